//! A server whose GPU is an emulated one (kernels/emulator/driver): the driver's library is made by the build, and found in front of any
//! other. The process is the one that serves on a real GPU. Nothing here says anything of a GPU's speed or of its memory model.

mod common;

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::*;
use serde_json::{Value, json};
use tastemaker::catalog::build::BuildOptions;
use tastemaker::catalog::bundle;
use tastemaker::catalog::synthetic::{self, SyntheticOptions};
use tastemaker::index::{
    BruteForce, Exact, Filter, IndexKind, IndexOptions, Kernel, SearchParams, SearchScratch, VectorIndex,
};
use tastemaker::server::Options;

/// How long a server may take to start: kernels are emulated.
const START: Duration = Duration::from_secs(60);

/// A server process.
struct Served {
    child: Child,
    http: SocketAddr,
    admin: SocketAddr,
    /// Fields of the lines of its log up to the one that says that it serves.
    log: Vec<Value>,
    folder: tempfile::TempDir,
}

impl Served {
    fn command(folder: &Path, bundle: &Path, device: &str, script: &str, config: &str, cpus: &str) -> Option<Command> {
        let Some(libraries) = tastemaker_emulator::emulated_cuda() else {
            // Not by `eprintln!`, which the test harness keeps to itself.
            let _ = writeln!(std::io::stderr(), "SKIPPED: no emulated driver: no C++ compiler, or another machine");
            return None;
        };
        let file = folder.join("t.toml");
        std::fs::write(&file, format!("[telemetry]\nlog_json = true\n{config}")).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_tastemaker"));
        command.env("LD_LIBRARY_PATH", libraries).env("EMU_CUDA", script);
        command.env("EMU_CUDA_REPORT", folder.join("report"));
        command.arg("serve").arg(bundle).args(["--device", device, "--no-cache", "--config"]).arg(file);
        command.args(["--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--cpus", cpus]);
        Some(command)
    }

    fn start(device: &str, script: &str, config: &str) -> Option<Self> {
        Self::start_on(bundle_path(), "0", device, script, config)
    }

    fn start_on(bundle: &Path, cpus: &str, device: &str, script: &str, config: &str) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Self::command(folder.path(), bundle, device, script, config, cpus)?;
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
        let (mut log, began) = (Vec::new(), Instant::now());
        let fields = loop {
            let line = lines.next().unwrap_or_else(|| panic!("it ended: {log:?}"));
            assert!(began.elapsed() < START, "{log:?}");
            let Ok(mut line) = serde_json::from_str::<Value>(&line) else { continue };
            log.push(line["fields"].take());
            let fields = log.last().unwrap();
            if fields["message"] == "serving" {
                break fields.clone();
            }
        };
        // What it says later must not fill the pipe.
        std::thread::spawn(move || lines.for_each(drop));
        let addr = |name: &str| fields[name].as_str().unwrap().parse().unwrap();
        Some(Served { http: addr("http"), admin: addr("admin"), child, log, folder })
    }

    fn said(&self, message: &str) -> Vec<&Value> {
        self.log.iter().filter(|fields| fields["message"] == message).collect()
    }

    fn metric(&self, name_and_labels: &str) -> f64 {
        let text = http(self.admin, "GET", "/metrics", "").body;
        let line = text.lines().find_map(|line| line.strip_prefix(name_and_labels)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {name_and_labels} in\n{text}")).parse().unwrap()
    }

    /// Ends it as an operator would; what the driver reported.
    fn stop(mut self) -> String {
        let status = Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status().unwrap();
        assert!(status.success());
        let status = self.child.wait().unwrap();
        let report = std::fs::read_to_string(self.folder.path().join("report")).unwrap_or_default();
        assert!(status.success(), "{status}: {report}");
        report
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // Where a test failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn post(addr: SocketAddr, path: &str, body: &Value) -> Value {
    let response = http(addr, "POST", path, &body.to_string());
    assert_eq!(response.status, 200, "{path} {body}: {}", response.body);
    response.json()
}

/// Questions of all kinds that search.
fn questions(users: std::ops::Range<usize>) -> Vec<(&'static str, Value)> {
    let mut all = Vec::new();
    for user in users {
        let id = format!("user-{user}");
        let ask = json!({"user_id": id, "n_items": 10, "explain": true, "deadline_ms": 10_000});
        all.push(("/v1/recommend", ask));
        match user % 5 {
            0 => all.push(("/v1/search", json!({"user_id": id, "k": 30, "deadline_ms": 10_000}))),
            1 => all
                .push(("/v1/search", json!({"item_id": format!("item-{}", user + 1), "k": 20, "deadline_ms": 10_000}))),
            2 => {
                let vectors: Vec<Vec<f32>> =
                    (0..3).map(|at| (0..16).map(|d| ((d * 7 + at + user) % 5) as f32 - 2.0).collect()).collect();
                all.push(("/v1/search", json!({"vectors": vectors, "k": 15, "deadline_ms": 10_000})));
            }
            3 => all.push((
                "/v1/recommend",
                json!({"user_id": id, "query": "silent city", "n_items": 8, "deadline_ms": 10_000}),
            )),
            _ => {}
        }
    }
    all.push(("/v1/recommend", json!({"user_id": "nobody", "n_items": 10, "deadline_ms": 10_000})));
    all
}

/// Without what differs from run to run.
fn plain(mut answer: Value) -> Value {
    let fields = answer.as_object_mut().unwrap();
    fields.remove("timings_us");
    answer
}

/// Whether both say the same, but for scores that a ranker rounded otherwise.
fn same(got: &Value, want: &Value) -> bool {
    match (got, want) {
        (Value::Object(got), Value::Object(want)) => {
            got.len() == want.len()
                && want.iter().all(|(key, want)| {
                    let score = |value: &Value| (key == "score").then(|| value.as_f64()).flatten();
                    got.get(key).is_some_and(|got| match (score(got), score(want)) {
                        (Some(got), Some(want)) => (got - want).abs() <= 1e-5 * want.abs().max(1.0),
                        _ => same(got, want),
                    })
                })
        }
        (Value::Array(got), Value::Array(want)) => {
            got.len() == want.len() && got.iter().zip(want).all(|(got, want)| same(got, want))
        }
        _ => got == want,
    }
}

#[test]
fn answers_are_the_cpu_s() {
    let Some(gpu) = Served::start(
        "cuda:0",
        "seed=1,delay_us=50",
        // What trends is counted anew beside the requests, by each server in its own time.
        "[device]\npatience_ms = 20000\n[pipeline]\ntrending_k = 0\n",
    ) else {
        return;
    };
    assert_eq!(gpu.said("device chosen")[0]["device"], "cuda:0");
    assert_eq!(gpu.said("serving")[0]["device"], "cuda:0");
    assert!(gpu.said("tables loaded")[0]["memory"].as_str().unwrap().contains("for 600 x 16 vectors"), "{:?}", gpu.log);
    let mut config = config();
    config.cache.enabled = false;
    config.pipeline.trending_k = 0;
    let cpu = start(config, Options::default());
    let compare = |users| {
        let questions = questions(users);
        for (path, ask) in &questions {
            let (got, want) = (plain(post(gpu.http, path, ask)), plain(post(cpu.addrs.http, path, ask)));
            // What is not explained is computed on the device as a whole.
            let is_whole = path == &"/v1/recommend" && ask["explain"] != true;
            assert!(if is_whole { same(&got, &want) } else { got == want }, "{path} {ask}: {got} {want}");
            assert!(!got["items"].as_array().unwrap_or_else(|| got["results"].as_array().unwrap()).is_empty());
        }
        questions.len()
    };
    let recommended =
        |by: &str| gpu.metric(&format!("tastemaker_device_recommendations_total{{device=\"cuda:0\",{by}}}"));
    let n = compare(0..80);
    let before = recommended("by=\"device\"");
    // Items that come, change and go, and what users did.
    for addr in [gpu.http, cpu.addrs.http] {
        let vector = |at: usize| (0..16).map(|d| ((d * 3 + at) % 7) as f32 / 3.0 - 1.0).collect::<Vec<f32>>();
        let items: Vec<Value> =
            (0..8).map(|at| json!({"item_id": format!("item-{}", at * 40), "embedding": vector(at)})).collect();
        post(addr, "/v1/items", &json!({"items": items}));
        for at in 0..90 {
            assert_eq!(http(addr, "DELETE", &format!("/v1/items/item-{}", at * 5 + 1), "").status, 200);
        }
        let events: Vec<Value> = (0..20).map(|at| json!({"user_id": format!("user-{at}"), "item_id": format!("item-{}", at * 7), "kind": "like", "event_id": format!("e{at}")})).collect();
        post(addr, "/v1/events", &json!({"events": events}));
    }
    let n = n + compare(0..30);
    assert_eq!(gpu.metric("tastemaker_device_up{device=\"cuda:0\"}"), 1.0);
    assert_eq!(gpu.metric("tastemaker_device_fenced_total{device=\"cuda:0\"}"), 0.0);
    assert_eq!(gpu.metric("tastemaker_device_jobs_total{device=\"cuda:0\",by=\"device\"}"), n as f64);
    assert!(gpu.metric("tastemaker_device_searches_total{device=\"cuda:0\",settled=\"yes\"}") >= 100.0);
    assert!(recommended("by=\"device\"") >= 16.0, "{}", recommended("by=\"device\""));
    assert!(recommended("by=\"cpu\",reason=\"refused\"") >= 100.0);
    // Also after items came and changed, which were brought there.
    assert!(recommended("by=\"device\"") > before, "{before}");
    assert!(gpu.metric("tastemaker_device_item_updates_total{device=\"cuda:0\"}") >= 8.0);
    // Rankers are timed on the device, too: every recommendation is counted but those of nobody, who has neither a vector nor a history, so that
    // there is no candidate, what trends being off, and no ranker is called.
    let ranked = || gpu.metric("model_inference_latency_seconds_count{model_name=\"demo\"}");
    let all = || recommended("by=\"device\"") + recommended("by=\"cpu\",reason=\"refused\"");
    assert_eq!((ranked(), all()), (132.0, 134.0));
    let of_nobody = json!({"user_id": "nobody", "n_items": 10, "deadline_ms": 10_000});
    post(gpu.http, "/v1/recommend", &of_nobody);
    assert_eq!((ranked(), all()), (132.0, 135.0));
    post(gpu.http, "/v1/recommend", &json!({"user_id": "user-1", "n_items": 10, "deadline_ms": 10_000}));
    assert_eq!((ranked(), all()), (133.0, 136.0));
    assert_eq!(recommended("by=\"cpu\",reason=\"open\""), 0.0);
    let report = gpu.stop();
    assert!(!report.contains("misuse:"), "{report}");
    assert!(report.contains("counts: "), "{report}");
    cpu.shut_down().unwrap();
}

#[test]
fn narrow_tables_rank_the_cpu_s_candidates() {
    let config = "[device]\npatience_ms = 20000\ntables = \"int8\"\n[pipeline]\ntrending_k = 0\n";
    let Some(gpu) = Served::start("cuda:0", "seed=4,delay_us=0", config) else { return };
    assert_eq!(gpu.said("recommendations are computed as a whole on the GPU")[0]["tables"], "int8");
    let mut config = common::config();
    config.cache.enabled = false;
    config.pipeline.trending_k = 0;
    let cpu = start(config, Options::default());
    let (mut common, mut all) = (0, 0);
    for user in 0..30 {
        let ask = json!({"user_id": format!("user-{user}"), "n_items": 10, "deadline_ms": 10_000});
        let ids = |addr| -> Vec<String> {
            let answer = post(addr, "/v1/recommend", &ask);
            answer["items"].as_array().unwrap().iter().map(|item| item["item_id"].to_string()).collect()
        };
        let (got, want) = (ids(gpu.http), ids(cpu.addrs.http));
        common += got.iter().filter(|id| want.contains(id)).count();
        all += want.len();
    }
    println!("{common} of {all} items are the CPU's");
    assert!(common * 100 >= all * 95, "{common} of {all}");
    let by_device = gpu.metric("tastemaker_device_recommendations_total{device=\"cuda:0\",by=\"device\"}");
    assert_eq!(by_device, 30.0);
    let report = gpu.stop();
    assert!(!report.contains("misuse:"), "{report}");
    cpu.shut_down().unwrap();
}

#[test]
fn whatever_fails_every_request_is_answered_and_the_device_comes_back() {
    // A launch fails and the context is lost; making the device anew fails for lack of memory, and succeeds later; then one hangs.
    // Some 35 launches and 38 allocations make a device.
    let script = "seed=2,delay_us=20,fail@200,oom@42,hang@400=4000";
    let Some(gpu) = Served::start("cuda:0", script, "[device]\npatience_ms = 1500\n") else { return };
    let (answered, degraded) = (AtomicU64::new(0), AtomicU64::new(0));
    let done = Arc::new(AtomicBool::new(false));
    let fenced = || gpu.metric("tastemaker_device_fenced_total{device=\"cuda:0\"}");
    let up = || gpu.metric("tastemaker_device_up{device=\"cuda:0\"}");
    std::thread::scope(|scope| {
        for thread in 0..3 {
            let (answered, degraded, done, addr) = (&answered, &degraded, done.clone(), gpu.http);
            scope.spawn(move || {
                for at in 0.. {
                    let ask = json!({"user_id": format!("user-{}", (thread * 29 + at) % 80), "n_items": 10, "deadline_ms": 5000});
                    let began = Instant::now();
                    let answer = post(addr, "/v1/recommend", &ask);
                    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
                    assert_eq!(answer["items"].as_array().unwrap().len(), 10, "{answer}");
                    let flagged = answer["degraded"].as_array().is_some_and(|all| all.iter().any(|one| one["stage"] == "queue"));
                    answered.fetch_add(1, Ordering::Relaxed);
                    degraded.fetch_add(u64::from(flagged), Ordering::Relaxed);
                    if done.load(Ordering::Relaxed) {
                        break;
                    }
                }
            });
        }
        let until = Instant::now() + Duration::from_secs(60);
        // Fenced by the failure, by the lack of memory, and by the hang; and up again.
        while (fenced() < 3.0 || up() < 1.0) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(50));
        }
        done.store(true, Ordering::Relaxed);
    });
    assert!(fenced() >= 3.0 && up() == 1.0, "{} {}", fenced(), up());
    let (answered, degraded) = (answered.into_inner(), degraded.into_inner());
    let of = |labels: &str| gpu.metric(&format!("tastemaker_device_jobs_total{{device=\"cuda:0\",{labels}}}"));
    let (by_device, failed) = (of("by=\"device\""), of("by=\"cpu\",reason=\"failed\""));
    let late = of("by=\"cpu\",reason=\"deadline\"");
    assert_eq!((failed + late, by_device + failed + late), (degraded as f64, answered as f64));
    assert!(degraded > 0 && by_device > 10.0, "{degraded} of {answered}, {by_device}");
    let after = post(gpu.http, "/v1/recommend", &json!({"user_id": "user-1", "deadline_ms": 5000}));
    assert_eq!(after["degraded"].as_array().map_or(0, Vec::len), 0, "{after}");
    let report = gpu.stop();
    assert!(!report.contains("misuse:"), "{report}");
}

#[test]
fn what_can_t_be_used_is_left_or_refused() {
    let little = "[device]\nmemory_bytes = 1000000\n";
    let Some(auto) = Served::start("auto", "delay_us=0", little) else { return };
    assert_eq!(auto.said("serving")[0]["device"], "cpu");
    let warned = auto.said("the device can't be used: the CPU computes");
    assert!(warned[0]["error"].as_str().unwrap().contains("may be used of the"), "{warned:?}");
    let answer = post(auto.http, "/v1/recommend", &json!({"user_id": "user-1"}));
    assert_eq!(answer["degraded"].as_array().map_or(0, Vec::len), 0, "{answer}");
    auto.stop();

    let folder = tempfile::tempdir().unwrap();
    let ran =
        Served::command(folder.path(), bundle_path(), "cuda:0", "delay_us=0", little, "0").unwrap().output().unwrap();
    let said = String::from_utf8(ran.stderr).unwrap();
    assert_eq!(ran.status.code(), Some(1), "{said}");
    assert!(said.contains("device cuda:0") && said.contains("may be used of the"), "{said}");

    let auto = Served::start("auto", "delay_us=0", "[device]\npatience_ms = 20000\n").unwrap();
    assert_eq!(auto.said("serving")[0]["device"], "cuda:0");
    auto.stop();
}

#[test]
fn a_gpu_of_several_that_fails_is_fenced_alone() {
    // The second one fails, some 35 launches after it was made, and comes back; the first goes on.
    let script = "seed=4,delay_us=20,devices=3,fail/1@60";
    let config = "[device]\npatience_ms = 20000\n";
    let Some(gpus) = Served::start_on(bundle_path(), "0,1", "cuda:0,cuda:1", script, config) else { return };
    assert_eq!(gpus.said("device chosen")[0]["device"], "cuda:0,cuda:1");
    assert_eq!(gpus.said("tables loaded").len(), 2);
    let of = |device: usize, name: &str| gpus.metric(&format!("tastemaker_device_{name}{{device=\"cuda:{device}\"}}"));
    let computed =
        |device: usize| gpus.metric(&format!("tastemaker_device_jobs_total{{device=\"cuda:{device}\",by=\"device\"}}"));
    let until = Instant::now() + Duration::from_secs(40);
    let mut came_back_at = None;
    let mut asked = 0;
    while Instant::now() < until {
        // Both workers take part only where there is work for both.
        std::thread::scope(|scope| {
            for user in 0..6 {
                let addr = gpus.http;
                scope.spawn(move || {
                    let ask =
                        json!({"user_id": format!("user-{}", (asked + user) % 80), "n_items": 10, "deadline_ms": 5000});
                    let answer = post(addr, "/v1/recommend", &ask);
                    assert_eq!(answer["items"].as_array().unwrap().len(), 10, "{answer}");
                });
            }
        });
        asked += 6;
        if came_back_at.is_none() && of(1, "fenced_total") >= 1.0 && of(1, "up") == 1.0 {
            came_back_at = Some(computed(1));
        }
        if came_back_at.is_some_and(|before| computed(1) > before) {
            break;
        }
    }
    assert!(came_back_at.is_some_and(|before| computed(1) > before), "{came_back_at:?} of {asked}");
    assert_eq!((of(0, "fenced_total"), of(0, "up"), of(1, "up")), (0.0, 1.0, 1.0));
    assert!(computed(0) > 0.0 && of(0, "memory_bytes") > 0.0 && of(1, "memory_bytes") > 0.0);
    let report = gpus.stop();
    assert!(!report.contains("misuse:"), "{report}");
}

#[test]
fn gpus_are_taken_as_far_as_they_can_be_used() {
    // All that there are; no more than workers; of `auto`, those that have room.
    let Some(all) =
        Served::start_on(bundle_path(), "0,1", "cuda", "delay_us=0,devices=2", "[device]\npatience_ms = 20000\n")
    else {
        return;
    };
    assert_eq!(all.said("serving")[0]["device"], "cuda:0,cuda:1");
    all.stop();
    let one = Served::start_on(bundle_path(), "0", "auto", "delay_us=0,devices=3", "[device]\npatience_ms = 20000\n")
        .unwrap();
    assert_eq!(one.said("serving")[0]["device"], "cuda:0");
    assert_eq!(one.said("more GPUs than workers: the last ones are not used").len(), 1);
    one.stop();
    // The second has no memory for the first thing that it is asked for.
    let script = "delay_us=0,devices=2,oom/1@1";
    let left = Served::start_on(bundle_path(), "0,1", "auto", script, "[device]\npatience_ms = 20000\n").unwrap();
    assert_eq!(left.said("serving")[0]["device"], "cuda:0", "{:?}", left.log);
    assert_eq!(left.said("the device can't be used: the CPU computes")[0]["ordinal"], 1);
    let answer = post(left.http, "/v1/recommend", &json!({"user_id": "user-1"}));
    assert_eq!(answer["degraded"].as_array().map_or(0, Vec::len), 0, "{answer}");
    left.stop();
    let folder = tempfile::tempdir().unwrap();
    let ran =
        Served::command(folder.path(), bundle_path(), "cuda:0,cuda:1", script, "", "0,1").unwrap().output().unwrap();
    let said = String::from_utf8(ran.stderr).unwrap();
    assert!(ran.status.code() == Some(1) && said.contains("device cuda:1: "), "{said}");
}

/// Makes what stands in for cuVS on the emulated driver; `None`, visibly, where there is no C compiler.
fn fake_cuvs(folder: &Path) -> Option<PathBuf> {
    let [source, library] = ["fake.c", "libcuvs_c.so"].map(|name| folder.join(name));
    std::fs::write(&source, include_str!("../src/device/cuda/cuvs/fake.c")).unwrap();
    let cc = std::env::var("CC").unwrap_or_else(|_| "cc".into());
    let mut command = Command::new(&cc);
    command.args(["-DEMULATED", "-shared", "-fPIC", "-w", "-O1"]).arg(source).arg("-o").arg(&library);
    if command.args(["-lm", "-ldl"]).status().is_ok_and(|status| status.success()) {
        return Some(library);
    }
    let _ = writeln!(std::io::stderr(), "SKIPPED: {cc} makes no library");
    None
}

#[test]
fn a_graph_that_a_gpu_made_is_searched_and_changed_by_the_cpu() {
    let Some(libraries) = tastemaker_emulator::emulated_cuda() else {
        let _ = writeln!(std::io::stderr(), "SKIPPED: no emulated driver: no C++ compiler, or another machine");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let Some(_) = fake_cuvs(folder.path()) else { return };
    let (data, bundle) = (folder.path().join("data"), folder.path().join("bundle"));
    synthetic::generate(&data, &SyntheticOptions { n_items: 2200, n_users: 40, dim: 15, seed: 4 }).unwrap();
    let build = |options: &[&str], script: Option<&str>| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tastemaker"));
        command.arg("build").arg(&data).arg("--out").arg(&bundle).args(["--index", "cagra"]).args(options);
        command.env("EMU_CUDA_REPORT", folder.path().join("report")).env("CUDA_VISIBLE_DEVICES", "");
        if let Some(script) = script {
            command.env("LD_LIBRARY_PATH", libraries).env("EMU_CUDA", script);
        }
        let ran = command.output().unwrap();
        let said = String::from_utf8_lossy(&ran.stdout).into_owned() + &String::from_utf8_lossy(&ran.stderr);
        (ran.status.code(), said)
    };
    let cuvs = folder.path().to_str().unwrap();
    // Whatever is missing is said, and nothing is left.
    let refused = [
        (&["--partitions", "2"][..], Some("delay_us=0"), "makes one graph"),
        (&["--n-lists", "9"], Some("delay_us=0"), "does not concern this --index"),
        (&["--device", "cpu"], Some("delay_us=0"), "device cpu: it makes graphs of `--index hnsw`"),
        (&["--device", "cuda:7"], Some("delay_us=0"), "device cuda:7: "),
        (&["--cuvs", "/nowhere"], Some("delay_us=0"), "device cuda: no cuVS"),
        (&["--cuvs", cuvs], Some("delay_us=0,memory=600000"), "of memory; 4096 are needed"),
        (&["--cuvs", cuvs], None, "--index cagra: device cuda: no NVIDIA"),
    ];
    for (options, script, want) in refused {
        let (code, said) = build(options, script);
        assert!(code == Some(1) && said.contains(want), "{options:?}: {code:?} {said}");
        assert!(!bundle.exists());
    }
    let (code, said) =
        build(&["--cuvs", cuvs, "--device", "cuda:0", "--graph-degree", "24"], Some("seed=1,delay_us=20"));
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("graph by CAGRA on cuda:0"), "{said}");
    let report = std::fs::read_to_string(folder.path().join("report")).unwrap();
    assert!(!report.contains("misuse:"), "{report}");

    let generation = bundle::open(&bundle).unwrap();
    let index = generation.index().unwrap();
    assert_eq!(index.kind(), IndexKind::Hnsw);
    let matrix = generation.item_embeddings.as_ref().unwrap();
    let scanned = BruteForce::over(Exact::new(matrix.clone(), generation.metric, Kernel::detect()));
    let users = generation.user_embeddings.as_ref().unwrap();
    let (mut scratch, mut n_found) = (SearchScratch::default(), 0);
    for user in 0..40 {
        let mut query = Vec::new();
        users.extend_row(user, &mut query);
        let mut rows = |index: &dyn VectorIndex, params: &SearchParams| {
            let mut out = Vec::new();
            index.search(&query, 20, Filter::ALL, params, &mut scratch, &mut out);
            out.into_iter().map(|found| found.row).collect::<Vec<_>>()
        };
        let want = rows(&scanned, &SearchParams::default());
        let got = rows(&*index, &SearchParams { ef_search: Some(200), ..SearchParams::default() });
        n_found += want.iter().filter(|row| got.contains(row)).count();
    }
    assert!(n_found >= 760, "recall@20 {}", n_found as f64 / 800.0);

    // Served where there is no GPU, and changed as any other.
    let Some(cpu) = Served::start_on(&bundle, "0", "cpu", "", "") else { return };
    let ask = json!({"item_id": "item-5", "k": 10, "ef_search": 200, "deadline_ms": 10_000});
    let ids = |answer: Value| -> Vec<String> {
        let items = answer["items"].as_array().unwrap();
        items.iter().map(|item| item["item_id"].as_str().unwrap().to_owned()).collect()
    };
    let before = ids(post(cpu.http, "/v1/search", &ask));
    assert_eq!(before.len(), 10);
    assert_eq!(http(cpu.http, "DELETE", &format!("/v1/items/{}", before[0]), "").status, 200);
    let mut vector = Vec::new();
    matrix.extend_row(5, &mut vector);
    post(cpu.http, "/v1/items", &json!({"items": [{"item_id": "new", "embedding": vector}]}));
    let after = ids(post(cpu.http, "/v1/search", &ask));
    assert!(after.contains(&"new".to_owned()) && !after.contains(&before[0]), "{before:?} {after:?}");
    cpu.stop();
}

#[test]
fn an_index_of_cuvs_answers_and_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    // It stands in for cuVS, exactly: what comes out is what an exact index finds.
    let Some(library) = fake_cuvs(folder.path()) else { return };
    // What cuVS opens for its files, and the stand-in does not need.
    std::fs::copy(library, path("libcufile.so.0")).unwrap();
    let index = IndexOptions::of(IndexKind::IvfFlat);
    let (_work, bundle) = build_bundle(&BuildOptions { index, ..BuildOptions::default() });
    let config = format!(
        "[device]\npatience_ms = 20000\nindex = \"bundle\"\ncuvs = {:?}\nindex_cache = {:?}\n[pipeline]\ntrending_k = 0\n",
        folder.path(),
        path("kept")
    );
    let mut exact = common::config();
    exact.cache.enabled = false;
    exact.pipeline.trending_k = 0;
    let cpu = start(exact, Options::default());
    // cuVS does without files where this is missing.
    let is_kept = Path::new("/proc/modules").exists();
    for from in ["made", if is_kept { "read" } else { "made" }] {
        let Some(gpu) = Served::start_on(&bundle, "0", "cuda:0", "seed=1,delay_us=50", &config) else { return };
        let ready = gpu.said("index of cuVS ready");
        assert_eq!(
            (ready.len(), &ready[0]["kind"], &ready[0]["from"]),
            (1, &json!("ivf_flat"), &json!(from)),
            "{:?}",
            gpu.log
        );
        let questions = questions(0..30);
        for (path, ask) in &questions {
            let [got, want] = [gpu.http, cpu.addrs.http].map(|addr| {
                let mut answer = plain(post(addr, path, ask));
                // The bundles differ in their indexes.
                answer.as_object_mut().unwrap().remove("model_version");
                answer
            });
            assert_eq!(got, want, "{path} {ask}");
        }
        let searches = |settled: &str| {
            gpu.metric(&format!("tastemaker_device_searches_total{{device=\"cuda:0\",settled=\"{settled}\"}}"))
        };
        assert!(searches("yes") >= 30.0, "{}, {} not", searches("yes"), searches("no"));
        assert!(gpu.metric("tastemaker_device_index_searches_total{device=\"cuda:0\"}") >= 30.0);
        let report = gpu.stop();
        assert!(!report.contains("misuse:"), "{report}");
    }
    cpu.shut_down().unwrap();
}
