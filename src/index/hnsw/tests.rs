use super::*;
use crate::catalog::generation::{Matrix, MatrixData};
use crate::index::{BruteForce, Kernel};
use crate::testing::noise;
use half::f16;
use proptest::prelude::*;

const METRICS: [Metric; 3] = [Metric::InnerProduct, Metric::Cosine, Metric::L2];

fn options(graph_degree: u32) -> HnswOptions {
    HnswOptions { graph_degree, ef_construction: 2 * graph_degree, seed: 7 }
}

fn f32s(dim: usize, values: Vec<f32>) -> Matrix {
    Matrix { dim, data: MatrixData::F32(values.into()) }
}

fn exact(matrix: &Matrix, metric: Metric) -> Exact {
    Exact::new(matrix.clone(), metric, Kernel::detect())
}

fn build(matrix: &Matrix, metric: Metric, degree: u32) -> Hnsw {
    Hnsw::build(&options(degree), exact(matrix, metric), &|_, _, _| {}).unwrap()
}

/// Points about `n_clusters` centres, a tenth as far from them as they are from each other, off the origin, of uneven length;
/// one cluster: uniform.
fn points(n: usize, dim: usize, n_clusters: usize, seed: u64) -> Vec<f32> {
    let mut next = noise(seed);
    let centers: Vec<f32> = (0..n_clusters * dim).map(|_| next()).collect();
    let width = if n_clusters == 1 { 1.0 } else { 0.1 };
    let mut values = Vec::with_capacity(n * dim);
    for at in 0..n {
        let center = &centers[at % n_clusters * dim..][..dim];
        let length = 1.0 + next().powi(4) * 8.0;
        values.extend(center.iter().map(|c| (c + width * next() + 0.2) * length));
    }
    values
}

/// Walks, whatever a scan would cost.
fn walk(index: &Hnsw, query: &[f32], k: usize, ef: usize, filter: Filter<'_>) -> Vec<u32> {
    let mut walk = Walk::default();
    index.codes.prepare(query, &mut walk.query);
    index.walk(ef, filter, &mut walk);
    let rows: Vec<u32> = walk.found.finish(ef).iter().map(|&entry| Scored::from(entry).row).collect();
    let mut scores = Vec::new();
    index.scores(query, &rows, &mut SearchScratch::default(), &mut scores);
    let mut best = rows.iter().zip(scores).map(|(&row, score)| Packed::from(Scored { row, score })).collect();
    keep_best(&mut best, k);
    best.into_iter().map(|entry| Scored::from(entry).row).collect()
}

fn search(index: &dyn VectorIndex, query: &[f32], k: usize, filter: Filter<'_>) -> Vec<Scored> {
    let mut out = Vec::new();
    index.search(query, k, filter, &SearchParams::default(), &mut SearchScratch::default(), &mut out);
    out
}

/// The share of the best `k` that is found, over queries like the points.
fn recall(matrix: &Matrix, metric: Metric, k: usize, filter: Filter<'_>, found: impl Fn(&[f32]) -> Vec<u32>) -> f64 {
    let oracle = BruteForce::new(matrix.clone(), metric, Kernel::detect());
    let (mut hits, mut wanted, mut query) = (0, 0, Vec::new());
    for at in 0..50 {
        query.clear();
        matrix.extend_row((at * matrix.n_rows() / 50) as u32, &mut query);
        let mut next = noise(at as u64);
        query.iter_mut().for_each(|v| *v += 0.1 * next());
        let (want, got) = (search(&oracle, &query, k, filter), found(&query));
        hits += want.iter().filter(|want| got.contains(&want.row)).count();
        wanted += want.len();
    }
    hits as f64 / wanted as f64
}

#[test]
fn walks_find_the_best() {
    for (n_clusters, floor) in [(40, 0.97), (1, 0.93)] {
        let values = points(6000, 24, n_clusters, 1);
        let halves = values.iter().map(|&v| f16::from_f32(v)).collect::<Vec<_>>();
        for matrix in [f32s(24, values), Matrix { dim: 24, data: MatrixData::F16(halves.into()) }] {
            for metric in METRICS {
                let index = build(&matrix, metric, 24);
                let recall =
                    recall(&matrix, metric, 20, Filter::ALL, |query| walk(&index, query, 20, 100, Filter::ALL));
                assert!(recall >= floor, "{n_clusters} {metric:?}: {recall}");
            }
        }
    }
}

#[test]
fn graphs_without_layers_are_searched() {
    let matrix = f32s(16, points(4000, 16, 30, 2));
    for metric in METRICS {
        let index = build(&matrix, metric, 24);
        let graph = index.parts().bottom.clone();
        let index = Hnsw::from_graph(graph, 24, exact(&matrix, metric)).unwrap();
        let recall = recall(&matrix, metric, 20, Filter::ALL, |query| walk(&index, query, 20, 100, Filter::ALL));
        assert!(recall >= 0.97, "{metric:?}: {recall}");
    }
}

#[test]
fn filters_keep_the_recall() {
    let matrix = f32s(16, points(8000, 16, 40, 3));
    let index = build(&matrix, Metric::Cosine, 16);
    for percent in [0u32, 1, 10, 50, 99] {
        let mut bits = vec![0u64; 8000usize.div_ceil(64)];
        let admitted = (0..8000u32).filter(|row| row.wrapping_mul(2654435769) >> 8 & 0xffff < percent * 0x10000 / 100);
        admitted.for_each(|row| bits[row as usize / 64] |= 1 << (row % 64));
        let of_bits = |row: u32| bits[row as usize / 64] >> (row % 64) & 1 == 1;
        for filter in [Filter::ALL.within(&bits), Filter::predicate(&of_bits)] {
            if percent == 0 {
                assert!(search(&index, &[1.0; 16], 10, filter).is_empty());
                continue;
            }
            let all_ways = [
                recall(&matrix, Metric::Cosine, 10, filter, |query| {
                    search(&index, query, 10, filter).iter().map(|found| found.row).collect()
                }),
                recall(&matrix, Metric::Cosine, 10, filter, |query| {
                    let found = walk(&index, query, 10, 100, filter);
                    assert!(found.iter().all(|&row| filter.allows(row)));
                    found
                }),
            ];
            assert!(all_ways.iter().all(|&recall| recall >= 0.95), "{percent} %: {all_ways:?}");
        }
    }
}

#[test]
fn same_vectors_do_not_cut_the_rest_off() {
    // A third of the rows are zero, a third are the same: more than a list holds.
    let mut values = points(3000, 8, 1, 4);
    for (at, row) in values.chunks_exact_mut(8).enumerate() {
        match at % 3 {
            0 => row.fill(0.0),
            1 => row.fill(0.25),
            _ => {}
        }
    }
    let matrix = f32s(8, values);
    for metric in METRICS {
        let index = build(&matrix, metric, 16);
        let different = |row: u32| row % 3 == 2;
        let filter = Filter::predicate(&different);
        let recall = recall(&matrix, metric, 10, filter, |query| walk(&index, query, 10, 100, filter));
        assert!(recall >= 0.9, "{metric:?}: {recall}");
        let found = search(&index, &[0.25; 8], 1500, Filter::ALL);
        assert_eq!(found.len(), 1500, "{metric:?}");
    }
}

#[test]
fn the_seed_alone_decides() {
    let matrix = f32s(8, points(1500, 8, 10, 5));
    let build = |threads: usize, seed: u64| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let options = HnswOptions { seed, ..options(8) };
        pool.install(|| Hnsw::build(&options, exact(&matrix, Metric::L2), &|_, _, _| {}).unwrap().parts)
    };
    let (one, four, other) = (build(1, 1), build(4, 1), build(1, 2));
    assert_eq!(one.bottom[..], four.bottom[..]);
    assert_eq!(one.upper[..], four.upper[..]);
    assert_eq!(one.upper_rows[..], four.upper_rows[..]);
    assert_ne!(one.bottom[..], other.bottom[..]);
}

#[test]
fn progress_ends_with_all() {
    let last = std::sync::atomic::AtomicU64::new(0);
    let told = |step: &str, done: u64, of: u64| {
        assert!(step == "graph" && done <= of && of == 300);
        last.store(done, std::sync::atomic::Ordering::Relaxed);
    };
    Hnsw::build(&options(8), exact(&f32s(2, points(300, 2, 1, 6)), Metric::L2), &told).unwrap();
    assert_eq!(last.into_inner(), 300);
}

#[test]
fn options_and_matrices_out_of_range_are_refused() {
    let exact = || exact(&f32s(2, points(3, 2, 1, 6)), Metric::L2);
    let error = |options: HnswOptions| Hnsw::build(&options, exact(), &|_, _, _| {}).unwrap_err();
    assert!(error(HnswOptions { graph_degree: 3, ..options(8) }).starts_with("graph_degree is 3"));
    assert!(error(HnswOptions { ef_construction: 7, ..options(8) }).starts_with("ef_construction is 7"));
    let error = |graph: Vec<u32>, degree: u32| Hnsw::from_graph(graph.into(), degree, exact()).unwrap_err();
    assert!(error(vec![0; 3], 0).starts_with("bottom: degree is 0"));
    assert!(error(vec![0; 5], 2).starts_with("bottom: 5 links"));
    assert!(error(vec![0, 1, 3], 1).starts_with("bottom: a link to 3"));
}

#[test]
fn parts_go_out_and_in() {
    let matrix = f32s(5, points(700, 5, 4, 8));
    for metric in METRICS {
        let index = build(&matrix, metric, 8);
        let again = Hnsw::from_parts(index.parts().clone(), exact(&matrix, metric)).unwrap();
        let query = [0.1, -0.2, 0.3, 0.4, -0.5];
        assert_eq!(walk(&index, &query, 10, 30, Filter::ALL), walk(&again, &query, 10, 30, Filter::ALL));
        assert_eq!(search(&index, &query, 10, Filter::ALL), search(&again, &query, 10, Filter::ALL));
        assert_eq!(index.bytes(), again.bytes());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn small_ones_are_exact(
        n in 0usize..40, dim in 1usize..20, k in 0usize..50, metric in prop::sample::select(METRICS.to_vec()), seed in any::<u64>(),
    ) {
        let matrix = f32s(dim, points(n, dim, 1, seed));
        let (index, oracle) = (build(&matrix, metric, 4), BruteForce::new(matrix.clone(), metric, Kernel::detect()));
        let query: Vec<f32> = points(1, dim, 1, !seed);
        let (got, want) = (search(&index, &query, k, Filter::ALL), search(&oracle, &query, k, Filter::ALL));
        // Both are exact; the last bits of a score depend on how many rows a kernel takes at once, and may decide among equals.
        prop_assert_eq!(got.len(), want.len());
        for (got, want) in got.iter().zip(&want) {
            prop_assert!((got.score - want.score).abs() <= 1e-5 * want.score.abs().max(1.0), "{:?} for {:?}", got, want);
        }
        let rows: std::collections::HashSet<u32> = got.iter().map(|g| g.row).collect();
        prop_assert_eq!(rows.len(), got.len());
        // Walks end as well, and give each row once.
        if n > 0 && k > 0 {
            let mut rows = walk(&index, &query, n, n, Filter::ALL);
            rows.sort_unstable();
            rows.dedup();
            prop_assert!(rows.len() <= n && !rows.is_empty());
        }
    }

    #[test]
    fn flipped_bits_are_refused_or_harmless(
        array in 0usize..7, at in any::<prop::sample::Index>(), bit in 0u32..32, cut in 0usize..2,
        metric in prop::sample::select(METRICS.to_vec()),
    ) {
        let matrix = f32s(5, points(300, 5, 4, 9));
        let mut parts = build(&matrix, metric, 4).parts;
        if array == 6 {
            let mut values = parts.center.to_vec();
            let at = at.index(values.len());
            values[at] = f32::from_bits(values[at].to_bits() ^ 1 << bit);
            values.truncate(values.len() - cut);
            parts.center = values.into();
        } else {
            let arrays = [
                &mut parts.bottom, &mut parts.layer_sizes, &mut parts.upper_rows, &mut parts.upper, &mut parts.starts,
                &mut parts.codes,
            ];
            let array = arrays.into_iter().nth(array).unwrap();
            if array.is_empty() {
                return Ok(());
            }
            let mut values = array.to_vec();
            let at = at.index(values.len());
            values[at] ^= 1 << bit;
            values.truncate(values.len() - cut);
            *array = values.into();
        }
        if let Ok(index) = Hnsw::from_parts(parts, exact(&matrix, metric)) {
            let found = search(&index, &[0.1, 0.2, -0.3, 0.4, 0.5], 10, Filter::ALL);
            prop_assert!(found.len() <= 10 && found.iter().all(|found| found.row < 300));
            walk(&index, &[0.1, 0.2, -0.3, 0.4, 0.5], 10, 20, Filter::ALL);
        }
    }
}
