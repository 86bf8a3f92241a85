//! That the emulated driver notices what CUDA leaves undefined, and that a wait that is missing shows: each is done on purpose here, by the
//! driver's own calls. Beside each stands what is right, which must pass.

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::io::Write as _;
use std::ptr::null_mut;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Bytes of a copy.
const N: usize = 4096;
const NOT_READY: c_int = 600;
const ILLEGAL_ADDRESS: c_int = 700;

/// The driver with a context, for one test.
struct Driver {
    library: *mut c_void,
    _alone: MutexGuard<'static, ()>,
}

macro_rules! calls {
    ($($call:ident = $name:literal ($($argument:ident: $type:ty),*);)*) => {
        impl Driver {
            $(fn $call(&self, $($argument: $type),*) -> c_int {
                // SAFETY: the library was made for this, and its function has this type.
                let call: extern "C" fn($($type),*) -> c_int = unsafe { std::mem::transmute(self.symbol($name)) };
                call($($argument),*)
            })*
        }
    };
}

type Handle = *mut c_void;

calls! {
    init = c"cuInit" (flags: c_uint);
    retain = c"cuDevicePrimaryCtxRetain" (context: *mut Handle, device: c_int);
    release = c"cuDevicePrimaryCtxRelease_v2" (device: c_int);
    set_current = c"cuCtxSetCurrent" (context: Handle);
    alloc = c"cuMemAlloc_v2" (at: *mut u64, bytes: usize);
    free = c"cuMemFree_v2" (at: u64);
    alloc_host = c"cuMemHostAlloc" (at: *mut Handle, bytes: usize, flags: c_uint);
    free_host = c"cuMemFreeHost" (at: Handle);
    stream_create = c"cuStreamCreate" (stream: *mut Handle, flags: c_uint);
    stream_destroy = c"cuStreamDestroy_v2" (stream: Handle);
    stream_synchronize = c"cuStreamSynchronize" (stream: Handle);
    stream_wait = c"cuStreamWaitEvent" (stream: Handle, event: Handle, flags: c_uint);
    stream_query = c"cuStreamQuery" (stream: Handle);
    event_create = c"cuEventCreate" (event: *mut Handle, flags: c_uint);
    event_destroy = c"cuEventDestroy_v2" (event: Handle);
    event_record = c"cuEventRecord" (event: Handle, stream: Handle);
    upload = c"cuMemcpyHtoDAsync_v2" (to: u64, from: *const c_void, bytes: usize, stream: Handle);
    download = c"cuMemcpyDtoHAsync_v2" (to: *mut c_void, from: u64, bytes: usize, stream: Handle);
    begin_capture = c"cuStreamBeginCapture_v2" (stream: Handle, mode: c_int);
    end_capture = c"cuStreamEndCapture" (stream: Handle, graph: *mut Handle);
    instantiate = c"cuGraphInstantiateWithFlags" (executable: *mut Handle, graph: Handle, flags: u64);
    graph_destroy = c"cuGraphDestroy" (graph: Handle);
    executable_destroy = c"cuGraphExecDestroy" (executable: Handle);
    graph_launch = c"cuGraphLaunch" (executable: Handle, stream: Handle);
    module_load = c"cuModuleLoadData" (module: *mut Handle, image: *const c_void);
    module_unload = c"cuModuleUnload" (module: Handle);
    function = c"cuModuleGetFunction" (function: *mut Handle, module: Handle, name: *const c_char);
    launch_host = c"cuLaunchHostFunc" (stream: Handle, function: extern "C" fn(Handle), data: Handle);
    holds = c"emu_cuda_holds" (at: u64, bytes: usize, device: c_int);
    misuse_text = c"emu_cuda_misuse" (text: *mut c_char, room: usize);
}

impl Driver {
    /// `None`, visibly, where it could not be made.
    fn open(seed: u64) -> Option<Self> {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(folder) = tastemaker_emulator::emulated_cuda() else {
            // Not by `eprintln!`, which the test harness keeps to itself.
            let _ = writeln!(std::io::stderr(), "SKIPPED: no emulated driver: no C++ compiler, or another machine");
            return None;
        };
        let path = CString::new(folder.join("libcuda.so").to_str().unwrap()).unwrap();
        // SAFETY: the library was made for this; what it runs on opening does nothing.
        let library = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW) };
        assert!(!library.is_null());
        let driver = Driver { library, _alone: alone };
        let script = CString::new(format!("seed={seed},delay_us=2000,devices=2")).unwrap();
        // SAFETY: of this type in driver.cpp.
        let call: extern "C" fn(*const c_char) = unsafe { std::mem::transmute(driver.symbol(c"emu_cuda_script")) };
        call(script.as_ptr());
        assert_eq!(driver.init(0), 0);
        let context = driver.made(|at| driver.retain(at, 0));
        assert_eq!(driver.set_current(context), 0);
        Some(driver)
    }

    fn symbol(&self, name: &CStr) -> *mut c_void {
        // SAFETY: the library is open.
        let symbol = unsafe { libc::dlsym(self.library, name.as_ptr()) };
        assert!(!symbol.is_null(), "{name:?}");
        symbol
    }

    fn made<T>(&self, make: impl FnOnce(*mut T) -> c_int) -> T {
        let mut made = std::mem::MaybeUninit::uninit();
        assert_eq!(make(made.as_mut_ptr()), 0);
        // SAFETY: the call succeeded, and has then written it.
        unsafe { made.assume_init() }
    }

    fn stream(&self) -> Handle {
        self.made(|at| self.stream_create(at, 1))
    }

    fn memory(&self) -> u64 {
        self.made(|at| self.alloc(at, N))
    }

    /// Pinned memory that holds `value` everywhere.
    fn host(&self, value: u8) -> &'static mut [u8] {
        let at: Handle = self.made(|at| self.alloc_host(at, N, 0));
        // SAFETY: as many bytes as were asked for; whoever frees it does not use it any more.
        let bytes = unsafe { std::slice::from_raw_parts_mut(at.cast::<u8>(), N) };
        bytes.fill(value);
        bytes
    }

    fn misuse(&self) -> Option<String> {
        let mut text = [0u8; 512];
        let is = self.misuse_text(text.as_mut_ptr().cast(), text.len()) != 0;
        is.then(|| CStr::from_bytes_until_nul(&text).unwrap().to_string_lossy().into_owned())
    }

    /// Gives the context up; the first misuse of all.
    fn close(self) -> Option<String> {
        assert_eq!(self.release(0), 0);
        self.misuse()
    }
}

fn all(bytes: &[u8], value: u8) -> bool {
    bytes.iter().all(|&byte| byte == value)
}

#[test]
fn a_copy_takes_what_is_there_when_its_turn_comes() {
    let mut wrong = 0;
    for (seed, waits) in (0..8).flat_map(|seed| [(seed, true), (seed, false)]) {
        let Some(driver) = Driver::open(seed) else { return };
        let (stream, memory, from, to) = (driver.stream(), driver.memory(), driver.host(1), driver.host(0));
        assert_eq!(driver.upload(memory, from.as_ptr().cast(), N, stream), 0);
        if waits {
            assert_eq!(driver.stream_synchronize(stream), 0);
        }
        from.fill(2);
        assert_eq!(driver.download(to.as_mut_ptr().cast(), memory, N, stream), 0);
        // The target of a copy holds rubbish until it is done.
        if driver.stream_query(stream) == NOT_READY {
            assert!(!all(to, 0));
        }
        assert_eq!(driver.stream_synchronize(stream), 0);
        if waits {
            assert!(all(to, 1), "{seed}");
        } else {
            wrong += u32::from(!all(to, 1));
        }
        assert_eq!(driver.free(memory), 0);
        assert_eq!([driver.free_host(from.as_mut_ptr().cast()), driver.free_host(to.as_mut_ptr().cast())], [0; 2]);
        assert_eq!(driver.stream_destroy(stream), 0);
        assert_eq!(driver.close(), None);
    }
    assert!(wrong > 0, "a missing wait never shows");
}

#[test]
fn streams_wait_for_each_other_by_events_alone() {
    let mut wrong = 0;
    for (seed, waits) in (0..12).flat_map(|seed| [(seed, true), (seed, false)]) {
        let Some(driver) = Driver::open(seed) else { return };
        let (one, other, memory) = (driver.stream(), driver.stream(), driver.memory());
        let (from, to, event) = (driver.host(1), driver.host(0), driver.made(|at| driver.event_create(at, 0)));
        assert_eq!(driver.upload(memory, from.as_ptr().cast(), N, one), 0);
        assert_eq!(driver.event_record(event, one), 0);
        if waits {
            assert_eq!(driver.stream_wait(other, event, 0), 0);
        }
        assert_eq!(driver.download(to.as_mut_ptr().cast(), memory, N, other), 0);
        assert_eq!([driver.stream_synchronize(other), driver.stream_synchronize(one)], [0; 2]);
        if waits {
            assert!(all(to, 1), "{seed}");
        } else {
            wrong += u32::from(!all(to, 1));
        }
        assert_eq!(driver.free(memory), 0);
        assert_eq!([driver.free_host(from.as_mut_ptr().cast()), driver.free_host(to.as_mut_ptr().cast())], [0; 2]);
        assert_eq!([driver.stream_destroy(one), driver.stream_destroy(other), driver.event_destroy(event)], [0; 3]);
        assert_eq!(driver.close(), None);
    }
    assert!(wrong > 0, "a missing event never shows");
}

#[test]
fn misuse_is_named() {
    type Planted = (&'static str, fn(&Driver, Handle, u64, &'static mut [u8]));
    let planted: [Planted; 12] = [
        ("not in one buffer of the device", |driver, stream, memory, host| {
            assert_ne!(driver.upload(memory + 1, host.as_ptr().cast(), N, stream), 0);
        }),
        ("not in one buffer of the device", |driver, stream, memory, host| {
            assert_eq!(driver.free(memory), 0);
            assert_ne!(driver.download(host.as_mut_ptr().cast(), memory, N, stream), 0);
        }),
        ("is no device memory or was freed before", |driver, _, memory, _| {
            assert_eq!([driver.free(memory), driver.free(memory)], [0; 2]);
        }),
        ("is no pinned memory or was freed before", |driver, _, memory, _| {
            assert_ne!(driver.free_host(memory as Handle), 0);
        }),
        ("pinned memory is freed while a copy still needs it", |driver, stream, memory, host| {
            // Several, so that the last is not done whatever the delays.
            for _ in 0..4 {
                assert_eq!(driver.upload(memory, host.as_ptr().cast(), N, stream), 0);
            }
            assert_eq!(driver.free_host(host.as_mut_ptr().cast()), 0);
        }),
        ("a stream that is not there, or not any more", |driver, stream, _, _| {
            assert_eq!(driver.stream_destroy(stream), 0);
            assert_ne!(driver.stream_synchronize(stream), 0);
        }),
        ("a wait inside a capture", |driver, stream, _, _| {
            assert_eq!(driver.begin_capture(stream, 0), 0);
            assert_ne!(driver.stream_synchronize(stream), 0);
            let mut graph = null_mut();
            assert_ne!(driver.end_capture(stream, &mut graph), 0);
        }),
        ("an allocation inside a capture", |driver, stream, _, _| {
            assert_eq!(driver.begin_capture(stream, 1), 0);
            assert_ne!(driver.alloc(&mut 0, 64), 0);
            let mut graph = null_mut();
            assert_ne!(driver.end_capture(stream, &mut graph), 0);
        }),
        ("memory given back inside a capture", |driver, stream, memory, _| {
            assert_eq!(driver.begin_capture(stream, 1), 0);
            assert_ne!(driver.free(memory), 0);
            let mut graph = null_mut();
            assert_ne!(driver.end_capture(stream, &mut graph), 0);
            assert_eq!(driver.free(memory), 0, "it is still there");
        }),
        ("a graph that is not there, or not any more", |driver, stream, _, _| {
            assert_eq!(driver.begin_capture(stream, 1), 0);
            let graph = driver.made(|at| driver.end_capture(stream, at));
            assert_eq!(driver.graph_destroy(graph), 0);
            assert_ne!(driver.instantiate(&mut null_mut(), graph, 0), 0);
        }),
        ("left over: 1 streams, 0 events, 0 modules, 1 graphs", |driver, stream, _, _| {
            assert_eq!(driver.begin_capture(stream, 1), 0);
            driver.made(|at| driver.end_capture(stream, at));
        }),
        ("left over: 1 streams, 0 events, 0 modules, 0 graphs", |_, _, _, _| {}),
    ];
    for (named, does) in planted {
        let Some(driver) = Driver::open(1) else { return };
        let (stream, memory, host) = (driver.stream(), driver.memory(), driver.host(3));
        does(&driver, stream, memory, host);
        let misuse = driver.close();
        assert!(misuse.as_ref().is_some_and(|text| text.contains(named)), "{named}: {misuse:?}");
    }
}

#[test]
fn a_kernel_on_memory_that_was_freed_loses_the_context() {
    let Some(driver) = Driver::open(1) else { return };
    let (stream, memory) = (driver.stream(), driver.memory());
    let module = driver.made(|at| driver.module_load(at, c"EMULATED CUBIN 1".as_ptr().cast()));
    let function = driver.made(|at| driver.function(at, module, c"mask_scores".as_ptr()));
    let pairs = driver.memory();
    assert_eq!(driver.free(memory), 0);
    // SAFETY: of this type in cuda.h.
    let launch: extern "C" fn(
        Handle,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        Handle,
        *mut *mut c_void,
        *mut *mut c_void,
    ) -> c_int = unsafe { std::mem::transmute(driver.symbol(c"cuLaunchKernel")) };
    // Pairs hold rubbish, which is beyond every row, so that only what is read counts: here the pairs themselves were freed.
    let (mut from, mut n, mut scores, mut sizes) = (memory, 4u32, pairs, [u32::MAX; 3]);
    let [queries, rows, stride] = sizes.each_mut().map(|size| std::ptr::from_mut(size).cast());
    let parameters = [
        std::ptr::from_mut(&mut from).cast(),
        std::ptr::from_mut(&mut n).cast(),
        std::ptr::from_mut(&mut scores).cast(),
        queries,
        rows,
        stride,
    ];
    let mut parameters: [*mut c_void; 6] = parameters;
    assert_eq!(launch(function, 1, 1, 1, 256, 1, 1, 0, stream, parameters.as_mut_ptr(), null_mut()), 0);
    assert_eq!(driver.stream_synchronize(stream), ILLEGAL_ADDRESS);
    assert_eq!(driver.stream_create(&mut null_mut(), 0), ILLEGAL_ADDRESS, "whatever is called");
    let misuse = driver.misuse().unwrap();
    assert!(misuse.contains("of a buffer of 4096 bytes that was freed"), "{misuse}");
    assert_eq!(driver.free(pairs), ILLEGAL_ADDRESS);
    assert_eq!([driver.module_unload(module), driver.stream_destroy(stream)], [0; 2]);
    driver.close();
    // The next context is sound.
    let driver = Driver::open(1).unwrap();
    let stream = driver.stream();
    assert_eq!([driver.stream_synchronize(stream), driver.stream_destroy(stream)], [0; 2]);
    assert_eq!(driver.close(), None);
}

#[test]
fn what_was_captured_runs_as_often_as_it_is_launched() {
    let Some(driver) = Driver::open(5) else { return };
    let (stream, memory, from, to) = (driver.stream(), driver.memory(), driver.host(1), driver.host(0));
    assert_eq!(driver.begin_capture(stream, 0), 0);
    assert_eq!(driver.upload(memory, from.as_ptr().cast(), N, stream), 0);
    assert_eq!(driver.download(to.as_mut_ptr().cast(), memory, N, stream), 0);
    let graph = driver.made(|at| driver.end_capture(stream, at));
    let executable = driver.made(|at| driver.instantiate(at, graph, 0));
    assert_eq!(driver.graph_destroy(graph), 0);
    assert_eq!(driver.stream_synchronize(stream), 0);
    assert!(all(to, 0), "nothing runs while it is captured");
    for value in 1..4 {
        from.fill(value);
        assert_eq!(driver.graph_launch(executable, stream), 0);
        assert_eq!(driver.stream_synchronize(stream), 0);
        assert!(all(to, value));
    }
    assert_eq!(driver.executable_destroy(executable), 0);
    assert_ne!(driver.graph_launch(executable, stream), 0);
    assert_eq!(driver.misuse().unwrap(), "a graph that is not there, or not any more");
    assert_eq!(driver.free(memory), 0);
    assert_eq!([driver.free_host(from.as_mut_ptr().cast()), driver.free_host(to.as_mut_ptr().cast())], [0; 2]);
    assert_eq!(driver.stream_destroy(stream), 0);
    driver.close();
}

#[test]
fn a_function_of_the_host_runs_when_its_turn_comes() {
    extern "C" fn increment(at: Handle) {
        // SAFETY: the tests give it `N` bytes that only the stream's work touches meanwhile.
        unsafe { std::slice::from_raw_parts_mut(at.cast::<u8>(), N) }.iter_mut().for_each(|byte| *byte += 1);
    }
    let Some(driver) = Driver::open(8) else { return };
    let (stream, memory, from, to) = (driver.stream(), driver.memory(), driver.host(1), driver.host(0));
    assert_eq!(driver.upload(memory, from.as_ptr().cast(), N, stream), 0);
    assert_eq!(driver.launch_host(stream, increment, memory as Handle), 0);
    assert_eq!(driver.download(to.as_mut_ptr().cast(), memory, N, stream), 0);
    assert_eq!(driver.stream_synchronize(stream), 0);
    assert!(all(to, 2));
    let holds = |bytes, device| driver.holds(memory, bytes, device);
    assert_eq!([holds(N, 0), holds(N, -1), holds(N + 1, 0), holds(N, 1)], [1, 1, 0, 0]);
    assert_eq!([driver.free(memory), driver.stream_destroy(stream)], [0; 2]);
    assert_eq!([driver.free_host(from.as_mut_ptr().cast()), driver.free_host(to.as_mut_ptr().cast())], [0; 2]);
    assert_eq!(driver.close(), None);
}

#[test]
fn devices_have_memory_and_contexts_of_their_own() {
    let Some(driver) = Driver::open(9) else { return };
    let (first, memory, from) = (driver.stream(), driver.memory(), driver.host(3));
    let context = driver.made(|at| driver.retain(at, 1));
    assert_ne!(driver.retain(&mut null_mut(), 2), 0, "there are two");
    assert_eq!(driver.set_current(context), 0);
    let (second, own) = (driver.stream(), driver.memory());
    assert_eq!(driver.upload(own, from.as_ptr().cast(), N, second), 0);
    assert_eq!(driver.stream_synchronize(second), 0);
    assert_eq!(driver.misuse(), None);
    assert_eq!(driver.upload(memory, from.as_ptr().cast(), N, second), 1);
    assert!(driver.misuse().unwrap().ends_with("not in one buffer of the device"));
    // One is given up, and what is left of it said; the other goes on.
    assert_eq!([driver.free(own), driver.stream_destroy(second), driver.release(1)], [0; 3]);
    let context = driver.made(|at| driver.retain(at, 0));
    assert_eq!(driver.set_current(context), 0);
    assert_eq!(driver.upload(memory, from.as_ptr().cast(), N, first), 0);
    assert_eq!(driver.stream_synchronize(first), 0);
    assert_eq!([driver.free(memory), driver.stream_destroy(first), driver.free_host(from.as_mut_ptr().cast())], [0; 3]);
    assert_eq!(driver.release(0), 0);
    driver.close();
}
