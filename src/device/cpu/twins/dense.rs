//! What kernels/dense.cu computes: a program, step by step, of one candidate after the other.

use half::bf16;
use tastemaker_kernels::dense::{Function, NONE, Op, Program, RELU, ROUND, Step, TURNED, Unary};
use tastemaker_kernels::dense::{bf16_place, f32_place};

use crate::catalog::generation::NO_ROW;
use crate::ranking::dense::elementwise;
use crate::ranking::dense::ops;

/// What programs score.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// u32 `[n_requests, width]`
    pub rows: &'a [u32],
    /// u32 `[n_requests]`
    pub counts: &'a [u32],
    /// Places for candidates of a request.
    pub width: usize,
    /// f32 `[n_requests, shared width]`
    pub shared: &'a [f32],
    /// f32 `[n_requests, width, columns]`
    pub columns: &'a [f32],
}

/// One candidate.
struct Row<'a> {
    params: &'a [u32],
    arena: Vec<u32>,
    item: Option<&'a [f32]>,
    shared: &'a [f32],
    columns: &'a [f32],
}

/// `weight` times the score of every candidate, added to what is there unless `first`; NaN in holes. `table`: f32 `[n_rows, stride]`, what its
/// numbers are worth ([`bf16`]s, and int8 by [`in_int8`]); empty where the program reads none.
pub fn dense_rank(
    program: &Program,
    (table, stride): (&[f32], usize),
    batch: Batch<'_>,
    (weight, first): (f32, bool),
    scores: &mut [f32],
) {
    let (width, n_rows) = (batch.width, table.len().checked_div(stride).unwrap_or(0));
    for (slot, score) in scores.iter_mut().enumerate() {
        let (request, at, item) = (slot / width, slot % width, batch.rows[slot]);
        let beyond = stride > 0 && item as usize >= n_rows;
        if at >= batch.counts[request] as usize || item == NO_ROW || beyond {
            *score = f32::NAN;
            continue;
        }
        let mut row = Row {
            params: &program.params,
            arena: vec![0; program.units as usize],
            item: table.get(item as usize * stride..(item as usize + 1) * stride),
            shared: &batch.shared[request * program.shared_width..][..program.shared_width],
            columns: &batch.columns[slot * program.n_columns..][..program.n_columns],
        };
        for step in &program.steps {
            row.step(step);
            if step.op == Op::Score {
                let own = weight * row.get(step.x);
                *score = if first { own } else { *score + own };
            }
        }
    }
}

/// What a table in int8 has of a row, of which the pieces begin at `starts`.
pub fn in_int8(row: &[f32], starts: &[usize]) -> Vec<f32> {
    let ends = starts.iter().skip(1).copied().chain([row.len()]);
    let pieces = starts.iter().zip(ends).map(|(&start, end)| &row[start..end]);
    let of_piece = |piece: &[f32]| {
        if piece.iter().any(|value| !value.is_finite()) {
            return vec![f32::NAN; piece.len()];
        }
        let scale = piece.iter().fold(0f32, |most, value| most.max(value.abs())) / 127.0;
        let code = |value: f32| if scale > 0.0 { (value / scale).round_ties_even().clamp(-127.0, 127.0) } else { 0.0 };
        piece.iter().map(|&value| scale * code(value)).collect()
    };
    pieces.flat_map(of_piece).collect()
}

/// The sum in 32 parts, halves added until one is left.
fn sum(values: impl Iterator<Item = f32>) -> f32 {
    let mut parts = [0f32; 32];
    values.enumerate().for_each(|(at, value)| parts[at % 32] += value);
    for half in [16, 8, 4, 2, 1] {
        (0..half).for_each(|at| parts[at] += parts[at + half]);
    }
    parts[0]
}

fn rounded(value: f32) -> u16 {
    if value.is_nan() { 0x7fff } else { bf16::from_f32(value).to_bits() }
}

fn relu(value: f32) -> f32 {
    if value < 0.0 { 0.0 } else { value }
}

impl Row<'_> {
    fn get(&self, at: u32) -> f32 {
        f32::from_bits(self.arena[at as usize])
    }

    fn param(&self, at: u32, further: usize) -> f32 {
        f32::from_bits(self.params[at as usize + further])
    }

    /// The `at`-th value of two a word.
    fn half(words: &[u32], at: usize, first: usize) -> f32 {
        let word = words[first + at / 2];
        f32::from_bits(if at % 2 == 1 { word & 0xffff_0000 } else { word << 16 })
    }

    /// What the sum of a column starts with.
    fn start(&self, step: &Step, column: usize) -> f32 {
        let mut sum = if step.b == NONE { 0.0 } else { self.param(step.b, column) };
        if let (true, Some(item)) = (step.item != NONE, self.item) {
            sum += item[step.item as usize + column];
        }
        if step.shared != NONE {
            sum += self.shared[step.shared as usize + column];
        }
        if step.y != NONE { sum + self.get(step.y + column as u32) } else { sum }
    }

    /// Writes a row of results, of `step.repeat` parts, and zeros behind them.
    fn put(&mut self, step: &Step, values: &[f32]) {
        let fill = if step.repeat > 1 { values.len() } else { step.fill as usize };
        let value = |at: usize| values.get(at).copied().unwrap_or(0.0);
        let out = &mut self.arena[step.out as usize..];
        for at in 0..fill {
            match step.flags & ROUND != 0 {
                true if at % 2 == 1 => {}
                true => out[at / 2] = u32::from(rounded(value(at))) | u32::from(rounded(value(at + 1))) << 16,
                false => out[at] = value(at).to_bits(),
            }
        }
    }

    fn layer(&self, step: &Step, part: u32, column: usize) -> f32 {
        let (k, x) = (step.k as usize, step.x + part * step.x_part);
        let start = self.start(step, column);
        match step.op {
            Op::Layer => {
                let weight = |input| self.param(step.a, f32_place(k, input, column));
                let inputs = 0..k.next_multiple_of(4);
                inputs.fold(start, |sum, input| self.get(x + input as u32).mul_add(weight(input), sum))
            }
            Op::RoundedLayer => {
                let product = |input: usize| {
                    let (word, upper) = bf16_place(k, input, column);
                    let weight = Self::half(self.params, usize::from(upper), step.a as usize + word);
                    f64::from(Self::half(&self.arena, input, x as usize)) * f64::from(weight)
                };
                let deep = (0..k.next_multiple_of(32)).step_by(16);
                deep.fold(start, |sum, k| (k..k + 16).fold(f64::from(sum), |sum, k| sum + product(k)) as f32)
            }
            _ => {
                let mut parts = [0f32; 4];
                for input in 0..k {
                    let weight = self.param(step.a, column * k + input);
                    parts[input % 4] = self.get(x + input as u32).mul_add(weight, parts[input % 4]);
                }
                start + ((parts[0] + parts[1]) + (parts[2] + parts[3]))
            }
        }
    }

    fn each(&self, step: &Step, unary: Unary, column: usize) -> f32 {
        let (v, p, q) = (self.get(step.x + column as u32), step.p, step.q);
        let unary = match unary {
            Unary::Plain => return v,
            Unary::Affine => return v * self.param(step.a, column) + self.param(step.b, column),
            Unary::Relu => ops::Unary::Relu,
            Unary::Leaky => ops::Unary::LeakyRelu { slope: p },
            Unary::Sigmoid => ops::Unary::Sigmoid,
            Unary::Tanh => ops::Unary::Tanh,
            Unary::Gelu => ops::Unary::Gelu,
            Unary::Silu => ops::Unary::Silu,
            Unary::Softplus => ops::Unary::Softplus,
            Unary::Elu => ops::Unary::Elu { alpha: p },
            Unary::Erf => ops::Unary::Erf,
            Unary::Exp => ops::Unary::Exp,
            Unary::Log => ops::Unary::Log,
            Unary::Sqrt => ops::Unary::Sqrt,
            Unary::Abs => ops::Unary::Abs,
            Unary::Reciprocal => ops::Unary::Reciprocal,
            Unary::Square => ops::Unary::Pow { power: 2.0 },
            Unary::Power => ops::Unary::Pow { power: p },
            Unary::Clip => ops::Unary::Clip { low: p, high: q },
        };
        elementwise::value(unary, v)
    }

    fn step(&mut self, step: &Step) {
        let (width, m, n, k) = (step.width as usize, step.m as usize, step.n as usize, step.k as usize);
        let x = |at: usize| self.get(step.x + at as u32);
        let y = |at: usize| self.get(step.y + at as u32);
        let values: Vec<f32> = match step.op {
            Op::Layer | Op::RoundedLayer | Op::Narrow => {
                let parts = (0..step.repeat).flat_map(|part| (0..width).map(move |column| (part, column)));
                let values = parts.map(|(part, column)| self.layer(step, part, column));
                values.map(|value| if step.flags & RELU != 0 { relu(value) } else { value }).collect()
            }
            Op::Each | Op::Pair => {
                let value = |column| match step.function {
                    Function::Unary(unary) => self.each(step, unary, column),
                    Function::Binary(binary) => binary.of(x(column), y(if n == 1 { 0 } else { column })),
                };
                (0..width).map(value).collect()
            }
            Op::Take => {
                let from =
                    |column: usize| if step.a == NONE { column as u32 } else { self.params[step.a as usize + column] };
                let value = |column| if from(column) == NONE { 0.0 } else { x(from(column) as usize) };
                let values: Vec<f32> = (0..width).map(value).collect();
                return self.put(&Step { out: step.out + step.k, ..*step }, &values);
            }
            Op::Load => self.columns[k..k + width].to_vec(),
            Op::Sum if n == 1 => (0..width).map(|at| sum((0..m).map(|i| x(at * m + i))) * step.p).collect(),
            Op::Sum => {
                let whole = |at: usize| (0..m).fold(0.0, |sum, i| sum + x(at / n * m * n + i * n + at % n));
                (0..width).map(|at| whole(at) * step.p).collect()
            }
            Op::Softmax => {
                let group = |first: usize| {
                    let most =
                        (first..first + m).map(x).fold(f32::NEG_INFINITY, |most, v| if v > most { v } else { most });
                    let values: Vec<f32> =
                        (first..first + m).map(|at| elementwise::exponential(x(at) - most)).collect();
                    let whole = sum(values.iter().copied());
                    values.into_iter().map(move |value| value / whole)
                };
                (0..width).step_by(m).flat_map(group).collect()
            }
            Op::Norm => {
                let group = |first: usize| {
                    let mean = sum((first..first + m).map(x)) / m as f32;
                    let squares = sum((first..first + m).map(|at| (x(at) - mean) * (x(at) - mean)));
                    let scale = 1.0 / (squares / m as f32 + step.p).sqrt();
                    let value =
                        |at: usize| (x(first + at) - mean) * scale * self.param(step.a, at) + self.param(step.b, at);
                    (0..m).map(value).collect::<Vec<_>>()
                };
                (0..width).step_by(m).flat_map(group).collect()
            }
            Op::Embed => {
                let value = |at: usize| {
                    let number = x(at / m).trunc();
                    let id = if number < 0.0 { number + k as f32 } else { number };
                    let is_row = id >= 0.0 && id < k as f32;
                    if is_row { self.param(step.a, id as usize * m + at % m) } else { f32::NAN }
                };
                (0..width).map(value).collect()
            }
            Op::Multiply => {
                let value = |at: usize| {
                    let (batch, i, j) = (at / (m * n), at / n % m, at % n);
                    let b = |e: usize| y(batch * k * n + if step.flags & TURNED != 0 { j * k + e } else { e * n + j });
                    (0..k).fold(0f32, |sum, e| x((batch * m + i) * k + e).mul_add(b(e), sum))
                };
                (0..width).map(value).collect()
            }
            Op::Score => return,
        };
        self.put(step, &values);
    }
}
