//! Hints to the memory system.
#![allow(unsafe_code)] // One instruction and one system call that the language does not offer.

/// Begins to bring `slice[at]` into the nearest cache, for a read some dozens of instructions later. Any `at` is sound;
/// nothing happens where the CPU has no such hint.
#[inline(always)]
pub fn prefetch<T>(slice: &[T], at: usize) {
    prefetch_place(slice.as_ptr().wrapping_add(at));
}

/// [`prefetch`] of what lies at an address, whatever it is.
#[inline(always)]
pub fn prefetch_place<T>(place: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch reads nothing that the program sees and never faults, whatever the address.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(place.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = place;
}

/// Asks for large pages under `slice`, of memory that is read here and there: most of what a cache line from a place not read lately
/// costs is finding its page. Best before the first write; nothing happens where the system has no such hint.
pub fn prefer_large_pages<T>(slice: &mut [T]) {
    #[cfg(target_os = "linux")]
    {
        const PAGE: usize = 1 << 21;
        let bytes = slice.as_mut_ptr_range();
        let (start, end) = ((bytes.start as usize).next_multiple_of(PAGE), bytes.end as usize / PAGE * PAGE);
        if start < end {
            // SAFETY: the range lies within the slice, and the hint changes no value. That it may be refused changes nothing.
            unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_HUGEPAGE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = slice;
}

/// [`prefetch`] for every cache line of `slice[range]`.
#[inline(always)]
pub fn prefetch_range<T>(slice: &[T], range: std::ops::Range<usize>) {
    let step = (64 / size_of::<T>().max(1)).max(1);
    for at in range.step_by(step) {
        prefetch(slice, at);
    }
}
