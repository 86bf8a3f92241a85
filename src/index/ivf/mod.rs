//! Inverted lists: vectors are clustered, and a search scans the lists whose centroids promise most (Jégou et al., TPAMI 2011).
//!
//! What lies in the lists depends on the kind. `ivf_flat` holds the vectors themselves. `ivf_pq` and `ivf_rabitq` hold codes of 4
//! bits a subspace of the residual from the centroid, after a random rotation: codewords are trained, or they are the signs of
//! four dimensions (RaBitQ; Gao and Long, SIGMOD 2024). Both estimate `<q, r>` by `<q, c> · |r|² / <r, c>`, c being what the code
//! stands for, which is unbiased under the rotation. The best estimates are refined by codes of 8 bits a dimension.
//!
//! Departures from the usual: clusters are trained under L2 whatever the metric, and what is scanned is not whole lists but blocks of
//! 32 vectors. The vectors of a list lie in the order of their projections on its centroid `c`, and a block whose vectors' mean
//! projection is `g |c|` ranks by `g <q, c> + 0.2 ρ |q|`, ρ being the root mean square of what is left of its residuals: of a list near
//! the query only the long vectors are worth a look, and of many more lists than could be scanned. The centroids themselves are
//! coded and refined as vectors are.

mod batch;
mod build;
mod codes;
mod parts;
mod search;

pub use batch::BatchScratch;
pub use codes::Codes;
pub use parts::{IvfParts, Lists, Vectors, padded};
pub use search::{EXACT_BELOW, IvfScratch};

use codes::Codebook;

use super::exact::Exact;
use super::fastscan::BLOCK;
use super::rotation::Rotation;
use super::simd::Simd;
use super::{Filter, IndexKind, SearchParams, SearchScratch, Stored, VectorIndex};
use crate::candidates::Scored;
use crate::catalog::generation::NO_ROW;

/// An index of inverted lists over a matrix.
#[derive(Debug)]
pub struct Ivf {
    exact: Exact,
    parts: IvfParts,
    rotation: Rotation,
    /// `[n_blocks]`: the lanes that hold vectors.
    lanes: Vec<u32>,
    /// The words of `ivf_pq`.
    codebook: Option<Codebook>,
    /// Those of the centroids and of `ivf_rabitq`.
    signs: Codebook,
    /// What a search does that does not say.
    defaults: SearchParams,
    simd: Simd,
}

impl Ivf {
    /// The lists over the vectors of `exact`.
    ///
    /// # Errors
    /// What does not fit, so that no search can go out of bounds.
    pub fn from_parts(mut parts: IvfParts, exact: Exact, simd: Simd) -> Result<Self, String> {
        parts.validate(exact.rows().dim(), exact.rows().n_rows())?;
        if let Lists::Pq { codes, .. } | Lists::Rabitq(codes) = &mut parts.lists {
            codes.blocks = codes.blocks.clone().huge();
            codes.refined = codes.refined.clone().huge();
        }
        let of_block = |ids: &[u32; BLOCK]| {
            ids.iter().enumerate().fold(0, |lanes, (lane, &id)| lanes | u32::from(id != NO_ROW) << lane)
        };
        let lanes = parts.ids.as_chunks::<BLOCK>().0.iter().map(of_block).collect();
        let codebook = match &parts.lists {
            Lists::Pq { words, codes } => Some(Codebook::new(words.clone(), codes.layout.n_subspaces, simd)),
            _ => None,
        };
        let signs = Codebook::signs(parts.padded, simd);
        let rotation = Rotation::new(parts.dim, parts.padded, parts.seed, simd);
        Ok(Ivf { exact, parts, rotation, lanes, codebook, signs, defaults: SearchParams::default(), simd })
    }

    /// With what a search does that does not say.
    pub fn with_defaults(self, defaults: SearchParams) -> Self {
        Ivf { defaults, ..self }
    }
}

impl VectorIndex for Ivf {
    fn kind(&self) -> IndexKind {
        self.parts.kind
    }

    fn dim(&self) -> usize {
        self.parts.dim
    }

    fn n_lists(&self) -> u32 {
        self.parts.n_lists() as u32
    }

    fn bytes(&self) -> usize {
        self.parts.bytes() + size_of_val(&self.lanes[..])
    }

    fn search(
        &self,
        query: &[f32],
        k: usize,
        filter: Filter<'_>,
        params: &SearchParams,
        scratch: &mut SearchScratch,
        out: &mut Vec<Scored>,
    ) {
        self.run(query, k, filter, &params.or(&self.defaults), scratch, out);
    }

    fn search_batch(
        &self,
        queries: &[f32],
        k: usize,
        filter: Filter<'_>,
        params: &SearchParams,
        scratch: &mut SearchScratch,
        out: &mut [Vec<Scored>],
    ) {
        let params = params.or(&self.defaults);
        if self.shares(out.len(), k, &params) {
            return self.run_batch(queries, k, filter, &params, scratch, out);
        }
        for (query, out) in queries.chunks_exact(self.parts.dim.max(1)).zip(out) {
            self.run(query, k, filter, &params, scratch, out);
        }
    }

    fn stored(&self) -> Stored<'_> {
        Stored::Ivf(&self.parts)
    }

    fn scores(&self, query: &[f32], rows: &[u32], scratch: &mut SearchScratch, out: &mut Vec<f32>) {
        self.exact.scores(query, rows, &mut scratch.block, out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::candidates::best_first;
    use crate::catalog::generation::{Matrix, MatrixData, Metric};
    use crate::index::{BruteForce, IndexOptions, IvfOptions, Kernel, Storage, build};
    use half::f16;

    /// Clusters of vectors, `[n, dim]`.
    pub(super) fn clustered(n: usize, dim: usize, seed: u64) -> Vec<f32> {
        let mut next = crate::testing::noise(seed);
        let n_clusters = (n / 40).max(1);
        let centres: Vec<f32> = (0..n_clusters * dim).map(|_| next()).collect();
        let mut values = Vec::with_capacity(n * dim);
        for _ in 0..n {
            let centre = ((next() + 0.5) * n_clusters as f32) as usize % n_clusters;
            let size = 1.0 + next();
            values.extend((0..dim).map(|at| size * (centres[centre * dim + at] + 0.5 * next())));
        }
        values
    }

    fn options(kind: IndexKind) -> Vec<IndexOptions> {
        let ivf = IvfOptions { seed: 3, kmeans_n_iters: Some(4), ..Default::default() };
        let stored = |storage| IndexOptions::IvfFlat(IvfOptions { storage: Some(storage), ..ivf.clone() });
        match kind {
            IndexKind::IvfFlat => [Storage::F32, Storage::F16, Storage::Bf16].map(stored).into(),
            IndexKind::IvfPq => vec![IndexOptions::IvfPq(ivf)],
            _ => vec![IndexOptions::IvfRabitq(ivf)],
        }
    }

    /// The share of `want` that is in `got`.
    fn recall(got: &[Scored], want: &[Scored]) -> f64 {
        if want.is_empty() {
            return 1.0;
        }
        let found = want.iter().filter(|w| got.iter().any(|g| g.row == w.row)).count();
        found as f64 / want.len() as f64
    }

    pub(super) fn matrix(values: Vec<f32>, dim: usize, half: bool) -> Matrix {
        let data = match half {
            true => MatrixData::F16(values.iter().map(|&v| f16::from_f32(v)).collect::<Vec<_>>().into()),
            false => MatrixData::F32(values.into()),
        };
        Matrix { dim, data }
    }

    #[test]
    fn finds_what_the_oracle_finds() {
        for (metric, dim, half) in [
            (Metric::InnerProduct, 48, false),
            (Metric::Cosine, 64, true),
            (Metric::L2, 33, false),
            (Metric::L2, 96, true),
        ] {
            let n = 900;
            let matrix = matrix(clustered(n, dim, 5), dim, half);
            let oracle = BruteForce::new(matrix.clone(), metric, Kernel::detect());
            let queries = clustered(6, dim, 6);
            for options in [IndexKind::IvfFlat, IndexKind::IvfPq, IndexKind::IvfRabitq].into_iter().flat_map(options) {
                let index = build(&options, &matrix, metric, &|_, _, _| {}).unwrap();
                let mut scratch = SearchScratch::default();
                for k in [10, 100] {
                    // Every list: what is missed is the codes' fault.
                    let all = SearchParams { n_probes: Some(u32::MAX), ..Default::default() };
                    for (params, floor) in [(all, 0.97), (SearchParams::default(), 0.85)] {
                        let mut sum = 0.0;
                        for query in queries.chunks_exact(dim) {
                            let (mut got, mut want) = (Vec::new(), Vec::new());
                            index.search(query, k, Filter::ALL, &params, &mut scratch, &mut got);
                            oracle.search(query, k, Filter::ALL, &params, &mut scratch, &mut want);
                            assert_eq!(got.len(), k);
                            assert!(got.is_sorted_by(|a, b| best_first(a, b).is_lt()));
                            let (rows, mut exact) = (got.iter().map(|s| s.row).collect::<Vec<_>>(), Vec::new());
                            index.scores(query, &rows, &mut scratch, &mut exact);
                            let spread = want[0].score - want[k - 1].score;
                            for (got, exact) in got.iter().zip(exact) {
                                assert!(
                                    (got.score - exact).abs() <= 0.05 * spread + 1e-4,
                                    "{options:?} {got:?} {exact}"
                                );
                            }
                            sum += recall(&got, &want) / 6.0;
                        }
                        assert!(sum >= floor, "{options:?} {metric:?} {dim} {k} {params:?}: {sum}");
                    }
                }
            }
        }
    }

    /// An index of a few lists over `clustered` vectors.
    fn small(kind: IndexKind, n: usize, dim: usize) -> (Ivf, Matrix) {
        let matrix = matrix(clustered(n, dim, 9), dim, false);
        let exact = Exact::new(matrix.clone(), Metric::InnerProduct, Kernel::detect());
        let options = IvfOptions { n_lists: Some(6), kmeans_n_iters: Some(2), ..Default::default() };
        (Ivf::build(kind, &options, exact, &|_, _, _| {}).unwrap(), matrix)
    }

    #[test]
    fn filters_keep_recall_at_every_selectivity() {
        let (n, dim, k) = (900, 32, 20);
        let matrix = matrix(clustered(n, dim, 5), dim, false);
        let oracle = BruteForce::new(matrix.clone(), Metric::InnerProduct, Kernel::detect());
        let queries = clustered(6, dim, 6);
        let mut scratch = SearchScratch::default();
        for options in [IndexKind::IvfFlat, IndexKind::IvfPq, IndexKind::IvfRabitq].into_iter().flat_map(options) {
            let index = build(&options, &matrix, Metric::InnerProduct, &|_, _, _| {}).unwrap();
            for percent in [1, 10, 50, 99] {
                let bits: Vec<u64> = (0..n.div_ceil(64))
                    .map(|word| {
                        (0..64).fold(0, |bits, bit| bits | u64::from((word * 64 + bit) * 37 % 100 < percent) << bit)
                    })
                    .collect();
                let odd = |row: u32| row % 2 == 1;
                for filter in [Filter::ALL.within(&bits), Filter::predicate(&odd).within(&bits)] {
                    let mut found = 0.0;
                    for query in queries.chunks_exact(dim) {
                        let (mut got, mut want) = (Vec::new(), Vec::new());
                        index.search(query, k, filter, &SearchParams::default(), &mut scratch, &mut got);
                        oracle.search(query, k, filter, &SearchParams::default(), &mut scratch, &mut want);
                        assert!(got.iter().all(|s| filter.allows(s.row)));
                        assert!(got.is_sorted_by(|a, b| best_first(a, b).is_lt()));
                        found += recall(&got, &want) / 6.0;
                    }
                    assert!(found >= 0.85, "{options:?} {percent} %: {found}");
                }
            }
        }
    }

    #[test]
    fn every_instruction_set_finds_the_same() {
        for kind in [IndexKind::IvfPq, IndexKind::IvfRabitq] {
            let (index, matrix) = small(kind, 300, 40);
            let mut found: Vec<Vec<Scored>> = Vec::new();
            for simd in Simd::available() {
                // One kernel for what is exact: its order of summation is not that of the others.
                let exact = Exact::new(matrix.clone(), Metric::InnerProduct, Kernel::Portable);
                let index = Ivf::from_parts(index.parts.clone(), exact, simd).unwrap();
                let (mut scratch, mut all) = (SearchScratch::default(), Vec::new());
                for query in clustered(4, 40, 8).chunks_exact(40) {
                    index.search(query, 200, Filter::ALL, &SearchParams::default(), &mut scratch, &mut all);
                }
                found.push(all);
            }
            assert!(found.windows(2).all(|pair| pair[0] == pair[1]), "{kind}");
        }
    }

    #[test]
    fn damaged_parts_are_refused_or_harmless() {
        let flip = |array: &[u32], at: usize, bit: u32| {
            let mut copy = array.to_vec();
            copy[at] ^= 1 << bit;
            copy.into()
        };
        for kind in [IndexKind::IvfFlat, IndexKind::IvfPq, IndexKind::IvfRabitq] {
            let (index, matrix) = small(kind, 300, 20);
            let mut tried = 0;
            for bit in 0..32 {
                for (at, of_ids) in [(0, false), (3, false), (6, false), (0, true), (40, true), (191, true)] {
                    let mut parts = index.parts.clone();
                    if of_ids {
                        parts.ids = flip(&parts.ids, at, bit);
                    } else {
                        parts.offsets = flip(&parts.offsets, at, bit);
                    }
                    let exact = Exact::new(matrix.clone(), Metric::InnerProduct, Kernel::detect());
                    if let Ok(damaged) = Ivf::from_parts(parts, exact, Simd::detect()) {
                        let mut out = Vec::new();
                        let params = SearchParams { n_probes: Some(6), ..Default::default() };
                        damaged.search(&[0.3; 20], 50, Filter::ALL, &params, &mut SearchScratch::default(), &mut out);
                        assert!(out.iter().all(|s| s.row < 300));
                    }
                    tried += 1;
                }
            }
            assert_eq!(tried, 192);
            let mut parts = index.parts.clone();
            parts.centroids = parts.centroids[1..].to_vec().into();
            let exact = Exact::new(matrix.clone(), Metric::InnerProduct, Kernel::detect());
            assert!(Ivf::from_parts(parts, exact, Simd::detect()).is_err());
        }
    }

    #[test]
    fn odd_shapes_are_searched() {
        let mut scratch = SearchScratch::default();
        for (n, dim) in [(1, 1), (2, 3), (33, 32), (40, 130)] {
            // Zeros and duplicates among them.
            let values: Vec<f32> =
                (0..n * dim).map(|at| if at / dim % 3 == 0 { 0.0 } else { (at % dim) as f32 - 1.0 }).collect();
            let matrix = matrix(values, dim, false);
            for metric in [Metric::InnerProduct, Metric::Cosine, Metric::L2] {
                for options in
                    [IndexKind::IvfFlat, IndexKind::IvfPq, IndexKind::IvfRabitq].into_iter().flat_map(options)
                {
                    let index = build(&options, &matrix, metric, &|_, _, _| {}).unwrap();
                    let mut out = Vec::new();
                    let params = SearchParams { n_probes: Some(u32::MAX), ..Default::default() };
                    index.search(&vec![1.0; dim], 1000, Filter::ALL, &params, &mut scratch, &mut out);
                    let mut rows: Vec<u32> = out.iter().map(|s| s.row).collect();
                    rows.sort_unstable();
                    assert_eq!(rows, (0..n as u32).collect::<Vec<_>>(), "{options:?} {metric:?} {n} x {dim}");
                    out.clear();
                    index.search(&vec![f32::NAN; dim], 5, Filter::ALL, &params, &mut scratch, &mut out);
                    index.search(&vec![1.0; dim + 1], 5, Filter::ALL, &params, &mut scratch, &mut out);
                    assert!(out.is_empty());
                }
            }
        }
    }

    #[test]
    fn options_that_do_not_fit_are_named() {
        let matrix = matrix(clustered(100, 16, 1), 16, false);
        let refused = |options: IndexOptions| build(&options, &matrix, Metric::L2, &|_, _, _| {}).unwrap_err();
        let with =
            |n_lists, kmeans_n_iters, pq_dim, storage| IvfOptions { n_lists, kmeans_n_iters, pq_dim, storage, seed: 0 };
        assert!(refused(IndexOptions::IvfPq(with(Some(101), None, None, None))).contains("n_lists = 101"));
        assert!(refused(IndexOptions::IvfPq(with(Some(0), None, None, None))).contains("n_lists = 0"));
        assert!(refused(IndexOptions::IvfPq(with(None, Some(0), None, None))).contains("kmeans_n_iters = 0"));
        assert!(refused(IndexOptions::IvfPq(with(None, None, Some(9), None))).contains("it may be 32, 16, 8, 4"));
        assert!(refused(IndexOptions::IvfPq(with(None, None, None, Some(Storage::F16)))).contains("storage"));
        assert!(refused(IndexOptions::IvfRabitq(with(None, None, Some(8), None))).contains("pq_dim"));
    }
}
