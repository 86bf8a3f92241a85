//! What a call of cuVS needs beside its index: a stream, workspace, and parameters.
#![allow(unsafe_code)] // Calls of cuVS.

use std::ffi::c_void;
use std::marker::PhantomData;

use super::library::Cuvs;
use super::sys::*;
use super::{Error, Value};
use tastemaker_kernels::DevicePtr;

/// A CUDA stream: the driver's `CUstream`, which is the runtime's `cudaStream_t`.
#[derive(Clone, Copy, Debug)]
pub struct Stream(pub *mut c_void);

/// Calls a function of the library, and makes its status a result with its name.
macro_rules! call {
    ($cuvs:expr, $name:ident($($argument:expr),* $(,)?)) => {{
        let cuvs: &Cuvs = $cuvs;
        cuvs.check(stringify!($name), (cuvs.api.$name)($($argument),*))
    }};
}
pub(super) use call;

/// Something that the library made, and that it destroys.
#[derive(Debug)]
pub(super) struct Owned<T> {
    raw: *mut T,
    cuvs: &'static Cuvs,
    destroy: (&'static str, unsafe extern "C" fn(*mut T) -> cuvsError_t),
}

impl<T> Owned<T> {
    /// # Errors
    /// `create` fails, or makes nothing.
    ///
    /// # Safety
    /// `create` stores a pointer that `destroy` takes, to what is not shared.
    pub(super) unsafe fn new(
        cuvs: &'static Cuvs,
        create: impl FnOnce(*mut *mut T) -> Result<(), Error>,
        destroy: (&'static str, unsafe extern "C" fn(*mut T) -> cuvsError_t),
    ) -> Result<Self, Error> {
        let mut raw = std::ptr::null_mut();
        create(&mut raw)?;
        if raw.is_null() {
            return Err(Error::Call { call: destroy.0, said: "there is nothing to destroy later".into() });
        }
        Ok(Owned { raw, cuvs, destroy })
    }

    pub(super) fn raw(&self) -> *mut T {
        self.raw
    }

    /// The fields of what is a plain structure.
    pub(super) fn fields(&mut self) -> &mut T {
        // SAFETY: the library made it, of the version that `T`'s layout is of; it is this one's alone, which is borrowed as a whole.
        unsafe { &mut *self.raw }
    }
}

impl<T> Drop for Owned<T> {
    fn drop(&mut self) {
        // SAFETY: it was made by the function that goes with this one, and nothing uses it any more.
        let status = unsafe { (self.destroy.1)(self.raw) };
        if let Err(error) = self.cuvs.check(self.destroy.0, status) {
            tracing::warn!(%error, "cuVS could not give something back");
        }
    }
}

/// Makes one of the structures that a `…Create` makes with defaults and a `…Destroy` destroys.
macro_rules! owned {
    ($cuvs:expr, $create:ident, $destroy:ident) => {{
        let cuvs: &'static Cuvs = $cuvs;
        // SAFETY: the two functions go together, and what the first makes is new.
        unsafe { Owned::new(cuvs, |raw| call!(cuvs, $create(raw)), (stringify!($destroy), cuvs.api.$destroy)) }
    }};
}
pub(super) use owned;

/// A tensor for one call: an address with a shape that lives as long.
#[derive(Debug)]
pub(super) struct Tensor<'a> {
    raw: DLManagedTensor,
    shape: PhantomData<&'a mut [i64]>,
}

impl<'a> Tensor<'a> {
    /// Row-major, without gaps.
    pub(super) fn new(address: DevicePtr, (code, bits): (u32, u8), shape: &'a mut [i64], ordinal: u32) -> Self {
        let dl_tensor = DLTensor {
            data: address as *mut c_void,
            device: DLDevice { device_type: kDLCUDA, device_id: ordinal as i32 },
            ndim: shape.len() as i32,
            dtype: DLDataType { code: code as u8, bits, lanes: 1 },
            shape: shape.as_mut_ptr(),
            strides: std::ptr::null_mut(),
            byte_offset: 0,
        };
        let raw = DLManagedTensor { dl_tensor, manager_ctx: std::ptr::null_mut(), deleter: None };
        Tensor { raw, shape: PhantomData }
    }

    /// The same of the host's memory, which is only read.
    pub(super) fn of_host<T>(values: &'a [T], value: (u32, u8), shape: &'a mut [i64]) -> Self {
        let mut tensor = Tensor::new(values.as_ptr() as DevicePtr, value, shape, 0);
        tensor.raw.dl_tensor.device = DLDevice { device_type: kDLCPU, device_id: 0 };
        tensor
    }

    /// Valid while `self` is.
    pub(super) fn raw(&mut self) -> *mut DLManagedTensor {
        &mut self.raw
    }
}

impl Value {
    pub(super) fn dl(self) -> (u32, u8) {
        match self {
            Value::F32 => (kDLFloat, 32),
            Value::F16 => (kDLFloat, 16),
        }
    }
}

/// A stream, the library's workspace on it, and the parameters of searches: one worker's.
///
/// Calls only put work on the stream, but for those that build or load, and [`Self::synchronize`].
///
/// One thread at a time has it:
/// ```compile_fail,E0277
/// fn shared<T: Sync>() {}
/// shared::<tastemaker::device::cuda::cuvs::Resources>();
/// ```
#[derive(Debug)]
pub struct Resources {
    pub(super) cuvs: &'static Cuvs,
    pub(super) ordinal: u32,
    pub(super) ivf_flat: Owned<cuvsIvfFlatSearchParams>,
    pub(super) ivf_pq: Owned<cuvsIvfPqSearchParams>,
    pub(super) cagra: Owned<cuvsCagraSearchParams>,
    handle: Handle,
}

/// Destroys the library's handle, after all that was made with it.
#[derive(Debug)]
struct Handle(&'static Cuvs, cuvsResources_t);

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: `Resources::new` made it, and it goes last.
        if let Err(error) = unsafe { call!(self.0, cuvsResourcesDestroy(self.1)) } {
            tracing::warn!(%error, "cuVS could not give its resources back");
        }
    }
}

// SAFETY: the library keeps what belongs to a thread (the last error's text) elsewhere, and nothing here is shared: `&mut self` for all
// that is called. It is not `Sync`, by its raw pointers: cuVS's handle makes what it lacks when it is first asked, without a lock.
unsafe impl Send for Resources {}

impl Resources {
    /// Of GPU number `ordinal`. A GPU is first needed by what is called with it.
    ///
    /// # Errors
    /// What cuVS says.
    ///
    /// # Safety
    /// The stream is one of the primary context of that GPU, and lives longer than this; on each thread that calls anything here, or
    /// of an [`super::Index`], that context is the current one.
    pub unsafe fn new(cuvs: &'static Cuvs, stream: Stream, ordinal: u32) -> Result<Self, Error> {
        let mut raw = 0;
        // SAFETY: writes one handle.
        unsafe { call!(cuvs, cuvsResourcesCreate(&mut raw)) }?;
        let handle = Handle(cuvs, raw);
        // SAFETY: the handle was just made; the caller vouches for the stream.
        unsafe { call!(cuvs, cuvsStreamSet(raw, stream.0)) }?;
        let mut cagra = owned!(cuvs, cuvsCagraSearchParamsCreate, cuvsCagraSearchParamsDestroy)?;
        // The C interface makes it 0, which is another mode, and not the default that it has in C++.
        cagra.fields().hashmap_mode = AUTO_HASH;
        Ok(Resources {
            cuvs,
            ordinal,
            ivf_flat: owned!(cuvs, cuvsIvfFlatSearchParamsCreate, cuvsIvfFlatSearchParamsDestroy)?,
            ivf_pq: owned!(cuvs, cuvsIvfPqSearchParamsCreate, cuvsIvfPqSearchParamsDestroy)?,
            cagra,
            handle,
        })
    }

    pub(super) fn raw(&self) -> cuvsResources_t {
        self.handle.1
    }

    /// Takes temporary memory from a pool of its own, which begins with so many bytes and only grows, instead of from the driver at each
    /// call: calls of several workers then do not wait for each other.
    ///
    /// # Errors
    /// What cuVS says.
    pub fn pool(&mut self, bytes: usize) -> Result<(), Error> {
        // SAFETY: the handle is this one's.
        unsafe { call!(self.cuvs, cuvsResourcesSetWorkspacePool(self.raw(), bytes)) }
    }

    /// Waits until the stream is done with all that was put on it.
    ///
    /// # Errors
    /// What cuVS says: also of what was put on the stream before, by anybody.
    pub fn synchronize(&mut self) -> Result<(), Error> {
        // SAFETY: the handle is this one's.
        unsafe { call!(self.cuvs, cuvsStreamSync(self.raw())) }
    }
}
