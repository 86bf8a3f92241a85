//! What the pipeline needs of a ranker on the device.

use std::sync::Arc;

use super::super::stream::{Part, PartMut, Stream};
use crate::device::DeviceError;
use crate::device::cpu::Weighted;

/// Candidates of some requests, to be scored.
#[derive(Clone, Copy, Debug)]
pub struct RankBatch<'a> {
    /// u32 `[n_requests, width]`: items; what lies behind a request's count is none.
    pub rows: Part<'a, u32>,
    /// u32 `[n_requests]`
    pub counts: Part<'a, u32>,
    /// Requests that there is room for; those that there are not have no candidates.
    pub n_requests: usize,
    /// Candidates that there is room for in a request.
    pub width: usize,
    /// f32 `[n_requests, shared_width]`: what the CPU computed of the request.
    pub shared: Part<'a, f32>,
    /// f32 `[n_requests * width, columns_width]`: what depends on both, in the order of the model's columns.
    pub columns: Part<'a, f32>,
}

/// Tables and weights of a ranker on one GPU, for all workers.
pub trait ResidentRanker: Send + Sync {
    /// Values that the CPU computes for a request.
    fn shared_width(&self) -> usize;
    /// Values from one candidate's columns to the next's; at least as many as there are columns.
    fn columns_width(&self) -> usize;
    /// Memory of all of it, and of what a worker adds for `n_slots` candidates, bytes.
    fn bytes(&self, n_slots: usize) -> [u64; 2];
    /// What a worker scores up to `n_slots` candidates with.
    ///
    /// # Errors
    /// Out of memory, or what the driver says.
    fn on(&self, stream: &Stream, n_slots: usize) -> Result<Box<dyn StreamRanker>, DeviceError>;
}

/// A ranker with one worker's buffers.
pub trait StreamRanker: Send {
    /// Gives the stream what scores all candidates: f32 `[n_requests, width]`, NaN or anything behind a request's count. Allocates nothing
    /// and waits for nothing, so that it can be recorded.
    ///
    /// # Errors
    /// What the driver says.
    fn enqueue(&mut self, stream: &Stream, batch: RankBatch<'_>, scores: PartMut<'_, f32>) -> Result<(), DeviceError>;
}

/// Puts a ranker into the GPU's memory; a reason where it can't be there.
pub type Make<'a> = dyn Fn(&Stream, &Weighted) -> Result<Result<Arc<dyn ResidentRanker>, String>, DeviceError> + 'a;
/// As [`Make`], for all workers.
pub type Maker =
    dyn Fn(&Stream, &Weighted) -> Result<Result<Arc<dyn ResidentRanker>, String>, DeviceError> + Send + Sync;

/// Makes the rankers that there are for GPUs.
pub fn maker() -> Arc<Maker> {
    Arc::new(|_, _| Ok(Err("no engine for GPUs computes it".to_owned())))
}
