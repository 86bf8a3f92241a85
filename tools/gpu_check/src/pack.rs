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

/// What cuVS needs of a CUDA toolkit, likewise.
const TOOLKIT: [&str; 6] = [
    "nvidia/cu13/lib/libcublas.so.13",
    "nvidia/cu13/lib/libcublasLt.so.13",
    "nvidia/cu13/lib/libcusolver.so.12",
    "nvidia/cu13/lib/libcusparse.so.12",
    "nvidia/cu13/lib/libcurand.so.10",
    "nvidia/cu13/lib/libnvrtc.so.13",
];
/// What cuVS talks to other GPUs by, which is not checked here, and is larger than all the rest: functions that fail stand in for it.
const NCCL: &str = "nvidia/nccl/lib/libnccl.so.2";
/// Of NCCL's results: `ncclSystemError`.
const NCCL_FAILS: u32 = 2;

/// What a build of everything takes of the disk, bytes, and one where the dependencies are built already; measured, and rounded up.
const BUILD_BYTES: u64 = 2 << 30;
const REBUILD_BYTES: u64 = 1 << 30;

/// How names of TensorRT's libraries begin: itself, its parser of ONNX, and what builds engines.
const TENSORRT: [&str; 2] = ["libnvinfer", "libnvonnxparser"];

/// What is started on the other machine, beside the first piece.
const START: &str = r#"#!/bin/sh
# Unpacks the pieces that lie beside this file, in the numbered folders beside its own, or in those that PIECES names, and runs everything on
# this machine's GPU. Arguments go to `gpu_check run`. README.md says what comes out.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
into=${INTO:-/tmp/gpu_check}
if [ -z "${PIECES:-}" ]; then
    for folder in "$here"/../[0-9]*; do
        [ -f "$folder"/piece-*.bin ] && [ "$(cd "$folder" && pwd)" != "$here" ] && PIECES="${PIECES:-} $folder"
    done
fi
chmod +x "$here/gpu_check"
"$here/gpu_check" unpack "$here" ${PIECES:-} --into "$into"
# What was carried, and where toolkits and the Python packages of others keep what cuVS needs.
for folder in "$into"/cuvs/nvidia/*/lib /usr/local/cuda/lib64 /usr/local/cuda/targets/x86_64-linux/lib /usr/local/nvidia/lib64 \
    /usr/local/lib/python3*/*-packages/nvidia/*/lib /usr/lib/python3*/*-packages/nvidia/*/lib; do
    [ -d "$folder" ] && LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$folder"
done
export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:-}"
[ -d "$into/cuvs" ] && set -- --cuvs "$into/cuvs" "$@"
[ -d "$into/tensorrt" ] && set -- --tensorrt "$into/tensorrt" "$@"
exec "$here/gpu_check" run --tests "$into/tests" "$@"
"#;

/// This program and those that Cargo makes of the library's tests and of `tests`, under `profile`.
fn programs(Pack { profile, test: tests, tensorrt, .. }: &Pack) -> Result<(PathBuf, Vec<PathBuf>)> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let built = |arguments: &[&str]| -> Result<Vec<PathBuf>> {
        let ran = Command::new(&cargo)
            .args(arguments)
            // The same packages each time: features are those of all of them together, and others would build everything anew.
            .args(["-p", "tastemaker", "-p", "gpu_check"])
            .args(tensorrt.iter().flat_map(|_| ["--features", "gpu_check/tensorrt"]))
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

/// A file of cuVS below `site`, of which code of other GPUs than `arch` is left out.
fn library(site: &Path, name: &Path, arch: u32) -> Result<Entry> {
    let path = site.join(name);
    let mut bytes = fs::read(&path).with_context(|| path.display().to_string())?;
    let zeroed = strip::keep_only(&mut bytes, arch);
    let (size, of) = (bytes.len() as f64 / 1e6, zeroed as f64 / 1e6);
    println!("{}: {size:.1} MB, {of:.1} of them code of others than sm_{arch}", name.display());
    Ok(Entry { name: Path::new("cuvs").join(name), bytes, is_executable: false })
}

/// The names of files of cuVS below `site`.
fn libraries(site: &Path, toolkit: bool) -> Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    for below in LIBRARIES.iter().chain(TOOLKIT.iter().filter(|_| toolkit)).map(Path::new) {
        let path = site.join(below);
        if path.is_dir() {
            let found = fs::read_dir(&path)?.map(|entry| Ok(below.join(entry?.file_name())));
            let mut files = found.collect::<Result<Vec<_>>>()?;
            files.sort();
            all.extend(files);
        } else {
            all.push(below.to_owned());
        }
    }
    Ok(all)
}

/// TensorRT's libraries in `folder`; files that are links to each other once.
fn tensorrt(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        // As they are opened: by the major version.
        let is_versioned = name.split(".so.").nth(1).is_some_and(|version| !version.contains('.'));
        // Resources to build for a GPU are opened by their whole version.
        let is_resource = name.contains("builder_resource") && path.is_file() && !path.is_symlink();
        if TENSORRT.iter().any(|start| name.starts_with(start)) && (is_versioned || is_resource) {
            all.push(path);
        }
    }
    all.sort();
    ensure!(!all.is_empty(), "{}: no library of TensorRT", folder.display());
    Ok(all)
}

/// A library with NCCL's functions as far as `library` names them.
fn nccl(library: &[u8]) -> Result<Entry> {
    let is_name =
        |text: &&[u8]| text.starts_with(b"nccl") && text.len() > 4 && text.iter().all(u8::is_ascii_alphanumeric);
    let mut names: Vec<&[u8]> = library.split(|&byte| byte == 0).filter(is_name).collect();
    names.sort_unstable();
    names.dedup();
    let mut source = String::new();
    for name in names {
        let name = String::from_utf8_lossy(name);
        // One of them tells what went wrong.
        source += &match &*name {
            "ncclGetErrorString" | "ncclGetLastError" => {
                format!("const char* {name}(void) {{ return \"no NCCL\"; }}\n")
            }
            _ => format!("int {name}(void) {{ return {NCCL_FAILS}; }}\n"),
        };
    }
    let work = tempfile::tempdir()?;
    let (from, to) = (work.path().join("nccl.c"), work.path().join("libnccl.so.2"));
    fs::write(&from, source)?;
    let cc = std::env::var_os("CC").unwrap_or_else(|| "cc".into());
    let mut command = Command::new(&cc);
    command.args(["-shared", "-fPIC", "-O1", "-s", "-Wl,-soname,libnccl.so.2"]).arg(&from).arg("-o").arg(&to);
    let ran = command.output().with_context(|| cc.display().to_string())?;
    ensure!(ran.status.success(), "{}: {}", cc.display(), String::from_utf8_lossy(&ran.stderr));
    Ok(Entry { name: Path::new("cuvs").join(NCCL), bytes: fs::read(to)?, is_executable: false })
}

/// Whether the disk of `folder`, or of the nearest one above it that there is, has room for `bytes`.
///
/// # Errors
/// It has not: with the numbers.
fn room(folder: &Path, bytes: u64, what: &str) -> Result<()> {
    let there = folder.ancestors().find(|folder| folder.exists() && !folder.as_os_str().is_empty());
    let disk = rustix::fs::statvfs(there.unwrap_or(Path::new("."))).context("the disk")?;
    let free = disk.f_bavail * disk.f_frsize;
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    let name = folder.display();
    ensure!(free >= bytes, "{name}: {what} takes up to {:.1} GiB, and {:.1} GiB are free", gib(bytes), gib(free));
    println!("{name}: {what} takes up to {:.1} GiB of the {:.1} GiB that are free", gib(bytes), gib(free));
    Ok(())
}

/// Where Cargo puts what it builds.
fn target() -> Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let ran = Command::new(cargo).args(["metadata", "--no-deps", "--format-version", "1", "--offline"]).output()?;
    ensure!(ran.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&ran.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&ran.stdout)?;
    Ok(metadata["target_directory"].as_str().context("cargo metadata names no target directory")?.into())
}

/// Packs.
///
/// # Errors
/// A disk with too little room, by numbers, before anything is built; a file that is not there, a build that fails, or a disk that does.
pub fn pack(options: &Pack) -> Result<()> {
    let target = target()?;
    let is_warm = target.join(&options.profile).join("build").exists();
    room(&target, if is_warm { REBUILD_BYTES } else { BUILD_BYTES }, "building the tests")?;
    let site = options.cuvs.as_deref();
    let names = site.map(|site| libraries(site, options.toolkit)).transpose()?.unwrap_or_default();
    let engines = options.tensorrt.as_deref().map(tensorrt).transpose()?.unwrap_or_default();
    let paths = names.iter().map(|name| site.unwrap_or(Path::new("")).join(name)).chain(engines.iter().cloned());
    let sizes = paths.map(|path| Ok(fs::metadata(&path).with_context(|| path.display().to_string())?.len()));
    // Nothing that is carried compresses to more than half of itself, but small files.
    room(&options.out, sizes.sum::<Result<u64>>()? / 2 + (256 << 20), "the pieces")?;
    let (own, tests) = programs(options)?;
    let test = |path: PathBuf| {
        // Without Cargo's hash, which tells nothing on the other machine.
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let name = name.rsplit_once('-').map_or(name.as_str(), |(name, _)| name).to_owned();
        let bytes = fs::read(&path).with_context(|| path.display().to_string())?;
        Ok(Entry { name: Path::new("tests").join(name), bytes, is_executable: true })
    };
    let files = names.iter().map(|name| library(site.unwrap_or(Path::new("")), name, options.arch));
    let nccl = site.filter(|_| options.toolkit).map(|site| nccl(&fs::read(site.join("libcuvs/lib64/libcuvs.so"))?));
    let engines = engines.iter().map(|path| {
        let bytes = fs::read(path).with_context(|| path.display().to_string())?;
        let name = Path::new("tensorrt").join(path.file_name().unwrap_or_default());
        Ok(Entry { name, bytes, is_executable: false })
    });
    write(tests.into_iter().map(test).chain(files).chain(nccl).chain(engines), &fs::read(own)?, options)
}

/// Writes pieces and what lies beside the first, in the place of what an earlier packing left.
fn write(entries: impl IntoIterator<Item = Result<Entry>>, own: &[u8], options: &Pack) -> Result<()> {
    let Pack { out, limit_mib, level, .. } = options;
    let limit = limit_mib << 20;
    fs::create_dir_all(out)?;
    for at in 0.. {
        let folder = out.join(format!("{at}"));
        if !folder.join(pieces::name(at)).exists() {
            break;
        }
        fs::remove_dir_all(&folder).with_context(|| folder.display().to_string())?;
    }
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
            toolkit: false,
            tensorrt: None,
            test: Vec::new(),
        };
        // It stands for this program.
        write(entries.iter().cloned().map(Ok), b"#!/bin/sh\necho \"$@\"\n", &options).unwrap();
        let folders: Vec<PathBuf> = (0..3).map(|at| out.path().join(at.to_string())).collect();
        assert!(folders.iter().all(|folder| folder.is_dir()));
        unpack(&Unpack { folders: folders.clone(), into: into.path().to_owned() }).unwrap();
        assert_eq!(fs::read(into.path().join("tests/x")).unwrap(), entries[0].bytes);
        // Again with less: nothing is left of what there was.
        let fewer =
            entries.iter().cloned().map(|entry| Ok(Entry { bytes: entry.bytes[..1_200_000].to_vec(), ..entry }));
        write(fewer, b"#!/bin/sh\necho \"$@\"\n", &options).unwrap();
        assert!(folders[1].is_dir() && !folders[2].exists());
        // The script gives its arguments on, and finds the pieces.
        let start = |pieces: Option<&PathBuf>| {
            let mut command = Command::new("sh");
            command.arg(folders[0].join("start.sh")).args(["--quick"]).env("INTO", into.path());
            command.envs(pieces.map(|folder| ("PIECES", folder)));
            let ran = command.output().unwrap();
            assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
            String::from_utf8(ran.stdout).unwrap()
        };
        let (zero, one, into) = (folders[0].display(), folders[1].display(), into.path().display());
        let want = format!("unpack {zero} {one} --into {into}\nrun --tests {into}/tests --quick\n");
        assert_eq!(start(Some(&folders[1])), want);
        let want = format!("unpack {zero} {zero}/../1 --into {into}\nrun --tests {into}/tests --quick\n");
        assert_eq!(start(None), want);
    }

    #[test]
    fn a_disk_without_room_is_told_by_numbers() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("not/there/yet");
        room(&out, 1, "something").unwrap();
        let said = room(&out, 1 << 60, "something").unwrap_err().to_string();
        let want = format!("{}: something takes up to 1073741824.0 GiB, and ", out.display());
        assert!(said.starts_with(&want) && said.ends_with(" GiB are free"), "{said}");
    }

    #[test]
    fn tensorrt_s_libraries_are_found_by_their_names() {
        let folder = tempfile::tempdir().unwrap();
        let said = tensorrt(folder.path()).unwrap_err().to_string();
        assert_eq!(said, format!("{}: no library of TensorRT", folder.path().display()));
        let real = ["libnvinfer.so.11.4.0", "libnvonnxparser.so.11.4.0", "libnvinfer_builder_resource_sm90.so.11.4.0"];
        real.iter().for_each(|name| fs::write(folder.path().join(name), "x").unwrap());
        for name in ["libnvinfer.so.11", "libnvonnxparser.so.11", "libnvinfer.so"] {
            let to = format!("{}.so.11.4.0", name.split(".so").next().unwrap());
            std::os::unix::fs::symlink(to, folder.path().join(name)).unwrap();
        }
        fs::write(folder.path().join("libcudart.so.13"), "x").unwrap();
        let found = tensorrt(folder.path()).unwrap();
        let names: Vec<_> = found.iter().map(|path| path.file_name().unwrap().to_str().unwrap()).collect();
        assert_eq!(names, ["libnvinfer.so.11", "libnvinfer_builder_resource_sm90.so.11.4.0", "libnvonnxparser.so.11"]);
    }

    #[test]
    fn functions_that_fail_stand_in_for_nccl() {
        let library = b"\x7fELF\0ncclSend\0nccl\0libnccl.so.2\0ncclGetErrorString\0ncclSend\0x";
        let entry = match nccl(library) {
            Ok(entry) => entry,
            Err(error) => panic!("{error:#}"),
        };
        assert_eq!(entry.name, Path::new("cuvs/nvidia/nccl/lib/libnccl.so.2"));
        let has = |name: &str| entry.bytes.windows(name.len()).any(|at| at == name.as_bytes());
        assert!(has("\0ncclSend\0") && has("\0ncclGetErrorString\0") && entry.bytes.len() < 100_000);
    }
}
