//! The engine with an index, by a stand-in for cuVS that works on the emulated driver's memory and streams, exactly: what comes out is what
//! the CPU finds, whatever the index's kind, and whatever fails of it.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use proptest::prelude::*;
use tempfile::TempDir;

use super::super::cuvs::tests::{fake, with_files};
use super::super::emulated::{Emulated, tell};
use super::super::engine::tests::{compare, cpu, cuda, jobs};
use super::super::engine::{Cuda, CudaDevice};
use crate::catalog::generation::{Generation, Metric, testing};
use crate::catalog::live::LiveItems;
use crate::device::{Device as _, DeviceConfig, IndexChoice, Storage};
use crate::index::{HnswOptions, IndexKind, IndexOptions};
use crate::pipeline::PipelineConfig;

const KINDS: [IndexKind; 4] = [IndexKind::IvfFlat, IndexKind::IvfPq, IndexKind::IvfRabitq, IndexKind::Hnsw];

/// Items of which the bundle says that it has an index of that kind.
fn generation(n: usize, dim: usize, metric: Metric, kind: IndexKind, seed: u64) -> Arc<Generation> {
    let mut noise = crate::testing::noise(seed);
    let mut generation = testing::with_embeddings((0..n * dim).map(|_| noise()).collect(), dim);
    generation.metric = metric;
    let options = match kind {
        IndexKind::Hnsw => {
            IndexOptions::Hnsw(HnswOptions { graph_degree: 4, ef_construction: 8, ..HnswOptions::default() })
        }
        kind => IndexOptions::of(kind),
    };
    testing::set_index_options(&mut generation, options);
    Arc::new(generation)
}

fn config(folder: &TempDir) -> DeviceConfig {
    let cuvs = folder.path().to_str().unwrap().to_owned();
    DeviceConfig { index: IndexChoice::Bundle, cuvs, ..DeviceConfig::default() }
}

fn told(folder: &TempDir, script: &str) {
    tell(&folder.path().join("libcuvs_c.so"), c"fake_script", script);
}

fn pipeline(ann_k: u32) -> Arc<PipelineConfig> {
    Arc::new(PipelineConfig { ann_k, ..PipelineConfig::default() })
}

fn device(cuda: &Arc<Cuda>, ann_k: u32, generation: &Arc<Generation>) -> CudaDevice {
    let mut device = cuda.device(cpu(&pipeline(ann_k)), &pipeline(ann_k)).unwrap();
    device.load(generation).unwrap();
    device
}

/// Has both answer the same, and says how many kernels of ours that took: one by an index, at least two without.
fn launches(emulated: &Emulated, device: &mut CudaDevice, generation: &Arc<Generation>, dim: usize, seed: u64) -> u64 {
    let before = emulated.count("launches");
    let mut other = cpu(&pipeline(40));
    other.load(generation).unwrap();
    let make = || {
        let mut all = jobs(generation, 9, dim, 40, seed);
        all.iter_mut().for_each(|job| job.user.seen.truncate(30));
        all
    };
    compare(device, &mut other, make(), make());
    emulated.count("launches") - before
}

#[test]
fn answers_are_the_cpu_s() {
    let Some(folder) = &fake(&["-DEMULATED"]) else { return };
    proptest!(ProptestConfig::with_cases(32), |(
        n in 2usize..900, dim in 1usize..20, metric in prop::sample::select(vec![Metric::InnerProduct, Metric::Cosine, Metric::L2]),
        kind in prop::sample::select(KINDS.to_vec()), n_jobs in 1usize..20, k in 1u32..60, persistent in any::<bool>(),
        gone in 0usize..4, seed in any::<u64>(),
    )| {
        let Some(emulated) = Emulated::open(&format!("seed={seed},delay_us=100")) else { return Ok(()) };
        // On a line all cosines are 1 or -1 but for rounding: which of hundreds are the best is no more than that.
        let dim = if metric == Metric::Cosine { dim + 1 } else { dim };
        let generation = generation(n, dim, metric, kind, seed);
        let persistent_queries = if persistent { 64 } else { 0 };
        let cuda = cuda(&DeviceConfig { persistent_queries, ..config(folder) }, 1);
        let mut device = device(&cuda, k, &generation);
        let mut other = cpu(&pipeline(k));
        other.load(&generation).unwrap();
        // None, few, so many gone that the GPU is told, or so many that all of the rest are scored.
        let items = (gone > 0).then(|| {
            let mut items = LiveItems::new(n);
            let is_gone = |row: &u32| match gone {
                1 => row.is_multiple_of(50),
                2 => row.is_multiple_of(3),
                _ => !row.is_multiple_of(16),
            };
            (0..n as u32).filter(is_gone).for_each(|row| assert!(items.set_gone(row, true)));
            Arc::new(items)
        });
        for round in 0..2 {
            let make = || {
                let mut all = jobs(&generation, n_jobs, dim, k, seed + round);
                all.iter_mut().for_each(|job| job.items.clone_from(&items));
                all
            };
            let before = emulated.count("launches");
            compare(&mut device, &mut other, make(), make());
            let launches = emulated.count("launches") - before;
            prop_assert!(gone > 2 || launches <= 1, "{} launches: not by the index", launches);
        }
    });
}

#[test]
fn an_index_s_lists_settle_searches_with_one_copy_each_way() {
    let Some(emulated) = Emulated::open("delay_us=0") else { return };
    let Some(folder) = &fake(&["-DEMULATED"]) else { return };
    for kind in KINDS {
        let generation = generation(3000, 8, Metric::L2, kind, 4);
        let cuda = cuda(&config(folder), 1);
        let mut device = device(&cuda, 40, &generation);
        emulated.script("seed=6,delay_us=0");
        assert_eq!(launches(&emulated, &mut device, &generation, 8, 1), 1, "{kind}");
        assert_eq!((emulated.count("uploads"), emulated.count("downloads")), (1, 1), "{kind}");
        let settled = &cuda.counters.settled;
        assert!(settled.yes.load(Relaxed) > 0 && settled.no.load(Relaxed) == 0, "{kind}: {settled:?}");
    }
}

#[test]
fn whatever_is_in_the_way_all_rows_are_scored() {
    let Some(emulated) = Emulated::open("delay_us=0") else { return };
    let exact = |folder: &TempDir, config: DeviceConfig, kind| {
        let generation = generation(500, 6, Metric::Cosine, kind, 7);
        let cuda = cuda(&config, 1);
        let mut device = device(&cuda, 40, &generation);
        let n = launches(&emulated, &mut device, &generation, 6, 2);
        assert!(n >= 2, "{n} launches: {config:?} {:?}", folder.path());
    };
    // No library, one of another version, one that lacks a function, and what it has nothing for.
    let empty = tempfile::tempdir().unwrap();
    exact(&empty, config(&empty), IndexKind::IvfFlat);
    for macros in [["-DEMULATED", "-DMINOR=8"], ["-DEMULATED", "-DWITHOUT_CAGRA"]] {
        let Some(folder) = &fake(&macros) else { return };
        exact(folder, config(folder), IndexKind::IvfFlat);
    }
    let folder = &fake(&["-DEMULATED"]).unwrap();
    exact(folder, config(folder), IndexKind::BruteForce);
    exact(folder, DeviceConfig { index: IndexChoice::Exact, ..config(folder) }, IndexKind::IvfFlat);
    exact(folder, DeviceConfig { index: IndexChoice::Auto, ..config(folder) }, IndexKind::IvfFlat);
    exact(folder, DeviceConfig { vectors: Storage::Bf16, ..config(folder) }, IndexKind::IvfFlat);
    // Room for what exact search takes alone.
    let little = DeviceConfig { memory_bytes: 24 << 20, workspace_bytes: 1 << 20, ..config(folder) };
    exact(folder, little, IndexKind::IvfFlat);
    // What fails when it is made, or when a worker begins to use it.
    let failing = ["cuvsIvfFlatBuild", "cuvsResourcesSetWorkspacePool", "cuvsResourcesCreate"];
    for call in failing {
        told(folder, &format!("{call}@1=cudaErrorInvalidValue: invalid argument"));
        exact(folder, config(folder), IndexKind::IvfFlat);
    }
    told(folder, "cuvsCagraBuild@1=std::bad_alloc: out_of_memory: CUDA error");
    exact(folder, config(folder), IndexKind::Hnsw);
    told(folder, "");
}

#[test]
fn a_search_that_fails_is_done_exactly_and_one_that_lacks_memory_may_come_again() {
    let Some(emulated) = Emulated::open("delay_us=0") else { return };
    let Some(folder) = &fake(&["-DEMULATED"]) else { return };
    for (kind, call) in [
        (IndexKind::IvfFlat, "cuvsIvfFlatSearch"),
        (IndexKind::IvfPq, "cuvsIvfPqSearch"),
        (IndexKind::Hnsw, "cuvsCagraSearch"),
    ] {
        let generation = generation(700, 5, Metric::InnerProduct, kind, 3);
        let cuda = cuda(&config(folder), 1);
        let mut device = device(&cuda, 40, &generation);
        let mut n = |script: &str, seed| {
            told(folder, script);
            launches(&emulated, &mut device, &generation, 5, seed)
        };
        assert_eq!(n("", 1), 1, "{kind}");
        assert!(n(&format!("{call}@1=out_of_memory"), 2) >= 2, "{kind}");
        assert_eq!(n("", 3), 1, "{kind}: memory is there again");
        assert!(n(&format!("{call}@1=cudaErrorInvalidValue"), 4) >= 2, "{kind}");
        assert!(n("", 5) >= 2, "{kind}: it is not asked again");
    }
}

#[test]
fn a_lost_context_takes_its_index_with_it() {
    let Some(emulated) = Emulated::open("delay_us=50") else { return };
    let Some(folder) = &fake(&["-DEMULATED"]) else { return };
    for kind in [IndexKind::IvfFlat, IndexKind::Hnsw] {
        let generation = generation(300, 8, Metric::L2, kind, 2);
        let cuda = cuda(&config(folder), 1);
        let mut one = device(&cuda, 40, &generation);
        emulated.script("delay_us=50,fail@1");
        let error = one.execute(&mut jobs(&generation, 2, 8, 5, 3)).unwrap_err().to_string();
        assert!(error.ends_with(": CUDA_ERROR_LAUNCH_FAILED"), "{error}");
        drop(one);
        emulated.script("delay_us=50");
        let mut again = device(&cuda, 40, &generation);
        assert_eq!(launches(&emulated, &mut again, &generation, 8, 1), 1);
    }
}

#[test]
fn an_index_is_kept_and_read_if_it_is_whole() {
    let Some(emulated) = Emulated::open("delay_us=0") else { return };
    let Some(folder) = &fake(&["-DEMULATED"]) else { return };
    let cuvs = with_files(folder);
    for (kind, build) in [
        (IndexKind::IvfFlat, "cuvsIvfFlatBuild"),
        (IndexKind::IvfPq, "cuvsIvfPqBuild"),
        (IndexKind::Hnsw, "cuvsCagraBuild"),
    ] {
        let kept = tempfile::tempdir().unwrap();
        let index_cache = kept.path().join("a/b").to_str().unwrap().to_owned();
        let config = DeviceConfig { index_cache, ..config(folder) };
        let by_index = |generation: &Arc<Generation>, script: &str| {
            told(folder, script);
            let cuda = cuda(&config, 1);
            cuda.cuvs.set(Ok(cuvs)).unwrap();
            let mut device = device(&cuda, 40, generation);
            launches(&emulated, &mut device, generation, 5, 1) == 1
        };
        let (one, broken) = (generation(400, 5, Metric::L2, kind, 1), format!("{build}@1=broken"));
        assert!(!by_index(&one, &broken), "{kind}: nothing is kept");
        assert!(by_index(&one, ""), "{kind}");
        let files =
            || std::fs::read_dir(kept.path().join("a/b")).unwrap().map(|file| file.unwrap().path()).collect::<Vec<_>>();
        assert_eq!(files().len(), 2, "{:?}", files());
        assert!(by_index(&one, &broken), "{kind}: it is read, not made");
        // Of other vectors, or damaged.
        assert!(!by_index(&generation(401, 5, Metric::L2, kind, 1), &broken), "{kind}");
        let file = files().into_iter().find(|path| path.extension().is_some_and(|end| end == "cuvs")).unwrap();
        let mut bytes = std::fs::read(&file).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&file, bytes).unwrap();
        assert!(!by_index(&one, &broken), "{kind}: it is damaged");
        assert!(by_index(&one, "") && by_index(&one, &broken), "{kind}: it is made and kept anew");
        told(folder, "");
    }
}
