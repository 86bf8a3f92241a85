//! The best of many scores, without a heap: what passes a threshold goes to a buffer, and when that is full, counting finds a
//! higher threshold that leaves as many as are wanted. Order is kept, so that what is read for them later is read forwards.
#![allow(unsafe_code)] // Calls of functions compiled for CPU features that were detected, and their stores.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use super::fastscan::BLOCK;
use super::simd::{Simd, for_each_simd};

/// A superset of the best `keep` of what was pushed.
#[derive(Debug, Default)]
pub struct Select {
    scores: Vec<f32>,
    positions: Vec<u32>,
    len: usize,
    keep: usize,
    room: usize,
    threshold: f32,
}

impl Select {
    /// Begins anew, for the best `keep`.
    pub fn begin(&mut self, keep: usize) {
        self.keep = keep;
        self.room = (3 * keep).max(2048);
        self.len = 0;
        self.threshold = f32::NEG_INFINITY;
        // A block more than the room: it is looked at after a block only.
        let most = self.room + 2 * BLOCK;
        if self.scores.len() < most {
            self.scores.resize(most, 0.0);
            self.positions.resize(most, 0);
        }
    }

    /// The scores and positions that are kept, in the order of pushing.
    pub fn kept(&self) -> (&[f32], &[u32]) {
        (&self.scores[..self.len], &self.positions[..self.len])
    }

    /// Scores that are to be replaced by better ones, and their positions; then [`Self::again`].
    pub fn kept_mut(&mut self) -> (&mut [f32], &[u32]) {
        (&mut self.scores[..self.len], &self.positions[..self.len])
    }

    /// Of what is kept the best `keep` are wanted.
    pub fn again(&mut self, keep: usize) {
        self.keep = keep;
        self.threshold = f32::NEG_INFINITY;
    }

    /// Offers the scores of blocks, whole ones, at `first` and following positions; bit `i` of `lanes(b)` says whether the `i`-th score of
    /// the `b`-th counts. `admits` is asked about those that pass the threshold. NaN does not pass.
    #[inline(always)]
    pub fn push_all(
        &mut self,
        simd: Simd,
        scores: &[f32],
        first: u32,
        lanes: impl Fn(usize) -> u32,
        admits: Option<&dyn Fn(u32) -> bool>,
    ) {
        let blocks = scores.as_chunks::<BLOCK>().0;
        match simd {
            // SAFETY: `Simd` has this variant only where the features were detected.
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512 => unsafe { self.push_all_avx512(blocks, first, lanes, admits) },
            _ => {
                for (at, scores) in blocks.iter().enumerate() {
                    self.push_portable(scores, first + (at * BLOCK) as u32, lanes(at), admits);
                }
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn push_all_avx512(
        &mut self,
        blocks: &[[f32; BLOCK]],
        first: u32,
        lanes: impl Fn(usize) -> u32,
        admits: Option<&dyn Fn(u32) -> bool>,
    ) {
        for (at, scores) in blocks.iter().enumerate() {
            // SAFETY: 16 values from 0 and from 16 lie within the 32.
            let halves = unsafe { [_mm512_loadu_ps(scores.as_ptr()), _mm512_loadu_ps(scores.as_ptr().add(16))] };
            self.push_avx512(halves, first + (at * BLOCK) as u32, lanes(at), admits);
        }
    }

    /// One block of [`Self::push_all`].
    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    pub fn push_avx512(&mut self, halves: [__m512; 2], first: u32, lanes: u32, admits: Option<&dyn Fn(u32) -> bool>) {
        let threshold = _mm512_set1_ps(self.threshold);
        let above = halves.map(|half| _mm512_cmp_ps_mask::<_CMP_GT_OQ>(half, threshold));
        let mut passing = (u32::from(above[0]) | u32::from(above[1]) << 16) & lanes;
        if passing == 0 {
            return;
        }
        if let Some(admits) = admits {
            passing = admitted(passing, first, admits);
        }
        let ramp = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        let to = self.len..self.len + BLOCK;
        let (to_scores, to_positions) = (&mut self.scores[to.clone()], &mut self.positions[to]);
        let mut kept = 0;
        for (half, values) in halves.into_iter().enumerate() {
            let mask = (passing >> (16 * half)) as u16;
            let places = _mm512_add_epi32(_mm512_set1_epi32((first + 16 * half as u32) as i32), ramp);
            // SAFETY: at most 16 were kept of the first half, and both have room for 32.
            unsafe {
                _mm512_storeu_ps(to_scores.as_mut_ptr().add(kept), _mm512_maskz_compress_ps(mask, values));
                let places = _mm512_maskz_compress_epi32(mask, places);
                _mm512_storeu_si512(to_positions.as_mut_ptr().add(kept).cast(), places);
            }
            kept += mask.count_ones() as usize;
        }
        self.len += kept;
        if self.len >= self.room {
            self.prune(Simd::Avx512, self.keep / 8);
        }
    }

    fn push_portable(&mut self, scores: &[f32; BLOCK], first: u32, lanes: u32, admits: Option<&dyn Fn(u32) -> bool>) {
        let mut passing = 0u32;
        for (lane, &score) in scores.iter().enumerate() {
            passing |= u32::from(score > self.threshold) << lane;
        }
        passing &= lanes;
        if let Some(admits) = admits {
            passing = admitted(passing, first, admits);
        }
        while passing != 0 {
            let lane = passing.trailing_zeros();
            passing &= passing - 1;
            self.scores[self.len] = scores[lane as usize];
            self.positions[self.len] = first + lane;
            self.len += 1;
        }
        if self.len >= self.room {
            self.prune(Simd::Portable, self.keep / 8);
        }
    }

    /// Leaves at least the best `keep` and, where scores differ, at most `slack` more.
    pub fn prune(&mut self, simd: Simd, slack: usize) {
        if self.len <= self.keep + slack {
            return;
        }
        let most = self.keep + slack;
        let scores = &self.scores[..self.len];
        let (mut low, mut high) = range(simd, scores);
        // More than `keep` are above `low`, fewer than `keep` are above `high`. Below the least is not a score: nothing is lost.
        let mut above_low = self.len;
        let mut above_high = 0;
        low = if self.threshold > low { self.threshold } else { low.next_down() };
        for step in 0.. {
            if above_low <= most {
                break;
            }
            // Scores thin out towards the best: the roots of their counts fall about in a line. What does not yield to that is many
            // alike, and halving the integers that stand for floats ends in any case.
            let middle = if step >= 24 {
                from_ordered(ordered(low) + (ordered(high) - ordered(low)) / 2)
            } else if step % 4 == 3 {
                low + (high - low) * 0.5
            } else {
                let [of_low, of_high, wanted] =
                    [above_low, above_high, self.keep + slack / 2].map(|n| (n as f32).sqrt());
                low + (high - low) * ((of_low - wanted) / (of_low - of_high)).clamp(0.02, 0.98)
            };
            if middle <= low || middle >= high {
                if step >= 24 {
                    break;
                }
                continue;
            }
            let above = count_above(simd, scores, middle);
            if above >= self.keep {
                (low, above_low) = (middle, above);
            } else {
                (high, above_high) = (middle, above);
            }
        }
        if above_low <= most {
            self.keep_above(simd, low);
        } else {
            self.keep_alike(low, high, most - above_high);
        }
        self.threshold = low;
    }

    /// Keeps what is above the threshold.
    fn keep_above(&mut self, simd: Simd, threshold: f32) {
        match simd {
            // SAFETY: `Simd` has this variant only where the features were detected.
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512 => unsafe { self.keep_above_avx512(threshold) },
            _ => self.keep_if(|score| score > threshold),
        }
    }

    /// Keeps what is above `high`, and of what is above `low`, all alike, the first `spare`.
    fn keep_alike(&mut self, low: f32, high: f32, mut spare: usize) {
        self.keep_if(|score| {
            let stays = (score > high) | ((score > low) & (spare > 0));
            spare -= usize::from(stays & (score <= high));
            stays
        });
    }

    fn keep_if(&mut self, mut stays: impl FnMut(f32) -> bool) {
        let mut kept = 0;
        for from in 0..self.len {
            let (score, position) = (self.scores[from], self.positions[from]);
            // `kept <= from`: nothing is overwritten that is still to be read.
            self.scores[kept] = score;
            self.positions[kept] = position;
            kept += usize::from(stays(score));
        }
        self.len = kept;
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn keep_above_avx512(&mut self, threshold: f32) {
        let threshold = _mm512_set1_ps(threshold);
        let mut kept = 0;
        assert!(self.len + 16 <= self.scores.len() && self.len + 16 <= self.positions.len());
        for from in (0..self.len).step_by(16) {
            let lanes = if self.len - from >= 16 { u16::MAX } else { (1 << (self.len - from)) - 1 };
            // SAFETY: 16 values from `from` lie within both buffers, and `kept <= from`.
            unsafe {
                let scores = _mm512_loadu_ps(self.scores.as_ptr().add(from));
                let positions = _mm512_loadu_si512(self.positions.as_ptr().add(from).cast());
                let stays = _mm512_mask_cmp_ps_mask::<_CMP_GT_OQ>(lanes, scores, threshold);
                _mm512_storeu_ps(self.scores.as_mut_ptr().add(kept), _mm512_maskz_compress_ps(stays, scores));
                let positions = _mm512_maskz_compress_epi32(stays, positions);
                _mm512_storeu_si512(self.positions.as_mut_ptr().add(kept).cast(), positions);
                kept += stays.count_ones() as usize;
            }
        }
        self.len = kept;
    }
}

/// Floats as integers of the same order; no NaN.
fn ordered(value: f32) -> u32 {
    let bits = value.to_bits();
    if bits >> 31 == 0 { bits | 1 << 31 } else { !bits }
}

fn from_ordered(value: u32) -> f32 {
    f32::from_bits(if value >> 31 == 1 { value & !(1 << 31) } else { !value })
}

/// The lanes of `passing` that are admitted.
#[inline]
fn admitted(passing: u32, first: u32, admits: &dyn Fn(u32) -> bool) -> u32 {
    let (mut left, mut admitted) = (passing, 0);
    while left != 0 {
        let lane = left.trailing_zeros();
        left &= left - 1;
        admitted |= u32::from(admits(first + lane)) << lane;
    }
    admitted
}

for_each_simd!(
    fn count_above(scores: &[f32], threshold: f32) -> usize = count_above_of
);

#[inline(always)]
fn count_above_of<const FUSED: bool>(scores: &[f32], threshold: f32) -> usize {
    let (chunks, rest) = scores.as_chunks::<64>();
    let mut lanes = [0u32; 64];
    for chunk in chunks {
        for (lane, &score) in lanes.iter_mut().zip(chunk) {
            *lane += u32::from(score > threshold);
        }
    }
    lanes.iter().sum::<u32>() as usize + rest.iter().filter(|&&score| score > threshold).count()
}

for_each_simd!(
    fn range(scores: &[f32]) -> (f32, f32) = range_of
);

#[inline(always)]
fn range_of<const FUSED: bool>(scores: &[f32]) -> (f32, f32) {
    // Four registers a side: one alone would wait for itself.
    let (chunks, rest) = scores.as_chunks::<64>();
    let (mut low, mut high) = ([f32::INFINITY; 64], [f32::NEG_INFINITY; 64]);
    for chunk in chunks {
        for lane in 0..64 {
            low[lane] = if chunk[lane] < low[lane] { chunk[lane] } else { low[lane] };
            high[lane] = if chunk[lane] > high[lane] { chunk[lane] } else { high[lane] };
        }
    }
    let fold = |mut lanes: [f32; 64], of: fn(f32, f32) -> f32| {
        lanes[..rest.len()].iter_mut().zip(rest).for_each(|(lane, &score)| *lane = of(*lane, score));
        lanes.into_iter().reduce(of).unwrap_or(0.0)
    };
    (fold(low, f32::min), fold(high, f32::max))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn keeps_the_best_in_order(
            n_blocks in 1usize..100, keep in 1usize..300, steps in prop::sample::select(vec![1f32, 7.0, 1e6]), seed in any::<u64>(),
            every in 1u32..4,
        ) {
            let mut next = crate::testing::noise(seed);
            let scores: Vec<f32> = (0..n_blocks * BLOCK).map(|_| (next() * steps).round() / steps).collect();
            let lanes: Vec<u32> = (0..n_blocks).map(|_| (next() * 4e9) as i64 as u32 | 1).collect();
            let admits = |position: u32| position.is_multiple_of(every);
            let counts = |at: usize| lanes[at / BLOCK] >> (at % BLOCK) & 1 == 1 && admits(at as u32);
            let mut want: Vec<f32> = scores.iter().enumerate().filter(|(at, _)| counts(*at)).map(|(_, &s)| s).collect();
            want.sort_by(|a, b| b.total_cmp(a));
            want.truncate(keep);
            for simd in Simd::available() {
                let mut select = Select::default();
                select.begin(keep);
                let filter: Option<&dyn Fn(u32) -> bool> = if every == 1 { None } else { Some(&admits) };
                select.push_all(simd, &scores, 0, |block| lanes[block], filter);
                select.prune(simd, 0);
                let (kept, positions) = select.kept();
                prop_assert!(positions.windows(2).all(|p| p[0] < p[1]));
                prop_assert!(positions.iter().zip(kept).all(|(&at, &s)| counts(at as usize) && scores[at as usize] == s));
                let mut kept = kept.to_vec();
                kept.sort_by(|a, b| b.total_cmp(a));
                kept.truncate(keep);
                prop_assert_eq!(&kept, &want);
            }
        }
    }
}
