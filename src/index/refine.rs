//! Scoring chosen vectors by 8-bit codes, read at random: a quarter of the bytes of the vectors themselves.
#![allow(unsafe_code)] // Calls of functions compiled for CPU features that were detected, and their loads.

use super::fastscan::BLOCK;
use super::simd::Simd;
use crate::memory::prefetch;

/// Codes ahead of their use that codes are asked for.
const AHEAD: usize = 24;
/// More than any whole number that a query's values become, and a half.
const HALVES: f32 = 16_384.5;
/// What a code of 0 stands at.
const ZERO: i32 = 128;

/// A query in 15 bits a dimension: `q ≈ scale * (128 high + low)`.
#[derive(Debug, Default)]
pub struct WideQuery {
    high: Vec<i8>,
    /// 0 to 127.
    low: Vec<i8>,
    scale: f32,
    /// `ZERO * Σ (128 high + low)`: what the codes' offset adds; modulo 2^32, as all sums here.
    offset: i32,
}

impl WideQuery {
    /// Rounds `query`, whose length is a multiple of 32.
    pub fn prepare(&mut self, query: &[f32]) {
        let largest = query.iter().fold(0f32, |most, v| most.max(v.abs()));
        // |Σ (code - 128)(128 high + low)| stays below 2^31.
        let most = (i32::MAX / 128 / query.len().max(1) as i32).min(127 * 128) as f32;
        self.scale = largest / most;
        let unit = if largest > 0.0 { most / largest } else { 0.0 };
        self.high.clear();
        self.low.clear();
        // Rounds as `round` does but for halves, without a call: the sum is positive, and conversion drops what is behind the point.
        let whole = |value: &f32| (value * unit + HALVES) as i32 - HALVES as i32;
        self.high.extend(query.iter().map(|value| (whole(value) >> 7) as i8));
        self.low.extend(query.iter().map(|value| (whole(value) & 127) as i8));
        let sum = query.iter().fold(0i32, |sum, value| sum.wrapping_add(whole(value)));
        self.offset = sum.wrapping_mul(ZERO);
    }
}

/// 8 bits of `value`, `unit` being 127 over the largest magnitude.
pub fn code(value: f32, unit: f32) -> u8 {
    ((value * unit).round().clamp(-127.0, 127.0) as i32 + ZERO) as u8
}

/// Replaces `out` by `<query, codes>` for `positions`, where the codes of position `p` are the `dim` bytes from `p * dim` and stand for
/// `code - 128`; `soon` is called some positions ahead, to ask for what will be read with the product.
///
/// # Panics
/// If a position lies beyond `codes`, or `out` is not as long as `positions`.
#[inline(always)]
pub fn dots(simd: Simd, query: &WideQuery, codes: &[u8], positions: &[u32], soon: impl Fn(u32), out: &mut [f32]) {
    match simd {
        // SAFETY: `Simd` has this variant only where the features were detected.
        #[cfg(target_arch = "x86_64")]
        Simd::Avx512 => unsafe { x86::dots_avx512(query, codes, positions, soon, out) },
        _ => dots_of(query, codes, positions, soon, out, |rows| rows.map(|row| dot(simd, query, row))),
    }
}

#[inline(always)]
fn dots_of(
    query: &WideQuery,
    codes: &[u8],
    positions: &[u32],
    soon: impl Fn(u32),
    out: &mut [f32],
    four_dots: impl Fn([&[u8]; 4]) -> [i32; 4],
) {
    assert_eq!(positions.len(), out.len());
    let dim = query.high.len();
    let ask = |position: u32| {
        let from = position as usize * dim;
        for at in (from..from + dim).step_by(64) {
            prefetch(codes, at);
        }
        soon(position);
    };
    for &position in &positions[..positions.len().min(AHEAD)] {
        ask(position);
    }
    let row = |position: u32| &codes[position as usize * dim..(position as usize + 1) * dim];
    let (fours, rest) = positions.as_chunks::<4>();
    let (of_fours, of_rest) = out.as_chunks_mut::<4>();
    for (at, (&[a, b, c, d], out)) in fours.iter().zip(of_fours).enumerate() {
        for &later in positions.get(4 * at + AHEAD..).unwrap_or_default().iter().take(4) {
            ask(later);
        }
        *out = four_dots([row(a), row(b), row(c), row(d)]).map(|dot| dot as f32 * query.scale);
    }
    for (&position, out) in rest.iter().zip(of_rest) {
        *out = four_dots([row(position); 4])[0] as f32 * query.scale;
    }
}

/// Replaces `out` by `base + scale * <query, codes>` for rows of codes that lie one behind the other, as [`dots`] has them; every
/// [`BLOCK`] of them have one of `scales`.
pub fn blocks(simd: Simd, query: &WideQuery, codes: &[u8], scales: &[f32], base: f32, out: &mut [f32]) {
    debug_assert_eq!(codes.len(), query.high.len() * out.len());
    debug_assert_eq!(scales.len() * BLOCK, out.len());
    match simd {
        // SAFETY: `Simd` has this variant only where the features were detected.
        #[cfg(target_arch = "x86_64")]
        Simd::Avx512 => unsafe { x86::blocks_avx512(query, codes, scales, base, out) },
        _ => blocks_of(query, codes, scales, base, out, |rows| rows.map(|row| dot(simd, query, row))),
    }
}

#[inline(always)]
fn blocks_of(
    query: &WideQuery,
    codes: &[u8],
    scales: &[f32],
    base: f32,
    out: &mut [f32],
    four_dots: impl Fn([&[u8]; 4]) -> [i32; 4],
) {
    let dim = query.high.len();
    let all = codes.chunks_exact(BLOCK * dim).zip(scales).zip(out.as_chunks_mut::<BLOCK>().0);
    for ((codes, scale), out) in all {
        for (rows, out) in codes.chunks_exact(4 * dim).zip(out.as_chunks_mut::<4>().0) {
            let ((a, b), (c, d)) = (rows[..2 * dim].split_at(dim), rows[2 * dim..].split_at(dim));
            *out = four_dots([a, b, c, d]).map(|dot| base + scale * (dot as f32 * query.scale));
        }
    }
}

/// `Σ (code - 128) (128 high + low)`
#[inline(always)]
fn dot(simd: Simd, query: &WideQuery, row: &[u8]) -> i32 {
    match simd {
        // SAFETY: `Simd` has this variant only where the features were detected.
        #[cfg(target_arch = "x86_64")]
        Simd::Avx512 => unsafe { x86::dot_avx512(query, row) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Simd::Avx2 => unsafe { x86::dot_avx2(query, row) },
        _ => dot_portable(query, row),
    }
}

fn dot_portable(query: &WideQuery, row: &[u8]) -> i32 {
    let (mut high, mut low) = (0i32, 0i32);
    for ((&code, &h), &l) in row.iter().zip(&query.high).zip(&query.low) {
        high = high.wrapping_add(i32::from(code) * i32::from(h));
        low = low.wrapping_add(i32::from(code) * i32::from(l));
    }
    high.wrapping_mul(128).wrapping_add(low).wrapping_sub(query.offset)
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::WideQuery;
    use std::arch::x86_64::*;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2")]
    pub fn dot_avx512(query: &WideQuery, row: &[u8]) -> i32 {
        let (mut high, mut low) = (_mm512_setzero_si512(), _mm512_setzero_si512());
        let (rows, row_rest) = row.as_chunks::<64>();
        let (highs, high_rest) = query.high.as_chunks::<64>();
        let (lows, low_rest) = query.low.as_chunks::<64>();
        for ((row, h), l) in rows.iter().zip(highs).zip(lows) {
            // SAFETY: each chunk has the 64 bytes of a register.
            unsafe {
                let row = _mm512_loadu_si512(row.as_ptr().cast());
                high = _mm512_dpbusd_epi32(high, row, _mm512_loadu_si512(h.as_ptr().cast()));
                low = _mm512_dpbusd_epi32(low, row, _mm512_loadu_si512(l.as_ptr().cast()));
            }
        }
        let mut sums = _mm512_add_epi32(_mm512_slli_epi32::<7>(high), low);
        let rest = (row_rest.first_chunk::<32>(), high_rest.first_chunk::<32>(), low_rest.first_chunk::<32>());
        if let (Some(row), Some(h), Some(l)) = rest {
            // SAFETY: each chunk has the 32 bytes of a half register.
            unsafe {
                let row = _mm256_loadu_si256(row.as_ptr().cast());
                let zero = _mm256_setzero_si256();
                let high = _mm256_dpbusd_epi32(zero, row, _mm256_loadu_si256(h.as_ptr().cast()));
                let low = _mm256_dpbusd_epi32(zero, row, _mm256_loadu_si256(l.as_ptr().cast()));
                let both = _mm256_add_epi32(_mm256_slli_epi32::<7>(high), low);
                sums = _mm512_add_epi32(sums, _mm512_zextsi256_si512(both));
            }
        }
        _mm512_reduce_add_epi32(sums).wrapping_sub(query.offset)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2")]
    pub fn dots_avx512(query: &WideQuery, codes: &[u8], positions: &[u32], soon: impl Fn(u32), out: &mut [f32]) {
        super::dots_of(query, codes, positions, soon, out, |rows| four_avx512(query, rows));
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2")]
    pub fn blocks_avx512(query: &WideQuery, codes: &[u8], scales: &[f32], base: f32, out: &mut [f32]) {
        super::blocks_of(query, codes, scales, base, out, |rows| four_avx512(query, rows));
    }

    /// As `dot_avx512`; the four sums are put together at the end.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2")]
    fn four_avx512(query: &WideQuery, rows: [&[u8]; 4]) -> [i32; 4] {
        let (mut high, mut low) = ([_mm512_setzero_si512(); 4], [_mm512_setzero_si512(); 4]);
        let (highs, high_rest) = query.high.as_chunks::<64>();
        let (lows, low_rest) = query.low.as_chunks::<64>();
        let parts = rows.map(|row| row.as_chunks::<64>());
        for (at, (h, l)) in highs.iter().zip(lows).enumerate() {
            for (nth, part) in parts.iter().enumerate() {
                // SAFETY: each chunk has the 64 bytes of a register.
                unsafe {
                    let row = _mm512_loadu_si512(part.0[at].as_ptr().cast());
                    high[nth] = _mm512_dpbusd_epi32(high[nth], row, _mm512_loadu_si512(h.as_ptr().cast()));
                    low[nth] = _mm512_dpbusd_epi32(low[nth], row, _mm512_loadu_si512(l.as_ptr().cast()));
                }
            }
        }
        let mut sums: [__m512i; 4] =
            std::array::from_fn(|nth| _mm512_add_epi32(_mm512_slli_epi32::<7>(high[nth]), low[nth]));
        if let (Some(h), Some(l)) = (high_rest.first_chunk::<32>(), low_rest.first_chunk::<32>()) {
            for (sums, (_, rest)) in sums.iter_mut().zip(parts) {
                let rest: &[u8; 32] = rest.first_chunk().unwrap_or(&[0; 32]);
                // SAFETY: each chunk has the 32 bytes of a half register.
                unsafe {
                    let row = _mm256_loadu_si256(rest.as_ptr().cast());
                    let zero = _mm256_setzero_si256();
                    let high = _mm256_dpbusd_epi32(zero, row, _mm256_loadu_si256(h.as_ptr().cast()));
                    let low = _mm256_dpbusd_epi32(zero, row, _mm256_loadu_si256(l.as_ptr().cast()));
                    let both = _mm256_add_epi32(_mm256_slli_epi32::<7>(high), low);
                    *sums = _mm512_add_epi32(*sums, _mm512_zextsi256_si512(both));
                }
            }
        }
        let pair = |a, b| _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        let (first, second) = (pair(sums[0], sums[1]), pair(sums[2], sums[3]));
        let all = _mm512_add_epi32(_mm512_unpacklo_epi64(first, second), _mm512_unpackhi_epi64(first, second));
        let half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64::<1>(all));
        let quarter = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256::<1>(half));
        let mut out = [0; 4];
        // SAFETY: the array has the 16 bytes of a quarter register.
        unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), _mm_sub_epi32(quarter, _mm_set1_epi32(query.offset))) };
        out
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub fn dot_avx2(query: &WideQuery, row: &[u8]) -> i32 {
        let (mut high, mut low) = (_mm256_setzero_si256(), _mm256_setzero_si256());
        let parts =
            row.as_chunks::<16>().0.iter().zip(query.high.as_chunks::<16>().0).zip(query.low.as_chunks::<16>().0);
        for ((row, h), l) in parts {
            // SAFETY: each chunk has the 16 bytes that are loaded. Widened: products of bytes would not fit 16 bits.
            unsafe {
                let row = _mm256_cvtepu8_epi16(_mm_loadu_si128(row.as_ptr().cast()));
                let h = _mm256_cvtepi8_epi16(_mm_loadu_si128(h.as_ptr().cast()));
                let l = _mm256_cvtepi8_epi16(_mm_loadu_si128(l.as_ptr().cast()));
                high = _mm256_add_epi32(high, _mm256_madd_epi16(row, h));
                low = _mm256_add_epi32(low, _mm256_madd_epi16(row, l));
            }
        }
        let sums = _mm256_add_epi32(_mm256_slli_epi32::<7>(high), low);
        let half = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256::<1>(sums));
        let quarter = _mm_add_epi32(half, _mm_shuffle_epi32::<0b01_00_11_10>(half));
        let total = _mm_add_epi32(quarter, _mm_shuffle_epi32::<0b10_11_00_01>(quarter));
        _mm_cvtsi128_si32(total).wrapping_sub(query.offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_variant_is_the_product(halves in 1usize..33, n in 1usize..100, seed in any::<u64>()) {
            let dim = halves * 32;
            let mut next = crate::testing::noise(seed);
            let query: Vec<f32> = (0..dim).map(|_| next()).collect();
            let values: Vec<f32> = (0..n * dim).map(|_| next()).collect();
            let codes: Vec<u8> = values.iter().map(|&v| code(v, 127.0 / 0.5)).collect();
            let positions: Vec<u32> = (0..n as u32).rev().collect();
            let mut wide = WideQuery::default();
            wide.prepare(&query);
            let mut variants = Vec::new();
            for simd in Simd::available() {
                let mut got = vec![0.0; n];
                dots(simd, &wide, &codes, &positions, |_| {}, &mut got);
                let n_blocks = n / BLOCK;
                let scales: Vec<f32> = (0..n_blocks).map(|block| 0.5 + block as f32).collect();
                let mut scores = vec![0.0; n_blocks * BLOCK];
                blocks(simd, &wide, &codes[..n_blocks * BLOCK * dim], &scales, 2.0, &mut scores);
                for (&at, &dot) in positions.iter().zip(&got).filter(|(at, _)| (**at as usize) < scores.len()) {
                    prop_assert_eq!(scores[at as usize], 2.0 + scales[at as usize / BLOCK] * dot);
                }
                variants.push(got);
            }
            prop_assert!(variants.windows(2).all(|pair| pair[0] == pair[1]));
            for (&position, got) in positions.iter().zip(&variants[0]) {
                let row = &codes[position as usize * dim..][..dim];
                let want: f64 = query.iter().zip(row).map(|(q, &c)| f64::from(*q) * f64::from(i32::from(c) - ZERO)).sum();
                // Each of the query's values is off by half a step at most.
                let bound = 0.51 * f64::from(wide.scale) * 127.0 * dim as f64 + 1e-3;
                prop_assert!((f64::from(*got) - want).abs() <= bound, "{got} {want}");
            }
        }
    }
}
