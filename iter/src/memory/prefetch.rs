//! The prefetch instruction of x86-64.
#![expect(unsafe_code, reason = "the instruction is an intrinsic")]

use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
use std::ptr;

/// Asks for the cache line of `address` at all levels.
#[inline]
pub(super) fn prefetch(address: usize) {
    // SAFETY: a prefetch of any address is allowed; it faults nowhere and gives nothing.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(ptr::without_provenance(address)) }
}
