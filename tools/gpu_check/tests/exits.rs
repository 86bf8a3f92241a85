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
    let want = "gpu_check: --only fun: expected kernels, engine, cuvs, bench-kernels, bench-engine, tests, bench-cuvs, \
                sanitizer\n";
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
    let Some(libraries) = tastemaker_emulator::emulated_cuda() else {
        // Not by `eprintln!`, which the test harness keeps to itself.
        let _ = writeln!(std::io::stderr(), "SKIPPED: no emulated driver: no C++ compiler, or another machine");
        return None;
    };
    let mut command = Command::new(env!("CARGO_BIN_EXE_gpu_check"));
    command.args(["run", "--quick", "--seed", "1", "--out"]).arg(out).args(arguments);
    command.env("LD_LIBRARY_PATH", libraries).env("EMU_CUDA", script).env("EMU_CUDA_REPORT", out.join("report"));
    let ran = command.output().unwrap();
    let said = String::from_utf8_lossy(&ran.stdout).into_owned() + &String::from_utf8_lossy(&ran.stderr);
    let report = std::fs::read_to_string(out.join("report")).unwrap_or_default();
    assert!(!report.contains("misuse:"), "{report}");
    let json = std::fs::read_to_string(out.join("gpu.json")).unwrap_or_else(|error| panic!("{error}: {said}"));
    Some((ran.status.code(), said, serde_json::from_str(&json).unwrap()))
}

#[test]
fn on_the_emulated_driver_kernels_and_engine_agree_with_the_cpu() {
    let (out, cuvs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let source = cuvs.path().join("fake.c");
    std::fs::write(&source, include_str!("../../../src/device/cuda/cuvs/fake.c")).unwrap();
    let cc = std::env::var("CC").unwrap_or_else(|_| "cc".into());
    let mut compiler = Command::new(cc);
    compiler.args(["-DEMULATED", "-shared", "-fPIC", "-w", "-O2"]).arg(&source).arg("-o");
    let compiled = compiler.arg(cuvs.path().join("libcuvs_c.so")).args(["-lm", "-ldl"]).status();
    if !compiled.is_ok_and(|status| status.success()) {
        let _ = writeln!(std::io::stderr(), "SKIPPED: no C compiler");
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
    ];
    assert_eq!(found, want.map(|what| (what, Some(1.0))), "{said}");
    assert!(engines.iter().all(|check| check["jobs"].as_u64().unwrap() >= 16), "{said}");
    let table = std::fs::read_to_string(out.path().join("gpu.md")).unwrap();
    assert!(
        table.contains("Result: nothing differs.") && table.contains("| engine, exactly, f32 | 1.0000 of 32 jobs"),
        "{table}"
    );
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
