//! Steps that need no product instructions: plain loops, compiled for what the CPU has.
#![allow(unsafe_code)] // Calls of functions compiled for CPU features that were detected.

use super::kernels::Rows;
use super::ops::{Binary, Unary};
use crate::index::Kernel;

/// What a step does with its operands' rows; widths and lengths are of one row.
pub enum Simple {
    Unary(Unary),
    Affine {
        gain: Vec<f32>,
        add: Vec<f32>,
    },
    Binary(Binary),
    /// Copies the operands side by side.
    Concat,
    /// Runs of neighbouring columns: first column, how many.
    Take(Vec<(u32, u32)>),
    Sum {
        len: usize,
        inner: usize,
        scale: f32,
    },
    Softmax {
        len: usize,
    },
    LayerNorm {
        gain: Vec<f32>,
        add: Vec<f32>,
        epsilon: f32,
    },
    Embedding {
        table: std::sync::Arc<Vec<f32>>,
        dim: usize,
    },
    MatMul {
        m: usize,
        k: usize,
        n: usize,
        turned: bool,
    },
}

impl Simple {
    /// Computes `n` rows of `width` values, the first `width` of every `stride`, from operands of their widths.
    pub fn run(
        &self,
        kernel: Kernel,
        x: &[(Rows<'_>, usize)],
        (n, width): (usize, usize),
        out: &mut [f32],
        stride: usize,
    ) {
        match kernel {
            // SAFETY: these variants are only made after the features were detected on this CPU.
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512 => unsafe { run_avx512(self, x, n, width, out, stride) },
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2 => unsafe { run_avx2(self, x, n, width, out, stride) },
            _ => run(self, x, n, width, out, stride),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma")]
fn run_avx512(simple: &Simple, x: &[(Rows<'_>, usize)], n: usize, width: usize, out: &mut [f32], stride: usize) {
    run(simple, x, n, width, out, stride);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn run_avx2(simple: &Simple, x: &[(Rows<'_>, usize)], n: usize, width: usize, out: &mut [f32], stride: usize) {
    run(simple, x, n, width, out, stride);
}

#[inline(always)]
fn run(simple: &Simple, x: &[(Rows<'_>, usize)], n: usize, width: usize, out: &mut [f32], stride: usize) {
    for at in 0..n {
        let out = &mut out[at * stride..at * stride + width];
        let row = |operand: usize| x[operand].0.floats(at, x[operand].1);
        match simple {
            Simple::Unary(unary) => apply(*unary, row(0), out),
            Simple::Affine { gain, add } => {
                for (((out, v), gain), add) in out.iter_mut().zip(row(0)).zip(gain).zip(add) {
                    *out = v * gain + add;
                }
            }
            Simple::Binary(binary) => match binary {
                Binary::Add => pair(row(0), row(1), out, |a, b| a + b),
                Binary::Sub => pair(row(0), row(1), out, |a, b| a - b),
                Binary::Mul => pair(row(0), row(1), out, |a, b| a * b),
                Binary::Div => pair(row(0), row(1), out, |a, b| a / b),
                // NaN stays, on either side.
                Binary::Max => pair(row(0), row(1), out, |a, b| if a > b || a.is_nan() { a } else { b }),
                Binary::Min => pair(row(0), row(1), out, |a, b| if a < b || a.is_nan() { a } else { b }),
                Binary::Pow => pair(row(0), row(1), out, f32::powf),
            },
            Simple::Concat => {
                let mut rest = out;
                for (rows, width) in x {
                    let (part, behind) = rest.split_at_mut(*width);
                    part.copy_from_slice(rows.floats(at, *width));
                    rest = behind;
                }
            }
            Simple::Take(runs) => {
                let (row, mut to) = (row(0), 0);
                for &(from, len) in runs {
                    let (from, len) = (from as usize, len as usize);
                    match len {
                        1 => out[to] = row[from],
                        _ => out[to..to + len].copy_from_slice(&row[from..from + len]),
                    }
                    to += len;
                }
            }
            Simple::Sum { len, inner, scale } => {
                for (group, out) in row(0).chunks_exact(len * inner).zip(out.chunks_exact_mut(*inner)) {
                    if *inner == 1 {
                        out[0] = sum(group) * scale;
                        continue;
                    }
                    out.fill(0.0);
                    for line in group.chunks_exact(*inner) {
                        out.iter_mut().zip(line).for_each(|(out, v)| *out += v);
                    }
                    out.iter_mut().for_each(|out| *out *= scale);
                }
            }
            Simple::Softmax { len } => {
                for (group, out) in row(0).chunks_exact(*len).zip(out.chunks_exact_mut(*len)) {
                    let most = group.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    out.iter_mut().zip(group).for_each(|(out, v)| *out = exp(v - most));
                    let whole = sum(out);
                    out.iter_mut().for_each(|out| *out /= whole);
                }
            }
            Simple::LayerNorm { gain, add, epsilon } => {
                let len = gain.len();
                for (group, out) in row(0).chunks_exact(len).zip(out.chunks_exact_mut(len)) {
                    let mean = sum(group) / len as f32;
                    out.iter_mut().zip(group).for_each(|(out, v)| *out = (v - mean) * (v - mean));
                    let scale = 1.0 / (sum(out) / len as f32 + epsilon).sqrt();
                    for (((out, v), gain), add) in out.iter_mut().zip(group).zip(gain).zip(add) {
                        *out = (v - mean) * scale * gain + add;
                    }
                }
            }
            Simple::Embedding { table, dim } => {
                let rows = (table.len() / dim) as f32;
                for (&id, out) in row(0).iter().zip(out.chunks_exact_mut(*dim)) {
                    let id = id.trunc();
                    let id = if id < 0.0 { id + rows } else { id };
                    match id >= 0.0 && id < rows {
                        true => out.copy_from_slice(&table[id as usize * dim..(id as usize + 1) * dim]),
                        false => out.fill(f32::NAN),
                    }
                }
            }
            Simple::MatMul { m, k, n, turned } => {
                let batches =
                    row(0).chunks_exact(m * k).zip(row(1).chunks_exact(k * n)).zip(out.chunks_exact_mut(m * n));
                for ((a, b), out) in batches {
                    for (a, out) in a.chunks_exact(*k).zip(out.chunks_exact_mut(*n)) {
                        if *turned {
                            for (b, out) in b.chunks_exact(*k).zip(out) {
                                *out = dot(a, b);
                            }
                            continue;
                        }
                        out.fill(0.0);
                        for (a, b) in a.iter().zip(b.chunks_exact(*n)) {
                            out.iter_mut().zip(b).for_each(|(out, b)| *out += a * b);
                        }
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn pair(a: &[f32], b: &[f32], out: &mut [f32], of: impl Fn(f32, f32) -> f32) {
    match b {
        [b] => out.iter_mut().zip(a).for_each(|(out, &a)| *out = of(a, *b)),
        b => out.iter_mut().zip(a).zip(b).for_each(|((out, &a), &b)| *out = of(a, b)),
    }
}

/// Sixteen running sums, which any compiler keeps in vector registers.
#[inline(always)]
fn sum(values: &[f32]) -> f32 {
    let (whole, rest) = values.as_chunks::<16>();
    let mut sums = [0f32; 16];
    for values in whole {
        (0..16).for_each(|lane| sums[lane] += values[lane]);
    }
    sums.iter().sum::<f32>() + rest.iter().sum::<f32>()
}

#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<16>(), b.as_chunks::<16>());
    let mut sums = [0f32; 16];
    for (a, b) in a.iter().zip(b) {
        (0..16).for_each(|lane| sums[lane] += a[lane] * b[lane]);
    }
    sums.iter().sum::<f32>() + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f32>()
}

/// A function of one value.
pub fn value(unary: Unary, v: f32) -> f32 {
    let mut out = [0.0];
    apply(unary, &[v], &mut out);
    out[0]
}

/// `e^v` as all functions here have it.
pub fn exponential(v: f32) -> f32 {
    exp(v)
}

#[inline(always)]
fn apply(unary: Unary, x: &[f32], out: &mut [f32]) {
    match unary {
        Unary::Relu => each(x, out, |v| if v < 0.0 { 0.0 } else { v }),
        Unary::LeakyRelu { slope } => each(x, out, |v| if v < 0.0 { v * slope } else { v }),
        Unary::Sigmoid => each(x, out, sigmoid),
        Unary::Tanh => each(x, out, |v| 2.0 * sigmoid(2.0 * v) - 1.0),
        Unary::Gelu => each(x, out, |v| 0.5 * v * (1.0 + erf(v * std::f32::consts::FRAC_1_SQRT_2))),
        Unary::Silu => each(x, out, |v| v * sigmoid(v)),
        Unary::Softplus => each(x, out, |v| if v < 0.0 { v.exp().ln_1p() } else { v + (-v).exp().ln_1p() }),
        Unary::Elu { alpha } => each(x, out, |v| if v < 0.0 { alpha * (exp(v) - 1.0) } else { v }),
        Unary::Erf => each(x, out, erf),
        Unary::Exp => each(x, out, exp),
        Unary::Log => each(x, out, f32::ln),
        Unary::Sqrt => each(x, out, f32::sqrt),
        Unary::Abs => each(x, out, f32::abs),
        Unary::Reciprocal => each(x, out, |v| 1.0 / v),
        Unary::Pow { power: 2.0 } => each(x, out, |v| v * v),
        Unary::Pow { power: 0.5 } => each(x, out, f32::sqrt),
        Unary::Pow { power } => each(x, out, |v| v.powf(power)),
        Unary::Clip { low, high } => {
            each(x, out, |v| {
                if v < low {
                    low
                } else if v > high {
                    high
                } else {
                    v
                }
            });
        }
    }
}

#[inline(always)]
fn each(x: &[f32], out: &mut [f32], of: impl Fn(f32) -> f32) {
    out.iter_mut().zip(x).for_each(|(out, &v)| *out = of(v));
}

/// `e^v` to about two units in the last place, without a branch: 2^n times a polynomial on half a power of two to either side
/// (Cephes' expf). Beyond what f32 holds: 0 and infinity; NaN stays.
#[inline(always)]
fn exp(v: f32) -> f32 {
    let kept = v.clamp(-87.3, 88.8);
    // Adding 1.5 * 2^23 leaves the nearest whole number in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let shifted = kept * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = kept - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let tail =
        ((((1.987_569_1e-4 * r + 1.398_2e-3) * r + 8.333_452e-3) * r + 4.166_579_6e-2) * r + 0.166_666_65) * r + 0.5;
    let part = tail * r * r + r + 1.0;
    // 2^128 has no exponent of its own: twice the half of it.
    let half = f32::from_bits(shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(126) << 23);
    let result = part * half * 2.0;
    let result = if v < -87.3 { 0.0 } else { result };
    if v > 88.72 { f32::INFINITY } else { result }
}

#[inline(always)]
fn sigmoid(v: f32) -> f32 {
    1.0 / (1.0 + exp(-v))
}

/// Abramowitz and Stegun 7.1.26: within 1.5e-7 of the error function.
#[inline(always)]
fn erf(v: f32) -> f32 {
    let size = v.abs();
    let t = 1.0 / (1.0 + 0.327_591_1 * size);
    let tail = ((((1.061_405_4 * t - 1.453_152) * t + 1.421_413_7) * t - 0.284_496_74) * t + 0.254_829_6) * t;
    (1.0 - tail * exp(-size * size)).copysign(v)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_agree_with_f64() {
        for step in -40_000..40_000 {
            let v = step as f32 * 0.002_31;
            let wide = f64::from(v);
            let (got, want) = (f64::from(exp(v)), wide.exp());
            assert!(
                (got - want).abs() <= 4.0 * 2f64.powi(-24) * want + 2e-38 || (got.is_infinite() && want > 3.3e38),
                "{v}: {got} {want}"
            );
            let (got, want) = (f64::from(sigmoid(v)), 1.0 / (1.0 + (-wide).exp()));
            assert!((got - want).abs() <= 3e-7, "{v}: {got} {want}");
            let mut tanh = [0.0];
            apply(Unary::Tanh, &[v], &mut tanh);
            assert!((f64::from(tanh[0]) - wide.tanh()).abs() <= 6e-7, "{v}: {}", tanh[0]);
        }
        for (v, want) in [(0.0, 0.0), (0.5, 0.520_499_9), (-1.0, -0.842_700_8), (3.0, 0.999_977_9)] {
            assert!((erf(v) - want).abs() < 4e-7, "{v}: {}", erf(v));
        }
        assert!(exp(f32::NAN).is_nan() && exp(f32::INFINITY) == f32::INFINITY && exp(f32::NEG_INFINITY) == 0.0);
        assert!(erf(f32::NAN).is_nan() && sigmoid(f32::NAN).is_nan());
        assert_eq!((sigmoid(f32::INFINITY), sigmoid(f32::NEG_INFINITY)), (1.0, 0.0));
    }
}
