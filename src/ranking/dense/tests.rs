//! Kernels against float64, parts against the whole, batches against single rows.

use std::sync::Arc;

use proptest::prelude::*;

use super::kernels::{Ahead, Format, Layer, Line, Precision, Rows, Scale, Target, convert};
use super::ops::{Binary, Graph, Id, Op, Unary};
use super::program::{Plan, Program};
use super::*;
use crate::ranking::precision::Wanted;
use crate::testing::noise;

const PRECISIONS: [Precision; 3] = [Precision::F32, Precision::Bf16, Precision::Int8];

/// What a layer's operand holds, as numbers: `q` as given, in the precision.
fn packed(values: &[f64], precision: Precision) -> Vec<u32> {
    let per_unit = precision.per_unit();
    let unit = |values: &[f64]| {
        values.iter().enumerate().fold(0u32, |unit, (at, &v)| {
            let bits = match precision {
                Precision::F32 => (v as f32).to_bits(),
                Precision::Bf16 => half::bf16::from_f64(v).to_bits().into(),
                Precision::Int8 => v as u32,
            };
            unit | bits << (at * (32 / per_unit))
        })
    };
    values.chunks(per_unit).map(unit).collect()
}

/// Runs a layer on rows of units into f32.
fn run(layer: &Layer, units: &[u32], n: usize, format: Format, relu: bool) -> Vec<u32> {
    let stride = layer.padded_outputs();
    let mut out = vec![Line::default(); (n * stride).div_ceil(16) + 1];
    let rows = Rows { units, stride: layer.n_units(), n };
    let units = bytemuck::cast_slice_mut(&mut out);
    layer.run(rows, None, &mut Target { units, stride, format, relu }, &mut Ahead::new(&mut std::iter::empty()));
    bytemuck::cast_slice(&out)[..n * stride].to_vec()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn every_kernel_agrees_with_f64(k in 1usize..150, m in 1usize..150, n in 1usize..20, seed in any::<u64>(), relu in any::<bool>()) {
        let mut next = noise(seed);
        let weights: Vec<f32> = (0..k * m).map(|_| next()).collect();
        let bias: Vec<f32> = (0..m).map(|_| next()).collect();
        for precision in PRECISIONS.into_iter().filter(|p| m > 4 || *p == Precision::F32) {
            let (low, step): (Vec<f32>, Vec<f32>) = match precision {
                Precision::Int8 => (0..k).map(|_| (next(), next().abs() * 0.1 + 0.001)).unzip(),
                _ => (vec![0.0; k], vec![1.0; k]),
            };
            let q: Vec<f64> = (0..n * k).map(|_| match precision {
                Precision::F32 => f64::from(next() * 4.0),
                Precision::Bf16 => half::bf16::from_f32(next() * 4.0).to_f64(),
                Precision::Int8 => f64::from(((next() + 0.5) * 255.0).round()),
            }).collect();
            let units: Vec<u32> = q.chunks(k).flat_map(|row| packed(row, precision)).collect();
            for kernel in Kernel::available() {
                let layer = Layer::new(&weights, &bias, precision, Scale { low: &low, step: &step }, kernel);
                let got = run(&layer, &units, n, Format::F32, relu);
                let stride = layer.padded_outputs();
                for row in 0..n {
                    for column in 0..m {
                        // Weights as they are kept: 8 significant bits, or steps of the largest over 127.
                        let scaled = |i: usize| f64::from(weights[i * m + column]) * f64::from(step[i]);
                        let worth = (0..k).map(|i| scaled(i).abs()).fold(0.0, f64::max) / 127.0;
                        let kept = |i: usize| match precision {
                            Precision::F32 => f64::from(scaled(i) as f32),
                            Precision::Bf16 => half::bf16::from_f64(scaled(i)).to_f64(),
                            Precision::Int8 => (scaled(i) / worth).round_ties_even() * worth,
                        };
                        let value = |i: usize| f64::from(low[i]) / f64::from(step[i]) + q[row * k + i];
                        let sum = f64::from(bias[column]) + (0..k).map(|i| value(i) * kept(i)).sum::<f64>();
                        let want = if relu { sum.max(0.0) } else { sum };
                        let size = f64::from(bias[column].abs()) + (0..k).map(|i| (value(i) * kept(i)).abs()).sum::<f64>();
                        let offset = (0..k).map(|i| (f64::from(low[i] / step[i]) * kept(i)).abs()).sum::<f64>();
                        // Higham: |error| <= terms u Σ|a b|, u = 2^-24; integers are exact but for the last product and sum.
                        let terms = if precision == Precision::Int8 { 4.0 } else { k as f64 + 2.0 };
                        let bound = terms * 2f64.powi(-24) * (size + 2.0 * offset) + 1e-30;
                        let got = f64::from(f32::from_bits(got[row * stride + column]));
                        prop_assert!((got - want).abs() <= bound, "{precision:?} {kernel:?}: {got} {want} {bound}");
                    }
                    let one = run(&layer, &units[row * layer.n_units()..], 1, Format::F32, relu);
                    prop_assert_eq!(&one[..m], &got[row * stride..row * stride + m], "alone as in the batch");
                }
                if m <= 4 {
                    continue;
                }
                let (low, per_unit) = (-1.0, 40.0);
                let rounded = run(&layer, &units, n, Format::Bf16, relu);
                let rounded: &[u16] = bytemuck::cast_slice(&rounded);
                let format = Format::U8 { low, per_unit };
                let bytes = run(&layer, &units, n, format, relu);
                let bytes: &[u8] = bytemuck::cast_slice(&bytes);
                // What is rectified has a range that does not begin below 0.
                let folded_format = Format::U8 { low: if relu { 0.0 } else { low }, per_unit };
                let folded = run(&layer.folded(folded_format), &units, n, folded_format, relu);
                let folded: &[u8] = bytemuck::cast_slice(&folded);
                for (row, column) in (0..n).flat_map(|row| (0..m).map(move |column| (row, column))) {
                    let exact = f32::from_bits(got[row * stride + column]);
                    let near = half::bf16::from_f32(exact).to_bits();
                    prop_assert_eq!(rounded[row * stride * 2 + column], near);
                    // The scale is applied in one rounding or in two.
                    let wide = ((f64::from(exact) - f64::from(low)) * f64::from(per_unit)).clamp(0.0, 255.0);
                    let off = (f64::from(bytes[row * stride * 4 + column]) - wide).abs();
                    prop_assert!(off <= 0.5001, "{exact} {wide} {off}");
                    let least = if relu { 0.0 } else { f64::from(low) };
                    let wide = ((f64::from(exact) - least) * f64::from(per_unit)).clamp(0.0, 255.0);
                    let off = (f64::from(folded[row * stride * 4 + column]) - wide).abs();
                    prop_assert!(off <= 0.502, "{exact} {wide} {off}");
                }
            }
        }
    }
}

#[test]
fn nan_and_infinities_are_what_the_docs_say() {
    let (k, m) = (20, 40);
    let (weights, bias) = (vec![1.0; k * m], vec![0.0; m]);
    for kernel in Kernel::available() {
        for precision in [Precision::F32, Precision::Bf16] {
            let layer = Layer::new(&weights, &bias, precision, Scale::NONE, kernel);
            let score = |odd: f64, format: Format, relu: bool| {
                let mut row = vec![1.0; k];
                row[7] = odd;
                run(&layer, &packed(&row, precision), 1, format, relu)[0]
            };
            assert!(f32::from_bits(score(f64::NAN, Format::F32, true)).is_nan(), "{precision:?} {kernel:?}");
            assert!(half::bf16::from_bits(score(f64::NAN, Format::Bf16, true) as u16).is_nan());
            assert_eq!(f32::from_bits(score(f64::INFINITY, Format::F32, true)), f32::INFINITY);
            assert_eq!(f32::from_bits(score(f64::NEG_INFINITY, Format::F32, true)), 0.0);
            assert_eq!(f32::from_bits(score(f64::NEG_INFINITY, Format::F32, false)), f32::NEG_INFINITY);
            let u8 = |odd: f64| score(odd, Format::U8 { low: -2.0, per_unit: 10.0 }, false) as u8;
            assert_eq!((u8(f64::NAN), u8(f64::INFINITY), u8(f64::NEG_INFINITY)), (0, 255, 0), "{kernel:?}");
        }
    }
}

#[test]
fn rows_are_converted_as_their_values_one_by_one() {
    let mut next = noise(5);
    for width in [1, 16, 37, 64, 130] {
        let n = 5;
        let mut values: Vec<f32> = (0..n * width).map(|_| next() * 4.0).collect();
        values[0] = f32::NAN;
        values[width] = f32::INFINITY;
        values[2 * width] = f32::NEG_INFINITY;
        values[3 * width] = 3e38;
        let lines = |value: f32| vec![Line([value.to_bits(); 16]); width.div_ceil(16)];
        let (low, per_unit) = (lines(100.0), lines(90.0));
        for kernel in Kernel::available() {
            let converted = |format: Format| {
                let stride = width.next_multiple_of(64);
                let mut out = vec![Line::default(); n * stride / 16];
                let rows = Rows { units: bytemuck::cast_slice(&values), stride: width, n };
                let units = bytemuck::cast_slice_mut(&mut out);
                convert(kernel, rows, width, &low, &per_unit, &mut Target { units, stride, format, relu: false });
                out
            };
            let steps = converted(Format::U8 { low: 0.0, per_unit: 1.0 });
            let halves = converted(Format::Bf16);
            let (steps, halves): (&[u8], &[u16]) = (bytemuck::cast_slice(&steps), bytemuck::cast_slice(&halves));
            for (at, &v) in values.iter().enumerate() {
                let (place, wide) = (at / width * width.next_multiple_of(64), f64::from(v) * 90.0 + 100.0);
                let step = f64::from(steps[place * 4 + at % width]);
                let off = if v.is_nan() { step } else { (step - wide.clamp(0.0, 255.0)).abs() };
                assert!(off <= 0.5001, "{kernel:?} {width} {at}: {step} for {wide}");
                let half = half::bf16::from_bits(halves[place * 2 + at % width]);
                let want = half::bf16::from_f32(v + 100.0);
                assert!(half == want || (half.is_nan() && v.is_nan()), "{kernel:?} {width} {at}: {half} for {want}");
            }
        }
    }
}

#[test]
fn steps_beyond_32_bits_end_at_255() {
    let (k, m) = (20, 64);
    let bias: Vec<f32> = (0..m).map(|at| if at % 2 == 0 { 1.0 } else { -1.0 }).collect();
    let format = Format::U8 { low: 0.0, per_unit: 1e12 };
    for kernel in Kernel::available() {
        let layer = Layer::new(&vec![0.0; k * m], &bias, Precision::Int8, Scale { low: &[0.0], step: &[1.0] }, kernel);
        let bytes = run(&layer.folded(format), &packed(&[7.0; 20], Precision::Int8), 1, format, false);
        let bytes: &[u8] = bytemuck::cast_slice(&bytes);
        assert!((0..m).all(|at| bytes[at] == if at % 2 == 0 { 255 } else { 0 }), "{kernel:?}: {bytes:?}");
    }
}

#[test]
fn what_lies_ahead_is_asked_for_line_by_line() {
    let memory: Vec<Line> = vec![Line::default(); 200];
    let units: &[u32] = bytemuck::cast_slice(&memory);
    // Two whole lines, none, one that is begun, and more than is asked for at a time.
    let runs = [0..32, 32..32, 48..50, 64..3200].map(|run| &units[run]);
    let mut runs = runs.iter().copied();
    let mut ahead = Ahead::new(&mut runs);
    let mut asked = Vec::new();
    for n in [0, 1, 3, 1000, 1000, 1000] {
        let lines = ahead.next(n);
        assert!(lines.len() <= n);
        asked.extend(lines.iter().map(|line| (line.addr() - units.as_ptr().addr()) / 64));
    }
    assert_eq!(asked, [0, 1, 3].into_iter().chain(4..200).collect::<Vec<_>>());
}

pub(crate) fn dense(graph: &mut Graph, x: Id, m: usize, next: &mut impl FnMut() -> f32) -> Id {
    let k = graph.width(x);
    let scale = 2.0 / (k as f32).sqrt();
    let weights = Arc::new((0..k * m).map(|_| next() * scale).collect::<Vec<_>>());
    let bias = Arc::new((0..m).map(|_| next() * 0.1).collect::<Vec<_>>());
    graph.push(Op::Dense { x, weights, bias, base: None, repeat: 1 })
}

pub(crate) fn inputs(widths: &[usize]) -> (Graph, Vec<Id>) {
    let mut graph = Graph::default();
    graph.inputs = widths.to_vec();
    let ids = (0..widths.len()).map(|at| graph.push(Op::Input(at))).collect();
    (graph, ids)
}

/// A perceptron over all inputs side by side.
pub(crate) fn perceptron(widths: &[usize], hidden: &[usize], seed: u64) -> Graph {
    let mut next = noise(seed);
    let (mut graph, ids) = inputs(widths);
    let mut x = graph.push(Op::Concat(ids));
    for &m in hidden {
        x = dense(&mut graph, x, m, &mut next);
        x = graph.push(Op::Unary(Unary::Relu, x));
    }
    let x = dense(&mut graph, x, 1, &mut next);
    graph.outputs = vec![x];
    graph
}

/// Cross layers beside a tower, a dot product of two inputs, a norm: values of every kind that mix.
pub(crate) fn crossed(widths: &[usize], seed: u64) -> Graph {
    let mut next = noise(seed);
    let (mut graph, ids) = inputs(widths);
    let x0 = graph.push(Op::Concat(ids.clone()));
    let mut x = x0;
    for _ in 0..2 {
        let width = graph.width(x0);
        let w = dense(&mut graph, x, width, &mut next);
        let gated = graph.push(Op::Binary(Binary::Mul, x0, w));
        x = graph.push(Op::Binary(Binary::Add, gated, x));
    }
    let tower = dense(&mut graph, ids[0], 24, &mut next);
    let tower = graph.push(Op::Unary(Unary::Tanh, tower));
    let other = dense(&mut graph, ids[1], 24, &mut next);
    let dot = graph.push(Op::Binary(Binary::Mul, tower, other));
    let dot = graph.push(Op::Sum { x: dot, len: 24, inner: 1, scale: 1.0 });
    let all = graph.push(Op::Concat(vec![x, dot, other]));
    let width = graph.width(all);
    let (gain, add) = (Arc::new(vec![1.0; width]), Arc::new(vec![0.1; width]));
    let normed = graph.push(Op::LayerNorm { x: all, gain, add, epsilon: 1e-5 });
    // An operand of computed and of raw columns: a rounded product with a base.
    let mixed = graph.push(Op::Concat(vec![normed, ids[1]]));
    let hidden = dense(&mut graph, mixed, 70, &mut next);
    let hidden = graph.push(Op::Unary(Unary::Silu, hidden));
    let score = dense(&mut graph, hidden, 1, &mut next);
    graph.outputs = vec![score];
    graph
}

pub(crate) struct Catalogue {
    columns: Vec<f32>,
    width: usize,
}

impl Items for Catalogue {
    fn len(&self) -> usize {
        self.columns.len() / self.width
    }

    fn fill(&self, rows: Range<u32>, out: &mut Vec<f32>) {
        out.clear();
        out.extend_from_slice(&self.columns[rows.start as usize * self.width..rows.end as usize * self.width]);
    }
}

/// Requests over a catalogue: request columns the same in a request, item columns of the item's.
pub(crate) fn samples(
    columns: &[Vec<Dependence>],
    catalogue: &Catalogue,
    n_requests: usize,
    n: usize,
    seed: u64,
) -> Vec<Sample> {
    let mut next = noise(seed);
    let sample = |_| {
        let mut rows: Vec<u32> = (0..n).map(|_| ((next() + 0.5) * (catalogue.len() - 1) as f32) as u32).collect();
        rows.sort_unstable();
        let request: Vec<f32> = (0..columns.iter().flatten().count()).map(|_| next()).collect();
        let mut inputs = vec![Vec::new(); columns.len()];
        for &row in &rows {
            let (mut item, mut at) = (row as usize * catalogue.width, 0);
            for (input, columns) in inputs.iter_mut().zip(columns) {
                for column in columns {
                    input.push(match column {
                        Dependence::Request => request[at],
                        Dependence::Candidate => next(),
                        Dependence::Item => {
                            item += 1;
                            catalogue.columns[item - 1]
                        }
                    });
                    at += 1;
                }
            }
        }
        Sample { inputs, rows }
    };
    (0..n_requests).map(sample).collect()
}

fn scored(program: &Program, inputs: &[Vec<f32>]) -> Vec<f32> {
    let (mut scores, mut scratch) = (Vec::new(), program.scratch());
    whole(program, &mut scratch, inputs, &mut scores);
    scores
}

/// The columns that a split model takes of a sample: its request's, its candidates'; of one that is not split all for each candidate.
pub(crate) fn parts(model: &Model, sample: &Sample) -> (Vec<f32>, Vec<f32>) {
    match &model.split {
        Some(split) => (split.of_request(sample), split.of_candidates(sample)),
        None => {
            let n = sample.rows.len();
            let row = |at| sample.inputs.iter().flat_map(move |v| &v[at * (v.len() / n)..(at + 1) * (v.len() / n)]);
            (Vec::new(), (0..n).flat_map(row).copied().collect())
        }
    }
}

/// Interleaved, so that no class is in one piece.
pub(crate) fn classes(widths: &[usize]) -> Vec<Vec<Dependence>> {
    widths.iter().map(|&width| (0..width).map(|at| Dependence::ALL[at * 7 % 3]).collect()).collect()
}

pub(crate) fn with_items<'a>(columns: &[Vec<Dependence>], catalogue: &'a Catalogue, samples: &[Sample]) -> Setting<'a> {
    Setting { columns: columns.to_vec(), items: Some(catalogue), table_bytes: 1 << 20, samples: samples.to_vec() }
}

pub(crate) fn catalogue(columns: &[Vec<Dependence>]) -> Catalogue {
    let width = columns.iter().flatten().filter(|c| **c == Dependence::Item).count();
    let mut next = noise(99);
    Catalogue { columns: (0..300 * width).map(|_| next()).collect(), width }
}

#[test]
fn parts_add_up_to_the_whole_in_every_precision_and_alone_as_in_the_batch() {
    for (graph, widths) in [(perceptron(&[50, 31], &[140, 64], 3), [50, 31]), (crossed(&[40, 24], 5), [40, 24])] {
        let columns = classes(&widths);
        let catalogue = catalogue(&columns);
        let samples = samples(&columns, &catalogue, 2, 110, 17);
        let setting = with_items(&columns, &catalogue, &samples);
        for kernel in Kernel::available() {
            let reference = Model::plain("m", &graph, kernel);
            let reference = reference.scores(&samples);
            for wanted in [Wanted::F32, Wanted::Bf16, Wanted::Int8] {
                let calibration = Calibration { precision: wanted, min_ndcg: 0.0 };
                // Also in precisions that this CPU would not choose: by portable code.
                let model = Arc::new(Model::with("m", &graph, &calibration, &setting, kernel, |_| true));
                let error = model.fidelity(&samples, &reference).error;
                let bound = [1e-5, 0.04, 0.15][wanted as usize - 1];
                assert!(error <= bound, "{wanted:?} {kernel:?}: {error}");
                assert!(model.report().split, "{}", model.report());
                let mut ranker = DenseRanker::new(model.clone());
                let split = model.split.as_ref().unwrap();
                let (mut batch, mut one, sample) = (Vec::new(), Vec::new(), &samples[1]);
                let (request, each) = (split.of_request(sample), split.of_candidates(sample));
                ranker.score_split(&request, &sample.rows, &each, &mut batch).unwrap();
                let width = each.len() / sample.rows.len();
                for at in (0..sample.rows.len()).step_by(17) {
                    let row = at..at + 1;
                    let columns = &each[at * width..(at + 1) * width];
                    ranker.score_split(&request, &sample.rows[row], columns, &mut one).unwrap();
                    assert_eq!(one[0].to_bits(), batch[at].to_bits(), "{wanted:?} {kernel:?} {at}");
                }
                ranker.score(&sample.inputs, sample.rows.len(), &mut batch).unwrap();
                for at in (0..sample.rows.len()).step_by(17) {
                    let row = sample.inputs.iter().zip(widths).map(|(v, w)| v[at * w..(at + 1) * w].to_vec());
                    ranker.score(&row.collect::<Vec<_>>(), 1, &mut one).unwrap();
                    assert_eq!(one[0].to_bits(), batch[at].to_bits(), "{wanted:?} {kernel:?} {at}");
                }
            }
        }
    }
}

#[test]
fn a_precision_that_moves_the_order_is_refused_and_reported() {
    let widths = [40, 40];
    let columns = classes(&widths);
    let catalogue = catalogue(&columns);
    let samples = samples(&columns, &catalogue, 5, 200, 8);
    let graph = perceptron(&widths, &[128, 64], 4);
    let setting = with_items(&columns, &catalogue, &samples);
    let model = |min_ndcg: f32, wanted: Wanted, setting: &Setting<'_>| {
        let calibration = Calibration { precision: wanted, min_ndcg };
        Model::with("m", &graph, &calibration, setting, Kernel::detect(), |_| true)
    };
    let strict = model(1.1, Wanted::Auto, &setting);
    assert_eq!(strict.report().precision, Precision::F32);
    assert_eq!(strict.report().tried.iter().map(|t| t.0).collect::<Vec<_>>(), [Precision::Int8, Precision::Bf16]);
    let tried = &strict.report().tried;
    assert!(tried[1].1.ndcg > 0.99 && tried[1].1.error < tried[0].1.error, "{tried:?}");
    assert_eq!(model(0.0, Wanted::Auto, &setting).report().precision, Precision::Int8);
    assert_eq!(model(0.0, Wanted::Bf16, &setting).report().precision, Precision::Bf16);
    // Nothing to measure with: nothing is rounded.
    let blind =
        Setting { columns: columns.clone(), items: Some(&catalogue), table_bytes: 1 << 20, samples: Vec::new() };
    assert_eq!(model(0.9, Wanted::Bf16, &blind).report().precision, Precision::F32);
    // A table that does not fit: items' columns are candidates'.
    let small = Setting { table_bytes: 1000, ..with_items(&columns, &catalogue, &samples) };
    let without = model(0.0, Wanted::F32, &small);
    assert!(without.report().split && without.report().table_bytes == 0);
    assert!(without.columns().unwrap().iter().flatten().all(|c| *c != Dependence::Item));
}

#[test]
fn a_value_of_items_alone_is_a_column_of_the_table() {
    // Two towers and their dot product: nothing but the product is left for candidates.
    let mut next = noise(1);
    let (mut graph, ids) = inputs(&[12, 20]);
    let towers = ids.iter().map(|&x| {
        let hidden = dense(&mut graph, x, 48, &mut next);
        let hidden = graph.push(Op::Unary(Unary::Relu, hidden));
        dense(&mut graph, hidden, 16, &mut next)
    });
    let towers: Vec<Id> = towers.collect();
    let dot = graph.push(Op::Binary(Binary::Mul, towers[0], towers[1]));
    let score = graph.push(Op::Sum { x: dot, len: 16, inner: 1, scale: 1.0 });
    graph.outputs = vec![score];
    let columns = vec![vec![Dependence::Request; 12], vec![Dependence::Item; 20]];
    let catalogue = catalogue(&columns);
    let samples = samples(&columns, &catalogue, 3, 100, 2);
    let setting = with_items(&columns, &catalogue, &samples);
    let calibration = Calibration { precision: Wanted::F32, ..Calibration::default() };
    let model = Model::new("m", &graph, &calibration, &setting, Kernel::detect());
    assert_eq!((model.flops().1, model.report().table_bytes), (0, 300 * 64));
    let reference = Model::plain("m", &graph, Kernel::Portable).scores(&samples);
    assert!(model.fidelity(&samples, &reference).error < 1e-4);
}

#[test]
fn what_does_not_fit_is_an_error_and_nan_stays_with_its_row() {
    let graph = perceptron(&[3], &[20], 1);
    for kernel in Kernel::available() {
        let mut ranker = DenseRanker::new(Arc::new(Model::plain("m", &graph, kernel)));
        let mut scores = vec![1.0];
        let error = ranker.score(&[vec![0.0; 5]], 2, &mut scores).unwrap_err().to_string();
        assert!(error.contains("5 values for 2 x 3") && scores.is_empty(), "{error}");
        assert!(ranker.score(&[Vec::new(), Vec::new()], 0, &mut scores).is_err());
        assert!(ranker.score_split(&[], &[], &[], &mut scores).is_err());
        assert!(ranker.share(&[], &mut []).is_ok());
        let error = ranker.share(&[1.0], &mut [2.0]).unwrap_err().to_string();
        assert!(error.contains("1 and 1 values for 0 and 0"), "{error}");
        ranker.score(&[vec![1.0, 1.0, 1.0, f32::NAN, 0.0, 0.0, -1.0, 0.0, 0.0]], 3, &mut scores).unwrap();
        assert_eq!(scores.iter().map(|s| s.is_nan()).collect::<Vec<_>>(), [false, true, false]);
    }
}

#[test]
fn affine_maps_fold_into_products() {
    let mut next = noise(11);
    let (mut graph, ids) = inputs(&[8]);
    let before = graph.push(Op::Affine { x: ids[0], gain: Arc::new(vec![2.0; 8]), add: Arc::new(vec![0.5; 8]) });
    let hidden = dense(&mut graph, before, 12, &mut next);
    let behind = graph.push(Op::Affine { x: hidden, gain: Arc::new(vec![-1.5; 12]), add: Arc::new(vec![0.25; 12]) });
    let hidden = graph.push(Op::Unary(Unary::Relu, behind));
    let score = dense(&mut graph, hidden, 1, &mut next);
    graph.outputs = vec![score];
    let simple = graph.simplified();
    let ops = || simple.needed().into_iter().map(|at| simple.op(at));
    assert!(ops().all(|op| !matches!(op, Op::Affine { .. })));
    let rows = [(0..80).map(|_| next()).collect::<Vec<f32>>()];
    let plan = Plan::f32(Kernel::Portable);
    let (got, want) = (scored(&Program::compile(&simple, plan), &rows), scored(&Program::compile(&graph, plan), &rows));
    assert!(got.iter().zip(&want).all(|(a, b)| (a - b).abs() < 1e-5));
}
