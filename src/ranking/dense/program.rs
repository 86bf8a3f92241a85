//! A graph as steps over blocks of rows: a block passes through all of them before the next begins, so that nothing between them
//! leaves the cache, and nothing is allocated.

use std::collections::HashMap;

use super::elementwise::Simple;
use super::kernels::{
    Ahead, Format, LANES, Layer, Line, NARROW, Precision, Rows, Scale, Table, Target, convert, gather,
};
use super::ops::{Graph, Id, Op, Unary};
use crate::index::Kernel;

/// Rows that pass through the steps together, at most.
const BLOCK: usize = 96;
/// 32-bit units that the largest value of a block takes, at most.
const BLOCK_UNITS: usize = BLOCK * 1024;
/// Products over fewer inputs stay in f32: rounding them would cost more than it saves.
pub const LEAST_INPUTS: usize = 16;

/// What values were seen to be, over a sample: least and largest, by column for inputs, else over all columns.
pub type Ranges = HashMap<Id, (Vec<f32>, Vec<f32>)>;

/// How a graph is to be computed.
#[derive(Clone, Copy)]
pub struct Plan<'a> {
    pub precision: Precision,
    pub kernel: Kernel,
    /// Needed for int8.
    pub ranges: Option<&'a Ranges>,
    /// Products with the graph's inputs stay in f32.
    pub exact_inputs: bool,
    /// Every value keeps its place until the block is done, for [`Program::observe`].
    pub keep: bool,
}

impl<'a> Plan<'a> {
    /// All in f32.
    pub fn f32(kernel: Kernel) -> Self {
        Plan { precision: Precision::F32, kernel, ranges: None, exact_inputs: false, keep: false }
    }
}

/// Where the rows of a value lie.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Slot {
    place: Place,
    /// Units from one row to the next.
    stride: usize,
    /// Values of a row.
    width: usize,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Place {
    Input(usize),
    Buffer(usize),
}

enum Kind {
    Dense { layer: Layer, base: Option<Slot>, format: Format, relu: bool },
    Convert { low: Vec<Line>, per_unit: Vec<Line>, format: Format },
    Given { item: Option<usize>, shared: Option<usize>, format: Format, relu: bool },
    Simple(Simple),
}

struct Step {
    kind: Kind,
    x: Vec<Slot>,
    out: Slot,
    /// Rows of the step for a row of the block.
    repeat: usize,
}

/// What a program reads beside its inputs.
#[derive(Clone, Copy, Default)]
pub struct Given<'a> {
    /// A table and the rows to read there, one for each row computed.
    pub items: Option<(&'a Table, &'a [u32])>,
    /// What is the same for all rows, each piece padded to a multiple of 16.
    pub shared: &'a [f32],
}

/// Compiled steps; shared by all that run it, each with a [`Scratch`] of its own.
pub struct Program {
    kernel: Kernel,
    inputs: Vec<usize>,
    block: usize,
    steps: Vec<Step>,
    /// Units of a row, by buffer.
    buffers: Vec<usize>,
    outputs: Vec<Slot>,
    /// f32 values by id; all of them under [`Plan::keep`].
    values: Vec<(Id, Slot)>,
    quantised_flops: usize,
    flops: usize,
}

/// Buffers of a program.
#[derive(Default)]
pub struct Scratch(Vec<Vec<Line>>);

/// Columns rounded up to what any layer's panels read.
fn padded(width: usize) -> usize {
    match width {
        0..=16 => 16,
        17..=32 => 32,
        _ => width.next_multiple_of(64),
    }
}

/// Columns rounded up to whole registers: how wide a piece of [`Given`] lies.
pub fn whole(width: usize) -> usize {
    width.next_multiple_of(LANES)
}

/// Where each piece of a row begins when pieces of these widths stand side by side, and how wide all are.
pub fn places(widths: &[usize]) -> (Vec<usize>, usize) {
    let mut end = 0;
    let mut place = |&width: &usize| {
        end += whole(width);
        end - whole(width)
    };
    let places = widths.iter().map(&mut place).collect();
    (places, end)
}

fn lines(values: impl Iterator<Item = f32>) -> Vec<Line> {
    let values: Vec<u32> = values.map(f32::to_bits).collect();
    let line = |chunk: &[u32]| {
        let mut line = Line::default();
        line.0[..chunk.len()].copy_from_slice(chunk);
        line
    };
    values.chunks(LANES).map(line).collect()
}

/// What is known while steps are made.
struct Compiler<'a> {
    graph: &'a Graph,
    plan: Plan<'a>,
    uses: Vec<usize>,
    /// The one reader of values that have one.
    readers: Vec<Vec<Id>>,
    steps: Vec<Step>,
    /// Of each buffer before they are shared, one a step: units of a row.
    buffers: Vec<usize>,
    /// Places of values, in f32 and in the plan's precision.
    wide: HashMap<Id, Slot>,
    narrow: HashMap<Id, Slot>,
    flops: usize,
    quantised_flops: usize,
}

impl Program {
    /// Makes the steps.
    pub fn compile(graph: &Graph, plan: Plan<'_>) -> Self {
        let mut readers = vec![Vec::new(); graph.n_values()];
        let needed = graph.needed();
        for &at in &needed {
            graph.op(at).operands().into_iter().for_each(|x| readers[x].push(at));
        }
        let mut compiler = Compiler {
            graph,
            plan,
            uses: graph.uses(),
            readers,
            steps: Vec::new(),
            buffers: Vec::new(),
            wide: HashMap::new(),
            narrow: HashMap::new(),
            flops: 0,
            quantised_flops: 0,
        };
        for at in needed {
            compiler.value(at);
        }
        let outputs: Vec<Slot> = graph.outputs.iter().map(|&at| compiler.wide[&at]).collect();
        let Compiler { mut steps, buffers, wide, flops, quantised_flops, .. } = compiler;
        let mut values: Vec<(Id, Slot)> = wide.into_iter().collect();
        let mut outputs = outputs;
        let buffers = match plan.keep {
            true => buffers,
            false => {
                values.clear();
                share(&mut steps, &mut outputs, &buffers)
            }
        };
        let widest = buffers.iter().copied().max().unwrap_or(1).max(1);
        let block = match BLOCK_UNITS / widest {
            many if many >= BLOCK => BLOCK,
            few => (few / 6 * 6).max(6),
        };
        Program {
            kernel: plan.kernel,
            inputs: graph.inputs.clone(),
            block,
            steps,
            buffers,
            outputs,
            values,
            flops,
            quantised_flops,
        }
    }

    /// Widths of the inputs.
    pub fn inputs(&self) -> &[usize] {
        &self.inputs
    }

    /// Multiplications and additions of all products, per row.
    pub fn flops(&self) -> usize {
        self.flops
    }

    /// The share of them that is computed in less than f32.
    pub fn quantised(&self) -> f32 {
        self.quantised_flops as f32 / self.flops.max(1) as f32
    }

    /// Buffers to run with.
    pub fn scratch(&self) -> Scratch {
        // A line more each: tight rows end in a register that is stored whole.
        Scratch(
            self.buffers.iter().map(|units| vec![Line::default(); (units * self.block).div_ceil(LANES) + 4]).collect(),
        )
    }

    /// Computes `n` rows of `inputs[i]`, `[n, width i]` row-major, and hands over the results block by block: place of the first
    /// row, how many there are, and the rows of each output by number.
    ///
    /// # Panics
    /// If an input is too short, or the scratch is another program's.
    pub fn run(
        &self,
        scratch: &mut Scratch,
        inputs: &[&[f32]],
        given: Given<'_>,
        n: usize,
        mut each: impl for<'b> FnMut(usize, usize, &(dyn Fn(usize) -> Rows<'b> + 'b)),
    ) {
        self.blocks(scratch, inputs, given, n, |first, n, rows| {
            each(first, n, &|output| rows(self.outputs[output]));
        });
    }

    /// Runs like [`Self::run`] and widens `ranges` by every value that is not NaN.
    pub fn observe(&self, scratch: &mut Scratch, inputs: &[&[f32]], given: Given<'_>, n: usize, ranges: &mut Ranges) {
        self.blocks(scratch, inputs, given, n, |_, n, rows| {
            for &(id, slot) in &self.values {
                let columns = match slot.place {
                    Place::Input(_) => slot.width,
                    Place::Buffer(_) => 1,
                };
                let empty = || (vec![f32::INFINITY; columns], vec![f32::NEG_INFINITY; columns]);
                let (low, high) = ranges.entry(id).or_insert_with(empty);
                let rows = rows(slot);
                for at in 0..n {
                    for (column, &v) in rows.floats(at, slot.width).iter().enumerate() {
                        let column = column % columns;
                        low[column] = low[column].min(v);
                        high[column] = high[column].max(v);
                    }
                }
            }
        });
    }

    fn blocks(
        &self,
        scratch: &mut Scratch,
        inputs: &[&[f32]],
        given: Given<'_>,
        n: usize,
        mut each: impl for<'b> FnMut(usize, usize, &(dyn Fn(Slot) -> Rows<'b> + 'b)),
    ) {
        assert!(inputs.len() >= self.inputs.len() && scratch.0.len() == self.buffers.len(), "what the program wants");
        for first in (0..n).step_by(self.block) {
            let next = (first + self.block).min(n)..(first + 2 * self.block).min(n);
            let items = given.items.and_then(|(table, rows)| Some((table, rows.get(next.clone())?)));
            let rows = items.into_iter().flat_map(|(table, rows)| rows.iter().map(|&row| table.row(row)));
            let mut runs = inputs
                .iter()
                .zip(&self.inputs)
                .filter_map(|(values, width)| values.get(next.start * width..next.end * width))
                .map(bytemuck::cast_slice)
                .chain(rows);
            let mut ahead = Ahead::new(&mut runs);
            let n = self.block.min(n - first);
            for step in &self.steps {
                let Place::Buffer(to) = step.out.place else { continue };
                let mut out = std::mem::take(&mut scratch.0[to]);
                self.step(step, &scratch.0, inputs, given, (first, n), (&mut out, &mut ahead));
                scratch.0[to] = out;
            }
            let buffers = &scratch.0;
            each(first, n, &|slot| self.rows(slot, buffers, inputs, first, n));
        }
    }

    fn rows<'a>(&self, slot: Slot, buffers: &'a [Vec<Line>], inputs: &[&'a [f32]], first: usize, n: usize) -> Rows<'a> {
        let units: &[u32] = match slot.place {
            Place::Input(at) => bytemuck::cast_slice(&inputs[at][first * self.inputs[at]..]),
            Place::Buffer(at) => bytemuck::cast_slice(&buffers[at]),
        };
        Rows { units, stride: slot.stride, n }
    }

    fn step(
        &self,
        step: &Step,
        buffers: &[Vec<Line>],
        inputs: &[&[f32]],
        given: Given<'_>,
        (first, n): (usize, usize),
        (out, ahead): (&mut [Line], &mut Ahead<'_>),
    ) {
        let rows = |slot: Slot| self.rows(slot, buffers, inputs, first, n * step.repeat);
        let units: &mut [u32] = bytemuck::cast_slice_mut(out);
        let (stride, width) = (step.out.stride, step.out.width);
        match &step.kind {
            Kind::Dense { layer, base, format, relu } => {
                let mut target = Target { units, stride, format: *format, relu: *relu };
                layer.run(rows(step.x[0]), base.map(rows), &mut target, ahead);
            }
            Kind::Convert { low, per_unit, format } => {
                let mut target = Target { units, stride, format: *format, relu: false };
                convert(self.kernel, rows(step.x[0]), step.x[0].width, low, per_unit, &mut target);
            }
            Kind::Given { item, shared, format, relu } => {
                let mut target = Target { units: &mut *units, stride, format: *format, relu: *relu };
                let wide = whole(width);
                let table =
                    item.zip(given.items).map(|(column, (table, rows))| (table, column, &rows[first..first + n]));
                let shared = shared.map(|from| &given.shared[from..from + wide]);
                gather(self.kernel, table, shared, (n, wide), &mut target);
                // What a layer reads beyond the width must not be a leftover: NaN times 0 is NaN.
                let used = wide / format.precision().per_unit();
                if used < stride {
                    units.chunks_mut(stride).take(n).for_each(|row| row[used..].fill(0));
                }
            }
            Kind::Simple(simple) => {
                let mut operands = [(rows(step.x[0]), step.x[0].width); MOST_OPERANDS];
                for (operand, &slot) in operands.iter_mut().zip(&step.x) {
                    *operand = (rows(slot), slot.width);
                }
                let out = bytemuck::cast_slice_mut(units);
                simple.run(self.kernel, &operands[..step.x.len()], (n * step.repeat, width), out, stride);
            }
        }
    }
}

/// Operands of one step; longer concatenations take several.
const MOST_OPERANDS: usize = 64;

/// Gives values that are not wanted at the same time the same buffer; the new buffers' units of a row.
fn share(steps: &mut [Step], outputs: &mut [Slot], units: &[usize]) -> Vec<usize> {
    let mut last_use = vec![0; units.len()];
    for (at, step) in steps.iter().enumerate() {
        let base = match step.kind {
            Kind::Dense { base, .. } => base,
            _ => None,
        };
        for slot in step.x.iter().copied().chain(base) {
            if let Place::Buffer(buffer) = slot.place {
                last_use[buffer] = at;
            }
        }
    }
    for slot in &*outputs {
        if let Place::Buffer(buffer) = slot.place {
            last_use[buffer] = usize::MAX;
        }
    }
    let (mut shared, mut free, mut to) = (Vec::<usize>::new(), Vec::<usize>::new(), vec![0; units.len()]);
    let rename = |slot: &mut Slot, to: &[usize]| {
        if let Place::Buffer(buffer) = &mut slot.place {
            *buffer = to[*buffer];
        }
    };
    for (at, step) in steps.iter_mut().enumerate() {
        let Place::Buffer(out) = step.out.place else { continue };
        let place = free.pop().unwrap_or_else(|| {
            shared.push(0);
            shared.len() - 1
        });
        shared[place] = shared[place].max(units[out]);
        to[out] = place;
        let mut read: Vec<usize> = Vec::new();
        let base = match &mut step.kind {
            Kind::Dense { base, .. } => base.as_mut(),
            _ => None,
        };
        for slot in step.x.iter_mut().chain(base) {
            if let Place::Buffer(buffer) = slot.place {
                read.push(buffer);
            }
            rename(slot, &to);
        }
        rename(&mut step.out, &to);
        read.sort_unstable();
        read.dedup();
        free.extend(read.into_iter().filter(|&buffer| last_use[buffer] == at).map(|buffer| to[buffer]));
    }
    outputs.iter_mut().for_each(|slot| rename(slot, &to));
    shared
}

impl Compiler<'_> {
    /// Whether a product is computed in the plan's precision.
    fn is_quantised(&self, at: Id) -> bool {
        let Op::Dense { x, weights, bias, .. } = self.graph.op(at) else { return false };
        let n_inputs = weights.len() / bias.len();
        let is_input = matches!(self.graph.op(*x), Op::Input(_));
        let ranged = || {
            let range = self.plan.ranges.and_then(|ranges| ranges.get(x));
            range.is_some_and(|(low, high)| low.iter().chain(high).all(|v| v.is_finite()))
        };
        let fits = match self.plan.precision {
            Precision::F32 => false,
            Precision::Bf16 => true,
            Precision::Int8 => ranged(),
        };
        fits && bias.len() > NARROW && n_inputs >= LEAST_INPUTS && !(is_input && self.plan.exact_inputs)
    }

    /// How a value is rounded for those that read it so: what is added, units per step; one for all or by column.
    fn scale(&self, at: Id) -> (Vec<f32>, Vec<f32>) {
        let range = self.plan.ranges.and_then(|ranges| ranges.get(&at));
        match (self.plan.precision, range) {
            (Precision::Int8, Some((low, high))) => {
                let per_unit = |(low, high): (&f32, &f32)| match high - low {
                    span if span > 0.0 && span.is_finite() => 255.0 / span,
                    _ => 1.0,
                };
                (low.clone(), low.iter().zip(high).map(per_unit).collect())
            }
            // Columns that lie far from 0 would lose what tells their values apart.
            (Precision::Bf16, Some((low, high))) if matches!(self.graph.op(at), Op::Input(_)) => {
                let middle = |(low, high): (&f32, &f32)| match 0.5 * low + 0.5 * high {
                    middle if middle.is_finite() => middle,
                    _ => 0.0,
                };
                (low.iter().zip(high).map(middle).collect(), vec![1.0])
            }
            _ => (vec![0.0], vec![1.0]),
        }
    }

    fn buffer(&mut self, units: usize) -> Place {
        self.buffers.push(units);
        Place::Buffer(self.buffers.len() - 1)
    }

    fn push(&mut self, kind: Kind, x: Vec<Slot>, out: Slot, repeat: usize) -> Slot {
        self.steps.push(Step { kind, x, out, repeat });
        out
    }

    /// A step of plain loops into a new buffer.
    fn simple(&mut self, simple: Simple, x: Vec<Slot>, width: usize) -> Slot {
        let stride = padded(width);
        let out = Slot { place: self.buffer(stride), stride, width };
        self.push(Kind::Simple(simple), x, out, 1)
    }

    /// The value with rows right behind one another, as products over parts of a row need it.
    fn tight(&mut self, slot: Slot) -> Slot {
        if slot.stride == slot.width {
            return slot;
        }
        let out = Slot { place: self.buffer(slot.width), stride: slot.width, width: slot.width };
        self.push(Kind::Simple(Simple::Concat), vec![slot], out, 1)
    }

    /// The result that a product or a given value is stored as: itself, or the rectified one where that is its only reader.
    fn stored(&self, at: Id) -> (Id, bool) {
        match self.readers[at][..] {
            [reader] if self.uses[at] == 1 && *self.graph.op(reader) == Op::Unary(Unary::Relu, at) => (reader, true),
            _ => (at, false),
        }
    }

    /// The format that a product stores its result in: the plan's, where all readers want that.
    fn format(&self, stored: Id) -> Format {
        let all = self.uses[stored] == self.readers[stored].len()
            && self.readers[stored]
                .iter()
                .all(|&reader| self.is_quantised(reader) && self.reads_rounded(reader, stored));
        match self.plan.precision {
            Precision::Bf16 if all => Format::Bf16,
            Precision::Int8 if all => {
                let (low, per_unit) = self.scale(stored);
                Format::U8 { low: low[0], per_unit: per_unit[0] }
            }
            _ => Format::F32,
        }
    }

    /// Whether a product reads a value as its operand, row for row, and not as its base.
    fn reads_rounded(&self, reader: Id, value: Id) -> bool {
        matches!(self.graph.op(reader), Op::Dense { x, base, repeat: 1, .. } if *x == value && *base != Some(value))
    }

    /// Keeps a result where its readers look for it.
    fn keep(&mut self, stored: Id, format: Format, slot: Slot) {
        match format {
            Format::F32 => self.wide.insert(stored, slot),
            _ => self.narrow.insert(stored, slot),
        };
    }

    fn value(&mut self, at: Id) {
        if self.wide.contains_key(&at) || self.narrow.contains_key(&at) {
            return;
        }
        let width = self.graph.width(at);
        let wide = |compiler: &Self, x: &Id| compiler.wide[x];
        let slot = match self.graph.op(at).clone() {
            Op::Input(input) => Slot { place: Place::Input(input), stride: width, width },
            Op::Given { item, shared } => {
                let (stored, relu) = self.stored(at);
                let format = self.format(stored);
                let stride = padded(width) / format.precision().per_unit();
                let out = Slot { place: self.buffer(stride), stride, width };
                let item = item.map(|item| places(&self.graph.item_widths).0[item]);
                let shared = shared.map(|shared| places(&self.graph.shared_widths).0[shared]);
                self.push(Kind::Given { item, shared, format, relu }, Vec::new(), out, 1);
                return self.keep(stored, format, out);
            }
            Op::Dense { x, weights, bias, base, repeat } => {
                return self.dense(at, x, &weights, &bias, base, repeat);
            }
            Op::Unary(unary, x) => {
                let x = wide(self, &x);
                self.simple(Simple::Unary(unary), vec![x], width)
            }
            Op::Affine { x, gain, add } => {
                let x = wide(self, &x);
                self.simple(Simple::Affine { gain: gain.to_vec(), add: add.to_vec() }, vec![x], width)
            }
            Op::Binary(binary, a, b) => {
                let x = vec![wide(self, &a), wide(self, &b)];
                self.simple(Simple::Binary(binary), x, width)
            }
            Op::Concat(parts) => {
                let mut slots: Vec<Slot> = parts.iter().map(|part| wide(self, part)).collect();
                while slots.len() > MOST_OPERANDS {
                    let first: Vec<Slot> = slots.drain(..MOST_OPERANDS).collect();
                    let width = first.iter().map(|slot| slot.width).sum();
                    let joined = self.simple(Simple::Concat, first, width);
                    slots.insert(0, joined);
                }
                self.simple(Simple::Concat, slots, width)
            }
            Op::Take { x, columns } => {
                let mut runs: Vec<(u32, u32)> = Vec::new();
                for &column in &*columns {
                    match runs.last_mut() {
                        Some((from, len)) if *from + *len == column => *len += 1,
                        _ => runs.push((column, 1)),
                    }
                }
                let x = wide(self, &x);
                self.simple(Simple::Take(runs), vec![x], width)
            }
            Op::Sum { x, len, inner, scale } => {
                let x = wide(self, &x);
                self.simple(Simple::Sum { len, inner, scale }, vec![x], width)
            }
            Op::Softmax { x, len } => {
                let x = wide(self, &x);
                self.simple(Simple::Softmax { len }, vec![x], width)
            }
            Op::LayerNorm { x, gain, add, epsilon } => {
                let x = wide(self, &x);
                self.simple(Simple::LayerNorm { gain: gain.to_vec(), add: add.to_vec(), epsilon }, vec![x], width)
            }
            Op::Embedding { x, table, dim } => {
                let x = wide(self, &x);
                self.simple(Simple::Embedding { table, dim }, vec![x], width)
            }
            Op::MatMul { a, b, m, k, n, turned } => {
                self.flops += 2 * self.graph.width(a) * n;
                let x = vec![wide(self, &a), wide(self, &b)];
                self.simple(Simple::MatMul { m, k, n, turned }, x, width)
            }
        };
        self.wide.insert(at, slot);
    }

    fn dense(&mut self, at: Id, x: Id, weights: &[f32], bias: &[f32], base: Option<Id>, repeat: usize) {
        let quantised = self.is_quantised(at);
        let precision = if quantised { self.plan.precision } else { Precision::F32 };
        let (low, per_unit) = if quantised { self.scale(x) } else { (vec![0.0], vec![1.0]) };
        let step: Vec<f32> = per_unit.iter().map(|per_unit| 1.0 / per_unit).collect();
        let layer = Layer::new(weights, bias, precision, Scale { low: &low, step: &step }, self.plan.kernel);
        self.flops += layer.flops() * repeat;
        self.quantised_flops += if quantised { layer.flops() * repeat } else { 0 };
        let mut from = match quantised {
            true => self.rounded(x, repeat, &low, &per_unit),
            false => self.wide[&x],
        };
        if repeat > 1 && !quantised {
            from = self.tight(from);
            from = Slot { stride: from.width / repeat, width: from.width / repeat, ..from };
        }
        let base = base.map(|base| self.wide[&base]);
        let (stored, relu) = self.stored(at);
        let format = if repeat == 1 { self.format(stored) } else { Format::F32 };
        let format = if layer.n_outputs() <= NARROW { Format::F32 } else { format };
        let layer = if base.is_none() { layer.folded(format) } else { layer };
        let stride = layer.padded_outputs().div_ceil(format.precision().per_unit());
        let width = layer.n_outputs();
        let out = Slot { place: self.buffer(stride * repeat), stride, width };
        let mut out = self.push(Kind::Dense { layer, base, format, relu }, vec![from], out, repeat);
        if repeat > 1 {
            if stride != width {
                let tight = Slot { place: self.buffer(width * repeat), stride: width, width };
                out = self.push(Kind::Simple(Simple::Concat), vec![out], tight, repeat);
            }
            out = Slot { stride: width * repeat, width: width * repeat, ..out };
        }
        self.keep(stored, format, out);
    }

    /// The value in the plan's precision.
    fn rounded(&mut self, x: Id, repeat: usize, low: &[f32], per_unit: &[f32]) -> Slot {
        if let Some(&slot) = self.narrow.get(&x).filter(|_| repeat == 1) {
            return slot;
        }
        let mut from = self.wide[&x];
        if repeat > 1 {
            from = self.tight(from);
            from = Slot { stride: from.width / repeat, width: from.width / repeat, ..from };
        }
        let format = match self.plan.precision {
            Precision::Bf16 => Format::Bf16,
            _ => Format::U8 { low: 0.0, per_unit: 1.0 },
        };
        let width = from.width;
        let of = |values: &[f32], at: usize| values[if values.len() == 1 { 0 } else { at }];
        let kind = Kind::Convert {
            low: lines((0..width).map(|at| -of(low, at) * of(per_unit, at))),
            per_unit: lines((0..width).map(|at| of(per_unit, at))),
            format,
        };
        let stride = padded(width) / format.precision().per_unit();
        let out = Slot { place: self.buffer(stride * repeat), stride, width };
        let out = self.push(kind, vec![from], out, repeat);
        if repeat == 1 {
            self.narrow.insert(x, out);
        }
        out
    }
}
