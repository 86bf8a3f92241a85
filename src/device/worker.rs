//! A thread that owns a device: pops jobs, executes them, returns each to its shard.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::batcher::{BatchLimits, Batcher, Load, Pace, Source};
use super::ring::JobQueue;
use super::{Device, Job};
use crate::context::Stage;
use crate::error::{Code, Error};

/// How long a worker that waits for company sleeps before it looks again.
const PAUSE: Duration = Duration::from_micros(50);

/// Takes finished jobs back to the shards that made them.
pub trait JobSink: Send + Sync {
    /// Returns one job; never blocks for long and never loses it.
    fn deliver(&self, job: Box<Job>);
}

/// The queue and the clock.
struct Live<'q>(&'q JobQueue, &'q Load);

impl Source for Live<'_> {
    fn try_pop(&mut self) -> Option<Box<Job>> {
        self.0.try_pop()
    }

    fn load(&mut self) -> (Pace, usize) {
        (self.1.pace(), self.1.busy())
    }

    fn now(&mut self) -> Instant {
        Instant::now()
    }

    fn pause(&mut self, until: Instant) {
        std::thread::sleep(until.saturating_duration_since(Instant::now()).min(PAUSE));
    }
}

/// Works until the queue is closed and empty. Every job that is popped is delivered exactly once: executed, expired, or
/// failed. `limits` say which jobs are executed together, `load` is that of all workers of the device.
pub fn run(
    device: &mut dyn Device,
    queue: &JobQueue,
    worker: usize,
    limits: BatchLimits,
    load: &Load,
    sink: &Arc<dyn JobSink>,
) {
    let mut batch: Vec<Box<Job>> = Vec::with_capacity(limits.max_batch_size);
    let (mut batcher, mut source) = (Batcher::new(limits), Live(queue, load));
    while let Some(first) = batcher.held().or_else(|| queue.pop(worker)) {
        batcher.fill(first, &mut source, &mut batch, &mut |mut job| {
            job.timings.lap(Stage::Queue, job.enqueued);
            job.failure = Some(Error::fixed(Code::DeadlineExceeded, "the deadline passed before the work began"));
            sink.deliver(job);
        });
        if batch.is_empty() {
            continue;
        }
        for job in &mut batch {
            job.timings.lap(Stage::Queue, job.enqueued);
        }
        batch[0].ranked.batch_size = batch.len() as u16;
        let clock = Instant::now();
        load.begin(batch.len());
        let done = catch_unwind(AssertUnwindSafe(|| device.execute(&mut batch)));
        load.end(clock.elapsed());
        let failure = match done {
            Ok(Ok(())) => None,
            Ok(Err(error)) => {
                tracing::error!(device = device.name(), %error, "device failed");
                Some(Error::fixed(Code::Unavailable, "the device failed"))
            }
            Err(_) => {
                tracing::error!(device = device.name(), "device panicked");
                Some(Error::fixed(Code::Internal, "the request could not be computed"))
            }
        };
        for mut job in batch.drain(..) {
            if let Some(failure) = &failure {
                job.ranked.clear();
                job.failure = Some(failure.clone());
            }
            sink.deliver(job);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::Ticket;
    use crate::catalog::generation::testing;
    use crate::context::Deadline;
    use crate::device::batcher::Company;
    use crate::device::sim::{Script, SimDevice};
    use parking_lot::Mutex;

    #[derive(Default)]
    struct Collected(Mutex<Vec<(u64, Option<Code>)>>);

    impl JobSink for Collected {
        fn deliver(&self, job: Box<Job>) {
            self.0.lock().push((job.ticket.0, job.failure.as_ref().map(|f| f.code)));
        }
    }

    fn outcomes(script: Script, late: u64) -> Vec<(u64, Option<Code>)> {
        let generation = Arc::new(testing::plain(3));
        let queue = JobQueue::new(64, 1);
        for ticket in 0..40 {
            let mut job = Box::new(Job::new(generation.clone()));
            job.ticket = Ticket(ticket);
            let budget = if ticket == late { Duration::ZERO } else { Duration::from_secs(60) };
            job.deadline = Deadline::after(budget);
            assert!(queue.push(job).is_ok());
        }
        queue.close();
        let collected = Arc::new(Collected::default());
        let sink: Arc<dyn JobSink> = collected.clone();
        let limits = BatchLimits { max_batch_size: 4, max_wait: Duration::ZERO, company: Company::Any };
        run(&mut SimDevice::new(script), &queue, 0, limits, &Load::default(), &sink);
        let mut all = std::mem::take(&mut *collected.0.lock());
        all.sort_by_key(|o| o.0);
        all
    }

    #[test]
    fn late_jobs_expire_and_all_others_are_answered() {
        let all = outcomes(Script::default(), 7);
        assert_eq!(all.len(), 40);
        for (ticket, code) in all {
            assert_eq!(code, (ticket == 7).then_some(Code::DeadlineExceeded), "{ticket}");
        }
    }

    #[test]
    fn failures_and_panics_lose_nothing() {
        for script in [Script { fail_every: 3, ..Script::default() }, Script { panic_every: 2, ..Script::default() }] {
            let all = outcomes(script, u64::MAX);
            assert_eq!(all.iter().map(|o| o.0).collect::<Vec<_>>(), (0..40).collect::<Vec<_>>());
            assert!(all.iter().any(|o| o.1.is_some()) && all.iter().any(|o| o.1.is_none()));
        }
    }
}
