//! The binary port as it serves (its ring inside a glommio executor) against the same engine alone in a thread: requests per second
//! and CPU per request of the full path socket → queue → worker → queue → socket, with a worker that computes nothing.
//!
//! `cargo bench -p loadgen --bench hot_port`. Bars: ≥ 0.90 × the requests and ≤ 1.15 × the CPU per request, medians of
//! interleaved rounds, 64 connections. The server runs on the first CPU, the load on the second.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Parser;
use loadgen::{Options, engine, run};
use tastemaker::catalog::generation::Generation;
use tastemaker::catalog::synthetic::{self, SyntheticOptions};
use tastemaker::catalog::{build, bundle};
use tastemaker::config::Config;
use tastemaker::device::batcher::BatchLimits;
use tastemaker::device::sim::{Script, SimDevice};
use tastemaker::device::worker::{self, JobSink};
use tastemaker::server::ring::{Engine, EngineConfig};
use tastemaker::server::service::{Service, Shared};
use tastemaker::server::shard::BinaryPort;
use tastemaker::server::{DeviceKind, Server, http, signals};

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
            worker::run(&mut SimDevice::new(Script::default()), &shared.jobs, 0, BatchLimits::CPU, &sink);
        }
    });
    signals::pin(0);
    let listener = http::listen(shared.config.server.listen).unwrap();
    println!("{}", listener.local_addr().unwrap());
    let limits = EngineConfig {
        max_frame_bytes: 1 << 20,
        max_output_bytes: 4 << 20,
        max_connections: 4096,
        idle_timeout: Duration::from_secs(600),
    };
    let mut engine = Engine::new(listener, limits).unwrap();
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
        return if kind == "raw" { serve_raw(generation) } else { serve_hybrid(generation) };
    }
    let work = tempfile::tempdir().unwrap();
    let (data, out) = (work.path().join("data"), work.path().join("bundle"));
    synthetic::generate(&data, &SyntheticOptions { n_items: 500, n_users: 100, dim: 8, seed: 1 }).unwrap();
    build::build(&data, &out, &Default::default(), &build::Silent).unwrap();
    engine::pin(1);
    println!(
        "full path, trivial worker, 64 connections, {ROUNDS} interleaved rounds of {SECONDS} s; medians, then per round"
    );
    let mut passed = true;
    for depth in DEPTHS {
        let (mut rps, mut cpu) = ([const { Vec::new() }; 2], [const { Vec::new() }; 2]);
        for round in 0..ROUNDS {
            for at in if round % 2 == 0 { [0, 1] } else { [1, 0] } {
                let serving = Serving::start(["raw", "hybrid"][at], &out);
                let pid = serving.child.id().to_string();
                let options = Options::parse_from([
                    "loadgen",
                    "--addr",
                    &serving.addr,
                    "-c",
                    "64",
                    "--depth",
                    depth,
                    "--seconds",
                    SECONDS,
                    "--warmup",
                    "0.5",
                    "--n-users",
                    "100",
                    "--server-pid",
                    &pid,
                ]);
                let report = run::run(&options).unwrap();
                assert_eq!(report.errors, 0, "{report}");
                rps[at].push(report.rps);
                cpu[at].push(report.server_cpu_us.unwrap());
            }
        }
        let ratios =
            |of: &[Vec<f64>; 2]| of[1].iter().zip(&of[0]).map(|(hybrid, raw)| hybrid / raw).collect::<Vec<f64>>();
        let (of_rps, of_cpu) = (ratios(&rps), ratios(&cpu));
        println!(
            "depth {depth}: raw {:.0} req/s, {:.2} µs CPU; hybrid {:.0} req/s, {:.2} µs CPU",
            median(rps[0].clone()),
            median(cpu[0].clone()),
            median(rps[1].clone()),
            median(cpu[1].clone()),
        );
        println!("  requests, hybrid / raw: {:.3}   {of_rps:.2?}", median(of_rps.clone()));
        println!("  CPU per request, hybrid / raw: {:.3}   {of_cpu:.2?}", median(of_cpu.clone()));
        passed &= median(of_rps) >= 0.90 && median(of_cpu) <= 1.15;
    }
    println!("bars (>= 0.90 requests, <= 1.15 CPU): {}", if passed { "met" } else { "MISSED" });
}
