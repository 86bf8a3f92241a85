//! Metrics by the specification's names, labels and buckets, with finer buckets below 10 ms added.
//!
//! Every shard records into counters of its own (relaxed atomics on its own cache lines); a scrape adds them up.
//! Status labels are `ok` or the error's name.

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crate::api::{CacheStatus, Outcome, Slate};
use crate::candidates::Source;
use crate::catalog::live::LiveItems;
use crate::context::{Degradation, Reason, Stage, StageTimings, now_ms};
use crate::device::{Counters, Job, Task};
use crate::error::Code;
use crate::link::{Link, LinkCounters};
use crate::state::change::Kind;
use crate::state::sinks::SinkCounters;
use crate::state::writer::EventCounters;
use crate::store::items::ItemCounters;
use crate::store::{self, FeatureStore, Known, Level};

/// Which call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Endpoint {
    /// `recommend`
    Recommend = 0,
    /// `search`
    Search = 1,
    /// `rank`
    Rank = 2,
    /// `infer`
    Infer = 3,
    /// `events`
    Events = 4,
    /// `items`: upserts and deletions.
    Items = 5,
    /// `users`: the same.
    Users = 6,
}

const ENDPOINTS: [&str; 7] = ["recommend", "search", "rank", "infer", "events", "items", "users"];
const STATUSES: [Option<Code>; 10] = [
    None,
    Some(Code::BadRequest),
    Some(Code::Unauthorized),
    Some(Code::NotFound),
    Some(Code::MethodNotAllowed),
    Some(Code::DeadlineExceeded),
    Some(Code::TooLarge),
    Some(Code::Overloaded),
    Some(Code::Internal),
    Some(Code::Unavailable),
];
const REASONS: [Reason; 4] = [Reason::Failed, Reason::Deadline, Reason::Exhausted, Reason::Missing];

fn status_name(code: Option<Code>) -> &'static str {
    code.map_or("ok", Code::name)
}

/// Seconds; the specification's are those from 0.01 up.
const REQUEST_BUCKETS: [f64; 14] =
    [0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0];
/// Seconds; the specification's are those from 0.005 up.
const STAGE_BUCKETS: [f64; 14] =
    [0.000001, 0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1];
/// Candidates; the specification's.
const CANDIDATE_BUCKETS: [f64; 6] = [10.0, 50.0, 100.0, 500.0, 1000.0, 5000.0];

/// Jobs.
const BATCH_BUCKETS: [f64; 7] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0];

/// Seconds, from one to a week.
const AGE_BUCKETS: [f64; 9] = [1.0, 10.0, 60.0, 300.0, 900.0, 3600.0, 21_600.0, 86_400.0, 604_800.0];

/// A histogram with fixed buckets.
struct Histogram<const N: usize> {
    counts: [AtomicU64; N],
    above: AtomicU64,
    /// Nanoseconds, or plain units.
    sum: AtomicU64,
}

impl<const N: usize> Default for Histogram<N> {
    fn default() -> Self {
        Histogram { counts: [const { AtomicU64::new(0) }; N], above: AtomicU64::new(0), sum: AtomicU64::new(0) }
    }
}

impl<const N: usize> Histogram<N> {
    fn observe(&self, bounds: &[f64; N], value: f64, sum: u64) {
        let bucket = bounds.partition_point(|&bound| bound < value);
        self.counts.get(bucket).unwrap_or(&self.above).fetch_add(1, Relaxed);
        self.sum.fetch_add(sum, Relaxed);
    }

    fn observe_time(&self, bounds: &[f64; N], time: Duration) {
        self.observe(bounds, time.as_secs_f64(), u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
    }
}

/// Inferences of one ranker; times in nanoseconds.
#[derive(Default)]
struct InferCounters {
    rows: AtomicU64,
    succeeded: AtomicU64,
    succeeded_ns: AtomicU64,
    failed: AtomicU64,
    failed_ns: AtomicU64,
    executions: AtomicU64,
    queue_ns: AtomicU64,
    compute_ns: AtomicU64,
    /// Milliseconds since 1970.
    last_ms: AtomicU64,
}

/// Inferences of one ranker since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InferStats {
    /// Rows of those that succeeded.
    pub rows: u64,
    /// Answered.
    pub succeeded: u64,
    /// From the call to its answer, nanoseconds in all; so with the others.
    pub succeeded_ns: u64,
    /// Computed and failed, or late.
    pub failed: u64,
    /// As above.
    pub failed_ns: u64,
    /// Calls of the ranker.
    pub executions: u64,
    /// Between the shard and the worker, of those that succeeded.
    pub queue_ns: u64,
    /// Inside the ranker, of those that succeeded.
    pub compute_ns: u64,
    /// When the last one succeeded, milliseconds since 1970; 0: never.
    pub last_ms: u64,
}

/// The counters of one shard; recording neither locks nor allocates.
#[repr(align(128))]
pub struct ShardMetrics {
    requests: [[Histogram<14>; STATUSES.len()]; ENDPOINTS.len()],
    stages: [Histogram<14>; Stage::COUNT],
    served: [AtomicU64; Source::COUNT],
    backfilled: AtomicU64,
    cache_hits: AtomicU64,
    l2_hits: AtomicU64,
    stale_hits: AtomicU64,
    precomputed_hits: AtomicU64,
    cache_misses: AtomicU64,
    shared: AtomicU64,
    candidates: [Histogram<6>; Source::COUNT],
    batches: Histogram<7>,
    inference: Vec<Histogram<14>>,
    infer: Vec<InferCounters>,
    degraded: [[AtomicU64; REASONS.len()]; Stage::COUNT],
    features: [[AtomicU64; Level::COUNT]; store::Kind::COUNT],
    feature_age: Histogram<9>,
    negative_hits: AtomicU64,
    unknown_users: AtomicU64,
    nan_scores: AtomicU64,
    /// Calls in flight now.
    pub in_flight: AtomicU64,
    /// Binary connections open now.
    pub connections: AtomicU64,
    /// Connections refused for the cap.
    pub refused: AtomicU64,
    /// Frames that were no request.
    pub malformed: AtomicU64,
}

impl ShardMetrics {
    fn new(n_rankers: usize) -> Self {
        ShardMetrics {
            requests: Default::default(),
            stages: Default::default(),
            served: Default::default(),
            backfilled: AtomicU64::new(0),
            cache_hits: AtomicU64::new(0),
            l2_hits: AtomicU64::new(0),
            stale_hits: AtomicU64::new(0),
            precomputed_hits: AtomicU64::new(0),
            cache_misses: AtomicU64::new(0),
            shared: AtomicU64::new(0),
            candidates: Default::default(),
            batches: Histogram::default(),
            inference: (0..n_rankers).map(|_| Histogram::default()).collect(),
            infer: (0..n_rankers).map(|_| InferCounters::default()).collect(),
            degraded: Default::default(),
            features: Default::default(),
            feature_age: Histogram::default(),
            negative_hits: AtomicU64::new(0),
            unknown_users: AtomicU64::new(0),
            nan_scores: AtomicU64::new(0),
            in_flight: AtomicU64::new(0),
            connections: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            malformed: AtomicU64::new(0),
        }
    }

    /// A call was answered.
    pub fn record_outcome(&self, endpoint: Endpoint, outcome: &Outcome, latency: Duration) {
        let code = match outcome {
            Outcome::Failed(error) => Some(error.code),
            Outcome::Slate(slate, cache) => {
                self.record_slate(slate, *cache);
                None
            }
            Outcome::Scored(scored) => {
                self.record_degraded(&scored.degraded);
                None
            }
            Outcome::Inferred(_) | Outcome::Received(_) | Outcome::Changed(_) => None,
        };
        let status = STATUSES.iter().position(|s| *s == code).unwrap_or(0);
        self.requests[endpoint as usize][status].observe_time(&REQUEST_BUCKETS, latency);
    }

    fn record_slate(&self, slate: &Slate, cache: CacheStatus) {
        match cache {
            CacheStatus::L1 if !slate.degraded.is_empty() => self.negative_hits.fetch_add(1, Relaxed),
            CacheStatus::L1 => self.cache_hits.fetch_add(1, Relaxed),
            CacheStatus::Precomputed => self.precomputed_hits.fetch_add(1, Relaxed),
            CacheStatus::L2 => self.l2_hits.fetch_add(1, Relaxed),
            CacheStatus::Stale => self.stale_hits.fetch_add(1, Relaxed),
            CacheStatus::Miss => self.cache_misses.fetch_add(1, Relaxed),
            CacheStatus::Bypass => 0,
        };
        if !slate.known_user {
            self.unknown_users.fetch_add(1, Relaxed);
        }
        let mut served = [0u64; Source::COUNT];
        let mut backfilled = 0;
        for item in &slate.items {
            backfilled += u64::from(item.sources.0 == 0);
            item.sources.iter().for_each(|source| served[source as usize] += 1);
        }
        for (counter, n) in self.served.iter().zip(served).filter(|(_, n)| *n > 0) {
            counter.fetch_add(n, Relaxed);
        }
        if backfilled > 0 {
            self.backfilled.fetch_add(backfilled, Relaxed);
        }
        self.record_degraded(&slate.degraded);
    }

    fn record_degraded(&self, degraded: &[Degradation]) {
        for degraded in degraded {
            let reason = REASONS.iter().position(|r| *r == degraded.reason).unwrap_or(0);
            self.degraded[degraded.stage as usize][reason].fetch_add(1, Relaxed);
        }
    }

    /// A job came back from its worker.
    pub fn record_job(&self, job: &Job) {
        self.record_stages(&job.timings);
        for (histogram, &time) in self.inference.iter().zip(&job.ranked.inference) {
            if !time.is_zero() {
                histogram.observe_time(&STAGE_BUCKETS, time);
            }
        }
        for (histogram, &n) in self.candidates.iter().zip(&job.ranked.n_by_source).filter(|(_, n)| **n > 0) {
            histogram.observe(&CANDIDATE_BUCKETS, f64::from(n), u64::from(n));
        }
        if job.ranked.batch_size > 0 && matches!(job.task, Task::Rank { .. } | Task::Infer { .. }) {
            self.batches.observe(&BATCH_BUCKETS, f64::from(job.ranked.batch_size), u64::from(job.ranked.batch_size));
        }
        if job.ranked.n_nan > 0 {
            self.nan_scores.fetch_add(u64::from(job.ranked.n_nan), Relaxed);
        }
    }

    /// An inference came back from its worker.
    pub fn record_infer(&self, ranker: u16, rows: u32, job: &Job, ok: bool, latency: Duration) {
        let Some(counters) = self.infer.get(usize::from(ranker)) else { return };
        let ns = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        if !ok {
            counters.failed.fetch_add(1, Relaxed);
            counters.failed_ns.fetch_add(ns(latency), Relaxed);
            return;
        }
        counters.rows.fetch_add(u64::from(rows), Relaxed);
        counters.succeeded.fetch_add(1, Relaxed);
        counters.succeeded_ns.fetch_add(ns(latency), Relaxed);
        counters.executions.fetch_add(u64::from(job.ranked.batch_size > 0), Relaxed);
        counters.queue_ns.fetch_add(ns(job.timings.get(Stage::Queue)), Relaxed);
        counters.compute_ns.fetch_add(ns(job.timings.get(Stage::Rank)), Relaxed);
        counters.last_ms.store(now_ms() as u64, Relaxed);
    }

    /// What the feature store said of a call's user.
    pub fn record_known(&self, known: &Known, now_ms: i64) {
        for (counters, &level) in self.features.iter().zip(&known.levels).filter(|(_, level)| **level != Level::Off) {
            counters[level as usize].fetch_add(1, Relaxed);
        }
        if let Some(age) = known.age_seconds(now_ms) {
            self.feature_age.observe(&AGE_BUCKETS, age, age as u64);
        }
    }

    fn record_stages(&self, timings: &StageTimings) {
        for stage in Stage::ALL {
            let time = timings.get(stage);
            if !time.is_zero() {
                self.stages[stage as usize].observe_time(&STAGE_BUCKETS, time);
            }
        }
    }

    /// A call was answered together with an identical one.
    pub fn record_shared(&self) {
        self.shared.fetch_add(1, Relaxed);
    }
}

/// All counters of the process.
pub struct Metrics {
    /// By shard.
    pub shards: Vec<ShardMetrics>,
    rankers: Vec<String>,
    /// Shards that the watchdog had to kick.
    pub watchdog_kicks: AtomicU64,
}

/// Values that are read at scrape time.
#[derive(Clone, Debug, Default)]
pub struct Gauges<'a> {
    /// Jobs waiting for a worker.
    pub queue_depth: usize,
    /// Result cache, bytes.
    pub cache_bytes: u64,
    /// Result cache, entries.
    pub cache_entries: usize,
    /// Memory of the bitmaps of search filters.
    pub filter_cache_bytes: u64,
    /// Sinks of events.
    pub sinks: &'a [std::sync::Arc<SinkCounters>],
    /// Users with events.
    pub live_users: usize,
    /// Items in their histories.
    pub live_entries: usize,
    /// Items that came, changed or went, if any did.
    pub items: Option<Arc<LiveItems>>,
    /// Values of columns that the bundle does not have.
    pub live_values: usize,
    /// Users of whom something was upserted, or who are forgotten.
    pub live_profiles: usize,
    /// Memory of that.
    pub profile_bytes: usize,
    /// When live trending was last made, milliseconds since 1970.
    pub trending_ms: Option<i64>,
    /// When the file of slates was made, milliseconds since 1970.
    pub precomputed_ms: Option<i64>,
    /// Events and changes, and their log.
    pub events: Option<&'a EventCounters>,
    /// The feature store, where there is one.
    pub store: Option<&'a FeatureStore>,
    /// Items that the feature store said had changed, where they are followed.
    pub followed: Option<&'a ItemCounters>,
    /// Uses of Redis, where there are some.
    pub links: &'a [Arc<Link>],
    /// Devices that may fail.
    pub devices: &'a [Arc<Counters>],
    /// The bundle.
    pub generation: &'a str,
    /// Partitions of the index: all, and those that did not answer when they were last asked.
    pub partitions: usize,
    /// As above.
    pub partitions_down: usize,
    /// Searches of partitions that failed, since the index was made.
    pub partition_failures: u64,
    /// Searches of partitions that were late, since the index was made.
    pub partition_latenesses: u64,
}

impl Metrics {
    /// Counters for `n_shards` shards and the given rankers.
    pub fn new(n_shards: usize, rankers: Vec<String>) -> Self {
        Metrics {
            shards: (0..n_shards).map(|_| ShardMetrics::new(rankers.len())).collect(),
            rankers,
            watchdog_kicks: AtomicU64::new(0),
        }
    }

    /// Inferences of a ranker, over all shards.
    pub fn infer_stats(&self, ranker: usize) -> InferStats {
        let mut all = InferStats::default();
        for counters in self.shards.iter().filter_map(|shard| shard.infer.get(ranker)) {
            all.rows += counters.rows.load(Relaxed);
            all.succeeded += counters.succeeded.load(Relaxed);
            all.succeeded_ns += counters.succeeded_ns.load(Relaxed);
            all.failed += counters.failed.load(Relaxed);
            all.failed_ns += counters.failed_ns.load(Relaxed);
            all.executions += counters.executions.load(Relaxed);
            all.queue_ns += counters.queue_ns.load(Relaxed);
            all.compute_ns += counters.compute_ns.load(Relaxed);
            all.last_ms = all.last_ms.max(counters.last_ms.load(Relaxed));
        }
        all
    }

    fn sum(&self, of: impl Fn(&ShardMetrics) -> &AtomicU64) -> u64 {
        self.shards.iter().map(|s| of(s).load(Relaxed)).sum()
    }

    /// Prometheus text exposition, format 0.0.4.
    pub fn render(&self, gauges: &Gauges<'_>) -> String {
        let mut out = String::with_capacity(32 << 10);
        let o = &mut out;
        head(o, "recommendation_request_latency_seconds", "histogram", "Request latency");
        let each_request = || {
            (0..ENDPOINTS.len())
                .flat_map(|e| (0..STATUSES.len()).map(move |s| (e, s)))
                .filter(|&(e, s)| self.shards.iter().any(|shard| count(&shard.requests[e][s]) > 0))
        };
        let labels =
            |e: usize, s: usize| format!("endpoint=\"{}\",status=\"{}\"", ENDPOINTS[e], status_name(STATUSES[s]));
        for (e, s) in each_request() {
            let name = "recommendation_request_latency_seconds";
            self.histogram(o, name, &labels(e, s), &REQUEST_BUCKETS, 1e-9, |m| &m.requests[e][s]);
        }
        head(o, "recommendation_requests_total", "counter", "Total requests");
        for (e, s) in each_request() {
            let total: u64 = self.shards.iter().map(|m| count(&m.requests[e][s])).sum();
            line(o, "recommendation_requests_total", &labels(e, s), total);
        }
        head(o, "recommendation_stage_latency_seconds", "histogram", "Per-stage latency");
        for stage in Stage::ALL {
            let labels = format!("stage=\"{}\"", stage.name());
            let name = "recommendation_stage_latency_seconds";
            self.histogram(o, name, &labels, &STAGE_BUCKETS, 1e-9, |m| &m.stages[stage as usize]);
        }
        head(o, "recommendations_served_total", "counter", "Total recommendations served");
        for source in Source::ALL {
            let labels = format!("source=\"{}\"", source.name());
            line(o, "recommendations_served_total", &labels, self.sum(|m| &m.served[source as usize]));
        }
        line(o, "recommendations_served_total", "source=\"backfill\"", self.sum(|m| &m.backfilled));
        head(o, "recommendation_cache_hits_total", "counter", "Cache hits");
        line(o, "recommendation_cache_hits_total", "cache_level=\"l1\"", self.sum(|m| &m.cache_hits));
        line(o, "recommendation_cache_hits_total", "cache_level=\"l2\"", self.sum(|m| &m.l2_hits));
        let precomputed = self.sum(|m| &m.precomputed_hits);
        line(o, "recommendation_cache_hits_total", "cache_level=\"precomputed\"", precomputed);
        line(o, "recommendation_cache_hits_total", "cache_level=\"stale\"", self.sum(|m| &m.stale_hits));
        line(o, "recommendation_cache_hits_total", "cache_level=\"negative\"", self.sum(|m| &m.negative_hits));
        head(o, "model_inference_latency_seconds", "histogram", "Model inference latency");
        for (at, ranker) in self.rankers.iter().enumerate() {
            let labels = format!("model_name=\"{}\"", escaped(ranker));
            self.histogram(o, "model_inference_latency_seconds", &labels, &STAGE_BUCKETS, 1e-9, |m| &m.inference[at]);
        }
        head(o, "tastemaker_batch_size", "histogram", "Rankings and inferences computed together");
        self.histogram(o, "tastemaker_batch_size", "kind=\"rank\"", &BATCH_BUCKETS, 1.0, |m| &m.batches);
        head(o, "candidates_generated", "histogram", "Number of candidates generated");
        for source in Source::ALL {
            let labels = format!("source=\"{}\"", source.name());
            self.histogram(o, "candidates_generated", &labels, &CANDIDATE_BUCKETS, 1.0, |m| {
                &m.candidates[source as usize]
            });
        }
        head(o, "tastemaker_degraded_total", "counter", "Answers that did without something, by stage and reason");
        for stage in Stage::ALL {
            for (at, reason) in REASONS.iter().enumerate() {
                let n = self.sum(|m| &m.degraded[stage as usize][at]);
                if n > 0 {
                    let labels = format!("stage=\"{}\",reason=\"{}\"", stage.name(), reason.name());
                    line(o, "tastemaker_degraded_total", &labels, n);
                }
            }
        }
        let event =
            |of: fn(&EventCounters) -> &AtomicU64| gauges.events.map_or(0, |counters| of(counters).load(Relaxed));
        head(o, "tastemaker_changes_total", "counter", "Upserts and deletions logged and applied");
        for kind in Kind::ALL {
            let n = gauges.events.map_or(0, |counters| counters.changes[kind as usize].load(Relaxed));
            line(o, "tastemaker_changes_total", &format!("kind=\"{}\"", kind.name()), n);
        }
        head(
            o,
            "tastemaker_partition_troubles_total",
            "counter",
            "Searches of partitions of the index that failed or were late",
        );
        line(o, "tastemaker_partition_troubles_total", "reason=\"failed\"", gauges.partition_failures);
        line(o, "tastemaker_partition_troubles_total", "reason=\"deadline\"", gauges.partition_latenesses);
        let of_items = |of: fn(&LiveItems) -> usize| gauges.items.as_ref().map_or(0, |items| of(items) as u64);
        let plain: [(&str, &str, &str, u64); 32] = [
            ("tastemaker_partitions", "gauge", "Partitions of the index", gauges.partitions as u64),
            (
                "tastemaker_partitions_down",
                "gauge",
                "Partitions that did not answer when they were last asked",
                gauges.partitions_down as u64,
            ),
            (
                "tastemaker_cache_misses_total",
                "counter",
                "Results that had to be computed",
                self.sum(|m| &m.cache_misses),
            ),
            (
                "tastemaker_shared_total",
                "counter",
                "Calls answered together with an identical one",
                self.sum(|m| &m.shared),
            ),
            (
                "tastemaker_unknown_users_total",
                "counter",
                "Answers to users that the bundle lacks",
                self.sum(|m| &m.unknown_users),
            ),
            (
                "tastemaker_nan_scores_total",
                "counter",
                "Ranker scores that were not a number",
                self.sum(|m| &m.nan_scores),
            ),
            ("tastemaker_malformed_frames_total", "counter", "Frames that were no request", self.sum(|m| &m.malformed)),
            ("tastemaker_connections_refused_total", "counter", "Connections beyond the cap", self.sum(|m| &m.refused)),
            ("tastemaker_connections", "gauge", "Open binary connections", self.sum(|m| &m.connections)),
            ("tastemaker_in_flight", "gauge", "Calls in flight", self.sum(|m| &m.in_flight)),
            ("tastemaker_queue_depth", "gauge", "Jobs waiting for a worker", gauges.queue_depth as u64),
            ("tastemaker_cache_bytes", "gauge", "Memory of the result cache", gauges.cache_bytes),
            ("tastemaker_cache_entries", "gauge", "Results in the cache", gauges.cache_entries as u64),
            ("tastemaker_filter_cache_bytes", "gauge", "Memory of search filters", gauges.filter_cache_bytes),
            ("tastemaker_live_users", "gauge", "Users with events", gauges.live_users as u64),
            ("tastemaker_live_entries", "gauge", "Items in the histories of these users", gauges.live_entries as u64),
            ("tastemaker_items_gone", "gauge", "Items that were deleted", of_items(LiveItems::n_gone)),
            ("tastemaker_live_items", "gauge", "Items that came or changed", of_items(LiveItems::n_entries)),
            ("tastemaker_live_items_bytes", "gauge", "Memory of that", of_items(LiveItems::bytes)),
            ("tastemaker_live_values", "gauge", "Values of columns that came", gauges.live_values as u64),
            ("tastemaker_profiles", "gauge", "Users upserted or forgotten", gauges.live_profiles as u64),
            ("tastemaker_profile_bytes", "gauge", "Memory of that", gauges.profile_bytes as u64),
            ("tastemaker_events_total", "counter", "Events logged and applied", event(|c| &c.accepted)),
            (
                "tastemaker_events_duplicate_total",
                "counter",
                "Of these, repetitions of an event id",
                event(|c| &c.duplicates),
            ),
            (
                "tastemaker_events_unknown_item_total",
                "counter",
                "Of these, of items that the catalogue lacks",
                event(|c| &c.unknown_items),
            ),
            (
                "tastemaker_event_calls_refused_total",
                "counter",
                "Calls that the event log refused",
                event(|c| &c.refused),
            ),
            ("tastemaker_exposures_total", "counter", "Exposures logged", event(|c| &c.exposures)),
            ("tastemaker_exposures_dropped_total", "counter", "Exposures not logged", event(|c| &c.exposures_dropped)),
            ("tastemaker_event_log_bytes", "gauge", "Size of the event log", event(|c| &c.log_bytes)),
            ("tastemaker_state_file_bytes", "gauge", "Size of the file of items and users", event(|c| &c.state_bytes)),
            ("tastemaker_event_log_syncs_total", "counter", "Syncs of the event log", event(|c| &c.syncs)),
            (
                "tastemaker_watchdog_kicks_total",
                "counter",
                "Kicks to shards that had work and did not move",
                self.watchdog_kicks.load(Relaxed),
            ),
        ];
        for (name, kind, help, value) in plain {
            head(o, name, kind, help);
            line(o, name, "", value);
        }
        head(o, "tastemaker_event_log_sync_seconds_total", "counter", "Time spent in these");
        let _ = writeln!(o, "tastemaker_event_log_sync_seconds_total {}", event(|c| &c.sync_ns) as f64 * 1e-9);
        let age = |ms: i64| now_ms().saturating_sub(ms).max(0) as f64 / 1000.0;
        let applied = gauges.events.map_or(0, |counters| counters.applied_ms.load(Relaxed));
        let ages = [
            ("tastemaker_live_state_age_seconds", "Since events or changes took effect last", Some(applied)),
            ("tastemaker_live_trending_age_seconds", "Since what trends was last counted", gauges.trending_ms),
            ("tastemaker_precomputed_age_seconds", "Since slates were made ahead of time", gauges.precomputed_ms),
        ];
        for (name, help, ms) in ages {
            if let Some(ms) = ms.filter(|ms| *ms > 0) {
                head(o, name, "gauge", help);
                let _ = writeln!(o, "{name} {}", age(ms));
            }
        }
        if !gauges.sinks.is_empty() {
            type Counted = fn(&SinkCounters) -> &AtomicU64;
            let families: [(_, _, _, Counted); 4] = [
                ("tastemaker_event_sink_events_total", "counter", "Events that a sink took", |s| &s.events),
                (
                    "tastemaker_event_sink_lost_total",
                    "counter",
                    "Records gone or damaged before a sink read them",
                    |s| &s.lost,
                ),
                ("tastemaker_event_sink_behind", "gauge", "Records on the disk that a sink did not read yet", |s| {
                    &s.behind
                }),
                ("tastemaker_event_sink_failures_total", "counter", "Times that a sink failed", |s| &s.failures),
            ];
            for (name, kind, help, of) in families {
                head(o, name, kind, help);
                for sink in gauges.sinks {
                    line(o, name, &format!("sink=\"{}\"", sink.name), of(sink).load(Relaxed));
                }
            }
        }
        if let Some(store) = gauges.store {
            head(o, "tastemaker_feature_lookups_total", "counter", "Users looked up in the feature store");
            for kind in store::Kind::ALL {
                for level in Level::ALL {
                    let labels = format!("kind=\"{}\",level=\"{}\"", kind.name(), level.name());
                    let n = self.sum(|m| &m.features[kind as usize][level as usize]);
                    line(o, "tastemaker_feature_lookups_total", &labels, n);
                }
            }
            head(o, "tastemaker_feature_age_seconds", "histogram", "Age of the users' values that were used");
            let labels = "kind=\"user\"";
            self.histogram(o, "tastemaker_feature_age_seconds", labels, &AGE_BUCKETS, 1.0, |m| &m.feature_age);
            head(o, "tastemaker_feature_memory_bytes", "gauge", "Memory of what was read of users");
            for (kind, bytes) in store::Kind::ALL.into_iter().zip(store.memory_bytes()) {
                line(o, "tastemaker_feature_memory_bytes", &format!("kind=\"{}\"", kind.name()), bytes);
            }
        }
        if let Some(counters) = gauges.followed {
            head(o, "tastemaker_followed_items_total", "counter", "Items that the feature store said had changed");
            let each = [
                ("upserted", &counters.upserted),
                ("unchanged", &counters.unchanged),
                ("too_old", &counters.too_old),
                ("missing", &counters.missing),
                ("unreadable", &counters.unreadable),
            ];
            for (result, value) in each {
                line(o, "tastemaker_followed_items_total", &format!("result=\"{result}\""), value.load(Relaxed));
            }
            let lag = "tastemaker_followed_items_lag_seconds";
            head(o, lag, "gauge", "From the making of the newest value to its upsert, when that was last");
            let _ = writeln!(o, "{lag} {}", counters.lag_ms.load(Relaxed) as f64 / 1000.0);
        }
        if !gauges.links.is_empty() {
            head(o, "tastemaker_redis_breaker", "gauge", "0 closed: it works, 1 open, 2 half open");
            for link in gauges.links {
                line(o, "tastemaker_redis_breaker", &format!("use=\"{}\"", link.name), link.breaker() as u64);
            }
            type Counted = fn(&LinkCounters) -> &AtomicU64;
            let families: [(_, _, Counted); 8] = [
                ("tastemaker_redis_round_trips_total", "Batches sent", |c| &c.round_trips),
                ("tastemaker_redis_found_total", "Keys that were there", |c| &c.found),
                ("tastemaker_redis_misses_total", "Keys that were not there", |c| &c.misses),
                ("tastemaker_redis_unanswered_total", "Lookups beyond their budget", |c| &c.unanswered),
                ("tastemaker_redis_unreadable_total", "Values that could not be read", |c| &c.unreadable),
                ("tastemaker_redis_stored_total", "Values stored", |c| &c.stored),
                ("tastemaker_redis_not_stored_total", "Values that could not be stored", |c| &c.not_stored),
                ("tastemaker_redis_failures_total", "Connections lost or not made", |c| &c.failures),
            ];
            for (name, help, of) in families {
                head(o, name, "counter", help);
                for link in gauges.links {
                    line(o, name, &format!("use=\"{}\"", link.name), of(&link.counters).load(Relaxed));
                }
            }
        }
        if !gauges.devices.is_empty() {
            type Counted = fn(&Counters) -> &AtomicU64;
            let families: [(_, _, _, &[(&str, Counted)]); 9] = [
                ("tastemaker_device_up", "gauge", "Workers whose device works", &[("", |d| &d.up)]),
                ("tastemaker_device_memory_bytes", "gauge", "Device memory", &[("", |d| &d.memory_bytes)]),
                ("tastemaker_device_fenced_total", "counter", "Times that a device was fenced", &[("", |d| &d.fenced)]),
                (
                    "tastemaker_device_out_of_memory_total",
                    "counter",
                    "Batches that were too large for a device",
                    &[("", |d| &d.out_of_memory)],
                ),
                (
                    "tastemaker_device_jobs_total",
                    "counter",
                    "Jobs that a device computed, or the CPU because the device was away or late",
                    &[
                        (",by=\"device\"", |d| &d.computed),
                        (",by=\"cpu\",reason=\"failed\"", |d| &d.failed),
                        (",by=\"cpu\",reason=\"deadline\"", |d| &d.late),
                    ],
                ),
                (
                    "tastemaker_device_searches_total",
                    "counter",
                    "Searches that what a device found settled, or that the CPU did again",
                    &[(",settled=\"yes\"", |d| &d.settled.yes), (",settled=\"no\"", |d| &d.settled.no)],
                ),
                (
                    "tastemaker_device_recommendations_total",
                    "counter",
                    "Recommendations computed on a device as a whole, or ranked by the CPU: it was not asked, or left something open",
                    &[
                        (",by=\"device\"", |d| &d.slates.whole),
                        (",by=\"cpu\",reason=\"refused\"", |d| &d.slates.refused),
                        (",by=\"cpu\",reason=\"open\"", |d| &d.slates.open),
                    ],
                ),
                (
                    "tastemaker_device_item_updates_total",
                    "counter",
                    "Items that came or changed, copied to a worker's memory on a device",
                    &[("", |d| &d.slates.sent)],
                ),
                (
                    "tastemaker_device_index_searches_total",
                    "counter",
                    "Searches of a device by an index of cuVS",
                    &[("", |d| &d.by_index)],
                ),
            ];
            for (name, kind, help, lines) in families {
                head(o, name, kind, help);
                for (device, (labels, of)) in
                    gauges.devices.iter().flat_map(|d| lines.iter().map(move |line| (d, line)))
                {
                    line(o, name, &format!("device=\"{}\"{labels}", device.device), of(device).load(Relaxed));
                }
            }
        }
        head(o, "tastemaker_info", "gauge", "Version and bundle");
        let labels = format!("version=\"{}\",generation=\"{}\"", env!("CARGO_PKG_VERSION"), escaped(gauges.generation));
        line(o, "tastemaker_info", &labels, 1);
        out
    }

    fn histogram<'a, const N: usize>(
        &'a self,
        out: &mut String,
        name: &str,
        labels: &str,
        bounds: &[f64; N],
        unit: f64,
        of: impl Fn(&'a ShardMetrics) -> &'a Histogram<N>,
    ) {
        let total = |bucket: usize| -> u64 { self.shards.iter().map(|m| of(m).counts[bucket].load(Relaxed)).sum() };
        let mut running = 0;
        for (bucket, bound) in bounds.iter().enumerate() {
            running += total(bucket);
            line(out, &format!("{name}_bucket"), &format!("{labels},le=\"{bound}\""), running);
        }
        running += self.shards.iter().map(|m| of(m).above.load(Relaxed)).sum::<u64>();
        line(out, &format!("{name}_bucket"), &format!("{labels},le=\"+Inf\""), running);
        let sum: u64 = self.shards.iter().map(|m| of(m).sum.load(Relaxed)).sum();
        let _ = writeln!(out, "{name}_sum{{{labels}}} {}", sum as f64 * unit);
        line(out, &format!("{name}_count"), labels, running);
    }
}

fn count<const N: usize>(histogram: &Histogram<N>) -> u64 {
    histogram.counts.iter().map(|c| c.load(Relaxed)).sum::<u64>() + histogram.above.load(Relaxed)
}

fn head(out: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

fn line(out: &mut String, name: &str, labels: &str, value: u64) {
    let _ = match labels {
        "" => writeln!(out, "{name} {value}"),
        labels => writeln!(out, "{name}{{{labels}}} {value}"),
    };
}

fn escaped(label: &str) -> String {
    label.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;
    use std::collections::HashMap;

    #[test]
    fn exposition_is_sound() {
        let metrics = Metrics::new(2, vec!["ma\"in".into()]);
        for shard in 0..2 {
            for us in [3, 70, 900, 12_000, 2_000_000] {
                let outcome = Outcome::Failed(Error::fixed(Code::Overloaded, "x"));
                metrics.shards[shard].record_outcome(Endpoint::Rank, &outcome, Duration::from_micros(us));
            }
        }
        let text = metrics.render(&Gauges { generation: "g", ..Gauges::default() });
        let (mut types, mut values) = (HashMap::new(), HashMap::new());
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap();
                assert!(types.insert(name, kind).is_none(), "{name} twice");
            } else if !line.starts_with('#') {
                let (series, value) = line.rsplit_once(' ').unwrap();
                assert!(values.insert(series, value.parse::<f64>().unwrap()).is_none(), "{series} twice");
            }
        }
        let series = "recommendation_request_latency_seconds";
        let labels = "endpoint=\"rank\",status=\"overloaded\"";
        let mut last = 0.0;
        for bound in REQUEST_BUCKETS {
            let value = values[format!("{series}_bucket{{{labels},le=\"{bound}\"}}").as_str()];
            assert!(value >= last);
            last = value;
        }
        assert_eq!(last, 8.0);
        assert_eq!(values[format!("{series}_bucket{{{labels},le=\"+Inf\"}}").as_str()], 10.0);
        assert_eq!(values[format!("{series}_count{{{labels}}}").as_str()], 10.0);
        assert!((values[format!("{series}_sum{{{labels}}}").as_str()] - 2.0 * 2.012_973).abs() < 1e-6);
        assert_eq!(values[format!("recommendation_requests_total{{{labels}}}").as_str()], 10.0);
        assert!(text.contains("model_name=\"ma\\\"in\""));
        for name in ["recommendations_served_total", "recommendation_cache_hits_total", "candidates_generated"] {
            assert!(types.contains_key(name), "{name}");
        }
    }
}
