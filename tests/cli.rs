//! The command line as a process: exit codes, what goes to which stream, one line for what went wrong.

mod common;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use arrow_array::{ArrayRef, Float32Array, RecordBatch, StringArray};
use common::*;
use parquet::arrow::ArrowWriter;
use tastemaker::catalog::synthetic::{self, SyntheticOptions};

/// What a command left.
#[derive(Debug)]
struct Ran {
    code: Option<i32>,
    out: String,
    err: String,
}

fn run<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Ran {
    let output = Command::new(env!("CARGO_BIN_EXE_tastemaker")).args(arguments).output().unwrap();
    Ran {
        code: output.status.code(),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

impl Ran {
    #[track_caller]
    fn ok(self) -> Self {
        assert_eq!(self.code, Some(0), "{self:?}");
        self
    }

    /// Failed with one line for a person, and nothing on standard output.
    #[track_caller]
    fn failed(&self) -> &str {
        assert_eq!(self.code, Some(1), "{self:?}");
        assert_eq!(self.out, "", "{self:?}");
        let line = self.err.strip_suffix('\n').unwrap();
        assert!(line.starts_with("tastemaker: ") && !line.contains('\n'), "{self:?}");
        line
    }

    #[track_caller]
    fn misused(&self) -> &str {
        assert_eq!(self.code, Some(2), "{self:?}");
        assert_eq!(self.out, "", "{self:?}");
        &self.err
    }
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn dataset(work: &Path) -> PathBuf {
    let data = work.join("data");
    synthetic::generate(&data, &SyntheticOptions { n_items: 200, n_users: 20, dim: 8, seed: 4 }).unwrap();
    data
}

#[test]
fn every_command_has_help() {
    let top = run(["--help"]).ok();
    assert!(top.out.contains("Exit codes: 0 ok, 1 failed, 2 usage."), "{}", top.out);
    let listed = top.out.split("Commands:\n").nth(1).unwrap().split("\n\n").next().unwrap();
    let commands: Vec<&str> = listed.lines().filter_map(|line| line.split_whitespace().next()).collect();
    let all = "demo build serve recommend eval tune inspect check precompute plan store features help";
    assert_eq!(commands.join(" "), all, "{listed}");
    for command in commands.into_iter().filter(|c| *c != "help") {
        let help = run([command, "--help"]).ok();
        assert!(help.out.contains(&format!("Usage: tastemaker {command}")), "{}", help.out);
        assert!(help.out.lines().next().is_some_and(|line| line.contains(' ')), "{}", help.out);
        assert_eq!(help.err, "");
        // Every option says what it is for.
        let options = help.out.split("Options:\n").nth(1).unwrap();
        for line in options.lines().filter(|l| l.trim_start().starts_with('-')) {
            let described = line.trim().contains("  ");
            let next = options.lines().skip_while(|l| l != &line).nth(1).is_some_and(|l| l.starts_with("          "));
            assert!(described || next, "{command}: {line}");
        }
    }
    assert!(run(["--version"]).ok().out.starts_with("tastemaker "));
}

#[test]
fn misuse_is_2() {
    assert!(run::<&str>([]).misused().contains("Usage: tastemaker"));
    assert!(run(["bild"]).misused().contains("'build'"));
    assert!(run(["store"]).misused().contains("Usage: tastemaker store"));
    assert!(run(["store", "push", "x"]).misused().contains("--kind"));
    assert!(run(["inspect"]).misused().contains("<BUNDLE>"));
    assert!(run(["inspect", "x", "--jsn"]).misused().contains("'--json'"));
    assert!(run(["build", "x"]).misused().contains("--out"));
    assert!(run(["build", "x", "--out", "y", "--index", "scann"]).misused().contains("brute_force"));
    assert!(run(["build", "x", "--out", "y", "--index", "cagra", "--device", "gpu"]).misused().contains("cuda:N"));
    assert!(run(["eval", "x", "--test", "y", "--k", "0"]).misused().contains("1..=10000"));
    assert!(run(["eval", "x", "--test", "y", "--relevant", "rating"]).misused().contains("COLUMN>=NUMBER"));
    assert!(run(["recommend", "u", "--context", "country"]).misused().contains("KEY=VALUE"));
    assert!(run(["recommend", "u", "--addr", "nowhere"]).misused().contains("socket address"));
    assert!(run(["demo", "--dim", "1"]).misused().contains("2..=1024"));
}

#[test]
fn failure_is_1_and_one_line() {
    let work = tempfile::tempdir().unwrap();
    let nowhere = work.path().join("nowhere");
    assert!(run(["inspect", path(&nowhere)]).failed().contains("not a bundle"));
    assert!(run(["serve", path(&nowhere)]).failed().contains("not a bundle"));
    assert!(run(["check", "--config", path(&nowhere)]).failed().contains("No such file"));
    assert!(run(["eval", path(&nowhere), "--test", "t.parquet"]).failed().contains("not a bundle"));
    let missing = run(["eval", path(bundle_path()), "--test", path(&nowhere)]);
    assert!(missing.failed().contains(path(&nowhere)));
    let missing = run(["features", path(bundle_path()), "--users", path(&nowhere), "--columns", "c", "--out", "o"]);
    assert!(missing.failed().contains(path(&nowhere)));
}

#[test]
fn plan_says_how_many_replicas() {
    let work = tempfile::tempdir().unwrap();
    let (profile, plot, made) = (work.path().join("p.toml"), work.path().join("p.svg"), work.path().join("made.toml"));
    let text = "name = \"t\"\ncpus = 2\nhit_us = 2.5\nwake_us = 100.0\ntransit_us = 50.0\n\
        [miss]\ncpu_us = [[0.0, 100.0], [0.5, 200.0], [1.0, 400.0]]\n";
    std::fs::write(&profile, text).unwrap();
    let ask = |more: &[&str]| {
        let always = ["plan", "--profile", path(&profile), "--requests", "20000"];
        run(always.iter().chain(more).copied().collect::<Vec<_>>())
    };
    let load = ["--rps", "100000", "--p99-ms", "5", "--hit-ratio", "0.5"];
    let json: serde_json::Value =
        serde_json::from_str(&ask(&[&load[..], &["--json", "--plot", path(&plot)]].concat()).ok().out).unwrap();
    // Half of the calls at 225 us and half at 2.5 us: 17,582 a second from two CPUs at most; .15 must be free.
    let replicas = json["replicas"].as_u64().unwrap();
    assert!((7..=9).contains(&replicas), "{json}");
    assert!(json["all"]["p99_ms"].as_f64().unwrap() <= 5.0 && json["all"]["keeps_up"] == true, "{json}");
    assert!(json["one_lost"]["cpu"].as_f64() > json["all"]["cpu"].as_f64(), "{json}");
    assert_eq!(json["bottleneck"], "CPU");
    assert!(std::fs::read_to_string(&plot).unwrap().starts_with("<svg"));
    let table = ask(&load).ok().out;
    assert!(table.contains(&format!("replicas: {replicas} keep p99 at 5 ms")) && table.contains("one lost"), "{table}");
    assert!(ask(&["--rps", "20000"]).ok().out.contains("does not keep up"));

    assert!(ask(&["--rps", "1000", "--p99-ms", "0.1"]).failed().contains("no number of replicas"));
    assert!(ask(&["--rps", "0"]).failed().contains("--rps 0: must be above 0"));
    assert!(ask(&["--rps", "1", "--hit-ratio", "2"]).failed().contains("--hit-ratio 2: must be 0 to 1"));
    std::fs::write(&profile, text.replace("cpus = 2", "cpus = 0")).unwrap();
    assert!(ask(&["--rps", "1"]).failed().contains("cpus: must be at least 1"));

    let run_of = |name: &str, offered: u32, rps: u32, us: u32| {
        let file = work.path().join(name);
        let json = serde_json::json!({
            "offered_rps": offered, "rps": rps, "errors": 0, "server_cpu_us": us, "p50_ms": 0.5, "p99_ms": 1.5,
        });
        std::fs::write(&file, json.to_string()).unwrap();
        file
    };
    let (saturated, light) = (run_of("s.json", 0, 4000, 250), run_of("l.json", 800, 800, 330));
    let fit = |saturated: &Path| {
        let files = ["--saturated", path(saturated), "--light", path(&light), "--write-profile", path(&made)];
        run([&["plan", "--rps", "2000", "--requests", "20000"][..], &files].concat())
    };
    assert!(fit(&saturated).ok().out.contains("one replica"));
    assert!(std::fs::read_to_string(&made).unwrap().contains("wake_us"));
    assert!(fit(&light).failed().contains("saturated: must be a closed loop"));
    std::fs::write(&saturated, "{}").unwrap();
    assert!(fit(&saturated).failed().contains("s.json: not a run of loadgen --json"));
    assert!(run(["plan", "--rps", "1"]).misused().contains("--profile"));
}

#[test]
fn nobody_to_ask() {
    // A port that was free a moment ago, and where nobody listens.
    let addr = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let ran = run(["recommend", "user-1", "--addr", &addr.to_string()]);
    let line = ran.failed();
    assert!(line.contains(&addr.to_string()) && line.contains("is `tastemaker serve` running there?"), "{line}");
}

#[test]
fn asks_a_server() {
    let server = start(config(), Default::default());
    let addr = server.addrs.binary.to_string();
    let ran = run(["recommend", "user-1", "-n", "3", "--addr", &addr, "--explain", "--timings"]).ok();
    assert_eq!(ran.out.lines().filter(|line| line.contains("item-")).count(), 3, "{}", ran.out);
    assert!(ran.out.contains("known user") && ran.out.contains("µs: "), "{}", ran.out);
    let ran = run(["recommend", "user-1", "-n", "100000", "--addr", &addr]);
    assert!(ran.failed().contains("n_items"), "{ran:?}");
    server.shut_down().unwrap();
}

#[test]
fn check_names_what_is_wrong() {
    let work = tempfile::tempdir().unwrap();
    let file = work.path().join("t.toml");
    let check = |text: &str, bundle: Option<&Path>| {
        std::fs::write(&file, text).unwrap();
        run(["check", "--device", "cpu", "--config", path(&file)].into_iter().chain(bundle.map(path)))
    };
    assert_eq!(check("", None).ok().out, format!("{}: ok\n", file.display()));
    assert_eq!(check("", Some(bundle_path())).ok().out, format!("{}: ok\n", file.display()));
    let unknown = check("[cache]\nttl_second = 5\n", None);
    let want = format!("tastemaker: {}:2: unknown key `ttl_second`; did you mean `ttl_seconds`?", file.display());
    assert_eq!(unknown.failed(), want);
    assert!(check("[cache]\nttl_seconds = 0\n", None).failed().contains("ttl_seconds"));
    // There is no GPU that it would be asked of.
    let ran = check("[pipeline.engines]\ndemo = \"tensorrt\"\n", Some(bundle_path()));
    assert!(ran.failed().contains("ranker `demo`: not on engine `tensorrt`"), "{ran:?}");
    // A rule that is sound by itself, over a column that this bundle lacks.
    let rule = "[[rerank.rules]]\nname = \"r\"\naction = \"exclude\"\nwhere = { pirce = { ge = 5 } }\n";
    check(rule, None).ok();
    let ran = check(rule, Some(bundle_path()));
    assert!(ran.failed().contains("pirce") && ran.failed().contains("price"), "{ran:?}");
}

#[test]
fn inspect_for_people_and_programs() {
    let ran = run(["inspect", path(bundle_path())]).ok();
    assert!(ran.out.contains("checksums verified") && ran.out.contains("ranker        demo: "), "{}", ran.out);
    assert!(ran.out.lines().any(|l| l.split_whitespace().eq(["items", "600"])), "{}", ran.out);
    let info: serde_json::Value =
        serde_json::from_str(&run(["inspect", "--json", path(bundle_path())]).ok().out).unwrap();
    assert_eq!((&info["n_items"], &info["n_users"], &info["dim"]), (&600.into(), &80.into(), &16.into()));
    assert_eq!(info["version"], generation().version);
    assert_eq!(info["roles"]["category"], "category");
    assert!(info["rankers"]["demo"].as_array().is_some_and(|columns| !columns.is_empty()));
}

#[test]
fn build_speaks_plainly_to_a_pipe() {
    let work = tempfile::tempdir().unwrap();
    let (data, out) = (dataset(work.path()), work.path().join("bundle"));
    let ran = run(["build", path(&data), "--out", path(&out)]).ok();
    assert!(!ran.err.contains(['\r', '\u{1b}']), "{ran:?}");
    let stages: Vec<&str> = ran.err.lines().filter_map(|line| line.strip_suffix(" …")).collect();
    assert_eq!(stages, ["reading dataset", "item-item neighbours", "text index", "writing bundle"], "{ran:?}");
    let line = ran.out.trim_end();
    assert!(line.starts_with(path(&out)) && line.contains("(200 items, 20 users, "), "{ran:?}");

    let again = run(["build", path(&data), "--out", path(&out)]);
    assert!(again.failed().contains("--overwrite"));
    let replaced = run(["build", path(&data), "--out", path(&out), "--overwrite"]).ok();
    let version = |ran: &Ran| ran.out.split(": ").nth(1).unwrap().split(' ').next().unwrap().to_owned();
    assert_eq!(version(&replaced), version(&ran));

    std::fs::remove_file(data.join("items.parquet")).unwrap();
    let ran = run(["build", path(&data), "--out", path(&work.path().join("other"))]);
    assert_eq!(ran.code, Some(1));
    assert!(ran.err.lines().last().is_some_and(|l| l.starts_with("tastemaker: ") && l.contains("items.parquet")));
}

#[test]
fn an_index_in_partitions_is_built_inspected_and_tuned() {
    let work = tempfile::tempdir().unwrap();
    let (data, out) = (dataset(work.path()), work.path().join("bundle"));
    let build = |partitions| {
        run([
            "build",
            path(&data),
            "--out",
            path(&out),
            "--overwrite",
            "--index",
            "ivf_flat",
            "--partitions",
            partitions,
        ])
    };
    assert!(build("0").failed().contains("--partitions 0: must be 1 to 256"));
    assert!(build("257").failed().contains("must be 1 to 256"));
    build("3").ok();
    let shown = |what: &str| run(["inspect", path(&out)]).ok().out.lines().any(|line| line.contains(what));
    assert!(shown("ivf_flat in 3 partitions") && !shown("when tuned"));
    let tuned = run(["tune", path(&out), "--recall", "0.9", "--k", "20"]).ok();
    assert!(tuned.out.contains("ivf_flat in 3 partitions, n_probes "), "{tuned:?}");
    assert!(shown("when tuned"));
}

#[test]
fn build_tries_the_rankers() {
    let work = tempfile::tempdir().unwrap();
    let data = dataset(work.path());
    let engines = Path::new(env!("CARGO_MANIFEST_DIR")).join("engines");
    let manifest = std::fs::read_to_string(engines.join("demo.toml")).unwrap();
    let model = std::fs::read(engines.join("demo.onnx")).unwrap();
    std::fs::create_dir(data.join("rankers")).unwrap();
    let out = work.path().join("bundle");
    for (model, manifest, wanted) in [
        (&model[..model.len() / 2], manifest.clone(), "demo.onnx: "),
        (&model[..], manifest.replace("cross.dot", "cross.dots"), "did you mean `cross.dot`?"),
        (&model[..], manifest.replace("name = \"score\"", "name = \"scores\""), "no output `scores`"),
    ] {
        std::fs::write(data.join("rankers/demo.onnx"), model).unwrap();
        std::fs::write(data.join("rankers/demo.toml"), manifest).unwrap();
        let ran = run(["build", path(&data), "--out", path(&out)]);
        assert_eq!(ran.code, Some(1), "{ran:?}");
        let line = ran.err.lines().last().unwrap();
        assert!(line.contains(wanted) && line.contains(path(&data.join("rankers"))), "{line}");
        assert!(!line.contains(".tastemaker-build-"), "{line}");
        assert_eq!(std::fs::read_dir(work.path()).unwrap().count(), 1, "nothing is left behind");
    }
}

#[test]
fn nobody_reads() {
    let work = tempfile::tempdir().unwrap();
    let (data, out) = (dataset(work.path()), work.path().join("bundle"));
    run(["build", path(&data), "--out", path(&out)]).ok();
    let mut child = Command::new(env!("CARGO_BIN_EXE_tastemaker"))
        .args(["inspect", path(&out)])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), &*String::from_utf8_lossy(&output.stderr)), (Some(0), ""));

    // Output that is lost otherwise is a failure.
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let output =
        Command::new(env!("CARGO_BIN_EXE_tastemaker")).args(["inspect", path(&out)]).stdout(full).output().unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(1) && err.contains("No space left on device"), "{err}");
}

#[test]
fn eval_prints_a_table_or_json() {
    let work = tempfile::tempdir().unwrap();
    let test = work.path().join("test.parquet");
    // What ten users did not do, and an item that the bundle does not know.
    let generation = generation();
    let (mut users, mut items, mut ratings) = (Vec::new(), Vec::new(), Vec::new());
    for user in 0..10 {
        let seen: Vec<u32> = generation.histories.of(user).map(|entry| entry.row).collect();
        let unseen = (0..600).filter(|row| !seen.contains(row));
        for (at, row) in unseen.step_by(20).enumerate() {
            users.push(generation.users.ids.id(user));
            items.push(generation.items.ids.id(row));
            ratings.push((at % 5 + 1) as f32);
        }
    }
    items[0] = "unknown";
    let columns: [(&str, ArrayRef); 3] = [
        ("user_id", Arc::new(StringArray::from(users))),
        ("item_id", Arc::new(StringArray::from(items))),
        ("rating", Arc::new(Float32Array::from(ratings))),
    ];
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    let mut writer = ArrowWriter::try_new(std::fs::File::create(&test).unwrap(), batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();

    let arguments = ["eval", path(bundle_path()), "--test", path(&test), "--k", "50,5", "--relevant", "rating>=4"];
    let table = run(arguments).ok();
    let mut lines = table.out.lines();
    assert!(lines.next().unwrap().starts_with(&format!("{}: 10 users, ", generation.version)), "{}", table.out);
    let head = lines.next().unwrap();
    assert!(head.find("recall@5 ").unwrap() < head.find("recall@50").unwrap(), "{head}");
    let rows: Vec<&str> = lines.map(|line| line[..22].trim_end()).collect();
    assert_eq!(rows[..2], ["slate", "merged"]);
    assert!(rows.contains(&"ann alone") && rows.contains(&"trending alone"), "{rows:?}");

    let json = run(arguments.into_iter().chain(["--json"])).ok();
    let report: serde_json::Value = serde_json::from_str(&json.out).unwrap();
    assert_eq!((&report["users"], &report["generation"]), (&10.into(), &generation.version.as_str().into()));
    let slate = &report["rows"][0];
    assert_eq!(slate[0], "slate");
    let recall = |k: &str| slate[1]["recall"][k].as_f64().unwrap();
    assert!(0.0 <= recall("5") && recall("5") <= recall("50") && recall("50") <= 1.0, "{slate}");
    // Evaluation of the same bundle by the same file is the same.
    assert_eq!(run(arguments.into_iter().chain(["--json"])).ok().out, json.out);

    let few = run(arguments.into_iter().chain(["--users", "3", "--json"])).ok();
    assert_eq!(serde_json::from_str::<serde_json::Value>(&few.out).unwrap()["users"], 3);
    let none = run(["eval", path(bundle_path()), "--test", path(&test), "--relevant", "rating>9"]);
    assert!(none.failed().contains("no relevant rows"));
    let no_column = run(["eval", path(bundle_path()), "--test", path(&test), "--item-column", "book"]);
    assert!(no_column.failed().contains("`book`"));
}

#[test]
fn demo_prints_a_slate() {
    let ran = run(["demo", "--once", "--items", "300", "--users", "50", "--dim", "8"]).ok();
    assert!(ran.out.starts_with("built 300 items and 50 users"), "{}", ran.out);
    let slate = ran.out.split("rank   score  item\n").nth(1).unwrap();
    let ranked = slate.lines().filter(|l| l.split_whitespace().next().is_some_and(|n| n.parse::<u32>().is_ok()));
    assert_eq!(ranked.count(), 10, "{}", ran.out);
    assert!(ran.out.contains("recommended to a user never seen before"), "{}", ran.out);
}

#[test]
fn slates_made_ahead_are_what_the_server_computes() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("slates");
    let precompute = |users: &str, out: &Path| {
        let bundle = path(bundle_path());
        run(["precompute", bundle, "--users", users, "--n-items", "10,3", "--out", path(out)])
    };
    let list = dir.path().join("users");
    std::fs::write(&list, "user-1\n\n user-2\nnobody\n").unwrap();
    assert!(precompute(path(&list), &file).ok().out.contains("6 slates of 3 users"));
    assert!(precompute("top:5", &dir.path().join("top")).ok().out.contains("10 slates of 5 users"));
    assert!(precompute("top:x", &file).failed().contains("--users top:x"));
    assert!(precompute("/nowhere", &file).failed().contains("/nowhere"));

    let mut config = config();
    config.cache.precomputed = file.clone();
    let server = start(config.clone(), Default::default());
    let mut client = client(&server);
    let call = |user, n| tastemaker::api::RecommendCall::new(user, n);
    let mut ask = |call: tastemaker::api::RecommendCall<'_>| {
        let answer = client.recommend(&call).unwrap();
        let items: Vec<_> = answer.items.iter().map(|item| (item.item_id.clone(), item.score, item.sources)).collect();
        (answer.cache, answer.known_user, items)
    };
    for user in ["user-1", "user-2", "nobody"] {
        for n in [10, 3] {
            let (cache, known, items) = ask(call(user, n));
            assert_eq!(cache, "precomputed");
            let fresh = ask(tastemaker::api::RecommendCall { no_cache: true, ..call(user, n) });
            assert_eq!(fresh, ("bypass".to_owned(), known, items));
        }
    }
    assert_eq!(metric(&server, "recommendation_cache_hits_total{cache_level=\"precomputed\"}"), 6.0);
    // Another length, a context, another user: not made.
    assert_eq!(ask(call("user-1", 4)).0, "miss");
    assert_eq!(ask(tastemaker::api::RecommendCall { context: &[("device", "tv")], ..call("user-1", 10) }).0, "miss");
    assert_eq!(ask(call("user-3", 10)).0, "miss");
    // Nor for one of whom something new is known.
    let (_, _, before) = ask(call("user-2", 10));
    let event = tastemaker::api::Event::new("user-2", &before[0].0, "click");
    common::client(&server).put_events(&[event], false).unwrap();
    let (cache, _, after) = ask(call("user-2", 10));
    assert_eq!(cache, "miss");
    assert!(after.iter().all(|item| item.0 != before[0].0));
    // Nor one with an item that is gone.
    let (cache, _, before) = ask(call("nobody", 3));
    assert_eq!(cache, "precomputed");
    common::client(&server).delete_items(&[&before[0].0], false).unwrap();
    let (cache, _, after) = ask(call("nobody", 3));
    assert_eq!((cache.as_str(), after.len()), ("miss", 3));
    assert!(after.iter().all(|item| item.0 != before[0].0));
    server.shut_down().unwrap();

    // Made under another configuration, or too long ago: not served.
    let mut other = config.clone();
    other.pipeline.trending_k += 1;
    let mut old = config.clone();
    old.cache.precomputed_max_age_seconds = 1;
    std::thread::sleep(std::time::Duration::from_millis(2100));
    for config in [other, old] {
        let server = start(config, Default::default());
        let answer = common::client(&server).recommend(&call("user-1", 10)).unwrap();
        assert_eq!(answer.cache, "miss");
        server.shut_down().unwrap();
    }
    std::fs::write(&file, "no slates").unwrap();
    let error = tastemaker::server::Server::start(generation(), config, Default::default()).err().unwrap();
    assert!(format!("{error:#}").contains("cache.precomputed"), "{error:#}");
}
