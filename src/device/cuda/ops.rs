//! Kernels as calls that check the shapes of what they are given.
#![allow(unsafe_code)] // Launches of kernels whose arguments are checked here.

use half::bf16;
use tastemaker_kernels as kernels;
use tastemaker_kernels::{Launch, ScoreBy, ShapeError};

use super::stream::{Buffer, Part, PartMut, Stream};
use crate::device::DeviceError;

/// A table of vectors, of either type.
#[derive(Clone, Copy, Debug)]
pub enum Vectors<'a> {
    /// f32 `[n_rows, width]`
    F32(Part<'a, f32>),
    /// bf16 `[n_rows, width]`
    Bf16(Part<'a, bf16>),
}

/// What [`Stream::scores`] computes, but for where.
#[derive(Clone, Copy, Debug)]
pub struct Scoring<'a> {
    /// f32 `[n_queries, width]`
    pub queries: Part<'a, f32>,
    /// Queries.
    pub n_queries: usize,
    /// `[n_rows, width]`
    pub vectors: Vectors<'a>,
    /// Rows.
    pub n_rows: usize,
    /// Values of a vector, zeros at its end among them; a multiple of 4.
    pub width: usize,
    /// What a score is.
    pub by: ScoreBy,
    /// f32 `[n_rows]`, unless the score is the inner product.
    pub terms: Option<Part<'a, f32>>,
    /// Bits of `n_rows` rows; those without get NaN.
    pub available: Option<Part<'a, u32>>,
}

/// Where lists of scored rows are.
#[derive(Debug)]
pub struct ListsMut<'a> {
    /// u32
    pub rows: PartMut<'a, u32>,
    /// f32
    pub scores: PartMut<'a, f32>,
}

/// Lists of scored rows.
#[derive(Clone, Copy, Debug)]
pub struct Lists<'a> {
    /// u32
    pub rows: Part<'a, u32>,
    /// f32
    pub scores: Part<'a, f32>,
}

/// A compiled ranker's memory, and how it is launched.
#[derive(Clone, Copy, Debug)]
pub struct Ranking<'a> {
    /// u32: the program's words.
    pub program: Part<'a, u32>,
    /// u32
    pub params: Part<'a, u32>,
    /// Rows as [`kernels::dense::TableShape`] says; `None`: the program reads none.
    pub table: Option<Part<'a, u32>>,
    /// Words of a row of the table.
    pub line_words: usize,
    /// Columns of a candidate.
    pub n_columns: usize,
    /// Values of a request's row.
    pub shared_width: usize,
    /// Candidates of a block.
    pub block_rows: u32,
    /// Words of shared memory of a candidate.
    pub units: u32,
    /// What scores are multiplied by.
    pub weight: f32,
    /// Whether scores are written, or added to what is there.
    pub first: bool,
}

/// Rows beside a table, numbered from the table's last one on.
#[derive(Clone, Copy, Debug)]
pub struct MoreRows<'a> {
    /// In the table's own numbers and width.
    pub rows: Part<'a, u32>,
    /// Rows that there is room for.
    pub n: usize,
}

/// Candidates of requests, `width` places for each.
#[derive(Clone, Copy, Debug)]
pub struct RankBatch<'a> {
    /// Items' rows, u32 `[n_requests, width]`; a place with `NO_ROW`, with a row that neither the ranker's table nor what lies beside it
    /// has, or beyond the count is a hole.
    pub rows: Part<'a, u32>,
    /// What lies beside the ranker's table; `None`: nothing.
    pub more: Option<MoreRows<'a>>,
    /// u32 `[n_requests]`
    pub counts: Part<'a, u32>,
    /// Requests; 1 to 65,535.
    pub n_requests: usize,
    /// Places for candidates of a request.
    pub width: usize,
    /// f32 `[n_requests, shared_width]`: what `DenseRanker::share` computes of a request.
    pub shared: Part<'a, f32>,
    /// f32 `[n_requests, width, n_columns]`: candidates' own columns; what holes have is not read.
    pub columns: Part<'a, f32>,
}

/// A number for a launch; what does not fit is out of every range.
pub(super) fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

pub(super) fn shaped(launch: Result<Launch, ShapeError>) -> Result<Launch, DeviceError> {
    launch.map_err(|error| DeviceError::Failed(error.to_string()))
}

/// Whether a part is long enough.
#[track_caller]
pub(super) fn holds(len: usize, rows: usize, columns: usize) {
    assert!(rows.checked_mul(columns).is_some_and(|n| n <= len), "{rows} x {columns} in {len}");
}

impl Stream {
    /// For a kernel.
    pub(super) fn more(&self, more: Option<MoreRows<'_>>) -> kernels::More {
        more.map_or_else(Default::default, |more| kernels::More { rows: self.of(&more.rows).0, n: count(more.n) })
    }

    /// How near every row is to every query: f32 `[n_queries, n_rows]`.
    ///
    /// # Errors
    /// A number that the kernel does not take, or what the driver says.
    ///
    /// # Panics
    /// If something is too short for the shapes, or another stream's.
    pub fn scores(&self, scoring: Scoring<'_>, out: PartMut<'_, f32>) -> Result<(), DeviceError> {
        self.scores_among(scoring, scoring.n_rows, out)
    }

    /// The same, `stride` values from one query's to the next one's: f32 `[n_queries, stride]`, of which `n_rows` are written.
    ///
    /// # Errors
    /// As [`Self::scores`].
    ///
    /// # Panics
    /// As [`Self::scores`].
    pub fn scores_among(&self, scoring: Scoring<'_>, stride: usize, out: PartMut<'_, f32>) -> Result<(), DeviceError> {
        let Scoring { queries, n_queries, vectors, n_rows, width, by, terms, available } = scoring;
        holds(queries.len(), n_queries, width);
        holds(stride, n_rows, 1);
        holds((out.0.len() + stride).saturating_sub(n_rows), n_queries, stride);
        if by != ScoreBy::InnerProduct {
            holds(terms.map_or(0, |terms| terms.len()), n_rows, 1);
        }
        if let Some(available) = available {
            holds(available.len(), n_rows.div_ceil(32), 1);
        }
        let table = match vectors {
            Vectors::F32(table) => self.of(&table),
            Vectors::Bf16(table) => self.of(&table),
        };
        holds(table.1, n_rows, width);
        let shape = kernels::Scores {
            queries: self.of(&queries).0,
            n_queries: count(n_queries),
            table: table.0,
            n_rows: count(n_rows),
            width: count(width),
            terms: terms.map_or(0, |terms| self.of(&terms).0),
            by,
            available: available.map(|available| self.of(&available).0),
            scores: self.of(&out.0).0,
            stride: count(stride),
        };
        let launch = match vectors {
            Vectors::F32(_) => kernels::ScoresF32(shape).launch(),
            Vectors::Bf16(_) => kernels::ScoresBf16(shape).launch(),
        };
        // SAFETY: the parts are this stream's or tables, and as long as the kernel reads and writes: checked above.
        unsafe { self.launch(&shaped(launch)?) }
    }

    /// Takes the scores (f32 `[n_queries, n_rows]`) of `n` pairs of query and row away.
    ///
    /// # Errors
    /// As [`Self::scores`].
    ///
    /// # Panics
    /// As [`Self::scores`].
    pub fn mask_scores(
        &self,
        pairs: Part<'_, u32>,
        n: usize,
        scores: PartMut<'_, f32>,
        [n_queries, n_rows]: [usize; 2],
    ) -> Result<(), DeviceError> {
        holds(pairs.len(), n, 2);
        holds(scores.0.len(), n_queries, n_rows);
        let shape = kernels::MaskScores {
            pairs: self.of(&pairs).0,
            n: count(n),
            scores: self.of(&scores.0).0,
            n_queries: count(n_queries),
            n_rows: count(n_rows),
            stride: count(n_rows),
        };
        // SAFETY: as in `scores`; pairs beyond the scores are skipped by the kernel.
        unsafe { self.launch(&shaped(shape.launch())?) }
    }

    /// The `k` best of each of `n_parts` parts of every row of `scores` (f32 `[n_rows, n_cols]`), of which as many columns count as
    /// `lengths` says (u32 `[n_rows]`), or all: `[n_rows, n_parts, k]`.
    ///
    /// # Errors
    /// As [`Self::scores`].
    ///
    /// # Panics
    /// As [`Self::scores`].
    pub fn topk(
        &self,
        scores: Part<'_, f32>,
        lengths: Option<Part<'_, u32>>,
        [n_rows, n_cols, n_parts, k]: [usize; 4],
        out: ListsMut<'_>,
    ) -> Result<(), DeviceError> {
        holds(scores.len(), n_rows, n_cols);
        if let Some(lengths) = lengths {
            holds(lengths.len(), n_rows, 1);
        }
        holds(out.rows.0.len(), n_rows.saturating_mul(n_parts), k);
        holds(out.scores.0.len(), n_rows.saturating_mul(n_parts), k);
        let shape = kernels::TopkSelect {
            scores: self.of(&scores).0,
            ids: None,
            lengths: lengths.map(|lengths| self.of(&lengths).0),
            n_rows: count(n_rows),
            n_cols: count(n_cols),
            stride: count(n_cols),
            n_parts: count(n_parts),
            k: count(k),
            out_rows: self.of(&out.rows.0).0,
            out_scores: self.of(&out.scores.0).0,
        };
        // SAFETY: as in `scores`.
        unsafe { self.launch(&shaped(shape.launch())?) }
    }

    /// The `k` best of all of a query's lists (`[n_queries, n_parts, width]`): `[n_queries, k]`.
    ///
    /// # Errors
    /// As [`Self::scores`].
    ///
    /// # Panics
    /// As [`Self::scores`].
    pub fn partition_merge(
        &self,
        lists: Lists<'_>,
        [n_queries, n_parts, width, k]: [usize; 4],
        out: ListsMut<'_>,
    ) -> Result<(), DeviceError> {
        holds(lists.rows.len(), n_queries.saturating_mul(n_parts), width);
        holds(lists.scores.len(), n_queries.saturating_mul(n_parts), width);
        holds(out.rows.0.len(), n_queries, k);
        holds(out.scores.0.len(), n_queries, k);
        let shape = kernels::PartitionMerge {
            rows: self.of(&lists.rows).0,
            scores: self.of(&lists.scores).0,
            offsets: None,
            n_queries: count(n_queries),
            n_parts: count(n_parts),
            width: count(width),
            k: count(k),
            out_rows: self.of(&out.rows.0).0,
            out_scores: self.of(&out.scores.0).0,
        };
        // SAFETY: as in `scores`.
        unsafe { self.launch(&shaped(shape.launch())?) }
    }

    /// The `k` best of every row of scores: as [`Self::topk`] in that many parts, which are put together in `parts`
    /// (u32 `[2, n_rows, n_parts, k]`, used where there is more than one).
    ///
    /// # Errors
    /// As [`Self::scores`].
    ///
    /// # Panics
    /// As [`Self::scores`].
    pub fn best(
        &self,
        scores: Part<'_, f32>,
        lengths: Option<Part<'_, u32>>,
        [n_rows, n_cols, n_parts, k]: [usize; 4],
        parts: &mut Buffer<u32>,
        out: ListsMut<'_>,
    ) -> Result<(), DeviceError> {
        if n_parts == 1 {
            return self.topk(scores, lengths, [n_rows, n_cols, 1, k], out);
        }
        let size = n_rows * n_parts * k;
        let (rows, of_rows) = parts.part_mut(0..2 * size).split_at(size);
        let lists = ListsMut { rows, scores: of_rows.as_type() };
        self.topk(scores, lengths, [n_rows, n_cols, n_parts, k], lists)?;
        let lists = parts.part(0..2 * size);
        let lists = Lists { rows: lists.part(0..size), scores: lists.part(size..2 * size).as_type() };
        self.partition_merge(lists, [n_rows, n_parts, k, k], out)
    }

    /// Scores of candidates by a compiled ranker, f32 `[n_requests, width]`: NaN in holes.
    ///
    /// # Errors
    /// As [`Self::scores`].
    ///
    /// # Panics
    /// As [`Self::scores`].
    ///
    /// # Safety
    /// Program and parameters are what one `tastemaker_kernels::dense::Program` gives, which `n_columns`, `shared_width` and `units` are of;
    /// the table is of the shape that the program was given, and no piece of it or of the shared values ends beyond its row.
    pub(super) unsafe fn dense_rank(
        &self,
        ranking: Ranking<'_>,
        batch: RankBatch<'_>,
        scores: PartMut<'_, f32>,
    ) -> Result<(), DeviceError> {
        let RankBatch { rows, more, counts, n_requests, width, shared, columns } = batch;
        let slots = n_requests.saturating_mul(width);
        holds(rows.len(), n_requests, width);
        holds(scores.0.len(), n_requests, width);
        holds(counts.len(), n_requests, 1);
        holds(shared.len(), n_requests, ranking.shared_width);
        holds(columns.len(), slots, ranking.n_columns);
        let more = more.filter(|_| ranking.table.is_some());
        if let Some(MoreRows { rows, n }) = &more {
            holds(rows.len(), *n, ranking.line_words);
        }
        let shape = kernels::dense::DenseRank {
            program: self.of(&ranking.program).0,
            params: self.of(&ranking.params).0,
            table: ranking.table.map(|table| self.of(&table).0),
            more: self.more(more),
            rows: self.of(&rows).0,
            counts: self.of(&counts).0,
            columns: self.of(&columns).0,
            shared: self.of(&shared).0,
            n_requests: count(n_requests),
            width: count(width),
            block_rows: ranking.block_rows,
            units: ranking.units,
            weight: ranking.weight,
            first: ranking.first,
            scores: self.of(&scores.0).0,
        };
        // SAFETY: as in `scores`, and by contract.
        unsafe { self.launch(&shaped(shape.launch())?) }
    }

    /// What a library found (`[n_lists, width]`; distances times `scale[0]` plus `scale[1]` are scores) as lists of `k`, in order, each of
    /// the `n_rows` rows once, and only those that are `available`.
    ///
    /// # Errors
    /// As [`Self::scores`].
    ///
    /// # Panics
    /// As [`Self::scores`].
    pub fn take_neighbors(
        &self,
        (neighbors, distances): (Part<'_, i64>, Part<'_, f32>),
        scale: [f32; 2],
        [n_lists, width, n_rows, k]: [usize; 4],
        available: Option<Part<'_, u32>>,
        out: ListsMut<'_>,
    ) -> Result<(), DeviceError> {
        holds(neighbors.len(), n_lists, width);
        holds(distances.len(), n_lists, width);
        holds(out.rows.0.len(), n_lists, k);
        holds(out.scores.0.len(), n_lists, k);
        if let Some(available) = available {
            holds(available.len(), n_rows.div_ceil(32), 1);
        }
        let shape = kernels::TakeNeighbors {
            neighbors: self.of(&neighbors).0,
            distances: self.of(&distances).0,
            factor: scale[0],
            offset: scale[1],
            n_lists: count(n_lists),
            width: count(width),
            n_rows: count(n_rows),
            available: available.map(|available| self.of(&available).0),
            k: count(k),
            out_rows: self.of(&out.rows.0).0,
            out_scores: self.of(&out.scores.0).0,
        };
        // SAFETY: as in `scores`.
        unsafe { self.launch(&shaped(shape.launch())?) }
    }
}
