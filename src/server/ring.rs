//! The binary port's engine: a private io_uring with multishot accept and receive, provided buffers and one send in
//! flight per connection. It knows bytes and frames, not what they mean; it can be driven from any loop.
//!
//! Every kernel operation carries its connection's slot and generation, so that a late completion can't touch the next
//! connection in the same slot. A slot is reused only after all of its operations have completed.
#![allow(unsafe_code)] // Submitting operations whose buffers this file keeps alive; the buffer ring shared with the kernel.

use std::collections::VecDeque;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use io_uring::types::{BufRingEntry, Fd};
use io_uring::{IoUring, cqueue, opcode, squeue};
use memmap2::MmapMut;

use crate::wire::frame::{self, PREFIX, Split};

/// A connection of one engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ConnId {
    slot: u32,
    generation: u32,
}

/// What to do after a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Go on; the frame is answered, or wants no answer.
    Continue,
    /// Go on; the answer comes later through [`Engine::answer`].
    Pending,
    /// Send what is to be sent, then close.
    Close,
}

/// What frames mean.
pub trait Handler {
    /// A whole frame; answers that are ready are appended to `out` as whole frames.
    fn frame(&mut self, conn: ConnId, frame: &[u8], out: &mut Vec<u8>) -> Verdict;
    /// A frame was announced that is longer than allowed; a last answer may be appended. The connection is closed.
    fn oversized(&mut self, conn: ConnId, len: usize, out: &mut Vec<u8>);
}

/// Limits of an engine.
#[derive(Clone, Copy, Debug)]
pub struct EngineConfig {
    /// Largest frame, bytes.
    pub max_frame_bytes: usize,
    /// Unsent bytes of a connection beyond which it is not read.
    pub max_output_bytes: usize,
    /// Open connections; further ones are closed at once.
    pub max_connections: usize,
    /// A connection that sends nothing for this long is closed.
    pub idle_timeout: Duration,
}

/// Counters of an engine.
#[derive(Clone, Copy, Debug, Default)]
pub struct EngineStats {
    /// Open connections.
    pub connections: usize,
    /// Connections closed for the cap.
    pub refused: u64,
}

const ACCEPT: u64 = 1;
const RECV: u64 = 2;
const SEND: u64 = 3;
const CANCEL: u64 = 4;
const WATCH: u64 = 5;

/// Receive buffers shared by all connections.
const BUFFERS: u16 = 1024;
const BUFFER_BYTES: usize = 8192;
/// Frames of one connection handled per turn: a busy neighbour waits its turn.
const FRAMES_PER_TURN: usize = 64;
/// Received bytes that wait for their turn, beyond which a connection is not read.
const MAX_BACKLOG: usize = 256 << 10;
/// After running out of descriptors, accepting pauses: the alternative is a loop at full speed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// How often timeouts are looked at.
const SWEEP: Duration = Duration::from_millis(250);
/// A frame that has begun must be whole within this time.
const FRAME_TIMEOUT: Duration = Duration::from_secs(30);
/// What is sent must be taken within this time.
const SEND_TIMEOUT: Duration = Duration::from_secs(60);
/// After the last byte was sent and the sending side shut down, what the peer still sends is read and dropped this
/// long: closing with unread input would reset the connection and take answers with it that the peer has not read.
pub const LINGER: Duration = Duration::from_millis(500);

#[derive(Default)]
struct Conn {
    generation: u32,
    fd: Option<OwnedFd>,
    /// Received, not yet handled.
    input: Vec<u8>,
    /// Handled bytes at the front of `input`.
    used: usize,
    /// To be sent next.
    output: Vec<u8>,
    /// Being sent; the kernel reads it until the send completes.
    sending: Vec<u8>,
    sent: usize,
    recv_armed: bool,
    send_armed: bool,
    /// When the send in flight began.
    send_since: Option<Instant>,
    cancelling: bool,
    /// The peer finished sending; what it asked is still answered.
    eof: bool,
    /// Send what is there, then close.
    closing: bool,
    /// All is sent and the sending side shut down; until then the peer may end in peace.
    linger_until: Option<Instant>,
    /// Nothing can be sent any more.
    broken: bool,
    queued: bool,
    last_input: Option<Instant>,
    /// When the frame at the front of `input` began.
    frame_since: Option<Instant>,
}

impl Conn {
    /// Bytes received and not yet handled.
    fn backlog(&self) -> usize {
        self.input.len() - self.used
    }

    /// Bytes that the peer has not been sent yet.
    fn unsent(&self) -> usize {
        self.output.len() + self.sending.len() - self.sent
    }
}

/// The engine.
pub struct Engine {
    ring: IoUring,
    buffers: BufferRing,
    listener: Option<TcpListener>,
    accept_armed: bool,
    accept_again: Option<Instant>,
    conns: Vec<Conn>,
    /// By slot: calls that are not answered yet.
    calls: Vec<u32>,
    free: Vec<u32>,
    /// Connections to look at in the next `flush`: output, more input, or an end.
    ready: VecDeque<u32>,
    completed: Vec<cqueue::Entry>,
    config: EngineConfig,
    stats: EngineStats,
    next_sweep: Instant,
    /// As of the last turn.
    now: Instant,
    watched: Box<u64>,
}

/// Checks that this machine allows what the engine needs.
///
/// # Errors
/// One line that says what is missing and what helps.
pub fn probe() -> Result<(), String> {
    match Engine::build_ring() {
        Ok(_) => Ok(()),
        Err(e) => Err(match e.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => "io_uring is forbidden here (a container's seccomp profile, or \
                kernel.io_uring_disabled); allow io_uring_setup, io_uring_enter and io_uring_register"
                .to_owned(),
            Some(libc::ENOSYS) => "this kernel has no io_uring; Linux 6.1 or later is needed".to_owned(),
            Some(libc::EINVAL) => "this kernel's io_uring is too old; Linux 6.1 or later is needed".to_owned(),
            Some(libc::ENOMEM) => {
                "not enough locked memory for io_uring; raise `ulimit -l` to 512 KiB or more".to_owned()
            }
            _ => format!("io_uring can't be set up: {e}"),
        }),
    }
}

fn token(kind: u64, slot: u32, generation: u32) -> u64 {
    kind << 60 | u64::from(generation & 0x0fff_ffff) << 32 | u64::from(slot)
}

impl Engine {
    fn build_ring() -> io::Result<IoUring> {
        let mut builder = IoUring::builder();
        builder.setup_single_issuer().setup_defer_taskrun().setup_coop_taskrun().setup_cqsize(8192);
        builder.build(1024)
    }

    /// An engine that accepts on `listener`. It must be used on the thread that made it.
    ///
    /// # Errors
    /// The kernel refused; see [`probe`].
    pub fn new(listener: TcpListener, config: EngineConfig) -> io::Result<Self> {
        let ring = Self::build_ring()?;
        // Only saves a lookup per system call; without it everything works.
        let _ = ring.submitter().register_ring_fd();
        let buffers = BufferRing::new(&ring)?;
        Ok(Engine {
            ring,
            buffers,
            listener: Some(listener),
            accept_armed: false,
            accept_again: None,
            conns: Vec::new(),
            calls: Vec::new(),
            free: Vec::new(),
            ready: VecDeque::new(),
            completed: Vec::with_capacity(8192),
            config,
            stats: EngineStats::default(),
            next_sweep: Instant::now() + SWEEP,
            now: Instant::now(),
            watched: Box::new(0),
        })
    }

    /// Makes completions signal `fd`, an eventfd, while [`Self::notify`] is on.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn register_eventfd(&mut self, fd: RawFd) -> io::Result<()> {
        self.ring.submitter().register_eventfd(fd)?;
        self.notify(false);
        Ok(())
    }

    /// Turns the eventfd on (before sleeping) or off (while busy).
    pub fn notify(&mut self, on: bool) {
        let completion = self.ring.completion();
        if on { completion.enable_eventfd() } else { completion.disable_eventfd() }
    }

    /// Makes [`Self::turn`] return when `event`, an eventfd that outlives the engine, becomes readable: for loops that sleep in the ring itself.
    pub fn watch(&mut self, event: &impl AsRawFd) {
        self.watch_fd(event.as_raw_fd());
    }

    fn watch_fd(&mut self, fd: RawFd) {
        let into: *mut u64 = &mut *self.watched;
        let read = opcode::Read::new(Fd(fd), into.cast(), 8).build().user_data(token(WATCH, fd as u32, 0));
        // SAFETY: `watched` is boxed and lives as long as the ring.
        unsafe { push(&mut self.ring, &read) };
    }

    /// Counters.
    pub fn stats(&self) -> EngineStats {
        self.stats
    }

    /// Whether there is work that waits for no completion.
    pub fn pending(&mut self) -> bool {
        !self.ready.is_empty() || !self.ring.submission().is_empty()
    }

    /// Stops accepting; open connections stay.
    pub fn stop_accepting(&mut self) {
        self.accept_again = None;
        if self.accept_armed {
            let cancel = opcode::AsyncCancel::new(token(ACCEPT, 0, 0)).build().user_data(token(CANCEL, u32::MAX, 0));
            // SAFETY: a cancel refers to no memory.
            unsafe { push(&mut self.ring, &cancel) };
        }
        self.listener = None;
    }

    /// Closes every connection once its calls are answered and its output is sent.
    pub fn close_all(&mut self) {
        for slot in 0..self.conns.len() as u32 {
            if self.conns[slot as usize].fd.is_some() {
                self.conns[slot as usize].closing = true;
                self.queue(slot);
            }
        }
    }

    /// Appends the answer of a frame that was [`Verdict::Pending`]; false if its connection is gone.
    pub fn answer(&mut self, conn: ConnId, write: impl FnOnce(&mut Vec<u8>)) -> bool {
        match self.conns.get_mut(conn.slot as usize) {
            Some(c) if c.generation == conn.generation && c.fd.is_some() => {
                let calls = &mut self.calls[conn.slot as usize];
                *calls = calls.saturating_sub(1);
                if !c.broken {
                    write(&mut c.output);
                }
                let alive = !c.broken;
                self.queue(conn.slot);
                alive
            }
            _ => false,
        }
    }

    fn queue(&mut self, slot: u32) {
        let conn = &mut self.conns[slot as usize];
        if !conn.queued {
            conn.queued = true;
            self.ready.push_back(slot);
        }
    }

    /// Submits what is queued, takes all completions, handles frames. Waits for at least `wait` completions. Returns how
    /// many there were.
    ///
    /// # Errors
    /// The ring itself broke.
    pub fn turn(&mut self, wait: usize, now: Instant, handler: &mut dyn Handler) -> io::Result<usize> {
        self.now = now;
        self.arm_accept(now);
        let to_submit = self.ring.submission().len() as u32;
        const GETEVENTS: u32 = 1;
        // SAFETY: no signal mask and no extended argument are passed.
        let entered = unsafe { self.ring.submitter().enter::<libc::sigset_t>(to_submit, wait as u32, GETEVENTS, None) };
        match entered {
            Ok(_) => {}
            Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EBUSY | libc::EAGAIN)) => {}
            Err(e) => return Err(e),
        }
        let mut completed = std::mem::take(&mut self.completed);
        completed.extend(self.ring.completion());
        for entry in &completed {
            self.complete(entry, now, handler);
        }
        let n = completed.len();
        completed.clear();
        self.completed = completed;
        self.buffers.publish();
        // Connections with more frames than one turn handles.
        for _ in 0..self.ready.len() {
            let Some(slot) = self.ready.pop_front() else { break };
            self.conns[slot as usize].queued = false;
            self.frames(slot, handler);
            self.queue(slot);
        }
        if now >= self.next_sweep {
            self.next_sweep = now + SWEEP;
            self.sweep(now);
        }
        self.flush();
        Ok(n)
    }

    fn arm_accept(&mut self, now: Instant) {
        let due = self.accept_again.is_none_or(|at| now >= at);
        if let Some(listener) = &self.listener
            && !self.accept_armed
            && due
        {
            let fd = Fd(listener.as_raw_fd());
            let accept = opcode::AcceptMulti::new(fd).flags(libc::SOCK_CLOEXEC).build().user_data(token(ACCEPT, 0, 0));
            // SAFETY: multishot accept refers to no memory of ours.
            unsafe { push(&mut self.ring, &accept) };
            self.accept_armed = true;
            self.accept_again = None;
        }
    }

    fn complete(&mut self, entry: &cqueue::Entry, now: Instant, handler: &mut dyn Handler) {
        let data = entry.user_data();
        let (kind, generation, slot) = (data >> 60, (data >> 32) as u32 & 0x0fff_ffff, data as u32);
        let more = cqueue::more(entry.flags());
        match kind {
            ACCEPT => {
                self.accept_armed = more;
                match entry.result() {
                    fd if fd >= 0 => self.accepted(fd, now),
                    // Out of descriptors or memory; with the listener gone, a cancel.
                    _ if !more => self.accept_again = Some(now + ACCEPT_PAUSE),
                    _ => {}
                }
            }
            RECV => {
                let buffer = cqueue::buffer_select(entry.flags());
                let known = self.conns.get(slot as usize).is_some_and(|c| c.generation & 0x0fff_ffff == generation);
                if known {
                    self.received(slot, entry.result(), buffer, more, now, handler);
                }
                if let Some(id) = buffer {
                    self.buffers.give_back(id);
                }
            }
            SEND => {
                let Some(conn) = self.conns.get_mut(slot as usize) else { return };
                conn.send_armed = false;
                conn.send_since = None;
                match usize::try_from(entry.result()) {
                    Ok(n) if n > 0 => {
                        conn.sent += n;
                        if conn.sent >= conn.sending.len() {
                            conn.sending.clear();
                            conn.sent = 0;
                        }
                    }
                    _ => conn.broken = true,
                }
                self.queue(slot);
            }
            WATCH => self.watch_fd(slot as RawFd),
            _ => {
                if let Some(conn) = self.conns.get_mut(slot as usize) {
                    conn.cancelling = false;
                }
            }
        }
    }

    fn accepted(&mut self, fd: RawFd, now: Instant) {
        // SAFETY: the kernel made this descriptor for us just now; nobody else has it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        if self.stats.connections >= self.config.max_connections {
            self.stats.refused += 1;
            return;
        }
        let socket = socket2::SockRef::from(&fd);
        // Latency is all that it changes.
        let _ = socket.set_tcp_nodelay(true);
        let slot = self.free.pop().unwrap_or_else(|| {
            self.conns.push(Conn::default());
            self.calls.push(0);
            self.conns.len() as u32 - 1
        });
        self.stats.connections += 1;
        let conn = &mut self.conns[slot as usize];
        conn.fd = Some(fd);
        conn.last_input = Some(now);
        self.arm_recv(slot);
    }

    fn arm_recv(&mut self, slot: u32) {
        let conn = &mut self.conns[slot as usize];
        let Some(fd) = &conn.fd else { return };
        conn.recv_armed = true;
        let recv = opcode::RecvMulti::new(Fd(fd.as_raw_fd()), BufferRing::GROUP).build().user_data(token(
            RECV,
            slot,
            conn.generation,
        ));
        // SAFETY: it receives into the buffer ring, which lives as long as the ring.
        unsafe { push(&mut self.ring, &recv) };
    }

    fn received(
        &mut self,
        slot: u32,
        result: i32,
        buffer: Option<u16>,
        more: bool,
        now: Instant,
        handler: &mut dyn Handler,
    ) {
        let conn = &mut self.conns[slot as usize];
        conn.recv_armed = more;
        match usize::try_from(result) {
            Ok(n) if n > 0 => {
                if let Some(id) = buffer
                    && !conn.closing
                {
                    conn.input.extend_from_slice(self.buffers.bytes(id, n));
                    conn.last_input = Some(now);
                    conn.frame_since.get_or_insert(now);
                    self.frames(slot, handler);
                }
            }
            Ok(_) => conn.eof = true,
            // No buffer was free, or reading was paused: armed again in `flush`.
            Err(_) if matches!(-result, libc::ENOBUFS | libc::ECANCELED) => {}
            Err(_) => conn.broken = true,
        }
        self.queue(slot);
    }

    /// Handles whole frames at the front of a connection's input.
    fn frames(&mut self, slot: u32, handler: &mut dyn Handler) {
        let conn = &mut self.conns[slot as usize];
        let id = ConnId { slot, generation: conn.generation };
        for _ in 0..FRAMES_PER_TURN {
            if conn.broken || conn.closing || conn.unsent() > self.config.max_output_bytes {
                break;
            }
            match frame::split(&conn.input[conn.used..], self.config.max_frame_bytes) {
                Split::Frame(message) => {
                    let verdict = handler.frame(id, message, &mut conn.output);
                    conn.used += PREFIX + message.len();
                    conn.frame_since = conn.last_input;
                    match verdict {
                        Verdict::Continue => {}
                        Verdict::Pending => self.calls[slot as usize] += 1,
                        Verdict::Close => {
                            conn.closing = true;
                            conn.used = conn.input.len();
                        }
                    }
                }
                Split::Partial { .. } => break,
                Split::TooLarge { len } => {
                    handler.oversized(id, len, &mut conn.output);
                    conn.closing = true;
                    conn.used = conn.input.len();
                }
            }
        }
        if conn.used == conn.input.len() {
            conn.input.clear();
            conn.used = 0;
            conn.frame_since = None;
        } else if conn.used > 1 << 16 {
            conn.input.drain(..conn.used);
            conn.used = 0;
        }
    }

    fn has_frame(conn: &Conn, max: usize) -> bool {
        !matches!(frame::split(&conn.input[conn.used..], max), Split::Partial { .. })
    }

    /// Starts sends, pauses and resumes receiving, closes what is done.
    pub fn flush(&mut self) {
        for _ in 0..self.ready.len() {
            let Some(slot) = self.ready.pop_front() else { break };
            self.conns[slot as usize].queued = false;
            self.flush_one(slot);
        }
    }

    fn flush_one(&mut self, slot: u32) {
        let limit = self.config.max_output_bytes;
        let conn = &mut self.conns[slot as usize];
        let Some(fd) = conn.fd.as_ref().map(AsRawFd::as_raw_fd) else { return };
        if !conn.send_armed && !conn.broken {
            if conn.sending.is_empty() && !conn.output.is_empty() {
                std::mem::swap(&mut conn.sending, &mut conn.output);
            }
            if conn.sent < conn.sending.len() {
                let rest = &conn.sending[conn.sent..];
                let send = opcode::Send::new(Fd(fd), rest.as_ptr(), rest.len() as u32)
                    .flags(libc::MSG_NOSIGNAL | libc::MSG_WAITALL)
                    .build()
                    .user_data(token(SEND, slot, conn.generation));
                conn.send_armed = true;
                conn.send_since = Some(self.now);
                // SAFETY: `sending` is neither changed nor freed while `send_armed`, and the descriptor stays open.
                unsafe { push(&mut self.ring, &send) };
            }
        }
        let now = self.now;
        let conn = &mut self.conns[slot as usize];
        let (unsent, backlog) = (conn.unsent(), conn.backlog());
        let more = !conn.closing && Self::has_frame(conn, self.config.max_frame_bytes);
        let answered = unsent == 0 && !self.in_flight(slot);
        let conn = &mut self.conns[slot as usize];
        if conn.broken || answered && (conn.closing || conn.eof && !more) {
            self.end(slot, now);
            return;
        }
        if conn.closing {
            return;
        }
        let full = unsent > limit || more && backlog > MAX_BACKLOG;
        if full && conn.recv_armed && !conn.cancelling {
            conn.cancelling = true;
            let receiving = token(RECV, slot, conn.generation);
            let cancel = opcode::AsyncCancel::new(receiving).build().user_data(token(CANCEL, slot, conn.generation));
            // SAFETY: a cancel refers to no memory.
            unsafe { push(&mut self.ring, &cancel) };
        }
        let conn = &mut self.conns[slot as usize];
        let room = unsent <= limit / 2 && (!more || backlog <= MAX_BACKLOG / 2);
        if room && !conn.recv_armed && !conn.cancelling && !conn.eof {
            self.arm_recv(slot);
        }
        if more && unsent <= limit {
            self.queue(slot);
        }
    }

    /// Takes a connection that has nothing more to say from its last byte to its free slot.
    fn end(&mut self, slot: u32, now: Instant) {
        let conn = &mut self.conns[slot as usize];
        let Some(fd) = &conn.fd else { return };
        let until = match conn.linger_until {
            Some(until) => until,
            None => {
                // A peer that is gone already makes this fail, and then nothing is left to do.
                let _ = socket2::SockRef::from(fd).shutdown(std::net::Shutdown::Write);
                *conn.linger_until.insert(now + LINGER)
            }
        };
        conn.closing = true;
        if conn.broken || conn.eof || now >= until {
            if conn.recv_armed || conn.send_armed {
                // Ends the operations in flight; their last completions bring us here again.
                let _ = socket2::SockRef::from(fd).shutdown(std::net::Shutdown::Both);
            } else if !conn.cancelling {
                let generation = conn.generation.wrapping_add(1);
                *conn = Conn { generation, ..Conn::default() };
                self.calls[slot as usize] = 0;
                self.free.push(slot);
                self.stats.connections -= 1;
            }
        } else if !conn.recv_armed && !conn.cancelling {
            self.arm_recv(slot);
        }
    }

    /// Calls of a connection that are not answered yet keep it open after the peer finished sending.
    fn in_flight(&self, slot: u32) -> bool {
        self.calls.get(slot as usize).is_some_and(|&n| n > 0)
    }

    /// Ends connections that are idle, that hold a frame back, or that linger.
    fn sweep(&mut self, now: Instant) {
        let since = |at: Option<Instant>| at.map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        for slot in 0..self.conns.len() as u32 {
            let conn = &self.conns[slot as usize];
            if conn.fd.is_none() {
                continue;
            }
            let late = since(conn.frame_since) > FRAME_TIMEOUT && !Self::has_frame(conn, self.config.max_frame_bytes);
            let idle = since(conn.last_input) > self.config.idle_timeout && !self.in_flight(slot);
            if since(conn.send_since) > SEND_TIMEOUT {
                self.conns[slot as usize].broken = true;
                self.queue(slot);
            } else if late || idle || conn.linger_until.is_some_and(|until| now >= until) {
                self.conns[slot as usize].closing = true;
                self.queue(slot);
            }
        }
    }
}

/// # Safety
/// Whatever memory the operation refers to must stay valid until it completes.
unsafe fn push(ring: &mut IoUring, entry: &squeue::Entry) {
    loop {
        // SAFETY: passed on to the caller.
        if unsafe { ring.submission().push(entry) }.is_ok() {
            return;
        }
        // The queue is full: hand it over. Errors such as EBUSY pass once completions are taken, which `turn` does next.
        let _ = ring.submit();
    }
}

/// Buffers that the kernel picks from for receives.
struct BufferRing {
    entries: MmapMut,
    memory: MmapMut,
    tail: u16,
}

impl BufferRing {
    const GROUP: u16 = 0;

    fn new(ring: &IoUring) -> io::Result<Self> {
        let entries = MmapMut::map_anon(usize::from(BUFFERS) * size_of::<BufRingEntry>())?;
        let memory = MmapMut::map_anon(usize::from(BUFFERS) * BUFFER_BYTES)?;
        let mut buffers = BufferRing { entries, memory, tail: 0 };
        for id in 0..BUFFERS {
            buffers.give_back(id);
        }
        buffers.publish();
        // SAFETY: page-aligned, of the right size, and unmapped only after the ring, whose owner drops it first (field
        // order in `Engine`).
        unsafe {
            ring.submitter().register_buf_ring_with_flags(buffers.entries.as_ptr() as u64, BUFFERS, Self::GROUP, 0)?
        };
        Ok(buffers)
    }

    /// The first `len` bytes of buffer `id`.
    fn bytes(&self, id: u16, len: usize) -> &[u8] {
        let start = usize::from(id) * BUFFER_BYTES;
        self.memory.get(start..start + len.min(BUFFER_BYTES)).unwrap_or_default()
    }

    /// Queues a buffer for the kernel; visible to it after [`Self::publish`].
    fn give_back(&mut self, id: u16) {
        let address = self.memory.as_ptr() as u64 + u64::from(id) * BUFFER_BYTES as u64;
        let at = usize::from(self.tail & (BUFFERS - 1));
        // SAFETY: `at` is below the number of entries; the kernel does not read entries at or beyond the published tail.
        let entry = unsafe { &mut *self.entries.as_mut_ptr().cast::<BufRingEntry>().add(at) };
        entry.set_addr(address);
        entry.set_len(BUFFER_BYTES as u32);
        entry.set_bid(id);
        self.tail = self.tail.wrapping_add(1);
    }

    fn publish(&mut self) {
        // SAFETY: the tail lies in the first entry's reserved field, is aligned, and is shared with the kernel, which is
        // why it is written atomically; Release orders the entries before it.
        unsafe {
            let tail = BufRingEntry::tail(self.entries.as_ptr().cast::<BufRingEntry>());
            AtomicU16::from_ptr(tail.cast_mut()).store(self.tail, Ordering::Release);
        }
    }
}
