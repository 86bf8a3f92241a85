//! Making the lists: cluster, assign, code. Parallel; memory beyond the result is a sample and a few blocks a thread.

use half::{bf16, f16};
use rayon::prelude::*;

use super::Ivf;
use super::codes::{BlockMut, Codebook, Codes, Encoder, TRAINED_ON};
use super::parts::{IvfParts, Lists, Vectors, padded};
use crate::catalog::generation::{Metric, NO_ROW};
use crate::index::exact::Exact;
use crate::index::fastscan::{BLOCK, Blocks};
use crate::index::kmeans::{self, Centroids, Groups};
use crate::index::rotation::Rotation;
use crate::index::simd::Simd;
use crate::index::{IndexKind, IvfOptions, Storage};

/// Vectors per list that clusters are trained on.
const SAMPLED: usize = 64;
/// Rows that one task assigns.
const TASK: usize = 1536;
/// What the rank of a block is lifted by the spread of its vectors about their mean, as a share of it.
const LIFT: f32 = 0.2;
/// The same for L2, where it is a share of the product with the spread of all vectors about their centroids.
const L2_LIFT: f32 = 0.4;

/// Told of every step.
type Told<'a> = &'a (dyn Fn(&str, u64, u64) + Sync);

impl Ivf {
    /// Clusters and codes the rows of `exact`.
    ///
    /// # Errors
    /// An option out of its range, or one that does not concern the kind.
    pub fn build(kind: IndexKind, options: &IvfOptions, exact: Exact, told: Told<'_>) -> Result<Self, String> {
        let simd = Simd::detect();
        let plan = Plan::new(kind, options, &exact)?;
        let rows = Rows { exact: &exact };
        let n = exact.rows().n_rows();
        let mut state = options.seed ^ 0x6976_665f_6c69_7374;
        let sample = kmeans::sample(n, plan.n_lists * SAMPLED, &mut state);
        let gathered = rows.gather(&sample);
        let n_iters = plan.n_iters as u64;
        told("k-means", 0, n_iters);
        let trained = |done| told("k-means", done, n_iters);
        let centroids =
            kmeans::train(&gathered, plan.dim, plan.n_lists, usize::MAX, plan.n_iters, options.seed, simd, &trained);
        drop(gathered);
        let nearest = rows.assign(&Centroids::new(&centroids, plan.dim, simd), told);
        let parts = plan.fill(&rows, &centroids, &Groups::new(&nearest, plan.n_lists), simd, told);
        Ivf::from_parts(parts, exact, simd)
    }
}

/// Options with their defaults filled in.
struct Plan {
    kind: IndexKind,
    dim: usize,
    padded: usize,
    n_lists: usize,
    n_iters: usize,
    seed: u64,
    storage: Storage,
    n_subspaces: usize,
    metric: Metric,
}

impl Plan {
    fn new(kind: IndexKind, options: &IvfOptions, exact: &Exact) -> Result<Self, String> {
        let (n, dim) = (exact.rows().n_rows(), exact.rows().dim());
        let padded = padded(dim);
        let n_lists = match options.n_lists {
            Some(wanted) if wanted as usize > n || wanted == 0 => {
                return Err(format!("n_lists = {wanted}: must be 1 to the number of vectors, {n}"));
            }
            _ => options.n_lists_of(n),
        };
        let n_iters = options.kmeans_n_iters_or_usual();
        if !(1..=100).contains(&n_iters) {
            return Err(format!("kmeans_n_iters = {n_iters}: must be 1 to 100"));
        }
        let only = |name: &str, is_set: bool, kinds: &[IndexKind]| match is_set && !kinds.contains(&kind) {
            true => Err(format!("{name} does not concern {kind}")),
            false => Ok(()),
        };
        only("storage", options.storage.is_some(), &[IndexKind::IvfFlat])?;
        only("pq_dim", options.pq_dim.is_some(), &[IndexKind::IvfPq])?;
        let fits = |n: usize| n <= 1024 && n.is_multiple_of(4) && padded.is_multiple_of(n);
        let n_subspaces = match (kind, options.pq_dim) {
            (IndexKind::IvfPq, Some(wanted)) if fits(wanted as usize) && wanted > 0 => wanted as usize,
            (IndexKind::IvfPq, Some(wanted)) => {
                let possible: Vec<String> =
                    [1, 2, 4, 8].iter().map(|d| padded / d).filter(|&n| fits(n)).map(|n| n.to_string()).collect();
                return Err(format!("pq_dim = {wanted}: for {dim} dimensions it may be {}", possible.join(", ")));
            }
            (IndexKind::IvfPq, None) => [2, 4, 8, 16].into_iter().map(|d| padded / d).find(|&n| fits(n)).unwrap_or(4),
            _ => padded / 4,
        };
        if kind != IndexKind::IvfFlat && n_subspaces > 1024 {
            return Err(format!("{kind} takes up to 4096 dimensions; there are {dim}"));
        }
        Ok(Plan {
            kind,
            dim,
            padded,
            n_lists,
            n_iters: n_iters as usize,
            seed: options.seed,
            storage: options.storage.unwrap_or_default(),
            n_subspaces,
            metric: exact.metric(),
        })
    }

    fn fill(&self, rows: &Rows<'_>, centroids: &[f32], groups: &Groups, simd: Simd, told: Told<'_>) -> IvfParts {
        let rotation = Rotation::new(self.dim, self.padded, self.seed, simd);
        let (n_lists, padded) = (self.n_lists, self.padded);
        let mut rotated = Vec::with_capacity(n_lists * padded);
        let mut buffer = Vec::new();
        for centroid in centroids.chunks_exact(self.dim) {
            rotation.apply(centroid, &mut buffer);
            rotated.extend_from_slice(&buffer);
        }
        let mut offsets = vec![0u32];
        for list in 0..n_lists {
            offsets.push(offsets[list] + groups.of(list).len().div_ceil(BLOCK) as u32);
        }
        let n_blocks = offsets[n_lists] as usize;
        let mut ids = vec![NO_ROW; n_blocks * BLOCK];
        let mut slices = vec![Slice::default(); n_blocks];
        let codebook = match self.kind {
            IndexKind::IvfPq => Some(self.train_words(rows, &rotation, &rotated, groups, simd)),
            _ => None,
        };
        let signs = Codebook::signs(padded, simd);
        let lists = if self.kind == IndexKind::IvfFlat {
            Lists::Flat(self.flat(rows, &rotation, &rotated, groups, &offsets, &mut ids, &mut slices))
        } else {
            let book = codebook.as_ref().unwrap_or(&signs);
            let codes = self.code(book, rows, &rotation, &rotated, groups, &offsets, &mut ids, &mut slices, told);
            match codebook {
                Some(book) => Lists::Pq { words: book.words, codes },
                None => Lists::Rabitq(codes),
            }
        };
        let lifts = self.lifts(&slices);
        // Of each list: what its gains are shares of, and the lift of its first block.
        let of_first = |pair: &[u32]| match (pair[0] as usize, pair[0] < pair[1]) {
            (block, true) => (slices[block].unit(), lifts[block]),
            _ => (1.0, 0.0),
        };
        let first: Vec<(f32, f32)> = offsets.windows(2).map(of_first).collect();
        let promises = |list: usize| {
            let (blocks, unit) = (offsets[list] as usize..offsets[list + 1] as usize, first[list].0);
            let blocks = slices[blocks.clone()].iter().zip(&lifts[blocks]);
            blocks.flat_map(move |(slice, &lift)| [slice.gain / unit, lift])
        };
        IvfParts {
            kind: self.kind,
            dim: self.dim,
            padded,
            seed: self.seed,
            coarse: self.code_centroids(&signs, &rotated, &first),
            promises: (0..n_lists).flat_map(promises).collect::<Vec<_>>().into(),
            centroids: rotated.into(),
            offsets: offsets.into(),
            ids: ids.into(),
            lists,
        }
    }

    /// The members of a list and their residuals, those that lie furthest along the centroid first: what decides which of a list's
    /// vectors a query is near, beside the list itself, is their length in that direction, and one block holds vectors of like length.
    fn list(&self, rows: &Rows<'_>, rotation: &Rotation, centroid: &[f32], members: &[u32]) -> List {
        let n = members.len();
        let (mut row, mut rotated, mut residuals) = (Vec::new(), Vec::new(), Vec::with_capacity(n * self.padded));
        let mut order: Vec<(f32, u32)> = Vec::with_capacity(n);
        let mut squares = Vec::with_capacity(n);
        let square = |values: &[f32]| values.iter().map(|v| v * v).sum::<f32>();
        let of_centroid = square(centroid);
        for (at, &member) in members.iter().enumerate() {
            row.clear();
            rows.append(member, &mut row);
            rotation.apply(&row, &mut rotated);
            squares.push(square(&rotated));
            residuals.extend(rotated.iter().zip(centroid).map(|(v, c)| v - c));
            let along: f32 = rotated.iter().zip(centroid).map(|(v, c)| v * c).sum();
            let gain = if of_centroid > 0.0 { along / of_centroid } else { 1.0 };
            order.push((if gain.is_finite() { gain } else { 1.0 }, at as u32));
        }
        order.sort_by(|a, b| b.0.total_cmp(&a.0));
        let mut list = List::default();
        for block in order.chunks(BLOCK) {
            let mean = |of: &dyn Fn(f32, usize) -> f32| {
                (block.iter().map(|&(gain, at)| f64::from(of(gain, at as usize))).sum::<f64>() / block.len() as f64)
                    as f32
            };
            let residual = |at: usize| &residuals[at * self.padded..(at + 1) * self.padded];
            let gain = mean(&|gain, _| gain);
            let spread = mean(&|_, at| square(residual(at))) - (gain - 1.0) * (gain - 1.0) * of_centroid;
            let half_square = 0.5 * mean(&|_, at| squares[at]);
            list.slices.push(Slice { gain, spread: spread.max(0.0).sqrt(), half_square, n: block.len() as u32 });
            for &(_, at) in block {
                list.ids.push(members[at as usize]);
                list.residuals.extend_from_slice(residual(at as usize));
                list.biases.push(-0.5 * squares[at as usize]);
            }
        }
        list
    }

    /// What the rank of each block is lifted by, times the query's length but for L2.
    fn lifts(&self, slices: &[Slice]) -> Vec<f32> {
        let sum: f64 = slices.iter().map(|slice| f64::from(slice.n) * f64::from(slice.spread).powi(2)).sum();
        let n: f64 = slices.iter().map(|slice| f64::from(slice.n)).sum();
        let typical = (sum / n.max(1.0)).sqrt() as f32;
        let lift = |slice: &Slice| match self.metric {
            Metric::L2 => L2_LIFT * typical * slice.spread - slice.half_square,
            _ => LIFT * slice.spread,
        };
        slices.iter().map(lift).collect()
    }

    fn train_words(
        &self,
        rows: &Rows<'_>,
        rotation: &Rotation,
        centroids: &[f32],
        groups: &Groups,
        simd: Simd,
    ) -> Codebook {
        // Whole lists, spread over all, until there are enough.
        let average = (rows.exact.rows().n_rows() / self.n_lists.max(1)).max(1);
        let lists = (TRAINED_ON / average).clamp(1, self.n_lists.max(1));
        let lists: Vec<usize> = (0..lists).map(|at| at * self.n_lists / lists).collect();
        let residuals: Vec<f32> = lists
            .into_par_iter()
            .flat_map_iter(|list| {
                let centroid = &centroids[list * self.padded..(list + 1) * self.padded];
                let mut residuals = self.list(rows, rotation, centroid, groups.of(list)).residuals;
                for residual in residuals.chunks_exact_mut(self.padded) {
                    let square: f32 = residual.iter().map(|v| v * v).sum();
                    let unit = if square > 0.0 { (self.padded as f32 / square).sqrt() } else { 0.0 };
                    residual.iter_mut().for_each(|v| *v *= unit);
                }
                residuals
            })
            .collect();
        Codebook::train(&residuals, self.padded, self.n_subspaces, self.seed, simd)
    }

    #[expect(clippy::too_many_arguments, reason = "the pieces of an index, in and out")]
    fn code(
        &self,
        book: &Codebook,
        rows: &Rows<'_>,
        rotation: &Rotation,
        centroids: &[f32],
        groups: &Groups,
        offsets: &[u32],
        ids: &mut [u32],
        slices: &mut [Slice],
        told: Told<'_>,
    ) -> Codes {
        let layout = Blocks { n_subspaces: self.n_subspaces, has_bias: self.metric == Metric::L2 };
        let n_blocks = ids.len() / BLOCK;
        let mut blocks = vec![0u8; n_blocks * layout.bytes()];
        let mut refined = vec![refine_zero(); n_blocks * BLOCK * self.padded];
        let mut scales = vec![0f32; n_blocks];
        let done = std::sync::atomic::AtomicU64::new(0);
        let n_lists = self.n_lists as u64;
        by_list(offsets, layout.bytes(), &mut blocks)
            .into_par_iter()
            .zip(by_list(offsets, BLOCK * self.padded, &mut refined))
            .zip(by_list(offsets, 1, &mut scales))
            .zip(by_list(offsets, BLOCK, ids))
            .zip(by_list(offsets, 1, slices))
            .enumerate()
            .for_each(|(list, ((((blocks, refined), scales), ids), slices))| {
                let centroid = &centroids[list * self.padded..(list + 1) * self.padded];
                let members = self.list(rows, rotation, centroid, groups.of(list));
                slices.copy_from_slice(&members.slices);
                ids[..members.ids.len()].copy_from_slice(&members.ids);
                let mut encoder = Encoder::new(book, layout);
                let residuals = members.residuals.chunks(BLOCK * self.padded).zip(members.biases.chunks(BLOCK));
                let outs = blocks
                    .chunks_exact_mut(layout.bytes())
                    .zip(refined.chunks_exact_mut(BLOCK * self.padded))
                    .zip(scales);
                for ((residuals, biases), ((block, refined), scale)) in residuals.zip(outs) {
                    encoder.write(residuals, biases, BlockMut { block, refined, scale });
                }
                let done = done.fetch_add(1, std::sync::atomic::Ordering::Relaxed) + 1;
                if done.is_multiple_of(64) || done == n_lists {
                    told("code", done, n_lists);
                }
            });
        Codes { layout, blocks: blocks.into(), refined: refined.into(), scales: scales.into() }
    }

    /// Copies the vectors into the lists.
    #[expect(clippy::too_many_arguments, reason = "the pieces of an index, in and out")]
    fn flat(
        &self,
        rows: &Rows<'_>,
        rotation: &Rotation,
        centroids: &[f32],
        groups: &Groups,
        offsets: &[u32],
        ids: &mut [u32],
        slices: &mut [Slice],
    ) -> Vectors {
        let mut values = vec![0f32; ids.len() * self.dim];
        by_list(offsets, BLOCK * self.dim, &mut values)
            .into_par_iter()
            .zip(by_list(offsets, BLOCK, ids))
            .zip(by_list(offsets, 1, slices))
            .enumerate()
            .for_each(|(list, ((values, ids), slices))| {
                let centroid = &centroids[list * self.padded..(list + 1) * self.padded];
                let members = self.list(rows, rotation, centroid, groups.of(list));
                slices.copy_from_slice(&members.slices);
                let mut row = Vec::new();
                for ((&member, id), values) in members.ids.iter().zip(ids).zip(values.chunks_exact_mut(self.dim)) {
                    *id = member;
                    row.clear();
                    rows.exact.rows().extend_row(member, &mut row);
                    values.copy_from_slice(&row);
                }
            });
        match self.storage {
            Storage::F32 => Vectors::F32(values.into()),
            Storage::F16 => Vectors::F16(values.into_par_iter().map(f16::from_f32).collect::<Vec<_>>().into()),
            Storage::Bf16 => Vectors::Bf16(values.into_par_iter().map(bf16::from_f32).collect::<Vec<_>>().into()),
        }
    }

    /// The centroids as the lists' first blocks weigh them, coded as vectors are.
    fn code_centroids(&self, signs: &Codebook, centroids: &[f32], first: &[(f32, f32)]) -> Codes {
        let layout = Blocks { n_subspaces: self.padded / 4, has_bias: true };
        let n_blocks = first.len().div_ceil(BLOCK);
        let mut blocks = vec![0u8; n_blocks * layout.bytes()];
        let mut refined = vec![refine_zero(); n_blocks * BLOCK * self.padded];
        let mut scales = vec![0f32; n_blocks];
        let mut encoder = Encoder::new(signs, layout);
        let mut values = Vec::with_capacity(BLOCK * self.padded);
        for (at, (centroids, first)) in centroids.chunks(BLOCK * self.padded).zip(first.chunks(BLOCK)).enumerate() {
            values.clear();
            for (centroid, (unit, _)) in centroids.chunks_exact(self.padded).zip(first) {
                values.extend(centroid.iter().map(|value| value * unit));
            }
            let lifts: Vec<f32> = first.iter().map(|&(_, lift)| lift).collect();
            let into = BlockMut {
                block: &mut blocks[at * layout.bytes()..(at + 1) * layout.bytes()],
                refined: &mut refined[at * BLOCK * self.padded..(at + 1) * BLOCK * self.padded],
                scale: &mut scales[at],
            };
            encoder.write(&values, &lifts, into);
        }
        Codes { layout, blocks: blocks.into(), refined: refined.into(), scales: scales.into() }
    }
}

/// The 8-bit code of nothing.
fn refine_zero() -> u8 {
    crate::index::refine::code(0.0, 0.0)
}

/// A list's members in the order in which they are stored.
#[derive(Default)]
struct List {
    ids: Vec<u32>,
    residuals: Vec<f32>,
    biases: Vec<f32>,
    slices: Vec<Slice>,
}

/// What is known of the vectors of a block together.
#[derive(Clone, Copy, Debug, Default)]
struct Slice {
    /// Their mean's product with the centroid, as a share of the centroid's own.
    gain: f32,
    /// Root mean square of their distances from where `gain` puts them.
    spread: f32,
    /// Mean of half the squares of their lengths.
    half_square: f32,
    n: u32,
}

impl Slice {
    /// What the gains of the list are shares of, this being its first slice.
    fn unit(&self) -> f32 {
        if self.gain > 0.0 { self.gain } else { 1.0 }
    }
}

/// The rows as they are clustered: for cosine, of unit length.
struct Rows<'a> {
    exact: &'a Exact,
}

impl Rows<'_> {
    fn append(&self, row: u32, out: &mut Vec<f32>) {
        let from = out.len();
        self.exact.rows().extend_row(row, out);
        if self.exact.metric() == Metric::Cosine {
            let unit = self.exact.norms()[row as usize];
            out[from..].iter_mut().for_each(|v| *v *= unit);
        }
    }

    fn gather(&self, rows: &[u32]) -> Vec<f32> {
        let mut out = Vec::with_capacity(rows.len() * self.exact.rows().dim());
        rows.iter().for_each(|&row| self.append(row, &mut out));
        out
    }

    fn assign(&self, centroids: &Centroids, told: Told<'_>) -> Vec<u32> {
        let n = self.exact.rows().n_rows();
        let mut nearest = vec![0; n];
        let done = std::sync::atomic::AtomicU64::new(0);
        nearest.par_chunks_mut(TASK).enumerate().for_each(|(task, nearest)| {
            let rows: Vec<u32> = (0..nearest.len()).map(|at| (task * TASK + at) as u32).collect();
            centroids.nearest(&self.gather(&rows), nearest);
            let before = done.fetch_add(rows.len() as u64, std::sync::atomic::Ordering::Relaxed);
            told("assign", before + rows.len() as u64, n as u64);
        });
        nearest
    }
}

/// Splits an array of `per_block` values a block into the lists' parts.
fn by_list<'a, T>(offsets: &[u32], per_block: usize, mut values: &'a mut [T]) -> Vec<&'a mut [T]> {
    let mut parts = Vec::with_capacity(offsets.len() - 1);
    for pair in offsets.windows(2) {
        let (part, rest) = values.split_at_mut((pair[1] - pair[0]) as usize * per_block);
        parts.push(part);
        values = rest;
    }
    parts
}
