//! Recommendations that stay on the device: a batch goes in by one copy and comes out by one.
//!
//! The CPU asks the sources that need no neighbours and computes what rankers read of a request; that, the users' vectors and what they have
//! seen is uploaded. On one stream, all rows are scored, the nearest selected and scored again in the CPU's own order of summation, so that
//! they are the CPU's to the bit; the lists are merged, the rankers' columns filled, candidates ranked, and the best of them collected. What comes
//! back is a record per request. Where rounding leaves open which the nearest are, or a score is no number, the CPU computes the job anew.
//!
//! Items that came or changed lie beside the tables ([`live`]).
//!
//! Sizes that differ from batch to batch lie in device memory: the work of a bucket is one recorded graph.
#![allow(unsafe_code)] // Kernels that read by places which are written here.

mod live;
mod ops;
pub mod ranker;
mod shape;
#[cfg(test)]
#[expect(clippy::vec_box, reason = "a device executes boxes")]
mod tests;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use smallvec::SmallVec;
use tastemaker_kernels::{Column, CountBy, FinishSlates, ScoreBy, SumOrder};

use super::engine::{Resident, Searcher, Stored, mib, square};
use super::ops::{Lists, ListsMut, RankBatch, Scoring, Vectors};
use super::stream::{Buffer, Flight, Graph, Moments, Pinned, Ring, Stream, Table};
use super::tensorrt::assembled::columns_of_items;
use crate::candidates::{Dependence, Scored, Source, SourceSet};
use crate::catalog::generation::{self, ColumnData, Metric, NO_CODE, Roles};
use crate::catalog::live::{LiveItem, LiveItems, n_rows};
use crate::catalog::records::Field;
use crate::context::Stage;
use crate::device::cpu::{CpuDevice, Weighted};
use crate::device::{DeviceConfig, DeviceError, Job, RankedItem, Task};
use crate::features::assemble::{Layout, Op};
use crate::features::history::{Series, SeriesColumns, SeriesEntry};
use crate::index::{Exact, Kernel};
use crate::pipeline::PipelineConfig;
use live::{LiveRows, Shape};
use ops::{
    Asked, Blend, Columns, Compared, Copied, Counting, InSeries, Merged, MergedMut, Neighbours, Settled, SettledMut,
};
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
    /// Items that were brought to a worker's memory after they came or changed.
    pub sent: AtomicU64,
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

    /// Those of an item that came or changed.
    fn live<'a>(&self, item: &'a LiveItem) -> &'a [u32] {
        self.first(item.codes(self.field.column))
    }

    /// Those that count.
    fn first<'a>(&self, codes: &'a [u32]) -> &'a [u32] {
        if self.field.first_only { &codes[..codes.len().min(1)] } else { codes }
    }
}

/// Which of the columns that speak of series an operation is.
fn of_series(op: &Op) -> Option<usize> {
    match op {
        Op::SameSeries => Some(0),
        Op::NextInSeries => Some(1),
        Op::SeriesGap => Some(2),
        _ => None,
    }
}

/// An item's series, `NO_CODE` without one, and the bits of where it stands in it.
fn in_series(columns: &SeriesColumns<'_>, row: u32) -> [u32; 2] {
    [columns.code(row).unwrap_or(NO_CODE), columns.position(row).to_bits()]
}

/// Columns of a ranker that depend on the item alone.
struct ItemColumns {
    layout: Layout,
    /// f32 `[n_items, width]`
    table: Table<f32>,
    /// Which of a candidate's values each becomes.
    columns: Table<u32>,
}

/// A ranker in the GPU's memory.
struct Ranker {
    weighted: Weighted,
    /// Columns that count codes of the history: which, what they make of it, and of which codes.
    counting: Vec<(usize, CountBy, usize)>,
    items: Option<ItemColumns>,
    /// Columns that speak of series, as [`of_series`] has them.
    series: [Option<usize>; 3],
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
    /// u32 `[n_items, 2]`: [`in_series`], where a ranker reads it.
    series: Option<Table<u32>>,
    /// What lies beside all of it.
    beside: Shape,
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
        let (mut kinds, mut columns_of): (Vec<Field>, Vec<Vec<u32>>) = (Vec::new(), Vec::new());
        for weighted in &weights {
            let name = &weighted.name;
            let Some(layout) = &weighted.columns else {
                return Ok(Err(format!("ranker `{name}` is not computed in parts")));
            };
            let (mut columns, mut counts, mut of_items, mut series) = (Vec::new(), Vec::new(), Vec::new(), [None; 3]);
            for (name_of, op, width) in layout.columns() {
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
                    (None, None) if op.dependence() == Dependence::Item => {
                        of_items.extend((columns.len()..columns.len() + width).map(|column| column as u32));
                        columns.resize(columns.len() + width, Column::Counted);
                    }
                    (None, None) if let Some(which) = of_series(op) => {
                        series[which] = Some(columns.len());
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
            columns_of.push(of_items);
            widths.push([resident.shared_width(), resident.columns_width()]);
            let codes: Vec<u32> = columns.iter().map(|column| column.code()).collect();
            rankers.push(Ranker {
                weighted: weighted.clone(),
                counting: counts,
                items: None,
                series,
                codes: Table::copied(stream, &codes)?,
                reads_lists: columns.iter().any(|column| column.reads_lists()),
                reads_dots: columns.contains(&Column::Dot),
                resident,
            });
        }
        let has_series = rankers.iter().any(|ranker| ranker.series.iter().any(Option::is_some));
        let counted = kinds.len() + usize::from(has_series);
        let sizes = match Sizes::new(config, device, resident.n_rows, resident.width, widths, counted) {
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
        let n_codes: Vec<usize> = kinds.iter().map(n_codes).collect();
        // For items with twice as many as usual.
        let usual = |n_codes: usize| (2 * n_codes).div_ceil(resident.n_rows).clamp(4, 64);
        let usual = |(kind, n): (&Field, &usize)| if kind.first_only { 1 } else { usual(*n) };
        let beside = Shape {
            n_rows: resident.n_rows,
            n_more: sizes.more,
            width: resident.width,
            with_norms: resident.by != ScoreBy::InnerProduct,
            codes: kinds.iter().zip(&n_codes).map(|of| sizes.more * usual(of)).collect(),
            lines: rankers.iter().map(|ranker| ranker.resident.line_words()).collect(),
            columns: columns_of.iter().map(Vec::len).collect(),
            series: if has_series { 2 } else { 0 },
        };
        worker += beside.bytes();
        let n_codes = n_codes.iter().map(|n| resident.n_rows + 1 + n).sum::<usize>();
        let n_logarithms = LOGARITHMS.max(sizes.liked + 1);
        let n_columns = (columns_of.iter().map(Vec::len).sum::<usize>() + beside.series) * resident.n_rows;
        let tables = 4 * (n_norms + n_lists + n_codes + n_columns + n_logarithms) as u64;
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
        for (ranker, columns) in rankers.iter_mut().zip(&columns_of).filter(|(_, columns)| !columns.is_empty()) {
            let Some(all) = &ranker.weighted.columns else { continue };
            let layout = Layout::part(std::slice::from_ref(all), |of| of == Dependence::Item);
            let table = columns_of_items(stream, generation, &layout)?;
            ranker.items = Some(ItemColumns { layout, table, columns: Table::copied(stream, columns)? });
        }
        let series = match SeriesColumns::of(generation, None).filter(|_| has_series) {
            Some(of) => Some(Table::new(stream, 2 * resident.n_rows, |start, out: &mut [u32]| {
                // Pieces are of whole items: both numbers are even.
                let items = (start / 2..).zip(out.as_chunks_mut::<2>().0);
                items.for_each(|(row, out)| *out = in_series(&of, row as u32));
            })?),
            None => None,
        };
        let search_weight = config.search_weight;
        let tables = Tables {
            sizes,
            rankers,
            weights,
            norms,
            neighbours,
            logarithms,
            codes,
            series,
            beside,
            kernel,
            search_weight,
        };
        Ok(Ok((tables, all)))
    }
}

impl Tables {
    /// Words that a job takes of the tail at most.
    fn most_words(&self, job: &Job) -> usize {
        let codes = |of: &Codes| self.history_codes(of, job).map(<[u32]>::len).sum::<usize>();
        let codes = self.codes.iter().map(codes).sum::<usize>();
        let series = if self.series.is_some() { 3 * job.user.history.len() } else { 0 };
        self.sizes.lists() + job.user.seen.len() + 2 * codes + series
    }

    /// The codes of each liked item.
    fn history_codes<'a>(&self, of: &'a Codes, job: &'a Job) -> impl Iterator<Item = &'a [u32]> + use<'a> {
        let (data, n_rows) = (&job.generation.items.columns[of.field.column].data, self.sizes.n_rows as u32);
        let changed = changed(job);
        let liked = job.user.history.iter().filter(move |entry| entry.weight > 0.0);
        liked.map(move |entry| match changed.and_then(|items| items.get(entry.row)) {
            Some(item) => of.live(item),
            None if entry.row < n_rows => of.first(data.codes(entry.row)),
            None => &[],
        })
    }
}

/// What came or changed, where something did.
fn changed(job: &Job) -> Option<&LiveItems> {
    job.items.as_deref().filter(|items| items.n_entries() > 0)
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
    places: Buffer<u32>,
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
            places: stream.buffer(candidates)?,
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
    /// Before and after each ranker, where times are told.
    moments: Option<Moments>,
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
    bucket: usize,
}

/// The pipeline of one worker.
pub struct Pipeline {
    tables: Arc<Tables>,
    resident: Arc<Resident>,
    rankers: Vec<Box<dyn WorkerRanker>>,
    buffers: Buffers,
    live: LiveRows,
    buckets: Vec<Bucket>,
    up: Ring<u32>,
    down: Vec<Pinned<u32>>,
    flying: VecDeque<Flying>,
    /// It was said that more items came or changed than have room.
    is_full: bool,
    /// Jobs of a batch that may be taken, and those that were planned with the same items.
    fit: Vec<usize>,
    alike: Vec<usize>,
    /// Codes of a history, and its series.
    codes: Vec<u32>,
    series: Series,
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
    pub(super) fn new(
        stream: &Stream,
        searcher: &mut Searcher,
        rest: &mut CpuDevice,
        tables: Arc<Tables>,
    ) -> Result<Self, DeviceError> {
        let sizes = &tables.sizes;
        let n_slots = sizes.most() * sizes.width();
        let rankers = tables.rankers.iter().map(|ranker| ranker.resident.clone().on(stream, n_slots));
        let n_moments = 2 * tables.rankers.len();
        let bucket = |&n: &usize| {
            let moments = stream.moments(n_moments)?;
            Ok(Bucket { n, regions: Regions::new(sizes, n), graph: None, moments })
        };
        let mut pipeline = Pipeline {
            rankers: rankers.collect::<Result<_, _>>()?,
            buffers: Buffers::new(stream, sizes)?,
            live: LiveRows::new(stream, &tables.beside)?,
            buckets: sizes.buckets.iter().map(bucket).collect::<Result<_, DeviceError>>()?,
            up: Ring::new(stream, 2, sizes.input())?,
            down: Vec::new(),
            flying: VecDeque::new(),
            fit: Vec::new(),
            alike: Vec::new(),
            is_full: false,
            codes: Vec::new(),
            series: Series::default(),
            recorded: true,
            resident: searcher.resident.clone(),
            tables,
        };
        pipeline.warm_up(stream, searcher, rest)?;
        Ok(pipeline)
    }

    /// Runs a batch of no requests of each size, and records it.
    fn warm_up(&mut self, stream: &Stream, searcher: &mut Searcher, rest: &mut CpuDevice) -> Result<(), DeviceError> {
        let (of, none) = ((&*self.tables, &*self.resident), Slates::default());
        while !self.live.know(stream, rest, of, None, &none)? {}
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
        let Self { tables, resident, rankers, buffers, live, buckets, .. } = self;
        let Buffers { input, found_rows, found_scores, exact, list_rows, list_scores, lengths, open, .. } = buffers;
        let Buffers {
            rows,
            sources,
            source_scores,
            source_ranks,
            counts,
            places,
            dots,
            columns,
            scores,
            sums,
            records,
            ..
        } = buffers;
        let Bucket { n, regions, moments, .. } = &buckets[bucket];
        let (n, sizes, n_rows) = (*n, &tables.sizes, resident.n_rows);
        let (width, fetched, all) = (sizes.width(), sizes.fetched, sizes.columns());
        let (same, more, more_terms, there) = live.searched();
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
            available: Some(same),
        };
        stream.scores_among(scoring, all, searcher.scores.part_mut(0..n * all))?;
        if sizes.more > 0 {
            let (vectors, n_rows, terms) = (more, sizes.more, more_terms);
            let scoring = Scoring { vectors, n_rows, terms, available: Some(there), ..scoring };
            stream.scores_among(scoring, all, searcher.scores.part_mut(resident.n_rows..n * all))?;
        }
        // SAFETY: what lies in the tail was written by `begin`, which says where in the words; after `warm_up` nothing is said to.
        unsafe { stream.mask_seen(asked, searcher.scores.part_mut(0..n * all), all)? };
        let of_all = searcher.scores.part(0..n * all);
        let best =
            ListsMut { rows: found_rows.part_mut(0..n * fetched), scores: found_scores.part_mut(0..n * fetched) };
        let shape = [n, all, searcher.sizes.parts(n), fetched];
        stream.best(of_all, Some(asked.scanned), shape, &mut searcher.lists, best)?;
        let compared = Compared {
            vectors,
            n_rows,
            widths: [resident.width, resident.dim],
            norms: tables.norms.as_ref().map(|norms| norms.part(0..n_rows)),
            more: live.compared(),
            by: resident.by,
            order: match tables.kernel {
                Kernel::Avx512 => SumOrder::Avx512,
                Kernel::Avx2 => SumOrder::Avx2,
                Kernel::Portable => SumOrder::Portable,
            },
        };
        let found = found_rows.part(0..n * fetched);
        stream.exact_scores(asked, compared, found, None, exact.part_mut(0..n * fetched), fetched)?;
        if sizes.more > 0 {
            stream.name_places(found_rows.part_mut(0..n * fetched), n_rows, live.names())?;
        }
        let found = Lists { rows: found_rows.part(0..n * fetched), scores: found_scores.part(0..n * fetched) };
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
        let mut at = merged.rows;
        if sizes.more > 0 {
            stream.find_places(asked, merged, n_rows, live.changed(), places.part_mut(0..n * width))?;
            at = places.part(0..n * width);
        }
        if tables.rankers.iter().any(|ranker| ranker.reads_dots) {
            let skip = Some((merged.counts, merged.sources));
            stream.exact_scores(asked, compared, at, skip, dots.part_mut(0..n * width), width)?;
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
                    more: live.codes(kind),
                    places: input.part(regions.counted.clone()),
                    places_stride: 2 * sizes.counted,
                    place: 2 * kind,
                    by,
                    logarithms: filled.logarithms,
                    stride,
                    column,
                };
                // SAFETY: as above; `Codes` are where their offsets say.
                unsafe { stream.fill_counts(asked, (merged, at), counting, columns.part_mut(0..n * width * stride))? };
            }
            if let Some(items) = &ranker.items {
                let copied = Copied {
                    table: items.table.part(0..items.table.len()),
                    more: live.columns(nth),
                    columns: items.columns.part(0..items.columns.len()),
                    stride,
                };
                // SAFETY: columns are places in a row of `stride` values: `Tables::new`.
                unsafe { stream.copy_columns((merged, at), copied, columns.part_mut(0..n * width * stride))? };
            }
            if let Some(items) = tables.series.as_ref().filter(|_| ranker.series.iter().any(Option::is_some)) {
                let series = InSeries {
                    items: items.part(0..items.len()),
                    more: live.series(),
                    places: input.part(regions.counted.clone()),
                    places_stride: 2 * sizes.counted,
                    place: 2 * tables.codes.len(),
                    logarithms: filled.logarithms,
                    stride,
                    columns: ranker.series,
                };
                // SAFETY: as above.
                unsafe { stream.fill_series(asked, (merged, at), series, columns.part_mut(0..n * width * stride))? };
            }
            let batch = RankBatch {
                rows: at,
                more: (sizes.more > 0).then(|| live.lines(nth)),
                counts: merged.counts,
                n_requests: n,
                width,
                shared: input.part(regions.shared[nth].start..regions.shared[nth].start + n * shared).as_type(),
                columns: columns.part(0..n * width * stride),
            };
            let comes = |at: usize| moments.as_ref().map_or(Ok(()), |moments| stream.comes(moments, 2 * nth + at));
            comes(0)?;
            on_stream.enqueue(stream, batch, scores.part_mut(0..n * width))?;
            comes(1)?;
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
        let has_room = |items: &Arc<LiveItems>| items.n_entries() <= sizes.more;
        matches!(job.task, Task::Recommend { explain: false, .. })
            && Arc::ptr_eq(&job.generation, &self.resident.generation)
            && !job.deadline.passed(now)
            && user.vector.len() == self.resident.dim
            && norm > 0.0
            && norm < 1e18
            && items.is_none_or(has_room)
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
        counted: &Slates,
    ) -> Result<(), DeviceError> {
        let now = Instant::now();
        let (mut fit, mut alike) = (std::mem::take(&mut self.fit), std::mem::take(&mut self.alike));
        fit.clear();
        fit.extend((0..batch.len()).filter(|&at| self.takes(&batch[at], now)));
        let (n, room) =
            (batch.iter().filter_map(|job| changed(job)).map(LiveItems::n_entries).max(), self.tables.sizes.more);
        if n.is_some_and(|n| n > room) && !std::mem::replace(&mut self.is_full, true) {
            tracing::warn!(room, "more items came or changed than `device.live_items` have room: the CPU recommends");
        }
        // What the GPU knows of items holds for jobs that were planned with the same ones.
        while let Some(&first) = fit.first() {
            let items = batch[first].items.clone();
            let own = |at: usize| batch[at].items.as_ref().map(Arc::as_ptr) == items.as_ref().map(Arc::as_ptr);
            alike.clear();
            alike.extend(fit.extract_if(.., |at| own(*at)));
            if self.live.know(stream, rest, (&self.tables, &self.resident), items.as_ref(), counted)? {
                let mut from = 0;
                while from < alike.len() {
                    from += self.launch(stream, searcher, rest, batch, &alike[from..], places)?;
                }
            }
        }
        (self.fit, self.alike) = (fit, alike);
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
        let n_changed = fit.first().and_then(|&at| changed(&batch[at])).map_or(0, LiveItems::n_entries);
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
            if put((&tables, &resident), &self.live, rest, job, (&mut self.codes, &mut self.series), &mut to)? {
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
        host[..4].copy_from_slice(&[n as u32, m as u32, n_changed as u32, 0]);
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
        self.flying.push_back(Flying { flight, jobs, m, begun, bucket: place });
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
        // All of them, before times are asked for: those of a batch's size are its moments as they came last, which while another of that size is
        // on its way are none. Then several have the last one's, which ran the same kernels.
        let mut landed: SmallVec<[_; 2]> = SmallVec::new();
        while let Some(Flying { flight, jobs, m, begun, bucket }) = self.flying.pop_front() {
            landed.push((flight.wait()?, begun.elapsed(), jobs, m, bucket));
        }
        for (slot, spent, jobs, m, bucket) in landed {
            let moments = self.buckets[bucket].moments.as_ref();
            let time =
                |nth: usize| moments.and_then(|moments| moments.between(2 * nth, 2 * nth + 1)).unwrap_or_default();
            let times: SmallVec<[Duration; 4]> = (0..self.tables.rankers.len()).map(time).collect();
            let ranked = times.iter().sum::<Duration>().min(spent);
            for (taken, record) in jobs.iter().zip(slot.chunks_exact(FinishSlates::record(m))) {
                let job = &mut *batch[taken.at];
                // Each has waited for all of it.
                job.timings.add(Stage::Ann, spent - ranked);
                job.timings.add(Stage::Rank, ranked);
                if self.answer(rest, job, record, m, &times) {
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
    fn answer(&self, rest: &mut CpuDevice, job: &mut Job, record: &[u32], m: usize, times: &[Duration]) -> bool {
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
        let n_rows = n_rows(&job.generation, job.items.as_deref());
        let fits = |&row: &u32| {
            (row as usize) < n_rows && job.filter.allows(row) && job.user.seen.binary_search(&row).is_err()
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
        for (ranker, time) in self.tables.rankers.iter().zip(times) {
            ranked.inference.get_mut(ranker.weighted.at).into_iter().for_each(|own| *own = *time);
        }
        rest.fill_up(job, top_m as usize);
        true
    }
}

/// Writes what a job asks; `false`: it is better computed on the CPU.
fn put(
    (tables, resident): (&Tables, &Resident),
    live: &LiveRows,
    rest: &mut CpuDevice,
    job: &mut Job,
    (codes, series): (&mut Vec<u32>, &mut Series),
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
    let changed = changed(job);
    // Where its score is.
    let place = |&row: &u32| match changed.and_then(|items| items.place(row)) {
        Some(at) => sizes.n_rows as u32 + at,
        None => row,
    };
    let [seen, n_seen] = to.put(job.user.seen.iter().map(place));
    let liked = || job.user.history.iter().filter(|entry| entry.weight > 0.0);
    let [first, n_liked] = to.put(liked().map(|entry| entry.row));
    to.put(liked().map(|entry| entry.weight.to_bits()));
    for (kind, of) in tables.codes.iter().enumerate() {
        codes.clear();
        tables.history_codes(of, job).for_each(|own| codes.extend_from_slice(own));
        codes.sort_unstable();
        let most = codes.chunk_by(|a, b| a == b).map(<[u32]>::len).max().unwrap_or(0);
        // Where more than that may come together, the logarithm is the CPU's.
        if most * of.most.max(live.most_codes(kind)) >= LOGARITHMS {
            return Ok(false);
        }
        let [first, n] = to.put(codes.chunk_by(|a, b| a == b).map(|same| same[0]));
        to.put(codes.chunk_by(|a, b| a == b).map(|same| same.len() as u32));
        let place = regions.counted.start + 2 * (at * sizes.counted + kind);
        to.host[place..place + 2].copy_from_slice(&[first, n]);
    }
    if tables.series.is_some()
        && let Some(columns) = SeriesColumns::of(&job.generation, changed)
    {
        series.gather(&columns, &job.user.history);
        let mut entries: SmallVec<[SeriesEntry; 64]> = series.entries().into();
        entries.sort_unstable_by_key(|entry| entry.code);
        let [first, n] = to.put(entries.iter().map(|entry| entry.code));
        to.put(entries.iter().map(|entry| entry.position.to_bits()));
        to.put(entries.iter().map(|entry| entry.n_liked));
        let place = regions.counted.start + 2 * (at * sizes.counted + tables.codes.len());
        to.host[place..place + 2].copy_from_slice(&[first, n]);
    }
    let [one, two, three] = lists.map(|list| list.len() as u32);
    to.host[regions.words.clone()][8 * at..8 * at + 8]
        .copy_from_slice(&[start, one, two, three, seen, n_seen, first, n_liked]);
    to.host[regions.scanned.start + at] = (sizes.n_rows + changed.map_or(0, LiveItems::n_entries)) as u32;
    let vector = &job.user.vector;
    let length = match resident.generation.metric {
        Metric::InnerProduct => 0.0,
        _ => tables.kernel.dot(vector, vector).sqrt(),
    };
    let (shift, scale, error) = resident.tolerance(square(vector).sqrt(), resident.longest.max(live.longest()));
    write(&mut to.host[regions.bounds.clone()][4 * at..4 * at + 4], &[shift, scale, error, length]);
    let query = &mut to.host[regions.queries.clone()][sizes.query * at..sizes.query * (at + 1)];
    write(query, vector);
    query[vector.len()..].fill(0);
    Ok(true)
}
