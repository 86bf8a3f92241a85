//! What a model computes, as values per row and what makes them: between ONNX and the steps of a program.
//!
//! A value has a width per row; axes beyond the first are only a matter of order, so reshaping costs nothing and transposing,
//! slicing and broadcasting are all a choice of columns.

use std::sync::Arc;

pub use tastemaker_kernels::dense::Binary;

/// A value of a [`Graph`].
pub type Id = usize;

/// Value by value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Unary {
    /// `max(v, 0)`; NaN stays.
    Relu,
    /// `v`, times `slope` where it is negative.
    LeakyRelu { slope: f32 },
    /// `1 / (1 + e^-v)`
    Sigmoid,
    /// Hyperbolic tangent.
    Tanh,
    /// `v Φ(v)` by the error function.
    Gelu,
    /// `v / (1 + e^-v)`
    Silu,
    /// `ln(1 + e^v)`
    Softplus,
    /// `v`, `alpha (e^v - 1)` where it is negative.
    Elu { alpha: f32 },
    /// Error function.
    Erf,
    /// `e^v`
    Exp,
    /// Natural logarithm.
    Log,
    /// Square root.
    Sqrt,
    /// Absolute value.
    Abs,
    /// `1 / v`
    Reciprocal,
    /// `v^power`
    Pow { power: f32 },
    /// At least `low`, at most `high`.
    Clip { low: f32, high: f32 },
}

/// What makes a value.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    /// One of the graph's inputs.
    Input(usize),
    /// A piece of an item's row in a table, plus a piece of what is the same for all rows; either may be absent. First columns.
    Given { item: Option<usize>, shared: Option<usize> },
    /// `x · weights + bias`, `+ base` where there is one; `weights` is `[width of x / repeat, width / repeat]`, row-major.
    Dense { x: Id, weights: Arc<Vec<f32>>, bias: Arc<Vec<f32>>, base: Option<Id>, repeat: usize },
    /// Value by value.
    Unary(Unary, Id),
    /// `x * gain + add`, by column.
    Affine { x: Id, gain: Arc<Vec<f32>>, add: Arc<Vec<f32>> },
    /// Of two values equally wide; the second may have one column.
    Binary(Binary, Id, Id),
    /// Side by side.
    Concat(Vec<Id>),
    /// Columns in that order.
    Take { x: Id, columns: Arc<Vec<u32>> },
    /// Sums over the middle of `[outer, len, inner]`, times `scale`.
    Sum { x: Id, len: usize, inner: usize, scale: f32 },
    /// `e^v / Σ e^v` over groups of `len`.
    Softmax { x: Id, len: usize },
    /// Normalised over groups of as many columns as there are gains.
    LayerNorm { x: Id, gain: Arc<Vec<f32>>, add: Arc<Vec<f32>>, epsilon: f32 },
    /// Rows of a table, `[rows, dim]`, one for each column; a number that is none of its rows gives NaN, a negative one counts
    /// from the end.
    Embedding { x: Id, table: Arc<Vec<f32>>, dim: usize },
    /// `[batch, m, k] · [batch, k, n]`, the second as `[batch, n, k]` if it is `turned`.
    MatMul { a: Id, b: Id, m: usize, k: usize, n: usize, turned: bool },
}

impl Op {
    /// The values that it reads.
    pub fn operands(&self) -> Vec<Id> {
        match self {
            Op::Input(_) | Op::Given { .. } => Vec::new(),
            Op::Dense { x, base, .. } => [*x].into_iter().chain(*base).collect(),
            Op::Unary(_, x)
            | Op::Affine { x, .. }
            | Op::Take { x, .. }
            | Op::Sum { x, .. }
            | Op::Softmax { x, .. }
            | Op::LayerNorm { x, .. }
            | Op::Embedding { x, .. } => vec![*x],
            Op::Binary(_, a, b) | Op::MatMul { a, b, .. } => vec![*a, *b],
            Op::Concat(parts) => parts.clone(),
        }
    }

    /// The same of other values.
    pub fn of(&self, mut other: impl FnMut(Id) -> Id) -> Op {
        let mut op = self.clone();
        match &mut op {
            Op::Input(_) | Op::Given { .. } => {}
            Op::Dense { x, base, .. } => {
                *x = other(*x);
                *base = base.map(other);
            }
            Op::Unary(_, x)
            | Op::Affine { x, .. }
            | Op::Take { x, .. }
            | Op::Sum { x, .. }
            | Op::Softmax { x, .. }
            | Op::LayerNorm { x, .. }
            | Op::Embedding { x, .. } => *x = other(*x),
            Op::Binary(_, a, b) | Op::MatMul { a, b, .. } => {
                *a = other(*a);
                *b = other(*b);
            }
            Op::Concat(parts) => parts.iter_mut().for_each(|part| *part = other(*part)),
        }
        op
    }
}

/// Values and what makes them; operands come before their readers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Graph {
    /// Width of each input.
    pub inputs: Vec<usize>,
    /// Widths of what items and requests give, by number; see [`Op::Given`].
    pub item_widths: Vec<usize>,
    /// As above.
    pub shared_widths: Vec<usize>,
    nodes: Vec<(Op, usize)>,
    /// The results.
    pub outputs: Vec<Id>,
}

impl Graph {
    /// What makes a value.
    pub fn op(&self, id: Id) -> &Op {
        &self.nodes[id].0
    }

    /// Columns of a value.
    pub fn width(&self, id: Id) -> usize {
        self.nodes[id].1
    }

    /// How many values there are.
    pub fn n_values(&self) -> usize {
        self.nodes.len()
    }

    /// By input and column: rows of the smallest table that the column picks from, 0 where it picks from none.
    pub fn places(&self) -> Vec<Vec<usize>> {
        let mut places: Vec<Vec<usize>> = self.inputs.iter().map(|&width| vec![0; width]).collect();
        // By value and column: the input's column that it is.
        let mut origins: Vec<Vec<Option<(usize, usize)>>> = Vec::with_capacity(self.nodes.len());
        for (op, width) in &self.nodes {
            let origin = match op {
                Op::Input(input) => (0..*width).map(|column| Some((*input, column))).collect(),
                Op::Take { x, columns } => columns.iter().map(|&column| origins[*x][column as usize]).collect(),
                Op::Concat(parts) => parts.iter().flat_map(|&part| origins[part].iter().copied()).collect(),
                Op::Embedding { x, table, dim } => {
                    for &(input, column) in origins[*x].iter().flatten() {
                        let (least, rows) = (&mut places[input][column], table.len() / dim);
                        *least = if *least == 0 { rows } else { rows.min(*least) };
                    }
                    vec![None; *width]
                }
                _ => vec![None; *width],
            };
            origins.push(origin);
        }
        places
    }

    /// Adds a value; the same operation is not added twice, and one that changes nothing not at all.
    pub fn push(&mut self, op: Op) -> Id {
        let op = match op {
            Op::Concat(parts) if parts.len() == 1 => return parts[0],
            Op::Take { x, columns } => {
                let (x, columns) = match self.op(x) {
                    Op::Take { x, columns: inner } => {
                        (*x, Arc::new(columns.iter().map(|&c| inner[c as usize]).collect::<Vec<_>>()))
                    }
                    _ => (x, columns),
                };
                if columns.iter().copied().eq(0..self.width(x) as u32) {
                    return x;
                }
                Op::Take { x, columns }
            }
            op => op,
        };
        if let Some(at) = self.nodes.iter().position(|(known, _)| *known == op) {
            return at;
        }
        let width = match &op {
            Op::Input(at) => self.inputs[*at],
            Op::Given { item: Some(at), .. } => self.item_widths[*at],
            Op::Given { shared, .. } => shared.map_or(0, |at| self.shared_widths[at]),
            Op::Dense { bias, repeat, .. } => bias.len() * repeat,
            Op::Unary(_, x) | Op::Affine { x, .. } | Op::Softmax { x, .. } | Op::LayerNorm { x, .. } => self.width(*x),
            Op::Binary(_, a, _) => self.width(*a),
            Op::Concat(parts) => parts.iter().map(|&part| self.width(part)).sum(),
            Op::Take { columns, .. } => columns.len(),
            Op::Sum { x, len, .. } => self.width(*x) / len,
            Op::Embedding { x, dim, .. } => self.width(*x) * dim,
            Op::MatMul { a, m, k, n, .. } => self.width(*a) / (m * k) * m * n,
        };
        self.nodes.push((op, width));
        self.nodes.len() - 1
    }

    /// How often each value is read, results included.
    pub fn uses(&self) -> Vec<usize> {
        let mut uses = vec![0; self.n_values()];
        for at in self.needed() {
            self.op(at).operands().into_iter().for_each(|x| uses[x] += 1);
        }
        self.outputs.iter().for_each(|&x| uses[x] += 1);
        uses
    }

    /// What the results depend on, operands first.
    pub fn needed(&self) -> Vec<Id> {
        let mut needed = vec![false; self.n_values()];
        self.outputs.iter().for_each(|&x| needed[x] = true);
        for at in (0..self.n_values()).rev() {
            if needed[at] {
                self.op(at).operands().into_iter().for_each(|x| needed[x] = true);
            }
        }
        (0..self.n_values()).filter(|&at| needed[at]).collect()
    }

    /// The same with affine maps folded into the products before and behind them, and gates recognised.
    pub fn simplified(&self) -> Graph {
        let mut to = Graph {
            inputs: self.inputs.clone(),
            item_widths: self.item_widths.clone(),
            shared_widths: self.shared_widths.clone(),
            ..Graph::default()
        };
        let uses = self.uses();
        let mut place = vec![0; self.n_values()];
        for at in self.needed() {
            let op = self.op(at).of(|x| place[x]);
            place[at] = match &op {
                Op::Affine { x, gain, add } => match to.op(*x).clone() {
                    // Folded only where the product is not wanted by itself, too.
                    Op::Dense { x, weights, bias, base: None, repeat: 1 } if uses[self.op(at).operands()[0]] == 1 => {
                        let weights = weights.iter().enumerate().map(|(i, w)| w * gain[i % gain.len()]).collect();
                        let bias = bias.iter().zip(&**gain).zip(&**add).map(|((b, g), a)| b * g + a).collect();
                        to.push(Op::Dense {
                            x,
                            weights: Arc::new(weights),
                            bias: Arc::new(bias),
                            base: None,
                            repeat: 1,
                        })
                    }
                    Op::Affine { x, gain: before, add: under } => {
                        let both = before.iter().zip(&**gain).map(|(b, g)| b * g).collect();
                        let sums = under.iter().zip(&**gain).zip(&**add).map(|((u, g), a)| u * g + a).collect();
                        to.push(Op::Affine { x, gain: Arc::new(both), add: Arc::new(sums) })
                    }
                    _ => to.push(op),
                },
                Op::Dense { x, weights, bias, base: None, repeat: 1 } => match to.op(*x).clone() {
                    Op::Affine { x, gain, add } => {
                        let n = bias.len();
                        let scaled = weights.iter().enumerate().map(|(i, w)| w * gain[i / n]).collect();
                        let moved = |column: usize| {
                            let inputs =
                                add.iter().enumerate().map(|(i, a)| f64::from(*a) * f64::from(weights[i * n + column]));
                            (f64::from(bias[column]) + inputs.sum::<f64>()) as f32
                        };
                        let bias = (0..n).map(moved).collect();
                        to.push(Op::Dense { x, weights: Arc::new(scaled), bias: Arc::new(bias), base: None, repeat: 1 })
                    }
                    _ => to.push(op),
                },
                Op::Binary(Binary::Mul, a, b) => match (to.op(*a), to.op(*b)) {
                    (_, Op::Unary(Unary::Sigmoid, x)) if x == a => to.push(Op::Unary(Unary::Silu, *a)),
                    (Op::Unary(Unary::Sigmoid, x), _) if x == b => to.push(Op::Unary(Unary::Silu, *b)),
                    _ => to.push(op),
                },
                _ => to.push(op),
            };
        }
        to.outputs = self.outputs.iter().map(|&x| place[x]).collect();
        to
    }
}
