//! A user's vector from a history: one step of implicit ALS against the items' vectors (Hu, Koren & Volinsky, ICDM 2008),
//! solved by conjugate gradients (Takács, Pilászy & Tikk, RecSys 2011).
//!
//! Vectors of another origin than ALS are served, too: what folding in the trained users' own histories gives is compared
//! with their trained vectors at load, and its length is corrected by the median ratio. A user with a trained vector keeps it,
//! moved by the difference that the new events make.

use rayon::prelude::*;

use crate::catalog::generation::{Generation, Interaction, Matrix, Metric};
use crate::index::Kernel;

/// Steps of conjugate gradients, at most.
const STEPS: usize = 16;
/// They end when the residual is this share of what it was.
const TOLERANCE: f32 = 1e-3;
/// Trained users that the length is taken from.
const SAMPLE: usize = 256;

/// How much a history entry counts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FoldInParams {
    /// Confidence of an entry of weight 1; items not in the history have 1.
    pub alpha: f32,
    /// Regularization.
    pub regularization: f32,
}

/// What folding in needs of the item vectors.
#[derive(Debug)]
pub struct FoldIn {
    params: FoldInParams,
    dim: usize,
    metric: Metric,
    kernel: Kernel,
    /// f32 `[dim, dim]`: the item vectors' Gram matrix, and the regularization on its diagonal.
    gram: Vec<f32>,
    /// Length of a trained vector for that of a folded one.
    scale: f32,
    /// Cosine of both, median over the sample; NaN without trained users.
    agreement: f32,
}

/// Appends the vector of an item's row; says whether it has one.
pub type VectorOf<'a> = dyn Fn(u32, &mut Vec<f32>) -> bool + 'a;

/// Buffers, reused from request to request.
#[derive(Debug, Default)]
pub struct FoldInScratch {
    /// `[entries, dim]`
    vectors: Vec<f32>,
    confidences: Vec<f32>,
    residual: Vec<f32>,
    direction: Vec<f32>,
    product: Vec<f32>,
    folded: Vec<f32>,
}

impl FoldIn {
    /// Reads all item vectors, in parallel; `None` without any. 1 M x 128 takes some seconds of CPU time.
    pub fn new(generation: &Generation, params: FoldInParams) -> Option<Self> {
        let items = generation.item_embeddings.as_ref().filter(|items| items.n_rows() > 0)?;
        let dim = items.dim;
        let rows: Vec<u32> = (0..items.n_rows() as u32).collect();
        let mut gram = rows
            .par_chunks(4096)
            .map(|rows| {
                let (mut gram, mut vectors) = (vec![0.0; dim * dim], Vec::new());
                rows.iter().for_each(|&row| items.extend_row(row, &mut vectors));
                for vector in vectors.chunks_exact(dim) {
                    // It is symmetric: the half from the diagonal on.
                    for (at, line) in gram.chunks_exact_mut(dim).enumerate() {
                        add_scaled(vector[at], &vector[at..], &mut line[at..]);
                    }
                }
                gram
            })
            .reduce(
                || vec![0.0; dim * dim],
                |mut a, b| {
                    a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
                    a
                },
            );
        for at in 0..dim {
            gram[at * dim + at] += params.regularization;
            (0..at).for_each(|before| gram[at * dim + before] = gram[before * dim + at]);
        }
        let mut fold = FoldIn {
            params,
            dim,
            metric: generation.metric,
            kernel: Kernel::detect(),
            gram,
            scale: 1.0,
            agreement: f32::NAN,
        };
        fold.fit_length(generation, items);
        Some(fold)
    }

    fn fit_length(&mut self, generation: &Generation, items: &Matrix) {
        let Some(trained) = &generation.user_embeddings else { return };
        let n = trained.n_rows();
        let (mut scratch, mut folded, mut own) = (FoldInScratch::default(), Vec::new(), Vec::new());
        let (mut ratios, mut cosines) = (Vec::new(), Vec::new());
        for at in 0..SAMPLE.min(n) {
            let user = (at * n / SAMPLE.min(n)) as u32;
            let history: Vec<Interaction> = generation.histories.of(user).collect();
            own.clear();
            trained.extend_row(user, &mut own);
            self.solve(&of_matrix(items), &history, &mut scratch, &mut folded);
            let (a, b) = (self.kernel.dot(&own, &own).sqrt(), self.kernel.dot(&folded, &folded).sqrt());
            if a > 0.0 && b > 0.0 {
                ratios.push(a / b);
                cosines.push(self.kernel.dot(&own, &folded) / (a * b));
            }
        }
        if let (Some(ratio), Some(cosine)) = (median(&mut ratios), median(&mut cosines)) {
            (self.scale, self.agreement) = (ratio, cosine);
        }
    }

    /// How well folding in the trained users' histories gives their vectors: the median cosine; NaN without trained users.
    pub fn agreement(&self) -> f32 {
        self.agreement
    }

    /// Makes `vector` that of a user with the given history. Empty, it is made of the history alone; else it holds the trained
    /// vector, which `trained` led to, and moves by what the history changes. Where nothing is liked it stays as it is.
    pub fn fold_in(
        &self,
        items: &VectorOf<'_>,
        trained: &[Interaction],
        history: &[Interaction],
        scratch: &mut FoldInScratch,
        vector: &mut Vec<f32>,
    ) {
        let mut folded = std::mem::take(&mut scratch.folded);
        if vector.is_empty() {
            if self.solve(items, history, scratch, &mut folded) {
                vector.extend(folded.iter().map(|value| self.scale * value));
            }
        } else {
            for (history, sign) in [(history, self.scale), (trained, -self.scale)] {
                self.solve(items, history, scratch, &mut folded);
                add_scaled(sign, &folded, vector);
            }
        }
        scratch.folded = folded;
    }

    /// The vector of a history alone, `[dim]`, zeros where nothing is liked; says whether something is.
    fn solve(
        &self,
        items: &VectorOf<'_>,
        history: &[Interaction],
        scratch: &mut FoldInScratch,
        x: &mut Vec<f32>,
    ) -> bool {
        let FoldInScratch { vectors, confidences, residual, direction, product, .. } = scratch;
        vectors.clear();
        confidences.clear();
        for entry in history.iter().filter(|entry| entry.weight > 0.0) {
            // Who came without a vector says nothing here.
            if !items(entry.row, vectors) {
                continue;
            }
            confidences.push(if self.metric == Metric::L2 { entry.weight } else { self.params.alpha * entry.weight });
        }
        x.clear();
        x.resize(self.dim, 0.0);
        let liked = || confidences.iter().copied().zip(vectors.chunks_exact(self.dim));
        if self.metric == Metric::L2 {
            // Near what is liked, not large where it is.
            let all: f32 = confidences.iter().sum();
            liked().for_each(|(weight, vector)| add_scaled(weight / all, vector, x));
            return all > 0.0;
        }
        residual.clear();
        residual.resize(self.dim, 0.0);
        liked().for_each(|(confidence, vector)| add_scaled(confidence, vector, residual));
        direction.clone_from(residual);
        product.resize(self.dim, 0.0);
        let first = self.kernel.dot(residual, residual);
        let mut error = first;
        for _ in 0..STEPS {
            if error <= first * TOLERANCE * TOLERANCE {
                break;
            }
            self.kernel.dots(direction, &self.gram, product);
            liked().for_each(|(confidence, vector)| {
                add_scaled((confidence - 1.0) * self.kernel.dot(vector, direction), vector, product)
            });
            let step = error / self.kernel.dot(direction, product);
            if !step.is_finite() {
                break;
            }
            add_scaled(step, direction, x);
            add_scaled(-step, product, residual);
            let next = self.kernel.dot(residual, residual);
            let share = next / error;
            direction.iter_mut().zip(&*residual).for_each(|(d, r)| *d = r + share * *d);
            error = next;
        }
        !confidences.is_empty()
    }
}

fn of_matrix(items: &Matrix) -> impl Fn(u32, &mut Vec<f32>) -> bool + '_ {
    |row, out| {
        items.extend_row(row, out);
        true
    }
}

/// `to += by * from`
fn add_scaled(by: f32, from: &[f32], to: &mut [f32]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to += by * from);
}

fn median(values: &mut [f32]) -> Option<f32> {
    values.sort_unstable_by(f32::total_cmp);
    values.get(values.len() / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::generation::{Histories, MatrixData, testing};
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    const DIM: usize = 12;
    const PARAMS: FoldInParams = FoldInParams { alpha: 20.0, regularization: 0.1 };

    fn generation(n: usize, metric: Metric) -> Generation {
        let mut random = StdRng::seed_from_u64(7);
        let mut generation =
            testing::with_embeddings((0..n * DIM).map(|_| random.random_range(-1.0..1.0)).collect(), DIM);
        generation.metric = metric;
        generation
    }

    fn history(rows: &[(u32, f32)]) -> Vec<Interaction> {
        rows.iter().map(|&(row, weight)| Interaction { row, weight }).collect()
    }

    fn items(generation: &Generation) -> &Matrix {
        generation.item_embeddings.as_ref().unwrap()
    }

    /// The normal equations in f64, solved by elimination.
    fn exact(generation: &Generation, history: &[Interaction]) -> Vec<f64> {
        let mut flat = Vec::new();
        (0..generation.items.len() as u32).for_each(|row| items(generation).extend_row(row, &mut flat));
        let rows: Vec<&[f32]> = flat.chunks_exact(DIM).collect();
        let mut system = vec![vec![0.0f64; DIM + 1]; DIM];
        let mut add = |vector: &[f32], by: f64, right: f64| {
            for i in 0..DIM {
                (0..DIM).for_each(|j| system[i][j] += by * f64::from(vector[i]) * f64::from(vector[j]));
                system[i][DIM] += right * f64::from(vector[i]);
            }
        };
        rows.iter().for_each(|vector| add(vector, 1.0, 0.0));
        for entry in history.iter().filter(|e| e.weight > 0.0) {
            let confidence = f64::from(PARAMS.alpha * entry.weight);
            add(rows[entry.row as usize], confidence - 1.0, confidence);
        }
        (0..DIM).for_each(|i| system[i][i] += f64::from(PARAMS.regularization));
        for i in 0..DIM {
            for j in (0..DIM).filter(|j| *j != i) {
                let by = system[j][i] / system[i][i];
                (i..=DIM).for_each(|k| system[j][k] -= by * system[i][k]);
            }
        }
        (0..DIM).map(|i| system[i][DIM] / system[i][i]).collect()
    }

    fn fold(fold_in: &FoldIn, of: &Generation, trained: &[Interaction], all: &[Interaction], from: &[f32]) -> Vec<f32> {
        let mut vector = from.to_vec();
        fold_in.fold_in(&of_matrix(items(of)), trained, all, &mut FoldInScratch::default(), &mut vector);
        vector
    }

    #[test]
    fn a_new_user_gets_the_solution() {
        let generation = generation(200, Metric::InnerProduct);
        let fold_in = FoldIn::new(&generation, PARAMS).unwrap();
        for rows in [&[(3, 1.0)][..], &[(3, 1.0), (50, 0.2), (7, 0.0)], &(0..60).map(|r| (r, 0.5)).collect::<Vec<_>>()]
        {
            let history = history(rows);
            let (got, want) = (fold(&fold_in, &generation, &[], &history, &[]), exact(&generation, &history));
            let length = want.iter().map(|w| w * w).sum::<f64>().sqrt();
            let off = got.iter().zip(&want).map(|(g, w)| (f64::from(*g) - w).powi(2)).sum::<f64>().sqrt();
            assert!(off < 5e-3 * length, "{off} of {length}");
        }
        assert!(fold(&fold_in, &generation, &[], &history(&[(3, 0.0)]), &[]).is_empty());
    }

    #[test]
    fn a_trained_vector_moves_by_what_is_new() {
        let mut generation = generation(200, Metric::InnerProduct);
        let old = history(&[(3, 1.0), (9, 1.0)]);
        let fold_in = FoldIn::new(&generation, PARAMS).unwrap();
        let own = fold(&fold_in, &generation, &[], &old, &[]);
        assert_eq!(fold(&fold_in, &generation, &old, &old, &own), own);
        let all = history(&[(3, 1.0), (9, 1.0), (100, 1.0)]);
        let (moved, fresh) =
            (fold(&fold_in, &generation, &old, &all, &own), fold(&fold_in, &generation, &[], &all, &[]));
        assert!(moved.iter().zip(&fresh).all(|(a, b)| (a - b).abs() < 1e-4));
        // Vectors of thrice the length: what is folded in has that length, too.
        generation.user_embeddings =
            Some(Matrix { dim: DIM, data: MatrixData::F32(own.iter().map(|v| 3.0 * v).collect::<Vec<_>>().into()) });
        generation.histories =
            Histories { offsets: vec![0, 2].into(), rows: vec![3, 9].into(), weights: vec![1.0, 1.0].into() };
        let fold_in = FoldIn::new(&generation, PARAMS).unwrap();
        assert!(fold_in.agreement() > 0.9999);
        let longer = fold(&fold_in, &generation, &[], &all, &[]);
        assert!(longer.iter().zip(&fresh).all(|(a, b)| (a - 3.0 * b).abs() < 1e-3));
    }

    #[test]
    fn distances_want_the_middle_of_what_is_liked() {
        let generation = generation(20, Metric::L2);
        let fold_in = FoldIn::new(&generation, PARAMS).unwrap();
        let (mut a, mut b) = (Vec::new(), Vec::new());
        items(&generation).extend_row(3, &mut a);
        items(&generation).extend_row(4, &mut b);
        let got = fold(&fold_in, &generation, &[], &history(&[(3, 1.0), (4, 0.5)]), &[]);
        assert!(got.iter().zip(a.iter().zip(b)).all(|(g, (a, b))| (g - (a / 1.5 + b / 3.0)).abs() < 1e-6));
    }
}
