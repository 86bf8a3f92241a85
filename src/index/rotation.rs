//! A random rotation: it spreads what a vector holds evenly over its dimensions, which is what codes of few bits a dimension
//! need.
//!
//! Rounds of random signs and a fast Hadamard transform, over the first and the last `2^p` dimensions in turn, as the library of
//! RaBitQ has it (Gao et al., SIGMOD 2025): orthogonal, and `O(d log d)` where a dense matrix costs `O(d²)`.

use super::simd::{Simd, for_each_simd};

/// Rounds; with fewer, a vector of one dimension is not spread well.
const ROUNDS: usize = 4;

/// An orthogonal map of `[dim]`, padded with zeros to `[padded]`.
#[derive(Clone, Debug)]
pub struct Rotation {
    dim: usize,
    /// `[ROUNDS, padded]`, ±1.
    signs: Vec<f32>,
    simd: Simd,
}

/// The next of a stream of random numbers, the same in every release (Steele et al., "SplitMix", OOPSLA 2014).
pub fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Rotation {
    /// The rotation of that seed.
    pub fn new(dim: usize, padded: usize, seed: u64, simd: Simd) -> Self {
        let mut state = seed;
        let signs = (0..ROUNDS * padded).map(|_| if split_mix(&mut state) >> 63 == 0 { 1.0 } else { -1.0 }).collect();
        Rotation { dim, signs, simd }
    }

    /// Dimensions of what comes out.
    pub fn padded(&self) -> usize {
        self.signs.len() / ROUNDS
    }

    /// Replaces `out` by the rotated `vector`.
    pub fn apply(&self, vector: &[f32], out: &mut Vec<f32>) {
        debug_assert_eq!(vector.len(), self.dim);
        out.clear();
        out.extend_from_slice(vector);
        out.resize(self.padded(), 0.0);
        rounds(self.simd, &self.signs, out);
    }
}

for_each_simd!(
    fn rounds(signs: &[f32], values: &mut [f32]) = rounds_of
);

#[inline(always)]
fn rounds_of<const FUSED: bool>(signs: &[f32], values: &mut [f32]) {
    let padded = values.len();
    let window = 1usize << padded.ilog2();
    for (round, signs) in signs.chunks_exact(padded).enumerate() {
        values.iter_mut().zip(signs).for_each(|(v, sign)| *v *= sign);
        let from = if round % 2 == 0 { 0 } else { padded - window };
        hadamard(&mut values[from..from + window]);
    }
}

/// The normalised Hadamard transform of a power of two of values.
#[inline(always)]
fn hadamard(values: &mut [f32]) {
    let mut half = 1;
    while half < values.len() {
        for pair in values.chunks_exact_mut(2 * half) {
            let (low, high) = pair.split_at_mut(half);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        half *= 2;
    }
    let scale = 1.0 / (values.len() as f32).sqrt();
    values.iter_mut().for_each(|v| *v *= scale);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn keeps_inner_products(dim in 1usize..200, seed in any::<u64>()) {
            let padded = dim.next_multiple_of(32);
            let mut next = crate::testing::noise(seed);
            let (a, b): (Vec<f32>, Vec<f32>) = (0..dim).map(|_| (next(), next())).unzip();
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
            let mut all = Vec::new();
            for simd in Simd::available() {
                let rotation = Rotation::new(dim, padded, seed, simd);
                let (mut ra, mut rb) = (Vec::new(), Vec::new());
                rotation.apply(&a, &mut ra);
                rotation.apply(&b, &mut rb);
                prop_assert!((dot(&a, &b) - dot(&ra, &rb)).abs() < 1e-5 * dim as f64);
                all.push(ra);
            }
            // Sums and differences only: the same to the bit.
            prop_assert!(all.windows(2).all(|pair| pair[0] == pair[1]));
        }
    }

    #[test]
    fn spreads_one_dimension_over_all() {
        let rotation = Rotation::new(100, 128, 7, Simd::detect());
        let (mut one, mut out) = (vec![0.0; 100], Vec::new());
        one[3] = 1.0;
        rotation.apply(&one, &mut out);
        assert!(out.iter().all(|v| v.abs() < 4.5 / 128f32.sqrt()), "{out:?}");
    }
}
