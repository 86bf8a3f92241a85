//! A manifest's columns, compiled to writers, and the matrix that they fill.

use std::sync::Arc;

use crate::candidates::{Candidates, Source};
use crate::catalog::generation::{ColumnData, Generation, Interaction, NO_CODE};
use crate::context::nearest;
use crate::device::{Context, PlannedUser};
use crate::index::SearchScratch;

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
    /// Resolved user.
    pub user: &'a PlannedUser,
    /// Request context.
    pub context: &'a Context,
    /// Who is to be scored.
    pub candidates: &'a Candidates,
    /// Item-item evidence for a row.
    pub cooccurrence: &'a dyn Fn(u32) -> CooccurrenceSignal,
    /// The metric's score of the user's vector and each row, 0 without vectors; not asked where the ANN source gave the score.
    pub dots: &'a Dots<'a>,
}

#[derive(Clone, Debug)]
enum Op {
    SourceScore(Source),
    SourceRank(Source),
    SourcePresent(Source),
    Dot,
    CoSum,
    CoMax,
    CoCount,
    CoMean,
    CoTop3,
    SameCreator,
    SameCategory,
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

/// The columns of one model input.
#[derive(Clone, Debug)]
pub struct Layout {
    ops: Vec<Op>,
    dim: usize,
    width: usize,
    /// Whether any column speaks of item-item evidence.
    cooccurrence: bool,
    logs: Arc<Logs>,
}

/// Logarithms that would be taken again and again: libm's cost more than the rest of a column.
#[derive(Debug)]
struct Logs {
    /// `ln(1 + n)` of small whole numbers.
    of_counts: Vec<f32>,
    /// `ln(1 + popularity)` of every item; empty where no column asks.
    of_popularity: Vec<f32>,
}

impl Logs {
    fn of(&self, n: u32) -> f32 {
        self.of_counts.get(n as usize).copied().unwrap_or_else(|| (n as f32).ln_1p())
    }
}

/// Buffers, reused from request to request.
#[derive(Debug, Default)]
pub struct FeatureScratch {
    counts: Counts,
    series: Vec<(u32, f32, u32)>,
    row: Vec<f32>,
    search: SearchScratch,
    /// Candidates that the ANN source did not propose, and their scores.
    unscored: Vec<u32>,
    dots: Vec<f32>,
    /// By candidate.
    cooccurrence: Vec<CooccurrenceSignal>,
}

/// Occurrences of codes in the history.
#[derive(Debug, Default)]
struct Counts {
    by_code: Vec<u32>,
    touched: Vec<u32>,
}

impl Counts {
    fn gather<'a>(&mut self, column: &'a ColumnData, history: &[Interaction], codes: impl Fn(u32) -> &'a [u32]) {
        for code in self.touched.drain(..) {
            self.by_code[code as usize] = 0;
        }
        let n = column.vocabulary().map_or(0, |v| v.len());
        if self.by_code.len() < n {
            self.by_code.resize(n, 0);
        }
        for entry in liked(history) {
            for &code in codes(entry.row) {
                if self.by_code[code as usize] == 0 {
                    self.touched.push(code);
                }
                self.by_code[code as usize] += 1;
            }
        }
    }
}

fn liked(history: &[Interaction]) -> impl Iterator<Item = &Interaction> {
    history.iter().filter(|e| e.weight > 0.0)
}

impl Layout {
    /// Compiles the columns that a manifest names.
    ///
    /// # Errors
    /// A column that does not exist or that the generation can't give.
    pub fn compile(columns: &[String], generation: &Generation) -> Result<Self, FeatureError> {
        let ops = columns.iter().map(|c| compile(c, generation)).collect::<Result<Vec<_>, _>>()?;
        let dim = generation.item_embeddings.as_ref().map_or(0, |m| m.dim);
        let width = ops.iter().map(|op| Self::op_width(op, dim)).sum();
        let asks = |wanted: fn(&Op) -> bool| ops.iter().any(wanted);
        let cooccurrence = asks(|op| matches!(op, Op::CoSum | Op::CoMax | Op::CoCount | Op::CoMean | Op::CoTop3));
        let logs = Arc::new(Logs {
            of_counts: (0..1024).map(|n| (n as f32).ln_1p()).collect(),
            of_popularity: match asks(|op| matches!(op, Op::Popularity)) {
                true => generation.popularity.iter().map(|p| p.ln_1p()).collect(),
                false => Vec::new(),
            },
        });
        Ok(Layout { ops, dim, width, cooccurrence, logs })
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

    /// Fills `out` with `[candidates, width]`, row-major.
    pub fn fill(&self, inputs: &Inputs<'_>, scratch: &mut FeatureScratch, out: &mut Vec<f32>) {
        let n = inputs.candidates.len();
        out.clear();
        out.resize(n * self.width, 0.0);
        scratch.cooccurrence.clear();
        if self.cooccurrence {
            scratch.cooccurrence.extend(inputs.candidates.rows.iter().map(|&row| (inputs.cooccurrence)(row)));
        }
        let mut at = 0;
        for op in &self.ops {
            let width = Self::op_width(op, self.dim);
            fill(op, inputs, &self.logs, scratch, Target { out, width: self.width, at });
            at += width;
        }
    }
}

/// How many candidates ahead of its use a column's value is asked for.
const AHEAD: usize = 8;

/// One column of the matrix.
struct Target<'a> {
    out: &'a mut Vec<f32>,
    width: usize,
    at: usize,
}

impl Target<'_> {
    /// Writes a value per candidate, each from the candidate's place in `column`.
    fn each_of(self, column: &ColumnData, rows: &[u32], value: impl Fn(u32) -> f32) {
        for ((index, &row), line) in rows.iter().enumerate().zip(self.out.chunks_exact_mut(self.width)) {
            if let Some(&later) = rows.get(index + 2 * AHEAD) {
                column.prefetch_place(later);
            }
            if let Some(&soon) = rows.get(index + AHEAD) {
                column.prefetch_codes(soon);
            }
            line[self.at] = value(row);
        }
    }

    /// Writes a value per candidate.
    fn each(self, rows: &[u32], mut value: impl FnMut(usize, u32) -> f32) {
        for ((index, &row), line) in rows.iter().enumerate().zip(self.out.chunks_exact_mut(self.width)) {
            line[self.at] = value(index, row);
        }
    }
}

fn fill(op: &Op, inputs: &Inputs<'_>, logs: &Logs, scratch: &mut FeatureScratch, target: Target<'_>) {
    let Inputs { generation, user, context, candidates, dots, .. } = inputs;
    let (rows, history) = (&candidates.rows[..], &user.history[..]);
    let n_liked = liked(history).count().max(1) as f32;
    let FeatureScratch { counts, series, row: vector, cooccurrence, search, unscored, dots: computed } = scratch;
    match op {
        Op::SourceScore(source) => {
            let scores = &candidates.source_scores[*source as usize];
            target.each(rows, |at, _| scores[at]);
        }
        Op::SourceRank(source) => {
            let ranks = &candidates.source_ranks[*source as usize];
            target.each(rows, |at, _| if ranks[at] == 0 { 0.0 } else { 1.0 / f32::from(ranks[at]) });
        }
        Op::SourcePresent(source) => {
            target.each(rows, |at, _| if candidates.sources[at].contains(*source) { 1.0 } else { 0.0 });
        }
        Op::Dot => {
            let (scores, sources) = (&candidates.source_scores[Source::Ann as usize], &candidates.sources);
            unscored.clear();
            unscored.extend(rows.iter().zip(sources).filter(|(_, s)| !s.contains(Source::Ann)).map(|(&row, _)| row));
            computed.clear();
            dots(unscored, search, computed);
            let mut computed = computed.iter().copied();
            target.each(rows, |at, _| match sources[at].contains(Source::Ann) {
                true => scores[at],
                false => computed.next().unwrap_or(0.0),
            });
        }
        Op::CoSum => target.each(rows, |at, _| cooccurrence[at].sum),
        Op::CoMax => target.each(rows, |at, _| cooccurrence[at].max),
        Op::CoCount => target.each(rows, |at, _| logs.of(cooccurrence[at].count)),
        Op::CoMean => target.each(rows, |at, _| cooccurrence[at].sum / cooccurrence[at].count.max(1) as f32),
        Op::CoTop3 => target.each(rows, |at, _| cooccurrence[at].top3),
        Op::SameCreator => {
            let Some(column) = generation.roles.creator.map(|at| &generation.items.columns[at].data) else { return };
            counts.gather(column, history, |row| column.codes(row));
            target.each_of(column, rows, |row| {
                logs.of(column.codes(row).iter().map(|&code| counts.by_code[code as usize]).sum())
            });
        }
        Op::SameCategory => {
            let Some(column) = generation.roles.category.map(|at| &generation.items.columns[at].data) else { return };
            let first = |row: u32| column.codes(row).get(..1).unwrap_or_default();
            counts.gather(column, history, first);
            target.each_of(column, rows, |row| {
                first(row).first().map_or(0.0, |&code| counts.by_code[code as usize] as f32 / n_liked)
            });
        }
        Op::Overlap(at) => {
            let column = &generation.items.columns[*at].data;
            counts.gather(column, history, |row| column.codes(row));
            target.each_of(column, rows, |row| {
                let codes = column.codes(row);
                let shared: u32 = codes.iter().map(|&code| counts.by_code[code as usize]).sum();
                shared as f32 / (n_liked * codes.len().max(1) as f32)
            });
        }
        Op::SameSeries | Op::NextInSeries | Op::SeriesGap => {
            let roles = generation.roles;
            let Some(column) = roles.series.map(|at| &generation.items.columns[at].data) else { return };
            let positions = roles.series_position.map(|at| &generation.items.columns[at].data);
            let code_of = |row: u32| column.codes(row).first().copied().unwrap_or(NO_CODE);
            let position_of = |row: u32| match positions {
                Some(ColumnData::Number { values, .. }) => values[row as usize],
                _ => f32::NAN,
            };
            // Per series of the history: code, furthest position (NaN where unknown), liked entries.
            series.clear();
            for entry in history.iter().filter(|e| code_of(e.row) != NO_CODE) {
                let (code, position) = (code_of(entry.row), position_of(entry.row));
                let likes = u32::from(entry.weight > 0.0);
                match series.iter_mut().find(|s| s.0 == code) {
                    Some(known) => {
                        known.1 = known.1.max(position);
                        known.2 += likes;
                    }
                    None => series.push((code, position, likes)),
                }
            }
            series.sort_unstable_by_key(|s| s.0);
            let known = |row: u32| series.binary_search_by_key(&code_of(row), |s| s.0).ok().map(|at| series[at]);
            match op {
                Op::SameSeries => target.each(rows, |_, row| known(row).map_or(0.0, |s| logs.of(s.2))),
                Op::NextInSeries => target.each(rows, |_, row| {
                    known(row).map_or(0.0, |s| {
                        let gap = position_of(row) - s.1;
                        if gap > 0.0 && gap <= 1.0 { 1.0 } else { 0.0 }
                    })
                }),
                _ => target.each(rows, |_, row| {
                    let gap = known(row).map_or(0.0, |s| position_of(row) - s.1);
                    if gap.is_nan() { 0.0 } else { gap.clamp(-10.0, 10.0) }
                }),
            }
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
            for (&row, line) in rows.iter().zip(target.out.chunks_exact_mut(target.width)) {
                vector.clear();
                matrix.extend_row(row, vector);
                line[target.at..target.at + matrix.dim].copy_from_slice(vector);
            }
        }
        Op::UserNumber(at) => {
            let value = match (&generation.users.columns[*at].data, user.row) {
                (data, Some(row)) => data.number(row).unwrap_or(0.0),
                (ColumnData::Number { default, .. }, None) => *default,
                _ => 0.0,
            };
            target.each(rows, |_, _| value);
        }
        Op::ItemNumber(at) => {
            let data = &generation.items.columns[*at].data;
            target.each_of(data, rows, |row| data.number(row).unwrap_or(0.0));
        }
        Op::HistoryLength => {
            let value = (history.len() as f32).ln_1p();
            target.each(rows, |_, _| value);
        }
        Op::Popularity => {
            target.each(rows, |_, row| logs.of_popularity.get(row as usize).copied().unwrap_or(0.0));
        }
        Op::Context(key) => {
            let value = context.get(key).and_then(|v| v.parse::<f32>().ok()).filter(|v| v.is_finite()).unwrap_or(0.0);
            target.each(rows, |_, _| value);
        }
    }
}

fn compile(name: &str, generation: &Generation) -> Result<Op, FeatureError> {
    let wrong = |reason: String| FeatureError { column: name.to_owned(), reason };
    let roles = generation.roles;
    let needs = |role: Option<usize>, what: &str, op: Op| match role {
        Some(_) => Ok(op),
        None => Err(wrong(format!("the dataset has no {what}"))),
    };
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
    let with_role = [
        ("cross.same_creator", roles.creator, "items.creator", Op::SameCreator),
        ("cross.same_category", roles.category, "items.category", Op::SameCategory),
        ("cross.same_series", roles.series, "items.series", Op::SameSeries),
        ("cross.next_in_series", roles.series.and(roles.series_position), "items.series_position", Op::NextInSeries),
        ("cross.series_gap", roles.series.and(roles.series_position), "items.series_position", Op::SeriesGap),
    ];
    if let Some((_, op)) = cross.iter().find(|(known, _)| *known == name) {
        return match op {
            Op::UserEmbedding | Op::ItemEmbedding if generation.item_embeddings.is_none() => {
                Err(wrong("the dataset has no embeddings".into()))
            }
            op => Ok(op.clone()),
        };
    }
    if let Some((_, role, what, op)) = with_role.iter().find(|(known, ..)| *known == name) {
        return needs(*role, what, op.clone());
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
    use crate::catalog::generation::testing;

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
            user,
            context: &context,
            candidates: &candidates,
            cooccurrence: &|row| CooccurrenceSignal { sum: row as f32, max: 0.5, top3: 0.9, count: 2 },
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
        let user = PlannedUser { row: None, vector: vec![9.0, 8.0], history: history(&[0, 3]), seen: vec![0, 3] };
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
