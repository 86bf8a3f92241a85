//! Building what is carried, and packing it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};

use crate::pieces::{self, Entry, Manifest};
use crate::{Pack, Unpack, strip};

/// Of cuVS and what it needs, below the folder of the Python packages: what machines with a CUDA toolkit or PyTorch do not have. cuBLAS,
/// cuSOLVER, cuSPARSE, cuRAND, NVRTC and NCCL must be there.
const LIBRARIES: [&str; 10] = [
    "libcuvs/lib64/libcuvs_c.so",
    "libcuvs/lib64/libcuvs.so",
    "rapids_logger/lib64/librapids_logger.so",
    "librmm/lib64/librmm.so",
    "libkvikio/lib64/libkvikio.so",
    "libcuvs_cu13.libs",
    "libkvikio_cu13.libs",
    // Newer than most have, and needed in this version.
    "nvidia/cu13/lib/libnvJitLink.so.13",
    "nvidia/cu13/lib/libcudart.so.13",
    "nvidia/cu13/lib/libcufile.so.0",
];

/// What is started on the other machine, beside the first piece.
const START: &str = r#"#!/bin/sh
# Unpacks the pieces that lie beside this file (or in the folders that PIECES names) and runs everything on this machine's GPU.
# Arguments go to `gpu_check run`. README.md says what comes out.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
into=${INTO:-/tmp/gpu_check}
chmod +x "$here/gpu_check"
"$here/gpu_check" unpack "$here" ${PIECES:-} --into "$into"
# Where toolkits and the Python packages of others keep what cuVS needs.
for folder in /usr/local/cuda/lib64 /usr/local/cuda/targets/x86_64-linux/lib /usr/local/nvidia/lib64 \
    /usr/local/lib/python3*/*-packages/nvidia/*/lib /usr/lib/python3*/*-packages/nvidia/*/lib; do
    [ -d "$folder" ] && LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$folder"
done
export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:-}"
[ -d "$into/cuvs" ] && set -- --cuvs "$into/cuvs" "$@"
exec "$here/gpu_check" run --tests "$into/tests" "$@"
"#;

/// This program and those that Cargo makes of the library's tests and of `tests`, under `profile`.
fn programs(profile: &str, tests: &[String]) -> Result<(PathBuf, Vec<PathBuf>)> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let built = |arguments: &[&str]| -> Result<Vec<PathBuf>> {
        let ran = Command::new(&cargo)
            .args(arguments)
            // The same packages each time: features are those of all of them together, and others would build everything anew.
            .args(["-p", "tastemaker", "-p", "gpu_check"])
            .args(["--profile", profile, "--message-format", "json-render-diagnostics"])
            .stderr(Stdio::inherit())
            .output()
            .context("cargo")?;
        ensure!(ran.status.success(), "cargo {}: {}", arguments.join(" "), ran.status);
        Ok(executables(&String::from_utf8_lossy(&ran.stdout)))
    };
    let own = built(&["build", "--bin", "gpu_check"])?;
    let own = own.into_iter().find(|path| path.file_name().is_some_and(|name| name == "gpu_check"));
    let named = tests.iter().flat_map(|test| ["--test", test]);
    let mut tests = built(&["test", "--no-run", "--lib"].into_iter().chain(named).collect::<Vec<_>>())?;
    tests.retain(|path| path.parent().is_some_and(|folder| folder.ends_with("deps")));
    tests.sort();
    Ok((own.context("Cargo made no gpu_check")?, tests))
}

/// Paths of the programs in Cargo's messages.
fn executables(messages: &str) -> Vec<PathBuf> {
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    messages.filter_map(|message| Some(PathBuf::from(message.get("executable")?.as_str()?))).collect()
}

/// The files of cuVS below `site`, of which code of other GPUs than `arch` is left out.
fn libraries(site: &Path, arch: u32) -> Result<Vec<Entry>> {
    let mut all = Vec::new();
    for below in LIBRARIES {
        let path = site.join(below);
        let mut files = vec![PathBuf::from(below)];
        if path.is_dir() {
            let found = fs::read_dir(&path)?.map(|entry| Ok(Path::new(below).join(entry?.file_name())));
            files = found.collect::<Result<_>>()?;
            files.sort();
        }
        for name in files {
            let path = site.join(&name);
            let mut bytes = fs::read(&path).with_context(|| path.display().to_string())?;
            let zeroed = strip::keep_only(&mut bytes, arch);
            let (size, of) = (bytes.len() as f64 / 1e6, zeroed as f64 / 1e6);
            println!("{}: {size:.1} MB, {of:.1} of them code of others than sm_{arch}", name.display());
            all.push(Entry { name: Path::new("cuvs").join(name), bytes, is_executable: false });
        }
    }
    Ok(all)
}

/// Packs.
///
/// # Errors
/// A file that is not there, a build that fails, or a disk that does.
pub fn pack(options: &Pack) -> Result<()> {
    let (own, tests) = programs(&options.profile, &options.test)?;
    let mut entries = Vec::new();
    for path in tests {
        // Without Cargo's hash, which tells nothing on the other machine.
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let name = name.rsplit_once('-').map_or(name.as_str(), |(name, _)| name).to_owned();
        let bytes = fs::read(&path).with_context(|| path.display().to_string())?;
        entries.push(Entry { name: Path::new("tests").join(name), bytes, is_executable: true });
    }
    if let Some(site) = &options.cuvs {
        entries.extend(libraries(site, options.arch)?);
    }
    write(&entries, &fs::read(own)?, options)
}

/// Writes pieces and what lies beside the first.
fn write(entries: &[Entry], own: &[u8], options: &Pack) -> Result<()> {
    let Pack { out, limit_mib, level, .. } = options;
    let limit = limit_mib << 20;
    fs::create_dir_all(out)?;
    let readme = include_str!("../README.md");
    // The manifest is small, and known only afterwards.
    let beside = (own.len() + START.len() + readme.len() + (1 << 16)) as u64;
    let manifest = pieces::pack(entries, out, limit, beside, *level)?;
    for at in 0..manifest.pieces.len() {
        let folder = out.join(format!("{at}"));
        fs::create_dir_all(&folder)?;
        fs::rename(out.join(pieces::name(at)), folder.join(pieces::name(at)))?;
    }
    let first = out.join("0");
    fs::create_dir_all(&first)?;
    fs::write(first.join("manifest.json"), serde_json::to_string(&manifest)?)?;
    fs::write(first.join("gpu_check"), own)?;
    fs::write(first.join("start.sh"), START)?;
    fs::write(first.join("README.md"), readme)?;
    for at in 0..manifest.pieces.len().max(1) {
        let folder = out.join(format!("{at}"));
        let files = fs::read_dir(&folder)?.map(|entry| Ok(entry?.metadata()?.len())).collect::<Result<Vec<u64>>>()?;
        let size: u64 = files.iter().sum();
        ensure!(size <= limit, "{}: {size} bytes, more than {limit_mib} MiB", folder.display());
        println!("{}: {:.1} MiB", folder.display(), size as f64 / f64::from(1 << 20));
    }
    Ok(())
}

/// Unpacks.
///
/// # Errors
/// A piece that is missing or damaged, by name.
pub fn unpack(options: &Unpack) -> Result<()> {
    let Unpack { folders, into } = options;
    let path = folders.iter().map(|folder| folder.join("manifest.json")).find(|path| path.exists());
    let path = path.context("manifest.json is missing: it lies beside the first piece")?;
    let manifest: Manifest = serde_json::from_slice(&fs::read(&path)?).with_context(|| path.display().to_string())?;
    let files = pieces::unpack(&manifest, folders, into)?;
    println!("{} files in {}", files.len(), into.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cargo_says_what_it_made() {
        let said = "{\"reason\":\"compiler-artifact\",\"executable\":null}\nnot JSON\n\
                    {\"reason\":\"compiler-artifact\",\"executable\":\"/t/deps/tastemaker-0a1b\"}";
        assert_eq!(executables(said), [PathBuf::from("/t/deps/tastemaker-0a1b")]);
    }

    #[test]
    fn what_is_packed_starts_from_its_folders() {
        let (out, into) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let bytes: Vec<u8> =
            (0..3_000_000u32).flat_map(|at| at.wrapping_mul(2_654_435_761).to_le_bytes()[..1].to_vec()).collect();
        let noise: Vec<u8> = bytes
            .iter()
            .scan(1u64, |state, &byte| {
                *state = state.wrapping_mul(6364136223846793005).wrapping_add(u64::from(byte) | 1);
                Some((*state >> 40) as u8)
            })
            .collect();
        let entries = [Entry { name: "tests/x".into(), bytes: noise, is_executable: true }];
        let options = Pack {
            out: out.path().to_owned(),
            cuvs: None,
            arch: 90,
            limit_mib: 1,
            level: 1,
            profile: String::new(),
            test: Vec::new(),
        };
        // It stands for this program.
        write(&entries, b"#!/bin/sh\necho \"$@\"\n", &options).unwrap();
        let folders: Vec<PathBuf> = (0..3).map(|at| out.path().join(at.to_string())).collect();
        assert!(folders.iter().all(|folder| folder.is_dir()));
        unpack(&Unpack { folders: folders.clone(), into: into.path().to_owned() }).unwrap();
        assert_eq!(fs::read(into.path().join("tests/x")).unwrap(), entries[0].bytes);
        // The script gives its arguments on, and finds the pieces.
        let ran = Command::new("sh")
            .arg(folders[0].join("start.sh"))
            .args(["--quick"])
            .env("INTO", into.path())
            .env("PIECES", &folders[1])
            .output()
            .unwrap();
        let (said, into) = (String::from_utf8(ran.stdout).unwrap(), into.path().display());
        let want = format!(
            "unpack {} {} --into {into}\nrun --tests {into}/tests --quick\n",
            folders[0].display(),
            folders[1].display()
        );
        assert_eq!(said, want, "{}", String::from_utf8_lossy(&ran.stderr));
    }
}
