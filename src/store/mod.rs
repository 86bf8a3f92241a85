//! Feature store in Redis: what other processes write of users, and what an external encoder makes of them, shared by replicas.
//!
//! A call of a user looks into the memory tier; what that does not know is asked for in one lookup, which travels with those of other
//! calls in one round trip. What does not come in time is done without: the bundle, events and upserts are always there. Items are not
//! looked up by call, for a slate ranks hundreds: [`items`] follows what changes of them.

pub mod items;
pub mod memory;
pub mod user;
pub mod value;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use parking_lot::RwLock;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use crate::api::Ticket;
use crate::catalog::generation::{Generation, Interaction};
use crate::config::in_range;
use crate::context::{Reason, now_ms};
use crate::link::{Keys, Link, Lookup, RedisConfig, Values};
use crate::state::LiveState;
use crate::state::change::{self, Record};
use crate::state::event::Damaged;
use crate::state::users::Profile;
use memory::{Memory, MemoryTier};
use user::{Embedding, StoredUser};
use value::{FieldKind, FieldValue, Packed, Schema, StoredItem};

/// `[features]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FeaturesConfig {
    /// Whether users' packed values are read. Default true.
    pub users: bool,
    /// Whether changes of items are followed. Default true.
    pub items: bool,
    /// Whether users' vectors are taken from an external encoder where it has written one, in the place of trained ones, and items' vectors
    /// where changes of items are followed. Default false.
    pub embeddings: bool,
    /// Embeddings lie under `PREFIX:user:ID` and `PREFIX:item:ID`. 1 to 64 visible characters, default `emb`.
    pub embedding_prefix: String,
    /// How long an embedding in memory is used before it is read again, and kept in Redis by who writes it with `tastemaker store`, seconds.
    /// 1 to 86400, default 3600.
    pub embedding_ttl_seconds: u32,
    /// Memory for what was read, bytes; users and embeddings have a half each. 1 MiB to 1 TiB, default 64 MiB.
    pub memory_bytes: u64,
    /// How long a user's value in memory is used before it is read again, seconds. 1 to 86400, default 30.
    pub memory_ttl_seconds: u32,
    /// How long a user that was not there is taken not to be there, unless an event or an upsert comes, seconds. 0 to 3600, default 10.
    pub negative_ttl_seconds: u32,
    /// Users' values that were made longer ago are not used, seconds. 0 to 31536000; 0, the default: all are.
    pub user_max_age_seconds: u32,
    /// The same of items, when their change is read.
    pub item_max_age_seconds: u32,
    /// Whether upserts and deletions of users over the protocols are written there, too. Default false.
    pub write_through: bool,
    /// How long Redis keeps what was written so, seconds. 0 to 31536000; 0, the default: as long as it lives.
    pub write_ttl_seconds: u32,
    /// The Redis.
    pub redis: RedisConfig,
}

impl Default for FeaturesConfig {
    fn default() -> Self {
        FeaturesConfig {
            users: true,
            items: true,
            embeddings: false,
            embedding_prefix: "emb".into(),
            embedding_ttl_seconds: 3600,
            memory_bytes: 64 << 20,
            memory_ttl_seconds: 30,
            negative_ttl_seconds: 10,
            user_max_age_seconds: 0,
            item_max_age_seconds: 0,
            write_through: false,
            write_ttl_seconds: 0,
            redis: RedisConfig::default(),
        }
    }
}

impl FeaturesConfig {
    /// Checks ranges.
    ///
    /// # Errors
    /// The key, its value and its range.
    pub fn validate(&self) -> Result<(), String> {
        if !((1 << 20)..=(1 << 40)).contains(&self.memory_bytes) {
            return Err(format!("features.memory_bytes is {}, expected 1 MiB to 1 TiB", self.memory_bytes));
        }
        let year = 31_536_000;
        let ranges = [
            ("embedding_ttl_seconds", self.embedding_ttl_seconds, 1, 86_400),
            ("memory_ttl_seconds", self.memory_ttl_seconds, 1, 86_400),
            ("negative_ttl_seconds", self.negative_ttl_seconds, 0, 3600),
            ("user_max_age_seconds", self.user_max_age_seconds, 0, year),
            ("item_max_age_seconds", self.item_max_age_seconds, 0, year),
            ("write_ttl_seconds", self.write_ttl_seconds, 0, year),
        ];
        in_range("features", ranges)?;
        let prefix = &self.embedding_prefix;
        if !(1..=64).contains(&prefix.len()) || !prefix.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err("features.embedding_prefix is not of 1 to 64 visible ASCII characters".to_owned());
        }
        self.redis.validate("features.redis")
    }

    /// The key of a packed value, or what such keys begin with.
    pub fn key(&self, kind: &str, id: &str) -> Vec<u8> {
        format!("{}:f1:{kind}:{id}", self.redis.key_prefix).into_bytes()
    }

    /// The key of a schema's text, by its id.
    pub fn schema_key(&self, schema: u64) -> Vec<u8> {
        self.key("schema", &format!("{schema:016x}"))
    }

    /// The key of the stream of ids of items that changed.
    pub fn items_key(&self) -> Vec<u8> {
        format!("{}:f1:items", self.redis.key_prefix).into_bytes()
    }

    /// The key of an embedding.
    pub fn embedding_key(&self, kind: &str, id: &str) -> Vec<u8> {
        format!("{}:{kind}:{id}", self.embedding_prefix).into_bytes()
    }
}

/// What is looked up of a user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// The packed value.
    User = 0,
    /// The external embedding.
    Embedding = 1,
}

impl Kind {
    /// Number of kinds.
    pub const COUNT: usize = 2;
    /// All kinds.
    pub const ALL: [Kind; Self::COUNT] = [Kind::User, Kind::Embedding];

    /// The name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Kind::User => "user",
            Kind::Embedding => "embedding",
        }
    }
}

/// How a lookup of a call ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Level {
    /// That kind is not looked up.
    #[default]
    Off = 0,
    /// In memory, fresh.
    Memory = 1,
    /// In memory it was known that there is none.
    Negative = 2,
    /// In Redis.
    Redis = 3,
    /// Redis has none, or none that can be read.
    Missing = 4,
    /// In memory, and Redis did not say whether there is a newer one.
    Stale = 5,
    /// There is one that is older than the configuration allows.
    TooOld = 6,
    /// Redis did not answer, and nothing is in memory.
    Away = 7,
}

impl Level {
    /// Number of levels.
    pub const COUNT: usize = 8;
    /// All but [`Level::Off`].
    pub const ALL: [Level; Self::COUNT - 1] =
        [Level::Memory, Level::Negative, Level::Redis, Level::Missing, Level::Stale, Level::TooOld, Level::Away];

    /// The name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Level::Off => "off",
            Level::Memory => "memory",
            Level::Negative => "negative",
            Level::Redis => "redis",
            Level::Missing => "missing",
            Level::Stale => "stale",
            Level::TooOld => "too_old",
            Level::Away => "away",
        }
    }
}

/// What the store says of a user, for one call.
#[derive(Clone, Debug, Default)]
pub struct Known {
    /// The packed value.
    pub user: Option<Arc<StoredUser>>,
    /// The external embedding.
    pub embedding: Option<Arc<Embedding>>,
    /// Where they came from, by [`Kind`].
    pub levels: [Level; Kind::COUNT],
    /// Why something is not known that should be.
    pub away: Option<Reason>,
}

impl Known {
    /// Names all that is known of a user: `of_state` is [`crate::state::LiveState::version_of`]. The same where the store has nothing.
    pub fn version(&self, of_state: u64) -> u64 {
        if self.user.is_none() && self.embedding.is_none() && self.away.is_none() {
            return of_state;
        }
        let user = self.user.as_ref().map_or(0, |user| user.digest());
        let embedding = self.embedding.as_ref().map_or(0, |embedding| embedding.digest());
        let parts = [of_state, user, embedding, u64::from(self.away.is_some())];
        xxh3_64(parts.map(u64::to_le_bytes).as_flattened()).max(1)
    }

    /// How old the packed value is, seconds.
    pub fn age_seconds(&self, now_ms: i64) -> Option<f64> {
        Some(age_ms(self.user.as_ref()?.made_ms, now_ms) as f64 / 1000.0)
    }
}

/// Clocks differ: nothing is younger than now.
fn age_ms(made_ms: i64, now_ms: i64) -> i64 {
    now_ms.saturating_sub(made_ms).max(0)
}

/// What a lookup brought; `None`: it was not asked for.
#[derive(Debug, Default)]
pub struct Learned {
    user: Option<Option<Arc<StoredUser>>>,
    embedding: Option<Option<Arc<Embedding>>>,
}

/// What a call is to do for its user.
#[derive(Debug)]
pub enum Asked {
    /// Go on.
    Ready(Known),
    /// Send a lookup of these, and go on when it is back.
    Wait(Keys),
}

/// A lookup of a schema is nobody's call.
const NOBODY: u16 = u16::MAX;
/// How long a schema that was not there is taken not to be there.
const SCHEMA_RETRY: Duration = Duration::from_secs(5);

/// Schemas that are remembered; a store has a few.
const MAX_SCHEMAS: usize = 1024;

/// A schema by its id: how it maps to the bundle, or when it was looked for and not found.
type Mapped = Result<Arc<user::Mapping>, Instant>;

/// Users in the store; shared by all shards.
pub struct FeatureStore {
    config: FeaturesConfig,
    generation: Arc<Generation>,
    /// The way there.
    pub link: Arc<Link>,
    users: Option<MemoryTier<StoredUser>>,
    embeddings: Option<MemoryTier<Embedding>>,
    schemas: RwLock<HashMap<u64, Mapped>>,
    /// What the keys of the kinds begin with.
    prefixes: [Vec<u8>; Kind::COUNT],
    /// What is written under.
    own: user::Mapping,
}

impl std::fmt::Debug for FeatureStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "FeatureStore {{ link: {:?} }}", self.link)
    }
}

impl FeatureStore {
    /// `None` where it is off. An embedding replaces vectors of the bundle's dimension: without item embeddings there are none.
    pub fn new(config: &FeaturesConfig, generation: &Arc<Generation>) -> Option<Self> {
        if config.redis.url.is_empty() || !(config.users || config.embeddings) {
            return None;
        }
        let seconds = |n: u32| Duration::from_secs(u64::from(n));
        let negative = seconds(config.negative_ttl_seconds);
        let users = || MemoryTier::new(config.memory_bytes / 2, seconds(config.memory_ttl_seconds), negative);
        let embeddings = || MemoryTier::new(config.memory_bytes / 2, seconds(config.embedding_ttl_seconds), negative);
        let has_vectors = generation.item_embeddings.is_some();
        Some(FeatureStore {
            link: Arc::new(Link::new("features", &config.redis)),
            users: config.users.then(users),
            embeddings: (config.embeddings && has_vectors).then(embeddings),
            schemas: RwLock::default(),
            prefixes: [config.key("user", ""), config.embedding_key("user", "")],
            own: user::Mapping::of_columns(generation),
            generation: generation.clone(),
            config: config.clone(),
        })
    }

    /// Memory in use, bytes, about, by kind.
    pub fn memory_bytes(&self) -> [u64; Kind::COUNT] {
        [self.users.as_ref().map_or(0, MemoryTier::bytes), self.embeddings.as_ref().map_or(0, MemoryTier::bytes)]
    }

    /// What is known of a user, or what to ask for. `version`: what events and upserts say.
    pub fn user(&self, id: &str, version: u64, now: Instant, now_ms: i64) -> Asked {
        let memories = self.memories(id, version, now);
        let ask = [
            memories.0.as_ref().is_some_and(|memory| !matches!(memory, Memory::Fresh(_))),
            memories.1.as_ref().is_some_and(|memory| !matches!(memory, Memory::Fresh(_))),
        ];
        if ask.contains(&true) && self.link.is_up() {
            let name = |kind: Kind| [&self.prefixes[kind as usize], id.as_bytes()].concat();
            return Asked::Wait(Kind::ALL.into_iter().filter(|&kind| ask[kind as usize]).map(name).collect());
        }
        Asked::Ready(self.settle(memories, Learned::default(), Reason::Failed, now_ms))
    }

    /// Sends a lookup on its way. False: nothing will come.
    pub fn ask(&self, keys: Keys, shard: u16, ticket: Ticket, version: u64, now: Instant) -> bool {
        self.link.get(Lookup { keys, shard, ticket, mark: version, asked: now })
    }

    /// What is known of a user after a lookup; `None`: it was not answered.
    pub fn after(&self, id: &str, version: u64, learned: Option<Learned>, now: Instant, now_ms: i64) -> Known {
        self.settle(self.memories(id, version, now), learned.unwrap_or_default(), Reason::Deadline, now_ms)
    }

    fn memories(&self, id: &str, version: u64, now: Instant) -> Memories {
        let of_user = self.users.as_ref().map(|tier| tier.get(id, version, now));
        (of_user, self.embeddings.as_ref().map(|tier| tier.get(id, version, now)))
    }

    fn settle(&self, (user, embedding): Memories, learned: Learned, reason: Reason, now_ms: i64) -> Known {
        let (mut known, mut away) = (Known::default(), false);
        let mut decide = |kind: Kind, level: Level| {
            away |= level == Level::Away;
            known.levels[kind as usize] = level;
        };
        if let Some(memory) = user {
            let (mut value, mut level) = chosen(memory, learned.user);
            let most = i64::from(self.config.user_max_age_seconds) * 1000;
            if most > 0 && value.as_ref().is_some_and(|user| age_ms(user.made_ms, now_ms) > most) {
                (value, level) = (None, Level::TooOld);
            }
            known.user = value;
            decide(Kind::User, level);
        }
        if let Some(memory) = embedding {
            let (value, level) = chosen(memory, learned.embedding);
            known.embedding = value;
            decide(Kind::Embedding, level);
        }
        known.away = away.then_some(reason);
        known
    }

    /// Reads what a lookup brought and keeps it in memory; for the link's thread. `None`: it goes on, for a schema is missing.
    pub fn learn(&self, lookup: Lookup, values: Option<Values>) -> Option<(u16, Ticket, Option<Learned>)> {
        let (shard, ticket) = (lookup.shard, lookup.ticket);
        let Some(values) = values else { return (shard != NOBODY).then_some((shard, ticket, None)) };
        if shard == NOBODY {
            self.learn_schema(&lookup, values);
            return None;
        }
        let mut learned = Learned::default();
        for (key, value) in lookup.keys.iter().zip(&values) {
            if let (Some(tier), Some(id)) = (&self.users, suffix(key, &self.prefixes[Kind::User as usize])) {
                let user = match value.as_deref().map(|bytes| self.read(bytes)) {
                    None => None,
                    Some(Read::User(user)) => Some(user),
                    Some(Read::Unreadable) => {
                        self.link.counters.unreadable.fetch_add(1, Relaxed);
                        None
                    }
                    Some(Read::Under(schema)) => {
                        let keys = smallvec::smallvec![self.config.schema_key(schema)];
                        let of_schema = Lookup { keys, shard: NOBODY, mark: schema, ..lookup };
                        // The schema first: then the value can be read.
                        return match self.link.get(of_schema) {
                            true => self.again(lookup),
                            false => Some((shard, ticket, None)),
                        };
                    }
                };
                tier.put(id, user.clone(), lookup.mark, Instant::now());
                learned.user = Some(user);
            } else if let (Some(tier), Some(id)) =
                (&self.embeddings, suffix(key, &self.prefixes[Kind::Embedding as usize]))
            {
                let embedding = value.as_deref().and_then(|bytes| {
                    let embedding = self.embedding(bytes);
                    if embedding.is_none() {
                        self.link.counters.unreadable.fetch_add(1, Relaxed);
                    }
                    embedding.map(Arc::new)
                });
                tier.put(id, embedding.clone(), lookup.mark, Instant::now());
                learned.embedding = Some(embedding);
            }
        }
        Some((shard, ticket, Some(learned)))
    }

    /// Writes what a record of the log says of users to the store, where that is configured, and to the memory tier, so that the next call here
    /// finds it. Best effort: what can't be written is counted, and known to this process alone.
    pub fn write_through(&self, state: &LiveState, record: &[u8]) {
        let (true, Ok(Record::Change(kind @ (change::Kind::UpsertUsers | change::Kind::DeleteUsers), body))) =
            (self.config.write_through, Record::of(record))
        else {
            return;
        };
        let schema = self.own.schema();
        let mut set = redis::cmd("SET");
        set.arg(self.config.schema_key(schema.id())).arg(schema.text());
        // With each record: Redis may have been flushed.
        self.link.store(&set);
        // Damage was refused by the shard.
        let _ = change::decode::<Damaged>(body, |change| {
            let key = [&self.prefixes[Kind::User as usize], change.id.as_bytes()].concat();
            let profile = state.with_user(change.id, |_, profile| profile.cloned());
            let profile = profile.filter(|_| kind == change::Kind::UpsertUsers);
            let packed = profile.and_then(|profile| self.pack(&profile));
            let mut command = redis::cmd(if packed.is_some() { "SET" } else { "DEL" });
            command.arg(key);
            if let Some(packed) = &packed {
                command.arg(&packed[..]);
                if self.config.write_ttl_seconds > 0 {
                    command.arg("EX").arg(self.config.write_ttl_seconds);
                }
            }
            self.link.store(&command);
            if let Some(tier) = &self.users {
                let user = packed
                    .and_then(|packed| StoredUser::of(&Packed::of(&packed).ok()?, &self.own, &self.generation).ok());
                tier.put(change.id, user.map(Arc::new), state.version_of(change.id), Instant::now());
            }
            Ok(())
        });
    }

    /// What was upserted of a user, as a value under the schema of the bundle's columns.
    fn pack(&self, profile: &Profile) -> Option<Vec<u8>> {
        let values: Vec<_> =
            self.own.schema().fields().iter().map(|field| (field, profile.value(&field.name))).collect();
        let values: Vec<_> = values
            .iter()
            .map(|(field, value)| match (field.kind, value) {
                (FieldKind::Vector, _) => {
                    profile.vector().map_or(FieldValue::Missing, |v| FieldValue::Vector(v.into()))
                }
                (FieldKind::Items, _) => FieldValue::Items(self.items(profile)),
                (FieldKind::Number, Some(change::Value::Number(number))) if (*number as f32).is_finite() => {
                    FieldValue::Number(*number as f32)
                }
                (FieldKind::Text, Some(change::Value::Text(text))) => FieldValue::Text(text),
                (FieldKind::List, Some(change::Value::List(list))) => FieldValue::List(list.clone()),
                _ => FieldValue::Missing,
            })
            .collect();
        value::pack(self.own.schema(), now_ms(), &values).ok()
    }

    /// What the user's vector knows.
    fn items(&self, profile: &Profile) -> Vec<StoredItem<'_>> {
        let ids = &self.generation.items.ids;
        let item = |entry: &Interaction| StoredItem { id: ids.id(entry.row), weight: entry.weight, seen: false };
        profile.known().iter().map(item).collect()
    }

    fn again(&self, lookup: Lookup) -> Option<(u16, Ticket, Option<Learned>)> {
        let (shard, ticket) = (lookup.shard, lookup.ticket);
        (!self.link.get(lookup)).then_some((shard, ticket, None))
    }

    fn embedding(&self, bytes: &[u8]) -> Option<Embedding> {
        Embedding::of(bytes, self.generation.item_embeddings.as_ref()?.dim)
    }

    fn read(&self, bytes: &[u8]) -> Read {
        let Ok(packed) = Packed::of(bytes) else { return Read::Unreadable };
        let mapping = match self.schemas.read().get(&packed.schema) {
            Some(Ok(mapping)) => mapping.clone(),
            Some(Err(asked)) if asked.elapsed() < SCHEMA_RETRY => return Read::Unreadable,
            _ => return Read::Under(packed.schema),
        };
        match StoredUser::of(&packed, &mapping, &self.generation) {
            Ok(user) => Read::User(Arc::new(user)),
            Err(_) => Read::Unreadable,
        }
    }

    fn learn_schema(&self, lookup: &Lookup, values: Values) {
        let text = values.into_iter().next().flatten();
        let schema = text.as_deref().and_then(|text| std::str::from_utf8(text).ok()).map(Schema::parse);
        let mapped = match schema {
            Some(Ok(schema)) if schema.id() == lookup.mark => {
                let (mapping, complaints) = user::Mapping::new(schema, &self.generation);
                for complaint in complaints {
                    tracing::warn!(schema = format!("{:016x}", lookup.mark), "features of users: {complaint}");
                }
                Ok(Arc::new(mapping))
            }
            wrong => {
                let reason = match wrong {
                    Some(Err(reason)) => reason,
                    Some(Ok(_)) => "it is not what its key says".to_owned(),
                    None => "it is not there".to_owned(),
                };
                let key = String::from_utf8_lossy(&lookup.keys[0]).into_owned();
                tracing::warn!(
                    key,
                    reason,
                    "a schema of features can't be read, and no value that was written under it"
                );
                Err(Instant::now())
            }
        };
        let mut schemas = self.schemas.write();
        if schemas.len() >= MAX_SCHEMAS {
            schemas.clear();
        }
        schemas.insert(lookup.mark, mapped);
    }
}

/// What memory knows of a user, where the kind is looked up.
type Memories = (Option<Memory<StoredUser>>, Option<Memory<Embedding>>);

/// What became of a value.
enum Read {
    User(Arc<StoredUser>),
    /// Its schema is not known yet.
    Under(u64),
    Unreadable,
}

fn suffix<'a>(key: &'a [u8], prefix: &[u8]) -> Option<&'a str> {
    std::str::from_utf8(key.strip_prefix(prefix)?).ok()
}

/// What counts of what memory and a lookup say, and where it is from.
fn chosen<T>(memory: Memory<T>, learned: Option<Option<Arc<T>>>) -> (Option<Arc<T>>, Level) {
    match (learned, memory) {
        (Some(Some(value)), _) => (Some(value), Level::Redis),
        (Some(None), _) => (None, Level::Missing),
        (None, Memory::Fresh(Some(value))) => (Some(value), Level::Memory),
        (None, Memory::Fresh(None)) => (None, Level::Negative),
        (None, Memory::Stale(value)) => (Some(value), Level::Stale),
        (None, Memory::Unknown) => (None, Level::Away),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_known_has_a_name_whenever_it_was_made() {
        let generation = user::tests::generation();
        let user = |age: f32| {
            let stored = user::tests::stored(&generation, "age:number\n", &[FieldValue::Number(age)]).unwrap();
            Some(Arc::new(stored))
        };
        let embedding = |value: f32| Embedding::of(&[value.to_le_bytes(), [0; 4]].concat(), 2).map(Arc::new);
        let of = |user, embedding, away| Known { user, embedding, away, ..Known::default() };
        assert_eq!(Known::default().version(7), 7);
        let versions = [
            of(None, None, None).version(7),
            of(user(1.0), None, None).version(7),
            of(user(1.0), None, None).version(8),
            of(user(2.0), None, None).version(7),
            of(None, embedding(1.0), None).version(7),
            of(None, embedding(2.0), None).version(7),
            of(user(1.0), embedding(1.0), None).version(7),
            of(None, None, Some(Reason::Failed)).version(7),
        ];
        assert_eq!(versions.iter().collect::<std::collections::HashSet<_>>().len(), versions.len());
        assert_eq!(of(user(1.0), None, None).version(7), versions[1]);
        assert_eq!(of(user(1.0), None, None).age_seconds(1005), Some(1.0));
        assert_eq!((of(user(1.0), None, None).age_seconds(0), Known::default().age_seconds(9)), (Some(0.0), None));
    }

    #[test]
    fn ranges_are_checked() {
        let valid = |change: fn(&mut FeaturesConfig)| {
            let mut config = FeaturesConfig::default();
            change(&mut config);
            config.validate().err().unwrap_or_default()
        };
        assert_eq!(valid(|_| {}), "");
        assert!(valid(|c| c.memory_bytes = 1).contains("features.memory_bytes"));
        assert!(valid(|c| c.memory_ttl_seconds = 0).contains("features.memory_ttl_seconds is 0, expected 1 to 86400"));
        assert!(valid(|c| c.embedding_prefix = "a b".into()).contains("features.embedding_prefix"));
        assert!(valid(|c| c.redis.budget_ms = 0).contains("features.redis.budget_ms"));
        let secret = valid(|c| c.redis.url = "http://:swordfish@host".into());
        assert!(secret.contains("features.redis.url") && !secret.contains("swordfish"), "{secret}");
    }
}
