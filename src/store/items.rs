//! Follows what changes of items in the store: a stream of ids, and a packed value for each.
//!
//! What it reads becomes an upsert like any other: it goes to the event log, lies over the bundle, is found by searches and ranked by its
//! columns, and is still there when Redis is not. A start reads the stream from its beginning and leaves out what is in force already.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

use redis::{Cmd, FromRedisValue, from_redis_value};

use super::user::{AVAILABLE, Embedding, Target, targets};
use super::value::{Field, FieldKind, FieldValue, Packed, Schema};
use super::{FeaturesConfig, MAX_SCHEMAS, age_ms};
use crate::api::Ticket;
use crate::catalog::generation::Generation;
use crate::context::now_ms;
use crate::link::{FoundSink, Link, Lookup, RedisConfig, Values};
use crate::state::LiveState;
use crate::state::change::{Change, Encoder, Kind, MAX_CHANGES, Value};
use crate::state::writer::{EventQueue, Submission};

/// Entries of the stream read in one go.
const BATCH: usize = 500;
const _: () = assert!(BATCH <= MAX_CHANGES, "one record takes a batch");
/// How often it is looked for more.
const POLL: Duration = Duration::from_millis(200);
/// What reading a batch may take, at least: it is more than a lookup, and nobody waits for it.
const BUDGET_MS: u32 = 1000;

/// What became of items that the stream named, for metrics.
#[derive(Debug, Default)]
pub struct ItemCounters {
    /// Upserted.
    pub upserted: AtomicU64,
    /// As they were.
    pub unchanged: AtomicU64,
    /// Older than allowed.
    pub too_old: AtomicU64,
    /// Without a value.
    pub missing: AtomicU64,
    /// With one that can't be read, or that the log does not take.
    pub unreadable: AtomicU64,
    /// How long after it was made the newest one was upserted, milliseconds.
    pub lag_ms: AtomicI64,
}

/// See the module.
pub struct ItemFollower {
    config: FeaturesConfig,
    generation: Arc<Generation>,
    state: Arc<LiveState>,
    events: Arc<EventQueue>,
    /// The way there.
    pub link: Arc<Link>,
    /// Counters.
    pub counters: ItemCounters,
}

/// A schema and what its fields are of items.
struct Mapping {
    schema: Schema,
    /// The column's name; `None`: nothing that is used.
    columns: Vec<Option<String>>,
    vector: Option<usize>,
    available: Option<usize>,
}

/// An item as the store has it.
#[derive(Debug, Default)]
struct Stored<'a> {
    made_ms: i64,
    columns: Vec<(&'a str, Value<'a>)>,
    vector: Option<Vec<f32>>,
    available: Option<bool>,
}

/// Nobody's lookups come this way.
struct Nobody;

impl FoundSink for Nobody {
    fn found(&self, _: Lookup, _: Option<Values>) {}
}

impl ItemFollower {
    /// `None` where it is off.
    pub fn new(config: &FeaturesConfig, state: &Arc<LiveState>, events: &Arc<EventQueue>) -> Option<Self> {
        if config.redis.url.is_empty() || !config.items {
            return None;
        }
        let redis = RedisConfig { budget_ms: config.redis.budget_ms.max(BUDGET_MS), ..config.redis.clone() };
        Some(ItemFollower {
            link: Arc::new(Link::new("items", &redis)),
            generation: state.generation().clone(),
            config: config.clone(),
            state: state.clone(),
            events: events.clone(),
            counters: ItemCounters::default(),
        })
    }

    /// Starts the link's thread and the one that follows; both end when the link is closed.
    ///
    /// # Errors
    /// A thread could not be started.
    pub fn spawn(self: Arc<Self>) -> std::io::Result<[JoinHandle<()>; 2]> {
        let link = self.link.clone().spawn(Arc::new(Nobody))?;
        let follow = std::thread::Builder::new().name("items".into()).spawn(move || self.run())?;
        Ok([link, follow])
    }

    fn run(&self) {
        let (mut next, mut mappings) = ("0".to_owned(), HashMap::new());
        while !self.link.closed() {
            if !self.step(&mut next, &mut mappings) {
                std::thread::park_timeout(POLL);
            }
        }
    }

    fn ask<T: FromRedisValue>(&self, command: &Cmd) -> Option<T> {
        from_redis_value(self.link.ask(command)?).ok()
    }

    /// Takes what comes next of the stream; whether there was something.
    fn step(&self, next: &mut String, mappings: &mut HashMap<u64, Mapping>) -> bool {
        type Entries = Vec<(String, HashMap<String, String>)>;
        let mut read = redis::cmd("XREAD");
        read.arg("COUNT").arg(BATCH).arg("STREAMS").arg(self.config.items_key()).arg(&**next);
        let Some(Some(streams)) = self.ask::<Option<Vec<(String, Entries)>>>(&read) else { return false };
        let entries: Entries = streams.into_iter().flat_map(|(_, entries)| entries).collect();
        let Some((last, _)) = entries.last() else { return false };
        let ids: BTreeSet<&str> =
            entries.iter().filter_map(|(_, fields)| fields.get("id").map(String::as_str)).collect();
        let ids: Vec<&str> = ids.into_iter().collect();
        let (with_vectors, n) = (self.vectors_of_encoder(), ids.len());
        let mut get = redis::cmd("MGET");
        ids.iter().for_each(|id| {
            get.arg(self.config.key("item", id));
        });
        ids.iter().filter(|_| with_vectors).for_each(|id| {
            get.arg(self.config.embedding_key("item", id));
        });
        let wanted = if with_vectors { 2 * n } else { n };
        let values = match n {
            0 => Some(Vec::new()),
            _ => self.ask::<Vec<Option<Vec<u8>>>>(&get).filter(|values| values.len() == wanted),
        };
        let Some(values) = values else { return false };
        for value in values[..n].iter().flatten() {
            if !self.learn_schema(value, mappings) {
                return false;
            }
        }
        if !self.upsert(&ids, &values, mappings) {
            return false;
        }
        last.clone_into(next);
        true
    }

    fn vectors_of_encoder(&self) -> bool {
        self.config.embeddings && self.generation.item_embeddings.is_some()
    }

    /// Makes the schema of a value known; false: Redis did not say.
    fn learn_schema(&self, value: &[u8], mappings: &mut HashMap<u64, Mapping>) -> bool {
        let Ok(packed) = Packed::of(value) else { return true };
        if mappings.contains_key(&packed.schema) {
            return true;
        }
        let mut get = redis::cmd("GET");
        get.arg(self.config.schema_key(packed.schema));
        let Some(text) = self.ask::<Option<Vec<u8>>>(&get) else { return false };
        let schema = text.and_then(|text| Schema::parse(std::str::from_utf8(&text).ok()?).ok());
        let mapping = schema.filter(|schema| schema.id() == packed.schema).map(|schema| self.map(schema));
        match mapping {
            Some(mapping) => {
                if mappings.len() >= MAX_SCHEMAS {
                    mappings.clear();
                }
                mappings.insert(packed.schema, mapping);
            }
            // It is looked for again with the next value under it.
            None => {
                let schema = format!("{:016x}", packed.schema);
                tracing::warn!(schema, "a schema of items' features is not there or is none");
            }
        }
        true
    }

    fn map(&self, schema: Schema) -> Mapping {
        let (items, texts) = (&self.generation.items.columns, &self.generation.text_columns);
        let mut complaints = Vec::new();
        // What is no column and yet of use.
        let others: Vec<String> = texts.iter().cloned().chain([AVAILABLE.to_owned()]).collect();
        let targets = targets(&schema, items, &others, &mut complaints);
        let is_available = |at: &usize| {
            let field = &schema.fields()[*at];
            field.name == AVAILABLE && targets[*at] == Target::Nothing
        };
        let available = (0..targets.len()).find(is_available);
        for complaint in complaints {
            tracing::warn!(schema = format!("{:016x}", schema.id()), "features of items: {complaint}");
        }
        let column = |(at, target): (usize, &Target)| {
            let Field { name, kind } = &schema.fields()[at];
            let is_text = matches!(kind, FieldKind::Text | FieldKind::List) && texts.contains(name);
            (is_text || matches!(target, Target::Column(_))).then(|| name.clone())
        };
        Mapping {
            columns: targets.iter().enumerate().map(column).collect(),
            vector: targets.iter().position(|target| *target == Target::Vector),
            available,
            schema,
        }
    }

    /// Sends what the values say of the items to the log; false: it does not take more now.
    fn upsert(&self, ids: &[&str], values: &[Option<Vec<u8>>], mappings: &HashMap<u64, Mapping>) -> bool {
        let counters = &self.counters;
        let now = now_ms();
        let most = i64::from(self.config.item_max_age_seconds) * 1000;
        let mut records = vec![Encoder::carrying(Kind::UpsertItems)];
        let (mut n, mut newest) = (0, 0);
        for (at, id) in ids.iter().enumerate() {
            let packed = values[at].as_deref();
            let encoded = values.get(ids.len() + at).and_then(|value| value.as_deref());
            if packed.is_none() && encoded.is_none() {
                counters.missing.fetch_add(1, Relaxed);
                continue;
            }
            let stored = packed.map(|value| self.read(value, mappings));
            let vector = encoded.map(|value| Embedding::of(value, self.dim()));
            if matches!(stored, Some(None)) || matches!(vector, Some(None)) {
                counters.unreadable.fetch_add(1, Relaxed);
            }
            let mut stored = stored.flatten().unwrap_or_default();
            if most > 0 && stored.made_ms > 0 && age_ms(stored.made_ms, now) > most {
                counters.too_old.fetch_add(1, Relaxed);
                stored = Stored::default();
            }
            newest = newest.max(stored.made_ms);
            let vector = vector.as_ref().and_then(Option::as_ref).map(Embedding::values).or(stored.vector.as_deref());
            let Stored { columns, available, .. } = &stored;
            if columns.is_empty() && vector.is_none() && available.is_none() {
                continue;
            }
            let change = Change { id, available: *available, whole: false, columns, vector };
            if self.state.holds_item(&change) {
                counters.unchanged.fetch_add(1, Relaxed);
                continue;
            }
            let pushed = records.last_mut().is_some_and(|record| record.push(&change).is_ok()) || {
                // It was full; alone the item fits, or never does.
                records.push(Encoder::carrying(Kind::UpsertItems));
                records.last_mut().is_some_and(|record| record.push(&change).is_ok())
            };
            match pushed {
                true => n += 1,
                false => drop(counters.unreadable.fetch_add(1, Relaxed)),
            }
        }
        for record in records.into_iter().filter(|record| !record.is_empty()) {
            let submission = Submission { record: record.record(), durable: false, shard: u16::MAX, ticket: Ticket(0) };
            if self.events.push(submission).is_err() {
                // What was sent is unchanged when it is read again.
                return false;
            }
        }
        counters.upserted.fetch_add(n, Relaxed);
        if n > 0 && newest > 0 {
            counters.lag_ms.store(age_ms(newest, now_ms()), Relaxed);
        }
        true
    }

    fn dim(&self) -> usize {
        self.generation.item_embeddings.as_ref().map_or(0, |items| items.dim)
    }

    fn read<'a>(&self, value: &'a [u8], mappings: &'a HashMap<u64, Mapping>) -> Option<Stored<'a>> {
        let packed = Packed::of(value).ok()?;
        let mapping = mappings.get(&packed.schema)?;
        let mut stored = Stored { made_ms: packed.made_ms, ..Stored::default() };
        let mut fits = true;
        packed
            .read(&mapping.schema, |at, value| {
                if mapping.vector == Some(at) {
                    if let FieldValue::Vector(values) = value {
                        fits &= values.len() == self.dim() && values.iter().all(|value| value.is_finite());
                        stored.vector = Some(values);
                    }
                } else if mapping.available == Some(at) {
                    stored.available = match value {
                        FieldValue::Number(number) => Some(number != 0.0),
                        _ => None,
                    };
                } else if let Some(name) = &mapping.columns[at] {
                    let value = match value {
                        FieldValue::Number(number) => Value::Number(f64::from(number)),
                        FieldValue::Text(text) => Value::Text(text),
                        FieldValue::List(list) => Value::List(list),
                        FieldValue::Missing | FieldValue::Vector(_) | FieldValue::Items(_) => Value::Missing,
                    };
                    stored.columns.push((name, value));
                }
            })
            .ok()?;
        fits.then_some(stored)
    }
}
