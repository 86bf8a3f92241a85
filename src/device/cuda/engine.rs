//! The engine of a GPU: finds the neighbours of a batch there, and has the CPU engine do the rest.
//!
//! They are found by an index of cuVS where there is to be one ([`super::finder`]), and else exactly: the scores of all rows are computed by
//! a kernel of our own and the best selected on the device; twice as many as are wanted come back, so that filters that only the CPU knows
//! leave enough. The GPU sums in another order than the CPU, so what comes back is scored again as far as its error leaves the order open
//! ([`crate::index::Prefetched`]): answers are the same to the bit, but for what an index misses.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use half::bf16;
use parking_lot::Mutex;
use tastemaker_kernels::{MAX_K, ScoreBy, TopkSelect};

use super::context::Context;
use super::cuvs::{Cuvs, Unavailable};
use super::finder::{Asked, Failure, Finder, Indexed, Plan};
use super::kernels::{Image, image};
use super::ops::{ListsMut, Scoring, Vectors};
use super::pipeline::ranker::Maker;
use super::pipeline::{Pipeline, PipelineSizes, Place, Setting, Tables};
use super::probe::Gpu;
use super::stream::{Buffer, Flight, Pinned, Ring, Stream, Table};
use crate::catalog::generation::{Generation, Matrix, MatrixData, Metric};
use crate::catalog::live::LiveItems;
use crate::context::Stage;
use crate::device::cpu::{Ahead, CpuDevice, twins};
use crate::device::{Counters, Device, DeviceConfig, DeviceError, Job, Storage, Task};
use crate::index::{Found, SearchParams, Settled};
use crate::pipeline::PipelineConfig;

/// The most neighbours that are looked for on the GPU: twice as many come back, but for the last eighth.
const MOST_WANTED: usize = MAX_K as usize / 8 * 7;
/// The fewest that come back.
const LEAST_FETCHED: usize = 128;
/// Pairs of query and row that a user has seen, for one chunk of queries. What is more is left to the CPU to leave out.
const MOST_PAIRS: usize = 16_384;
/// Queries at a time: two of the kernel's tiles.
const MOST_QUERIES: usize = 64;
/// Rows that are gone or changed from which the GPU is told of them, as a share of all: the CPU leaves fewer out by itself.
const TOLD_FROM: usize = 8;
/// The shortest time between two tellings: rows come and go all the time.
const TOLD_EVERY: Duration = if cfg!(test) { Duration::from_secs(3600) } else { Duration::from_millis(100) };

/// A GPU and what all workers that use it share.
#[derive(Debug)]
pub struct Cuda {
    /// What was found.
    pub gpu: Gpu,
    /// What became of its jobs.
    pub counters: Arc<Counters>,
    config: DeviceConfig,
    n_workers: usize,
    image: Image,
    /// Opened when it is first needed.
    pub(super) cuvs: OnceLock<Result<&'static Cuvs, Unavailable>>,
    /// While a worker uses it.
    shared: Mutex<Weak<Shared>>,
}

/// A context, and the tables in it.
#[derive(Debug)]
pub struct Shared {
    context: Arc<Context>,
    residents: Mutex<Vec<Arc<Resident>>>,
}

impl Cuda {
    /// For `n_workers` workers on `gpu`.
    ///
    /// # Errors
    /// There is no machine code for it.
    pub fn new(gpu: Gpu, config: &DeviceConfig, n_workers: usize) -> Result<Arc<Self>, DeviceError> {
        let cache = Some(Path::new(&config.kernel_cache)).filter(|path| !path.as_os_str().is_empty());
        let image = image(gpu.capability, cache).map_err(|error| DeviceError::Failed(error.to_string()))?;
        Ok(Self::with_image(gpu, config, n_workers, image))
    }

    fn with_image(gpu: Gpu, config: &DeviceConfig, n_workers: usize, image: Image) -> Arc<Self> {
        let (counters, shared) = (Arc::new(Counters::new(&format!("cuda:{}", gpu.ordinal))), Mutex::default());
        Arc::new(Cuda { gpu, counters, config: config.clone(), n_workers, image, cuvs: OnceLock::new(), shared })
    }

    /// The context, and the generation's tables in it, which stay there while this is held or a worker uses them.
    ///
    /// # Errors
    /// The GPU fails, or has no room for the tables: the text has the numbers.
    pub fn load(&self, generation: &Arc<Generation>) -> Result<Arc<Shared>, DeviceError> {
        let shared = self.shared()?;
        self.resident(&shared, generation)?;
        Ok(shared)
    }

    /// A device on a stream of its own, once a small computation on it has come out right. `rest` is what does the rest.
    ///
    /// # Errors
    /// The GPU fails, or computes something wrong.
    pub fn device(self: &Arc<Self>, rest: CpuDevice, config: &Arc<PipelineConfig>) -> Result<CudaDevice, DeviceError> {
        let shared = self.shared()?;
        let stream = Stream::new(&shared.context)?;
        try_out(&stream)?;
        Ok(CudaDevice {
            name: format!("cuda:{}", self.gpu.ordinal),
            cuda: self.clone(),
            config: config.clone(),
            rest,
            make: super::pipeline::ranker::maker(&self.gpu, config, &self.config),
            pipeline: None,
            places: Vec::new(),
            searcher: None,
            answers: Answers::default(),
            stream,
            shared,
        })
    }

    /// The context in use, or a new one. One that is lost must be given up by all before there is another.
    fn shared(&self) -> Result<Arc<Shared>, DeviceError> {
        let mut held = self.shared.lock();
        match held.upgrade() {
            Some(shared) if shared.context.is_lost() => {
                Err(DeviceError::Failed("the context is lost, and not yet given up by all".into()))
            }
            Some(shared) => Ok(shared),
            None => {
                let context = Context::open(self.gpu.ordinal, self.image.bytes())?;
                let shared = Arc::new(Shared { context, residents: Mutex::default() });
                *held = Arc::downgrade(&shared);
                Ok(shared)
            }
        }
    }

    /// Bytes that may be used: of those that are free.
    fn left(&self, shared: &Shared) -> Result<u64, DeviceError> {
        Ok(self.may(shared.context.memory()?.0))
    }

    /// Of so many bytes that are free, those that may be used.
    fn may(&self, free: u64) -> u64 {
        match self.config.memory_bytes {
            0 => free / 10 * 9,
            limit => limit.min(free),
        }
    }

    /// The tables of a generation, made by the first that asks; `None` where it has no vectors that can be compared.
    fn resident(&self, shared: &Shared, generation: &Arc<Generation>) -> Result<Option<Arc<Resident>>, DeviceError> {
        let Some(matrix) = &generation.item_embeddings else { return Ok(None) };
        if matrix.n_rows() == 0 || matrix.dim == 0 {
            return Ok(None);
        }
        // Under the lock: the others wait for the same tables.
        let mut residents = shared.residents.lock();
        if let Some(resident) = residents.iter().find(|resident| Arc::ptr_eq(&resident.generation, generation)) {
            return Ok(Some(resident.clone()));
        }
        // Those that no worker has any more.
        residents.retain(|resident| Arc::strong_count(resident) > 1);
        let longest = longest(matrix);
        if !longest.is_finite() {
            tracing::warn!(device = %self.gpu.ordinal, "vectors that are not finite: neighbours are found on the CPU");
            return Ok(None);
        }
        let exactly = |reason: String| no_finder(self.gpu.ordinal, &reason);
        let width = padded(matrix.dim);
        let plan = Plan::of(&self.config, generation, [matrix.n_rows(), matrix.dim, width]);
        let mut plan = plan.unwrap_or_else(|error| {
            exactly(error.to_string());
            None
        });
        let mut budget = Budget::new(matrix, generation.metric, &self.config, self.n_workers, plan.as_ref());
        let (free, _) = shared.context.memory()?;
        let may = self.may(free);
        if plan.is_some() && budget.all() > may {
            exactly(format!("{budget}; {} may be used of the {} that are free", mib(may), mib(free)));
            plan = None;
            budget = Budget::new(matrix, generation.metric, &self.config, self.n_workers, None);
        }
        if budget.all() > may {
            let reason = format!("{budget}; {} may be used of the {} that are free", mib(may), mib(free));
            return Err(DeviceError::Load { version: generation.version.clone(), reason });
        }
        let stream = Stream::new(&shared.context)?;
        let mut resident = Resident::new(&stream, generation.clone(), matrix, longest, self.config.vectors)?;
        if let (Some(plan), Stored::F32(vectors)) = (plan, &resident.vectors) {
            let folder = Some(Path::new(&self.config.cuvs)).filter(|folder| !folder.as_os_str().is_empty());
            let cuvs = self.cuvs.get_or_init(|| Cuvs::load(folder)).as_ref().map_err(ToString::to_string);
            let made = cuvs.and_then(|cuvs| {
                Indexed::new(&stream, self.gpu.ordinal, (cuvs, vectors), plan, generation, &self.config)
            });
            match made {
                Ok(indexed) => resident.indexed = Some(Arc::new(indexed)),
                Err(reason) => exactly(reason),
            }
        }
        let resident = Arc::new(resident);
        self.counters.memory_bytes.store(budget.all(), Relaxed);
        tracing::info!(device = %format_args!("cuda:{}", self.gpu.ordinal), memory = %budget, free = %mib(free), "tables loaded");
        residents.push(resident.clone());
        Ok(Some(resident))
    }
}

pub(super) fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / (1 << 20) as f64)
}

/// What a generation takes of a GPU's memory, bytes.
#[derive(Clone, Copy, Debug)]
struct Budget {
    n_rows: usize,
    dim: usize,
    vectors: u64,
    terms: u64,
    index: u64,
    worker: u64,
    n_workers: u64,
}

impl Budget {
    fn new(matrix: &Matrix, metric: Metric, config: &DeviceConfig, n_workers: usize, plan: Option<&Plan>) -> Self {
        let (n_rows, dim) = (matrix.n_rows(), matrix.dim);
        let value = match config.vectors {
            Storage::F32 => 4,
            Storage::Bf16 => 2,
        };
        let terms = if metric == Metric::InnerProduct { 0 } else { n_rows * 4 };
        Budget {
            n_rows,
            dim,
            vectors: (n_rows * padded(dim) * value) as u64,
            terms: terms as u64,
            index: plan.map_or(0, Plan::bytes),
            worker: Sizes::new(n_rows, padded(dim), config, plan.is_some()).bytes(),
            n_workers: n_workers as u64,
        }
    }

    fn all(&self) -> u64 {
        self.vectors + self.terms + self.index + self.worker * self.n_workers
    }
}

impl std::fmt::Display for Budget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Budget { n_rows, dim, vectors, terms, index, worker, n_workers } = self;
        let (all, vectors, worker) = (mib(self.all()), mib(vectors + terms), mib(*worker));
        write!(f, "{all} of GPU memory: {vectors} for {n_rows} x {dim} vectors, ")?;
        if *index > 0 {
            write!(f, "at most {} for making their index, ", mib(*index))?;
        }
        write!(f, "{worker} for each of {n_workers} workers")
    }
}

/// Values of a vector on the device: rows of both types begin at 16-byte boundaries.
fn padded(dim: usize) -> usize {
    dim.next_multiple_of(8)
}

/// The square of a vector's length.
pub(super) fn square(vector: &[f32]) -> f64 {
    vector.iter().map(|&value| f64::from(value) * f64::from(value)).sum()
}

/// What of a vector, whose length's square this is, goes into its score.
pub(super) fn term(by: ScoreBy, square: f64) -> f64 {
    match by {
        ScoreBy::Times if square > 0.0 => 1.0 / square.sqrt(),
        ScoreBy::Times => 0.0,
        _ => square,
    }
}

/// The square of the length of a matrix's row.
fn squares(matrix: &Matrix) -> impl FnMut(usize) -> f64 {
    let mut row = Vec::with_capacity(matrix.dim);
    move |at| {
        row.clear();
        matrix.extend_row(at as u32, &mut row);
        square(&row)
    }
}

/// The length of the longest vector; those that are not a number score nothing anywhere.
fn longest(matrix: &Matrix) -> f64 {
    (0..matrix.n_rows()).map(squares(matrix)).filter(|square| !square.is_nan()).fold(0.0, f64::max).sqrt()
}

#[derive(Debug)]
pub(super) enum Stored {
    F32(Table<f32>),
    Bf16(Table<bf16>),
}

/// The item vectors of a generation in a GPU's memory.
#[derive(Debug)]
pub(super) struct Resident {
    pub(super) generation: Arc<Generation>,
    pub(super) vectors: Stored,
    /// Cosine: `1 / |x|`; L2: `|x|²`.
    pub(super) terms: Option<Table<f32>>,
    pub(super) by: ScoreBy,
    pub(super) n_rows: usize,
    pub(super) dim: usize,
    pub(super) width: usize,
    /// The length of the longest vector.
    pub(super) longest: f64,
    /// Where neighbours are not to be found exactly.
    pub(super) indexed: Option<Arc<Indexed>>,
    /// What recommendations need beside, once the first worker has looked; `None` in it: they can't be computed here.
    tables: Mutex<Option<Option<Arc<Tables>>>>,
}

impl Resident {
    fn new(
        stream: &Stream,
        generation: Arc<Generation>,
        matrix: &Matrix,
        longest: f64,
        storage: Storage,
    ) -> Result<Self, DeviceError> {
        let (n_rows, dim, width) = (matrix.n_rows(), matrix.dim, padded(matrix.dim));
        let value = |at: usize| {
            let (row, column) = (at / width, at % width);
            match &matrix.data {
                _ if column >= dim => 0.0,
                MatrixData::F32(values) => values[row * dim + column],
                MatrixData::F16(values) => values[row * dim + column].to_f32(),
            }
        };
        let vectors = match storage {
            Storage::F32 => Stored::F32(Table::new(stream, n_rows * width, |start, out| {
                out.iter_mut().enumerate().for_each(|(at, out)| *out = value(start + at));
            })?),
            Storage::Bf16 => Stored::Bf16(Table::new(stream, n_rows * width, |start, out| {
                out.iter_mut().enumerate().for_each(|(at, out)| *out = bf16::from_f32(value(start + at)));
            })?),
        };
        let by = match generation.metric {
            Metric::InnerProduct => ScoreBy::InnerProduct,
            Metric::Cosine => ScoreBy::Times,
            Metric::L2 => ScoreBy::TwiceLess,
        };
        let mut squares = squares(matrix);
        let terms = match by {
            ScoreBy::InnerProduct => None,
            _ => Some(Table::new(stream, n_rows, |start, out| {
                out.iter_mut().enumerate().for_each(|(at, out)| *out = term(by, squares(start + at)) as f32);
            })?),
        };
        let tables = Mutex::default();
        Ok(Resident { generation, vectors, terms, by, n_rows, dim, width, longest, indexed: None, tables })
    }

    /// How a device's scores for a query of length `norm` and vectors of at most length `longest` relate to the metric's: shift, scale,
    /// error, as in [`Found`].
    ///
    /// Of `n` products that are summed up in any order the error is at most `n u Σ|ab|`, u = 2^-24 (Higham, Accuracy and Stability of
    /// Numerical Algorithms, 3.1), here and there; a value in bf16 is off by 2^-9 of itself. All of it is taken twice, which covers the
    /// few roundings beside.
    pub(super) fn tolerance(&self, norm: f64, longest: f64) -> (f32, f32, f32) {
        let unit = 2f64.powi(-24);
        let sums = (self.dim + 8) as f64 * unit;
        let stored = match self.vectors {
            Stored::F32(_) => 0.0,
            Stored::Bf16(_) => 2f64.powi(-9),
        };
        let product = norm * longest;
        let (shift, scale, error) = match self.by {
            ScoreBy::InnerProduct => (0.0, 1.0, (2.0 * sums + stored) * product),
            ScoreBy::Times => (0.0, norm, 5.0 * sums + stored),
            ScoreBy::TwiceLess => {
                let squares = longest * longest + norm * norm;
                (-norm * norm, 1.0, 2.0 * (2.0 * sums + stored) * product + 4.0 * sums * squares)
            }
        };
        (shift as f32, scale as f32, (2.0 * error) as f32 + f32::MIN_POSITIVE)
    }
}

/// How much a searcher takes at a time, and of memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    n_rows: usize,
    width: usize,
    /// Queries whose scores of all rows have room.
    chunk: usize,
    /// Queries of whom lists are put together: as many, or a batch of recommendations.
    scored: usize,
    /// Scores that there is room for.
    scores: usize,
    /// Queries at a time.
    queries: usize,
    by_index: bool,
}

impl Sizes {
    fn new(n_rows: usize, width: usize, config: &DeviceConfig, by_index: bool) -> Self {
        let chunk = (config.workspace_bytes as usize / (4 * n_rows.max(1))).clamp(1, MOST_QUERIES);
        // Recommendations are not computed as a whole where neighbours are not found exactly.
        let scored = if by_index { chunk } else { chunk.max(PipelineSizes::largest(config, n_rows)) };
        let whole = if by_index { 0 } else { PipelineSizes::scores(config, n_rows) };
        let scores = whole.max(chunk * n_rows);
        Sizes { n_rows, width, chunk, scored, scores, queries: if by_index { MOST_QUERIES } else { chunk }, by_index }
    }

    /// Parts that rows are selected in.
    pub(super) fn parts(&self, n_queries: usize) -> usize {
        TopkSelect::n_parts(n_queries, self.n_rows)
    }

    fn input(&self) -> usize {
        self.queries * self.width + 2 * MOST_PAIRS
    }

    fn lists(&self) -> usize {
        (1..=self.scored).map(|n| n * self.parts(n)).max().unwrap_or(0) * MAX_K as usize * 2
    }

    fn output(&self) -> usize {
        self.queries * MAX_K as usize * 2
    }

    fn words(&self) -> usize {
        self.n_rows.div_ceil(32)
    }

    fn bytes(&self) -> u64 {
        let by_index = if self.by_index { Plan::worker_bytes(self.queries) } else { 0 };
        4 * (self.input() + self.scores + self.lists() + self.output() + self.words()) as u64 + by_index
    }
}

/// Rows that must not come out, as a worker's GPU memory has them.
#[derive(Debug)]
struct Told {
    items: Arc<LiveItems>,
    when: Instant,
    /// Rows that may come out.
    n_left: usize,
}

/// What one worker searches by.
#[derive(Debug)]
pub(super) struct Searcher {
    pub(super) resident: Arc<Resident>,
    pub(super) sizes: Sizes,
    /// f32 `[n, width]`, then pairs of query and row.
    input: Buffer<u32>,
    /// f32 `[n, n_rows]`, or as a pipeline has it.
    pub(super) scores: Buffer<f32>,
    /// Rows and scores, `[n, n_parts, fetched]` each.
    pub(super) lists: Buffer<u32>,
    /// Rows and scores, `[n, fetched]` each.
    output: Buffer<u32>,
    /// Bits of rows that may come out, as was told last.
    words: Buffer<u32>,
    told: Option<Told>,
    finder: Option<Finder>,
    /// A search lacked memory once, and that was said.
    lacked: bool,
    up: Ring<u32>,
    down: Vec<Pinned<u32>>,
}

/// A query, and what its user has seen.
#[derive(Clone, Copy, Debug)]
struct Question<'a> {
    query: &'a [f32],
    norm: f64,
    seen: &'a [u32],
}

/// Lists of the device, all of them `fetched` long.
#[derive(Debug, Default)]
struct Answers {
    fetched: usize,
    rows: Vec<u32>,
    scores: Vec<f32>,
    /// By an index, and whether its distances are the vectors'; `None`: exactly.
    by_index: Option<bool>,
}

impl Answers {
    /// The `at`-th list, up to the first that is no number.
    fn list(&self, at: usize) -> (&[u32], &[f32], bool) {
        let range = at * self.fetched..(at + 1) * self.fetched;
        let (rows, scores) = (&self.rows[range.clone()], &self.scores[range]);
        let n = scores.partition_point(|score| !score.is_nan());
        (&rows[..n], &scores[..n], n < self.fetched)
    }

    /// The `at`-th list with what is known of its scores, for a query of length `norm`.
    fn found(&self, at: usize, resident: &Resident, norm: f64) -> Found<'_> {
        let (rows, scores, all) = self.list(at);
        let (shift, scale, error) = resident.tolerance(norm, resident.longest);
        match self.by_index {
            None => Found { rows, scores, shift, scale, error, all, enough: false },
            Some(of_vectors) => Found {
                rows,
                scores,
                // As the metric has them.
                shift: 0.0,
                scale: 1.0,
                error: if of_vectors { error } else { f32::INFINITY },
                all: rows.len() == resident.n_rows,
                enough: true,
            },
        }
    }

    /// Takes over a chunk's output: rows `[n, fetched]`, then scores.
    fn extend(&mut self, output: &[u32], n: usize) {
        let (rows, scores) = output[..2 * n * self.fetched].split_at(n * self.fetched);
        self.rows.extend_from_slice(rows);
        self.scores.extend(scores.iter().map(|&bits| f32::from_bits(bits)));
    }
}

impl Searcher {
    fn new(stream: &Stream, ordinal: u32, resident: Arc<Resident>, config: &DeviceConfig) -> Result<Self, DeviceError> {
        let indexed = resident.indexed.clone();
        let sizes = Sizes::new(resident.n_rows, resident.width, config, indexed.is_some());
        let finder = indexed.and_then(|indexed| {
            let made = Finder::new(stream, ordinal, indexed, config, sizes.queries);
            made.map_err(|error| no_finder(ordinal, &error)).ok()
        });
        Ok(Searcher {
            resident,
            finder,
            lacked: false,
            sizes,
            input: stream.buffer(sizes.input())?,
            scores: stream.buffer(sizes.scores)?,
            lists: stream.buffer(sizes.lists())?,
            output: stream.buffer(sizes.output())?,
            words: stream.buffer(sizes.words())?,
            told: None,
            up: Ring::new(stream, 2, sizes.input().max(sizes.words()))?,
            down: (0..2).map(|_| stream.pinned(sizes.output())).collect::<Result<_, _>>()?,
        })
    }

    /// Tells the GPU which rows must not come out, if that is worth it and not too soon; says whether it knows those of `items`.
    fn tell(&mut self, stream: &Stream, items: Option<&Arc<LiveItems>>) -> Result<bool, DeviceError> {
        let Some(items) = items else { return Ok(false) };
        let worth = (items.n_gone() + items.n_entries()) * TOLD_FROM >= self.sizes.n_rows;
        if worth || self.knows(items) { self.know(stream, items) } else { Ok(false) }
    }

    fn knows(&self, items: &Arc<LiveItems>) -> bool {
        self.told.as_ref().is_some_and(|told| Arc::ptr_eq(&told.items, items))
    }

    /// Tells the GPU which rows of `items` must not come out, if it knows others and was not told of these just now; says whether it
    /// knows.
    fn know(&mut self, stream: &Stream, items: &Arc<LiveItems>) -> Result<bool, DeviceError> {
        if self.knows(items) {
            return Ok(true);
        }
        if self.told.as_ref().is_some_and(|told| told.when.elapsed() < TOLD_EVERY) {
            return Ok(false);
        }
        self.told = None;
        let (n, mut host, mut n_left) = (self.sizes.words(), self.up.take()?, 0);
        host[..n].fill(0);
        for row in (0..self.sizes.n_rows as u32).filter(|&row| !items.hides_vector(row)) {
            host[row as usize / 32] |= 1 << (row % 32);
            n_left += 1;
        }
        self.up.give(stream.upload(host, n, self.words.part_mut(0..n))?);
        self.told = Some(Told { items: items.clone(), when: Instant::now(), n_left });
        Ok(true)
    }

    /// Finds the `answers.fetched` best rows for each question: by the index, with what `effort` says or the bundle; where there is none, of
    /// all rows, without those that its user has seen if they are many. Without those that `items` hides if the GPU is told.
    fn search(
        &mut self,
        stream: &Stream,
        ordinal: u32,
        questions: &[Question<'_>],
        (wanted, effort): (usize, &SearchParams),
        items: Option<&Arc<LiveItems>>,
        answers: &mut Answers,
    ) -> Result<(), DeviceError> {
        let told = self.tell(stream, items)?;
        let admitted =
            self.told.as_ref().filter(|_| told).map_or(1.0, |told| told.n_left as f64 / self.sizes.n_rows as f64);
        let asked = self.finder.as_ref().and_then(|finder| {
            // Who has seen more is the CPU's.
            let seen = questions.iter().map(|question| question.seen.len()).filter(|&n| n <= wanted).max();
            finder.indexed().asked([wanted, seen.unwrap_or(0), LEAST_FETCHED], admitted, effort)
        });
        if let Some(asked) = asked {
            match self.pass(stream, questions, wanted, told, Some(&asked), answers) {
                Err(Failure::Index(error)) => {
                    // What lacked memory may have it the next time.
                    let lacks = error.is_out_of_memory();
                    if !lacks || !std::mem::replace(&mut self.lacked, true) {
                        no_finder(ordinal, &Failure::Index(error));
                    }
                    if !lacks {
                        self.finder = None;
                    }
                    self.down = (0..2).map(|_| stream.pinned(self.sizes.output())).collect::<Result<_, _>>()?;
                }
                Err(Failure::Device(error)) => return Err(error),
                Ok(()) => return Ok(()),
            }
        }
        self.pass(stream, questions, wanted, told, None, answers).map_err(|failure| match failure {
            Failure::Device(error) => error,
            Failure::Index(error) => DeviceError::Failed(error.to_string()),
        })
    }

    /// As [`Self::search`]: by the index as `asked`, or else exactly.
    fn pass(
        &mut self,
        stream: &Stream,
        questions: &[Question<'_>],
        wanted: usize,
        told: bool,
        asked: Option<&Asked>,
        answers: &mut Answers,
    ) -> Result<(), Failure> {
        let fetched = asked.map_or((2 * wanted).clamp(LEAST_FETCHED, MAX_K as usize), |asked| asked.fetched);
        answers.fetched = fetched;
        answers.by_index = asked.and(self.finder.as_ref()).map(|finder| finder.indexed().is_of_vectors());
        answers.rows.clear();
        answers.scores.clear();
        let mut flying: VecDeque<(Flight<u32>, usize)> = VecDeque::new();
        for questions in questions.chunks(if asked.is_some() { self.sizes.queries } else { self.sizes.chunk }) {
            // While one chunk is computed, the next is prepared and the last taken over.
            let down = match self.down.pop() {
                Some(slot) => slot,
                None => {
                    let (flight, n) = flying.pop_front().ok_or_else(|| DeviceError::Failed("no staging".into()))?;
                    let slot = flight.wait()?;
                    answers.extend(&slot, n);
                    slot
                }
            };
            let flight = self.chunk(stream, questions, (fetched, wanted), told, asked, down)?;
            flying.push_back((flight, questions.len()));
        }
        for (flight, n) in flying {
            let slot = flight.wait()?;
            answers.extend(&slot, n);
            self.down.push(slot);
        }
        Ok(())
    }

    /// One copy in, one copy out.
    fn chunk(
        &mut self,
        stream: &Stream,
        questions: &[Question<'_>],
        (fetched, wanted): (usize, usize),
        told: bool,
        asked: Option<&Asked>,
        down: Pinned<u32>,
    ) -> Result<Flight<u32>, Failure> {
        let Resident { vectors, terms, by, n_rows, dim, width, .. } = &*self.resident;
        let (n, n_rows, width) = (questions.len(), *n_rows, *width);
        let mut host = self.up.take()?;
        let (queries, pairs) = host.split_at_mut(n * width);
        let mut n_pairs = 0;
        for (at, question) in questions.iter().enumerate() {
            let query = &mut queries[at * width..(at + 1) * width];
            query[*dim..].fill(0);
            query.iter_mut().zip(question.query).for_each(|(to, value)| *to = value.to_bits());
            // Few are left out by the CPU, which has as many more as this to choose from.
            let many = question.seen.len() > (fetched - wanted) / 2;
            if many && asked.is_none() && n_pairs + question.seen.len() <= MOST_PAIRS {
                for (pair, &row) in pairs[2 * n_pairs..].as_chunks_mut::<2>().0.iter_mut().zip(question.seen) {
                    *pair = [at as u32, row];
                }
                n_pairs += question.seen.len();
            }
        }
        let n_input = n * width + 2 * n_pairs;
        self.up.give(stream.upload(host, n_input, self.input.part_mut(0..n_input))?);
        let queries = self.input.part(0..n * width).as_type();
        let available = told.then(|| self.words.part(0..self.sizes.words()));
        let (rows, scores) = self.output.part_mut(0..2 * n * fetched).split_at(n * fetched);
        let best = ListsMut { rows, scores: scores.as_type() };
        if let (Some(asked), Some(finder)) = (asked, &mut self.finder) {
            finder.find(stream, (queries, n), asked, available, best)?;
            return Ok(stream.download(self.output.part(0..2 * n * fetched), down)?);
        }
        let scoring = Scoring {
            queries,
            n_queries: n,
            vectors: match vectors {
                Stored::F32(table) => Vectors::F32(table.part(0..table.len())),
                Stored::Bf16(table) => Vectors::Bf16(table.part(0..table.len())),
            },
            n_rows,
            width,
            by: *by,
            terms: terms.as_ref().map(|terms| terms.part(0..n_rows)),
            available,
        };
        stream.scores(scoring, self.scores.part_mut(0..n * n_rows))?;
        if n_pairs > 0 {
            let pairs = self.input.part(n * width..n_input);
            stream.mask_scores(pairs, n_pairs, self.scores.part_mut(0..n * n_rows), [n, n_rows])?;
        }
        let shape = [n, n_rows, self.sizes.parts(n), fetched];
        stream.best(self.scores.part(0..n * n_rows), None, shape, &mut self.lists, best)?;
        Ok(stream.download(self.output.part(0..2 * n * fetched), down)?)
    }
}

/// The line for the operator.
fn no_finder(ordinal: u32, reason: &dyn std::fmt::Display) {
    tracing::warn!(device = %format_args!("cuda:{ordinal}"), %reason, "neighbours are found exactly, not by cuVS");
}

/// Has the stream compute something whose result is known.
fn try_out(stream: &Stream) -> Result<(), DeviceError> {
    const N_ROWS: usize = 40;
    let value = |at: usize| ((at * 37 + 11) % 64) as f32;
    let table = Table::new(stream, N_ROWS * 4, |start, out: &mut [f32]| {
        out.iter_mut().enumerate().for_each(|(at, out)| *out = value(start + at));
    })?;
    let mut host = stream.pinned::<f32>(4)?;
    host.copy_from_slice(&[1.0, -2.0, 0.5, 3.0]);
    let query = host.to_vec();
    let (mut queries, mut scores) = (stream.buffer(4)?, stream.buffer::<f32>(N_ROWS)?);
    let (mut rows, mut best) = (stream.buffer::<u32>(3)?, stream.buffer::<f32>(3)?);
    stream.upload(host, 4, queries.part_mut(0..4))?.wait()?;
    let scoring = Scoring {
        queries: queries.part(0..4),
        n_queries: 1,
        vectors: Vectors::F32(table.part(0..N_ROWS * 4)),
        n_rows: N_ROWS,
        width: 4,
        by: ScoreBy::InnerProduct,
        terms: None,
        available: None,
    };
    stream.scores(scoring, scores.part_mut(0..N_ROWS))?;
    let out = ListsMut { rows: rows.part_mut(0..3), scores: best.part_mut(0..3) };
    stream.topk(scores.part(0..N_ROWS), None, [1, N_ROWS, 1, 3], out)?;
    let got = stream.download(rows.part(0..3), stream.pinned(3)?)?.wait()?;
    let values: Vec<f32> = (0..N_ROWS * 4).map(value).collect();
    let want = twins::scores(&query, &values, 4, (ScoreBy::InnerProduct, &[]), None);
    let want = twins::topk_select(&want, None, None, [N_ROWS, N_ROWS, 1, 3]);
    if got[..] == want.rows[..] {
        Ok(())
    } else {
        Err(DeviceError::Failed(format!("the GPU computes something wrong: {:?} instead of {:?}", &got[..], want.rows)))
    }
}

/// The engine of one worker: a stream of a GPU, and the CPU engine.
pub struct CudaDevice {
    name: String,
    cuda: Arc<Cuda>,
    config: Arc<PipelineConfig>,
    rest: CpuDevice,
    pub(super) make: Arc<Maker>,
    /// Of the searcher's generation, where it can be.
    pub(super) pipeline: Option<Pipeline>,
    /// By job of a batch.
    places: Vec<Place>,
    /// Of the generation that was loaded last; jobs of another one are the CPU's.
    searcher: Option<Searcher>,
    answers: Answers,
    stream: Stream,
    shared: Arc<Shared>,
}

/// What was found for the jobs of a batch.
struct FoundAhead<'a> {
    lists: Vec<Found<'a>>,
    /// Ends of the jobs' lists.
    ends: Vec<usize>,
    settled: &'a Settled,
    /// Who computes each job, and who computes here.
    places: &'a [Place],
    here: Place,
}

impl Ahead for FoundAhead<'_> {
    fn of(&self, job: usize) -> &[Found<'_>] {
        let start = job.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.lists[start..self.ends[job]]
    }

    fn settled(&self) -> &Settled {
        self.settled
    }

    fn skips(&self, job: usize) -> bool {
        self.places[job] != self.here
    }
}

/// The vectors that a job searches by and how many neighbours it wants, where the GPU can look for them.
fn question(job: &Job, dim: usize, ann_k: usize) -> Option<(&[f32], usize)> {
    let (vectors, k) = match &job.task {
        Task::Recommend { .. } => (&job.user.vector, ann_k),
        // Conditions leave out most rows, as a rule; the CPU has them as bitmaps.
        Task::Search { .. } if !job.query.is_empty() || !job.search.tests.is_empty() => return None,
        Task::Search { k, .. } if job.search.vectors.is_empty() => (&job.user.vector, *k as usize),
        Task::Search { k, .. } => (&job.search.vectors, *k as usize),
        Task::Rank { .. } | Task::Infer { .. } => return None,
    };
    let fits = !vectors.is_empty() && vectors.len().is_multiple_of(dim) && (1..=MOST_WANTED).contains(&k);
    fits.then_some((vectors, k))
}

impl CudaDevice {
    /// Looks for the neighbours of all jobs of that place that want some; fills the answers and says how many lists each job has, and the
    /// lists' norms.
    fn ask(&mut self, batch: &mut [Box<Job>], here: Place) -> Result<(Vec<usize>, Vec<f64>), DeviceError> {
        let (mut ends, mut norms) = (Vec::new(), Vec::new());
        let Some(searcher) = &mut self.searcher else { return Ok((vec![0; batch.len()], norms)) };
        let (places, ann_k) = (&self.places, self.config.ann_k as usize);
        let clock = Instant::now();
        let Resident { generation, dim, .. } = &*searcher.resident;
        let (mut questions, mut wanted, mut n_lists) = (Vec::new(), 0, 0);
        let mut effort = SearchParams::default();
        // What the GPU is told of items holds for jobs that were planned with the same ones.
        let mut items: Option<Option<&Arc<LiveItems>>> = None;
        for (job, &place) in batch.iter().zip(places) {
            let is_here = place == here && Arc::ptr_eq(generation, &job.generation);
            if let Some((vectors, k)) = question(job, *dim, ann_k).filter(|_| is_here) {
                let before = questions.len();
                for query in vectors.chunks_exact(*dim) {
                    questions.push(Question { query, norm: square(query).sqrt(), seen: &job.user.seen });
                }
                // Of what has no length or no end nothing can be said.
                if questions[before..].iter().all(|question| question.norm > 0.0 && question.norm < 1e18) {
                    wanted = wanted.max(k);
                    // One search for all: the most that one of them asks for.
                    effort = effort.most(&job.search.params);
                    n_lists = questions.len();
                    items = Some(match (items, &job.items) {
                        (None, own) => own.as_ref(),
                        (Some(Some(one)), Some(own)) if Arc::ptr_eq(one, own) => Some(one),
                        _ => None,
                    });
                } else {
                    questions.truncate(before);
                }
            }
            ends.push(n_lists);
        }
        if questions.is_empty() {
            return Ok((ends, norms));
        }
        norms.extend(questions.iter().map(|question| question.norm));
        let ordinal = self.cuda.gpu.ordinal;
        searcher.search(&self.stream, ordinal, &questions, (wanted, &effort), items.flatten(), &mut self.answers)?;
        if self.answers.by_index.is_some() {
            self.cuda.counters.by_index.fetch_add(questions.len() as u64, Relaxed);
        }
        let spent = clock.elapsed();
        let mut before = 0;
        for (job, &end) in batch.iter_mut().zip(&ends) {
            // Each has waited for all of it.
            if end > before {
                job.timings.add(Stage::Ann, spent);
            }
            before = end;
        }
        Ok((ends, norms))
    }
}

impl Device for CudaDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn load(&mut self, generation: &Arc<Generation>) -> Result<(), DeviceError> {
        self.rest.load(generation)?;
        if self.searcher.as_ref().is_none_or(|searcher| !Arc::ptr_eq(&searcher.resident.generation, generation)) {
            // The old one's memory first: both may not fit.
            (self.pipeline, self.searcher) = (None, None);
            let resident = self.cuda.resident(&self.shared, generation)?;
            let make = |resident| Searcher::new(&self.stream, self.cuda.gpu.ordinal, resident, &self.cuda.config);
            self.searcher = resident.map(make).transpose()?;
            self.load_pipeline()?;
        }
        Ok(())
    }

    fn execute(&mut self, batch: &mut [Box<Job>]) -> Result<(), DeviceError> {
        let Self { rest, searcher, pipeline, cuda, stream, places, .. } = self;
        rest.prepare(batch)?;
        places.clear();
        places.resize(batch.len(), Place::Cpu);
        if let (Some(searcher), Some(pipeline)) = (searcher, &mut *pipeline) {
            pipeline.begin(stream, searcher, rest, batch, places, &cuda.counters.slates)?;
        }
        let slates = &cuda.counters.slates;
        let jobs = batch.iter().zip(&*places);
        let refused = jobs.filter(|(job, place)| **place == Place::Cpu && matches!(job.task, Task::Recommend { .. }));
        slates.refused.fetch_add(refused.count() as u64, Relaxed);
        // While the device computes its jobs, the CPU computes the others.
        self.compute(batch, Place::Cpu)?;
        let Self { rest, pipeline: Some(pipeline), cuda, places, .. } = self else { return Ok(()) };
        pipeline.finish(rest, batch, places, &cuda.counters.slates)?;
        self.compute(batch, Place::Again)
    }
}

/// How a batch's kernels are given to the GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Launches {
    /// As the graph that was recorded of them, where there is one: as for [`Device::execute`].
    Recorded,
    /// Each by itself: a graph has no seams.
    OneByOne,
}

impl CudaDevice {
    /// [`Device::execute`], and what of it the stream was given, in order, with seconds: see [`Stream::times`].
    ///
    /// # Errors
    /// As there.
    pub fn execute_timed(
        &mut self,
        batch: &mut [Box<Job>],
        launches: Launches,
    ) -> Result<Vec<(&'static str, f64)>, DeviceError> {
        let recorded = |device: &mut Self, is| device.pipeline.iter_mut().for_each(|pipeline| pipeline.recorded = is);
        recorded(self, launches == Launches::Recorded);
        let done = self.stream.take_times().and_then(|()| self.execute(batch));
        recorded(self, true);
        let times = self.stream.times();
        done.and(times)
    }

    /// Makes what keeps recommendations on the device, where that can be; the log says why not.
    fn load_pipeline(&mut self) -> Result<(), DeviceError> {
        let Some(searcher) = &mut self.searcher else { return Ok(()) };
        let (resident, counters) = (searcher.resident.clone(), &self.cuda.counters);
        // Under the lock: the others wait for the same tables.
        let mut tables = resident.tables.lock();
        let made = match &*tables {
            Some(made) => made.clone(),
            None => {
                let left = self.cuda.left(&self.shared)?.saturating_sub(match self.cuda.config.memory_bytes {
                    0 => 0,
                    _ => counters.memory_bytes.load(Relaxed),
                });
                let (config, device, n_workers) = (&*self.config, &self.cuda.config, self.cuda.n_workers);
                let setting = Setting { config, device, n_workers, left, make: &*self.make };
                let made = match Tables::new(&self.stream, &resident, &mut self.rest, &setting) {
                    Ok(made) => made,
                    Err(DeviceError::OutOfMemory) => Err("there is no memory for it".to_owned()),
                    Err(error) => return Err(error),
                };
                match made {
                    Ok((made, bytes)) => {
                        counters.memory_bytes.fetch_add(bytes, Relaxed);
                        let (memory, tables) = (mib(bytes), device.tables.name());
                        tracing::info!(device = %self.name, memory, tables, "recommendations are computed as a whole on the GPU");
                        Some(Arc::new(made))
                    }
                    Err(reason) if super::tensorrt::asked(&self.config, &resident.generation).next().is_some() => {
                        let reason = format!("a ranker is to be on engine `tensorrt`: {reason}");
                        return Err(DeviceError::Load { version: resident.generation.version.clone(), reason });
                    }
                    Err(reason) => {
                        tracing::info!(device = %self.name, reason, "recommendations are ranked on the CPU");
                        None
                    }
                }
            }
        };
        *tables = Some(made.clone());
        drop(tables);
        let Some(made) = made else { return Ok(()) };
        self.pipeline = match Pipeline::new(&self.stream, searcher, &mut self.rest, made) {
            Ok(pipeline) => Some(pipeline),
            Err(DeviceError::OutOfMemory) => {
                tracing::warn!(device = %self.name, "no memory for a worker's recommendations: they are ranked on the CPU");
                None
            }
            Err(error) => return Err(error),
        };
        Ok(())
    }

    /// Computes the jobs of that place on the CPU, with neighbours from the device.
    fn compute(&mut self, batch: &mut [Box<Job>], here: Place) -> Result<(), DeviceError> {
        if !self.places.contains(&here) {
            return Ok(());
        }
        let (ends, norms) = self.ask(batch, here)?;
        let Self { rest, searcher, answers, cuda, places, .. } = self;
        let found = |(at, &norm)| Some(answers.found(at, &searcher.as_ref()?.resident, norm));
        let lists = norms.iter().enumerate().filter_map(found);
        let ahead = FoundAhead { lists: lists.collect(), ends, settled: &cuda.counters.settled, places, here };
        rest.execute_after(batch, Some(&ahead))
    }
}

/// For tests of what the engine is made of.
#[cfg(test)]
pub(super) mod testing {
    use super::super::emulated::IMAGE;
    use super::super::probe::probe;
    use super::*;

    /// The emulated GPU.
    pub fn cuda(config: &DeviceConfig, n_workers: usize) -> Arc<Cuda> {
        Cuda::with_image(probe(Some(0)).unwrap(), config, n_workers, Image::Embedded(IMAGE))
    }

    /// A generation's vectors on it.
    pub fn with_resident<R>(
        config: &DeviceConfig,
        generation: &Arc<Generation>,
        body: impl FnOnce(&Stream, &Resident) -> R,
    ) -> R {
        let cuda = cuda(config, 1);
        let shared = cuda.shared().unwrap();
        let resident = cuda.resident(&shared, generation).unwrap().unwrap();
        body(&Stream::new(&shared.context).unwrap(), &resident)
    }
}

#[cfg(test)]
#[expect(clippy::vec_box, reason = "a device executes boxes")]
pub(super) mod tests {
    use proptest::prelude::*;
    use rten::ThreadPool;

    use super::super::emulated::Emulated;
    use super::*;
    use crate::catalog::generation::testing;
    use crate::context::Deadline;
    use crate::device::Ranked;

    pub(crate) use super::testing::cuda;

    pub(crate) fn cpu(config: &Arc<PipelineConfig>) -> CpuDevice {
        CpuDevice::new(config.clone(), Arc::new(ThreadPool::with_num_threads(1)))
    }

    /// Items whose vectors have many ties among their products.
    fn generation(n: usize, dim: usize, metric: Metric, seed: u64) -> Arc<Generation> {
        let mut noise = crate::testing::noise(seed);
        let vectors = (0..n * dim).map(|_| (noise() * 8.0).round() / 4.0).collect();
        let mut generation = testing::with_embeddings(vectors, dim);
        generation.metric = metric;
        Arc::new(generation)
    }

    /// Jobs of every kind that searches, and some that do not.
    pub(crate) fn jobs(generation: &Arc<Generation>, n: usize, dim: usize, k: u32, seed: u64) -> Vec<Box<Job>> {
        let mut noise = crate::testing::noise(seed);
        let n_items = generation.items.len() as u32;
        (0..n)
            .map(|at| {
                let mut job = Box::new(Job::new(generation.clone()));
                job.deadline = Deadline::after(Duration::from_secs(600));
                job.user.vector = (0..dim).map(|_| (noise() * 8.0).round() / 4.0).collect();
                let every = [1000, 7, 2, 3][at % 4];
                job.user.seen = (0..n_items).filter(|row| row % every == 1).collect();
                job.task = match at % 6 {
                    0 | 1 => Task::Search { k, n_queries: None },
                    2 => {
                        job.search.vectors = (0..3 * dim).map(|_| (noise() * 4.0).round()).collect();
                        Task::Search { k, n_queries: Some(3) }
                    }
                    3 => Task::Rank { rows: vec![0, 1], ranker: 0 },
                    _ => Task::Recommend { top_m: 40, explain: true },
                };
                match at % 11 {
                    7 => job.user.vector.clear(),
                    8 => job.user.vector.fill(0.0),
                    9 => job.user.vector[0] = f32::NAN,
                    _ => {}
                }
                job
            })
            .collect()
    }

    fn answered(job: &Job) -> impl PartialEq + std::fmt::Debug {
        let Ranked { items, result_lengths, candidates, .. } = &job.ranked;
        let scores = candidates.source_scores.each_ref().map(|scores| &scores[..]);
        (items, result_lengths, &candidates.rows, scores, job.failure.is_some())
    }

    pub(crate) fn compare(
        device: &mut CudaDevice,
        other: &mut CpuDevice,
        mut batch: Vec<Box<Job>>,
        mut own: Vec<Box<Job>>,
    ) {
        device.execute(&mut batch).unwrap();
        other.execute(&mut own).unwrap();
        for (at, (got, want)) in batch.iter().zip(&own).enumerate() {
            assert_eq!(answered(got), answered(want), "job {at}: {:?}", want.task);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn answers_are_the_cpu_s(
            n in 1usize..900, dim in 1usize..20, metric in prop::sample::select(vec![Metric::InnerProduct, Metric::Cosine, Metric::L2]),
            vectors in prop::sample::select(vec![Storage::F32, Storage::Bf16]), n_jobs in 1usize..20, k in 1u32..60, chunk in 1usize..12,
            gone in 0usize..3, seed in any::<u64>(),
        ) {
            let Some(_emulated) = Emulated::open(&format!("seed={seed},delay_us=100")) else { return Ok(()) };
            let generation = generation(n, dim, metric, seed);
            let config = Arc::new(PipelineConfig { ann_k: k, ..PipelineConfig::default() });
            let device_config = DeviceConfig { vectors, workspace_bytes: (chunk * n * 4) as u64, ..DeviceConfig::default() };
            let cuda = cuda(&device_config, 1);
            let mut device = cuda.device(cpu(&config), &config).unwrap();
            let mut other = cpu(&config);
            device.load(&generation).unwrap();
            other.load(&generation).unwrap();
            // None, few, or so many gone that the GPU is told.
            let items = (gone > 0).then(|| {
                let mut items = LiveItems::new(n);
                let every = [0, 50, 3][gone];
                (0..n as u32).filter(|row| row % every == 0).for_each(|row| assert!(items.set_gone(row, true)));
                Arc::new(items)
            });
            for round in 0..2 {
                let make = || {
                    let mut all = jobs(&generation, n_jobs, dim, k, seed + round);
                    all.iter_mut().for_each(|job| job.items.clone_from(&items));
                    all
                };
                compare(&mut device, &mut other, make(), make());
            }
        }
    }

    #[test]
    fn large_catalogues_are_selected_in_parts_with_two_copies_a_batch() {
        let Some(emulated) = Emulated::open("seed=5,delay_us=0") else { return };
        let generation = generation(9000, 8, Metric::InnerProduct, 5);
        let config = Arc::new(PipelineConfig { ann_k: 60, ..PipelineConfig::default() });
        let cuda = cuda(&DeviceConfig::default(), 1);
        let mut device = cuda.device(cpu(&config), &config).unwrap();
        let mut other = cpu(&config);
        device.load(&generation).unwrap();
        other.load(&generation).unwrap();
        emulated.script("seed=6,delay_us=0");
        let make = || {
            let mut all = jobs(&generation, 6, 8, 60, 1);
            all.retain(|job| !job.user.seen.is_empty());
            all
        };
        compare(&mut device, &mut other, make(), make());
        assert_eq!((emulated.count("uploads"), emulated.count("downloads")), (1, 1));
        // Scores, what was seen, parts, and all together.
        assert_eq!(emulated.count("launches"), 4);
        let settled = &cuda.counters.settled;
        assert!(settled.yes.load(Relaxed) > 0 && settled.no.load(Relaxed) == 0, "{settled:?}");
    }

    #[test]
    fn what_does_not_fit_is_refused_with_numbers() {
        let Some(_emulated) = Emulated::open("delay_us=0,memory=8000000000") else { return };
        let generation = generation(1000, 16, Metric::Cosine, 1);
        let config = DeviceConfig { memory_bytes: 4 << 20, workspace_bytes: 1 << 20, ..DeviceConfig::default() };
        let error = cuda(&config, 4).load(&generation).unwrap_err();
        let DeviceError::Load { reason, .. } = error else { panic!("{error}") };
        let text = "5.8 MiB of GPU memory: 0.1 MiB for 1000 x 16 vectors, 1.4 MiB for each of 4 workers; \
                    4.0 MiB may be used of the 7629.4 MiB that are free";
        assert_eq!(reason, text);
        assert!(cuda(&config, 1).load(&generation).is_ok());
    }

    #[test]
    fn a_gpu_that_computes_something_wrong_is_none() {
        let Some(emulated) = Emulated::open("delay_us=0") else { return };
        let config = Arc::new(PipelineConfig::default());
        let cuda = cuda(&DeviceConfig::default(), 1);
        assert!(cuda.device(cpu(&config), &config).is_ok());
        emulated.script("delay_us=0,wrong@1");
        let error = cuda.device(cpu(&config), &config).err().unwrap().to_string();
        assert!(error.starts_with("device failed: the GPU computes something wrong"), "{error}");
    }

    #[test]
    fn all_give_a_lost_context_up_before_there_is_a_new_one() {
        let Some(emulated) = Emulated::open("delay_us=0") else { return };
        let generation = generation(300, 8, Metric::InnerProduct, 2);
        let config = Arc::new(PipelineConfig::default());
        let cuda = cuda(&DeviceConfig::default(), 2);
        let make = || -> Result<CudaDevice, DeviceError> {
            let mut device = cuda.device(cpu(&config), &config)?;
            device.load(&generation)?;
            Ok(device)
        };
        let (mut one, mut two) = (make().unwrap(), make().unwrap());
        emulated.script("delay_us=0,fail@1");
        let run =
            |device: &mut CudaDevice| device.execute(&mut jobs(&generation, 1, 8, 5, 3)).map_err(|e| e.to_string());
        // Wherever it shows first.
        let error = run(&mut one).unwrap_err();
        assert!(error.ends_with(": CUDA_ERROR_LAUNCH_FAILED"), "{error}");
        drop(one);
        let error = make().err().unwrap().to_string();
        assert_eq!(error, "device failed: the context is lost, and not yet given up by all");
        assert_eq!(run(&mut two), Err("device failed: the context is lost".into()));
        drop(two);
        let mut again = make().unwrap();
        assert_eq!(run(&mut again), Ok(()));
    }
}
