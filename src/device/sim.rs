//! A device that computes nothing: scripted latency and faults, for tests and for measuring everything around a device.

use std::sync::Arc;
use std::time::{Duration, Instant};

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
}

/// Answers with the first items of the catalogue.
pub struct SimDevice {
    script: Script,
    batches: u64,
}

impl SimDevice {
    /// A device that follows `script`.
    pub fn new(script: Script) -> Self {
        SimDevice { script, batches: 0 }
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
