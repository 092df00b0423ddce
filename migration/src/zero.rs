//! Zero-page detection on memory that vCPUs may be writing.

use vm_memory::VolatileSlice;

/// What a zero page holds.
pub(crate) const ZERO_PAGE: [u8; 4096] = [0; 4096];

/// Whether all bytes of `page` are zero at the moment they are looked at.
///
/// A page that changes meanwhile may be called either; the dirty log sees that write and sends it again.
pub(crate) fn is_zero(page: &VolatileSlice<'_>) -> bool {
    let guard = page.ptr_guard();
    let (start, len) = (guard.as_ptr(), page.len());
    // SAFETY: `offset + LINE <= len` wherever this is called, so the line is inside the slice, which lives through this
    // call.
    let line = |offset| unsafe { line_is_zero(start.add(offset)) };
    // Most pages that are not zero show it in the first line; the others are read as fast as memory gives.
    if len >= LINE && !line(0) {
        return false;
    }
    let wide = len - len % STEP;
    (0..wide).step_by(STEP).all(|offset| (0..STEP).step_by(LINE).fold(true, |zero, at| zero & line(offset + at)))
        && (wide..len).all(|offset| {
            // SAFETY: `offset < len`.
            unsafe { start.add(offset).read_volatile() == 0 }
        })
}

/// Asks for the beginning of a page that will be looked at soon.
pub(crate) fn prefetch(page: &VolatileSlice<'_>) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    // SAFETY: prefetching gives no value, and no address is wrong for it.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(page.ptr_guard().as_ptr().cast()) };
}

/// A cache line.
const LINE: usize = 64;
/// Bytes that are compared in one step.
const STEP: usize = 4 * LINE;

/// # Safety
/// `LINE` bytes at `line` must be readable.
#[cfg(target_arch = "x86_64")]
#[inline]
unsafe fn line_is_zero(line: *const u8) -> bool {
    use std::arch::x86_64::{
        __m128i, _mm_cmpeq_epi8, _mm_loadu_si128, _mm_movemask_epi8, _mm_or_si128, _mm_setzero_si128,
    };
    let line = line.cast::<__m128i>();
    // SAFETY: four loads of 16 bytes are the `LINE` bytes that the caller vouches for, and need no alignment. SSE2 is
    // part of every x86-64. The memory may change during the loads, as memory behind a device register may.
    unsafe {
        let low = _mm_or_si128(_mm_loadu_si128(line), _mm_loadu_si128(line.add(1)));
        let high = _mm_or_si128(_mm_loadu_si128(line.add(2)), _mm_loadu_si128(line.add(3)));
        _mm_movemask_epi8(_mm_cmpeq_epi8(_mm_or_si128(low, high), _mm_setzero_si128())) == 0xffff
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_set_bit_anywhere_is_seen() {
        for len in [4096, 300, 100, 64, 7] {
            let mut page = vec![0u8; len];
            assert!(is_zero(&VolatileSlice::from(&mut page[..])));
            for at in 0..len {
                page[at] = 1 << (at % 8);
                assert!(!is_zero(&VolatileSlice::from(&mut page[..])), "byte {at} of {len}");
                page[at] = 0;
            }
        }
    }
}
