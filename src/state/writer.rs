//! The thread that owns the log: one order for all events and changes.
//!
//! Calls that wait are taken together: appended in one write, applied, answered; those that are to be durable after one
//! sync for all of them.

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed, Ordering::Release};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use crossbeam_queue::ArrayQueue;

use super::change::{self, Kind, Record};
use super::event::Damaged;
use super::live::{LiveState, Receipt};
use super::log::{EventLog, Limits};
use super::sinks::SinkCounters;
use crate::api::Ticket;
use crate::context::now_ms;
use crate::error::{Code, Error};
use crate::ring::Ring;

/// How often trending is made anew while events come, and old segments are looked for.
const TICK: Duration = Duration::from_millis(250);
/// Calls that one write takes at most.
const BATCH: usize = 512;
/// Exposures that one write takes at most, and that wait. The writer looks at them every [`TICK`] at least.
const EXPOSURE_BATCH: usize = 4096;
const MOST_EXPOSURES: usize = 1 << 17;

/// A call on its way to the log.
#[derive(Debug)]
pub struct Submission {
    /// What [`super::event::Encoder`] or [`super::change::Encoder`] made of it.
    pub record: Vec<u8>,
    /// Whether the answer waits for the disk.
    pub durable: bool,
    /// Where the answer goes.
    pub shard: u16,
    /// The shard's name for the call.
    pub ticket: Ticket,
}

/// What calls came to.
pub type Result = std::result::Result<Receipt, Error>;

/// Takes answers to their shards.
pub trait ReceiptSink: Send + Sync {
    /// Hands an answer over; does not block.
    fn deliver(&self, shard: u16, ticket: Ticket, result: Result);

    /// A record took effect, which nobody was told yet; does not block.
    fn applied(&self, record: &[u8]);
}

/// Counters, for metrics.
#[derive(Debug, Default)]
pub struct EventCounters {
    /// Events logged and applied.
    pub accepted: AtomicU64,
    /// Of these, repetitions.
    pub duplicates: AtomicU64,
    /// Of these, of unknown items.
    pub unknown_items: AtomicU64,
    /// Calls that the log refused.
    pub refused: AtomicU64,
    /// Exposures logged.
    pub exposures: AtomicU64,
    /// Exposures that found no room in the queue or in the log.
    pub exposures_dropped: AtomicU64,
    /// Entries of changes applied, by [`Kind`].
    pub changes: [AtomicU64; 6],
    /// When the last record took effect, milliseconds since 1970; 0: none did since the start.
    pub applied_ms: AtomicI64,
    /// Bytes of the log.
    pub log_bytes: AtomicU64,
    /// Bytes of the file of what is in force of items and users.
    pub state_bytes: AtomicU64,
    /// Records before this sequence are on the disk.
    pub on_disk: AtomicU64,
    /// Syncs, and nanoseconds in them.
    pub syncs: AtomicU64,
    /// As above.
    pub sync_ns: AtomicU64,
}

/// The way to the writer.
pub struct EventQueue {
    inbox: Ring<Submission>,
    /// Records that nobody waits for.
    exposures: ArrayQueue<Vec<u8>>,
    /// Whether there is a log.
    durable: bool,
    /// Counters.
    pub counters: EventCounters,
    /// Of the sinks, once they are started.
    pub sinks: OnceLock<Vec<Arc<SinkCounters>>>,
}

impl EventQueue {
    /// For `state`'s configuration.
    pub fn new(state: &LiveState) -> Self {
        EventQueue {
            inbox: Ring::new(state.config().max_queued as usize, 1),
            exposures: ArrayQueue::new(MOST_EXPOSURES),
            durable: !state.config().log_dir.as_os_str().is_empty(),
            counters: EventCounters::default(),
            sinks: OnceLock::new(),
        }
    }

    /// Sends a call on its way.
    ///
    /// # Errors
    /// The queue is full, or `durable` was asked for where there is no log.
    pub fn push(&self, submission: Submission) -> std::result::Result<(), Error> {
        if submission.durable && !self.durable {
            let message = "this server keeps no event log (events.log_dir), so nothing is durable";
            return Err(Error::fixed(Code::BadRequest, message));
        }
        self.inbox.send(submission).map_err(|_| {
            self.counters.refused.fetch_add(1, Relaxed);
            Error::fixed(Code::Overloaded, "too many calls wait for the event log")
        })
    }

    /// Logs the record of an exposure soon, unless too many wait.
    pub fn expose(&self, record: Vec<u8>) {
        if self.exposures.push(record).is_err() {
            self.counters.exposures_dropped.fetch_add(1, Relaxed);
        }
    }

    /// Lets the writer end when everything that was pushed is answered.
    pub fn close(&self) {
        self.inbox.close();
    }
}

/// Replays the log of `state`'s configuration, where there is one.
///
/// # Errors
/// The directory can't be used.
pub fn open(state: &LiveState) -> anyhow::Result<Option<EventLog>> {
    let config = state.config();
    if config.log_dir.as_os_str().is_empty() {
        tracing::info!("events are kept in memory only: events.log_dir is not set");
        return Ok(None);
    }
    let max_age = Duration::from_secs(3600 * u64::from(config.max_age_hours));
    let limits = Limits {
        segment_bytes: config.segment_bytes,
        max_bytes: config.max_bytes,
        max_age: (!max_age.is_zero()).then_some(max_age),
    };
    let (started, mut applied, mut unreadable) = (Instant::now(), Receipt::default(), 0u64);
    let opened = EventLog::open(&config.log_dir, limits, |record| match state.replay(record) {
        Ok(receipt) => {
            applied.accepted += receipt.accepted;
            applied.duplicates += receipt.duplicates;
            applied.unknown += receipt.unknown;
        }
        Err(_) => unreadable += 1,
    });
    state.publish();
    let (log, found) = opened.context("opening the event log (events.log_dir)")?;
    state.refresh_trending(now_ms());
    tracing::info!(
        segments = found.segments,
        records = found.records,
        events = applied.accepted,
        duplicates = applied.duplicates,
        unknown_items = applied.unknown,
        torn_bytes = found.torn_bytes,
        users = state.n_users(),
        ms = started.elapsed().as_millis() as u64,
        "event log replayed"
    );
    for path in &found.damaged {
        tracing::error!(file = %path.display(), bytes = found.damaged_bytes, "the event log was damaged; what it was is kept in this file");
    }
    if unreadable > 0 {
        tracing::error!(records = unreadable, "records of the event log could not be read");
    }
    Ok(Some(log))
}

/// Starts the writer.
///
/// # Errors
/// The thread could not be started.
pub fn spawn(
    state: Arc<LiveState>,
    log: Option<EventLog>,
    queue: Arc<EventQueue>,
    sink: Arc<dyn ReceiptSink>,
) -> std::io::Result<JoinHandle<()>> {
    if state.generation().item_embeddings.is_some() {
        let state = state.clone();
        // Seconds for a large catalogue: until then users keep the vectors that they have.
        std::thread::Builder::new().name("fold-in".into()).spawn(move || state.prepare_fold_in())?;
    }
    let index = state.live_index();
    if let Some(index) = index.clone() {
        // It ends when the writer closes the index.
        std::thread::Builder::new().name("compaction".into()).spawn(move || {
            index.compact_when_due(&|reason| tracing::error!(reason, "vectors of items can't be compacted"));
        })?;
    }
    if let Some(log) = &log {
        queue.counters.on_disk.store(log.next_sequence(), Release);
    }
    std::thread::Builder::new().name("events".into()).spawn(move || {
        Writer {
            state: &state,
            log,
            queue: &queue,
            sink: &*sink,
            batch: Vec::new(),
            exposures: Vec::new(),
            unsynced: None,
            failing: false,
        }
        .run();
        if let Some(index) = index {
            index.close();
        }
    })
}

/// What a batch adds, before it is applied.
#[derive(Default)]
struct Coming {
    users: HashSet<Box<str>>,
    items: HashSet<Box<str>>,
}

impl Coming {
    /// Whether there is room for what a record adds.
    fn admit(&mut self, state: &LiveState, record: &[u8]) -> std::result::Result<(), Error> {
        let limits = state.limits();
        let Ok(Record::Change(kind @ (Kind::UpsertUsers | Kind::UpsertItems), body)) = Record::of(record) else {
            return Ok(());
        };
        let of_items = kind == Kind::UpsertItems;
        let (coming, held, most, key) = match of_items {
            true => (&mut self.items, state.n_live_items(), limits.live_items_max, "live_items_max"),
            false => (&mut self.users, state.n_profiles(), limits.live_users_max, "live_users_max"),
        };
        let mut new: HashSet<Box<str>> = HashSet::new();
        // Damage was refused by the shard.
        let _ = change::decode::<Damaged>(body, |change| {
            let is_held = if of_items { state.has_item(change.id) } else { state.has_profile(change.id) };
            if !is_held && !coming.contains(change.id) {
                new.insert(change.id.into());
            }
            Ok(())
        });
        let full = |n: usize, what: &str, key: &str, most: u32| {
            let message = format!("{n} {what} are held beside the bundle, and state.{key} is {most}");
            Err(Error::new(Code::Unavailable, message))
        };
        if !new.is_empty() && held + coming.len() + new.len() > most as usize {
            return full(held, kind.entries(), key, most);
        }
        let n_values = state.n_live_values();
        if of_items && n_values > limits.live_values_max as usize {
            return full(n_values, "values of columns", "live_values_max", limits.live_values_max);
        }
        coming.extend(new);
        Ok(())
    }
}

struct Writer<'a> {
    state: &'a LiveState,
    log: Option<EventLog>,
    queue: &'a EventQueue,
    sink: &'a dyn ReceiptSink,
    batch: Vec<Submission>,
    exposures: Vec<Vec<u8>>,
    /// Since when something that was appended is not synced.
    unsynced: Option<Instant>,
    /// The last write failed, which was said.
    failing: bool,
}

impl Writer<'_> {
    fn run(mut self) {
        let mut ticked = Instant::now();
        let sync_within = Duration::from_millis(u64::from(self.state.config().sync_interval_ms));
        loop {
            let closed = self.queue.inbox.closed();
            while self.batch.len() < BATCH
                && let Some(submission) = self.queue.inbox.try_pop()
            {
                self.batch.push(submission);
            }
            while self.exposures.len() < EXPOSURE_BATCH
                && let Some(record) = self.queue.exposures.pop()
            {
                self.exposures.push(record);
            }
            let idle = self.batch.is_empty() && self.exposures.is_empty();
            if !self.exposures.is_empty() {
                self.write_exposures();
            }
            if !self.batch.is_empty() {
                self.write();
            }
            let now = Instant::now();
            if self.unsynced.is_some_and(|since| closed || now.saturating_duration_since(since) >= sync_within) {
                // Nobody waits for it; the next one that does will hear.
                let _ = self.sync();
            }
            if now.saturating_duration_since(ticked) >= TICK {
                ticked = now;
                self.tick();
            }
            if idle {
                if closed {
                    return;
                }
                self.queue.inbox.wait(0, Some(TICK));
            }
        }
    }

    fn write(&mut self) {
        let mut batch = std::mem::take(&mut self.batch);
        self.refuse(&mut batch);
        let appended = match &mut self.log {
            Some(log) => log.append(batch.iter().map(|submission| &submission.record[..])),
            None => Ok(()),
        };
        let durable = batch.iter().any(|submission| submission.durable);
        if let Err(error) = appended {
            if !std::mem::replace(&mut self.failing, true) {
                tracing::error!(%error, "the event log can't be written; events are refused until it can");
            }
            self.queue.counters.refused.fetch_add(batch.len() as u64, Relaxed);
            for Submission { shard, ticket, .. } in batch.drain(..) {
                let error = Error::fixed(Code::Unavailable, "the event log can't be written now");
                self.sink.deliver(shard, ticket, Err(error));
            }
            self.batch = batch;
            return;
        }
        if std::mem::take(&mut self.failing) {
            tracing::info!("the event log can be written again");
        }
        self.unsynced = self.unsynced.or(self.log.is_some().then(Instant::now));
        let mut waiting = Vec::new();
        let applied: Vec<_> = batch.drain(..).map(|submission| (self.apply(&submission.record), submission)).collect();
        // Whoever is answered finds the change.
        self.state.publish();
        for (result, Submission { durable, shard, ticket, .. }) in applied {
            match durable {
                true => waiting.push((shard, ticket, result)),
                false => self.sink.deliver(shard, ticket, result),
            }
        }
        self.batch = batch;
        if durable {
            let synced = self.sync();
            for (shard, ticket, result) in waiting {
                let result = result.and_then(|receipt| match synced {
                    Ok(()) => Ok(Receipt { durable: true, ..receipt }),
                    Err(()) => {
                        Err(Error::fixed(Code::Unavailable, "the events are applied, but may not be on the disk"))
                    }
                });
                self.sink.deliver(shard, ticket, result);
            }
        }
    }

    /// Logs what waits; what can't be logged is counted and gone.
    fn write_exposures(&mut self) {
        let n = self.exposures.len() as u64;
        let counters = &self.queue.counters;
        let appended = match &mut self.log {
            Some(log) => log.append(self.exposures.iter().map(|record| &record[..])).is_ok(),
            None => false,
        };
        match appended {
            true => {
                counters.exposures.fetch_add(n, Relaxed);
                self.unsynced.get_or_insert_with(Instant::now);
            }
            false => drop(counters.exposures_dropped.fetch_add(n, Relaxed)),
        }
        self.exposures.clear();
    }

    /// Answers calls for which there is no room, before the log has them.
    fn refuse(&self, batch: &mut Vec<Submission>) {
        let mut coming = Coming::default();
        batch.retain(|Submission { record, shard, ticket, .. }| match coming.admit(self.state, record) {
            Ok(()) => true,
            Err(error) => {
                self.queue.counters.refused.fetch_add(1, Relaxed);
                self.sink.deliver(*shard, *ticket, Err(error));
                false
            }
        });
    }

    fn apply(&self, record: &[u8]) -> Result {
        // A defect that one call finds must not take the others' writer with it.
        let applied = catch_unwind(AssertUnwindSafe(|| self.state.apply_record(record)));
        let Ok(Ok(receipt)) = applied else {
            tracing::error!("events that were logged could not be applied");
            return Err(Error::fixed(Code::Internal, "the events could not be applied"));
        };
        let counters = &self.queue.counters;
        counters.applied_ms.store(now_ms(), Relaxed);
        let accepted = u64::from(receipt.accepted);
        match Record::of(record) {
            Ok(Record::Events(_)) => {
                counters.accepted.fetch_add(accepted, Relaxed);
                counters.duplicates.fetch_add(u64::from(receipt.duplicates), Relaxed);
                counters.unknown_items.fetch_add(u64::from(receipt.unknown), Relaxed);
            }
            Ok(Record::Change(kind, _)) => {
                counters.changes[kind as usize].fetch_add(accepted, Relaxed);
                self.sink.applied(record);
            }
            Ok(Record::Exposure(_)) | Err(_) => {}
        }
        Ok(receipt)
    }

    fn sync(&mut self) -> std::result::Result<(), ()> {
        self.unsynced = None;
        let Some(log) = &mut self.log else { return Ok(()) };
        let started = Instant::now();
        let done = log.sync();
        self.queue.counters.syncs.fetch_add(1, Relaxed);
        self.queue.counters.sync_ns.fetch_add(started.elapsed().as_nanos() as u64, Relaxed);
        if done.is_ok() {
            self.queue.counters.on_disk.store(log.next_sequence(), Release);
        }
        done.map_err(|error| tracing::error!(%error, "syncing the event log failed"))
    }

    fn tick(&mut self) {
        self.state.refresh_trending(now_ms());
        // Of what was compacted.
        self.state.publish();
        if let Some(log) = &mut self.log {
            let state = self.state;
            match log.retain(&|take| state.carry(take)) {
                Ok(0) => {}
                Ok(segments) => tracing::info!(segments, "old segments of the event log were removed"),
                Err(error) => tracing::warn!(%error, "old segments of the event log can't be removed"),
            }
            self.queue.counters.log_bytes.store(log.bytes(), Relaxed);
            self.queue.counters.state_bytes.store(log.carried_bytes(), Relaxed);
        }
    }
}
