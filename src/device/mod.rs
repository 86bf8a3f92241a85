//! Accelerators and their CPU stand-in. Nothing above this module knows which one it is talking to.

pub mod batcher;
pub mod cpu;
pub mod cuda;
pub mod guard;
pub mod ring;
pub mod sim;
pub mod worker;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::api::Ticket;
use crate::candidates::{Candidates, Scored, Source};
use crate::catalog::conditions::Test;
use crate::catalog::generation::{Generation, Interaction};
use crate::catalog::live::LiveItems;
use crate::config::in_range;
use crate::context::{Deadline, Degradations, StageTimings};
use crate::error::Error;
use crate::index::{GraphMaker, SearchParams, Settled};
use crate::pipeline::PipelineConfig;
use crate::rerank::HardFilter;
use crate::state::trending::LiveTrending;
use crate::state::users::Profile;
use crate::store::user::StoredUser;

/// An accelerator or its CPU stand-in, owned by one worker thread: `Send`, never shared.
///
/// Calls block. A device loads a generation the first time that a job brings it and keeps the last few.
pub trait Device: Send {
    /// For logs: `cpu`, `cuda:0`, `sim`.
    fn name(&self) -> &str;

    /// Makes `generation` ready: models loaded, tables in place, warmed up. Idempotent.
    ///
    /// # Errors
    /// The device stays usable for the generations it already has.
    fn load(&mut self, generation: &Arc<Generation>) -> Result<(), DeviceError>;

    /// Executes planned jobs end to end (retrieve → merge → rank → select), filling each job's `ranked`, `failure`,
    /// `degraded` and `timings`. Batched results equal one-by-one results.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`]: no job has been answered, fewer at a time may be. Else the device is unfit and must be fenced, and
    /// no job has been answered. A failing request is not an error here: it is in its job.
    fn execute(&mut self, batch: &mut [Box<Job>]) -> Result<(), DeviceError>;
}

/// Why a device could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// A model or table of the generation can't be used on this device.
    #[error("cannot load generation {version}: {reason}")]
    Load {
        /// [`Generation::version`]
        version: String,
        /// For the operator.
        reason: String,
    },
    /// The device has no memory for the batch; it stays usable.
    #[error("the device is out of memory")]
    OutOfMemory,
    /// The device failed and must be fenced.
    #[error("device failed: {0}")]
    Failed(String),
}

/// `[device]`: how a GPU is used, where one is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DeviceConfig {
    /// Workers that use the GPU, each with a stream of its own; the others compute on their CPUs alone. 0 to 1024; 0, the default: all.
    pub workers: u32,
    /// Jobs of a batch. 1 to 1024, default 16.
    pub max_batch_size: u32,
    /// How long the first job of a batch may wait for others at most, microseconds: only while the GPU computes another worker's batch, and
    /// no longer than a batch takes. 0 to 10000, default 1000; 0: only what waits already is taken along.
    pub max_wait_us: u32,
    /// A GPU that has not answered a batch for so long is fenced, milliseconds. 10 to 60000, default 500.
    pub patience_ms: u32,
    /// GPU memory that may be used, bytes. 0, the default: nine tenths of what is free when a bundle is loaded.
    pub memory_bytes: u64,
    /// Of that, for the scores of the queries that one worker searches by at a time, bytes; at least one query's are. 1 MiB to 1 TiB,
    /// default 256 MiB.
    pub workspace_bytes: u64,
    /// How item vectors lie in GPU memory. The answers are the same; bf16 takes half of the memory and settles fewer of them there.
    pub vectors: Storage,
    /// How the rankers' tables of items lie in GPU memory. bf16 takes half of it, int8 about a quarter, and scores differ by their rounding of
    /// the items' part.
    pub tables: TableStorage,
    /// Items that may come or change before recommendations are the CPU's again, for which each worker has room in GPU memory. 0 to 65536,
    /// default 4096.
    pub live_items: u32,
    /// Directory for kernels that NVRTC has compiled. Empty, the default: they are compiled at each start, in about a second.
    pub kernel_cache: String,
    /// What finds neighbours on the GPU.
    pub index: IndexChoice,
    /// Folder with cuVS: the `site-packages` that `pip` installed it in, or one with all of its libraries. Empty, the default: where the
    /// loader looks.
    pub cuvs: String,
    /// Directory for indexes that cuVS has made, with their checksums. Empty, the default: they are made at each start.
    pub index_cache: String,
    /// As many queries, or fewer, are searched in a graph (`hnsw`) by a kernel that stays on the GPU and takes half of it. 0 to 64; 0, the
    /// default: never. Nothing else should use the GPU then.
    pub persistent_queries: u32,
}

impl Default for DeviceConfig {
    fn default() -> Self {
        DeviceConfig {
            workers: 0,
            max_batch_size: 16,
            max_wait_us: 1000,
            patience_ms: 500,
            memory_bytes: 0,
            workspace_bytes: 256 << 20,
            vectors: Storage::F32,
            tables: TableStorage::F32,
            live_items: 4096,
            kernel_cache: String::new(),
            index: IndexChoice::Auto,
            cuvs: String::new(),
            index_cache: String::new(),
            persistent_queries: 0,
        }
    }
}

impl DeviceConfig {
    /// Checks ranges.
    ///
    /// # Errors
    /// The key, its value and its range.
    pub fn validate(&self) -> Result<(), String> {
        let ranges = [
            ("workers", u64::from(self.workers), 0, 1024),
            ("max_batch_size", u64::from(self.max_batch_size), 1, 1024),
            ("max_wait_us", u64::from(self.max_wait_us), 0, 10_000),
            ("patience_ms", u64::from(self.patience_ms), 10, 60_000),
            ("workspace_bytes", self.workspace_bytes, 1 << 20, 1 << 40),
            ("live_items", u64::from(self.live_items), 0, 65_536),
            ("persistent_queries", u64::from(self.persistent_queries), 0, 64),
        ];
        in_range("device", ranges)
    }
}

/// How numbers lie in a GPU's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Storage {
    /// 4 bytes.
    #[default]
    F32,
    /// 2 bytes, of which 8 bits are the number's.
    Bf16,
}

/// How values of a ranker's table of items lie in a GPU's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TableStorage {
    /// As the CPU's: 4 bytes, or 2 where the ranker is computed in bf16 or int8 there.
    #[default]
    F32,
    /// 2 bytes, of which 8 bits are the number's.
    Bf16,
    /// 1 byte, and 4 for each piece of an item's row: the scale, a 127th of the largest magnitude in the piece.
    Int8,
}

impl TableStorage {
    /// As in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            TableStorage::F32 => "f32",
            TableStorage::Bf16 => "bf16",
            TableStorage::Int8 => "int8",
        }
    }
}

/// What finds neighbours on a GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IndexChoice {
    /// [`Self::Exact`] up to 2^28 values of vectors (2 M x 128), else [`Self::Bundle`].
    #[default]
    Auto,
    /// Our kernels, from all rows: the same answers as those of an exact index on the CPU.
    Exact,
    /// cuVS's index of the kind that the bundle's is, and our kernels where cuVS can't be used or the bundle's is `brute_force`.
    Bundle,
}

/// What became of the jobs of a device that may fail.
#[derive(Debug)]
pub struct Counters {
    /// The device's name.
    pub device: String,
    /// Workers whose device works.
    pub up: AtomicU64,
    /// Times that one was fenced.
    pub fenced: AtomicU64,
    /// Jobs that it computed.
    pub computed: AtomicU64,
    /// Jobs that the CPU computed because it had failed, and was away.
    pub failed: AtomicU64,
    /// Jobs that the CPU computed because it was late.
    pub late: AtomicU64,
    /// Batches that were too large for its memory.
    pub out_of_memory: AtomicU64,
    /// Whether what it found settled searches.
    pub settled: Settled,
    /// What became of recommendations.
    pub slates: cuda::pipeline::Slates,
    /// Searches by an index of cuVS.
    pub by_index: AtomicU64,
    /// Memory that it was given.
    pub memory_bytes: AtomicU64,
}

impl Counters {
    /// Of the device of that name.
    pub fn new(device: &str) -> Self {
        Counters {
            device: device.to_owned(),
            up: AtomicU64::new(0),
            fenced: AtomicU64::new(0),
            computed: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            late: AtomicU64::new(0),
            out_of_memory: AtomicU64::new(0),
            settled: Settled::default(),
            slates: Default::default(),
            by_index: AtomicU64::new(0),
            memory_bytes: AtomicU64::new(0),
        }
    }
}

/// Numbers of GPUs, as the driver counts them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gpus(u64);

impl Gpus {
    /// Numbers are below this.
    pub const MOST: u32 = u64::BITS;

    /// Number of GPUs.
    pub fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    /// Whether it is none.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Ascending.
    pub fn iter(self) -> impl Iterator<Item = u32> {
        (0..Self::MOST).filter(move |at| self.0 >> at & 1 == 1)
    }
}

impl FromIterator<u32> for Gpus {
    /// Those from [`Self::MOST`] on are left out.
    fn from_iter<I: IntoIterator<Item = u32>>(all: I) -> Self {
        Gpus(all.into_iter().filter_map(|at| 1u64.checked_shl(at)).fold(0, |set, bit| set | bit))
    }
}

impl std::fmt::Display for Gpus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.iter()
            .enumerate()
            .try_for_each(|(at, ordinal)| write!(f, "{}cuda:{ordinal}", if at > 0 { "," } else { "" }))
    }
}

/// Where requests shall be computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// On all GPUs that work here, or by the CPU engine.
    #[default]
    Auto,
    /// By the CPU engine.
    Cpu,
    /// On these GPUs, or not at all; none: on all that work here.
    Cuda(Gpus),
}

impl std::str::FromStr for Choice {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // Digits alone: `parse` would take a sign.
        let ordinal = |text: &str| match text.strip_prefix("cuda:") {
            Some(n) if n.bytes().all(|byte| byte.is_ascii_digit()) => n.parse().ok().filter(|&n| n < Gpus::MOST),
            _ => None,
        };
        match text {
            "auto" => Ok(Choice::Auto),
            "cpu" => Ok(Choice::Cpu),
            "cuda" => Ok(Choice::Cuda(Gpus::default())),
            _ => {
                let named: Option<Vec<u32>> = text.split(',').map(ordinal).collect();
                let named = named.filter(|named| named.iter().copied().collect::<Gpus>().len() == named.len());
                named.map(|named| Choice::Cuda(named.into_iter().collect()))
            }
            .ok_or("expected auto, cpu, cuda, cuda:N or several, as in cuda:0,cuda:2"),
        }
    }
}

/// A device that was asked for can't be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("device {device}: {reason}")]
pub struct ChoiceError {
    /// As asked for.
    pub device: String,
    /// For the operator.
    pub reason: String,
}

/// What computes, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selected {
    /// `cpu`, `cuda:0`, `cuda:0,cuda:1`.
    pub name: String,
    /// For the log: why, or what it is.
    pub reason: String,
    /// The GPUs, where it is some.
    pub gpus: Gpus,
    /// Whether nothing else will do.
    pub required: bool,
}

/// Looks for what computes best here.
///
/// # Errors
/// A GPU was asked for that can't be used.
pub fn select(choice: Choice) -> Result<Selected, ChoiceError> {
    let cpu = |reason| Selected { name: "cpu".to_owned(), reason, gpus: Gpus::default(), required: false };
    let found = |all: Vec<cuda::probe::Gpu>, required| {
        let gpus: Gpus = all.iter().map(|gpu| gpu.ordinal).collect();
        let reasons: Vec<String> = all.iter().map(ToString::to_string).collect();
        Selected { name: gpus.to_string(), reason: reasons.join("; "), gpus, required }
    };
    let failed = |device: String, unfit: cuda::probe::Unfit| ChoiceError { device, reason: unfit.to_string() };
    match choice {
        Choice::Cpu => Ok(cpu("as asked".to_owned())),
        Choice::Auto => Ok(match cuda::probe::probe_all(None) {
            Ok(all) => found(all, false),
            Err(unfit) => cpu(unfit.to_string()),
        }),
        Choice::Cuda(gpus) if gpus.is_empty() => {
            let all = cuda::probe::probe_all(None).map_err(|unfit| failed("cuda".to_owned(), unfit))?;
            Ok(found(all, true))
        }
        Choice::Cuda(gpus) => {
            let one = |at| cuda::probe::probe(Some(at)).map_err(|unfit| failed(format!("cuda:{at}"), unfit));
            Ok(found(gpus.iter().map(one).collect::<Result<_, _>>()?, true))
        }
    }
}

/// What makes graphs of `hnsw` indexes on the GPU that is chosen, or the one with the most memory: CAGRA, of the cuVS in `cuvs` or where
/// the loader looks.
///
/// # Errors
/// A choice that is not one GPU, or whatever is missing.
pub fn graph_maker(choice: Choice, cuvs: Option<&Path>) -> Result<Arc<dyn GraphMaker>, ChoiceError> {
    let (device, ordinal) = match choice {
        Choice::Auto => ("cuda".to_owned(), None),
        Choice::Cuda(gpus) if gpus.len() < 2 => {
            let ordinal = gpus.iter().next();
            (ordinal.map_or("cuda".to_owned(), |at| format!("cuda:{at}")), ordinal)
        }
        Choice::Cuda(gpus) => {
            return Err(ChoiceError { device: gpus.to_string(), reason: "one GPU makes a graph".to_owned() });
        }
        Choice::Cpu => {
            return Err(ChoiceError {
                device: "cpu".to_owned(),
                reason: "it makes graphs of `--index hnsw`".to_owned(),
            });
        }
    };
    let maker = cuda::cuvs::CagraMaker::open(ordinal, cuvs).map_err(|reason| ChoiceError { device, reason })?;
    Ok(Arc::new(maker))
}

/// How long a device that comes back may take where it makes an index of many vectors; the CPU serves meanwhile.
const INDEX_PATIENCE: Duration = Duration::from_secs(1800);

/// Whether rankers whose engine is named and is a GPU's can be computed where `accelerated` says whether a GPU does.
///
/// # Errors
/// The first that can't be, and why.
pub fn check_engines(config: &PipelineConfig, generation: &Generation, accelerated: bool) -> Result<(), String> {
    cuda::tensorrt::check(config, generation, accelerated)
}

/// An accelerator that workers use together.
pub struct Accelerator {
    cuda: Arc<cuda::engine::Cuda>,
    config: DeviceConfig,
    /// Keeps the tables there until the first worker has them.
    held: Arc<cuda::engine::Shared>,
    load: Arc<batcher::Load>,
}

impl Accelerator {
    /// Opens the GPU of that number for `n_workers` workers, and loads a generation's tables into its memory.
    ///
    /// # Errors
    /// Whatever is in the way: for the operator.
    pub fn open(
        ordinal: u32,
        config: &DeviceConfig,
        n_workers: usize,
        generation: &Arc<Generation>,
    ) -> Result<Self, DeviceError> {
        let gpu = cuda::probe::probe(Some(ordinal)).map_err(|unfit| DeviceError::Failed(unfit.to_string()))?;
        let cuda = cuda::engine::Cuda::new(gpu, config, n_workers)?;
        let held = cuda.load(generation)?;
        Ok(Accelerator { cuda, config: config.clone(), held, load: Arc::default() })
    }

    /// What becomes of the jobs.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.cuda.counters
    }

    /// Makes a worker's device. The tables stay for it until it drops what this returns.
    pub fn make(&self, pipeline: &Arc<PipelineConfig>) -> (guard::Make, impl Sized + use<>) {
        let (cuda, pipeline) = (self.cuda.clone(), pipeline.clone());
        let make = move || Ok(Box::new(device_of(&cuda, &pipeline)?) as Box<dyn Device>);
        (Arc::new(make), self.held.clone())
    }

    /// As [`Self::make`] makes it, for whoever measures; the tables stay as long as the accelerator.
    ///
    /// # Errors
    /// The GPU fails, or computes something wrong.
    pub fn device(&self, pipeline: &Arc<PipelineConfig>) -> Result<cuda::engine::CudaDevice, DeviceError> {
        device_of(&self.cuda, pipeline)
    }

    /// What its workers know of each other.
    pub fn load(&self) -> &Arc<batcher::Load> {
        &self.load
    }

    /// How jobs are put together for it.
    pub fn limits(&self) -> batcher::BatchLimits {
        batcher::BatchLimits {
            max_batch_size: self.config.max_batch_size as usize,
            max_wait: Duration::from_micros(u64::from(self.config.max_wait_us)),
            company: batcher::Company::Any,
        }
    }

    /// How long it is waited for.
    pub fn patience(&self) -> guard::Options {
        let patience = Duration::from_millis(u64::from(self.config.patience_ms));
        let mut options = guard::Options { patience, ..guard::Options::default() };
        if self.config.index != IndexChoice::Exact {
            options.load_patience = INDEX_PATIENCE;
        }
        options
    }
}

fn device_of(
    cuda: &Arc<cuda::engine::Cuda>,
    pipeline: &Arc<PipelineConfig>,
) -> Result<cuda::engine::CudaDevice, DeviceError> {
    cuda.device(cpu::CpuDevice::new(pipeline.clone(), Arc::new(rten::ThreadPool::with_num_threads(1))), pipeline)
}

/// One unit of work on its way to a worker and back. Recycled, with all its buffers, by the shard that made it.
pub struct Job {
    /// The shard to return to.
    pub shard: u16,
    /// The shard's name for the call.
    pub ticket: Ticket,
    /// The generation that serves the call.
    pub generation: Arc<Generation>,
    /// When an answer is owed; a worker drops a job whose time is up (`failure` says so).
    pub deadline: Deadline,
    /// When it was planned and ready for the queue.
    pub enqueued: Instant,
    /// What to do.
    pub task: Task,
    /// The user, resolved.
    pub user: PlannedUser,
    /// Canonical context.
    pub context: Context,
    /// Text query, empty for none.
    pub query: String,
    /// What a search starts from and may return.
    pub search: PlannedSearch,
    /// Items as they stood when it was planned, where any changed; set by whoever plans it, before.
    pub items: Option<Arc<LiveItems>>,
    /// What is popular because of events, if there were any.
    pub trending: Option<Arc<LiveTrending>>,
    /// What must not be retrieved, beside what the user has seen.
    pub filter: HardFilter,
    /// Result: best first (recommend, search) or as asked (rank).
    pub ranked: Ranked,
    /// Set instead of `ranked` when this job alone failed.
    pub failure: Option<Error>,
    /// What was done without.
    pub degraded: Degradations,
    /// Where the time went.
    pub timings: StageTimings,
}

impl Job {
    /// A job with empty buffers.
    pub fn new(generation: Arc<Generation>) -> Self {
        let now = Instant::now();
        Job {
            shard: 0,
            ticket: Ticket(0),
            generation,
            deadline: Deadline(now),
            enqueued: now,
            task: Task::Recommend { top_m: 0, explain: false },
            user: PlannedUser::default(),
            context: Context::default(),
            query: String::new(),
            search: PlannedSearch::default(),
            items: None,
            trending: None,
            filter: HardFilter::default(),
            ranked: Ranked::default(),
            failure: None,
            degraded: Degradations::new(),
            timings: StageTimings::default(),
        }
    }

    /// Empties the job for another use and keeps its memory, and [`Self::items`].
    pub fn reset(&mut self) {
        self.user.clear();
        self.user.id.clear();
        self.query.clear();
        self.search.clear();
        self.trending = None;
        self.filter = HardFilter::default();
        self.ranked.clear();
        self.failure = None;
        self.degraded.clear();
        self.timings = StageTimings::default();
    }

    /// Becomes a job that asks what `other` asks, and keeps its memory.
    fn copy_question(&mut self, other: &Job) {
        self.reset();
        // Field by field: one that is added is not forgotten here.
        let Job {
            shard,
            ticket,
            generation,
            deadline,
            enqueued,
            task,
            user: PlannedUser { id, row, vector, history, seen, fold_in, profile, stored, encoded },
            context,
            query,
            search,
            trending,
            items,
            filter,
            ranked: Ranked { batch_size, .. },
            failure: _,
            degraded: _,
            timings,
        } = other;
        (self.shard, self.ticket, self.deadline, self.enqueued) = (*shard, *ticket, *deadline, *enqueued);
        self.generation.clone_from(generation);
        self.task.clone_from(task);
        (self.user.row, self.user.fold_in, self.user.encoded) = (*row, *fold_in, *encoded);
        self.user.id.clone_from(id);
        self.user.vector.clone_from(vector);
        self.user.history.clone_from(history);
        self.user.seen.clone_from(seen);
        self.context.clone_from(context);
        self.query.clone_from(query);
        self.search.clone_from(search);
        self.user.profile.clone_from(profile);
        self.user.stored.clone_from(stored);
        self.trending.clone_from(trending);
        self.items.clone_from(items);
        self.filter.clone_from(filter);
        self.ranked.batch_size = *batch_size;
        self.timings = *timings;
    }

    /// Takes over how `copy`, a copy of this job, was answered.
    fn take_answer(&mut self, copy: &mut Job) {
        // Folding in moves the user's vector.
        std::mem::swap(&mut self.user, &mut copy.user);
        std::mem::swap(&mut self.ranked, &mut copy.ranked);
        self.failure = copy.failure.take();
        self.degraded.append(&mut copy.degraded);
        self.timings = copy.timings;
    }
}

/// What a job asks of a device.
#[derive(Clone, Debug)]
pub enum Task {
    /// Retrieve from every source, merge, rank, select.
    Recommend {
        /// Return the `top_m` best candidates.
        top_m: u32,
        /// Also fill [`Ranked::candidates`] for an explanation.
        explain: bool,
    },
    /// Nearest items to the vectors of [`Job::search`] (then [`Job::query`] is empty) or to the words of the query.
    Search {
        /// Number of items, of each query.
        k: u32,
        /// As many vectors, answered with [`Ranked::result_lengths`]; `None`: one vector, or words, answered without.
        n_queries: Option<u32>,
    },
    /// Score given items.
    Rank {
        /// Rows in the order asked; `NO_ROW` for unknown items.
        rows: Vec<u32>,
        /// Position in [`Generation::rankers`].
        ranker: u16,
    },
    /// The ranker's output on given tensors.
    Infer {
        /// Position in [`Generation::rankers`].
        ranker: u16,
        /// Rows of every input.
        n: u32,
        /// `[n, width]` for each input of the manifest.
        inputs: Vec<Vec<f32>>,
    },
}

/// The user of a job. Devices read users from here only, so that live state can differ from the generation.
#[derive(Clone, Debug, Default)]
pub struct PlannedUser {
    /// As asked.
    pub id: String,
    /// Row in the generation, for its feature columns where nothing else has a value; `None`: defaults.
    pub row: Option<u32>,
    /// f32 `[dim]`; empty when unknown: the ANN source is then silent.
    pub vector: Vec<f32>,
    /// Oldest first, at most the configured history length.
    pub history: Vec<Interaction>,
    /// Everything already seen, ascending; never recommended.
    pub seen: Vec<u32>,
    /// What was upserted of the user.
    pub profile: Option<Arc<Profile>>,
    /// What the feature store says of the user.
    pub stored: Option<Arc<StoredUser>>,
    /// The vector is an external encoder's.
    pub encoded: bool,
    /// Events changed the history: the vector is still the trained one, or empty, and to be computed from it.
    pub fold_in: bool,
}

impl PlannedUser {
    /// Empties it and keeps its memory, and the id.
    pub fn clear(&mut self) {
        self.row = None;
        self.vector.clear();
        self.history.clear();
        self.seen.clear();
        (self.profile, self.stored) = (None, None);
        (self.encoded, self.fold_in) = (false, false);
    }

    /// Whether the bundle, an upsert or the feature store knows the user.
    pub fn is_known(&self) -> bool {
        self.row.is_some()
            || self.encoded
            || self.stored.is_some()
            || self.profile.as_ref().is_some_and(|profile| profile.is_known())
    }

    /// What the feature store says of the number column at `column`, or else what was upserted of it, NaN where it is missing; `None`:
    /// nothing.
    pub fn number(&self, column: usize) -> Option<f32> {
        let stored = self.stored.as_ref().and_then(|stored| stored.number(column));
        stored.or_else(|| self.profile.as_ref()?.number(column))
    }

    /// What the vector knows beside what the bundle's vectors do, where it is another one: of a stored one the history that came with it, of
    /// an upserted one what events had said when it came.
    pub fn vector_knows(&self) -> &[Interaction] {
        if let Some(stored) = self.stored.as_deref().filter(|stored| stored.vector().is_some()) {
            return stored.interactions();
        }
        self.profile.as_deref().filter(|profile| profile.vector().is_some()).map_or(&[], |profile| profile.known())
    }
}

/// A search, resolved as far as a shard has time for.
#[derive(Clone, Debug, Default)]
pub struct PlannedSearch {
    /// f32 `[n_queries, dim]`, row-major; empty for words.
    pub vectors: Vec<f32>,
    /// Conditions that all must hold, with the positions of their item columns.
    pub tests: Vec<(u32, Test)>,
    /// An item not to return: the one that the search starts from.
    pub exclude: Option<u32>,
    /// Ids of further items not to return; the device finds their rows.
    pub exclude_ids: Strings,
    /// It starts from the user, whose vector must be known.
    pub by_user: bool,
    /// Of a user: what was seen may be returned.
    pub with_seen: bool,
    /// For the index.
    pub params: SearchParams,
}

impl PlannedSearch {
    fn clear(&mut self) {
        self.vectors.clear();
        self.tests.clear();
        self.exclude = None;
        self.exclude_ids.clear();
        (self.by_user, self.with_seen) = (false, false);
        self.params = SearchParams::default();
    }
}

/// Strings in one buffer.
#[derive(Clone, Debug, Default)]
pub struct Strings {
    text: String,
    ends: Vec<u32>,
}

impl Strings {
    /// Empties it and keeps its memory.
    pub fn clear(&mut self) {
        self.text.clear();
        self.ends.clear();
    }

    /// Appends one.
    ///
    /// # Panics
    /// Beyond 4 GiB in all.
    pub fn push(&mut self, string: &str) {
        self.text.push_str(string);
        self.ends.push(u32::try_from(self.text.len()).expect("strings of less than 4 GiB"));
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// All, in order.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        let mut start = 0;
        self.ends.iter().map(move |&end| {
            let string = &self.text[start..end as usize];
            start = end as usize;
            string
        })
    }
}

/// Canonical request context: keys ascending and unique, all text in one buffer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Context {
    text: String,
    spans: Vec<[u32; 3]>,
}

impl Context {
    /// Replaces the content. `pairs` come in any order; of a repeated key the last value stays.
    pub fn assign(&mut self, pairs: &[(&str, &str)]) {
        self.text.clear();
        self.spans.clear();
        let mut order: smallvec::SmallVec<[u16; 16]> = (0..pairs.len().min(usize::from(u16::MAX)) as u16).collect();
        order.sort_by_key(|&i| pairs[usize::from(i)].0);
        for (at, &i) in order.iter().enumerate() {
            let (key, value) = pairs[usize::from(i)];
            if order.get(at + 1).is_some_and(|&next| pairs[usize::from(next)].0 == key) {
                continue;
            }
            let start = self.text.len() as u32;
            self.text.push_str(key);
            let middle = self.text.len() as u32;
            self.text.push_str(value);
            self.spans.push([start, middle, self.text.len() as u32]);
        }
    }

    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<&str> {
        let at = self.spans.binary_search_by(|s| self.text[s[0] as usize..s[1] as usize].cmp(key)).ok()?;
        let [_, middle, end] = self.spans[at];
        Some(&self.text[middle as usize..end as usize])
    }

    /// Pairs in ascending order of keys.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.spans.iter().map(|&[a, b, c]| (&self.text[a as usize..b as usize], &self.text[b as usize..c as usize]))
    }
}

/// What comes back from a device.
#[derive(Clone, Debug, Default)]
pub struct Ranked {
    /// Recommend and search: best first, ties by ascending row. Rank: as asked.
    pub items: Vec<RankedItem>,
    /// Infer: one per row.
    pub scores: Vec<f32>,
    /// Jobs of the batch that this one was the first of; 0 for the others.
    pub batch_size: u16,
    /// Search of several vectors: how many of `items` belong to each, in order.
    pub result_lengths: Vec<u32>,
    /// Merged candidates that were ranked.
    pub n_candidates: u32,
    /// Proposals per source, after each source's own filter; for metrics.
    pub n_by_source: [u32; Source::COUNT],
    /// All candidates, only where an explanation was asked for.
    pub candidates: Candidates,
    /// Items that may fill the slate up, best first, not among `items`; only when `items` is short.
    pub backfill: Vec<Scored>,
    /// Scores that were not a number; they rank last.
    pub n_nan: u32,
    /// Share of the items that the index did not search: partitions that did not answer.
    pub uncovered: f32,
    /// Time spent inside each ranker, by position in [`Generation::rankers`].
    pub inference: smallvec::SmallVec<[Duration; 2]>,
}

impl Ranked {
    /// Empties it and keeps its memory.
    pub fn clear(&mut self) {
        self.items.clear();
        self.scores.clear();
        self.batch_size = 0;
        self.result_lengths.clear();
        self.n_candidates = 0;
        self.n_by_source = [0; Source::COUNT];
        self.candidates.clear();
        self.backfill.clear();
        self.n_nan = 0;
        self.uncovered = 0.0;
        self.inference.clear();
    }
}

/// One ranked item.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RankedItem {
    /// Item row.
    pub row: u32,
    /// The ranker's score.
    pub score: f32,
    /// Who proposed it.
    pub sources: crate::candidates::SourceSet,
}
