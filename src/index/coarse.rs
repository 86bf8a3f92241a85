//! A matrix in 8 bits beside itself, to leave rows out that can't be among the best: a quarter of the bytes to read.
//!
//! Row and query are rounded to `x̂ = s · c`, `c` whole numbers of at most ±127. Then `q·x = q̂·x̂ + q·(x - x̂) + (q - q̂)·x̂`, and by
//! Cauchy and Schwarz the last two are at most `|q| |x - x̂| + |q - q̂| |x̂|`: every inner product comes with bounds that hold, so
//! what is left out is left out rightly and the search stays exact.
#![allow(unsafe_code)] // Calls of a function compiled for CPU features that were detected.

use super::exact::Rows as VectorRows;
use crate::memory::prefetch;

/// Bytes ahead of their use that codes are asked for.
const AHEAD: usize = 4096;

/// Rows side by side in one register.
pub const GROUP: usize = 16;

/// A matrix in 8 bits.
#[derive(Debug)]
pub struct Coarse {
    /// Query bytes a group takes at a time, `ceil(dim / 4)`.
    steps: usize,
    /// `[groups, steps, GROUP, 4]`: code + 128.
    codes: Vec<u8>,
    /// Per row, padded to whole groups: the scale of the codes.
    scales: Vec<f32>,
    /// Per row: `|x - x̂|`, and the rounding of the exact kernels per `|q|`.
    residuals: Vec<f32>,
    /// Per row: `|x̂|`.
    sizes: Vec<f32>,
}

/// A query in 8 bits.
#[derive(Debug, Default)]
pub struct CoarseQuery {
    /// `[steps]`: four codes each.
    codes: Vec<i32>,
    scale: f32,
    /// `128 Σ code`: what the rows' offset adds.
    offset: i32,
    /// `|q|`
    size: f32,
    /// `|q - q̂|`
    residual: f32,
}

/// The largest magnitude becomes 127.
fn scale_of(values: &[f32]) -> f32 {
    values.iter().fold(0f32, |most, v| most.max(v.abs())) / 127.0
}

fn code(value: f32, scale: f32) -> i8 {
    if scale > 0.0 { (value / scale).round().clamp(-127.0, 127.0) as i8 } else { 0 }
}

/// `|a|` in double precision, rounded up a little.
fn size(values: impl Iterator<Item = f64>) -> f32 {
    (values.map(|v| v * v).sum::<f64>().sqrt() * (1.0 + 1e-6)) as f32
}

impl Coarse {
    /// Whether this CPU has what makes it worth while: AVX-512 with VNNI.
    pub fn is_supported() -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni")
        }
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// Rounds every row; `None` where it is not supported.
    pub fn new(rows: &VectorRows) -> Option<Self> {
        if !Self::is_supported() {
            return None;
        }
        let (n, dim) = (rows.n_rows(), rows.dim());
        let (groups, steps) = (n.div_ceil(GROUP), dim.div_ceil(4));
        let mut coarse = Coarse {
            steps,
            codes: vec![128; groups * steps * GROUP * 4],
            scales: vec![0.0; groups * GROUP],
            residuals: vec![0.0; groups * GROUP],
            sizes: vec![0.0; groups * GROUP],
        };
        // |computed - true| <= dim u |q| |x| for any order of summation, u = 2^-24; twice that, for both sums and for ours.
        let rounding = (dim as f32 + 32.0) * 2f32.powi(-23);
        let mut row = Vec::with_capacity(dim);
        for at in 0..n {
            row.clear();
            rows.extend_row(at as u32, &mut row);
            let scale = scale_of(&row);
            let (group, lane) = (at / GROUP, at % GROUP);
            for (column, &value) in row.iter().enumerate() {
                let place = ((group * steps + column / 4) * GROUP + lane) * 4 + column % 4;
                coarse.codes[place] = (i16::from(code(value, scale)) + 128) as u8;
            }
            let rounded = |v: f32| f64::from(scale) * f64::from(code(v, scale));
            coarse.scales[at] = scale;
            coarse.sizes[at] = size(row.iter().map(|&v| rounded(v)));
            let exact = size(row.iter().map(|&v| f64::from(v)));
            coarse.residuals[at] = size(row.iter().map(|&v| f64::from(v) - rounded(v))) + rounding * exact;
        }
        Some(coarse)
    }

    /// Size in memory.
    pub fn bytes(&self) -> usize {
        self.codes.len() + 4 * (self.scales.len() + self.residuals.len() + self.sizes.len())
    }

    /// Rounds a query.
    pub fn prepare(&self, query: &[f32], out: &mut CoarseQuery) {
        let scale = scale_of(query);
        out.codes.clear();
        for four in query.chunks(4) {
            let mut bytes = [0u8; 4];
            for (byte, &value) in bytes.iter_mut().zip(four) {
                *byte = code(value, scale) as u8;
            }
            out.codes.push(i32::from_le_bytes(bytes));
        }
        let rounded = |v: f32| f64::from(scale) * f64::from(code(v, scale));
        out.scale = scale;
        out.offset = query.iter().map(|&v| i32::from(code(v, scale))).sum::<i32>() * 128;
        out.size = size(query.iter().map(|&v| f64::from(v)));
        out.residual = size(query.iter().map(|&v| f64::from(v) - rounded(v)));
    }

    /// Bounds of the inner products of the rows from `GROUP * first` with some queries, whose codes are read once for all of
    /// them; the lengths of `lower` and `upper` are alike, and multiples of [`GROUP`].
    ///
    /// # Panics
    /// If the lengths differ or reach beyond the last group.
    pub fn bounds<const N: usize>(
        &self,
        queries: [&CoarseQuery; N],
        first: usize,
        lower: [&mut [f32]; N],
        upper: [&mut [f32]; N],
    ) {
        let n = lower.first().map_or(0, |lower| lower.len());
        assert!(n.is_multiple_of(GROUP) && lower.iter().chain(&upper).all(|bounds| bounds.len() == n));
        assert!(queries.iter().all(|query| query.codes.len() == self.steps));
        let (from, to) = (first * GROUP, first * GROUP + n);
        let codes = &self.codes[from * self.steps * 4..to * self.steps * 4];
        let rows = Rows {
            codes,
            scales: &self.scales[from..to],
            residuals: &self.residuals[from..to],
            sizes: &self.sizes[from..to],
        };
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a `Coarse` exists only where the features were detected.
        unsafe {
            bounds_vnni(rows, queries, lower, upper);
        }
        #[cfg(not(target_arch = "x86_64"))]
        for (query, (lower, upper)) in queries.into_iter().zip(lower.into_iter().zip(upper)) {
            bounds_portable(rows, query, lower, upper);
        }
    }
}

#[derive(Clone, Copy)]
struct Rows<'a> {
    codes: &'a [u8],
    scales: &'a [f32],
    residuals: &'a [f32],
    sizes: &'a [f32],
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vnni")]
fn bounds_vnni<const N: usize>(
    rows: Rows<'_>,
    queries: [&CoarseQuery; N],
    lower: [&mut [f32]; N],
    upper: [&mut [f32]; N],
) {
    use std::arch::x86_64::*;
    let steps = queries.first().map_or(1, |query| query.codes.len());
    let pairs_of = queries.map(|query| &query.codes.as_chunks::<2>().0[..steps / 2]);
    let groups = rows.codes.chunks_exact(steps * GROUP * 4).zip(rows.scales.as_chunks::<GROUP>().0);
    let errors = rows.residuals.as_chunks::<GROUP>().0.iter().zip(rows.sizes.as_chunks::<GROUP>().0);
    for (group, ((codes, scales), (residuals, sizes))) in groups.zip(errors).enumerate() {
        let mut sums = [[_mm512_setzero_si512(); 2]; N];
        let (pairs, last) = codes.as_chunks::<128>();
        for (step, codes) in pairs[..steps / 2].iter().enumerate() {
            // The CPU looks ahead by itself within a page of memory only.
            prefetch(codes, AHEAD);
            prefetch(codes, AHEAD + 64);
            for part in 0..2 {
                // SAFETY: 64 bytes from `64 * part` lie within the 128 of the chunk.
                let codes = unsafe { _mm512_loadu_si512(codes.as_ptr().add(64 * part).cast()) };
                for (sums, pairs) in sums.iter_mut().zip(&pairs_of) {
                    sums[part] = _mm512_dpbusd_epi32(sums[part], codes, _mm512_set1_epi32(pairs[step][part]));
                }
            }
        }
        if let Some(last) = last.first_chunk::<64>() {
            // SAFETY: the chunk has 64 bytes.
            let codes = unsafe { _mm512_loadu_si512(last.as_ptr().cast()) };
            for (sums, query) in sums.iter_mut().zip(&queries) {
                sums[0] = _mm512_dpbusd_epi32(sums[0], codes, _mm512_set1_epi32(query.codes[steps - 1]));
            }
        }
        // SAFETY: each array has the 16 values that a register takes.
        let (scales, residuals, sizes) = unsafe {
            (_mm512_loadu_ps(scales.as_ptr()), _mm512_loadu_ps(residuals.as_ptr()), _mm512_loadu_ps(sizes.as_ptr()))
        };
        for (at, (query, sums)) in queries.iter().zip(&sums).enumerate() {
            let whole = _mm512_sub_epi32(_mm512_add_epi32(sums[0], sums[1]), _mm512_set1_epi32(query.offset));
            let dot = _mm512_mul_ps(_mm512_cvtepi32_ps(whole), _mm512_mul_ps(_mm512_set1_ps(query.scale), scales));
            let error = _mm512_fmadd_ps(_mm512_set1_ps(query.size), residuals, _mm512_set1_ps(f32::MIN_POSITIVE));
            let error = _mm512_fmadd_ps(_mm512_set1_ps(query.residual), sizes, error);
            let place = group * GROUP..(group + 1) * GROUP;
            let (lower, upper) = (&mut lower[at][place.clone()], &mut upper[at][place]);
            // SAFETY: both have the 16 values that a register gives.
            unsafe {
                _mm512_storeu_ps(lower.as_mut_ptr(), _mm512_sub_ps(dot, error));
                _mm512_storeu_ps(upper.as_mut_ptr(), _mm512_add_ps(dot, error));
            }
        }
    }
}

/// The same, obviously.
#[cfg(any(test, not(target_arch = "x86_64")))]
fn bounds_portable(rows: Rows<'_>, query: &CoarseQuery, lower: &mut [f32], upper: &mut [f32]) {
    for at in 0..lower.len() {
        let (group, lane) = (at / GROUP, at % GROUP);
        let steps = query.codes.len();
        let mut sum = -query.offset;
        for (step, codes) in query.codes.iter().enumerate() {
            for (byte, code) in codes.to_le_bytes().into_iter().enumerate() {
                let row = rows.codes[((group * steps + step) * GROUP + lane) * 4 + byte];
                sum += i32::from(row) * i32::from(code as i8);
            }
        }
        let dot = sum as f32 * (query.scale * rows.scales[at]);
        // The least: what underflows.
        let error = query.size * rows.residuals[at] + query.residual * rows.sizes[at] + f32::MIN_POSITIVE;
        (lower[at], upper[at]) = (dot - error, dot + error);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::generation::{Matrix, MatrixData};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn bounds_hold(
            dim in 1usize..70, n in 1usize..50, seed in any::<u64>(), spread in prop::sample::select(vec![0f32, 1e-20, 1.0, 1e10]),
        ) {
            let mut noise = crate::testing::noise(seed);
            // Heavy tails: one large value makes all others coarse.
            let mut next = || noise().powi(3) * spread;
            let query: Vec<f32> = (0..dim).map(|_| next()).collect();
            let values: Vec<f32> = (0..n * dim).map(|_| next()).collect();
            let Some(coarse) = Coarse::new(&Matrix { dim, data: MatrixData::F32(values.clone().into()) }.into()) else {
                return Ok(());
            };
            let mut prepared = CoarseQuery::default();
            coarse.prepare(&query, &mut prepared);
            let padded = n.next_multiple_of(GROUP);
            let (mut lower, mut upper) = (vec![0.0; padded], vec![0.0; padded]);
            coarse.bounds([&prepared], 0, [&mut lower], [&mut upper]);
            // Beside others it is bounded as it is alone.
            let mut other = CoarseQuery::default();
            coarse.prepare(&values[..dim], &mut other);
            let mut twice = [(); 4].map(|()| vec![0.0; padded]);
            let [a, b, c, d] = &mut twice;
            coarse.bounds([&other, &prepared], 0, [a, b], [c, d]);
            prop_assert!(twice[1] == lower && twice[3] == upper);
            for (at, row) in values.chunks_exact(dim).enumerate() {
                let dot: f64 = query.iter().zip(row).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                prop_assert!(f64::from(lower[at]) <= dot && dot <= f64::from(upper[at]), "{} {dot} {}", lower[at], upper[at]);
            }
            let (mut slow_lower, mut slow_upper) = (vec![0.0; padded], vec![0.0; padded]);
            let rows = Rows { codes: &coarse.codes, scales: &coarse.scales, residuals: &coarse.residuals, sizes: &coarse.sizes };
            bounds_portable(rows, &prepared, &mut slow_lower, &mut slow_upper);
            for at in 0..n {
                // The one fuses what the other rounds in between.
                let slack = 1e-5 * (slow_upper[at] - slow_lower[at]) + 1e-6 * slow_upper[at].abs() + 1e-30;
                prop_assert!((lower[at] - slow_lower[at]).abs() <= slack && (upper[at] - slow_upper[at]).abs() <= slack);
            }
        }
    }
}
