//! What the pipeline needs of a ranker on the device, and the dense ranker as one.

use std::sync::Arc;

use tastemaker_kernels::dense::TableNumbers;

use super::super::ops::RankBatch;
use super::super::probe::Gpu;
use super::super::ranker::{DeviceRanker, RankerOptions, RankerPlan, StreamRanker};
use super::super::stream::{PartMut, Stream};
use super::super::tensorrt;
use super::shape::Sizes;
use crate::device::cpu::Weighted;
use crate::device::{DeviceConfig, DeviceError, TableStorage};
use crate::pipeline::PipelineConfig;

/// Tables and weights of a ranker on one GPU, for all workers.
pub trait ResidentRanker: Send + Sync {
    /// Values that the CPU computes for a request.
    fn shared_width(&self) -> usize;
    /// Columns of a candidate.
    fn columns_width(&self) -> usize;
    /// Words of what is kept of an item, 0 where nothing is.
    fn line_words(&self) -> usize {
        0
    }
    /// What [`CpuDevice::line`](crate::device::cpu::CpuDevice::line) says of an item, as it is kept.
    fn put_line(&self, _line: &[f32], _out: &mut [u32]) {}
    /// Memory of all of it, and of what a worker adds for `n_slots` candidates, bytes.
    fn bytes(&self, n_slots: usize) -> [u64; 2];
    /// What a worker scores up to `n_slots` candidates with.
    ///
    /// # Errors
    /// Out of memory, or what the driver says.
    fn on(self: Arc<Self>, stream: &Stream, n_slots: usize) -> Result<Box<dyn WorkerRanker>, DeviceError>;
}

/// A ranker with one worker's buffers.
pub trait WorkerRanker: Send {
    /// Gives the stream what scores all candidates: f32 `[n_requests, width]`, NaN or anything behind a request's count. Allocates nothing
    /// and waits for nothing, so that it can be recorded.
    ///
    /// # Errors
    /// What the driver says.
    fn enqueue(&mut self, stream: &Stream, batch: RankBatch<'_>, scores: PartMut<'_, f32>) -> Result<(), DeviceError>;
}

impl ResidentRanker for DeviceRanker {
    fn shared_width(&self) -> usize {
        DeviceRanker::shared_width(self)
    }

    fn columns_width(&self) -> usize {
        DeviceRanker::columns_width(self)
    }

    fn line_words(&self) -> usize {
        DeviceRanker::line_words(self)
    }

    fn put_line(&self, line: &[f32], out: &mut [u32]) {
        DeviceRanker::put_line(self, line, out);
    }

    fn bytes(&self, n_slots: usize) -> [u64; 2] {
        [DeviceRanker::bytes(self), StreamRanker::bytes(self, n_slots)]
    }

    fn on(self: Arc<Self>, _: &Stream, n_slots: usize) -> Result<Box<dyn WorkerRanker>, DeviceError> {
        Ok(Box::new(StreamRanker::new(self, n_slots)))
    }
}

impl WorkerRanker for StreamRanker {
    fn enqueue(&mut self, stream: &Stream, batch: RankBatch<'_>, scores: PartMut<'_, f32>) -> Result<(), DeviceError> {
        StreamRanker::enqueue(self, stream, batch, scores)
    }
}

/// What became of a ranker that was to be put into the GPU's memory; a reason where it can't be there.
pub type Made = Result<Result<Arc<dyn ResidentRanker>, String>, DeviceError>;
/// Puts a ranker there that may take so many bytes.
pub type Make<'a> = dyn Fn(&Stream, &Weighted, u64) -> Made + 'a;
/// As [`Make`], for all workers.
pub type Maker = dyn Fn(&Stream, &Weighted, u64) -> Made + Send + Sync;

/// Makes the rankers that there are for GPUs.
pub fn maker(gpu: &Gpu, config: &Arc<PipelineConfig>, device: &DeviceConfig) -> Arc<Maker> {
    let (gpu, config, device) = (gpu.clone(), config.clone(), device.clone());
    Arc::new(move |stream, weighted, left| {
        if let Some(whole) = &weighted.whole {
            return match Sizes::new(&config, &device, whole.generation.items.len(), 0, Vec::new(), 0) {
                Ok(sizes) => tensorrt::make(stream, &gpu, &config, whole, (&sizes.buckets, sizes.width(), left)),
                Err(reason) => Ok(Err(reason)),
            };
        }
        let Some(model) = &weighted.model else {
            return Ok(Err("no engine for GPUs computes it".to_owned()));
        };
        let table = match device.tables {
            TableStorage::F32 => TableNumbers::F32,
            TableStorage::Bf16 => TableNumbers::Bf16,
            TableStorage::Int8 => TableNumbers::Int8,
        };
        let options = RankerOptions { table, ..RankerOptions::default() };
        let plan = match RankerPlan::new(model, stream.context().shared_bytes(), options) {
            Ok(plan) => plan,
            Err(reason) => return Ok(Err(reason)),
        };
        // Before anything is allocated.
        let bytes = plan.bytes();
        if bytes > left {
            return Ok(Err(format!("it takes {bytes} bytes of GPU memory, and {left} are left")));
        }
        Ok(Ok(Arc::new(DeviceRanker::planned(stream, model, plan)?)))
    })
}
