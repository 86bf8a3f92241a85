//! Programs of kernels/dense.cu: what a network is compiled to, and how it is launched.

use crate::launch::{Launch, MAX_GRID_X, MAX_GRID_Y, ShapeError, within};
use crate::{DevicePtr, More, THREADS};

/// Columns of a tile, and rows.
pub const TILE: usize = 32;
/// Columns of a product that is computed by dot products, at most.
pub const NARROW_COLUMNS: usize = 4;
/// Where there is nothing: no item's piece, no list, no bias.
pub const NONE: u32 = u32::MAX;
/// The most dynamic shared memory that any architecture gives a block.
const MAX_SHARED_BYTES: u32 = 227 << 10;

/// What a [`Step`] does, and which of its fields it reads beside `out`, `out_stride`, `width` and `fill`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Op {
    /// A product in f32 of `k` inputs of `x` by the weights at `a` ([`f32_place`]), for each of `repeat` parts of a row, onto the bias at
    /// `b`, the item's piece, the request's, and `y`. `k` 0: those alone. `fill` is a multiple of 4.
    Layer,
    /// The same of an operand of bf16, filled up to a multiple of 32, by weights of bf16 ([`bf16_place`]).
    RoundedLayer,
    /// The same, of up to [`NARROW_COLUMNS`] columns, by f32 weights `[width, k]` at `a`.
    Narrow,
    /// `function` of every value of `x`; may be in place.
    Each,
    /// `function` of `x` and `y`, the second of one column where `n` is 1; may be in place.
    Pair,
    /// Columns `k` to `k + width` of the result from `x`: those that the list at `a` names, [`NONE`] being 0; without one the first.
    Take,
    /// Columns `k` to `k + width` of the candidates'.
    Load,
    /// Sums over the middle of `[.., m, n]`, times `p`.
    Sum,
    /// `e^v / Σ e^v` over groups of `m`.
    Softmax,
    /// Normalised over groups of `m`: gains at `a`, what is added at `b`, epsilon `p`.
    Norm,
    /// Rows of a table of `k` rows, `m` wide, at `a`.
    Embed,
    /// `[.., m, k]` of `x` by `[.., k, n]` of `y`, or by `[.., n, k]` if [`TURNED`].
    Multiply,
    /// `x` is the score.
    Score,
}

/// Functions of one value, as the ranking engine of the CPU defines them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Unary {
    Plain,
    Relu,
    /// Times `p` where negative.
    Leaky,
    Sigmoid,
    Tanh,
    Gelu,
    Silu,
    Softplus,
    /// Of `p`.
    Elu,
    Erf,
    Exp,
    Log,
    Sqrt,
    Abs,
    Reciprocal,
    Square,
    /// To the power of `p`.
    Power,
    /// At least `p`, at most `q`.
    Clip,
    /// Times the gain of its column at `a`, plus what is at `b`.
    Affine,
}

/// Functions of two values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Binary {
    Add,
    Sub,
    Mul,
    Div,
    Max,
    Min,
    Pow,
}

impl Binary {
    /// The result; the larger and the smaller of two is NaN where one of them is.
    pub fn of(self, a: f32, b: f32) -> f32 {
        match self {
            Binary::Add => a + b,
            Binary::Sub => a - b,
            Binary::Mul => a * b,
            Binary::Div => a / b,
            Binary::Max if a > b || a.is_nan() => a,
            Binary::Min if a < b || a.is_nan() => a,
            Binary::Max | Binary::Min => b,
            Binary::Pow => a.powf(b),
        }
    }
}

/// What [`Op::Each`] and [`Op::Pair`] compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Function {
    /// Of one value.
    Unary(Unary),
    /// Of two.
    Binary(Binary),
}

/// Of [`Step::flags`]: negative results become 0.
pub const RELU: u32 = 1;
/// Results are written as bf16, two a word, filled up to a multiple of 32.
pub const ROUND: u32 = 2;
/// See [`Op::Multiply`].
pub const TURNED: u32 = 4;

/// One step of a program. Values are named by the place of their first word in a candidate's row of shared memory, parameters by their
/// place among them, a multiple of 4 for weights and biases.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// What is done.
    pub op: Op,
    /// The operand.
    pub x: u32,
    /// Words from one row of the operand to the next; 4 more than a multiple of 8.
    pub x_stride: u32,
    /// Words from one part of a row to the next, where `repeat` is more than 1; for layers a multiple of 4.
    pub x_part: u32,
    /// The second operand; for layers what is added, or [`NONE`].
    pub y: u32,
    /// As `x_stride`.
    pub y_stride: u32,
    /// The result.
    pub out: u32,
    /// As `x_stride`.
    pub out_stride: u32,
    /// Columns that are computed; for layers of a part.
    pub width: u32,
    /// Columns that are written, zeros from `width` on; not for layers of several parts.
    pub fill: u32,
    /// Inputs of a product.
    pub k: u32,
    /// See [`Op`].
    pub m: u32,
    /// See [`Op`].
    pub n: u32,
    /// Parts of a row; at least 1.
    pub repeat: u32,
    /// Place of parameters.
    pub a: u32,
    /// Place of parameters.
    pub b: u32,
    /// First column of a piece of the item's row in the table, a multiple of 4, or [`NONE`].
    pub item: u32,
    /// Number of that piece, for the scale of a table in int8.
    pub piece: u32,
    /// First column of a piece of the request's row, a multiple of 4, or [`NONE`].
    pub shared: u32,
    /// Of [`Op::Each`] and [`Op::Pair`].
    pub function: Function,
    /// A parameter of the function.
    pub p: f32,
    /// As above.
    pub q: f32,
    /// Of [`RELU`], [`ROUND`] and [`TURNED`].
    pub flags: u32,
}

impl Step {
    const WORDS: usize = 24;

    /// A step that reads nothing yet.
    pub fn new(op: Op) -> Self {
        let (x, y, out, stride) = (0, NONE, 0, 0);
        Step {
            op,
            x,
            x_stride: stride,
            x_part: 0,
            y,
            y_stride: stride,
            out,
            out_stride: stride,
            width: 0,
            fill: 0,
            k: 0,
            m: 0,
            n: 0,
            repeat: 1,
            a: NONE,
            b: NONE,
            item: NONE,
            piece: 0,
            shared: NONE,
            function: Function::Unary(Unary::Plain),
            p: 0.0,
            q: 0.0,
            flags: 0,
        }
    }

    /// As `Step` in kernels/dense.cu.
    fn words(&self) -> [u32; Self::WORDS] {
        let Step { op, x, x_stride, x_part, y, y_stride, out, out_stride, width, fill, k, m, n, repeat, a, b, .. } =
            *self;
        let Step { item, piece, shared, function, p, q, flags, .. } = *self;
        let function = match function {
            Function::Unary(unary) => unary as u32,
            Function::Binary(binary) => binary as u32,
        };
        let (p, q) = (p.to_bits(), q.to_bits());
        [
            op as u32, x, x_stride, x_part, y, y_stride, out, out_stride, width, fill, k, m, n, repeat, a, b, item,
            shared, function, p, q, flags, piece, 0,
        ]
    }
}

/// A compiled network.
#[derive(Clone, Debug, PartialEq)]
pub struct Program {
    /// In order.
    pub steps: Vec<Step>,
    /// What steps name places in.
    pub params: Vec<u32>,
    /// Words of a candidate's row in shared memory; the first is the item's row.
    pub units: u32,
    /// Columns of a candidate.
    pub n_columns: usize,
    /// Values of a request's row.
    pub shared_width: usize,
    /// Multiplications and additions of all products, per candidate.
    pub flops: usize,
}

/// In which numbers a table of items is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TableNumbers {
    /// As they are.
    #[default]
    F32,
    /// The nearest bf16, ties to even.
    Bf16,
    /// Codes from -127 to 127, times the scale of their piece of the row: a 127th of its largest magnitude. A value is off by at most half of that,
    /// and all of a piece that holds NaN or an infinity is NaN.
    Int8,
}

/// A table of items.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TableShape {
    /// Rows.
    pub n_rows: u32,
    /// Values of a row, a multiple of 8.
    pub stride: u32,
    /// What they are kept in.
    pub numbers: TableNumbers,
    /// Pieces of a row, which have a scale each in int8.
    pub n_pieces: u32,
}

impl TableShape {
    /// Words of a row: its values, one, two or four a word, the first in the lowest bits; in int8 the scales of its pieces behind them, f32.
    pub fn row_words(&self) -> usize {
        let stride = self.stride as usize;
        match self.numbers {
            TableNumbers::F32 => stride,
            TableNumbers::Bf16 => stride / 2,
            TableNumbers::Int8 => stride / 4 + self.n_pieces as usize,
        }
    }
}

impl Program {
    /// For the device: the header, then the steps.
    pub fn words(&self, table: TableShape) -> Vec<u32> {
        let [n_steps, n_columns, shared_width] =
            [self.steps.len(), self.n_columns, self.shared_width].map(|n| n as u32);
        let (row_words, scales) = (table.row_words() as u32, table.stride / 4);
        let header =
            [n_steps, self.units, table.n_rows, row_words, table.numbers as u32, n_columns, shared_width, scales];
        header.into_iter().chain(self.steps.iter().flat_map(Step::words)).collect()
    }

    /// Dynamic shared memory for so many candidates of a block, bytes.
    pub fn shared_bytes(&self, block_rows: u32) -> u64 {
        4 * u64::from(self.units) * u64::from(block_rows)
    }
}

/// Where the weight of an input for a column of [`Op::Layer`] lies, f32: `[tiles of 32 columns, inputs filled up to 4, 32]`.
pub fn f32_place(n_inputs: usize, input: usize, column: usize) -> usize {
    (column / TILE * n_inputs.next_multiple_of(4) + input) * TILE + column % TILE
}

/// The same of [`Op::RoundedLayer`]: the word, and whether in its upper half. `[tiles of 32 columns, inputs by 32, 4 times 8 columns, lanes,
/// 4 words]`: what a lane holds of two right operands of `mma.m16n8k16` lies side by side.
pub fn bf16_place(n_inputs: usize, input: usize, column: usize) -> (usize, bool) {
    let (deep, within) = (column / TILE * n_inputs.div_ceil(32) + input / 32, input % 16);
    let lane = column % 8 * 4 + within % 8 / 2;
    let word = input % 32 / 16 * 2 + within / 8;
    (((deep * 4 + column % TILE / 8) * 32 + lane) * 4 + word, within % 2 == 1)
}

/// kernels/dense.cu
#[derive(Clone, Copy, Debug)]
pub struct DenseRank {
    /// u32: [`Program::words`].
    pub program: DevicePtr,
    /// u32: [`Program::params`], at a 16-byte boundary.
    pub params: DevicePtr,
    /// Rows as [`TableShape`] says, at a 16-byte boundary; `None`: no step reads one.
    pub table: Option<DevicePtr>,
    /// Rows beside the table, at a 16-byte boundary.
    pub more: More,
    /// u32 `[n_requests, width]`
    pub rows: DevicePtr,
    /// u32 `[n_requests]`
    pub counts: DevicePtr,
    /// f32 `[n_requests, width, n_columns]`
    pub columns: DevicePtr,
    /// f32 `[n_requests, shared_width]`, at a 16-byte boundary.
    pub shared: DevicePtr,
    /// 1 to 65,535.
    pub n_requests: u32,
    /// Places for candidates of a request; 1 to 2^31 - 1.
    pub width: u32,
    /// Candidates of a block: a multiple of 16, at most 256.
    pub block_rows: u32,
    /// The program's; with `block_rows` at most 227 KiB of shared memory.
    pub units: u32,
    /// What scores are multiplied by.
    pub weight: f32,
    /// Whether scores are written, or added to what is there.
    pub first: bool,
    /// f32 `[n_requests, width]`
    pub scores: DevicePtr,
}

impl DenseRank {
    /// The launch.
    ///
    /// # Errors
    /// A number out of its range.
    pub fn launch(&self) -> Result<Launch, ShapeError> {
        let kernel = "dense_rank";
        within(kernel, "n_requests", self.n_requests, 1, MAX_GRID_Y)?;
        within(kernel, "width", self.width, 1, MAX_GRID_X)?;
        within(kernel, "block_rows", self.block_rows, 16, THREADS)?;
        within(kernel, "block_rows modulo 16", self.block_rows % 16, 0, 0)?;
        let shared_bytes = 4 * u64::from(self.block_rows) * u64::from(self.units);
        within(kernel, "shared memory", shared_bytes, 4 * self.block_rows, MAX_SHARED_BYTES)?;
        for (what, address) in [
            ("the parameters' address modulo 16", self.params),
            ("the table's address modulo 16", self.table.unwrap_or(0)),
            ("the address modulo 16 of rows beside the table", self.more.rows),
            ("the shared values' address modulo 16", self.shared),
        ] {
            within(kernel, what, address % 16, 0, 0)?;
        }
        let grid = [self.width.div_ceil(self.block_rows), self.n_requests, 1];
        let mut launch = Launch::new(
            kernel,
            grid,
            [
                self.program,
                self.params,
                self.table.unwrap_or(0),
                self.rows,
                self.counts,
                self.columns,
                self.shared,
                self.width.into(),
                self.block_rows.into(),
                self.weight.to_bits().into(),
                self.first.into(),
                self.scores,
                self.more.rows,
                self.more.n.into(),
            ],
        );
        launch.shared_bytes = shared_bytes as u32;
        Ok(launch)
    }
}
