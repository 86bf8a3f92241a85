//! What the program says of the NVIDIA driver that it finds: libraries under the driver's name, one for each outcome, made here. Each
//! is opened by a process of its own, for a process opens the driver once.

mod common;

use std::io::{BufRead, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::*;

/// A driver that answers as macros say.
const DRIVER: &str = r#"
#include <stddef.h>
#include <string.h>
#ifndef VERSION
#define VERSION 13000
#endif
#ifndef INIT
#define INIT 0
#endif
#ifndef COUNT
#define COUNT 1
#endif
#ifndef MAJOR
#define MAJOR 9
#endif
#ifndef MEMORY
#define MEMORY (141ull << 30)
#endif
#ifndef GET
#define GET 0
#endif
int cuInit(unsigned flags) { return INIT; }
int cuDriverGetVersion(int* version) { *version = VERSION; return 0; }
int cuDeviceGetCount(int* n) { *n = COUNT; return 0; }
int cuDeviceGet(int* device, int ordinal) { *device = ordinal; return GET; }
int cuDeviceGetAttribute(int* value, int which, int device) { *value = which == 75 ? MAJOR : 0; return 0; }
int cuDeviceTotalMem_v2(size_t* bytes, int device) { *bytes = MEMORY; return 0; }
#ifndef NAMELESS
int cuDeviceGetName(char* name, int room, int device) {
#ifdef ENDLESS
    memset(name, 'x', room);
#else
    strcpy(name, "Fake 0");
    name[5] += device;
#endif
    return 0;
}
#endif
"#;

/// A folder with a library of the driver's name; `None`, visibly, where there is no C compiler.
fn driver(name: &str, macros: &[&str]) -> Option<tempfile::TempDir> {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("driver.c");
    std::fs::write(&source, DRIVER).unwrap();
    let cc = std::env::var("CC").unwrap_or_else(|_| "cc".into());
    let ran = Command::new(&cc)
        .args(["-shared", "-fPIC", "-w"])
        .args(macros.iter().map(|m| format!("-D{m}")))
        .arg(&source)
        .arg("-o")
        .arg(folder.path().join(name))
        .output();
    match ran {
        Ok(ran) => assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr)),
        Err(error) => {
            // Not by `eprintln!`, which the test harness keeps to itself.
            let _ = writeln!(std::io::stderr(), "SKIPPED: {cc}: {error}");
            return None;
        }
    }
    Some(folder)
}

fn tastemaker(libraries: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tastemaker"));
    command.env("LD_LIBRARY_PATH", libraries);
    command
}

fn configuration(folder: &Path) -> PathBuf {
    let path = folder.join("t.toml");
    std::fs::write(&path, "[telemetry]\nlog_json = true\n").unwrap();
    path
}

/// What `check --device` prints behind the file's line, or its one line of error.
fn check(libraries: &Path, device: &str) -> Result<String, String> {
    let config = configuration(libraries);
    let ran = tastemaker(libraries).args(["check", "--device", device, "--config"]).arg(config).output().unwrap();
    let (out, err) = (String::from_utf8(ran.stdout).unwrap(), String::from_utf8(ran.stderr).unwrap());
    if ran.status.success() {
        assert_eq!(err, "");
        let (_, device) = out.split_once("t.toml: ok\ndevice: ").unwrap();
        let device = device.strip_suffix('\n').unwrap();
        Ok(device.strip_prefix("cpu: ").unwrap_or(device).to_owned())
    } else {
        assert_eq!((ran.status.code(), out.as_str()), (Some(1), ""), "{err}");
        Err(err.strip_prefix("tastemaker: device ").unwrap().strip_suffix('\n').unwrap().to_owned())
    }
}

#[test]
fn each_outcome_has_its_line() {
    let outcomes: &[(&[&str], &str)] = &[
        (
            &["INIT=34"],
            "libcuda.so is the CUDA toolkit's stub, which only links; take its folder out of LD_LIBRARY_PATH",
        ),
        (&["INIT=803"], "the NVIDIA driver's library and its kernel module differ in version; restart the machine"),
        (&["INIT=100"], "no NVIDIA GPU: the driver sees none"),
        (&["COUNT=0"], "no NVIDIA GPU: the driver sees none"),
        (&["COUNT=-3"], "no NVIDIA GPU: the driver sees none"),
        (&["INIT=999"], "the NVIDIA driver failed: CUDA_ERROR_UNKNOWN"),
        (&["GET=101"], "the NVIDIA driver failed: CUDA_ERROR_INVALID_DEVICE"),
        (&["NAMELESS"], "libcuda.so is not a driver: it has no cuDeviceGetName"),
        (
            &["VERSION=12080"],
            "the NVIDIA driver supports CUDA 12.8; 13.0 or later is needed: install driver 580 or later",
        ),
        (&["MAJOR=7"], "Fake 0 has compute capability 7.0; 8.0 or later is needed (Ampere)"),
        (&["MEMORY=2147483648"], "Fake 0 has 2048 MiB of memory; 4096 are needed"),
        // The first of two that are unfit, both that are fit, the one that is.
        (&["COUNT=2", "MAJOR=7"], "Fake 0 has compute capability 7.0; 8.0 or later is needed (Ampere)"),
        (
            &["COUNT=2", "MEMORY=(device?80ull<<30:8ull<<30)"],
            "cuda:0,cuda:1: Fake 0, 8.0 GiB, compute capability 9.0, driver for CUDA 13.0; \
             Fake 1, 80.0 GiB, compute capability 9.0, driver for CUDA 13.0",
        ),
        (&["COUNT=2", "MAJOR=(device?9:7)"], "cuda:1: Fake 1, 141.0 GiB, compute capability 9.0, driver for CUDA 13.0"),
        (&["COUNT=2", "MAJOR=(device?7:9)"], "cuda:0: Fake 0, 141.0 GiB, compute capability 9.0, driver for CUDA 13.0"),
    ];
    for (at, &(macros, line)) in outcomes.iter().enumerate() {
        // Both names that a driver may have.
        let Some(folder) = driver(["libcuda.so.1", "libcuda.so"][at % 2], macros) else { return };
        assert_eq!(check(folder.path(), "auto").as_deref(), Ok(line), "{macros:?}");
        if !macros.contains(&"COUNT=2") {
            assert_eq!(check(folder.path(), "cuda:0"), Err(format!("cuda:0: {line}")), "{macros:?}");
            assert_eq!(check(folder.path(), "cuda"), Err(format!("cuda: {line}")), "{macros:?}");
        }
    }
    let Some(folder) = driver("libcuda.so.1", &["COUNT=2"]) else { return };
    assert_eq!(check(folder.path(), "cuda:2"), Err("cuda:2: no GPU 2: the driver sees 2, from 0 on".into()));
    let second = "cuda:1: Fake 1, 141.0 GiB, compute capability 9.0, driver for CUDA 13.0";
    assert_eq!(check(folder.path(), "cuda:1"), Ok(second.into()));
    for both in ["cuda", "cuda:0,cuda:1", "cuda:1,cuda:0"] {
        let line = check(folder.path(), both).unwrap();
        assert!(line.starts_with("cuda:0,cuda:1: Fake 0, ") && line.contains("; Fake 1, "), "{both}: {line}");
    }
    let one_too_many = "cuda:2: no GPU 2: the driver sees 2, from 0 on";
    assert_eq!(check(folder.path(), "cuda:1,cuda:2"), Err(one_too_many.into()));
    let Some(folder) = driver("libcuda.so.1", &["ENDLESS"]) else { return };
    assert!(check(folder.path(), "auto").unwrap().contains(&format!(": {}, ", "x".repeat(128))));
}

#[test]
fn no_driver_and_no_library() {
    let none = "no NVIDIA driver: libcuda.so.1 is not there or can't be opened";
    let folder = tempfile::tempdir().unwrap();
    let outcome = check(folder.path(), "auto").unwrap();
    if outcome != none {
        // Not by `eprintln!`, which the test harness keeps to itself.
        let _ = writeln!(std::io::stderr(), "SKIPPED: this machine has an NVIDIA driver: {outcome}");
        return;
    }
    assert_eq!(check(folder.path(), "cuda:3"), Err(format!("cuda:3: {none}")));
    // Something of that name that is no library at all.
    std::fs::write(folder.path().join("libcuda.so.1"), "not a library").unwrap();
    assert_eq!(check(folder.path(), "auto").as_deref(), Ok(none));
}

#[test]
fn serving_on_a_gpu_or_without() {
    let Some(folder) = driver("libcuda.so.1", &["INIT=34"]) else { return };
    let serve = |device: &str| {
        let mut command = tastemaker(folder.path());
        command
            .arg("serve")
            .arg(bundle_path())
            .args(["--device", device, "--config"])
            .arg(configuration(folder.path()));
        command.args(["--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--admin", "127.0.0.1:0"]);
        command
    };
    // Asked for, and not there: an error as of any other wrong configuration, and nothing is served.
    let ran = serve("cuda:0").output().unwrap();
    let said = String::from_utf8(ran.stderr).unwrap();
    assert_eq!(ran.status.code(), Some(1), "{said}");
    assert!(said.starts_with("tastemaker: device cuda:0: libcuda.so is the CUDA toolkit's stub"), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    for wrong in
        ["gpu", "cuda:", "cuda:x", "cuda:+1", "cuda:64", "cuda:99999999999", "cuda:0,", "cuda:0,cuda:0", "cuda:0,cpu"]
    {
        let ran = serve(wrong).output().unwrap();
        let said = String::from_utf8(ran.stderr).unwrap();
        assert!(
            ran.status.code() == Some(2) && said.contains("expected auto, cpu, cuda, cuda:N or several"),
            "{wrong}: {said}"
        );
    }
    // Whatever there is: one line says it, and the CPU serves. A driver that has no more than what is looked for first is not found out
    // before it is used.
    let Some(shallow) = driver("libcuda.so.1", &[]) else { return };
    let mut only_looks_fit = serve("auto");
    only_looks_fit.env("LD_LIBRARY_PATH", shallow.path());
    let cases = [
        (serve("auto"), "cpu", "libcuda.so is the CUDA toolkit's stub"),
        (serve("cpu"), "cpu", "as asked"),
        (only_looks_fit, "cuda:0", "Fake 0, 141.0 GiB"),
    ];
    for (mut command, device, reason) in cases {
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let log = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
        let mut serving = None;
        let mut lines: Vec<serde_json::Value> = Vec::new();
        for line in log {
            let fields = serde_json::from_str::<serde_json::Value>(&line).unwrap()["fields"].take();
            if fields["message"] == "serving" {
                serving = Some(fields);
                break;
            }
            lines.push(fields);
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let chosen: Vec<_> = lines.iter().filter(|fields| fields["message"] == "device chosen").collect();
        assert_eq!(chosen.len(), 1, "{lines:?}");
        assert_eq!(chosen[0]["device"], device);
        assert!(chosen[0]["reason"].as_str().unwrap().starts_with(reason), "{chosen:?}");
        assert_eq!(serving.unwrap()["device"], "cpu", "{lines:?}");
        let warned = lines.iter().any(|fields| fields["message"] == "the device can't be used: the CPU computes");
        assert_eq!(warned, device != "cpu", "{lines:?}");
    }
    let ran = serve("cuda:0").env("LD_LIBRARY_PATH", shallow.path()).output().unwrap();
    let said = String::from_utf8(ran.stderr).unwrap();
    assert!(ran.status.code() == Some(1) && said.contains("tastemaker: device cuda:0: device failed: "), "{said}");
}
