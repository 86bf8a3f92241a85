//! Compiled rankers beside their twin, and their time.

use std::sync::Arc;

use anyhow::{Result, ensure};
use half::bf16;
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};
use tastemaker::device::cpu::twins::dense::{Batch, dense_rank, in_int8};
use tastemaker::device::cuda::dense::{Arithmetic, compile, put_row};
use tastemaker::ranking::dense::ops::{Binary, Graph, Id, Op, Unary};
use tastemaker::ranking::dense::places;
use tastemaker_kernels::dense::{DenseRank, Program, TableNumbers, TableShape};

use crate::kernels::median;
use crate::machine::{Machine, Memory, get, put};
use crate::report::KernelTime;

/// Largest dynamic shared memory that is asked for: every GPU since Ampere has it.
const SHARED_BYTES: u64 = 99 << 10;

/// A graph that grows by layers of random weights.
struct Network<'a> {
    graph: Graph,
    random: &'a mut SmallRng,
}

impl Network<'_> {
    /// One piece of an item's row and one of the request's, under the product of `n_columns` columns of candidates.
    fn new(n_columns: usize, width: usize, random: &mut SmallRng) -> (Network<'_>, Id) {
        let mut graph = Graph::default();
        (graph.inputs, graph.item_widths, graph.shared_widths) = (vec![n_columns], vec![width], vec![width]);
        let base = graph.push(Op::Given { item: Some(0), shared: Some(0) });
        let x = graph.push(Op::Input(0));
        let mut network = Network { graph, random };
        let first = network.dense(x, width, Some(base));
        let first = network.unary(Unary::Relu, first);
        (network, first)
    }

    fn values(&mut self, n: usize, size: f32) -> Arc<Vec<f32>> {
        Arc::new((0..n).map(|_| self.random.random_range(-size..size)).collect())
    }

    fn dense(&mut self, x: Id, n: usize, base: Option<Id>) -> Id {
        let k = self.graph.width(x);
        let (weights, bias) = (self.values(k * n, 2.0 / (k as f32).sqrt()), self.values(n, 0.3));
        self.graph.push(Op::Dense { x, weights, bias, base, repeat: 1 })
    }

    fn unary(&mut self, unary: Unary, x: Id) -> Id {
        self.graph.push(Op::Unary(unary, x))
    }

    fn scored(mut self, x: Id) -> Graph {
        let score = self.dense(x, 1, None);
        self.graph.outputs = vec![score];
        self.graph
    }
}

/// A network of every operation whose result is the same on any machine: not logarithms, powers, and what is made of them.
fn exact(random: &mut SmallRng) -> Graph {
    let (n_columns, width) = (random.random_range(1..20), random.random_range(5..200));
    let (mut network, x) = Network::new(n_columns, width, random);
    let mut gated = x;
    for _ in 0..2 {
        let w = network.dense(gated, width, None);
        let w = network.graph.push(Op::Binary(Binary::Mul, x, w));
        gated = network.graph.push(Op::Binary(Binary::Add, w, gated));
    }
    let functions =
        [Unary::Sigmoid, Unary::Tanh, Unary::Gelu, Unary::Silu, Unary::Elu { alpha: 0.5 }, Unary::Exp, Unary::Abs];
    let fields: Vec<Id> = (0..4)
        .map(|_| {
            let field = network.dense(gated, 8, None);
            let function = functions[network.random.random_range(0..functions.len())];
            network.unary(function, field)
        })
        .collect();
    let stacked = network.graph.push(Op::Concat(fields.clone()));
    let dots = network.graph.push(Op::MatMul { a: stacked, b: stacked, m: 4, k: 8, n: 4, turned: true });
    let softmax = network.graph.push(Op::Softmax { x: dots, len: 4 });
    let below = network.graph.push(Op::Take { x: dots, columns: Arc::new(vec![4, 8, 9, 12, 13, 14]) });
    let sums = network.graph.push(Op::Sum { x: stacked, len: 4, inner: 8, scale: 0.25 });
    let all = network.graph.push(Op::Concat(vec![gated, softmax, below, sums]));
    let width = network.graph.width(all);
    let (gain, add) = (network.values(width, 1.0), network.values(width, 0.1));
    let normed = network.graph.push(Op::LayerNorm { x: all, gain, add, epsilon: 1e-5 });
    network.scored(normed)
}

/// A network with one product in bf16, whose operands are the same on any machine, and how far its scores may be off: tensor cores sum up in an
/// order and with a rounding of their own, at most 2^-22 of the sum of sizes a term (twice what f32 has, for truncation).
fn rounded(random: &mut SmallRng) -> (Graph, f64) {
    let (n_columns, k, n) = (random.random_range(1..20), random.random_range(16..300), random.random_range(5..150));
    let (mut network, x) = Network::new(n_columns, k, random);
    let x = network.dense(x, n, None);
    // Inputs are at most 3 + 2 sqrt(columns), weights 2 / sqrt(inputs) in the product, and 2 / sqrt(n) in the score.
    let sizes = k as f64 * (3.0 + 2.0 * (n_columns as f64).sqrt()) * 2.0 / (k as f64).sqrt();
    let bound = (k as f64 + 4.0) * 2f64.powi(-22) * sizes * 2.0 * (n as f64).sqrt();
    (network.scored(x), bound)
}

/// What a launch reads, on the machine.
struct Held {
    program: Program,
    block_rows: u32,
    words: Memory,
    params: Memory,
    table: Memory,
}

impl Held {
    fn new(machine: &mut dyn Machine, program: Program, shape: TableShape, table: Memory) -> Result<Self> {
        let block_rows = [64, 32, 16].into_iter().find(|&rows| program.shared_bytes(rows) <= SHARED_BYTES);
        let block_rows = block_rows.ok_or_else(|| anyhow::anyhow!("{} words of shared memory", program.units))?;
        let (words, params) = (put(machine, &program.words(shape))?, put(machine, &program.params)?);
        Ok(Held { program, block_rows, words, params, table })
    }

    /// Of `[rows, counts, columns, shared]`.
    fn launch(&self, of: [Memory; 4], n_requests: usize, width: usize, scores: Memory) -> DenseRank {
        let [rows, counts, columns, shared] = of.map(|memory| memory.address);
        DenseRank {
            program: self.words.address,
            params: self.params.address,
            table: Some(self.table.address),
            more: Default::default(),
            rows,
            counts,
            columns,
            shared,
            n_requests: n_requests as u32,
            width: width as u32,
            block_rows: self.block_rows,
            units: self.program.units,
            weight: 1.0,
            first: true,
            scores: scores.address,
        }
    }
}

const NUMBERS: [TableNumbers; 3] = [TableNumbers::F32, TableNumbers::Bf16, TableNumbers::Int8];

/// One random network on random candidates: in f32 bit by bit, whatever its table is in; in bf16 as near as a GPU's sums are.
///
/// # Errors
/// Where it differs from its twin, or what the machine says.
pub fn check(machine: &mut dyn Machine, size: usize, random: &mut SmallRng) -> Result<()> {
    let narrow: bool = random.random();
    let (graph, bound) = if narrow { rounded(random) } else { (exact(random), 0.0) };
    let program =
        compile(&graph, if narrow { Arithmetic::Bf16 } else { Arithmetic::F32 }).map_err(anyhow::Error::msg)?;
    let (n_rows, (starts, stride)) = (random.random_range(1..300u32), places(&graph.item_widths));
    let (n_requests, width) = (random.random_range(1..4usize), random.random_range(1..=size.min(500)));
    let n = n_requests * width;
    let mut values = |n: usize| -> Vec<f32> { (0..n).map(|_| random.random_range(-1.0f32..1.0)).collect() };
    let table: Vec<f32> = values(n_rows as usize * stride);
    let (shared, columns) = (values(n_requests * program.shared_width), values(n * program.n_columns));
    let numbers = NUMBERS[random.random_range(0..NUMBERS.len())];
    let shape = TableShape { n_rows, stride: stride as u32, numbers, n_pieces: starts.len() as u32 };
    let mut lines = vec![0; n_rows as usize * shape.row_words()];
    let of_table = || table.chunks(stride.max(1));
    let to = lines.chunks_mut(shape.row_words().max(1));
    of_table().zip(to).for_each(|(line, out)| put_row(&shape, &starts, line, out));
    let table: Vec<f32> = match numbers {
        TableNumbers::F32 => table,
        TableNumbers::Bf16 => table.iter().map(|&value| bf16::from_f32(value).to_f32()).collect(),
        TableNumbers::Int8 => of_table().flat_map(|line| in_int8(line, &starts)).collect(),
    };
    let rows: Vec<u32> = (0..n).map(|_| random.random_range(0..n_rows + n_rows / 8 + 1)).collect();
    let counts: Vec<u32> = (0..n_requests).map(|_| random.random_range(0..width as u32 + 2)).collect();
    let mut want = vec![0.0; n];
    let batch = Batch { rows: &rows, counts: &counts, width, shared: &shared, columns: &columns };
    dense_rank(&program, (&table, stride), batch, (1.0, true), &mut want);

    let memory = put(machine, &lines)?;
    let held = Held::new(machine, program, shape, memory)?;
    let of = [put(machine, &rows)?, put(machine, &counts)?, put(machine, &columns)?, put(machine, &shared)?];
    let scores = machine.reserve(4 * n)?;
    machine.launch(&held.launch(of, n_requests, width, scores).launch()?)?;
    let got = get::<f32>(machine, scores, n)?;
    for (at, (got, want)) in got.iter().zip(&want).enumerate() {
        let off = f64::from((got - want).abs());
        let same = (got.is_nan() && want.is_nan()) || got.to_bits() == want.to_bits() || (narrow && off <= bound);
        ensure!(same, "scores[{at}] is {got:?}, expected {want:?}, {bound:.1e} off at most");
    }
    Ok(())
}

/// A DLRM (Naumov et al. 2019) without its embedding tables: eight fields, half of them the request's and half the item's, and what a small
/// network makes of the candidate's columns as a ninth; products of all pairs, and a perceptron over these and the ninth.
fn pairwise(random: &mut SmallRng, share: usize) -> Graph {
    let width = 64 / share;
    let (n_columns, fields) = (12, 8);
    let mut graph = Graph::default();
    let half = fields / 2 * width;
    (graph.inputs, graph.item_widths, graph.shared_widths) = (vec![n_columns], vec![half], vec![half]);
    let items = graph.push(Op::Given { item: Some(0), shared: None });
    let requests = graph.push(Op::Given { item: None, shared: Some(0) });
    let columns = graph.push(Op::Input(0));
    let mut network = Network { graph, random };
    let bottom = network.dense(columns, 2 * width, None);
    let bottom = network.unary(Unary::Relu, bottom);
    let own = network.dense(bottom, width, None);
    let (n, graph) = (fields + 1, &mut network.graph);
    let all = graph.push(Op::Concat(vec![requests, items, own]));
    let dots = graph.push(Op::MatMul { a: all, b: all, m: n, k: width, n, turned: true });
    let below = (1..n as u32).flat_map(|row| (0..row).map(move |column| row * n as u32 + column)).collect();
    let dots = graph.push(Op::Take { x: dots, columns: Arc::new(below) });
    let mut x = graph.push(Op::Concat(vec![dots, own]));
    for layer in [512, 256, 128] {
        let hidden = network.dense(x, layer / share, None);
        x = network.unary(Unary::Relu, hidden);
    }
    network.scored(x)
}

/// Times of rankers' candidate parts for `batch` requests of 900 candidates, over tables of up to a million items; of much smaller ones where
/// `n_items` is small. The last is a DLRM-style core, for four times as many requests of 270 candidates: about what a query of MLPerf's
/// has, of whose model a pair takes 40 MFLOP.
///
/// # Errors
/// What the machine says.
pub fn bench(machine: &mut dyn Machine, copied: f64, [n_items, batch]: [usize; 2]) -> Result<Vec<KernelTime>> {
    let random = &mut SmallRng::seed_from_u64(3);
    let (share, width) = if n_items < 100_000 { (8, 20) } else { (1, 900) };
    let (n_items, mut all) = (n_items.min(1_000_000), Vec::new());
    for (name, layers) in [("128-256-128-1", &[256, 128][..]), ("256-512-256-128-1", &[512, 256, 128])] {
        use {Arithmetic::*, TableNumbers as Table};
        for of in [(F32, Table::F32), (Bf16, Table::Bf16), (Bf16, Table::Int8)] {
            let (mut network, mut x) = Network::new(12, layers[0] / share, random);
            for &n in &layers[1..] {
                let hidden = network.dense(x, n / share, None);
                x = network.unary(Unary::Relu, hidden);
            }
            let graph = network.scored(x);
            all.push(time(machine, copied, (name, &graph), of, [n_items, batch, width], random)?);
        }
    }
    let graph = pairwise(random, share);
    let program = compile(&graph, Arithmetic::Bf16).map_err(anyhow::Error::msg)?;
    let name = format!("DLRM-style, {:.2} MFLOP a pair", program.flops as f64 / 1e6);
    let shape = [n_items, 4 * batch, width * 3 / 10];
    let of = (Arithmetic::Bf16, TableNumbers::Bf16);
    all.push(time(machine, copied, (&name, &graph), of, shape, random)?);
    Ok(all)
}

/// Of a named network, for `[n_items, batch, width]`.
fn time(
    machine: &mut dyn Machine,
    copied: f64,
    (name, graph): (&str, &Graph),
    (arithmetic, numbers): (Arithmetic, TableNumbers),
    [n_items, batch, width]: [usize; 3],
    random: &mut SmallRng,
) -> Result<KernelTime> {
    let program = compile(graph, arithmetic).map_err(anyhow::Error::msg)?;
    let (starts, stride) = places(&graph.item_widths);
    let shape = TableShape { n_rows: n_items as u32, stride: stride as u32, numbers, n_pieces: starts.len() as u32 };
    let row_bytes = 4 * shape.row_words();
    // Any bits do for a table.
    let table = machine.reserve(n_items * row_bytes)?;
    let held = Held::new(machine, program, shape, table)?;
    let n = batch * width;
    let rows: Vec<u32> = (0..n).map(|_| random.random_range(0..n_items as u32)).collect();
    let columns: Vec<f32> = (0..n * 12).map(|_| random.random_range(-1.0f32..1.0)).collect();
    let shared = vec![0.1f32; batch * held.program.shared_width];
    let counts = vec![width as u32; batch];
    let of = [put(machine, &rows)?, put(machine, &counts)?, put(machine, &columns)?, put(machine, &shared)?];
    let scores = machine.reserve(4 * n)?;
    let launch = held.launch(of, batch, width, scores).launch()?;
    let seconds = median(machine, 9, &mut |machine| machine.launch(&launch))?;
    let of = match (arithmetic, numbers) {
        (Arithmetic::F32, _) => "f32",
        (Arithmetic::Bf16, TableNumbers::Int8) => "bf16, int8 table",
        (Arithmetic::Bf16, _) => "bf16",
    };
    let bytes = n * (row_bytes + 4 + 4 + 12 * 4) + held.params.bytes;
    machine.clear()?;
    Ok(KernelTime {
        kernel: "dense_rank".into(),
        shape: format!("{batch} x {width}, {name}, {of}"),
        seconds,
        bytes: bytes as u64,
        of_copy: bytes as f64 / (2.0 * copied) / seconds,
        flops: (n * held.program.flops) as u64,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_measured_fits_every_gpu() {
        let program = compile(&pairwise(&mut SmallRng::seed_from_u64(1), 1), Arithmetic::Bf16).unwrap();
        assert!(program.shared_bytes(16) <= SHARED_BYTES, "{}", program.shared_bytes(16));
        // Three towers' and three layers' products, twice; the request's and the item's fields are given.
        let pairs = 9 * 64 * 9;
        assert_eq!(program.flops, 2 * (12 * 128 + 128 * 64 + pairs + 100 * 512 + 512 * 256 + 256 * 128 + 128));
    }
}
