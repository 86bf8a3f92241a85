//! What the program says and ends with where there is nothing to check.

use std::process::{Command, Output};

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
