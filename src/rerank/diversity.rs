//! Maximal marginal relevance (Carbonell & Goldstein, SIGIR 1998) over item embeddings, and a cap per category.

use super::caps::{Cap, Counts};
use crate::catalog::generation::{Generation, Matrix, MatrixData};
use crate::catalog::live::LiveItems;
use crate::device::RankedItem;
use crate::index::Kernel;

/// Items that MMR chooses from: the best of the ranked ones. Bounds the work to `picks * POOL * dim`.
const POOL: usize = 256;

/// Diversity settings, compiled against a generation.
#[derive(Debug)]
pub struct Diversity {
    lambda: f32,
    max_per_category: u32,
    /// `1 / |x|` per item; empty when MMR is off.
    inverse_norms: Vec<f32>,
    kernel: Kernel,
}

/// Buffers, reused from request to request.
#[derive(Debug, Default)]
pub struct DiversityScratch {
    /// `[pool, dim]` unit vectors, those that are `ready`.
    vectors: Vec<f32>,
    ready: Vec<bool>,
    relevance: Vec<f32>,
    /// Largest similarity to the first so many picks, and how many.
    closest: Vec<(f32, usize)>,
    open: Vec<u32>,
    picked: Vec<u32>,
    categories: Counts,
}

impl Diversity {
    /// `lambda` 1 or a generation without embeddings turn MMR off; `max_per_category` 0 or no category column the cap.
    pub fn new(lambda: f32, max_per_category: u32, generation: &Generation) -> Self {
        let kernel = Kernel::detect();
        let inverse_norms = match &generation.item_embeddings {
            Some(matrix) if lambda < 1.0 => inverse_norms(matrix, kernel),
            _ => Vec::new(),
        };
        Diversity { lambda, max_per_category, inverse_norms, kernel }
    }

    /// Appends up to `n` of `items` (best first) to `out`, in the order picked. Each pick maximises
    /// `λ · relevance - (1 - λ) · max cosine to what is picked`, where relevance is the score scaled to 0..1 within
    /// the pool; ties go to the better ranked. Beyond the pool items follow in the ranker's order.
    pub fn pick(
        &self,
        generation: &Generation,
        live: Option<&LiveItems>,
        items: &[RankedItem],
        n: usize,
        scratch: &mut DiversityScratch,
        out: &mut Vec<RankedItem>,
    ) {
        let DiversityScratch { vectors, ready, relevance, closest, open, picked, categories } = scratch;
        categories.clear();
        let cap = self.cap(generation, live);
        let embeddings = generation.item_embeddings.as_ref().filter(|_| !self.inverse_norms.is_empty());
        let Some(matrix) = embeddings else {
            for item in items {
                if out.len() == n {
                    break;
                }
                if within(cap, item.row, categories) {
                    out.push(*item);
                }
            }
            return;
        };
        let pool = &items[..items.len().min(POOL.max(n))];
        let dim = matrix.dim;
        let finite = || pool.iter().map(|i| i.score).filter(|s| s.is_finite());
        let (low, high) = (finite().fold(f32::INFINITY, f32::min), finite().fold(f32::NEG_INFINITY, f32::max));
        let scale = if high > low { 1.0 / (high - low) } else { 0.0 };
        relevance.clear();
        relevance.extend(pool.iter().map(|i| if i.score.is_finite() { (i.score - low) * scale } else { 0.0 }));
        vectors.resize(vectors.len().max(pool.len() * dim), 0.0);
        ready.clear();
        ready.resize(pool.len(), false);
        closest.clear();
        closest.resize(pool.len(), (f32::NEG_INFINITY, 0));
        open.clear();
        open.extend(0..pool.len() as u32);
        picked.clear();
        let penalty = 1.0 - self.lambda;
        while out.len() < n && !open.is_empty() {
            let (mut best, mut best_value) = (0, f32::NEG_INFINITY);
            for (place, &at) in open.iter().enumerate() {
                let at = at as usize;
                // A cosine is at least -1, rounding apart; relevance falls along the list.
                let most = self.lambda * relevance[at] + penalty * 1.001;
                if most <= best_value {
                    break;
                }
                let (nearest, compared) = &mut closest[at];
                // What was compared with some of the picks can only lose by the others.
                if *compared > 0 && self.lambda * relevance[at] - penalty * *nearest <= best_value {
                    continue;
                }
                if !picked.is_empty() {
                    self.make_ready(matrix, live, pool, at, vectors, ready);
                }
                for &other in &picked[*compared..] {
                    let vector = |at: usize| &vectors[at * dim..(at + 1) * dim];
                    *nearest = nearest.max(self.kernel.dot(vector(at), vector(other as usize)));
                }
                *compared = picked.len();
                let value = self.lambda * relevance[at] - if picked.is_empty() { 0.0 } else { penalty * *nearest };
                if value > best_value {
                    (best, best_value) = (place, value);
                }
            }
            // Order is kept, so that ties go to the better ranked.
            let at = open.remove(best);
            if within(cap, pool[at as usize].row, categories) {
                self.make_ready(matrix, live, pool, at as usize, vectors, ready);
                out.push(pool[at as usize]);
                picked.push(at);
            }
        }
        for item in &items[pool.len()..] {
            if out.len() >= n {
                break;
            }
            if within(cap, item.row, categories) {
                out.push(*item);
            }
        }
    }

    /// Makes the unit vector of the pool's item `at`; most are never needed.
    fn make_ready(
        &self,
        matrix: &Matrix,
        live: Option<&LiveItems>,
        pool: &[RankedItem],
        at: usize,
        vectors: &mut [f32],
        ready: &mut [bool],
    ) {
        if std::mem::replace(&mut ready[at], true) {
            return;
        }
        let (item, dim) = (pool[at].row as usize, matrix.dim);
        let out = &mut vectors[at * dim..(at + 1) * dim];
        if let Some(live) = live.and_then(|live| live.get(pool[at].row))
            && let Some(vector) = &live.vector
        {
            return out.iter_mut().zip(vector).for_each(|(out, v)| *out = v * live.inverse_norm);
        }
        // Who came without a vector is like nobody.
        let Some(inverse) = self.inverse_norms.get(item).copied() else { return out.fill(0.0) };
        match &matrix.data {
            MatrixData::F32(values) => {
                out.iter_mut().zip(&values[item * dim..]).for_each(|(out, v)| *out = v * inverse);
            }
            MatrixData::F16(values) => {
                out.iter_mut().zip(&values[item * dim..]).for_each(|(out, v)| *out = v.to_f32() * inverse);
            }
        }
    }

    /// The cap per category, where there is one.
    pub fn cap<'a>(&self, generation: &'a Generation, items: Option<&'a LiveItems>) -> Option<Cap<'a>> {
        let at = generation.roles.category?;
        let column = &generation.items.columns[at].data;
        (self.max_per_category > 0).then_some(Cap { column, at, items, max: self.max_per_category, first_only: true })
    }
}

/// Counts `row` if it is within the cap, and says whether it was.
fn within(cap: Option<Cap<'_>>, row: u32, counts: &mut Counts) -> bool {
    let Some(cap) = cap else { return true };
    let admitted = cap.admits(row, counts);
    if admitted {
        cap.count(row, counts);
    }
    admitted
}

fn inverse_norms(matrix: &Matrix, kernel: Kernel) -> Vec<f32> {
    let inverse = |norm: f32| if norm > 0.0 { 1.0 / norm.sqrt() } else { 0.0 };
    match &matrix.data {
        MatrixData::F32(values) => values.chunks_exact(matrix.dim).map(|x| inverse(kernel.dot(x, x))).collect(),
        MatrixData::F16(values) => {
            values.chunks_exact(matrix.dim).map(|x| inverse(x.iter().map(|v| v.to_f32() * v.to_f32()).sum())).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::candidates::SourceSet;
    use crate::catalog::generation::testing;
    use proptest::prelude::*;

    fn ranked(scores: &[f32]) -> Vec<RankedItem> {
        let mut items: Vec<RankedItem> = scores
            .iter()
            .enumerate()
            .map(|(row, &score)| RankedItem { row: row as u32, score, sources: SourceSet::default() })
            .collect();
        items.sort_by(|a, b| b.score.total_cmp(&a.score).then(a.row.cmp(&b.row)));
        items
    }

    fn picked(diversity: &Diversity, generation: &Generation, items: &[RankedItem], n: usize) -> Vec<u32> {
        let mut out = Vec::new();
        diversity.pick(generation, None, items, n, &mut DiversityScratch::default(), &mut out);
        out.iter().map(|i| i.row).collect()
    }

    /// The definition, word by word.
    fn naive(lambda: f32, vectors: &[f32], dim: usize, items: &[RankedItem], n: usize) -> Vec<u32> {
        let unit = |row: u32| -> Vec<f32> {
            let x = &vectors[row as usize * dim..(row as usize + 1) * dim];
            let norm = x.iter().map(|v| v * v).sum::<f32>().sqrt();
            x.iter().map(|v| if norm > 0.0 { v / norm } else { 0.0 }).collect()
        };
        let low = items.iter().map(|i| i.score).fold(f32::INFINITY, f32::min);
        let high = items.iter().map(|i| i.score).fold(f32::NEG_INFINITY, f32::max);
        let mut left = items.to_vec();
        let mut out: Vec<u32> = Vec::new();
        while out.len() < n && !left.is_empty() {
            let value = |item: &RankedItem| {
                let relevance = if high > low { (item.score - low) / (high - low) } else { 0.0 };
                let closest = out
                    .iter()
                    .map(|&o| unit(o).iter().zip(unit(item.row)).map(|(a, b)| a * b).sum::<f32>())
                    .fold(f32::NEG_INFINITY, f32::max);
                lambda * relevance - if out.is_empty() { 0.0 } else { (1.0 - lambda) * closest }
            };
            let best = (0..left.len()).rev().max_by(|&a, &b| value(&left[a]).total_cmp(&value(&left[b]))).unwrap();
            out.push(left.remove(best).row);
        }
        out
    }

    proptest! {
        #[test]
        fn equals_the_definition(
            // Distinct powers keep the two versions' rounding from deciding a tie differently.
            vectors in prop::collection::vec(-1.0f32..1.0, 12 * 3),
            scores in prop::collection::vec(0.0f32..1.0, 12),
            lambda in 0.05f32..0.95, n in 1usize..12,
        ) {
            let generation = testing::with_embeddings(vectors.clone(), 3);
            let items = ranked(&scores);
            let got = picked(&Diversity::new(lambda, 0, &generation), &generation, &items, n);
            let want = naive(lambda, &vectors, 3, &items, n);
            prop_assert_eq!(got, want);
        }

        #[test]
        fn lambda_one_keeps_the_order(scores in prop::collection::vec(0.0f32..1.0, 1..20), n in 1usize..20) {
            let generation = testing::with_embeddings(vec![1.0; scores.len() * 2], 2);
            let items = ranked(&scores);
            let got = picked(&Diversity::new(1.0, 0, &generation), &generation, &items, n);
            prop_assert_eq!(got, items.iter().take(n).map(|i| i.row).collect::<Vec<_>>());
        }

        #[test]
        fn cap_holds(categories in prop::collection::vec(0u32..3, 1..30), cap in 1u32..4, lambda in 0.5f32..=1.0) {
            let mut generation = testing::with_embeddings(vec![1.0; categories.len() * 2], 2);
            testing::add_category(&mut generation, "category", &categories);
            let items = ranked(&vec![0.5; categories.len()]);
            let got = picked(&Diversity::new(lambda, cap, &generation), &generation, &items, 30);
            for category in 0..3 {
                let available = categories.iter().filter(|&&c| c == category).count();
                let shown = got.iter().filter(|&&row| categories[row as usize] == category).count();
                prop_assert_eq!(shown, available.min(cap as usize));
            }
        }
    }
}
