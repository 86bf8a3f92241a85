//! What the architecture forbids and grep can see.

use std::path::{Path, PathBuf};

fn sources(folder: &str) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.extend((!path.ends_with("target")).then_some(path));
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                found.push((path.strip_prefix(env!("CARGO_MANIFEST_DIR")).unwrap().to_owned(), text));
            }
        }
    }
    // Benches may all be in other languages.
    assert!(!found.is_empty() || folder == "benches", "{folder}: no sources");
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
        "src/device/cuda/context.rs",
        "src/device/cuda/emulated.rs",
        "src/device/cuda/cuvs/graph.rs",
        "src/device/cuda/cuvs/index.rs",
        "src/device/cuda/cuvs/library.rs",
        "src/device/cuda/cuvs/resources.rs",
        "src/device/cuda/cuvs/sys.rs",
        "src/device/cuda/cuvs/tests.rs",
        "src/device/cuda/finder.rs",
        "src/device/cuda/kernels.rs",
        "src/device/cuda/ops.rs",
        "src/device/cuda/pipeline/mod.rs",
        "src/device/cuda/pipeline/ops.rs",
        "src/device/cuda/probe.rs",
        "src/device/cuda/ranker.rs",
        "src/device/cuda/stream.rs",
        "src/device/cuda/tensorrt/assembled.rs",
        "src/device/cuda/tensorrt/engine.rs",
        "src/device/cuda/timeline.rs",
        "src/server/http.rs",
        "src/server/ring.rs",
        "src/server/signals.rs",
        "src/server/shard.rs",
        "src/server/completions.rs",
        "src/index/coarse.rs",
        "src/index/distance.rs",
        "src/index/fastscan.rs",
        "src/index/refine.rs",
        "src/index/select.rs",
        "src/index/simd.rs",
        "src/index/sort.rs",
        "src/index/hnsw/codes.rs",
        "src/index/partitions/searchers.rs",
        "src/memory.rs",
        "src/ranking/dense/elementwise.rs",
        "src/ranking/dense/kernels.rs",
        "src/ranking/dense/kernels/x86.rs",
        "src/ranking/trees.rs",
        "src/cache/precomputed.rs",
        "src/catalog/bundle.rs",
        "src/wire/generated.rs",
        "kernels/emulator/src/lib.rs",
        "tensorrt/src/library.rs",
        "tensorrt/src/session.rs",
    ];
    for (path, text) in sources("src").into_iter().chain(sources("kernels")).chain(sources("tensorrt")) {
        let fenced = allowed.iter().any(|a| path == Path::new(a));
        let fenced = fenced || path.starts_with("kernels/emulator/tests");
        let used = text.lines().any(|l| l.contains("unsafe {") || l.contains("unsafe fn") || l.contains("unsafe impl"));
        assert!(fenced || !used, "{}: unsafe outside the fence", path.display());
    }
}

#[test]
fn no_unfinished_work() {
    let marks =
        [["TO", "DO"].concat(), ["FIX", "ME"].concat(), ["unimpl", "emented!"].concat(), ["to", "do!("].concat()];
    for folder in ["src", "kernels", "tensorrt", "tools", "tests", "benches", "fuzz"] {
        for (path, text) in sources(folder) {
            for (number, line) in text.lines().enumerate() {
                let mark = marks.iter().find(|mark| line.contains(*mark));
                assert!(mark.is_none(), "{}:{}: {line}", path.display(), number + 1);
            }
        }
    }
}

/// What `[text](target)` and `[name]: target` point to, outside code.
fn links(markdown: &str) -> Vec<(usize, String)> {
    let (mut found, mut fenced) = (Vec::new(), false);
    for (number, line) in markdown.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        }
        if fenced {
            continue;
        }
        // Every other piece between backticks is code.
        let prose: String = line.split('`').step_by(2).collect::<Vec<_>>().join("`");
        let inline = prose.split("](").skip(1).filter_map(|rest| rest.split([')', ' ']).next());
        found.extend(inline.map(|target| (number + 1, target.to_owned())));
        if let Some((name, target)) = prose.split_once("]: ")
            && name.starts_with('[')
        {
            found.push((number + 1, target.trim().to_owned()));
        }
    }
    found
}

#[test]
fn links_are_found() {
    let text = "See [a](b.md#c) and [`x`](y \"t\").\n```\n[no](no.md)\n```\n`[no](no.md)`\n[ref]: d/e.md\n";
    let found = [(1, "b.md#c"), (1, "y"), (6, "d/e.md")].map(|(line, target)| (line, target.to_owned()));
    assert_eq!(links(text), found);
}

#[test]
fn relative_links_lead_somewhere() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (mut folders, mut pages) = (vec![root.to_owned()], 0);
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            if path.is_dir() && name != "target" && name != "node_modules" && !name.starts_with('.') {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "md") {
                pages += 1;
                for (line, target) in links(&std::fs::read_to_string(&path).unwrap()) {
                    let file = target.split('#').next().unwrap();
                    let elsewhere = target.contains("://") || target.starts_with("mailto:") || file.is_empty();
                    let exists = elsewhere || folder.join(file).exists();
                    assert!(exists, "{}:{line}: {target} does not exist", path.display());
                }
            }
        }
    }
    assert!(pages > 3, "{pages}");
}

#[test]
fn lines_are_readable() {
    for (path, text) in sources("src").into_iter().chain(sources("kernels")) {
        if path.ends_with("generated.rs") {
            continue;
        }
        for (number, line) in text.lines().enumerate() {
            let len = line.chars().count();
            assert!(len <= 160, "{}:{}: {len} columns", path.display(), number + 1);
        }
    }
}
