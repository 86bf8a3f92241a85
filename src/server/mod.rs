//! Sockets, shards, admission, completions.

pub mod changes;
pub mod completions;
pub mod http;
mod index;
pub mod json;
pub mod ring;
pub mod service;
pub mod shard;
pub mod signals;
pub mod tensors;
mod v2;
pub mod watchdog;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::Instant;

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use crate::catalog;
use crate::catalog::generation::Generation;
use crate::config::{Config, in_range};
use crate::device::batcher::BatchLimits;
use crate::device::guard::{self, Guard};
use crate::device::worker::{self, JobSink};
use crate::device::{self, Accelerator, Counters, Device, Gpus, Selected, cpu, sim};
use crate::index::Searchers;
use crate::link::Link;
use crate::state::sinks::Sinks;
use crate::state::{self, writer::ReceiptSink};
use completions::Completions;
use service::{Shared, UserSink};

/// Threads for partitions where the configuration names no number.
const MOST_SEARCHERS: usize = 16;

/// `[server]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ServerConfig {
    /// Address of the binary protocol. Default 127.0.0.1:7070.
    pub listen: SocketAddr,
    /// Address of HTTP/JSON. Default 127.0.0.1:8000.
    pub http: SocketAddr,
    /// Address of metrics, health and administration. Default 127.0.0.1:8002.
    pub admin: SocketAddr,
    /// What changes the server's state on the admin port must be sent with it, as `Authorization: Bearer TOKEN`: 16 to 256
    /// visible ASCII characters. Empty, the default: nothing may.
    pub admin_token: String,
    /// CPUs to run on, one shard and one worker each. Empty: all that the process may use.
    pub cpus: Vec<usize>,
    /// Threads that search the partitions of an index in partitions; with none, workers search them one after another. 0 to 1024;
    /// absent, the default: one on each CPU that the process may use and `cpus` leaves out, at most 16.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub searchers: Option<u32>,
    /// Calls in flight per shard; more are answered `overloaded`. 1 to 65536, default 256.
    pub max_in_flight: u32,
    /// Binary connections per shard. 1 to 1048576, default 4096.
    pub max_connections: u32,
    /// Largest frame and HTTP body, bytes. 1024 to 64 MiB, default 1 MiB.
    pub max_frame_bytes: u32,
    /// Unsent answers of one connection beyond which it is not read, bytes. Default 4 MiB.
    pub max_output_bytes: u32,
    /// Time budget of a call that names none, milliseconds. 1 to `max_deadline_ms`, default 1000.
    pub default_deadline_ms: u32,
    /// Largest time budget, milliseconds. 1 to 600000, default 10000.
    pub max_deadline_ms: u32,
    /// A connection that sends nothing for this long is closed, seconds. 1 to 86400, default 600.
    pub idle_timeout_seconds: u32,
    /// On SIGTERM, time to finish what was accepted, milliseconds. 0 to 600000, default 10000.
    pub drain_timeout_ms: u32,
}

impl Default for ServerConfig {
    fn default() -> Self {
        ServerConfig {
            listen: SocketAddr::from(([127, 0, 0, 1], 7070)),
            http: SocketAddr::from(([127, 0, 0, 1], 8000)),
            admin: SocketAddr::from(([127, 0, 0, 1], 8002)),
            admin_token: String::new(),
            cpus: Vec::new(),
            searchers: None,
            max_in_flight: 256,
            max_connections: 4096,
            max_frame_bytes: 1 << 20,
            max_output_bytes: 4 << 20,
            default_deadline_ms: 1000,
            max_deadline_ms: 10_000,
            idle_timeout_seconds: 600,
            drain_timeout_ms: 10_000,
        }
    }
}

impl ServerConfig {
    /// Checks ranges.
    ///
    /// # Errors
    /// The key, its value and its range.
    pub fn validate(&self) -> Result<(), String> {
        let token = self.admin_token.as_bytes();
        if !token.is_empty() && (!(16..=256).contains(&token.len()) || !token.iter().all(u8::is_ascii_graphic)) {
            return Err("server.admin_token is not of 16 to 256 visible ASCII characters".to_owned());
        }
        let ranges = [
            ("searchers", self.searchers.unwrap_or(0), 0, 1024),
            ("max_in_flight", self.max_in_flight, 1, 65_536),
            ("max_connections", self.max_connections, 1, 1 << 20),
            ("max_frame_bytes", self.max_frame_bytes, 1024, 64 << 20),
            ("max_output_bytes", self.max_output_bytes, 1 << 16, 1 << 30),
            ("max_deadline_ms", self.max_deadline_ms, 1, 600_000),
            ("default_deadline_ms", self.default_deadline_ms, 1, self.max_deadline_ms),
            ("idle_timeout_seconds", self.idle_timeout_seconds, 1, 86_400),
            ("drain_timeout_ms", self.drain_timeout_ms, 0, 600_000),
        ];
        in_range("server", ranges)
    }
}

/// Opens a bundle and serves it on what was selected until SIGTERM or SIGINT; then drains.
///
/// # Errors
/// A bundle, ranker or rule that can't be used; an address that is taken; a machine without io_uring; a device that was asked for and can't
/// be used.
pub fn run(bundle: &Path, config: Config, selected: &Selected) -> anyhow::Result<()> {
    signals::block().context("blocking signals")?;
    signals::keep_freed_memory();
    let start = Instant::now();
    let stop: Arc<OnceLock<Stop>> = Arc::default();
    let signal = std::thread::Builder::new().name("signals".into()).spawn({
        let stop = stop.clone();
        move || {
            let name = signals::wait();
            match stop.get() {
                Some(stop) => {
                    tracing::info!(signal = name, "draining; a second signal ends at once");
                    stop.stop();
                    signals::wait();
                }
                None => tracing::info!(signal = name, "ended before it served"),
            }
            std::process::exit(1);
        }
    });
    signal.context("starting the signal thread")?;
    let generation = Arc::new(catalog::bundle::open(bundle)?);
    tracing::info!(
        generation = generation.version,
        items = generation.items.len(),
        users = generation.users.len(),
        "bundle verified"
    );
    tracing::info!(device = selected.name, reason = selected.reason, "device chosen");
    let options = Options { device: DeviceKind::from(selected), ..Options::default() };
    let server = Server::start(generation, config, options)?;
    let _ = stop.set(server.stopper());
    tracing::info!(
        binary = %server.addrs.binary,
        http = %server.addrs.http,
        admin = %server.addrs.admin,
        shards = server.n_shards(),
        device = server.device(),
        ready_ms = start.elapsed().as_millis() as u64,
        "serving"
    );
    server.join()?;
    tracing::info!("drained");
    Ok(())
}

/// Keeps an accelerator's tables where they are.
type Tables = Box<dyn Send>;

/// What computes.
#[derive(Clone, Copy, Debug)]
pub enum DeviceKind {
    /// The CPU engine.
    Cpu,
    /// A simulated device; see [`sim::Script`].
    Sim(sim::Script),
    /// A simulated device that is guarded, with the CPU engine behind it.
    Guarded(sim::Script),
    /// GPUs, likewise: workers are spread over them, and each has all tables.
    Accelerators {
        /// See [`Selected::gpus`].
        gpus: Gpus,
        /// Whether the server is not to start without it.
        required: bool,
    },
}

impl From<&Selected> for DeviceKind {
    fn from(selected: &Selected) -> Self {
        match selected.gpus {
            none if none.is_empty() => DeviceKind::Cpu,
            gpus => DeviceKind::Accelerators { gpus, required: selected.required },
        }
    }
}

/// What tests and measurements change; the default is what serves.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// What computes.
    pub device: DeviceKind,
    /// Whether shards are watched from outside. Default true.
    pub watchdog: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options { device: DeviceKind::Cpu, watchdog: true }
    }
}

/// Where a server listens.
#[derive(Clone, Copy, Debug)]
pub struct Addrs {
    /// Binary protocol.
    pub binary: SocketAddr,
    /// HTTP/JSON.
    pub http: SocketAddr,
    /// Metrics, health.
    pub admin: SocketAddr,
}

/// Ends a server, from any thread.
#[derive(Clone)]
pub struct Stop {
    flag: Arc<AtomicBool>,
    shared: Arc<Shared>,
}

impl Stop {
    /// Whether the shards are to end.
    pub fn stopped(&self) -> bool {
        self.flag.load(Ordering::Acquire)
    }

    /// Lets the shards drain and end.
    pub fn stop(&self) {
        self.flag.store(true, Ordering::Release);
        self.shared.completions.iter().for_each(Completions::wake);
    }
}

/// A running server.
pub struct Server {
    /// Where it listens.
    pub addrs: Addrs,
    stop: Stop,
    shared: Arc<Shared>,
    shards: Vec<JoinHandle<std::io::Result<()>>>,
    workers: Vec<JoinHandle<()>>,
    events: JoinHandle<()>,
    sinks: Sinks,
    links: Vec<(Arc<Link>, JoinHandle<()>)>,
    watchdog: JoinHandle<()>,
    watched: Arc<AtomicBool>,
}

impl Server {
    /// Starts workers (rankers loaded and warm), then shards; returns once all of them serve.
    ///
    /// # Errors
    /// As [`run`].
    pub fn start(generation: Arc<Generation>, config: Config, options: Options) -> anyhow::Result<Self> {
        ring::probe().map_err(anyhow::Error::msg)?;
        signals::raise_file_limit();
        let cpus = match &config.server.cpus {
            cpus if cpus.is_empty() => signals::allowed_cpus(),
            cpus => cpus.clone(),
        };
        let shared = Arc::new(Shared::new(generation, config, cpus.len())?);
        let log = state::writer::open(&shared.live)?;
        shared.index.serve(Self::start_searchers(&shared.config.server, &cpus)?);
        let workers = Self::start_workers(&shared, &cpus, options.device)?;

        let server = &shared.config.server;
        let binary = http::listen(server.listen).with_context(|| format!("binding {}", server.listen))?;
        let http = http::listen(server.http).with_context(|| format!("binding {}", server.http))?;
        let admin = http::listen(server.admin).with_context(|| format!("binding {}", server.admin))?;
        let addrs = Addrs { binary: binary.local_addr()?, http: http.local_addr()?, admin: admin.local_addr()? };
        let stop = Stop { flag: Arc::new(AtomicBool::new(false)), shared: shared.clone() };
        let sink: Arc<dyn ReceiptSink> = shared.clone();
        let mut links = Vec::new();
        if let Some(redis) = &shared.redis {
            links.push((redis.link.clone(), redis.link.clone().spawn(shared.clone())?));
        }
        if let Some(store) = &shared.store {
            links.push((store.link.clone(), store.link.clone().spawn(Arc::new(UserSink(shared.clone())))?));
        }
        let events = state::writer::spawn(shared.live.clone(), log, shared.events.clone(), sink)?;
        let sinks = Sinks::start(&shared.config.events, &shared.events)?;
        if let Some(items) = &shared.items {
            links.extend(items.clone().spawn()?.map(|thread| (items.link.clone(), thread)));
        }
        let (mut binary, mut http, mut admin) = (Some(binary), Some(http), Some(admin));
        let mut shards = Vec::new();
        let (ready, started) = std::sync::mpsc::channel();
        for (id, &cpu) in cpus.iter().enumerate() {
            let again = |first: &mut Option<std::net::TcpListener>, addr| match first.take() {
                Some(listener) => Ok(listener),
                None => http::listen_again(addr),
            };
            let shard = shard::Shard {
                id: id as u16,
                cpu,
                shared: shared.clone(),
                listener: again(&mut binary, addrs.binary)?,
                http: again(&mut http, addrs.http)?,
                admin: admin.take(),
                stop: stop.clone(),
                ready: ready.clone(),
            };
            shards.push(shard.spawn()?);
        }
        let watched = Arc::new(AtomicBool::new(!options.watchdog));
        let watchdog = std::thread::Builder::new().name("watchdog".into()).spawn({
            let (shared, watched) = (shared.clone(), watched.clone());
            move || watchdog::run(&shared, &watched)
        })?;
        drop(ready);
        let server = Server { addrs, stop, shared, shards, workers, events, sinks, links, watchdog, watched };
        let failed = started.iter().take(server.shards.len()).find_map(Result::err);
        match failed {
            Some(error) => {
                // The shards' own ends say no more than the first of them did.
                let _ = server.shut_down();
                Err(anyhow::Error::new(error).context("starting a shard"))
            }
            None => Ok(server),
        }
    }

    fn start_searchers(config: &ServerConfig, cpus: &[usize]) -> anyhow::Result<Arc<Searchers>> {
        let spare: Vec<usize> = signals::allowed_cpus().into_iter().filter(|cpu| !cpus.contains(cpu)).collect();
        let n = config.searchers.map_or(spare.len().min(MOST_SEARCHERS), |n| n as usize);
        let begin = move |at: usize| {
            if !spare.is_empty() {
                signals::pin(spare[at % spare.len()]);
            }
        };
        Searchers::start(n, begin).context("starting the threads that search partitions")
    }

    fn start_workers(shared: &Arc<Shared>, cpus: &[usize], kind: DeviceKind) -> anyhow::Result<Vec<JoinHandle<()>>> {
        let (ready, loaded) = std::sync::mpsc::channel();
        let n_accelerated = match shared.config.device.workers {
            0 => cpus.len(),
            n => cpus.len().min(n as usize),
        };
        let accelerators = match kind {
            DeviceKind::Accelerators { gpus, required } => {
                Self::open_accelerators(shared, gpus, required, n_accelerated)?
            }
            _ => Vec::new(),
        };
        if let DeviceKind::Cpu | DeviceKind::Accelerators { .. } = kind {
            let checked = device::check_engines(&shared.config.pipeline, &shared.generation, !accelerators.is_empty());
            checked.map_err(anyhow::Error::msg)?;
        }
        if let DeviceKind::Guarded(_) = kind {
            let _ = shared.devices.set(vec![Arc::new(Counters::new("sim"))]);
        }
        let mut workers = Vec::new();
        for (id, &cpu) in cpus.iter().enumerate() {
            let (shared, ready) = (shared.clone(), ready.clone());
            let accelerator = match accelerators.len() {
                0 => None,
                n => Some(accelerators[id % n].clone()).filter(|_| id < n_accelerated),
            };
            let thread = std::thread::Builder::new().name(format!("worker-{id}"));
            workers.push(thread.spawn(move || {
                let sink: Arc<dyn JobSink> = shared.clone();
                let limits = accelerator.as_ref().map_or(BatchLimits::CPU, |accelerator| accelerator.limits());
                let load = accelerator.as_ref().map_or_else(Default::default, |accelerator| accelerator.load().clone());
                let work = |device: &mut dyn Device, tables: Option<Tables>| {
                    signals::pin(cpu);
                    signals::take_turns();
                    let result = device.load(&shared.generation);
                    let usable = result.is_ok();
                    // The device has them by now; a broken one must be able to give them up.
                    drop(tables);
                    // The receiver is gone only if another worker failed, and then nothing starts.
                    let _ = ready.send(result);
                    if usable {
                        worker::run(device, &shared.jobs, id, limits, &load, &sink);
                    }
                };
                let config = Arc::new(shared.config.pipeline.clone());
                match (kind, accelerator, shared.devices.get().and_then(|devices| devices.first())) {
                    (DeviceKind::Sim(script), ..) => work(&mut sim::SimDevice::new(script), None),
                    (DeviceKind::Guarded(script), _, Some(counters)) => {
                        // Each has faults of its own.
                        let next = AtomicU64::new(script.faults.seed + ((id as u64) << 32));
                        let make: guard::Make = Arc::new(move || {
                            let mut script = script;
                            script.faults.seed = next.fetch_add(1, Ordering::Relaxed);
                            Ok(Box::new(sim::SimDevice::new(script)) as _)
                        });
                        cpu::with_device(config, |device| {
                            work(&mut Guard::new(counters, make, device, guard::Options::default()), None);
                        });
                    }
                    (_, Some(accelerator), _) => {
                        let (make, tables) = accelerator.make(&config);
                        let (patience, counters) = (accelerator.patience(), accelerator.counters().clone());
                        drop(accelerator);
                        cpu::with_device(config, |device| {
                            work(&mut Guard::new(&counters, make, device, patience), Some(Box::new(tables)));
                        });
                    }
                    _ => cpu::with_device(config, |device| work(device, None)),
                }
            })?);
        }
        drop(accelerators);
        drop(ready);
        let results: Vec<_> = loaded.iter().take(cpus.len()).collect();
        if results.len() < cpus.len() || results.iter().any(Result::is_err) {
            shared.jobs.close();
        }
        anyhow::ensure!(results.len() == cpus.len(), "a worker ended before it was ready");
        for result in results {
            result?;
        }
        Ok(workers)
    }

    /// The accelerators that `n_workers` are spread over, at most as many; without those that can't be used, with a warning each, where they
    /// need not be.
    fn open_accelerators(
        shared: &Arc<Shared>,
        gpus: Gpus,
        required: bool,
        n_workers: usize,
    ) -> anyhow::Result<Vec<Arc<Accelerator>>> {
        let mut left: Vec<u32> = gpus.iter().collect();
        if left.len() > n_workers {
            tracing::warn!(gpus = %gpus, n_workers, "more GPUs than workers: the last ones are not used");
            left.truncate(n_workers);
        }
        while !left.is_empty() {
            // Side by side: each loads tables, and may make an index.
            let each = n_workers.div_ceil(left.len());
            let (config, generation) = (&shared.config.device, &shared.generation);
            let open = |ordinal: u32| (ordinal, Accelerator::open(ordinal, config, each, generation));
            let opened: Vec<_> = std::thread::scope(|scope| {
                let threads: Vec<_> = left.iter().map(|&ordinal| scope.spawn(move || open(ordinal))).collect();
                threads.into_iter().map(std::thread::ScopedJoinHandle::join).collect()
            });
            let mut usable = Vec::new();
            for opened in opened {
                match opened.map_err(|_| anyhow::anyhow!("opening a GPU panicked"))? {
                    (_, Ok(accelerator)) => usable.push(Arc::new(accelerator)),
                    (ordinal, Err(error)) if required => {
                        return Err(anyhow::Error::new(error).context(format!("device cuda:{ordinal}")));
                    }
                    (ordinal, Err(error)) => {
                        tracing::warn!(ordinal, %error, "the device can't be used: the CPU computes");
                        left.retain(|&other| other != ordinal);
                    }
                }
            }
            if usable.len() == left.len() {
                let counters = usable.iter().map(|accelerator| accelerator.counters().clone()).collect();
                let _ = shared.devices.set(counters);
                return Ok(usable);
            }
            // Fewer than planned, with more workers each: what they take is reckoned anew.
        }
        Ok(Vec::new())
    }

    /// What computes: `cpu`, `cuda:0`, `cuda:0,cuda:1`.
    pub fn device(&self) -> String {
        let devices = self.shared.devices.get().map_or(&[][..], Vec::as_slice);
        let names: Vec<&str> = devices.iter().map(|counters| counters.device.as_str()).collect();
        if names.is_empty() { "cpu".to_owned() } else { names.join(",") }
    }

    /// What ends this server.
    pub fn stopper(&self) -> Stop {
        self.stop.clone()
    }

    /// Shards, one per CPU.
    pub fn n_shards(&self) -> usize {
        self.shards.len()
    }

    /// What all shards share.
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Waits until all shards have drained after `stop`, then ends workers and watchdog.
    ///
    /// # Errors
    /// A shard that ended by itself, and why.
    pub fn join(self) -> anyhow::Result<()> {
        let mut failed = None;
        for (id, shard) in self.shards.into_iter().enumerate() {
            match shard.join() {
                Ok(Ok(())) => {}
                Ok(Err(error)) => failed = failed.or(Some(anyhow::anyhow!("shard {id}: {error}"))),
                Err(_) => failed = failed.or(Some(anyhow::anyhow!("shard {id} panicked"))),
            }
        }
        self.shared.jobs.close();
        self.shared.events.close();
        if self.events.join().is_err() {
            failed = failed.or(Some(anyhow::anyhow!("the event log's thread panicked")));
        }
        self.sinks.close();
        for (link, thread) in self.links {
            link.close();
            if thread.join().is_err() {
                failed = failed.or(Some(anyhow::anyhow!("the thread of Redis ({}) panicked", link.name)));
            }
        }
        self.watched.store(true, Ordering::Release);
        for worker in self.workers {
            if worker.join().is_err() {
                failed = failed.or(Some(anyhow::anyhow!("a worker panicked")));
            }
        }
        if self.watchdog.join().is_err() {
            failed = failed.or(Some(anyhow::anyhow!("the watchdog panicked")));
        }
        failed.map_or(Ok(()), Err)
    }

    /// Drains and waits.
    ///
    /// # Errors
    /// As [`Self::join`].
    pub fn shut_down(self) -> anyhow::Result<()> {
        self.stop.stop();
        self.join()
    }
}
