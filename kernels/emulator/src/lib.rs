//! Runs the kernels of kernels/ on the CPU: the very same source, every CUDA thread a fiber. src/emulator.h says what is noticed and
//! what can't be shown. For tests: the server never links it.

use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::path::Path;
use std::ptr::NonNull;

use tastemaker_kernels::{DevicePtr, Launch};

include!("planted.rs");

/// A folder with an emulated `libcuda.so` and `libnvrtc.so` (driver/ says what they are); `None` where they could not be made, and on
/// another machine than that which made them.
pub fn emulated_cuda() -> Option<&'static Path> {
    Some(Path::new(env!("EMULATED_CUDA"))).filter(|folder| folder.join("libcuda.so").is_file())
}

unsafe extern "C" {
    fn emu_launch(
        variant: *const c_char,
        kernel: *const c_char,
        grid: *const c_uint,
        block: c_uint,
        shared_bytes: usize,
        arguments: *const *const c_void,
        n_arguments: c_uint,
        seed: u64,
        message: *mut c_char,
        room: usize,
    ) -> c_int;
    fn emu_allocate(bytes: usize, align: usize) -> *mut c_void;
    fn emu_intact(data: *const c_void) -> c_int;
    fn emu_free(data: *mut c_void);
}

/// What was noticed, with its place in the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding(pub String);

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Finding {}

/// Runs a launch to its end. `variant`: `plain`, or the name of a planted bug. `seed` decides in which order threads run: 0 modulo 4
/// first to last, 1 last to first, 2 at random, 3 at random and one warp at a time.
///
/// # Errors
/// What was noticed.
///
/// # Safety
/// The addresses in the launch are those of [`Buffer`]s of the shapes that the kernel's header names, which nothing else uses
/// meanwhile. A kernel that strays from them is a finding where it meets a guard page, and undefined behaviour where it does not.
pub unsafe fn launch(variant: &str, launch: &Launch, seed: u64) -> Result<(), Finding> {
    let [variant, kernel] = [variant, launch.kernel].map(|name| CString::new(name).expect("names have no NUL"));
    let arguments: Vec<*const c_void> = launch.arguments().iter().map(|a| std::ptr::from_ref(a).cast()).collect();
    let mut message = vec![0u8; 1024];
    // SAFETY: pointers and lengths are those of live values; that the kernel keeps to its buffers is the caller's word.
    let outcome = unsafe {
        emu_launch(
            variant.as_ptr(),
            kernel.as_ptr(),
            launch.grid.as_ptr(),
            launch.block,
            launch.shared_bytes as usize,
            arguments.as_ptr(),
            arguments.len() as c_uint,
            seed,
            message.as_mut_ptr().cast(),
            message.len(),
        )
    };
    let end = message.iter().position(|&byte| byte == 0).unwrap_or(message.len());
    if outcome == 0 { Ok(()) } else { Err(Finding(String::from_utf8_lossy(&message[..end]).into_owned())) }
}

/// Types of which any bits are a value.
///
/// # Safety
/// Any bits are a value.
pub unsafe trait Plain: Copy + 'static {}
// SAFETY: numbers.
unsafe impl Plain for u8 {}
// SAFETY: numbers.
unsafe impl Plain for u16 {}
// SAFETY: numbers.
unsafe impl Plain for u32 {}
// SAFETY: numbers.
unsafe impl Plain for i64 {}
// SAFETY: numbers.
unsafe impl Plain for f32 {}

/// Device memory that ends at a guard page.
#[derive(Debug)]
pub struct Buffer<T: Plain> {
    data: NonNull<T>,
    len: usize,
    owns: PhantomData<T>,
}

impl<T: Plain> Buffer<T> {
    /// A copy of `values`, aligned as `T` is: not one byte can be touched beyond the last.
    pub fn new(values: &[T]) -> Self {
        Self::aligned(values, align_of::<T>())
    }

    /// A copy of `values` at a 16-byte boundary, as the driver's allocations begin; what is touched within the next 15 bytes is found by
    /// [`Buffer::intact`] only, if written.
    pub fn new_16(values: &[T]) -> Self {
        Self::aligned(values, 16)
    }

    fn aligned(values: &[T], align: usize) -> Self {
        // SAFETY: no requirement; null is checked.
        let memory = unsafe { emu_allocate(size_of_val(values), align) };
        let data = NonNull::new(memory.cast::<T>()).expect("memory with guard pages");
        // SAFETY: the allocation has room for `values`, is aligned for `T`, and is new.
        unsafe { data.copy_from_nonoverlapping(NonNull::from(values).cast(), values.len()) };
        Buffer { data, len: values.len(), owns: PhantomData }
    }

    /// For launches.
    pub fn address(&self) -> DevicePtr {
        self.data.as_ptr() as DevicePtr
    }

    /// Whether nothing was written around it.
    pub fn intact(&self) -> bool {
        // SAFETY: the address is that of an allocation.
        unsafe { emu_intact(self.data.as_ptr().cast()) != 0 }
    }
}

impl<T: Plain> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `len` values that were initialised, of a type of which any bits are a value.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr(), self.len) }
    }
}

impl<T: Plain> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr(), self.len) }
    }
}

impl<T: Plain> Drop for Buffer<T> {
    fn drop(&mut self) {
        // SAFETY: allocated by `aligned`, freed once.
        unsafe { emu_free(self.data.as_ptr().cast()) };
    }
}
