//! A manifest's columns, compiled to writers, and the matrix that they fill.

use std::ops::Range;
use std::sync::Arc;

use crate::candidates::{Candidates, Dependence, Source, SourceSet};
use crate::catalog::generation::{ColumnData, Generation, Roles};
use crate::catalog::live::{LiveItem, LiveItems, extend_vector};
use crate::catalog::records::{Field, Records, Value, Values};
use crate::context::nearest;
use crate::device::{Context, PlannedUser};
use crate::index::SearchScratch;

use super::history::{AHEAD, Counts, ItemColumn, Series, SeriesColumns};

/// Why a column can't be computed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("feature column `{column}`: {reason}")]
pub struct FeatureError {
    /// As the manifest names it.
    pub column: String,
    /// What is wrong, and the nearest known name.
    pub reason: String,
}

/// What the history says of a candidate through item-item lists; the collaborative source gathers it.
#[derive(Clone, Copy, Debug, Default)]
pub struct CooccurrenceSignal {
    /// Σ weight · similarity.
    pub sum: f32,
    /// Largest similarity.
    pub max: f32,
    /// Sum of the three largest.
    pub top3: f32,
    /// How many history items list the candidate.
    pub count: u32,
}

/// Appends a score per row.
pub type Dots<'a> = dyn Fn(&[u32], &mut SearchScratch, &mut Vec<f32>) + 'a;

/// What a request offers to the writers.
pub struct Inputs<'a> {
    /// Columns, embeddings.
    pub generation: &'a Generation,
    /// Items that came or changed.
    pub live: Option<&'a LiveItems>,
    /// Resolved user.
    pub user: &'a PlannedUser,
    /// Request context.
    pub context: &'a Context,
    /// Who is to be scored.
    pub candidates: &'a Candidates,
    /// Appends the item-item evidence for each row.
    pub cooccurrence: &'a dyn Fn(&[u32], &mut Vec<CooccurrenceSignal>),
    /// The metric's score of the user's vector and each row, 0 without vectors; not asked where the ANN source gave the score.
    pub dots: &'a Dots<'a>,
}

/// What a column is.
#[derive(Clone, Debug)]
pub(crate) enum Op {
    SourceScore(Source),
    SourceRank(Source),
    SourcePresent(Source),
    Dot,
    CoSum,
    CoMax,
    CoCount,
    CoMean,
    CoTop3,
    SameCreator(usize),
    SameCategory(usize),
    SameSeries,
    NextInSeries,
    SeriesGap,
    Overlap(usize),
    UserEmbedding,
    ItemEmbedding,
    UserNumber(usize),
    ItemNumber(usize),
    HistoryLength,
    Popularity,
    Context(String),
}

impl Op {
    /// What its values depend on.
    pub(crate) fn dependence(&self) -> Dependence {
        match self {
            Op::UserEmbedding | Op::UserNumber(_) | Op::HistoryLength | Op::Context(_) => Dependence::Request,
            Op::ItemEmbedding | Op::ItemNumber(_) | Op::Popularity => Dependence::Item,
            _ => Dependence::Candidate,
        }
    }

    /// The codes of items that it reads, where it reads nothing else of them but where the item stands in a series.
    pub(crate) fn field(&self, roles: &Roles) -> Option<Field> {
        match *self {
            Op::SameCreator(column) | Op::Overlap(column) => Some(Field { column, first_only: false }),
            Op::SameCategory(column) => Some(Field { column, first_only: true }),
            Op::SameSeries | Op::NextInSeries | Op::SeriesGap => {
                roles.series.map(|column| Field { column, first_only: true })
            }
            _ => None,
        }
    }
}

/// The columns of one model input.
#[derive(Clone, Debug)]
pub struct Layout {
    ops: Vec<Op>,
    /// By operation: as the manifest has it.
    names: Vec<String>,
    /// By operation: where in a record its codes are.
    fields: Vec<Option<usize>>,
    /// The operations that read records, in the order of their fields.
    recorded: Vec<Recorded>,
    dim: usize,
    width: usize,
    tables: Arc<Tables>,
}

/// An operation that reads records.
#[derive(Clone, Copy, Debug)]
struct Recorded {
    field: usize,
    /// Position of the operation.
    op: usize,
    /// Position of its value in a row.
    at: usize,
}

/// Functions that would be computed again and again: libm's logarithm costs more than the rest of a column.
#[derive(Debug)]
struct Tables {
    /// `ln(1 + n)` of small whole numbers.
    logarithms: Vec<f32>,
    /// `1 / n` of them, 0 of 0.
    reciprocals: Vec<f32>,
    /// `ln(1 + popularity)` of every item; empty where no column asks.
    popularity: Vec<f32>,
}

impl Tables {
    fn new(popularity: &[f32]) -> Self {
        Tables {
            logarithms: (0..1024).map(|n| (n as f32).ln_1p()).collect(),
            reciprocals: (0..1024).map(|n| if n == 0 { 0.0 } else { 1.0 / n as f32 }).collect(),
            popularity: popularity.iter().map(|p| p.ln_1p()).collect(),
        }
    }

    /// `1 / n`; 0 of 0.
    fn reciprocal(&self, n: u16) -> f32 {
        self.reciprocals.get(usize::from(n)).copied().unwrap_or_else(|| 1.0 / f32::from(n))
    }

    fn ln_1p(&self, n: u32) -> f32 {
        self.logarithms.get(n as usize).copied().unwrap_or_else(|| (n as f32).ln_1p())
    }
}

/// Buffers, reused from request to request.
#[derive(Debug, Default)]
pub struct FeatureScratch {
    /// By column.
    counts: Vec<Counts>,
    series: Series,
    row: Vec<f32>,
    search: SearchScratch,
    /// Candidates that the ANN source did not propose, and their scores.
    unscored: Vec<u32>,
    computed: Vec<f32>,
    /// By candidate.
    dots: Vec<f32>,
    /// By candidate.
    cooccurrence: Vec<CooccurrenceSignal>,
    /// Rows of the bundle, by candidate.
    stand_ins: Vec<u32>,
}

impl Layout {
    /// Compiles the columns that a manifest names.
    ///
    /// # Errors
    /// A column that does not exist or that the generation can't give.
    pub fn compile(columns: &[String], generation: &Generation) -> Result<Self, FeatureError> {
        let ops = columns.iter().map(|c| compile(c, generation)).collect::<Result<Vec<_>, _>>()?;
        let records = generation.records(|| fields(generation));
        let fields = ops.iter().map(|op| records.position(op.field(&generation.roles)?)).collect();
        let dim = generation.item_embeddings.as_ref().map_or(0, |m| m.dim);
        let asks = |wanted: fn(&Op) -> bool| ops.iter().any(wanted);
        let popularity = if asks(|op| matches!(op, Op::Popularity)) { &generation.popularity[..] } else { &[] };
        let tables = Arc::new(Tables::new(popularity));
        Ok(Layout::of(ops, columns.to_vec(), fields, dim, tables))
    }

    fn of(ops: Vec<Op>, names: Vec<String>, fields: Vec<Option<usize>>, dim: usize, tables: Arc<Tables>) -> Self {
        let mut width = 0;
        let mut recorded = Vec::new();
        for (op, field) in fields.iter().enumerate() {
            recorded.extend(field.map(|field| Recorded { field, op, at: width }));
            width += Self::op_width(&ops[op], dim);
        }
        recorded.sort_by_key(|r| r.field);
        Layout { ops, names, fields, recorded, dim, width, tables }
    }

    fn op_width(op: &Op, dim: usize) -> usize {
        match op {
            Op::UserEmbedding | Op::ItemEmbedding => dim,
            _ => 1,
        }
    }

    /// Values per candidate.
    pub fn width(&self) -> usize {
        self.width
    }

    /// The columns, their names, and how many values each is: an embedding is one column.
    pub(crate) fn columns(&self) -> impl Iterator<Item = (&str, &Op, usize)> {
        self.names.iter().zip(&self.ops).map(|(name, op)| (&**name, op, Self::op_width(op, self.dim)))
    }

    /// What each value depends on, `[width]`.
    pub fn dependences(&self) -> Vec<Dependence> {
        self.ops.iter().flat_map(|op| vec![op.dependence(); Self::op_width(op, self.dim)]).collect()
    }

    /// The columns of several layouts that depend on what is `wanted`, side by side.
    pub fn part(layouts: &[Layout], wanted: impl Fn(Dependence) -> bool) -> Layout {
        let columns = layouts.iter().flat_map(|l| l.ops.iter().zip(&l.names).zip(&l.fields));
        let columns = columns.filter(|((op, _), _)| wanted(op.dependence()));
        let (columns, fields): (Vec<_>, _) = columns.map(|(named, at)| (named, *at)).unzip();
        let (ops, names) = columns.into_iter().map(|(op, name)| (op.clone(), name.clone())).unzip();
        let dim = layouts.first().map_or(0, |l| l.dim);
        let informed = layouts.iter().find(|l| !l.tables.popularity.is_empty()).or(layouts.first());
        let tables = informed.map_or_else(|| Arc::new(Tables::new(&[])), |l| l.tables.clone());
        Layout::of(ops, names, fields, dim, tables)
    }

    /// Fills `out` with `[candidates, width]`, row-major.
    pub fn fill(&self, inputs: &Inputs<'_>, scratch: &mut FeatureScratch, out: &mut Vec<f32>) {
        self.fill_first(inputs.candidates.len(), inputs, scratch, out);
    }

    /// Fills `out` with `[rows, width]` of any items, for columns that depend on nothing else; others are as for nobody.
    pub fn fill_items(
        &self,
        generation: &Generation,
        rows: Range<u32>,
        scratch: &mut FeatureScratch,
        out: &mut Vec<f32>,
    ) {
        self.fill_of(generation, None, rows.collect(), scratch, out);
    }

    /// The same of one item, as it is known by now.
    pub fn fill_item(
        &self,
        generation: &Generation,
        live: &LiveItems,
        row: u32,
        scratch: &mut FeatureScratch,
        out: &mut Vec<f32>,
    ) {
        self.fill_of(generation, Some(live), vec![row], scratch, out);
    }

    fn fill_of(
        &self,
        generation: &Generation,
        live: Option<&LiveItems>,
        rows: Vec<u32>,
        scratch: &mut FeatureScratch,
        out: &mut Vec<f32>,
    ) {
        let n = rows.len();
        let mut candidates = Candidates { rows, ..Candidates::default() };
        candidates.sources.resize(n, Default::default());
        candidates.source_scores.iter_mut().for_each(|scores| scores.resize(n, 0.0));
        candidates.source_ranks.iter_mut().for_each(|ranks| ranks.resize(n, 0));
        let inputs = Inputs {
            generation,
            live,
            user: &PlannedUser::default(),
            context: &Context::default(),
            candidates: &candidates,
            cooccurrence: &|rows, out| out.resize(out.len() + rows.len(), Default::default()),
            dots: &|rows, _, out| out.resize(out.len() + rows.len(), 0.0),
        };
        self.fill(&inputs, scratch, out);
    }

    /// Fills `out` with the rows of the first `n` candidates: all, or one where the columns are the same for all.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn fill_first(&self, n: usize, inputs: &Inputs<'_>, scratch: &mut FeatureScratch, out: &mut Vec<f32>) {
        let all = &inputs.candidates.rows[..n];
        out.clear();
        out.resize(all.len() * self.width, 0.0);
        self.prepare(inputs, scratch);
        let live = inputs.live.filter(|live| live.n_entries() > 0);
        let stand_ins = live.map(|_| self.stand_ins(inputs, all, scratch));
        let rows = stand_ins.as_deref().unwrap_or(all);
        let n_liked = inputs.user.history.iter().filter(|e| e.weight > 0.0).count().max(1) as f32;
        // Some candidates at a time: the lines that their columns share stay in the nearest cache.
        for (block, out) in out.chunks_mut(BLOCK * self.width.max(1)).enumerate() {
            let first = block * BLOCK;
            let rows = &rows[first..rows.len().min(first + BLOCK)];
            let gathered = Gathered {
                tables: &self.tables,
                counts: &scratch.counts,
                n_liked,
                series: &scratch.series,
                columns: SeriesColumns::of(inputs.generation, inputs.live),
                dots: &scratch.dots,
                cooccurrence: &scratch.cooccurrence,
            };
            if !self.recorded.is_empty() {
                let records = inputs.generation.records(|| fields(inputs.generation));
                match records.values() {
                    Values::Narrow(values) => self.fill_recorded(records, values, &gathered, rows, out),
                    Values::Wide(values) => self.fill_recorded(records, values, &gathered, rows, out),
                }
            }
            let mut at = 0;
            for (index, (op, field)) in self.ops.iter().zip(&self.fields).enumerate() {
                if field.is_none() {
                    let target = Target { out: &mut *out, width: self.width, at, first, rows };
                    fill(index, op, inputs, &gathered, &mut scratch.row, target);
                }
                at += Self::op_width(op, self.dim);
            }
            if let Some(live) = live {
                let all = &all[first..first + rows.len()];
                for (&row, line) in all.iter().zip(out.chunks_exact_mut(self.width)) {
                    if let Some(item) = live.get(row) {
                        self.fill_changed(row, item, inputs, &gathered, &mut scratch.row, line);
                    }
                }
            }
        }
        if let Some(rows) = stand_ins {
            scratch.stand_ins = rows;
        }
    }

    /// The rows, with one of the bundle in the place of each that the bundle's columns do not have; none where that has no rows.
    fn stand_ins(&self, inputs: &Inputs<'_>, rows: &[u32], scratch: &mut FeatureScratch) -> Vec<u32> {
        let n = inputs.generation.items.len() as u32;
        let mut stand_ins = std::mem::take(&mut scratch.stand_ins);
        stand_ins.clear();
        stand_ins.extend(rows.iter().map(|&row| if row < n { row } else { 0 }));
        stand_ins
    }

    /// Puts what columns read of an item that came or changed in the place of what the bundle has.
    fn fill_changed(
        &self,
        row: u32,
        item: &LiveItem,
        inputs: &Inputs<'_>,
        gathered: &Gathered<'_>,
        vector: &mut Vec<f32>,
        line: &mut [f32],
    ) {
        let generation = inputs.generation;
        let mut at = 0;
        for (index, op) in self.ops.iter().enumerate() {
            let width = Self::op_width(op, self.dim);
            let place = &mut line[at..at + width];
            at += width;
            if let Some(field) = op.field(&generation.roles) {
                let codes = item.codes(field.column);
                let codes = if field.first_only { &codes[..codes.len().min(1)] } else { codes };
                place[0] = gathered.of_codes(index, op, codes, row);
                continue;
            }
            match op {
                Op::ItemNumber(column) => {
                    let number = item.number(*column);
                    place[0] = match &generation.items.columns[*column].data {
                        ColumnData::Number { default, .. } if number.is_nan() => *default,
                        _ => number,
                    };
                }
                Op::Popularity => {
                    place[0] = gathered.tables.popularity.get(row as usize).copied().unwrap_or(0.0);
                }
                Op::ItemEmbedding => {
                    vector.clear();
                    match extend_vector(generation, inputs.live, row, vector) {
                        true => place.copy_from_slice(vector),
                        false => place.fill(0.0),
                    }
                }
                _ => {}
            }
        }
    }

    /// Fills the columns that read records.
    fn fill_recorded<V: Value>(
        &self,
        records: &Records,
        values: &[V],
        gathered: &Gathered<'_>,
        rows: &[u32],
        out: &mut [f32],
    ) {
        for ((index, &row), line) in rows.iter().enumerate().zip(out.chunks_exact_mut(self.width)) {
            records.prefetch_ahead(values, rows.get(index + AHEAD), rows.get(index + 2 * AHEAD));
            let (mut record, mut field) = (records.of(values, row), 0);
            for recorded in &self.recorded {
                while field < recorded.field {
                    record.advance();
                    field += 1;
                }
                line[recorded.at] = gathered.of_codes(recorded.op, &self.ops[recorded.op], record.codes(), row);
            }
        }
    }

    /// What columns need of the whole request.
    fn prepare(&self, inputs: &Inputs<'_>, scratch: &mut FeatureScratch) {
        let (generation, candidates, history) = (inputs.generation, inputs.candidates, &inputs.user.history[..]);
        let FeatureScratch { counts, series, search, unscored, computed, dots, cooccurrence, .. } = scratch;
        if counts.len() < self.ops.len() {
            counts.resize_with(self.ops.len(), Counts::default);
        }
        let column = |at: usize| ItemColumn::new(generation, inputs.live, at);
        for (op, counts) in self.ops.iter().zip(counts) {
            match op {
                Op::SameCreator(at) | Op::Overlap(at) => counts.gather(&column(*at), history, usize::MAX),
                Op::SameCategory(at) => counts.gather(&column(*at), history, 1),
                _ => {}
            }
        }
        if self.asks(|op| matches!(op, Op::SameSeries | Op::NextInSeries | Op::SeriesGap))
            && let Some(columns) = SeriesColumns::of(generation, inputs.live)
        {
            series.gather(&columns, history);
        }
        cooccurrence.clear();
        if self.asks(|op| matches!(op, Op::CoSum | Op::CoMax | Op::CoCount | Op::CoMean | Op::CoTop3)) {
            (inputs.cooccurrence)(&candidates.rows, cooccurrence);
        }
        dots.clear();
        if self.asks(|op| matches!(op, Op::Dot)) {
            let (scores, sources) = (&candidates.source_scores[Source::Ann as usize], &candidates.sources);
            let rows = candidates.rows.iter().zip(sources);
            unscored.clear();
            unscored.extend(rows.filter(|(_, sources)| !sources.contains(Source::Ann)).map(|(&row, _)| row));
            computed.clear();
            (inputs.dots)(unscored, search, computed);
            let mut computed = computed.iter().copied();
            let dot = |(&score, sources): (&f32, &SourceSet)| match sources.contains(Source::Ann) {
                true => score,
                false => computed.next().unwrap_or(0.0),
            };
            dots.extend(scores.iter().zip(sources).map(dot));
        }
    }

    fn asks(&self, wanted: fn(&Op) -> bool) -> bool {
        self.ops.iter().any(wanted)
    }
}

/// Candidates whose columns are filled together.
const BLOCK: usize = 128;

/// One column of a block of candidates.
struct Target<'a> {
    /// `[rows, width]`
    out: &'a mut [f32],
    width: usize,
    at: usize,
    /// Place of the block's first candidate among all.
    first: usize,
    rows: &'a [u32],
}

impl Target<'_> {
    /// Writes a value per candidate, given its row, each from its place in `column`.
    fn each_of(self, column: &ColumnData, value: impl Fn(u32) -> f32) {
        let rows = self.rows;
        for ((index, &row), line) in rows.iter().enumerate().zip(self.out.chunks_exact_mut(self.width)) {
            column.prefetch_ahead(rows.get(index + AHEAD).copied(), rows.get(index + 2 * AHEAD).copied());
            line[self.at] = value(row);
        }
    }

    /// Writes a value per candidate, made of what `all` has for it; `all` is by candidate.
    fn each<T>(self, all: &[T], value: impl Fn(&T) -> f32) {
        let block = &all[self.first..self.first + self.rows.len()];
        self.put(block.iter().map(value));
    }

    /// Writes the same for every candidate.
    fn fill(self, value: f32) {
        self.put(std::iter::repeat(value));
    }

    fn put(self, values: impl Iterator<Item = f32>) {
        for (line, value) in self.out.chunks_exact_mut(self.width).zip(values) {
            line[self.at] = value;
        }
    }
}

/// What was gathered for the whole request.
struct Gathered<'a> {
    tables: &'a Tables,
    /// By operation.
    counts: &'a [Counts],
    /// How many entries of the history are liked, at least 1.
    n_liked: f32,
    series: &'a Series,
    columns: Option<SeriesColumns<'a>>,
    dots: &'a [f32],
    cooccurrence: &'a [CooccurrenceSignal],
}

impl Gathered<'_> {
    /// The value of an operation (the one at `index`) that has a field, from the item's codes.
    #[inline(always)]
    fn of_codes<V: Value>(&self, index: usize, op: &Op, codes: &[V], row: u32) -> f32 {
        let counts = &self.counts[index].by_code;
        let count = |&code: &V| counts[code.into() as usize];
        let position = || self.columns.as_ref().map_or(f32::NAN, |columns| columns.position(row));
        let series = || codes.first().and_then(|&code| self.series.of(code.into()));
        match op {
            Op::SameCreator(_) => self.tables.ln_1p(V::sum(counts, codes)),
            Op::SameCategory(_) => codes.first().map_or(0.0, |code| count(code) as f32 / self.n_liked),
            Op::Overlap(_) => V::sum(counts, codes) as f32 / (self.n_liked * codes.len().max(1) as f32),
            Op::SameSeries => series().map_or(0.0, |s| self.tables.ln_1p(s.n_liked)),
            Op::NextInSeries => series().map_or(0.0, |s| {
                let gap = position() - s.position;
                if gap > 0.0 && gap <= 1.0 { 1.0 } else { 0.0 }
            }),
            Op::SeriesGap => {
                let gap = series().map_or(0.0, |s| position() - s.position);
                if gap.is_nan() { 0.0 } else { gap.clamp(-10.0, 10.0) }
            }
            _ => 0.0,
        }
    }
}

/// The fields that the generation's rankers ask for.
fn fields(generation: &Generation) -> Vec<Field> {
    let columns = generation.rankers.iter().flat_map(|r| &r.manifest.inputs).flat_map(|input| &input.columns);
    columns.filter_map(|column| compile(column, generation).ok()?.field(&generation.roles)).collect()
}

fn fill(
    index: usize,
    op: &Op,
    inputs: &Inputs<'_>,
    gathered: &Gathered<'_>,
    vector: &mut Vec<f32>,
    target: Target<'_>,
) {
    let Inputs { generation, user, context, candidates, .. } = inputs;
    let history = &user.history[..];
    let Gathered { tables, dots, cooccurrence, .. } = gathered;
    let column = |at: usize| &generation.items.columns[at].data;
    match op {
        Op::SourceScore(source) => {
            target.each(&candidates.source_scores[*source as usize], |&score| score);
        }
        Op::SourceRank(source) => {
            target.each(&candidates.source_ranks[*source as usize], |&rank| tables.reciprocal(rank));
        }
        Op::SourcePresent(source) => {
            target.each(&candidates.sources, |sources| f32::from(u8::from(sources.contains(*source))));
        }
        Op::Dot => target.each(dots, |&dot| dot),
        Op::CoSum => target.each(cooccurrence, |s| s.sum),
        Op::CoMax => target.each(cooccurrence, |s| s.max),
        Op::CoCount => target.each(cooccurrence, |s| tables.ln_1p(s.count)),
        Op::CoMean => target.each(cooccurrence, |s| s.sum / s.count.max(1) as f32),
        Op::CoTop3 => target.each(cooccurrence, |s| s.top3),
        Op::SameCreator(_)
        | Op::SameCategory(_)
        | Op::Overlap(_)
        | Op::SameSeries
        | Op::NextInSeries
        | Op::SeriesGap => {
            let Some(field) = op.field(&generation.roles) else { return };
            let column = column(field.column);
            target.each_of(column, |row| gathered.of_codes(index, op, column.codes(row), row));
        }
        Op::UserEmbedding => {
            if !user.vector.is_empty() {
                for line in target.out.chunks_exact_mut(target.width) {
                    line[target.at..target.at + user.vector.len()].copy_from_slice(&user.vector);
                }
            }
        }
        Op::ItemEmbedding => {
            let Some(matrix) = &generation.item_embeddings else { return };
            for (&row, line) in target.rows.iter().zip(target.out.chunks_exact_mut(target.width)) {
                vector.clear();
                matrix.extend_row(row, vector);
                line[target.at..target.at + matrix.dim].copy_from_slice(vector);
            }
        }
        Op::UserNumber(at) => {
            let value = match (&generation.users.columns[*at].data, user.number(*at), user.row) {
                (_, Some(value), _) if !value.is_nan() => value,
                (data, None, Some(row)) => data.number(row).unwrap_or(0.0),
                (ColumnData::Number { default, .. }, ..) => *default,
                _ => 0.0,
            };
            target.fill(value);
        }
        Op::ItemNumber(at) => {
            let data = column(*at);
            target.each_of(data, |row| data.number(row).unwrap_or(0.0));
        }
        Op::HistoryLength => {
            let value = (history.len() as f32).ln_1p();
            target.fill(value);
        }
        Op::Popularity => {
            let rows = target.rows;
            target.put(rows.iter().map(|&row| tables.popularity.get(row as usize).copied().unwrap_or(0.0)));
        }
        Op::Context(key) => {
            let value = context.get(key).and_then(|v| v.parse::<f32>().ok()).filter(|v| v.is_finite()).unwrap_or(0.0);
            target.fill(value);
        }
    }
}

fn compile(name: &str, generation: &Generation) -> Result<Op, FeatureError> {
    let wrong = |reason: String| FeatureError { column: name.to_owned(), reason };
    let roles = generation.roles;
    let cross = [
        ("cross.dot", Op::Dot),
        ("cross.cooccurrence_sum", Op::CoSum),
        ("cross.cooccurrence_max", Op::CoMax),
        ("cross.cooccurrence_count", Op::CoCount),
        ("cross.cooccurrence_mean", Op::CoMean),
        ("cross.cooccurrence_top3", Op::CoTop3),
        ("user.embedding", Op::UserEmbedding),
        ("item.embedding", Op::ItemEmbedding),
        ("user.history_length", Op::HistoryLength),
        ("item.popularity", Op::Popularity),
    ];
    let positioned = roles.series.and(roles.series_position);
    let with_role = [
        ("cross.same_creator", "items.creator", roles.creator.map(Op::SameCreator)),
        ("cross.same_category", "items.category", roles.category.map(Op::SameCategory)),
        ("cross.same_series", "items.series", roles.series.map(|_| Op::SameSeries)),
        ("cross.next_in_series", "items.series_position", positioned.map(|_| Op::NextInSeries)),
        ("cross.series_gap", "items.series_position", positioned.map(|_| Op::SeriesGap)),
    ];
    if let Some((_, op)) = cross.iter().find(|(known, _)| *known == name) {
        return match op {
            Op::UserEmbedding | Op::ItemEmbedding if generation.item_embeddings.is_none() => {
                Err(wrong("the dataset has no embeddings".into()))
            }
            op => Ok(op.clone()),
        };
    }
    if let Some((_, what, op)) = with_role.iter().find(|(known, ..)| *known == name) {
        return op.clone().ok_or_else(|| wrong(format!("the dataset has no {what}")));
    }
    for source in Source::ALL {
        let prefix = format!("candidate.{}.", source.name());
        match name.strip_prefix(&prefix) {
            Some("score") => return Ok(Op::SourceScore(source)),
            Some("rank") => return Ok(Op::SourceRank(source)),
            Some("present") => return Ok(Op::SourcePresent(source)),
            _ => {}
        }
    }
    let number = |of: &str, columns: &[crate::catalog::generation::Column], column: &str| {
        let Some(at) = columns.iter().position(|c| c.name == column) else {
            let hint = nearest(column, columns.iter().map(|c| c.name.as_str()));
            let hint = hint.map(|n| format!("; did you mean `{of}.{n}`?")).unwrap_or_default();
            return Err(wrong(format!("no {of} column `{column}`{hint}")));
        };
        match &columns[at].data {
            ColumnData::Number { .. } => Ok(at),
            _ => Err(wrong(format!("`{column}` holds strings; as a feature, use cross.overlap.{column}"))),
        }
    };
    if let Some(column) = name.strip_prefix("cross.overlap.") {
        return match generation.items.column_index(column) {
            Some(at) if generation.items.columns[at].data.vocabulary().is_some() => Ok(Op::Overlap(at)),
            Some(_) => Err(wrong(format!("`{column}` holds numbers"))),
            None => Err(wrong(format!("no item column `{column}`"))),
        };
    }
    if let Some(column) = name.strip_prefix("user.") {
        return number("user", &generation.users.columns, column).map(Op::UserNumber);
    }
    if let Some(column) = name.strip_prefix("item.") {
        return number("item", &generation.items.columns, column).map(Op::ItemNumber);
    }
    match name.strip_prefix("context.") {
        Some(key) if !key.is_empty() => Ok(Op::Context(key.to_owned())),
        _ => {
            let known = cross.iter().map(|c| c.0).chain(with_role.iter().map(|c| c.0));
            let hint = nearest(name, known).map(|n| format!("; did you mean `{n}`?")).unwrap_or_default();
            Err(wrong(format!("unknown{hint}")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::generation::{Interaction, NO_CODE, RankerModel, testing};
    use crate::ranking::manifest::{RankerInput, RankerManifest};
    use proptest::prelude::*;

    fn history(rows: &[u32]) -> Vec<Interaction> {
        rows.iter().map(|&row| Interaction { row, weight: 1.0 }).collect()
    }

    fn matrix(generation: &Generation, columns: &[&str], user: &PlannedUser, rows: &[u32]) -> Vec<f32> {
        let columns: Vec<String> = columns.iter().map(|c| (*c).to_owned()).collect();
        let layout = Layout::compile(&columns, generation).unwrap();
        let mut candidates = Candidates { rows: rows.to_vec(), ..Candidates::default() };
        candidates.sources.resize(rows.len(), Default::default());
        candidates.sources[0].insert(Source::Ann);
        for source in 0..Source::COUNT {
            candidates.source_scores[source] = vec![0.0; rows.len()];
            candidates.source_ranks[source] = vec![0; rows.len()];
        }
        candidates.source_scores[0][0] = 0.75;
        candidates.source_ranks[0][0] = 4;
        let mut context = Context::default();
        context.assign(&[("hour", "13"), ("place", "home")]);
        let inputs = Inputs {
            generation,
            live: None,
            user,
            context: &context,
            candidates: &candidates,
            cooccurrence: &|rows, out| {
                out.extend(rows.iter().map(|&row| CooccurrenceSignal {
                    sum: row as f32,
                    max: 0.5,
                    top3: 0.9,
                    count: 2,
                }));
            },
            dots: &|rows, _, out| out.extend(rows.iter().map(|&row| -(row as f32))),
        };
        let mut out = Vec::new();
        let mut scratch = FeatureScratch::default();
        layout.fill(&inputs, &mut scratch, &mut out);
        layout.fill(&inputs, &mut scratch, &mut out);
        out
    }

    #[test]
    fn values_by_hand() {
        let mut generation = testing::with_embeddings(vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], 2);
        testing::add_category(&mut generation, "genre", &[0, 1, 0, 0]);
        testing::add_category(&mut generation, "series", &[0, 0, 0, 1]);
        testing::add_number(&mut generation, "position", &[1.0, 2.0, 4.0, 1.0]);
        generation.roles.creator = Some(0);
        generation.roles.series = Some(1);
        generation.roles.series_position = Some(2);
        generation.popularity = vec![0.0, 1.0, 0.0, 0.0].into();
        let user = PlannedUser {
            vector: vec![9.0, 8.0],
            history: history(&[0, 3]),
            seen: vec![0, 3],
            ..PlannedUser::default()
        };
        let get = |column: &str| matrix(&generation, &[column], &user, &[1, 2]);
        assert_eq!(get("candidate.ann.score"), [0.75, 0.0]);
        assert_eq!(get("candidate.ann.rank"), [0.25, 0.0]);
        assert_eq!(get("candidate.ann.present"), [1.0, 0.0]);
        assert_eq!(get("cross.dot"), [0.75, -2.0], "the ann source proposed the first, and its score is the dot");
        assert_eq!(get("cross.cooccurrence_mean"), [0.5, 1.0]);
        assert_eq!(get("cross.same_category"), [0.0, 1.0]);
        assert_eq!(get("cross.same_creator"), [0.0, 2f32.ln_1p()]);
        assert_eq!(get("cross.same_series"), [1f32.ln_1p(), 1f32.ln_1p()]);
        assert_eq!(get("cross.next_in_series"), [1.0, 0.0]);
        assert_eq!(get("cross.series_gap"), [1.0, 3.0]);
        assert_eq!(get("cross.overlap.genre"), [0.0, 1.0]);
        assert_eq!(get("item.position"), [2.0, 4.0]);
        assert_eq!(get("item.popularity"), [1f32.ln_1p(), 0.0]);
        assert_eq!(get("user.history_length"), [2f32.ln_1p(); 2]);
        assert_eq!(get("context.hour"), [13.0; 2]);
        assert_eq!(get("context.place"), [0.0; 2]);
        let wide = matrix(&generation, &["user.embedding", "cross.dot", "item.embedding"], &user, &[1, 2]);
        assert_eq!(wide, [9.0, 8.0, 0.75, 3.0, 4.0, 9.0, 8.0, -2.0, 5.0, 6.0]);
    }

    #[test]
    fn records_give_what_columns_give() {
        let made = |ranked: &[&str]| {
            let mut generation = testing::plain(300);
            let tags: Vec<Vec<u32>> =
                (0..300).map(|row| (0..row % 7).map(|at| (row * 3 + at * 5) % 40).collect()).collect();
            testing::add_tags(&mut generation, "tags", &tags);
            let series = |row: u32| if row.is_multiple_of(3) { NO_CODE } else { row % 11 };
            testing::add_category(&mut generation, "series", &(0..300).map(series).collect::<Vec<_>>());
            testing::add_number(&mut generation, "position", &(0..300).map(|row| (row % 5) as f32).collect::<Vec<_>>());
            generation.roles = Roles {
                category: Some(0),
                creator: Some(0),
                series: Some(1),
                series_position: Some(2),
                ..Roles::default()
            };
            let input =
                RankerInput { columns: ranked.iter().map(|c| (*c).to_owned()).collect(), ..RankerInput::default() };
            let manifest = RankerManifest { inputs: vec![input], ..RankerManifest::default() };
            generation.rankers = vec![RankerModel { name: "main".into(), manifest, onnx: Default::default() }];
            generation
        };
        let columns = [
            "cross.overlap.tags",
            "item.position",
            "cross.series_gap",
            "cross.same_creator",
            "cross.next_in_series",
            "cross.same_category",
            "candidate.ann.rank",
            "cross.same_series",
            "cross.overlap.series",
        ];
        let user = PlannedUser {
            history: history(&(0..60).map(|at| at * 37 % 300).collect::<Vec<_>>()),
            ..Default::default()
        };
        let rows: Vec<u32> = (0..300).filter(|row| row % 4 != 1).collect();
        let get = |generation: &Generation| matrix(generation, &columns, &user, &rows);
        let want = get(&made(&[]));
        assert!(
            columns.iter().enumerate().all(|(at, _)| want.iter().skip(at).step_by(columns.len()).any(|v| *v != 0.0))
        );
        // All of them, and some: the rest then come from their columns.
        assert_eq!(get(&made(&columns)), want);
        assert_eq!(get(&made(&columns[..4])), want);
    }

    #[test]
    fn parts_hold_the_columns_of_their_kind() {
        let mut generation = testing::with_embeddings(vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 2);
        testing::add_number(&mut generation, "price", &[7.0, 8.0, 9.0]);
        generation.popularity = vec![0.0, 1.0, 2.0].into();
        let layout = |columns: &[&str]| {
            let columns: Vec<String> = columns.iter().map(|c| (*c).to_owned()).collect();
            Layout::compile(&columns, &generation).unwrap()
        };
        let whole = [
            layout(&["user.history_length", "item.embedding", "cross.dot", "context.hour"]),
            layout(&["item.price", "candidate.ann.rank", "item.popularity", "user.embedding"]),
        ];
        use Dependence::{Candidate, Item, Request};
        assert_eq!(whole[0].dependences(), [Request, Item, Item, Candidate, Request]);
        assert_eq!(whole[1].dependences(), [Item, Candidate, Item, Request, Request]);
        let width = |wanted: Dependence| Layout::part(&whole, |d| d == wanted).width();
        assert_eq!((width(Request), width(Item), width(Candidate)), (4, 4, 2));
        let part = Layout::part(&whole, |d| d == Request);
        let names: Vec<&str> = part.columns().map(|(name, ..)| name).collect();
        assert_eq!(names, ["user.history_length", "context.hour", "user.embedding"]);
        let mut out = Vec::new();
        let items = Layout::part(&whole, |d| d == Item);
        items.fill_items(&generation, 1..3, &mut FeatureScratch::default(), &mut out);
        assert_eq!(out, [3.0, 4.0, 8.0, 1f32.ln_1p(), 5.0, 6.0, 9.0, 2f32.ln_1p()]);
    }

    proptest! {
        /// As a bundle that was built with the changes would give them.
        #[test]
        fn items_that_came_or_changed_give_what_a_bundle_of_them_gives(
            before in prop::collection::vec((0u32..4, prop::collection::vec(0u32..5, 0..4), 0u8..5), 3..12),
            after in prop::collection::vec((0u32..7, prop::collection::vec(0u32..9, 0..4), 0u8..5), 0..6),
            changed in prop::collection::vec(any::<prop::sample::Index>(), 0..4),
            history in prop::collection::vec(any::<prop::sample::Index>(), 0..6), liked in any::<bool>(),
        ) {
            let mut rows = before.clone();
            for (at, row) in changed.iter().zip(&after) {
                rows[at.index(before.len())] = row.clone();
            }
            rows.extend(after.iter().skip(changed.len()).cloned());
            let made = |rows: &[(u32, Vec<u32>, u8)]| {
                let vectors = rows.iter().flat_map(|row| [row.0 as f32, f32::from(row.2)]).collect();
                let mut generation = testing::with_embeddings(vectors, 2);
                let series: Vec<u32> = rows.iter().map(|row| if row.0 == 3 { NO_CODE } else { row.0 }).collect();
                testing::add_category(&mut generation, "series", &series);
                testing::add_tags(&mut generation, "tags", &rows.iter().map(|row| row.1.clone()).collect::<Vec<_>>());
                let position = |row: &(u32, Vec<u32>, u8)| if row.2 == 4 { f32::NAN } else { f32::from(row.2) };
                testing::add_number(&mut generation, "position", &rows.iter().map(position).collect::<Vec<_>>());
                generation.roles.creator = Some(1);
                (generation.roles.series, generation.roles.series_position) = (Some(0), Some(2));
                let popularity = |row: usize| if row < before.len() { row as f32 } else { 0.0 };
                generation.popularity = (0..rows.len()).map(popularity).collect::<Vec<f32>>().into();
                generation
            };
            let (old, new) = (made(&before), made(&rows));
            let live = testing::changes(&old, &new);
            let columns = [
                "cross.same_category", "cross.same_creator", "cross.overlap.tags", "cross.overlap.series",
                "cross.same_series", "cross.next_in_series", "cross.series_gap", "item.position", "item.popularity",
                "item.embedding", "user.history_length",
            ].map(str::to_owned);
            let weight = if liked { 1.0 } else { 0.0 };
            let user = PlannedUser {
                history: history.iter().map(|at| Interaction { row: at.index(rows.len()) as u32, weight }).collect(),
                ..PlannedUser::default()
            };
            let n = rows.len();
            let mut candidates = Candidates { rows: (0..n as u32).collect(), ..Candidates::default() };
            candidates.sources.resize(n, Default::default());
            candidates.source_scores.iter_mut().for_each(|scores| scores.resize(n, 0.0));
            candidates.source_ranks.iter_mut().for_each(|ranks| ranks.resize(n, 0));
            let fill = |generation: &Generation, live: Option<&LiveItems>| {
                let inputs = Inputs {
                    generation, live, user: &user, context: &Context::default(), candidates: &candidates,
                    cooccurrence: &|rows, out| out.resize(rows.len(), Default::default()),
                    dots: &|rows, _, out| out.resize(out.len() + rows.len(), 0.0),
                };
                let mut out = Vec::new();
                Layout::compile(&columns, generation).unwrap().fill(&inputs, &mut FeatureScratch::default(), &mut out);
                out
            };
            prop_assert_eq!(fill(&old, Some(&live)), fill(&new, None));
        }
    }

    #[test]
    fn unknown_columns_are_named() {
        let mut generation = testing::plain(2);
        testing::add_number(&mut generation, "price", &[1.0, 2.0]);
        let error = |column: &str| Layout::compile(&[column.to_owned()], &generation).unwrap_err().to_string();
        assert!(error("item.prise").contains("did you mean `item.price`?"));
        assert!(error("cross.cooccurence_max").contains("did you mean `cross.cooccurrence_max`?"));
        assert!(error("cross.same_creator").contains("no items.creator"));
        assert!(error("user.embedding").contains("no embeddings"));
        assert!(error("nonsense").contains("unknown"));
    }
}
