//! Registers and products of x86-64, and the functions compiled for the features that they need.
#![allow(unsafe_code)] // As in the parent.

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
    unsafe fn at_most(self, most: f32) -> Self {
        Wide(unsafe { _mm512_min_ps(_mm512_set1_ps(most), self.0) })
    }

    #[inline(always)]
    unsafe fn store(self, out: &mut [f32; LANES]) {
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), self.0) }
    }

    #[inline(always)]
    unsafe fn store_bf16(self, out: &mut [u16; LANES]) {
        unsafe {
            if NATIVE {
                let rounded = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(self.0));
                return _mm256_storeu_si256(out.as_mut_ptr().cast(), rounded);
            }
            let mut lanes = [0f32; LANES];
            self.store(&mut lanes);
            rounded_to_bf16(&lanes, out);
        }
    }

    #[inline(always)]
    unsafe fn store_u8(self, out: &mut [u8; LANES]) {
        unsafe {
            // The second operand is the result where the first is NaN. What is too large becomes 2^31, which saturates.
            let least = _mm512_max_ps(self.0, _mm512_setzero_ps());
            _mm_storeu_si128(out.as_mut_ptr().cast(), _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(least)));
        }
    }

    /// Four are packed at once, to 16 bits and then to 8 with saturation, which leaves quarters of registers out of order.
    #[inline(always)]
    unsafe fn store_u8s<const N: usize>(values: [Self; N], out: &mut [[u8; LANES]; N]) {
        unsafe {
            if !NATIVE || N != 4 {
                return values.into_iter().zip(out).for_each(|(value, out)| value.store_u8(out));
            }
            // NaN becomes -2^31, and in the end 0.
            let whole = |at: usize| _mm512_cvtps_epi32(values[at].0);
            let (low, high) = (_mm512_packs_epi32(whole(0), whole(1)), _mm512_packs_epi32(whole(2), whole(3)));
            let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
            let bytes = _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high));
            _mm512_storeu_si512(out.as_mut_ptr().cast(), bytes);
        }
    }

    #[inline(always)]
    unsafe fn load_bf16(lanes: &[u16; LANES]) -> Self {
        unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(lanes.as_ptr().cast()));
            Wide(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits)))
        }
    }

    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        unsafe { _mm512_reduce_add_ps(self.0) }
    }
}

/// Apart from the tiles, whose sums leave their registers where too much is inlined.
#[inline(never)]
fn rounded_to_bf16(lanes: &[f32; LANES], out: &mut [u16; LANES]) {
    // SAFETY: arrays need no features; so below.
    unsafe { lanes.store_bf16(out) }
}

#[inline(never)]
fn rounded_to_u8(lanes: &[f32; LANES], out: &mut [u8; LANES]) {
    unsafe { lanes.store_u8(out) }
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

    const WORTH: bool = false;

    #[inline(always)]
    unsafe fn floats(sums: __m512) -> Wide<NATIVE> {
        Wide(sums)
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

    const WORTH: bool = true;

    #[inline(always)]
    unsafe fn floats(sums: __m512i) -> Wide<NATIVE> {
        Wide(unsafe { _mm512_cvtepi32_ps(sums) })
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
    unsafe fn at_most(self, most: f32) -> Self {
        let most = unsafe { _mm256_set1_ps(most) };
        unsafe { [_mm256_min_ps(most, self[0]), _mm256_min_ps(most, self[1])] }
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
            rounded_to_bf16(&lanes, out);
        }
    }

    #[inline(always)]
    unsafe fn store_u8(self, out: &mut [u8; LANES]) {
        let mut lanes = [0f32; LANES];
        unsafe {
            self.store(&mut lanes);
            rounded_to_u8(&lanes, out);
        }
    }

    #[inline(always)]
    unsafe fn load_bf16(lanes: &[u16; LANES]) -> Self {
        unsafe { Self::load(&<[f32; LANES]>::load_bf16(lanes)) }
    }

    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        let mut lanes = [0f32; LANES];
        unsafe {
            self.store(&mut lanes);
            lanes.sum()
        }
    }
}

/// 24 sums, 4 weights and a value fill the 32 registers.
#[inline(always)]
unsafe fn wide<const NATIVE: bool, P: Product<Wide<NATIVE>>>(
    layer: &Layer,
    rows: Rows<'_>,
    base: Option<Rows<'_>>,
    out: &mut Target<'_>,
    ahead: &mut Ahead<'_>,
) {
    unsafe {
        match layer.n_lanes {
            0 => dots::<Wide<NATIVE>>(layer, rows, base, out),
            4 => panels::<Wide<NATIVE>, P, 6, 4>(layer, rows, base, out, ahead),
            2 => panels::<Wide<NATIVE>, P, 6, 2>(layer, rows, base, out, ahead),
            _ => panels::<Wide<NATIVE>, P, 6, 1>(layer, rows, base, out, ahead),
        }
    }
}

/// [`wide`], compiled for features of the CPU.
macro_rules! compiled {
    ($($vis:vis fn $name:ident = $of:ty, native: $native:literal, $features:literal;)*) => {$(
        #[target_feature(enable = $features)]
        $vis unsafe fn $name(
            layer: &Layer,
            rows: Rows<'_>,
            base: Option<Rows<'_>>,
            out: &mut Target<'_>,
            ahead: &mut Ahead<'_>,
        ) {
            unsafe { wide::<$native, $of>(layer, rows, base, out, ahead) }
        }
    )*};
}

compiled! {
    fn f32_plain = F32, native: false, "avx512f,fma";
    fn f32_bf = F32, native: true, "avx512f,fma,avx512bw,avx512vl,avx512bf16";
    pub fn bf16_avx512 = Bf16, native: true, "avx512f,fma,avx512bw,avx512vl,avx512bf16";
    fn int8_plain = Int8, native: false, "avx512f,fma,avx512vnni";
    fn int8_bf = Int8, native: true, "avx512f,fma,avx512vnni,avx512bw,avx512vl,avx512bf16";
}

/// # Safety
/// The CPU has AVX-512F; so with the next one for what its name says.
pub unsafe fn f32_avx512(
    layer: &Layer,
    rows: Rows<'_>,
    base: Option<Rows<'_>>,
    out: &mut Target<'_>,
    ahead: &mut Ahead<'_>,
) {
    // SAFETY: by contract; the second after detection.
    unsafe {
        match Precision::Bf16.is_native() {
            true => f32_bf(layer, rows, base, out, ahead),
            false => f32_plain(layer, rows, base, out, ahead),
        }
    }
}

pub unsafe fn int8_avx512(
    layer: &Layer,
    rows: Rows<'_>,
    base: Option<Rows<'_>>,
    out: &mut Target<'_>,
    ahead: &mut Ahead<'_>,
) {
    unsafe {
        match Precision::Bf16.is_native() {
            true => int8_bf(layer, rows, base, out, ahead),
            false => int8_plain(layer, rows, base, out, ahead),
        }
    }
}

/// 2 sums, a weight and a value in pairs of the 16 registers, six rows at a time.
#[target_feature(enable = "avx2,fma")]
pub unsafe fn f32_avx2(
    layer: &Layer,
    rows: Rows<'_>,
    base: Option<Rows<'_>>,
    out: &mut Target<'_>,
    ahead: &mut Ahead<'_>,
) {
    unsafe {
        match layer.n_lanes {
            0 => dots::<Pair>(layer, rows, base, out),
            _ => panels::<Pair, F32, 6, 1>(layer, rows, base, out, ahead),
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
