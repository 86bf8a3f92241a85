//! Launches: what a kernel is told, as plain numbers that the driver and the emulator take alike. Shapes are checked here, so that a
//! kernel need not; nothing is allocated.

/// An address in device memory; for the emulator, in the host's.
pub type DevicePtr = u64;

/// Threads of every block; `THREADS` in kernels/prelude.cu.
pub const THREADS: u32 = 256;
/// The most that [`TopkSelect`] and [`PartitionMerge`] return.
pub const MAX_K: u32 = 1024;
/// The most entries that [`MergeCandidates`] merges.
pub const MAX_MERGED: u32 = 2048;
/// The most blocks in the second direction of a grid.
pub(crate) const MAX_GRID_Y: u32 = 65_535;
/// The most blocks in the first direction of a grid; also the most columns of a row, so that sums of two stay below 2^32.
pub(crate) const MAX_GRID_X: u32 = i32::MAX as u32;
/// Rows and queries of a block; `SCORED_ROWS` and `SCORED_QUERIES` in kernels/scores.cu.
const SCORED_ROWS: u32 = 128;
const SCORED_QUERIES: u32 = 32;
/// Arguments of a launch.
pub const MOST_ARGUMENTS: usize = 20;

/// A launch can't be made of these shapes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{kernel}: {what} is {value}, expected {low} to {high}")]
pub struct ShapeError {
    /// The kernel.
    pub kernel: &'static str,
    /// Which number.
    pub what: &'static str,
    /// What it is.
    pub value: u64,
    /// The least that it may be.
    pub low: u64,
    /// The most that it may be.
    pub high: u64,
}

/// A kernel with its grid and arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Name in the module.
    pub kernel: &'static str,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block, in one direction.
    pub block: u32,
    /// Dynamic shared memory, bytes.
    pub shared_bytes: u32,
    arguments: [u64; MOST_ARGUMENTS],
    n_arguments: usize,
}

impl Launch {
    /// One value per parameter, a narrower one in the low bytes: on a little-endian host the address of each is what the driver wants.
    pub fn arguments(&self) -> &[u64] {
        &self.arguments[..self.n_arguments]
    }

    /// A launch of [`THREADS`] threads a block without dynamic shared memory. The launches of the kernels here are made by their own
    /// types, which check shapes.
    ///
    /// # Panics
    /// Beyond [`MOST_ARGUMENTS`].
    pub fn new<const N: usize>(kernel: &'static str, grid: [u32; 3], given: [u64; N]) -> Self {
        let mut arguments = [0; MOST_ARGUMENTS];
        arguments[..N].copy_from_slice(&given);
        Launch { kernel, grid, block: THREADS, shared_bytes: 0, arguments, n_arguments: N }
    }
}

/// Checks one number.
pub(crate) fn within(
    kernel: &'static str,
    what: &'static str,
    value: impl Into<u64>,
    low: u32,
    high: u32,
) -> Result<(), ShapeError> {
    let (value, low, high) = (value.into(), u64::from(low), u64::from(high));
    if (low..=high).contains(&value) { Ok(()) } else { Err(ShapeError { kernel, what, value, low, high }) }
}

/// kernels/topk_select.cu
#[derive(Clone, Copy, Debug)]
pub struct TopkSelect {
    /// f32 `[n_rows, stride]`
    pub scores: DevicePtr,
    /// u32 `[n_rows, stride]`; `None`: columns are their own ids.
    pub ids: Option<DevicePtr>,
    /// u32 `[n_rows]`; `None`: all rows have `n_cols`.
    pub lengths: Option<DevicePtr>,
    /// 1 to 2^31 - 1.
    pub n_rows: u32,
    /// Columns that count, at most 2^31 - 1.
    pub n_cols: u32,
    /// Columns that there are.
    pub stride: u32,
    /// Parts of each row, each with its own k best; 1 to 65,535. More than one where there are too few rows to fill the device.
    pub n_parts: u32,
    /// 1 to 1,024.
    pub k: u32,
    /// u32 `[n_rows, n_parts, k]`
    pub out_rows: DevicePtr,
    /// f32 `[n_rows, n_parts, k]`
    pub out_scores: DevicePtr,
}

impl TopkSelect {
    /// In how many parts each of `n_rows` (at least 1) is best selected: as many blocks as fill a GPU, three on each of an H100's 132
    /// multiprocessors, unless a part has fewer columns than are worth a block.
    pub fn n_parts(n_rows: usize, n_columns: usize) -> usize {
        const BLOCKS: usize = 396;
        const LEAST_COLUMNS: usize = 4096;
        (BLOCKS / n_rows).clamp(1, n_columns.div_ceil(LEAST_COLUMNS))
    }

    /// The launch.
    ///
    /// # Errors
    /// A number out of its range.
    pub fn launch(&self) -> Result<Launch, ShapeError> {
        let kernel = "topk_select";
        within(kernel, "n_rows", self.n_rows, 1, MAX_GRID_X)?;
        within(kernel, "stride", self.stride, 0, MAX_GRID_X)?;
        within(kernel, "n_cols", self.n_cols, 0, self.stride)?;
        within(kernel, "n_parts", self.n_parts, 1, MAX_GRID_Y)?;
        within(kernel, "k", self.k, 1, MAX_K)?;
        // Parts begin where 16-byte accesses do, if rows do.
        let part_cols = self.n_cols.div_ceil(self.n_parts).next_multiple_of(4);
        Ok(Launch::new(
            kernel,
            [self.n_rows, self.n_parts, 1],
            [
                self.scores,
                self.ids.unwrap_or(0),
                self.lengths.unwrap_or(0),
                self.n_cols.into(),
                self.stride.into(),
                part_cols.into(),
                self.k.into(),
                self.out_rows,
                self.out_scores,
            ],
        ))
    }
}

/// kernels/partition_merge.cu
#[derive(Clone, Copy, Debug)]
pub struct PartitionMerge {
    /// u32 `[n_queries, n_parts, width]`
    pub rows: DevicePtr,
    /// f32 `[n_queries, n_parts, width]`
    pub scores: DevicePtr,
    /// u32 `[n_parts]`; `None`: rows are those of the whole.
    pub offsets: Option<DevicePtr>,
    /// 1 to 2^31 - 1.
    pub n_queries: u32,
    /// Lists of a query.
    pub n_parts: u32,
    /// Entries of a list.
    pub width: u32,
    /// 1 to 1,024.
    pub k: u32,
    /// u32 `[n_queries, k]`
    pub out_rows: DevicePtr,
    /// f32 `[n_queries, k]`
    pub out_scores: DevicePtr,
}

impl PartitionMerge {
    /// The launch.
    ///
    /// # Errors
    /// A number out of its range.
    pub fn launch(&self) -> Result<Launch, ShapeError> {
        let kernel = "partition_merge";
        within(kernel, "n_queries", self.n_queries, 1, MAX_GRID_X)?;
        within(kernel, "n_parts * width", u64::from(self.n_parts) * u64::from(self.width), 0, MAX_GRID_X)?;
        within(kernel, "k", self.k, 1, MAX_K)?;
        Ok(Launch::new(
            kernel,
            [self.n_queries, 1, 1],
            [
                self.rows,
                self.scores,
                self.offsets.unwrap_or(0),
                self.n_parts.into(),
                self.width.into(),
                self.k.into(),
                self.out_rows,
                self.out_scores,
            ],
        ))
    }
}

/// kernels/merge_candidates.cu
#[derive(Clone, Copy, Debug)]
pub struct MergeCandidates {
    /// u32 `[n_requests, width]`, the lists of the sources one behind the other.
    pub rows: DevicePtr,
    /// f32 `[n_requests, width]`
    pub scores: DevicePtr,
    /// u32 `[n_requests, 4]`
    pub lengths: DevicePtr,
    /// 1 to 2^31 - 1.
    pub n_requests: u32,
    /// The most that each source's list holds; together at most 2,048.
    pub widths: [u32; 4],
    /// u32 `[n_requests, width]`
    pub out_rows: DevicePtr,
    /// u8 `[n_requests, width]`
    pub sources: DevicePtr,
    /// f32 `[n_requests, 4, width]`
    pub source_scores: DevicePtr,
    /// u16 `[n_requests, 4, width]`
    pub source_ranks: DevicePtr,
    /// u32 `[n_requests]`
    pub counts: DevicePtr,
}

impl MergeCandidates {
    /// The launch.
    ///
    /// # Errors
    /// A number out of its range.
    pub fn launch(&self) -> Result<Launch, ShapeError> {
        let kernel = "merge_candidates";
        within(kernel, "n_requests", self.n_requests, 1, MAX_GRID_X)?;
        let mut starts = [0u64; 5];
        for (source, &width) in self.widths.iter().enumerate() {
            starts[source + 1] = starts[source] + u64::from(width);
        }
        within(kernel, "the width of all lists", starts[4], 0, MAX_MERGED)?;
        Ok(Launch::new(
            kernel,
            [self.n_requests, 1, 1],
            [
                self.rows,
                self.scores,
                self.lengths,
                starts[4],
                starts[1],
                starts[2],
                starts[3],
                self.out_rows,
                self.sources,
                self.source_scores,
                self.source_ranks,
                self.counts,
            ],
        ))
    }
}

/// kernels/filter_candidates.cu
#[derive(Clone, Copy, Debug)]
pub struct FilterCandidates {
    /// u32 `[n_lists, width]`
    pub rows: DevicePtr,
    /// f32 `[n_lists, width]`
    pub scores: DevicePtr,
    /// u32 `[n_lists]`; `None`: all of `width`.
    pub lengths: Option<DevicePtr>,
    /// 1 to 2^31 - 1.
    pub n_lists: u32,
    /// At most 2^31 - 1.
    pub width: u32,
    /// `n_items` bits; `None`: all are available.
    pub available: Option<DevicePtr>,
    /// `[n_lists / lists_per_seen, seen_words]` u32 of bits; `None`: none was seen.
    pub seen: Option<DevicePtr>,
    /// At least `n_items / 32`, rounded up.
    pub seen_words: u32,
    /// Lists that share the bits of what was seen: those of one request. At least 1.
    pub lists_per_seen: u32,
    /// Rows from here on are dropped.
    pub n_items: u32,
    /// u32 `[n_lists, width]`; may be `rows`.
    pub out_rows: DevicePtr,
    /// f32 `[n_lists, width]`; may be `scores`.
    pub out_scores: DevicePtr,
    /// u32 `[n_lists]`
    pub counts: DevicePtr,
}

impl FilterCandidates {
    /// The launch.
    ///
    /// # Errors
    /// A number out of its range.
    pub fn launch(&self) -> Result<Launch, ShapeError> {
        let kernel = "filter_candidates";
        within(kernel, "n_lists", self.n_lists, 1, MAX_GRID_X)?;
        within(kernel, "width", self.width, 0, MAX_GRID_X)?;
        within(kernel, "lists_per_seen", self.lists_per_seen, 1, u32::MAX)?;
        if self.seen.is_some() {
            within(kernel, "seen_words", self.seen_words, self.n_items.div_ceil(32), u32::MAX)?;
        }
        Ok(Launch::new(
            kernel,
            [self.n_lists, 1, 1],
            [
                self.rows,
                self.scores,
                self.lengths.unwrap_or(0),
                self.width.into(),
                self.available.unwrap_or(0),
                self.seen.unwrap_or(0),
                self.seen_words.into(),
                self.lists_per_seen.into(),
                self.n_items.into(),
                self.out_rows,
                self.out_scores,
                self.counts,
            ],
        ))
    }
}

/// What both kernels of kernels/gather_rows.cu take.
#[derive(Clone, Copy, Debug)]
pub struct Gather {
    /// u32 `[n]`
    pub rows: DevicePtr,
    /// Rows to gather; at least 1.
    pub n: u32,
    /// `[n_rows, table_stride]` units, at a 16-byte boundary.
    pub table: DevicePtr,
    /// Rows of the table; others are zeros.
    pub n_rows: u32,
    /// Units of a row of the table.
    pub table_stride: u32,
    /// Units to copy of each row; at least 1, at most either stride.
    pub chunks: u32,
    /// `[n, out_stride]` units, at a 16-byte boundary; a column of a wider matrix may be meant.
    pub out: DevicePtr,
    /// Units of a row of the result.
    pub out_stride: u32,
}

/// Rows of any type; a unit is 16 bytes.
#[derive(Clone, Copy, Debug)]
pub struct GatherRows(pub Gather);

/// Rows of bf16 that become f32; a unit is 4 values: 8 bytes of the table, 16 of the result.
#[derive(Clone, Copy, Debug)]
pub struct Bf16GatherAsF32(pub Gather);

impl GatherRows {
    /// The launch.
    ///
    /// # Errors
    /// A number out of its range.
    pub fn launch(&self) -> Result<Launch, ShapeError> {
        self.0.launch("gather_rows")
    }
}

impl Bf16GatherAsF32 {
    /// The launch.
    ///
    /// # Errors
    /// A number out of its range.
    pub fn launch(&self) -> Result<Launch, ShapeError> {
        self.0.launch("gather_bf16_as_f32")
    }
}

impl Gather {
    fn launch(&self, kernel: &'static str) -> Result<Launch, ShapeError> {
        within(kernel, "chunks", self.chunks, 1, self.table_stride.min(self.out_stride))?;
        let total = u64::from(self.n) * u64::from(self.chunks);
        within(kernel, "n * chunks", total, 1, u32::MAX)?;
        within(kernel, "the table's address modulo 16", self.table % 16, 0, 0)?;
        within(kernel, "the result's address modulo 16", self.out % 16, 0, 0)?;
        Ok(Launch::new(
            kernel,
            [total.div_ceil(u64::from(4 * THREADS)) as u32, 1, 1],
            [
                self.rows,
                self.n.into(),
                self.table,
                self.n_rows.into(),
                self.table_stride.into(),
                self.chunks.into(),
                self.out,
                self.out_stride.into(),
            ],
        ))
    }
}

/// How an inner product becomes a score; [`Scores::terms`] are of the rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ScoreBy {
    /// As it is.
    InnerProduct = 0,
    /// Times the row's term: cosine by `1 / |x|`, but for the query's length.
    Times = 1,
    /// Twice it less the row's term: squared distance by `|x|²`, but for sign and the query's square.
    TwiceLess = 2,
}

/// What both scoring kernels of kernels/scores.cu take.
#[derive(Clone, Copy, Debug)]
pub struct Scores {
    /// f32 `[n_queries, width]`, at a 16-byte boundary.
    pub queries: DevicePtr,
    /// 1 to 2,097,120.
    pub n_queries: u32,
    /// `[n_rows, width]`, at a 16-byte boundary.
    pub table: DevicePtr,
    /// 1 to 2^31 - 1.
    pub n_rows: u32,
    /// Values of a row, zeros at its end among them: a multiple of 4, at most 65,536.
    pub width: u32,
    /// f32 `[n_rows]`; not read where the score is the inner product.
    pub terms: DevicePtr,
    /// What the score is.
    pub by: ScoreBy,
    /// `n_rows` bits; `None`: all are available.
    pub available: Option<DevicePtr>,
    /// f32 `[n_queries, stride]`
    pub scores: DevicePtr,
    /// At least `n_rows`, at most 2^31 - 1.
    pub stride: u32,
}

/// A table of f32.
#[derive(Clone, Copy, Debug)]
pub struct ScoresF32(pub Scores);

/// A table of bf16.
#[derive(Clone, Copy, Debug)]
pub struct ScoresBf16(pub Scores);

impl ScoresF32 {
    /// The launch.
    ///
    /// # Errors
    /// A number out of its range.
    pub fn launch(&self) -> Result<Launch, ShapeError> {
        self.0.launch("scores_f32")
    }
}

impl ScoresBf16 {
    /// The launch.
    ///
    /// # Errors
    /// A number out of its range.
    pub fn launch(&self) -> Result<Launch, ShapeError> {
        self.0.launch("scores_bf16")
    }
}

impl Scores {
    fn launch(&self, kernel: &'static str) -> Result<Launch, ShapeError> {
        within(kernel, "n_queries", self.n_queries, 1, MAX_GRID_Y * SCORED_QUERIES)?;
        within(kernel, "n_rows", self.n_rows, 1, MAX_GRID_X)?;
        within(kernel, "stride", self.stride, self.n_rows, MAX_GRID_X)?;
        within(kernel, "width", self.width, 0, 1 << 16)?;
        within(kernel, "width modulo 4", self.width % 4, 0, 0)?;
        within(kernel, "the queries' address modulo 16", self.queries % 16, 0, 0)?;
        within(kernel, "the table's address modulo 16", self.table % 16, 0, 0)?;
        Ok(Launch::new(
            kernel,
            [self.n_rows.div_ceil(SCORED_ROWS), self.n_queries.div_ceil(SCORED_QUERIES), 1],
            [
                self.queries,
                self.n_queries.into(),
                self.table,
                self.n_rows.into(),
                (self.width / 4).into(),
                if self.by == ScoreBy::InnerProduct { 0 } else { self.terms },
                self.by as u64,
                self.available.unwrap_or(0),
                self.scores,
                self.stride.into(),
            ],
        ))
    }
}

/// The third kernel of kernels/scores.cu.
#[derive(Clone, Copy, Debug)]
pub struct MaskScores {
    /// u32 `[n, 2]`, at an 8-byte boundary.
    pub pairs: DevicePtr,
    /// 1 to 2^31 - 1.
    pub n: u32,
    /// f32 `[n_queries, stride]`
    pub scores: DevicePtr,
    /// Queries that there are.
    pub n_queries: u32,
    /// Rows that there are, at most `stride`.
    pub n_rows: u32,
    /// At most 2^31 - 1.
    pub stride: u32,
}

impl MaskScores {
    /// The launch.
    ///
    /// # Errors
    /// A number out of its range.
    pub fn launch(&self) -> Result<Launch, ShapeError> {
        let kernel = "mask_scores";
        within(kernel, "n", self.n, 1, MAX_GRID_X)?;
        within(kernel, "stride", self.stride, 0, MAX_GRID_X)?;
        within(kernel, "n_rows", self.n_rows, 0, self.stride)?;
        within(kernel, "the pairs' address modulo 8", self.pairs % 8, 0, 0)?;
        Ok(Launch::new(
            kernel,
            [self.n.div_ceil(THREADS), 1, 1],
            [self.pairs, self.n.into(), self.scores, self.n_queries.into(), self.n_rows.into(), self.stride.into()],
        ))
    }
}

/// kernels/take_neighbors.cu
#[derive(Clone, Copy, Debug)]
pub struct TakeNeighbors {
    /// i64 `[n_lists, width]`, at an 8-byte boundary.
    pub neighbors: DevicePtr,
    /// f32 `[n_lists, width]`
    pub distances: DevicePtr,
    /// A score is `factor * distance + offset`.
    pub factor: f32,
    /// See [`Self::factor`].
    pub offset: f32,
    /// 1 to 2^31 - 1.
    pub n_lists: u32,
    /// Entries of a list that is read, 1 to 1,024.
    pub width: u32,
    /// Neighbours from here on are none.
    pub n_rows: u32,
    /// `n_rows` bits; `None`: all are available.
    pub available: Option<DevicePtr>,
    /// Entries of a list that is written, 1 to 1,024.
    pub k: u32,
    /// u32 `[n_lists, k]`
    pub out_rows: DevicePtr,
    /// f32 `[n_lists, k]`
    pub out_scores: DevicePtr,
}

impl TakeNeighbors {
    /// The launch.
    ///
    /// # Errors
    /// A number out of its range.
    pub fn launch(&self) -> Result<Launch, ShapeError> {
        let kernel = "take_neighbors";
        within(kernel, "n_lists", self.n_lists, 1, MAX_GRID_X)?;
        within(kernel, "width", self.width, 1, MAX_K)?;
        within(kernel, "k", self.k, 1, MAX_K)?;
        within(kernel, "the neighbors' address modulo 8", self.neighbors % 8, 0, 0)?;
        Ok(Launch::new(
            kernel,
            [self.n_lists, 1, 1],
            [
                self.neighbors,
                self.distances,
                self.factor.to_bits().into(),
                self.offset.to_bits().into(),
                self.width.into(),
                self.n_rows.into(),
                self.available.unwrap_or(0),
                self.k.into(),
                self.out_rows,
                self.out_scores,
            ],
        ))
    }
}
