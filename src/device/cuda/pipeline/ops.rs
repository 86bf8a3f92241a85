//! The kernels between scores of all rows and slates as calls that check the shapes of what they are given.
#![allow(unsafe_code)] // Launches of kernels whose arguments are checked here.

use tastemaker_kernels as kernels;
use tastemaker_kernels::{CountBy, ScoreBy, SumOrder};

use super::super::ops::{Lists, ListsMut, MoreRows, count, holds, shaped};
use super::super::stream::{Part, PartMut, Stream};
use crate::device::DeviceError;

/// What requests ask, as it was uploaded.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// Requests that there is room for.
    pub n: usize,
    /// u32 `[4]`: requests that there are, items wanted of each (a multiple of 4), items that came or changed.
    pub header: Part<'a, u32>,
    /// u32 `[n]`: rows that are searched, 0 for requests that there are not.
    pub scanned: Part<'a, u32>,
    /// f32 `[n, width]`: the users' vectors, zeros at their ends.
    pub queries: Part<'a, f32>,
    /// f32 `[n, 4]`: shift, scale and error of the scores of all rows, and the query's length.
    pub bounds: Part<'a, f32>,
    /// u32 `[n, 8]`: where in the tail lists, seen rows and liked items lie, and how many.
    pub words: Part<'a, u32>,
    /// u32
    pub tail: Part<'a, u32>,
}

/// Vectors of items that came or changed, numbered from the table's last row on.
#[derive(Clone, Copy, Debug)]
pub struct Beside<'a> {
    /// Rows that there is room for.
    pub n: usize,
    /// f32 `[n, width]`
    pub vectors: Part<'a, f32>,
    /// f32 `[n]`, unless the score is the inner product.
    pub norms: Option<Part<'a, f32>>,
    /// Bits of those that have a vector.
    pub there: Part<'a, u32>,
}

/// The vectors of items, and how they are compared.
#[derive(Clone, Copy, Debug)]
pub struct Compared<'a> {
    /// f32 `[n_rows, width]`
    pub vectors: Part<'a, f32>,
    /// Rows.
    pub n_rows: usize,
    /// Values of a row, and how many of them count.
    pub widths: [usize; 2],
    /// f32 `[n_rows]`, unless the score is the inner product.
    pub norms: Option<Part<'a, f32>>,
    /// Those beside them.
    pub more: Beside<'a>,
    /// What a score is.
    pub by: ScoreBy,
    /// How it is summed up.
    pub order: SumOrder,
}

/// Merged candidates, `[n, width]` each.
#[derive(Clone, Copy, Debug)]
pub struct Merged<'a> {
    /// Entries of a request.
    pub width: usize,
    /// u32, ascending.
    pub rows: Part<'a, u32>,
    /// u8
    pub sources: Part<'a, u8>,
    /// f32 `[n, 4, width]`
    pub source_scores: Part<'a, f32>,
    /// u16 `[n, 4, width]`
    pub source_ranks: Part<'a, u16>,
    /// u32 `[n]`
    pub counts: Part<'a, u32>,
}

impl Merged<'_> {
    fn holds(&self, n: usize) {
        holds(self.rows.len(), n, self.width);
        holds(self.sources.len(), n, self.width);
        holds(self.source_scores.len(), 4 * n, self.width);
        holds(self.source_ranks.len(), 4 * n, self.width);
        holds(self.counts.len(), n, 1);
    }
}

/// Where merged candidates go.
#[derive(Debug)]
pub struct MergedMut<'a> {
    /// As [`Merged::rows`].
    pub rows: PartMut<'a, u32>,
    /// As [`Merged::sources`].
    pub sources: PartMut<'a, u8>,
    /// As [`Merged::source_scores`].
    pub source_scores: PartMut<'a, f32>,
    /// As [`Merged::source_ranks`].
    pub source_ranks: PartMut<'a, u16>,
    /// As [`Merged::counts`].
    pub counts: PartMut<'a, u32>,
}

/// What lies beside each item.
#[derive(Clone, Copy, Debug)]
pub struct Neighbours<'a> {
    /// u64 `[n_keys + 1]`
    pub offsets: Part<'a, u64>,
    /// u32
    pub rows: Part<'a, u32>,
    /// f32
    pub scores: Part<'a, f32>,
}

/// What [`Stream::fill_columns`] writes of a candidate.
#[derive(Clone, Copy, Debug)]
pub struct Columns<'a> {
    /// u32: codes.
    pub codes: Part<'a, u32>,
    /// Values from one candidate to the next.
    pub stride: usize,
    /// f32 `[n, width]`: scores of the user's vector and candidates that the neighbours do not hold.
    pub dots: Part<'a, f32>,
    /// Where a column reads them.
    pub neighbours: Option<Neighbours<'a>>,
    /// f32: ln(1 + n).
    pub logarithms: Part<'a, f32>,
}

/// A column that counts codes of the history.
#[derive(Clone, Copy, Debug)]
pub struct Counting<'a> {
    /// u32 `[n_items + 1]`
    pub offsets: Part<'a, u32>,
    /// u32: codes of items.
    pub codes: Part<'a, u32>,
    /// u32 `[n, 2]`: where those of items beside the tables begin and end, and what they are.
    pub more: (MoreRows<'a>, Part<'a, u32>),
    /// u32 `[n, places_stride]`: where in the tail codes of the history lie, how many.
    pub places: Part<'a, u32>,
    /// Words of a request's places.
    pub places_stride: usize,
    /// Which of them.
    pub place: usize,
    /// What the value is.
    pub by: CountBy,
    /// f32: ln(1 + n).
    pub logarithms: Part<'a, f32>,
    /// Values from one candidate to the next, and which of them.
    pub stride: usize,
    /// See [`Self::stride`].
    pub column: usize,
}

/// Columns that depend on the item alone.
#[derive(Clone, Copy, Debug)]
pub struct Copied<'a> {
    /// f32 `[n_items, columns]`
    pub table: Part<'a, f32>,
    /// Beside it.
    pub more: MoreRows<'a>,
    /// u32: which of a candidate's values each becomes, below `stride`.
    pub columns: Part<'a, u32>,
    /// Values from one candidate to the next.
    pub stride: usize,
}

/// Columns that speak of series.
#[derive(Clone, Copy, Debug)]
pub struct InSeries<'a> {
    /// u32 `[n_items, 2]`: the code of each item's series, and where the item stands in it.
    pub items: Part<'a, u32>,
    /// Beside them.
    pub more: MoreRows<'a>,
    /// u32 `[n, places_stride]`: where in the tail what the history holds lies, how much that is.
    pub places: Part<'a, u32>,
    /// Words of a request's places.
    pub places_stride: usize,
    /// Which of them.
    pub place: usize,
    /// f32: ln(1 + n).
    pub logarithms: Part<'a, f32>,
    /// Values from one candidate to the next, and which of them.
    pub stride: usize,
    /// See [`Self::stride`].
    pub columns: [Option<usize>; 3],
}

/// The lists of all sources.
#[derive(Clone, Copy, Debug)]
pub struct Settled<'a> {
    /// As [`Stream::settle_lists`] has it.
    pub widths: [usize; 4],
    /// u32 and f32 `[n, all widths]`
    pub lists: Lists<'a>,
    /// u32 `[n, 4]`
    pub lengths: Part<'a, u32>,
    /// u32 `[n]`
    pub open: Part<'a, u32>,
}

/// Where the lists of all sources go.
#[derive(Debug)]
pub struct SettledMut<'a> {
    /// As [`Settled::lists`].
    pub lists: ListsMut<'a>,
    /// As [`Settled::lengths`].
    pub lengths: PartMut<'a, u32>,
    /// As [`Settled::open`].
    pub open: PartMut<'a, u32>,
}

/// How scores become slates.
#[derive(Clone, Copy, Debug)]
pub struct Blend<'a> {
    /// f32 `[n, width]`: the rankers' weighted scores.
    pub sums: Part<'a, f32>,
    /// All weights together.
    pub weight: f32,
    /// What the best of the search adds.
    pub search_weight: f32,
}

impl Stream {
    /// Takes what was seen out of the scores of all rows, f32 `[n, n_rows]`. Whoever uploaded what is asked vouches for its places.
    ///
    /// # Errors
    /// As [`Stream::scores`].
    ///
    /// # Panics
    /// As [`Stream::scores`].
    ///
    /// # Safety
    /// What the words say lies in the tail does.
    pub unsafe fn mask_seen(
        &self,
        asked: Asked<'_>,
        scores: PartMut<'_, f32>,
        n_rows: usize,
    ) -> Result<(), DeviceError> {
        holds(asked.words.len(), asked.n, 8);
        holds(scores.0.len(), asked.n, n_rows);
        let shape = kernels::MaskSeen {
            tail: self.of(&asked.tail).0,
            asked: self.of(&asked.words).0,
            scores: self.of(&scores.0).0,
            n_requests: count(asked.n),
            n_rows: count(n_rows),
        };
        // SAFETY: the parts are this stream's or tables, and as long as the kernel reads and writes: checked above; what lies in the tail is
        // the caller's word. So below.
        unsafe { self.launch(&shaped(shape.launch())?) }
    }

    /// The scores of `rows` (u32 `[n, places]`, `counts` of which there are), as the CPU computes them, but for those whose `sources` say
    /// that they are known: f32 `[n, places]`. Rows from the table's last one on are of those beside it.
    ///
    /// # Errors
    /// As [`Stream::scores`].
    ///
    /// # Panics
    /// As [`Stream::scores`].
    pub fn exact_scores(
        &self,
        asked: Asked<'_>,
        compared: Compared<'_>,
        rows: Part<'_, u32>,
        skip: Option<(Part<'_, u32>, Part<'_, u8>)>,
        scores: PartMut<'_, f32>,
        places: usize,
    ) -> Result<(), DeviceError> {
        let Compared { vectors, n_rows, widths: [width, dim], norms, more, by, order } = compared;
        holds(asked.queries.len(), asked.n, width);
        holds(asked.bounds.len(), asked.n, 4);
        holds(vectors.len(), n_rows, width);
        holds(rows.len(), asked.n, places);
        holds(scores.0.len(), asked.n, places);
        if by != ScoreBy::InnerProduct {
            holds(norms.map_or(0, |norms| norms.len()), n_rows, 1);
            holds(more.norms.map_or(0, |norms| norms.len()), more.n, 1);
        }
        holds(more.vectors.len(), more.n, width);
        holds(more.there.len(), more.n.div_ceil(32), 1);
        if let Some((counts, sources)) = skip {
            holds(counts.len(), asked.n, 1);
            holds(sources.len(), asked.n, places);
        }
        let shape = kernels::ExactScores {
            queries: self.of(&asked.queries).0,
            table: self.of(&vectors).0,
            n_rows: count(n_rows),
            width: count(width),
            dim: count(dim),
            norms: norms.map_or(0, |norms| self.of(&norms).0),
            more: kernels::More { rows: self.of(&more.vectors).0, n: count(more.n) },
            more_norms: more.norms.map_or(0, |norms| self.of(&norms).0),
            more_there: self.of(&more.there).0,
            by,
            order,
            bounds: self.of(&asked.bounds).0,
            rows: self.of(&rows).0,
            counts: skip.map(|(counts, _)| self.of(&counts).0),
            sources: skip.map(|(_, sources)| self.of(&sources).0),
            scores: self.of(&scores.0).0,
            n_requests: count(asked.n),
            places: count(places),
        };
        // SAFETY: as above.
        unsafe { self.launch(&shaped(shape.launch())?) }
    }

    /// The `widths[0]` nearest of what was `found` (`[n, fetched]`) by their `exact` scores, and the lists that came with the requests.
    ///
    /// # Errors
    /// As [`Stream::scores`].
    ///
    /// # Panics
    /// As [`Stream::scores`].
    ///
    /// # Safety
    /// What the words say lies in the tail does.
    pub unsafe fn settle_lists(
        &self,
        asked: Asked<'_>,
        found: Lists<'_>,
        exact: Part<'_, f32>,
        fetched: usize,
        widths: [usize; 4],
        out: SettledMut<'_>,
    ) -> Result<(), DeviceError> {
        let (n, width) = (asked.n, widths.iter().sum());
        holds(asked.header.len(), 4, 1);
        holds(asked.words.len(), n, 8);
        holds(asked.bounds.len(), n, 4);
        holds(found.rows.len(), n, fetched);
        holds(found.scores.len(), n, fetched);
        holds(exact.len(), n, fetched);
        holds(out.lists.rows.0.len(), n, width);
        holds(out.lists.scores.0.len(), n, width);
        holds(out.lengths.0.len(), n, 4);
        holds(out.open.0.len(), n, 1);
        let shape = kernels::SettleLists {
            header: self.of(&asked.header).0,
            rows: self.of(&found.rows).0,
            scores: self.of(&found.scores).0,
            exact: self.of(&exact).0,
            fetched: count(fetched),
            bounds: self.of(&asked.bounds).0,
            tail: self.of(&asked.tail).0,
            asked: self.of(&asked.words).0,
            widths: widths.map(count),
            n_requests: count(n),
            out_rows: self.of(&out.lists.rows.0).0,
            out_scores: self.of(&out.lists.scores.0).0,
            lengths: self.of(&out.lengths.0).0,
            open: self.of(&out.open.0).0,
        };
        // SAFETY: as above, and what lies in the tail is the caller's word.
        unsafe { self.launch(&shaped(shape.launch())?) }
    }

    /// One candidate per item of each request's lists.
    ///
    /// # Errors
    /// As [`Stream::scores`].
    ///
    /// # Panics
    /// As [`Stream::scores`].
    pub fn merge_candidates(&self, n: usize, lists: Settled<'_>, out: MergedMut<'_>) -> Result<(), DeviceError> {
        let width = lists.widths.iter().sum();
        holds(lists.lists.rows.len(), n, width);
        holds(lists.lists.scores.len(), n, width);
        holds(lists.lengths.len(), n, 4);
        let MergedMut { rows, sources, source_scores, source_ranks, counts } = out;
        let [rows, counts] = [rows.0, counts.0];
        let merged = Merged {
            width,
            rows,
            sources: sources.0,
            source_scores: source_scores.0,
            source_ranks: source_ranks.0,
            counts,
        };
        merged.holds(n);
        let shape = kernels::MergeCandidates {
            rows: self.of(&lists.lists.rows).0,
            scores: self.of(&lists.lists.scores).0,
            lengths: self.of(&lists.lengths).0,
            n_requests: count(n),
            widths: lists.widths.map(count),
            out_rows: self.of(&merged.rows).0,
            sources: self.of(&merged.sources).0,
            source_scores: self.of(&merged.source_scores).0,
            source_ranks: self.of(&merged.source_ranks).0,
            counts: self.of(&merged.counts).0,
        };
        // SAFETY: as above.
        unsafe { self.launch(&shaped(shape.launch())?) }
    }

    /// Puts words that changed where they belong: of each of `n_pieces` (u32 `[n_pieces, 3]`) where it begins in `staged` and in `target`,
    /// and its length. Two must not go to the same word; one that is beyond an end is skipped.
    ///
    /// # Errors
    /// As [`Stream::scores`].
    ///
    /// # Panics
    /// As [`Stream::scores`].
    pub fn apply_changes(
        &self,
        staged: Part<'_, u32>,
        pieces: Part<'_, u32>,
        n_pieces: usize,
        target: PartMut<'_, u32>,
    ) -> Result<(), DeviceError> {
        holds(pieces.len(), n_pieces, 3);
        let shape = kernels::ApplyChanges {
            staged: self.of(&staged).0,
            n_staged: count(staged.len()),
            pieces: self.of(&pieces).0,
            n_pieces: count(n_pieces),
            target: self.of(&target.0).0,
            n_target: count(target.0.len()),
        };
        // SAFETY: as above; the kernel skips what is beyond either end.
        unsafe { self.launch(&shaped(shape.launch())?) }
    }

    /// The rows (u32) of the items at places: themselves in the tables' `n_rows`, then what `names` says.
    ///
    /// # Errors
    /// As [`Stream::scores`].
    ///
    /// # Panics
    /// As [`Stream::scores`].
    pub fn name_places(&self, rows: PartMut<'_, u32>, n_rows: usize, names: MoreRows<'_>) -> Result<(), DeviceError> {
        holds(names.rows.len(), names.n, 1);
        let (to, n) = self.of(&rows.0);
        let (n_rows, names) = (count(n_rows), self.more(Some(names)));
        let shape = kernels::NamePlaces { rows: to, n: count(n), n_rows, names };
        // SAFETY: as above.
        unsafe { self.launch(&shaped(shape.launch())?) }
    }

    /// The places of candidates, u32 `[n, width]`: their rows in the tables' `n_rows`, or what `changed` says (u32 `[2, n]`: rows,
    /// ascending, and places beside the tables), of which the header says how many count.
    ///
    /// # Errors
    /// As [`Stream::scores`].
    ///
    /// # Panics
    /// As [`Stream::scores`].
    pub fn find_places(
        &self,
        asked: Asked<'_>,
        merged: Merged<'_>,
        n_rows: usize,
        changed: MoreRows<'_>,
        places: PartMut<'_, u32>,
    ) -> Result<(), DeviceError> {
        merged.holds(asked.n);
        holds(asked.header.len(), 4, 1);
        holds(changed.rows.len(), changed.n, 2);
        holds(places.0.len(), asked.n, merged.width);
        let shape = kernels::FindPlaces {
            header: self.of(&asked.header).0,
            rows: self.of(&merged.rows).0,
            counts: self.of(&merged.counts).0,
            n_requests: count(asked.n),
            width: count(merged.width),
            n_rows: count(n_rows),
            changed: self.more(Some(changed)),
            places: self.of(&places.0).0,
        };
        // SAFETY: as above.
        unsafe { self.launch(&shaped(shape.launch())?) }
    }

    /// What a ranker reads of the candidates: f32 `[n, width, stride]`.
    ///
    /// # Errors
    /// As [`Stream::scores`].
    ///
    /// # Panics
    /// As [`Stream::scores`].
    ///
    /// # Safety
    /// What the words say lies in the tail does, and what the offsets of neighbours say lies in their lists.
    pub unsafe fn fill_columns(
        &self,
        asked: Asked<'_>,
        merged: Merged<'_>,
        columns: Columns<'_>,
        values: PartMut<'_, f32>,
    ) -> Result<(), DeviceError> {
        let Columns { codes, stride, dots, neighbours, logarithms } = columns;
        merged.holds(asked.n);
        holds(asked.words.len(), asked.n, 8);
        holds(dots.len(), asked.n, merged.width);
        holds(values.0.len(), asked.n * merged.width, stride);
        let lists = neighbours.map(|n| [self.of(&n.offsets).0, self.of(&n.rows).0, self.of(&n.scores).0]);
        let [offsets, list_rows, list_scores] = lists.unwrap_or_default();
        let shape = kernels::FillColumns {
            rows: self.of(&merged.rows).0,
            sources: self.of(&merged.sources).0,
            source_scores: self.of(&merged.source_scores).0,
            source_ranks: self.of(&merged.source_ranks).0,
            counts: self.of(&merged.counts).0,
            n_requests: count(asked.n),
            width: count(merged.width),
            dots: self.of(&dots).0,
            columns: self.of(&codes).0,
            n_columns: count(codes.len()),
            offsets,
            n_keys: neighbours.map_or(0, |neighbours| count(neighbours.offsets.len().saturating_sub(1))),
            list_rows,
            list_scores,
            tail: self.of(&asked.tail).0,
            asked: self.of(&asked.words).0,
            logarithms: self.of(&logarithms).0,
            n_logarithms: count(logarithms.len()),
            values: self.of(&values.0).0,
            stride: count(stride),
        };
        // SAFETY: as above, and what lies in the tail and in the lists is the caller's word.
        unsafe { self.launch(&shaped(shape.launch())?) }
    }

    /// A column of the candidates, which are at `places` (u32 `[n, width]`), that counts codes of the history: one value of f32
    /// `[n, width, stride]`.
    ///
    /// # Errors
    /// As [`Stream::scores`].
    ///
    /// # Panics
    /// As [`Stream::scores`].
    ///
    /// # Safety
    /// What the places say lies in the tail does, and what the offsets say lies in the codes.
    pub unsafe fn fill_counts(
        &self,
        asked: Asked<'_>,
        (merged, at): (Merged<'_>, Part<'_, u32>),
        counting: Counting<'_>,
        values: PartMut<'_, f32>,
    ) -> Result<(), DeviceError> {
        merged.holds(asked.n);
        holds(at.len(), asked.n, merged.width);
        holds(counting.more.0.rows.len(), counting.more.0.n, 2);
        holds(asked.words.len(), asked.n, 8);
        holds(counting.places.len(), asked.n, counting.places_stride);
        holds(values.0.len(), asked.n * merged.width, counting.stride);
        let shape = kernels::FillCounts {
            rows: self.of(&at).0,
            counts: self.of(&merged.counts).0,
            n_requests: count(asked.n),
            width: count(merged.width),
            offsets: self.of(&counting.offsets).0,
            codes: self.of(&counting.codes).0,
            n_items: count(counting.offsets.len().saturating_sub(1)),
            more: self.more(Some(counting.more.0)),
            more_codes: self.of(&counting.more.1).0,
            tail: self.of(&asked.tail).0,
            asked: self.of(&asked.words).0,
            places: self.of(&counting.places).0,
            places_stride: count(counting.places_stride),
            place: count(counting.place),
            by: counting.by,
            logarithms: self.of(&counting.logarithms).0,
            n_logarithms: count(counting.logarithms.len()),
            values: self.of(&values.0).0,
            stride: count(counting.stride),
            column: count(counting.column),
        };
        // SAFETY: as above, and what lies in the tail and in the codes is the caller's word.
        unsafe { self.launch(&shaped(shape.launch())?) }
    }

    /// Columns of the candidates, which are at `places` (u32 `[n, width]`), that depend on the item alone: some values of f32 `[n, width,
    /// stride]`.
    ///
    /// # Errors
    /// As [`Stream::scores`].
    ///
    /// # Panics
    /// As [`Stream::scores`].
    ///
    /// # Safety
    /// No column is beyond the stride.
    pub unsafe fn copy_columns(
        &self,
        (merged, at): (Merged<'_>, Part<'_, u32>),
        copied: Copied<'_>,
        values: PartMut<'_, f32>,
    ) -> Result<(), DeviceError> {
        let Copied { table, more, columns, stride } = copied;
        let (n, width) = (merged.counts.len(), merged.width);
        merged.holds(n);
        holds(at.len(), n, width);
        holds(more.rows.len(), more.n, columns.len());
        holds(values.0.len(), n * width, stride);
        let shape = kernels::CopyColumns {
            rows: self.of(&at).0,
            counts: self.of(&merged.counts).0,
            n_requests: count(n),
            width: count(width),
            table: self.of(&table).0,
            n_items: count(table.len() / columns.len().max(1)),
            more: self.more(Some(more)),
            n: count(columns.len()),
            columns: self.of(&columns).0,
            values: self.of(&values.0).0,
            stride: count(stride),
        };
        // SAFETY: as above, and columns are the caller's word.
        unsafe { self.launch(&shaped(shape.launch())?) }
    }

    /// Columns of the candidates, which are at `places` (u32 `[n, width]`), that speak of series: some values of f32 `[n, width, stride]`.
    ///
    /// # Errors
    /// As [`Stream::scores`].
    ///
    /// # Panics
    /// As [`Stream::scores`].
    ///
    /// # Safety
    /// What the places say lies in the tail does.
    pub unsafe fn fill_series(
        &self,
        asked: Asked<'_>,
        (merged, at): (Merged<'_>, Part<'_, u32>),
        series: InSeries<'_>,
        values: PartMut<'_, f32>,
    ) -> Result<(), DeviceError> {
        merged.holds(asked.n);
        holds(at.len(), asked.n, merged.width);
        holds(series.more.rows.len(), series.more.n, 2);
        holds(series.places.len(), asked.n, series.places_stride);
        holds(values.0.len(), asked.n * merged.width, series.stride);
        let shape = kernels::FillSeries {
            rows: self.of(&at).0,
            counts: self.of(&merged.counts).0,
            n_requests: count(asked.n),
            width: count(merged.width),
            items: self.of(&series.items).0,
            n_items: count(series.items.len() / 2),
            more: self.more(Some(series.more)),
            tail: self.of(&asked.tail).0,
            places: self.of(&series.places).0,
            places_stride: count(series.places_stride),
            place: count(series.place),
            logarithms: self.of(&series.logarithms).0,
            n_logarithms: count(series.logarithms.len()),
            values: self.of(&values.0).0,
            stride: count(series.stride),
            columns: series.columns.map(|column| column.map(count)),
        };
        // SAFETY: as above, and what lies in the tail is the caller's word.
        unsafe { self.launch(&shaped(shape.launch())?) }
    }

    /// Adds a ranker's weighted scores (f32 `[n]`) to those before, or begins with them.
    ///
    /// # Errors
    /// As [`Stream::scores`].
    ///
    /// # Panics
    /// As [`Stream::scores`].
    pub fn add_scores(
        &self,
        scores: Part<'_, f32>,
        weight: f32,
        first: bool,
        sums: PartMut<'_, f32>,
    ) -> Result<(), DeviceError> {
        holds(sums.0.len(), scores.len(), 1);
        let (from, n) = self.of(&scores);
        let shape = kernels::AddScores { scores: from, n: count(n), weight, first, sums: self.of(&sums.0).0 };
        // SAFETY: as above.
        unsafe { self.launch(&shaped(shape.launch())?) }
    }

    /// A record of the best of each request: u32 `[n, record]`, whose length the header's second number says; it is at most `most`.
    ///
    /// # Errors
    /// As [`Stream::scores`].
    ///
    /// # Panics
    /// As [`Stream::scores`].
    ///
    /// # Safety
    /// The header says no more than `most`.
    pub unsafe fn finish_slates(
        &self,
        asked: Asked<'_>,
        merged: Merged<'_>,
        settled: Settled<'_>,
        blend: Blend<'_>,
        records: PartMut<'_, u32>,
        most: usize,
    ) -> Result<(), DeviceError> {
        let n = asked.n;
        merged.holds(n);
        holds(asked.header.len(), 4, 1);
        holds(settled.lists.scores.len(), n, merged.width);
        holds(settled.lengths.len(), n, 4);
        holds(settled.open.len(), n, 1);
        holds(blend.sums.len(), n, merged.width);
        holds(records.0.len(), n, kernels::FinishSlates::record(most));
        let shape = kernels::FinishSlates {
            header: self.of(&asked.header).0,
            rows: self.of(&merged.rows).0,
            sources: self.of(&merged.sources).0,
            sums: self.of(&blend.sums).0,
            counts: self.of(&merged.counts).0,
            widths: settled.widths.map(count),
            weight: blend.weight,
            source_scores: self.of(&merged.source_scores).0,
            list_scores: self.of(&settled.lists.scores).0,
            lengths: self.of(&settled.lengths).0,
            search_weight: blend.search_weight,
            open: self.of(&settled.open).0,
            records: self.of(&records.0).0,
            n_requests: count(n),
        };
        // SAFETY: as above, and the header is the caller's word.
        unsafe { self.launch(&shaped(shape.launch())?) }
    }
}
