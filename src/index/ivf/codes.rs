//! Codewords and coded vectors.

use rayon::prelude::*;

use crate::catalog::array::Array;
use crate::index::fastscan::{BLOCK, Blocks, CODEWORDS};
use crate::index::kmeans;
use crate::index::refine;
use crate::index::simd::{Simd, for_each_simd, mul_add};

/// Residuals that codewords are trained on.
pub const TRAINED_ON: usize = 16_384;
/// Iterations of k-means over them.
const ITERATIONS: usize = 10;

/// The codewords of every subspace.
#[derive(Clone, Debug)]
pub struct Codebook {
    /// `[n_subspaces, d, 16]`
    pub words: Array<f32>,
    /// `[n_subspaces, 16]`: `|word|² / 2`
    halves: Vec<f32>,
    n_subspaces: usize,
    simd: Simd,
}

impl Codebook {
    /// From words that were stored.
    pub fn new(words: Array<f32>, n_subspaces: usize, simd: Simd) -> Self {
        let dims = words.len() / n_subspaces / CODEWORDS;
        let mut halves = vec![0.0; n_subspaces * CODEWORDS];
        for (words, halves) in words.chunks_exact(dims * CODEWORDS).zip(halves.chunks_exact_mut(CODEWORDS)) {
            for words in words.chunks_exact(CODEWORDS) {
                halves.iter_mut().zip(words).for_each(|(half, word)| *half += 0.5 * word * word);
            }
        }
        Codebook { words, halves, n_subspaces, simd }
    }

    /// The signs of four dimensions a subspace; `dim` is a multiple of 16.
    pub fn signs(dim: usize, simd: Simd) -> Self {
        let sign = |at: usize| {
            let (part, word) = (at / CODEWORDS % 4, at % CODEWORDS);
            if word >> part & 1 == 1 { 1.0 } else { -1.0 }
        };
        let words: Vec<f32> = (0..dim * CODEWORDS).map(sign).collect();
        Codebook::new(words.into(), dim / 4, simd)
    }

    /// Trained on residuals, `[n, dim]`, each brought to the length `√dim`.
    pub fn train(residuals: &[f32], dim: usize, n_subspaces: usize, seed: u64, simd: Simd) -> Self {
        let dims = dim / n_subspaces;
        let mut words = vec![0f32; dim * CODEWORDS];
        words.par_chunks_exact_mut(dims * CODEWORDS).enumerate().for_each(|(subspace, words)| {
            let mut parts = Vec::with_capacity(residuals.len() / n_subspaces);
            for residual in residuals.chunks_exact(dim) {
                parts.extend_from_slice(&residual[subspace * dims..(subspace + 1) * dims]);
            }
            let k = CODEWORDS.min(residuals.len() / dim);
            let trained = kmeans::train(&parts, dims, k, TRAINED_ON, ITERATIONS, seed + subspace as u64, simd, &|_| {});
            for (word, values) in trained.chunks_exact(dims).enumerate() {
                for (part, &value) in values.iter().enumerate() {
                    words[part * CODEWORDS + word] = value;
                }
            }
        });
        Codebook::new(words.into(), n_subspaces, simd)
    }

    /// Number of subspaces.
    pub fn n_subspaces(&self) -> usize {
        self.n_subspaces
    }

    /// Codes a residual into `codes` (`[n_subspaces]`) and returns the factor of its estimates. `scaled` is a buffer.
    pub fn encode(&self, residual: &[f32], scaled: &mut Vec<f32>, codes: &mut [u8]) -> f32 {
        let square: f32 = residual.iter().map(|v| v * v).sum();
        let unit = if square > 0.0 { (residual.len() as f32 / square).sqrt() } else { 0.0 };
        scaled.clear();
        scaled.extend(residual.iter().map(|v| v * unit));
        let product = nearest_words(self.simd, scaled, &self.words, &self.halves, codes);
        // <r, c> = product / unit
        let factor = square * unit / product;
        if factor.is_finite() { factor } else { 0.0 }
    }
}

for_each_simd!(
    /// The nearest word of each subspace, and the inner product of the vector with all of them put together.
    fn nearest_words(vector: &[f32], words: &[f32], halves: &[f32], codes: &mut [u8]) -> f32 = nearest_words_of
);

#[inline(always)]
fn nearest_words_of<const FUSED: bool>(vector: &[f32], words: &[f32], halves: &[f32], codes: &mut [u8]) -> f32 {
    let dims = vector.len() / codes.len();
    let words = words.as_chunks::<CODEWORDS>().0;
    let mut product = 0.0;
    let parts =
        vector.chunks_exact(dims).zip(words.chunks_exact(dims)).zip(halves.as_chunks::<CODEWORDS>().0).zip(codes);
    for (((values, words), halves), code) in parts {
        let mut sums = [0f32; CODEWORDS];
        for (&value, words) in values.iter().zip(words) {
            for (sum, &word) in sums.iter_mut().zip(words) {
                *sum = mul_add::<FUSED>(value, word, *sum);
            }
        }
        let mut best = 0;
        for word in 1..CODEWORDS {
            if sums[word] - halves[word] > sums[best] - halves[best] {
                best = word;
            }
        }
        *code = best as u8;
        product += sums[best];
    }
    product
}

/// Coded vectors, [`BLOCK`] by [`BLOCK`].
#[derive(Clone, Debug)]
pub struct Codes {
    /// How blocks lie.
    pub layout: Blocks,
    /// `[n_blocks, layout.bytes()]`
    pub blocks: Array<u8>,
    /// `[n_blocks, BLOCK, padded]`: 8-bit codes of the residuals.
    pub refined: Array<u8>,
    /// `[n_blocks]`: what an 8-bit code stands for.
    pub scales: Array<f32>,
}

/// One block while it is written.
pub struct BlockMut<'a> {
    /// `layout.bytes()` bytes.
    pub block: &'a mut [u8],
    /// `[BLOCK, padded]`
    pub refined: &'a mut [u8],
    /// See [`Codes::scales`].
    pub scale: &'a mut f32,
}

/// What a vector is written by.
pub struct Encoder<'a> {
    /// The words.
    pub codebook: &'a Codebook,
    /// How blocks lie.
    pub layout: Blocks,
    codes: Vec<u8>,
    scaled: Vec<f32>,
}

impl<'a> Encoder<'a> {
    /// With buffers of its own.
    pub fn new(codebook: &'a Codebook, layout: Blocks) -> Self {
        Encoder { codebook, layout, codes: vec![0; codebook.n_subspaces()], scaled: Vec::new() }
    }

    /// Writes up to [`BLOCK`] residuals (`[n, padded]`) with their additive parts; lanes beyond them stay as they are.
    pub fn write(&mut self, residuals: &[f32], biases: &[f32], into: BlockMut<'_>) {
        let padded = into.refined.len() / BLOCK;
        let largest = residuals.iter().fold(0f32, |most, v| most.max(v.abs()));
        let unit = if largest > 0.0 { 127.0 / largest } else { 0.0 };
        *into.scale = largest / 127.0;
        let rows = residuals.chunks_exact(padded).zip(into.refined.chunks_exact_mut(padded)).zip(biases);
        for (lane, ((residual, refined), &bias)) in rows.enumerate() {
            let factor = self.codebook.encode(residual, &mut self.scaled, &mut self.codes);
            self.layout.set(into.block, lane, &self.codes, factor, bias);
            refined.iter_mut().zip(residual).for_each(|(code, &value)| *code = refine::code(value, unit));
        }
    }
}
