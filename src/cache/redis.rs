//! The second level of the result cache: Redis, shared by replicas.
//!
//! One thread owns the connection. It takes what waits, sends it in one go and reads the answers; a lookup that is not answered within its
//! budget is a miss, and so is everything while there is no connection. A connection that timed out is given up: its late
//! answers would be taken for others'.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rand::SeedableRng;
use rand::rngs::SmallRng;
use redis::{Client, Connection, RedisResult, Value};
use serde::{Deserialize, Serialize};

use super::CacheConfig;
use super::key::CacheKey;
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

/// `[cache.redis]`
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
    /// Checks ranges.
    ///
    /// # Errors
    /// The key, its value (but for the URL, which may hold a password) and its range.
    pub fn validate(&self) -> Result<(), String> {
        let ranges = [
            ("budget_ms", self.budget_ms, 1, 1000),
            ("connect_timeout_ms", self.connect_timeout_ms, 1, 60_000),
            ("max_queued", self.max_queued, 1, 1 << 20),
        ];
        in_range("cache.redis", ranges)?;
        if !(1..=64).contains(&self.key_prefix.len()) || !self.key_prefix.bytes().all(|b| b.is_ascii_graphic()) {
            return Err("cache.redis.key_prefix is not of 1 to 64 visible ASCII characters".to_owned());
        }
        redis_url("cache.redis.url", &self.url)
    }

    fn client(&self) -> RedisResult<Client> {
        Client::open(self.url.as_str())
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
pub struct RedisCounters {
    /// Lookups that found nothing.
    pub misses: AtomicU64,
    /// Lookups that were not answered in time, or without a connection.
    pub unanswered: AtomicU64,
    /// Values that were found and could not be read.
    pub unreadable: AtomicU64,
    /// Values stored.
    pub stored: AtomicU64,
    /// Values that Redis refused, or that found no room in the queue or no connection.
    pub not_stored: AtomicU64,
    /// Times that the connection was lost or could not be made.
    pub failures: AtomicU64,
}

#[derive(Debug)]
enum Op {
    Get { key: CacheKey, shard: u16, ticket: Ticket, asked: Instant },
    Set { key: CacheKey, value: Vec<u8> },
}

/// Takes what was found to its shard.
pub trait FoundSink: Send + Sync {
    /// Hands a value over, `None` for a miss; does not block.
    fn found(&self, shard: u16, ticket: Ticket, value: Option<Vec<u8>>);
}

/// The way to Redis.
#[derive(Debug)]
pub struct RedisCache {
    config: RedisConfig,
    ttl_seconds: u32,
    inbox: Ring<Op>,
    up: AtomicBool,
    breaker: AtomicU8,
    /// Counters.
    pub counters: RedisCounters,
}

impl RedisCache {
    /// `None` where it is off.
    pub fn new(CacheConfig { enabled, ttl_seconds, redis, .. }: &CacheConfig) -> Option<Self> {
        (*enabled && !redis.url.is_empty()).then(|| RedisCache {
            inbox: Ring::new(redis.max_queued as usize, 1),
            config: redis.clone(),
            ttl_seconds: *ttl_seconds,
            up: AtomicBool::new(false),
            breaker: AtomicU8::new(Breaker::Open as u8),
            counters: RedisCounters::default(),
        })
    }

    /// Asks for a value. False: nothing will come; compute.
    pub fn get(&self, key: CacheKey, shard: u16, ticket: Ticket, now: Instant) -> bool {
        self.up.load(Relaxed) && self.inbox.send(Op::Get { key, shard, ticket, asked: now }).is_ok()
    }

    /// Stores a value, if there is a connection.
    pub fn set(&self, key: CacheKey, value: Vec<u8>) {
        if !self.up.load(Relaxed) || self.inbox.send(Op::Set { key, value }).is_err() {
            self.counters.not_stored.fetch_add(1, Relaxed);
        }
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

    /// Starts the thread.
    ///
    /// # Errors
    /// It could not be started.
    pub fn spawn(self: Arc<Self>, sink: Arc<dyn FoundSink>) -> std::io::Result<JoinHandle<()>> {
        std::thread::Builder::new().name("redis".into()).spawn(move || {
            Driver { cache: &self, sink: &*sink, failures: 0, told: false, random: SmallRng::from_os_rng() }.run();
        })
    }
}

struct Driver<'a> {
    cache: &'a RedisCache,
    sink: &'a dyn FoundSink,
    /// In a row.
    failures: u32,
    /// Whether its absence was said.
    told: bool,
    random: SmallRng,
}

impl Driver<'_> {
    fn run(mut self) {
        while !self.cache.inbox.closed() {
            self.wait();
            self.cache.enter(Breaker::HalfOpen);
            let error = match self.connect() {
                Ok(mut connection) => {
                    if std::mem::take(&mut self.told) {
                        tracing::info!("Redis answers again");
                    }
                    self.cache.enter(Breaker::Closed);
                    match self.serve(&mut connection) {
                        Ok(()) => break,
                        Err(error) => error,
                    }
                }
                Err(error) => error,
            };
            self.cache.enter(Breaker::Open);
            self.failures += 1;
            self.cache.counters.failures.fetch_add(1, Relaxed);
            if self.failures > PATIENT_FAILURES && !std::mem::replace(&mut self.told, true) {
                tracing::warn!(%error, "Redis does not answer; results come from this process alone until it does");
            }
            self.drain();
        }
        self.cache.enter(Breaker::Open);
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
            if left.is_zero() || self.cache.inbox.closed() {
                return;
            }
            self.cache.inbox.wait(0, Some(left));
            self.drain();
        }
    }

    fn connect(&self) -> RedisResult<Connection> {
        let timeout = Duration::from_millis(u64::from(self.cache.config.connect_timeout_ms));
        let connection = self.cache.config.client()?.get_connection_with_timeout(timeout)?;
        connection.set_write_timeout(Some(Duration::from_millis(u64::from(self.cache.config.budget_ms))))?;
        Ok(connection)
    }

    /// Answers all that waits: nothing was found.
    fn drain(&self) {
        while let Some(op) = self.cache.inbox.try_pop() {
            self.unanswered(op);
        }
    }

    fn unanswered(&self, op: Op) {
        match op {
            Op::Get { shard, ticket, .. } => {
                self.cache.counters.unanswered.fetch_add(1, Relaxed);
                self.sink.found(shard, ticket, None);
            }
            Op::Set { .. } => drop(self.cache.counters.not_stored.fetch_add(1, Relaxed)),
        }
    }

    /// Until it is closed, or the connection fails.
    fn serve(&mut self, connection: &mut Connection) -> RedisResult<()> {
        let (mut gets, mut sets, mut used) = (Vec::new(), Vec::new(), Instant::now());
        loop {
            while gets.len() + sets.len() < BATCH
                && let Some(op) = self.cache.inbox.try_pop()
            {
                if matches!(op, Op::Get { .. }) { gets.push(op) } else { sets.push(op) }
            }
            let idle = gets.is_empty() && sets.is_empty();
            if idle && self.cache.inbox.closed() {
                return Ok(());
            }
            if idle && used.elapsed() < IDLE_PING {
                self.cache.inbox.wait(0, Some(IDLE_PING.saturating_sub(used.elapsed())));
                continue;
            }
            used = Instant::now();
            let exchanged = self.exchange(connection, &mut gets, &mut sets);
            // What is left of the batch was not answered.
            gets.drain(..).chain(sets.drain(..)).for_each(|op| self.unanswered(op));
            exchanged?;
            self.failures = 0;
        }
    }

    /// One batch, or a ping where there is none; takes out what was answered.
    fn exchange(&self, connection: &mut Connection, gets: &mut Vec<Op>, sets: &mut Vec<Op>) -> RedisResult<()> {
        let RedisCache { config, counters, .. } = self.cache;
        let budget = Duration::from_millis(u64::from(config.budget_ms));
        // What waited too long for a batch before it gets no answer, and none must wait for it.
        let age = |op: &Op| match op {
            Op::Get { asked, .. } => asked.elapsed(),
            Op::Set { .. } => Duration::ZERO,
        };
        gets.extract_if(.., |op| age(op) >= budget).for_each(|late| self.unanswered(late));
        let oldest = gets.iter().map(age).max().unwrap_or_default();
        connection.set_read_timeout(Some(budget.saturating_sub(oldest).max(Duration::from_micros(500))))?;

        let mut packed = Vec::new();
        let name = |key: &CacheKey| format!("{}:1:{key:032x}", config.key_prefix);
        if !gets.is_empty() {
            let mut lookup = redis::cmd("MGET");
            for op in &*gets {
                if let Op::Get { key, .. } = op {
                    lookup.arg(name(key));
                }
            }
            packed.extend(lookup.get_packed_command());
        }
        for op in &*sets {
            if let Op::Set { key, value } = op {
                let mut store = redis::cmd("SETEX");
                store.arg(name(key)).arg(self.cache.ttl_seconds).arg(&value[..]);
                packed.extend(store.get_packed_command());
            }
        }
        if packed.is_empty() {
            packed = redis::cmd("PING").get_packed_command();
            connection.send_packed_command(&packed)?;
            return connection.recv_response().map(drop);
        }
        connection.send_packed_command(&packed)?;
        if !gets.is_empty() {
            let found = match connection.recv_response()? {
                Value::Array(found) if found.len() == gets.len() => found,
                // An error of the server, as while it loads: nothing was found.
                _ => gets.iter().map(|_| Value::Nil).collect(),
            };
            for (op, value) in gets.drain(..).zip(found) {
                let Op::Get { shard, ticket, .. } = op else { continue };
                let value = match value {
                    Value::BulkString(bytes) => Some(bytes),
                    _ => None,
                };
                if value.is_none() {
                    counters.misses.fetch_add(1, Relaxed);
                }
                self.sink.found(shard, ticket, value);
            }
        }
        while !sets.is_empty() {
            let counter = match connection.recv_response()? {
                Value::Okay => &counters.stored,
                // Out of memory, or a replica that may not be written.
                _ => &counters.not_stored,
            };
            counter.fetch_add(1, Relaxed);
            sets.pop();
        }
        Ok(())
    }
}
