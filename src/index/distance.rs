//! Inner products of one query with many rows: AVX-512, AVX2 and portable, chosen at run time.
#![allow(unsafe_code)] // Calls of functions compiled for CPU features that were detected.

/// Which instruction set to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// AVX-512F.
    Avx512,
    /// AVX2 with FMA.
    Avx2,
    /// Whatever the target has.
    Portable,
}

/// Sixteen-lane sums in four registers hide the latency of the adds; the last values come in by a masked load.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn dot_avx512(a: &[f32], b: &[f32]) -> f32 {
    use std::arch::x86_64::*;
    let mut sums = [_mm512_setzero_ps(); 4];
    let (a_wide, a_rest) = a.as_chunks::<64>();
    let (b_wide, b_rest) = b.as_chunks::<64>();
    for (a, b) in a_wide.iter().zip(b_wide) {
        for (part, sum) in sums.iter_mut().enumerate() {
            // SAFETY: 16 values from `16 * part` lie within the 64 of the chunk.
            let (a, b) =
                unsafe { (_mm512_loadu_ps(a.as_ptr().add(16 * part)), _mm512_loadu_ps(b.as_ptr().add(16 * part))) };
            *sum = _mm512_fmadd_ps(a, b, *sum);
        }
    }
    for (part, (a, b)) in a_rest.chunks(16).zip(b_rest.chunks(16)).enumerate() {
        let mask = ((1u32 << a.len().min(b.len())) - 1) as u16;
        // SAFETY: the mask admits only the values that both chunks have.
        let (a, b) = unsafe { (_mm512_maskz_loadu_ps(mask, a.as_ptr()), _mm512_maskz_loadu_ps(mask, b.as_ptr())) };
        sums[part] = _mm512_fmadd_ps(a, b, sums[part]);
    }
    _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])))
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn dots_avx512(query: &[f32], rows: &[f32], out: &mut [f32]) {
    for (row, out) in rows.chunks_exact(query.len()).zip(out) {
        *out = dot_avx512(query, row);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn dot_avx2(a: &[f32], b: &[f32]) -> f32 {
    use std::arch::x86_64::*;
    let mut sums = [_mm256_setzero_ps(); 4];
    let (a_wide, a_rest) = a.as_chunks::<32>();
    let (b_wide, b_rest) = b.as_chunks::<32>();
    for (a, b) in a_wide.iter().zip(b_wide) {
        for (part, sum) in sums.iter_mut().enumerate() {
            // SAFETY: 8 values from `8 * part` lie within the 32 of the chunk.
            let (a, b) =
                unsafe { (_mm256_loadu_ps(a.as_ptr().add(8 * part)), _mm256_loadu_ps(b.as_ptr().add(8 * part))) };
            *sum = _mm256_fmadd_ps(a, b, *sum);
        }
    }
    let sum = _mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3]));
    let half = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps::<1>(sum));
    let quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
    let total = _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
    total + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f32>()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn dots_avx2(query: &[f32], rows: &[f32], out: &mut [f32]) {
    for (row, out) in rows.chunks_exact(query.len()).zip(out) {
        *out = dot_avx2(query, row);
    }
}

/// Eight running sums, which any compiler keeps in vector registers.
fn dot_portable(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0f32; 8];
    let (a_wide, a_rest) = a.as_chunks::<8>();
    let (b_wide, b_rest) = b.as_chunks::<8>();
    for (a, b) in a_wide.iter().zip(b_wide) {
        for lane in 0..8 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    sums.iter().sum::<f32>() + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f32>()
}

fn dots_portable(query: &[f32], rows: &[f32], out: &mut [f32]) {
    for (row, out) in rows.chunks_exact(query.len()).zip(out) {
        *out = dot_portable(query, row);
    }
}

impl Kernel {
    /// The best that this CPU has.
    pub fn detect() -> Self {
        Self::available()[0]
    }

    /// All that this CPU has, best first.
    pub fn available() -> Vec<Self> {
        let mut kernels = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") {
                kernels.push(Kernel::Avx512);
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                kernels.push(Kernel::Avx2);
            }
        }
        kernels.push(Kernel::Portable);
        kernels
    }

    /// `out[i] = <query, rows[i]>`; `rows` is `[out.len(), query.len()]`, row-major. An empty query gives nothing.
    pub fn dots(self, query: &[f32], rows: &[f32], out: &mut [f32]) {
        if query.is_empty() {
            return;
        }
        match self {
            // SAFETY: this variant is only made by `available`, after the feature was detected on this CPU.
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512 => unsafe { dots_avx512(query, rows, out) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2 => unsafe { dots_avx2(query, rows, out) },
            _ => dots_portable(query, rows, out),
        }
    }

    /// `<a, b>`.
    pub fn dot(self, a: &[f32], b: &[f32]) -> f32 {
        let mut out = [0.0];
        self.dots(a, b, &mut out);
        out[0]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_kernel_agrees_with_f64(dim in 1usize..200, n in 1usize..5, seed in any::<u64>()) {
            let mut next = crate::testing::noise(seed);
            let query: Vec<f32> = (0..dim).map(|_| next()).collect();
            let rows: Vec<f32> = (0..dim * n).map(|_| next()).collect();
            for kernel in Kernel::available() {
                let mut out = vec![0.0; n];
                kernel.dots(&query, &rows, &mut out);
                for (row, got) in rows.chunks_exact(dim).zip(&out) {
                    let terms = || query.iter().zip(row).map(|(a, b)| f64::from(*a) * f64::from(*b));
                    let (want, size) = (terms().sum::<f64>(), terms().map(f64::abs).sum::<f64>());
                    // Higham: |error| <= n u Σ|a b|, u = 2^-24.
                    let bound = dim as f64 * 2f64.powi(-24) * size + 1e-12;
                    prop_assert!((f64::from(*got) - want).abs() <= bound, "{kernel:?}: {got} {want}");
                }
            }
        }
    }
}
