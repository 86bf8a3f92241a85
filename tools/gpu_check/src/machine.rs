//! What runs the kernels and holds their data: a GPU, or in tests the emulator and the host's memory.

use std::ffi::{CString, c_void};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use cudarc::driver::{CudaContext, CudaStream, result, sys};
use tastemaker::device::cuda::cuvs::Stream;
use tastemaker::device::cuda::{kernels, probe};
use tastemaker_kernels::{DevicePtr, Launch};

/// Plain values: every pattern of bits is one.
pub trait Plain: Copy + Default + 'static {}
impl Plain for u8 {}
impl Plain for u16 {}
impl Plain for u32 {}
impl Plain for i64 {}
impl Plain for f32 {}

/// Memory on the machine, of the machine's lifetime or until [`Machine::clear`].
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// Where.
    pub address: DevicePtr,
    /// Bytes.
    pub bytes: usize,
}

/// Runs launches in order, and measures.
pub trait Machine {
    /// Memory of so many bytes, all of them 0xee.
    fn reserve(&mut self, bytes: usize) -> Result<Memory>;
    /// Writes at the memory's beginning, when all before is done.
    fn write(&mut self, memory: Memory, bytes: &[u8]) -> Result<()>;
    /// Reads all of it, when all before is done.
    fn read(&mut self, memory: Memory, bytes: &mut [u8]) -> Result<()>;
    /// Copies all of the first to the second, which is as large.
    fn copy(&mut self, from: Memory, to: Memory) -> Result<()>;
    /// Starts a kernel.
    fn launch(&mut self, launch: &Launch) -> Result<()>;
    /// Seconds that the machine takes for what `work` starts.
    fn seconds(&mut self, work: &mut dyn FnMut(&mut dyn Machine) -> Result<()>) -> Result<f64>;
    /// For cuVS.
    fn stream(&self) -> Stream;
    /// Number of the GPU.
    fn ordinal(&self) -> u32;
    /// Gives all memory back.
    fn clear(&mut self) -> Result<()>;
}

/// Values on the machine.
pub fn put<T: Plain>(machine: &mut dyn Machine, values: &[T]) -> Result<Memory> {
    // SAFETY: plain values are bytes.
    let bytes = unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(values)) };
    // At least some, so that there is an address.
    let memory = machine.reserve(bytes.len().max(16))?;
    machine.write(memory, bytes)?;
    Ok(Memory { bytes: bytes.len(), ..memory })
}

/// The first `n` values there.
pub fn get<T: Plain>(machine: &mut dyn Machine, memory: Memory, n: usize) -> Result<Vec<T>> {
    let mut values = vec![T::default(); n];
    // SAFETY: as in `put`, and every pattern of bits is a value.
    let bytes = unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast::<u8>(), n * size_of::<T>()) };
    machine.read(Memory { bytes: bytes.len(), ..memory }, bytes)?;
    Ok(values)
}

/// A GPU with the kernels.
pub struct Gpu {
    /// What it is.
    pub gpu: probe::Gpu,
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    module: sys::CUmodule,
    reserved: Vec<DevicePtr>,
}

impl Gpu {
    /// The GPU of that number, or the one with the most memory; kernels that must be compiled are kept in `cache`.
    ///
    /// # Errors
    /// [`probe::Unfit`] as the cause where there is none.
    pub fn open(ordinal: Option<u32>, cache: Option<&Path>) -> Result<Gpu> {
        let gpu = probe::probe(ordinal)?;
        let context = CudaContext::new(gpu.ordinal as usize).context("the GPU can't be opened")?;
        let stream = context.new_stream()?;
        let image = kernels::image(gpu.capability, cache)?;
        // SAFETY: the image is a whole one, for this GPU, and stays until the function returns.
        let module = unsafe { result::module::load_data(image.bytes().as_ptr().cast()) }.context("kernels")?;
        Ok(Gpu { gpu, context, stream, module, reserved: Vec::new() })
    }

    /// Free and all memory, bytes.
    ///
    /// # Errors
    /// What the driver says.
    pub fn memory(&self) -> Result<(usize, usize)> {
        Ok(self.context.mem_get_info()?)
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // The process ends soon, and a GPU that failed has said so before.
        let _ = self.clear();
        // SAFETY: all launches are done, and none follows.
        let _ = unsafe { result::module::unload(self.module) };
    }
}

impl Machine for Gpu {
    fn reserve(&mut self, bytes: usize) -> Result<Memory> {
        // SAFETY: a context is current; the memory is given back by `clear`.
        let address = unsafe { result::malloc_sync(bytes) }.with_context(|| format!("{bytes} bytes on the GPU"))?;
        self.reserved.push(address);
        // SAFETY: it has that size.
        unsafe { result::memset_d8_async(address, 0xee, bytes, self.stream.cu_stream()) }?;
        self.stream.synchronize()?;
        Ok(Memory { address, bytes })
    }

    fn write(&mut self, memory: Memory, bytes: &[u8]) -> Result<()> {
        anyhow::ensure!(bytes.len() <= memory.bytes, "{} bytes for {}", bytes.len(), memory.bytes);
        // SAFETY: it has the room, and the bytes stay until the copy is done.
        unsafe { result::memcpy_htod_async(memory.address, bytes, self.stream.cu_stream()) }?;
        Ok(self.stream.synchronize()?)
    }

    fn read(&mut self, memory: Memory, bytes: &mut [u8]) -> Result<()> {
        anyhow::ensure!(bytes.len() <= memory.bytes, "{} bytes of {}", bytes.len(), memory.bytes);
        // SAFETY: it has as many, and they are not looked at until the copy is done.
        unsafe { result::memcpy_dtoh_async(bytes, memory.address, self.stream.cu_stream()) }?;
        Ok(self.stream.synchronize()?)
    }

    fn copy(&mut self, from: Memory, to: Memory) -> Result<()> {
        anyhow::ensure!(from.bytes <= to.bytes, "{} bytes for {}", from.bytes, to.bytes);
        // SAFETY: both have as many.
        Ok(unsafe { result::memcpy_dtod_async(to.address, from.address, from.bytes, self.stream.cu_stream()) }?)
    }

    fn launch(&mut self, launch: &Launch) -> Result<()> {
        let name = CString::new(launch.kernel)?;
        // SAFETY: the module is loaded, and stays.
        let function = unsafe { result::module::get_function(self.module, name) }.context(launch.kernel)?;
        if launch.shared_bytes > 48 << 10 {
            let which = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is of a module that is loaded.
            let set = unsafe { result::function::set_function_attribute(function, which, launch.shared_bytes as i32) };
            set.with_context(|| format!("{} with {} bytes of shared memory", launch.kernel, launch.shared_bytes))?;
        }
        let mut arguments = launch.arguments().to_vec();
        let mut arguments: Vec<*mut c_void> = arguments.iter_mut().map(|a| std::ptr::from_mut(a).cast()).collect();
        let ([x, y, z], block) = (launch.grid, (launch.block, 1, 1));
        let stream = self.stream.cu_stream();
        // SAFETY: arguments are as the launch says, which its type made for this kernel, and are copied before it returns; memory is of the
        // shapes that the kernel's header names, by whoever made the launch here.
        let started =
            unsafe { result::launch_kernel(function, (x, y, z), block, launch.shared_bytes, stream, &mut arguments) };
        started.context(launch.kernel)
    }

    fn seconds(&mut self, work: &mut dyn FnMut(&mut dyn Machine) -> Result<()>) -> Result<f64> {
        let flags = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
        let start = self.stream.record_event(flags)?;
        work(self)?;
        let end = self.stream.record_event(flags)?;
        self.stream.synchronize()?;
        Ok(f64::from(start.elapsed_ms(&end)?) / 1e3)
    }

    fn stream(&self) -> Stream {
        Stream(self.stream.cu_stream().cast())
    }

    fn ordinal(&self) -> u32 {
        self.gpu.ordinal
    }

    fn clear(&mut self) -> Result<()> {
        self.stream.synchronize()?;
        for address in self.reserved.drain(..) {
            // SAFETY: `reserve` made it, and all that used it is done.
            unsafe { result::free_sync(address) }?;
        }
        Ok(())
    }
}

/// The emulator, and the host's memory.
#[cfg(test)]
pub mod emulated {
    use std::time::Instant;

    use super::*;

    /// A machine for tests.
    #[derive(Default)]
    pub struct Emulated {
        held: Vec<Box<[u128]>>,
        /// Of the order in which threads run.
        pub seed: u64,
    }

    impl Machine for Emulated {
        fn reserve(&mut self, bytes: usize) -> Result<Memory> {
            let words = vec![u128::from_ne_bytes([0xee; 16]); bytes.div_ceil(16)].into_boxed_slice();
            let address = words.as_ptr() as DevicePtr;
            self.held.push(words);
            Ok(Memory { address, bytes })
        }
        fn write(&mut self, memory: Memory, bytes: &[u8]) -> Result<()> {
            anyhow::ensure!(bytes.len() <= memory.bytes);
            // SAFETY: `reserve` made it, and it has the room.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), memory.address as *mut u8, bytes.len()) };
            Ok(())
        }
        fn read(&mut self, memory: Memory, bytes: &mut [u8]) -> Result<()> {
            anyhow::ensure!(bytes.len() <= memory.bytes);
            // SAFETY: as above.
            unsafe { std::ptr::copy_nonoverlapping(memory.address as *const u8, bytes.as_mut_ptr(), bytes.len()) };
            Ok(())
        }
        fn copy(&mut self, from: Memory, to: Memory) -> Result<()> {
            // SAFETY: as above; they are different ones.
            unsafe { std::ptr::copy_nonoverlapping(from.address as *const u8, to.address as *mut u8, from.bytes) };
            Ok(())
        }
        fn launch(&mut self, launch: &Launch) -> Result<()> {
            // SAFETY: as for a GPU.
            Ok(unsafe { tastemaker_emulator::launch("plain", launch, self.seed) }?)
        }
        fn seconds(&mut self, work: &mut dyn FnMut(&mut dyn Machine) -> Result<()>) -> Result<f64> {
            let start = Instant::now();
            work(self)?;
            Ok(start.elapsed().as_secs_f64())
        }
        fn stream(&self) -> Stream {
            Stream(std::ptr::null_mut())
        }
        fn ordinal(&self) -> u32 {
            0
        }
        fn clear(&mut self) -> Result<()> {
            self.held.clear();
            Ok(())
        }
    }
}
