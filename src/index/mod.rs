//! Vector search on the CPU.

mod brute_force;
mod coarse;
mod distance;
mod exact;
mod fastscan;
mod hnsw;
mod ivf;
mod kmeans;
pub mod live;
mod options;
mod overlay;
pub mod partitions;
mod prefetched;
mod refine;
mod rotation;
mod select;
mod simd;
mod sort;
pub mod tune;

pub use brute_force::BruteForce;
pub use distance::Kernel;
pub use exact::{Exact, Rows, norm};
pub use fastscan::Blocks;
pub use hnsw::{GraphMaker, Hnsw, HnswParts, Lifted, NO_LINK};
pub use ivf::{Codes, Ivf, IvfParts, Lists, Vectors, padded};
pub use options::{HnswOptions, IndexKind, IndexOptions, IvfOptions, SearchParams, Storage};
pub use overlay::Overlay;
pub use partitions::{Coverage, Partitioned, Searchers};
pub use prefetched::{Found, Prefetched, Settled};
pub use simd::Simd;

use std::sync::Arc;
use std::time::Instant;

use crate::candidates::{Packed, Scored};
use crate::catalog::generation::{Matrix, Metric};

/// A searchable set of item vectors. Row `i` of the index is item row `i`.
pub trait VectorIndex: Send + Sync + std::fmt::Debug {
    /// How it was made.
    fn kind(&self) -> IndexKind;

    /// Dimension.
    fn dim(&self) -> usize;

    /// Inverted lists; 0 for kinds without.
    fn n_lists(&self) -> u32 {
        0
    }

    /// Bytes that the index needs beside the matrix it is over, vectors of its own included.
    fn bytes(&self) -> usize;

    /// Appends the `k` best rows for `query` (f32 `[dim]`) that `filter` admits: best first, ties by lower row. Rows may be
    /// missed by kinds that are not exact; `params` trade that against time.
    fn search(
        &self,
        query: &[f32],
        k: usize,
        filter: Filter<'_>,
        params: &SearchParams,
        scratch: &mut SearchScratch,
        out: &mut Vec<Scored>,
    );

    /// Searches for each of `queries` (f32 `[out.len(), dim]`, row-major), with what [`Self::search`] gives for each. Kinds for
    /// which queries can share the reading of memory do.
    fn search_batch(
        &self,
        queries: &[f32],
        k: usize,
        filter: Filter<'_>,
        params: &SearchParams,
        scratch: &mut SearchScratch,
        out: &mut [Vec<Scored>],
    ) {
        for (query, out) in queries.chunks_exact(self.dim().max(1)).zip(out) {
            self.search(query, k, filter, params, scratch, out);
        }
    }

    /// What a bundle stores of it.
    fn stored(&self) -> Stored<'_> {
        Stored::Nothing
    }

    /// The same, where it is in partitions.
    fn partitioned(&self) -> Option<&Partitioned> {
        match self.stored() {
            Stored::Partitions(whole) => Some(whole),
            _ => None,
        }
    }

    /// Number of partitions; 1 for an index of one piece.
    fn n_partitions(&self) -> u32 {
        self.partitioned().map_or(1, |whole| whole.pieces().len() as u32)
    }

    /// Appends the metric's exact score of each of `rows`, which may be any of the index's.
    fn scores(&self, query: &[f32], rows: &[u32], scratch: &mut SearchScratch, out: &mut Vec<f32>);
}

/// What a bundle stores of an index.
#[derive(Debug)]
pub enum Stored<'a> {
    /// It is made from the matrix when it is asked for.
    Nothing,
    /// Inverted lists.
    Ivf(&'a IvfParts),
    /// A graph.
    Hnsw(&'a HnswParts),
    /// An index for each partition.
    Partitions(&'a Partitioned),
}

/// Makes an index over `matrix`. `progress` is told of every step: its name, and how many of how many units are done.
///
/// # Errors
/// Options that do not fit the matrix; the text names the option and what it may be.
pub fn build(
    options: &IndexOptions,
    matrix: &Matrix,
    metric: Metric,
    progress: &(dyn Fn(&str, u64, u64) + Sync),
) -> Result<Arc<dyn VectorIndex>, String> {
    let exact = Exact::new(matrix.clone(), metric, Kernel::detect());
    build_over(options, exact, SearchParams::default(), progress)
}

/// As [`build`], over the rows of `exact`, with what a search does that does not say.
///
/// # Errors
/// As [`build`].
pub fn build_over(
    options: &IndexOptions,
    exact: Exact,
    defaults: SearchParams,
    progress: &(dyn Fn(&str, u64, u64) + Sync),
) -> Result<Arc<dyn VectorIndex>, String> {
    Ok(match options {
        _ if exact.rows().n_rows() == 0 => Arc::new(BruteForce::over(exact)),
        IndexOptions::BruteForce {} => Arc::new(BruteForce::over(exact)),
        IndexOptions::IvfFlat(ivf) | IndexOptions::IvfPq(ivf) | IndexOptions::IvfRabitq(ivf) => {
            Arc::new(Ivf::build(options.kind(), ivf, exact, progress)?.with_defaults(defaults))
        }
        IndexOptions::Hnsw(hnsw) => Arc::new(Hnsw::build(hnsw, exact, progress)?.with_defaults(defaults)),
    })
}

/// Which rows a search may return: those that are in a set and that a predicate admits.
#[derive(Clone, Copy, Default)]
pub struct Filter<'a> {
    bits: Option<&'a [u64]>,
    predicate: Option<&'a (dyn Fn(u32) -> bool + Sync)>,
    /// See [`Self::in_piece`].
    piece: Option<(&'a [u32], f64)>,
}

impl std::fmt::Debug for Filter<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Filter {{ bits: {}, predicate: {} }}", self.bits.is_some(), self.predicate.is_some())
    }
}

impl<'a> Filter<'a> {
    /// Admits every row.
    pub const ALL: Filter<'static> = Filter { bits: None, predicate: None, piece: None };

    /// Admits what the predicate admits. It is asked about few rows only: those that would be among the best.
    pub fn predicate(predicate: &'a (dyn Fn(u32) -> bool + Sync)) -> Self {
        Filter { predicate: Some(predicate), ..Self::ALL }
    }

    /// Further demands that row `i` has bit `i % 64` of word `i / 64`; rows beyond the last word are out.
    pub fn within(self, bits: &'a [u64]) -> Self {
        Filter { bits: Some(bits), ..self }
    }

    /// The same for a part of the rows: its row `i` is `rows[i]` here. `share` is the share that is admitted, which is then not
    /// counted again.
    ///
    /// # Panics
    /// Later, if a row is asked about that the part does not have.
    pub fn in_piece(self, rows: &'a [u32], share: f64) -> Self {
        if self.is_all() { self } else { Filter { piece: Some((rows, share)), ..self } }
    }

    /// Whether it admits `row`.
    #[inline]
    pub fn allows(&self, row: u32) -> bool {
        let row = self.piece.map_or(row, |(rows, _)| rows[row as usize]);
        self.bits.is_none_or(|bits| bits.get(row as usize / 64).is_some_and(|word| word >> (row % 64) & 1 == 1))
            && self.predicate.is_none_or(|allows| allows(row))
    }

    /// Whether it admits every row without asking.
    pub fn is_all(&self) -> bool {
        self.bits.is_none() && self.predicate.is_none()
    }

    /// The share of `n` rows that it admits: counted, or estimated from rows spread over all.
    pub fn share(&self, n: usize) -> f64 {
        if self.is_all() || n == 0 {
            return 1.0;
        }
        if let Some((_, share)) = self.piece {
            return share;
        }
        let in_set = match self.bits {
            Some(bits) if self.predicate.is_none() => {
                let count: u64 = bits.iter().take(n.div_ceil(64)).map(|word| u64::from(word.count_ones())).sum();
                return count as f64 / n as f64;
            }
            _ => |row: u32| self.allows(row),
        };
        // Few rows tell a share that is not small; a small one takes more to be told from none.
        let mut share = 0.0;
        for sampled in [256, 4096] {
            let sampled = sampled.min(n);
            let admitted = (0..sampled).filter(|at| in_set((at * n / sampled) as u32)).count();
            share = admitted as f64 / sampled as f64;
            if admitted >= 16 {
                break;
            }
        }
        share
    }

    /// Calls `take` for every admitted row below `n`, in order.
    pub fn each(&self, n: usize, mut take: impl FnMut(u32)) {
        match self.bits {
            Some(bits) if self.piece.is_none() => {
                for (at, &word) in bits.iter().enumerate().take(n.div_ceil(64)) {
                    let mut left = word;
                    while left != 0 {
                        let row = at as u32 * 64 + left.trailing_zeros();
                        left &= left - 1;
                        if (row as usize) < n && self.predicate.is_none_or(|allows| allows(row)) {
                            take(row);
                        }
                    }
                }
            }
            _ => (0..n as u32).filter(|&row| self.allows(row)).for_each(take),
        }
    }
}

/// Buffers of a search, reused from search to search, and what only an index in partitions asks and tells.
#[derive(Debug, Default)]
pub struct SearchScratch {
    /// When partitions must have answered; `None`: whenever they do.
    pub until: Option<Instant>,
    /// What the partitions did not answer in the last search; nothing where there are none.
    pub coverage: Coverage,
    partitions: partitions::PartitionScratch,
    scores: Vec<f32>,
    block: Vec<f32>,
    best: Vec<Packed>,
    lower: Vec<f32>,
    upper: Vec<f32>,
    /// Places of a block that pass the threshold.
    passing: Vec<u32>,
    maybe: Vec<u32>,
    /// Rows that must be scored exactly, and the scores.
    rows: Vec<u32>,
    exact: Vec<f32>,
    /// By query.
    exact_scans: Vec<brute_force::Progress>,
    ivf: ivf::IvfScratch,
    ivf_batch: ivf::BatchScratch,
    hnsw: hnsw::Walk,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::generation::MatrixData;

    #[test]
    fn batches_answer_as_queries_one_by_one_to_the_bit() {
        let (n, dim, n_queries) = (480, 20, 7);
        let mut noise = crate::testing::noise(11);
        // Duplicates among them: ties at every threshold.
        let values: Vec<f32> = (0..n / 2 * dim).map(|_| noise()).collect();
        let values = [&values[..], &values[..]].concat();
        let mut queries: Vec<f32> = (0..n_queries * dim).map(|_| noise()).collect();
        queries[5 * dim] = f32::NAN;
        queries[6 * dim..7 * dim].fill(0.0);
        let ivf = IvfOptions { n_lists: Some(25), kmeans_n_iters: Some(3), ..Default::default() };
        let stored = |storage| IndexOptions::IvfFlat(IvfOptions { storage: Some(storage), ..ivf.clone() });
        let kinds = [
            IndexOptions::BruteForce {},
            stored(Storage::F32),
            stored(Storage::F16),
            stored(Storage::Bf16),
            IndexOptions::IvfPq(ivf.clone()),
            IndexOptions::IvfRabitq(ivf.clone()),
            IndexOptions::Hnsw(HnswOptions { graph_degree: 8, ef_construction: 20, seed: 0 }),
        ];
        let ids: Vec<String> = (0..n).map(|row| row.to_string()).collect();
        let half = |row: u32| row.is_multiple_of(2);
        let bits = vec![0xfff0_0000_ffff_ff00; n.div_ceil(64)];
        let few = [0x0100_0000_0000_0000];
        let mut scratch = SearchScratch::default();
        for (options, metric, in_halves) in kinds.iter().flat_map(|options| {
            let metrics = [Metric::InnerProduct, Metric::Cosine, Metric::L2];
            metrics.map(|metric| (options, metric, false)).into_iter().chain([(options, Metric::L2, true)])
        }) {
            let data = match in_halves {
                true => MatrixData::F16(values.iter().map(|&v| half::f16::from_f32(v)).collect::<Vec<_>>().into()),
                false => MatrixData::F32(values.clone().into()),
            };
            let matrix = Matrix { dim, data };
            let whole = build(options, &matrix, metric, &|_, _, _| {}).unwrap();
            let places = partitions::place(ids.iter().map(String::as_str), 3).unwrap();
            let params = SearchParams::default();
            let divided = Partitioned::build(options, &matrix, metric, places, params, &|_, _, _| {}).unwrap();
            for index in [&*whole, &divided] {
                for (k, n_probes) in [(1, None), (10, Some(3)), (150, Some(7)), (2000, None)] {
                    let params = SearchParams { n_probes, ..Default::default() };
                    for filter in [
                        Filter::ALL,
                        Filter::predicate(&half),
                        Filter::ALL.within(&bits),
                        Filter::predicate(&half).within(&few),
                    ] {
                        let mut want = vec![Vec::new(); n_queries];
                        for (query, want) in queries.chunks_exact(dim).zip(&mut want) {
                            index.search(query, k, filter, &params, &mut scratch, want);
                        }
                        for size in [1, 3, n_queries] {
                            let mut got = vec![Vec::new(); n_queries];
                            for (queries, got) in queries.chunks(size * dim).zip(got.chunks_mut(size)) {
                                index.search_batch(queries, k, filter, &params, &mut scratch, got);
                            }
                            assert_eq!(got, want, "{options:?} {metric:?} {k} {params:?} {filter:?} {size}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn filters_agree_with_themselves() {
        let n = 1000;
        let bits: Vec<u64> = (0..n / 64).map(|word| 0x9249_2492_4924_9249u64.rotate_left(word as u32)).collect();
        let odd = |row: u32| row % 2 == 1;
        for filter in
            [Filter::ALL, Filter::predicate(&odd), Filter::ALL.within(&bits), Filter::predicate(&odd).within(&bits)]
        {
            let want: Vec<u32> = (0..n as u32).filter(|&row| filter.allows(row)).collect();
            let mut got = Vec::new();
            filter.each(n, |row| got.push(row));
            assert_eq!(got, want);
            let share = want.len() as f64 / n as f64;
            assert!((filter.share(n) - share).abs() < 0.05, "{filter:?}: {} {share}", filter.share(n));
        }
        assert_eq!(Filter::predicate(&|_| false).share(n), 0.0);
    }
}
