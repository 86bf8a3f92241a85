//! The arithmetic of a block of rows: matrix products in f32, bf16 and int8, fused with what follows them.
//!
//! A layer's weights lie in panels of up to 64 columns, and a tile of a few rows by one panel is summed up in registers, as in
//! every fast matrix product (Goto and van de Geijn, ACM TOMS 34(3), 2008). A row's result does not depend on the rows beside it.
//!
//! Values lie in 32-bit units: one f32, two bf16, or four 8-bit values, of which a product instruction takes one each for every
//! column. NaN and infinities pass through f32 and bf16; on the way into 8 bits NaN becomes the least value of the range
//! and what lies outside it the nearest end.
#![allow(unsafe_code)] // Calls of functions compiled for CPU features that were detected, and reads at places checked before.

#[cfg(target_arch = "x86_64")]
mod x86;

use bytemuck::{Pod, Zeroable};

use crate::index::Kernel;

/// Values of a register.
pub const LANES: usize = 16;
/// Layers of at most so many columns are computed by dot products: a panel would be mostly padding.
pub const NARROW: usize = 4;
/// Units of a tile for each cache line that is asked for meanwhile; lines for a tile at most.
const UNITS_AHEAD: usize = 4;
const MOST_AHEAD: usize = 128;
/// Rows of a narrow layer that are summed up together, so that no sum waits for itself.
const TOGETHER: usize = 4;
/// How many rows ahead of its use a row of a table is asked for.
const AHEAD: usize = 6;

/// A cache line: what a register takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C, align(64))]
pub struct Line(pub [u32; LANES]);

impl Line {
    fn floats(&self) -> &[f32; LANES] {
        bytemuck::cast_ref(&self.0)
    }
}

/// In which numbers products are computed; sums are f32, for int8 exact 32-bit integers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 24 significant bits.
    F32,
    /// 8 significant bits, the range of f32.
    Bf16,
    /// 8-bit integers: values on a scale that a sample showed, weights on a scale per column.
    Int8,
}

impl Precision {
    /// Values in a 32-bit unit.
    pub fn per_unit(self) -> usize {
        match self {
            Precision::F32 => 1,
            Precision::Bf16 => 2,
            Precision::Int8 => 4,
        }
    }

    /// Whether this CPU computes in it faster than in the next wider one.
    pub fn is_native(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        match self {
            Precision::F32 => true,
            Precision::Bf16 => is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512bw"),
            Precision::Int8 => is_x86_feature_detected!("avx512vnni"),
        }
        #[cfg(not(target_arch = "x86_64"))]
        return self == Precision::F32;
    }

    /// As it is written in manifests.
    pub fn name(self) -> &'static str {
        match self {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
            Precision::Int8 => "int8",
        }
    }
}

/// How values are written: 8-bit ones as `(v - low) * steps_per_unit`, rounded to even.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Format {
    F32,
    Bf16,
    U8 { low: f32, per_unit: f32 },
}

impl Format {
    pub fn precision(self) -> Precision {
        match self {
            Format::F32 => Precision::F32,
            Format::Bf16 => Precision::Bf16,
            Format::U8 { .. } => Precision::Int8,
        }
    }
}

/// Rows that a kernel reads; `stride` units from one to the next.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    pub units: &'a [u32],
    pub stride: usize,
    pub n: usize,
}

impl<'a> Rows<'a> {
    /// The first `width` units of a row.
    #[inline(always)]
    pub fn row(&self, at: usize, width: usize) -> &'a [u32] {
        &self.units[at * self.stride..at * self.stride + width]
    }

    /// The first `width` values of a row of f32.
    #[inline(always)]
    pub fn floats(&self, at: usize, width: usize) -> &'a [f32] {
        bytemuck::cast_slice(self.row(at, width))
    }
}

/// Rows that a kernel writes, in whole registers: every row has room for its columns rounded up to 16.
pub struct Target<'a> {
    pub units: &'a mut [u32],
    pub stride: usize,
    pub format: Format,
    /// Negative values become 0; NaN stays.
    pub relu: bool,
}

/// What is read next, asked for line by line while products are computed: the arithmetic leaves memory idle.
pub struct Ahead<'a> {
    /// Until it has ended.
    runs: Option<&'a mut dyn Iterator<Item = &'a [u32]>>,
    left: &'a [u32],
    /// The next lines to ask for.
    lines: [*const u32; MOST_AHEAD],
}

impl<'a> Ahead<'a> {
    /// Asks for `runs` of memory one after another.
    pub fn new(runs: &'a mut dyn Iterator<Item = &'a [u32]>) -> Self {
        Ahead { runs: Some(runs), left: &[], lines: [std::ptr::null(); MOST_AHEAD] }
    }

    /// The next cache lines, `n` and [`MOST_AHEAD`] at most.
    pub(super) fn next(&mut self, n: usize) -> &[*const u32] {
        let (mut at, n) = (0, n.min(MOST_AHEAD));
        while let Some(runs) = self.runs.as_mut().filter(|_| at < n) {
            if self.left.is_empty() {
                match runs.next() {
                    Some(run) => self.left = run,
                    None => self.runs = None,
                }
            }
            let (some, left) = self.left.split_at(self.left.len().min((n - at) * LANES));
            let count = some.len().div_ceil(LANES);
            let lines = self.lines[at..at + count].iter_mut().enumerate();
            lines.for_each(|(line, place)| *place = some.as_ptr().wrapping_add(line * LANES));
            (at, self.left) = (at + count, left);
        }
        &self.lines[..at]
    }
}

/// Which code computes a layer; only made for what the CPU has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Code {
    #[cfg(target_arch = "x86_64")]
    Avx512(Precision),
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable(Precision),
}

impl Code {
    fn choose(kernel: Kernel, precision: Precision) -> Self {
        match kernel {
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512 if precision.is_native() => Code::Avx512(precision),
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512 | Kernel::Avx2 if precision == Precision::F32 => Code::Avx2,
            _ => Code::Portable(precision),
        }
    }
}

/// How a layer's operand was made 8-bit, or moved before it was rounded: `v = low + step * q`, by input.
#[derive(Clone, Copy, Debug)]
pub struct Scale<'a> {
    /// `[n_inputs]`, or one value for all.
    pub low: &'a [f32],
    /// `[n_inputs]`, or one value for all.
    pub step: &'a [f32],
}

impl Scale<'_> {
    /// Values as they are.
    pub const NONE: Scale<'static> = Scale { low: &[0.0], step: &[1.0] };

    fn at(&self, input: usize) -> (f64, f64) {
        let of = |values: &[f32]| f64::from(values[if values.len() == 1 { 0 } else { input }]);
        (of(self.low), of(self.step))
    }
}

/// A layer as it is computed: `x · weights + bias`.
pub struct Layer {
    n_inputs: usize,
    n_outputs: usize,
    /// Of the operand.
    precision: Precision,
    code: Code,
    /// `[panels, units, n_lanes]`; narrow: f32 `[n_outputs, ceil(n_inputs / 16)]`.
    weights: Vec<Line>,
    /// f32 `[panels, n_lanes]`; narrow: one value per output.
    bias: Vec<Line>,
    /// f32, as long as `bias`: what an int8 sum is worth; not used in other precisions.
    worth: Vec<Line>,
    /// Registers' worth of columns in a panel; 0: narrow.
    n_lanes: usize,
    /// Sums are in steps of the 8-bit values that are written.
    steps: bool,
}

impl Layer {
    /// Packs `weights`, `[n_inputs, n_outputs]` row-major, for operands of a precision and scale; narrow layers read f32 only.
    pub fn new(weights: &[f32], bias: &[f32], precision: Precision, scale: Scale<'_>, kernel: Kernel) -> Self {
        let n_outputs = bias.len();
        assert!(n_outputs > NARROW || precision == Precision::F32, "a narrow layer reads f32");
        let n_inputs = weights.len() / n_outputs.max(1);
        let code = Code::choose(kernel, precision);
        let n_lanes = match code {
            _ if n_outputs <= NARROW => 0,
            #[cfg(target_arch = "x86_64")]
            Code::Avx512(_) if n_outputs > 2 * LANES => 4,
            #[cfg(target_arch = "x86_64")]
            Code::Avx512(_) if n_outputs > LANES => 2,
            _ => 1,
        };
        let mut layer = Layer {
            n_inputs,
            n_outputs,
            precision,
            code,
            weights: Vec::new(),
            bias: Vec::new(),
            worth: Vec::new(),
            n_lanes,
            steps: false,
        };
        let units = layer.n_units();
        let per_unit = precision.per_unit();
        let across = n_inputs.div_ceil(LANES);
        let panels = match n_lanes {
            0 => n_outputs,
            lanes => n_outputs.div_ceil(lanes * LANES),
        };
        layer.weights = vec![Line::default(); if n_lanes == 0 { n_outputs * across } else { panels * units * n_lanes }];
        layer.bias = vec![Line::default(); panels * n_lanes.max(1)];
        layer.worth = layer.bias.clone();
        for output in 0..n_outputs {
            let scaled = |input: usize| f64::from(weights[input * n_outputs + output]) * scale.at(input).1;
            let largest = (0..n_inputs).map(|input| scaled(input).abs()).fold(0.0, f64::max);
            // What an integer weight is worth; any number does for a column of zeros.
            let worth = match precision == Precision::Int8 && largest > 0.0 && largest.is_finite() {
                true => largest / 127.0,
                false => 1.0,
            };
            let mut offset = f64::from(bias[output]);
            for input in 0..n_inputs {
                let (low, step) = scale.at(input);
                // The bits of the weight, and the weight that they stand for.
                let (bits, kept) = match precision {
                    Precision::F32 => ((scaled(input) as f32).to_bits(), scaled(input)),
                    Precision::Bf16 => {
                        let rounded = half::bf16::from_f64(scaled(input));
                        (u32::from(rounded.to_bits()), rounded.to_f64())
                    }
                    Precision::Int8 => {
                        let rounded = (scaled(input) / worth).round_ties_even().clamp(-127.0, 127.0);
                        (u32::from(rounded as i8 as u8), rounded * worth)
                    }
                };
                if low != 0.0 {
                    offset += low / step * kept;
                }
                let (line, lane, shift) = match n_lanes {
                    0 => (output * across + input / LANES, input % LANES, 0),
                    lanes => {
                        let (panel, column) = (output / (lanes * LANES), output % (lanes * LANES));
                        let line = (panel * units + input / per_unit) * lanes + column / LANES;
                        (line, column % LANES, input % per_unit * (32 / per_unit))
                    }
                };
                layer.weights[line].0[lane] |= bits << shift;
            }
            let (line, lane) = match n_lanes {
                0 => (output, 0),
                _ => (output / LANES, output % LANES),
            };
            layer.bias[line].0[lane] = (offset as f32).to_bits();
            layer.worth[line].0[lane] = (worth as f32).to_bits();
        }
        layer
    }

    /// The same for 8-bit results in one format only, rectified or not, and no base: the step is folded into what sums are worth.
    /// Other layers are left as they are, and those whose results might lie beyond what 32-bit integers hold.
    pub fn folded(mut self, format: Format) -> Self {
        let (Format::U8 { low, per_unit }, Precision::Int8) = (format, self.precision) else { return self };
        let scaled = |lines: &[Line], of: &dyn Fn(f32) -> f32| -> Vec<Line> {
            lines.iter().map(|line| Line(line.floats().map(|v| of(v).to_bits()))).collect()
        };
        let (worth, bias) = (scaled(&self.worth, &|v| v * per_unit), scaled(&self.bias, &|v| (v - low) * per_unit));
        // NaN is not within.
        let within = |lines: &[Line], most: f32| lines.iter().flat_map(|line| line.floats()).all(|v| v.abs() <= most);
        let largest_sum = (255 * 127 * self.n_inputs) as f32;
        if within(&worth, 2f32.powi(29) / largest_sum) && within(&bias, 2f32.powi(29)) {
            (self.worth, self.bias, self.steps) = (worth, bias, true);
        }
        self
    }

    /// Columns of the result.
    pub fn n_outputs(&self) -> usize {
        self.n_outputs
    }

    /// Values of a result row, padding included.
    pub fn padded_outputs(&self) -> usize {
        match self.n_lanes {
            0 => self.n_outputs,
            _ => self.bias.len() * LANES,
        }
    }

    /// Units that are read of each row.
    pub fn n_units(&self) -> usize {
        self.n_inputs.div_ceil(self.precision.per_unit())
    }

    /// Multiplications and additions per row.
    pub fn flops(&self) -> usize {
        2 * self.n_inputs * self.n_outputs
    }

    /// `rows · weights` + the layer's bias, + a row of `base` (f32, as wide as the result) where that is given, into `out`.
    ///
    /// # Panics
    /// If rows or `out` are too short. A narrow layer writes f32 whatever the format.
    pub fn run(&self, rows: Rows<'_>, base: Option<Rows<'_>>, out: &mut Target<'_>, ahead: &mut Ahead<'_>) {
        if rows.n == 0 {
            return;
        }
        let last = rows.n - 1;
        let per_row = self.padded_outputs() / if self.n_lanes == 0 { 1 } else { out.format.precision().per_unit() };
        assert!(rows.units.len() >= last * rows.stride + self.n_units(), "rows that are too short");
        assert!(out.units.len() >= last * out.stride + per_row, "a result that does not fit");
        assert!(!self.steps || (base.is_none() && matches!(out.format, Format::U8 { .. })), "what it was folded for");
        if let Some(base) = base {
            assert!(base.units.len() >= last * base.stride + self.padded_outputs(), "a base that is too short");
        }
        match self.code {
            // SAFETY, here and below: the code was chosen after its features were detected on this CPU; places were checked.
            #[cfg(target_arch = "x86_64")]
            Code::Avx512(Precision::F32) => unsafe { x86::f32_avx512(self, rows, base, out, ahead) },
            #[cfg(target_arch = "x86_64")]
            Code::Avx512(Precision::Bf16) => unsafe { x86::bf16_avx512(self, rows, base, out, ahead) },
            #[cfg(target_arch = "x86_64")]
            Code::Avx512(Precision::Int8) => unsafe { x86::int8_avx512(self, rows, base, out, ahead) },
            #[cfg(target_arch = "x86_64")]
            Code::Avx2 => unsafe { x86::f32_avx2(self, rows, base, out, ahead) },
            Code::Portable(Precision::F32) => unsafe { small::<[f32; LANES], F32>(self, rows, base, out, ahead) },
            Code::Portable(Precision::Bf16) => unsafe { small::<[f32; LANES], Bf16>(self, rows, base, out, ahead) },
            Code::Portable(Precision::Int8) => unsafe { small::<[f32; LANES], Int8>(self, rows, base, out, ahead) },
        }
    }
}

/// Sixteen f32 in registers. Its functions are inlined into those compiled for the features that they need.
trait Vector: Copy {
    /// # Safety
    /// The CPU has the features of the implementation; so with all the others.
    unsafe fn load(lanes: &[f32; LANES]) -> Self;
    unsafe fn splat(value: f32) -> Self;
    unsafe fn add(self, other: Self) -> Self;
    /// `self * other + sums`, by lane.
    unsafe fn mul_add(self, other: Self, sums: Self) -> Self;
    /// Negative lanes become 0; NaN stays.
    unsafe fn relu(self) -> Self;
    /// What is more becomes `most`; NaN stays.
    unsafe fn at_most(self, most: f32) -> Self;
    unsafe fn store(self, out: &mut [f32; LANES]);
    /// To the nearest bf16, ties to even; NaN stays.
    unsafe fn store_bf16(self, out: &mut [u16; LANES]);
    /// To the nearest of 0 to 255, ties to even; NaN becomes 0.
    unsafe fn store_u8(self, out: &mut [u8; LANES]);
    /// The same of several side by side, of which none is 2^31 or more.
    #[inline(always)]
    unsafe fn store_u8s<const N: usize>(values: [Self; N], out: &mut [[u8; LANES]; N]) {
        values.into_iter().zip(out).for_each(|(value, out)| unsafe { value.store_u8(out) });
    }
    unsafe fn load_bf16(lanes: &[u16; LANES]) -> Self;
    /// Of all lanes: halves added until one is left, the same in every implementation.
    unsafe fn sum(self) -> f32;
}

impl Vector for [f32; LANES] {
    #[inline(always)]
    unsafe fn load(lanes: &[f32; LANES]) -> Self {
        *lanes
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        [value; LANES]
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        std::array::from_fn(|at| self[at] + other[at])
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
    unsafe fn at_most(self, most: f32) -> Self {
        self.map(|v| if v > most { most } else { v })
    }

    #[inline(always)]
    unsafe fn store(self, out: &mut [f32; LANES]) {
        *out = self;
    }

    #[inline(always)]
    unsafe fn store_bf16(self, out: &mut [u16; LANES]) {
        *out = self.map(|v| half::bf16::from_f32(v).to_bits());
    }

    #[inline(always)]
    unsafe fn store_u8(self, out: &mut [u8; LANES]) {
        // `as` turns NaN into 0 and what lies outside into the nearest end.
        *out = self.map(|v| v.round_ties_even() as u8);
    }

    #[inline(always)]
    unsafe fn load_bf16(lanes: &[u16; LANES]) -> Self {
        lanes.map(|bits| f32::from_bits(u32::from(bits) << 16))
    }

    #[inline(always)]
    unsafe fn sum(mut self) -> f32 {
        for half in [8, 4, 2, 1] {
            for lane in 0..half {
                self[lane] += self[lane + half];
            }
        }
        self[0]
    }
}

/// A precision's products of one unit with a register of weights.
trait Product<V: Vector> {
    type Sums: Copy;
    type Weights: Copy;
    /// # Safety
    /// As for [`Vector`]; so with all the others.
    unsafe fn zero() -> Self::Sums;
    unsafe fn weights(line: &Line) -> Self::Weights;
    unsafe fn add(sums: Self::Sums, unit: u32, weights: Self::Weights) -> Self::Sums;
    /// Whether sums are integers, worth something else.
    const WORTH: bool;
    unsafe fn floats(sums: Self::Sums) -> V;

    /// Writes a row of steps, what [`Layer::folded`] makes of sums: `worth` and `bias` are `[N]`.
    #[inline(always)]
    unsafe fn store_steps<const N: usize>(sums: [Self::Sums; N], worth: *const Line, bias: *const Line, out: *mut u32) {
        // SAFETY: by contract.
        unsafe {
            let steps = std::array::from_fn(|lane| {
                let (worth, bias) = (V::load((*worth.add(lane)).floats()), V::load((*bias.add(lane)).floats()));
                Self::floats(sums[lane]).mul_add(worth, bias)
            });
            V::store_u8s::<N>(steps, &mut *out.cast());
        }
    }
}

struct F32;
struct Bf16;
struct Int8;

impl<V: Vector> Product<V> for F32 {
    type Sums = V;
    type Weights = V;

    #[inline(always)]
    unsafe fn zero() -> V {
        unsafe { V::splat(0.0) }
    }

    #[inline(always)]
    unsafe fn weights(line: &Line) -> V {
        unsafe { V::load(line.floats()) }
    }

    #[inline(always)]
    unsafe fn add(sums: V, unit: u32, weights: V) -> V {
        unsafe { V::splat(f32::from_bits(unit)).mul_add(weights, sums) }
    }

    const WORTH: bool = false;

    #[inline(always)]
    unsafe fn floats(sums: V) -> V {
        sums
    }
}

/// Two products a lane, the odd one first, as the instruction does it.
impl Product<[f32; LANES]> for Bf16 {
    type Sums = [f32; LANES];
    type Weights = Line;

    #[inline(always)]
    unsafe fn zero() -> Self::Sums {
        [0.0; LANES]
    }

    #[inline(always)]
    unsafe fn weights(line: &Line) -> Line {
        *line
    }

    #[inline(always)]
    unsafe fn add(sums: Self::Sums, unit: u32, weights: Line) -> Self::Sums {
        let (odd, even) = (|bits: u32| f32::from_bits(bits & 0xffff_0000), |bits: u32| f32::from_bits(bits << 16));
        std::array::from_fn(|at| {
            let weight = weights.0[at];
            sums[at] + odd(unit) * odd(weight) + even(unit) * even(weight)
        })
    }

    const WORTH: bool = false;

    #[inline(always)]
    unsafe fn floats(sums: Self::Sums) -> [f32; LANES] {
        sums
    }
}

impl Product<[f32; LANES]> for Int8 {
    type Sums = [i32; LANES];
    type Weights = Line;

    #[inline(always)]
    unsafe fn zero() -> Self::Sums {
        [0; LANES]
    }

    #[inline(always)]
    unsafe fn weights(line: &Line) -> Line {
        *line
    }

    #[inline(always)]
    unsafe fn add(sums: Self::Sums, unit: u32, weights: Line) -> Self::Sums {
        let values = unit.to_le_bytes();
        std::array::from_fn(|at| {
            let weights = weights.0[at].to_le_bytes();
            let products = values.iter().zip(weights).map(|(&v, w)| i32::from(v) * i32::from(w as i8));
            products.fold(sums[at], i32::wrapping_add)
        })
    }

    const WORTH: bool = true;

    #[inline(always)]
    unsafe fn floats(sums: Self::Sums) -> [f32; LANES] {
        sums.map(|sum| sum as f32)
    }
}

/// How a register is written; a constant, so that the choice is made once for a whole tile.
mod to {
    pub const F32: u8 = 0;
    pub const F32_RELU: u8 = 1;
    pub const BF16: u8 = 2;
    pub const BF16_RELU: u8 = 3;
    pub const U8: u8 = 4;
    pub const U8_RELU: u8 = 5;
    /// Values that are steps already.
    pub const STEPS: u8 = 6;
}

/// Calls a function for the constant that a target asks for: `with_target!(out, steps, function::<A, B>(arguments))`.
macro_rules! with_target {
    ($out:expr, $steps:expr, $function:ident::<$($generic:tt),*>($($argument:expr),*)) => {
        match ($out.format, $out.relu) {
            (Format::F32, false) => $function::<$($generic,)* { to::F32 }>($($argument),*),
            (Format::F32, true) => $function::<$($generic,)* { to::F32_RELU }>($($argument),*),
            (Format::Bf16, false) => $function::<$($generic,)* { to::BF16 }>($($argument),*),
            (Format::Bf16, true) => $function::<$($generic,)* { to::BF16_RELU }>($($argument),*),
            (Format::U8 { .. }, _) if $steps => $function::<$($generic,)* { to::STEPS }>($($argument),*),
            (Format::U8 { .. }, false) => $function::<$($generic,)* { to::U8 }>($($argument),*),
            (Format::U8 { .. }, true) => $function::<$($generic,)* { to::U8_RELU }>($($argument),*),
        }
    };
}

/// What 8-bit values are multiplied by, and what is added then.
#[inline(always)]
unsafe fn steps<V: Vector>(format: Format) -> [V; 2] {
    let (low, per_unit) = match format {
        Format::U8 { low, per_unit } => (low, per_unit),
        _ => (0.0, 1.0),
    };
    // SAFETY: by contract.
    unsafe { [V::splat(per_unit), V::splat(-low * per_unit)] }
}

/// Writes 16 values from column `column` of the row that begins at `place`.
///
/// # Safety
/// As for [`Vector`], and there is room; so with the callers.
#[inline(always)]
unsafe fn store<V: Vector, const TO: u8>(value: V, place: *mut u32, column: usize, [scale, shift]: [V; 2]) {
    // SAFETY: by contract. Units may be read and written as any numbers.
    unsafe {
        let value = if matches!(TO, to::F32_RELU | to::BF16_RELU | to::U8_RELU) { value.relu() } else { value };
        match TO {
            to::F32 | to::F32_RELU => value.store(&mut *place.add(column).cast()),
            to::BF16 | to::BF16_RELU => value.store_bf16(&mut *place.add(column / 2).cast()),
            to::STEPS => value.store_u8(&mut *place.add(column / 4).cast()),
            _ => value.mul_add(scale, shift).store_u8(&mut *place.add(column / 4).cast()),
        }
    }
}

/// Adds the products of one unit of `R` rows, `stride` from one to the next, with `N` registers of weights. Inlined always, or the sums
/// would have places in memory.
#[inline(always)]
unsafe fn add<V: Vector, P: Product<V>, const R: usize, const N: usize>(
    sums: &mut [[P::Sums; N]; R],
    weights: *const Line,
    values: *const u32,
    stride: usize,
) {
    // SAFETY: by contract.
    unsafe {
        let weights: [P::Weights; N] = std::array::from_fn(|lane| P::weights(&*weights.add(lane)));
        #[expect(clippy::needless_range_loop, reason = "constant places, or the sums would have one in memory")]
        for r in 0..R {
            let value = *values.add(r * stride);
            for lane in 0..N {
                sums[r][lane] = P::add(sums[r][lane], value, weights[lane]);
            }
        }
    }
}

/// `R` rows by one panel of `N` registers: the sums stay in registers until they are put into `kept`, from where they are finished.
/// Finished right away, in loops too long to unroll, they would live in memory from the beginning; steps of a wide panel are few
/// instructions, and are. Between products, lines of `ahead` are asked for: all at once would hold up the loads of weights.
///
/// # Safety
/// As for [`Vector`]; rows, base and `out` are as long as [`Layer::run`] demands. So with the callers.
#[inline(always)]
unsafe fn tile<V: Vector, P: Product<V>, const R: usize, const N: usize>(
    (layer, panel): (&Layer, usize),
    rows: Rows<'_>,
    base: Option<Rows<'_>>,
    out: &mut Target<'_>,
    row: usize,
    kept: &mut [[[f32; LANES]; N]; R],
    ahead: &[*const u32],
) {
    // SAFETY: by contract.
    unsafe {
        let units = layer.n_units();
        let weights = layer.weights.as_ptr().add(panel * units * N);
        let values = rows.units.as_ptr().add(row * rows.stride);
        let mut sums = [[P::zero(); N]; R];
        let groups = units / UNITS_AHEAD;
        for group in 0..groups {
            if let Some(&line) = ahead.get(group) {
                crate::memory::prefetch_place(line);
            }
            for unit in group * UNITS_AHEAD..(group + 1) * UNITS_AHEAD {
                add::<V, P, R, N>(&mut sums, weights.add(unit * N), values.add(unit), rows.stride);
            }
        }
        for unit in groups * UNITS_AHEAD..units {
            add::<V, P, R, N>(&mut sums, weights.add(unit * N), values.add(unit), rows.stride);
        }
        if P::WORTH && layer.steps && N == 4 {
            let (worth, bias) = (layer.worth.as_ptr().add(panel * N), layer.bias.as_ptr().add(panel * N));
            let place = out.units.as_mut_ptr().add(row * out.stride + panel * N * LANES / 4);
            for (r, sums) in sums.into_iter().enumerate() {
                P::store_steps(sums, worth, bias, place.add(r * out.stride));
            }
            return;
        }
        for r in 0..R {
            for lane in 0..N {
                P::floats(sums[r][lane]).store(&mut kept[r][lane]);
            }
        }
        match base {
            Some(base) => {
                let base = Some((base.units.as_ptr().add(row * base.stride).cast::<f32>(), base.stride));
                with_target!(out, layer.steps, finish::<V, P, R, N>(layer, panel, kept, base, out, row));
            }
            None => with_target!(out, layer.steps, finish::<V, P, R, N>(layer, panel, kept, None, out, row)),
        }
    }
}

/// Adds the bias, and the base where there is one, to the sums of a tile and writes them.
#[inline(always)]
unsafe fn finish<V: Vector, P: Product<V>, const R: usize, const N: usize, const TO: u8>(
    layer: &Layer,
    panel: usize,
    sums: &[[[f32; LANES]; N]; R],
    base: Option<(*const f32, usize)>,
    out: &mut Target<'_>,
    row: usize,
) {
    // SAFETY: by contract.
    unsafe {
        let scale = steps::<V>(out.format);
        let place = out.units.as_mut_ptr().add(row * out.stride);
        for lane in 0..N {
            let line = panel * N + lane;
            let (bias, worth) = (layer.bias.get_unchecked(line), layer.worth.get_unchecked(line));
            let (bias, worth) = (V::load(bias.floats()), V::load(worth.floats()));
            for (r, sums) in sums.iter().enumerate() {
                let sum = V::load(&sums[lane]);
                let mut value = if P::WORTH { sum.mul_add(worth, bias) } else { sum.add(bias) };
                if let Some((base, stride)) = base {
                    value = value.add(V::load(&*base.add(r * stride + line * LANES).cast()));
                }
                store::<V, TO>(value, place.add(r * out.stride), line * LANES, scale);
            }
        }
    }
}

/// A whole layer over a block, panel by panel, in tiles of `R` rows, then of one.
#[inline(always)]
unsafe fn panels<V: Vector, P: Product<V>, const R: usize, const N: usize>(
    layer: &Layer,
    rows: Rows<'_>,
    base: Option<Rows<'_>>,
    out: &mut Target<'_>,
    ahead: &mut Ahead<'_>,
) {
    let (mut many, mut one) = ([[[0f32; LANES]; N]; R], [[[0f32; LANES]; N]; 1]);
    for panel in 0..layer.bias.len() / N {
        let mut row = 0;
        // SAFETY: by contract.
        unsafe {
            while row + R <= rows.n {
                let lines = ahead.next(layer.n_units() / UNITS_AHEAD);
                tile::<V, P, R, N>((layer, panel), rows, base, out, row, &mut many, lines);
                row += R;
            }
            while row < rows.n {
                tile::<V, P, 1, N>((layer, panel), rows, base, out, row, &mut one, &[]);
                row += 1;
            }
        }
    }
}

/// A narrow layer over a block.
#[inline(always)]
unsafe fn dots<V: Vector>(layer: &Layer, rows: Rows<'_>, base: Option<Rows<'_>>, out: &mut Target<'_>) {
    let (across, whole) = (layer.n_inputs.div_ceil(LANES), layer.n_inputs / LANES);
    for first in (0..rows.n).step_by(TOGETHER) {
        let last = rows.n - 1 - first;
        let values: [&[f32]; TOGETHER] = std::array::from_fn(|r| rows.floats(first + r.min(last), layer.n_inputs));
        let mut ends = [[0f32; LANES]; TOGETHER];
        if whole < across {
            for (end, row) in ends.iter_mut().zip(values) {
                end[..row.len() % LANES].copy_from_slice(&row[whole * LANES..]);
            }
        }
        for output in 0..layer.n_outputs {
            // SAFETY: by contract; `whole` registers lie in every row.
            let sums: [f32; TOGETHER] = unsafe {
                let weights = layer.weights.as_ptr().add(output * across);
                let mut sums = [V::splat(0.0); TOGETHER];
                for chunk in 0..whole {
                    let weights = V::load((*weights.add(chunk)).floats());
                    for r in 0..TOGETHER {
                        let row = V::load(&*values[r].as_ptr().add(chunk * LANES).cast());
                        sums[r] = row.mul_add(weights, sums[r]);
                    }
                }
                if whole < across {
                    let weights = V::load((*weights.add(whole)).floats());
                    (0..TOGETHER).for_each(|r| sums[r] = V::load(&ends[r]).mul_add(weights, sums[r]));
                }
                sums.map(|sums| sums.sum())
            };
            for (at, sum) in (first..rows.n).zip(sums) {
                let under = base.map_or(0.0, |base| base.floats(at, layer.n_outputs)[output]);
                let sum = sum + layer.bias[output].floats()[0] + under;
                out.units[at * out.stride + output] = if out.relu && sum < 0.0 { 0.0 } else { sum }.to_bits();
            }
        }
    }
}

/// Layers where registers are few.
#[inline(always)]
unsafe fn small<V: Vector, P: Product<V>>(
    layer: &Layer,
    rows: Rows<'_>,
    base: Option<Rows<'_>>,
    out: &mut Target<'_>,
    ahead: &mut Ahead<'_>,
) {
    // SAFETY: by contract.
    unsafe {
        match layer.n_lanes {
            0 => dots::<V>(layer, rows, base, out),
            _ => panels::<V, P, 2, 1>(layer, rows, base, out, ahead),
        }
    }
}

/// f32 rows into another format: `v * per_unit[column] + low[column]`, both `[ceil(width / 16)]`, then rounded; `per_unit` is for 8 bits
/// only.
///
/// # Panics
/// If the shapes do not agree.
pub fn convert(kernel: Kernel, rows: Rows<'_>, width: usize, low: &[Line], per_unit: &[Line], out: &mut Target<'_>) {
    if rows.n == 0 {
        return;
    }
    let across = width.div_ceil(LANES);
    let per_row = across * LANES / out.format.precision().per_unit();
    assert!(low.len() >= across && per_unit.len() >= across, "a scale that is too short");
    assert!(rows.units.len() >= (rows.n - 1) * rows.stride + width, "rows that are too short");
    assert!(out.units.len() >= (rows.n - 1) * out.stride + per_row, "a result that does not fit");
    match kernel {
        #[cfg(target_arch = "x86_64")]
        Kernel::Avx512 if Precision::Bf16.is_native() => unsafe { x86::convert_bf(rows, width, low, per_unit, out) },
        // SAFETY, above and here: detected; places were checked.
        #[cfg(target_arch = "x86_64")]
        Kernel::Avx512 => unsafe { x86::convert(rows, width, low, per_unit, out) },
        _ => unsafe { convert_with::<[f32; LANES]>(rows, width, low, per_unit, out) },
    }
}

#[inline(always)]
unsafe fn convert_with<V: Vector>(rows: Rows<'_>, width: usize, low: &[Line], per_unit: &[Line], out: &mut Target<'_>) {
    // SAFETY: by contract.
    unsafe {
        match out.format {
            Format::U8 { .. } => convert_to::<V, { to::STEPS }>(rows, width, low, per_unit, out),
            Format::Bf16 => convert_to::<V, { to::BF16 }>(rows, width, low, per_unit, out),
            Format::F32 => convert_to::<V, { to::F32 }>(rows, width, low, per_unit, out),
        }
    }
}

#[inline(always)]
unsafe fn convert_to<V: Vector, const TO: u8>(
    rows: Rows<'_>,
    width: usize,
    low: &[Line],
    per_unit: &[Line],
    out: &mut Target<'_>,
) {
    let whole = width / LANES;
    // SAFETY: by contract; so below.
    let moved = |values: &[f32; LANES], chunk: usize| unsafe {
        let (low, per_unit) = (low.get_unchecked(chunk), per_unit.get_unchecked(chunk));
        match TO {
            to::STEPS => V::load(values).mul_add(V::load(per_unit.floats()), V::load(low.floats())),
            _ => V::load(values).add(V::load(low.floats())),
        }
    };
    for at in 0..rows.n {
        let (values, rest) = rows.floats(at, width).as_chunks::<LANES>();
        // SAFETY: by contract.
        unsafe {
            let place = out.units.as_mut_ptr().add(at * out.stride);
            let mut chunk = 0;
            while TO == to::STEPS && chunk + 4 <= whole {
                let steps = std::array::from_fn(|i| moved(values.get_unchecked(chunk + i), chunk + i).at_most(255.0));
                V::store_u8s::<4>(steps, &mut *place.add(chunk * LANES / 4).cast());
                chunk += 4;
            }
            for chunk in chunk..whole {
                store::<V, TO>(moved(values.get_unchecked(chunk), chunk), place, chunk * LANES, steps(out.format));
            }
            if !rest.is_empty() {
                let mut last = [0f32; LANES];
                last[..rest.len()].copy_from_slice(rest);
                store::<V, TO>(moved(&last, whole), place, whole * LANES, steps(out.format));
            }
        }
    }
}

/// A table with a row per item, shared by all workers.
pub struct Table {
    units: Vec<Line>,
    /// Lines from one row to the next.
    stride: usize,
    precision: Precision,
}

impl std::fmt::Debug for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Table({} lines of {})", self.units.len(), self.precision.name())
    }
}

impl Table {
    /// Bytes of a table of `n` rows of `width` values, a multiple of 16.
    pub fn bytes(n: usize, width: usize, precision: Precision) -> usize {
        n * Self::lines(width, precision) * size_of::<Line>()
    }

    fn lines(width: usize, precision: Precision) -> usize {
        (width / precision.per_unit()).div_ceil(LANES)
    }

    /// `n` rows of 0; `precision` is f32 or bf16.
    pub fn new(n: usize, width: usize, precision: Precision) -> Self {
        let stride = Self::lines(width, precision);
        let mut units = Vec::with_capacity(n * stride);
        crate::memory::prefer_large_pages(units.spare_capacity_mut());
        units.resize(n * stride, Line::default());
        Table { units, stride, precision }
    }

    /// Number of rows.
    pub fn n_rows(&self) -> usize {
        self.units.len().checked_div(self.stride).unwrap_or(0)
    }

    /// Memory.
    pub fn n_bytes(&self) -> usize {
        self.units.len() * size_of::<Line>()
    }

    /// Values of a row, padding included.
    pub fn width(&self) -> usize {
        self.stride * LANES * self.precision.per_unit()
    }

    /// The units of a row; none of a row that there is not.
    pub fn row(&self, row: u32) -> &[u32] {
        let lines = self.units.get(row as usize * self.stride..(row as usize + 1) * self.stride);
        bytemuck::cast_slice(lines.unwrap_or_default())
    }

    /// All rows as units: `[rows, width]` of f32, or of pairs of bf16.
    pub fn units(&self) -> &[u32] {
        bytemuck::cast_slice(&self.units)
    }

    /// In which numbers it is kept.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Pieces of `n` rows to be filled.
    pub fn pieces(&mut self, n: usize) -> impl ExactSizeIterator<Item = TableRows<'_>> {
        let (stride, precision) = (self.stride * LANES, self.precision);
        let pieces = self.units.chunks_mut((n * self.stride).max(1));
        pieces.map(move |lines| TableRows { units: bytemuck::cast_slice_mut(lines), stride, precision })
    }
}

/// Some rows of a [`Table`], to be filled.
pub struct TableRows<'a> {
    units: &'a mut [u32],
    stride: usize,
    precision: Precision,
}

impl TableRows<'_> {
    /// Writes values of a row from value `column` on.
    pub fn write(&mut self, row: usize, column: usize, values: &[f32]) {
        let units = &mut self.units[row * self.stride..(row + 1) * self.stride];
        match self.precision {
            Precision::F32 => bytemuck::cast_slice_mut(units)[column..column + values.len()].copy_from_slice(values),
            _ => {
                let places: &mut [u16] = &mut bytemuck::cast_slice_mut(units)[column..column + values.len()];
                places.iter_mut().zip(values).for_each(|(to, &v)| *to = half::bf16::from_f32(v).to_bits());
            }
        }
    }
}

/// The sum of a table's rows, from value `column` on, and of `shared`, the same for all rows; either may be absent.
///
/// `shared` is `[width]`, `width` a multiple of 16.
///
/// # Panics
/// If a row is none of the table's, or a shape does not agree.
pub fn gather(
    kernel: Kernel,
    table: Option<(&Table, usize, &[u32])>,
    shared: Option<&[f32]>,
    (n, width): (usize, usize),
    out: &mut Target<'_>,
) {
    if n == 0 {
        return;
    }
    assert!(width.is_multiple_of(LANES), "whole registers");
    let per_row = width / out.format.precision().per_unit();
    assert!(out.units.len() >= (n - 1) * out.stride + per_row, "a result that does not fit");
    assert!(shared.is_none_or(|shared| shared.len() >= width), "a shared row that is too short");
    if let Some((table, column, rows)) = table {
        let lines = (column + width) / table.precision.per_unit();
        assert!(rows.len() == n && lines <= table.stride * LANES, "a row that is too short");
        assert!(rows.iter().all(|&row| (row as usize) < table.n_rows()), "an item that the table does not have");
    }
    match kernel {
        #[cfg(target_arch = "x86_64")]
        Kernel::Avx512 if Precision::Bf16.is_native() => unsafe { x86::gather_bf(table, shared, n, width, out) },
        // SAFETY, above and here: detected; places were checked.
        #[cfg(target_arch = "x86_64")]
        Kernel::Avx512 => unsafe { x86::gather(table, shared, n, width, out) },
        _ => unsafe { gather_with::<[f32; LANES]>(table, shared, n, width, out) },
    }
}

#[inline(always)]
unsafe fn gather_with<V: Vector>(
    table: Option<(&Table, usize, &[u32])>,
    shared: Option<&[f32]>,
    n: usize,
    width: usize,
    out: &mut Target<'_>,
) {
    let shared = shared.map(|shared| &shared.as_chunks::<LANES>().0[..width / LANES]);
    // SAFETY: by contract.
    unsafe {
        match (table, shared) {
            (Some(table), Some(shared)) => with_target!(out, false, sum_rows::<V>(table, shared, n, out)),
            (Some(table), None) => {
                let nothing = [[0f32; LANES]; MOST_NOTHING];
                let mut from = 0;
                while from < width {
                    let some = (width - from).min(MOST_NOTHING * LANES);
                    let (of, column, rows) = table;
                    let mut part = Target { units: &mut *out.units, ..*out };
                    part.units = &mut part.units[from / out.format.precision().per_unit()..];
                    let table = (of, column + from, rows);
                    let nothing = &nothing[..some / LANES];
                    with_target!(part, false, sum_rows::<V>(table, nothing, n, &mut part));
                    from += some;
                }
            }
            (None, Some(shared)) => with_target!(out, false, repeat_row::<V>(shared, n, out)),
            (None, None) => {}
        }
    }
}

/// Registers of zeros that stand for a shared row that is absent.
const MOST_NOTHING: usize = 32;

#[inline(always)]
unsafe fn repeat_row<V: Vector, const TO: u8>(shared: &[[f32; LANES]], n: usize, out: &mut Target<'_>) {
    for at in 0..n {
        for (chunk, shared) in shared.iter().enumerate() {
            // SAFETY: by contract.
            unsafe {
                let place = out.units.as_mut_ptr().add(at * out.stride);
                store::<V, TO>(V::load(shared), place, chunk * LANES, steps(out.format));
            }
        }
    }
}

#[inline(always)]
unsafe fn sum_rows<V: Vector, const TO: u8>(
    (table, column, rows): (&Table, usize, &[u32]),
    shared: &[[f32; LANES]],
    n: usize,
    out: &mut Target<'_>,
) {
    // SAFETY: by contract.
    unsafe {
        match table.precision {
            Precision::Bf16 => sum_rows_of::<V, TO, true>((table, column / 2, rows), shared, n, out),
            _ => sum_rows_of::<V, TO, false>((table, column, rows), shared, n, out),
        }
    }
}

#[inline(always)]
unsafe fn sum_rows_of<V: Vector, const TO: u8, const HALF: bool>(
    (table, start, rows): (&Table, usize, &[u32]),
    shared: &[[f32; LANES]],
    n: usize,
    out: &mut Target<'_>,
) {
    let units: &[u32] = bytemuck::cast_slice(&table.units);
    let (stride, lines) = (table.stride * LANES, if HALF { shared.len().div_ceil(2) } else { shared.len() });
    for at in 0..n {
        if let Some(&later) = rows.get(at + AHEAD) {
            let place = later as usize * stride + start;
            for line in 0..lines {
                crate::memory::prefetch(units, place + line * LANES);
            }
        }
        // SAFETY: by contract.
        unsafe {
            let row = units.as_ptr().add(*rows.get_unchecked(at) as usize * stride + start);
            let place = out.units.as_mut_ptr().add(at * out.stride);
            for (chunk, shared) in shared.iter().enumerate() {
                let value = match HALF {
                    true => V::load_bf16(&*row.add(chunk * LANES / 2).cast()),
                    false => V::load(&*row.add(chunk * LANES).cast()),
                };
                store::<V, TO>(value.add(V::load(shared)), place, chunk * LANES, steps(out.format));
            }
        }
    }
}
