//! Exact scan: the oracle that other index kinds are held against.

use super::{Kernel, SearchScratch, VectorIndex};
use crate::candidates::{Packed, Scored, keep_best};
use crate::catalog::generation::{Matrix, MatrixData, Metric};
use half::slice::HalfFloatSliceExt;

/// Rows scored at a time: scores and converted rows stay in the L1 and L2 caches.
const BLOCK: usize = 512;

/// Exact scan over f32 or f16 rows.
pub struct BruteForce {
    matrix: Matrix,
    metric: Metric,
    kernel: Kernel,
    /// Cosine: `1 / |x|`; L2: `|x|²`; inner product: empty.
    norms: Vec<f32>,
}

impl BruteForce {
    /// Shares the matrix; computes norms where the metric needs them.
    pub fn new(matrix: Matrix, metric: Metric, kernel: Kernel) -> Self {
        let mut norms = Vec::new();
        if metric != Metric::InnerProduct {
            let mut row = Vec::with_capacity(matrix.dim);
            for at in 0..matrix.n_rows() {
                row.clear();
                matrix.extend_row(at as u32, &mut row);
                let square = kernel.dot(&row, &row);
                norms.push(match metric {
                    Metric::Cosine if square > 0.0 => 1.0 / square.sqrt(),
                    Metric::Cosine => 0.0,
                    _ => square,
                });
            }
        }
        BruteForce { matrix, metric, kernel, norms }
    }

    /// Turns an inner product into the metric's score. `query_norm` is `|q|`.
    fn finish(&self, dot: f32, row: usize, query_norm: f32) -> f32 {
        match self.metric {
            Metric::InnerProduct => dot,
            Metric::Cosine if query_norm > 0.0 => dot * self.norms[row] / query_norm,
            Metric::Cosine => 0.0,
            Metric::L2 => 2.0 * dot - self.norms[row] - query_norm * query_norm,
        }
    }

    fn query_norm(&self, query: &[f32]) -> f32 {
        match self.metric {
            Metric::InnerProduct => 0.0,
            _ => self.kernel.dot(query, query).sqrt(),
        }
    }
}

impl VectorIndex for BruteForce {
    fn dim(&self) -> usize {
        self.matrix.dim
    }

    fn search(
        &self,
        query: &[f32],
        k: usize,
        allowed: &dyn Fn(u32) -> bool,
        scratch: &mut SearchScratch,
        out: &mut Vec<Scored>,
    ) {
        let dim = self.matrix.dim;
        if k == 0 || query.len() != dim {
            return;
        }
        let query_norm = self.query_norm(query);
        let SearchScratch { scores, block, best } = scratch;
        best.clear();
        scores.resize(BLOCK, 0.0);
        // Nothing below the k-th best so far gets into the buffer; it is pruned to k when it holds 3k.
        let (mut threshold, room) = (f32::NEG_INFINITY, 3 * k + BLOCK);
        for start in (0..self.matrix.n_rows()).step_by(BLOCK) {
            let end = (start + BLOCK).min(self.matrix.n_rows());
            let scores = &mut scores[..end - start];
            match &self.matrix.data {
                MatrixData::F32(values) => self.kernel.dots(query, &values[start * dim..end * dim], scores),
                MatrixData::F16(values) => {
                    block.resize((end - start) * dim, 0.0);
                    values[start * dim..end * dim].convert_to_f32_slice(block);
                    self.kernel.dots(query, block, scores);
                }
            }
            if self.metric != Metric::InnerProduct {
                for (at, score) in scores.iter_mut().enumerate() {
                    *score = self.finish(*score, start + at, query_norm);
                }
            }
            for (at, &score) in scores.iter().enumerate() {
                let row = (start + at) as u32;
                // Written so that NaN fails; equal scores lose to the lower rows already there.
                if (score > threshold || best.len() < k && score == threshold) && allowed(row) {
                    best.push(Packed::from(Scored { row, score }));
                }
            }
            if best.len() >= room {
                best.select_nth_unstable(k - 1);
                best.truncate(k);
                threshold = Scored::from(best[k - 1]).score;
            }
        }
        keep_best(best, k);
        out.extend(best.iter().map(|&p| Scored::from(p)));
    }

    fn score(&self, query: &[f32], row: u32) -> f32 {
        let (dim, at) = (self.matrix.dim, row as usize);
        let dot = match &self.matrix.data {
            MatrixData::F32(values) => self.kernel.dot(query, &values[at * dim..(at + 1) * dim]),
            MatrixData::F16(values) => {
                query.iter().zip(&values[at * dim..(at + 1) * dim]).map(|(q, x)| q * x.to_f32()).sum()
            }
        };
        self.finish(dot, at, self.query_norm(query))
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
            let allowed = |row: u32| !row.is_multiple_of(every);
            let mut want: Vec<Scored> = (0..rows.len() as u32)
                .filter(|&row| allowed(row))
                .map(|row| Scored { row, score: index.score(&query, row) })
                .collect();
            want.sort_by(best_first);
            want.truncate(k);
            let mut got = Vec::new();
            index.search(&query, k, &allowed, &mut SearchScratch::default(), &mut got);
            prop_assert_eq!(got, want);
        }
    }
}
