//! Networks of products, activations and the like, compiled to fused kernels: the engine for the common rankers.
//!
//! A [`Model`] is made once and shared by all workers; each scores with a [`DenseRanker`] of its own. It scores rows of features,
//! or, where it was split, the columns that depend on candidates alone: what depends on the request is computed once per request,
//! what depends on the item lies in a table made at load.

pub(crate) mod elementwise;
pub mod kernels;
pub mod ops;
mod program;
mod split;
#[cfg(test)]
pub(crate) mod tests;

use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use super::manifest::Calibration;
use super::precision::{self, Fidelity, Report};
use super::{RankError, Ranker};
use crate::candidates::Dependence;
use crate::index::Kernel;
use kernels::{Precision, Table};
use ops::Graph;
use program::{Given, Plan, Program, Ranges, Scratch};
pub use program::{LEAST_INPUTS, places};
use split::Split;

/// Items whose part of a table is computed at a time.
const TABLE_ROWS: usize = 4096;
/// Fewer multiplications and additions per row than this are not worth rounding for.
const LEAST_FLOPS: usize = 16_384;

/// The columns of all items that depend on nothing else, for the table.
pub trait Items: Sync {
    /// How many items there are.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Replaces `out` by the columns of these items, `[rows, columns]`, in the order of inputs and of columns therein.
    fn fill(&self, rows: Range<u32>, out: &mut Vec<f32>);
}

/// A request to measure a model with.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    /// `[n, width]` for each input.
    pub inputs: Vec<Vec<f32>>,
    /// Item rows, `[n]`; may be empty where nothing is known of items.
    pub rows: Vec<u32>,
}

/// What a model can know of where it is to serve.
#[derive(Default)]
pub struct Setting<'a> {
    /// Of every input, what each column depends on; empty: the model is not split.
    pub columns: Vec<Vec<Dependence>>,
    /// For a table of what depends on items.
    pub items: Option<&'a dyn Items>,
    /// Largest table, in bytes.
    pub table_bytes: usize,
    /// Requests as they come.
    pub samples: Vec<Sample>,
}

/// A compiled model; immutable.
pub struct Model {
    name: String,
    /// As it was given; other back ends begin with it.
    graph: Graph,
    whole: Program,
    split: Option<SplitModel>,
    report: Report,
}

/// A model in parts.
struct SplitModel {
    /// What `candidate` was compiled from.
    graph: Graph,
    request: Program,
    candidate: Program,
    table: Option<Arc<Table>>,
    /// What makes a row of the table, where there is one.
    item: Option<ItemPart>,
    /// Where the pieces that the request gives lie, and how wide all are.
    shared: (Vec<usize>, usize),
    shared_widths: Vec<usize>,
    /// What each column is taken for: items' are candidates' where there is no table.
    columns: Vec<Vec<Dependence>>,
}

/// What makes a row of a table from the columns of an item.
struct ItemPart {
    program: Program,
    /// Where its pieces lie in a row, how wide each is, and all are.
    starts: Vec<usize>,
    widths: Vec<usize>,
    width: usize,
}

impl ItemPart {
    fn new(split: &Split, kernel: Kernel) -> Self {
        let widths = split.candidate.item_widths.clone();
        let (starts, width) = places(&widths);
        ItemPart { program: Program::compile(&split.item, Plan::f32(kernel)), starts, widths, width }
    }

    /// Hands over the row, the place in it and the values of each piece of `n` rows.
    fn run(&self, scratch: &mut Scratch, columns: &[f32], n: usize, mut put: impl FnMut(usize, usize, &[f32])) {
        self.program.run(scratch, &[columns], Given::default(), n, |block, n, of| {
            for (at, (&start, &width)) in self.starts.iter().zip(&self.widths).enumerate() {
                (0..n).for_each(|row| put(block + row, start, of(at).floats(row, width)));
            }
        });
    }
}

impl Model {
    /// Compiles `graph`, which has one output of one column, at the precision that `calibration` asks for where the samples allow.
    pub fn new(name: &str, graph: &Graph, calibration: &Calibration, setting: &Setting<'_>, kernel: Kernel) -> Self {
        Self::with(name, graph, calibration, setting, kernel, Precision::is_native)
    }

    /// In f32, whole.
    pub fn plain(name: &str, graph: &Graph, kernel: Kernel) -> Self {
        let calibration = Calibration { precision: precision::Wanted::F32, ..Calibration::default() };
        Self::new(name, graph, &calibration, &Setting::default(), kernel)
    }

    fn with(
        name: &str,
        graph: &Graph,
        calibration: &Calibration,
        setting: &Setting<'_>,
        kernel: Kernel,
        is_native: impl Fn(Precision) -> bool,
    ) -> Self {
        let whole = Program::compile(graph, Plan::f32(kernel));
        let mut model =
            Model { name: name.to_owned(), graph: graph.clone(), whole, split: None, report: Report::dense() };
        let reference = model.scores(&setting.samples);
        let mut parts = Parts::new(graph, setting);
        let wanted = match model.whole.flops() {
            flops if flops < LEAST_FLOPS && calibration.precision == precision::Wanted::Auto => &[][..],
            _ => calibration.precision.trials(),
        };
        let trials: Vec<Precision> = wanted.iter().copied().filter(|&p| is_native(p)).collect();
        let ranges = (!trials.is_empty()).then(|| observe(graph, kernel, &setting.samples));
        for trial in trials {
            let plan = Plan { precision: trial, ranges: ranges.as_ref(), ..Plan::f32(kernel) };
            let rounded = Model {
                name: name.to_owned(),
                graph: graph.clone(),
                whole: Program::compile(graph, plan),
                split: parts.as_mut().and_then(|parts| parts.build(trial, setting, kernel)),
                report: Report::dense(),
            };
            if rounded.whole.quantised() == 0.0 {
                continue;
            }
            let fidelity = rounded.fidelity(&setting.samples, &reference);
            model.report.tried.push((trial, fidelity));
            if fidelity.ndcg >= f64::from(calibration.min_ndcg) {
                let tried = std::mem::take(&mut model.report.tried);
                model = rounded;
                model.report.tried = tried;
                model.report.precision = trial;
                break;
            }
        }
        if model.report.precision == Precision::F32 {
            model.split = parts.as_mut().and_then(|parts| parts.build(Precision::F32, setting, kernel));
            // The parts sum up in another order, no more; anything else would be a defect here.
            if model.split.is_some() && model.fidelity(&setting.samples, &reference).error > 1e-3 {
                tracing::error!(ranker = name, "the parts of the model do not add up to it; it is computed whole");
                model.split = None;
            }
        }
        model.report.kernel = kernel;
        model.report.samples = (setting.samples.len(), reference.iter().map(Vec::len).sum());
        model.report.split = model.split.is_some();
        let table = model.split.as_ref().and_then(|split| split.table.as_ref());
        model.report.table_bytes = table.map_or(0, |table| table.n_bytes());
        model
    }

    /// How it is computed, and what that costs in fidelity.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// Of every input, what each column is to be filled for by [`DenseRanker::score_split`]; `None` where it is not split.
    pub fn columns(&self) -> Option<&[Vec<Dependence>]> {
        self.split.as_ref().map(|split| &split.columns[..])
    }

    /// What is computed of every candidate, for other back ends: the candidates' part of a model that is split, else all of it.
    pub fn candidate_graph(&self) -> &Graph {
        self.split.as_ref().map_or(&self.graph, |split| &split.graph)
    }

    /// The pieces that items give to [`Self::candidate_graph`], where it reads any.
    pub fn table(&self) -> Option<&Table> {
        self.split.as_ref().and_then(|split| split.table.as_deref())
    }

    /// Values that a request gives to [`Self::candidate_graph`]: see [`DenseRanker::share`].
    pub fn shared_width(&self) -> usize {
        self.split.as_ref().map_or(0, |split| split.shared.1)
    }

    /// Multiplications and additions per row: of the whole model, of a candidate where it is split.
    pub fn flops(&self) -> (usize, usize) {
        let whole = self.whole.flops();
        (whole, self.split.as_ref().map_or(whole, |split| split.candidate.flops()))
    }

    /// Scores of whole samples.
    fn scores(&self, samples: &[Sample]) -> Vec<Vec<f32>> {
        let mut scratch = self.whole.scratch();
        samples
            .iter()
            .map(|sample| {
                let mut scores = Vec::new();
                whole(&self.whole, &mut scratch, &sample.inputs, &mut scores);
                scores
            })
            .collect()
    }

    /// How near this model's scores are to the reference's, over all ways in which it scores.
    fn fidelity(&self, samples: &[Sample], reference: &[Vec<f32>]) -> Fidelity {
        let mut fidelity = Fidelity::of(reference, &self.scores(samples));
        if let Some(split) = &self.split {
            let (mut request, mut candidate) = (split.request.scratch(), split.candidate.scratch());
            let scores: Vec<Vec<f32>> = samples
                .iter()
                .map(|sample| {
                    let (one, each) = (split.of_request(sample), split.of_candidates(sample));
                    let (mut shared, mut scores) = (Vec::new(), Vec::new());
                    let (scratch, table) = ((&mut request, &mut candidate, &mut shared), split.table.as_deref());
                    split.score(scratch, &one, (table, &sample.rows), &each, &mut scores);
                    scores
                })
                .collect();
            fidelity = fidelity.worse(Fidelity::of(reference, &scores));
        }
        fidelity
    }
}

/// The ranges of all values in f32.
fn observe(graph: &Graph, kernel: Kernel, samples: &[Sample]) -> Ranges {
    let program = Program::compile(graph, Plan { keep: true, ..Plan::f32(kernel) });
    let (mut scratch, mut ranges) = (program.scratch(), Ranges::new());
    for sample in samples {
        let inputs: Vec<&[f32]> = sample.inputs.iter().map(Vec::as_slice).collect();
        program.observe(&mut scratch, &inputs, Given::default(), n_rows(&program, &sample.inputs), &mut ranges);
    }
    ranges
}

fn n_rows(program: &Program, inputs: &[Vec<f32>]) -> usize {
    let rows = inputs.iter().zip(program.inputs()).map(|(values, width)| values.len() / width.max(&1));
    rows.max().unwrap_or(0)
}

fn whole(program: &Program, scratch: &mut Scratch, inputs: &[Vec<f32>], scores: &mut Vec<f32>) {
    let n = n_rows(program, inputs);
    let mut rows = [&[][..]; MOST_INPUTS];
    rows.iter_mut().zip(inputs).for_each(|(rows, input)| *rows = input);
    program.run(scratch, &rows[..inputs.len()], Given::default(), n, |_, n, of| {
        scores.extend((0..n).map(|at| of(0).floats(at, 1)[0]));
    });
}

/// Inputs of a model; one with more is not recognised.
pub const MOST_INPUTS: usize = 16;

/// A model being split: what is the same for all precisions is made once.
struct Parts {
    split: Split,
    columns: Vec<Vec<Dependence>>,
    ranges: Option<Ranges>,
    tables: Vec<Arc<Table>>,
    has_items: bool,
}

impl Parts {
    /// `None` where splitting gains nothing: all depends on candidates, or on one thing alone.
    fn new(graph: &Graph, setting: &Setting<'_>) -> Option<Self> {
        let mut columns = setting.columns.clone();
        let any = |columns: &[Vec<Dependence>], what| columns.iter().flatten().any(|c| *c == what);
        if columns.is_empty() {
            return None;
        }
        let mut split = split::split(graph, &columns);
        let bytes = |split: &Split, n: usize| Table::bytes(n, places(&split.candidate.item_widths).1, Precision::F32);
        let fits = setting.items.is_some_and(|items| bytes(&split, items.len()) <= setting.table_bytes);
        if any(&columns, Dependence::Item) && !fits {
            for column in columns.iter_mut().flatten().filter(|c| **c == Dependence::Item) {
                *column = Dependence::Candidate;
            }
            split = split::split(graph, &columns);
        }
        if !any(&columns, Dependence::Request) && !any(&columns, Dependence::Item) {
            return None;
        }
        let has_items = !split.candidate.item_widths.is_empty();
        Some(Parts { split, columns, ranges: None, tables: Vec::new(), has_items })
    }

    /// The parts at a precision; `None` where a sample lacks what it needs.
    fn build(&mut self, precision: Precision, setting: &Setting<'_>, kernel: Kernel) -> Option<SplitModel> {
        let stored = if precision == Precision::F32 { Precision::F32 } else { Precision::Bf16 };
        let table = match (self.has_items, setting.items) {
            (true, Some(items)) => Some(self.table(items, stored, kernel)),
            (true, None) => return None,
            _ => None,
        };
        let model = |program: Program, columns: &[Vec<Dependence>], split: &Split| SplitModel {
            graph: split.candidate.clone(),
            request: Program::compile(&split.request, Plan::f32(kernel)),
            candidate: program,
            table: table.clone(),
            item: table.is_some().then(|| ItemPart::new(split, kernel)),
            shared: places(&split.candidate.shared_widths),
            shared_widths: split.candidate.shared_widths.clone(),
            columns: columns.to_vec(),
        };
        let plan = Plan { exact_inputs: true, ..Plan::f32(kernel) };
        if precision != Precision::F32 && self.ranges.is_none() {
            let keep = Program::compile(&self.split.candidate, Plan { keep: true, ..plan });
            let observed = model(keep, &self.columns, &self.split);
            let mut ranges = Ranges::new();
            let (mut request, mut candidate) = (observed.request.scratch(), observed.candidate.scratch());
            for sample in &setting.samples {
                let (one, each) = (observed.of_request(sample), observed.of_candidates(sample));
                let mut shared = Vec::new();
                shared.resize(observed.shared.1, 0.0);
                observed.prepare(&mut request, &mut shared, &one);
                let given = observed.given(&shared, (observed.table.as_deref(), &sample.rows));
                let n = sample.rows.len();
                observed.candidate.observe(&mut candidate, &[&each], given, n, &mut ranges);
            }
            self.ranges = Some(ranges);
        }
        let plan = Plan { precision, ranges: self.ranges.as_ref(), ..plan };
        Some(model(Program::compile(&self.split.candidate, plan), &self.columns, &self.split))
    }

    /// The table in a precision, made on all cores at the first call.
    fn table(&mut self, items: &dyn Items, precision: Precision, kernel: Kernel) -> Arc<Table> {
        if let Some(table) = self.tables.iter().find(|table| table.precision() == precision) {
            return table.clone();
        }
        let item = ItemPart::new(&self.split, kernel);
        let mut table = Table::new(items.len(), item.width, precision);
        let mut pieces: Vec<_> = table.pieces(TABLE_ROWS).collect();
        pieces.par_iter_mut().enumerate().for_each_init(
            || (item.program.scratch(), Vec::new()),
            |(scratch, columns), (piece, rows)| {
                let first = piece * TABLE_ROWS;
                let n = TABLE_ROWS.min(items.len() - first);
                items.fill(first as u32..(first + n) as u32, columns);
                item.run(scratch, columns, n, |row, start, values| rows.write(row, start, values));
            },
        );
        drop(pieces);
        let table = Arc::new(table);
        // One at a time: it may be most of the memory.
        self.tables = vec![table.clone()];
        table
    }
}

impl SplitModel {
    /// The columns of a whole sample that its request gives, in order.
    fn of_request(&self, sample: &Sample) -> Vec<f32> {
        self.pick(sample, Dependence::Request, 1)
    }

    /// Those of its candidates, `[n, columns]`.
    fn of_candidates(&self, sample: &Sample) -> Vec<f32> {
        self.pick(sample, Dependence::Candidate, sample.rows.len())
    }

    fn pick(&self, sample: &Sample, what: Dependence, n: usize) -> Vec<f32> {
        let mut picked = Vec::new();
        for row in 0..n {
            for (values, columns) in sample.inputs.iter().zip(&self.columns) {
                let line = values.iter().skip(row * columns.len()).zip(columns);
                picked.extend(line.filter(|(_, column)| **column == what).map(|(value, _)| value));
            }
        }
        picked
    }

    /// Computes what is the same for all candidates, and leaves what lies between the pieces.
    fn prepare(&self, scratch: &mut Scratch, shared: &mut [f32], request: &[f32]) {
        let (starts, widths) = (&self.shared.0, &self.shared_widths);
        self.request.run(scratch, &[request], Given::default(), 1, |_, _, of| {
            for (at, &start) in starts.iter().enumerate() {
                let width = widths[at];
                shared[start..start + width].copy_from_slice(of(at).floats(0, width));
            }
        });
    }

    fn given<'a>(&self, shared: &'a [f32], (table, rows): (Option<&'a Table>, &'a [u32])) -> Given<'a> {
        Given { items: table.map(|table| (table, rows)), shared }
    }

    fn score(
        &self,
        (first, second, shared): (&mut Scratch, &mut Scratch, &mut Vec<f32>),
        request: &[f32],
        items: (Option<&Table>, &[u32]),
        candidates: &[f32],
        scores: &mut Vec<f32>,
    ) {
        shared.resize(self.shared.1, 0.0);
        self.prepare(first, shared, request);
        self.candidate.run(second, &[candidates], self.given(shared, items), items.1.len(), |_, n, of| {
            scores.extend((0..n).map(|at| of(0).floats(at, 1)[0]));
        });
    }
}

/// A worker's own view of a [`Model`]: what it computes in. Scoring allocates nothing once `scores` is long enough.
pub struct DenseRanker {
    model: Arc<Model>,
    whole: Scratch,
    request: Scratch,
    candidate: Scratch,
    item: Scratch,
    shared: Vec<f32>,
}

impl DenseRanker {
    /// Buffers for a model, which is run once.
    pub fn new(model: Arc<Model>) -> Self {
        let (request, candidate) = match &model.split {
            Some(split) => (split.request.scratch(), split.candidate.scratch()),
            None => Default::default(),
        };
        let part = model.split.as_ref().and_then(|split| split.item.as_ref());
        let item = part.map(|part| part.program.scratch()).unwrap_or_default();
        DenseRanker { whole: model.whole.scratch(), request, candidate, item, shared: Vec::new(), model }
    }

    /// The model.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// Scores the items `rows` from the columns that [`Model::columns`] classes under the request, one row, and under
    /// candidates, `[rows, columns]`, each in the order of inputs and of columns therein. Equals [`Ranker::score`] up to rounding.
    ///
    /// # Errors
    /// A model that is not split, columns of another number, a row that the table does not have; `scores` is then empty.
    pub fn score_split(
        &mut self,
        request: &[f32],
        rows: &[u32],
        candidates: &[f32],
        scores: &mut Vec<f32>,
    ) -> Result<(), RankError> {
        scores.clear();
        let wrong = |reason: String| RankError { ranker: self.model.name.clone(), reason };
        let Some(split) = &self.model.split else { return Err(wrong("the model is not split".to_owned())) };
        let (one, each) = (split.request.inputs()[0], split.candidate.inputs()[0]);
        if request.len() != one || candidates.len() != each * rows.len() {
            let (got, n) = ((request.len(), candidates.len()), rows.len());
            return Err(wrong(format!("{} and {} values for {one} and {n} x {each}", got.0, got.1)));
        }
        if let Some(table) = &split.table
            && let Some(row) = rows.iter().find(|row| **row as usize >= table.n_rows())
        {
            return Err(wrong(format!("no item {row} in a table of {}", table.n_rows())));
        }
        let scratch = (&mut self.request, &mut self.candidate, &mut self.shared);
        split.score(scratch, request, (split.table.as_deref(), rows), candidates, scores);
        Ok(())
    }

    /// Computes what the columns of a request, in order of inputs and of columns therein, give to all candidates: `[shared width]`, each
    /// piece where [`places`] says and zeros between. Nothing for a model that is not split.
    ///
    /// # Errors
    /// Columns or room of another number; `out` is then as it was.
    pub fn share(&mut self, request: &[f32], out: &mut [f32]) -> Result<(), RankError> {
        let one = self.model.split.as_ref().map_or(0, |split| split.request.inputs()[0]);
        let width = self.model.shared_width();
        if request.len() != one || out.len() != width {
            let reason = format!("{} and {} values for {one} and {width}", request.len(), out.len());
            return Err(RankError { ranker: self.model.name.clone(), reason });
        }
        out.fill(0.0);
        if let Some(split) = &self.model.split {
            split.prepare(&mut self.request, out, request);
        }
        Ok(())
    }

    /// Whether there is a table of what depends on items.
    pub fn has_table(&self) -> bool {
        self.model.split.as_ref().is_some_and(|split| split.item.is_some())
    }

    /// What the table would have of an item with these columns, in f32; empty where there is no table, or for columns of another number.
    pub fn line(&mut self, columns: &[f32]) -> Box<[f32]> {
        let part = self.model.split.as_ref().and_then(|split| split.item.as_ref());
        let Some(part) = part.filter(|part| part.program.inputs()[0] == columns.len()) else { return Box::default() };
        let mut line = vec![0.0; part.width];
        part.run(&mut self.item, columns, 1, |_, start, values| {
            line[start..start + values.len()].copy_from_slice(values);
        });
        line.into()
    }

    /// As [`Self::score_split`], of items that the table does not have: of each what [`Self::line`] gives.
    ///
    /// # Errors
    /// A model without a table, values of another number; `scores` is then empty.
    pub fn score_lines(
        &mut self,
        request: &[f32],
        lines: &[&[f32]],
        candidates: &[f32],
        scores: &mut Vec<f32>,
    ) -> Result<(), RankError> {
        scores.clear();
        let wrong = |reason: &str| RankError { ranker: self.model.name.clone(), reason: reason.to_owned() };
        let split = self.model.split.as_ref().ok_or_else(|| wrong("the model is not split"))?;
        let (Some(part), Some(table)) = (&split.item, &split.table) else {
            return Err(wrong("the model has no table"));
        };
        let (one, each) = (split.request.inputs()[0], split.candidate.inputs()[0]);
        let fits = request.len() == one && candidates.len() == each * lines.len();
        if !fits || lines.iter().any(|line| line.len() != part.width) {
            return Err(wrong("values of another number"));
        }
        let mut own = Table::new(lines.len(), part.width, table.precision());
        for mut rows in own.pieces(lines.len().max(1)) {
            lines.iter().enumerate().for_each(|(row, line)| rows.write(row, 0, line));
        }
        let rows: Vec<u32> = (0..lines.len() as u32).collect();
        let scratch = (&mut self.request, &mut self.candidate, &mut self.shared);
        split.score(scratch, request, (Some(&own), &rows), candidates, scores);
        Ok(())
    }
}

impl Ranker for DenseRanker {
    fn name(&self) -> &str {
        &self.model.name
    }

    fn rows_are_independent(&self) -> bool {
        true
    }

    fn score(&mut self, inputs: &[Vec<f32>], n: usize, scores: &mut Vec<f32>) -> Result<(), RankError> {
        scores.clear();
        let wrong = |reason: String| RankError { ranker: self.model.name.clone(), reason };
        let widths = self.model.whole.inputs();
        if inputs.len() != widths.len() {
            return Err(wrong(format!("{} inputs where there are {}", inputs.len(), widths.len())));
        }
        if let Some((values, width)) = inputs.iter().zip(widths).find(|(values, width)| values.len() != n * **width) {
            return Err(wrong(format!("{} values for {n} x {width}", values.len())));
        }
        whole(&self.model.whole, &mut self.whole, inputs, scores);
        Ok(())
    }

    fn report(&self) -> Report {
        self.model.report.clone()
    }

    fn dense(&mut self) -> Option<&mut DenseRanker> {
        Some(self)
    }
}
