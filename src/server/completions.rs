//! Foreign thread → shard: the only bridge. A bounded queue and an eventfd that is written only when the shard sleeps.
#![allow(unsafe_code)] // Creating eventfds.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::FromRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

use crossbeam_queue::ArrayQueue;

use crate::api::{Slate, Ticket};
use crate::cache::key::CacheKey;
use crate::device::Job;
use crate::error::Error;
use crate::store::Learned;

/// What comes to a shard from outside.
pub enum Completion {
    /// A job of this shard, done.
    Job(Box<Job>),
    /// A call of this shard waited for an identical one, which is answered.
    Shared {
        /// The shard's own name for the call.
        ticket: Ticket,
        /// The answer; or why there is none, nor would be for this one.
        result: Result<Arc<Slate>, Error>,
    },
    /// A call of this shard waited for an identical one, which failed by itself: now it leads.
    Lead {
        /// The shard's own name for the call.
        ticket: Ticket,
        /// What it leads.
        key: CacheKey,
    },
    /// The feature store has looked for the user of a call of this shard.
    Known {
        /// The shard's own name for the call.
        ticket: Ticket,
        /// What it has; `None`: it did not answer.
        learned: Option<Learned>,
    },
    /// The second level of the cache has looked.
    Found {
        /// The shard's own name for the call.
        ticket: Ticket,
        /// What it has; `None`: nothing.
        value: Option<Vec<u8>>,
    },
    /// Events of a call of this shard are logged, or not.
    Received {
        /// The shard's own name for the call.
        ticket: Ticket,
        /// The answer.
        result: crate::state::writer::Result,
    },
}

fn eventfd(flags: libc::c_int) -> io::Result<File> {
    // SAFETY: a plain system call.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was made just now and belongs to nobody else; the File closes it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// One shard's inbox.
pub struct Completions {
    queue: ArrayQueue<Completion>,
    event: File,
    /// A semaphore: each unit ends one of the reads that the shard has standing.
    kick: File,
    armed: AtomicBool,
    /// Grows with every turn of the shard's loop; the watchdog looks at it.
    progress: AtomicU64,
}

impl Completions {
    /// `capacity` must be at least the calls that the shard may have in flight: each has at most one completion under way.
    ///
    /// # Errors
    /// No eventfd could be made.
    pub fn new(capacity: usize) -> io::Result<Self> {
        let (event, kick) = (eventfd(0)?, eventfd(libc::EFD_SEMAPHORE)?);
        Ok(Completions {
            queue: ArrayQueue::new(capacity),
            event,
            kick,
            // Until its first turn the shard is as good as asleep.
            armed: AtomicBool::new(true),
            progress: AtomicU64::new(0),
        })
    }

    /// Hands a completion over. Waits, yielding, only if the capacity promise of [`Self::new`] was broken.
    pub fn push(&self, completion: Completion) {
        let mut completion = completion;
        while let Err(back) = self.queue.push(completion) {
            completion = back;
            self.wake();
            std::thread::yield_now();
        }
        // Pairs with the fence in `arm`: either this sees `armed`, or the shard sees the completion.
        fence(Ordering::SeqCst);
        if self.armed.load(Ordering::Relaxed) && self.armed.swap(false, Ordering::AcqRel) {
            self.wake();
        }
    }

    /// The next completion; for the shard alone.
    pub fn pop(&self) -> Option<Completion> {
        self.queue.pop()
    }

    /// Whether completions wait.
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Announces that the shard is about to sleep. False: something came meanwhile, do not.
    pub fn arm(&self) -> bool {
        self.armed.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.queue.is_empty()
    }

    /// Whether the shard sleeps of its own accord.
    pub fn armed(&self) -> bool {
        self.armed.load(Ordering::Relaxed)
    }

    /// The shard is awake.
    pub fn disarm(&self) {
        self.armed.store(false, Ordering::Relaxed);
    }

    /// Makes the eventfd readable, whatever the shard does.
    pub fn wake(&self) {
        // It neither blocks nor fails short of 2^64 unread kicks.
        let _ = (&self.event).write(&1u64.to_ne_bytes());
    }

    /// Ends one wrong park of the shard's executor; see `watchdog`.
    pub fn kick(&self) {
        // As above.
        let _ = (&self.kick).write(&1u64.to_ne_bytes());
    }

    /// What [`Self::wake`] writes to, for the shard's rings.
    pub fn event(&self) -> &File {
        &self.event
    }

    /// What [`Self::kick`] writes to.
    pub fn kicks(&self) -> &File {
        &self.kick
    }

    /// Counts a turn of the shard's loop.
    pub fn progressed(&self) {
        self.progress.fetch_add(1, Ordering::Relaxed);
    }

    /// Turns so far.
    pub fn progress(&self) -> u64 {
        self.progress.load(Ordering::Relaxed)
    }
}
