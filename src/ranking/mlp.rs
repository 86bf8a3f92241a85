//! Multi-layer perceptrons, the common ranker, fused: a block of rows passes through all layers before the next begins, so that
//! what lies between layers stays in the nearest cache, and nothing is allocated.
//!
//! A layer's weights lie in panels of up to 64 columns, and a tile of a few rows by one panel is summed up in registers, as in
//! every fast matrix product (Goto and van de Geijn, ACM TOMS 34(3), 2008).
#![allow(unsafe_code)] // Calls of functions compiled for CPU features that were detected.

use super::{RankError, Ranker};
use crate::index::Kernel;

/// Rows that pass through the layers together.
const BLOCK: usize = 96;
/// Values that are aligned and used together.
const LANES: usize = 16;
/// Layers of at most so many columns are computed by dot products: a panel would be mostly padding.
const NARROW: usize = 4;

/// What follows a layer's sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// Nothing.
    None,
    /// `max(v, 0)`; NaN stays.
    Relu,
    /// `1 / (1 + e^-v)`
    Sigmoid,
    /// Hyperbolic tangent.
    Tanh,
}

/// A layer as it is given: `activation(x · weights + bias)`.
#[derive(Clone, Debug, PartialEq)]
pub struct Dense {
    /// `[n_inputs, n_outputs]`, row-major.
    pub weights: Vec<f32>,
    /// `[n_outputs]`
    pub bias: Vec<f32>,
    /// Applied to every sum.
    pub activation: Activation,
}

#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
struct Lanes([f32; LANES]);

/// A layer as it is computed.
struct Layer {
    n_inputs: usize,
    n_outputs: usize,
    activation: Activation,
    /// `[panels, n_inputs, n_lanes]`; narrow: `[n_outputs, ceil(n_inputs / LANES)]`.
    weights: Vec<Lanes>,
    /// `[panels, n_lanes]`; narrow: one value per output.
    bias: Vec<Lanes>,
    /// Registers' worth of columns in a panel; 0: narrow.
    n_lanes: usize,
}

impl Layer {
    fn new(dense: &Dense, kernel: Kernel) -> Self {
        let n_outputs = dense.bias.len();
        let n_inputs = dense.weights.len() / n_outputs;
        let zero = Lanes([0.0; LANES]);
        let n_lanes = match (kernel, n_outputs) {
            (_, n) if n <= NARROW => 0,
            (Kernel::Avx512, n) if n > 2 * LANES => 4,
            (Kernel::Avx512, n) if n > LANES => 2,
            _ => 1,
        };
        let weight = |input: usize, output: usize| dense.weights[input * n_outputs + output];
        let (mut weights, mut bias);
        if n_lanes == 0 {
            let across = n_inputs.div_ceil(LANES);
            weights = vec![zero; n_outputs * across];
            bias = vec![zero; n_outputs];
            for output in 0..n_outputs {
                bias[output].0[0] = dense.bias[output];
                for input in 0..n_inputs {
                    weights[output * across + input / LANES].0[input % LANES] = weight(input, output);
                }
            }
        } else {
            let panels = n_outputs.div_ceil(n_lanes * LANES);
            weights = vec![zero; panels * n_inputs * n_lanes];
            bias = vec![zero; panels * n_lanes];
            for output in 0..n_outputs {
                let (panel, column) = (output / (n_lanes * LANES), output % (n_lanes * LANES));
                let (lanes, lane) = (column / LANES, column % LANES);
                bias[panel * n_lanes + lanes].0[lane] = dense.bias[output];
                for input in 0..n_inputs {
                    weights[(panel * n_inputs + input) * n_lanes + lanes].0[lane] = weight(input, output);
                }
            }
        }
        Layer { n_inputs, n_outputs, activation: dense.activation, weights, bias, n_lanes }
    }

    /// Values from one output row to the next.
    fn stride(&self) -> usize {
        match self.n_lanes {
            0 => self.n_outputs,
            _ => self.bias.len() * LANES,
        }
    }
}

/// Where a layer reads.
#[derive(Clone, Copy)]
struct Rows<'a> {
    values: &'a [f32],
    stride: usize,
    n: usize,
}

/// Sixteen values in registers. Its functions are inlined into those compiled for the features that they need.
trait Vector: Copy {
    /// # Safety
    /// The CPU has the features of the implementation; so with all the others.
    unsafe fn load(lanes: &[f32; LANES]) -> Self;
    /// `value * weights + self` for every lane.
    unsafe fn add_product(self, value: f32, weights: Self) -> Self;
    /// `self * other + sums`, by lane.
    unsafe fn mul_add(self, other: Self, sums: Self) -> Self;
    /// Negative lanes become 0; NaN stays.
    unsafe fn relu(self) -> Self;
    unsafe fn store(self, out: &mut [f32; LANES]);
}

impl Vector for [f32; LANES] {
    #[inline(always)]
    unsafe fn load(lanes: &[f32; LANES]) -> Self {
        *lanes
    }

    #[inline(always)]
    unsafe fn add_product(self, value: f32, weights: Self) -> Self {
        std::array::from_fn(|at| value * weights[at] + self[at])
    }

    #[inline(always)]
    unsafe fn mul_add(self, other: Self, sums: Self) -> Self {
        std::array::from_fn(|at| self[at] * other[at] + sums[at])
    }

    #[inline(always)]
    unsafe fn relu(self) -> Self {
        self.map(|v| if v < 0.0 { 0.0 } else { v })
    }

    #[inline(always)]
    unsafe fn store(self, out: &mut [f32; LANES]) {
        *out = self;
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{LANES, Vector};
    use std::arch::x86_64::*;

    // SAFETY, here and below: the caller has the features, and the arrays have the values that a register takes.
    impl Vector for __m512 {
        #[inline(always)]
        unsafe fn load(lanes: &[f32; LANES]) -> Self {
            unsafe { _mm512_loadu_ps(lanes.as_ptr()) }
        }

        #[inline(always)]
        unsafe fn add_product(self, value: f32, weights: Self) -> Self {
            unsafe { _mm512_fmadd_ps(_mm512_set1_ps(value), weights, self) }
        }

        #[inline(always)]
        unsafe fn mul_add(self, other: Self, sums: Self) -> Self {
            unsafe { _mm512_fmadd_ps(self, other, sums) }
        }

        #[inline(always)]
        unsafe fn relu(self) -> Self {
            // The second operand is the result where either is NaN.
            unsafe { _mm512_max_ps(_mm512_setzero_ps(), self) }
        }

        #[inline(always)]
        unsafe fn store(self, out: &mut [f32; LANES]) {
            unsafe { _mm512_storeu_ps(out.as_mut_ptr(), self) }
        }
    }

    /// Two registers of eight.
    pub type Pair = [__m256; 2];

    impl Vector for Pair {
        #[inline(always)]
        unsafe fn load(lanes: &[f32; LANES]) -> Self {
            unsafe { [_mm256_loadu_ps(lanes.as_ptr()), _mm256_loadu_ps(lanes.as_ptr().add(8))] }
        }

        #[inline(always)]
        unsafe fn add_product(self, value: f32, weights: Self) -> Self {
            unsafe {
                let value = _mm256_set1_ps(value);
                [_mm256_fmadd_ps(value, weights[0], self[0]), _mm256_fmadd_ps(value, weights[1], self[1])]
            }
        }

        #[inline(always)]
        unsafe fn mul_add(self, other: Self, sums: Self) -> Self {
            unsafe { [_mm256_fmadd_ps(self[0], other[0], sums[0]), _mm256_fmadd_ps(self[1], other[1], sums[1])] }
        }

        #[inline(always)]
        unsafe fn relu(self) -> Self {
            unsafe { [_mm256_max_ps(_mm256_setzero_ps(), self[0]), _mm256_max_ps(_mm256_setzero_ps(), self[1])] }
        }

        #[inline(always)]
        unsafe fn store(self, out: &mut [f32; LANES]) {
            unsafe {
                _mm256_storeu_ps(out.as_mut_ptr(), self[0]);
                _mm256_storeu_ps(out.as_mut_ptr().add(8), self[1]);
            }
        }
    }
}

/// `R` rows by one panel of `N` vectors: the sums stay in registers.
///
/// # Safety
/// The CPU has the features of `V`; so with the callers.
#[inline(always)]
unsafe fn tile<V: Vector, const R: usize, const N: usize>(
    rows: [&[f32]; R],
    weights: &[Lanes],
    bias: &[Lanes; N],
    relu: bool,
    out: &mut [f32],
    stride: usize,
) {
    // SAFETY: by contract.
    unsafe {
        let bias: [V; N] = std::array::from_fn(|at| V::load(&bias[at].0));
        let mut sums = [bias; R];
        for (at, weights) in weights.as_chunks::<N>().0.iter().enumerate() {
            let weights: [V; N] = std::array::from_fn(|lane| V::load(&weights[lane].0));
            for r in 0..R {
                let value = rows[r][at];
                for lane in 0..N {
                    sums[r][lane] = sums[r][lane].add_product(value, weights[lane]);
                }
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            let out = out[row * stride..row * stride + N * LANES].as_chunks_mut::<LANES>().0;
            for (sum, out) in sums.iter().zip(out) {
                if relu { sum.relu() } else { *sum }.store(out);
            }
        }
    }
}

/// A whole layer over a block, panel by panel, in tiles of `R` rows.
#[inline(always)]
unsafe fn panels<V: Vector, const R: usize, const N: usize>(layer: &Layer, rows: Rows<'_>, out: &mut [f32]) {
    let (k, stride, relu) = (layer.n_inputs, layer.stride(), layer.activation == Activation::Relu);
    let row = |at: usize| &rows.values[at * rows.stride..at * rows.stride + k];
    for (panel, bias) in layer.bias.as_chunks::<N>().0.iter().enumerate() {
        let weights = &layer.weights[panel * k * N..(panel + 1) * k * N];
        let out = &mut out[panel * N * LANES..];
        let mut at = 0;
        // SAFETY: by contract.
        unsafe {
            while at + R <= rows.n {
                let tall: [&[f32]; R] = std::array::from_fn(|r| row(at + r));
                tile::<V, R, N>(tall, weights, bias, relu, &mut out[at * stride..], stride);
                at += R;
            }
            while at < rows.n {
                tile::<V, 1, N>([row(at)], weights, bias, relu, &mut out[at * stride..], stride);
                at += 1;
            }
        }
    }
}

/// A narrow layer over a block.
#[inline(always)]
unsafe fn dots<V: Vector>(layer: &Layer, rows: Rows<'_>, out: &mut [f32]) {
    let across = layer.n_inputs.div_ceil(LANES);
    let relu = layer.activation == Activation::Relu;
    for (at, out) in out.chunks_exact_mut(layer.n_outputs).take(rows.n).enumerate() {
        let row = &rows.values[at * rows.stride..at * rows.stride + layer.n_inputs];
        let (whole, rest) = row.as_chunks::<LANES>();
        let mut last = [0f32; LANES];
        last[..rest.len()].copy_from_slice(rest);
        for ((out, weights), bias) in out.iter_mut().zip(layer.weights.chunks_exact(across)).zip(&layer.bias) {
            let mut lanes = [0f32; LANES];
            // SAFETY: by contract.
            unsafe {
                let mut sums = V::load(&lanes);
                for (values, weights) in whole.iter().chain((!rest.is_empty()).then_some(&last)).zip(weights) {
                    sums = V::load(values).mul_add(V::load(&weights.0), sums);
                }
                sums.store(&mut lanes);
            }
            for half in [8, 4, 2, 1] {
                for lane in 0..half {
                    lanes[lane] += lanes[lane + half];
                }
            }
            let sum = lanes[0] + bias.0[0];
            *out = if relu && sum < 0.0 { 0.0 } else { sum };
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,fma")]
fn layer_avx512(layer: &Layer, rows: Rows<'_>, out: &mut [f32]) {
    // SAFETY: this function has the features. 24 sums, 4 weights and a value fill the 32 registers.
    unsafe {
        match layer.n_lanes {
            0 => dots::<std::arch::x86_64::__m512>(layer, rows, out),
            4 => panels::<std::arch::x86_64::__m512, 6, 4>(layer, rows, out),
            2 => panels::<std::arch::x86_64::__m512, 6, 2>(layer, rows, out),
            _ => panels::<std::arch::x86_64::__m512, 6, 1>(layer, rows, out),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn layer_avx2(layer: &Layer, rows: Rows<'_>, out: &mut [f32]) {
    // SAFETY: this function has the features. 12 sums, 2 weights and a value fill the 16 registers.
    unsafe {
        match layer.n_lanes {
            0 => dots::<x86::Pair>(layer, rows, out),
            _ => panels::<x86::Pair, 6, 1>(layer, rows, out),
        }
    }
}

fn layer_portable(layer: &Layer, rows: Rows<'_>, out: &mut [f32]) {
    // SAFETY: arrays need no features.
    unsafe {
        match layer.n_lanes {
            0 => dots::<[f32; LANES]>(layer, rows, out),
            _ => panels::<[f32; LANES], 2, 1>(layer, rows, out),
        }
    }
}

/// A perceptron with one input and one score per row. A row's score does not depend on the rows beside it.
pub struct Mlp {
    name: String,
    layers: Vec<Layer>,
    kernel: Kernel,
    /// Between layers, in turns.
    buffers: [Vec<f32>; 2],
}

impl Mlp {
    /// Packs the layers for a kernel.
    ///
    /// # Panics
    /// If there are none, the widths do not fit together, or the last layer's is not 1; see [`super::graph::chain`].
    pub fn new(name: &str, layers: &[Dense], kernel: Kernel) -> Self {
        assert!(layers.last().is_some_and(|last| last.bias.len() == 1), "one output");
        let layers: Vec<Layer> = layers.iter().map(|dense| Layer::new(dense, kernel)).collect();
        assert!(layers.windows(2).all(|two| two[0].n_outputs == two[1].n_inputs), "widths that fit together");
        let most = layers.iter().map(Layer::stride).max().unwrap_or(0) * BLOCK;
        Mlp { name: name.to_owned(), layers, kernel, buffers: [vec![0.0; most], vec![0.0; most]] }
    }

    /// Values of a row.
    pub fn n_inputs(&self) -> usize {
        self.layers[0].n_inputs
    }
}

impl Ranker for Mlp {
    fn name(&self) -> &str {
        &self.name
    }

    fn rows_are_independent(&self) -> bool {
        true
    }

    fn score(&mut self, inputs: &[Vec<f32>], n: usize, scores: &mut Vec<f32>) -> Result<(), RankError> {
        scores.clear();
        let width = self.n_inputs();
        let [features] = inputs else {
            let reason = format!("{} inputs where there is one", inputs.len());
            return Err(RankError { ranker: self.name.clone(), reason });
        };
        if features.len() != n * width {
            let reason = format!("{} values for {n} x {width}", features.len());
            return Err(RankError { ranker: self.name.clone(), reason });
        }
        let [front, back] = &mut self.buffers;
        for block in features.chunks(BLOCK * width) {
            let n = block.len() / width;
            let (mut input, mut output) = (&mut *front, &mut *back);
            for (at, of) in self.layers.iter().enumerate() {
                let (values, stride) = match at {
                    0 => (block, width),
                    _ => (&input[..], self.layers[at - 1].stride()),
                };
                let rows = Rows { values, stride, n };
                match self.kernel {
                    // SAFETY: this variant is only made after AVX-512F was detected on this CPU, which implies FMA.
                    #[cfg(target_arch = "x86_64")]
                    Kernel::Avx512 => unsafe { layer_avx512(of, rows, output) },
                    // SAFETY: this variant is only made after AVX2 and FMA were detected on this CPU.
                    #[cfg(target_arch = "x86_64")]
                    Kernel::Avx2 => unsafe { layer_avx2(of, rows, output) },
                    _ => layer_portable(of, rows, output),
                }
                let all = &mut output[..n * of.stride()];
                match of.activation {
                    Activation::None | Activation::Relu => {}
                    Activation::Sigmoid => all.iter_mut().for_each(|v| *v = 1.0 / (1.0 + (-*v).exp())),
                    Activation::Tanh => all.iter_mut().for_each(|v| *v = v.tanh()),
                }
                (input, output) = (output, input);
            }
            scores.extend_from_slice(&input[..n]);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// In double precision; also the largest sum of magnitudes of any layer, for the tolerance.
    fn by_definition(layers: &[Dense], row: &[f32]) -> (f64, f64) {
        let (mut values, mut most): (Vec<f64>, f64) = (row.iter().map(|&v| f64::from(v)).collect(), 1.0);
        for layer in layers {
            let n = layer.bias.len();
            let column =
                |at: usize| values.iter().enumerate().map(move |(k, v)| v * f64::from(layer.weights[k * n + at]));
            most = (0..n).fold(most, |most, at| most.max(column(at).map(f64::abs).sum::<f64>()));
            values = (0..n)
                .map(|at| {
                    let sum = column(at).sum::<f64>() + f64::from(layer.bias[at]);
                    match layer.activation {
                        Activation::None => sum,
                        Activation::Relu => sum.max(0.0),
                        Activation::Sigmoid => 1.0 / (1.0 + (-sum).exp()),
                        Activation::Tanh => sum.tanh(),
                    }
                })
                .collect();
        }
        (values[0], most)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn every_kernel_agrees_with_the_definition(
            widths in prop::collection::vec(1usize..150, 1..4), n in 0usize..250, seed in any::<u64>(),
            activation in prop::sample::select(vec![Activation::None, Activation::Relu, Activation::Sigmoid, Activation::Tanh]),
        ) {
            let mut next = crate::testing::noise(seed);
            let ends: Vec<usize> = widths.iter().copied().skip(1).chain([1]).collect();
            let layers: Vec<Dense> = widths.iter().zip(&ends).map(|(&k, &m)| Dense {
                weights: (0..k * m).map(|_| next()).collect(), bias: (0..m).map(|_| next()).collect(), activation,
            }).collect();
            let features: Vec<f32> = (0..n * widths[0]).map(|_| next() * 4.0).collect();
            for kernel in Kernel::available() {
                let mut mlp = Mlp::new("m", &layers, kernel);
                let (mut scores, mut one) = (vec![9.0], Vec::new());
                mlp.score(std::slice::from_ref(&features), n, &mut scores).unwrap();
                prop_assert_eq!(scores.len(), n);
                for (at, row) in features.chunks_exact(widths[0]).enumerate().step_by(7) {
                    let (want, most) = by_definition(&layers, row);
                    // Each layer adds at most k u times the magnitudes and passes on what came in, times its own.
                    let tolerance = 1e-5 * most.powi(layers.len() as i32).max(1.0);
                    prop_assert!((f64::from(scores[at]) - want).abs() <= tolerance, "{kernel:?} {} {want}", scores[at]);
                    mlp.score(&[row.to_vec()], 1, &mut one).unwrap();
                    prop_assert_eq!(one[0].to_bits(), scores[at].to_bits(), "alone as in the batch");
                }
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_an_error_and_nan_stays() {
        let dense =
            |k: usize, m: usize, activation| Dense { weights: vec![1.0; k * m], bias: vec![0.0; m], activation };
        for kernel in Kernel::available() {
            let mut mlp = Mlp::new("m", &[dense(3, 20, Activation::Relu), dense(20, 1, Activation::Relu)], kernel);
            let mut scores = vec![1.0];
            assert!(mlp.score(&[vec![0.0; 5]], 2, &mut scores).unwrap_err().to_string().contains("5 values for 2 x 3"));
            assert!(scores.is_empty());
            assert!(mlp.score(&[Vec::new(), Vec::new()], 0, &mut scores).is_err());
            mlp.score(&[vec![1.0, 1.0, 1.0, f32::NAN, 0.0, 0.0, -1.0, 0.0, 0.0]], 3, &mut scores).unwrap();
            assert_eq!((scores[0], scores[1].is_nan(), scores[2]), (60.0, true, 0.0));
        }
    }
}
