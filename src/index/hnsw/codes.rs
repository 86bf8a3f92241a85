//! Vectors in 8 bits a dimension, scored at random places: what a walk through a graph reads.
//!
//! A record holds codes and what turns a sum over them into a score, so that one vector is one run of memory: at 64 dimensions 76
//! bytes, where the vector itself has 256. Vectors are coded about their mean, which no order depends on.
#![allow(unsafe_code)] // Calls of functions compiled for CPU features that were detected, and their loads.

use crate::catalog::array::Array;
use crate::catalog::generation::Metric;
use crate::index::exact::Rows;
use crate::index::simd::Simd;
use crate::memory::{prefetch, prefetch_range};
use rayon::prelude::*;

/// Words of a record before its codes: scale, norm, height.
const HEAD: usize = 3;
/// Records ahead of its use that a record is asked for.
const AHEAD: usize = 12;
/// Rows that the mean is taken of.
const SAMPLED: usize = 16_384;
/// Turns a code (offset by 128) into a signed byte and back, four at a time.
const SIGN: u32 = 0x8080_8080;

/// The records of a matrix.
#[derive(Clone, Debug)]
pub struct Codes {
    simd: Simd,
    metric: Metric,
    dim: usize,
    /// `[dim]`: the mean that vectors are coded about.
    center: Array<f32>,
    /// `[n, stride]`: scale, norm and height as f32, then codes, each offset by 128, four in a word.
    words: Array<u32>,
}

/// What vectors are scored against: a vector in 8 bits, and the weights of what a record holds.
#[derive(Debug, Default)]
pub struct CodedQuery {
    /// Signed, four in a word.
    codes: Vec<u32>,
    /// `128 Σ code`: what the records' offset adds.
    offset: i32,
    weights: Weights,
    /// The query about the mean.
    moved: Vec<f32>,
}

/// `score = dot * scale * Σ code code + norm * |x|² + height * h`
#[derive(Clone, Copy, Debug, Default)]
struct Weights {
    dot: f32,
    norm: f32,
    height: f32,
}

/// Words of a record.
pub fn stride(dim: usize) -> usize {
    HEAD + dim.div_ceil(4)
}

/// Rounds `values` to whole multiples of the scale that is returned, at most 127 of them.
fn round(values: &[f32], mut put: impl FnMut(usize, i8)) -> f32 {
    let largest = values.iter().fold(0f32, |most, v| most.max(v.abs()));
    let unit = if largest > 0.0 { 127.0 / largest } else { 0.0 };
    for (at, value) in values.iter().enumerate() {
        put(at, (value * unit).round() as i8);
    }
    largest / 127.0
}

fn square(values: &[f32]) -> f32 {
    values.iter().map(|v| v * v).sum()
}

/// Row `row` as it is compared: of length 1 where the metric is cosine.
fn read(rows: &Rows, metric: Metric, row: usize, out: &mut Vec<f32>) {
    out.clear();
    rows.extend_row(row as u32, out);
    if metric == Metric::Cosine {
        let size = square(out).sqrt();
        if size > 0.0 {
            out.iter_mut().for_each(|v| *v /= size);
        }
    }
}

/// Vectors as graphs compare them, by squared distances, whatever the metric: of length 1 for cosine, and for inner products with a
/// further coordinate √(r² - |x|²), r the longest length: then all are of one length, and the nearest are those of the highest product
/// (the reduction of Bachrach et al., RecSys 2014).
#[derive(Clone, Copy, Debug)]
pub struct Lifted<'a> {
    rows: &'a Rows,
    metric: Metric,
    /// r²
    longest: f32,
}

impl<'a> Lifted<'a> {
    /// All of `rows`.
    pub fn new(rows: &'a Rows, metric: Metric) -> Self {
        let square = |row: &mut Vec<f32>, at: usize| {
            read(rows, metric, at, row);
            square(row)
        };
        let longest = match metric {
            Metric::InnerProduct => {
                (0..rows.n_rows()).into_par_iter().map_init(Vec::new, square).reduce(|| 0.0, f32::max)
            }
            _ => 0.0,
        };
        Lifted { rows, metric, longest }
    }

    /// Number of vectors.
    pub fn n_rows(&self) -> usize {
        self.rows.n_rows()
    }

    /// Replaces `out` by vector `at` but for its further coordinate, which is returned; 0 where there is none.
    pub fn read(&self, at: usize, out: &mut Vec<f32>) -> f32 {
        read(self.rows, self.metric, at, out);
        match self.metric {
            Metric::InnerProduct => (self.longest - square(out)).max(0.0).sqrt(),
            _ => 0.0,
        }
    }
}

impl Codes {
    /// Codes every row.
    pub fn new(rows: &Rows, metric: Metric, simd: Simd) -> Self {
        let (n, dim) = (rows.n_rows(), rows.dim());
        let mut row = Vec::with_capacity(dim);
        let mut sums = vec![0f64; dim];
        let sampled = n.min(SAMPLED);
        for at in 0..sampled {
            read(rows, metric, at * n / sampled, &mut row);
            sums.iter_mut().zip(&row).for_each(|(sum, &v)| *sum += f64::from(v));
        }
        let center: Vec<f32> = sums.iter().map(|sum| (sum / sampled.max(1) as f64) as f32).collect();
        let lifted = Lifted::new(rows, metric);
        let stride = stride(dim);
        let mut words = vec![0u32; n * stride];
        words.par_chunks_exact_mut(stride).enumerate().for_each_init(
            || Vec::with_capacity(dim),
            |row, (at, record)| {
                let height = lifted.read(at, row);
                row.iter_mut().zip(&center).for_each(|(v, c)| *v -= c);
                let (head, codes) = record.split_at_mut(HEAD);
                codes.fill(SIGN);
                let mut sum = 0i64;
                let scale = round(row, |at, code| {
                    sum += i64::from(code) * i64::from(code);
                    // The sign bit is set in what is there.
                    codes[at / 4] ^= u32::from(code as u8) << (at % 4 * 8);
                });
                // Of what the codes stand for: the distances between them are then those of real points.
                let norm = scale * scale * sum as f32 + height * height;
                head.copy_from_slice(&[scale, norm, height].map(f32::to_bits));
            },
        );
        Codes { simd, metric, dim, center: center.into(), words: words.into() }
    }

    /// Takes what [`Self::center`] and [`Self::words`] gave; any bits are sound.
    ///
    /// # Errors
    /// If their lengths do not fit the matrix.
    pub fn from_parts(
        rows: &Rows,
        metric: Metric,
        simd: Simd,
        center: Array<f32>,
        words: Array<u32>,
    ) -> Result<Self, String> {
        let (n, dim) = (rows.n_rows(), rows.dim());
        if center.len() != dim {
            return Err(format!("center: {} values, not {dim}", center.len()));
        }
        if Some(words.len()) != n.checked_mul(stride(dim)) {
            return Err(format!("codes: {} words, not {n} * {}", words.len(), stride(dim)));
        }
        Ok(Codes { simd, metric, dim, center, words })
    }

    /// `[dim]`
    pub fn center(&self) -> &Array<f32> {
        &self.center
    }

    /// `[n, stride]`
    pub fn words(&self) -> &Array<u32> {
        &self.words
    }

    fn record(&self, row: u32) -> &[u32] {
        record(&self.words, stride(self.dim), row)
    }

    /// `|x|²` of what the codes of `row` stand for.
    pub fn norm(&self, row: u32) -> f32 {
        f32::from_bits(self.record(row)[1])
    }

    /// Rounds `query` (`[dim]`): scores then rise with the metric's.
    pub fn prepare(&self, query: &[f32], out: &mut CodedQuery) {
        out.moved.clear();
        out.moved.extend_from_slice(query);
        // Inner products with the mean are the same for all rows.
        if self.metric == Metric::L2 {
            out.moved.iter_mut().zip(&self.center[..]).for_each(|(v, c)| *v -= c);
        }
        out.codes.clear();
        out.codes.resize(query.len().div_ceil(4), 0);
        let mut sum = 0i32;
        let scale = round(&out.moved, |at, code| {
            sum += i32::from(code);
            out.codes[at / 4] |= u32::from(code as u8) << (at % 4 * 8);
        });
        out.offset = sum.wrapping_mul(128);
        out.weights = match self.metric {
            Metric::InnerProduct | Metric::Cosine => Weights { dot: scale, norm: 0.0, height: 0.0 },
            Metric::L2 => Weights { dot: 2.0 * scale, norm: -1.0, height: 0.0 },
        };
    }

    /// Takes `row` for the query: scores are then `|row|² - |row - x|²` of what the codes stand for.
    pub fn prepare_row(&self, row: u32, out: &mut CodedQuery) {
        let (head, codes) = self.record(row).split_at(HEAD);
        let signed = codes.iter().map(|word| word ^ SIGN);
        out.codes.clear();
        out.codes.extend(signed.clone());
        let sum: i32 = signed.flat_map(u32::to_le_bytes).map(|byte| i32::from(byte as i8)).sum();
        out.offset = sum.wrapping_mul(128);
        let (scale, height) = (f32::from_bits(head[0]), f32::from_bits(head[2]));
        out.weights = Weights { dot: 2.0 * scale, norm: -1.0, height: 2.0 * height };
    }

    /// `out[i]` = the score of `rows[i]`.
    ///
    /// # Panics
    /// If a row is out of range, or the query was prepared for another dimension.
    pub fn scores(&self, query: &CodedQuery, rows: &[u32], out: &mut Vec<f32>) {
        assert_eq!(query.codes.len() + HEAD, stride(self.dim));
        out.clear();
        match self.simd {
            // SAFETY: `Simd` has this variant only where the features were detected.
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512 => unsafe { x86::scores_avx512(self, query, rows, out) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Simd::Avx2 => unsafe { x86::scores_avx2(self, query, rows, out) },
            _ => scores_with(self, query, rows, out, sum_portable),
        }
    }
}

#[inline(always)]
fn record(words: &[u32], stride: usize, row: u32) -> &[u32] {
    &words[row as usize * stride..][..stride]
}

#[inline(always)]
fn scores_with(
    codes: &Codes,
    query: &CodedQuery,
    rows: &[u32],
    out: &mut Vec<f32>,
    sum: impl Fn(&[u32], &[u32]) -> i32,
) {
    let Weights { dot, norm, height } = query.weights;
    let (words, stride) = (&codes.words[..], HEAD + query.codes.len());
    let ask = |row: u32| {
        let from = row as usize * stride;
        prefetch_range(words, from..from + stride);
        // The last line too, wherever the record begins.
        prefetch(words, from + stride - 1);
    };
    rows.iter().take(AHEAD).for_each(|&row| ask(row));
    out.resize(rows.len(), 0.0);
    // A loop and no closure, so that `sum` is inlined where its features are.
    for (at, (&row, out)) in rows.iter().zip(out).enumerate() {
        if let Some(&later) = rows.get(at + AHEAD) {
            ask(later);
        }
        let (head, record) = record(words, stride, row).split_at(HEAD);
        let sum = sum(record, &query.codes).wrapping_sub(query.offset) as f32;
        let [scale, square, up] = [head[0], head[1], head[2]].map(f32::from_bits);
        *out = dot * scale * sum + (norm * square + height * up);
    }
}

/// `Σ unsigned signed`, modulo 2^32 as all sums here: it is exact up to 66,000 dimensions.
fn sum_portable(unsigned: &[u32], signed: &[u32]) -> i32 {
    let mut sum = 0i32;
    for (a, b) in unsigned.iter().zip(signed) {
        for (a, b) in a.to_le_bytes().into_iter().zip(b.to_le_bytes()) {
            sum = sum.wrapping_add(i32::from(a) * i32::from(b as i8));
        }
    }
    sum
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{CodedQuery, Codes, scores_with};
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2")]
    pub fn scores_avx512(codes: &Codes, query: &CodedQuery, rows: &[u32], out: &mut Vec<f32>) {
        scores_with(codes, query, rows, out, |a, b| sum_avx512(a, b));
    }

    #[target_feature(enable = "avx2")]
    pub fn scores_avx2(codes: &Codes, query: &CodedQuery, rows: &[u32], out: &mut Vec<f32>) {
        scores_with(codes, query, rows, out, |a, b| sum_avx2(a, b));
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2")]
    fn sum_avx512(unsigned: &[u32], signed: &[u32]) -> i32 {
        let mut sums = [_mm512_setzero_si512(); 2];
        let ((a_wide, a_rest), (b_wide, b_rest)) = (unsigned.as_chunks::<32>(), signed.as_chunks::<32>());
        for (a, b) in a_wide.iter().zip(b_wide) {
            for (part, sum) in sums.iter_mut().enumerate() {
                // SAFETY: 16 words from `16 * part` lie within the 32 of the chunk.
                let (a, b) = unsafe {
                    (
                        _mm512_loadu_si512(a.as_ptr().add(16 * part).cast()),
                        _mm512_loadu_si512(b.as_ptr().add(16 * part).cast()),
                    )
                };
                *sum = _mm512_dpbusd_epi32(*sum, a, b);
            }
        }
        for (sum, (a_rest, b_rest)) in sums.iter_mut().zip(a_rest.chunks(16).zip(b_rest.chunks(16))) {
            let mask = ((1u32 << a_rest.len().min(b_rest.len())) - 1) as u16;
            // SAFETY: the mask admits only the words that both have.
            let (a, b) = unsafe {
                (
                    _mm512_maskz_loadu_epi32(mask, a_rest.as_ptr().cast()),
                    _mm512_maskz_loadu_epi32(mask, b_rest.as_ptr().cast()),
                )
            };
            *sum = _mm512_dpbusd_epi32(*sum, a, b);
        }
        _mm512_reduce_add_epi32(_mm512_add_epi32(sums[0], sums[1]))
    }

    /// In 16 bits: products of unsigned and signed bytes, added in pairs, may not fit the 16 bits of `maddubs`.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn sum_avx2(unsigned: &[u32], signed: &[u32]) -> i32 {
        let mut sum = _mm256_setzero_si256();
        let ((a_wide, a_rest), (b_wide, b_rest)) = (unsigned.as_chunks::<4>(), signed.as_chunks::<4>());
        for (a, b) in a_wide.iter().zip(b_wide) {
            // SAFETY: each chunk has the 16 bytes that a register takes.
            let (a, b) = unsafe { (_mm_loadu_si128(a.as_ptr().cast()), _mm_loadu_si128(b.as_ptr().cast())) };
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_cvtepu8_epi16(a), _mm256_cvtepi8_epi16(b)));
        }
        let half = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256::<1>(sum));
        let quarter = _mm_add_epi32(half, _mm_unpackhi_epi64(half, half));
        let total = _mm_add_epi32(quarter, _mm_shuffle_epi32::<1>(quarter));
        _mm_cvtsi128_si32(total).wrapping_add(super::sum_portable(a_rest, b_rest))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::generation::{Matrix, MatrixData};
    use crate::testing::noise;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn scores_rise_with_the_metric(
            dim in 1usize..200, n in 1usize..40, seed in any::<u64>(), offset in prop::sample::select(vec![0f32, 3.0]),
            metric in prop::sample::select(vec![Metric::InnerProduct, Metric::Cosine, Metric::L2]),
        ) {
            let mut next = noise(seed);
            let values: Vec<f32> = (0..n * dim).map(|_| next() + offset).collect();
            let query: Vec<f32> = (0..dim).map(|_| next() + offset).collect();
            let matrix: Rows = Matrix { dim, data: MatrixData::F32(values.into()) }.into();
            let rows: Vec<u32> = (0..n as u32).rev().collect();
            let score = |simd: Simd, prepare: &dyn Fn(&Codes, &mut CodedQuery)| {
                let codes = Codes::new(&matrix, metric, simd);
                let (mut query, mut out) = (CodedQuery::default(), Vec::new());
                prepare(&codes, &mut query);
                codes.scores(&query, &rows, &mut out);
                out
            };
            for simd in Simd::available() {
                for prepare in [
                    &(|codes: &Codes, out: &mut CodedQuery| codes.prepare(&query, out)) as &dyn Fn(&_, &mut _),
                    &|codes: &Codes, out: &mut CodedQuery| codes.prepare_row(0, out),
                ] {
                    let (got, want) = (score(simd, prepare), score(Simd::Portable, prepare));
                    for (got, want) in got.iter().zip(&want) {
                        prop_assert!((got - want).abs() <= 1e-5 * (1.0 + want.abs()), "{simd:?}: {got} {want}");
                    }
                }
            }
            // Differences of scores are those of the metric, but for the rounding of row and query: each is at most half a
            // step, and a step is at most 1/127 of the length.
            let codes = Codes::new(&matrix, metric, Simd::detect());
            let (mut row, mut reals, mut lengths) = (Vec::new(), Vec::new(), Vec::new());
            for &at in &rows {
                read(&matrix, metric, at as usize, &mut row);
                let dot: f32 = row.iter().zip(&query).map(|(a, b)| a * b).sum();
                let distance: f32 = row.iter().zip(&query).map(|(a, b)| (a - b) * (a - b)).sum();
                reals.push(if metric == Metric::L2 { -distance } else { dot });
                row.iter_mut().zip(&codes.center[..]).for_each(|(v, c)| *v -= c);
                lengths.push(square(&row).sqrt());
            }
            let got = score(Simd::detect(), &|codes, out| codes.prepare(&query, out));
            let size = square(&query).sqrt() + square(&codes.center).sqrt();
            let longest = lengths.iter().fold(0f32, |most, v| most.max(*v));
            let slack = (dim as f32).sqrt() / 127.0 * 4.0 * (size + longest) * longest + 1e-4;
            for at in 1..n {
                let (got, want) = (got[at] - got[0], reals[at] - reals[0]);
                prop_assert!((got - want).abs() <= slack, "{metric:?}: {got} {want} {slack}");
            }
        }

        #[test]
        fn rows_are_at_no_distance_from_themselves(dim in 1usize..100, seed in any::<u64>()) {
            let mut next = noise(seed);
            let values: Vec<f32> = (0..2 * dim).map(|_| next()).collect();
            for metric in [Metric::InnerProduct, Metric::Cosine, Metric::L2] {
                let codes = Codes::new(&Matrix { dim, data: MatrixData::F32(values.clone().into()) }.into(), metric, Simd::detect());
                let (mut query, mut out) = (CodedQuery::default(), Vec::new());
                codes.prepare_row(1, &mut query);
                codes.scores(&query, &[1, 0], &mut out);
                prop_assert!((codes.norm(1) - out[0]).abs() <= 1e-6 * codes.norm(1) && out[1] <= out[0]);
            }
        }
    }
}
