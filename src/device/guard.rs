//! Stands between a worker and a device that may fail, hang or run out of memory, and has the CPU engine do what the device does not.
//!
//! The device has a thread of its own and computes copies of the jobs: what a hung device holds is never needed again. A device that fails,
//! panics, or does not answer within [`Options::patience`] is fenced: nothing is asked of it any more. After a pause a device is made anew,
//! beside the traffic, and takes over when it has loaded the generation. Whatever the CPU computes instead is flagged as degraded.
#![expect(clippy::vec_box, reason = "a device executes boxes, which go from thread to thread")]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, sync_channel};
use std::time::{Duration, Instant};

use super::{Counters, Device, DeviceError, Job};
use crate::catalog::generation::Generation;
use crate::context::{Degradation, Reason, Stage};

/// Makes a device, also anew after one was fenced: fails where a probe of it does. Called on the thread that the device is to live on.
pub type Make = Arc<dyn Fn() -> Result<Box<dyn Device>, DeviceError> + Send + Sync>;

/// How long a guard waits.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// A device that has not answered a batch for so long hangs. Default 500 ms.
    pub patience: Duration,
    /// Making a device and loading a generation may take so long. Default 2 min.
    pub load_patience: Duration,
    /// From fencing to the first try to bring a device back; doubles with each that fails. Default 1 s.
    pub pause: Duration,
    /// The longest of these pauses. Default 1 min.
    pub longest_pause: Duration,
    /// Threads of hung devices that may be left behind; with more of them, no device is made. Default 4.
    pub most_hung: usize,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            patience: Duration::from_millis(500),
            load_patience: Duration::from_secs(120),
            pause: Duration::from_secs(1),
            longest_pause: Duration::from_secs(60),
            most_hung: 4,
        }
    }
}

/// What a device's thread is told.
enum Order {
    Load(Arc<Generation>),
    Execute(Vec<Box<Job>>),
}

/// What it answers: the jobs back, and how it went.
struct Answer {
    batch: Vec<Box<Job>>,
    result: Result<(), DeviceError>,
}

/// A device on a thread of its own. Dropping it ends the thread, as soon as the device comes back from what it does.
struct Side {
    name: String,
    orders: SyncSender<Order>,
    answers: Receiver<Answer>,
}

enum State {
    /// Waits for work.
    Up(Side),
    /// Still at a batch that the CPU has taken over.
    Busy(Side, Instant),
    /// Being made, since then; the pause that comes if it fails.
    Coming(Receiver<Result<Side, DeviceError>>, Instant, Duration),
    /// Fenced until then; the pause that comes if the next try fails.
    Down(Instant, Duration),
}

/// How a batch went.
enum Outcome {
    Done,
    OutOfMemory,
    /// The CPU is to do it, and why.
    Moved(Reason),
}

/// A [`Device`] of two: one that may fail, and one that does not.
pub struct Guard<'a> {
    name: String,
    options: Options,
    make: Make,
    fallback: &'a mut dyn Device,
    state: State,
    generation: Option<Arc<Generation>>,
    /// Threads of devices, those of hung ones among them.
    threads: Arc<AtomicUsize>,
    /// For the next copies.
    spare: Vec<Box<Job>>,
    counters: Arc<Counters>,
}

impl<'a> Guard<'a> {
    /// A guard whose device is made when a generation is loaded. `counters`, which several may share, say what becomes of the jobs, and
    /// have the device's name.
    pub fn new(counters: &Arc<Counters>, make: Make, fallback: &'a mut dyn Device, options: Options) -> Self {
        Guard {
            name: counters.device.clone(),
            options,
            make,
            fallback,
            state: State::Down(Instant::now(), options.pause),
            generation: None,
            threads: Arc::default(),
            spare: Vec::new(),
            counters: counters.clone(),
        }
    }

    fn set(&mut self, state: State) {
        let works = |state: &State| u64::from(matches!(state, State::Up(_) | State::Busy(..)));
        // Up and down by one each; together the number of those that work.
        self.counters.up.fetch_add(works(&state), Ordering::Relaxed);
        self.counters.up.fetch_sub(works(&self.state), Ordering::Relaxed);
        self.state = state;
    }

    /// Whether the next batch is the device's.
    pub fn is_up(&self) -> bool {
        matches!(self.state, State::Up(_))
    }

    /// Makes a device and loads the last generation, on a thread of its own.
    fn begin(&self) -> Receiver<Result<Side, DeviceError>> {
        let (ready, coming) = sync_channel(1);
        let (make, generation, name) = (self.make.clone(), self.generation.clone(), self.name.clone());
        let alive = Alive::new(&self.threads);
        let body = move || {
            let _alive = alive;
            let made = calmly(|| {
                let mut device = make()?;
                generation.map_or(Ok(()), |generation| device.load(&generation))?;
                Ok(device)
            });
            let ((orders, told), (answer, answers)) = (sync_channel(1), sync_channel(1));
            match made {
                Ok(device) => {
                    // Who asked may have given up; then nobody will give orders either.
                    let _ = ready.send(Ok(Side { name, orders, answers }));
                    serve(device, &told, &answer);
                }
                Err(error) => drop(ready.send(Err(error))),
            }
        };
        // Where no thread can be had, nobody answers, and that is a failure like another.
        if let Err(error) = std::thread::Builder::new().name(self.name.clone()).spawn(body) {
            tracing::warn!(device = self.name, %error, "no thread for the device");
        }
        coming
    }

    /// Nothing is asked of the device any more, until a new one is there.
    fn fence(&mut self, why: &str, pause: Duration) {
        tracing::error!(
            device = self.name,
            why,
            pause_ms = pause.as_millis() as u64,
            "device fenced: the CPU computes"
        );
        let next = (2 * pause).min(self.options.longest_pause);
        self.counters.fenced.fetch_add(1, Ordering::Relaxed);
        self.set(State::Down(Instant::now() + pause, next));
    }

    /// What can be known without waiting.
    fn look(&mut self, now: Instant) {
        match &mut self.state {
            State::Up(_) => {}
            State::Busy(side, since) => match side.answers.try_recv() {
                Ok(answer) => {
                    self.spare.extend(answer.batch);
                    match answer.result {
                        Err(error @ DeviceError::Failed(_)) => self.fence(&error.to_string(), self.options.pause),
                        _ => self.up(),
                    }
                }
                Err(TryRecvError::Empty) if now < *since + self.options.patience => {}
                Err(TryRecvError::Empty) => self.fence("it does not answer", self.options.pause),
                Err(TryRecvError::Disconnected) => self.fence("its thread ended", self.options.pause),
            },
            State::Coming(coming, since, pause) => match coming.try_recv() {
                Ok(Ok(side)) => {
                    tracing::info!(device = side.name, "device is back");
                    self.set(State::Up(side));
                }
                Ok(Err(error)) => {
                    let pause = *pause;
                    self.fence(&error.to_string(), pause);
                }
                Err(TryRecvError::Empty) if now < *since + self.options.load_patience => {}
                Err(_) => {
                    let pause = *pause;
                    self.fence("it does not come back", pause);
                }
            },
            State::Down(until, pause) => {
                let (due, pause) = (now >= *until, *pause);
                if due && self.threads.load(Ordering::Acquire) >= self.options.most_hung {
                    self.fence("too many of its threads hang", pause);
                } else if due {
                    self.set(State::Coming(self.begin(), now, pause));
                }
            }
        }
    }

    /// The device has answered what it was at.
    fn up(&mut self) {
        let down = State::Down(Instant::now(), self.options.pause);
        self.state = match std::mem::replace(&mut self.state, down) {
            State::Busy(side, _) => State::Up(side),
            other => other,
        };
    }

    /// Has the device compute copies of the jobs, and takes over what comes out.
    fn ask(&mut self, batch: &mut [Box<Job>]) -> Outcome {
        let now = Instant::now();
        self.look(now);
        let side = match &self.state {
            State::Up(side) => side,
            State::Busy(..) => return Outcome::Moved(Reason::Deadline),
            _ => return Outcome::Moved(Reason::Failed),
        };
        let mut copies = Vec::with_capacity(batch.len());
        for job in batch.iter() {
            let mut copy = self.spare.pop().unwrap_or_else(|| Box::new(Job::new(job.generation.clone())));
            copy.copy_question(job);
            copies.push(copy);
        }
        if side.orders.send(Order::Execute(copies)).is_err() {
            self.fence("its thread ended", self.options.pause);
            return Outcome::Moved(Reason::Failed);
        }
        // Half of the time that is left is the CPU's, should it come to that.
        let tightest = batch.iter().map(|job| job.deadline.0).min().unwrap_or(now);
        let early = tightest.saturating_duration_since(now) / 2;
        match side.answers.recv_timeout(early.min(self.options.patience)) {
            Ok(Answer { batch: mut copies, result }) => {
                let outcome = match result {
                    Ok(()) => {
                        batch.iter_mut().zip(copies.iter_mut()).for_each(|(job, copy)| job.take_answer(copy));
                        Outcome::Done
                    }
                    Err(DeviceError::OutOfMemory) => Outcome::OutOfMemory,
                    Err(error) => {
                        self.fence(&error.to_string(), self.options.pause);
                        Outcome::Moved(Reason::Failed)
                    }
                };
                self.spare.extend(copies);
                outcome
            }
            Err(RecvTimeoutError::Timeout) if early < self.options.patience => {
                let idle = State::Down(now, self.options.pause);
                if let State::Up(side) = std::mem::replace(&mut self.state, idle) {
                    self.state = State::Busy(side, now);
                }
                Outcome::Moved(Reason::Deadline)
            }
            Err(RecvTimeoutError::Timeout) => {
                self.fence("it does not answer", self.options.pause);
                Outcome::Moved(Reason::Failed)
            }
            Err(RecvTimeoutError::Disconnected) => {
                self.fence("its thread ended", self.options.pause);
                Outcome::Moved(Reason::Failed)
            }
        }
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        self.set(State::Down(Instant::now(), self.options.pause));
    }
}

impl Device for Guard<'_> {
    fn name(&self) -> &str {
        &self.name
    }

    /// Loads it on both. A device that is away loads it when it comes back.
    fn load(&mut self, generation: &Arc<Generation>) -> Result<(), DeviceError> {
        self.fallback.load(generation)?;
        let first = self.generation.replace(generation.clone()).is_none();
        self.look(Instant::now());
        if first && let State::Coming(coming, ..) = &self.state {
            let made = coming.recv_timeout(self.options.load_patience);
            let made = made.unwrap_or_else(|_| Err(DeviceError::Failed("it does not load".into())));
            self.set(State::Up(made?));
        } else if let State::Up(side) = &self.state {
            let sent = side.orders.send(Order::Load(generation.clone())).is_ok();
            let answer = sent.then(|| side.answers.recv_timeout(self.options.load_patience));
            match answer {
                Some(Ok(Answer { result: Err(DeviceError::Failed(why)), .. })) => self.fence(&why, self.options.pause),
                Some(Ok(answer)) => return answer.result,
                _ => self.fence("it does not load", self.options.pause),
            }
        }
        Ok(())
    }

    fn execute(&mut self, batch: &mut [Box<Job>]) -> Result<(), DeviceError> {
        let count = |counter: &AtomicU64, n: usize| _ = counter.fetch_add(n as u64, Ordering::Relaxed);
        match self.ask(batch) {
            Outcome::Done => {
                count(&self.counters.computed, batch.len());
                Ok(())
            }
            Outcome::OutOfMemory if batch.len() > 1 => {
                count(&self.counters.out_of_memory, 1);
                // Less at a time, before the CPU has to do it.
                let (first, second) = batch.split_at_mut(batch.len() / 2);
                self.execute(first)?;
                self.execute(second)
            }
            outcome => {
                let reason = if let Outcome::Moved(reason) = outcome { reason } else { Reason::Failed };
                count(
                    if reason == Reason::Deadline { &self.counters.late } else { &self.counters.failed },
                    batch.len(),
                );
                let moved = Degradation { stage: Stage::Queue, reason };
                batch.iter_mut().for_each(|job| job.degraded.push(moved));
                self.fallback.execute(batch)
            }
        }
    }
}

/// Counts the threads that live.
struct Alive(Arc<AtomicUsize>);

impl Alive {
    fn new(threads: &Arc<AtomicUsize>) -> Self {
        threads.fetch_add(1, Ordering::AcqRel);
        Alive(threads.clone())
    }
}

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A panic is a failure.
fn calmly<T>(work: impl FnOnce() -> Result<T, DeviceError>) -> Result<T, DeviceError> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| Err(DeviceError::Failed("it panicked".into())))
}

/// Does what is ordered until nobody orders or listens any more, or the device has failed.
fn serve(mut device: Box<dyn Device>, orders: &Receiver<Order>, answers: &SyncSender<Answer>) {
    for order in orders {
        let (mut batch, load) = match order {
            Order::Load(generation) => (Vec::new(), Some(generation)),
            Order::Execute(batch) => (batch, None),
        };
        let result = calmly(|| match load {
            Some(generation) => device.load(&generation),
            None => device.execute(&mut batch),
        });
        let failed = matches!(result, Err(DeviceError::Failed(_)));
        if answers.send(Answer { batch, result }).is_err() || failed {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use rten::ThreadPool;

    use super::*;
    use crate::api::{SearchBy, SearchCall, SearchFilter, Ticket};
    use crate::catalog::conditions::Demand;
    use crate::catalog::generation::{NO_ROW, testing};
    use crate::context::Deadline;
    use crate::device::cpu::CpuDevice;
    use crate::device::sim::{Faults, Script, SimDevice};
    use crate::device::{Ranked, Task};
    use crate::index::SearchParams;
    use crate::pipeline::{PipelineConfig, plan};

    const PATIENCE: Duration = Duration::from_millis(60);
    const OPTIONS: Options = Options {
        patience: PATIENCE,
        load_patience: Duration::from_secs(30),
        pause: Duration::from_millis(20),
        longest_pause: Duration::from_millis(80),
        most_hung: 4,
    };

    fn jobs(n: usize, generation: &Arc<Generation>, budget: Duration) -> Vec<Box<Job>> {
        (0..n as u64)
            .map(|ticket| {
                let mut job = Box::new(Job::new(generation.clone()));
                (job.ticket, job.deadline) = (Ticket(ticket), Deadline::after(budget));
                job.task = Task::Recommend { top_m: 1 + ticket as u32 % 3, explain: false };
                job
            })
            .collect()
    }

    /// Sims that the scripts tell what to do, one after the other and the last again and again; and how many were made.
    fn sims(scripts: Vec<Result<Script, &'static str>>) -> (Make, Arc<AtomicUsize>) {
        let made = Arc::new(AtomicUsize::new(0));
        let count = made.clone();
        let make = move || {
            let at = count.fetch_add(1, Ordering::Relaxed);
            let script = scripts[at.min(scripts.len() - 1)].map_err(|why| DeviceError::Failed(why.into()))?;
            Ok(Box::new(SimDevice::new(script)) as Box<dyn Device>)
        };
        (Arc::new(make), made)
    }

    /// Executes a batch; every job is answered, and at once. Returns why some were moved.
    fn run(guard: &mut Guard<'_>, batch: &mut [Box<Job>]) -> Option<Reason> {
        let began = Instant::now();
        guard.execute(batch).unwrap();
        assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
        for (at, job) in batch.iter().enumerate() {
            assert_eq!((job.ticket, job.failure.is_none()), (Ticket(at as u64), true));
            let rows: Vec<u32> = job.ranked.items.iter().map(|item| item.row).collect();
            assert_eq!(rows, (0..1 + at as u32 % 3).collect::<Vec<_>>());
            assert!(job.degraded.len() <= 1 && job.degraded.iter().all(|d| d.stage == Stage::Queue));
        }
        // What did not fit the device's memory alone may have been moved.
        batch.iter().find_map(|job| job.degraded.first().map(|d| d.reason))
    }

    fn eventually(guard: &mut Guard<'_>, generation: &Arc<Generation>) {
        let until = Instant::now() + Duration::from_secs(20);
        while run(guard, &mut jobs(1, generation, Duration::from_secs(60))).is_some() {
            assert!(Instant::now() < until, "the device does not come back");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    #[test]
    fn every_job_is_answered_whatever_the_device_does() {
        let generation = Arc::new(testing::plain(3));
        for seed in 0..12 {
            let faults = Faults {
                seed,
                fail: 60,
                panic: 30,
                hang: 60,
                out_of_memory: 100,
                hang_for: 3 * PATIENCE,
                most_jobs: 0,
            };
            let script =
                |more: u64| Ok(Script { faults: Faults { seed: seed * 100 + more, ..faults }, ..Script::default() });
            // Some that fail, some that can't be made, and then one that is sound.
            let mut scripts: Vec<_> = (0..5).map(script).collect();
            scripts.insert(2, Err("still away"));
            scripts.push(Ok(Script::default()));
            let (make, made) = sims(scripts);
            let mut fallback = SimDevice::new(Script::default());
            let mut guard = Guard::new(&Arc::new(Counters::new("sim")), make, &mut fallback, OPTIONS);
            guard.load(&generation).unwrap();
            assert!(guard.is_up());
            let (mut flagged, mut batches) = (0, 0);
            let until = Instant::now() + Duration::from_secs(30);
            while made.load(Ordering::Relaxed) < 7 || !guard.is_up() {
                assert!(
                    Instant::now() < until,
                    "seed {seed}: {} devices in {batches} batches",
                    made.load(Ordering::Relaxed)
                );
                let n = 1 + batches % 5;
                flagged += usize::from(run(&mut guard, &mut jobs(n, &generation, Duration::from_secs(60))).is_some());
                batches += 1;
            }
            assert!(flagged >= 6 && batches > flagged, "seed {seed}: {flagged} of {batches}");
            for n in 1..20 {
                assert_eq!(run(&mut guard, &mut jobs(n, &generation, Duration::from_secs(60))), None, "seed {seed}");
            }
        }
    }

    #[test]
    fn a_hung_device_is_fenced_and_another_takes_over() {
        let generation = Arc::new(testing::plain(3));
        let hangs = Faults { hang: 1000, hang_for: 10 * PATIENCE, ..Faults::default() };
        let (make, made) = sims(vec![Ok(Script { faults: hangs, ..Script::default() }), Ok(Script::default())]);
        let mut fallback = SimDevice::new(Script::default());
        let mut guard = Guard::new(&Arc::new(Counters::new("sim")), make, &mut fallback, OPTIONS);
        guard.load(&generation).unwrap();
        let mut batch = jobs(3, &generation, Duration::from_secs(60));
        assert_eq!(run(&mut guard, &mut batch), Some(Reason::Failed));
        assert!(!guard.is_up());
        // Meanwhile nobody waits for it.
        let began = Instant::now();
        assert_eq!(run(&mut guard, &mut jobs(2, &generation, Duration::from_secs(60))), Some(Reason::Failed));
        assert!(began.elapsed() < PATIENCE || made.load(Ordering::Relaxed) > 1, "{:?}", began.elapsed());
        eventually(&mut guard, &generation);
        assert_eq!(made.load(Ordering::Relaxed), 2);
        // The hung one wakes up: its answer is nobody's.
        let until = Instant::now() + Duration::from_secs(20);
        while guard.threads.load(Ordering::Relaxed) > 1 {
            assert!(Instant::now() < until, "the hung device's thread is left");
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(run(&mut guard, &mut jobs(2, &generation, Duration::from_secs(60))), None);
    }

    #[test]
    fn what_is_late_is_moved_before_its_deadline_and_the_device_is_kept() {
        let generation = Arc::new(testing::plain(3));
        let (make, made) = sims(vec![Ok(Script { latency: Duration::from_millis(300), ..Script::default() })]);
        let mut fallback = SimDevice::new(Script::default());
        let options = Options { patience: Duration::from_secs(30), ..OPTIONS };
        let mut guard = Guard::new(&Arc::new(Counters::new("sim")), make, &mut fallback, options);
        guard.load(&generation).unwrap();
        let mut batch = jobs(1, &generation, Duration::from_millis(200));
        assert_eq!(run(&mut guard, &mut batch), Some(Reason::Deadline));
        // It still computes what it was asked first.
        assert_eq!(run(&mut guard, &mut jobs(1, &generation, Duration::from_secs(60))), Some(Reason::Deadline));
        eventually(&mut guard, &generation);
        assert_eq!(made.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn out_of_memory_is_answered_by_less_at_a_time_and_fences_nothing() {
        let generation = Arc::new(testing::plain(3));
        for (most_jobs, reason) in [(2, None), (1, None)] {
            let faults = Faults { most_jobs, ..Faults::default() };
            let (make, made) = sims(vec![Ok(Script { faults, ..Script::default() })]);
            let mut fallback = SimDevice::new(Script::default());
            let mut guard = Guard::new(&Arc::new(Counters::new("sim")), make, &mut fallback, OPTIONS);
            guard.load(&generation).unwrap();
            assert_eq!(run(&mut guard, &mut jobs(7, &generation, Duration::from_secs(60))), reason);
            assert!(guard.is_up() && made.load(Ordering::Relaxed) == 1);
        }
        let faults = Faults { out_of_memory: 1000, ..Faults::default() };
        let (make, made) = sims(vec![Ok(Script { faults, ..Script::default() })]);
        let mut fallback = SimDevice::new(Script::default());
        let mut guard = Guard::new(&Arc::new(Counters::new("sim")), make, &mut fallback, OPTIONS);
        guard.load(&generation).unwrap();
        assert_eq!(run(&mut guard, &mut jobs(4, &generation, Duration::from_secs(60))), Some(Reason::Failed));
        assert!(guard.is_up() && made.load(Ordering::Relaxed) == 1);
    }

    #[test]
    fn a_device_that_hangs_again_and_again_leaves_few_threads() {
        let generation = Arc::new(testing::plain(3));
        let hangs = Faults { hang: 1000, hang_for: Duration::from_secs(5), ..Faults::default() };
        let (make, made) = sims(vec![Ok(Script { faults: hangs, ..Script::default() })]);
        let mut fallback = SimDevice::new(Script::default());
        let options = Options {
            patience: Duration::from_millis(5),
            pause: Duration::from_millis(1),
            longest_pause: Duration::from_millis(2),
            most_hung: 3,
            ..OPTIONS
        };
        let mut guard = Guard::new(&Arc::new(Counters::new("sim")), make, &mut fallback, options);
        guard.load(&generation).unwrap();
        for _ in 0..200 {
            assert!(run(&mut guard, &mut jobs(1, &generation, Duration::from_secs(60))).is_some());
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(made.load(Ordering::Relaxed) <= 3);
    }

    /// Questions of every kind, for items in the plane.
    fn questions(generation: &Arc<Generation>) -> Vec<Box<Job>> {
        let vectors = [1.0, -0.5, 0.25, 2.0];
        let conditions = [("category", Demand::Values(&["c0"]))];
        let filter = SearchFilter { conditions: &conditions, exclude: &["4", "?"], exclude_seen: None };
        let params = SearchParams { n_probes: Some(3), ..SearchParams::default() };
        let mut all: Vec<_> = (0..4).map(|_| Box::new(Job::new(generation.clone()))).collect();
        let by = SearchBy::Vectors { values: &vectors, n: 2 };
        let call = SearchCall { filter, params, ..SearchCall::new(by, 3) };
        plan::search(&call, generation, Instant::now(), &mut all[0]).unwrap();
        all[1].task = Task::Recommend { top_m: 4, explain: true };
        (all[1].user.vector, all[1].user.seen) = (vec![1.0, 0.5], vec![1, 3]);
        all[2].task = Task::Rank { rows: vec![5, 0, NO_ROW], ranker: 0 };
        all[3].task = Task::Recommend { top_m: 2, explain: false };
        for (at, job) in all.iter_mut().enumerate() {
            (job.ticket, job.shard) = (Ticket(at as u64), at as u16);
            job.deadline = Deadline::after(Duration::from_secs(60));
            job.context.assign(&[("k", "v")]);
        }
        all
    }

    #[test]
    fn what_is_asked_and_answered_passes_through_whole() {
        let mut generation = testing::with_embeddings((0..12).map(|at| (at % 5) as f32).collect(), 2);
        testing::add_category(&mut generation, "category", &[0, 1, 0, 1, 0, 1]);
        let generation = Arc::new(generation);
        let cpu = || CpuDevice::new(Arc::new(PipelineConfig::default()), Arc::new(ThreadPool::with_num_threads(1)));
        let make: Make = Arc::new(move || Ok(Box::new(cpu()) as Box<dyn Device>));
        let (mut by_itself, mut fallback) = (cpu(), SimDevice::new(Script::default()));
        by_itself.load(&generation).unwrap();
        let options = Options { patience: Duration::from_secs(30), ..OPTIONS };
        let mut guard = Guard::new(&Arc::new(Counters::new("cpu")), make, &mut fallback, options);
        guard.load(&generation).unwrap();
        // More than once, so that copies are made of used jobs.
        for round in 0..3 {
            let (mut want, mut got) = (questions(&generation), questions(&generation));
            got.rotate_left(round);
            by_itself.execute(&mut want).unwrap();
            guard.execute(&mut got).unwrap();
            got.rotate_right(round);
            let answered = |job: &Job| {
                let Ranked { items, result_lengths, candidates, n_candidates, n_by_source, .. } = &job.ranked;
                let numbers = (*n_candidates, *n_by_source, result_lengths.clone(), candidates.rows.clone());
                (job.ticket, job.shard, items.clone(), numbers, job.degraded.clone(), job.failure.clone())
            };
            for (got, want) in got.iter().zip(&want) {
                assert_eq!(answered(got), answered(want));
                assert!(got.timings.0.iter().any(|&spent| spent > 0));
            }
            assert!(want[0].ranked.items.len() >= 4 && want[1].ranked.items.len() >= 3);
        }
    }

    #[test]
    fn a_device_that_never_was_is_an_error() {
        let generation = Arc::new(testing::plain(3));
        let (make, _) = sims(vec![Err("no such device")]);
        let mut fallback = SimDevice::new(Script::default());
        let mut guard = Guard::new(&Arc::new(Counters::new("sim")), make, &mut fallback, OPTIONS);
        assert_eq!(guard.load(&generation).unwrap_err().to_string(), "device failed: no such device");
    }
}
