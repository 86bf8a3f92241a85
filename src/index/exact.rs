//! Exact scores of chosen rows.

use super::Kernel;
use crate::candidates::{Packed, Scored};
use crate::catalog::generation::{Matrix, MatrixData, Metric};
use crate::memory::prefetch_range;
use half::slice::HalfFloatSliceExt;
use std::ops::Range;
use std::sync::Arc;

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

/// Rows of a matrix: all of them, or chosen ones, which then are numbered from 0.
#[derive(Clone, Debug)]
pub struct Rows {
    matrix: Matrix,
    chosen: Option<Arc<[u32]>>,
}

impl Rows {
    /// Number of rows.
    pub fn n_rows(&self) -> usize {
        self.chosen.as_ref().map_or_else(|| self.matrix.n_rows(), |chosen| chosen.len())
    }

    /// Columns.
    pub fn dim(&self) -> usize {
        self.matrix.dim
    }

    /// Appends row `row` to `out` as f32.
    ///
    /// # Panics
    /// If `row` is out of range.
    pub fn extend_row(&self, row: u32, out: &mut Vec<f32>) {
        self.matrix.extend_row(self.of_matrix(row), out);
    }

    /// Some rows one after another, f32; `converted` is a buffer for what does not lie so.
    pub fn block<'a>(&'a self, rows: Range<usize>, converted: &'a mut Vec<f32>) -> &'a [f32] {
        let values = rows.start * self.dim()..rows.end * self.dim();
        match (&self.matrix.data, &self.chosen) {
            (MatrixData::F32(all), None) => return &all[values],
            (MatrixData::F16(all), None) => {
                converted.resize(values.len(), 0.0);
                all[values].convert_to_f32_slice(converted);
            }
            (_, Some(chosen)) => {
                converted.clear();
                chosen[rows].iter().for_each(|&row| self.matrix.extend_row(row, converted));
            }
        }
        converted
    }

    fn of_matrix(&self, row: u32) -> u32 {
        self.chosen.as_ref().map_or(row, |chosen| chosen[row as usize])
    }
}

impl From<Matrix> for Rows {
    fn from(matrix: Matrix) -> Self {
        Rows { matrix, chosen: None }
    }
}

/// Rows of a matrix and how they score.
#[derive(Debug)]
pub struct Exact {
    rows: Rows,
    metric: Metric,
    kernel: Kernel,
    /// Cosine: `1 / |x|`; L2: `|x|²`; inner product: empty.
    norms: Vec<f32>,
}

impl Exact {
    /// Shares the matrix; computes norms where the metric needs them.
    pub fn new(matrix: Matrix, metric: Metric, kernel: Kernel) -> Self {
        Self::over(matrix.into(), metric, kernel)
    }

    /// As [`Self::new`], of `chosen` rows of the matrix alone. The row numbers of everything else here are places in `chosen`.
    ///
    /// # Panics
    /// If a row is out of range.
    pub fn of_chosen(matrix: Matrix, chosen: Arc<[u32]>, metric: Metric, kernel: Kernel) -> Self {
        assert!(chosen.iter().all(|&row| (row as usize) < matrix.n_rows()));
        Self::over(Rows { matrix, chosen: Some(chosen) }, metric, kernel)
    }

    fn over(rows: Rows, metric: Metric, kernel: Kernel) -> Self {
        let mut norms = Vec::new();
        if metric != Metric::InnerProduct {
            let mut row = Vec::with_capacity(rows.dim());
            for at in 0..rows.n_rows() {
                row.clear();
                rows.extend_row(at as u32, &mut row);
                norms.push(norm(metric, kernel.dot(&row, &row)));
            }
        }
        Exact { rows, metric, kernel, norms }
    }

    /// The rows.
    pub fn rows(&self) -> &Rows {
        &self.rows
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
        let dim = self.rows.dim();
        let range = |row: u32| {
            let row = self.rows.of_matrix(row) as usize;
            row * dim..(row + 1) * dim
        };
        for (at, &row) in rows.iter().enumerate() {
            let soon = rows.get(at + AHEAD).map_or(0..0, |&row| range(row));
            let values = match &self.rows.matrix.data {
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
