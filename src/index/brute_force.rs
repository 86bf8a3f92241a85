//! Exact scan: the oracle that other index kinds are held against. Where the CPU allows, an 8-bit copy of the matrix leaves out
//! what can't be among the best; the answers are the same.

use super::coarse::{Coarse, GROUP};
use super::exact::Exact;
use super::{Filter, IndexKind, Kernel, SearchParams, SearchScratch, VectorIndex};
use crate::candidates::{Packed, Scored, keep_best};
use crate::catalog::generation::{Matrix, MatrixData, Metric};
use half::slice::HalfFloatSliceExt;

/// Rows scored at a time: scores and converted rows stay in the L1 and L2 caches.
const BLOCK: usize = 512;
/// Rows that the 8-bit filter bounds at a time: few enough for the L2 cache, so many that most catalogues take few blocks.
const WIDE_BLOCK: usize = if cfg!(test) { 256 } else { 16_384 };
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
        let coarse = if matrix.n_rows() >= WORTH_FILTERING { Coarse::new(&matrix) } else { None };
        BruteForce { exact: Exact::new(matrix, metric, kernel), coarse }
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
        self.exact.matrix().dim
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
        let dim = self.exact.matrix().dim;
        if k == 0 || query.len() != dim {
            return;
        }
        let query_norm = self.exact.query_norm(query);
        match &self.coarse {
            Some(coarse) if k <= self.exact.matrix().n_rows() / 8 => {
                self.filtered(coarse, query, query_norm, k, filter, scratch);
            }
            _ => self.scan(query, query_norm, k, filter, scratch),
        }
        keep_best(&mut scratch.best, k);
        out.extend(scratch.best.iter().map(|&p| Scored::from(p)));
    }

    fn scores(&self, query: &[f32], rows: &[u32], scratch: &mut SearchScratch, out: &mut Vec<f32>) {
        self.exact.scores(query, rows, &mut scratch.block, out);
    }
}

/// Writes the places of the values that are not below `threshold` (NaN is not) and returns how many there are, without a branch
/// on the data. `places` is as long as `values`.
fn not_below(threshold: f32, values: &[f32], places: &mut [u32]) -> usize {
    let mut n = 0;
    for (at, &value) in values.iter().enumerate() {
        // `n <= at`.
        places[n] = at as u32;
        n += usize::from((value >= threshold) | value.is_nan());
    }
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

impl BruteForce {
    /// Bounds every score by the 8-bit matrix, and computes those that may be among the best: a superset of the best `k`.
    fn filtered(
        &self,
        coarse: &Coarse,
        query: &[f32],
        query_norm: f32,
        k: usize,
        filter: Filter<'_>,
        scratch: &mut SearchScratch,
    ) {
        let SearchScratch {
            block: converted,
            best,
            coarse: prepared,
            lower,
            upper,
            passing,
            maybe,
            most,
            rows,
            exact,
            ..
        } = scratch;
        coarse.prepare(query, prepared);
        best.clear();
        maybe.clear();
        most.clear();
        let n = self.exact.matrix().n_rows();
        let block = n.min(WIDE_BLOCK).next_multiple_of(GROUP);
        lower.resize(block, 0.0);
        upper.resize(block, 0.0);
        passing.resize(block, 0);
        // `best` holds lower bounds: the k-th of them is a score that k rows reach.
        let mut threshold = f32::NEG_INFINITY;
        for start in (0..n).step_by(WIDE_BLOCK) {
            let end = (start + WIDE_BLOCK).min(n);
            let padded = (end - start).next_multiple_of(GROUP);
            coarse.bounds(prepared, start / GROUP, &mut lower[..padded], &mut upper[..padded]);
            if self.exact.metric() != Metric::InnerProduct {
                for at in 0..end - start {
                    // Rising in the inner product, but rounded on its way.
                    let slack = 1e-5 * (1.0 + self.exact.norms()[start + at] + query_norm * query_norm);
                    lower[at] = self.exact.finish(lower[at], start + at, query_norm) - slack;
                    upper[at] = self.exact.finish(upper[at], start + at, query_norm) + slack;
                }
            }
            if start == 0 {
                threshold = begin(&lower[..end], k, filter, best, passing);
            }
            let n_passing = not_below(threshold, &upper[..end - start], passing);
            for at in passing[..n_passing].iter().map(|&at| at as usize) {
                let row = (start + at) as u32;
                if filter.allows(row) {
                    maybe.push(row);
                    most.push(upper[at]);
                    best.push(Packed::from(Scored { row, score: lower[at] }));
                }
            }
            if best.len() > k {
                threshold = nth(best, k);
            }
        }
        rows.clear();
        passing.resize(maybe.len().max(block), 0);
        let n_passing = not_below(threshold, most, passing);
        rows.extend(passing[..n_passing].iter().map(|&at| maybe[at as usize]));
        self.exact.rescore(query, rows, converted, exact, best);
    }

    /// Computes every score; `scratch.best` is a superset of the best `k`.
    fn scan(&self, query: &[f32], query_norm: f32, k: usize, filter: Filter<'_>, scratch: &mut SearchScratch) {
        let dim = self.exact.matrix().dim;
        let SearchScratch { scores, block, best, passing, .. } = scratch;
        best.clear();
        scores.resize(BLOCK, 0.0);
        passing.resize(BLOCK, 0);
        // Nothing below the k-th best so far gets into the buffer; it is pruned to k when it holds 3k.
        let (mut threshold, room) = (f32::NEG_INFINITY, 3 * k + BLOCK);
        for start in (0..self.exact.matrix().n_rows()).step_by(BLOCK) {
            let end = (start + BLOCK).min(self.exact.matrix().n_rows());
            let scores = &mut scores[..end - start];
            match &self.exact.matrix().data {
                MatrixData::F32(values) => self.exact.kernel().dots(query, &values[start * dim..end * dim], scores),
                MatrixData::F16(values) => {
                    block.resize((end - start) * dim, 0.0);
                    values[start * dim..end * dim].convert_to_f32_slice(block);
                    self.exact.kernel().dots(query, block, scores);
                }
            }
            if self.exact.metric() != Metric::InnerProduct {
                for (at, score) in scores.iter_mut().enumerate() {
                    *score = self.exact.finish(*score, start + at, query_norm);
                }
            }
            let n_passing = not_below(threshold, scores, passing);
            for at in passing[..n_passing].iter().map(|&at| at as usize) {
                let (row, score) = ((start + at) as u32, scores[at]);
                if !score.is_nan() && filter.allows(row) {
                    best.push(Packed::from(Scored { row, score }));
                }
            }
            if best.len() >= room {
                best.select_nth_unstable(k - 1);
                best.truncate(k);
                threshold = Scored::from(best[k - 1]).score;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::candidates::best_first;
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
