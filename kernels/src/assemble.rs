//! Launches of the kernels of assemble_rows.cu.

use super::More;
use super::launch::{DevicePtr, Launch, ShapeError, THREADS, within};

/// What the values of a model's input are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum RowKind {
    /// One word.
    F32 = 0,
    /// One word.
    I32 = 1,
    /// Two words.
    I64 = 2,
}

impl RowKind {
    /// Words of 4 bytes of a value.
    pub fn words(self) -> usize {
        if self == RowKind::I64 { 2 } else { 1 }
    }
}

/// Where a value of a row comes from, and which value there, below 2^30.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowPart {
    /// Of the request's values.
    Shared(u32),
    /// Of the item's.
    Item(u32),
    /// Of the candidate's columns.
    Candidate(u32),
}

impl RowPart {
    /// As the kernel reads it.
    pub fn code(self) -> u32 {
        match self {
            RowPart::Shared(at) => at,
            RowPart::Item(at) => 1 << 30 | at,
            RowPart::Candidate(at) => 2 << 30 | at,
        }
    }
}

/// The first kernel of kernels/assemble_rows.cu.
#[derive(Clone, Copy, Debug)]
pub struct AssembleRows {
    /// u32 `[n_requests, width]`
    pub rows: DevicePtr,
    /// u32 `[n_requests]`
    pub counts: DevicePtr,
    /// At least 1.
    pub n_requests: u32,
    /// Places of a request; at least 1. All values together are below 2^32.
    pub width: u32,
    /// f32 `[n_requests, n_shared]`
    pub shared: DevicePtr,
    /// Values of a request.
    pub n_shared: u32,
    /// f32 `[n_items, n_item]`
    pub table: DevicePtr,
    /// Rows of the table.
    pub n_items: u32,
    /// f32 `[n, n_item]`: beside the table. Rows behind these are holes.
    pub more: More,
    /// Values of an item.
    pub n_item: u32,
    /// f32 `[n_requests, width, n_columns]`
    pub columns: DevicePtr,
    /// Values of a candidate.
    pub n_columns: u32,
    /// u32 `[n_values]`, by [`RowPart::code`]; each is one that there is.
    pub places: DevicePtr,
    /// Values of a row; at least 1.
    pub n_values: u32,
    /// What they become.
    pub kind: RowKind,
    /// `[n_requests, width, n_values]`, at an 8-byte boundary where they are i64.
    pub values: DevicePtr,
}

impl AssembleRows {
    /// The launch.
    ///
    /// # Errors
    /// A number out of its range.
    pub fn launch(&self) -> Result<Launch, ShapeError> {
        let kernel = "assemble_rows";
        within(kernel, "n_values", self.n_values, 1, u32::MAX)?;
        let slots = slots(kernel, self.n_requests, self.width)?;
        let total = slots.saturating_mul(u64::from(self.n_values));
        within(kernel, "n_requests * width * n_values", total, 1, u32::MAX)?;
        Ok(Launch::new(
            kernel,
            [total.div_ceil(u64::from(THREADS)) as u32, 1, 1],
            [
                self.rows,
                self.counts,
                self.n_requests.into(),
                self.width.into(),
                self.shared,
                self.n_shared.into(),
                self.table,
                self.n_items.into(),
                self.n_item.into(),
                self.columns,
                self.n_columns.into(),
                self.places,
                self.n_values.into(),
                (self.kind as u32).into(),
                self.values,
                self.more.rows,
                self.more.n.into(),
            ],
        ))
    }
}

/// The second kernel of kernels/assemble_rows.cu.
#[derive(Clone, Copy, Debug)]
pub struct VoidHoles {
    /// u32 `[n_requests, width]`
    pub rows: DevicePtr,
    /// u32 `[n_requests]`
    pub counts: DevicePtr,
    /// At least 1.
    pub n_requests: u32,
    /// Places of a request; at least 1. All together below 2^32.
    pub width: u32,
    /// Rows from here on are holes.
    pub n_items: u32,
    /// f32 `[n_requests, width]`
    pub scores: DevicePtr,
}

impl VoidHoles {
    /// The launch.
    ///
    /// # Errors
    /// A number out of its range.
    pub fn launch(&self) -> Result<Launch, ShapeError> {
        let kernel = "void_holes";
        let slots = slots(kernel, self.n_requests, self.width)?;
        let arguments =
            [self.rows, self.counts, self.n_requests.into(), self.width.into(), self.n_items.into(), self.scores];
        Ok(Launch::new(kernel, [slots.div_ceil(u64::from(THREADS)) as u32, 1, 1], arguments))
    }
}

fn slots(kernel: &'static str, n_requests: u32, width: u32) -> Result<u64, ShapeError> {
    let slots = u64::from(n_requests) * u64::from(width);
    within(kernel, "n_requests * width", slots, 1, u32::MAX)?;
    Ok(slots)
}
