//! The way to a Redis.
//!
//! One thread owns the connection. It takes what waits, sends it in one go and reads the answers; a lookup that is not answered within its
//! budget is unanswered, and so is everything while there is no connection. A connection that timed out is given up: its late
//! answers would be taken for others'.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rand::SeedableRng;
use rand::rngs::SmallRng;
use redis::{Client, Cmd, Connection, RedisResult, Value};
use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

use crate::api::Ticket;
use crate::backoff;
use crate::config::{in_range, redis_url};
use crate::ring::Ring;

/// Operations sent in one go.
const BATCH: usize = 64;
/// Failures in a row after which it waits before it tries again.
const PATIENT_FAILURES: u32 = 2;
/// First and longest wait, before jitter.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// While nothing happens, the connection is tried this often.
const IDLE_PING: Duration = Duration::from_secs(1);

/// `[cache.redis]`, `[features.redis]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RedisConfig {
    /// `redis://[USER:PASSWORD@]HOST[:PORT][/DB]`, or `unix:///PATH`. Empty, the default: off.
    pub url: String,
    /// What a lookup may cost, milliseconds. 1 to 1000, default 5.
    pub budget_ms: u32,
    /// Time to connect and to authenticate, milliseconds. 1 to 60000, default 1000.
    pub connect_timeout_ms: u32,
    /// Keys begin with it. Default `tastemaker`.
    pub key_prefix: String,
    /// Operations that wait; what is more is not looked up and not stored. 1 to 1048576, default 4096.
    pub max_queued: u32,
}

impl Default for RedisConfig {
    fn default() -> Self {
        RedisConfig {
            url: String::new(),
            budget_ms: 5,
            connect_timeout_ms: 1000,
            key_prefix: "tastemaker".into(),
            max_queued: 4096,
        }
    }
}

impl RedisConfig {
    /// Checks ranges; `section` is where it stands, for the error.
    ///
    /// # Errors
    /// The key, its value (but for the URL, which may hold a password) and its range.
    pub fn validate(&self, section: &str) -> Result<(), String> {
        let ranges = [
            ("budget_ms", self.budget_ms, 1, 1000),
            ("connect_timeout_ms", self.connect_timeout_ms, 1, 60_000),
            ("max_queued", self.max_queued, 1, 1 << 20),
        ];
        in_range(section, ranges)?;
        if !(1..=64).contains(&self.key_prefix.len()) || !self.key_prefix.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(format!("{section}.key_prefix is not of 1 to 64 visible ASCII characters"));
        }
        redis_url(&format!("{section}.url"), &self.url)
    }

    fn client(&self) -> RedisResult<Client> {
        Client::open(self.url.as_str())
    }

    /// A connection for a command, which may wait.
    ///
    /// # Errors
    /// It can't be made in time; the text does not show the URL.
    pub fn connect(&self) -> RedisResult<Connection> {
        self.client()?.get_connection_with_timeout(Duration::from_millis(u64::from(self.connect_timeout_ms)))
    }
}

/// What the connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Breaker {
    /// It works.
    Closed = 0,
    /// It does not; nothing is sent.
    Open = 1,
    /// It is being tried.
    HalfOpen = 2,
}

/// Counters, for metrics.
#[derive(Debug, Default)]
pub struct LinkCounters {
    /// Batches sent, each one round trip.
    pub round_trips: AtomicU64,
    /// Keys that were there.
    pub found: AtomicU64,
    /// Keys that were not.
    pub misses: AtomicU64,
    /// Lookups that were not answered in time, or without a connection.
    pub unanswered: AtomicU64,
    /// Values that were found and could not be read; counted by who reads them.
    pub unreadable: AtomicU64,
    /// Values stored.
    pub stored: AtomicU64,
    /// Values that Redis refused, or that found no room in the queue or no connection.
    pub not_stored: AtomicU64,
    /// Times that the connection was lost or could not be made.
    pub failures: AtomicU64,
}

/// Names of keys.
pub type Keys = SmallVec<[Vec<u8>; 2]>;
/// What lies under them; `None`: nothing.
pub type Values = SmallVec<[Option<Vec<u8>>; 2]>;

/// A lookup on its way.
#[derive(Debug)]
pub struct Lookup {
    /// What is looked up, together.
    pub keys: Keys,
    /// Who asks.
    pub shard: u16,
    /// The shard's name for the call.
    pub ticket: Ticket,
    /// For who takes the answer.
    pub mark: u64,
    /// When its budget began.
    pub asked: Instant,
}

#[derive(Debug)]
enum Op {
    Get(Lookup),
    /// A command that stores something.
    Store(Vec<u8>),
    /// Any command, for a thread that waits.
    Ask(Vec<u8>, SyncSender<Option<Value>>),
}

/// Takes what was found to who asked.
pub trait FoundSink: Send + Sync {
    /// Hands values over, one for each key; `None`: the lookup was not answered. Does not block.
    fn found(&self, lookup: Lookup, values: Option<Values>);
}

/// The way to one Redis for one use.
#[derive(Debug)]
pub struct Link {
    /// The use, in metrics and logs.
    pub name: &'static str,
    config: RedisConfig,
    inbox: Ring<Op>,
    up: AtomicBool,
    breaker: AtomicU8,
    /// Counters.
    pub counters: LinkCounters,
}

impl Link {
    /// Not yet connected.
    pub fn new(name: &'static str, config: &RedisConfig) -> Self {
        Link {
            name,
            inbox: Ring::new(config.max_queued as usize, 1),
            config: config.clone(),
            up: AtomicBool::new(false),
            breaker: AtomicU8::new(Breaker::Open as u8),
            counters: LinkCounters::default(),
        }
    }

    /// What keys begin with.
    pub fn prefix(&self) -> &str {
        &self.config.key_prefix
    }

    /// Whether the connection works.
    pub fn is_up(&self) -> bool {
        self.up.load(Relaxed)
    }

    /// Sends a lookup on its way. False: nothing will come, for there is no connection, or too many operations wait.
    pub fn get(&self, lookup: Lookup) -> bool {
        self.is_up() && self.inbox.send(Op::Get(lookup)).is_ok()
    }

    /// Sends a command that stores something, if there is a connection.
    pub fn store(&self, command: &Cmd) {
        if !self.is_up() || self.inbox.send(Op::Store(command.get_packed_command())).is_err() {
            self.counters.not_stored.fetch_add(1, Relaxed);
        }
    }

    /// Sends a command and waits for its answer; for threads that may. `None`: it was not answered, or with an error.
    pub fn ask(&self, command: &Cmd) -> Option<Value> {
        let (reply, answer) = sync_channel(1);
        if !self.is_up() || self.inbox.send(Op::Ask(command.get_packed_command(), reply)).is_err() {
            return None;
        }
        // The link's thread answers whatever it takes, or lets go of it; but at its end something may be left behind.
        let RedisConfig { budget_ms, connect_timeout_ms, .. } = self.config;
        answer.recv_timeout(Duration::from_millis(u64::from(2 * budget_ms + connect_timeout_ms))).ok().flatten()
    }

    /// The state of the connection.
    pub fn breaker(&self) -> Breaker {
        match self.breaker.load(Relaxed) {
            0 => Breaker::Closed,
            1 => Breaker::Open,
            _ => Breaker::HalfOpen,
        }
    }

    fn enter(&self, state: Breaker) {
        self.up.store(state == Breaker::Closed, Relaxed);
        self.breaker.store(state as u8, Relaxed);
    }

    /// Ends the thread.
    pub fn close(&self) {
        self.inbox.close();
    }

    /// Whether [`Self::close`] was called.
    pub fn closed(&self) -> bool {
        self.inbox.closed()
    }

    /// Starts the thread.
    ///
    /// # Errors
    /// It could not be started.
    pub fn spawn(self: Arc<Self>, sink: Arc<dyn FoundSink>) -> std::io::Result<JoinHandle<()>> {
        std::thread::Builder::new().name(format!("redis-{}", self.name)).spawn(move || {
            Driver { link: &self, sink: &*sink, failures: 0, told: false, random: SmallRng::from_os_rng() }.run();
        })
    }
}

struct Driver<'a> {
    link: &'a Link,
    sink: &'a dyn FoundSink,
    /// In a row.
    failures: u32,
    /// Whether its absence was said.
    told: bool,
    random: SmallRng,
}

impl Driver<'_> {
    fn run(mut self) {
        let name = self.link.name;
        while !self.link.closed() {
            self.wait();
            self.link.enter(Breaker::HalfOpen);
            let error = match self.connect() {
                Ok(mut connection) => {
                    if std::mem::take(&mut self.told) {
                        tracing::info!(of = name, "Redis answers again");
                    }
                    self.link.enter(Breaker::Closed);
                    match self.serve(&mut connection) {
                        Ok(()) => break,
                        Err(error) => error,
                    }
                }
                Err(error) => error,
            };
            self.link.enter(Breaker::Open);
            self.failures += 1;
            self.link.counters.failures.fetch_add(1, Relaxed);
            if self.failures > PATIENT_FAILURES && !std::mem::replace(&mut self.told, true) {
                tracing::warn!(of = name, %error, "Redis does not answer; serving goes on without it until it does");
            }
            self.drain();
        }
        self.link.enter(Breaker::Open);
        self.drain();
    }

    /// Between two attempts; at once after the first failures.
    fn wait(&mut self) {
        let over = self.failures.saturating_sub(PATIENT_FAILURES);
        if over == 0 {
            return;
        }
        let until = Instant::now() + backoff::pause(over, BACK_OFF, &mut self.random);
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || self.link.closed() {
                return;
            }
            self.link.inbox.wait(0, Some(left));
            self.drain();
        }
    }

    fn connect(&self) -> RedisResult<Connection> {
        let connection = self.link.config.connect()?;
        connection.set_write_timeout(Some(Duration::from_millis(u64::from(self.link.config.budget_ms))))?;
        Ok(connection)
    }

    /// Answers all that waits: nothing was found.
    fn drain(&self) {
        while let Some(op) = self.link.inbox.try_pop() {
            self.unanswered(op);
        }
    }

    fn unanswered(&self, op: Op) {
        let counters = &self.link.counters;
        match op {
            Op::Get(lookup) => {
                counters.unanswered.fetch_add(1, Relaxed);
                self.sink.found(lookup, None);
            }
            Op::Store(_) => drop(counters.not_stored.fetch_add(1, Relaxed)),
            // Who waits hears that the other end is gone.
            Op::Ask(..) => {}
        }
    }

    /// Until it is closed, or the connection fails.
    fn serve(&mut self, connection: &mut Connection) -> RedisResult<()> {
        let (mut gets, mut others, mut used) = (Vec::new(), Vec::new(), Instant::now());
        loop {
            while gets.len() + others.len() < BATCH
                && let Some(op) = self.link.inbox.try_pop()
            {
                match op {
                    Op::Get(lookup) => gets.push(lookup),
                    other => others.push(other),
                }
            }
            let idle = gets.is_empty() && others.is_empty();
            if idle && self.link.closed() {
                return Ok(());
            }
            if idle && used.elapsed() < IDLE_PING {
                self.link.inbox.wait(0, Some(IDLE_PING.saturating_sub(used.elapsed())));
                continue;
            }
            used = Instant::now();
            let exchanged = self.exchange(connection, &mut gets, &mut others);
            // What is left of the batch was not answered.
            gets.drain(..).map(Op::Get).chain(others.drain(..)).for_each(|op| self.unanswered(op));
            exchanged?;
            self.failures = 0;
        }
    }

    /// One batch, or a ping where there is none; takes out what was answered.
    fn exchange(&self, connection: &mut Connection, gets: &mut Vec<Lookup>, others: &mut Vec<Op>) -> RedisResult<()> {
        let Link { config, counters, .. } = self.link;
        let budget = Duration::from_millis(u64::from(config.budget_ms));
        // What waited too long for a batch before it gets no answer, and none must wait for it.
        gets.extract_if(.., |lookup| lookup.asked.elapsed() >= budget).for_each(|late| self.unanswered(Op::Get(late)));
        let oldest = gets.iter().map(|lookup| lookup.asked.elapsed()).max().unwrap_or_default();
        connection.set_read_timeout(Some(budget.saturating_sub(oldest).max(Duration::from_micros(500))))?;

        let mut packed = Vec::new();
        if !gets.is_empty() {
            let mut lookup = redis::cmd("MGET");
            for key in gets.iter().flat_map(|lookup| &lookup.keys) {
                lookup.arg(&key[..]);
            }
            packed.extend(lookup.get_packed_command());
        }
        for op in &*others {
            if let Op::Store(command) | Op::Ask(command, _) = op {
                packed.extend_from_slice(command);
            }
        }
        if packed.is_empty() {
            packed = redis::cmd("PING").get_packed_command();
            connection.send_packed_command(&packed)?;
            return connection.recv_response().map(drop);
        }
        connection.send_packed_command(&packed)?;
        counters.round_trips.fetch_add(1, Relaxed);
        if !gets.is_empty() {
            let n: usize = gets.iter().map(|lookup| lookup.keys.len()).sum();
            let found = match connection.recv_response()? {
                Value::Array(found) if found.len() == n => Some(found),
                // An error of the server, as while it loads.
                _ => None,
            };
            let answered = if found.is_some() { gets.len() } else { 0 };
            let mut found = found.into_iter().flatten();
            for lookup in gets.drain(..answered) {
                let value = |value| match value {
                    Value::BulkString(bytes) => Some(bytes),
                    _ => None,
                };
                let values: Values = found.by_ref().take(lookup.keys.len()).map(value).collect();
                let there = values.iter().flatten().count();
                counters.found.fetch_add(there as u64, Relaxed);
                counters.misses.fetch_add((values.len() - there) as u64, Relaxed);
                self.sink.found(lookup, Some(values));
            }
        }
        // From the last: the list shrinks as answers come, and who did not get one is told.
        others.reverse();
        while !others.is_empty() {
            let answer = connection.recv_response()?;
            match (others.pop(), answer) {
                // Out of memory, or a replica that may not be written.
                (Some(Op::Store(_)), Value::ServerError(_)) => drop(counters.not_stored.fetch_add(1, Relaxed)),
                (Some(Op::Store(_)), _) => drop(counters.stored.fetch_add(1, Relaxed)),
                (Some(Op::Ask(_, reply)), answer) => {
                    let answer = (!matches!(answer, Value::ServerError(_))).then_some(answer);
                    // Nobody may wait for it any more.
                    let _ = reply.send(answer);
                }
                (Some(Op::Get(_)) | None, _) => {}
            }
        }
        Ok(())
    }
}
