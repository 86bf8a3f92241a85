//! What the GPU kernels compute, on the CPU: the oracle that each is held against. Flat arrays, as the kernels have them; the order is
//! that of [`Packed`], by the functions that the CPU engine itself uses.

pub mod dense;

use crate::candidates::{Candidates, Packed, Scored, Source, SourceSet, keep_best};
use crate::catalog::generation::NO_ROW;
use crate::index::Exact;
use crate::ranking::ensemble::WeightedMean;
use crate::retrieval::collaborative::Signals;
use crate::retrieval::merge::{MergeScratch, merge};
use tastemaker_kernels::{Column, CountBy, RowKind, RowPart, ScoreBy};

/// A row that is none, and its score.
const HOLE: Scored = Scored { row: NO_ROW, score: f32::NAN };

/// Lists of scored rows, column by column.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Lists {
    /// u32 `[n_lists, width]`; behind a list's end `NO_ROW`.
    pub rows: Vec<u32>,
    /// f32 `[n_lists, width]`; behind a list's end NaN.
    pub scores: Vec<f32>,
}

impl Lists {
    /// Appends a list, filled up with holes to `width`.
    fn push(&mut self, list: impl Iterator<Item = Scored>, width: usize) {
        for scored in list.chain(std::iter::repeat(HOLE)).take(width) {
            self.rows.push(scored.row);
            self.scores.push(scored.score);
        }
    }

    /// Appends the `k` best of `entries`, but for holes.
    fn push_best(&mut self, entries: impl Iterator<Item = Scored>, k: usize) {
        let mut packed: Vec<Packed> = entries.filter(|entry| entry.row != NO_ROW).map(Packed::from).collect();
        keep_best(&mut packed, k);
        self.push(packed.into_iter().map(Scored::from), k);
    }
}

/// The `k` best of each of `n_parts` equal parts (but for rounding up to 4 columns) of every row: `[n_rows, n_parts, k]`.
///
/// `scores`: `[n_rows, stride]`, of which `n_cols` count, or as many as `lengths` says; `ids` likewise, else columns are ids.
pub fn topk_select(
    scores: &[f32],
    ids: Option<&[u32]>,
    lengths: Option<&[u32]>,
    [stride, n_cols, n_parts, k]: [usize; 4],
) -> Lists {
    let mut out = Lists::default();
    let part_cols = n_cols.div_ceil(n_parts).next_multiple_of(4);
    for (at, row) in scores.chunks_exact(stride.max(1)).enumerate() {
        let n = lengths.map_or(n_cols, |lengths| n_cols.min(lengths[at] as usize));
        for part in 0..n_parts {
            let columns = (part * part_cols).min(n)..((part + 1) * part_cols).min(n);
            let id = |column: usize| ids.map_or(column as u32, |ids| ids[at * stride + column]);
            out.push_best(columns.map(|column| Scored { row: id(column), score: row[column] }), k);
        }
    }
    out
}

/// The `k` best of all the lists of a query, `[n_queries, n_parts, width]`; `offsets` are added to the rows of their part.
pub fn partition_merge(lists: &Lists, offsets: Option<&[u32]>, [n_parts, width, k]: [usize; 3]) -> Lists {
    let mut out = Lists::default();
    let size = n_parts * width;
    for (rows, scores) in lists.rows.chunks_exact(size.max(1)).zip(lists.scores.chunks_exact(size.max(1))) {
        let entries = rows.iter().zip(scores).enumerate().map(|(at, (&row, &score))| {
            let offset = offsets.map_or(0, |offsets| offsets[at / width]);
            Scored { row: if row == NO_ROW { row } else { row + offset }, score }
        });
        out.push_best(entries, k);
    }
    out
}

/// Each request's lists (`[n_requests, width]`, one source behind the other, `widths` wide, `lengths` `[n_requests, 4]` long) as one:
/// [`merge`] of them. Rows below `n_items`, or `NO_ROW` at a list's end.
pub fn merge_candidates(
    lists: &Lists,
    lengths: &[u32],
    widths: [usize; Source::COUNT],
    n_items: usize,
) -> Vec<Candidates> {
    let (width, mut scratch) = (widths.iter().sum::<usize>(), MergeScratch::default());
    let request = |(at, lengths): (usize, &[u32; Source::COUNT])| {
        let mut start = at * width;
        let by_source = std::array::from_fn(|source| {
            let entries = start..start + widths[source].min(lengths[source] as usize);
            start += widths[source];
            entries
                .map(|at| Scored { row: lists.rows[at], score: lists.scores[at] })
                .take_while(|entry| entry.row != NO_ROW)
                .collect()
        });
        let mut out = Candidates::default();
        merge(&by_source, n_items, &mut scratch, &mut out);
        out
    };
    lengths.as_chunks().0.iter().enumerate().map(request).collect()
}

/// Whether bit `row` is set, the first being the lowest of the first word.
pub fn bit(words: &[u32], row: u32) -> bool {
    words[row as usize / 32] >> (row % 32) & 1 == 1
}

/// The lists (`[n_lists, width]`, `lengths` long) without rows from `n_items` on, without those that are not `available`, and without
/// those that the request (of `lists_per_seen` lists) has `seen`; and how many are left.
pub fn filter_candidates(
    lists: &Lists,
    lengths: Option<&[u32]>,
    width: usize,
    available: Option<&[u32]>,
    seen: Option<(&[u32], usize)>,
    n_items: u32,
) -> (Lists, Vec<u32>) {
    let (mut out, mut counts) = (Lists::default(), Vec::new());
    let words = n_items.div_ceil(32) as usize;
    for (at, (rows, scores)) in lists.rows.chunks_exact(width).zip(lists.scores.chunks_exact(width)).enumerate() {
        let n = lengths.map_or(width, |lengths| width.min(lengths[at] as usize));
        let seen = seen.map(|(seen, lists_per_seen)| &seen[at / lists_per_seen * words..][..words]);
        let stays = |row: u32| {
            row < n_items && available.is_none_or(|words| bit(words, row)) && seen.is_none_or(|words| !bit(words, row))
        };
        let left: Vec<Scored> = rows[..n]
            .iter()
            .zip(scores)
            .filter(|(row, _)| stays(**row))
            .map(|(&row, &score)| Scored { row, score })
            .collect();
        counts.push(left.len() as u32);
        out.push(left.into_iter(), width);
    }
    (out, counts)
}

/// The first `width` values of the given rows of `table` (`[n_rows, stride]`): `[rows, width]`; zeros for rows that there are not.
pub fn gather_rows<T: Copy + Default>(rows: &[u32], table: &[T], stride: usize, width: usize) -> Vec<T> {
    let row =
        |row: u32| table.get(row as usize * stride..).filter(|rest| rest.len() >= stride).map(|rest| &rest[..width]);
    rows.iter().flat_map(|&at| (0..width).map(move |column| row(at).map_or(T::default(), |row| row[column]))).collect()
}

/// As [`gather_rows`] of bf16, made f32.
pub fn gather_bf16_as_f32(rows: &[u32], table: &[half::bf16], stride: usize, width: usize) -> Vec<f32> {
    // Not `f32::from`: that makes every NaN a quiet one.
    let widen = |value: half::bf16| f32::from_bits(u32::from(value.to_bits()) << 16);
    gather_rows(rows, table, stride, width).into_iter().map(widen).collect()
}

/// How near every row of `table` (`[n_rows, width]`) is to every query (`[n_queries, width]`): `[n_queries, n_rows]`, NaN for rows that are
/// not `available`. `terms` are of the rows.
pub fn scores(
    queries: &[f32],
    table: &[f32],
    width: usize,
    (by, terms): (ScoreBy, &[f32]),
    available: Option<&[u32]>,
) -> Vec<f32> {
    let score = |query: &[f32], (row, values): (usize, &[f32])| {
        if available.is_some_and(|words| !bit(words, row as u32)) {
            return f32::NAN;
        }
        let dot = query.iter().zip(values).fold(0f32, |sum, (q, x)| q.mul_add(*x, sum));
        match by {
            ScoreBy::InnerProduct => dot,
            ScoreBy::Times => dot * terms[row],
            ScoreBy::TwiceLess => 2f32.mul_add(dot, -terms[row]),
        }
    };
    let rows = || table.chunks_exact(width).enumerate();
    queries.chunks_exact(width).flat_map(|query| rows().map(move |row| score(query, row))).collect()
}

/// Takes the scores (`[n_queries, stride]`) of `pairs` of query and row away.
pub fn mask_scores(scores: &mut [f32], pairs: &[[u32; 2]], [n_queries, n_rows, stride]: [usize; 3]) {
    for [query, row] in pairs.iter().map(|pair| pair.map(|at| at as usize)) {
        if query < n_queries && row < n_rows {
            scores[query * stride + row] = f32::NAN;
        }
    }
}

/// The scores of `rows`, NaN for those that there are not, 0 for those without a vector.
pub fn exact_scores(exact: &Exact, query: &[f32], rows: &[u32], has_vector: impl Fn(u32) -> bool) -> Vec<f32> {
    let mut converted = Vec::new();
    let score = |&row: &u32| {
        let mut out = Vec::new();
        match (row as usize) < exact.rows().n_rows() {
            true if has_vector(row) => exact.scores(query, &[row], &mut converted, &mut out),
            true => out.push(0.0),
            false => {}
        }
        out.first().copied().unwrap_or(f32::NAN)
    };
    rows.iter().map(score).collect()
}

/// Puts each piece of `staged` (begin there, begin in `target`, length) where it belongs, but for those beyond either end.
pub fn apply_changes(staged: &[u32], pieces: &[[u32; 3]], target: &mut [u32]) {
    for &[from, to, n] in pieces {
        let range = |start: u32| start as usize..start as usize + n as usize;
        if let (Some(from), Some(to)) = (staged.get(range(from)), target.get_mut(range(to))) {
            to.copy_from_slice(from);
        }
    }
}

/// The row of the item at a place: itself below `n_rows`, then what `names` says.
pub fn name_place(place: u32, n_rows: u32, names: &[u32]) -> u32 {
    let beside = |slot: u32| names.get(slot as usize).copied().unwrap_or(NO_ROW);
    place.checked_sub(n_rows).map_or(place, beside)
}

/// The place of the item of that row; `changed` are rows and their places beside the tables.
pub fn find_place(row: u32, n_rows: u32, changed: &[(u32, u32)]) -> u32 {
    let beside = changed.iter().find(|(changed, _)| *changed == row).map(|(_, slot)| n_rows + slot);
    beside.unwrap_or(if row < n_rows { row } else { NO_ROW })
}

/// Takes the rows that each query's user has `seen` out of its scores (`[n_queries, n_rows]`).
pub fn mask_seen(scores: &mut [f32], seen: &[&[u32]], n_rows: usize) {
    let pairs: Vec<[u32; 2]> =
        seen.iter().enumerate().flat_map(|(at, rows)| rows.iter().map(move |&row| [at as u32, row])).collect();
    mask_scores(scores, &pairs, [seen.len(), n_rows, n_rows]);
}

/// The `k` best of a list by `exact` scores, and whether one that is not in it might be among them. `scores` are those by which the list
/// is in order, rounded otherwise; `[shift, scale, error]` bound what they say of the others.
pub fn settle_list(
    rows: &[u32],
    scores: &[f32],
    exact: &[f32],
    k: usize,
    [shift, scale, error]: [f32; 3],
) -> (Vec<Scored>, bool) {
    let entries = rows.iter().zip(scores).zip(exact);
    let entries = entries.filter(|((row, score), exact)| **row != NO_ROW && !score.is_nan() && !exact.is_nan());
    let mut best: Vec<Packed> = entries.map(|((&row, _), &score)| Packed::from(Scored { row, score })).collect();
    keep_best(&mut best, k);
    let best: Vec<Scored> = best.into_iter().map(Scored::from).collect();
    let all = rows.last().is_none_or(|row| *row == NO_ROW) || scores.last().is_none_or(|score| score.is_nan());
    let most = scores.last().map_or(f32::NAN, |last| (last + shift) / scale + error);
    let settled = best.len() == k && best.last().is_none_or(|last| most < last.score);
    (best, !all && !settled)
}

/// What a ranker reads of each candidate: `[candidates, columns]`. `dots` are read of those that the first source did not propose.
pub fn fill_columns(columns: &[Column], candidates: &Candidates, signals: &Signals, dots: &[f32]) -> Vec<f32> {
    let value = |at: usize, column: Column| {
        let signal = signals.of(candidates.rows[at]);
        match column {
            Column::SourceScore(source) => candidates.source_scores[usize::from(source)][at],
            Column::SourceRank(source) => match candidates.source_ranks[usize::from(source)][at] {
                0 => 0.0,
                rank => 1.0 / f32::from(rank),
            },
            Column::SourcePresent(source) => f32::from(candidates.sources[at].0 >> source & 1),
            Column::Dot if candidates.sources[at].contains(Source::Ann) => candidates.source_scores[0][at],
            Column::Dot => dots[at],
            Column::CoSum => signal.sum,
            Column::CoMax => signal.largest[0],
            Column::CoCount => (signal.count as f32).ln_1p(),
            Column::CoMean => signal.sum / signal.count.max(1) as f32,
            Column::CoTop3 => signal.largest.iter().sum(),
            // Another kernel's.
            Column::Counted => f32::NAN,
        }
    };
    (0..candidates.len()).flat_map(|at| columns.iter().map(move |&column| value(at, column))).collect()
}

/// What of an item that has these `codes` the column says whose history holds codes so often, `times` being by code.
pub fn fill_counts(by: CountBy, codes: &[u32], times: impl Fn(u32) -> u32, n_liked: usize) -> f32 {
    let (liked, sum) = (n_liked.max(1) as f32, codes.iter().map(|&code| times(code)).sum::<u32>());
    match by {
        CountBy::Logarithm => (sum as f32).ln_1p(),
        CountBy::First => codes.first().map_or(0.0, |&code| times(code) as f32 / liked),
        CountBy::Share => sum as f32 / (liked * codes.len().max(1) as f32),
    }
}

/// Writes the columns of the item in that row of `table` (`[n_items, columns]`) to where `columns` says; 0 for one that there is not.
pub fn copy_columns(table: &[f32], row: u32, columns: &[u32], out: &mut [f32]) {
    let line = table.get(row as usize * columns.len()..).filter(|rest| rest.len() >= columns.len());
    for (at, &column) in columns.iter().enumerate() {
        out[column as usize] = line.map_or(0.0, |line| line[at]);
    }
}

/// What the history says of a series: of an item's place, the furthest one in the history, and how many of the series are liked there;
/// `None`: it holds none. The logarithm of liked items, whether it is the next, how much further it is.
pub fn fill_series(of: Option<(f32, f32, u32)>) -> [f32; 3] {
    let Some((place, furthest, n_liked)) = of else { return [0.0; 3] };
    let gap = place - furthest;
    let next = if gap > 0.0 && gap <= 1.0 { 1.0 } else { 0.0 };
    [(n_liked as f32).ln_1p(), next, if gap.is_nan() { 0.0 } else { gap.clamp(-10.0, 10.0) }]
}

/// The sum of `members`, each with its weight, before it is divided by all of these.
pub fn add_scores(members: &[(&[f32], f32)]) -> Vec<f32> {
    let mut mean = WeightedMean::default();
    mean.begin(members.first().map_or(0, |(scores, _)| scores.len()));
    members.iter().for_each(|(scores, weight)| mean.add(scores, *weight));
    mean.sum().to_vec()
}

/// Requests' candidates, with what whole rows are put together of.
#[derive(Clone, Copy, Debug)]
pub struct Slots<'a> {
    /// `[n_requests, width]`
    pub rows: &'a [u32],
    /// `[n_requests]`
    pub counts: &'a [u32],
    /// Places of a request.
    pub width: usize,
    /// Rows from here on are holes.
    pub n_items: u32,
}

impl Slots<'_> {
    /// Request and row of each place; no row for a hole.
    fn each(self) -> impl Iterator<Item = (usize, Option<usize>)> {
        let Slots { rows, counts, width, n_items } = self;
        rows.iter().enumerate().map(move |(at, &row)| {
            let (request, place) = (at / width, (at % width) as u32);
            (request, (place < counts[request] && row < n_items).then_some(row as usize))
        })
    }
}

/// Whole rows of a model's input, as words; each value from what there is of the request (f32 `[n_requests, n_shared]`), the item
/// (`[n_items, n_item]`) or the candidate (`[n_requests, width, n_columns]`). Holes are zeros.
pub fn assemble_rows(
    slots: Slots<'_>,
    [shared, table, columns]: [(&[f32], usize); 3],
    places: &[RowPart],
    kind: RowKind,
) -> Vec<u32> {
    let mut words = Vec::new();
    for (at, (request, row)) in slots.each().enumerate() {
        for &place in places {
            let value = row.map_or(0.0, |row| match place {
                RowPart::Shared(which) => shared.0[request * shared.1 + which as usize],
                RowPart::Item(which) => table.0[row * table.1 + which as usize],
                RowPart::Candidate(which) => columns.0[at * columns.1 + which as usize],
            });
            match kind {
                RowKind::F32 => words.push(value.to_bits()),
                RowKind::I32 => words.push(value as i32 as u32),
                RowKind::I64 => words.extend([value as i64 as u32, (value as i64 >> 32) as u32]),
            }
        }
    }
    words
}

/// NaN for holes among the scores.
pub fn void_holes(slots: Slots<'_>, scores: &mut [f32]) {
    slots.each().zip(scores).filter(|((_, row), _)| row.is_none()).for_each(|(_, score)| *score = f32::NAN);
}

/// The `m` best of the candidates with their sources, and how many scores are NaN. `best` is the search's first score, 0 without one.
pub fn finish_slate(
    candidates: &Candidates,
    sums: &[f32],
    weight: f32,
    (search_weight, best): (f32, f32),
    m: usize,
) -> (Vec<(Scored, SourceSet)>, usize) {
    let mut scores: Vec<f32> = sums.iter().map(|sum| sum / weight).collect();
    super::blend_search(search_weight, best, &candidates.source_scores[Source::Search as usize], &mut scores);
    let scored = candidates.rows.iter().zip(&scores).map(|(&row, &score)| Packed::from(Scored { row, score }));
    let mut order: Vec<Packed> = scored.collect();
    keep_best(&mut order, m);
    let with_sources = order.into_iter().map(Scored::from).map(|scored| {
        let at = candidates.rows.partition_point(|row| *row < scored.row);
        (scored, candidates.sources[at])
    });
    (with_sources.collect(), scores.iter().filter(|score| score.is_nan()).count())
}

/// What a library found (`[n_lists, width]`) as lists of `k`: `factor * distance + offset` for a score, in order, each row once with the
/// best of its scores. Neighbours that are no row below `n_rows`, or not `available`, are holes.
pub fn take_neighbors(
    neighbors: &[i64],
    distances: &[f32],
    [factor, offset]: [f32; 2],
    [width, k]: [usize; 2],
    n_rows: u32,
    available: Option<&[u32]>,
) -> Lists {
    let mut out = Lists::default();
    for (neighbors, distances) in neighbors.chunks_exact(width).zip(distances.chunks_exact(width)) {
        let entry = |(&row, &distance): (&i64, &f32)| {
            let row = u32::try_from(row).ok().filter(|&row| row < n_rows)?;
            let is_there = available.is_none_or(|words| bit(words, row));
            is_there.then(|| Packed::from(Scored { row, score: factor.mul_add(distance, offset) }))
        };
        let mut all: Vec<Packed> = neighbors.iter().zip(distances).filter_map(entry).collect();
        all.sort();
        let (mut taken, mut best) = (std::collections::HashSet::new(), Vec::new());
        best.extend(all.into_iter().map(Scored::from).filter(|scored| taken.insert(scored.row)));
        out.push(best.into_iter(), k);
    }
    out
}
