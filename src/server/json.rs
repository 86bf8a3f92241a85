//! JSON in and out of the HTTP API.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde::de::{self, Deserializer};
use serde::ser::{SerializeMap, SerializeSeq, Serializer};
use serde::{Deserialize, Serialize};

use crate::api::{CacheStatus, Explanation, Receipt, ScoredItems, Slate};
use crate::candidates::{Scored, Source};
use crate::catalog::conditions::Compare;
use crate::catalog::generation::{IdTable, NO_ROW};
use crate::context::{Degradation, Stage, StageTimings};
use crate::error::{Code, Error};
use crate::state::event::MAX_EVENTS;
use crate::wire::LIMITS;

/// A string, or a number or boolean as its text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Text<'a>(pub Cow<'a, str>);

impl<'de: 'a, 'a> Deserialize<'de> for Text<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Text<'de>;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a string, a number or a boolean")
            }
            fn visit_borrowed_str<E: de::Error>(self, v: &'de str) -> Result<Self::Value, E> {
                Ok(Text(Cow::Borrowed(v)))
            }
            fn visit_str<E: de::Error>(self, v: &str) -> Result<Self::Value, E> {
                Ok(Text(Cow::Owned(v.to_owned())))
            }
            fn visit_i64<E: de::Error>(self, v: i64) -> Result<Self::Value, E> {
                Ok(Text(Cow::Owned(v.to_string())))
            }
            fn visit_u64<E: de::Error>(self, v: u64) -> Result<Self::Value, E> {
                Ok(Text(Cow::Owned(v.to_string())))
            }
            fn visit_f64<E: de::Error>(self, v: f64) -> Result<Self::Value, E> {
                Ok(Text(Cow::Owned(v.to_string())))
            }
            fn visit_bool<E: de::Error>(self, v: bool) -> Result<Self::Value, E> {
                Ok(Text(Cow::Borrowed(if v { "true" } else { "false" })))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// A list of which at most `N + 1` elements are kept: enough to see that it is too long.
#[derive(Clone, Debug, PartialEq)]
pub struct Bounded<T, const N: usize>(pub Vec<T>);

impl<T, const N: usize> Default for Bounded<T, N> {
    fn default() -> Self {
        Bounded(Vec::new())
    }
}

impl<'de, T: Deserialize<'de>, const N: usize> Deserialize<'de> for Bounded<T, N> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor<T, const N: usize>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>, const N: usize> de::Visitor<'de> for Visitor<T, N> {
            type Value = Bounded<T, N>;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a list")
            }
            fn visit_seq<A: de::SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
                let mut kept = Vec::new();
                while kept.len() <= N {
                    match list.next_element()? {
                        Some(element) => kept.push(element),
                        None => return Ok(Bounded(kept)),
                    }
                }
                while list.next_element::<de::IgnoredAny>()?.is_some() {}
                Ok(Bounded(kept))
            }
        }
        deserializer.deserialize_seq(Visitor(std::marker::PhantomData))
    }
}

/// A condition over an item column, as a rule's `where` has it.
#[derive(Debug)]
pub enum ConditionBody<'a> {
    /// A number, or a boolean as 1 or 0.
    Number(f64),
    /// A string, or a list of them.
    Values(Bounded<Word<'a>, { LIMITS.condition_values }>),
    /// Comparisons.
    Compare(Compare),
}

/// A string and nothing else.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Word<'a>(#[serde(borrow)] pub Cow<'a, str>);

impl<'de: 'a, 'a> Deserialize<'de> for ConditionBody<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = ConditionBody<'de>;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a number, a string, a list of strings, or comparisons as in {\"ge\": 4}")
            }
            fn visit_borrowed_str<E: de::Error>(self, v: &'de str) -> Result<Self::Value, E> {
                Ok(ConditionBody::Values(Bounded(vec![Word(Cow::Borrowed(v))])))
            }
            fn visit_str<E: de::Error>(self, v: &str) -> Result<Self::Value, E> {
                Ok(ConditionBody::Values(Bounded(vec![Word(Cow::Owned(v.to_owned()))])))
            }
            fn visit_i64<E: de::Error>(self, v: i64) -> Result<Self::Value, E> {
                Ok(ConditionBody::Number(v as f64))
            }
            fn visit_u64<E: de::Error>(self, v: u64) -> Result<Self::Value, E> {
                Ok(ConditionBody::Number(v as f64))
            }
            fn visit_f64<E: de::Error>(self, v: f64) -> Result<Self::Value, E> {
                Ok(ConditionBody::Number(v))
            }
            fn visit_bool<E: de::Error>(self, v: bool) -> Result<Self::Value, E> {
                Ok(ConditionBody::Number(f64::from(u8::from(v))))
            }
            fn visit_seq<A: de::SeqAccess<'de>>(self, list: A) -> Result<Self::Value, A::Error> {
                Bounded::deserialize(de::value::SeqAccessDeserializer::new(list)).map(ConditionBody::Values)
            }
            fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                Compare::deserialize(de::value::MapAccessDeserializer::new(map)).map(ConditionBody::Compare)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// Item columns and their conditions, of which one more is kept than allowed.
#[derive(Debug, Default)]
pub struct FilterBody<'a>(pub Vec<(Text<'a>, ConditionBody<'a>)>);

impl<'de: 'a, 'a> Deserialize<'de> for FilterBody<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = FilterBody<'de>;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("item columns and their conditions")
            }
            fn visit_map<A: de::MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut kept = Vec::new();
                while kept.len() <= LIMITS.conditions {
                    let Some(column) = map.next_key::<Text<'de>>()? else { return Ok(FilterBody(kept)) };
                    let condition = map.next_value().map_err(|e| {
                        // The place is added again to whatever leaves here.
                        let reason = e.to_string();
                        let reason = reason.split(" at line ").next().unwrap_or_default();
                        let column: String = column.0.chars().take(LIMITS.id_bytes).collect();
                        de::Error::custom(format!("filter.{column}: {reason}"))
                    })?;
                    kept.push((column, condition));
                }
                while map.next_entry::<de::IgnoredAny, de::IgnoredAny>()?.is_some() {}
                Ok(FilterBody(kept))
            }
        }
        deserializer.deserialize_map(Visitor)
    }
}

/// `POST /v1/recommend`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecommendBody<'a> {
    #[serde(borrow)]
    pub user_id: Text<'a>,
    #[serde(default, borrow)]
    pub context: BTreeMap<Cow<'a, str>, Text<'a>>,
    #[serde(default)]
    pub n_items: Option<u32>,
    #[serde(default, borrow)]
    pub query: Option<Cow<'a, str>>,
    #[serde(default)]
    pub explain: bool,
    #[serde(default)]
    pub timings: bool,
    #[serde(default)]
    pub no_cache: bool,
    #[serde(default)]
    pub deadline_ms: Option<u64>,
}

/// A vector to search by.
pub type VectorBody = Bounded<f32, { LIMITS.vector_values }>;

/// `POST /v1/search`; exactly one of vector, vectors, item_id, user_id, text.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SearchBody<'a> {
    #[serde(default)]
    pub vector: Option<VectorBody>,
    #[serde(default)]
    pub vectors: Option<Bounded<VectorBody, { LIMITS.vectors }>>,
    #[serde(default, borrow)]
    pub item_id: Option<Text<'a>>,
    #[serde(default, borrow)]
    pub user_id: Option<Text<'a>>,
    #[serde(default, borrow)]
    pub text: Option<Cow<'a, str>>,
    #[serde(default)]
    pub k: Option<u32>,
    #[serde(default, borrow)]
    pub filter: FilterBody<'a>,
    #[serde(default, borrow)]
    pub exclude_item_ids: Bounded<Text<'a>, { LIMITS.items }>,
    #[serde(default)]
    pub exclude_seen: Option<bool>,
    #[serde(default)]
    pub n_probes: Option<u32>,
    #[serde(default)]
    pub refine_ratio: Option<f32>,
    #[serde(default)]
    pub ef_search: Option<u32>,
    #[serde(default)]
    pub deadline_ms: Option<u64>,
}

/// `POST /v1/rank`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RankBody<'a> {
    #[serde(borrow)]
    pub user_id: Text<'a>,
    #[serde(default, borrow)]
    pub context: BTreeMap<Cow<'a, str>, Text<'a>>,
    #[serde(borrow)]
    pub item_ids: Bounded<Text<'a>, { LIMITS.items }>,
    #[serde(default, borrow)]
    pub ranker: Option<Cow<'a, str>>,
    #[serde(default)]
    pub deadline_ms: Option<u64>,
}

/// One event of `POST /v1/events`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EventBody<'a> {
    #[serde(borrow)]
    pub user_id: Text<'a>,
    #[serde(borrow)]
    pub item_id: Text<'a>,
    #[serde(borrow)]
    pub kind: Cow<'a, str>,
    #[serde(default, borrow)]
    pub event_id: Option<Text<'a>>,
    #[serde(default)]
    pub value: Option<f32>,
    #[serde(default)]
    pub time_ms: Option<i64>,
    #[serde(default, borrow)]
    pub context: BTreeMap<Cow<'a, str>, Text<'a>>,
}

/// `POST /v1/events`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EventsBody<'a> {
    #[serde(borrow)]
    pub events: Bounded<EventBody<'a>, MAX_EVENTS>,
    #[serde(default)]
    pub durable: bool,
    #[serde(default)]
    pub deadline_ms: Option<u64>,
}

/// Parses a body; the error says what and where.
///
/// # Errors
/// Not JSON, an unknown or missing field, a wrong type.
pub fn parse<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, Error> {
    serde_json::from_slice(body).map_err(|e| Error::new(Code::BadRequest, e.to_string()))
}

/// An id: a number where the dataset's ids are numbers.
struct Id<'a>(&'a IdTable, u32);

impl Serialize for Id<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let id = self.0.id(self.1);
        match id.parse::<i64>() {
            Ok(number) if self.0.integer => serializer.serialize_i64(number),
            _ => serializer.serialize_str(id),
        }
    }
}

struct SlateJson<'a>(&'a Slate, CacheStatus, bool);

impl Serialize for SlateJson<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let SlateJson(slate, cache, timings) = self;
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("items", &ItemsJson(slate))?;
        map.serialize_entry("model_version", &slate.generation.version)?;
        map.serialize_entry("cache", cache.name())?;
        map.serialize_entry("known_user", &slate.known_user)?;
        map.serialize_entry("degraded", &DegradedJson(&slate.degraded))?;
        if slate.coverage < 1.0 {
            map.serialize_entry("coverage", &slate.coverage)?;
        }
        if *timings {
            map.serialize_entry("timings_us", &TimingsJson(&slate.timings))?;
        }
        map.end()
    }
}

struct ItemsJson<'a>(&'a Slate);

impl Serialize for ItemsJson<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Item<'a> {
            item_id: Id<'a>,
            score: f32,
            rank: usize,
            sources: Sources,
            #[serde(skip_serializing_if = "Option::is_none")]
            explanation: Option<ExplanationJson<'a>>,
        }
        let mut seq = serializer.serialize_seq(Some(self.0.items.len()))?;
        for (at, item) in self.0.items.iter().enumerate() {
            seq.serialize_element(&Item {
                item_id: Id(&self.0.generation.items.ids, item.row),
                score: item.score,
                rank: at + 1,
                sources: Sources(item.sources),
                explanation: item.explanation.as_deref().map(ExplanationJson),
            })?;
        }
        seq.end()
    }
}

struct Sources(crate::candidates::SourceSet);

impl Serialize for Sources {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.iter().map(Source::name))
    }
}

struct ExplanationJson<'a>(&'a Explanation);

impl Serialize for ExplanationJson<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Evidence {
            score: f32,
            rank: u16,
        }
        struct BySource<'a>(&'a Explanation);
        impl Serialize for BySource<'_> {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                let mut map = serializer.serialize_map(None)?;
                for source in Source::ALL {
                    let (score, rank) = (self.0.source_scores[source as usize], self.0.source_ranks[source as usize]);
                    if let (Some(score), Some(rank)) = (score, rank) {
                        map.serialize_entry(source.name(), &Evidence { score, rank })?;
                    }
                }
                map.end()
            }
        }
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("sources", &BySource(self.0))?;
        map.serialize_entry("ranker_score", &self.0.ranker_score)?;
        map.serialize_entry("ranker_rank", &self.0.ranker_rank)?;
        map.serialize_entry("rules", &self.0.rules)?;
        map.serialize_entry("backfill", &self.0.backfill)?;
        map.end()
    }
}

struct DegradedJson<'a>(&'a [Degradation]);

impl Serialize for DegradedJson<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Entry {
            stage: &'static str,
            reason: &'static str,
        }
        serializer.collect_seq(self.0.iter().map(|d| Entry { stage: d.stage.name(), reason: d.reason.name() }))
    }
}

struct TimingsJson<'a>(&'a StageTimings);

impl Serialize for TimingsJson<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        for stage in Stage::ALL.into_iter().filter(|&s| !self.0.get(s).is_zero()) {
            map.serialize_entry(stage.name(), &(self.0.get(stage).as_nanos() as f64 / 1000.0))?;
        }
        map.end()
    }
}

/// The body that answers a recommendation.
pub fn slate(slate: &Slate, cache: CacheStatus, timings: bool) -> Vec<u8> {
    let mut out = Vec::with_capacity(64 + slate.items.len() * 96);
    // Writing to memory can't fail, and NaN scores become null.
    let _ = serde_json::to_writer(&mut out, &SlateJson(slate, cache, timings));
    out
}

struct ScoredJson<'a>(&'a IdTable, &'a [Scored]);

impl Serialize for ScoredJson<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Item<'a> {
            item_id: Id<'a>,
            score: f32,
        }
        serializer.collect_seq(self.1.iter().map(|item| {
            let known = item.row != NO_ROW;
            known.then_some(Item { item_id: Id(self.0, item.row), score: item.score })
        }))
    }
}

struct ResultsJson<'a>(&'a ScoredItems);

impl Serialize for ResultsJson<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct OneResult<'a> {
            items: ScoredJson<'a>,
        }
        let ids = &self.0.generation.items.ids;
        serializer.collect_seq(self.0.results().map(|items| OneResult { items: ScoredJson(ids, items) }))
    }
}

/// The body that answers a search or a rank: `results` for a search of several vectors, else `items`. Of a rank, an unknown item
/// is `null`.
pub fn scored(scored: &ScoredItems) -> Vec<u8> {
    #[derive(Serialize)]
    struct Body<'a> {
        #[serde(skip_serializing_if = "Option::is_none")]
        items: Option<ScoredJson<'a>>,
        #[serde(skip_serializing_if = "Option::is_none")]
        results: Option<ResultsJson<'a>>,
        model_version: &'a str,
        #[serde(skip_serializing_if = "str::is_empty")]
        ranker: &'a str,
        degraded: DegradedJson<'a>,
        #[serde(skip_serializing_if = "Option::is_none")]
        coverage: Option<f32>,
    }
    let several = !scored.result_lengths.is_empty();
    let body = Body {
        items: (!several).then(|| ScoredJson(&scored.generation.items.ids, &scored.items)),
        results: several.then_some(ResultsJson(scored)),
        model_version: &scored.generation.version,
        ranker: &scored.ranker,
        degraded: DegradedJson(&scored.degraded),
        coverage: (scored.coverage < 1.0).then_some(scored.coverage),
    };
    let mut out = Vec::with_capacity(128 + scored.items.len() * 48);
    // As in `slate`.
    let _ = serde_json::to_writer(&mut out, &body);
    out
}

/// The body that answers events.
pub fn receipt(receipt: Receipt) -> Vec<u8> {
    let Receipt { accepted, duplicates, unknown, durable, .. } = receipt;
    let body = serde_json::json!({
        "accepted": accepted, "duplicates": duplicates, "unknown_items": unknown, "durable": durable,
    });
    body.to_string().into_bytes()
}

/// The body that answers a change.
pub fn changed(receipt: Receipt) -> Vec<u8> {
    let Receipt { accepted, created, unknown, durable, .. } = receipt;
    let body = serde_json::json!({"accepted": accepted, "created": created, "unknown": unknown, "durable": durable});
    body.to_string().into_bytes()
}

/// The body of an error.
pub fn error(error: &Error) -> Vec<u8> {
    #[derive(Serialize)]
    struct Body<'a> {
        error: Inner<'a>,
    }
    #[derive(Serialize)]
    struct Inner<'a> {
        code: &'a str,
        message: &'a str,
        retryable: bool,
    }
    let inner = Inner { code: error.code.name(), message: &error.message, retryable: error.code.retryable() };
    serde_json::to_vec(&Body { error: inner }).unwrap_or_default()
}
