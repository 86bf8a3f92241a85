//! Scanning vectors in 4-bit codes, 32 at a time: each code is a place in a small table that lies in a register, one table a
//! subspace, made for the query (André, Kermarrec and Le Scouarnec, "Quicker ADC", TPAMI 2021).
//!
//! Tables hold 6 bits, so that four values fit a byte before they have to be widened.
#![allow(unsafe_code)] // Calls of functions compiled for CPU features that were detected, and their loads and stores.

use super::select::Select;
use super::simd::{Simd, for_each_simd, mul_add};

/// Vectors side by side.
pub const BLOCK: usize = 32;
/// Codewords of a subspace.
pub const CODEWORDS: usize = 16;
/// Subspaces that one register of codes holds.
const QUAD: usize = 4;
/// The largest value in a table: four of them fit a byte.
const MOST: f32 = 63.0;

/// How a block lies in memory: codes, `[n_subspaces / 4, 2, 32]` bytes of two codes each, then `[32]` f32 factors, then, where
/// scores have an additive part of their own, `[32]` f32 of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocks {
    /// A multiple of 4, at most 1024.
    pub n_subspaces: usize,
    /// Whether every vector has an additive part.
    pub has_bias: bool,
}

impl Blocks {
    /// Bytes of a block, a multiple of 64.
    pub fn bytes(self) -> usize {
        self.factors() + if self.has_bias { 8 * BLOCK } else { 4 * BLOCK }
    }

    /// The layout whose blocks have so many bytes.
    pub fn of_bytes(bytes: usize, has_bias: bool) -> Option<Self> {
        let codes = bytes.checked_sub(if has_bias { 8 * BLOCK } else { 4 * BLOCK })?;
        let layout = Blocks { n_subspaces: codes / 64 * QUAD, has_bias };
        (layout.bytes() == bytes).then_some(layout)
    }

    /// Where the factors begin.
    fn factors(self) -> usize {
        self.n_subspaces / QUAD * 64
    }

    /// Writes what lane `lane` of a block holds.
    pub fn set(self, block: &mut [u8], lane: usize, codes: &[u8], factor: f32, bias: f32) {
        for (pair, codes) in codes.chunks_exact(2).enumerate() {
            block[pair * BLOCK + lane] = codes[0] | codes[1] << 4;
        }
        let at = self.factors() + 4 * lane;
        block[at..at + 4].copy_from_slice(&factor.to_le_bytes());
        if self.has_bias {
            let at = at + 4 * BLOCK;
            block[at..at + 4].copy_from_slice(&bias.to_le_bytes());
        }
    }

    /// The additive parts of the lanes, little-endian; none where scores have none.
    pub fn biases(self, block: &[u8]) -> &[[u8; 4]] {
        block[self.factors() + 4 * BLOCK..].as_chunks().0
    }

    /// The additive part of lane `lane`.
    pub fn bias(self, block: &[u8], lane: usize) -> f32 {
        self.biases(block).get(lane).map_or(0.0, |bytes| f32::from_le_bytes(*bytes))
    }
}

/// A query's tables.
#[derive(Debug, Default)]
pub struct Tables {
    /// `[n_subspaces / 4, 2, 64]`: for the low and for the high codes of a register.
    bytes: Vec<u8>,
    /// `<query, codewords> = scale * sum + offset`
    scale: f32,
    offset: f32,
    values: Vec<f32>,
    /// By subspace.
    leasts: Vec<f32>,
}

impl Tables {
    /// Makes the tables of `query` (`[n_subspaces * d]`) for `codebook`, `[n_subspaces, d, 16]`.
    pub fn prepare(&mut self, simd: Simd, query: &[f32], n_subspaces: usize, codebook: &[f32]) {
        debug_assert_eq!(codebook.len(), query.len() * CODEWORDS);
        self.values.resize(n_subspaces * CODEWORDS, 0.0);
        products(simd, query, codebook, &mut self.values);
        self.leasts.resize(n_subspaces, 0.0);
        let range = extent(simd, &self.values, &mut self.leasts);
        self.scale = range / MOST;
        self.offset = self.leasts.iter().sum();
        let unit = MOST / range;
        let unit = if unit.is_finite() { unit } else { 0.0 };
        self.bytes.resize(n_subspaces / QUAD * 128, 0);
        round(simd, &self.values, &self.leasts, unit, &mut self.bytes);
    }
}

for_each_simd!(
    fn products(query: &[f32], codebook: &[f32], out: &mut [f32]) = products_of
);

#[inline(always)]
fn products_of<const FUSED: bool>(query: &[f32], codebook: &[f32], out: &mut [f32]) {
    let dims = query.len() / (out.len() / CODEWORDS).max(1);
    let words = codebook.as_chunks::<CODEWORDS>().0;
    let parts = query.chunks_exact(dims).zip(words.chunks_exact(dims)).zip(out.as_chunks_mut::<CODEWORDS>().0);
    for ((query, words), out) in parts {
        let mut sums = [0f32; CODEWORDS];
        for (&value, words) in query.iter().zip(words) {
            for (sum, &word) in sums.iter_mut().zip(words) {
                *sum = mul_add::<FUSED>(value, word, *sum);
            }
        }
        *out = sums;
    }
}

for_each_simd!(
    /// The least of each subspace's values, and the largest range of them, which is returned.
    fn extent(values: &[f32], leasts: &mut [f32]) -> f32 = extent_of
);

#[inline(always)]
fn extent_of<const FUSED: bool>(values: &[f32], leasts: &mut [f32]) -> f32 {
    let mut range = 0.0;
    for (values, least) in values.as_chunks::<CODEWORDS>().0.iter().zip(leasts) {
        *least = folded(*values, |a, b| if b < a { b } else { a });
        let most = folded(*values, |a, b| if b > a { b } else { a });
        range = if most - *least > range { most - *least } else { range };
    }
    range
}

/// Halves against each other, so that it can be done in a register.
#[inline(always)]
fn folded(values: [f32; CODEWORDS], of: impl Fn(f32, f32) -> f32) -> f32 {
    let eight: [f32; 8] = std::array::from_fn(|at| of(values[at], values[at + 8]));
    let four: [f32; 4] = std::array::from_fn(|at| of(eight[at], eight[at + 4]));
    of(of(four[0], four[2]), of(four[1], four[3]))
}

for_each_simd!(
    fn round(values: &[f32], leasts: &[f32], unit: f32, bytes: &mut [u8]) = round_of
);

#[inline(always)]
fn round_of<const FUSED: bool>(values: &[f32], leasts: &[f32], unit: f32, bytes: &mut [u8]) {
    // Floats from here on are whole, and the lowest byte of their bits is what was added.
    const WHOLE: f32 = 8_388_608.0;
    let quads = values.as_chunks::<{ QUAD * CODEWORDS }>().0.iter().zip(leasts.as_chunks::<QUAD>().0);
    for ((values, leasts), bytes) in quads.zip(bytes.as_chunks_mut::<128>().0) {
        let (values, bytes) = (values.as_chunks::<CODEWORDS>().0, bytes.as_chunks_mut::<CODEWORDS>().0);
        for (within, (values, least)) in values.iter().zip(leasts).enumerate() {
            let table = values.map(|value| ((value - least) * unit + WHOLE).to_bits() as u8);
            // Even subspaces are the low codes; each table fills both 16-byte lanes of its half.
            let at = within % 2 * 4 + within / 2 * 2;
            bytes[at] = table;
            bytes[at + 1] = table;
        }
    }
}

/// What turns sums of codes into scores: `base + factor * <query, codewords> + weight * bias`.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// Of all vectors of the list: the query's product with its centroid.
    pub base: f32,
    /// Of the additive part.
    pub weight: f32,
}

/// Scores of the vectors of `blocks`; `scores.len()` is [`BLOCK`] times their number.
pub fn scan(simd: Simd, layout: Blocks, blocks: &[u8], tables: &Tables, terms: Terms, scores: &mut [f32]) {
    debug_assert_eq!(blocks.len(), layout.bytes() * (scores.len() / BLOCK));
    debug_assert_eq!(tables.bytes.len(), layout.n_subspaces / QUAD * 128);
    match simd {
        // SAFETY: `Simd` has this variant only where the features were detected.
        #[cfg(target_arch = "x86_64")]
        Simd::Avx512 => unsafe { x86::scan_avx512(layout, blocks, tables, terms, scores) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Simd::Avx2 => unsafe { x86::scan_avx2(layout, blocks, tables, terms, scores) },
        _ => scan_portable(layout, blocks, tables, terms, scores),
    }
}

/// No fused operations: every variant rounds alike, and the scores are the same to the bit.
#[inline(always)]
fn finish(sum: f32, factor: f32, bias: f32, tables: &Tables, terms: Terms) -> f32 {
    let score = terms.base + factor * (tables.scale * sum + tables.offset);
    if bias == 0.0 { score } else { score + terms.weight * bias }
}

fn scan_portable(layout: Blocks, blocks: &[u8], tables: &Tables, terms: Terms, scores: &mut [f32]) {
    for (block, scores) in blocks.chunks_exact(layout.bytes()).zip(scores.as_chunks_mut::<BLOCK>().0) {
        let mut sums = [0u16; BLOCK];
        for (codes, tables) in
            block[..layout.factors()].as_chunks::<64>().0.iter().zip(tables.bytes.as_chunks::<128>().0)
        {
            for half in 0..2 {
                for lane in 0..BLOCK {
                    let code = codes[half * 32 + lane];
                    let low = tables[half * 32 + usize::from(code & 15)];
                    let high = tables[64 + half * 32 + usize::from(code >> 4)];
                    sums[lane] += u16::from(low) + u16::from(high);
                }
            }
        }
        let factors = block[layout.factors()..].as_chunks::<4>().0;
        for (lane, score) in scores.iter_mut().enumerate() {
            let factor = f32::from_le_bytes(factors[lane]);
            *score = finish(f32::from(sums[lane]), factor, layout.bias(block, lane), tables, terms);
        }
    }
}

/// [`scan`], with what passes going to `select`: as many as there are of `lanes`, from position `first` on; see [`Select::push_all`].
/// `scores` is a buffer.
#[allow(clippy::too_many_arguments)]
pub fn scan_into(
    simd: Simd,
    layout: Blocks,
    blocks: &[u8],
    tables: &Tables,
    terms: Terms,
    (first, lanes): (u32, &[u32]),
    admits: Option<&dyn Fn(u32) -> bool>,
    scores: &mut Vec<f32>,
    select: &mut Select,
) {
    match simd {
        // SAFETY: `Simd` has this variant only where the features were detected.
        #[cfg(target_arch = "x86_64")]
        Simd::Avx512 => unsafe {
            x86::scan_into_avx512(layout, blocks, tables, terms, (first, lanes), admits, select);
        },
        _ => {
            scores.resize(lanes.len() * BLOCK, 0.0);
            scan(simd, layout, blocks, tables, terms, scores);
            select.push_all(simd, scores, first, |at| lanes[at], admits);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{BLOCK, Blocks, Select, Tables, Terms};
    use std::arch::x86_64::*;

    /// Two subspaces of 64 vectors' halves: the codes' values, added up, at most 126.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn quad_avx512(codes: &[u8; 64], tables: &[u8; 128]) -> __m512i {
        // SAFETY: the arrays have the bytes that registers take.
        let (codes, low, high) = unsafe {
            (
                _mm512_loadu_si512(codes.as_ptr().cast()),
                _mm512_loadu_si512(tables.as_ptr().cast()),
                _mm512_loadu_si512(tables.as_ptr().add(64).cast()),
            )
        };
        let mask = _mm512_set1_epi8(15);
        let low = _mm512_shuffle_epi8(low, _mm512_and_si512(codes, mask));
        let high = _mm512_shuffle_epi8(high, _mm512_and_si512(_mm512_srli_epi16::<4>(codes), mask));
        _mm512_add_epi8(low, high)
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2")]
    pub fn scan_avx512(layout: Blocks, blocks: &[u8], tables: &Tables, terms: Terms, scores: &mut [f32]) {
        let (scores, _) = scores.as_chunks_mut::<BLOCK>();
        each_avx512(layout, blocks, tables, terms, |at, halves| {
            for (values, scores) in halves.into_iter().zip(scores[at].as_chunks_mut::<16>().0) {
                // SAFETY: the array has the 16 values of a register.
                unsafe { _mm512_storeu_ps(scores.as_mut_ptr(), values) };
            }
        });
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2")]
    pub fn scan_into_avx512(
        layout: Blocks,
        blocks: &[u8],
        tables: &Tables,
        terms: Terms,
        (first, lanes): (u32, &[u32]),
        admits: Option<&dyn Fn(u32) -> bool>,
        select: &mut Select,
    ) {
        each_avx512(layout, blocks, tables, terms, |at, scores| {
            select.push_avx512(scores, first + (at * BLOCK) as u32, lanes[at], admits);
        });
    }

    /// Calls with the number of each block and its scores.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2")]
    fn each_avx512(
        layout: Blocks,
        blocks: &[u8],
        tables: &Tables,
        terms: Terms,
        mut each: impl FnMut(usize, [__m512; 2]),
    ) {
        let (scale, offset) = (_mm512_set1_ps(tables.scale), _mm512_set1_ps(tables.offset));
        let (base, weight) = (_mm512_set1_ps(terms.base), _mm512_set1_ps(terms.weight));
        let table_pairs = tables.bytes.as_chunks::<128>().0.as_chunks::<2>();
        for (at, block) in blocks.chunks_exact(layout.bytes()).enumerate() {
            let (codes, rest) = block.split_at(layout.factors());
            // Pairs of bytes: `sums` holds even + 256 odd, `odd` the odd ones, both modulo 2^16.
            let (mut sums, mut odd) = (_mm512_setzero_si512(), _mm512_setzero_si512());
            let (pairs, last) = codes.as_chunks::<64>().0.as_chunks::<2>();
            for (codes, tables) in pairs.iter().zip(table_pairs.0) {
                let four = _mm512_add_epi8(quad_avx512(&codes[0], &tables[0]), quad_avx512(&codes[1], &tables[1]));
                sums = _mm512_add_epi16(sums, four);
                odd = _mm512_add_epi16(odd, _mm512_srli_epi16::<8>(four));
            }
            if let ([codes], [tables]) = (last, table_pairs.1) {
                let two = quad_avx512(codes, tables);
                sums = _mm512_add_epi16(sums, two);
                odd = _mm512_add_epi16(odd, _mm512_srli_epi16::<8>(two));
            }
            let even = _mm512_sub_epi16(sums, _mm512_slli_epi16::<8>(odd));
            let fold = |v: __m512i| _mm256_add_epi16(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64::<1>(v));
            let (even, odd) = (fold(even), fold(odd));
            let (low, high) = (_mm256_unpacklo_epi16(even, odd), _mm256_unpackhi_epi16(even, odd));
            let ordered = [_mm256_permute2x128_si256::<0x20>(low, high), _mm256_permute2x128_si256::<0x31>(low, high)];
            let halves = rest.as_chunks::<64>().0;
            let of_half = |half: usize| {
                let sums = _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(ordered[half]));
                let dot = _mm512_add_ps(_mm512_mul_ps(scale, sums), offset);
                let score = _mm512_add_ps(base, _mm512_mul_ps(load(&halves[half]), dot));
                if layout.has_bias {
                    _mm512_add_ps(score, _mm512_mul_ps(weight, load(&halves[2 + half])))
                } else {
                    score
                }
            };
            each(at, [of_half(0), of_half(1)]);
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn load(values: &[u8; 64]) -> __m512 {
        // SAFETY: the array has the 64 bytes of a register.
        unsafe { _mm512_loadu_ps(values.as_ptr().cast()) }
    }

    #[target_feature(enable = "avx2")]
    pub fn scan_avx2(layout: Blocks, blocks: &[u8], tables: &Tables, terms: Terms, scores: &mut [f32]) {
        let (scale, offset) = (_mm256_set1_ps(tables.scale), _mm256_set1_ps(tables.offset));
        let (base, weight) = (_mm256_set1_ps(terms.base), _mm256_set1_ps(terms.weight));
        let mask = _mm256_set1_epi8(15);
        for (block, scores) in blocks.chunks_exact(layout.bytes()).zip(scores.as_chunks_mut::<BLOCK>().0) {
            let (codes, rest) = block.split_at(layout.factors());
            let (mut sums, mut odd) = (_mm256_setzero_si256(), _mm256_setzero_si256());
            for (codes, tables) in codes.as_chunks::<64>().0.iter().zip(tables.bytes.as_chunks::<128>().0) {
                let mut four = _mm256_setzero_si256();
                for half in 0..2 {
                    // SAFETY: 32 bytes from `32 * half` lie within the 64 of codes and of each table.
                    let (codes, low, high) = unsafe {
                        (
                            _mm256_loadu_si256(codes.as_ptr().add(32 * half).cast()),
                            _mm256_loadu_si256(tables.as_ptr().add(32 * half).cast()),
                            _mm256_loadu_si256(tables.as_ptr().add(64 + 32 * half).cast()),
                        )
                    };
                    let low = _mm256_shuffle_epi8(low, _mm256_and_si256(codes, mask));
                    let high = _mm256_shuffle_epi8(high, _mm256_and_si256(_mm256_srli_epi16::<4>(codes), mask));
                    four = _mm256_add_epi8(four, _mm256_add_epi8(low, high));
                }
                sums = _mm256_add_epi16(sums, four);
                odd = _mm256_add_epi16(odd, _mm256_srli_epi16::<8>(four));
            }
            let even = _mm256_sub_epi16(sums, _mm256_slli_epi16::<8>(odd));
            let (low, high) = (_mm256_unpacklo_epi16(even, odd), _mm256_unpackhi_epi16(even, odd));
            let ordered = [
                _mm256_castsi256_si128(low),
                _mm256_castsi256_si128(high),
                _mm256_extracti128_si256::<1>(low),
                _mm256_extracti128_si256::<1>(high),
            ];
            for (part, sums) in ordered.into_iter().enumerate() {
                let sums = _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(sums));
                // SAFETY: a block has 32 factors, and as many additive parts where the layout says so; `scores` has 32 values.
                unsafe {
                    let factors = _mm256_loadu_ps(rest.as_ptr().add(32 * part).cast());
                    let dot = _mm256_add_ps(_mm256_mul_ps(scale, sums), offset);
                    let mut score = _mm256_add_ps(base, _mm256_mul_ps(factors, dot));
                    if layout.has_bias {
                        let bias = _mm256_loadu_ps(rest.as_ptr().add(4 * BLOCK + 32 * part).cast());
                        score = _mm256_add_ps(score, _mm256_mul_ps(weight, bias));
                    }
                    _mm256_storeu_ps(scores.as_mut_ptr().add(8 * part), score);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_variant_gives_the_same_and_about_the_product(
            quads in 1usize..20, dims in 1usize..5, n_blocks in 1usize..4, has_bias in any::<bool>(), seed in any::<u64>(),
        ) {
            let layout = Blocks { n_subspaces: quads * QUAD, has_bias };
            let mut next = crate::testing::noise(seed);
            let query: Vec<f32> = (0..layout.n_subspaces * dims).map(|_| next()).collect();
            let codebook: Vec<f32> = (0..query.len() * CODEWORDS).map(|_| next()).collect();
            // Aligned as bundles align their arrays.
            let mut storage = vec![0f32; n_blocks * layout.bytes() / 4];
            let blocks: &mut [u8] = bytemuck::cast_slice_mut(&mut storage);
            let mut want = Vec::new();
            for block in blocks.chunks_exact_mut(layout.bytes()) {
                for lane in 0..BLOCK {
                    let codes: Vec<u8> = (0..layout.n_subspaces).map(|_| ((next() + 0.5) * 16.0) as u8).collect();
                    let (factor, bias) = (next() + 1.0, next());
                    layout.set(block, lane, &codes, factor, bias);
                    let word = |at: usize| {
                        let (subspace, part) = (at / dims, at % dims);
                        codebook[(subspace * dims + part) * CODEWORDS + usize::from(codes[subspace])]
                    };
                    let dot: f32 = query.iter().enumerate().map(|(at, q)| q * word(at)).sum();
                    want.push(2.0 + factor * dot + if has_bias { 3.0 * bias } else { 0.0 });
                    prop_assert_eq!(layout.bias(block, lane), if has_bias { bias } else { 0.0 });
                }
            }
            let mut tables = Tables::default();
            let terms = Terms { base: 2.0, weight: 3.0 };
            let mut all = Vec::new();
            for simd in Simd::available() {
                tables.prepare(Simd::Portable, &query, layout.n_subspaces, &codebook);
                let mut scores = vec![0.0; n_blocks * BLOCK];
                scan(simd, layout, bytemuck::cast_slice(&storage), &tables, terms, &mut scores);
                all.push(scores);
            }
            prop_assert!(all.windows(2).all(|pair| pair[0] == pair[1]));
            // A table's value is off by at most half a step, and so is each of the values added up.
            let bound = 1.5 * 0.51 * tables.scale * layout.n_subspaces as f32 + 1e-4;
            for (got, want) in all[0].iter().zip(&want) {
                prop_assert!((got - want).abs() <= bound, "{got} {want} {bound}");
            }
        }
    }
}
