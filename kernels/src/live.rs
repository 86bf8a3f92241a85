//! Launches of what keeps rows beside tables: the kernels of live_rows.cu.

use super::launch::{DevicePtr, Launch, MAX_GRID_X, MAX_GRID_Y, ShapeError, THREADS, within};

/// Rows beside a table, numbered from the table's last one on.
#[derive(Clone, Copy, Debug, Default)]
pub struct More {
    /// Of what the table is; not read where there are none.
    pub rows: DevicePtr,
    /// Rows that there is room for; with those of the table below 2^32 - 1.
    pub n: u32,
}

/// The first kernel of kernels/live_rows.cu.
#[derive(Clone, Copy, Debug)]
pub struct ApplyChanges {
    /// u32 `[n_staged]`
    pub staged: DevicePtr,
    /// Words.
    pub n_staged: u32,
    /// u32 `[n_pieces, 3]`: begin in `staged`, begin in `target`, words.
    pub pieces: DevicePtr,
    /// 1 to 2^31 - 1.
    pub n_pieces: u32,
    /// u32 `[n_target]`
    pub target: DevicePtr,
    /// Words.
    pub n_target: u32,
}

impl ApplyChanges {
    /// The launch.
    ///
    /// # Errors
    /// A number out of its range.
    pub fn launch(&self) -> Result<Launch, ShapeError> {
        let kernel = "apply_changes";
        within(kernel, "n_pieces", self.n_pieces, 1, MAX_GRID_X)?;
        let arguments = [self.staged, self.n_staged.into(), self.pieces, self.target, self.n_target.into()];
        Ok(Launch::new(kernel, [self.n_pieces, 1, 1], arguments))
    }
}

/// The second kernel of kernels/live_rows.cu.
#[derive(Clone, Copy, Debug)]
pub struct NamePlaces {
    /// u32 `[n]`
    pub rows: DevicePtr,
    /// At least 1.
    pub n: u32,
    /// Rows of the tables.
    pub n_rows: u32,
    /// u32: the row of each beside them.
    pub names: More,
}

impl NamePlaces {
    /// The launch.
    ///
    /// # Errors
    /// A number out of its range.
    pub fn launch(&self) -> Result<Launch, ShapeError> {
        let kernel = "name_places";
        within(kernel, "n", self.n, 1, MAX_GRID_X)?;
        let arguments = [self.rows, self.n.into(), self.n_rows.into(), self.names.rows, self.names.n.into()];
        Ok(Launch::new(kernel, [self.n.div_ceil(THREADS), 1, 1], arguments))
    }
}

/// The third kernel of kernels/live_rows.cu.
#[derive(Clone, Copy, Debug)]
pub struct FindPlaces {
    /// u32 `[4]`
    pub header: DevicePtr,
    /// u32 `[n_requests, width]`
    pub rows: DevicePtr,
    /// u32 `[n_requests]`
    pub counts: DevicePtr,
    /// 1 to 65,535.
    pub n_requests: u32,
    /// At least 1.
    pub width: u32,
    /// Rows of the tables.
    pub n_rows: u32,
    /// u32 `[2, n]`
    pub changed: More,
    /// u32 `[n_requests, width]`
    pub places: DevicePtr,
}

impl FindPlaces {
    /// The launch.
    ///
    /// # Errors
    /// A number out of its range.
    pub fn launch(&self) -> Result<Launch, ShapeError> {
        let kernel = "find_places";
        within(kernel, "n_requests", self.n_requests, 1, MAX_GRID_Y)?;
        within(kernel, "width", self.width, 1, MAX_GRID_X)?;
        Ok(Launch::new(
            kernel,
            [self.width.div_ceil(THREADS), self.n_requests, 1],
            [
                self.header,
                self.rows,
                self.counts,
                self.width.into(),
                self.n_rows.into(),
                self.changed.rows,
                self.changed.n.into(),
                self.places,
            ],
        ))
    }
}
