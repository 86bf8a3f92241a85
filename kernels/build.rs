//! Compiles the kernels where there is an nvcc. Nothing of CUDA is needed: without it, or if it does not work, the source is embedded
//! and compiled by NVRTC when a server starts.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

#[path = "src/source.rs"]
mod source;

/// `NVCC` names the compiler, or is empty for none; else it lies where CUDA is said to be, or in the path.
fn nvcc() -> Option<OsString> {
    if let Some(nvcc) = std::env::var_os("NVCC") {
        return (!nvcc.is_empty()).then_some(nvcc);
    }
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(std::env::var_os);
    let homes = homes.map(|home| Path::new(&home).join("bin")).chain(["/usr/local/cuda/bin".into()]);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = homes.chain(std::env::split_paths(&path)).map(|folder| folder.join("nvcc")).find(|nvcc| nvcc.is_file());
    found.map(Into::into)
}

/// One file with code for every architecture.
///
/// # Errors
/// For a warning.
fn fatbin(nvcc: &OsString, out: &Path) -> Result<(), String> {
    let unit = out.join("kernels.cu");
    std::fs::write(&unit, source::SOURCE).map_err(|error| format!("{}: {error}", unit.display()))?;
    let mut command = Command::new(nvcc);
    command.args(["-fatbin", "-O3"]).args(source::OPTIONS);
    for arch in source::ARCHITECTURES {
        command.arg("-gencode").arg(format!("arch=compute_{arch},code=sm_{arch}"));
    }
    let oldest = source::ARCHITECTURES[0];
    command.arg("-gencode").arg(format!("arch=compute_{oldest},code=compute_{oldest}"));
    let ran = command.arg(&unit).arg("-o").arg(out.join("kernels.fatbin")).output();
    let ran = ran.map_err(|error| format!("it can't be run: {error}"))?;
    if ran.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&ran.stderr);
    Err(format!("{}: {}", ran.status, said.lines().find(|line| !line.trim().is_empty()).unwrap_or("it said nothing")))
}

fn main() {
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets it"));
    println!("cargo::rustc-check-cfg=cfg(have_fatbin)");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=src/source.rs");
    for (file, _) in source::PIECES {
        println!("cargo::rerun-if-changed={file}");
    }
    for variable in ["NVCC", "CUDA_HOME", "CUDA_PATH"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let Some(nvcc) = nvcc() else { return };
    // A bare name is looked up in the path, and can't be watched.
    if Path::new(&nvcc).is_file() {
        println!("cargo::rerun-if-changed={}", Path::new(&nvcc).display());
    }
    match fatbin(&nvcc, &out) {
        Ok(()) => println!("cargo::rustc-cfg=have_fatbin"),
        Err(why) => println!("cargo::warning={}: {why}; the kernels' source is embedded", Path::new(&nvcc).display()),
    }
}
