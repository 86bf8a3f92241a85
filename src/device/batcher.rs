//! Puts waiting jobs together into one batch: small rankings and inferences of one ranker, which cost a device less together.
//!
//! On the CPU nothing is waited for, and only what is small is put together: above some tens of rows a ranker gains nothing by
//! company, and the other workers want work, too.
//!
//! On a device that several workers share, a job is waited for where that costs nothing: while the device computes somebody else's batch, what
//! goes now would only stand behind it. A device that is idle is given at once what there is.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use super::{Job, Task};

/// How jobs are put together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchLimits {
    /// Jobs of a batch, 1 to 1,024.
    pub max_batch_size: usize,
    /// How long the first job may wait for others at most, at most 10 ms; zero: only what waits already is taken along.
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

/// How jobs come and go, as it was lately.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pace {
    /// From one job to the next; zero: not known.
    pub gap: Duration,
    /// Of a batch, on the device; zero: not known.
    pub cost: Duration,
}

impl BatchLimits {
    /// Until when a batch of `n` jobs, begun at `began`, is kept for more of them, which is the past where it is not. `deadline` is the first of
    /// theirs, and `busy` says how many other batches the device has.
    ///
    /// It is kept while the device is busy, for as long as a batch takes it at most: by then it is idle, or has too much to do for a
    /// wait to matter. It goes where as many jobs are together as come while one batch is computed, where none is expected in that time, and
    /// in time for the deadline.
    pub fn keep_until(&self, began: Instant, n: usize, deadline: Instant, pace: Pace, busy: usize) -> Instant {
        let Pace { gap, cost } = pace;
        let company = cost.as_secs_f64() / gap.as_secs_f64().max(1e-9);
        if busy == 0 || gap >= cost || n as f64 >= company {
            return began;
        }
        let in_time = deadline.checked_sub(2 * cost).unwrap_or(began);
        (began + cost.min(self.max_wait)).min(in_time)
    }
}

/// What the workers of a device know of each other.
#[derive(Debug)]
pub struct Load {
    busy: AtomicUsize,
    since: Instant,
    /// When a batch was put together last, nanoseconds since `since`.
    last: AtomicU64,
    gap: AtomicU64,
    cost: AtomicU64,
}

impl Default for Load {
    fn default() -> Self {
        let (last, gap, cost) = Default::default();
        Load { busy: AtomicUsize::new(0), since: Instant::now(), last, gap, cost }
    }
}

/// Moves an average by an eighth of what it is off; two at once may lose one of the moves.
fn follow(average: &AtomicU64, sample: u64) {
    let old = average.load(Relaxed);
    let new = if old == 0 { sample } else { old - old / 8 + sample / 8 };
    average.store(new.max(1), Relaxed);
}

impl Load {
    /// As it was lately.
    pub fn pace(&self) -> Pace {
        let of = |average: &AtomicU64| Duration::from_nanos(average.load(Relaxed));
        Pace { gap: of(&self.gap), cost: of(&self.cost) }
    }

    /// Batches that are computed.
    pub fn busy(&self) -> usize {
        self.busy.load(Relaxed)
    }

    /// A batch of `n` begins to be computed.
    pub fn begin(&self, n: usize) {
        let now = self.since.elapsed().as_nanos() as u64;
        let last = self.last.swap(now, Relaxed);
        follow(&self.gap, now.saturating_sub(last) / n.max(1) as u64);
        self.busy.fetch_add(1, Relaxed);
    }

    /// One is done, after so long.
    pub fn end(&self, spent: Duration) {
        self.busy.fetch_sub(1, Relaxed);
        follow(&self.cost, spent.as_nanos() as u64);
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
    /// How jobs come and go, and how many batches of other workers the device has.
    fn load(&mut self) -> (Pace, usize);
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

    /// Fills the empty `batch` from `first` on. Jobs whose time is up go to `late` instead. Others are waited for as
    /// [`BatchLimits::keep_until`] has it.
    pub fn fill(
        &mut self,
        first: Box<Job>,
        source: &mut dyn Source,
        batch: &mut Vec<Box<Job>>,
        late: &mut dyn FnMut(Box<Job>),
    ) {
        let began = source.now();
        let mut deadline = began + Duration::from_secs(3600);
        let mut next = Some(first);
        loop {
            let Some(job) = next.take().or_else(|| source.try_pop()) else {
                if batch.is_empty() || self.limits.max_wait.is_zero() {
                    break;
                }
                let (pace, busy) = source.load();
                let until = self.limits.keep_until(began, batch.len(), deadline, pace, busy);
                if source.now() >= until {
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
            deadline = deadline.min(job.deadline.0);
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
        load: (Pace, usize),
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

        fn load(&mut self) -> (Pace, usize) {
            self.load
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
            gap_us in 0u64..1000, busy in 0usize..3,
        ) {
            let company = Company::Alike { below_rows: 32 };
            let limits = BatchLimits { max_batch_size, max_wait: Duration::from_millis(wait_ms), company };
            let generation = Arc::new(testing::plain(1));
            let start = Instant::now();
            let jobs = plans.iter().enumerate().map(|(ticket, planned)| job(ticket, planned, start, &generation));
            let pace = Pace { gap: Duration::from_micros(gap_us), cost: Duration::from_micros(cost_us) };
            let step = Duration::from_micros(step_us);
            let mut source = Simulated { now: start, arrivals: jobs.collect(), step, load: (pace, busy) };
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
                if wait_ms == 0 || busy == 0 {
                    prop_assert_eq!(source.now, began, "nothing is waited for");
                }
                prop_assert!(source.now - began <= pace.cost, "waited {:?}", source.now - began);
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
        let mut source = Simulated { now: start, arrivals, step: Duration::from_micros(1), load: (Pace::default(), 0) };
        let (mut batcher, mut sizes, mut batch) = (Batcher::new(BatchLimits::CPU), Vec::new(), Vec::new());
        while let Some(first) = batcher.held().or_else(|| source.try_pop()) {
            batcher.fill(first, &mut source, &mut batch, &mut |_| panic!("nothing is late"));
            sizes.push(batch.drain(..).map(|job| job.ticket.0).collect::<Vec<_>>());
        }
        assert_eq!(sizes, [vec![0, 1, 2], vec![3], vec![4]]);
    }

    /// When a batch goes that cannot be full yet.
    #[derive(Clone, Copy, Debug)]
    enum Waits {
        /// By [`BatchLimits::keep_until`].
        Adapted,
        /// So long after its first job.
        Fixed(Duration),
    }

    /// A device that computes one batch after the other, each in 300 µs and 10 µs a job, for three workers. What came of jobs that arrive at
    /// random: the mean of their latencies, µs, and of the sizes of batches.
    fn simulate(rate: f64, waits: Waits, seed: u64) -> (f64, f64) {
        const STEP: Duration = Duration::from_micros(20);
        let limits = BatchLimits { max_batch_size: 64, max_wait: Duration::from_millis(10), company: Company::Any };
        let (mut noise, start) = (crate::testing::noise(seed), Instant::now());
        let mut gap = move || Duration::from_secs_f64(-f64::from((noise() + 0.5).max(1e-6)).ln() / rate);
        let (mut now, mut next, mut free_at) = (start, start + gap(), start);
        let mut queue: VecDeque<Instant> = VecDeque::new();
        // By worker: what it has, when it began, and when the device is done with it.
        let mut workers: [(Vec<Instant>, Instant, Option<Instant>); 3] = [(); 3].map(|()| (Vec::new(), start, None));
        let (mut latency, mut n_jobs, mut n_batches, mut last) = (Duration::ZERO, 0u32, 0u32, start);
        // As `Load` follows them, under this clock.
        let (mut pace_gap, mut pace_cost) = (0.0f64, 0.0f64);
        while now < start + Duration::from_secs(4) {
            while next <= now {
                queue.push_back(next);
                next += gap();
            }
            for at in 0..workers.len() {
                let busy = workers.iter().enumerate().filter(|(other, w)| *other != at && w.2.is_some()).count();
                let (batch, began, done) = &mut workers[at];
                if let Some(when) = *done {
                    if when > now {
                        continue;
                    }
                    latency += batch.iter().map(|arrived| when - *arrived).sum::<Duration>();
                    (n_jobs, n_batches) = (n_jobs + batch.len() as u32, n_batches + 1);
                    pace_cost += ((when - *began).as_secs_f64() - pace_cost) / 8.0;
                    batch.clear();
                    *done = None;
                }
                if batch.is_empty() {
                    *began = now;
                }
                while batch.len() < limits.max_batch_size
                    && let Some(job) = queue.pop_front()
                {
                    batch.push(job);
                }
                if batch.is_empty() {
                    continue;
                }
                let pace = Pace { gap: Duration::from_secs_f64(pace_gap), cost: Duration::from_secs_f64(pace_cost) };
                let until = match waits {
                    Waits::Adapted => limits.keep_until(*began, batch.len(), now + Duration::from_secs(1), pace, busy),
                    Waits::Fixed(wait) => *began + wait,
                };
                if batch.len() == limits.max_batch_size || until <= now {
                    let cost = Duration::from_micros(300 + 10 * batch.len() as u64);
                    pace_gap += ((now - last).as_secs_f64() / batch.len() as f64 - pace_gap) / 8.0;
                    (last, *began) = (now, now);
                    free_at = free_at.max(now) + cost;
                    *done = Some(free_at);
                }
            }
            now += STEP;
        }
        (latency.as_secs_f64() * 1e6 / f64::from(n_jobs.max(1)), f64::from(n_jobs) / f64::from(n_batches.max(1)))
    }

    #[test]
    fn waiting_is_adapted_to_what_comes() {
        let mut lines = Vec::new();
        for rate in [100.0, 1000.0, 3000.0, 10_000.0, 30_000.0] {
            let [adapted, at_once, fixed] =
                [Waits::Adapted, Waits::Fixed(Duration::ZERO), Waits::Fixed(Duration::from_millis(10))]
                    .map(|waits| simulate(rate, waits, 5));
            lines.push(format!("{rate} a second: adapted {adapted:.0?}, at once {at_once:.0?}, 10 ms {fixed:.0?}"));
            // A tenth where little comes, and never more.
            let most = if rate <= 1000.0 { 0.1 } else { 1.0 };
            assert!(adapted.0 <= most * fixed.0, "{lines:#?}");
            assert!(adapted.0 <= 1.1 * at_once.0 && adapted.1 >= 0.95 * at_once.1, "{lines:#?}");
        }
        println!("{lines:#?}");
    }

    #[test]
    fn a_load_follows_what_comes() {
        let load = Load::default();
        load.begin(4);
        assert_eq!(load.busy(), 1);
        load.end(Duration::from_micros(800));
        assert_eq!((load.busy(), load.pace().cost), (0, Duration::from_micros(800)));
        (0..50).for_each(|_| {
            load.begin(1);
            load.end(Duration::from_micros(100));
        });
        let cost = load.pace().cost;
        assert!(cost < Duration::from_micros(110), "{cost:?}");
    }
}
