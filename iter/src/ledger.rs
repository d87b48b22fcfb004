//! The ledger of holds: in debug and test builds, proof that each was released exactly once.
//!
//! It counts per thread, as holds never leave theirs, and exists in builds with debug assertions
//! only.

use std::cell::Cell;

thread_local! {
    static ACQUIRED: Cell<usize> = const { Cell::new(0) };
    static RELEASED: Cell<usize> = const { Cell::new(0) };
}

/// Holds this thread took and has not yet released.
pub fn outstanding() -> usize {
    ACQUIRED.get().wrapping_sub(RELEASED.get())
}

/// Holds this thread ever took.
pub fn acquired() -> usize {
    ACQUIRED.get()
}

pub(crate) fn acquire() {
    ACQUIRED.set(ACQUIRED.get().wrapping_add(1));
}

pub(crate) fn release() {
    assert!(
        outstanding() > 0,
        "a hold was released that was never taken"
    );
    RELEASED.set(RELEASED.get().wrapping_add(1));
}
