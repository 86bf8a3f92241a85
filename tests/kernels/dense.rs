//! kernels/dense.cu on compiled networks: every operation, alone and in random networks, in f32 and in bf16.

use std::sync::Arc;

use half::bf16;
use proptest::prelude::*;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use tastemaker::catalog::generation::NO_ROW;
use tastemaker::device::cpu::twins::dense::{Batch, dense_rank, in_int8};
use tastemaker::device::cuda::dense::{Arithmetic, compile, put_row};
use tastemaker::ranking::dense::ops::{Binary, Graph, Id, Op, Unary};
use tastemaker::ranking::dense::places;
use tastemaker_emulator::Buffer;
use tastemaker_kernels::dense::{DenseRank, TableNumbers, TableShape};

use super::{intact, run, same};

/// Operations that a network is made of, by number: [`Network::add`] knows them.
const OPERATIONS: usize = 16;

const FUNCTIONS: [Unary; 18] = [
    Unary::Relu,
    Unary::LeakyRelu { slope: 0.2 },
    Unary::Sigmoid,
    Unary::Tanh,
    Unary::Gelu,
    Unary::Silu,
    Unary::Softplus,
    Unary::Elu { alpha: 0.7 },
    Unary::Erf,
    Unary::Exp,
    Unary::Log,
    Unary::Sqrt,
    Unary::Abs,
    Unary::Reciprocal,
    Unary::Pow { power: 2.0 },
    Unary::Pow { power: 0.5 },
    Unary::Pow { power: 1.7 },
    Unary::Clip { low: -0.3, high: 0.4 },
];

const PAIRS: [Binary; 7] = [Binary::Add, Binary::Sub, Binary::Mul, Binary::Div, Binary::Max, Binary::Min, Binary::Pow];

/// A graph that grows.
struct Network<'a> {
    graph: Graph,
    /// Values that may be read.
    pool: Vec<Id>,
    random: &'a mut SmallRng,
}

impl Network<'_> {
    fn values(&mut self, n: usize, size: f32) -> Arc<Vec<f32>> {
        Arc::new((0..n).map(|_| self.random.random_range(-size..size)).collect())
    }

    fn any(&mut self) -> Id {
        self.pool[self.random.random_range(0..self.pool.len())]
    }

    fn dense(&mut self, x: Id, n: usize, base: Option<Id>, repeat: usize) -> Id {
        let k = self.graph.width(x) / repeat;
        let (weights, bias) = (self.values(k * n, 2.0 / (k as f32).sqrt()), self.values(n, 0.3));
        self.graph.push(Op::Dense { x, weights, bias, base, repeat })
    }

    /// A piece of the item's row, of the request's, or of both.
    fn given(&mut self, width: usize) -> Id {
        let what = self.random.random_range(0..3);
        let item = (what != 0).then(|| {
            self.graph.item_widths.push(width);
            self.graph.item_widths.len() - 1
        });
        let shared = (what != 1).then(|| {
            self.graph.shared_widths.push(width);
            self.graph.shared_widths.len() - 1
        });
        self.graph.push(Op::Given { item, shared })
    }

    /// Columns of any value, as many as are asked for.
    fn columns(&mut self, n: usize) -> Id {
        let x = self.any();
        let width = self.graph.width(x) as u32;
        let columns = Arc::new((0..n).map(|_| self.random.random_range(0..width)).collect());
        self.graph.push(Op::Take { x, columns })
    }

    fn add(&mut self, operation: usize) {
        let x = self.any();
        let width = self.graph.width(x);
        // Wide ones have more tiles than a block has warps.
        let n = if self.random.random_ratio(1, 8) { 300 } else { 70 };
        let n = self.random.random_range(1..n);
        let at = match operation {
            0 => self.dense(x, n, None, 1),
            1 => {
                let base = self.given(n);
                self.dense(x, n, Some(base), 1)
            }
            2 => {
                let base = self.columns(n);
                self.dense(x, n, Some(base), 1)
            }
            3 => self.given(n),
            4 => {
                let (repeat, k) = (self.random.random_range(2..4usize), self.random.random_range(1..24usize));
                let x = self.columns(repeat * k);
                self.dense(x, n % 20 + 1, None, repeat)
            }
            5 => {
                let x = self.dense(x, n, None, 1);
                self.graph.push(Op::Unary(Unary::Relu, x))
            }
            6 => self.graph.push(Op::Unary(FUNCTIONS[self.random.random_range(0..FUNCTIONS.len())], x)),
            7 => {
                let (gain, add) = (self.values(width, 2.0), self.values(width, 1.0));
                self.graph.push(Op::Affine { x, gain, add })
            }
            8 => {
                let y = if self.random.random() { self.columns(width) } else { self.columns(1) };
                self.graph.push(Op::Binary(PAIRS[self.random.random_range(0..PAIRS.len())], x, y))
            }
            9 => {
                let parts = (0..self.random.random_range(2..4usize)).map(|_| self.any()).collect();
                self.graph.push(Op::Concat(parts))
            }
            10 => self.columns(n),
            11 => {
                let (outer, len) = (self.random.random_range(1..4usize), self.random.random_range(1..40usize));
                let inner = [1, 1, 3, 33][self.random.random_range(0..4)].min(90 / len + 1);
                let x = self.columns(outer * len * inner);
                self.graph.push(Op::Sum { x, len, inner, scale: 0.5 })
            }
            12 => {
                let (len, groups) = (self.random.random_range(1..40usize), self.random.random_range(1..3usize));
                let x = self.columns(len * groups);
                self.graph.push(Op::Softmax { x, len })
            }
            13 => {
                let (gain, add) = (self.values(width, 2.0), self.values(width, 1.0));
                self.graph.push(Op::LayerNorm { x, gain, add, epsilon: 1e-5 })
            }
            14 => {
                // Numbers around those of the table's rows.
                let (x, dim, gain) =
                    (self.columns(n % 5 + 1), self.random.random_range(1..12usize), Arc::new(vec![7.0; n % 5 + 1]));
                let add = self.values(n % 5 + 1, 5.0);
                let x = self.graph.push(Op::Affine { x, gain, add });
                let table = self.values(9 * dim, 1.0);
                self.graph.push(Op::Embedding { x, table, dim })
            }
            _ => {
                let mut size = || self.random.random_range(1..6usize);
                let (batch, m, k, n) = (size() % 2 + 1, size(), size(), size());
                let turned = self.random.random();
                let (a, b) = (self.columns(batch * m * k), self.columns(batch * k * n));
                self.graph.push(Op::MatMul { a, b, m, k, n, turned })
            }
        };
        self.pool.push(at);
    }
}

/// What [`Dense::check`] scores.
#[derive(Clone, Debug)]
pub struct Dense {
    operations: Vec<usize>,
    arithmetic: Arithmetic,
    n_requests: usize,
    width: usize,
    block_rows: usize,
    table: TableNumbers,
    first: bool,
}

const NUMBERS: [TableNumbers; 3] = [TableNumbers::F32, TableNumbers::Bf16, TableNumbers::Int8];

impl Dense {
    pub fn any() -> impl Strategy<Value = Dense> {
        let arithmetic = prop::sample::select(vec![Arithmetic::F32, Arithmetic::Bf16]);
        let operations = prop::collection::vec(0..OPERATIONS, 1..8);
        let block_rows = prop::sample::select(vec![16, 32, 48]);
        let table = prop::sample::select(NUMBERS.to_vec());
        (operations, arithmetic, 1usize..4, 1usize..60, block_rows, table, any::<bool>()).prop_map(
            |(operations, arithmetic, n_requests, width, block_rows, table, first)| Dense {
                operations,
                arithmetic,
                n_requests,
                width,
                block_rows,
                table,
                first,
            },
        )
    }

    /// Of every operation some.
    pub fn every(seed: u64) -> Dense {
        let (arithmetic, odd) = ([Arithmetic::F32, Arithmetic::Bf16][seed as usize / 2 % 2], seed % 2 == 1);
        let operations = (0..OPERATIONS).map(|at| (at * 5 + seed as usize) % OPERATIONS).collect();
        let table = NUMBERS[seed as usize % 3];
        Dense { operations, arithmetic, n_requests: 2, width: 37, block_rows: 32, table, first: odd }
    }

    pub fn check(&self, variant: &str, seed: u64) -> Result<(), String> {
        let &Dense { arithmetic, n_requests, width, block_rows, table: numbers, first, .. } = self;
        let random = &mut SmallRng::seed_from_u64(seed);
        let mut graph = Graph::default();
        graph.inputs = vec![random.random_range(1..20), random.random_range(1..6)];
        let mut network = Network { graph, pool: Vec::new(), random };
        network.pool = (0..2).map(|at| network.graph.push(Op::Input(at))).collect();
        self.operations.iter().for_each(|&operation| network.add(operation));
        // What came last is read in any case, and everything where every operation is there.
        let some = vec![network.any(), network.pool[network.pool.len() - 1]];
        let read = if self.operations.len() == OPERATIONS { network.pool.clone() } else { some };
        let all = network.graph.push(Op::Concat(read));
        let score = network.dense(all, 1, None, 1);
        network.graph.outputs = vec![network.graph.push(Op::Unary(Unary::Sigmoid, score))];
        let Network { graph, random, .. } = network;
        let program = compile(&graph, arithmetic)?;

        let ((starts, stride), n_rows, n) = (places(&graph.item_widths), 23u32, n_requests * width);
        let odd = |random: &mut SmallRng| match random.random_range(0..400) {
            0 => f32::NAN,
            1 => f32::INFINITY,
            _ => random.random_range(-1.0f32..1.0),
        };
        let mut values = |n: usize| -> Vec<f32> { (0..n).map(|_| odd(random)).collect() };
        let mut table: Vec<f32> = values(n_rows as usize * stride);
        let shared = values(n_requests * program.shared_width);
        let columns = values(n * program.n_columns);
        let before = values(n);
        if numbers == TableNumbers::Int8 {
            // One of them takes all of its piece along: of the first rows alone.
            let few = table.iter_mut().skip(stride * 5).filter(|value| !value.is_finite());
            few.for_each(|value| *value = 0.5);
        }
        let shape = TableShape { n_rows, stride: stride as u32, numbers, n_pieces: starts.len() as u32 };
        let lines = || table.chunks(stride.max(1));
        let mut lines_of_table = vec![0; n_rows as usize * shape.row_words()];
        let to = lines_of_table.chunks_mut(shape.row_words().max(1));
        lines().zip(to).for_each(|(line, out)| put_row(&shape, &starts, line, out));
        let table: Vec<f32> = match numbers {
            TableNumbers::F32 => table,
            TableNumbers::Bf16 => table.iter().map(|&value| bf16::from_f32(value).to_f32()).collect(),
            TableNumbers::Int8 => lines().flat_map(|line| in_int8(line, &starts)).collect(),
        };
        let row = |_| if random.random_ratio(1, 9) { NO_ROW } else { random.random_range(0..n_rows + 2) };
        let rows: Vec<u32> = (0..n).map(row).collect();
        let counts: Vec<u32> = (0..n_requests).map(|_| random.random_range(0..width as u32 + 3)).collect();
        let weight = if random.random() { 1.0 } else { 0.3 };
        let mut want = before.clone();
        let batch = Batch { rows: &rows, counts: &counts, width, shared: &shared, columns: &columns };
        dense_rank(&program, (&table, stride), batch, (weight, first), &mut want);

        let params = Buffer::new_16(&program.params);
        // The last rows lie beside the table.
        let n_more = random.random_range(0..n_rows);
        let shape = TableShape { n_rows: n_rows - n_more, ..shape };
        let words = Buffer::new(&program.words(shape));
        let (in_table, beside) = lines_of_table.split_at(shape.n_rows as usize * shape.row_words());
        let (in_table, beside) = (Buffer::new_16(in_table), Buffer::new_16(beside));
        let (rows, counts) = (Buffer::new(&rows), Buffer::new(&counts));
        let (columns, shared, scores) = (Buffer::new(&columns), Buffer::new_16(&shared), Buffer::new(&before));
        let launch = DenseRank {
            program: words.address(),
            params: params.address(),
            table: (stride > 0).then(|| in_table.address()),
            more: tastemaker_kernels::More { rows: beside.address(), n: n_more },
            rows: rows.address(),
            counts: counts.address(),
            columns: columns.address(),
            shared: shared.address(),
            n_requests: n_requests as u32,
            width: width as u32,
            block_rows: block_rows as u32,
            units: program.units,
            weight,
            first,
            scores: scores.address(),
        };
        run(variant, launch.launch(), seed)?;
        // Of NaN only that it is one: which operand's bits it has is anybody's choice.
        let bits = |values: &[f32]| -> Vec<u32> {
            values.iter().map(|value| if value.is_nan() { u32::MAX } else { value.to_bits() }).collect()
        };
        same("scores", &bits(&scores), &bits(&want))?;
        intact("scores", &scores)
    }
}
