//! Carries what the event log holds to where others read it: Parquet files, a Redis stream.
//!
//! Each sink is a thread that follows the log as far as it is on the disk, and knows by itself where it stands, so that after
//! any interruption it goes on there: every event arrives once, in the log's order. A sink that fails costs nothing but its
//! lag; what retention takes before it was carried is counted.

pub mod parquet;
pub mod redis;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Acquire, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

use rand::SeedableRng;
use rand::rngs::SmallRng;

use super::Carried;
use super::event::Event;
use super::exposure::Exposure;
use super::follow::Follower;
use super::{EventsConfig, writer::EventQueue};
use crate::backoff;

/// How often the log is looked at.
const TICK: Duration = Duration::from_millis(100);
/// First and longest wait after a failure, before jitter.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));

/// Where events go.
pub trait Sink: Send {
    /// Label in metrics and logs.
    fn name(&self) -> &'static str;

    /// Connects or looks around, and says from which record on it wants events, and from which of them. Called first and after
    /// every failure; what was taken and not kept is forgotten.
    ///
    /// # Errors
    /// It can't be used now.
    fn resume(&mut self) -> anyhow::Result<Position>;

    /// Takes an event.
    ///
    /// # Errors
    /// As [`Self::resume`].
    fn take(&mut self, at: Position, event: &Event<'_>) -> anyhow::Result<()>;

    /// Takes an exposure.
    ///
    /// # Errors
    /// As [`Self::resume`].
    fn expose(&mut self, at: Position, exposure: &Exposure<'_>) -> anyhow::Result<()>;

    /// All events of the records before `next` were taken: keeps them, if it is time or `closing`.
    ///
    /// # Errors
    /// As [`Self::resume`].
    fn keep(&mut self, next: u64, closing: bool) -> anyhow::Result<()>;
}

/// A place in the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// Of the record.
    pub sequence: u64,
    /// Of the event within its record.
    pub index: u32,
}

/// Counters of a sink, for metrics.
#[derive(Debug)]
pub struct SinkCounters {
    /// [`Sink::name`]
    pub name: &'static str,
    /// Events and exposures carried, but for those that wait to be kept.
    pub events: AtomicU64,
    /// Records of the log that were gone or damaged before they were read.
    pub lost: AtomicU64,
    /// Records on the disk that were not carried yet.
    pub behind: AtomicU64,
    /// Times that it failed.
    pub failures: AtomicU64,
}

/// The sinks of a server.
#[derive(Default)]
pub struct Sinks {
    threads: Vec<JoinHandle<()>>,
    closing: Arc<AtomicBool>,
}

impl Sinks {
    /// Starts the sinks of the configuration.
    ///
    /// # Errors
    /// A thread could not be started.
    pub fn start(config: &EventsConfig, queue: &Arc<EventQueue>) -> std::io::Result<Self> {
        let mut sinks: Vec<Box<dyn Sink>> = Vec::new();
        if !config.parquet.dir.as_os_str().is_empty() {
            sinks.push(Box::new(parquet::ParquetSink::new(config.parquet.clone())));
        }
        if !config.redis_stream.url.is_empty() {
            sinks.push(Box::new(redis::StreamSink::new(config.redis_stream.clone())));
        }
        let (mut started, mut all) = (Sinks::default(), Vec::new());
        for sink in sinks {
            let counters = Arc::new(SinkCounters {
                name: sink.name(),
                events: AtomicU64::new(0),
                lost: AtomicU64::new(0),
                behind: AtomicU64::new(0),
                failures: AtomicU64::new(0),
            });
            all.push(counters.clone());
            let carrier = Carrier {
                sink,
                dir: config.log_dir.clone(),
                queue: queue.clone(),
                closing: started.closing.clone(),
                counters,
                failures: 0,
                random: SmallRng::from_os_rng(),
            };
            let thread = std::thread::Builder::new().name(format!("sink-{}", carrier.counters.name));
            started.threads.push(thread.spawn(move || carrier.run())?);
        }
        // Started once for a queue.
        let _ = queue.sinks.set(all);
        Ok(started)
    }

    /// Lets sinks carry what is on the disk, and waits for them; one that fails is not waited for again.
    pub fn close(self) {
        self.closing.store(true, Relaxed);
        for thread in self.threads {
            thread.thread().unpark();
            if thread.join().is_err() {
                tracing::error!("a sink of events panicked");
            }
        }
    }
}

struct Carrier {
    sink: Box<dyn Sink>,
    dir: PathBuf,
    queue: Arc<EventQueue>,
    closing: Arc<AtomicBool>,
    counters: Arc<SinkCounters>,
    /// In a row.
    failures: u32,
    random: SmallRng,
}

impl Carrier {
    fn run(mut self) {
        while let Err(error) = self.carry() {
            self.counters.failures.fetch_add(1, Relaxed);
            self.failures += 1;
            if self.failures == 1 {
                tracing::warn!(
                    sink = self.counters.name,
                    error = format!("{error:#}"),
                    "events can't be carried; they wait in the log"
                );
            }
            if self.closing.load(Relaxed) {
                return;
            }
            std::thread::park_timeout(backoff::pause(self.failures, BACK_OFF, &mut self.random));
        }
    }

    /// Until the end, or a failure.
    fn carry(&mut self) -> anyhow::Result<()> {
        let from = self.sink.resume()?;
        let mut follower = Follower::new(&self.dir, from.sequence);
        let mut lost = 0;
        loop {
            // Before the log is looked at: what comes after it is carried the next time.
            let closing = self.closing.load(Relaxed);
            let until = self.queue.counters.on_disk.load(Acquire);
            if from.sequence > until {
                anyhow::bail!(
                    "it holds events up to record {}, and the log only up to {until}: another log?",
                    from.sequence
                );
            }
            while follower.next() < until {
                let (before, sink) = (follower.next(), &mut self.sink);
                let (mut failed, mut n) = (None, 0);
                follower.read(until, |record| {
                    let sequence = record.sequence;
                    let mut index = 0;
                    let events = super::carried_of(record, |carried| {
                        let at = Position { sequence, index };
                        index += 1;
                        if failed.is_none() && at >= from {
                            n += 1;
                            failed = match carried {
                                Carried::Event(event) => sink.take(at, event).err(),
                                Carried::Exposure(exposure) => sink.expose(at, exposure).err(),
                            };
                        }
                    });
                    if events.is_err() {
                        tracing::error!(sequence, "a record of the event log can't be read; it is left out");
                    }
                })?;
                if let Some(error) = failed {
                    return Err(error);
                }
                if follower.next() == before {
                    break;
                }
                self.sink.keep(follower.next(), false)?;
                self.counters.events.fetch_add(n, Relaxed);
            }
            self.sink.keep(follower.next(), closing)?;
            let newly = follower.lost() - std::mem::replace(&mut lost, follower.lost());
            if newly > 0 {
                self.counters.lost.fetch_add(newly, Relaxed);
                tracing::error!(
                    sink = self.counters.name,
                    records = newly,
                    "records of the event log were gone before they were carried"
                );
            }
            self.counters.behind.store(until.saturating_sub(follower.next()), Relaxed);
            if std::mem::take(&mut self.failures) > 0 {
                tracing::info!(sink = self.counters.name, "events are carried again");
            }
            if closing {
                return Ok(());
            }
            std::thread::park_timeout(TICK);
        }
    }
}
