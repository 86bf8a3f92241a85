//! A GPU's context with the kernels loaded in it, shared by all threads that use the GPU.
#![allow(unsafe_code)] // Calls of the driver, through cudarc.

use std::ffi::CString;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cudarc::driver::sys::{self, CUresult};
use cudarc::driver::{DriverError, result};
use tastemaker_kernels::{PIECES, kernels_of};

use crate::device::DeviceError;

/// The functions of the driver that are called beside the probe's. cudarc panics where one is missing, so they are looked for first.
const NEEDED: [&[u8]; 33] = [
    b"cuDevicePrimaryCtxRetain\0",
    b"cuDevicePrimaryCtxRelease_v2\0",
    b"cuCtxSetCurrent\0",
    b"cuDeviceGetDefaultMemPool\0",
    b"cuMemPoolSetAttribute\0",
    b"cuMemGetInfo_v2\0",
    b"cuMemAlloc_v2\0",
    b"cuMemFree_v2\0",
    b"cuMemAllocAsync\0",
    b"cuMemFreeAsync\0",
    b"cuMemHostAlloc\0",
    b"cuMemFreeHost\0",
    b"cuMemcpyHtoDAsync_v2\0",
    b"cuMemcpyDtoHAsync_v2\0",
    b"cuStreamCreate\0",
    b"cuStreamDestroy_v2\0",
    b"cuStreamSynchronize\0",
    b"cuEventCreate\0",
    b"cuEventDestroy_v2\0",
    b"cuEventRecord\0",
    b"cuEventQuery\0",
    b"cuEventSynchronize\0",
    b"cuModuleLoadData\0",
    b"cuModuleUnload\0",
    b"cuModuleGetFunction\0",
    b"cuLaunchKernel\0",
    b"cuStreamBeginCapture_v2\0",
    b"cuStreamEndCapture\0",
    b"cuGraphInstantiateWithFlags\0",
    b"cuGraphDestroy\0",
    b"cuGraphExecDestroy\0",
    b"cuGraphLaunch\0",
    b"cuFuncSetAttribute\0",
];

/// Those that tell times, without which none are told.
const TIMES: [&[u8]; 2] = [b"cuEventRecordWithFlags\0", b"cuEventElapsedTime_v2\0"];

/// Kernels that may ask for more shared memory than every GPU gives unasked.
const DYNAMIC_SHARED: [&str; 1] = ["dense_rank"];
const MAX_DYNAMIC_SHARED: sys::CUfunction_attribute =
    sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;

/// The primary context of a GPU, which libraries share with us, and our kernels in it.
#[derive(Debug)]
pub struct Context {
    device: sys::CUdevice,
    raw: sys::CUcontext,
    module: sys::CUmodule,
    functions: Vec<(&'static str, sys::CUfunction)>,
    lost: AtomicBool,
    shared_bytes: u32,
    tells_times: bool,
}

// SAFETY: the handles are the driver's, which takes them from any thread and several at once; what is theirs lives until `drop`, which no
// borrow outlives. Functions of the module are only read.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// Makes the context of the `ordinal`-th GPU and loads the kernels, of which `image` is the machine code.
    ///
    /// # Errors
    /// What the driver says; a driver without a function that is needed.
    pub fn open(ordinal: u32, image: &[u8]) -> Result<Arc<Self>, DeviceError> {
        let failed = |what: &str, error: DriverError| DeviceError::Failed(format!("{what}: {:?}", error.0));
        // SAFETY: a library is opened by the driver's name, and code that it runs on opening is trusted as the system's is.
        if !unsafe { sys::is_culib_present() } {
            return Err(DeviceError::Failed("no NVIDIA driver".into()));
        }
        // SAFETY: as above; it was there just now.
        let library = unsafe { sys::culib() };
        for name in NEEDED {
            // SAFETY: the symbol is not called, only looked for.
            if unsafe { library.get::<unsafe extern "C" fn()>(name) }.is_err() {
                let name = String::from_utf8_lossy(&name[..name.len() - 1]);
                return Err(DeviceError::Failed(format!("the NVIDIA driver has no {name}")));
            }
        }
        // SAFETY: as above.
        let tells_times = TIMES.into_iter().all(|name| unsafe { library.get::<unsafe extern "C" fn()>(name) }.is_ok());
        result::init().map_err(|error| failed("cuInit", error))?;
        let device = result::device::get(ordinal as i32).map_err(|error| failed("cuDeviceGet", error))?;
        // SAFETY: the device is one that `get` returned. From here on `drop` releases.
        let raw = unsafe { result::primary_ctx::retain(device) }.map_err(|error| failed("the context", error))?;
        let mut context = Context {
            device,
            raw,
            module: std::ptr::null_mut(),
            functions: Vec::new(),
            lost: AtomicBool::new(false),
            shared_bytes: 0,
            tells_times,
        };
        context.bind()?;
        // SAFETY: the context is current; the image is of the kind that the driver knows by its first bytes, made by nvcc or NVRTC, and
        // is read during the call alone.
        let module = unsafe { result::module::load_data(image.as_ptr().cast()) };
        context.module = context.check("loading the kernels", module)?;
        for kernel in PIECES.iter().flat_map(|(_, source)| kernels_of(source)) {
            let name = CString::new(kernel).map_err(|_| DeviceError::Failed(format!("{kernel} has a NUL")))?;
            // SAFETY: the module was loaded above and lives as long as the context here.
            let function = unsafe { result::module::get_function(context.module, name) };
            let function = context.check(kernel, function)?;
            context.functions.push((kernel, function));
        }
        let most = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        // SAFETY: the device is one that `get` returned.
        let most = context.check("cuDeviceGetAttribute", unsafe { result::device::get_attribute(device, most) })?;
        context.shared_bytes = u32::try_from(most).unwrap_or(0);
        for kernel in DYNAMIC_SHARED {
            let (function, which) = (context.function(kernel)?, MAX_DYNAMIC_SHARED);
            // SAFETY: the function is of the module above.
            let set = unsafe { result::function::set_function_attribute(function, which, most) };
            context.check(kernel, set)?;
        }
        // Memory that is given back stays with the pool: what a batch needs the next one needs again.
        // SAFETY: the device is one that `get` returned; the attribute is of 64 bits, read during the call.
        unsafe {
            if let Ok(pool) = result::device::get_default_mem_pool(device) {
                let mut all = u64::MAX;
                let which = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
                let _ = result::mem_pool::set_attribute(pool, which, (&raw mut all).cast());
            }
        }
        Ok(Arc::new(context))
    }

    /// Makes this context the calling thread's, which every call of the driver is about.
    ///
    /// # Errors
    /// It is lost.
    pub fn bind(&self) -> Result<(), DeviceError> {
        if self.is_lost() {
            return Err(DeviceError::Failed("the context is lost".into()));
        }
        self.bind_anyway();
        Ok(())
    }

    /// The same for giving back what is this context's, lost or not.
    pub(super) fn bind_anyway(&self) {
        // SAFETY: the context is retained until `drop`. Where it can't be made current, the calls that follow fail and say so.
        let _ = unsafe { result::ctx::set_current(self.raw) };
    }

    /// Whether a kernel or the GPU failed in a way after which nothing in the context works any more.
    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    /// What the driver's answer is to whoever serves requests. An answer after which the driver refuses everything loses the context.
    ///
    /// # Errors
    /// Out of memory, or failed at `what`.
    pub fn check<T>(&self, what: &str, answer: Result<T, DriverError>) -> Result<T, DeviceError> {
        use CUresult::{
            CUDA_ERROR_INVALID_HANDLE, CUDA_ERROR_INVALID_VALUE, CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES,
            CUDA_ERROR_NOT_FOUND, CUDA_ERROR_NOT_PERMITTED, CUDA_ERROR_NOT_SUPPORTED, CUDA_ERROR_OUT_OF_MEMORY,
            CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED,
            CUDA_ERROR_STREAM_CAPTURE_ISOLATION, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,
        };
        answer.map_err(|error| match error.0 {
            CUDA_ERROR_OUT_OF_MEMORY => DeviceError::OutOfMemory,
            code => {
                let passes = [
                    CUDA_ERROR_INVALID_HANDLE,
                    CUDA_ERROR_INVALID_VALUE,
                    CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES,
                    CUDA_ERROR_NOT_FOUND,
                    CUDA_ERROR_NOT_PERMITTED,
                    CUDA_ERROR_NOT_SUPPORTED,
                    CUDA_ERROR_STREAM_CAPTURE_IMPLICIT,
                    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED,
                    CUDA_ERROR_STREAM_CAPTURE_ISOLATION,
                    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,
                ];
                if !passes.contains(&code) {
                    self.lost.store(true, Ordering::Release);
                }
                // The code's name only: its text would be another call of the driver.
                DeviceError::Failed(format!("{what}: {code:?}"))
            }
        })
    }

    /// The most shared memory of a block, bytes.
    pub fn shared_bytes(&self) -> u32 {
        self.shared_bytes
    }

    /// Whether the driver tells how long work took.
    pub(super) fn tells_times(&self) -> bool {
        self.tells_times
    }

    /// Memory that is left and that there is, bytes.
    ///
    /// # Errors
    /// What the driver says.
    pub fn memory(&self) -> Result<(u64, u64), DeviceError> {
        self.bind()?;
        let (left, all) = self.check("cuMemGetInfo", result::mem_get_info())?;
        Ok((left as u64, all as u64))
    }

    pub(super) fn function(&self, kernel: &str) -> Result<sys::CUfunction, DeviceError> {
        let found = self.functions.iter().find(|(name, _)| *name == kernel);
        found.map(|(_, function)| *function).ok_or_else(|| DeviceError::Failed(format!("no kernel {kernel}")))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        self.bind_anyway();
        // SAFETY: nobody uses the module or the context any more: whatever does holds it by an `Arc`. Both are released once.
        unsafe {
            if !self.module.is_null() {
                let _ = result::module::unload(self.module);
            }
            if let Err(error) = result::primary_ctx::release(self.device) {
                tracing::warn!(error = ?error.0, "a GPU's context can't be released");
            }
        }
    }
}
