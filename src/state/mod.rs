//! Live state above the immutable bundle: events, what they say of users, and what is popular because of them; items and users that
//! came, changed or went.
//!
//! Shards check events and changes and hand them to one thread ([`writer`]), which appends them to the log ([`log`]), applies them
//! ([`live`]) and answers. A start replays the log through the same code.

mod carried;
pub mod change;
pub mod event;
pub mod exposure;
pub mod fold_in;
pub mod follow;
pub mod items;
pub mod live;
pub mod log;
pub mod schema;
pub mod sinks;
pub mod trending;
pub mod users;
pub mod writer;

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::config::in_range;

use change::Record;
pub use live::LiveState;
use sinks::parquet::ParquetConfig;
use sinks::redis::StreamConfig;

/// What a record of the log holds that is carried elsewhere.
enum Carried<'a, 'r> {
    Event(&'a event::Event<'r>),
    Exposure(&'a exposure::Exposure<'r>),
}

/// Hands everything of a record that is carried to `take`; records of changes have nothing.
///
/// # Errors
/// The record is damaged.
fn carried_of(record: log::Logged<'_>, mut take: impl FnMut(Carried<'_, '_>)) -> Result<(), event::Damaged> {
    match record.content()? {
        Record::Events(body) => event::decode_body(body, |event| take(Carried::Event(event))),
        Record::Exposure(body) => {
            take(Carried::Exposure(&exposure::decode_body(body)?));
            Ok(())
        }
        Record::Change(..) => Ok(()),
    }
}

/// `[state]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StateConfig {
    /// Items that may come or change beside the bundle; an upsert of more is refused. 0 to 1e8, default 100000.
    pub live_items_max: u32,
    /// Values of categories and lists that the bundle does not have; beyond it upserts of items are refused. 0 to 1e9, default 1000000.
    pub live_values_max: u32,
    /// Users of whom something may be upserted; an upsert of more is refused. 0 to 1e9, default 1000000.
    pub live_users_max: u32,
}

impl Default for StateConfig {
    fn default() -> Self {
        StateConfig { live_items_max: 100_000, live_values_max: 1_000_000, live_users_max: 1_000_000 }
    }
}

impl StateConfig {
    /// Checks ranges.
    ///
    /// # Errors
    /// The key, its value and its range.
    pub fn validate(&self) -> Result<(), String> {
        let ranges = [
            ("live_items_max", self.live_items_max, 0, 100_000_000),
            ("live_values_max", self.live_values_max, 0, 1_000_000_000),
            ("live_users_max", self.live_users_max, 0, 1_000_000_000),
        ];
        in_range("state", ranges)
    }
}

/// `[events]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EventsConfig {
    /// Directory of the event log, made where it is missing. Empty, the default: events live in memory only, and `durable`
    /// is refused.
    pub log_dir: PathBuf,
    /// A segment of the log ends at this size, bytes. 64 KiB to 1 GiB, default 64 MiB.
    pub segment_bytes: u64,
    /// The oldest segments go when the log is larger, bytes. 1 MiB to 1 TiB, default 4 GiB.
    pub max_bytes: u64,
    /// Segments without a newer event go, hours; 0: never. Default 0.
    pub max_age_hours: u32,
    /// Events that nobody asked to be durable reach the disk within this time, milliseconds. 1 to 60000, default 1000.
    pub sync_interval_ms: u32,
    /// Calls that wait for the log; more are answered `overloaded`. 1 to 65536, default 1024.
    pub max_queued: u32,
    /// Newest items kept per user. 1 to 10000, default 500.
    pub history_per_user: u32,
    /// Users kept; the least recently active go. 1 to 1e9, default 1000000.
    pub max_users: u32,
    /// Share of the answered recommendations that are logged as exposures, 0 to 1. Default 0: none.
    pub exposure_rate: f32,
    /// Events as Parquet files.
    pub parquet: ParquetConfig,
    /// Events as a Redis stream.
    pub redis_stream: StreamConfig,
    /// What the kinds of events say. Events of other kinds are logged and change nothing.
    pub kinds: BTreeMap<String, KindConfig>,
    /// Half-life of live trending, hours. Above 0, default 168.
    pub trending_half_life_hours: f64,
    /// Context keys, as `country`, by whose values it is also counted what trends, of events alone. At most 8, default none.
    pub trending_context_keys: Vec<String>,
    /// Confidence of a history entry of weight 1 when a user's vector is folded in, as in implicit ALS. Above 1, default 40.
    pub fold_in_alpha: f32,
    /// Regularization of the same. 0 or more, default 0.05.
    pub fold_in_regularization: f32,
}

/// What events of one kind say.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KindConfig {
    /// Strength of liking, as in a dataset's weight rules; 0: none.
    pub weight: f32,
    /// Whether the item counts as seen and is not recommended again.
    #[serde(default = "yes")]
    pub seen: bool,
    /// For kinds with a value: from `from` on, the weight is another. Ascending.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub values: Vec<ValueWeight>,
}

/// One step of [`KindConfig::values`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ValueWeight {
    /// Least value.
    pub from: f32,
    /// Weight from there on.
    pub weight: f32,
}

fn yes() -> bool {
    true
}

impl KindConfig {
    /// The weight of an event of this kind; `value` is NaN where the event has none.
    pub fn weight_of(&self, value: f32) -> f32 {
        self.values.iter().rev().find(|step| value >= step.from).map_or(self.weight, |step| step.weight)
    }
}

impl Default for EventsConfig {
    fn default() -> Self {
        let plain = |weight: f32| KindConfig { weight, seen: true, values: Vec::new() };
        let step = |from, weight| ValueWeight { from, weight };
        let rating = KindConfig { values: vec![step(3.0, 0.5), step(4.0, 1.0)], ..plain(0.2) };
        let kinds = [
            ("view", plain(0.2)),
            ("click", plain(0.5)),
            ("purchase", plain(1.0)),
            ("like", plain(1.0)),
            ("dislike", plain(0.0)),
            ("rating", rating),
        ];
        EventsConfig {
            log_dir: PathBuf::new(),
            segment_bytes: 64 << 20,
            max_bytes: 4 << 30,
            max_age_hours: 0,
            sync_interval_ms: 1000,
            max_queued: 1024,
            history_per_user: 500,
            max_users: 1_000_000,
            exposure_rate: 0.0,
            parquet: ParquetConfig::default(),
            redis_stream: StreamConfig::default(),
            kinds: kinds.map(|(name, kind)| (name.to_owned(), kind)).into(),
            trending_half_life_hours: 168.0,
            trending_context_keys: Vec::new(),
            fold_in_alpha: 40.0,
            fold_in_regularization: 0.05,
        }
    }
}

impl EventsConfig {
    /// Checks ranges.
    ///
    /// # Errors
    /// The key, its value and its range.
    pub fn validate(&self) -> Result<(), String> {
        let ranges = [
            ("segment_bytes", self.segment_bytes, 64 << 10, 1 << 30),
            ("max_bytes", self.max_bytes, 1 << 20, 1 << 40),
            ("sync_interval_ms", u64::from(self.sync_interval_ms), 1, 60_000),
            ("max_queued", u64::from(self.max_queued), 1, 65_536),
            ("history_per_user", u64::from(self.history_per_user), 1, 10_000),
            ("max_users", u64::from(self.max_users), 1, 1_000_000_000),
        ];
        in_range("events", ranges)?;
        self.parquet.validate()?;
        self.redis_stream.validate()?;
        if !(0.0..=1.0).contains(&self.exposure_rate) {
            return Err(format!("events.exposure_rate is {}, expected 0 to 1", self.exposure_rate));
        }
        let sinks = [
            ("exposure_rate", self.exposure_rate == 0.0),
            ("parquet.dir", self.parquet.dir.as_os_str().is_empty()),
            ("redis_stream.url", self.redis_stream.url.is_empty()),
        ];
        if let Some((key, _)) = sinks.iter().find(|(_, off)| self.log_dir.as_os_str().is_empty() && !off) {
            return Err(format!("events.{key} needs events.log_dir"));
        }
        let weight = |weight: f32| weight >= 0.0 && weight.is_finite();
        for (name, kind) in &self.kinds {
            if !(1..=event::MAX_KIND_BYTES).contains(&name.len()) {
                return Err(format!("events.kinds.{name}: a kind has 1 to {} bytes", event::MAX_KIND_BYTES));
            }
            if !weight(kind.weight) || !kind.values.iter().all(|step| weight(step.weight) && step.from.is_finite()) {
                return Err(format!("events.kinds.{name}: a weight is a finite number of 0 or more"));
            }
            if !kind.values.is_sorted_by(|a, b| a.from < b.from) {
                return Err(format!("events.kinds.{name}.values: `from` must ascend"));
            }
        }
        if !(self.trending_half_life_hours > 0.0 && self.trending_half_life_hours.is_finite()) {
            let hours = self.trending_half_life_hours;
            return Err(format!("events.trending_half_life_hours is {hours}, expected a number above 0"));
        }
        if self.trending_context_keys.len() > 8 {
            return Err(format!(
                "events.trending_context_keys has {} keys, at most 8",
                self.trending_context_keys.len()
            ));
        }
        if !(self.fold_in_alpha > 1.0 && self.fold_in_alpha.is_finite()) {
            return Err(format!("events.fold_in_alpha is {}, expected a number above 1", self.fold_in_alpha));
        }
        match self.fold_in_regularization {
            some if some >= 0.0 && some.is_finite() => Ok(()),
            other => Err(format!("events.fold_in_regularization is {other}, expected 0 or more")),
        }
    }
}
