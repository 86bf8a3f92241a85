//! Launches of what fills columns that are not [`FillColumns`](super::FillColumns)'s: the kernels of item_columns.cu.

use super::More;
use super::launch::{DevicePtr, Launch, MAX_GRID_X, MAX_GRID_Y, MAX_MERGED, ShapeError, THREADS, within};

/// The first kernel of kernels/item_columns.cu.
#[derive(Clone, Copy, Debug)]
pub struct CopyColumns {
    /// u32 `[n_requests, width]`
    pub rows: DevicePtr,
    /// u32 `[n_requests]`
    pub counts: DevicePtr,
    /// 1 to 65,535.
    pub n_requests: u32,
    /// At least 1.
    pub width: u32,
    /// f32 `[n_items, n]`
    pub table: DevicePtr,
    /// Items.
    pub n_items: u32,
    /// f32 `[more.n, n]`: beside these.
    pub more: More,
    /// Columns, at least 1; with `width` at most 2^31 - 1 values of a request.
    pub n: u32,
    /// u32 `[n]`, each below `stride`.
    pub columns: DevicePtr,
    /// f32 `[n_requests, width, stride]`
    pub values: DevicePtr,
    /// Values of a candidate.
    pub stride: u32,
}

impl CopyColumns {
    /// The launch.
    ///
    /// # Errors
    /// A number out of its range.
    pub fn launch(&self) -> Result<Launch, ShapeError> {
        let kernel = "copy_columns";
        within(kernel, "n_requests", self.n_requests, 1, MAX_GRID_Y)?;
        within(kernel, "n", self.n, 1, self.stride)?;
        let all = u64::from(self.width) * u64::from(self.n);
        within(kernel, "width * n", all, 1, MAX_GRID_X)?;
        Ok(Launch::new(
            kernel,
            [(all as u32).div_ceil(THREADS), self.n_requests, 1],
            [
                self.rows,
                self.counts,
                self.width.into(),
                self.table,
                self.n_items.into(),
                self.n.into(),
                self.columns,
                self.values,
                self.stride.into(),
                self.more.rows,
                self.more.n.into(),
            ],
        ))
    }
}

/// The second kernel of kernels/item_columns.cu.
#[derive(Clone, Copy, Debug)]
pub struct FillSeries {
    /// u32 `[n_requests, width]`
    pub rows: DevicePtr,
    /// u32 `[n_requests]`
    pub counts: DevicePtr,
    /// 1 to 2^31 - 1.
    pub n_requests: u32,
    /// 1 to 2,048.
    pub width: u32,
    /// u32 `[n_items, 2]`: code of the series and bits of the place in it.
    pub items: DevicePtr,
    /// Items.
    pub n_items: u32,
    /// u32 `[more.n, 2]`: beside these.
    pub more: More,
    /// u32
    pub tail: DevicePtr,
    /// u32 `[n_requests, places_stride]`
    pub places: DevicePtr,
    /// Words of a request's places.
    pub places_stride: u32,
    /// Which of them; `place + 1` is one, too.
    pub place: u32,
    /// f32 `[n_logarithms]`
    pub logarithms: DevicePtr,
    /// At least 1.
    pub n_logarithms: u32,
    /// f32 `[n_requests, width, stride]`
    pub values: DevicePtr,
    /// Values of a candidate.
    pub stride: u32,
    /// Which of them are the logarithm of liked items, whether it is the next, and how much further it is: below `stride`.
    pub columns: [Option<u32>; 3],
}

impl FillSeries {
    /// The launch.
    ///
    /// # Errors
    /// A number out of its range.
    pub fn launch(&self) -> Result<Launch, ShapeError> {
        let kernel = "fill_series";
        within(kernel, "n_requests", self.n_requests, 1, MAX_GRID_X)?;
        within(kernel, "width", self.width, 1, MAX_MERGED)?;
        within(kernel, "place", self.place, 0, self.places_stride.saturating_sub(2))?;
        within(kernel, "n_logarithms", self.n_logarithms, 1, u32::MAX)?;
        for column in self.columns.into_iter().flatten() {
            within(kernel, "column", column, 0, self.stride.saturating_sub(1))?;
        }
        let [same, next, gap] = self.columns.map(|column| column.unwrap_or(u32::MAX).into());
        Ok(Launch::new(
            kernel,
            [self.n_requests, 1, 1],
            [
                self.rows,
                self.counts,
                self.width.into(),
                self.items,
                self.n_items.into(),
                self.tail,
                self.places,
                self.places_stride.into(),
                self.place.into(),
                self.logarithms,
                self.n_logarithms.into(),
                self.values,
                self.stride.into(),
                same,
                next,
                gap,
                self.more.rows,
                self.more.n.into(),
            ],
        ))
    }
}
