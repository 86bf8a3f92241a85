//! Whether a partition is asked: one that was in trouble is left alone for a while, longer each time.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};
use std::time::{Duration, Instant};

/// After the first trouble; twice as long after each that follows.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// What can be wrong with a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// Its search panicked.
    Failed,
    /// It did not answer in time.
    Late,
}

/// What a partition's record says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// Nothing was wrong with it the last time that it was asked.
    pub is_up: bool,
    /// Searches that panicked.
    pub failures: u64,
    /// Searches that were late through its own fault.
    pub latenesses: u64,
}

#[derive(Debug)]
pub struct Health {
    made: Instant,
    /// Troubles since the last answer.
    in_a_row: AtomicU32,
    was_late: AtomicBool,
    /// Searches that nobody waits for any more and that have not returned.
    hanging: AtomicU32,
    /// Milliseconds since `made`.
    retry_at: AtomicU64,
    failures: AtomicU64,
    latenesses: AtomicU64,
}

impl Default for Health {
    fn default() -> Self {
        Health {
            made: Instant::now(),
            in_a_row: AtomicU32::new(0),
            was_late: AtomicBool::new(false),
            hanging: AtomicU32::new(0),
            retry_at: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            latenesses: AtomicU64::new(0),
        }
    }
}

fn pause(in_a_row: u32) -> u64 {
    let pause = FIRST_PAUSE * (1 << in_a_row.saturating_sub(1).min(10));
    pause.min(LONGEST_PAUSE).as_millis() as u64
}

impl Health {
    fn now(&self) -> u64 {
        self.made.elapsed().as_millis() as u64
    }

    /// Whether the partition may be asked; of several that ask when a pause is over, one may, and none while a search hangs in it.
    pub fn admits(&self) -> Result<(), Trouble> {
        let in_a_row = self.in_a_row.load(Relaxed);
        if in_a_row == 0 {
            return Ok(());
        }
        let (now, at) = (self.now(), self.retry_at.load(Relaxed));
        let next = now + pause(in_a_row);
        if now >= at
            && self.hanging.load(Relaxed) == 0
            && self.retry_at.compare_exchange(at, next, Relaxed, Relaxed).is_ok()
        {
            return Ok(());
        }
        Err(if self.was_late.load(Relaxed) { Trouble::Late } else { Trouble::Failed })
    }

    /// Partition `at` was in trouble.
    pub fn report(&self, at: u32, trouble: Trouble) {
        let is_late = trouble == Trouble::Late;
        if is_late { &self.latenesses } else { &self.failures }.fetch_add(1, Relaxed);
        self.was_late.store(is_late, Relaxed);
        let before = self.in_a_row.fetch_add(1, Relaxed);
        self.retry_at.store(self.now() + pause(before.saturating_add(1)), Relaxed);
        if before == 0 {
            let reason = if is_late { "late" } else { "panicked" };
            tracing::warn!(
                partition = at,
                reason,
                "a partition of the index is left out; it is tried again now and then"
            );
        }
    }

    /// A search is given up, though it goes on.
    pub fn hangs(&self) {
        self.hanging.fetch_add(1, Relaxed);
    }

    /// A search that was given up has returned.
    pub fn returned(&self) {
        self.hanging.fetch_sub(1, Relaxed);
    }

    /// Partition `at` answered.
    pub fn answered(&self, at: u32) {
        // Mostly it is 0 already, and then its cache line stays shared.
        if self.in_a_row.load(Relaxed) > 0 && self.in_a_row.swap(0, Relaxed) > 0 {
            tracing::info!(partition = at, "a partition of the index answers again");
        }
    }

    pub fn state(&self) -> State {
        State {
            is_up: self.in_a_row.load(Relaxed) == 0,
            failures: self.failures.load(Relaxed),
            latenesses: self.latenesses.load(Relaxed),
        }
    }
}
