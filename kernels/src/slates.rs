//! Launches of what makes slates of scores: the kernels of exact_scores.cu, settle_lists.cu, fill_columns.cu and finish_slates.cu.

use super::More;
use super::launch::{
    DevicePtr, Launch, MAX_GRID_X, MAX_GRID_Y, MAX_K, MAX_MERGED, ScoreBy, ShapeError, THREADS, within,
};

/// Rows of a block; `EXACT_ROWS` in kernels/exact_scores.cu.
const EXACT_ROWS: u32 = 32;

/// In which order a CPU adds products up: how many sums run side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum SumOrder {
    /// Eight, without fused multiply-adds.
    Portable = 8,
    /// Four registers of eight.
    Avx2 = 32,
    /// Four registers of sixteen.
    Avx512 = 64,
}

/// kernels/exact_scores.cu
#[derive(Clone, Copy, Debug)]
pub struct ExactScores {
    /// f32 `[n_requests, width]`
    pub queries: DevicePtr,
    /// f32 `[n_rows, width]`
    pub table: DevicePtr,
    /// Rows of the table.
    pub n_rows: u32,
    /// Values of a row.
    pub width: u32,
    /// Values of a row that count, at most `width`.
    pub dim: u32,
    /// f32 `[n_rows]`; not read where the score is the inner product.
    pub norms: DevicePtr,
    /// f32 `[n, width]`: beside the table.
    pub more: More,
    /// f32 `[n]`: theirs, as [`Self::norms`].
    pub more_norms: DevicePtr,
    /// u32: bits of those that have a vector.
    pub more_there: DevicePtr,
    /// What the score is.
    pub by: ScoreBy,
    /// How it is summed up.
    pub order: SumOrder,
    /// f32 `[n_requests, 4]`, at a 16-byte boundary; the last is the query's length.
    pub bounds: DevicePtr,
    /// u32 `[n_requests, places]`
    pub rows: DevicePtr,
    /// u32 `[n_requests]`; `None`: all places.
    pub counts: Option<DevicePtr>,
    /// u8 `[n_requests, places]`: those with bit 0 are left out; `None`: none.
    pub sources: Option<DevicePtr>,
    /// f32 `[n_requests, places]`
    pub scores: DevicePtr,
    /// 1 to 65,535.
    pub n_requests: u32,
    /// Rows of a request, at least 1.
    pub places: u32,
}

impl ExactScores {
    /// The launch.
    ///
    /// # Errors
    /// A number out of its range.
    pub fn launch(&self) -> Result<Launch, ShapeError> {
        let kernel = "exact_scores";
        within(kernel, "n_requests", self.n_requests, 1, MAX_GRID_Y)?;
        within(kernel, "places", self.places, 1, MAX_GRID_X)?;
        within(kernel, "dim", self.dim, 0, self.width)?;
        within(kernel, "the bounds' address modulo 16", self.bounds % 16, 0, 0)?;
        Ok(Launch::new(
            kernel,
            [self.places.div_ceil(EXACT_ROWS), self.n_requests, 1],
            [
                self.queries,
                self.table,
                self.n_rows.into(),
                self.width.into(),
                self.dim.into(),
                if self.by == ScoreBy::InnerProduct { 0 } else { self.norms },
                self.by as u64,
                self.order as u64,
                self.bounds,
                self.rows,
                self.counts.unwrap_or(0),
                self.sources.unwrap_or(0),
                self.scores,
                self.places.into(),
                self.more.rows,
                self.more_norms,
                self.more_there,
                self.more.n.into(),
            ],
        ))
    }
}

/// The first kernel of kernels/settle_lists.cu.
#[derive(Clone, Copy, Debug)]
pub struct MaskSeen {
    /// u32
    pub tail: DevicePtr,
    /// u32 `[n_requests, 8]`
    pub asked: DevicePtr,
    /// f32 `[n_requests, n_rows]`
    pub scores: DevicePtr,
    /// 1 to 2^31 - 1.
    pub n_requests: u32,
    /// Rows that there are.
    pub n_rows: u32,
}

impl MaskSeen {
    /// The launch.
    ///
    /// # Errors
    /// A number out of its range.
    pub fn launch(&self) -> Result<Launch, ShapeError> {
        let kernel = "mask_seen";
        within(kernel, "n_requests", self.n_requests, 1, MAX_GRID_X)?;
        Ok(Launch::new(kernel, [self.n_requests, 1, 1], [self.tail, self.asked, self.scores, self.n_rows.into()]))
    }
}

/// Where the lists of the sources begin, and the width of all.
fn starts(kernel: &'static str, widths: [u32; 4]) -> Result<[u64; 4], ShapeError> {
    let mut end = 0u64;
    let ends = widths.map(|width| {
        end += u64::from(width);
        end
    });
    within(kernel, "the width of all lists", end, 1, MAX_MERGED)?;
    Ok(ends)
}

/// The second kernel of kernels/settle_lists.cu.
#[derive(Clone, Copy, Debug)]
pub struct SettleLists {
    /// u32 `[4]`
    pub header: DevicePtr,
    /// u32 `[n_requests, fetched]`
    pub rows: DevicePtr,
    /// f32 `[n_requests, fetched]`
    pub scores: DevicePtr,
    /// f32 `[n_requests, fetched]`
    pub exact: DevicePtr,
    /// 1 to 1,024.
    pub fetched: u32,
    /// f32 `[n_requests, 4]`, at a 16-byte boundary.
    pub bounds: DevicePtr,
    /// u32
    pub tail: DevicePtr,
    /// u32 `[n_requests, 8]`
    pub asked: DevicePtr,
    /// The most that each source's list holds, the first at most `fetched`; together 1 to 2,048.
    pub widths: [u32; 4],
    /// 1 to 2^31 - 1.
    pub n_requests: u32,
    /// u32 `[n_requests, width]`
    pub out_rows: DevicePtr,
    /// f32 `[n_requests, width]`
    pub out_scores: DevicePtr,
    /// u32 `[n_requests, 4]`
    pub lengths: DevicePtr,
    /// u32 `[n_requests]`
    pub open: DevicePtr,
}

impl SettleLists {
    /// The launch.
    ///
    /// # Errors
    /// A number out of its range.
    pub fn launch(&self) -> Result<Launch, ShapeError> {
        let kernel = "settle_lists";
        within(kernel, "n_requests", self.n_requests, 1, MAX_GRID_X)?;
        within(kernel, "fetched", self.fetched, 1, MAX_K)?;
        within(kernel, "k", self.widths[0], 0, self.fetched)?;
        within(kernel, "the bounds' address modulo 16", self.bounds % 16, 0, 0)?;
        let [start_1, start_2, start_3, width] = starts(kernel, self.widths)?;
        Ok(Launch::new(
            kernel,
            [self.n_requests, 1, 1],
            [
                self.header,
                self.rows,
                self.scores,
                self.exact,
                self.fetched.into(),
                self.bounds,
                self.tail,
                self.asked,
                start_1,
                start_2,
                start_3,
                width,
                self.out_rows,
                self.out_scores,
                self.lengths,
                self.open,
            ],
        ))
    }
}

/// What [`FillColumns`] can write; sources by their numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Column {
    /// The source's own score, 0 where it did not propose the candidate.
    SourceScore(u8),
    /// One over the place in the source's list, 0 where it did not.
    SourceRank(u8),
    /// 1 where it did.
    SourcePresent(u8),
    /// The metric's score of the user's vector and the item's.
    Dot,
    /// What the history says of the candidate through the lists of neighbours: sum of weight times similarity.
    CoSum,
    /// The largest similarity.
    CoMax,
    /// ln(1 + the number of liked items that list it).
    CoCount,
    /// Sum over number.
    CoMean,
    /// The sum of the three largest similarities.
    CoTop3,
    /// Another kernel writes it.
    Counted,
}

impl Column {
    /// As the kernel takes it.
    pub fn code(self) -> u32 {
        match self {
            Column::SourceScore(source) => u32::from(source) << 8,
            Column::SourceRank(source) => 1 | u32::from(source) << 8,
            Column::SourcePresent(source) => 2 | u32::from(source) << 8,
            Column::Dot => 3,
            Column::CoSum => 4,
            Column::CoMax => 5,
            Column::CoCount => 6,
            Column::CoMean => 7,
            Column::CoTop3 => 8,
            Column::Counted => 9,
        }
    }

    /// Whether it reads lists of neighbours.
    pub fn reads_lists(self) -> bool {
        (Column::CoSum.code()..=Column::CoTop3.code()).contains(&(self.code() & 255))
    }
}

/// What [`FillCounts`] makes of how often the history holds an item's codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum CountBy {
    /// ln(1 + the sum over the codes).
    Logarithm = 0,
    /// The first code's, over the liked items.
    First = 1,
    /// The sum, over the liked items and the item's codes.
    Share = 2,
}

/// The second kernel of kernels/fill_columns.cu.
#[derive(Clone, Copy, Debug)]
pub struct FillCounts {
    /// u32 `[n_requests, width]`
    pub rows: DevicePtr,
    /// u32 `[n_requests]`
    pub counts: DevicePtr,
    /// 1 to 2^31 - 1.
    pub n_requests: u32,
    /// 1 to 2,048.
    pub width: u32,
    /// u32 `[n_items + 1]`
    pub offsets: DevicePtr,
    /// u32
    pub codes: DevicePtr,
    /// Items.
    pub n_items: u32,
    /// u32 `[n, 2]`: beside these, where codes of each begin and end.
    pub more: More,
    /// u32: theirs.
    pub more_codes: DevicePtr,
    /// u32
    pub tail: DevicePtr,
    /// u32 `[n_requests, 8]`
    pub asked: DevicePtr,
    /// u32 `[n_requests, places_stride]`
    pub places: DevicePtr,
    /// Words of a request's places.
    pub places_stride: u32,
    /// Which of them; `place + 1` is one, too.
    pub place: u32,
    /// What the value is.
    pub by: CountBy,
    /// f32 `[n_logarithms]`
    pub logarithms: DevicePtr,
    /// At least 1.
    pub n_logarithms: u32,
    /// f32 `[n_requests, width, stride]`
    pub values: DevicePtr,
    /// Values of a candidate.
    pub stride: u32,
    /// Which of them, below `stride`.
    pub column: u32,
}

impl FillCounts {
    /// The launch.
    ///
    /// # Errors
    /// A number out of its range.
    pub fn launch(&self) -> Result<Launch, ShapeError> {
        let kernel = "fill_counts";
        within(kernel, "n_requests", self.n_requests, 1, MAX_GRID_X)?;
        within(kernel, "width", self.width, 1, MAX_MERGED)?;
        within(kernel, "place", self.place, 0, self.places_stride.saturating_sub(2))?;
        within(kernel, "column", self.column, 0, self.stride.saturating_sub(1))?;
        within(kernel, "n_logarithms", self.n_logarithms, 1, u32::MAX)?;
        Ok(Launch::new(
            kernel,
            [self.n_requests, 1, 1],
            [
                self.rows,
                self.counts,
                self.width.into(),
                self.offsets,
                self.codes,
                self.n_items.into(),
                self.tail,
                self.asked,
                self.places,
                self.places_stride.into(),
                self.place.into(),
                self.by as u64,
                self.logarithms,
                self.n_logarithms.into(),
                self.values,
                self.stride.into(),
                self.column.into(),
                self.more.rows,
                self.more_codes,
                self.more.n.into(),
            ],
        ))
    }
}

/// kernels/fill_columns.cu
#[derive(Clone, Copy, Debug)]
pub struct FillColumns {
    /// u32 `[n_requests, width]`
    pub rows: DevicePtr,
    /// u8 `[n_requests, width]`
    pub sources: DevicePtr,
    /// f32 `[n_requests, 4, width]`
    pub source_scores: DevicePtr,
    /// u16 `[n_requests, 4, width]`
    pub source_ranks: DevicePtr,
    /// u32 `[n_requests]`
    pub counts: DevicePtr,
    /// 1 to 2^31 - 1.
    pub n_requests: u32,
    /// 1 to 2,048.
    pub width: u32,
    /// f32 `[n_requests, width]`
    pub dots: DevicePtr,
    /// u32 `[n_columns]`: [`Column::code`]s.
    pub columns: DevicePtr,
    /// At most `stride`.
    pub n_columns: u32,
    /// u64 `[n_keys + 1]`
    pub offsets: DevicePtr,
    /// Items with lists; 0: no column reads them.
    pub n_keys: u32,
    /// u32
    pub list_rows: DevicePtr,
    /// f32
    pub list_scores: DevicePtr,
    /// u32
    pub tail: DevicePtr,
    /// u32 `[n_requests, 8]`
    pub asked: DevicePtr,
    /// f32 `[n_logarithms]`
    pub logarithms: DevicePtr,
    /// At least 1.
    pub n_logarithms: u32,
    /// f32 `[n_requests, width, stride]`
    pub values: DevicePtr,
    /// Values of a candidate.
    pub stride: u32,
}

impl FillColumns {
    /// The launch.
    ///
    /// # Errors
    /// A number out of its range.
    pub fn launch(&self) -> Result<Launch, ShapeError> {
        let kernel = "fill_columns";
        within(kernel, "n_requests", self.n_requests, 1, MAX_GRID_X)?;
        within(kernel, "width", self.width, 1, MAX_MERGED)?;
        within(kernel, "n_columns", self.n_columns, 0, self.stride)?;
        within(kernel, "n_logarithms", self.n_logarithms, 1, u32::MAX)?;
        let mut launch = Launch::new(
            kernel,
            [self.n_requests, 1, 1],
            [
                self.rows,
                self.sources,
                self.source_scores,
                self.source_ranks,
                self.counts,
                self.width.into(),
                self.dots,
                self.columns,
                self.n_columns.into(),
                self.offsets,
                self.n_keys.into(),
                self.list_rows,
                self.list_scores,
                self.tail,
                self.asked,
                self.logarithms,
                self.n_logarithms.into(),
                self.values,
                self.stride.into(),
            ],
        );
        launch.shared_bytes = 24 * self.width;
        Ok(launch)
    }
}

/// The first kernel of kernels/finish_slates.cu.
#[derive(Clone, Copy, Debug)]
pub struct AddScores {
    /// f32 `[n]`
    pub scores: DevicePtr,
    /// At least 1.
    pub n: u32,
    /// What scores count.
    pub weight: f32,
    /// Whether nothing was added before.
    pub first: bool,
    /// f32 `[n]`
    pub sums: DevicePtr,
}

impl AddScores {
    /// The launch.
    ///
    /// # Errors
    /// A number out of its range.
    pub fn launch(&self) -> Result<Launch, ShapeError> {
        let kernel = "add_scores";
        within(kernel, "n", self.n, 1, u32::MAX)?;
        Ok(Launch::new(
            kernel,
            [self.n.div_ceil(4 * THREADS), 1, 1],
            [self.scores, self.n.into(), self.weight.to_bits().into(), self.first.into(), self.sums],
        ))
    }
}

/// The second kernel of kernels/finish_slates.cu.
#[derive(Clone, Copy, Debug)]
pub struct FinishSlates {
    /// u32 `[4]`
    pub header: DevicePtr,
    /// u32 `[n_requests, width]`
    pub rows: DevicePtr,
    /// u8 `[n_requests, width]`
    pub sources: DevicePtr,
    /// f32 `[n_requests, width]`
    pub sums: DevicePtr,
    /// u32 `[n_requests]`
    pub counts: DevicePtr,
    /// As in [`SettleLists`].
    pub widths: [u32; 4],
    /// What sums are divided by.
    pub weight: f32,
    /// f32 `[n_requests, 4, width]`
    pub source_scores: DevicePtr,
    /// f32 `[n_requests, width]`
    pub list_scores: DevicePtr,
    /// u32 `[n_requests, 4]`
    pub lengths: DevicePtr,
    /// What the best of the search adds.
    pub search_weight: f32,
    /// u32 `[n_requests]`
    pub open: DevicePtr,
    /// u32 `[n_requests, record]`
    pub records: DevicePtr,
    /// 1 to 2^31 - 1.
    pub n_requests: u32,
}

impl FinishSlates {
    /// Words of a record of `m` items.
    pub fn record(m: usize) -> usize {
        4 + 2 * m + m / 4
    }

    /// The launch.
    ///
    /// # Errors
    /// A number out of its range.
    pub fn launch(&self) -> Result<Launch, ShapeError> {
        let kernel = "finish_slates";
        within(kernel, "n_requests", self.n_requests, 1, MAX_GRID_X)?;
        let [_, _, start_3, width] = starts(kernel, self.widths)?;
        Ok(Launch::new(
            kernel,
            [self.n_requests, 1, 1],
            [
                self.header,
                self.rows,
                self.sources,
                self.sums,
                self.counts,
                width,
                self.weight.to_bits().into(),
                self.source_scores,
                self.list_scores,
                self.lengths,
                start_3,
                self.search_weight.to_bits().into(),
                self.open,
                self.records,
            ],
        ))
    }
}
