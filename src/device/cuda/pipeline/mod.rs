//! Recommendations that stay on the device: a batch goes in by one copy and comes out by one.
//!
//! The CPU asks the sources that need no neighbours and computes what rankers read of a request; that, the users' vectors and what they have
//! seen is uploaded. On one stream, all rows are scored, the nearest selected and scored again in the CPU's own order of summation, so that
//! they are the CPU's to the bit; the lists are merged, the rankers' columns filled, candidates ranked, and the best of them collected. What comes
//! back is a record per request. Where rounding leaves open which the nearest are, or a score is no number, the CPU computes the job anew.
//!
//! Sizes that differ from batch to batch lie in device memory: the work of a bucket is one recorded graph.
#![allow(unsafe_code)] // Kernels that read by places which are written here.

mod ops;
pub mod ranker;
mod shape;
#[cfg(test)]
#[expect(clippy::vec_box, reason = "a device executes boxes")]
mod tests;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use tastemaker_kernels::{Column, CountBy, FinishSlates, ScoreBy, SumOrder};

use super::engine::{Resident, Searcher, Stored, mib, square};
use super::ops::{Lists, ListsMut, RankBatch, Scoring, Vectors};
use super::stream::{Buffer, Flight, Graph, Pinned, Ring, Stream, Table};
use crate::candidates::{Scored, Source, SourceSet};
use crate::catalog::generation::{self, ColumnData, Metric, Roles};
use crate::catalog::live::LiveItems;
use crate::catalog::records::Field;
use crate::context::Stage;
use crate::device::cpu::{CpuDevice, Weighted};
use crate::device::{DeviceConfig, DeviceError, Job, RankedItem, Task};
use crate::features::assemble::Op;
use crate::index::{Exact, Kernel};
use crate::pipeline::PipelineConfig;
use ops::{Asked, Blend, Columns, Compared, Counting, Merged, MergedMut, Neighbours, Settled, SettledMut};
use ranker::{Make, ResidentRanker, WorkerRanker};
use shape::{Regions, Sizes};

pub use shape::Sizes as PipelineSizes;

/// What became of recommendations.
#[derive(Debug, Default)]
pub struct Slates {
    /// Computed on the device from the neighbours to the slate.
    pub whole: AtomicU64,
    /// The device could not, and was not asked: what it does not know is asked for, or its rankers are not there.
    pub refused: AtomicU64,
    /// The device's answer left something open, and the CPU computed them anew.
    pub open: AtomicU64,
}

/// Who computes a job of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The CPU engine, with neighbours that the device finds.
    Cpu,
    /// The device.
    Device,
    /// The CPU engine, after the device.
    Again,
}

/// Logarithms that are at hand, beside those of numbers of liked items.
const LOGARITHMS: usize = 4096;

/// What a column makes of codes of the history, and of which codes of items, where that is what it is.
fn counting(op: &Op, roles: &Roles) -> Option<(CountBy, Field)> {
    let by = match op {
        Op::SameCreator(_) => CountBy::Logarithm,
        Op::SameCategory(_) => CountBy::First,
        Op::Overlap(_) => CountBy::Share,
        _ => return None,
    };
    Some((by, op.field(roles)?))
}

/// The column as the device computes it by itself, where it can.
fn column(op: &Op) -> Option<Column> {
    Some(match *op {
        Op::SourceScore(source) => Column::SourceScore(source as u8),
        Op::SourceRank(source) => Column::SourceRank(source as u8),
        Op::SourcePresent(source) => Column::SourcePresent(source as u8),
        Op::Dot => Column::Dot,
        Op::CoSum => Column::CoSum,
        Op::CoMax => Column::CoMax,
        Op::CoCount => Column::CoCount,
        Op::CoMean => Column::CoMean,
        Op::CoTop3 => Column::CoTop3,
        _ => return None,
    })
}

/// Codes of a column of items.
struct Codes {
    field: Field,
    /// Where each item's begin.
    offsets: Table<u32>,
    codes: Table<u32>,
    /// The most that an item has.
    most: usize,
}

impl Codes {
    fn new(stream: &Stream, data: &ColumnData, n_rows: usize, field: Field) -> Result<Option<Self>, DeviceError> {
        let (mut offsets, mut codes, mut most) = (vec![0u32], Vec::new(), 0);
        for row in 0..n_rows as u32 {
            let own = data.codes(row);
            most = most.max(own.len());
            codes.extend_from_slice(own);
            let Ok(end) = u32::try_from(codes.len()) else { return Ok(None) };
            offsets.push(end);
        }
        let (offsets, codes) = (Table::copied(stream, &offsets)?, Table::copied(stream, &codes)?);
        Ok(Some(Codes { field, offsets, codes, most }))
    }
}

/// A ranker in the GPU's memory.
struct Ranker {
    weighted: Weighted,
    /// Columns that count codes of the history: which, what they make of it, and of which codes.
    counting: Vec<(usize, CountBy, usize)>,
    codes: Table<u32>,
    reads_lists: bool,
    reads_dots: bool,
    resident: Arc<dyn ResidentRanker>,
}

/// What lies beside items, and what uses it, for all workers.
pub struct Tables {
    sizes: Sizes,
    rankers: Vec<Ranker>,
    weights: Vec<Weighted>,
    /// What of a vector goes into its exact scores, where the metric needs that.
    norms: Option<Table<f32>>,
    neighbours: Option<(Table<u64>, Table<u32>, Table<f32>)>,
    logarithms: Table<f32>,
    /// Codes that are counted.
    codes: Vec<Codes>,
    kernel: Kernel,
    search_weight: f32,
}

impl std::fmt::Debug for Tables {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tables").field("sizes", &self.sizes).finish_non_exhaustive()
    }
}

/// Whether each list is where it is said to be and holds an item once: the kernel adds up what a list holds side by side.
fn lists_are_sound(lists: &generation::Lists, n_rows: usize) -> bool {
    let n = lists.rows.len().min(lists.scores.len()) as u64;
    let mut last = vec![u32::MAX; n_rows];
    let ends = lists.offsets.windows(2);
    lists.offsets.iter().all(|&offset| offset <= n)
        && ends.zip(0u32..).all(|(ends, key)| {
            ends[0] <= ends[1]
                && lists.rows[ends[0] as usize..ends[1] as usize].iter().all(|&row| {
                    let place = last.get_mut(row as usize);
                    place.is_some_and(|last| std::mem::replace(last, key) != key)
                })
        })
}

/// What the pipeline may use, and for how many.
pub struct Setting<'a> {
    /// The sources' sizes and weights.
    pub config: &'a PipelineConfig,
    /// The device's.
    pub device: &'a DeviceConfig,
    /// Workers that have a pipeline each.
    pub n_workers: usize,
    /// Bytes that are left.
    pub left: u64,
    /// Puts rankers there.
    pub make: &'a Make<'a>,
}

impl Tables {
    /// The tables of a generation whose vectors are resident, and their bytes, with all workers' buffers; a reason, for the log, where
    /// recommendations can't stay on the device.
    ///
    /// # Errors
    /// The GPU fails.
    pub(super) fn new(
        stream: &Stream,
        resident: &Resident,
        rest: &mut CpuDevice,
        setting: &Setting<'_>,
    ) -> Result<Result<(Self, u64), String>, DeviceError> {
        let Setting { config, device, n_workers, left, make } = *setting;
        let generation = &resident.generation;
        let Some(matrix) = &generation.item_embeddings else { return Ok(Err("there are no vectors".to_owned())) };
        if let Stored::Bf16(_) = resident.vectors {
            return Ok(Err("its vectors are in bf16, and its neighbours would not be the CPU's".to_owned()));
        }
        if resident.indexed.is_some() {
            return Ok(Err("neighbours are found by an index".to_owned()));
        }
        let weights = rest.weighted(generation)?;
        if weights.is_empty() {
            return Ok(Err("there is no ranker".to_owned()));
        }
        let (mut rankers, mut bytes, mut widths) = (Vec::new(), 0, Vec::new());
        let mut kinds: Vec<Field> = Vec::new();
        for weighted in &weights {
            let name = &weighted.name;
            let Some(layout) = &weighted.columns else {
                return Ok(Err(format!("ranker `{name}` is not computed in parts")));
            };
            let (mut columns, mut counts) = (Vec::new(), Vec::new());
            for (name_of, op) in layout.columns() {
                match (column(op), counting(op, &generation.roles)) {
                    (Some(column), _) => columns.push(column),
                    (None, Some((by, kind))) => {
                        let place = kinds.iter().position(|known| *known == kind).unwrap_or(kinds.len());
                        if place == kinds.len() {
                            kinds.push(kind);
                        }
                        counts.push((columns.len(), by, place));
                        columns.push(Column::Counted);
                    }
                    (None, None) => return Ok(Err(format!("ranker `{name}`: column `{name_of}` is the CPU's"))),
                }
            }
            let resident = match make(stream, weighted, left.saturating_sub(bytes))? {
                Ok(resident) => resident,
                Err(reason) => return Ok(Err(format!("ranker `{name}`: {reason}"))),
            };
            bytes += resident.bytes(0)[0];
            if resident.columns_width() != columns.len() {
                return Ok(Err(format!("ranker `{name}`: it takes {} columns", resident.columns_width())));
            }
            widths.push([resident.shared_width(), resident.columns_width()]);
            let codes: Vec<u32> = columns.iter().map(|column| column.code()).collect();
            rankers.push(Ranker {
                weighted: weighted.clone(),
                counting: counts,
                codes: Table::copied(stream, &codes)?,
                reads_lists: columns.iter().any(|column| column.reads_lists()),
                reads_dots: columns.contains(&Column::Dot),
                resident,
            });
        }
        let sizes = match Sizes::new(config, device, resident.n_rows, resident.width, widths, kinds.len()) {
            Ok(sizes) => sizes,
            Err(reason) => return Ok(Err(reason)),
        };
        let lists = &generation.collaborative;
        let reads_lists = rankers.iter().any(|ranker| ranker.reads_lists) && !lists.offsets.is_empty();
        if reads_lists && !lists_are_sound(lists, resident.n_rows) {
            return Ok(Err("a list of neighbours holds an item twice".to_owned()));
        }
        let mut worker = sizes.bytes();
        for ranker in &rankers {
            worker += ranker.resident.bytes(sizes.most() * sizes.width())[1];
        }
        let n_norms = if resident.by == ScoreBy::InnerProduct { 0 } else { resident.n_rows };
        let n_lists = if reads_lists { 2 * lists.offsets.len() + 2 * lists.rows.len() } else { 0 };
        let data = |kind: &Field| &generation.items.columns[kind.column].data;
        let n_codes = |kind| (0..resident.n_rows as u32).map(|row| data(kind).codes(row).len()).sum::<usize>();
        let n_codes = kinds.iter().map(|kind| resident.n_rows + 1 + n_codes(kind)).sum::<usize>();
        let n_logarithms = LOGARITHMS.max(sizes.liked + 1);
        let tables = 4 * (n_norms + n_lists + n_codes + n_logarithms) as u64;
        let all = bytes + tables + worker * n_workers as u64;
        if all > left {
            let (all, tables, worker, left) = (mib(all), mib(bytes + tables), mib(worker), mib(left));
            return Ok(Err(format!(
                "it takes {all} of GPU memory, {tables} for tables and {worker} for each of {n_workers} workers, and {left} are left"
            )));
        }
        let kernel = Kernel::detect();
        let norms = match resident.by {
            ScoreBy::InnerProduct => None,
            _ => Some(Table::copied(stream, Exact::new(matrix.clone(), generation.metric, kernel).norms())?),
        };
        let neighbours = match reads_lists {
            true => Some((
                Table::copied(stream, &lists.offsets)?,
                Table::copied(stream, &lists.rows)?,
                Table::copied(stream, &lists.scores)?,
            )),
            false => None,
        };
        let logarithms: Vec<f32> = (0..n_logarithms).map(|n| (n as f32).ln_1p()).collect();
        let logarithms = Table::copied(stream, &logarithms)?;
        let mut codes = Vec::new();
        for kind in &kinds {
            match Codes::new(stream, data(kind), resident.n_rows, *kind)? {
                Some(of) => codes.push(of),
                None => return Ok(Err("items have more codes than 2^32".to_owned())),
            }
        }
        let search_weight = config.search_weight;
        Ok(Ok((Tables { sizes, rankers, weights, norms, neighbours, logarithms, codes, kernel, search_weight }, all)))
    }
}

impl Tables {
    /// Words that a job takes of the tail at most.
    fn most_words(&self, job: &Job) -> usize {
        let codes = |of: &Codes| self.history_codes(of, job).map(<[u32]>::len).sum::<usize>();
        let codes = self.codes.iter().map(codes).sum::<usize>();
        self.sizes.lists() + job.user.seen.len() + 2 * codes
    }

    /// The codes of each liked item.
    fn history_codes<'a>(&'a self, of: &Codes, job: &'a Job) -> impl Iterator<Item = &'a [u32]> + use<'a> {
        let (data, n_rows) = (&job.generation.items.columns[of.field.column].data, self.sizes.n_rows as u32);
        let most = if of.field.first_only { 1 } else { usize::MAX };
        let liked = job.user.history.iter().filter(move |entry| entry.weight > 0.0 && entry.row < n_rows);
        liked.map(move |entry| {
            let codes = data.codes(entry.row);
            &codes[..codes.len().min(most)]
        })
    }
}

/// What the pipeline computes in.
struct Buffers {
    input: Buffer<u32>,
    found_rows: Buffer<u32>,
    found_scores: Buffer<f32>,
    exact: Buffer<f32>,
    list_rows: Buffer<u32>,
    list_scores: Buffer<f32>,
    lengths: Buffer<u32>,
    open: Buffer<u32>,
    rows: Buffer<u32>,
    sources: Buffer<u8>,
    source_scores: Buffer<f32>,
    source_ranks: Buffer<u16>,
    counts: Buffer<u32>,
    dots: Buffer<f32>,
    columns: Buffer<f32>,
    scores: Buffer<f32>,
    sums: Buffer<f32>,
    records: Buffer<u32>,
}

impl Buffers {
    fn new(stream: &Stream, sizes: &Sizes) -> Result<Self, DeviceError> {
        let (most, fetched, candidates) = (sizes.most(), sizes.most() * sizes.fetched, sizes.most() * sizes.width());
        let columns = sizes.rankers.iter().map(|ranker| ranker[1]).max().unwrap_or(0);
        Ok(Buffers {
            input: stream.buffer(sizes.input())?,
            found_rows: stream.buffer(fetched)?,
            found_scores: stream.buffer(fetched)?,
            exact: stream.buffer(fetched)?,
            list_rows: stream.buffer(candidates)?,
            list_scores: stream.buffer(candidates)?,
            lengths: stream.buffer(4 * most)?,
            open: stream.buffer(most)?,
            rows: stream.buffer(candidates)?,
            sources: stream.buffer(candidates)?,
            source_scores: stream.buffer(4 * candidates)?,
            source_ranks: stream.buffer(4 * candidates)?,
            counts: stream.buffer(most)?,
            dots: stream.buffer(candidates)?,
            columns: stream.buffer(candidates * columns)?,
            scores: stream.buffer(candidates)?,
            sums: stream.buffer(candidates)?,
            records: stream.buffer(sizes.records())?,
        })
    }
}

/// Batches of one size.
struct Bucket {
    n: usize,
    regions: Regions,
    /// `None`: it could not be recorded, and its kernels are given one by one.
    graph: Option<Graph>,
}

/// A job on its way, and what it did without before.
#[derive(Clone, Copy, Debug)]
struct Taken {
    at: usize,
    n_degraded: usize,
}

/// A batch on its way.
struct Flying {
    flight: Flight<u32>,
    jobs: Vec<Taken>,
    /// Items of a record.
    m: usize,
    begun: Instant,
}

/// The pipeline of one worker.
pub struct Pipeline {
    tables: Arc<Tables>,
    resident: Arc<Resident>,
    rankers: Vec<Box<dyn WorkerRanker>>,
    buffers: Buffers,
    buckets: Vec<Bucket>,
    up: Ring<u32>,
    down: Vec<Pinned<u32>>,
    flying: VecDeque<Flying>,
    /// Jobs of a batch that may be taken.
    fit: Vec<usize>,
    /// Codes of a history.
    codes: Vec<u32>,
    /// Graphs are launched where there are some.
    pub(super) recorded: bool,
}

/// Places in what is uploaded, while it is written.
struct Writer<'a> {
    host: &'a mut [u32],
    regions: &'a Regions,
    tail: usize,
    /// Requests so far.
    n: usize,
}

impl Writer<'_> {
    fn put(&mut self, values: impl Iterator<Item = u32>) -> [u32; 2] {
        let start = self.tail;
        let base = self.regions.tail;
        for value in values {
            self.host[base + self.tail] = value;
            self.tail += 1;
        }
        [start as u32, (self.tail - start) as u32]
    }
}

fn write(to: &mut [u32], values: &[f32]) {
    to.iter_mut().zip(values).for_each(|(to, value)| *to = value.to_bits());
}

impl Pipeline {
    /// For a worker whose searcher has the tables' vectors: buffers, and a graph for each bucket.
    ///
    /// # Errors
    /// Out of memory, or the GPU fails.
    pub(super) fn new(stream: &Stream, searcher: &mut Searcher, tables: Arc<Tables>) -> Result<Self, DeviceError> {
        let sizes = &tables.sizes;
        let n_slots = sizes.most() * sizes.width();
        let rankers = tables.rankers.iter().map(|ranker| ranker.resident.clone().on(stream, n_slots));
        let bucket = |&n: &usize| Bucket { n, regions: Regions::new(sizes, n), graph: None };
        let mut pipeline = Pipeline {
            rankers: rankers.collect::<Result<_, _>>()?,
            buffers: Buffers::new(stream, sizes)?,
            buckets: sizes.buckets.iter().map(bucket).collect(),
            up: Ring::new(stream, 2, sizes.input())?,
            down: Vec::new(),
            flying: VecDeque::new(),
            fit: Vec::new(),
            codes: Vec::new(),
            recorded: true,
            resident: searcher.resident.clone(),
            tables,
        };
        pipeline.warm_up(stream, searcher)?;
        Ok(pipeline)
    }

    /// Runs a batch of no requests of each size, and records it.
    fn warm_up(&mut self, stream: &Stream, searcher: &mut Searcher) -> Result<(), DeviceError> {
        searcher.know(stream, None)?;
        for bucket in 0..self.buckets.len() {
            let regions = self.buckets[bucket].regions.clone();
            let mut host = self.up.take()?;
            host[..regions.tail].fill(0);
            self.up.give(stream.upload(host, regions.tail, self.buffers.input.part_mut(0..regions.tail))?);
            // Whatever is made at a first call is made before it is recorded.
            self.give(stream, searcher, bucket)?;
            stream.synchronize()?;
            match stream.record(|| self.give(stream, searcher, bucket)) {
                Ok(graph) => self.buckets[bucket].graph = Some(graph),
                Err(error) if !stream.context().is_lost() => {
                    tracing::warn!(bucket = self.buckets[bucket].n, %error, "no graph: kernels are launched one by one");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Gives the stream all kernels of a bucket's batch.
    fn give(&mut self, stream: &Stream, searcher: &mut Searcher, bucket: usize) -> Result<(), DeviceError> {
        let Self { tables, resident, rankers, buffers, buckets, .. } = self;
        let Buffers { input, found_rows, found_scores, exact, list_rows, list_scores, lengths, open, .. } = buffers;
        let Buffers {
            rows, sources, source_scores, source_ranks, counts, dots, columns, scores, sums, records, ..
        } = buffers;
        let Bucket { n, regions, .. } = &buckets[bucket];
        let (n, sizes, n_rows) = (*n, &tables.sizes, resident.n_rows);
        let (width, fetched) = (sizes.width(), sizes.fetched);
        let asked = Asked {
            n,
            header: input.part(0..4),
            scanned: input.part(regions.scanned.clone()),
            queries: input.part(regions.queries.clone()).as_type(),
            bounds: input.part(regions.bounds.clone()).as_type(),
            words: input.part(regions.words.clone()),
            tail: input.part(regions.tail..regions.tail + sizes.tail()),
        };
        let Stored::F32(vectors) = &resident.vectors else {
            return Err(DeviceError::Failed("the pipeline's vectors are not in f32".into()));
        };
        let vectors = vectors.part(0..vectors.len());
        let scoring = Scoring {
            queries: asked.queries,
            n_queries: n,
            vectors: Vectors::F32(vectors),
            n_rows,
            width: resident.width,
            by: resident.by,
            terms: resident.terms.as_ref().map(|terms| terms.part(0..n_rows)),
            available: Some(searcher.words.part(0..searcher.words.len())),
        };
        stream.scores(scoring, searcher.scores.part_mut(0..n * n_rows))?;
        // SAFETY: what lies in the tail was written by `begin`, which says where in the words; after `warm_up` nothing is said to.
        unsafe { stream.mask_seen(asked, searcher.scores.part_mut(0..n * n_rows), n_rows)? };
        let all = searcher.scores.part(0..n * n_rows);
        let best =
            ListsMut { rows: found_rows.part_mut(0..n * fetched), scores: found_scores.part_mut(0..n * fetched) };
        let shape = [n, n_rows, searcher.sizes.parts(n), fetched];
        stream.best(all, Some(asked.scanned), shape, &mut searcher.lists, best)?;
        let compared = Compared {
            vectors,
            n_rows,
            widths: [resident.width, resident.dim],
            norms: tables.norms.as_ref().map(|norms| norms.part(0..n_rows)),
            by: resident.by,
            order: match tables.kernel {
                Kernel::Avx512 => SumOrder::Avx512,
                Kernel::Avx2 => SumOrder::Avx2,
                Kernel::Portable => SumOrder::Portable,
            },
        };
        let found = Lists { rows: found_rows.part(0..n * fetched), scores: found_scores.part(0..n * fetched) };
        stream.exact_scores(asked, compared, found.rows, None, exact.part_mut(0..n * fetched), fetched)?;
        let lists = ListsMut { rows: list_rows.part_mut(0..n * width), scores: list_scores.part_mut(0..n * width) };
        let out = SettledMut { lists, lengths: lengths.part_mut(0..4 * n), open: open.part_mut(0..n) };
        let exact = exact.part(0..n * fetched);
        // SAFETY: as above.
        unsafe { stream.settle_lists(asked, found, exact, fetched, sizes.widths, out)? };
        let settled = Settled {
            widths: sizes.widths,
            lists: Lists { rows: list_rows.part(0..n * width), scores: list_scores.part(0..n * width) },
            lengths: lengths.part(0..4 * n),
            open: open.part(0..n),
        };
        let out = MergedMut {
            rows: rows.part_mut(0..n * width),
            sources: sources.part_mut(0..n * width),
            source_scores: source_scores.part_mut(0..4 * n * width),
            source_ranks: source_ranks.part_mut(0..4 * n * width),
            counts: counts.part_mut(0..n),
        };
        stream.merge_candidates(n, settled, out)?;
        let merged = Merged {
            width,
            rows: rows.part(0..n * width),
            sources: sources.part(0..n * width),
            source_scores: source_scores.part(0..4 * n * width),
            source_ranks: source_ranks.part(0..4 * n * width),
            counts: counts.part(0..n),
        };
        if tables.rankers.iter().any(|ranker| ranker.reads_dots) {
            let skip = Some((merged.counts, merged.sources));
            stream.exact_scores(asked, compared, merged.rows, skip, dots.part_mut(0..n * width), width)?;
        }
        for (nth, (ranker, on_stream)) in tables.rankers.iter().zip(rankers).enumerate() {
            let [shared, stride] = sizes.rankers[nth];
            let neighbours = tables.neighbours.as_ref().filter(|_| ranker.reads_lists);
            let filled = Columns {
                codes: ranker.codes.part(0..ranker.codes.len()),
                stride,
                dots: dots.part(0..n * width),
                neighbours: neighbours.map(|(offsets, rows, scores)| Neighbours {
                    offsets: offsets.part(0..offsets.len()),
                    rows: rows.part(0..rows.len()),
                    scores: scores.part(0..scores.len()),
                }),
                logarithms: tables.logarithms.part(0..tables.logarithms.len()),
            };
            // SAFETY: as above; the lists of neighbours are where their offsets say: `lists_are_sound`.
            unsafe { stream.fill_columns(asked, merged, filled, columns.part_mut(0..n * width * stride))? };
            for &(column, by, kind) in &ranker.counting {
                let Codes { offsets, codes, .. } = &tables.codes[kind];
                let counting = Counting {
                    offsets: offsets.part(0..offsets.len()),
                    codes: codes.part(0..codes.len()),
                    places: input.part(regions.counted.clone()),
                    places_stride: 2 * sizes.counted,
                    place: 2 * kind,
                    by,
                    logarithms: filled.logarithms,
                    stride,
                    column,
                };
                // SAFETY: as above; `Codes` are where their offsets say.
                unsafe { stream.fill_counts(asked, merged, counting, columns.part_mut(0..n * width * stride))? };
            }
            let batch = RankBatch {
                rows: merged.rows,
                counts: merged.counts,
                n_requests: n,
                width,
                shared: input.part(regions.shared[nth].start..regions.shared[nth].start + n * shared).as_type(),
                columns: columns.part(0..n * width * stride),
            };
            on_stream.enqueue(stream, batch, scores.part_mut(0..n * width))?;
            let sums = sums.part_mut(0..n * width);
            stream.add_scores(scores.part(0..n * width), ranker.weighted.weight, nth == 0, sums)?;
        }
        let blend = Blend {
            sums: sums.part(0..n * width),
            weight: tables.rankers.iter().fold(0.0, |sum, ranker| sum + ranker.weighted.weight),
            search_weight: tables.search_weight,
        };
        let most = sizes.items(usize::MAX);
        let records = records.part_mut(0..n * FinishSlates::record(most));
        // SAFETY: the header's number of items is at most that: `launch` writes it.
        unsafe { stream.finish_slates(asked, merged, settled, blend, records, most) }
    }

    /// Whether the device can compute a job, but for what it knows of items.
    fn takes(&self, job: &Job, now: Instant) -> bool {
        let sizes = &self.tables.sizes;
        let user = &job.user;
        let norm = square(&user.vector).sqrt();
        let items = job.items.as_ref();
        matches!(job.task, Task::Recommend { explain: false, .. })
            && Arc::ptr_eq(&job.generation, &self.resident.generation)
            && !job.deadline.passed(now)
            && user.vector.len() == self.resident.dim
            && norm > 0.0
            && norm < 1e18
            && items.is_none_or(|items| items.n_entries() == 0 && items.n_rows() as usize == sizes.n_rows)
            && job.filter.forbids_only_gone(items)
            && user.history.len() <= sizes.liked
    }

    /// Gives the device those jobs of a batch that it can compute, and says which.
    ///
    /// # Errors
    /// The GPU fails, or [`Device::load`](crate::device::Device::load) does.
    pub(super) fn begin(
        &mut self,
        stream: &Stream,
        searcher: &mut Searcher,
        rest: &mut CpuDevice,
        batch: &mut [Box<Job>],
        places: &mut [Place],
    ) -> Result<(), DeviceError> {
        let now = Instant::now();
        let gone = |job: &Job| job.items.clone().filter(|items| items.n_gone() > 0);
        let mut fit = std::mem::take(&mut self.fit);
        fit.clear();
        // What the GPU is told of items holds for jobs that were planned with the same ones.
        let mut told: Option<Option<Arc<LiveItems>>> = None;
        for (at, job) in batch.iter().enumerate().filter(|(_, job)| self.takes(job, now)) {
            let (own, first) = (gone(job), told.is_none());
            let told = told.get_or_insert(own.clone());
            if first || told.as_ref().map(Arc::as_ptr) == own.as_ref().map(Arc::as_ptr) {
                fit.push(at);
            }
        }
        if let Some(told) = told.filter(|_| !fit.is_empty())
            && searcher.know(stream, told.as_ref())?
        {
            let mut from = 0;
            while from < fit.len() {
                from += self.launch(stream, searcher, rest, batch, &fit[from..], places)?;
            }
        }
        self.fit = fit;
        Ok(())
    }

    /// Gives the device a batch of the first of `fit`; says how many were looked at, at least one.
    fn launch(
        &mut self,
        stream: &Stream,
        searcher: &mut Searcher,
        rest: &mut CpuDevice,
        batch: &mut [Box<Job>],
        fit: &[usize],
        places: &mut [Place],
    ) -> Result<usize, DeviceError> {
        let begun = Instant::now();
        let place = self.buckets.iter().position(|bucket| bucket.n >= fit.len()).unwrap_or(self.buckets.len() - 1);
        let (tables, resident) = (self.tables.clone(), self.resident.clone());
        let sizes = &tables.sizes;
        let mut host = self.up.take()?;
        let Bucket { n: room, regions, .. } = &self.buckets[place];
        let room = *room;
        let mut to = Writer { host: &mut host, regions, tail: 0, n: 0 };
        let (mut jobs, mut m, mut looked_at) = (Vec::with_capacity(room.min(fit.len())), 4, 0);
        for &at in fit {
            let job = &mut *batch[at];
            let words = tables.most_words(job);
            let fits = words <= sizes.tail();
            if to.n == room || fits && to.tail + words > sizes.tail() {
                break;
            }
            looked_at += 1;
            if !fits {
                continue;
            }
            let n_degraded = job.degraded.len();
            if put(&tables, &resident, rest, job, &mut self.codes, &mut to)? {
                let Task::Recommend { top_m, .. } = job.task else { continue };
                m = m.max(sizes.items(top_m as usize));
                jobs.push(Taken { at, n_degraded });
                places[at] = Place::Device;
                to.n += 1;
            } else {
                job.degraded.truncate(n_degraded);
            }
        }
        let (n, tail) = (to.n, to.tail);
        if n == 0 {
            self.up.give_idle(host);
            return Ok(looked_at);
        }
        host[..4].copy_from_slice(&[n as u32, m as u32, 0, 0]);
        host[regions.scanned.clone()][n..].fill(0);
        host[regions.words.clone()][8 * n..].fill(0);
        host[regions.counted.clone()][2 * sizes.counted * n..].fill(0);
        host[regions.queries.clone()][sizes.query * n..].fill(0);
        let n_input = regions.tail + tail;
        self.up.give(stream.upload(host, n_input, self.buffers.input.part_mut(0..n_input))?);
        match &self.buckets[place].graph {
            Some(graph) if self.recorded => stream.launch_graph(graph)?,
            _ => self.give(stream, searcher, place)?,
        }
        let down = match self.down.pop() {
            Some(slot) => slot,
            None => stream.pinned(sizes.records())?,
        };
        let flight = stream.download(self.buffers.records.part(0..n * FinishSlates::record(m)), down)?;
        self.flying.push_back(Flying { flight, jobs, m, begun });
        Ok(looked_at)
    }

    /// Waits for what was given, and answers the jobs that it answers; the others are to be computed again.
    ///
    /// # Errors
    /// The GPU fails.
    pub fn finish(
        &mut self,
        rest: &mut CpuDevice,
        batch: &mut [Box<Job>],
        places: &mut [Place],
        counted: &Slates,
    ) -> Result<(), DeviceError> {
        while let Some(Flying { flight, jobs, m, begun }) = self.flying.pop_front() {
            let slot = flight.wait()?;
            let spent = begun.elapsed();
            for (taken, record) in jobs.iter().zip(slot.chunks_exact(FinishSlates::record(m))) {
                let job = &mut *batch[taken.at];
                // Each has waited for all of it.
                job.timings.add(Stage::Ann, spent);
                if self.answer(rest, job, record, m) {
                    counted.whole.fetch_add(1, Relaxed);
                } else {
                    counted.open.fetch_add(1, Relaxed);
                    job.degraded.truncate(taken.n_degraded);
                    job.ranked.items.clear();
                    places[taken.at] = Place::Again;
                }
            }
            self.down.push(slot);
        }
        Ok(())
    }

    /// Fills a job's answer from its record, unless that leaves something open.
    fn answer(&self, rest: &mut CpuDevice, job: &mut Job, record: &[u32], m: usize) -> bool {
        let Task::Recommend { top_m, .. } = job.task else { return false };
        let (head, items) = record.split_at(4);
        let (rows, rest_of) = items.split_at(m);
        let (scores, sets) = rest_of.split_at(m);
        let &[n_candidates, n_near, n_nan, open] = head else { return false };
        if open != 0 || n_nan != 0 {
            return false;
        }
        let n = (top_m as usize).min(n_candidates as usize).min(m);
        // What the device was told was told before; few rows are looked at again.
        let fits = |&row: &u32| {
            (row as usize) < self.tables.sizes.n_rows
                && job.filter.allows(row)
                && job.user.seen.binary_search(&row).is_err()
        };
        if !rows[..n].iter().all(fits) {
            tracing::warn!("the GPU returned an item that must not be shown");
            return false;
        }
        let set = |at: usize| SourceSet(sets[at / 4].to_le_bytes()[at % 4]);
        let ranked = &mut job.ranked;
        let item = |at: usize| RankedItem { row: rows[at], score: f32::from_bits(scores[at]), sources: set(at) };
        ranked.items.extend((0..n).map(item));
        ranked.n_candidates = n_candidates;
        ranked.n_by_source[Source::Ann as usize] = n_near;
        ranked.inference.resize(self.resident.generation.rankers.len(), Default::default());
        rest.fill_up(job, top_m as usize);
        true
    }
}

/// Writes what a job asks; `false`: it is better computed on the CPU.
fn put(
    tables: &Tables,
    resident: &Resident,
    rest: &mut CpuDevice,
    job: &mut Job,
    codes: &mut Vec<u32>,
    to: &mut Writer<'_>,
) -> Result<bool, DeviceError> {
    let (sizes, at) = (&tables.sizes, to.n);
    let (regions, mut all) = (to.regions, true);
    let lists = rest.begin(job, &tables.weights, &mut |nth, shared| {
        let width = sizes.rankers[nth][0];
        all &= shared.len() == width;
        write(&mut to.host[regions.shared[nth].clone()][at * width..(at + 1) * width], shared);
    })?;
    let Some(lists) = lists.filter(|_| all) else { return Ok(false) };
    let lists: [&[Scored]; 3] = [1, 2, 3].map(|source| &lists[source][..]);
    if lists.iter().zip(&sizes.widths[1..]).any(|(list, width)| list.len() > *width) {
        return Ok(false);
    }
    let start = to.tail as u32;
    for list in lists {
        to.put(list.iter().map(|scored| scored.row));
        to.put(list.iter().map(|scored| scored.score.to_bits()));
    }
    for (count, list) in job.ranked.n_by_source[1..].iter_mut().zip(lists) {
        *count = list.len() as u32;
    }
    let [seen, n_seen] = to.put(job.user.seen.iter().copied());
    let liked = || job.user.history.iter().filter(|entry| entry.weight > 0.0);
    let [first, n_liked] = to.put(liked().map(|entry| entry.row));
    to.put(liked().map(|entry| entry.weight.to_bits()));
    for (kind, of) in tables.codes.iter().enumerate() {
        codes.clear();
        tables.history_codes(of, job).for_each(|own| codes.extend_from_slice(own));
        codes.sort_unstable();
        let most = codes.chunk_by(|a, b| a == b).map(<[u32]>::len).max().unwrap_or(0);
        // Where more than that may come together, the logarithm is the CPU's.
        if most * of.most >= LOGARITHMS {
            return Ok(false);
        }
        let [first, n] = to.put(codes.chunk_by(|a, b| a == b).map(|same| same[0]));
        to.put(codes.chunk_by(|a, b| a == b).map(|same| same.len() as u32));
        let place = regions.counted.start + 2 * (at * tables.codes.len() + kind);
        to.host[place..place + 2].copy_from_slice(&[first, n]);
    }
    let [one, two, three] = lists.map(|list| list.len() as u32);
    to.host[regions.words.clone()][8 * at..8 * at + 8]
        .copy_from_slice(&[start, one, two, three, seen, n_seen, first, n_liked]);
    to.host[regions.scanned.start + at] = sizes.n_rows as u32;
    let vector = &job.user.vector;
    let length = match resident.generation.metric {
        Metric::InnerProduct => 0.0,
        _ => tables.kernel.dot(vector, vector).sqrt(),
    };
    let (shift, scale, error) = resident.tolerance(square(vector).sqrt());
    write(&mut to.host[regions.bounds.clone()][4 * at..4 * at + 4], &[shift, scale, error, length]);
    let query = &mut to.host[regions.queries.clone()][sizes.query * at..sizes.query * (at + 1)];
    write(query, vector);
    query[vector.len()..].fill(0);
    Ok(true)
}
