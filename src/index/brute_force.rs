//! Exact scan: the oracle that other index kinds are held against. Where the CPU allows, an 8-bit copy of the matrix leaves out
//! what can't be among the best; the answers are the same.

use super::coarse::{Coarse, CoarseQuery, GROUP};
use super::exact::Exact;
use super::{Filter, IndexKind, Kernel, SearchParams, SearchScratch, VectorIndex};
use crate::candidates::{Packed, Scored, keep_best};
use crate::catalog::generation::{Matrix, Metric};

/// Rows scored at a time: scores and converted rows stay in the L1 and L2 caches.
const BLOCK: usize = 512;
/// Rows that the 8-bit filter bounds at a time: few enough for the L2 cache, so many that most catalogues take few blocks.
const WIDE_BLOCK: usize = if cfg!(test) { 256 } else { 16_384 };
/// The same for several queries: their codes stay in the L2 cache from query to query.
const SHARED_BYTES: usize = if cfg!(test) { 4096 } else { 256 << 10 };
/// The fewest rows of such a block, which say where to begin; more where many are wanted.
const LEAST_SHARED: usize = if cfg!(test) { 64 } else { 1024 };
/// Queries whose bounds are computed together, from one read of the codes.
const TOGETHER: usize = 4;
/// One row of so many says where to begin.
const SAMPLED: usize = 8;
/// Rows from which the 8-bit filter pays for itself.
const WORTH_FILTERING: usize = if cfg!(test) { 64 } else { 2048 };

/// Exact scan over f32 or f16 rows.
#[derive(Debug)]
pub struct BruteForce {
    exact: Exact,
    coarse: Option<Coarse>,
}

impl BruteForce {
    /// Shares the matrix; computes norms where the metric needs them.
    pub fn new(matrix: Matrix, metric: Metric, kernel: Kernel) -> Self {
        Self::over(Exact::new(matrix, metric, kernel))
    }

    /// Over the rows of `exact`.
    pub fn over(exact: Exact) -> Self {
        let coarse = if exact.rows().n_rows() >= WORTH_FILTERING { Coarse::new(exact.rows()) } else { None };
        BruteForce { exact, coarse }
    }
}

impl VectorIndex for BruteForce {
    fn kind(&self) -> IndexKind {
        IndexKind::BruteForce
    }

    fn bytes(&self) -> usize {
        size_of_val(self.exact.norms()) + self.coarse.as_ref().map_or(0, Coarse::bytes)
    }

    fn dim(&self) -> usize {
        self.exact.rows().dim()
    }

    fn search(
        &self,
        query: &[f32],
        k: usize,
        filter: Filter<'_>,
        _params: &SearchParams,
        scratch: &mut SearchScratch,
        out: &mut Vec<Scored>,
    ) {
        if query.len() == self.dim() {
            self.run(query, k, filter, scratch, std::slice::from_mut(out));
        }
    }

    /// Rows are read once for all queries.
    fn search_batch(
        &self,
        queries: &[f32],
        k: usize,
        filter: Filter<'_>,
        _params: &SearchParams,
        scratch: &mut SearchScratch,
        out: &mut [Vec<Scored>],
    ) {
        if queries.len() == self.dim() * out.len() {
            self.run(queries, k, filter, scratch, out);
        }
    }

    fn scores(&self, query: &[f32], rows: &[u32], scratch: &mut SearchScratch, out: &mut Vec<f32>) {
        self.exact.scores(query, rows, &mut scratch.block, out);
    }
}

/// Writes the places of the values that are not below `threshold` (NaN is not) and returns how many there are. `places` is as long as
/// `values`.
#[expect(clippy::neg_cmp_op_on_partial_ord, reason = "NaN is not below")]
fn not_below(threshold: f32, values: &[f32], places: &mut [u32]) -> usize {
    let (wide, rest) = values.as_chunks::<GROUP>();
    let mut n = 0;
    // Without a branch on the single value.
    let mut look = |values: &[f32], first: usize| {
        for (at, &value) in values.iter().enumerate() {
            // `n <= first + at`.
            places[n] = (first + at) as u32;
            n += usize::from(!(value < threshold));
        }
    };
    for (at, values) in wide.iter().enumerate() {
        // Mostly none of them is.
        if values.iter().fold(false, |is, &value| is | !(value < threshold)) {
            look(values, at * GROUP);
        }
    }
    look(rest, wide.len() * GROUP);
    n
}

/// Keeps the `n` best of `best`, which has as many, and returns the score of the last of them, -∞ for NaN.
fn nth(best: &mut Vec<Packed>, n: usize) -> f32 {
    best.select_nth_unstable(n - 1);
    best.truncate(n);
    let score = Scored::from(best[n - 1]).score;
    if score.is_nan() { f32::NEG_INFINITY } else { score }
}

/// A score that `k` of the first rows reach, by the lower bounds of their scores; -∞ where that can't be said. Uses `best`
/// and leaves it empty.
fn begin(lower: &[f32], k: usize, filter: Filter<'_>, best: &mut Vec<Packed>, passing: &mut [u32]) -> f32 {
    // A sample says where about `1.5 k` rows begin; with what is not allowed taken out, `k` are mostly left.
    best.extend(lower.iter().step_by(SAMPLED).map(|&score| Packed::from(Scored { row: 0, score })));
    let about = (k + k / 2).div_ceil(SAMPLED) + 8;
    let mut threshold = f32::NEG_INFINITY;
    if about < best.len() {
        let guess = nth(best, about);
        best.clear();
        let n_passing = not_below(guess, lower, passing);
        let rows = passing[..n_passing].iter().copied().filter(|&row| filter.allows(row));
        best.extend(rows.map(|row| Packed::from(Scored { row, score: lower[row as usize] })));
        if best.len() >= k {
            threshold = nth(best, k);
        }
    }
    best.clear();
    threshold
}

fn quarters(values: &mut [f32]) -> [&mut [f32]; 4] {
    let (left, right) = values.split_at_mut(values.len() / 2);
    let ((a, b), (c, d)) = (left.split_at_mut(left.len() / 2), right.split_at_mut(right.len() / 2));
    [a, b, c, d]
}

/// Bounds the scores of the rows of a block for up to [`TOGETHER`] queries, one after another in `lower` and `upper`.
fn bound(coarse: &Coarse, some: &[Progress], first: usize, lower: &mut [f32], upper: &mut [f32]) {
    let padded = lower.len() / some.len().max(1);
    if let [a, b, c, d] = some {
        return coarse.bounds([&a.coarse, &b.coarse, &c.coarse, &d.coarse], first, quarters(lower), quarters(upper));
    }
    for (one, (lower, upper)) in some.iter().zip(lower.chunks_exact_mut(padded).zip(upper.chunks_exact_mut(padded))) {
        coarse.bounds([&one.coarse], first, [lower], [upper]);
    }
}

/// Where the search for one query stands.
#[derive(Debug, Default)]
pub struct Progress {
    coarse: CoarseQuery,
    norm: f32,
    /// What is below it is not among the best.
    threshold: f32,
    /// Of those that may be among the best, scores, or with the 8-bit filter lower bounds of theirs.
    best: Vec<Packed>,
    /// Rows that may be among the best, and the most that the score of each can be.
    maybe: Vec<u32>,
    most: Vec<f32>,
}

impl BruteForce {
    fn run(&self, queries: &[f32], k: usize, filter: Filter<'_>, scratch: &mut SearchScratch, out: &mut [Vec<Scored>]) {
        if k == 0 || out.is_empty() {
            return;
        }
        let (n, dim) = (self.exact.rows().n_rows(), self.dim().max(1));
        let mut all = std::mem::take(&mut scratch.exact_scans);
        all.resize_with(all.len().max(out.len()), Progress::default);
        for (query, one) in queries.chunks_exact(dim).zip(&mut all) {
            one.norm = self.exact.query_norm(query);
            one.threshold = f32::NEG_INFINITY;
            one.best.clear();
        }
        match &self.coarse {
            Some(coarse) if k <= n / 8 => self.filtered(coarse, queries, k, filter, scratch, &mut all[..out.len()]),
            _ => self.scan(queries, k, filter, scratch, &mut all[..out.len()]),
        }
        for (one, out) in all.iter_mut().zip(out) {
            keep_best(&mut one.best, k);
            out.extend(one.best.iter().map(|&p| Scored::from(p)));
        }
        scratch.exact_scans = all;
    }

    /// Bounds every score by the 8-bit matrix, and computes those that may be among the best: a superset of the best `k`.
    fn filtered(
        &self,
        coarse: &Coarse,
        queries: &[f32],
        k: usize,
        filter: Filter<'_>,
        scratch: &mut SearchScratch,
        all: &mut [Progress],
    ) {
        let SearchScratch { block: converted, lower, upper, passing, rows, exact, .. } = scratch;
        let (n, dim) = (self.exact.rows().n_rows(), self.dim().max(1));
        for (query, one) in queries.chunks_exact(dim).zip(&mut *all) {
            coarse.prepare(query, &mut one.coarse);
            one.maybe.clear();
            one.most.clear();
        }
        let wide = match all {
            [_] => WIDE_BLOCK,
            _ => (SHARED_BYTES / dim).clamp(LEAST_SHARED, WIDE_BLOCK).max((8 * k).min(WIDE_BLOCK)),
        };
        let wide = wide.next_multiple_of(GROUP);
        let block = n.min(wide).next_multiple_of(GROUP);
        lower.resize(block * all.len().min(TOGETHER), 0.0);
        upper.resize(block * all.len().min(TOGETHER), 0.0);
        passing.resize(passing.len().max(block), 0);
        for start in (0..n).step_by(wide) {
            let end = (start + wide).min(n);
            let padded = (end - start).next_multiple_of(GROUP);
            for some in all.chunks_mut(TOGETHER) {
                let (lower, upper) = (&mut lower[..some.len() * padded], &mut upper[..some.len() * padded]);
                bound(coarse, some, start / GROUP, lower, upper);
                let bounds = lower.chunks_exact_mut(padded).zip(upper.chunks_exact_mut(padded));
                for (one, (lower, upper)) in some.iter_mut().zip(bounds) {
                    if self.exact.metric() != Metric::InnerProduct {
                        for at in 0..end - start {
                            // Rising in the inner product, but rounded on its way.
                            let slack = 1e-5 * (1.0 + self.exact.norms()[start + at] + one.norm * one.norm);
                            lower[at] = self.exact.finish(lower[at], start + at, one.norm) - slack;
                            upper[at] = self.exact.finish(upper[at], start + at, one.norm) + slack;
                        }
                    }
                    if start == 0 {
                        one.threshold = begin(&lower[..end], k, filter, &mut one.best, passing);
                    }
                    let n_passing = not_below(one.threshold, &upper[..end - start], passing);
                    for at in passing[..n_passing].iter().map(|&at| at as usize) {
                        let row = (start + at) as u32;
                        if filter.allows(row) {
                            one.maybe.push(row);
                            one.most.push(upper[at]);
                            one.best.push(Packed::from(Scored { row, score: lower[at] }));
                        }
                    }
                    // `best` holds lower bounds: the k-th of them is a score that k rows reach.
                    if one.best.len() > k {
                        one.threshold = nth(&mut one.best, k);
                    }
                }
            }
        }
        for (query, one) in queries.chunks_exact(dim).zip(all) {
            rows.clear();
            passing.resize(passing.len().max(one.maybe.len()), 0);
            let n_passing = not_below(one.threshold, &one.most, passing);
            rows.extend(passing[..n_passing].iter().map(|&at| one.maybe[at as usize]));
            self.exact.rescore(query, rows, converted, exact, &mut one.best);
        }
    }

    /// Computes every score; what is kept is a superset of the best `k`.
    fn scan(&self, queries: &[f32], k: usize, filter: Filter<'_>, scratch: &mut SearchScratch, all: &mut [Progress]) {
        let SearchScratch { scores, block, passing, .. } = scratch;
        let (n, dim) = (self.exact.rows().n_rows(), self.dim().max(1));
        scores.resize(BLOCK, 0.0);
        passing.resize(passing.len().max(BLOCK), 0);
        // Nothing below the k-th best so far gets into the buffer; it is pruned to k when it holds 3k.
        let room = 3 * k + BLOCK;
        for start in (0..n).step_by(BLOCK) {
            let end = (start + BLOCK).min(n);
            let scores = &mut scores[..end - start];
            let rows = self.exact.rows().block(start..end, block);
            for (query, Progress { norm, threshold, best, .. }) in queries.chunks_exact(dim).zip(&mut *all) {
                self.exact.kernel().dots(query, rows, scores);
                if self.exact.metric() != Metric::InnerProduct {
                    for (at, score) in scores.iter_mut().enumerate() {
                        *score = self.exact.finish(*score, start + at, *norm);
                    }
                }
                let n_passing = not_below(*threshold, scores, passing);
                for at in passing[..n_passing].iter().map(|&at| at as usize) {
                    let (row, score) = ((start + at) as u32, scores[at]);
                    if !score.is_nan() && filter.allows(row) {
                        best.push(Packed::from(Scored { row, score }));
                    }
                }
                if best.len() >= room {
                    best.select_nth_unstable(k - 1);
                    best.truncate(k);
                    *threshold = Scored::from(best[k - 1]).score;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::candidates::best_first;
    use crate::catalog::generation::MatrixData;
    use half::f16;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn equals_sorting_everything(
            rows in prop::collection::vec(prop::collection::vec(-4i8..5, 3), 1..1600),
            query in prop::collection::vec(-4i8..5, 3), k in 1usize..40, every in 2u32..5,
            metric in prop::sample::select(vec![Metric::InnerProduct, Metric::Cosine, Metric::L2]), half in any::<bool>(),
        ) {
            // Small integers: exact in f16 and in every order of summation, with many ties.
            let values: Vec<f32> = rows.iter().flatten().map(|&v| f32::from(v)).collect();
            let query: Vec<f32> = query.iter().map(|&v| f32::from(v)).collect();
            let data = match half {
                true => MatrixData::F16(values.iter().map(|&v| f16::from_f32(v)).collect::<Vec<_>>().into()),
                false => MatrixData::F32(values.into()),
            };
            let index = BruteForce::new(Matrix { dim: 3, data }, metric, Kernel::detect());
            let allows = |row: u32| !row.is_multiple_of(every);
            let (all, mut scores) = ((0..rows.len() as u32).collect::<Vec<_>>(), Vec::new());
            index.scores(&query, &all, &mut SearchScratch::default(), &mut scores);
            let mut want: Vec<Scored> =
                all.iter().zip(scores).map(|(&row, score)| Scored { row, score }).filter(|s| allows(s.row)).collect();
            want.sort_by(best_first);
            want.truncate(k);
            let mut got = Vec::new();
            let filter = Filter::predicate(&allows);
            index.search(&query, k, filter, &SearchParams::default(), &mut SearchScratch::default(), &mut got);
            prop_assert_eq!(got, want);
        }
    }
}
