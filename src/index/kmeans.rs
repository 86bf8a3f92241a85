//! Lloyd's k-means under L2, over a sample, in parallel, the same for the same seed whatever the number of threads.

use rayon::prelude::*;

use super::rotation::split_mix;
use super::simd::{Simd, for_each_simd, mul_add};

/// Centroids whose products with a few points are summed up in registers together.
const PANEL: usize = 64;
/// Those points.
const ROWS: usize = 6;
/// Points that one task assigns.
const TASK: usize = 1536;

/// Centroids made ready to be compared with.
pub struct Centroids {
    dim: usize,
    n: usize,
    /// `[panels, dim, PANEL]`
    panels: Vec<f32>,
    /// `[panels, PANEL]`: `-|c|² / 2`, -∞ beyond the last.
    halves: Vec<f32>,
    simd: Simd,
}

impl Centroids {
    /// Packs `centroids` (`[n, dim]`).
    pub fn new(centroids: &[f32], dim: usize, simd: Simd) -> Self {
        let n = centroids.len() / dim;
        let n_panels = n.div_ceil(PANEL);
        let mut panels = vec![0.0; n_panels * dim * PANEL];
        let mut halves = vec![f32::NEG_INFINITY; n_panels * PANEL];
        for (at, centroid) in centroids.chunks_exact(dim).enumerate() {
            let (panel, lane) = (at / PANEL, at % PANEL);
            for (column, &value) in centroid.iter().enumerate() {
                panels[(panel * dim + column) * PANEL + lane] = value;
            }
            halves[at] = -0.5 * centroid.iter().map(|v| v * v).sum::<f32>();
        }
        Centroids { dim, n, panels, halves, simd }
    }

    /// The nearest centroid of each of `points` (`[out.len(), dim]`).
    pub fn nearest(&self, points: &[f32], out: &mut [u32]) {
        nearest(self.simd, self, points, out);
    }

    /// The same in parallel.
    pub fn nearest_parallel(&self, points: &[f32], out: &mut [u32]) {
        points.par_chunks(TASK * self.dim).zip(out.par_chunks_mut(TASK)).for_each(|(p, out)| self.nearest(p, out));
    }
}

for_each_simd!(
    fn nearest(centroids: &Centroids, points: &[f32], out: &mut [u32]) = nearest_of
);

#[inline(always)]
fn nearest_of<const FUSED: bool>(centroids: &Centroids, points: &[f32], out: &mut [u32]) {
    let dim = centroids.dim;
    let (mut at, n) = (0, out.len());
    let row = |at: usize| &points[at * dim..(at + 1) * dim];
    while at + ROWS <= n {
        nearest_few::<FUSED, ROWS>(centroids, std::array::from_fn(|r| row(at + r)), &mut out[at..at + ROWS]);
        at += ROWS;
    }
    for at in at..n {
        nearest_few::<FUSED, 1>(centroids, [row(at)], &mut out[at..=at]);
    }
}

#[inline(always)]
fn nearest_few<const FUSED: bool, const R: usize>(centroids: &Centroids, rows: [&[f32]; R], out: &mut [u32]) {
    // By lane: the best of the centroids that fall on it.
    let mut best = [[f32::NEG_INFINITY; PANEL]; R];
    let mut which = [[0u32; PANEL]; R];
    let panels = centroids.panels.chunks_exact(centroids.dim * PANEL);
    for (panel, (values, halves)) in panels.zip(centroids.halves.as_chunks::<PANEL>().0).enumerate() {
        let mut sums = [*halves; R];
        for (column, values) in values.as_chunks::<PANEL>().0.iter().enumerate() {
            for r in 0..R {
                let value = rows[r][column];
                for lane in 0..PANEL {
                    sums[r][lane] = mul_add::<FUSED>(value, values[lane], sums[r][lane]);
                }
            }
        }
        for r in 0..R {
            for lane in 0..PANEL {
                let better = sums[r][lane] > best[r][lane];
                best[r][lane] = if better { sums[r][lane] } else { best[r][lane] };
                which[r][lane] = if better { panel as u32 } else { which[r][lane] };
            }
        }
    }
    for r in 0..R {
        let mut winner = (f32::NEG_INFINITY, 0);
        for lane in 0..PANEL {
            let at = which[r][lane] * PANEL as u32 + lane as u32;
            if best[r][lane] > winner.0 || (best[r][lane] == winner.0 && at < winner.1) {
                winner = (best[r][lane], at);
            }
        }
        out[r] = winner.1.min(centroids.n as u32 - 1);
    }
}

/// Clusters `points` (`[n, dim]`) around `k <= n` centroids, `[k, dim]`, or around a sample's if there are more than `most`
/// points; `told` hears how many iterations are done.
#[expect(clippy::too_many_arguments, reason = "each is one number")]
pub fn train(
    points: &[f32],
    dim: usize,
    k: usize,
    most: usize,
    n_iters: usize,
    seed: u64,
    simd: Simd,
    told: &dyn Fn(u64),
) -> Vec<f32> {
    let n = points.len() / dim;
    let mut state = seed;
    let sampled = sample(n, most.max(k), &mut state);
    let row = |at: u32| &points[at as usize * dim..(at as usize + 1) * dim];
    let gathered: Vec<f32>;
    let training = if sampled.len() == n {
        points
    } else {
        gathered = sampled.iter().flat_map(|&at| row(at)).copied().collect();
        &gathered
    };
    let n = training.len() / dim;
    let first = sample(n, k, &mut state);
    let mut centroids: Vec<f32> =
        first.iter().flat_map(|&at| &training[at as usize * dim..(at as usize + 1) * dim]).copied().collect();
    let mut nearest = vec![0u32; n];
    for iteration in 0..n_iters {
        Centroids::new(&centroids, dim, simd).nearest_parallel(training, &mut nearest);
        let members = Groups::new(&nearest, k);
        centroids.par_chunks_mut(dim).enumerate().for_each(|(at, centroid)| {
            let members = members.of(at);
            if !members.is_empty() {
                centroid.fill(0.0);
                for &member in members {
                    let row = &training[member as usize * dim..(member as usize + 1) * dim];
                    centroid.iter_mut().zip(row).for_each(|(c, v)| *c += v);
                }
                centroid.iter_mut().for_each(|c| *c /= members.len() as f32);
            }
        });
        split_largest(&mut centroids, dim, &members);
        told(iteration as u64 + 1);
    }
    centroids
}

/// Gives every centroid without members half of the largest cluster that is left: two places a hair apart, which the next
/// iteration tears asunder.
fn split_largest(centroids: &mut [f32], dim: usize, members: &Groups) {
    let mut sizes: Vec<usize> = (0..centroids.len() / dim).map(|at| members.of(at).len()).collect();
    for empty in 0..sizes.len() {
        if sizes[empty] > 0 {
            continue;
        }
        let largest = (0..sizes.len()).max_by_key(|&at| (sizes[at], std::cmp::Reverse(at))).unwrap_or(empty);
        if sizes[largest] < 2 {
            return;
        }
        for column in 0..dim {
            let nudge = if column % 2 == 0 { 1.0 + 1.0 / 1024.0 } else { 1.0 - 1.0 / 1024.0 };
            let value = centroids[largest * dim + column];
            centroids[empty * dim + column] = value * nudge;
            centroids[largest * dim + column] = value / nudge;
        }
        sizes[empty] = sizes[largest] / 2;
        sizes[largest] -= sizes[empty];
    }
}

/// `n` things by the group that each belongs to, ascending within a group.
pub struct Groups {
    starts: Vec<u32>,
    members: Vec<u32>,
}

impl Groups {
    /// Counts and places; `of[i] < n_groups` is the group of thing `i`.
    pub fn new(of: &[u32], n_groups: usize) -> Self {
        let mut starts = vec![0u32; n_groups + 1];
        of.iter().for_each(|&group| starts[group as usize + 1] += 1);
        for at in 0..n_groups {
            starts[at + 1] += starts[at];
        }
        let (mut next, mut members) = (starts.clone(), vec![0; of.len()]);
        for (thing, &group) in of.iter().enumerate() {
            members[next[group as usize] as usize] = thing as u32;
            next[group as usize] += 1;
        }
        Groups { starts, members }
    }

    /// Who belongs to `group`.
    pub fn of(&self, group: usize) -> &[u32] {
        &self.members[self.starts[group] as usize..self.starts[group + 1] as usize]
    }
}

/// `k` of `0..n`, ascending (Floyd's algorithm).
pub fn sample(n: usize, k: usize, state: &mut u64) -> Vec<u32> {
    if k >= n {
        return (0..n as u32).collect();
    }
    let mut chosen = std::collections::HashSet::with_capacity(k);
    for top in n - k..n {
        let at = (split_mix(state) % (top as u64 + 1)) as u32;
        if !chosen.insert(at) {
            chosen.insert(top as u32);
        }
    }
    let mut chosen: Vec<u32> = chosen.into_iter().collect();
    chosen.sort_unstable();
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn nearest_is_nearest(dim in 1usize..40, n in 1usize..150, k in 1usize..150, seed in any::<u64>()) {
            let mut next = crate::testing::noise(seed);
            let points: Vec<f32> = (0..n * dim).map(|_| next()).collect();
            let centroids: Vec<f32> = (0..k * dim).map(|_| next()).collect();
            let distance = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum::<f32>();
            for simd in Simd::available() {
                let mut got = vec![0; n];
                Centroids::new(&centroids, dim, simd).nearest_parallel(&points, &mut got);
                for (point, &got) in points.chunks_exact(dim).zip(&got) {
                    let least = centroids.chunks_exact(dim).map(|c| distance(point, c)).fold(f32::INFINITY, f32::min);
                    let found = distance(point, &centroids[got as usize * dim..][..dim]);
                    prop_assert!(found <= least + 1e-4 * dim as f32, "{found} {least}");
                }
            }
        }

        #[test]
        fn training_is_deterministic_and_uses_every_centroid(n in 20usize..400, seed in any::<u64>()) {
            let mut next = crate::testing::noise(seed);
            let points: Vec<f32> = (0..n * 4).map(|_| next()).collect();
            let k = n / 10;
            let centroids = train(&points, 4, k, n, 8, seed, Simd::detect(), &|_| {});
            prop_assert_eq!(&centroids, &train(&points, 4, k, n, 8, seed, Simd::detect(), &|_| {}));
            let mut nearest = vec![0; n];
            Centroids::new(&centroids, 4, Simd::detect()).nearest(&points, &mut nearest);
            let used: std::collections::BTreeSet<u32> = nearest.into_iter().collect();
            prop_assert!(used.len() * 10 >= k * 9, "{} of {k}", used.len());
        }
    }
}
