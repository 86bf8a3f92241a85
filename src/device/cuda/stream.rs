//! Streams, and memory that streams use: what safe code can do with them is free of data races and of use after free.
//!
//! A stream does its work in the order in which it was given; the calls that give it return at once. What keeps this safe:
//!
//! - A [`Buffer`] belongs to one stream, which alone reads, writes and frees it: whatever was given before is done before.
//! - [`Pinned`] memory that a copy needs is inside a [`Flight`] until the copy was waited for. A flight that is dropped hands its memory to the
//!   stream, which keeps it that long.
//! - A [`Table`] is written before it is one, and only read from then on, by any stream. A stream that reads it keeps it until it has.
//! - A [`Stream`] is one thread's at a time; it may be sent, not shared.
//! - A [`Graph`] is work that was recorded; it keeps all memory that it reads and writes, and runs on its own stream alone.
//!
//! None of these compiles:
//!
//! ```compile_fail,E0382
//! # use tastemaker::device::{DeviceError, cuda::stream::{Buffer, Pinned, Stream}};
//! fn written_while_a_copy_reads(stream: &Stream, mut host: Pinned<f32>, to: &mut Buffer<f32>) -> Result<(), DeviceError> {
//!     let _flight = stream.upload(host, 8, to.part_mut(0..8))?;
//!     host[0] = 1.0;
//!     Ok(())
//! }
//! ```
//! ```compile_fail,E0608
//! # use tastemaker::device::{DeviceError, cuda::stream::{Buffer, Pinned, Stream}};
//! fn read_before_the_copy_is_done(stream: &Stream, host: Pinned<f32>, from: &Buffer<f32>) -> Result<f32, DeviceError> {
//!     let flight = stream.download(from.part(0..8), host)?;
//!     Ok(flight[0])
//! }
//! ```
//! ```compile_fail,E0505
//! # use tastemaker::device::{DeviceError, cuda::stream::{Buffer, Pinned, Stream}};
//! fn freed_before_it_is_used(stream: &Stream, host: Pinned<f32>, from: Buffer<f32>) -> Result<(), DeviceError> {
//!     let part = from.part(0..8);
//!     drop(from);
//!     stream.download(part, host)?.wait().map(drop)
//! }
//! ```
//! ```compile_fail,E0499
//! # use tastemaker::device::cuda::stream::Buffer;
//! fn written_twice_at_once(buffer: &mut Buffer<f32>) {
//!     let one = buffer.part_mut(0..8);
//!     let other = buffer.part_mut(4..12);
//!     drop((one, other));
//! }
//! ```
//! ```compile_fail,E0599
//! # use tastemaker::device::cuda::stream::Table;
//! fn a_table_is_not_written(table: &Table<f32>) {
//!     let _ = table.part_mut(0..8);
//! }
//! ```
//! ```compile_fail,E0277
//! # use tastemaker::device::cuda::stream::Stream;
//! fn shared_by_two_threads(stream: &Stream) {
//!     std::thread::scope(|scope| {
//!         scope.spawn(|| stream.synchronize());
//!     });
//! }
//! ```
//!
//! And these, which differ by little, do:
//!
//! ```
//! # use tastemaker::device::{DeviceError, cuda::stream::{Buffer, Pinned, Stream, Table}};
//! fn there_and_back(stream: &Stream, mut host: Pinned<f32>, buffer: &mut Buffer<f32>) -> Result<f32, DeviceError> {
//!     let mut host = stream.upload(host, 8, buffer.part_mut(0..8))?.wait()?;
//!     host[0] = 1.0;
//!     let host = stream.download(buffer.part(0..8), host)?.wait()?;
//!     let (one, other) = buffer.part_mut(0..12).split_at(4);
//!     drop((one, other));
//!     Ok(host[0])
//! }
//! fn sent_to_another_thread(stream: Stream, table: &Table<f32>) {
//!     std::thread::scope(|scope| {
//!         scope.spawn(move || (stream.synchronize(), table.len()));
//!     });
//! }
//! ```
#![allow(unsafe_code)] // Calls of the driver, through cudarc, and memory that it gives.

use std::any::Any;
use std::cell::RefCell;
use std::ffi::c_void;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut, Range};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytemuck::Pod;
use cudarc::driver::{result, sys};
use parking_lot::Mutex;
use tastemaker_kernels::{DevicePtr, Launch, MOST_ARGUMENTS};

use super::context::Context;
use super::timeline::{Events, Timeline};
use crate::device::DeviceError;

/// What can lie on a GPU: any bits are a value.
pub trait Plain: Pod + Send + Sync {}

impl<T: Pod + Send + Sync> Plain for T {}

/// A stream of work on a GPU, and the only way to give it some.
#[derive(Debug)]
pub struct Stream {
    lane: Arc<Lane>,
    /// What the recorded work needs, while some is recorded. Not `Sync`: between the calls that make up one piece of work nobody else's
    /// may come.
    recorded: RefCell<Vec<Arc<dyn Any + Send + Sync>>>,
    /// While somebody asks what takes how long.
    timeline: RefCell<Option<Timeline>>,
}

/// What a stream and its memory share.
#[derive(Debug)]
struct Lane {
    context: Arc<Context>,
    raw: sys::CUstream,
    /// Marks that were set.
    marks: AtomicU64,
    /// Work is not done, but recorded.
    records: AtomicBool,
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    /// What is needed until a mark is reached, by the mark's number.
    kept: Vec<(u64, Arc<dyn Any + Send + Sync>)>,
    events: Vec<Event>,
    /// Memory that was given back while work was recorded: done at once it would become part of that.
    unfreed: Vec<DevicePtr>,
}

/// An event that nobody waits for.
#[derive(Debug)]
struct Event(sys::CUevent);

// SAFETY: the driver takes streams and events from any thread. What a lane holds is behind a lock, and only a `Stream`, which is not
// shared, gives it work.
unsafe impl Send for Lane {}
// SAFETY: as above.
unsafe impl Sync for Lane {}
// SAFETY: as above.
unsafe impl Send for Event {}

impl Lane {
    /// Whatever is needed until the next mark.
    fn keep(&self, what: Arc<dyn Any + Send + Sync>) {
        self.held.lock().kept.push((self.marks.load(Ordering::Relaxed), what));
    }

    /// The stream has reached the `mark`-th mark.
    fn reached(&self, mark: u64) {
        let mut done = Vec::new();
        {
            let mut held = self.held.lock();
            let mut at = 0;
            while at < held.kept.len() {
                if held.kept[at].0 < mark { done.push(held.kept.swap_remove(at)) } else { at += 1 }
            }
        }
        // Not under the lock: it may be memory, which is freed here.
        drop(done);
    }

    fn event(&self) -> Result<Event, DeviceError> {
        if let Some(event) = self.held.lock().events.pop() {
            return Ok(event);
        }
        self.context.bind()?;
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING;
        self.context.check("cuEventCreate", result::event::create(flags)).map(Event)
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.context.bind_anyway();
        // SAFETY: nobody gives the stream work any more. What it keeps is dropped behind this, when all is done or the context is lost,
        // in which no kernel runs any more.
        unsafe {
            let _ = result::stream::synchronize(self.raw);
            for event in self.held.get_mut().events.drain(..) {
                let _ = result::event::destroy(event.0);
            }
            let _ = result::stream::destroy(self.raw);
        }
    }
}

/// A place in a stream's work.
#[derive(Debug)]
struct Mark {
    lane: Arc<Lane>,
    event: Option<Event>,
    /// How many were set before, plus one.
    number: u64,
}

impl Mark {
    /// Blocks until the stream is there.
    fn wait(&self) -> Result<(), DeviceError> {
        let Some(event) = &self.event else { return Ok(()) };
        self.lane.context.bind()?;
        // SAFETY: the event is this mark's until it is dropped.
        let waited = unsafe { result::event::synchronize(event.0) };
        self.lane.context.check("waiting for the GPU", waited)?;
        self.lane.reached(self.number);
        Ok(())
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        // An event may be recorded again before it is reached: it then stands for the later place.
        self.lane.held.lock().events.extend(self.event.take());
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.lane.context.bind_anyway();
        // What is kept may hold the lane itself: it would keep itself alive.
        // SAFETY: the stream lives, and this was the only way to give it work.
        let _ = unsafe { result::stream::synchronize(self.lane.raw) };
        let kept = std::mem::take(&mut self.lane.held.lock().kept);
        drop(kept);
    }
}

impl Stream {
    /// A stream that runs beside others.
    ///
    /// # Errors
    /// What the driver says.
    pub fn new(context: &Arc<Context>) -> Result<Self, DeviceError> {
        context.bind()?;
        let raw = context.check("cuStreamCreate", result::stream::create(result::stream::StreamKind::NonBlocking))?;
        let (marks, records) = (AtomicU64::new(0), AtomicBool::new(false));
        let lane = Lane { context: context.clone(), raw, marks, records, held: Mutex::default() };
        Ok(Stream { lane: Arc::new(lane), recorded: RefCell::default(), timeline: RefCell::default() })
    }

    /// The context.
    pub fn context(&self) -> &Arc<Context> {
        &self.lane.context
    }

    /// For libraries that take a stream: valid as long as the stream. Work that they give it comes in order with the rest.
    pub fn raw(&self) -> *mut c_void {
        self.lane.raw.cast()
    }

    /// For what calls of libraries need of the stream: it lives as long as this.
    pub(super) fn kept(&self) -> Arc<dyn Any + Send + Sync> {
        self.lane.clone()
    }

    /// Blocks until all that the stream was given is done.
    ///
    /// # Errors
    /// What the GPU failed at since.
    pub fn synchronize(&self) -> Result<(), DeviceError> {
        self.mark()?.wait()
    }

    /// Has every kernel, graph and copy from now on followed by an event, until [`Self::times`].
    ///
    /// # Errors
    /// What the driver says.
    pub fn take_times(&self) -> Result<(), DeviceError> {
        self.works()?;
        let timeline = Timeline::new(self.lane.context.clone());
        let timeline =
            timeline.ok_or_else(|| DeviceError::Failed("the NVIDIA driver does not tell times".to_owned()))?;
        self.timeline.replace(Some(timeline));
        self.lap("")
    }

    /// What the stream was given since [`Self::take_times`], in order: a kernel's name, `graph`, `upload` or `download`, and its seconds. Waits
    /// for the GPU; nothing without that call.
    ///
    /// # Errors
    /// What the GPU failed at since.
    pub fn times(&self) -> Result<Vec<(&'static str, f64)>, DeviceError> {
        self.timeline.take().map_or(Ok(Vec::new()), |timeline| timeline.times())
    }

    /// An event behind what was given last, where times are taken and nothing is recorded.
    pub(super) fn lap(&self, what: &'static str) -> Result<(), DeviceError> {
        match &mut *self.timeline.borrow_mut() {
            Some(timeline) if !self.lane.records.load(Ordering::Relaxed) => timeline.lap(what, self.lane.raw),
            _ => Ok(()),
        }
    }

    /// Whether work is done, and not recorded, of which only kernels can be.
    fn works(&self) -> Result<(), DeviceError> {
        match self.lane.records.load(Ordering::Relaxed) {
            true => Err(DeviceError::Failed("only kernels can be recorded".into())),
            false => Ok(()),
        }
    }

    /// Records the kernels that `give` gives the stream, which are not run. What `give` looked up on the host stays as it was then.
    ///
    /// # Errors
    /// What `give` returns, something that can't be recorded, or what the driver says. The stream can be used as before.
    pub fn record(&self, give: impl FnOnce() -> Result<(), DeviceError>) -> Result<Graph, DeviceError> {
        self.works()?;
        self.lane.context.bind()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives, and captures nothing yet. `Recording` ends it, whatever happens in between.
        let begun = unsafe { result::stream::begin_capture(self.lane.raw, mode) };
        self.lane.context.check("cuStreamBeginCapture", begun)?;
        self.lane.records.store(true, Ordering::Relaxed);
        let mut recording = Recording { stream: self, graph: std::ptr::null_mut() };
        let given = give();
        let ended = recording.end();
        given.and(ended)?;
        if recording.graph.is_null() {
            return Err(DeviceError::Failed("nothing was recorded".into()));
        }
        // SAFETY: the graph is one that the driver has just made; it is destroyed when `recording` is dropped, which its executable
        // outlives.
        let made = unsafe { result::graph::instantiate(recording.graph, sys::CUgraphInstantiate_flags(0)) };
        let executable = self.lane.context.check("cuGraphInstantiate", made)?;
        let kept = std::mem::take(&mut *self.recorded.borrow_mut());
        Ok(Graph { lane: self.lane.clone(), executable, kept: Arc::new(kept) })
    }

    /// Gives the stream all that was recorded.
    ///
    /// # Errors
    /// What the driver says.
    ///
    /// # Panics
    /// If it was recorded on another stream.
    pub fn launch_graph(&self, graph: &Graph) -> Result<(), DeviceError> {
        assert!(Arc::ptr_eq(&graph.lane, &self.lane), "a graph of another stream");
        self.works()?;
        self.lane.context.bind()?;
        self.lane.keep(graph.kept.clone());
        // SAFETY: the executable is the graph's, which is not destroyed meanwhile; a driver frees it when what was launched is done. All
        // that its kernels touch is kept until then: buffers are freed in the stream's order, tables when the next mark was reached.
        let launched = unsafe { result::graph::launch(graph.executable, self.lane.raw) };
        self.lane.context.check("cuGraphLaunch", launched)?;
        self.lap("graph")
    }

    /// So many moments, none of which has come; `None`: the driver does not tell times.
    ///
    /// # Errors
    /// What the driver says.
    pub fn moments(&self, n: usize) -> Result<Option<Moments>, DeviceError> {
        let Some(mut of) = Events::new(self.lane.context.clone()) else { return Ok(None) };
        for _ in 0..n {
            of.add()?;
        }
        Ok(Some(Moments { lane: self.lane.clone(), of: Arc::new(of) }))
    }

    /// Has a moment come when the stream is here: each time that it is, in work that is recorded.
    ///
    /// # Errors
    /// What the driver says.
    ///
    /// # Panics
    /// If there is no such moment, or it is another stream's.
    pub fn comes(&self, moments: &Moments, at: usize) -> Result<(), DeviceError> {
        assert!(Arc::ptr_eq(&moments.lane, &self.lane), "a moment of another stream");
        let event = moments.of.get(at);
        let records = self.lane.records.load(Ordering::Relaxed);
        if records {
            self.recorded.borrow_mut().push(moments.of.clone());
        }
        self.lane.context.bind()?;
        // Else it would order recorded work, and tell nothing.
        let flags = if records { sys::CUevent_record_flags_enum::CU_EVENT_RECORD_EXTERNAL as u32 } else { 0 };
        // SAFETY: both live: the event is the moments', which a graph keeps; the function is there, for there are moments.
        let recorded = unsafe { sys::cuEventRecordWithFlags(event, self.lane.raw, flags) }.result();
        self.lane.context.check("cuEventRecordWithFlags", recorded)
    }

    fn mark(&self) -> Result<Mark, DeviceError> {
        self.works()?;
        let mut mark = Mark { lane: self.lane.clone(), event: Some(self.lane.event()?), number: 0 };
        mark.number = self.lane.marks.fetch_add(1, Ordering::Relaxed) + 1;
        self.lane.context.bind()?;
        let Some(event) = &mark.event else { return Ok(mark) };
        // SAFETY: both live: the event is the mark's, the stream the lane's.
        let recorded = unsafe { result::event::record(event.0, self.lane.raw) };
        self.lane.context.check("cuEventRecord", recorded)?;
        Ok(mark)
    }

    /// New memory for `len` values, of no particular content.
    ///
    /// # Errors
    /// Out of memory, or what the driver says.
    pub fn buffer<T: Plain>(&self, len: usize) -> Result<Buffer<T>, DeviceError> {
        self.works()?;
        self.lane.context.bind()?;
        let bytes = size_of::<T>().checked_mul(len.max(1)).ok_or(DeviceError::OutOfMemory)?;
        // SAFETY: no requirement but a stream that lives. The memory is this stream's alone, as the buffer is.
        let address = unsafe { result::malloc_async(self.lane.raw, bytes) };
        let address = self.lane.context.check("cuMemAllocAsync", address)?;
        let memory = Arc::new(BufferMemory { lane: self.lane.clone(), address });
        Ok(Buffer { memory, len, holds: PhantomData })
    }

    /// Host memory for `len` values, zeros, that a GPU copies from and to by itself.
    ///
    /// # Errors
    /// Out of memory, or what the driver says.
    pub fn pinned<T: Plain>(&self, len: usize) -> Result<Pinned<T>, DeviceError> {
        Pinned::new(&self.lane.context, len)
    }

    /// Copies the first `n` values to a part of a buffer.
    ///
    /// # Errors
    /// What the driver says.
    ///
    /// # Panics
    /// If either is shorter, or the buffer is another stream's.
    pub fn upload<T: Plain>(&self, from: Pinned<T>, n: usize, to: PartMut<'_, T>) -> Result<Flight<T>, DeviceError> {
        self.works()?;
        let (address, len) = self.of(&to.0);
        assert!(n <= from.len() && n <= len, "{n} values from {} to {len}", from.len());
        self.lane.context.bind()?;
        if n > 0 {
            // SAFETY: both ranges hold `n` values. The host's is not touched before the flight was waited for, and is kept that long;
            // the buffer's is this stream's, and freed in its order.
            let copied = unsafe { result::memcpy_htod_async(address, &from[..n], self.lane.raw) };
            self.lane.context.check("copying to the GPU", copied)?;
        }
        self.fly(from, (n > 0).then_some("upload"))
    }

    /// Copies a part of a buffer to the front of host memory.
    ///
    /// # Errors
    /// What the driver says.
    ///
    /// # Panics
    /// If the host's is shorter, or the buffer is another stream's.
    pub fn download<T: Plain>(&self, from: Part<'_, T>, mut to: Pinned<T>) -> Result<Flight<T>, DeviceError> {
        self.works()?;
        let (address, n) = self.of(&from);
        assert!(n <= to.len(), "{n} values to {}", to.len());
        self.lane.context.bind()?;
        if n > 0 {
            // SAFETY: as in `upload`, the other way.
            let copied = unsafe { result::memcpy_dtoh_async(&mut to[..n], address, self.lane.raw) };
            self.lane.context.check("copying from the GPU", copied)?;
        }
        self.fly(to, (n > 0).then_some("download"))
    }

    fn fly<T: Plain>(&self, host: Pinned<T>, copy: Option<&'static str>) -> Result<Flight<T>, DeviceError> {
        match copy.map_or(Ok(()), |copy| self.lap(copy)).and_then(|()| self.mark()) {
            Ok(mark) => Ok(Flight { host: Some(host), mark }),
            Err(error) => {
                // Nobody can tell when the copy is done: it is waited for, or the context is lost.
                self.lane.context.bind_anyway();
                // SAFETY: the stream lives.
                let _ = unsafe { result::stream::synchronize(self.lane.raw) };
                drop(host);
                Err(error)
            }
        }
    }

    /// Where a part lies, for a kernel: the part is this stream's to use, or a table's, which is kept until it is done.
    pub(super) fn of<T: Plain>(&self, part: &Part<'_, T>) -> (DevicePtr, usize) {
        match part.owner {
            Owner::Buffer(memory) => {
                assert!(Arc::ptr_eq(&memory.lane, &self.lane), "a buffer of another stream");
                if self.lane.records.load(Ordering::Relaxed) {
                    self.recorded.borrow_mut().push(memory.clone());
                }
            }
            Owner::Table(memory) => {
                assert!(Arc::ptr_eq(&memory.context, &self.lane.context), "a table of another context");
                match self.lane.records.load(Ordering::Relaxed) {
                    true => self.recorded.borrow_mut().push(memory.clone()),
                    false => self.lane.keep(memory.clone()),
                }
            }
            Owner::Fresh => {}
        }
        (part.address, part.len)
    }

    /// Gives the stream a kernel.
    ///
    /// # Errors
    /// What the driver says.
    ///
    /// # Safety
    /// The addresses in the launch were got from [`Self::of`] since the last mark, and the parts are as long as the kernel's header says.
    pub(super) unsafe fn launch(&self, launch: &Launch) -> Result<(), DeviceError> {
        self.lane.context.bind()?;
        let function = self.lane.context.function(launch.kernel)?;
        let mut parameters: smallvec::SmallVec<[*mut c_void; MOST_ARGUMENTS]> =
            launch.arguments().iter().map(|argument| std::ptr::from_ref(argument).cast_mut().cast()).collect();
        let [x, y, z] = launch.grid;
        let (block, shared) = ((launch.block, 1, 1), launch.shared_bytes);
        // SAFETY: the function is one of this context's; the driver copies the parameters during the call, each as wide as the kernel
        // has it, which is at most the 8 bytes of ours; the rest is the caller's word.
        let launched =
            unsafe { result::launch_kernel(function, (x, y, z), block, shared, self.lane.raw, &mut parameters) };
        self.lane.context.check(launch.kernel, launched)?;
        self.lap(launch.kernel)
    }
}

/// Moments in a stream's work, whose distance is told once both have come.
#[derive(Debug)]
pub struct Moments {
    lane: Arc<Lane>,
    of: Arc<Events>,
}

impl Moments {
    /// The time from one to the other, as they came last; `None` unless both did, in that order, and neither is to come again in work that the
    /// stream was given.
    ///
    /// # Panics
    /// If there is no such moment.
    pub fn between(&self, from: usize, to: usize) -> Option<Duration> {
        self.lane.context.bind().ok()?;
        let milliseconds = self.of.milliseconds(from, to).ok()?;
        (milliseconds > 0.0).then(|| Duration::from_secs_f32(milliseconds.min(1e9) / 1000.0))
    }
}

/// A recording under way.
struct Recording<'a> {
    stream: &'a Stream,
    graph: sys::CUgraph,
}

impl Recording<'_> {
    /// Has the stream work again.
    fn end(&mut self) -> Result<(), DeviceError> {
        let lane = &self.stream.lane;
        if !lane.records.swap(false, Ordering::Relaxed) {
            return Ok(());
        }
        lane.context.bind_anyway();
        // SAFETY: the stream captures; afterwards it does not, whatever the answer.
        let ended = unsafe { result::stream::end_capture(lane.raw) };
        for address in std::mem::take(&mut lane.held.lock().unfreed) {
            BufferMemory::free(lane, address);
        }
        self.graph = lane.context.check("cuStreamEndCapture", ended)?;
        Ok(())
    }
}

impl Drop for Recording<'_> {
    fn drop(&mut self) {
        // After a panic; else it has ended.
        let _ = self.end();
        self.stream.recorded.borrow_mut().clear();
        if !self.graph.is_null() {
            // SAFETY: the graph is this recording's, and destroyed once.
            let _ = unsafe { result::graph::destroy(self.graph) };
        }
    }
}

/// Kernels that were recorded, with their arguments and all memory that they read and write: one call of the driver instead of one each.
#[derive(Debug)]
pub struct Graph {
    lane: Arc<Lane>,
    executable: sys::CUgraphExec,
    kept: Arc<Vec<Arc<dyn Any + Send + Sync>>>,
}

// SAFETY: the driver takes graphs from any thread, one at a time; a graph is not shared, and neither is the stream that launches it.
unsafe impl Send for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        self.lane.context.bind_anyway();
        // SAFETY: made by `record`, destroyed once; what was launched goes on.
        let _ = unsafe { result::graph::exec_destroy(self.executable) };
    }
}

/// Device memory of one stream.
#[derive(Debug)]
pub struct Buffer<T: Plain> {
    memory: Arc<BufferMemory>,
    len: usize,
    holds: PhantomData<T>,
}

/// Held by the buffer, and by graphs that use it.
#[derive(Debug)]
struct BufferMemory {
    lane: Arc<Lane>,
    address: DevicePtr,
}

impl BufferMemory {
    fn free(lane: &Lane, address: DevicePtr) {
        lane.context.bind_anyway();
        // SAFETY: the memory was allocated on this stream and is freed once, behind all that the stream was given before.
        let freed = unsafe { result::free_async(address, lane.raw) };
        if let Err(error) = freed
            && !lane.context.is_lost()
        {
            tracing::warn!(error = ?error.0, "a GPU's memory can't be freed");
        }
    }
}

impl Drop for BufferMemory {
    fn drop(&mut self) {
        match self.lane.records.load(Ordering::Relaxed) {
            true => self.lane.held.lock().unfreed.push(self.address),
            false => Self::free(&self.lane, self.address),
        }
    }
}

impl<T: Plain> Buffer<T> {
    /// Values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is room for none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Some of it, to read.
    ///
    /// # Panics
    /// Beyond the end.
    pub fn part(&self, range: Range<usize>) -> Part<'_, T> {
        let memory = &self.memory;
        let whole = Part { owner: Owner::Buffer(memory), address: memory.address, len: self.len, holds: PhantomData };
        whole.part(range)
    }

    /// Some of it, to write.
    ///
    /// # Panics
    /// Beyond the end.
    pub fn part_mut(&mut self, range: Range<usize>) -> PartMut<'_, T> {
        PartMut(self.part(range))
    }
}

/// Whose memory a part is of.
#[derive(Clone, Copy, Debug)]
enum Owner<'a> {
    Buffer(&'a Arc<BufferMemory>),
    Table(&'a Arc<TableMemory>),
    /// A table's that nobody else knows of yet.
    Fresh,
}

/// Some values of a [`Buffer`] or a [`Table`], to read.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a, T: Plain> {
    owner: Owner<'a>,
    address: DevicePtr,
    len: usize,
    holds: PhantomData<&'a [T]>,
}

impl<'a, T: Plain> Part<'a, T> {
    /// Values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it is of none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Some of it.
    ///
    /// # Panics
    /// Beyond the end.
    pub fn part(self, range: Range<usize>) -> Part<'a, T> {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {}", self.len);
        Part { address: self.address + (range.start * size_of::<T>()) as u64, len: range.len(), ..self }
    }

    /// The same bits as another type of the same size.
    ///
    /// # Panics
    /// The sizes differ.
    pub fn as_type<U: Plain>(self) -> Part<'a, U> {
        assert_eq!(size_of::<T>(), size_of::<U>());
        Part { owner: self.owner, address: self.address, len: self.len, holds: PhantomData }
    }
}

/// Some values of a [`Buffer`], to write.
#[derive(Debug)]
pub struct PartMut<'a, T: Plain>(pub(super) Part<'a, T>);

impl<'a, T: Plain> PartMut<'a, T> {
    /// The same, for a while.
    pub fn reborrow(&mut self) -> PartMut<'_, T> {
        PartMut(self.0)
    }

    /// What comes before the `at`-th value, and the rest.
    ///
    /// # Panics
    /// Beyond the end.
    pub fn split_at(self, at: usize) -> (PartMut<'a, T>, PartMut<'a, T>) {
        (PartMut(self.0.part(0..at)), PartMut(self.0.part(at..self.0.len)))
    }

    /// As [`Part::as_type`].
    ///
    /// # Panics
    /// As there.
    pub fn as_type<U: Plain>(self) -> PartMut<'a, U> {
        PartMut(self.0.as_type())
    }
}

/// Host memory that a GPU copies from and to by itself.
#[derive(Debug)]
pub struct Pinned<T: Plain> {
    context: Arc<Context>,
    data: NonNull<T>,
    len: usize,
}

// SAFETY: it owns its values, as a box does.
unsafe impl<T: Plain> Send for Pinned<T> {}
// SAFETY: as above.
unsafe impl<T: Plain> Sync for Pinned<T> {}

impl<T: Plain> Pinned<T> {
    fn new(context: &Arc<Context>, len: usize) -> Result<Self, DeviceError> {
        context.bind()?;
        let bytes = size_of::<T>().checked_mul(len.max(1)).ok_or(DeviceError::OutOfMemory)?;
        // SAFETY: no requirement but a current context.
        let memory = unsafe { result::malloc_host(bytes, 0) };
        let memory = context.check("cuMemHostAlloc", memory)?;
        let Some(data) = NonNull::new(memory.cast::<T>()) else { return Err(DeviceError::OutOfMemory) };
        // SAFETY: `bytes` bytes that are ours, page-aligned; zeros are a value of every `Plain`.
        unsafe { data.as_ptr().cast::<u8>().write_bytes(0, bytes) };
        Ok(Pinned { context: context.clone(), data, len })
    }
}

impl<T: Plain> Deref for Pinned<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `len` values, initialised by `new` and then by whatever copied, of which any bits are a value; no copy is at it, for
        // then it would be inside a flight.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr(), self.len) }
    }
}

impl<T: Plain> DerefMut for Pinned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr(), self.len) }
    }
}

impl<T: Plain> Drop for Pinned<T> {
    fn drop(&mut self) {
        self.context.bind_anyway();
        // SAFETY: allocated by `new`, freed once; no copy is at it.
        let _ = unsafe { result::free_host(self.data.as_ptr().cast()) };
    }
}

/// Host memory that a copy is at.
#[must_use = "the copy is done when it was waited for"]
#[derive(Debug)]
pub struct Flight<T: Plain> {
    host: Option<Pinned<T>>,
    mark: Mark,
}

impl<T: Plain> Flight<T> {
    /// Blocks until the copy, and all that the stream was given before, is done.
    ///
    /// # Errors
    /// What the GPU failed at; the memory is then the stream's to free.
    pub fn wait(mut self) -> Result<Pinned<T>, DeviceError> {
        self.mark.wait()?;
        self.host.take().ok_or_else(|| DeviceError::Failed("a copy was waited for twice".into()))
    }
}

impl<T: Plain> Drop for Flight<T> {
    fn drop(&mut self) {
        if let Some(host) = self.host.take() {
            let kept: Arc<dyn Any + Send + Sync> = Arc::new(host);
            self.mark.lane.held.lock().kept.push((self.mark.number - 1, kept));
        }
    }
}

/// Device memory that all streams of a context read and none writes. A clone is the same memory.
#[derive(Clone, Debug)]
pub struct Table<T: Plain> {
    memory: Arc<TableMemory>,
    len: usize,
    holds: PhantomData<T>,
}

#[derive(Debug)]
struct TableMemory {
    context: Arc<Context>,
    address: DevicePtr,
}

impl Drop for TableMemory {
    fn drop(&mut self) {
        self.context.bind_anyway();
        // SAFETY: allocated once and freed once; streams that read it hold it until they have.
        let _ = unsafe { result::free_sync(self.address) };
    }
}

impl<T: Plain> Table<T> {
    /// A table of `len` values, `fill`ed piece by piece: the first value's place and room for some.
    ///
    /// # Errors
    /// Out of memory, or what the driver says.
    pub fn new(stream: &Stream, len: usize, mut fill: impl FnMut(usize, &mut [T])) -> Result<Self, DeviceError> {
        const PIECE_BYTES: usize = 4 << 20;
        let context = stream.context().clone();
        context.bind()?;
        let bytes = size_of::<T>().checked_mul(len.max(1)).ok_or(DeviceError::OutOfMemory)?;
        // SAFETY: no requirement but a current context.
        let address = context.check("cuMemAlloc", unsafe { result::malloc_sync(bytes) })?;
        let table = Table { memory: Arc::new(TableMemory { context, address }), len, holds: PhantomData };
        let piece = (PIECE_BYTES / size_of::<T>()).min(len.max(1));
        let mut ring = Ring::new(stream, 2, piece)?;
        for start in (0..len).step_by(piece) {
            let n = piece.min(len - start);
            let mut host = ring.take()?;
            fill(start, &mut host[..n]);
            let to = Part { owner: Owner::Fresh, ..table.part(0..len) };
            ring.give(stream.upload(host, n, PartMut(to.part(start..start + n)))?);
        }
        // Whoever reads it from now on, on whatever stream, finds it written.
        stream.synchronize()?;
        Ok(table)
    }

    /// A table of these values.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn copied(stream: &Stream, values: &[T]) -> Result<Self, DeviceError> {
        Self::new(stream, values.len(), |start, out| out.copy_from_slice(&values[start..start + out.len()]))
    }

    /// Values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Some of it.
    ///
    /// # Panics
    /// Beyond the end.
    pub fn part(&self, range: Range<usize>) -> Part<'_, T> {
        let whole =
            Part { owner: Owner::Table(&self.memory), address: self.memory.address, len: self.len, holds: PhantomData };
        whole.part(range)
    }
}

/// Pinned memory for one copy after the other: a slot is used again when its copy is done, and waited for only then.
#[derive(Debug)]
pub struct Ring<T: Plain> {
    free: Vec<Pinned<T>>,
    flying: std::collections::VecDeque<Flight<T>>,
}

impl<T: Plain> Ring<T> {
    /// `n` slots of `len` values.
    ///
    /// # Errors
    /// Out of memory, or what the driver says.
    pub fn new(stream: &Stream, n: usize, len: usize) -> Result<Self, DeviceError> {
        let free = (0..n).map(|_| stream.pinned(len)).collect::<Result<_, _>>()?;
        Ok(Ring { free, flying: std::collections::VecDeque::new() })
    }

    /// A slot that no copy is at, waiting for the oldest one if there is none.
    ///
    /// # Errors
    /// What the GPU failed at; all slots are taken and none was given back.
    pub fn take(&mut self) -> Result<Pinned<T>, DeviceError> {
        match self.free.pop() {
            Some(slot) => Ok(slot),
            None => match self.flying.pop_front() {
                Some(flight) => flight.wait(),
                None => Err(DeviceError::Failed("all slots are taken".into())),
            },
        }
    }

    /// Gives a slot back with the copy that is at it.
    pub fn give(&mut self, flight: Flight<T>) {
        self.flying.push_back(flight);
    }

    /// Gives a slot back that no copy is at.
    pub fn give_idle(&mut self, slot: Pinned<T>) {
        self.free.push(slot);
    }
}

#[cfg(test)]
mod tests {
    use super::super::emulated::{Emulated, IMAGE};
    use super::*;

    fn context() -> Arc<Context> {
        Context::open(0, IMAGE).unwrap()
    }

    #[test]
    fn what_goes_there_comes_back() {
        let Some(emulated) = Emulated::open("seed=3,delay_us=400") else { return };
        let context = context();
        let stream = Stream::new(&context).unwrap();
        let mut buffer = stream.buffer::<u32>(3000).unwrap();
        let mut ring = Ring::new(&stream, 2, 1000).unwrap();
        // More copies than slots: a slot that is written too early would change what an earlier copy takes.
        for round in 0..30u32 {
            let mut slot = ring.take().unwrap();
            slot.iter_mut().enumerate().for_each(|(at, value)| *value = round * 1000 + at as u32);
            let at = round as usize % 3 * 1000;
            ring.give(stream.upload(slot, 1000, buffer.part_mut(at..at + 1000)).unwrap());
        }
        let got = stream.download(buffer.part(0..3000), stream.pinned(3000).unwrap()).unwrap().wait().unwrap();
        let want: Vec<u32> = (27_000..30_000).collect();
        assert_eq!(&got[..], want);
        assert_eq!((emulated.count("uploads"), emulated.count("downloads")), (30, 1));
    }

    #[test]
    fn what_is_dropped_too_early_lives_until_it_is_not_needed() {
        for seed in 0..20 {
            let Some(emulated) = Emulated::open(&format!("seed={seed},delay_us=300")) else { return };
            let context = context();
            let stream = Stream::new(&context).unwrap();
            let mut want = stream.pinned::<f32>(64).unwrap();
            want.iter_mut().enumerate().for_each(|(at, value)| *value = at as f32);
            let expected = want.to_vec();
            let mut buffer = stream.buffer(64).unwrap();
            // Host memory of a flight that nobody waits for, a buffer and a table that a copy still reads.
            drop(stream.upload(want, 64, buffer.part_mut(0..64)).unwrap());
            let first = stream.download(buffer.part(0..64), stream.pinned(64).unwrap()).unwrap();
            drop(buffer);
            let table = Table::new(&stream, 64, |start, out: &mut [f32]| {
                out.iter_mut().enumerate().for_each(|(at, value)| *value = (start + at) as f32);
            })
            .unwrap();
            let other = Stream::new(&context).unwrap();
            let second = other.download(table.part(0..64), other.pinned(64).unwrap()).unwrap();
            drop(table);
            assert_eq!(&first.wait().unwrap()[..], expected);
            assert_eq!(&second.wait().unwrap()[..], expected);
            drop((stream, other, context));
            drop(emulated);
        }
    }

    #[test]
    #[should_panic(expected = "a buffer of another stream")]
    fn a_stream_s_buffer_is_its_own() {
        let Some(_emulated) = Emulated::open("delay_us=0") else { panic!("a buffer of another stream (skipped)") };
        let context = context();
        let (one, other) = (Stream::new(&context).unwrap(), Stream::new(&context).unwrap());
        let buffer = one.buffer::<f32>(8).unwrap();
        let _ = other.download(buffer.part(0..8), other.pinned(8).unwrap());
    }

    /// Takes the scores of the `n` pairs in `pairs` away.
    fn mask(stream: &Stream, pairs: &Buffer<u32>, scores: &mut Buffer<f32>) -> Result<(), DeviceError> {
        stream.mask_scores(pairs.part(0..2), 1, scores.part_mut(0..64), [1, 64])
    }

    #[test]
    fn what_was_recorded_runs_as_often_as_it_is_launched_on_what_is_there_then() {
        for seed in 0..8 {
            let Some(emulated) = Emulated::open(&format!("seed={seed},delay_us=200")) else { return };
            let context = context();
            let stream = Stream::new(&context).unwrap();
            let (mut pairs, mut scores) = (stream.buffer(2).unwrap(), stream.buffer::<f32>(64).unwrap());
            let graph = stream.record(|| mask(&stream, &pairs, &mut scores)).unwrap();
            assert_eq!(emulated.count("launches"), 0, "nothing runs while it is recorded");
            for round in 0..3 {
                let (mut to, mut from) = (stream.pinned(2).unwrap(), stream.pinned::<f32>(64).unwrap());
                to.copy_from_slice(&[0, round]);
                from.fill(1.0);
                let up = stream.upload(from, 64, scores.part_mut(0..64)).unwrap();
                let also = stream.upload(to, 2, pairs.part_mut(0..2)).unwrap();
                stream.launch_graph(&graph).unwrap();
                let got = stream.download(scores.part(0..64), stream.pinned(64).unwrap()).unwrap().wait().unwrap();
                drop((up, also));
                let masked: Vec<usize> = (0..64).filter(|&at| got[at].is_nan()).collect();
                assert_eq!(masked, [round as usize]);
            }
            assert_eq!((emulated.count("graph_launches"), emulated.count("single_launches")), (3, 0));
            // Buffers that are dropped stay as long as the graph, and what was launched.
            drop((pairs, scores));
            stream.launch_graph(&graph).unwrap();
            drop(graph);
            drop(stream);
        }
    }

    #[test]
    fn moments_tell_how_long_work_took_each_time() {
        let Some(emulated) = Emulated::open("seed=3,delay_us=3000") else { return };
        let context = context();
        let stream = Stream::new(&context).unwrap();
        let (pairs, mut scores) = (stream.buffer(2).unwrap(), stream.buffer::<f32>(64).unwrap());
        let moments = stream.moments(3).unwrap().expect("the emulated driver tells times");
        assert_eq!(moments.between(0, 1), None, "none has come");
        let give = |scores: &mut Buffer<f32>| {
            stream.comes(&moments, 0)?;
            mask(&stream, &pairs, scores)?;
            stream.comes(&moments, 1)
        };
        let mut told = Vec::new();
        give(&mut scores).unwrap();
        stream.synchronize().unwrap();
        told.extend(moments.between(0, 1));
        let graph = stream.record(|| give(&mut scores)).unwrap();
        for _ in 0..3 {
            stream.launch_graph(&graph).unwrap();
            stream.synchronize().unwrap();
            told.extend(moments.between(0, 1));
        }
        assert_eq!((told.len(), moments.between(1, 0), moments.between(0, 2)), (4, None, None), "{told:?}");
        assert!(
            told.iter().all(|time| *time < Duration::from_secs(5)) && told.windows(2).any(|w| w[0] != w[1]),
            "{told:?}"
        );
        // A graph keeps them.
        drop(moments);
        stream.launch_graph(&graph).unwrap();
        stream.synchronize().unwrap();
        assert_eq!(emulated.count("misuses"), 0);
    }

    #[test]
    fn times_are_of_each_kernel_and_copy_and_not_of_what_is_recorded() {
        let Some(_emulated) = Emulated::open("seed=4,delay_us=100") else { return };
        let context = context();
        let stream = Stream::new(&context).unwrap();
        let (pairs, mut scores) = (stream.buffer(2).unwrap(), stream.buffer::<f32>(64).unwrap());
        assert_eq!(stream.times().unwrap(), []);
        stream.take_times().unwrap();
        let up = stream.upload(stream.pinned(64).unwrap(), 64, scores.part_mut(0..64)).unwrap();
        let graph = stream.record(|| mask(&stream, &pairs, &mut scores)).unwrap();
        stream.launch_graph(&graph).unwrap();
        mask(&stream, &pairs, &mut scores).unwrap();
        let none = stream.upload(up.wait().unwrap(), 0, scores.part_mut(0..0)).unwrap();
        drop(stream.download(scores.part(0..64), none.wait().unwrap()).unwrap());
        let times = stream.times().unwrap();
        let names: Vec<&str> = times.iter().map(|(what, _)| *what).collect();
        assert_eq!(names, ["upload", "graph", "mask_scores", "download"]);
        assert!(times.iter().all(|(_, seconds)| (0.0..60.0).contains(seconds)), "{times:?}");
        // No longer.
        mask(&stream, &pairs, &mut scores).unwrap();
        assert_eq!(stream.times().unwrap(), []);
    }

    #[test]
    fn only_kernels_are_recorded() {
        let Some(emulated) = Emulated::open("delay_us=0,nograph@1") else { return };
        let context = context();
        let stream = Stream::new(&context).unwrap();
        let (pairs, mut scores) = (stream.buffer(2).unwrap(), stream.buffer::<f32>(64).unwrap());
        let refused = |graph: Result<Graph, DeviceError>| graph.unwrap_err().to_string();
        let text = "device failed: only kernels can be recorded";
        assert_eq!(refused(stream.record(|| stream.synchronize())), text);
        assert_eq!(refused(stream.record(|| stream.buffer::<u32>(8).map(drop))), text);
        assert_eq!(refused(stream.record(|| stream.record(|| Ok(())).map(drop))), text);
        // What is dropped meanwhile is freed, once.
        let (other, before) = (stream.buffer::<u32>(1000).unwrap(), emulated.count("used_bytes"));
        let error = refused(stream.record(|| {
            drop(other);
            mask(&stream, &pairs, &mut scores)
        }));
        assert_eq!(error, "device failed: cuGraphInstantiate: CUDA_ERROR_NOT_SUPPORTED");
        stream.synchronize().unwrap();
        assert_eq!(emulated.count("used_bytes"), before - 4000);
        // A panic ends a recording, too.
        let panicked =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| stream.record(|| panic!("on purpose"))));
        assert!(panicked.is_err() && !context.is_lost());
        let graph = stream.record(|| mask(&stream, &pairs, &mut scores)).unwrap();
        stream.launch_graph(&graph).unwrap();
        stream.synchronize().unwrap();
    }

    #[test]
    fn a_lost_context_is_not_kept_by_what_was_launched() {
        let Some(_emulated) = Emulated::open("delay_us=0,fail@1") else { return };
        let context = context();
        let stream = Stream::new(&context).unwrap();
        let (pairs, mut scores) = (stream.buffer(2).unwrap(), stream.buffer::<f32>(64).unwrap());
        let graph = stream.record(|| mask(&stream, &pairs, &mut scores)).unwrap();
        stream.launch_graph(&graph).unwrap();
        assert!(stream.synchronize().is_err() && context.is_lost());
        let held = Arc::downgrade(&context);
        drop((graph, pairs, scores, stream, context));
        assert!(held.upgrade().is_none());
    }

    #[test]
    fn memory_that_is_not_there_is_an_error_and_nothing_is_lost() {
        let Some(_emulated) = Emulated::open("delay_us=0,memory=100000,oom@2") else { return };
        let context = context();
        let stream = Stream::new(&context).unwrap();
        let first = stream.buffer::<u8>(60_000).unwrap();
        assert!(matches!(stream.buffer::<u8>(8), Err(DeviceError::OutOfMemory)));
        assert!(matches!(stream.buffer::<u8>(60_000), Err(DeviceError::OutOfMemory)));
        assert!(matches!(stream.buffer::<f64>(usize::MAX), Err(DeviceError::OutOfMemory)));
        drop(first);
        stream.synchronize().unwrap();
        assert!(!context.is_lost() && stream.buffer::<u8>(60_000).is_ok());
        assert_eq!(context.memory().unwrap().1, 100_000);
    }

    #[test]
    fn a_context_is_lost_once_and_for_all_until_it_is_given_up() {
        let Some(_emulated) = Emulated::open("delay_us=0,ecc@1") else { return };
        let context = context();
        let stream = Stream::new(&context).unwrap();
        let mut buffer = stream.buffer::<f32>(1024).unwrap();
        let pairs = stream.buffer::<u32>(2).unwrap();
        stream.mask_scores(pairs.part(0..2), 1, buffer.part_mut(0..1024), [1, 1024]).unwrap();
        let error = stream.synchronize().unwrap_err().to_string();
        // Wherever it shows first.
        assert!(error.starts_with("device failed: ") && error.ends_with(": CUDA_ERROR_ECC_UNCORRECTABLE"), "{error}");
        assert!(context.is_lost());
        let error = stream.buffer::<f32>(8).unwrap_err().to_string();
        assert_eq!(error, "device failed: the context is lost");
        drop((pairs, buffer, stream, context));
        // The next one is sound.
        let context = self::context();
        Stream::new(&context).unwrap().synchronize().unwrap();
    }
}
