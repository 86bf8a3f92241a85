//! The binary port beside what it could be at best, 64 connections, medians of interleaved rounds; the server runs on the first CPU,
//! the load on the second. `cargo bench -p loadgen --bench hot_port`.
//!
//! - The full path socket → queue → worker → queue → socket with a worker that computes nothing, as it serves (its ring inside a
//!   glommio executor), against the same engine alone in a thread. Bars: ≥ 0.90 × the requests and ≤ 1.15 × the CPU per request.
//! - Recommendations from the warm cache against an echo of the same engine, which answers every frame with the bytes of such an
//!   answer and looks at nothing but the request's number. Bar: ≥ 0.60 × the requests.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Parser;
use loadgen::{Options, engine, run};
use tastemaker::api::{CacheStatus, Outcome, Slate, SlateItem};
use tastemaker::candidates::SourceSet;
use tastemaker::catalog::generation::Generation;
use tastemaker::catalog::synthetic::{self, SyntheticOptions};
use tastemaker::catalog::{build, bundle};
use tastemaker::config::Config;
use tastemaker::device::batcher::{BatchLimits, Load};
use tastemaker::device::sim::{Script, SimDevice};
use tastemaker::device::worker::{self, JobSink};
use tastemaker::server::ring::{ConnId, Engine, EngineConfig, Handler, Verdict};
use tastemaker::server::service::{Service, Shared};
use tastemaker::server::shard::BinaryPort;
use tastemaker::server::{DeviceKind, Server, http, signals};
use tastemaker::wire::{frame, response};

const ROUNDS: usize = 7;
const SECONDS: &str = "2";
const DEPTHS: [&str; 2] = ["1", "8"];

fn config() -> Config {
    let mut config = Config::default();
    config.cache.enabled = false;
    config.server.cpus = vec![0];
    config.server.max_in_flight = 4096;
    for addr in [&mut config.server.listen, &mut config.server.http, &mut config.server.admin] {
        addr.set_port(0);
    }
    config
}

const LIMITS: EngineConfig = EngineConfig {
    max_frame_bytes: 1 << 20,
    max_output_bytes: 4 << 20,
    max_connections: 4096,
    idle_timeout: Duration::from_secs(600),
};

/// As it serves.
fn serve_hybrid(generation: Arc<Generation>) {
    let options = tastemaker::server::Options { device: DeviceKind::Sim(Script::default()), ..Default::default() };
    let server = Server::start(generation, config(), options).unwrap();
    println!("{}", server.addrs.binary);
    server.join().unwrap();
}

/// The same engine, service and worker, and nothing around them: the thread sleeps in the engine's ring.
fn serve_raw(generation: Arc<Generation>) {
    let shared = Arc::new(Shared::new(generation, config(), 1).unwrap());
    std::thread::spawn({
        let shared = shared.clone();
        move || {
            signals::pin(0);
            let sink: Arc<dyn JobSink> = shared.clone();
            let (mut device, load) = (SimDevice::new(Script::default()), Load::default());
            worker::run(&mut device, &shared.jobs, 0, BatchLimits::CPU, &load, &sink);
        }
    });
    signals::pin(0);
    let listener = http::listen(shared.config.server.listen).unwrap();
    println!("{}", listener.local_addr().unwrap());
    let mut engine = Engine::new(listener, LIMITS).unwrap();
    let service = std::rc::Rc::new(std::cell::RefCell::new(Service::new(shared.clone(), 0)));
    let mut port = BinaryPort::new(service.clone());
    let inbox = &shared.completions[0];
    engine.watch(inbox.event());
    loop {
        let now = Instant::now();
        let mut progress = engine.turn(0, now, &mut port).unwrap();
        progress += service.borrow_mut().poll(now, &mut |ticket, outcome| port.deliver(&mut engine, ticket, &outcome));
        service.borrow_mut().kick();
        engine.flush();
        if progress > 0 || engine.pending() {
            continue;
        }
        if inbox.arm() {
            engine.turn(1, now, &mut port).unwrap();
        }
        inbox.disarm();
    }
}

/// As it serves, with the cache.
fn serve_cached(generation: Arc<Generation>) {
    let mut config = config();
    config.cache.enabled = true;
    let options = tastemaker::server::Options { device: DeviceKind::Sim(Script::default()), ..Default::default() };
    let server = Server::start(generation, config, options).unwrap();
    println!("{}", server.addrs.binary);
    server.join().unwrap();
}

/// Answers every frame with the same bytes but for the request's number.
struct Echo {
    answer: Vec<u8>,
    /// Where the number is.
    number: usize,
}

impl Echo {
    fn new(generation: Arc<Generation>) -> Self {
        let item = |row| SlateItem { row, score: 0.5, sources: SourceSet(1), explanation: None };
        let slate = Arc::new(Slate {
            generation,
            items: (0..10).map(item).collect(),
            degraded: Vec::new(),
            timings: Default::default(),
            coverage: 1.0,
            known_user: true,
            n_candidates: 900,
        });
        let mut builder = flatbuffers::FlatBufferBuilder::new();
        let outcome = Outcome::Slate(slate, CacheStatus::L1);
        let answer = response::encode(&mut builder, u64::MAX, &outcome, false).to_vec();
        let number = answer.windows(8).position(|bytes| bytes == [255; 8]).unwrap();
        Echo { answer, number }
    }
}

impl Handler for Echo {
    fn frame(&mut self, _: ConnId, frame: &[u8], out: &mut Vec<u8>) -> Verdict {
        // The table's first field, by hand: table, its vtable, the field's place.
        let four = |at: usize| i32::from_le_bytes(frame[at..at + 4].try_into().unwrap());
        let table = four(0) as usize;
        let vtable = (table as i32 - four(table)) as usize;
        let field = usize::from(u16::from_le_bytes(frame[vtable + 4..vtable + 6].try_into().unwrap()));
        self.answer[self.number..self.number + 8].copy_from_slice(&frame[table + field..table + field + 8]);
        frame::append(out, &self.answer);
        Verdict::Continue
    }

    fn oversized(&mut self, _: ConnId, _: usize, _: &mut Vec<u8>) {}
}

fn serve_echo(generation: Arc<Generation>) {
    signals::pin(0);
    let listener = http::listen(config().server.listen).unwrap();
    println!("{}", listener.local_addr().unwrap());
    let mut engine = Engine::new(listener, LIMITS).unwrap();
    let mut echo = Echo::new(generation);
    loop {
        let progress = engine.turn(0, Instant::now(), &mut echo).unwrap();
        engine.flush();
        if progress == 0 && !engine.pending() {
            engine.turn(1, Instant::now(), &mut echo).unwrap();
        }
    }
}

struct Serving {
    child: Child,
    addr: String,
}

impl Serving {
    fn start(kind: &str, bundle: &Path) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        let mut child = command.args(["--serve", kind]).arg(bundle).stdout(Stdio::piped()).spawn().unwrap();
        let mut addr = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut addr).unwrap();
        Serving { child, addr: addr.trim().to_owned() }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, serve, kind, bundle] = &arguments[..]
        && serve == "--serve"
    {
        let generation = Arc::new(bundle::open(Path::new(bundle)).unwrap());
        match kind.as_str() {
            "raw" => serve_raw(generation),
            "echo" => serve_echo(generation),
            "cached" => serve_cached(generation),
            _ => serve_hybrid(generation),
        }
        return;
    }
    let work = tempfile::tempdir().unwrap();
    let (data, out) = (work.path().join("data"), work.path().join("bundle"));
    synthetic::generate(&data, &SyntheticOptions { n_items: 500, n_users: 100, dim: 8, seed: 1 }).unwrap();
    build::build(&data, &out, &Default::default(), &build::Silent).unwrap();
    engine::pin(1);
    println!("64 connections, {ROUNDS} interleaved rounds of {SECONDS} s; medians, then per round");
    let mut passed = true;
    for (kinds, least_rps, most_cpu) in [(["raw", "hybrid"], 0.90, 1.15), (["echo", "cached"], 0.60, f64::INFINITY)] {
        for depth in DEPTHS {
            let (of_rps, of_cpu) = compare(&out, kinds, depth);
            passed &= of_rps >= least_rps && of_cpu <= most_cpu;
        }
    }
    println!("bars: {}", if passed { "met" } else { "MISSED" });
}

/// Ratios of requests per second and of CPU per request, second kind to first.
fn compare(bundle: &Path, kinds: [&str; 2], depth: &str) -> (f64, f64) {
    let (mut rps, mut cpu) = ([const { Vec::new() }; 2], [const { Vec::new() }; 2]);
    for round in 0..ROUNDS {
        for at in if round % 2 == 0 { [0, 1] } else { [1, 0] } {
            let serving = Serving::start(kinds[at], bundle);
            let pid = serving.child.id().to_string();
            let fixed = ["loadgen", "-c", "64", "--seconds", SECONDS, "--warmup", "0.5", "--n-users", "100"];
            let own = ["--addr", &serving.addr, "--depth", depth, "--server-pid", &pid];
            let report = run::run(&Options::parse_from(fixed.iter().chain(&own))).unwrap();
            assert_eq!(report.errors, 0, "{report}");
            rps[at].push(report.rps);
            cpu[at].push(report.server_cpu_us.unwrap());
        }
    }
    let ratios =
        |of: &[Vec<f64>; 2]| of[1].iter().zip(&of[0]).map(|(second, first)| second / first).collect::<Vec<f64>>();
    let (of_rps, of_cpu) = (ratios(&rps), ratios(&cpu));
    let [first, second] = kinds;
    println!(
        "depth {depth}: {first} {:.0} req/s, {:.2} µs CPU; {second} {:.0} req/s, {:.2} µs CPU",
        median(rps[0].clone()),
        median(cpu[0].clone()),
        median(rps[1].clone()),
        median(cpu[1].clone()),
    );
    println!("  requests, {second} / {first}: {:.3}   {of_rps:.2?}", median(of_rps.clone()));
    println!("  CPU per request, {second} / {first}: {:.3}   {of_cpu:.2?}", median(of_cpu.clone()));
    (median(of_rps), median(of_cpu))
}
