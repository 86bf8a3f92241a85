//! A device that computes nothing: scripted latency and faults, for tests and for measuring everything around a device.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};

use super::{Device, DeviceError, Job, RankedItem, Task};
use crate::catalog::generation::Generation;

/// What the device does.
#[derive(Clone, Copy, Debug, Default)]
pub struct Script {
    /// Busy for this long per job.
    pub latency: Duration,
    /// Every n-th batch fails; 0: none.
    pub fail_every: u64,
    /// Every n-th batch panics; 0: none.
    pub panic_every: u64,
    /// What goes wrong at random.
    pub faults: Faults,
}

/// Faults at random, the same for the same seed: of a thousand batches so many fail, each in its own way.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// Decides which.
    pub seed: u64,
    /// Return an error.
    pub fail: u32,
    /// Panic.
    pub panic: u32,
    /// Take [`Faults::hang_for`], and then are answered after all.
    pub hang: u32,
    /// Are too large for the memory that is left.
    pub out_of_memory: u32,
    /// How long a batch hangs.
    pub hang_for: Duration,
    /// Batches of more jobs are too large for the memory; 0: none is.
    pub most_jobs: usize,
}

/// Answers with the first items of the catalogue.
pub struct SimDevice {
    script: Script,
    batches: u64,
    random: SmallRng,
}

impl SimDevice {
    /// A device that follows `script`.
    pub fn new(script: Script) -> Self {
        SimDevice { script, batches: 0, random: SmallRng::seed_from_u64(script.faults.seed) }
    }

    /// What goes wrong with a batch of `n`, if it does.
    fn fault(&mut self, n: usize) -> Result<(), DeviceError> {
        let Faults { fail, panic, hang, out_of_memory, hang_for, most_jobs, .. } = self.script.faults;
        let drawn = self.random.random_range(0..1000);
        let up_to = |before: u32, more: u32| (before..before + more).contains(&drawn);
        assert!(!up_to(fail, panic), "scripted panic");
        if up_to(0, fail) {
            return Err(DeviceError::Failed("scripted".into()));
        }
        if up_to(fail + panic + hang, out_of_memory) || most_jobs > 0 && n > most_jobs {
            return Err(DeviceError::OutOfMemory);
        }
        if up_to(fail + panic, hang) {
            std::thread::sleep(hang_for);
        }
        Ok(())
    }
}

impl Device for SimDevice {
    fn name(&self) -> &str {
        "sim"
    }

    fn load(&mut self, _: &Arc<Generation>) -> Result<(), DeviceError> {
        Ok(())
    }

    fn execute(&mut self, batch: &mut [Box<Job>]) -> Result<(), DeviceError> {
        self.batches += 1;
        let due = |every: u64| every > 0 && self.batches.is_multiple_of(every);
        if due(self.script.fail_every) {
            return Err(DeviceError::Failed("scripted".into()));
        }
        assert!(!due(self.script.panic_every), "scripted panic");
        self.fault(batch.len())?;
        for job in batch {
            let until = Instant::now() + self.script.latency;
            while Instant::now() < until {
                std::hint::spin_loop();
            }
            let (n, n_queries) = match &job.task {
                Task::Recommend { top_m, .. } => (*top_m as usize, None),
                Task::Search { k, n_queries } => (*k as usize, *n_queries),
                Task::Rank { rows, .. } => (rows.len(), None),
                Task::Infer { n, .. } => {
                    job.ranked.scores.resize(*n as usize, 0.5);
                    (0, None)
                }
            };
            let n = n.min(job.generation.items.len());
            let item = |row: u32| RankedItem { row, score: 1.0 / (1.0 + row as f32), sources: Default::default() };
            for _ in 0..n_queries.unwrap_or(1) {
                job.ranked.items.extend((0..n as u32).map(item));
            }
            job.ranked.result_lengths.resize(n_queries.unwrap_or(0) as usize, n as u32);
            job.ranked.n_candidates = n as u32;
        }
        Ok(())
    }
}
