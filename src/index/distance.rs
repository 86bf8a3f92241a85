//! Inner products of one query with many rows; one body, compiled for AVX-512, AVX2 and the baseline, chosen at run time.
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

/// Lanes that sum up side by side: four 16-lane registers hide the latency of the adds.
const LANES: usize = 64;

/// Four vector accumulators in flight; `mul_add` is one instruction where the caller's target has FMA.
macro_rules! dot {
    ($a:expr, $b:expr, $fma:expr) => {{
        let (a, b): (&[f32], &[f32]) = ($a, $b);
        let mut sums = [0f32; LANES];
        let (a_chunks, a_rest) = a.as_chunks::<LANES>();
        let (b_chunks, b_rest) = b.as_chunks::<LANES>();
        for (a, b) in a_chunks.iter().zip(b_chunks) {
            for lane in 0..LANES {
                sums[lane] = if $fma { a[lane].mul_add(b[lane], sums[lane]) } else { sums[lane] + a[lane] * b[lane] };
            }
        }
        let (a_small, a_rest) = a_rest.as_chunks::<16>();
        let (b_small, b_rest) = b_rest.as_chunks::<16>();
        for (a, b) in a_small.iter().zip(b_small) {
            for lane in 0..16 {
                sums[lane] = if $fma { a[lane].mul_add(b[lane], sums[lane]) } else { sums[lane] + a[lane] * b[lane] };
            }
        }
        let mut width = LANES;
        while width > 1 {
            width /= 2;
            for lane in 0..width {
                sums[lane] += sums[lane + width];
            }
        }
        sums[0] + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f32>()
    }};
}

macro_rules! dots {
    ($query:expr, $rows:expr, $out:expr, $fma:expr) => {
        for (row, out) in $rows.chunks_exact($query.len()).zip($out) {
            *out = dot!($query, row, $fma);
        }
    };
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn dots_avx512(query: &[f32], rows: &[f32], out: &mut [f32]) {
    dots!(query, rows, out, true);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn dots_avx2(query: &[f32], rows: &[f32], out: &mut [f32]) {
    dots!(query, rows, out, true);
}

fn dots_portable(query: &[f32], rows: &[f32], out: &mut [f32]) {
    dots!(query, rows, out, false);
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
            let mut state = seed;
            let mut next = || {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
            };
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
