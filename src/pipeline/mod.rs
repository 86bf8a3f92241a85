//! The product, top to bottom: plan → retrieve → merge → rank → select → rerank → respond.

pub mod local;
pub mod models;
pub mod plan;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::api::{Explanation, RecommendCall, ScoredItems, Slate};
use crate::candidates::{Scored, Source};
use crate::catalog::generation::{Generation, NO_ROW};
use crate::catalog::live::{LiveItems, any_gone};
use crate::config::in_range;
use crate::context::{Degradation, Reason, Stage};
use crate::device::{Device, Job};
use crate::error::{Code, Error};
use crate::ranking::manifest::{Engine, RankerManifest};
use crate::rerank::{RerankInput, RerankScratch, Reranker};
use crate::response;

/// `[pipeline]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PipelineConfig {
    /// Candidates from nearest neighbours; 0 turns the source off. 0 to 10000, default 500.
    pub ann_k: u32,
    /// Candidates from neighbours of the history. 0 to 10000, default 300.
    pub collaborative_k: u32,
    /// Candidates from trending. 0 to 1000, default 100.
    pub trending_k: u32,
    /// Candidates from text search, when the request has a query. 0 to 10000, default 200.
    pub search_k: u32,
    /// History entries used, the newest. 1 to 10000, default 200.
    pub history_length: u32,
    /// Slate length where a request names none. Default 10.
    pub default_n_items: u32,
    /// Longest slate. 1 to 10000, default 500.
    pub max_n_items: u32,
    /// What the best text match adds to the ranker's score, in units of the score range of the request. Default 1.
    pub search_weight: f32,
    /// Memory for the bitmaps of search filters, shared by all workers. 64 KiB to 1 TiB, default 64 MiB.
    pub filter_cache_bytes: u64,
    /// Time that partitions of the index have for a search, milliseconds, and never more than half of what the call has left; those
    /// that have not answered are left out, and the answer says so. 0 to 600000; 0, the default: that half.
    pub partition_budget_ms: u32,
    /// Weights of rankers by name; empty: the bundle's first one alone.
    pub rankers: BTreeMap<String, f32>,
    /// What computes a ranker, by name; before what its manifest says.
    pub engines: BTreeMap<String, Engine>,
    /// The library of ONNX Runtime, 1.24 or later, for rankers whose engine it is, and for what the embedded runtime lacks. Empty:
    /// `ORT_DYLIB_PATH`, then the loader's usual places, for the former alone.
    pub onnxruntime: String,
    /// The folder of TensorRT's libraries, for rankers whose engine it is. Empty: the loader's usual places.
    pub tensorrt: String,
    /// Where engines that TensorRT built are kept. Empty: in `.tensorrt` beside the bundle.
    pub tensorrt_cache: String,
    /// Memory for what a ranker computes of each item ahead, per ranker and shared by all workers; one that needs more computes
    /// it for every candidate. 0: none does. Default 2 GiB.
    pub item_table_bytes: u64,
}

impl Default for PipelineConfig {
    fn default() -> Self {
        PipelineConfig {
            ann_k: 500,
            collaborative_k: 300,
            trending_k: 100,
            search_k: 200,
            history_length: 200,
            default_n_items: 10,
            max_n_items: 500,
            search_weight: 1.0,
            filter_cache_bytes: 64 << 20,
            partition_budget_ms: 0,
            rankers: BTreeMap::new(),
            engines: BTreeMap::new(),
            onnxruntime: String::new(),
            tensorrt: String::new(),
            tensorrt_cache: String::new(),
            item_table_bytes: 2 << 30,
        }
    }
}

impl PipelineConfig {
    /// Checks ranges.
    ///
    /// # Errors
    /// The key, its value and its range.
    pub fn validate(&self) -> Result<(), String> {
        let ranges = [
            ("ann_k", self.ann_k, 0, 10_000),
            ("collaborative_k", self.collaborative_k, 0, 10_000),
            ("trending_k", self.trending_k, 0, 1_000),
            ("search_k", self.search_k, 0, 10_000),
            ("history_length", self.history_length, 1, 10_000),
            ("max_n_items", self.max_n_items, 1, 10_000),
            ("default_n_items", self.default_n_items, 1, self.max_n_items),
            ("partition_budget_ms", self.partition_budget_ms, 0, 600_000),
        ];
        in_range("pipeline", ranges)?;
        if !(self.search_weight.is_finite() && self.search_weight >= 0.0) {
            return Err(format!("pipeline.search_weight is {}, expected 0 or more", self.search_weight));
        }
        if !(64 << 10..=1 << 40).contains(&self.filter_cache_bytes) {
            let bytes = self.filter_cache_bytes;
            return Err(format!("pipeline.filter_cache_bytes is {bytes}, expected 65536 to 1099511627776"));
        }
        match self.rankers.iter().find(|(_, weight)| !(weight.is_finite() && **weight >= 0.0)) {
            Some((name, weight)) => Err(format!("pipeline.rankers.{name} is {weight}, expected 0 or more")),
            None => Ok(()),
        }
    }

    /// What is to compute a ranker: as configured, else as its manifest says.
    pub fn engine(&self, name: &str, manifest: &RankerManifest) -> Engine {
        self.engines.get(name).copied().unwrap_or(manifest.engine)
    }

    /// Ranked items that re-ranking chooses a slate of `n_items` from: what diversity, caps and pins can use.
    pub fn top_m(&self, n_items: u32) -> u32 {
        (4 * n_items).max(128)
    }
}

/// Buffers of the stages after the device, one per shard.
#[derive(Debug, Default)]
pub struct FinishScratch {
    rerank: RerankScratch,
}

/// The whole path of one recommendation, in one thread and without live state.
///
/// # Errors
/// A call that can't be planned, or a device that failed.
pub fn execute(
    device: &mut dyn Device,
    generation: &Arc<Generation>,
    reranker: &Reranker,
    config: &PipelineConfig,
    call: &RecommendCall<'_>,
    job: &mut Box<Job>,
    scratch: &mut FinishScratch,
) -> Result<Slate, Error> {
    plan::recommend(call, generation, None, reranker, config, Instant::now(), job)?;
    plan::resolve_user(generation, None, None, config, job)?;
    let ran = device.execute(std::slice::from_mut(job));
    ran.map_err(|_| Error::fixed(Code::Unavailable, "the device failed"))?;
    finish_recommend(job, reranker, None, call.n_items, call.explain, scratch)
}

/// rerank → respond, for a job that came back from a device. `live` is items as they stand now: what went
/// meanwhile is left out.
///
/// # Errors
/// The job's own failure.
pub fn finish_recommend(
    job: &mut Job,
    reranker: &Reranker,
    live: Option<&Arc<LiveItems>>,
    n_items: u32,
    explain: bool,
    scratch: &mut FinishScratch,
) -> Result<Slate, Error> {
    if let Some(failure) = job.failure.take() {
        return Err(failure);
    }
    let n_items = n_items as usize;
    let clock = Instant::now();
    let mut items = Vec::with_capacity(n_items);
    let input = RerankInput {
        generation: &job.generation,
        context: &job.context,
        seen: &job.user.seen,
        planned: job.items.as_ref(),
        live: live.or(job.items.as_ref()),
        items: &job.ranked.items,
        unproposed: &job.ranked.backfill,
        n_items,
        explain,
    };
    reranker.rerank(input, &mut scratch.rerank, &mut items);
    let clock = job.timings.lap(Stage::Rerank, clock);
    if items.len() < n_items {
        job.degraded.push(Degradation { stage: Stage::Respond, reason: Reason::Exhausted });
    }
    if explain {
        response::explain(&job.ranked, &mut items);
    }
    job.timings.lap(Stage::Respond, clock);
    Ok(Slate {
        generation: job.generation.clone(),
        items,
        degraded: job.degraded.to_vec(),
        timings: job.timings,
        known_user: job.user.is_known(),
        n_candidates: job.ranked.n_candidates,
        coverage: 1.0 - job.ranked.uncovered,
    })
}

/// The answer of a search or rank job that came back from a device. As with [`finish_recommend`], what went meanwhile is
/// left out.
///
/// # Errors
/// The job's own failure.
pub fn finish_scored(job: &mut Job, live: Option<&LiveItems>) -> Result<ScoredItems, Error> {
    if let Some(failure) = job.failure.take() {
        return Err(failure);
    }
    let ranker = match job.task {
        crate::device::Task::Rank { ranker, .. } => {
            job.generation.rankers.get(usize::from(ranker)).map(|r| r.name.clone()).unwrap_or_default()
        }
        _ => String::new(),
    };
    if any_gone(live, job.ranked.items.iter().map(|item| item.row)) {
        let gone = |row: u32| live.is_some_and(|live| live.is_gone(row));
        leave_out(job, gone);
    }
    Ok(ScoredItems {
        generation: job.generation.clone(),
        items: job.ranked.items.iter().map(|i| Scored { row: i.row, score: i.score }).collect(),
        result_lengths: job.ranked.result_lengths.clone(),
        ranker,
        degraded: job.degraded.to_vec(),
        timings: job.timings,
        coverage: 1.0 - job.ranked.uncovered,
    })
}

/// Takes items out of what was found; of a ranking, whose answers keep their places, they become unknown.
fn leave_out(job: &mut Job, gone: impl Fn(u32) -> bool) {
    let ranked = &mut job.ranked;
    if let crate::device::Task::Rank { .. } = job.task {
        for item in ranked.items.iter_mut().filter(|item| gone(item.row)) {
            (item.row, item.score) = (NO_ROW, 0.0);
        }
        return;
    }
    let mut first = 0;
    for length in &mut ranked.result_lengths {
        let of_query = &ranked.items[first..first + *length as usize];
        first += of_query.len();
        *length = of_query.iter().filter(|item| !gone(item.row)).count() as u32;
    }
    ranked.items.retain(|item| !gone(item.row));
}

/// What the sources said of a candidate, for its explanation.
pub(crate) fn source_evidence(candidates: &crate::candidates::Candidates, row: u32, explanation: &mut Explanation) {
    let Ok(at) = candidates.rows.binary_search(&row) else { return };
    for source in Source::ALL.into_iter().filter(|&s| candidates.sources[at].contains(s)) {
        explanation.source_scores[source as usize] = Some(candidates.source_scores[source as usize][at]);
        explanation.source_ranks[source as usize] = Some(candidates.source_ranks[source as usize][at]);
    }
}
