//! What accompanies a request through every stage: its deadline, the stage times, and what was done without.

use std::time::{Duration, Instant, SystemTime};

/// A stage of the pipeline, for timings, metrics and degradations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Stage {
    /// Ids to rows, arms, parameters.
    Plan = 0,
    /// From the shard's push to the worker's pop.
    Queue = 1,
    /// ANN source.
    Ann = 2,
    /// Collaborative source.
    Collaborative = 3,
    /// Trending source.
    Trending = 4,
    /// Text-search source.
    Search = 5,
    /// Dedupe and hard filters.
    Merge = 6,
    /// Feature assembly.
    Features = 7,
    /// Ranker.
    Rank = 8,
    /// Top of the scores.
    Select = 9,
    /// Seen filter, diversity, rules.
    Rerank = 10,
    /// Trim, backfill.
    Respond = 11,
}

impl Stage {
    /// Number of stages.
    pub const COUNT: usize = 12;
    /// All stages in the order of their discriminants.
    pub const ALL: [Stage; Self::COUNT] = [
        Stage::Plan,
        Stage::Queue,
        Stage::Ann,
        Stage::Collaborative,
        Stage::Trending,
        Stage::Search,
        Stage::Merge,
        Stage::Features,
        Stage::Rank,
        Stage::Select,
        Stage::Rerank,
        Stage::Respond,
    ];

    /// The name in metrics, responses and reports.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Plan => "plan",
            Stage::Queue => "queue",
            Stage::Ann => "ann",
            Stage::Collaborative => "collaborative",
            Stage::Trending => "trending",
            Stage::Search => "search",
            Stage::Merge => "merge",
            Stage::Features => "features",
            Stage::Rank => "rank",
            Stage::Select => "select",
            Stage::Rerank => "rerank",
            Stage::Respond => "respond",
        }
    }
}

/// Time spent in each stage of one request, in nanoseconds; 0 for a stage that did not run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StageTimings(pub [u32; Stage::COUNT]);

impl StageTimings {
    /// Adds the time since `start` to `stage` and returns the present, to start the next stage with.
    pub fn lap(&mut self, stage: Stage, start: Instant) -> Instant {
        let now = Instant::now();
        self.add(stage, now.saturating_duration_since(start));
        now
    }

    /// Adds `spent` to `stage`; saturates at 4.29 s.
    pub fn add(&mut self, stage: Stage, spent: Duration) {
        let slot = &mut self.0[stage as usize];
        *slot = slot.saturating_add(u32::try_from(spent.as_nanos()).unwrap_or(u32::MAX));
    }

    /// Time spent in `stage`.
    pub fn get(&self, stage: Stage) -> Duration {
        Duration::from_nanos(u64::from(self.0[stage as usize]))
    }
}

/// Why a stage was skipped or answered less than asked. The name is part of the response.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// The stage returned an error; the log has it.
    Failed,
    /// The request's time was up before the stage began.
    Deadline,
    /// The catalogue cannot fill the slate after filters and rules.
    Exhausted,
    /// The bundle lacks what the stage needs.
    Missing,
}

impl Reason {
    /// The name used on the wire and as a metric label.
    pub fn name(self) -> &'static str {
        match self {
            Reason::Failed => "failed",
            Reason::Deadline => "deadline",
            Reason::Exhausted => "exhausted",
            Reason::Missing => "missing",
        }
    }
}

/// One thing that was done without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Degradation {
    /// Where.
    pub stage: Stage,
    /// Why.
    pub reason: Reason,
}

/// What was done without in one request; inline, so that recording allocates nothing.
pub type Degradations = smallvec::SmallVec<[Degradation; 6]>;

/// Milliseconds since 1970.
pub fn now_ms() -> i64 {
    SystemTime::UNIX_EPOCH.elapsed().map_or(0, |t| t.as_millis() as i64)
}

/// The moment by which an answer is owed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(pub Instant);

impl Deadline {
    /// The deadline `budget` from now.
    pub fn after(budget: Duration) -> Self {
        Deadline(Instant::now() + budget)
    }

    /// Whether the time is up at `now`.
    pub fn passed(self, now: Instant) -> bool {
        now >= self.0
    }
}

/// The name most like `name` by Jaro-Winkler similarity, if any is alike at all; for error messages.
pub fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    known
        .map(|candidate| (strsim::jaro_winkler(name, candidate), candidate))
        .filter(|&(similarity, _)| similarity > 0.7)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}
