//! Hints to the memory system.
#![allow(unsafe_code)] // One instruction that the language does not offer.

/// Begins to bring `slice[at]` into the nearest cache, for a read some dozens of instructions later. Any `at` is sound;
/// nothing happens where the CPU has no such hint.
#[inline(always)]
pub fn prefetch<T>(slice: &[T], at: usize) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch reads nothing that the program sees and never faults, whatever the address.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(slice.as_ptr().wrapping_add(at).cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (slice, at);
}

/// [`prefetch`] for every cache line of `slice[range]`.
#[inline(always)]
pub fn prefetch_range<T>(slice: &[T], range: std::ops::Range<usize>) {
    let step = (64 / size_of::<T>().max(1)).max(1);
    for at in range.step_by(step) {
        prefetch(slice, at);
    }
}
