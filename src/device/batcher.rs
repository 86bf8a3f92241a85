//! Puts waiting jobs together into one batch: small rankings and inferences of one ranker, which cost a device less together.
//!
//! On the CPU nothing is waited for, and only what is small is put together: above some tens of rows a ranker gains nothing by
//! company, and the other workers want work, too.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Job, Task};

/// How jobs are put together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchLimits {
    /// Jobs of a batch, 1 to 64.
    pub max_batch_size: usize,
    /// How long the first job may wait for others, at most 10 ms; zero: only what waits already is taken along.
    pub max_wait: Duration,
    /// What may be in one batch.
    pub company: Company,
}

/// What may be in one batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Company {
    /// Whatever waits.
    Any,
    /// Rankings or inferences of fewer rows than this each, that ask the same ranker for the same; anything else goes alone.
    Alike {
        /// Rows of one job.
        below_rows: usize,
    },
}

impl BatchLimits {
    /// For the CPU engine.
    pub const CPU: BatchLimits =
        BatchLimits { max_batch_size: 64, max_wait: Duration::ZERO, company: Company::Alike { below_rows: 32 } };

    /// Whether a job may share a batch.
    fn shares(&self, job: &Job) -> bool {
        let Company::Alike { below_rows } = self.company else { return true };
        let n = match &job.task {
            Task::Rank { rows, .. } => rows.len(),
            Task::Infer { n, .. } => *n as usize,
            Task::Recommend { .. } | Task::Search { .. } => return false,
        };
        n < below_rows
    }

    /// Whether a job may be in the batch of another one that shares.
    fn joins(&self, first: &Job, job: &Job) -> bool {
        self.company == Company::Any || self.shares(job) && alike(first, job)
    }
}

/// Whether two jobs ask the same ranker of the same generation for the same.
pub fn alike(a: &Job, b: &Job) -> bool {
    let asked = match (&a.task, &b.task) {
        (Task::Rank { ranker: a, .. }, Task::Rank { ranker: b, .. }) => a == b,
        (Task::Infer { ranker: a, .. }, Task::Infer { ranker: b, .. }) => a == b,
        _ => false,
    };
    asked && Arc::ptr_eq(&a.generation, &b.generation)
}

/// Where jobs and the time come from.
pub trait Source {
    /// A job that waits.
    fn try_pop(&mut self) -> Option<Box<Job>>;
    /// The present.
    fn now(&mut self) -> Instant;
    /// Lets a little time pass, not beyond `until`.
    fn pause(&mut self, until: Instant);
}

/// Forms batches for one worker.
pub struct Batcher {
    limits: BatchLimits,
    /// Taken from the queue, but not for the last batch.
    held: Option<Box<Job>>,
}

impl Batcher {
    /// With nothing held.
    pub fn new(limits: BatchLimits) -> Self {
        Batcher { limits, held: None }
    }

    /// A job that the last batch left over; it comes before those of the queue.
    pub fn held(&mut self) -> Option<Box<Job>> {
        self.held.take()
    }

    /// Fills the empty `batch` from `first` on. Jobs whose time is up go to `late` instead. A job is waited for neither beyond
    /// the deadline of one that is in the batch nor beyond `max_wait` after the first.
    pub fn fill(
        &mut self,
        first: Box<Job>,
        source: &mut dyn Source,
        batch: &mut Vec<Box<Job>>,
        late: &mut dyn FnMut(Box<Job>),
    ) {
        let mut until = source.now() + self.limits.max_wait;
        let mut next = Some(first);
        loop {
            let Some(job) = next.take().or_else(|| source.try_pop()) else {
                if batch.is_empty() || source.now() >= until {
                    break;
                }
                source.pause(until);
                continue;
            };
            if job.deadline.passed(source.now()) {
                late(job);
                continue;
            }
            if batch.first().is_some_and(|first| !self.limits.joins(first, &job)) {
                self.held = Some(job);
                break;
            }
            until = until.min(job.deadline.0);
            batch.push(job);
            if batch.len() >= self.limits.max_batch_size || !self.limits.shares(&batch[0]) {
                break;
            }
        }
        // Whose time went by while others were waited for.
        let now = source.now();
        while let Some(at) = batch.iter().position(|job| job.deadline.passed(now)) {
            late(batch.remove(at));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::Ticket;
    use crate::catalog::generation::{Generation, testing};
    use crate::context::Deadline;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    /// Jobs that arrive at given times, and a clock that only a pause or a job moves.
    struct Simulated {
        now: Instant,
        arrivals: VecDeque<(Instant, Box<Job>)>,
        step: Duration,
    }

    impl Source for Simulated {
        fn try_pop(&mut self) -> Option<Box<Job>> {
            let due = self.arrivals.front().is_some_and(|(at, _)| *at <= self.now);
            due.then(|| self.arrivals.pop_front()).flatten().map(|(_, job)| job)
        }

        fn now(&mut self) -> Instant {
            self.now
        }

        fn pause(&mut self, until: Instant) {
            self.now = (self.now + self.step).min(until);
        }
    }

    #[derive(Clone, Debug)]
    struct Planned {
        at_us: u64,
        budget_us: u64,
        rows: u32,
        ranker: u16,
        kind: u8,
    }

    fn job(ticket: usize, planned: &Planned, start: Instant, generation: &Arc<Generation>) -> (Instant, Box<Job>) {
        let mut job = Box::new(Job::new(generation.clone()));
        let at = start + Duration::from_micros(planned.at_us);
        job.ticket = Ticket(ticket as u64);
        job.deadline = Deadline(at + Duration::from_micros(planned.budget_us));
        job.task = match planned.kind {
            0 => Task::Infer { ranker: planned.ranker, n: planned.rows, inputs: Vec::new() },
            1 => Task::Rank { rows: vec![0; planned.rows as usize], ranker: planned.ranker },
            _ => Task::Recommend { top_m: 10, explain: false },
        };
        (at, job)
    }

    fn plans() -> impl Strategy<Value = Vec<Planned>> {
        let one = (0u64..30_000, 1u64..20_000, prop_oneof![1u32..40, Just(900)], 0u16..2, 0u8..3);
        let one =
            one.prop_map(|(at_us, budget_us, rows, ranker, kind)| Planned { at_us, budget_us, rows, ranker, kind });
        prop::collection::vec(one, 1..120).prop_map(|mut all| {
            all.sort_by_key(|planned| planned.at_us);
            all
        })
    }

    proptest! {
        #[test]
        fn every_job_comes_out_once_in_time_and_among_its_like(
            plans in plans(), max_batch_size in 1usize..65, wait_ms in 0u64..11, cost_us in 0u64..3000, step_us in 1u64..700,
        ) {
            let company = Company::Alike { below_rows: 32 };
            let limits = BatchLimits { max_batch_size, max_wait: Duration::from_millis(wait_ms), company };
            let generation = Arc::new(testing::plain(1));
            let start = Instant::now();
            let jobs = plans.iter().enumerate().map(|(ticket, planned)| job(ticket, planned, start, &generation));
            let mut source =
                Simulated { now: start, arrivals: jobs.collect(), step: Duration::from_micros(step_us) };
            let (mut batcher, mut batch, mut out) = (Batcher::new(limits), Vec::new(), Vec::new());
            loop {
                let first = match batcher.held().or_else(|| source.try_pop()) {
                    Some(first) => first,
                    None if source.arrivals.is_empty() => break,
                    None => {
                        source.now = source.arrivals[0].0.max(source.now);
                        continue;
                    }
                };
                let (began, mut late) = (source.now, Vec::new());
                batcher.fill(first, &mut source, &mut batch, &mut |job| late.push(job));
                for job in &late {
                    prop_assert!(job.deadline.passed(source.now), "shed though there was time");
                }
                prop_assert!(batch.len() <= max_batch_size);
                prop_assert!(source.now - began <= limits.max_wait, "waited {:?}", source.now - began);
                if wait_ms == 0 {
                    prop_assert_eq!(source.now, began, "nothing is waited for");
                }
                for job in &batch {
                    prop_assert!(!job.deadline.passed(source.now), "computed though late");
                    prop_assert!(batch.len() == 1 || limits.shares(job) && alike(&batch[0], job));
                }
                out.extend(late.iter().chain(&batch).map(|job| job.ticket.0));
                if !batch.is_empty() {
                    source.now += Duration::from_micros(cost_us);
                }
                batch.clear();
            }
            prop_assert!(batcher.held.is_none());
            out.sort_unstable();
            prop_assert_eq!(out, (0..plans.len() as u64).collect::<Vec<_>>());
        }
    }

    #[test]
    fn what_waits_is_taken_along_and_what_differs_is_next() {
        let generation = Arc::new(testing::plain(1));
        let start = Instant::now();
        let infer = Planned { at_us: 0, budget_us: 1000, rows: 4, ranker: 0, kind: 0 };
        let plans = [infer.clone(), infer.clone(), infer.clone(), Planned { rows: 900, ..infer.clone() }, infer];
        let arrivals = plans.iter().enumerate().map(|(ticket, p)| job(ticket, p, start, &generation)).collect();
        let mut source = Simulated { now: start, arrivals, step: Duration::from_micros(1) };
        let (mut batcher, mut sizes, mut batch) = (Batcher::new(BatchLimits::CPU), Vec::new(), Vec::new());
        while let Some(first) = batcher.held().or_else(|| source.try_pop()) {
            batcher.fill(first, &mut source, &mut batch, &mut |_| panic!("nothing is late"));
            sizes.push(batch.drain(..).map(|job| job.ticket.0).collect::<Vec<_>>());
        }
        assert_eq!(sizes, [vec![0, 1, 2], vec![3], vec![4]]);
    }
}
