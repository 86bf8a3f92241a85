//! Sorting what a search found.
#![allow(unsafe_code)] // Calls of a function compiled for CPU features that were detected.

use super::simd::{Simd, for_each_simd};
use crate::candidates::Packed;

/// Up to so many are sorted by a network; its work grows faster than theirs.
const NETWORK: usize = 1024;

/// Buffers of sorting.
#[derive(Debug, Default)]
pub struct Sorter {
    spare: Vec<Packed>,
    /// By place before: the highest bits that the keys differ in, and the place.
    keys: Vec<u32>,
}

impl Sorter {
    /// Sorts `list`, best first, in a fraction of the time of comparisons: by the highest bits that its keys differ in, then by insertion.
    pub fn sort(&mut self, simd: Simd, list: &mut Vec<Packed>) {
        let n = list.len();
        if n < 2 {
            return;
        }
        let (least, most) = extent(simd, list);
        // Bits that the keys differ in.
        let bits = 64 - (most - least).leading_zeros();
        match simd {
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512 if n <= NETWORK => {
                let places = n.next_power_of_two().max(16);
                let (of_place, shift) = (places.ilog2(), (bits + places.ilog2()).saturating_sub(32));
                self.keys.clear();
                self.keys.resize(places, u32::MAX);
                shorten(simd, list, least, shift, of_place, &mut self.keys[..n]);
                // SAFETY: `Simd` has this variant only where the features were detected.
                unsafe { x86::sort(self.keys.as_chunks_mut::<16>().0) };
                std::mem::swap(list, &mut self.spare);
                list.clear();
                list.extend(self.keys[..n].iter().map(|&key| self.spare[key as usize & (places - 1)]));
            }
            _ if n >= 64 => by_digits(list, &mut self.spare, least, bits.saturating_sub(16)),
            _ => {}
        }
        insert(list);
    }
}

for_each_simd!(
    fn extent(list: &[Packed]) -> (u64, u64) = extent_of
);

#[inline(always)]
fn extent_of<const FUSED: bool>(list: &[Packed]) -> (u64, u64) {
    list.iter().fold((u64::MAX, 0), |(least, most), key| (key.0.min(least), key.0.max(most)))
}

for_each_simd!(
    /// What the keys have above the least but for the lowest `shift` bits, and below that `of_place` bits with their places.
    fn shorten(list: &[Packed], least: u64, shift: u32, of_place: u32, keys: &mut [u32]) = shorten_of
);

#[inline(always)]
fn shorten_of<const FUSED: bool>(list: &[Packed], least: u64, shift: u32, of_place: u32, keys: &mut [u32]) {
    for (at, (key, short)) in list.iter().zip(keys).enumerate() {
        *short = (((key.0 - least) >> shift) as u32) << of_place | at as u32;
    }
}

/// Sorts by 16 bits of what the keys have above the least, 8 at a time, those below `shift` left out.
fn by_digits(list: &mut [Packed], spare: &mut Vec<Packed>, least: u64, shift: u32) {
    let low = |key: Packed| ((key.0 - least) >> shift & 255) as usize;
    let high = |key: Packed| ((key.0 - least) >> shift >> 8 & 255) as usize;
    let (mut lows, mut highs) = ([0u32; 256], [0u32; 256]);
    for &key in &*list {
        lows[low(key)] += 1;
        highs[high(key)] += 1;
    }
    spare.clear();
    spare.resize(list.len(), Packed(0));
    place(list, spare, &mut lows, low);
    place(spare, list, &mut highs, high);
}

/// Puts `from` into `to` in the order of its digits; `counts` holds how many have each.
fn place(from: &[Packed], to: &mut [Packed], counts: &mut [u32; 256], digit: impl Fn(Packed) -> usize) {
    let mut sum = 0;
    for count in &mut *counts {
        sum += std::mem::replace(count, sum);
    }
    for &key in from {
        let at = &mut counts[digit(key)];
        to[*at as usize] = key;
        *at += 1;
    }
}

/// Sorts what is nearly sorted.
fn insert(list: &mut [Packed]) {
    let mut n_moves = 0;
    for at in 1..list.len() {
        let (key, mut to) = (list[at], at);
        while to > 0 && list[to - 1] > key {
            list[to] = list[to - 1];
            to -= 1;
        }
        list[to] = key;
        n_moves += at - to;
        // One that is far from all others leaves these alike in the bits that they were sorted by.
        if n_moves > 4 * list.len() {
            list.sort_unstable();
            return;
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    /// Bitonic sort (Batcher, "Sorting networks and their applications", AFIPS 1968) of a power of two of registers, ascending.
    #[target_feature(enable = "avx512f")]
    pub fn sort(registers: &mut [[u32; 16]]) {
        debug_assert!(registers.len().is_power_of_two());
        // Within registers: sequences of 2, 4 and 8 that ascend and descend in turn.
        for register in &mut *registers {
            let mut values = load(register);
            values = exchange::<1>(values, 0b0110_0110_0110_0110);
            values = exchange::<2>(values, 0b0011_1100_0011_1100);
            values = exchange::<1>(values, 0b0101_1010_0101_1010);
            values = exchange::<4>(values, 0b0000_1111_1111_0000);
            values = exchange::<2>(values, 0b0011_0011_1100_1100);
            values = exchange::<1>(values, 0b0101_0101_1010_1010);
            store(register, values);
        }
        let mut sorted = 1;
        loop {
            // Sequences of `sorted` registers that ascend and descend in turn; the last one ascends.
            for (nth, sequence) in registers.chunks_exact_mut(sorted).enumerate() {
                merge(sequence, nth % 2 == 1);
            }
            if sorted >= registers.len() {
                return;
            }
            sorted *= 2;
        }
    }

    /// Sorts what first ascends, then descends. Little code: it has left the nearest cache from query to query, and unrolled more is slower.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn merge(registers: &mut [[u32; 16]], descends: bool) {
        let mut distance = registers.len() / 2;
        while distance > 0 {
            for pair in registers.chunks_exact_mut(2 * distance) {
                let (low, high) = pair.split_at_mut(distance);
                let (least, most) = if descends { (high, low) } else { (low, high) };
                for (least, most) in least.iter_mut().zip(most) {
                    let (a, b) = (load(least), load(most));
                    store(least, _mm512_min_epu32(a, b));
                    store(most, _mm512_max_epu32(a, b));
                }
            }
            distance /= 2;
        }
        let turned = if descends { 0xffff } else { 0 };
        for register in registers {
            let values = exchange::<8>(load(register), 0b1111_1111_0000_0000 ^ turned);
            let values = exchange::<4>(values, 0b1111_0000_1111_0000 ^ turned);
            let values = exchange::<2>(values, 0b1100_1100_1100_1100 ^ turned);
            store(register, exchange::<1>(values, 0b1010_1010_1010_1010 ^ turned));
        }
    }

    /// Each value and the one `DISTANCE` lanes away: the larger goes where `larger` has a 1, the smaller where it has none.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn exchange<const DISTANCE: i32>(values: __m512i, larger: u16) -> __m512i {
        let others = match DISTANCE {
            1 => _mm512_shuffle_epi32::<0b10_11_00_01>(values),
            2 => _mm512_shuffle_epi32::<0b01_00_11_10>(values),
            4 => _mm512_shuffle_i64x2::<0b10_11_00_01>(values, values),
            _ => _mm512_shuffle_i64x2::<0b01_00_11_10>(values, values),
        };
        _mm512_mask_max_epu32(_mm512_min_epu32(values, others), larger, values, others)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn load(values: &[u32; 16]) -> __m512i {
        // SAFETY: the array has the 64 bytes of a register.
        unsafe { _mm512_loadu_si512(values.as_ptr().cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn store(to: &mut [u32; 16], values: __m512i) {
        // SAFETY: the array has the 64 bytes of a register.
        unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), values) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::candidates::Scored;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_way_is_sorting(
            n in prop_oneof![0usize..70, 0usize..3000], spread in prop::sample::select(vec![0f32, 1e-6, 1.0, 1e30]), outlier in any::<bool>(),
            seed in any::<u64>(),
        ) {
            let mut next = crate::testing::noise(seed);
            let list: Vec<Packed> = (0..n)
                .map(|at| Scored { row: (next() * 1e6) as i32 as u32, score: if outlier && at == n / 2 { 1e38 } else { 1.0 + spread * next() } })
                .map(Packed::from)
                .collect();
            let mut want = list.clone();
            want.sort_unstable();
            let mut sorter = Sorter { spare: vec![Packed(7)], keys: vec![7] };
            for simd in Simd::available() {
                let mut list = list.clone();
                sorter.sort(simd, &mut list);
                prop_assert_eq!(&list, &want);
            }
        }
    }
}
