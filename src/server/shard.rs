//! One shard: a glommio executor that drives the binary port's engine and serves HTTP beside it.
#![allow(unsafe_code)] // Handing duplicates of eventfds to glommio.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use flatbuffers::FlatBufferBuilder;
use glommio::{LocalExecutorBuilder, Placement};

use super::Stop;
use super::http::{self, HttpCalls};
use super::ring::{ConnId, Engine, EngineConfig, Handler, LINGER, Verdict};
use super::service::{Service, Shared};
use super::signals;
use crate::api::{Call, Outcome, Ticket};
use crate::error::{Code, Error};
use crate::wire::request::{self, Request};
use crate::wire::{frame, response};

/// A shard that is to end goes on at least this long: what is in its sockets already is still answered.
const SETTLE: Duration = Duration::from_millis(20);

/// Reads of the kick's eventfd that stand on glommio's main ring: one may be spent before its task has run.
const STANDING_READS: usize = 8;

/// Out of the way: the preempt timer makes glommio 0.9 park executors that have work (see `watchdog`). In its place a busy
/// shard lets glommio look at its own rings every [`REACTOR_EVERY`].
pub const PREEMPT_TIMER: Duration = Duration::from_secs(3600);

/// How long HTTP, timers and files wait at most while the binary port has no pause.
const REACTOR_EVERY: Duration = Duration::from_millis(1);

/// A duplicate of `file` as glommio reads it.
fn glommio_file(file: &File) -> io::Result<glommio::io::BufferedFile> {
    let fd = file.try_clone()?.into_raw_fd();
    // SAFETY: the duplicate belongs to nobody else; glommio's file closes it.
    Ok(unsafe { glommio::io::BufferedFile::from_raw_fd(fd) })
}

/// A call that came in by the binary protocol.
struct BinaryCall {
    conn: ConnId,
    request_id: u64,
    timings: bool,
}

/// What frames mean: the binary protocol over the shard's service.
pub struct BinaryPort {
    service: Rc<RefCell<Service>>,
    builder: FlatBufferBuilder<'static>,
    calls: Vec<Option<BinaryCall>>,
    free: Vec<u32>,
}

impl BinaryPort {
    /// A port over `service`.
    pub fn new(service: Rc<RefCell<Service>>) -> Self {
        BinaryPort { service, builder: FlatBufferBuilder::with_capacity(4096), calls: Vec::new(), free: Vec::new() }
    }

    /// Sends the outcome of a call that was pending.
    pub fn deliver(&mut self, engine: &mut Engine, ticket: Ticket, outcome: &Outcome) {
        let Some(call) = self.calls.get_mut(ticket.0 as usize).and_then(Option::take) else { return };
        self.free.push(ticket.0 as u32);
        let message = response::encode(&mut self.builder, call.request_id, outcome, call.timings);
        engine.answer(call.conn, |out| frame::append(out, message));
    }
}

impl Handler for BinaryPort {
    fn frame(&mut self, conn: ConnId, message: &[u8], out: &mut Vec<u8>) -> Verdict {
        let BinaryPort { service, builder, calls, free } = self;
        let now = Instant::now();
        let decoded = request::decode(message, |request_id, request| match request {
            Request::Health => {
                let service = service.borrow();
                let version = &service.shared().generation.version;
                frame::append(out, response::health(builder, request_id, !service.draining(), version));
                Verdict::Continue
            }
            Request::Call(call) => {
                let timings = matches!(call, Call::Recommend(c) if c.timings);
                let slot = free.pop().unwrap_or_else(|| {
                    calls.push(None);
                    calls.len() as u32 - 1
                });
                match service.borrow_mut().submit(&call, Ticket(u64::from(slot)), now) {
                    Some(outcome) => {
                        free.push(slot);
                        frame::append(out, response::encode(builder, request_id, &outcome, timings));
                        Verdict::Continue
                    }
                    None => {
                        calls[slot as usize] = Some(BinaryCall { conn, request_id, timings });
                        Verdict::Pending
                    }
                }
            }
        });
        decoded.unwrap_or_else(|malformed| {
            // The frame's end is known, so the stream goes on.
            let service = self.service.borrow();
            service.shared().metrics.shards[usize::from(service.shard())].malformed.fetch_add(1, Relaxed);
            frame::append(out, response::error(&mut self.builder, malformed.request_id, &malformed.error));
            Verdict::Continue
        })
    }

    fn oversized(&mut self, _: ConnId, _: usize, out: &mut Vec<u8>) {
        let error = Error::fixed(Code::TooLarge, "the frame is larger than this server allows");
        frame::append(out, response::error(&mut self.builder, 0, &error));
    }
}

/// Everything that one shard owns.
pub struct Shard {
    /// Its number.
    pub id: u16,
    /// The CPU that it is pinned to.
    pub cpu: usize,
    /// With all others.
    pub shared: Arc<Shared>,
    /// Binary port.
    pub listener: TcpListener,
    /// HTTP port.
    pub http: TcpListener,
    /// Admin port; the first shard's.
    pub admin: Option<TcpListener>,
    /// Says when to drain and end; the end of a shard ends them all.
    pub stop: Stop,
    /// Told once: it serves, or why it can't.
    pub ready: Sender<io::Result<()>>,
}

struct EndsAll(Stop);

impl Drop for EndsAll {
    fn drop(&mut self) {
        self.0.stop();
    }
}

impl Shard {
    /// Starts the shard's thread. The handle's result says why it ended, if not by [`Self::stop`].
    ///
    /// # Errors
    /// The thread could not be started.
    pub fn spawn(self) -> io::Result<std::thread::JoinHandle<io::Result<()>>> {
        std::thread::Builder::new().name(format!("shard-{}", self.id)).spawn(move || {
            let ready = self.ready.clone();
            // However this shard ends: the others must not serve on as if nothing were.
            let _ends_all = EndsAll(self.stop.clone());
            signals::take_turns();
            let executor = LocalExecutorBuilder::new(Placement::Fixed(self.cpu))
                .preempt_timer(PREEMPT_TIMER)
                .name(&format!("shard-{}", self.id))
                .make()
                .map_err(|e| format!("{e}; if it speaks of locked memory, raise `ulimit -l` to 512 KiB or more"));
            let ended = match executor {
                Ok(executor) => executor.run(self.serve()),
                Err(reason) => Err(io::Error::other(reason)),
            };
            if let Err(error) = &ended {
                // Heard only if it did not come to serving.
                let _ = ready.send(Err(io::Error::other(error.to_string())));
            }
            ended
        })
    }

    async fn serve(self) -> io::Result<()> {
        let service = Rc::new(RefCell::new(Service::new(self.shared.clone(), self.id)));
        let config = &self.shared.config.server;
        let engine_config = EngineConfig {
            max_frame_bytes: config.max_frame_bytes as usize,
            max_output_bytes: config.max_output_bytes as usize,
            max_connections: config.max_connections as usize,
            idle_timeout: Duration::from_secs(u64::from(config.idle_timeout_seconds)),
        };
        let mut engine = Engine::new(self.listener, engine_config)?;
        let inbox = &self.shared.completions[usize::from(self.id)];
        engine.register_eventfd(inbox.event().as_raw_fd())?;
        let event = glommio_file(inbox.event())?;
        let kicks = Rc::new(glommio_file(inbox.kicks())?);
        let standing: Vec<_> = (0..STANDING_READS)
            .map(|_| {
                let kicks = kicks.clone();
                glommio::spawn_local(async move { while kicks.read_at(0, 8).await.is_ok() {} })
            })
            .collect();

        let calls = Rc::new(HttpCalls::default());
        let state = Rc::new(http::HttpState::new(service.clone(), calls.clone()));
        let mut listeners = vec![glommio::spawn_local(http::serve(self.http, state.clone(), http::Routes::Api))];
        if let Some(admin) = self.admin {
            listeners.push(glommio::spawn_local(http::serve(admin, state.clone(), http::Routes::Admin)));
        }
        let mut port = BinaryPort::new(service.clone());
        // Nobody waits any more only if another shard failed, and then this one is stopped.
        let _ = self.ready.send(Ok(()));
        let (mut drain_since, mut reactor_ran) = (None, Instant::now());
        let cut_off = loop {
            let now = Instant::now();
            let mut progress = engine.turn(0, now, &mut port)?;
            progress += service.borrow_mut().poll(now, &mut |ticket, outcome| match ticket.0 >> 63 {
                0 => port.deliver(&mut engine, ticket, &outcome),
                _ => calls.deliver(ticket, outcome),
            });
            service.borrow_mut().kick();
            engine.flush();
            inbox.progressed();
            let stats = engine.stats();
            let metrics = &self.shared.metrics.shards[usize::from(self.id)];
            metrics.connections.store(stats.connections as u64, Relaxed);
            metrics.refused.store(stats.refused, Relaxed);

            if self.stop.stopped() {
                let since = *drain_since.get_or_insert_with(|| {
                    engine.stop_accepting();
                    service.borrow_mut().drain();
                    now
                });
                let (left, drained) = (service.borrow().in_flight(), now.saturating_duration_since(since));
                let late = drained >= Duration::from_millis(u64::from(config.drain_timeout_ms));
                if left == 0 && drained >= SETTLE || late {
                    break left;
                }
            }
            if progress > 0 || engine.pending() {
                if now.saturating_duration_since(reactor_ran) >= REACTOR_EVERY {
                    inbox.wake();
                    event.read_at(0, 8).await.map_err(|e| io::Error::other(e.to_string()))?;
                    reactor_ran = Instant::now();
                }
                continue;
            }
            if drain_since.is_some() {
                glommio::timer::sleep(Duration::from_millis(1)).await;
                continue;
            }
            engine.notify(true);
            if inbox.arm() && engine.turn(0, now, &mut port)? == 0 && !engine.pending() && !service.borrow().pushed() {
                // One eventfd for both: completions of the ring and of the workers.
                event.read_at(0, 8).await.map_err(|e| io::Error::other(e.to_string()))?;
            }
            inbox.disarm();
            engine.notify(false);
            reactor_ran = Instant::now();
        };
        // Every call is answered; the answers get their time to arrive.
        engine.close_all();
        engine.flush();
        state.end();
        let until = Instant::now() + LINGER;
        while engine.stats().connections > 0 || !state.idle() {
            let now = Instant::now();
            if now >= until {
                break;
            }
            engine.turn(0, now, &mut port)?;
            inbox.progressed();
            glommio::timer::sleep(Duration::from_millis(1)).await;
        }
        inbox.arm();
        for task in listeners.into_iter().chain(standing) {
            task.cancel().await;
        }
        match cut_off {
            0 => Ok(()),
            n => Err(io::Error::other(format!("{n} calls were still computed when server.drain_timeout_ms ended"))),
        }
    }
}
