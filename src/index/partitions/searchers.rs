//! Threads that search partitions for callers who wait for them, but not longer than they want to.
//!
//! What a searcher needs beyond the time that its caller waits lies in a [`Flight`], which both share by `Arc`: the partitions, the
//! queries and where results go. Only the filter belongs to the caller; copying it would cost as much as a search. It is behind a
//! [`Gate`] that the caller closes before it returns.
#![allow(unsafe_code)] // The gate: a borrowed filter, asked by another thread.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU8, AtomicUsize};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::Piece;
use crate::candidates::Scored;
use crate::index::{Filter, SearchParams, SearchScratch};
use crate::ring::Ring;

/// Tasks that wait for a searcher at most, of all callers; a partition beyond that is late.
const QUEUED: usize = 16_384;

/// What all partitions are asked.
#[derive(Debug, Default)]
pub struct Question {
    /// f32 `[n_queries, dim]`.
    pub queries: Vec<f32>,
    pub n_queries: usize,
    pub k: usize,
    pub params: SearchParams,
    /// The share of the rows that the filter admits.
    pub share: f64,
}

impl Question {
    /// Becomes `other` and keeps its memory.
    fn assign(&mut self, other: &Question) {
        let mut queries = std::mem::take(&mut self.queries);
        queries.clear();
        queries.extend_from_slice(&other.queries);
        *self = Question { queries, ..*other };
    }
}

/// What became of a partition.
#[derive(Clone, Copy, Debug)]
pub enum Answered {
    /// It answered; `late_by`: after the time, and that long after it began.
    Found { late_by: Option<Duration> },
    /// Its search panicked.
    Panicked,
    /// It has not answered, so long after it began, if it did.
    Late(Option<Duration>),
}

/// A filter that one other thread may ask until it is closed.
#[derive(Debug, Default)]
struct Gate {
    /// Null: closed. Else it points to a filter that outlives the opening.
    filter: AtomicPtr<Filter<'static>>,
    /// Somebody is asking.
    inside: AtomicBool,
}

/// Says that nobody is inside, also when the filter panics.
struct Leave<'g>(&'g AtomicBool);

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        self.0.store(false, Release);
    }
}

impl Gate {
    /// Whether the filter admits `row`; once the gate is closed, nothing is admitted. Called by one thread at a time: `Flight` lets
    /// one searcher into a slot.
    fn ask(&self, row: u32) -> bool {
        // Pairs with `close`, all of them sequentially consistent: either this sees null, or `close` sees `inside`.
        self.inside.store(true, SeqCst);
        let _leave = Leave(&self.inside);
        let filter = self.filter.load(SeqCst);
        // SAFETY: what it points to is borrowed by an `Open`, which ends only after `close`; and `close` returns only once it has
        // seen that nobody who saw the pointer is inside.
        unsafe { filter.as_ref() }.is_some_and(|filter| filter.allows(row))
    }

    fn close(&self) {
        self.filter.store(std::ptr::null_mut(), SeqCst);
        while self.inside.load(SeqCst) {
            // The other is asking about one row; if it is not running, it gets the CPU.
            std::thread::yield_now();
        }
        // What it read there happened before this: `Leave` stored with `Release`.
    }
}

const WAITING: u8 = 0;
const SEARCHING: u8 = 1;
const FOUND: u8 = 2;
const PANICKED: u8 = 3;
/// The caller has given up: it will not begin, or, if it has begun, nobody waits for it.
const GIVEN_UP: u8 = 4;

/// One partition's part of a flight.
#[derive(Debug, Default)]
struct Slot {
    piece: u32,
    state: AtomicU8,
    /// Set by who makes it `SEARCHING`.
    began: OnceLock<Instant>,
    gate: Gate,
    /// Held by the searcher while it searches.
    found: Mutex<Vec<Vec<Scored>>>,
}

/// A question on its way to the partitions and back.
#[derive(Debug, Default)]
pub struct Flight {
    pieces: Arc<[Piece]>,
    question: Question,
    is_filtered: bool,
    slots: Vec<Slot>,
    n_slots: usize,
    /// Tasks that are not done.
    left: Mutex<usize>,
    all_done: Condvar,
}

impl Flight {
    /// A flight of `flights` that nobody holds any more, or a new one, made ready for `question` to the pieces `asked`.
    pub fn ready(
        flights: &mut Vec<Arc<Flight>>,
        pieces: &Arc<[Piece]>,
        question: &Question,
        asked: &[u32],
        filter: &Filter<'_>,
    ) -> Arc<Flight> {
        // None of them keeps partitions that have been replaced.
        flights.iter_mut().filter_map(Arc::get_mut).for_each(|flight| flight.pieces = pieces.clone());
        let free = flights.iter_mut().position(|flight| Arc::get_mut(flight).is_some()).unwrap_or_else(|| {
            flights.push(Arc::default());
            flights.len() - 1
        });
        if let Some(flight) = Arc::get_mut(&mut flights[free]) {
            flight.pieces = pieces.clone();
            flight.question.assign(question);
            flight.is_filtered = !filter.is_all();
            flight.slots.resize_with(flight.slots.len().max(asked.len()), Slot::default);
            flight.n_slots = asked.len();
            *flight.left.get_mut() = asked.len();
            for (slot, &piece) in flight.slots.iter_mut().zip(asked) {
                slot.piece = piece;
                *slot.state.get_mut() = WAITING;
                slot.began = OnceLock::new();
            }
        }
        flights[free].clone()
    }

    /// Waits until all is done, or until `until`; says whether all is done.
    fn wait(&self, until: Option<Instant>) -> bool {
        let mut left = self.left.lock();
        while *left > 0 {
            match until {
                None => self.all_done.wait(&mut left),
                Some(until) if self.all_done.wait_until(&mut left, until).timed_out() => break,
                Some(_) => {}
            }
        }
        *left == 0
    }

    fn slots(&self) -> &[Slot] {
        &self.slots[..self.n_slots]
    }

    /// Searches a slot's partition, unless somebody has begun with it or the caller has given up. Says whether the caller gave up
    /// in between.
    fn search(&self, slot: u32, scratch: &mut SearchScratch) -> bool {
        let slot = &self.slots()[slot as usize];
        if slot.state.compare_exchange(WAITING, SEARCHING, AcqRel, Relaxed).is_err() {
            return false;
        }
        let _ = slot.began.set(Instant::now());
        let piece = &self.pieces[slot.piece as usize];
        let admits = |row: u32| slot.gate.ask(row);
        let filter = match self.is_filtered {
            true => Filter::predicate(&admits).in_piece(&piece.rows, self.question.share),
            false => Filter::ALL,
        };
        let mut found = slot.found.lock();
        let done = catch_unwind(AssertUnwindSafe(|| piece.search(&self.question, filter, scratch, &mut found)));
        drop(found);
        if done.is_err() {
            *scratch = SearchScratch::default();
        }
        // Pairs with `outcome`.
        if slot.state.swap(if done.is_ok() { FOUND } else { PANICKED }, AcqRel) == GIVEN_UP {
            piece.health.returned();
            return true;
        }
        let mut left = self.left.lock();
        *left -= 1;
        if *left == 0 {
            self.all_done.notify_one();
        }
        false
    }
}

impl Slot {
    /// What became of it by now. If it is not done it is given up; `hangs` is called if it has begun.
    fn outcome(&self, hangs: impl FnOnce()) -> Answered {
        if self.state.compare_exchange(WAITING, GIVEN_UP, AcqRel, Relaxed).is_ok() {
            return Answered::Late(None);
        }
        match self.state.compare_exchange(SEARCHING, GIVEN_UP, AcqRel, Acquire) {
            Err(PANICKED) => Answered::Panicked,
            Err(_) => Answered::Found { late_by: None },
            Ok(_) => {
                hangs();
                Answered::Late(Some(self.began.get().map_or(Duration::ZERO, Instant::elapsed)))
            }
        }
    }
}

/// The gates of a flight, open. When it is dropped they are closed, and the filter is the caller's alone again.
struct Open<'a> {
    flight: &'a Flight,
}

impl<'a> Open<'a> {
    /// `filter` is borrowed as long as the gates are open.
    fn new(flight: &'a Flight, filter: &'a Filter<'_>) -> Self {
        let filter = std::ptr::from_ref(filter).cast::<Filter<'static>>().cast_mut();
        // The push of the tasks publishes it.
        flight.slots().iter().for_each(|slot| slot.gate.filter.store(filter, Relaxed));
        Open { flight }
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.flight.slots().iter().for_each(|slot| slot.gate.close());
    }
}

struct Task {
    flight: Arc<Flight>,
    slot: u32,
}

/// The threads. They end when the last owner is gone.
pub struct Searchers {
    tasks: Arc<Ring<Task>>,
    n_threads: usize,
    /// Threads in a search that nobody waits for any more.
    n_hanging: Arc<AtomicUsize>,
}

impl std::fmt::Debug for Searchers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Searchers {{ n_threads: {} }}", self.n_threads)
    }
}

impl Searchers {
    /// Starts `n_threads`, of which each first calls `begin` with its number.
    ///
    /// # Errors
    /// A thread could not be started.
    pub fn start(n_threads: usize, begin: impl Fn(usize) + Clone + Send + 'static) -> io::Result<Arc<Self>> {
        let tasks = Arc::new(Ring::new(QUEUED, n_threads));
        let searchers = Arc::new(Searchers { tasks, n_threads, n_hanging: Arc::default() });
        for at in 0..n_threads {
            let (tasks, begin, n_hanging) = (searchers.tasks.clone(), begin.clone(), searchers.n_hanging.clone());
            std::thread::Builder::new().name(format!("searcher-{at}")).spawn(move || {
                begin(at);
                let mut scratch = SearchScratch::default();
                while let Some(Task { flight, slot }) = tasks.pop(at) {
                    if flight.search(slot, &mut scratch) {
                        n_hanging.fetch_sub(1, Relaxed);
                    }
                }
            })?;
        }
        Ok(searchers)
    }

    /// How many there are.
    pub fn n_threads(&self) -> usize {
        self.n_threads
    }

    /// Searches the slots of `flight` and waits for them until `until`; then calls `take` for each with its partition, what became
    /// of it and what it found. Where no thread has begun with a slot when half of the time is over, or all of them hang, the caller
    /// searches itself.
    pub fn search(
        &self,
        flight: &Arc<Flight>,
        filter: &Filter<'_>,
        until: Option<Instant>,
        scratch: &mut SearchScratch,
        mut take: impl FnMut(u32, Answered, Option<&mut Vec<Vec<Scored>>>),
    ) {
        let open = Open::new(flight, filter);
        let slots = 0..flight.slots().len() as u32;
        let mut is_full = false;
        for slot in slots.clone() {
            is_full |= self.tasks.push(Task { flight: flight.clone(), slot }).is_err();
        }
        self.tasks.kick();
        let now = Instant::now();
        let patience = until.map(|until| now + until.saturating_duration_since(now) / 2);
        if is_full || self.n_hanging.load(Relaxed) >= self.n_threads || !flight.wait(patience) {
            for slot in slots.take_while(|_| until.is_none_or(|until| Instant::now() < until)) {
                flight.search(slot, scratch);
            }
            flight.wait(until);
        }
        for slot in flight.slots() {
            // Its searcher may be through with it by now and count down first: for a moment the numbers then are large.
            let hangs = || {
                self.n_hanging.fetch_add(1, Relaxed);
                flight.pieces[slot.piece as usize].health.hangs();
            };
            match slot.outcome(hangs) {
                // Its searcher is through with it.
                found @ Answered::Found { .. } => take(slot.piece, found, Some(&mut slot.found.lock())),
                other => take(slot.piece, other, None),
            }
        }
        drop(open);
    }
}

impl Drop for Searchers {
    fn drop(&mut self) {
        self.tasks.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_asks_a_filter_after_its_gate_is_closed() {
        let (gate, done) = (Gate::default(), AtomicBool::new(false));
        let asked = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(SeqCst) {
                    if gate.ask(7) {
                        asked.fetch_add(1, Relaxed);
                    }
                }
            });
            let began = Instant::now();
            for round in 0.. {
                if round >= 20_000 && (asked.load(Relaxed) > 0 || began.elapsed() > Duration::from_secs(10)) {
                    break;
                }
                let is_open = AtomicBool::new(true);
                let admits = |row: u32| {
                    // Time for the other to close the gate in between.
                    (0..round % 50).for_each(|_| std::hint::spin_loop());
                    assert!(is_open.load(Relaxed), "asked after the gate was closed");
                    row == 7
                };
                let filter = Filter::predicate(&admits);
                gate.filter.store(std::ptr::from_ref(&filter).cast::<Filter<'static>>().cast_mut(), SeqCst);
                match round % 70 {
                    // On one CPU the other thread would never find it open.
                    0 => std::thread::yield_now(),
                    n => (0..n).for_each(|_| std::hint::spin_loop()),
                }
                gate.close();
                is_open.store(false, Relaxed);
            }
            done.store(true, SeqCst);
        });
        assert!(asked.load(Relaxed) > 0);
        assert!(!gate.ask(7));
    }
}
