//! What the program says and ends with: where there is nothing to check, and on the emulated driver.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use serde_json::Value;

fn gpu_check(arguments: &[&str]) -> (Option<i32>, String) {
    let Output { status, stdout, stderr } =
        Command::new(env!("CARGO_BIN_EXE_gpu_check")).args(arguments).output().unwrap();
    (status.code(), String::from_utf8_lossy(&stdout).into_owned() + &String::from_utf8_lossy(&stderr))
}

#[test]
fn without_a_gpu_it_says_so() {
    let folder = tempfile::tempdir().unwrap();
    // None that is there is seen.
    let out = folder.path().to_str().unwrap();
    let ran = Command::new(env!("CARGO_BIN_EXE_gpu_check"))
        .args(["run", "--quick", "--out", out])
        .env("CUDA_VISIBLE_DEVICES", "")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&ran.stderr);
    assert_eq!(ran.status.code(), Some(3), "{said}");
    assert!(said.starts_with("gpu_check: no NVIDIA ") && said.lines().count() == 1, "{said}");
    assert!(std::fs::read_dir(out).unwrap().next().is_none());
}

#[test]
fn what_makes_no_sense_is_refused() {
    let (code, said) = gpu_check(&["run", "--only", "kernels,fun"]);
    let want = "gpu_check: --only fun: expected kernels, engine, cuvs, bench-kernels, bench-pipeline, tensorrt, \
                bench-engine, bench-exact, tests, bench-cuvs, sanitizer\n";
    assert_eq!((code, said.as_str()), (Some(1), want));
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path().to_str().unwrap();
    let (code, said) = gpu_check(&["unpack", at, "--into", at]);
    let want = "gpu_check: manifest.json is missing: it lies beside the first piece\n";
    assert_eq!((code, said.as_str()), (Some(1), want));
    assert_eq!(gpu_check(&["unpack", "--into", at]).0, Some(2));
}

/// A run on the emulated driver, told what goes wrong there; its code, what it printed, and `gpu.json`. `None`, visibly, without one.
fn on_the_emulated_driver(script: &str, out: &Path, arguments: &[&str]) -> Option<(Option<i32>, String, Value)> {
    beside_the_emulated_driver(None, script, out, arguments)
}

/// The same with libraries of a folder.
fn beside_the_emulated_driver(
    folder: Option<&Path>,
    script: &str,
    out: &Path,
    arguments: &[&str],
) -> Option<(Option<i32>, String, Value)> {
    let Some(libraries) = tastemaker_emulator::emulated_cuda() else {
        // Not by `eprintln!`, which the test harness keeps to itself.
        let _ = writeln!(std::io::stderr(), "SKIPPED: no emulated driver: no C++ compiler, or another machine");
        return None;
    };
    let mut command = Command::new(env!("CARGO_BIN_EXE_gpu_check"));
    command.args(["run", "--quick", "--seed", "1", "--out"]).arg(out).args(arguments);
    let folders = std::env::join_paths(folder.into_iter().chain([libraries])).unwrap();
    command.env("LD_LIBRARY_PATH", folders).env("EMU_CUDA", script).env("EMU_CUDA_REPORT", out.join("report"));
    let ran = command.output().unwrap();
    let said = String::from_utf8_lossy(&ran.stdout).into_owned() + &String::from_utf8_lossy(&ran.stderr);
    let report = std::fs::read_to_string(out.join("report")).unwrap_or_default();
    assert!(!report.contains("misuse:"), "{report}");
    let json = std::fs::read_to_string(out.join("gpu.json")).unwrap_or_else(|error| panic!("{error}: {said}"));
    Some((ran.status.code(), said, serde_json::from_str(&json).unwrap()))
}

/// Compiles a stand-in for a library; `false`, visibly, where there is no C compiler.
fn compiled(source: &str, to: &Path) -> bool {
    let file = to.with_extension("c");
    std::fs::write(&file, source).unwrap();
    let mut compiler = Command::new(std::env::var("CC").unwrap_or_else(|_| "cc".into()));
    compiler.args(["-DEMULATED", "-shared", "-fPIC", "-w", "-O2"]).arg(file).arg("-o").arg(to).args(["-lm", "-ldl"]);
    match compiler.status() {
        Ok(status) => assert!(status.success()),
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "SKIPPED: no C compiler: {error}");
            return false;
        }
    }
    true
}

#[test]
fn on_the_emulated_driver_exact_search_is_measured_with_cublaslt_and_without() {
    let (out, library) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    if !compiled(include_str!("fake_cublaslt.c"), &library.path().join("libcublasLt.so")) {
        return;
    }
    let (script, arguments) = ("seed=2,delay_us=0", ["--only", "bench-exact"]);
    let ran = beside_the_emulated_driver(Some(library.path()), script, out.path(), &arguments);
    let Some((code, said, json)) = ran else { return };
    assert_eq!(code, Some(0), "{said}");
    let of = |json: &Value| -> Vec<(String, f64)> {
        let all = json["searches"].as_array().unwrap();
        all.iter().map(|one| (one["kind"].as_str().unwrap().to_owned(), one["recall"].as_f64().unwrap())).collect()
    };
    let found = of(&json);
    // In each way, for both k and batches.
    let kinds = ["our scores, f32", "our scores, bf16", "cuBLASLt, f32", "cuBLASLt, tf32", "cuBLASLt, bf16"]
        .map(|kind| [kind; 4]);
    let want: Vec<String> = kinds.as_flattened().iter().map(|kind| format!("exact, {kind}")).collect();
    assert_eq!(found.iter().map(|one| one.0.clone()).collect::<Vec<_>>(), want, "{said}");
    assert!(found.iter().all(|(kind, recall)| *recall > if kind.ends_with("bf16") { 0.9 } else { 0.999 }), "{found:?}");
    let out = tempfile::tempdir().unwrap();
    let (code, said, json) = on_the_emulated_driver(script, out.path(), &arguments).unwrap();
    assert_eq!((code, of(&json).len()), (Some(0), 8), "{said}");
    let note = json["notes"][0].as_str().unwrap();
    assert!(note.starts_with("exact search by cuBLASLt: not run: "), "{note}");
}

#[test]
fn on_the_emulated_driver_kernels_and_engine_agree_with_the_cpu() {
    let (out, cuvs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    if !compiled(include_str!("../../../src/device/cuda/cuvs/fake.c"), &cuvs.path().join("libcuvs_c.so")) {
        return;
    }
    let folder = cuvs.path().to_str().unwrap();
    let arguments = ["--only", "kernels,engine", "--shapes", "1", "--cuvs", folder];
    let Some((code, said, json)) = on_the_emulated_driver("seed=1,delay_us=0", out.path(), &arguments) else { return };
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(json["cuvs"], "26.10.7");
    assert_eq!(json["kernel_checks"].as_array().unwrap().len(), 11, "{said}");
    let engines = json["engines"].as_array().unwrap();
    let found: Vec<_> =
        engines.iter().map(|check| (check["what"].as_str().unwrap(), check["recall"].as_f64())).collect();
    let want = [
        "exactly, f32",
        "exactly, bf16",
        "recommendations as a whole",
        "by the index of ivf_flat",
        "by the index of ivf_pq",
        "by the index of hnsw",
        "the CPU's, by a graph of CAGRA's",
    ];
    assert_eq!(found.iter().map(|one| one.0).collect::<Vec<_>>(), want, "{said}");
    // But for what a walk misses.
    assert!(found[..6].iter().all(|one| one.1 == Some(1.0)) && found[6].1 > Some(0.95), "{found:?}");
    assert!(engines.iter().all(|check| check["jobs"].as_u64().unwrap() >= 16), "{said}");
    let table = std::fs::read_to_string(out.path().join("gpu.md")).unwrap();
    assert!(
        table.contains("Result: nothing differs.") && table.contains("| engine, exactly, f32 | 1.0000 of 32 jobs"),
        "{table}"
    );
}

#[test]
fn on_the_emulated_driver_recommendations_are_measured_as_a_whole() {
    let out = tempfile::tempdir().unwrap();
    let arguments = ["--only", "bench-pipeline,tensorrt"];
    let Some((code, said, json)) = on_the_emulated_driver("seed=1,delay_us=0", out.path(), &arguments) else { return };
    assert_eq!(code, Some(0), "{said}");
    let slates = json["slates"].as_array().unwrap();
    let numbers: Vec<&str> = slates.iter().map(|slate| slate["numbers"].as_str().unwrap()).collect();
    assert!(numbers.len() == 4 && numbers[3].ends_with(", int8 table"), "{said}");
    for slate in slates {
        assert_eq!((slate["jobs"].as_u64(), slate["same_candidates"].as_u64()), (Some(8), Some(8)), "{slate}");
        assert!(slate["candidates"].as_f64().unwrap() > 100.0, "{slate}");
    }
    let speeds = json["pipelines"].as_array().unwrap();
    // Three rankers, one of them over two tables, batches of 1 and 8 by one worker and by two.
    assert_eq!(speeds.len(), 4 * 4, "{said}");
    for speed in speeds {
        assert_eq!((speed["copies"].as_u64(), speed["whole"].as_f64()), (Some(2), Some(1.0)), "{speed}");
        let stages: Vec<&str> =
            speed["stages"].as_array().unwrap().iter().map(|stage| stage["stage"].as_str().unwrap()).collect();
        assert_eq!(stages, ["copies", "retrieve", "merge", "features", "rank", "select"]);
        assert!(speed["requests_per_second"].as_f64().unwrap() > 0.0, "{speed}");
    }
    // What could not be run is said.
    let note = json["notes"][0].as_str().unwrap();
    assert!(note.starts_with("TensorRT: not run: this program was built without TensorRT"), "{note}");
    let table = std::fs::read_to_string(out.path().join("gpu.md")).unwrap();
    assert!(table.contains("Recommendations as a whole") && table.contains("| what was aimed at |"), "{table}");
}

#[test]
fn a_gpu_that_is_wrong_or_hangs_is_told_in_time() {
    let out = tempfile::tempdir().unwrap();
    // The first launch does nothing.
    let arguments = ["--only", "kernels", "--shapes", "1"];
    let Some((code, said, json)) = on_the_emulated_driver("delay_us=0,wrong@1", out.path(), &arguments) else { return };
    assert_eq!(code, Some(4), "{said}");
    assert_eq!(json["kernel_checks"][0]["mismatches"].as_array().unwrap().len(), 1, "{said}");
    // One hangs: the run ends all the same.
    let out = tempfile::tempdir().unwrap();
    let arguments = ["--only", "kernels,engine", "--shapes", "1", "--limit-s", "3"];
    let began = Instant::now();
    let (code, said, json) = on_the_emulated_driver("delay_us=0,hang@2=600000", out.path(), &arguments).unwrap();
    assert!(
        code == Some(5) && began.elapsed() < Duration::from_secs(60),
        "{code:?} after {:?}: {said}",
        began.elapsed()
    );
    assert_eq!(json["notes"][0], "kernels: cut off, 3 s are over", "{said}");
    // No time at all: said, and nothing is wrong.
    let out = tempfile::tempdir().unwrap();
    let arguments = ["--only", "kernels,sanitizer", "--budget-s", "0"];
    let (code, said, json) = on_the_emulated_driver("delay_us=0", out.path(), &arguments).unwrap();
    assert_eq!((code, json["notes"].as_array().unwrap().len()), (Some(0), 2), "{said}");
}
