//! Exact scores of chosen rows.

use super::Kernel;
use crate::candidates::{Packed, Scored};
use crate::catalog::generation::{Matrix, MatrixData, Metric};
use crate::memory::prefetch_range;
use half::slice::HalfFloatSliceExt;

/// Rows ahead of its use that a row is asked for.
const AHEAD: usize = 4;

/// What of a vector goes into its scores beside inner products, by its `|x|²`: cosine: `1 / |x|`; L2: `|x|²`.
pub fn norm(metric: Metric, square: f32) -> f32 {
    match metric {
        Metric::Cosine if square > 0.0 => 1.0 / square.sqrt(),
        Metric::Cosine => 0.0,
        _ => square,
    }
}

/// Turns an inner product with a vector of that [`norm`] into the metric's score. `query_norm` is `|q|`.
#[inline]
pub fn score(metric: Metric, dot: f32, norm: f32, query_norm: f32) -> f32 {
    match metric {
        Metric::InnerProduct => dot,
        Metric::Cosine if query_norm > 0.0 => dot * norm / query_norm,
        Metric::Cosine => 0.0,
        Metric::L2 => 2.0 * dot - norm - query_norm * query_norm,
    }
}

/// A matrix and how its rows score.
#[derive(Debug)]
pub struct Exact {
    matrix: Matrix,
    metric: Metric,
    kernel: Kernel,
    /// Cosine: `1 / |x|`; L2: `|x|²`; inner product: empty.
    norms: Vec<f32>,
}

impl Exact {
    /// Shares the matrix; computes norms where the metric needs them.
    pub fn new(matrix: Matrix, metric: Metric, kernel: Kernel) -> Self {
        let mut norms = Vec::new();
        if metric != Metric::InnerProduct {
            let mut row = Vec::with_capacity(matrix.dim);
            for at in 0..matrix.n_rows() {
                row.clear();
                matrix.extend_row(at as u32, &mut row);
                norms.push(norm(metric, kernel.dot(&row, &row)));
            }
        }
        Exact { matrix, metric, kernel, norms }
    }

    /// The rows.
    pub fn matrix(&self) -> &Matrix {
        &self.matrix
    }

    /// How they compare.
    pub fn metric(&self) -> Metric {
        self.metric
    }

    /// The kernel of inner products.
    pub fn kernel(&self) -> Kernel {
        self.kernel
    }

    /// Cosine: `1 / |x|`; L2: `|x|²`; inner product: empty.
    pub fn norms(&self) -> &[f32] {
        &self.norms
    }

    /// `|q|` where the metric needs it, else 0.
    pub fn query_norm(&self, query: &[f32]) -> f32 {
        match self.metric {
            Metric::InnerProduct => 0.0,
            _ => self.kernel.dot(query, query).sqrt(),
        }
    }

    /// Turns an inner product into the metric's score. `query_norm` is `|q|`.
    pub fn finish(&self, dot: f32, row: usize, query_norm: f32) -> f32 {
        let norm = if self.metric == Metric::InnerProduct { 0.0 } else { self.norms[row] };
        score(self.metric, dot, norm, query_norm)
    }

    /// Replaces `best` by `rows` with their scores; those that are not a number are left out. `converted` and `scores` are buffers.
    pub fn rescore(
        &self,
        query: &[f32],
        rows: &[u32],
        converted: &mut Vec<f32>,
        scores: &mut Vec<f32>,
        best: &mut Vec<Packed>,
    ) {
        scores.clear();
        self.scores(query, rows, converted, scores);
        best.clear();
        let scored = rows.iter().zip(&*scores).filter(|(_, score)| !score.is_nan());
        best.extend(scored.map(|(&row, &score)| Packed::from(Scored { row, score })));
    }

    /// Appends the score of each of `rows`; `converted` is a buffer.
    pub fn scores(&self, query: &[f32], rows: &[u32], converted: &mut Vec<f32>, out: &mut Vec<f32>) {
        let query_norm = self.query_norm(query);
        let dim = self.matrix.dim;
        let range = |row: u32| row as usize * dim..(row as usize + 1) * dim;
        for (at, &row) in rows.iter().enumerate() {
            let soon = rows.get(at + AHEAD).map_or(0..0, |&row| range(row));
            let values = match &self.matrix.data {
                MatrixData::F32(values) => {
                    prefetch_range(values, soon);
                    &values[range(row)]
                }
                MatrixData::F16(values) => {
                    prefetch_range(values, soon);
                    converted.resize(dim, 0.0);
                    values[range(row)].convert_to_f32_slice(converted);
                    &converted[..]
                }
            };
            out.push(self.finish(self.kernel.dot(query, values), row as usize, query_norm));
        }
    }
}
