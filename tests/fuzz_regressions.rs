//! What fuzzing started from and what it found, replayed through the same code without a fuzzer.

#[path = "../fuzz/harness.rs"]
mod harness;

use std::path::{Path, PathBuf};

fn files(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

#[test]
fn seeds_and_finds_pass() {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
    for (target, run) in harness::TARGETS {
        let seeds = files(&fuzz.join("seeds").join(target));
        assert!(!seeds.is_empty(), "{target} has no seeds");
        for file in seeds.into_iter().chain(files(&fuzz.join("regressions").join(target))) {
            let bytes = std::fs::read(&file).unwrap();
            if let Err(panic) = std::panic::catch_unwind(|| run(&bytes)) {
                eprintln!("{}", file.display());
                std::panic::resume_unwind(panic);
            }
        }
    }
}

/// Mutations of rubbish would find little.
#[test]
fn what_is_mutated_is_valid() {
    for kind in (0..10).chain([19, 29, 39]) {
        let message = harness::valid_request(kind, &[1; 16]);
        let known = tastemaker::wire::request::decode(&message, |id, _| id);
        assert_eq!(known.unwrap(), u64::from(kind), "request {kind}");
        let (id, _) = tastemaker::wire::client::decode(&harness::valid_answer(kind, &[1; 16])).unwrap();
        assert_eq!(id, 7, "answer {kind}");
    }
}

#[test]
fn every_folder_belongs_to_a_target() {
    for folder in ["seeds", "regressions"] {
        for path in files(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz").join(folder)) {
            let name = path.file_name().unwrap().to_str().unwrap();
            let known = harness::TARGETS.iter().any(|(target, _)| *target == name);
            assert!(known || name == "README.md", "{}: no target of that name", path.display());
        }
    }
}
