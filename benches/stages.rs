//! Stages of a request beside what they replace, on one thread: `cargo bench --bench stages`.

use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use criterion::{Criterion, criterion_group, criterion_main};
use rten::ThreadPool;
use tastemaker::candidates::{Packed, Scored, keep_best};
use tastemaker::catalog::generation::{Matrix, MatrixData, Metric};
use tastemaker::index::{BruteForce, Filter, Kernel, SearchParams, SearchScratch, VectorIndex};
use tastemaker::ranking::dense::{DenseRanker, Model};
use tastemaker::ranking::manifest::RankerManifest;
use tastemaker::ranking::onnx::OnnxRanker;
use tastemaker::ranking::{self, Ranker};

/// Numbers around 0, roughly normal, always the same.
fn numbers(n: usize) -> Vec<f32> {
    let mut state = 7u64;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..n).map(|_| next() + next() + next()).collect()
}

/// The best 500 of 10,000 x 128: by the index, and by computing and selecting everything.
fn exact_scan(criterion: &mut Criterion) {
    let (n, dim, k) = (10_000, 128, 500);
    let (rows, query) = (numbers(n * dim), numbers(dim));
    let kernel = Kernel::detect();
    let matrix = Matrix { dim, data: MatrixData::F32(rows.clone().into()) };
    let index = BruteForce::new(matrix, Metric::InnerProduct, kernel);
    let mut group = criterion.benchmark_group("best 500 of 10,000 x 128");
    let (mut scratch, mut out) = (SearchScratch::default(), Vec::new());
    group.bench_function("index", |bencher| {
        bencher.iter(|| {
            out.clear();
            index.search(black_box(&query), k, Filter::ALL, &SearchParams::default(), &mut scratch, &mut out);
        });
    });
    let (mut scores, mut all): (_, Vec<Packed>) = (vec![0.0; n], Vec::new());
    group.bench_function("all scores, then the best", |bencher| {
        bencher.iter(|| {
            kernel.dots(black_box(&query), &rows, &mut scores);
            all.clear();
            all.extend(scores.iter().enumerate().map(|(row, &score)| Packed::from(Scored { row: row as u32, score })));
            keep_best(&mut all, k);
        });
    });
    assert!(out.iter().map(|s| s.row).eq(all.iter().map(|&p| Scored::from(p).row)), "the same rows in the same order");
}

/// The demo's ranker on 900 candidates: by the engine for dense networks, whole and in f32, and by the general runtime.
fn ranker(criterion: &mut Criterion) {
    let engines = Path::new(env!("CARGO_MANIFEST_DIR")).join("engines");
    let (onnx, n) = (engines.join("demo.onnx"), 900);
    let manifest = std::fs::read_to_string(engines.join("demo.toml")).expect("engines/demo.toml");
    let manifest: RankerManifest = toml::from_str(&manifest).expect("a manifest");
    let widths = [manifest.inputs[0].columns.len()];
    let features = [numbers(n * widths[0])];
    let pool = Arc::new(ThreadPool::with_num_threads(1));
    let mut group = criterion.benchmark_group("demo ranker, 900 candidates");
    let load = || OnnxRanker::load("demo", &onnx, &manifest, &widths, pool.clone()).expect("a model");
    let graph = ranking::recognise(&mut load(), &onnx, &manifest).expect("a dense network");
    let ours = DenseRanker::new(Arc::new(Model::plain("demo", &graph, Kernel::detect())));
    for (name, mut ranker) in [("ours", Box::new(ours) as Box<dyn Ranker>), ("rten", Box::new(load()))] {
        let mut scores = Vec::new();
        // Where the server runs them: on the pool's own thread.
        group.bench_function(name, |bencher| {
            bencher.iter_custom(|rounds| {
                pool.run(|| {
                    let start = Instant::now();
                    for _ in 0..rounds {
                        ranker.score(black_box(&features), n, &mut scores).expect("scores");
                    }
                    start.elapsed()
                })
            });
        });
    }
}

criterion_group!(benches, exact_scan, ranker);
criterion_main!(benches);
