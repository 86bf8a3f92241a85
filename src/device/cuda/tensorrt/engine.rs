//! A TensorRT engine as what scores whole rows. Nothing of this has run yet: it takes a GPU.
#![allow(unsafe_code)] // Addresses of the GPU for TensorRT.

use std::ffi::c_void;
use std::sync::Arc;

use smallvec::SmallVec;
use tastemaker_kernels::RowKind;
use tastemaker_tensorrt as bindings;

use bindings::build::{Values, Wanted, load};
use bindings::cache::{Cache, Found};
use bindings::library::Library;
use bindings::session::{Engine, Session};
use bindings::{Capability, Input, Profiles};

use super::super::context::Context;
use super::super::pipeline::ranker::{Made, ResidentRanker};
use super::super::probe::Gpu;
use super::super::stream::{Part, PartMut, Stream};
use super::assembled::{Assembled, OnStream, RowScorer, table_bytes};
use crate::device::DeviceError;
use crate::device::cpu::Whole;
use crate::pipeline::PipelineConfig;

/// A stream's contexts of an engine. They go before the context of the GPU.
struct OnEngine {
    session: Session,
    /// The stream that it is of.
    stream: usize,
    _context: Arc<Context>,
}

/// An engine and what must outlive it, in that order.
struct Held {
    engine: Arc<Engine>,
    context: Arc<Context>,
}

impl RowScorer for OnEngine {
    fn enqueue(
        &mut self,
        stream: &Stream,
        n_rows: usize,
        inputs: &[Part<'_, u32>],
        scores: PartMut<'_, f32>,
    ) -> Result<(), DeviceError> {
        if stream.raw() as usize != self.stream {
            return Err(DeviceError::Failed("an engine's contexts are another stream's".into()));
        }
        let address = |of: u64| of as *mut c_void;
        let inputs: SmallVec<[*mut c_void; 8]> = inputs.iter().map(|input| address(stream.of(input).0)).collect();
        stream.context().bind()?;
        // SAFETY: the session was made on this stream; inputs are whole rows of the engine's own kinds, as many as
        // `Assembled` made, and buffers begin where the driver's allocations do, at a multiple of 256 bytes.
        let given = unsafe { self.session.enqueue(stream.raw(), n_rows, &inputs, address(stream.of(&scores.0).0)) };
        given.map_err(|error| DeviceError::Failed(error.to_string()))?;
        stream.lap("tensorrt")
    }
}

/// Builds or reads a model's engine and puts it into the GPU's memory with the table of items; a reason where that can't be.
///
/// # Errors
/// The GPU fails.
pub fn make(
    stream: &Stream,
    gpu: &Gpu,
    config: &PipelineConfig,
    whole: &Whole,
    (batches, left): (&Profiles, u64),
) -> Made {
    let output = match &whole.output {
        Ok(output) => output,
        Err(reason) => return Ok(Err(reason.clone())),
    };
    let bytes = table_bytes(whole, &whole.generation);
    if bytes > left {
        return Ok(Err(format!("its items take {bytes} bytes of GPU memory, and {left} are left")));
    }
    let library = match Library::open(&config.tensorrt) {
        Ok(library) => library,
        Err(error) => return Ok(Err(super::Unavailable::Library(error).to_string())),
    };
    let model = match std::fs::read(&whole.onnx) {
        Ok(model) => model,
        Err(error) => return Ok(Err(format!("{}: {error}", whole.onnx.display()))),
    };
    let inputs: Vec<Input> = whole
        .names
        .iter()
        .zip(&whole.places)
        .map(|(name, places)| Input { name: name.clone(), width: places.len() })
        .collect();
    let capability = Capability(gpu.capability.0, gpu.capability.1);
    let wanted = Wanted { model: &model, inputs: &inputs, output, profiles: batches, capability };
    stream.context().bind()?;
    let begun = std::time::Instant::now();
    let (plan, found) = match load(library, &wanted, &Cache::new(super::folder(config, &whole.onnx))) {
        Ok(made) => made,
        Err(error) => return Ok(Err(error.to_string())),
    };
    let (seconds, kept) = (begun.elapsed().as_secs_f64(), found == Found::Whole);
    tracing::info!(onnx = %whole.onnx.display(), bytes = plan.len(), seconds, kept, "the TensorRT engine is there");
    // SAFETY: the stream's context is current, and of the GPU that the engine was built for; the scorer below holds it.
    let engine = match unsafe { Engine::new(library, &plan, &inputs, output, batches) } {
        Ok(engine) => engine,
        Err(error) => return Ok(Err(error.to_string())),
    };
    let kind = |values: &Values| match values {
        Values::Float32 => RowKind::F32,
        Values::Int32 => RowKind::I32,
        Values::Int64 => RowKind::I64,
    };
    let kinds: Vec<RowKind> = engine.values().iter().map(kind).collect();
    let context = stream.context().clone();
    let held = Held { engine, context };
    let scorer: Box<OnStream> = Box::new(move |stream, _| {
        let Held { engine, context } = &held;
        stream.synchronize()?;
        context.bind()?;
        // SAFETY: the context is current, and the stream's; nothing is under way.
        let session = unsafe { engine.on(stream.raw()) };
        let session = session.map_err(|error| DeviceError::Failed(error.to_string()))?;
        Ok(Box::new(OnEngine { session, stream: stream.raw() as usize, _context: context.clone() })
            as Box<dyn RowScorer>)
    });
    // What an engine takes is known to TensorRT alone; its file's size is the least.
    let made = Assembled::new(stream, &whole.generation, whole, &kinds, plan.len() as u64, scorer)?;
    Ok(Ok(Arc::new(made) as Arc<dyn ResidentRanker>))
}
