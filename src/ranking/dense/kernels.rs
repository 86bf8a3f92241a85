//! The arithmetic of a block of rows: matrix products in f32, bf16 and int8, fused with what follows them.
//!
//! A layer's weights lie in panels of up to 64 columns, and a tile of a few rows by one panel is summed up in registers, as in
//! every fast matrix product (Goto and van de Geijn, ACM TOMS 34(3), 2008). A row's result does not depend on the rows beside it.
//!
//! Values lie in 32-bit units: one f32, two bf16, or four 8-bit values, of which a product instruction takes one each for every
//! column. NaN and infinities pass through f32 and bf16; on the way into 8 bits NaN becomes the least value of the range
//! and what lies outside it the nearest end.
#![allow(unsafe_code)] // Calls of functions compiled for CPU features that were detected, and reads at places checked before.

use bytemuck::{Pod, Zeroable};

use crate::index::Kernel;

/// Values of a register.
pub const LANES: usize = 16;
/// Layers of at most so many columns are computed by dot products: a panel would be mostly padding.
pub const NARROW: usize = 4;
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
    /// f32 `[panels, n_lanes]`: what an int8 sum is worth; empty for other precisions.
    worth: Vec<Line>,
    /// Registers' worth of columns in a panel; 0: narrow.
    n_lanes: usize,
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
        if precision == Precision::Int8 {
            layer.worth = layer.bias.clone();
        }
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
            if let Some(line) = layer.worth.get_mut(line) {
                line.0[lane] = (worth as f32).to_bits();
            }
        }
        layer
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

    /// `rows · weights` + the layer's bias, or + a row of `base` (f32, as wide as the result) where that is given, into `out`.
    ///
    /// # Panics
    /// If rows or `out` are too short. A narrow layer writes f32 whatever the format.
    pub fn run(&self, rows: Rows<'_>, base: Option<Rows<'_>>, out: &mut Target<'_>) {
        if rows.n == 0 {
            return;
        }
        let last = rows.n - 1;
        let per_row = self.padded_outputs() / if self.n_lanes == 0 { 1 } else { out.format.precision().per_unit() };
        assert!(rows.units.len() >= last * rows.stride + self.n_units(), "rows that are too short");
        assert!(out.units.len() >= last * out.stride + per_row, "a result that does not fit");
        if let Some(base) = base {
            assert!(base.units.len() >= last * base.stride + self.padded_outputs(), "a base that is too short");
        }
        match self.code {
            // SAFETY, here and below: the code was chosen after its features were detected on this CPU; places were checked.
            #[cfg(target_arch = "x86_64")]
            Code::Avx512(Precision::F32) => unsafe { x86::f32_avx512(self, rows, base, out) },
            #[cfg(target_arch = "x86_64")]
            Code::Avx512(Precision::Bf16) => unsafe { x86::bf16_avx512(self, rows, base, out) },
            #[cfg(target_arch = "x86_64")]
            Code::Avx512(Precision::Int8) => unsafe { x86::int8_avx512(self, rows, base, out) },
            #[cfg(target_arch = "x86_64")]
            Code::Avx2 => unsafe { x86::f32_avx2(self, rows, base, out) },
            Code::Portable(Precision::F32) => unsafe { small::<[f32; LANES], F32>(self, rows, base, out) },
            Code::Portable(Precision::Bf16) => unsafe { small::<[f32; LANES], Bf16>(self, rows, base, out) },
            Code::Portable(Precision::Int8) => unsafe { small::<[f32; LANES], Int8>(self, rows, base, out) },
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
    unsafe fn store(self, out: &mut [f32; LANES]);
    /// To the nearest bf16, ties to even; NaN stays.
    unsafe fn store_bf16(self, out: &mut [u16; LANES]);
    /// To the nearest of 0 to 255, ties to even; NaN becomes 0.
    unsafe fn store_u8(self, out: &mut [u8; LANES]);
    unsafe fn load_bf16(lanes: &[u16; LANES]) -> Self;
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
    /// The sums' worth plus `base`.
    unsafe fn finish(sums: Self::Sums, worth: Option<&Line>, base: V) -> V;
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

    #[inline(always)]
    unsafe fn finish(sums: V, _: Option<&Line>, base: V) -> V {
        unsafe { sums.add(base) }
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

    #[inline(always)]
    unsafe fn finish(sums: Self::Sums, _: Option<&Line>, base: [f32; LANES]) -> [f32; LANES] {
        std::array::from_fn(|at| sums[at] + base[at])
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

    #[inline(always)]
    unsafe fn finish(sums: Self::Sums, worth: Option<&Line>, base: [f32; LANES]) -> [f32; LANES] {
        let worth = worth.map_or(&[1.0; LANES], Line::floats);
        std::array::from_fn(|at| (sums[at] as f32).mul_add(worth[at], base[at]))
    }
}

/// Writes 16 values from column `column` of row `row`.
///
/// # Safety
/// As for [`Vector`], and `out` has room there; so with the callers.
#[inline(always)]
unsafe fn store<V: Vector>(value: V, out: &mut Target<'_>, row: usize, column: usize) {
    // SAFETY: by contract. Units may be read and written as any numbers.
    unsafe {
        let value = if out.relu { value.relu() } else { value };
        let place = out.units.as_mut_ptr().add(row * out.stride);
        match out.format {
            Format::F32 => value.store(&mut *place.add(column).cast()),
            Format::Bf16 => value.store_bf16(&mut *place.add(column / 2).cast()),
            Format::U8 { low, per_unit } => {
                let scale = V::splat(per_unit);
                value.mul_add(scale, V::splat(-low * per_unit)).store_u8(&mut *place.add(column / 4).cast());
            }
        }
    }
}

/// `R` rows by one panel of `N` registers: the sums stay in registers.
///
/// # Safety
/// As for [`Vector`]; rows, base and `out` are as long as [`Layer::run`] demands. So with the callers.
#[inline(always)]
unsafe fn tile<V: Vector, P: Product<V>, const R: usize, const N: usize>(
    layer: &Layer,
    panel: usize,
    rows: Rows<'_>,
    base: Option<Rows<'_>>,
    out: &mut Target<'_>,
    row: usize,
) {
    // SAFETY: by contract.
    unsafe {
        let units = layer.n_units();
        let weights = layer.weights.as_ptr().add(panel * units * N);
        let values = rows.units.as_ptr().add(row * rows.stride);
        let mut sums = [[P::zero(); N]; R];
        for unit in 0..units {
            let weights: [P::Weights; N] = std::array::from_fn(|lane| P::weights(&*weights.add(unit * N + lane)));
            for r in 0..R {
                let value = *values.add(r * rows.stride + unit);
                for lane in 0..N {
                    sums[r][lane] = P::add(sums[r][lane], value, weights[lane]);
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            for (lane, sums) in sums.iter().enumerate() {
                let line = panel * N + lane;
                let under = match base {
                    Some(base) => {
                        &*base.units.as_ptr().add((row + r) * base.stride + line * LANES).cast::<[f32; LANES]>()
                    }
                    None => layer.bias.get_unchecked(line).floats(),
                };
                let value = P::finish(*sums, layer.worth.get(line), V::load(under));
                store(value, out, row + r, line * LANES);
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
) {
    for panel in 0..layer.bias.len() / N {
        let mut row = 0;
        // SAFETY: by contract.
        unsafe {
            while row + R <= rows.n {
                tile::<V, P, R, N>(layer, panel, rows, base, out, row);
                row += R;
            }
            while row < rows.n {
                tile::<V, P, 1, N>(layer, panel, rows, base, out, row);
                row += 1;
            }
        }
    }
}

/// A narrow layer over a block.
#[inline(always)]
unsafe fn dots<V: Vector>(layer: &Layer, rows: Rows<'_>, base: Option<Rows<'_>>, out: &mut Target<'_>) {
    let across = layer.n_inputs.div_ceil(LANES);
    for at in 0..rows.n {
        let (whole, rest) = rows.floats(at, layer.n_inputs).as_chunks::<LANES>();
        let mut last = [0f32; LANES];
        last[..rest.len()].copy_from_slice(rest);
        for output in 0..layer.n_outputs {
            let weights = &layer.weights[output * across..(output + 1) * across];
            let mut lanes = [0f32; LANES];
            // SAFETY: by contract.
            unsafe {
                let mut sums = V::splat(0.0);
                let values = whole.iter().chain((!rest.is_empty()).then_some(&last));
                for (values, weights) in values.zip(weights) {
                    sums = V::load(values).mul_add(V::load(weights.floats()), sums);
                }
                sums.store(&mut lanes);
            }
            for half in [8, 4, 2, 1] {
                for lane in 0..half {
                    lanes[lane] += lanes[lane + half];
                }
            }
            let under = match base {
                Some(base) => base.floats(at, layer.n_outputs)[output],
                None => layer.bias[output].floats()[0],
            };
            let sum = lanes[0] + under;
            out.units[at * out.stride + output] = if out.relu && sum < 0.0 { 0.0 } else { sum }.to_bits();
        }
    }
}

/// Layers where registers are few.
#[inline(always)]
unsafe fn small<V: Vector, P: Product<V>>(layer: &Layer, rows: Rows<'_>, base: Option<Rows<'_>>, out: &mut Target<'_>) {
    // SAFETY: by contract.
    unsafe {
        match layer.n_lanes {
            0 => dots::<V>(layer, rows, base, out),
            _ => panels::<V, P, 2, 1>(layer, rows, base, out),
        }
    }
}

/// f32 rows into another format: `(v - low[column]) * per_unit[column]`, both `[ceil(width / 16)]`, then rounded.
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
    for at in 0..rows.n {
        let (whole, rest) = rows.floats(at, width).as_chunks::<LANES>();
        let mut last = [0f32; LANES];
        last[..rest.len()].copy_from_slice(rest);
        let values = whole.iter().chain((!rest.is_empty()).then_some(&last));
        for ((chunk, values), (low, per_unit)) in values.enumerate().zip(low.iter().zip(per_unit)) {
            // SAFETY: by contract.
            unsafe {
                // Subtracted before it is scaled: the columns of years and prices lie far from 0.
                let moved = V::load(values).add(V::load(low.floats()));
                let scaled = moved.mul_add(V::load(per_unit.floats()), V::splat(0.0));
                store(scaled, out, at, chunk * LANES);
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
        Table { units: vec![Line::default(); n * stride], stride, precision }
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.units.len().checked_div(self.stride).unwrap_or(0)
    }

    /// Memory.
    pub fn n_bytes(&self) -> usize {
        self.units.len() * size_of::<Line>()
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
        assert!(rows.iter().all(|&row| (row as usize) < table.len()), "an item that the table does not have");
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
    let shared = shared.map_or(&[][..], |shared| shared.as_chunks::<LANES>().0);
    for at in 0..n {
        // SAFETY: by contract.
        unsafe {
            let Some((table, column, rows)) = table else {
                for (chunk, shared) in shared.iter().take(width / LANES).enumerate() {
                    store(V::load(shared), out, at, chunk * LANES);
                }
                continue;
            };
            let per_unit = table.precision.per_unit();
            let place = |row: u32| row as usize * table.stride * LANES + column / per_unit;
            if let Some(&later) = rows.get(at + AHEAD) {
                let units: &[u32] = bytemuck::cast_slice(&table.units);
                crate::memory::prefetch_range(units, place(later)..place(later) + width / per_unit);
            }
            let row = table.units.as_ptr().cast::<u32>().add(place(rows[at]));
            for chunk in 0..width / LANES {
                let value = match table.precision {
                    Precision::Bf16 => V::load_bf16(&*row.add(chunk * LANES / 2).cast()),
                    _ => V::load(&*row.add(chunk * LANES).cast()),
                };
                let value = match shared.get(chunk) {
                    Some(shared) => value.add(V::load(shared)),
                    None => value,
                };
                store(value, out, at, chunk * LANES);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::*;
    use std::arch::x86_64::*;

    /// A register of 16; `NATIVE`: the CPU rounds to bf16 by itself.
    #[derive(Clone, Copy)]
    pub struct Wide<const NATIVE: bool>(__m512);

    // SAFETY, here and below: the caller has the features, and the arrays have the values that a register takes.
    impl<const NATIVE: bool> Vector for Wide<NATIVE> {
        #[inline(always)]
        unsafe fn load(lanes: &[f32; LANES]) -> Self {
            Wide(unsafe { _mm512_loadu_ps(lanes.as_ptr()) })
        }

        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            Wide(unsafe { _mm512_set1_ps(value) })
        }

        #[inline(always)]
        unsafe fn add(self, other: Self) -> Self {
            Wide(unsafe { _mm512_add_ps(self.0, other.0) })
        }

        #[inline(always)]
        unsafe fn mul_add(self, other: Self, sums: Self) -> Self {
            Wide(unsafe { _mm512_fmadd_ps(self.0, other.0, sums.0) })
        }

        #[inline(always)]
        unsafe fn relu(self) -> Self {
            // The second operand is the result where either is NaN.
            Wide(unsafe { _mm512_max_ps(_mm512_setzero_ps(), self.0) })
        }

        #[inline(always)]
        unsafe fn store(self, out: &mut [f32; LANES]) {
            unsafe { _mm512_storeu_ps(out.as_mut_ptr(), self.0) }
        }

        #[inline(always)]
        unsafe fn store_bf16(self, out: &mut [u16; LANES]) {
            unsafe {
                let rounded: __m256i = match NATIVE {
                    true => std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(self.0)),
                    false => {
                        let bits = _mm512_castps_si512(self.0);
                        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
                        let up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
                        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(self.0, self.0);
                        let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x40_0000));
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(_mm512_mask_mov_epi32(up, nan, quiet)))
                    }
                };
                _mm256_storeu_si256(out.as_mut_ptr().cast(), rounded);
            }
        }

        #[inline(always)]
        unsafe fn store_u8(self, out: &mut [u8; LANES]) {
            unsafe {
                // The second operand is the result where the first is NaN.
                let least = _mm512_max_ps(self.0, _mm512_setzero_ps());
                let most = _mm512_min_ps(least, _mm512_set1_ps(255.0));
                _mm_storeu_si128(out.as_mut_ptr().cast(), _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(most)));
            }
        }

        #[inline(always)]
        unsafe fn load_bf16(lanes: &[u16; LANES]) -> Self {
            unsafe {
                let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(lanes.as_ptr().cast()));
                Wide(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits)))
            }
        }
    }

    #[inline(always)]
    unsafe fn line(line: &Line) -> __m512i {
        unsafe { _mm512_load_si512(line.0.as_ptr().cast()) }
    }

    impl<const NATIVE: bool> Product<Wide<NATIVE>> for Bf16 {
        type Sums = __m512;
        type Weights = __m512i;

        #[inline(always)]
        unsafe fn zero() -> __m512 {
            unsafe { _mm512_setzero_ps() }
        }

        #[inline(always)]
        unsafe fn weights(weights: &Line) -> __m512i {
            unsafe { line(weights) }
        }

        #[inline(always)]
        unsafe fn add(sums: __m512, unit: u32, weights: __m512i) -> __m512 {
            unsafe {
                let unit = _mm512_set1_epi32(unit as i32);
                let bits = |v: __m512i| std::mem::transmute::<__m512i, __m512bh>(v);
                _mm512_dpbf16_ps(sums, bits(unit), bits(weights))
            }
        }

        #[inline(always)]
        unsafe fn finish(sums: __m512, _: Option<&Line>, base: Wide<NATIVE>) -> Wide<NATIVE> {
            unsafe { Wide(sums).add(base) }
        }
    }

    impl<const NATIVE: bool> Product<Wide<NATIVE>> for Int8 {
        type Sums = __m512i;
        type Weights = __m512i;

        #[inline(always)]
        unsafe fn zero() -> __m512i {
            unsafe { _mm512_setzero_si512() }
        }

        #[inline(always)]
        unsafe fn weights(weights: &Line) -> __m512i {
            unsafe { line(weights) }
        }

        #[inline(always)]
        unsafe fn add(sums: __m512i, unit: u32, weights: __m512i) -> __m512i {
            unsafe { _mm512_dpbusd_epi32(sums, _mm512_set1_epi32(unit as i32), weights) }
        }

        #[inline(always)]
        unsafe fn finish(sums: __m512i, worth: Option<&Line>, base: Wide<NATIVE>) -> Wide<NATIVE> {
            unsafe {
                let sums = Wide(_mm512_cvtepi32_ps(sums));
                match worth {
                    Some(worth) => sums.mul_add(Wide::load(worth.floats()), base),
                    None => sums.add(base),
                }
            }
        }
    }

    /// Two registers of eight.
    type Pair = [__m256; 2];

    impl Vector for Pair {
        #[inline(always)]
        unsafe fn load(lanes: &[f32; LANES]) -> Self {
            unsafe { [_mm256_loadu_ps(lanes.as_ptr()), _mm256_loadu_ps(lanes.as_ptr().add(8))] }
        }

        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            unsafe { [_mm256_set1_ps(value); 2] }
        }

        #[inline(always)]
        unsafe fn add(self, other: Self) -> Self {
            unsafe { [_mm256_add_ps(self[0], other[0]), _mm256_add_ps(self[1], other[1])] }
        }

        #[inline(always)]
        unsafe fn mul_add(self, other: Self, sums: Self) -> Self {
            unsafe { [_mm256_fmadd_ps(self[0], other[0], sums[0]), _mm256_fmadd_ps(self[1], other[1], sums[1])] }
        }

        #[inline(always)]
        unsafe fn relu(self) -> Self {
            unsafe { [_mm256_max_ps(_mm256_setzero_ps(), self[0]), _mm256_max_ps(_mm256_setzero_ps(), self[1])] }
        }

        #[inline(always)]
        unsafe fn store(self, out: &mut [f32; LANES]) {
            unsafe {
                _mm256_storeu_ps(out.as_mut_ptr(), self[0]);
                _mm256_storeu_ps(out.as_mut_ptr().add(8), self[1]);
            }
        }

        #[inline(always)]
        unsafe fn store_bf16(self, out: &mut [u16; LANES]) {
            let mut lanes = [0f32; LANES];
            unsafe {
                self.store(&mut lanes);
                lanes.store_bf16(out);
            }
        }

        #[inline(always)]
        unsafe fn store_u8(self, out: &mut [u8; LANES]) {
            let mut lanes = [0f32; LANES];
            unsafe {
                self.store(&mut lanes);
                lanes.store_u8(out);
            }
        }

        #[inline(always)]
        unsafe fn load_bf16(lanes: &[u16; LANES]) -> Self {
            unsafe { Self::load(&<[f32; LANES]>::load_bf16(lanes)) }
        }
    }

    /// 24 sums, 4 weights and a value fill the 32 registers.
    #[inline(always)]
    unsafe fn wide<const NATIVE: bool, P: Product<Wide<NATIVE>>>(
        layer: &Layer,
        rows: Rows<'_>,
        base: Option<Rows<'_>>,
        out: &mut Target<'_>,
    ) {
        unsafe {
            match layer.n_lanes {
                0 => dots::<Wide<NATIVE>>(layer, rows, base, out),
                4 => panels::<Wide<NATIVE>, P, 6, 4>(layer, rows, base, out),
                2 => panels::<Wide<NATIVE>, P, 6, 2>(layer, rows, base, out),
                _ => panels::<Wide<NATIVE>, P, 6, 1>(layer, rows, base, out),
            }
        }
    }

    #[target_feature(enable = "avx512f,fma")]
    pub unsafe fn f32_plain(layer: &Layer, rows: Rows<'_>, base: Option<Rows<'_>>, out: &mut Target<'_>) {
        unsafe { wide::<false, F32>(layer, rows, base, out) }
    }

    #[target_feature(enable = "avx512f,fma,avx512bw,avx512vl,avx512bf16")]
    unsafe fn f32_bf(layer: &Layer, rows: Rows<'_>, base: Option<Rows<'_>>, out: &mut Target<'_>) {
        unsafe { wide::<true, F32>(layer, rows, base, out) }
    }

    /// # Safety
    /// The CPU has AVX-512F; so with the next ones for what their names say.
    pub unsafe fn f32_avx512(layer: &Layer, rows: Rows<'_>, base: Option<Rows<'_>>, out: &mut Target<'_>) {
        // SAFETY: by contract; the second after detection.
        unsafe {
            match out.format == Format::Bf16 && Precision::Bf16.is_native() {
                true => f32_bf(layer, rows, base, out),
                false => f32_plain(layer, rows, base, out),
            }
        }
    }

    #[target_feature(enable = "avx512f,fma,avx512bw,avx512vl,avx512bf16")]
    pub unsafe fn bf16_avx512(layer: &Layer, rows: Rows<'_>, base: Option<Rows<'_>>, out: &mut Target<'_>) {
        unsafe { wide::<true, Bf16>(layer, rows, base, out) }
    }

    #[target_feature(enable = "avx512f,fma,avx512vnni")]
    pub unsafe fn int8_avx512(layer: &Layer, rows: Rows<'_>, base: Option<Rows<'_>>, out: &mut Target<'_>) {
        unsafe { wide::<false, Int8>(layer, rows, base, out) }
    }

    /// 2 sums, a weight and a value in pairs of the 16 registers, six rows at a time.
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn f32_avx2(layer: &Layer, rows: Rows<'_>, base: Option<Rows<'_>>, out: &mut Target<'_>) {
        unsafe {
            match layer.n_lanes {
                0 => dots::<Pair>(layer, rows, base, out),
                _ => panels::<Pair, F32, 6, 1>(layer, rows, base, out),
            }
        }
    }

    #[target_feature(enable = "avx512f,fma,avx512bw,avx512vl,avx512bf16")]
    pub unsafe fn convert_bf(rows: Rows<'_>, width: usize, low: &[Line], per_unit: &[Line], out: &mut Target<'_>) {
        unsafe { convert_with::<Wide<true>>(rows, width, low, per_unit, out) }
    }

    #[target_feature(enable = "avx512f,fma")]
    pub unsafe fn convert(rows: Rows<'_>, width: usize, low: &[Line], per_unit: &[Line], out: &mut Target<'_>) {
        unsafe { convert_with::<Wide<false>>(rows, width, low, per_unit, out) }
    }

    #[target_feature(enable = "avx512f,fma,avx512bw,avx512vl,avx512bf16")]
    pub unsafe fn gather_bf(
        table: Option<(&Table, usize, &[u32])>,
        shared: Option<&[f32]>,
        n: usize,
        width: usize,
        out: &mut Target<'_>,
    ) {
        unsafe { gather_with::<Wide<true>>(table, shared, n, width, out) }
    }

    #[target_feature(enable = "avx512f,fma")]
    pub unsafe fn gather(
        table: Option<(&Table, usize, &[u32])>,
        shared: Option<&[f32]>,
        n: usize,
        width: usize,
        out: &mut Target<'_>,
    ) {
        unsafe { gather_with::<Wide<false>>(table, shared, n, width, out) }
    }
}
