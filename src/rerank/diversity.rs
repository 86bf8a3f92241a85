//! Maximal marginal relevance (Carbonell & Goldstein, SIGIR 1998) over item embeddings, and a cap per category.

use super::caps::{Cap, Counts};
use crate::catalog::generation::{Generation, Matrix, MatrixData};
use crate::device::RankedItem;

/// Items that MMR chooses from: the best of the ranked ones. Bounds the work to `picks * POOL * dim`.
const POOL: usize = 256;

/// Diversity settings, compiled against a generation.
#[derive(Debug)]
pub struct Diversity {
    lambda: f32,
    max_per_category: u32,
    /// `1 / |x|` per item; empty when MMR is off.
    inverse_norms: Vec<f32>,
}

/// Buffers, reused from request to request.
#[derive(Debug, Default)]
pub struct DiversityScratch {
    /// `[pool, dim]` unit vectors.
    vectors: Vec<f32>,
    row: Vec<f32>,
    relevance: Vec<f32>,
    /// Largest similarity to anything picked so far.
    closest: Vec<f32>,
    open: Vec<u32>,
    categories: Counts,
}

impl Diversity {
    /// `lambda` 1 or a generation without embeddings turn MMR off; `max_per_category` 0 or no category column the cap.
    pub fn new(lambda: f32, max_per_category: u32, generation: &Generation) -> Self {
        let inverse_norms = match &generation.item_embeddings {
            Some(matrix) if lambda < 1.0 => inverse_norms(matrix),
            _ => Vec::new(),
        };
        Diversity { lambda, max_per_category, inverse_norms }
    }

    /// Appends up to `n` of `items` (best first) to `out`, in the order picked. Each pick maximises
    /// `λ · relevance - (1 - λ) · max cosine to what is picked`, where relevance is the score scaled to 0..1 within
    /// the pool; ties go to the better ranked. Beyond the pool items follow in the ranker's order.
    pub fn pick(
        &self,
        generation: &Generation,
        items: &[RankedItem],
        n: usize,
        scratch: &mut DiversityScratch,
        out: &mut Vec<RankedItem>,
    ) {
        let DiversityScratch { vectors, row, relevance, closest, open, categories } = scratch;
        categories.clear();
        let cap = self.cap(generation);
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
        vectors.clear();
        relevance.clear();
        let finite = || pool.iter().map(|i| i.score).filter(|s| s.is_finite());
        let (low, high) = (finite().fold(f32::INFINITY, f32::min), finite().fold(f32::NEG_INFINITY, f32::max));
        let scale = if high > low { 1.0 / (high - low) } else { 0.0 };
        for item in pool {
            row.clear();
            matrix.extend_row(item.row, row);
            let inverse = self.inverse_norms[item.row as usize];
            vectors.extend(row.iter().map(|v| v * inverse));
            relevance.push(if item.score.is_finite() { (item.score - low) * scale } else { 0.0 });
        }
        closest.clear();
        closest.resize(pool.len(), 0.0);
        open.clear();
        open.extend(0..pool.len() as u32);
        let mut first = true;
        while out.len() < n && !open.is_empty() {
            let value = |at: u32| {
                let penalty = if first { 0.0 } else { closest[at as usize] };
                self.lambda * relevance[at as usize] - (1.0 - self.lambda) * penalty
            };
            let mut best = 0;
            for place in 1..open.len() {
                if value(open[place]) > value(open[best]) {
                    best = place;
                }
            }
            // Order is kept, so that ties go to the better ranked.
            let at = open.remove(best) as usize;
            if !within(cap, pool[at].row, categories) {
                continue;
            }
            out.push(pool[at]);
            let picked = &vectors[at * dim..(at + 1) * dim];
            for &other in open.iter() {
                let other = other as usize;
                let similarity = dot(picked, &vectors[other * dim..(other + 1) * dim]);
                closest[other] = if first { similarity } else { closest[other].max(similarity) };
            }
            first = false;
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

    /// The cap per category, where there is one.
    pub fn cap<'a>(&self, generation: &'a Generation) -> Option<Cap<'a>> {
        let column = &generation.items.columns[generation.roles.category?].data;
        (self.max_per_category > 0).then_some(Cap { column, max: self.max_per_category, first_only: true })
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

fn inverse_norms(matrix: &Matrix) -> Vec<f32> {
    let inverse = |norm: f32| if norm > 0.0 { 1.0 / norm.sqrt() } else { 0.0 };
    match &matrix.data {
        MatrixData::F32(values) => values.chunks_exact(matrix.dim).map(|x| inverse(dot(x, x))).collect(),
        MatrixData::F16(values) => {
            values.chunks_exact(matrix.dim).map(|x| inverse(x.iter().map(|v| v.to_f32() * v.to_f32()).sum())).collect()
        }
    }
}

/// Eight running sums, which the compiler keeps in one vector register.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0f32; 8];
    let (a_chunks, a_rest) = a.as_chunks::<8>();
    let (b_chunks, b_rest) = b.as_chunks::<8>();
    for (a, b) in a_chunks.iter().zip(b_chunks) {
        for lane in 0..8 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    sums.iter().sum::<f32>() + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f32>()
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
        diversity.pick(generation, items, n, &mut DiversityScratch::default(), &mut out);
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
