//! What a client can ask and be answered, free of any protocol. `wire` and `server::http` translate to and from it.

use std::sync::Arc;
use std::time::Duration;

use crate::candidates::{Scored, Source, SourceSet};
use crate::catalog::conditions::Demand;
use crate::catalog::generation::Generation;
use crate::context::{Degradation, StageTimings};
use crate::error::Error;
use crate::index::SearchParams;
pub use crate::state::change::{Change, Kind, Value};
pub use crate::state::event::Event;
pub use crate::state::live::Receipt;

/// Names one call in flight on one shard. Chosen by the protocol side, opaque to everything behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ticket(pub u64);

/// One call, borrowed from the bytes that it came in.
#[derive(Clone, Copy, Debug)]
pub enum Call<'a> {
    /// A slate for a user.
    Recommend(RecommendCall<'a>),
    /// The nearest items to something.
    Search(SearchCall<'a>),
    /// Scores for given items.
    Rank(RankCall<'a>),
    /// What users did.
    Events(EventsCall<'a>),
    /// Items or users that come, change or go.
    Change(ChangeCall<'a>),
}

/// Asks for a slate.
#[derive(Clone, Copy, Debug)]
pub struct RecommendCall<'a> {
    /// Need not be known: unknown users get trending and context, flagged by a counter.
    pub user_id: &'a str,
    /// Key and value pairs in any order; a repeated key keeps its last value.
    pub context: &'a [(&'a str, &'a str)],
    /// Slate length, 1 to the configured maximum.
    pub n_items: u32,
    /// Text query; turns the search source on.
    pub query: Option<&'a str>,
    /// Return sources' scores and what the re-ranker did to each item. Bypasses the cache.
    pub explain: bool,
    /// Return stage timings.
    pub timings: bool,
    /// Answer from a fresh computation, and do not store it.
    pub no_cache: bool,
    /// Time budget; the configured default when absent, capped by the configured maximum.
    pub deadline: Option<Duration>,
}

impl<'a> RecommendCall<'a> {
    /// A call without context or options.
    pub fn new(user_id: &'a str, n_items: u32) -> Self {
        RecommendCall {
            user_id,
            context: &[],
            n_items,
            query: None,
            explain: false,
            timings: false,
            no_cache: false,
            deadline: None,
        }
    }
}

/// What a search starts from.
#[derive(Clone, Copy, Debug)]
pub enum SearchBy<'a> {
    /// A vector of the catalogue's dimension, f32.
    Vector(&'a [f32]),
    /// Several such vectors, each answered on its own.
    Vectors {
        /// f32 `[n, dim]`, row-major.
        values: &'a [f32],
        /// 1 to 64.
        n: u32,
    },
    /// An item's embedding; the item itself is not returned.
    Item(&'a str),
    /// A user's embedding; seen items are not returned unless the filter says so.
    User(&'a str),
    /// Words.
    Text(&'a str),
}

/// Asks for the nearest items.
#[derive(Clone, Copy, Debug)]
pub struct SearchCall<'a> {
    /// Where to start.
    pub by: SearchBy<'a>,
    /// Number of items, 1 to 10,000.
    pub k: u32,
    /// Which items may be returned.
    pub filter: SearchFilter<'a>,
    /// What the index may trade between recall and time.
    pub params: SearchParams,
    /// As in [`RecommendCall`].
    pub deadline: Option<Duration>,
}

impl<'a> SearchCall<'a> {
    /// A call without filter or options.
    pub fn new(by: SearchBy<'a>, k: u32) -> Self {
        SearchCall { by, k, filter: SearchFilter::default(), params: SearchParams::default(), deadline: None }
    }
}

/// Which items a search may return.
#[derive(Clone, Copy, Debug, Default)]
pub struct SearchFilter<'a> {
    /// Item columns and what is demanded of them; all must hold. A column may come more than once.
    pub conditions: &'a [(&'a str, Demand<'a>)],
    /// Items not to return; unknown ones are ignored.
    pub exclude: &'a [&'a str],
    /// Only with [`SearchBy::User`]: whether what the user has seen stays away, which is the default.
    pub exclude_seen: Option<bool>,
}

/// Asks for scores of given items.
#[derive(Clone, Copy, Debug)]
pub struct RankCall<'a> {
    /// As in [`RecommendCall`].
    pub user_id: &'a str,
    /// As in [`RecommendCall`].
    pub context: &'a [(&'a str, &'a str)],
    /// 1 to 10,000 items, scored in this order.
    pub item_ids: &'a [&'a str],
    /// A ranker of the bundle; the default one when absent.
    pub ranker: Option<&'a str>,
    /// As in [`RecommendCall`].
    pub deadline: Option<Duration>,
}

/// Tells what users did. All events are taken or none.
#[derive(Clone, Copy, Debug)]
pub struct EventsCall<'a> {
    /// The events, checked, as [`crate::state::event::Encoder`] makes them.
    pub record: &'a [u8],
    /// Answer when they are on the disk.
    pub durable: bool,
    /// As in [`RecommendCall`].
    pub deadline: Option<Duration>,
}

/// Changes items or users. All entries are taken or none.
#[derive(Clone, Copy, Debug)]
pub struct ChangeCall<'a> {
    /// The entries, within limits, as [`crate::state::change::Encoder`] makes them.
    pub record: &'a [u8],
    /// Answer when they are on the disk.
    pub durable: bool,
    /// As in [`RecommendCall`].
    pub deadline: Option<Duration>,
}

/// Asks a ranker for its output on tensors that the client filled.
#[derive(Clone, Copy, Debug)]
pub struct InferCall<'a> {
    /// Position in the generation's rankers.
    pub ranker: u16,
    /// Rows of every input, 1 to 10,000.
    pub n: u32,
    /// `[n, width]` for each input of the ranker's manifest, in its order.
    pub inputs: &'a [InferInput<'a>],
    /// As in [`RecommendCall`].
    pub deadline: Option<Duration>,
}

/// Values of an input, row-major.
#[derive(Clone, Debug, PartialEq)]
pub enum InferInput<'a> {
    /// f32, little-endian, as they came.
    Bytes(&'a [u8]),
    /// Converted.
    Values(Vec<f32>),
}

impl InferInput<'_> {
    /// Puts the values in place of what is in `out`.
    pub fn write_to(&self, out: &mut Vec<f32>) {
        out.clear();
        match self {
            InferInput::Bytes(bytes) => out.extend(bytes.as_chunks().0.iter().map(|&v| f32::from_le_bytes(v))),
            InferInput::Values(values) => out.extend_from_slice(values),
        }
    }
}

/// How the result cache took part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CacheStatus {
    /// Computed for this request, or together with an identical one in flight.
    Miss,
    /// From this process's memory.
    L1,
    /// From Redis.
    L2,
    /// From the file of slates made ahead of time.
    Precomputed,
    /// From this process's memory and past its time; a newer one is on its way there.
    Stale,
    /// Not asked: explain, `no_cache`, or the cache is off.
    Bypass,
}

impl CacheStatus {
    /// The name in responses and metric labels.
    pub fn name(self) -> &'static str {
        match self {
            CacheStatus::Miss => "miss",
            CacheStatus::L1 => "l1",
            CacheStatus::L2 => "l2",
            CacheStatus::Precomputed => "precomputed",
            CacheStatus::Stale => "stale",
            CacheStatus::Bypass => "bypass",
        }
    }
}

/// A finished recommendation, shared between the cache and the responses made from it.
#[derive(Debug)]
pub struct Slate {
    /// The generation that made it; maps rows to ids.
    pub generation: Arc<Generation>,
    /// In order; the rank of an item is its index plus one.
    pub items: Vec<SlateItem>,
    /// Everything that was done without.
    pub degraded: Vec<Degradation>,
    /// Where the time went when it was computed.
    pub timings: StageTimings,
    /// Whether the generation or an upsert knew the user.
    pub known_user: bool,
    /// Merged candidates that were ranked.
    pub n_candidates: u32,
    /// Share of the items that the search for nearest neighbours saw, 0 to 1; 1 also where there was none to do.
    pub coverage: f32,
}

impl Slate {
    /// Memory that the slate holds, for the cache's budget.
    pub fn size_bytes(&self) -> usize {
        size_of::<Self>()
            + self.items.len() * size_of::<SlateItem>()
            + self.degraded.len() * size_of::<Degradation>()
            + self.items.iter().filter(|i| i.explanation.is_some()).count() * size_of::<Explanation>()
    }
}

/// One place of a slate.
#[derive(Clone, Debug)]
pub struct SlateItem {
    /// Row in the slate's generation.
    pub row: u32,
    /// The ranker's score after rules.
    pub score: f32,
    /// Who proposed it; empty for what only a pin or the filling up of a short slate brought.
    pub sources: SourceSet,
    /// Present when asked for.
    pub explanation: Option<Box<Explanation>>,
}

/// Why an item stands where it stands.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Explanation {
    /// Each source's own score, where it proposed the item.
    pub source_scores: [Option<f32>; Source::COUNT],
    /// Each source's own rank from 1.
    pub source_ranks: [Option<u16>; Source::COUNT],
    /// Score before rules.
    pub ranker_score: f32,
    /// Place after the ranker, from 1.
    pub ranker_rank: u32,
    /// Names of the rules that changed its score or place.
    pub rules: Vec<String>,
    /// Whether it only fills the slate up.
    pub backfill: bool,
}

/// The answer to [`SearchCall`] and [`RankCall`].
#[derive(Debug)]
pub struct ScoredItems {
    /// Maps rows to ids.
    pub generation: Arc<Generation>,
    /// Search: best first, the results of several queries one after another. Rank: in the order asked, `u32::MAX` as the row of
    /// an unknown item (its score is 0).
    pub items: Vec<Scored>,
    /// For [`SearchBy::Vectors`]: how many of `items` belong to each query, in order. Empty for every other call.
    pub result_lengths: Vec<u32>,
    /// The ranker that scored; empty for a search.
    pub ranker: String,
    /// Everything that was done without.
    pub degraded: Vec<Degradation>,
    /// Where the time went.
    pub timings: StageTimings,
    /// As in [`Slate::coverage`].
    pub coverage: f32,
}

impl ScoredItems {
    /// The items of each query of [`SearchBy::Vectors`], in order.
    pub fn results(&self) -> impl Iterator<Item = &[Scored]> {
        let mut rest = &self.items[..];
        self.result_lengths.iter().map(move |&length| {
            let (items, others) = rest.split_at((length as usize).min(rest.len()));
            rest = others;
            items
        })
    }
}

/// What becomes of a call.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// For [`Call::Recommend`].
    Slate(Arc<Slate>, CacheStatus),
    /// For [`Call::Search`] and [`Call::Rank`].
    Scored(Arc<ScoredItems>),
    /// For [`InferCall`]: one value per row.
    Inferred(Arc<[f32]>),
    /// For [`Call::Events`].
    Received(Receipt),
    /// For [`Call::Change`].
    Changed(Receipt),
    /// Any of them.
    Failed(Error),
}
