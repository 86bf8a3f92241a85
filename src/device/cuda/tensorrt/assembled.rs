//! Rankers that want whole rows: what requests, items and candidates give of a row is put together on the device, scored, and holes are voided.
#![allow(unsafe_code)] // Launches of kernels.

use std::sync::Arc;

use smallvec::SmallVec;
use tastemaker_kernels::{self as kernels, RowKind, RowPart};

use super::super::ops::{MoreRows, RankBatch, count, holds, shaped};
use super::super::pipeline::ranker::{ResidentRanker, WorkerRanker};
use super::super::stream::{Buffer, Part, PartMut, Stream, Table};
use crate::candidates::Dependence;
use crate::catalog::generation::Generation;
use crate::device::DeviceError;
use crate::device::cpu::Whole;
use crate::features::assemble::{FeatureScratch, Layout};

/// Where the table of items and the request's values are, for [`Stream::assemble_rows`].
struct Sources<'a> {
    /// f32 `[n_items, n_item]`
    table: &'a Table<f32>,
    n_items: usize,
    /// Values of a request, of an item, of a candidate.
    widths: [usize; 3],
}

impl Stream {
    /// Whole rows of an input, `[n_requests, width, n_values]` words of its kind.
    fn assemble_rows(
        &self,
        batch: RankBatch<'_>,
        from: &Sources<'_>,
        input: &InputRows,
        values: PartMut<'_, u32>,
    ) -> Result<(), DeviceError> {
        let (slots, [shared, item, columns]) = (batch.n_requests * batch.width, from.widths);
        holds(batch.rows.len(), batch.n_requests, batch.width);
        holds(batch.counts.len(), batch.n_requests, 1);
        holds(batch.shared.len(), batch.n_requests, shared);
        holds(batch.columns.len(), slots, columns);
        holds(from.table.len(), from.n_items, item);
        holds(values.0.len(), slots, input.n_values * input.kind.words());
        if let Some(MoreRows { rows, n }) = &batch.more {
            holds(rows.len(), *n, item);
        }
        let shape = kernels::AssembleRows {
            rows: self.of(&batch.rows).0,
            counts: self.of(&batch.counts).0,
            n_requests: count(batch.n_requests),
            width: count(batch.width),
            shared: self.of(&batch.shared).0,
            n_shared: count(shared),
            table: self.of(&from.table.part(0..from.table.len())).0,
            n_items: count(from.n_items),
            more: self.more(batch.more),
            n_item: count(item),
            columns: self.of(&batch.columns).0,
            n_columns: count(columns),
            places: self.of(&input.places.part(0..input.n_values)).0,
            n_values: count(input.n_values),
            kind: input.kind,
            values: self.of(&values.0).0,
        };
        // SAFETY: the parts are this stream's or tables, as long as checked above; places are of values that there are: `Assembled::new`.
        unsafe { self.launch(&shaped(shape.launch())?) }
    }

    /// NaN for places without a candidate: rows from `n_items` on are none.
    fn void_holes(&self, batch: RankBatch<'_>, n_items: usize, scores: PartMut<'_, f32>) -> Result<(), DeviceError> {
        holds(batch.rows.len(), batch.n_requests, batch.width);
        holds(batch.counts.len(), batch.n_requests, 1);
        holds(scores.0.len(), batch.n_requests, batch.width);
        let shape = kernels::VoidHoles {
            rows: self.of(&batch.rows).0,
            counts: self.of(&batch.counts).0,
            n_requests: count(batch.n_requests),
            width: count(batch.width),
            n_items: count(n_items),
            scores: self.of(&scores.0).0,
        };
        // SAFETY: as above.
        unsafe { self.launch(&shaped(shape.launch())?) }
    }
}

/// Scores whole rows; one stream's.
pub trait RowScorer: Send {
    /// Gives the stream what scores `n_rows` rows: `inputs` by the manifest's order, words of `[n_rows, width]` values each, to f32 `[n_rows]`.
    /// Waits for nothing, so that it can be recorded once it has run.
    ///
    /// # Errors
    /// What the driver or the engine says.
    fn enqueue(
        &mut self,
        stream: &Stream,
        n_rows: usize,
        inputs: &[Part<'_, u32>],
        scores: PartMut<'_, f32>,
    ) -> Result<(), DeviceError>;
}

/// Makes a stream's scorer of what all streams share.
pub type OnStream = dyn Fn(&Stream, usize) -> Result<Box<dyn RowScorer>, DeviceError> + Send + Sync;

/// An input's rows: where their values come from.
struct InputRows {
    places: Table<u32>,
    n_values: usize,
    kind: RowKind,
}

/// A ranker of whole rows, with the columns of all items in the GPU's memory.
pub struct Assembled {
    table: Table<f32>,
    n_items: usize,
    widths: [usize; 3],
    inputs: Vec<InputRows>,
    bytes: u64,
    scorer: Box<OnStream>,
}

/// Bytes of the table of a model's items.
pub fn table_bytes(whole: &Whole, generation: &Generation) -> u64 {
    4 * (generation.items.len() * whole.widths()[Dependence::Item as usize]) as u64
}

/// What columns that depend on nothing else have of all items: f32 `[n_items, width]`.
///
/// # Errors
/// Out of memory, or what the driver says.
pub fn columns_of_items(stream: &Stream, generation: &Generation, layout: &Layout) -> Result<Table<f32>, DeviceError> {
    let width = layout.width();
    // By whole items: a piece of the table may begin and end within one.
    let (mut scratch, mut lines) = (FeatureScratch::default(), Vec::new());
    Table::new(stream, generation.items.len() * width, |start, out: &mut [f32]| {
        let (first, end) = (start / width, (start + out.len()).div_ceil(width));
        layout.fill_items(generation, first as u32..end as u32, &mut scratch, &mut lines);
        out.copy_from_slice(&lines[start - first * width..][..out.len()]);
    })
}

impl Assembled {
    /// Fills the table from the generation. `kinds` are those of the inputs, `engine_bytes` what the scorer keeps there.
    ///
    /// # Errors
    /// Out of memory, or what the driver says.
    ///
    /// # Panics
    /// If there are other inputs than `kinds`.
    pub fn new(
        stream: &Stream,
        generation: &Generation,
        whole: &Whole,
        kinds: &[RowKind],
        engine_bytes: u64,
        scorer: Box<OnStream>,
    ) -> Result<Self, DeviceError> {
        assert_eq!(kinds.len(), whole.places.len(), "an input of the model is not the manifest's");
        let (widths, n_items) = (whole.widths(), generation.items.len());
        let table = columns_of_items(stream, generation, &whole.layouts[Dependence::Item as usize])?;
        let inputs = whole.places.iter().zip(kinds).map(|(places, &kind)| {
            let codes: Vec<u32> = places.iter().map(|&(of, at)| place(of, at).code()).collect();
            Ok(InputRows { places: Table::copied(stream, &codes)?, n_values: codes.len(), kind })
        });
        let inputs = inputs.collect::<Result<Vec<_>, DeviceError>>()?;
        let bytes = table_bytes(whole, generation) + engine_bytes;
        Ok(Assembled { table, n_items, widths, inputs, bytes, scorer })
    }
}

fn place(of: Dependence, at: usize) -> RowPart {
    let at = count(at);
    match of {
        Dependence::Request => RowPart::Shared(at),
        Dependence::Item => RowPart::Item(at),
        Dependence::Candidate => RowPart::Candidate(at),
    }
}

impl ResidentRanker for Assembled {
    fn shared_width(&self) -> usize {
        self.widths[Dependence::Request as usize]
    }

    fn columns_width(&self) -> usize {
        self.widths[Dependence::Candidate as usize]
    }

    fn line_words(&self) -> usize {
        self.widths[Dependence::Item as usize]
    }

    fn put_line(&self, line: &[f32], out: &mut [u32]) {
        out.iter_mut().zip(line).for_each(|(out, value)| *out = value.to_bits());
    }

    fn bytes(&self, n_slots: usize) -> [u64; 2] {
        let words: usize = self.inputs.iter().map(|input| input.n_values * input.kind.words()).sum();
        [self.bytes, 4 * (words * n_slots) as u64]
    }

    fn on(self: Arc<Self>, stream: &Stream, n_slots: usize) -> Result<Box<dyn WorkerRanker>, DeviceError> {
        let rows = self.inputs.iter().map(|input| stream.buffer(n_slots * input.n_values * input.kind.words()));
        let rows = rows.collect::<Result<_, _>>()?;
        let scorer = (self.scorer)(stream, n_slots)?;
        Ok(Box::new(OfWorker { scorer, rows, ranker: self }))
    }
}

struct OfWorker {
    scorer: Box<dyn RowScorer>,
    /// By input.
    rows: Vec<Buffer<u32>>,
    ranker: Arc<Assembled>,
}

impl WorkerRanker for OfWorker {
    fn enqueue(
        &mut self,
        stream: &Stream,
        batch: RankBatch<'_>,
        mut scores: PartMut<'_, f32>,
    ) -> Result<(), DeviceError> {
        let OfWorker { scorer, rows, ranker } = self;
        let Assembled { table, n_items, widths, inputs, .. } = &**ranker;
        let from = Sources { table, n_items: *n_items, widths: *widths };
        let n_rows = batch.n_requests * batch.width;
        let words = |input: &InputRows| n_rows * input.n_values * input.kind.words();
        for (input, rows) in inputs.iter().zip(&mut *rows) {
            stream.assemble_rows(batch, &from, input, rows.part_mut(0..words(input)))?;
        }
        let parts: SmallVec<[Part<'_, u32>; 8]> =
            inputs.iter().zip(&*rows).map(|(input, rows)| rows.part(0..words(input))).collect();
        scorer.enqueue(stream, n_rows, &parts, scores.reborrow())?;
        stream.void_holes(batch, *n_items + batch.more.map_or(0, |more| more.n), scores)
    }
}
