//! What the architecture forbids and grep can see.

use std::path::{Path, PathBuf};

fn sources(folder: &str) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                found.push((path.strip_prefix(env!("CARGO_MANIFEST_DIR")).unwrap().to_owned(), text));
            }
        }
    }
    assert!(!found.is_empty() || folder != "src");
    found
}

#[test]
fn stages_do_not_import_each_other() {
    let stages = ["retrieval", "features", "ranking", "rerank", "response"];
    for stage in stages {
        for (path, text) in sources(&format!("src/{stage}")) {
            for other in stages.iter().filter(|other| **other != stage) {
                let import = format!("crate::{other}::");
                let line = text.lines().find(|l| l.contains(&import) && !l.trim_start().starts_with("//"));
                // Retrievers and response are handed a row filter; its trait is retrieval's, and that is the one bridge.
                let allowed = line.is_some_and(|l| l.contains("RowFilter") || l.contains("Manifest"));
                assert!(line.is_none() || allowed, "{}: a stage imports another: {}", path.display(), line.unwrap());
            }
        }
    }
}

#[test]
fn unsafe_is_fenced() {
    let allowed = [
        "src/server/http.rs",
        "src/server/ring.rs",
        "src/server/signals.rs",
        "src/server/shard.rs",
        "src/server/completions.rs",
        "src/index/distance.rs",
        "src/catalog/bundle.rs",
        "src/wire/generated.rs",
    ];
    for (path, text) in sources("src") {
        let fenced = allowed.iter().any(|a| path == Path::new(a));
        let used = text.lines().any(|l| l.contains("unsafe {") || l.contains("unsafe fn") || l.contains("unsafe impl"));
        assert!(fenced || !used, "{}: unsafe outside the fence", path.display());
    }
}

#[test]
fn no_unfinished_work() {
    let marks =
        [["TO", "DO"].concat(), ["FIX", "ME"].concat(), ["unimpl", "emented!"].concat(), ["to", "do!("].concat()];
    for folder in ["src", "tools", "tests", "benches"] {
        for (path, text) in sources(folder) {
            for (number, line) in text.lines().enumerate() {
                let mark = marks.iter().find(|mark| line.contains(*mark));
                assert!(mark.is_none(), "{}:{}: {line}", path.display(), number + 1);
            }
        }
    }
}

#[test]
fn lines_are_readable() {
    for (path, text) in sources("src") {
        if path.ends_with("generated.rs") {
            continue;
        }
        for (number, line) in text.lines().enumerate() {
            let len = line.chars().count();
            assert!(len <= 160, "{}:{}: {len} columns", path.display(), number + 1);
        }
    }
}
