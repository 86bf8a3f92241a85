//! The CPU engine: complete, always there, and the oracle for every other device.

mod apart;
mod live;
mod rankers;
pub mod twins;

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use rten::ThreadPool;

use super::batcher::alike;
use super::{Device, DeviceError, Job, Ranked, RankedItem, Task};
use crate::candidates::{Candidates, Packed, Scored, Source, keep_best};
use crate::catalog::conditions::FilterScratch;
use crate::catalog::generation::{Generation, Interaction, NO_ROW};
use crate::catalog::live::{extend_vector, n_rows};
use crate::context::{Deadline, Degradation, Degradations, Reason, Stage};
use crate::error::{Code, Error};
use crate::features::assemble::{CooccurrenceSignal, FeatureError, FeatureScratch, Inputs, Layout};
use crate::index::{Coverage, Filter, Found, Prefetched, SearchScratch, Settled, VectorIndex};
use crate::pipeline::PipelineConfig;
use crate::ranking::ensemble::WeightedMean;
use crate::retrieval::collaborative::Signals;
use crate::retrieval::merge::{MergeScratch, merge};
use crate::retrieval::{Marks, ann, trending};
use crate::state::fold_in::FoldInScratch;
#[cfg(test)]
pub(crate) use apart::testing as apart_testing;
pub use apart::{Weighted, Whole};
#[cfg(test)]
pub(crate) use live::with_changed;
use rankers::LoadedRanker;
pub use rankers::reports;

/// Generations kept ready: the one that serves and the one before it, for jobs still on their way.
const KEPT: usize = 2;

/// Share of each source in rank fusion: what everybody likes only decides where nothing personal does.
const FUSION_WEIGHTS: [f32; Source::COUNT] = [1.0, 1.0, 0.02, 1.0];

/// Neighbours that another device looked for ahead, for the jobs of one batch.
pub trait Ahead {
    /// A list for each vector that the `job`-th job searches by; empty: it is searched here.
    fn of(&self, job: usize) -> &[Found<'_>];
    /// Whether the `job`-th job is somebody else's.
    fn skips(&self, _job: usize) -> bool {
        false
    }
    /// Counts what became of the lists.
    fn settled(&self) -> &Settled;
}

/// What nobody counts.
static UNCOUNTED: Settled = Settled { yes: AtomicU64::new(0), no: AtomicU64::new(0) };

/// What there is for one job.
#[derive(Clone, Copy)]
struct Asked<'a> {
    found: &'a [Found<'a>],
    settled: &'a Settled,
    /// Neighbours are not looked for here: somebody else does.
    elsewhere: bool,
}

impl<'a> Asked<'a> {
    /// Nothing was looked for.
    const NONE: Asked<'static> = Asked { found: &[], settled: &UNCOUNTED, elsewhere: false };

    /// The index that has been asked already, where it was.
    fn over(self, index: Option<&'a dyn VectorIndex>) -> Option<Prefetched<'a>> {
        let index = index.filter(|_| !self.found.is_empty())?;
        Some(Prefetched::new(index, self.found, self.settled))
    }
}

/// The CPU engine of one worker.
pub struct CpuDevice {
    config: Arc<PipelineConfig>,
    pool: Arc<ThreadPool>,
    loaded: VecDeque<Loaded>,
    scratch: Scratch,
}

/// A generation made ready.
struct Loaded {
    generation: Arc<Generation>,
    index: Option<Arc<dyn VectorIndex>>,
    /// [`Generation::index_changes`] when `index` was asked for.
    index_changes: u32,
    /// By position in the generation's rankers.
    rankers: Vec<LoadedRanker>,
}

#[derive(Default)]
struct Scratch {
    seen: Marks,
    taken: Marks,
    signals: Signals,
    lists: [Vec<Scored>; Source::COUNT],
    search: SearchScratch,
    filter: FilterScratch,
    /// Of a filter, with what came or changed.
    words: Vec<u64>,
    merge: MergeScratch,
    candidates: Candidates,
    features: FeatureScratch,
    inputs: Vec<Vec<f32>>,
    /// Of one job of a batch.
    part: Vec<f32>,
    /// Ends of the jobs' rows in a batch, and the rows.
    ends: Vec<usize>,
    rows: Vec<u32>,
    scores: Vec<f32>,
    mean: WeightedMean,
    /// `[query]`, each best first.
    results: Vec<Vec<Scored>>,
    order: Vec<Packed>,
    fold_in: FoldInScratch,
    /// The history of the user's training.
    trained: Vec<Interaction>,
}

/// Runs `body` with a new CPU device on the single thread that its rankers run on.
pub fn with_device(config: Arc<PipelineConfig>, body: impl FnOnce(&mut CpuDevice) + Send) {
    let pool = Arc::new(ThreadPool::with_num_threads(1));
    let mut device = CpuDevice::new(config, pool.clone());
    pool.run(move || body(&mut device));
}

/// Loads a generation's rankers and forgets them again: whether it can be served.
///
/// # Errors
/// What can't be loaded.
pub fn try_rankers(config: PipelineConfig, generation: &Generation) -> Result<(), DeviceError> {
    let mut result = Ok(());
    with_device(Arc::new(config), |device| {
        result = rankers::load(&device.config, generation, &device.pool, None).map(drop);
    });
    result
}

impl CpuDevice {
    /// A device whose rankers run on `pool`; calls from another thread than the pool's cost a hand-over each.
    pub fn new(config: Arc<PipelineConfig>, pool: Arc<ThreadPool>) -> Self {
        CpuDevice { config, pool, loaded: VecDeque::new(), scratch: Scratch::default() }
    }

    /// Moves the users' vectors to where events took their histories: what a search begins from. Idempotent.
    ///
    /// # Errors
    /// As [`Device::load`].
    pub fn prepare(&mut self, batch: &mut [Box<Job>]) -> Result<(), DeviceError> {
        for job in batch.iter_mut().filter(|job| job.user.fold_in) {
            self.load(&job.generation)?;
            let (config, scratch) = (&self.config, &mut self.scratch);
            let generation = job.generation.clone();
            let done = catch_unwind(AssertUnwindSafe(|| fold_in(&generation, config, scratch, job)));
            if done.is_err() {
                // It is tried again when the job's turn comes, and is that job's failure then.
                *scratch = Scratch::default();
                job.user.fold_in = true;
            }
        }
        Ok(())
    }

    /// As [`Device::execute`], with what was found ahead.
    ///
    /// # Errors
    /// As there.
    pub fn execute_after(&mut self, batch: &mut [Box<Job>], ahead: Option<&dyn Ahead>) -> Result<(), DeviceError> {
        if let [first, others @ ..] = &*batch
            && !others.is_empty()
            && others.iter().all(|job| alike(first, job))
        {
            self.load(&first.generation)?;
            let loaded = self.loaded.iter_mut().find(|l| Arc::ptr_eq(&l.generation, &first.generation));
            if let Some(loaded) = loaded.filter(|l| l.shareable(first)) {
                loaded.renew_index();
                let scratch = &mut self.scratch;
                if catch_unwind(AssertUnwindSafe(|| loaded.together(&self.config, scratch, batch))).is_err() {
                    *scratch = Scratch::default();
                    for job in batch {
                        job.ranked.clear();
                        job.failure = Some(Error::fixed(Code::Internal, "the request could not be computed"));
                    }
                }
                return Ok(());
            }
        }
        for (at, job) in batch.iter_mut().enumerate() {
            if ahead.is_some_and(|ahead| ahead.skips(at)) {
                continue;
            }
            self.load(&job.generation)?;
            let Some(loaded) = self.loaded.iter_mut().find(|l| Arc::ptr_eq(&l.generation, &job.generation)) else {
                return Err(DeviceError::Failed("a generation was loaded and is not there".into()));
            };
            loaded.renew_index();
            let (config, scratch) = (&self.config, &mut self.scratch);
            let lists = ahead.map_or(Asked::NONE, |ahead| {
                let (found, settled) = (ahead.of(at), ahead.settled());
                Asked { found, settled, ..Asked::NONE }
            });
            // A defect that one request finds must not take the others' worker with it.
            let done = catch_unwind(AssertUnwindSafe(|| loaded.execute(config, scratch, job, lists)));
            if done.is_err() {
                *scratch = Scratch::default();
                job.ranked.clear();
                job.failure = Some(Error::fixed(Code::Internal, "the request could not be computed"));
            }
        }
        Ok(())
    }

    /// The feature matrix of the candidates that the last job on this device had, for training data.
    ///
    /// # Errors
    /// A column that does not exist.
    pub fn features(&mut self, job: &Job, columns: &[String]) -> Result<(Vec<f32>, usize), FeatureError> {
        let layout = Layout::compile(columns, &job.generation)?;
        let loaded = self.loaded.iter().find(|l| Arc::ptr_eq(&l.generation, &job.generation));
        let index = loaded.and_then(|l| l.index.as_deref());
        let mut out = Vec::new();
        let Scratch { signals, candidates, features, .. } = &mut self.scratch;
        let gathered = Gathered { generation: &job.generation, index, job, signals, candidates };
        gathered.fill(&layout, candidates.len(), features, &mut out);
        Ok((out, layout.width()))
    }
}

impl Device for CpuDevice {
    fn name(&self) -> &str {
        "cpu"
    }

    fn load(&mut self, generation: &Arc<Generation>) -> Result<(), DeviceError> {
        if self.loaded.iter().all(|l| !Arc::ptr_eq(&l.generation, generation)) {
            let bare = || Loaded {
                // Before the index: what is exchanged in between is noticed later.
                index_changes: generation.index_changes(),
                generation: generation.clone(),
                index: generation.index(),
                rankers: Vec::new(),
            };
            let requests = || rankers::requests(&self.config, &mut bare());
            let rankers = rankers::load(&self.config, generation, &self.pool, Some(&requests))?;
            let mut loaded = Loaded { rankers, ..bare() };
            rankers::warm_up(&self.config, &mut loaded, &mut self.scratch);
            self.loaded.push_front(loaded);
            self.loaded.truncate(KEPT);
        }
        Ok(())
    }

    fn execute(&mut self, batch: &mut [Box<Job>]) -> Result<(), DeviceError> {
        self.execute_after(batch, None)
    }
}

/// Moves the user's vector to where events took the history.
fn fold_in(generation: &Generation, config: &PipelineConfig, scratch: &mut Scratch, job: &mut Job) {
    let Scratch { fold_in, trained, .. } = scratch;
    let Job { user, timings, items, .. } = job;
    if std::mem::take(&mut user.fold_in)
        && let Some(solver) = generation.ready_fold_in()
    {
        let clock = Instant::now();
        trained.clear();
        // What it was trained on, and what else it is taken to know.
        let known = user.vector_knows();
        if let Some(row) = user.row {
            let history = generation.histories.of(row);
            let skip = history.len().saturating_sub(config.history_length as usize);
            let is_new = |entry: &Interaction| known.iter().all(|other| other.row != entry.row);
            trained.extend(history.skip(skip).filter(is_new));
        }
        trained.extend_from_slice(known);
        let items = items.as_deref();
        let vector_of = |row: u32, out: &mut Vec<f32>| extend_vector(generation, items, row, out);
        solver.fold_in(&vector_of, trained, &user.history, fold_in, &mut user.vector);
        timings.lap(Stage::Ann, clock);
    }
}

impl Loaded {
    /// Takes the index that the generation has by now.
    fn renew_index(&mut self) {
        let changes = self.generation.index_changes();
        if changes != self.index_changes {
            (self.index_changes, self.index) = (changes, self.generation.index());
        }
    }

    fn execute(&mut self, config: &PipelineConfig, scratch: &mut Scratch, job: &mut Job, lists: Asked<'_>) {
        fold_in(&self.generation, config, scratch, job);
        self.mark_seen(scratch, job);
        match job.task {
            Task::Recommend { top_m, explain } => self.recommend(config, scratch, job, top_m as usize, explain, lists),
            Task::Search { k, n_queries } => self.search(config, scratch, job, k as usize, n_queries, lists),
            Task::Rank { .. } => self.rank(scratch, job),
            Task::Infer { .. } => self.infer(job),
        }
    }

    fn mark_seen(&self, scratch: &mut Scratch, job: &Job) {
        scratch.seen.begin(n_rows(&self.generation, job.items.as_deref()));
        for &row in &job.user.seen {
            scratch.seen.insert(row);
        }
    }

    /// retrieve → merge → rank → select
    fn recommend(
        &mut self,
        config: &PipelineConfig,
        scratch: &mut Scratch,
        job: &mut Job,
        top_m: usize,
        explain: bool,
        lists: Asked<'_>,
    ) {
        let mut clock = Instant::now();
        self.retrieve(config, scratch, job, lists);

        clock = clock.max(Instant::now());
        let n = n_rows(&self.generation, job.items.as_deref());
        merge(&scratch.lists, n, &mut scratch.merge, &mut scratch.candidates);
        job.ranked.n_candidates = scratch.candidates.len() as u32;
        for (count, list) in job.ranked.n_by_source.iter_mut().zip(&scratch.lists) {
            *count = list.len() as u32;
        }
        job.timings.lap(Stage::Merge, clock);

        self.score(scratch, job, None);

        clock = Instant::now();
        let Scratch { order, scores, candidates, lists, .. } = scratch;
        let best = lists[Source::Search as usize].first().map_or(0.0, |scored| scored.score);
        blend_search(config.search_weight, best, &candidates.source_scores[Source::Search as usize], scores);
        order.clear();
        order.extend(candidates.rows.iter().zip(&*scores).map(|(&row, &score)| Packed::from(Scored { row, score })));
        job.ranked.n_nan = scores.iter().filter(|s| s.is_nan()).count() as u32;
        keep_best(order, top_m);
        job.ranked.items.extend(order.iter().map(|&s| Scored::from(s)).map(|s| {
            let sources =
                candidates.rows.binary_search(&s.row).map_or_else(|_| Default::default(), |at| candidates.sources[at]);
            RankedItem { row: s.row, score: s.score, sources }
        }));
        if explain {
            job.ranked.candidates.clone_from(candidates);
        }
        if job.ranked.items.len() < top_m {
            self.backfill(scratch, job, top_m);
        }
        job.timings.lap(Stage::Select, clock);
    }

    /// Asks every source; one that fails, or that time does not allow, is skipped and reported.
    fn retrieve(&mut self, config: &PipelineConfig, scratch: &mut Scratch, job: &mut Job, ahead: Asked<'_>) {
        let Scratch { seen, taken, signals, lists, search, .. } = scratch;
        let generation = &*self.generation;
        lists.iter_mut().for_each(Vec::clear);
        let Job { user, context, query, filter, degraded, timings, deadline, ranked, trending: live, items, .. } = job;
        let (items, n) = (items.as_deref(), n_rows(generation, items.as_deref()));
        let allowed = |row: u32| !seen.contains(row) && filter.allows(row);
        let mut clock = Instant::now();
        let mut source = |source: Source, stage: Stage, run: &mut dyn FnMut(&mut Vec<Scored>) -> Result<(), String>| {
            let list = &mut lists[source as usize];
            // Trending costs next to nothing and is what remains when time is short.
            if deadline.passed(clock) && source != Source::Trending {
                degraded.push(Degradation { stage, reason: Reason::Deadline });
                return;
            }
            let failure = match catch_unwind(AssertUnwindSafe(|| run(list))) {
                Ok(Ok(())) => None,
                Ok(Err(reason)) => Some(reason),
                Err(_) => Some("panicked".to_owned()),
            };
            if let Some(reason) = failure {
                tracing::warn!(source = source.name(), reason, "candidate source failed");
                list.clear();
                degraded.push(Degradation { stage, reason: Reason::Failed });
            }
            clock = timings.lap(stage, clock);
        };
        let asked = ahead.over(self.index.as_deref());
        let index = asked.as_ref().map_or(self.index.as_deref(), |asked| Some(asked as &dyn VectorIndex));
        let overlay = live::overlay(index, generation, items);
        let index = live::index(index, &overlay);
        let mut coverage = None;
        if !ahead.elsewhere {
            source(Source::Ann, Stage::Ann, &mut |list| {
                begin_search(search, config, *deadline);
                ann::retrieve(index, &user.vector, config.ann_k as usize, Filter::predicate(&allowed), search, list);
                coverage = Some(search.coverage);
                Ok(())
            });
        }
        source(Source::Collaborative, Stage::Collaborative, &mut |list| {
            signals.gather(&generation.collaborative, &user.history, n);
            signals.retrieve(config.collaborative_k as usize, &allowed, list);
            Ok(())
        });
        source(Source::Trending, Stage::Trending, &mut |list| {
            let live = live.as_deref();
            let now = trending::Now { items, trending: live };
            trending::retrieve(generation, now, context, config.trending_k as usize, &allowed, taken, list);
            Ok(())
        });
        match &generation.text {
            _ if query.is_empty() => {}
            Some(text) => source(Source::Search, Stage::Search, &mut |list| {
                text.search_with(query, config.search_k as usize, items, &allowed, list).map_err(|e| e.to_string())
            }),
            None => degraded.push(Degradation { stage: Stage::Search, reason: Reason::Missing }),
        }
        match coverage {
            Some(coverage) => report(coverage, degraded, ranked),
            None if index.is_some() && !user.vector.is_empty() && !ahead.elsewhere => ranked.uncovered = 1.0,
            None => {}
        }
    }

    /// Fills `scratch.scores` for `scratch.candidates`: by `only` one ranker, or by the weighted mean of all; without a
    /// ranker, or when none answers, by reciprocal rank fusion (Cormack et al., SIGIR 2009) of the sources.
    fn score(&mut self, scratch: &mut Scratch, job: &mut Job, only: Option<usize>) {
        let n = scratch.candidates.len();
        let late = job.deadline.passed(Instant::now());
        scratch.mean.begin(n);
        let Loaded { generation, index, rankers, .. } = self;
        job.ranked.inference.resize(rankers.len(), Default::default());
        for (at, loaded) in rankers.iter_mut().enumerate() {
            let weight = match only {
                Some(wanted) => {
                    if wanted == at {
                        1.0
                    } else {
                        0.0
                    }
                }
                None => loaded.weight,
            };
            if weight <= 0.0 || n == 0 || late {
                continue;
            }
            let clock = Instant::now();
            let Scratch { signals, candidates, features, inputs, scores, .. } = &mut *scratch;
            let items = job.items.clone();
            let overlay = live::overlay(index.as_deref(), generation, items.as_deref());
            let index = live::index(index.as_deref(), &overlay);
            let gathered = Gathered { generation, index, job, signals, candidates };
            let layouts = loaded.parts.as_ref().map_or(&loaded.layouts[..], |parts| &parts[..]);
            inputs.resize_with(layouts.len(), Vec::new);
            for (part, (layout, out)) in layouts.iter().zip(&mut *inputs).enumerate() {
                // Of the parts, the first is the request's.
                let n = if loaded.parts.is_some() && part == 0 { 1 } else { n };
                gathered.fill(layout, n, features, out);
            }
            let clock = job.timings.lap(Stage::Features, clock);
            let result = match (&loaded.parts, loaded.ranker.dense()) {
                (Some(_), Some(dense)) => {
                    let rows = live::stand_ins(generation, items.as_deref(), &candidates.rows);
                    dense.score_split(&inputs[0], &rows, &inputs[1], scores)
                }
                _ => loaded.ranker.score(inputs, n, scores),
            };
            let gathered = Gathered { generation, index, job, signals, candidates };
            let result = result.and_then(|()| live::score_changed(loaded, at, &gathered, features, inputs, scores));
            let after = job.timings.lap(Stage::Rank, clock);
            job.ranked.inference[at] = after - clock;
            match result {
                Ok(()) => scratch.mean.add(&scratch.scores, weight),
                Err(error) => {
                    tracing::warn!(%error, "ranker failed");
                    job.degraded.push(Degradation { stage: Stage::Rank, reason: Reason::Failed });
                }
            }
        }
        scratch.scores.clear();
        match scratch.mean.finish() {
            Some(scores) if n > 0 => scratch.scores.extend_from_slice(scores),
            _ => {
                if late && rankers.iter().any(|r| r.weight > 0.0) {
                    job.degraded.push(Degradation { stage: Stage::Rank, reason: Reason::Deadline });
                }
                let ranks = &scratch.candidates.source_ranks;
                let fused = |at: usize| {
                    let share = |&rank: &u16| if rank == 0 { 0.0 } else { 1.0 / (60.0 + f32::from(rank)) };
                    ranks.iter().zip(FUSION_WEIGHTS).map(|(ranks, weight)| weight * share(&ranks[at])).sum::<f32>()
                };
                scratch.scores.extend((0..n).map(fused));
            }
        }
    }

    /// Items that nobody proposed: trending beyond the source's k, then the catalogue in order.
    fn backfill(&self, scratch: &mut Scratch, job: &mut Job, top_m: usize) {
        let Scratch { seen, taken, .. } = scratch;
        let n = n_rows(&self.generation, job.items.as_deref());
        taken.begin(n);
        for item in &job.ranked.items {
            taken.insert(item.row);
        }
        let want = top_m - job.ranked.items.len();
        let rows = self.generation.trending.rows.iter().copied().chain(0..n as u32);
        let fresh = rows.filter(|&row| !seen.contains(row) && job.filter.allows(row) && taken.insert(row));
        job.ranked.backfill.extend(fresh.take(want).map(|row| Scored { row, score: 0.0 }));
    }

    fn search(
        &self,
        config: &PipelineConfig,
        scratch: &mut Scratch,
        job: &mut Job,
        k: usize,
        n_queries: Option<u32>,
        lists: Asked<'_>,
    ) {
        let Scratch { seen, search, filter, words, results, .. } = scratch;
        let items = &self.generation.items;
        let Job { user, query, search: plan, ranked, failure, timings, deadline, degraded, items: live, .. } = job;
        let items_now = live.as_deref();
        let live = items_now.filter(|live| live.n_gone() > 0);
        let asked = lists.over(self.index.as_deref());
        let index = asked.as_ref().map_or(self.index.as_deref(), |asked| Some(asked as &dyn VectorIndex));
        let overlay = live::overlay(index, &self.generation, items_now);
        let index = live::index(index, &overlay);
        let mut clock = Instant::now();
        for row in plan.exclude_ids.iter().filter_map(|id| items.ids.row(id)).chain(plan.exclude) {
            seen.insert(row);
        }
        let unseen = |row: u32| !seen.contains(row) && live.is_none_or(|live| !live.is_gone(row));
        // Without a predicate an index can count what a set admits.
        let all_unseen =
            user.seen.is_empty() && plan.exclude_ids.is_empty() && plan.exclude.is_none() && live.is_none();
        let mut filtered = if all_unseen { Filter::ALL } else { Filter::predicate(&unseen) };
        if !plan.tests.is_empty() {
            if let Some(bits) = self.generation.filters(config.filter_cache_bytes).admitted(items, &plan.tests, filter)
            {
                filtered = filtered.within(live::with_changed(bits, &plan.tests, items_now, words));
            }
            clock = timings.lap(Stage::Merge, clock);
        }
        results.resize_with(results.len().max(n_queries.unwrap_or(1) as usize), Vec::new);
        let results = &mut results[..n_queries.unwrap_or(1) as usize];
        results.iter_mut().for_each(Vec::clear);
        match (&mut *results, &self.generation.text, index) {
            ([found], Some(text), _) if !query.is_empty() => {
                if let Err(error) = text.search_with(query, k, items_now, &|row| filtered.allows(row), found) {
                    tracing::warn!(%error, "text search failed");
                    *failure = Some(Error::fixed(Code::Internal, "text search failed"));
                }
                timings.lap(Stage::Search, clock);
            }
            (_, None, _) if !query.is_empty() => {
                *failure = Some(Error::fixed(Code::BadRequest, "the catalogue has no text index"));
            }
            (results, _, Some(index)) => {
                // Without vectors of its own a search is one by the user's.
                let vectors = if plan.vectors.is_empty() { &user.vector } else { &plan.vectors };
                begin_search(search, config, *deadline);
                match results {
                    _ if vectors.is_empty() => {
                        *failure =
                            Some(Error::fixed(Code::NotFound, "nothing that the user did says what to search for"));
                    }
                    [found] => index.search(vectors, k, filtered, &plan.params, search, found),
                    all => index.search_batch(vectors, k, filtered, &plan.params, search, all),
                }
                timings.lap(Stage::Ann, clock);
                report(search.coverage, degraded, ranked);
                if ranked.uncovered >= 1.0 {
                    *failure = Some(Error::fixed(Code::Unavailable, "no partition of the index answered"));
                }
            }
            _ => *failure = Some(Error::fixed(Code::BadRequest, "the catalogue has no embeddings")),
        }
        for found in results.iter() {
            let item = |s: &Scored| RankedItem { row: s.row, score: s.score, sources: Default::default() };
            ranked.items.extend(found.iter().map(item));
            if n_queries.is_some() {
                ranked.result_lengths.push(found.len() as u32);
            }
        }
    }

    fn infer(&mut self, job: &mut Job) {
        let Job { task: Task::Infer { ranker, n, inputs }, ranked, timings, failure, .. } = job else { return };
        let at = usize::from(*ranker);
        let Some(loaded) = self.rankers.get_mut(at) else {
            *failure = Some(Error::fixed(Code::NotFound, "no such ranker"));
            return;
        };
        let clock = Instant::now();
        let result = loaded.ranker.score(inputs, *n as usize, &mut ranked.scores);
        ranked.inference.resize(at + 1, Default::default());
        ranked.inference[at] = timings.lap(Stage::Rank, clock) - clock;
        if let Err(error) = result {
            tracing::warn!(%error, "ranker failed");
            *failure = Some(Error::fixed(Code::Internal, "the ranker failed"));
        }
    }

    fn rank(&mut self, scratch: &mut Scratch, job: &mut Job) {
        let Task::Rank { ranker, .. } = &job.task else { return };
        let only = usize::from(*ranker);
        gather(&self.generation, scratch, job);
        if job.deadline.passed(Instant::now()) {
            job.failure = Some(Error::fixed(Code::DeadlineExceeded, "the deadline passed before the ranker ran"));
            return;
        }
        let failed = job.degraded.len();
        self.score(scratch, job, Some(only));
        if job.degraded.len() > failed {
            job.failure = Some(Error::fixed(Code::Internal, "the ranker failed"));
        }
        as_asked(job, &scratch.candidates.rows, &scratch.scores);
    }

    /// Whether jobs like this one may share a call of its ranker.
    fn shareable(&self, job: &Job) -> bool {
        let (Task::Rank { ranker, .. } | Task::Infer { ranker, .. }) = job.task else { return false };
        // A ranking is computed in parts where that can be: by itself it would then be rounded otherwise.
        let whole = |loaded: &LoadedRanker| loaded.parts.is_none() || matches!(job.task, Task::Infer { .. });
        self.rankers.get(usize::from(ranker)).is_some_and(|l| l.ranker.rows_are_independent() && whole(l))
    }

    /// Rankings or inferences by one ranker, in one call of it; what each gets is what it would get alone.
    fn together(&mut self, config: &PipelineConfig, scratch: &mut Scratch, batch: &mut [Box<Job>]) {
        let Some(Task::Rank { ranker, .. } | Task::Infer { ranker, .. }) = batch.first().map(|job| &job.task) else {
            return;
        };
        let at = usize::from(*ranker);
        let Loaded { generation, index, rankers, .. } = self;
        let loaded = &mut rankers[at];
        scratch.inputs.resize_with(loaded.layouts.len(), Vec::new);
        scratch.inputs.iter_mut().for_each(Vec::clear);
        scratch.ends.clear();
        scratch.rows.clear();
        let mut n = 0;
        for job in &mut *batch {
            if let Task::Infer { n: more, inputs, .. } = &job.task {
                n += *more as usize;
                scratch.inputs.iter_mut().zip(inputs).for_each(|(all, more)| all.extend_from_slice(more));
            } else {
                fold_in(generation, config, scratch, job);
                gather(generation, scratch, job);
                n += scratch.candidates.len();
                scratch.rows.extend_from_slice(&scratch.candidates.rows);
                let clock = Instant::now();
                let Scratch { inputs, features, signals, candidates, part, .. } = &mut *scratch;
                for (layout, all) in loaded.layouts.iter().zip(inputs) {
                    let overlay = live::overlay(index.as_deref(), generation, job.items.as_deref());
                    let index = live::index(index.as_deref(), &overlay);
                    let gathered = Gathered { generation, index, job, signals, candidates };
                    gathered.fill(layout, candidates.len(), features, part);
                    all.extend_from_slice(part);
                }
                job.timings.lap(Stage::Features, clock);
            }
            scratch.ends.push(n);
        }
        let clock = Instant::now();
        let result = loaded.ranker.score(&scratch.inputs, n, &mut scratch.scores);
        let spent = clock.elapsed();
        if let Err(error) = &result {
            tracing::warn!(%error, jobs = batch.len(), "ranker failed");
        }
        let mut from = 0;
        for (nth, (job, &to)) in batch.iter_mut().zip(&scratch.ends).enumerate() {
            // Each has waited for all of it; the ranker ran once.
            job.timings.add(Stage::Rank, spent);
            job.ranked.inference.resize(at + 1, Default::default());
            if nth == 0 {
                job.ranked.inference[at] = spent;
            }
            match (&result, &job.task) {
                (Err(_), _) => job.failure = Some(Error::fixed(Code::Internal, "the ranker failed")),
                (Ok(()), Task::Infer { .. }) => job.ranked.scores.extend_from_slice(&scratch.scores[from..to]),
                (Ok(()), _) => as_asked(job, &scratch.rows[from..to], &scratch.scores[from..to]),
            }
            from = to;
        }
    }
}

/// Says until when partitions may take: half of the time that is left, the rest is for what comes after them.
fn begin_search(search: &mut SearchScratch, config: &PipelineConfig, deadline: Deadline) {
    let now = Instant::now();
    let mut budget = deadline.0.saturating_duration_since(now) / 2;
    if config.partition_budget_ms > 0 {
        budget = budget.min(Duration::from_millis(u64::from(config.partition_budget_ms)));
    }
    (search.until, search.coverage) = (Some(now + budget), Coverage::default());
}

/// Says what a search did without.
fn report(coverage: Coverage, degraded: &mut Degradations, ranked: &mut Ranked) {
    ranked.uncovered = coverage.missing;
    for (is, reason) in [(coverage.failed, Reason::Failed), (coverage.late, Reason::Deadline)] {
        if is {
            degraded.push(Degradation { stage: Stage::Ann, reason });
        }
    }
}

/// Puts the given items of a ranking, each once, to the candidates, and what the user's history says of them to the signals.
fn gather(generation: &Generation, scratch: &mut Scratch, job: &mut Job) {
    let Task::Rank { rows, .. } = &job.task else { return };
    let clock = Instant::now();
    let n = n_rows(generation, job.items.as_deref());
    scratch.signals.gather(&generation.collaborative, &job.user.history, n);
    job.timings.lap(Stage::Collaborative, clock);
    // The candidates are given: no source proposed them, and columns that speak of sources are 0.
    let candidates = &mut scratch.candidates;
    candidates.clear();
    candidates.rows.extend(rows.iter().copied().filter(|&row| row != NO_ROW));
    candidates.rows.sort_unstable();
    candidates.rows.dedup();
    proposed_by_nobody(candidates);
}

/// Completes candidates of which there are rows alone.
fn proposed_by_nobody(candidates: &mut Candidates) {
    let n = candidates.rows.len();
    candidates.sources.resize(n, Default::default());
    candidates.source_scores.iter_mut().for_each(|c| c.resize(n, 0.0));
    candidates.source_ranks.iter_mut().for_each(|c| c.resize(n, 0));
}

/// Gives the items of a ranking, in the order asked, the scores of `rows`, which are ascending; unknown ones get 0.
fn as_asked(job: &mut Job, rows: &[u32], scores: &[f32]) {
    let Task::Rank { rows: asked, .. } = &job.task else { return };
    job.ranked.n_candidates = rows.len() as u32;
    job.ranked.items.extend(asked.iter().map(|&row| {
        let score = rows.binary_search(&row).map_or(0.0, |at| scores[at]);
        RankedItem { row, score, sources: Default::default() }
    }));
}

/// What the features of a job's candidates are made of.
struct Gathered<'a> {
    generation: &'a Generation,
    index: Option<&'a dyn VectorIndex>,
    job: &'a Job,
    signals: &'a Signals,
    candidates: &'a Candidates,
}

impl Gathered<'_> {
    /// Fills the feature matrix of the first `n` candidates.
    fn fill(&self, layout: &Layout, n: usize, scratch: &mut FeatureScratch, out: &mut Vec<f32>) {
        let vector = &self.job.user.vector;
        let inputs = Inputs {
            generation: self.generation,
            live: self.job.items.as_deref(),
            user: &self.job.user,
            context: &self.job.context,
            candidates: self.candidates,
            cooccurrence: &|rows, out| {
                self.signals.each(rows, |s| {
                    let top3 = s.largest.iter().sum();
                    out.push(CooccurrenceSignal { sum: s.sum, max: s.largest[0], top3, count: s.count });
                });
            },
            dots: &|rows, search, out| match self.index {
                Some(index) if vector.len() == index.dim() => index.scores(vector, rows, search, out),
                _ => out.resize(out.len() + rows.len(), 0.0),
            },
        };
        layout.fill_first(n, &inputs, scratch, out);
    }
}

/// With a query, whose `best` search score is above 0, adds `weight` × the search score over the best to each: what was asked for comes
/// before what is merely liked.
fn blend_search(weight: f32, best: f32, search: &[f32], scores: &mut [f32]) {
    if best > 0.0 {
        let finite = || scores.iter().copied().filter(|s| s.is_finite());
        let range = finite().fold(f32::NEG_INFINITY, f32::max) - finite().fold(f32::INFINITY, f32::min);
        let unit = weight * if range > 0.0 { range } else { 1.0 } / best;
        scores.iter_mut().zip(search).for_each(|(score, search)| *score += unit * search);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::generation::testing;
    use crate::ranking::{RankError, Ranker};

    /// Sums a row up; fails at 13, panics at 14.
    struct Flaky;

    impl Ranker for Flaky {
        fn name(&self) -> &str {
            "flaky"
        }

        fn report(&self) -> crate::ranking::precision::Report {
            crate::ranking::precision::Report::other("flaky", None)
        }

        fn rows_are_independent(&self) -> bool {
            true
        }

        fn score(&mut self, inputs: &[Vec<f32>], n: usize, scores: &mut Vec<f32>) -> Result<(), RankError> {
            scores.clear();
            assert!(!inputs[0].contains(&14.0), "fourteen");
            if inputs[0].contains(&13.0) {
                return Err(RankError { ranker: "flaky".into(), reason: "thirteen".into() });
            }
            scores.extend(inputs[0].chunks_exact(inputs[0].len() / n).map(|row| row.iter().sum::<f32>()));
            Ok(())
        }
    }

    #[test]
    fn a_batch_fails_as_one_and_no_other_with_it() {
        let generation = Arc::new(testing::plain(3));
        let pool = Arc::new(ThreadPool::with_num_threads(1));
        let mut device = CpuDevice::new(Arc::new(PipelineConfig::default()), pool);
        let layouts = vec![Layout::compile(&["item.popularity".into()], &generation).unwrap()];
        let rankers = vec![LoadedRanker { layouts, ranker: Box::new(Flaky), parts: None, items: None, weight: 1.0 }];
        device.loaded.push_front(Loaded { generation: generation.clone(), index: None, index_changes: 0, rankers });
        let job = |rows: &[f32]| {
            let mut job = Box::new(Job::new(generation.clone()));
            job.deadline = Deadline::after(Duration::from_secs(60));
            job.task = Task::Infer { ranker: 0, n: rows.len() as u32, inputs: vec![rows.to_vec()] };
            job
        };
        let mut run = |batch: &[&[f32]]| -> Vec<Result<Vec<f32>, Code>> {
            let mut batch: Vec<Box<Job>> = batch.iter().map(|rows| job(rows)).collect();
            device.execute(&mut batch).unwrap();
            batch
                .iter()
                .map(|job| job.failure.as_ref().map_or(Ok(job.ranked.scores.clone()), |f| Err(f.code)))
                .collect()
        };
        let good = || [Ok(vec![1.0, 2.0]), Ok(vec![3.0])];
        assert_eq!(run(&[&[1.0, 2.0], &[3.0]]), good());
        assert_eq!(run(&[&[1.0], &[13.0], &[2.0]]), [Err(Code::Internal), Err(Code::Internal), Err(Code::Internal)]);
        assert_eq!(run(&[&[1.0, 2.0], &[3.0]]), good());
        assert_eq!(run(&[&[14.0], &[1.0]]), [Err(Code::Internal), Err(Code::Internal)]);
        assert_eq!(run(&[&[1.0, 2.0], &[3.0]]), good());
        assert_eq!(run(&[&[13.0]]), [Err(Code::Internal)]);
        assert_eq!(run(&[&[4.0]]), [Ok(vec![4.0])]);
    }
}

#[cfg(test)]
mod search_tests {
    use super::*;
    use crate::api::{SearchBy, SearchCall, SearchFilter};
    use crate::catalog::conditions::Demand;
    use crate::catalog::generation::testing;
    use crate::index::{IndexKind, SearchParams};
    use crate::pipeline::plan;
    use parking_lot::Mutex;

    /// A query, k, the rows that the filter admits, and the parameters.
    type Question = (Vec<f32>, usize, Vec<u32>, SearchParams);

    /// An index that tells what it was asked.
    #[derive(Debug, Default)]
    struct Asked(Mutex<Vec<Question>>);

    impl VectorIndex for Asked {
        fn kind(&self) -> IndexKind {
            IndexKind::BruteForce
        }

        fn dim(&self) -> usize {
            2
        }

        fn bytes(&self) -> usize {
            0
        }

        fn search(
            &self,
            query: &[f32],
            k: usize,
            filter: Filter<'_>,
            params: &SearchParams,
            _: &mut SearchScratch,
            out: &mut Vec<Scored>,
        ) {
            let mut admitted = Vec::new();
            filter.each(6, |row| admitted.push(row));
            out.extend(admitted.iter().map(|&row| Scored { row, score: query[0] }));
            self.0.lock().push((query.to_vec(), k, admitted, *params));
        }

        fn scores(&self, _: &[f32], rows: &[u32], _: &mut SearchScratch, out: &mut Vec<f32>) {
            out.resize(out.len() + rows.len(), 0.0);
        }
    }

    #[test]
    fn the_index_is_asked_what_the_call_says() {
        let mut generation = testing::with_embeddings((0..12).map(|at| at as f32).collect(), 2);
        testing::add_category(&mut generation, "category", &[0, 1, 0, 1, 0, 1]);
        let (generation, asked) = (Arc::new(generation), Arc::new(Asked::default()));
        let config = Arc::new(PipelineConfig::default());
        let mut device = CpuDevice::new(config, Arc::new(ThreadPool::with_num_threads(1)));
        let index: Arc<dyn VectorIndex> = asked.clone();
        device.loaded.push_front(Loaded {
            generation: generation.clone(),
            index: Some(index),
            index_changes: 0,
            rankers: Vec::new(),
        });
        let params = SearchParams { n_probes: Some(3), refine_ratio: Some(2.5), ef_search: Some(40) };
        let conditions = [("category", Demand::Values(&["c0"]))];
        let filter = SearchFilter { conditions: &conditions, exclude: &["2", "?"], exclude_seen: None };
        let mut job = [Box::new(Job::new(generation.clone()))];
        let mut ask = |by, filter, params| {
            let call = SearchCall { filter, params, ..SearchCall::new(by, 4) };
            plan::search(&call, &generation, Instant::now(), &mut job[0]).unwrap();
            device.execute(&mut job).unwrap();
            assert_eq!(job[0].failure, None);
            let rows: Vec<u32> = job[0].ranked.items.iter().map(|item| item.row).collect();
            (std::mem::take(&mut *asked.0.lock()), rows, job[0].ranked.result_lengths.clone())
        };
        let values = [1.0, 2.0, 3.0, 4.0];
        let (seen, rows, lengths) = ask(SearchBy::Vectors { values: &values, n: 2 }, filter, params);
        let of = |query: &[f32]| (query.to_vec(), 4, vec![0, 4], params);
        assert_eq!(seen, [of(&values[..2]), of(&values[2..])]);
        assert_eq!((rows, lengths), (vec![0, 4, 0, 4], vec![2, 2]));
        // Nothing of that is left for the next call on the same job.
        let (seen, rows, lengths) = ask(SearchBy::Item("1"), SearchFilter::default(), SearchParams::default());
        assert_eq!(seen, [(vec![2.0, 3.0], 4, vec![0, 2, 3, 4, 5], SearchParams::default())]);
        assert_eq!((rows, lengths), (vec![0, 2, 3, 4, 5], vec![]));
        let (seen, ..) = ask(SearchBy::Vector(&values[..2]), SearchFilter::default(), SearchParams::default());
        assert_eq!(seen[0].2, [0, 1, 2, 3, 4, 5]);
    }
}
