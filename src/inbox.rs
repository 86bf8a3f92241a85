//! A bounded queue to one thread that sleeps when there is nothing to do.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread::Thread;
use std::time::Duration;

use crossbeam_queue::ArrayQueue;

/// Many push, one thread takes.
#[derive(Debug)]
pub struct Inbox<T> {
    queue: ArrayQueue<T>,
    thread: OnceLock<Thread>,
    asleep: AtomicBool,
    closed: AtomicBool,
}

impl<T> Inbox<T> {
    /// For `capacity` entries, at least one.
    pub fn new(capacity: usize) -> Self {
        Inbox {
            queue: ArrayQueue::new(capacity.max(1)),
            thread: OnceLock::new(),
            asleep: AtomicBool::new(false),
            closed: AtomicBool::new(false),
        }
    }

    /// Hands an entry over and wakes the thread that takes; never blocks.
    ///
    /// # Errors
    /// The entry: the queue is full.
    pub fn push(&self, entry: T) -> Result<(), T> {
        self.queue.push(entry)?;
        self.wake();
        Ok(())
    }

    /// The next entry; for the thread that takes.
    pub fn pop(&self) -> Option<T> {
        self.queue.pop()
    }

    /// Makes the calling thread the one that is woken; its first act.
    pub fn attend(&self) {
        // Nobody else attends.
        let _ = self.thread.set(std::thread::current());
    }

    fn wake(&self) {
        // With the order of `sleep`: either this sees that it sleeps, or it sees what was pushed.
        if self.asleep.swap(false, SeqCst)
            && let Some(thread) = self.thread.get()
        {
            thread.unpark();
        }
    }

    /// Sleeps until something comes, the inbox is closed, or the time is over.
    pub fn sleep(&self, at_most: Duration) {
        self.asleep.store(true, SeqCst);
        if self.queue.is_empty() && !self.closed() {
            std::thread::park_timeout(at_most);
        }
        self.asleep.store(false, SeqCst);
    }

    /// Tells the thread that takes to end once nothing is left.
    pub fn close(&self) {
        self.closed.store(true, SeqCst);
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }

    /// Whether [`Self::close`] was called.
    pub fn closed(&self) -> bool {
        self.closed.load(SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::time::Instant;

    #[test]
    fn everything_arrives_and_nobody_oversleeps() {
        let inbox = Arc::new(Inbox::new(4));
        let taker = std::thread::spawn({
            let inbox = inbox.clone();
            move || {
                inbox.attend();
                let mut sum = 0u64;
                loop {
                    match inbox.pop() {
                        Some(entry) => sum += entry,
                        None if inbox.closed() => return sum,
                        None => inbox.sleep(Duration::from_secs(20)),
                    }
                }
            }
        });
        let start = Instant::now();
        for entry in 1..=2000u64 {
            let mut entry = entry;
            while let Err(back) = inbox.push(entry) {
                entry = back;
                std::thread::yield_now();
            }
            if entry.is_multiple_of(100) {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        inbox.close();
        assert_eq!(taker.join().unwrap(), 2000 * 2001 / 2);
        assert!(start.elapsed() < Duration::from_secs(10));
    }
}
