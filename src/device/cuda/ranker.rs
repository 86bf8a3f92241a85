//! The dense ranker on a GPU: tables and weights of a compiled model, and scores of candidates that lie on the GPU.
//!
//! A request's part is computed on the CPU ([`DenseRanker::share`]) and uploaded, the item's lies in a table that is copied from the CPU's,
//! and a kernel computes the rest, all layers in one launch (`kernels/dense.cu`).
//!
//! [`DenseRanker::share`]: crate::ranking::dense::DenseRanker::share
#![allow(unsafe_code)] // Launches of programs that were compiled here.

use std::sync::Arc;

use half::bf16;
use tastemaker_kernels::dense::{Program, TableNumbers, TableShape};

use super::dense::{Arithmetic, compile, put_row};
pub use super::ops::RankBatch;
use super::ops::Ranking;
use super::stream::{PartMut, Stream, Table};
use crate::device::DeviceError;
use crate::ranking::dense::{Model, kernels, places};
use crate::ranking::precision::Precision;

/// Candidates of a block, the preferred number first.
const BLOCK_ROWS: [u32; 3] = [64, 32, 16];

/// Shared memory that the driver takes of every block.
const RESERVED_BYTES: u32 = 1 << 10;

/// How a model is to be computed on a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RankerOptions {
    /// bf16 is taken where the model's calibration allowed it, or int8, on the CPU; else f32.
    pub arithmetic: Arithmetic,
    /// In which numbers the items' table is kept; f32: as the CPU has it, which may be bf16. Pieces of a row have a scale each in int8.
    pub table: TableNumbers,
}

impl Default for RankerOptions {
    /// Products in bf16 where that is allowed, the table as the CPU has it.
    fn default() -> Self {
        RankerOptions { arithmetic: Arithmetic::Bf16, table: TableNumbers::F32 }
    }
}

/// A model compiled for GPUs: what it takes is known before anything is allocated.
#[derive(Debug)]
pub struct RankerPlan {
    program: Program,
    table: TableShape,
    /// Where pieces of a row of the table begin.
    starts: Vec<usize>,
    /// Whether the CPU's table is of bf16.
    from_bf16: bool,
    block_rows: u32,
    arithmetic: Arithmetic,
}

impl RankerPlan {
    /// Compiles a model for GPUs that give a block so much shared memory, bytes.
    ///
    /// # Errors
    /// What the GPU does not have.
    pub fn new(model: &Model, shared_bytes: u32, options: RankerOptions) -> Result<Self, String> {
        let arithmetic = match model.report().precision {
            Precision::F32 => Arithmetic::F32,
            Precision::Bf16 | Precision::Int8 => options.arithmetic,
        };
        let graph = model.candidate_graph();
        let program = compile(graph, arithmetic)?;
        let (mut table, mut starts, mut from_bf16) = (TableShape::default(), Vec::new(), false);
        if !graph.item_widths.is_empty() {
            let Some(from) = model.table() else { return Err("items' parts without a table of them".into()) };
            let number =
                |n: usize| u32::try_from(n).map_err(|_| format!("a table of {} x {}", from.n_rows(), from.width()));
            from_bf16 = from.precision() != Precision::F32;
            let numbers = match options.table {
                TableNumbers::F32 if from_bf16 => TableNumbers::Bf16,
                numbers => numbers,
            };
            starts = places(&graph.item_widths).0;
            let (n_rows, stride, n_pieces) = (number(from.n_rows())?, number(from.width())?, number(starts.len())?);
            table = TableShape { n_rows, stride, numbers, n_pieces };
        }
        // Two blocks on a multiprocessor hide each other's waiting; there is room for them where either leaves half, but for what each
        // takes for itself.
        let most_of = |bytes: u32| BLOCK_ROWS.into_iter().find(|&rows| program.shared_bytes(rows) <= bytes.into());
        let block_rows = most_of(shared_bytes.saturating_sub(RESERVED_BYTES) / 2).or_else(|| most_of(shared_bytes));
        let Some(block_rows) = block_rows else {
            let least = program.shared_bytes(BLOCK_ROWS[BLOCK_ROWS.len() - 1]);
            return Err(format!(
                "{least} bytes of shared memory for a block of candidates; the GPU has {shared_bytes}"
            ));
        };
        Ok(RankerPlan { program, table, starts, from_bf16, block_rows, arithmetic })
    }

    /// Device memory that the ranker takes.
    pub fn bytes(&self) -> u64 {
        let table = u64::from(self.table.n_rows) * self.table.row_words() as u64;
        4 * ((self.program.words(self.table).len() + self.program.params.len()) as u64 + table)
    }

    /// The table that candidates' items are read from; of no rows where none is.
    pub fn table(&self) -> TableShape {
        self.table
    }

    /// In which numbers it computes.
    pub fn arithmetic(&self) -> Arithmetic {
        self.arithmetic
    }

    /// Multiplications and additions of all products, per candidate.
    pub fn flops(&self) -> usize {
        self.program.flops
    }
}

/// One model on one GPU, for all streams.
#[derive(Debug)]
pub struct DeviceRanker {
    plan: RankerPlan,
    program: Table<u32>,
    params: Table<u32>,
    table: Option<Table<u32>>,
}

/// Rows of the CPU's table in the numbers of the GPU's.
struct Rows<'a> {
    from: &'a kernels::Table,
    plan: &'a RankerPlan,
    values: Vec<f32>,
    row: Vec<u32>,
}

impl Rows<'_> {
    /// Writes words of the table from `start` on.
    fn fill(&mut self, start: usize, out: &mut [u32]) {
        let RankerPlan { table, starts, from_bf16, .. } = self.plan;
        if table.numbers == if *from_bf16 { TableNumbers::Bf16 } else { TableNumbers::F32 } {
            return out.copy_from_slice(&self.from.units()[start..start + out.len()]);
        }
        let (words, end) = (self.row.len(), start + out.len());
        for row in start / words..end.div_ceil(words) {
            let units = self.from.row(row as u32);
            self.values.clear();
            match from_bf16 {
                true => self
                    .values
                    .extend(units.iter().flat_map(|pair| [pair << 16, pair & 0xffff_0000]).map(f32::from_bits)),
                false => self.values.extend(units.iter().map(|&bits| f32::from_bits(bits))),
            }
            // A piece of the table begins and ends anywhere.
            let (first, behind) = ((row * words).max(start), ((row + 1) * words).min(end));
            let to = &mut out[first - start..behind - start];
            if to.len() == words {
                put_row(table, starts, &self.values, to);
            } else {
                put_row(table, starts, &self.values, &mut self.row);
                to.copy_from_slice(&self.row[first - row * words..behind - row * words]);
            }
        }
    }
}

impl DeviceRanker {
    /// Compiles a model and brings it to the stream's GPU; waits until it is there.
    ///
    /// # Errors
    /// Of the driver; within, what the GPU does not have, and the CPU therefore has to compute.
    pub fn new(stream: &Stream, model: &Model, options: RankerOptions) -> Result<Result<Self, String>, DeviceError> {
        match RankerPlan::new(model, stream.context().shared_bytes(), options) {
            Ok(plan) => Self::planned(stream, model, plan).map(Ok),
            Err(reason) => Ok(Err(reason)),
        }
    }

    /// Brings a model to the GPU as it was compiled for that; waits until it is there.
    ///
    /// # Errors
    /// Of the driver.
    pub fn planned(stream: &Stream, model: &Model, plan: RankerPlan) -> Result<Self, DeviceError> {
        let program = Table::copied(stream, &plan.program.words(plan.table))?;
        let params = Table::copied(stream, &plan.program.params)?;
        let shape = plan.table;
        let table = match model.table().filter(|_| shape.stride > 0) {
            Some(from) => {
                let n_words = shape.n_rows as usize * shape.row_words();
                let mut rows = Rows { from, plan: &plan, values: Vec::new(), row: vec![0; shape.row_words()] };
                Some(Table::new(stream, n_words, |start, out: &mut [u32]| rows.fill(start, out))?)
            }
            None => None,
        };
        Ok(DeviceRanker { plan, program, params, table })
    }

    /// Values per request that the CPU computes, by [`DenseRanker::share`].
    ///
    /// [`DenseRanker::share`]: crate::ranking::dense::DenseRanker::share
    pub fn shared_width(&self) -> usize {
        self.plan.program.shared_width
    }

    /// Columns per candidate: those that [`Model::columns`] classes under candidates, or all of a model that is not split, each in the order of
    /// inputs and of columns therein.
    pub fn columns_width(&self) -> usize {
        self.plan.program.n_columns
    }

    /// Words of a row of the items' table.
    pub fn line_words(&self) -> usize {
        self.plan.table.row_words()
    }

    /// What [`DenseRanker::line`] says of an item, as a row of the table.
    ///
    /// [`DenseRanker::line`]: crate::ranking::dense::DenseRanker::line
    pub fn put_line(&self, line: &[f32], out: &mut [u32]) {
        let RankerPlan { table, starts, from_bf16, .. } = &self.plan;
        match from_bf16 {
            // As it would be in the CPU's table.
            true => {
                let rounded: Vec<f32> = line.iter().map(|&value| bf16::from_f32(value).to_f32()).collect();
                put_row(table, starts, &rounded, out);
            }
            false => put_row(table, starts, line, out),
        }
    }

    /// How it is computed.
    pub fn plan(&self) -> &RankerPlan {
        &self.plan
    }

    /// Device memory that it takes.
    pub fn bytes(&self) -> u64 {
        self.plan.bytes()
    }
}

/// A member of an ensemble: rankers whose scores are added up in memory, one after the other.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Member {
    /// What its scores are multiplied by.
    pub weight: f32,
    /// The first one writes, others add to what is there.
    pub first: bool,
}

impl Member {
    /// One that is no ensemble.
    pub const ONLY: Member = Member { weight: 1.0, first: true };
}

/// A worker's own view of a [`DeviceRanker`]. It needs no memory: what lies between layers stays in the GPU's multiprocessors.
#[derive(Clone, Debug)]
pub struct StreamRanker {
    ranker: Arc<DeviceRanker>,
    most_slots: usize,
}

impl StreamRanker {
    /// For at most so many places for candidates in a batch.
    pub fn new(ranker: Arc<DeviceRanker>, most_slots: usize) -> Self {
        StreamRanker { ranker, most_slots }
    }

    /// The ranker.
    pub fn ranker(&self) -> &Arc<DeviceRanker> {
        &self.ranker
    }

    /// Device memory that one takes beside the ranker's.
    pub fn bytes(_ranker: &DeviceRanker, _most_slots: usize) -> u64 {
        0
    }

    /// Gives the stream what scores a batch: f32 `[n_requests, width]`, NaN in holes. Nothing is allocated, copied or waited for, so that it may be
    /// captured; what varies beneath a captured shape is in `counts`.
    ///
    /// # Errors
    /// More places than it is for, a number that the kernel does not take, or what the driver says.
    ///
    /// # Panics
    /// If something is too short for the shapes, or another stream's.
    pub fn enqueue(
        &mut self,
        stream: &Stream,
        batch: RankBatch<'_>,
        scores: PartMut<'_, f32>,
    ) -> Result<(), DeviceError> {
        self.enqueue_member(stream, batch, Member::ONLY, scores)
    }

    /// The same as a member of an ensemble.
    ///
    /// # Errors
    /// As [`Self::enqueue`].
    ///
    /// # Panics
    /// As [`Self::enqueue`].
    pub fn enqueue_member(
        &mut self,
        stream: &Stream,
        batch: RankBatch<'_>,
        member: Member,
        scores: PartMut<'_, f32>,
    ) -> Result<(), DeviceError> {
        let slots = batch.n_requests.saturating_mul(batch.width);
        if slots > self.most_slots {
            return Err(DeviceError::Failed(format!("{slots} candidates where there is room for {}", self.most_slots)));
        }
        let DeviceRanker { plan, program, params, table } = &*self.ranker;
        let ranking = Ranking {
            program: program.part(0..program.len()),
            params: params.part(0..params.len()),
            table: table.as_ref().map(|table| table.part(0..table.len())),
            line_words: self.ranker.line_words(),
            n_columns: plan.program.n_columns,
            shared_width: plan.program.shared_width,
            block_rows: plan.block_rows,
            units: plan.program.units,
            weight: member.weight,
            first: member.first,
        };
        // SAFETY: program, parameters and table are of one plan; pieces lie where `places` of the graph's widths says, in rows as wide as that.
        unsafe { stream.dense_rank(ranking, batch, scores) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::context::Context;
    use super::super::emulated::{Emulated, IMAGE};
    use super::super::ops::MoreRows;
    use super::super::stream::Buffer;
    use super::*;
    use crate::candidates::Dependence;
    use crate::catalog::generation::NO_ROW;
    use crate::index::Kernel;
    use crate::ranking::dense::ops::{Binary, Graph, Id, Op, Unary};
    use crate::ranking::dense::tests::{
        catalogue, classes, crossed, dense, inputs, parts, perceptron, samples, with_items,
    };
    use crate::ranking::dense::{DenseRanker, Sample, Setting};
    use crate::ranking::manifest::Calibration;
    use crate::ranking::onnx::OnnxRanker;
    use crate::ranking::precision::{Fidelity, Wanted};
    use crate::ranking::{Ranker as _, recognise};
    use crate::testing::noise;

    /// What is scored by the CPU, and where.
    struct Case {
        name: &'static str,
        graph: Graph,
        /// What each column of each input depends on.
        columns: Vec<Vec<Dependence>>,
    }

    fn hidden(graph: &mut Graph, x: Id, width: usize, next: &mut impl FnMut() -> f32) -> Id {
        let x = dense(graph, x, width, next);
        graph.push(Op::Unary(Unary::Relu, x))
    }

    /// DCN-v2: cross layers `x0 * (W x + b) + x` beside a deep part (Wang et al. 2021).
    fn cross_network(widths: &[usize]) -> Graph {
        let next = &mut noise(21);
        let (mut graph, ids) = inputs(widths);
        let x0 = graph.push(Op::Concat(ids));
        let (mut x, width) = (x0, graph.width(x0));
        for _ in 0..3 {
            let w = dense(&mut graph, x, width, next);
            let gated = graph.push(Op::Binary(Binary::Mul, x0, w));
            x = graph.push(Op::Binary(Binary::Add, gated, x));
        }
        let deep = hidden(&mut graph, x0, 48, next);
        let deep = hidden(&mut graph, deep, 24, next);
        let both = graph.push(Op::Concat(vec![x, deep]));
        let score = dense(&mut graph, both, 1, next);
        graph.outputs = vec![graph.push(Op::Unary(Unary::Sigmoid, score))];
        graph
    }

    /// DLRM: fields embedded by small towers, products of all pairs beside them, a top (Naumov et al. 2019).
    fn pairwise(widths: &[usize]) -> Graph {
        let next = &mut noise(22);
        let (mut graph, ids) = inputs(widths);
        let all = graph.push(Op::Concat(ids));
        let fields: Vec<Id> = (0..4).map(|_| hidden(&mut graph, all, 8, next)).collect();
        let stacked = graph.push(Op::Concat(fields.clone()));
        let dots = graph.push(Op::MatMul { a: stacked, b: stacked, m: 4, k: 8, n: 4, turned: true });
        let below = (1..4u32).flat_map(|row| (0..row).map(move |column| row * 4 + column)).collect();
        let dots = graph.push(Op::Take { x: dots, columns: Arc::new(below) });
        let joined = graph.push(Op::Concat(vec![dots, fields[0]]));
        let top = hidden(&mut graph, joined, 20, next);
        let score = dense(&mut graph, top, 1, next);
        graph.outputs = vec![score];
        graph
    }

    /// DeepFM: half of the square of a sum less the sum of squares over fields of embeddings, and a deep part (Guo et al. 2017).
    fn factorised(widths: &[usize]) -> Graph {
        let next = &mut noise(23);
        let (mut graph, ids) = inputs(widths);
        let all = graph.push(Op::Concat(ids));
        let fields = dense(&mut graph, all, 5 * 12, next);
        let whole = graph.push(Op::Sum { x: fields, len: 5, inner: 12, scale: 1.0 });
        let whole = graph.push(Op::Unary(Unary::Pow { power: 2.0 }, whole));
        let squares = graph.push(Op::Unary(Unary::Pow { power: 2.0 }, fields));
        let squares = graph.push(Op::Sum { x: squares, len: 5, inner: 12, scale: 1.0 });
        let both = graph.push(Op::Binary(Binary::Sub, whole, squares));
        let second = graph.push(Op::Sum { x: both, len: 12, inner: 1, scale: 0.5 });
        let deep = hidden(&mut graph, fields, 40, next);
        let deep = dense(&mut graph, deep, 1, next);
        let sum = graph.push(Op::Binary(Binary::Add, second, deep));
        graph.outputs = vec![graph.push(Op::Unary(Unary::Sigmoid, sum))];
        graph
    }

    fn towers(widths: &[usize]) -> Graph {
        let next = &mut noise(24);
        let (mut graph, ids) = inputs(widths);
        let ends: Vec<Id> = ids
            .into_iter()
            .map(|x| {
                let x = hidden(&mut graph, x, 40, next);
                dense(&mut graph, x, 16, next)
            })
            .collect();
        let dot = graph.push(Op::Binary(Binary::Mul, ends[0], ends[1]));
        graph.outputs = vec![graph.push(Op::Sum { x: dot, len: 16, inner: 1, scale: 1.0 })];
        graph
    }

    /// The demo's ranker.
    fn demo(widths: &[usize]) -> Graph {
        let engines = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("engines");
        let manifest = std::fs::read_to_string(engines.join("demo.toml")).unwrap();
        let (manifest, onnx) = (toml::from_str(&manifest).unwrap(), engines.join("demo.onnx"));
        let pool = Arc::new(rten::ThreadPool::with_num_threads(1));
        let mut general = OnnxRanker::load("demo", &onnx, &manifest, widths, pool).unwrap();
        recognise(&mut general, &onnx, &manifest).unwrap()
    }

    fn cases() -> Vec<Case> {
        let case = |name, widths: &[usize], graph: fn(&[usize]) -> Graph| Case {
            name,
            graph: graph(widths),
            columns: classes(widths),
        };
        // Nothing is left for candidates but the product of both towers.
        let columns = vec![vec![Dependence::Request; 14], vec![Dependence::Item; 9]];
        let towers = Case { name: "two towers", graph: towers(&[14, 9]), columns };
        vec![
            case("perceptron", &[44], |widths| perceptron(widths, &[70, 33], 3)),
            case("of two inputs", &[30, 21], |widths| perceptron(widths, &[96, 64, 20], 4)),
            case("wide", &[60], |widths| perceptron(widths, &[512, 256, 128], 6)),
            case("crossed", &[40, 24], |widths| crossed(widths, 5)),
            case("DCN-v2", &[20, 17], cross_network),
            case("DLRM", &[18, 12], pairwise),
            case("DeepFM", &[22, 13], factorised),
            case("demo", &[13], demo),
            towers,
        ]
    }

    /// A model, in another precision than f32 where that is asked for and has products to round; split, with a table, unless `whole`.
    fn model(case: &Case, wanted: Wanted, whole: bool) -> (Arc<Model>, Vec<Sample>) {
        let columns = &case.columns;
        let items = catalogue(columns);
        let samples = samples(columns, &items, 3, 60, 17);
        let calibration = Calibration { precision: wanted, min_ndcg: 0.0 };
        let setting = with_items(columns, &items, &samples);
        let setting = if whole { Setting { columns: Vec::new(), ..setting } } else { setting };
        (Arc::new(Model::new(case.name, &case.graph, &calibration, &setting, Kernel::detect())), samples)
    }

    fn on_device(stream: &Stream, model: &Model, options: RankerOptions) -> StreamRanker {
        let ranker = DeviceRanker::new(stream, model, options).unwrap().unwrap();
        StreamRanker::new(Arc::new(ranker), 4096)
    }

    const F32: RankerOptions = RankerOptions { arithmetic: Arithmetic::F32, table: TableNumbers::F32 };
    const NUMBERS: [TableNumbers; 3] = [TableNumbers::F32, TableNumbers::Bf16, TableNumbers::Int8];

    fn upload<T: super::super::stream::Plain>(stream: &Stream, values: &[T]) -> Buffer<T> {
        let mut host = stream.pinned(values.len()).unwrap();
        host.copy_from_slice(values);
        let mut buffer = stream.buffer(values.len()).unwrap();
        stream.upload(host, values.len(), buffer.part_mut(0..values.len())).unwrap().wait().unwrap();
        buffer
    }

    /// Requests on the host, `width` places for each.
    struct Host {
        width: usize,
        rows: Vec<u32>,
        counts: Vec<u32>,
        shared: Vec<f32>,
        columns: Vec<f32>,
        /// Rows beside the table, and how many.
        more: (Vec<u32>, usize),
    }

    /// What samples are to the device: each with `spare` places that hold anything.
    fn host(model: &Arc<Model>, ranker: &DeviceRanker, samples: &[Sample], spare: usize) -> Host {
        let (mut cpu, each) = (DenseRanker::new(model.clone()), ranker.columns_width());
        let width = samples.iter().map(|sample| sample.rows.len()).max().unwrap() + spare;
        let mut host =
            Host { width, rows: vec![], counts: vec![], shared: vec![], columns: vec![], more: Default::default() };
        for (at, sample) in samples.iter().enumerate() {
            let (request, columns) = parts(model, sample);
            let first = host.shared.len();
            host.shared.resize(first + ranker.shared_width(), f32::NAN);
            cpu.share(&request, &mut host.shared[first..]).unwrap();
            host.rows.extend(&sample.rows);
            host.rows.resize((at + 1) * width, 1);
            host.columns.extend(columns);
            host.columns.resize((at + 1) * width * each, f32::NAN);
            host.counts.push(sample.rows.len() as u32);
        }
        host
    }

    /// Scores of the batch, onto `before` as a member.
    fn run(stream: &Stream, ranker: &mut StreamRanker, host: &Host, member: Member, before: &[f32]) -> Vec<f32> {
        let (rows, counts) = (upload(stream, &host.rows), upload(stream, &host.counts));
        let (shared, columns) = (upload(stream, &host.shared), upload(stream, &host.columns));
        let mut scores = upload(stream, before);
        let (lines, n) = (upload(stream, &host.more.0), host.more.1);
        let batch = RankBatch {
            rows: rows.part(0..rows.len()),
            more: (n > 0).then(|| MoreRows { rows: lines.part(0..lines.len()), n }),
            counts: counts.part(0..counts.len()),
            n_requests: host.counts.len(),
            width: host.width,
            shared: shared.part(0..shared.len()),
            columns: columns.part(0..columns.len()),
        };
        ranker.enqueue_member(stream, batch, member, scores.part_mut(0..before.len())).unwrap();
        let all = stream.download(scores.part(0..before.len()), stream.pinned(before.len()).unwrap()).unwrap();
        all.wait().unwrap().to_vec()
    }

    /// The scores of each request without what lies behind them, which must be holes.
    fn by_request(host: &Host, scores: &[f32]) -> Vec<Vec<f32>> {
        let requests = scores.chunks(host.width).zip(&host.counts);
        requests
            .map(|(scores, &n)| {
                let (scores, holes) = scores.split_at(n as usize);
                assert!(holes.iter().all(|score| score.is_nan()));
                scores.to_vec()
            })
            .collect()
    }

    fn cpu(model: &Arc<Model>, samples: &[Sample]) -> Vec<Vec<f32>> {
        let mut ranker = DenseRanker::new(model.clone());
        let score = |sample: &Sample| {
            let mut scores = Vec::new();
            match model.columns() {
                Some(_) => {
                    let (request, columns) = parts(model, sample);
                    ranker.score_split(&request, &sample.rows, &columns, &mut scores).unwrap();
                }
                None => ranker.score(&sample.inputs, sample.rows.len(), &mut scores).unwrap(),
            }
            scores
        };
        samples.iter().map(score).collect()
    }

    /// How far sums of a network in another order may be apart, over the spread of its scores: each of up to 512 terms is rounded by 2^-24 of
    /// what the sum has come to (Higham), through up to 5 layers whose weights do not enlarge errors more than values.
    const REORDERED: f64 = 512.0 * 5.0 / (1 << 24) as f64;

    #[test]
    fn the_device_scores_as_the_cpu_does_and_alone_as_in_the_batch() {
        let Some(emulated) = Emulated::open("delay_us=0") else { return };
        let context = Context::open(0, IMAGE).unwrap();
        let stream = Stream::new(&context).unwrap();
        for (case, whole) in cases().iter().flat_map(|case| [(case, false), (case, true)]) {
            let (model, samples) = model(case, Wanted::F32, whole);
            assert_eq!(model.columns().is_none(), whole, "{}", case.name);
            let ranker = &mut on_device(&stream, &model, F32);
            let host = host(&model, ranker.ranker(), &samples, 9);
            let before = vec![7.0; host.rows.len()];
            let moved = |what| emulated.count(what);
            let all = run(&stream, ranker, &host, Member::ONLY, &before);
            let got = by_request(&host, &all);
            let fidelity = Fidelity::of(&cpu(&model, &samples), &got);
            println!("{}, whole {whole}: {:.1e}", case.name, fidelity.error);
            assert!(fidelity.error <= REORDERED, "{}, whole {whole}: {}", case.name, fidelity.error);
            assert_eq!(moved("misuses"), 0);
            let each = ranker.ranker().columns_width();
            for (request, sample) in samples.iter().enumerate() {
                let shared = ranker.ranker().shared_width();
                for at in [0, 17, sample.rows.len() - 1] {
                    let slot = request * host.width + at;
                    let one = Host {
                        width: 1,
                        rows: vec![sample.rows[at]],
                        counts: vec![1],
                        shared: host.shared[request * shared..(request + 1) * shared].to_vec(),
                        columns: host.columns[slot * each..(slot + 1) * each].to_vec(),
                        more: Default::default(),
                    };
                    let alone = run(&stream, ranker, &one, Member::ONLY, &[0.0]);
                    assert_eq!(alone[0].to_bits(), got[request][at].to_bits(), "{}, {request}, {at}", case.name);
                }
            }
        }
    }

    #[test]
    fn bf16_keeps_the_order_and_is_taken_only_where_the_model_allows_it() {
        let Some(_emulated) = Emulated::open("delay_us=0") else { return };
        let context = Context::open(0, IMAGE).unwrap();
        let stream = Stream::new(&context).unwrap();
        for (case, wanted) in cases().iter().flat_map(|case| [(case, Wanted::Bf16), (case, Wanted::Int8)]) {
            let (exact, samples) = model(case, Wanted::F32, false);
            let exact = cpu(&exact, &samples);
            let (rounded, _) = model(case, wanted, false);
            if rounded.report().precision == Precision::F32 {
                // No product to round, or a CPU that has none of them.
                println!("{}, {wanted:?}: f32 on this CPU", case.name);
                continue;
            }
            let ranker = &mut on_device(&stream, &rounded, RankerOptions::default());
            assert_eq!(ranker.ranker().plan().arithmetic(), Arithmetic::Bf16);
            let host = host(&rounded, ranker.ranker(), &samples, 0);
            let got = by_request(&host, &run(&stream, ranker, &host, Member::ONLY, &vec![0.0; host.rows.len()]));
            let fidelity = Fidelity::of(&exact, &got);
            println!("{}, {wanted:?}: ndcg@10 {:.5}, error {:.4}", case.name, fidelity.ndcg, fidelity.error);
            assert!(fidelity.ndcg >= 0.999 && fidelity.error < 0.05, "{}: {fidelity:?}", case.name);
        }
        let (exact, _) = model(&cases()[0], Wanted::F32, false);
        let ranker = on_device(&stream, &exact, RankerOptions::default());
        assert_eq!(ranker.ranker().plan().arithmetic(), Arithmetic::F32);
    }

    #[test]
    fn holes_and_nan_stay_where_they_are() {
        let Some(_emulated) = Emulated::open("delay_us=0") else { return };
        let context = Context::open(0, IMAGE).unwrap();
        let stream = Stream::new(&context).unwrap();
        let (model, samples) = model(&cases()[1], Wanted::F32, false);
        let ranker = &mut on_device(&stream, &model, F32);
        let mut host = host(&model, ranker.ranker(), &samples, 3);
        let n_rows = model.table().unwrap().n_rows() as u32;
        let before = vec![0.0; host.rows.len()];
        let clean = run(&stream, ranker, &host, Member::ONLY, &before);
        let (each, shared) = (ranker.ranker().columns_width(), ranker.ranker().shared_width());
        // Of the first request: none of three is there, three have odd columns. The last has none, and NaN of its own.
        (host.rows[3], host.rows[4], host.rows[5]) = (NO_ROW, n_rows, n_rows + 70_000);
        host.columns[7 * each] = f32::NAN;
        host.columns[8 * each + 1] = f32::INFINITY;
        host.columns[9 * each] = f32::NEG_INFINITY;
        *host.counts.last_mut().unwrap() = 0;
        host.shared[2 * shared..].fill(f32::NAN);
        let got = run(&stream, ranker, &host, Member::ONLY, &before);
        let odd = cpu(&model, &odd_sample(&model, &host, &samples[0], each));
        for (at, score) in got.iter().enumerate() {
            let (request, place) = (at / host.width, at % host.width);
            let hole = place >= host.counts[request] as usize || (request == 0 && (3..6).contains(&place));
            match (request, place) {
                _ if hole => assert!(score.is_nan(), "{at}"),
                (0, 7..10) => {
                    let want = odd[0][place];
                    let same = (score - want).abs() <= 1e-4 || *score == want || (score.is_nan() && want.is_nan());
                    assert!(same, "{at}: {score} {want}");
                }
                _ => assert_eq!(score.to_bits(), clean[at].to_bits(), "{at}"),
            }
        }
        assert!(got[7].is_nan());
    }

    /// The first request with the columns of the host's first places, as a sample of its own.
    fn odd_sample(model: &Arc<Model>, host: &Host, sample: &Sample, each: usize) -> Vec<Sample> {
        let mut sample = sample.clone();
        let columns = model.columns().unwrap();
        for place in 7..10 {
            let mut own = host.columns[place * each..(place + 1) * each].iter();
            for (values, columns) in sample.inputs.iter_mut().zip(columns) {
                let line = values[place * columns.len()..(place + 1) * columns.len()].iter_mut().zip(columns);
                let candidates = line.filter(|(_, column)| **column == Dependence::Candidate);
                candidates.zip(&mut own).for_each(|((value, _), own)| *value = *own);
            }
        }
        vec![sample]
    }

    #[test]
    fn members_of_an_ensemble_are_added_up() {
        let Some(_emulated) = Emulated::open("delay_us=0") else { return };
        let context = Context::open(0, IMAGE).unwrap();
        let stream = Stream::new(&context).unwrap();
        let cases = cases();
        let (one, samples) = model(&cases[0], Wanted::F32, false);
        // Another model of the same columns.
        let columns = cases[0].columns.clone();
        let other = Case { graph: perceptron(&[columns[0].len()], &[20], 9), name: "other", columns };
        let (other, _) = model(&other, Wanted::F32, false);
        let (first, second) = (&mut on_device(&stream, &one, F32), &mut on_device(&stream, &other, F32));
        let (of_first, of_second) =
            (host(&one, first.ranker(), &samples, 2), host(&other, second.ranker(), &samples, 2));
        let before = vec![9.0; of_first.rows.len()];
        let only = [
            run(&stream, first, &of_first, Member::ONLY, &before),
            run(&stream, second, &of_second, Member::ONLY, &before),
        ];
        let sum = run(&stream, first, &of_first, Member { weight: 0.7, first: true }, &before);
        let sum = run(&stream, second, &of_second, Member { weight: 0.3, first: false }, &sum);
        for ((sum, one), other) in sum.iter().zip(&only[0]).zip(&only[1]) {
            let want = 0.7f32 * one + 0.3f32 * other;
            assert!(sum.to_bits() == want.to_bits() || (sum.is_nan() && want.is_nan()), "{sum} {want}");
        }
    }

    #[test]
    fn items_beside_the_table_score_as_in_it() {
        let Some(_emulated) = Emulated::open("delay_us=0") else { return };
        let context = Context::open(0, IMAGE).unwrap();
        let stream = Stream::new(&context).unwrap();
        let mut n_tables = 0;
        let cases = cases();
        for (case, wanted) in cases.iter().flat_map(|case| [(case, Wanted::F32), (case, Wanted::Bf16)]) {
            let (exact, _) = model(case, Wanted::F32, false);
            let (model, samples) = model(case, wanted, false);
            // What an item's line is computed as.
            let Some(table) = exact.table() else { continue };
            n_tables += 1;
            let n_rows = table.n_rows();
            for table_of in NUMBERS {
                let ranker = &mut on_device(&stream, &model, RankerOptions { table: table_of, ..F32 });
                let mut host = host(&model, ranker.ranker(), &samples, 3);
                let before = vec![0.0; host.rows.len()];
                let want = run(&stream, ranker, &host, Member::ONLY, &before);
                // Every other row lies beside, in the opposite order.
                let place = |row: u32| if row.is_multiple_of(2) { row } else { (2 * n_rows) as u32 - 1 - row };
                host.rows.iter_mut().for_each(|row| *row = place(*row));
                let words = ranker.ranker().line_words();
                host.more = (vec![0; n_rows * words], n_rows);
                for (line, out) in table.units().chunks(table.width()).rev().zip(host.more.0.chunks_mut(words)) {
                    let line: Vec<f32> = line.iter().map(|bits| f32::from_bits(*bits)).collect();
                    ranker.ranker().put_line(&line, out);
                }
                let got = run(&stream, ranker, &host, Member::ONLY, &before);
                let bits = |scores: &[f32]| scores.iter().map(|score| score.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&got), bits(&want), "{}, {wanted:?}, {table_of:?}", case.name);
                // Nothing is there.
                host.more = Default::default();
                let got = run(&stream, ranker, &host, Member::ONLY, &before);
                let beside = host.rows.iter().zip(&got).filter(|(row, _)| **row as usize >= n_rows);
                assert!(beside.clone().count() > 0 && beside.clone().all(|(_, score)| score.is_nan()));
            }
        }
        assert!(n_tables > 4, "{n_tables}");
    }

    #[test]
    fn tables_in_int8_keep_the_order() {
        let Some(_emulated) = Emulated::open("delay_us=0") else { return };
        let context = Context::open(0, IMAGE).unwrap();
        let stream = Stream::new(&context).unwrap();
        for (case, wanted) in cases().iter().flat_map(|case| [(case, Wanted::F32), (case, Wanted::Bf16)]) {
            let (exact, samples) = model(case, Wanted::F32, false);
            let exact = cpu(&exact, &samples);
            let (model, _) = model(case, wanted, false);
            let options = RankerOptions { table: TableNumbers::Int8, ..RankerOptions::default() };
            let ranker = &mut on_device(&stream, &model, options);
            assert_eq!(ranker.ranker().plan().table().numbers, TableNumbers::Int8);
            let host = host(&model, ranker.ranker(), &samples, 0);
            let got = by_request(&host, &run(&stream, ranker, &host, Member::ONLY, &vec![0.0; host.rows.len()]));
            let fidelity = Fidelity::of(&exact, &got);
            println!("{}, {wanted:?}: ndcg@10 {:.5}, error {:.4}", case.name, fidelity.ndcg, fidelity.error);
            assert!(fidelity.ndcg >= 0.99 && fidelity.error < 0.05, "{}: {fidelity:?}", case.name);
        }
    }

    #[test]
    fn a_table_is_what_its_rows_are_however_it_is_cut() {
        // Magnitudes that are far apart, zeros, one value, what is no number, and the least numbers that there are.
        let (starts, n_rows, stride) = ([0usize, 16, 48], 5usize, 64usize);
        let mut next = noise(31);
        let mut values: Vec<f32> = (0..n_rows * stride).map(|_| next()).collect();
        (0..n_rows).for_each(|row| values[row * stride + 16..row * stride + 48].iter_mut().for_each(|v| *v *= 2e3));
        values[stride..stride + 16].fill(0.0);
        (values[2 * stride + 20], values[3 * stride + 50]) = (f32::NAN, f32::NEG_INFINITY);
        values[4 * stride..4 * stride + 16].iter_mut().for_each(|v| *v *= 1e-43);
        let mut table = kernels::Table::new(n_rows, stride, Precision::F32);
        let mut pieces: Vec<_> = table.pieces(n_rows).collect();
        (0..n_rows).for_each(|row| pieces[0].write(row, 0, &values[row * stride..(row + 1) * stride]));
        drop(pieces);
        for numbers in NUMBERS {
            let shape = TableShape { n_rows: n_rows as u32, stride: stride as u32, numbers, n_pieces: 3 };
            let graph = perceptron(&[4], &[8], 1);
            let model = Model::plain("any", &graph, Kernel::detect());
            let plan = RankerPlan::new(&model, 1 << 17, F32).unwrap();
            let plan = RankerPlan { table: shape, starts: starts.into(), ..plan };
            let words = shape.row_words();
            let mut rows = Rows { from: &table, plan: &plan, values: Vec::new(), row: vec![0; words] };
            let mut whole = vec![0; n_rows * words];
            rows.fill(0, &mut whole);
            for piece in [1, 7, words - 1, words, words + 1, 3 * words - 2] {
                let mut cut = vec![7; n_rows * words];
                cut.chunks_mut(piece).enumerate().for_each(|(at, out)| rows.fill(at * piece, out));
                assert_eq!(cut, whole, "{numbers:?}, {piece}");
            }
            for (row, values) in values.chunks(stride).enumerate() {
                let mut line = vec![7; words];
                put_row(&shape, &starts, values, &mut line);
                assert_eq!(line, whole[row * words..(row + 1) * words], "{numbers:?}, {row}");
            }
        }
        // What is off is half of a scale at most.
        let shape = TableShape { n_rows: 5, stride: 64, numbers: TableNumbers::Int8, n_pieces: 3 };
        let mut row = vec![0; shape.row_words()];
        put_row(&shape, &starts, &values[..stride], &mut row);
        for (at, value) in values[..stride].iter().enumerate() {
            let scale = f32::from_bits(row[16 + starts.iter().filter(|&&start| start <= at).count() - 1]);
            let off = (f32::from((row[at / 4] >> (at % 4 * 8)) as i8) * scale - value).abs();
            assert!(off <= scale * 0.500_01 && scale > 0.0, "{at}: {off} of {scale}");
        }
    }

    #[test]
    fn memory_is_what_was_said_and_scoring_takes_none() {
        let Some(emulated) = Emulated::open("delay_us=0") else { return };
        let context = Context::open(0, IMAGE).unwrap();
        let stream = Stream::new(&context).unwrap();
        let (model, samples) = model(&cases()[1], Wanted::F32, false);
        let mut sizes = Vec::new();
        for table in NUMBERS {
            let before = emulated.count("used_bytes");
            let ranker = &mut on_device(&stream, &model, RankerOptions { table, ..F32 });
            assert_eq!(emulated.count("used_bytes") - before, ranker.ranker().bytes());
            assert_eq!(StreamRanker::bytes(ranker.ranker(), 4096), 0);
            sizes.push(ranker.ranker().bytes());
            let host = host(&model, ranker.ranker(), &samples, 0);
            let all = host.rows.len();
            let got = by_request(&host, &run(&stream, ranker, &host, Member::ONLY, &vec![0.0; all]));
            let fidelity = Fidelity::of(&cpu(&model, &samples), &got);
            println!("{table:?}: {fidelity:?}");
            assert!(fidelity.ndcg >= 0.999 && fidelity.error < 0.02, "{table:?}: {fidelity:?}");
            // What scores takes no memory and copies nothing.
            let (rows, counts) = (upload(&stream, &host.rows), upload(&stream, &host.counts));
            let (shared, columns) = (upload(&stream, &host.shared), upload(&stream, &host.columns));
            let mut scores = upload(&stream, &vec![0.0; all]);
            let batch = RankBatch {
                rows: rows.part(0..all),
                more: None,
                counts: counts.part(0..3),
                n_requests: 3,
                width: host.width,
                shared: shared.part(0..shared.len()),
                columns: columns.part(0..columns.len()),
            };
            let counted = || ["allocations", "uploads", "downloads", "launches"].map(|what| emulated.count(what));
            let before = counted();
            ranker.enqueue(&stream, batch, scores.part_mut(0..all)).unwrap();
            stream.synchronize().unwrap();
            assert_eq!(counted(), [before[0], before[1], before[2], before[3] + 1]);
            let few = &mut StreamRanker::new(ranker.ranker().clone(), all - 1);
            let error = few.enqueue(&stream, batch, scores.part_mut(0..all)).unwrap_err().to_string();
            assert!(error.contains(&format!("{all} candidates where there is room for {}", all - 1)), "{error}");
        }
        let table = model.table().unwrap();
        let n_values = (table.n_rows() * table.width()) as u64;
        assert_eq!(sizes[0] - sizes[1], 2 * n_values);
        // A scale for each item: its row is one piece.
        assert_eq!(sizes[0] - sizes[2], 3 * n_values - 4 * table.n_rows() as u64);
    }

    #[test]
    fn what_a_gpu_does_not_have_is_said() {
        let plan = |width: usize, shared_bytes: u32| {
            let graph = perceptron(&[24], &[width, 8], 1);
            RankerPlan::new(&Model::plain("wide", &graph, Kernel::detect()), shared_bytes, F32)
        };
        let rows = |width, shared_bytes| plan(width, shared_bytes).unwrap().block_rows;
        assert_eq!([rows(64, 227 << 10), rows(700, 227 << 10), rows(1500, 227 << 10)], [64, 32, 16]);
        let said = plan(1500, 48 << 10).unwrap_err();
        assert!(said.contains("bytes of shared memory for a block of candidates; the GPU has 49152"), "{said}");
    }
}
