//! The emulated driver, for tests of this module in one process.
#![allow(unsafe_code)] // Opening a library and calling what it has for tests.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::io::Write as _;

use parking_lot::{Mutex, MutexGuard};

/// Machine code that the driver takes. Not by NVRTC: the emulated one would be found by tests of the real one.
pub const IMAGE: &[u8] = b"EMULATED CUBIN 1\0";

/// Tests change what all of the process's calls meet: one at a time.
static ALONE: Mutex<()> = Mutex::new(());

/// The driver, for one test. It must not have been misused by the end.
pub struct Emulated {
    driver: *mut c_void,
    _alone: MutexGuard<'static, ()>,
}

impl Emulated {
    /// Opens it, so that cudarc finds it under the driver's name, and tells it the script; `None`, visibly, where it could not be made.
    pub fn open(script: &str) -> Option<Self> {
        let alone = ALONE.lock();
        let Some(folder) = tastemaker_emulator::emulated_cuda() else {
            // Not by `eprintln!`, which the test harness keeps to itself.
            let _ = writeln!(std::io::stderr(), "SKIPPED: no emulated driver: no C++ compiler, or another machine");
            return None;
        };
        let path = CString::new(folder.join("libcuda.so").to_str().unwrap()).unwrap();
        // SAFETY: the library was made for this; what it runs on opening does nothing.
        let driver = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW) };
        assert!(!driver.is_null(), "{path:?}");
        let emulated = Emulated { driver, _alone: alone };
        emulated.script(script);
        Some(emulated)
    }

    fn symbol(&self, name: &CStr) -> *mut c_void {
        // SAFETY: the library is open.
        let symbol = unsafe { libc::dlsym(self.driver, name.as_ptr()) };
        assert!(!symbol.is_null(), "{name:?}");
        symbol
    }

    /// Begins anew with other settings.
    pub fn script(&self, script: &str) {
        let script = CString::new(script).unwrap();
        // SAFETY: of this type in driver.cpp.
        let call: extern "C" fn(*const c_char) = unsafe { std::mem::transmute(self.symbol(c"emu_cuda_script")) };
        call(script.as_ptr());
    }

    /// How often something happened since.
    pub fn count(&self, what: &str) -> u64 {
        let what = CString::new(what).unwrap();
        // SAFETY: of this type in driver.cpp.
        let call: extern "C" fn(*const c_char) -> u64 = unsafe { std::mem::transmute(self.symbol(c"emu_cuda_count")) };
        call(what.as_ptr())
    }

    /// The first misuse since.
    pub fn misuse(&self) -> Option<String> {
        let mut text = [0u8; 512];
        // SAFETY: of this type in driver.cpp; it writes at most as many bytes as it is told, with a NUL.
        let call: extern "C" fn(*mut c_char, usize) -> c_int =
            unsafe { std::mem::transmute(self.symbol(c"emu_cuda_misuse")) };
        let is = call(text.as_mut_ptr().cast(), text.len()) != 0;
        is.then(|| CStr::from_bytes_until_nul(&text).unwrap().to_string_lossy().into_owned())
    }
}

/// Tells a library that stands in for another one something, by a function of its own that takes a text.
pub fn tell(library: &std::path::Path, function: &CStr, text: &str) {
    let [path, text] = [library.to_str().unwrap(), text].map(|text| CString::new(text).unwrap());
    // SAFETY: the library is open, and was made for this; its function has this type.
    unsafe {
        let library = libc::dlopen(path.as_ptr(), libc::RTLD_NOW);
        let symbol = libc::dlsym(library, function.as_ptr());
        assert!(!symbol.is_null(), "{function:?}");
        let call: extern "C" fn(*const c_char) = std::mem::transmute(symbol);
        call(text.as_ptr());
    }
}

impl Drop for Emulated {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            assert_eq!(self.misuse(), None);
            assert_eq!(self.count("used_bytes"), 0, "bytes of device memory are left over");
        }
    }
}
