//! Connections on an io_uring: bytes out, bytes in. One send and one receive in flight per connection.
#![allow(unsafe_code)] // Submitting operations on buffers that this file keeps alive.

use std::collections::VecDeque;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, squeue, types};

const RECEIVE_BYTES: usize = 64 << 10;

/// A request on its way.
#[derive(Clone, Copy, Debug)]
pub struct Pending {
    /// As in the frame; 0 for HTTP, where answers come in order.
    pub id: u64,
    /// When it should have been sent.
    pub intended: Instant,
}

/// One connection.
pub struct Connection {
    stream: TcpStream,
    receiving: Box<[u8]>,
    receive_armed: bool,
    sending: Vec<u8>,
    sent: usize,
    send_armed: bool,
    /// To be sent.
    pub output: Vec<u8>,
    /// Received, not yet understood.
    pub input: Vec<u8>,
    /// In the order sent.
    pub pending: VecDeque<Pending>,
    /// The peer closed, or the network failed.
    pub broken: bool,
}

/// All connections.
pub struct Engine {
    ring: IoUring,
    /// By number.
    pub connections: Vec<Connection>,
}

const SEND: u64 = 1 << 32;

impl Engine {
    /// Opens `n` connections.
    ///
    /// # Errors
    /// The address does not answer, or io_uring is not to be had.
    pub fn connect(addr: SocketAddr, n: usize) -> io::Result<Self> {
        let ring = IoUring::builder().setup_coop_taskrun().build(4096)?;
        let mut connections = Vec::with_capacity(n);
        for _ in 0..n {
            let stream = TcpStream::connect_timeout(&addr, Duration::from_secs(5))?;
            stream.set_nodelay(true)?;
            connections.push(Connection {
                stream,
                receiving: vec![0; RECEIVE_BYTES].into_boxed_slice(),
                receive_armed: false,
                sending: Vec::new(),
                sent: 0,
                send_armed: false,
                output: Vec::new(),
                input: Vec::new(),
                pending: VecDeque::new(),
                broken: false,
            });
        }
        Ok(Engine { ring, connections })
    }

    /// Starts what can be started, waits for something or until `until`, and returns the connections that have input or
    /// broke.
    ///
    /// # Errors
    /// The ring failed.
    pub fn turn(&mut self, until: Instant, touched: &mut Vec<usize>) -> io::Result<()> {
        touched.clear();
        for at in 0..self.connections.len() {
            self.start(at)?;
        }
        let wait = until.saturating_duration_since(Instant::now());
        // Sleeping costs about this much; a due time that is nearer is met by polling.
        if wait > Duration::from_micros(60) {
            let time = types::Timespec::from(wait.min(Duration::from_millis(100)));
            let args = types::SubmitArgs::new().timespec(&time);
            match self.ring.submitter().submit_with_args(1, &args) {
                Ok(_) => {}
                Err(e) if matches!(e.raw_os_error(), Some(libc::ETIME | libc::EINTR | libc::EBUSY)) => {}
                Err(e) => return Err(e),
            }
        } else {
            self.ring.submit()?;
        }
        let Engine { ring, connections } = self;
        for entry in ring.completion() {
            let at = (entry.user_data() & 0xffff_ffff) as usize;
            let connection = &mut connections[at];
            let n = usize::try_from(entry.result()).unwrap_or(0);
            if entry.user_data() & SEND != 0 {
                connection.send_armed = false;
                connection.sent += n;
                connection.broken |= n == 0;
                if connection.sent >= connection.sending.len() {
                    connection.sending.clear();
                    connection.sent = 0;
                }
            } else {
                connection.receive_armed = false;
                if entry.result() == -libc::EINTR || entry.result() == -libc::EAGAIN {
                    continue;
                }
                connection.broken |= n == 0;
                connection.input.extend_from_slice(&connection.receiving[..n]);
                touched.push(at);
            }
        }
        Ok(())
    }

    fn start(&mut self, at: usize) -> io::Result<()> {
        let connection = &mut self.connections[at];
        if connection.broken {
            return Ok(());
        }
        let fd = types::Fd(connection.stream.as_raw_fd());
        if !connection.send_armed {
            if connection.sending.is_empty() {
                std::mem::swap(&mut connection.sending, &mut connection.output);
            }
            let rest = &connection.sending[connection.sent..];
            if !rest.is_empty() {
                connection.send_armed = true;
                let send = opcode::Send::new(fd, rest.as_ptr(), rest.len() as u32).flags(libc::MSG_NOSIGNAL);
                push(&mut self.ring, &send.build().user_data(SEND | at as u64))?;
            }
        }
        let connection = &mut self.connections[at];
        if !connection.receive_armed {
            connection.receive_armed = true;
            let into = &mut connection.receiving;
            let receive = opcode::Recv::new(fd, into.as_mut_ptr(), into.len() as u32);
            push(&mut self.ring, &receive.build().user_data(at as u64))?;
        }
        Ok(())
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // Receives still in flight write into our buffers: end them before the buffers go.
        for connection in &self.connections {
            let _ = connection.stream.shutdown(std::net::Shutdown::Both);
        }
        let until = Instant::now() + Duration::from_secs(1);
        while self.connections.iter().any(|c| c.receive_armed || c.send_armed) && Instant::now() < until {
            let time = types::Timespec::from(Duration::from_millis(50));
            let _ = self.ring.submitter().submit_with_args(1, &types::SubmitArgs::new().timespec(&time));
            for entry in self.ring.completion() {
                let connection = &mut self.connections[(entry.user_data() & 0xffff_ffff) as usize];
                match entry.user_data() & SEND {
                    0 => connection.receive_armed = false,
                    _ => connection.send_armed = false,
                }
            }
        }
    }
}

fn push(ring: &mut IoUring, entry: &squeue::Entry) -> io::Result<()> {
    loop {
        // SAFETY: `sending` and `receiving` are neither moved nor freed while their operation is armed; `Drop` waits.
        if unsafe { ring.submission().push(entry) }.is_ok() {
            return Ok(());
        }
        ring.submit()?;
    }
}

/// Pins this thread to a CPU.
pub fn pin(cpu: usize) {
    // SAFETY: the set is zeroed; only this thread's affinity changes.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu % libc::CPU_SETSIZE as usize, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set);
    }
}
