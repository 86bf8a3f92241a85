//! An engine on a GPU, and a stream's contexts of it. Nothing of this has run yet: it takes a GPU.
#![allow(unsafe_code)] // Calls of TensorRT with addresses of the GPU.

use std::ffi::c_void;
use std::sync::Arc;

use parking_lot::Mutex;
use trtx::trtx_sys::Dims64;
use trtx::{CudaEngine, ExecutionContext, Runtime};

use crate::build::Values;
use crate::library::Library;
use crate::{Error, Input, Profiles};

/// An engine in the memory of a GPU, for all streams.
pub struct Engine {
    // Before the runtime that it is of: fields are dropped in their order.
    engine: Mutex<CudaEngine<'static>>,
    _runtime: Mutex<Runtime<'static>>,
    library: &'static Library,
    inputs: Vec<Input>,
    values: Vec<Values>,
    output: String,
    profiles: Profiles,
}

// SAFETY: an engine may be used by any thread and several at once, as NvInferRuntime.h says of `ICudaEngine`; what makes a context has the
// lock besides. The runtime is only kept.
unsafe impl Send for Engine {}
// SAFETY: as above.
unsafe impl Sync for Engine {}

impl Engine {
    /// Loads an engine that [`load`](crate::build::load) gave for the same model, inputs, output and profiles.
    ///
    /// # Safety
    /// The context of the GPU that the engine was built for is current on this thread: without one TensorRT 11.4 makes a runtime that is
    /// none, and whose use crashes. It outlives the engine.
    ///
    /// # Errors
    /// What TensorRT says; an engine that has other inputs.
    pub unsafe fn new(
        library: &'static Library,
        plan: &[u8],
        inputs: &[Input],
        output: &str,
        profiles: &Profiles,
    ) -> Result<Arc<Self>, Error> {
        let _alone = library.building.lock();
        library.listen();
        let refused = |what: &'static str| move |_: trtx::Error| library.refused(what);
        let mut runtime = Runtime::new(&library.logger).map_err(refused("a runtime"))?;
        let engine = runtime.deserialize_cuda_engine(plan).map_err(refused("loading the engine"))?;
        let values = inputs.iter().map(|input| {
            let of = engine.tensor_data_type(&input.name).map_err(refused("an input's type"))?;
            Values::of(&input.name, of)
        });
        let values = values.collect::<Result<Vec<_>, _>>()?;
        let n = engine.nb_optimization_profiles().map_err(refused("its profiles"))?;
        if usize::try_from(n) != Ok(profiles.rows().len()) {
            return Err(Error::Model(format!("the engine has {n} profiles, not {}", profiles.rows().len())));
        }
        Ok(Arc::new(Engine {
            engine: Mutex::new(engine),
            _runtime: Mutex::new(runtime),
            library,
            inputs: inputs.to_vec(),
            values,
            output: output.to_owned(),
            profiles: profiles.clone(),
        }))
    }

    /// What each input's values are.
    pub fn values(&self) -> &[Values] {
        &self.values
    }

    /// Contexts for a stream, one per profile: what is recorded of one stays as it was while another is used.
    ///
    /// # Safety
    /// As for [`Engine::new`]. `stream` is one of that context, and nothing is under way on it.
    ///
    /// # Errors
    /// What TensorRT says: often that memory is short.
    pub unsafe fn on(self: &Arc<Self>, stream: *mut c_void) -> Result<Session, Error> {
        let mut engine = self.engine.lock();
        let contexts = (0..self.profiles.rows().len()).map(|profile| {
            let refused = |_: trtx::Error| self.library.refused("an execution context");
            let mut context = engine.create_execution_context().map_err(refused)?;
            // SAFETY: the caller's stream.
            match unsafe { context.set_optimization_profile_async(profile as i32, stream) } {
                true => Ok(context),
                false => Err(self.library.refused("choosing a profile")),
            }
        });
        Ok(Session { contexts: contexts.collect::<Result<_, _>>()?, engine: self.clone() })
    }
}

/// One stream's contexts of an engine.
pub struct Session {
    // Before the engine that they are of.
    contexts: Vec<ExecutionContext<'static>>,
    engine: Arc<Engine>,
}

// SAFETY: a context may be used by any thread, one at a time; it is used through `&mut` alone.
unsafe impl Send for Session {}

impl Session {
    /// Gives the stream what scores `n_rows` rows. Waits for nothing, and may be recorded once it has been given the same addresses and number of
    /// rows before: TensorRT settles shapes at the first time.
    ///
    /// # Safety
    /// `stream` is the one that this was made on. Each of `inputs`, in the engine's order, is the address of `[n_rows, width]` values of its type,
    /// `output` of `n_rows` f32, at a boundary of 256 bytes; all stay until the stream has done what it is given, and what is recorded.
    ///
    /// # Errors
    /// No profile is for so many rows; what TensorRT says.
    pub unsafe fn enqueue(
        &mut self,
        stream: *mut c_void,
        n_rows: usize,
        inputs: &[*mut c_void],
        output: *mut c_void,
    ) -> Result<(), Error> {
        let Session { contexts, engine } = self;
        let library = engine.library;
        let refused = |what: &'static str| move |_: trtx::Error| library.refused(what);
        let profile = engine.profiles.of(n_rows);
        let context = profile.and_then(|profile| contexts.get_mut(profile)).ok_or_else(|| {
            Error::Model(format!("{n_rows} rows are more than the engine's {:?}", engine.profiles.rows().last()))
        })?;
        if inputs.len() != engine.inputs.len() {
            return Err(Error::Model(format!("{} inputs of {}", inputs.len(), engine.inputs.len())));
        }
        for (Input { name, width }, &address) in engine.inputs.iter().zip(inputs) {
            let shape = Dims64::new_2d(n_rows as i64, *width as i64);
            context.set_input_shape(name, &shape).map_err(refused("an input's shape"))?;
            // SAFETY: the caller's.
            unsafe { context.set_tensor_address(name, address) }.map_err(refused("an input's address"))?;
        }
        // SAFETY: the caller's.
        unsafe { context.set_tensor_address(&engine.output, output) }.map_err(refused("the output's address"))?;
        // SAFETY: the caller's stream; all addresses were set.
        unsafe { context.enqueue_v3(stream) }.map_err(refused("scoring"))
    }
}
