//! Graphs of dense rankers compiled for kernels/dense.cu: the second back end of `ranking::dense`, over the same graph as the CPU's.
//!
//! A program keeps all values of a candidate in shared memory, each as long as it is read; a value takes the place of an operand that
//! nothing else reads where the kernel may write in place. Activations other than ReLU are steps of their own, in place.

use std::collections::HashMap;

use half::bf16;
use tastemaker_kernels::dense::{Function, NARROW_COLUMNS, NONE, Op as Does, Program, RELU, ROUND, Step, TILE};
use tastemaker_kernels::dense::{TURNED, TableNumbers, TableShape, Unary, bf16_place, f32_place};

use crate::ranking::dense::ops::{self, Graph, Id, Op};
use crate::ranking::dense::{LEAST_INPUTS, places};

/// In which numbers products are computed; sums are f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arithmetic {
    /// All in f32.
    F32,
    /// bf16 by tensor cores, but for products of candidates' own columns, of few inputs, and of up to 4 columns.
    Bf16,
}

/// Where a value lies: what is known before places are given out.
#[derive(Clone, Copy, Debug)]
struct Slot {
    /// Number of its memory; several values may have it one after the other.
    memory: usize,
    stride: u32,
    width: u32,
}

/// Words of a candidate's row that are in use from the first step to the last.
#[derive(Clone, Copy, Debug)]
struct Memory {
    words: u32,
    first: usize,
    last: usize,
}

/// Compiles a graph of one output of one column.
///
/// # Errors
/// What of it the kernel does not have.
pub fn compile(graph: &Graph, arithmetic: Arithmetic) -> Result<Program, String> {
    let &[output] = &graph.outputs[..] else { return Err(format!("{} results", graph.outputs.len())) };
    if graph.width(output) != 1 {
        return Err(format!("a result of {} columns", graph.width(output)));
    }
    let (mut readers, needed) = (vec![Vec::new(); graph.n_values()], graph.needed());
    for &at in &needed {
        graph.op(at).operands().into_iter().for_each(|x| readers[x].push(at));
    }
    let mut compiler = Compiler {
        graph,
        arithmetic,
        uses: graph.uses(),
        readers,
        // The items' rows, which the kernel begins with.
        memories: vec![Memory { words: 1, first: 0, last: 0 }],
        steps: Vec::new(),
        params: Vec::new(),
        wide: HashMap::new(),
        narrow: HashMap::new(),
        flops: 0,
    };
    for at in needed {
        compiler.value(at)?;
    }
    let score = compiler.wide(output);
    compiler.step(Step { width: 1, ..Step::new(Does::Score) }, [Some(score), None], None);
    if u32::try_from(compiler.params.len()).is_err() {
        return Err(format!("{} parameters", compiler.params.len()));
    }
    Ok(compiler.finished())
}

/// Writes a row of a table: up to `stride` values, zeros behind them. Its pieces begin at `starts`, ascending from 0, as [`places`] says.
///
/// # Panics
/// If `out` is no row of the table, or it has not as many pieces.
pub fn put_row(shape: &TableShape, starts: &[usize], values: &[f32], out: &mut [u32]) {
    assert!(out.len() == shape.row_words() && starts.len() == shape.n_pieces as usize, "a row of another table");
    out.fill(0);
    match shape.numbers {
        TableNumbers::F32 => out.iter_mut().zip(values).for_each(|(out, value)| *out = value.to_bits()),
        TableNumbers::Bf16 => {
            let half = |value: &f32| u32::from(bf16::from_f32(*value).to_bits());
            let pair = |pair: &[f32]| half(&pair[0]) | pair.get(1).map_or(0, half) << 16;
            out.iter_mut().zip(values.chunks(2)).for_each(|(out, values)| *out = pair(values));
        }
        TableNumbers::Int8 => {
            let (codes, scales) = out.split_at_mut(shape.stride as usize / 4);
            for (piece, (&start, scale)) in starts.iter().zip(scales).enumerate() {
                let end = starts.get(piece + 1).map_or(values.len(), |&end| end.min(values.len()));
                put_piece(&values[start.min(end)..end], &mut codes[start / 4..], scale);
            }
        }
    }
}

/// A piece in int8: codes, four a word, and their scale.
fn put_piece(values: &[f32], codes: &mut [u32], scale: &mut u32) {
    // A NaN stays.
    let larger = |most: f32, value: f32| if value > most || value.is_nan() { value } else { most };
    let most = values.iter().fold(0f32, |most, value| larger(most, value.abs()));
    let of = if most.is_finite() { most / 127.0 } else { f32::NAN };
    *scale = of.to_bits();
    // Whatever the codes, they are worth the same.
    if of.is_nan() || of == 0.0 {
        return;
    }
    // The low bits of the sum are the nearest whole number's, ties to even. Of subnormal numbers the scale may be so rough that it is beyond.
    let code = |value: &f32| ((value / of).clamp(-127.0, 127.0) + 12_582_912.0).to_bits() & 0xff;
    for (out, values) in codes.iter_mut().zip(values.chunks(4)) {
        *out = values.iter().rev().fold(0, |word, value| word << 8 | code(value));
    }
}

struct Compiler<'a> {
    graph: &'a Graph,
    arithmetic: Arithmetic,
    uses: Vec<usize>,
    readers: Vec<Vec<Id>>,
    memories: Vec<Memory>,
    /// With the memories of x, y and the result.
    steps: Vec<(Step, [Option<usize>; 3])>,
    params: Vec<u32>,
    /// Values in f32 and in bf16.
    wide: HashMap<Id, Slot>,
    narrow: HashMap<Id, Slot>,
    flops: usize,
}

/// Words of a row of so many values: what layers read beyond the width, and a stride that meets all banks.
fn stride(width: u32, rounded: bool) -> u32 {
    let words = if rounded { width.next_multiple_of(TILE as u32) / 2 } else { width.next_multiple_of(4) };
    // A multiple of 4 that is none of 8.
    words | 4
}

impl Compiler<'_> {
    /// Gives the program its places: for each memory the lowest that is free as long as it is needed.
    fn finished(mut self) -> Program {
        let last = self.steps.len() - 1;
        self.memories[0].last = last;
        let (mut places, mut taken, mut units) = (vec![0u32; self.memories.len()], Vec::<(u32, usize)>::new(), 0);
        let mut order: Vec<usize> = (0..self.memories.len()).collect();
        order.sort_by_key(|&at| self.memories[at].first);
        for at in order {
            let Memory { words, first, last } = self.memories[at];
            taken.retain(|&(_, other)| self.memories[other].last >= first);
            taken.sort_unstable();
            let mut place = 0;
            for &(from, other) in &taken {
                if place + words <= from {
                    break;
                }
                place = place.max(from + self.memories[other].words);
            }
            debug_assert!(last >= first);
            places[at] = place;
            taken.push((place, at));
            units = units.max(place + words);
        }
        let placed = |(mut step, [x, y, out]): (Step, [Option<usize>; 3])| {
            x.iter().for_each(|&at| step.x = places[at]);
            y.iter().for_each(|&at| step.y = places[at]);
            out.iter().for_each(|&at| step.out = places[at]);
            step
        };
        Program {
            steps: self.steps.into_iter().map(placed).collect(),
            params: self.params,
            units,
            n_columns: self.graph.inputs.iter().sum(),
            shared_width: crate::ranking::dense::places(&self.graph.shared_widths).1,
            flops: self.flops,
        }
    }

    fn memory(&mut self, words: u32) -> usize {
        let first = self.steps.len();
        self.memories.push(Memory { words, first, last: first });
        self.memories.len() - 1
    }

    /// Room for a value of the next step.
    fn slot(&mut self, width: u32, rounded: bool) -> Slot {
        let stride = stride(width, rounded);
        Slot { memory: self.memory(stride), stride, width }
    }

    /// Parameters at a 16-byte boundary; their place.
    fn keep(&mut self, params: impl IntoIterator<Item = u32>) -> u32 {
        let place = self.params.len() as u32;
        self.params.extend(params);
        self.params.resize(self.params.len().next_multiple_of(4), 0);
        place
    }

    fn keep_floats(&mut self, params: &[f32]) -> u32 {
        self.keep(params.iter().map(|param| param.to_bits()))
    }

    /// Adds a step that reads x and y and writes a value.
    fn step(&mut self, mut step: Step, [x, y]: [Option<Slot>; 2], out: Option<Slot>) {
        x.iter().for_each(|x| step.x_stride = x.stride);
        y.iter().for_each(|y| step.y_stride = y.stride);
        out.iter().for_each(|out| step.out_stride = out.stride);
        let memories = [x, y, out].map(|slot| slot.map(|slot| slot.memory));
        let at = self.steps.len();
        memories.iter().flatten().for_each(|&memory| self.memories[memory].last = at);
        self.steps.push((step, memories));
    }

    /// A step of one operand or two into a new value.
    fn made(&mut self, step: Step, x: Slot, y: Option<Slot>, width: u32) -> Slot {
        let out = self.slot(width, false);
        self.step(Step { width, fill: width.next_multiple_of(4), ..step }, [Some(x), y], Some(out));
        out
    }

    /// The same, in place where nothing else reads x.
    fn changed(&mut self, step: Step, at: Id, y: Option<Id>) -> Slot {
        let (x, y, width) = (self.wide(at), y.map(|y| self.wide(y)), self.graph.width(at) as u32);
        match self.uses[at] {
            1 => {
                self.step(Step { width, fill: width.next_multiple_of(4), ..step }, [Some(x), y], Some(x));
                x
            }
            _ => self.made(step, x, y, width),
        }
    }

    fn wide(&self, at: Id) -> Slot {
        self.wide[&at]
    }

    /// Whether a value is made of candidates' own columns alone.
    fn is_raw(&self, at: Id) -> bool {
        match self.graph.op(at) {
            Op::Input(_) => true,
            Op::Concat(parts) => parts.iter().all(|&part| self.is_raw(part)),
            Op::Take { x, .. } => self.is_raw(*x),
            _ => false,
        }
    }

    /// Whether a product is computed in bf16.
    fn is_rounded(&self, at: Id) -> bool {
        let Op::Dense { x, weights, bias, .. } = self.graph.op(at) else { return false };
        let n_inputs = weights.len() / bias.len();
        let large = bias.len() > NARROW_COLUMNS && n_inputs >= LEAST_INPUTS;
        self.arithmetic == Arithmetic::Bf16 && large && !self.is_raw(*x)
    }

    /// Whether all that read a value do so as the operand of a product in bf16.
    fn is_read_rounded(&self, at: Id) -> bool {
        let as_operand = |&reader: &Id| {
            let Op::Dense { x, base, repeat: 1, .. } = self.graph.op(reader) else { return false };
            *x == at && *base != Some(at) && self.is_rounded(reader)
        };
        self.uses[at] == self.readers[at].len() && self.readers[at].iter().all(as_operand)
    }

    /// The value that a product is stored as: itself, or the rectified one where that is its only reader.
    fn stored(&self, at: Id) -> (Id, bool) {
        match self.readers[at][..] {
            [reader] if self.uses[at] == 1 && *self.graph.op(reader) == Op::Unary(ops::Unary::Relu, at) => {
                (reader, true)
            }
            _ => (at, false),
        }
    }

    /// A value in bf16.
    fn rounded(&mut self, at: Id) -> Slot {
        if let Some(&slot) = self.narrow.get(&at) {
            return slot;
        }
        let from = self.wide(at);
        let slot = self.converted(from);
        self.narrow.insert(at, slot);
        slot
    }

    fn converted(&mut self, from: Slot) -> Slot {
        let (out, width) = (self.slot(from.width, true), from.width);
        let fill = width.next_multiple_of(TILE as u32);
        self.step(Step { width, fill, flags: ROUND, ..Step::new(Does::Each) }, [Some(from), None], Some(out));
        out
    }

    /// A step of a layer, onto the pieces and the base of what is `given`, written as its readers want it.
    fn layer(&mut self, at: Id, step: Step, x: Option<Slot>, given: Given) {
        let (stored, relu) = self.stored(at);
        let rounded = step.repeat == 1 && step.op != Does::Narrow && self.is_read_rounded(stored);
        let width = step.width * step.repeat;
        let out = self.slot(width, rounded);
        let fill = if rounded { width.next_multiple_of(TILE as u32) } else { width.next_multiple_of(4) };
        let flags = if relu { RELU } else { 0 } | if rounded { ROUND } else { 0 };
        let Given { item, piece, shared, .. } = given;
        let step = Step { item, piece, shared, fill, flags, ..step };
        self.step(step, [x, given.base], Some(out));
        if step.repeat > 1 && fill > width {
            self.step(Step { width, fill, ..Step::new(Does::Each) }, [Some(out), None], Some(out));
        }
        if rounded { &mut self.narrow } else { &mut self.wide }.insert(stored, out);
    }

    fn given(&self, item: Option<usize>, shared: Option<usize>) -> Given {
        let start = |widths: &[usize], piece: Option<usize>| piece.map_or(NONE, |piece| places(widths).0[piece] as u32);
        let piece = item.unwrap_or(0) as u32;
        let (item, shared) = (start(&self.graph.item_widths, item), start(&self.graph.shared_widths, shared));
        Given { item, piece, shared, base: None }
    }

    fn dense(&mut self, at: Id) -> Result<(), String> {
        let Op::Dense { x, weights, bias, base, repeat } = self.graph.op(at) else { return Ok(()) };
        let (n, repeat, rounded) = (bias.len(), *repeat, self.is_rounded(at));
        let (k, weight) = (weights.len() / n, |input: usize, column: usize| weights[input * n + column]);
        self.flops += 2 * k * n * repeat;
        if base.is_some() && repeat > 1 {
            return Err("a product by parts onto a base".into());
        }
        let mut given = Given { item: NONE, piece: 0, shared: NONE, base: None };
        match base.map(|base| (base, self.graph.op(base))) {
            Some((base, &Op::Given { item, shared })) if self.is_inlined(base) => given = self.given(item, shared),
            Some((base, _)) => given.base = Some(self.wide(base)),
            None => {}
        }
        let depth = if rounded { TILE } else { 4 };
        let (op, a) = match (rounded, n <= NARROW_COLUMNS) {
            (true, _) => {
                let mut packed = vec![0; n.next_multiple_of(TILE) * k.next_multiple_of(TILE) / 2];
                for (input, column) in pairs(k, n) {
                    let (word, upper) = bf16_place(k, input, column);
                    let bits = u32::from(bf16::from_f32(weight(input, column)).to_bits());
                    packed[word] |= if upper { bits << 16 } else { bits };
                }
                (Does::RoundedLayer, self.keep(packed))
            }
            (false, false) => {
                let mut packed = vec![0; n.next_multiple_of(TILE) * k.next_multiple_of(4)];
                for (input, column) in pairs(k, n) {
                    packed[f32_place(k, input, column)] = weight(input, column).to_bits();
                }
                (Does::Layer, self.keep(packed))
            }
            (false, true) => {
                let turned: Vec<f32> =
                    (0..n).flat_map(|column| (0..k).map(move |input| weight(input, column))).collect();
                (Does::Narrow, self.keep_floats(&turned))
            }
        };
        let filled = if op == Does::Narrow { 4 } else { n.next_multiple_of(TILE) };
        let b = self.keep((0..filled).map(|column| bias.get(column).map_or(0, |bias| bias.to_bits())));
        let mut part = k as u32;
        let operand = if repeat == 1 {
            if rounded { self.rounded(*x) } else { self.wide(*x) }
        } else {
            let mut slot = self.wide(*x);
            // Parts are read in whole accesses: each at a boundary, with zeros behind it.
            if op != Does::Narrow && (rounded || !k.is_multiple_of(depth)) {
                let wide = k.next_multiple_of(depth);
                let from = |at: usize| if at % wide < k { (at / wide * k + at % wide) as u32 } else { NONE };
                let a = self.keep((0..wide * repeat).map(from));
                slot = self.made(Step { a, ..Step::new(Does::Take) }, slot, None, (wide * repeat) as u32);
                part = wide as u32;
            }
            if rounded {
                slot = self.converted(slot);
                part /= 2;
            }
            slot
        };
        let step = Step { width: n as u32, k: k as u32, repeat: repeat as u32, x_part: part, a, b, ..Step::new(op) };
        self.layer(at, step, Some(operand), given);
        Ok(())
    }

    /// Whether pieces that are given are read where they are added, and lie nowhere.
    fn is_inlined(&self, at: Id) -> bool {
        let as_base = |&reader: &Id| {
            let Op::Dense { x, base, repeat: 1, .. } = self.graph.op(reader) else { return false };
            *base == Some(at) && *x != at
        };
        self.uses[at] == self.readers[at].len() && self.readers[at].iter().all(as_base)
    }

    fn value(&mut self, at: Id) -> Result<(), String> {
        if self.wide.contains_key(&at) || self.narrow.contains_key(&at) {
            return Ok(());
        }
        let width = self.graph.width(at) as u32;
        let slot = match self.graph.op(at) {
            Op::Input(input) => {
                let k = self.graph.inputs[..*input].iter().sum::<usize>() as u32;
                let out = self.slot(width, false);
                let step = Step { width, fill: width.next_multiple_of(4), k, ..Step::new(Does::Load) };
                self.step(step, [None, None], Some(out));
                out
            }
            Op::Given { .. } if self.is_inlined(at) => return Ok(()),
            &Op::Given { item, shared } => {
                let given = self.given(item, shared);
                self.layer(at, Step { width, ..Step::new(Does::Layer) }, None, given);
                return Ok(());
            }
            Op::Dense { .. } => return self.dense(at),
            Op::Unary(unary, x) => {
                let (function, p, q) = function(*unary);
                let step = Step { function: Function::Unary(function), p, q, ..Step::new(Does::Each) };
                if self.is_read_rounded(at) {
                    let (from, out) = (self.wide(*x), self.slot(width, true));
                    let step = Step { width, fill: width.next_multiple_of(TILE as u32), flags: ROUND, ..step };
                    self.step(step, [Some(from), None], Some(out));
                    self.narrow.insert(at, out);
                    return Ok(());
                }
                self.changed(step, *x, None)
            }
            Op::Affine { x, gain, add } => {
                let (a, b) = (self.keep_floats(gain), self.keep_floats(add));
                let function = Function::Unary(Unary::Affine);
                self.changed(Step { function, a, b, ..Step::new(Does::Each) }, *x, None)
            }
            Op::Binary(binary, x, y) => {
                let function = Function::Binary(*binary);
                let n = self.graph.width(*y) as u32;
                self.changed(Step { function, n, ..Step::new(Does::Pair) }, *x, Some(*y))
            }
            Op::Concat(parts) => {
                let (out, mut k) = (self.slot(width, false), 0);
                for (number, &part) in parts.iter().enumerate() {
                    let (x, is_last) = (self.wide(part), number + 1 == parts.len());
                    let fill = if is_last { width.next_multiple_of(4) - k } else { x.width };
                    let step = Step { width: x.width, fill, k, ..Step::new(Does::Take) };
                    self.step(step, [Some(x), None], Some(out));
                    k += x.width;
                }
                out
            }
            Op::Take { x, columns } => {
                let (x, a) = (self.wide(*x), self.keep(columns.iter().copied()));
                self.made(Step { a, ..Step::new(Does::Take) }, x, None, width)
            }
            &Op::Sum { x, len, inner, scale } => {
                let step = Step { m: len as u32, n: inner as u32, p: scale, ..Step::new(Does::Sum) };
                self.made(step, self.wide(x), None, width)
            }
            &Op::Softmax { x, len } => {
                self.made(Step { m: len as u32, ..Step::new(Does::Softmax) }, self.wide(x), None, width)
            }
            Op::LayerNorm { x, gain, add, epsilon } => {
                let (x, m, p) = (self.wide(*x), gain.len() as u32, *epsilon);
                let (a, b) = (self.keep_floats(gain), self.keep_floats(add));
                self.made(Step { m, a, b, p, ..Step::new(Does::Norm) }, x, None, width)
            }
            Op::Embedding { x, table, dim } => {
                let (x, a) = (self.wide(*x), self.keep_floats(table));
                let (k, m) = ((table.len() / dim) as u32, *dim as u32);
                self.made(Step { k, m, a, ..Step::new(Does::Embed) }, x, None, width)
            }
            &Op::MatMul { a, b, m, k, n, turned } => {
                self.flops += 2 * self.graph.width(a) * n;
                let (m, k, n) = (m as u32, k as u32, n as u32);
                let step = Step { m, k, n, flags: if turned { TURNED } else { 0 }, ..Step::new(Does::Multiply) };
                self.made(step, self.wide(a), Some(self.wide(b)), width)
            }
        };
        self.wide.insert(at, slot);
        Ok(())
    }
}

/// What the sums of a layer start with beside its bias.
#[derive(Clone, Copy)]
struct Given {
    item: u32,
    piece: u32,
    shared: u32,
    base: Option<Slot>,
}

fn pairs(k: usize, n: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..k).flat_map(move |input| (0..n).map(move |column| (input, column)))
}

/// A function of one value and its parameters, as the kernel has it.
fn function(unary: ops::Unary) -> (Unary, f32, f32) {
    match unary {
        ops::Unary::Relu => (Unary::Relu, 0.0, 0.0),
        ops::Unary::LeakyRelu { slope } => (Unary::Leaky, slope, 0.0),
        ops::Unary::Sigmoid => (Unary::Sigmoid, 0.0, 0.0),
        ops::Unary::Tanh => (Unary::Tanh, 0.0, 0.0),
        ops::Unary::Gelu => (Unary::Gelu, 0.0, 0.0),
        ops::Unary::Silu => (Unary::Silu, 0.0, 0.0),
        ops::Unary::Softplus => (Unary::Softplus, 0.0, 0.0),
        ops::Unary::Elu { alpha } => (Unary::Elu, alpha, 0.0),
        ops::Unary::Erf => (Unary::Erf, 0.0, 0.0),
        ops::Unary::Exp => (Unary::Exp, 0.0, 0.0),
        ops::Unary::Log => (Unary::Log, 0.0, 0.0),
        ops::Unary::Sqrt | ops::Unary::Pow { power: 0.5 } => (Unary::Sqrt, 0.0, 0.0),
        ops::Unary::Abs => (Unary::Abs, 0.0, 0.0),
        ops::Unary::Reciprocal => (Unary::Reciprocal, 0.0, 0.0),
        ops::Unary::Pow { power: 2.0 } => (Unary::Square, 0.0, 0.0),
        ops::Unary::Pow { power } => (Unary::Power, power, 0.0),
        ops::Unary::Clip { low, high } => (Unary::Clip, low, high),
    }
}
