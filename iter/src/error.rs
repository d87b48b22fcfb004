//! What the iterators' operations refuse.

/// Why an operation on an [`IovIter`](crate::IovIter) was refused; the iterator is unchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IterError {
    /// A revert past the iterator's origin.
    #[error("cannot revert by {by} bytes after {consumed}")]
    RevertPastStart {
        /// Bytes to go back.
        by: usize,
        /// Bytes from the origin to the position.
        consumed: usize,
    },
    /// A re-expansion past the iterator's end.
    #[error("cannot expand to {count} bytes, only {left} are left")]
    ExpandPastEnd {
        /// Bytes asked for.
        count: usize,
        /// Bytes from the position to the end, truncated ones included.
        left: usize,
    },
    /// A cursor of another iterator, or of this one before it was split or shortened.
    #[error("the cursor does not belong to this iterator as it is now")]
    ForeignCursor,
    /// A split past the remaining bytes.
    #[error("cannot split after {at} bytes, only {count} remain")]
    SplitPastEnd {
        /// Where to split, in bytes from the position.
        at: usize,
        /// Bytes remaining.
        count: usize,
    },
    /// A range that no region covers.
    #[error("guest range {guest:#x}+{len:#x} is not mapped")]
    Unmapped {
        /// Start of the range.
        guest: u64,
        /// Its length in bytes.
        len: u32,
    },
    /// A sum of lengths that does not fit.
    #[error("the segments' lengths overflow")]
    Overflow,
    /// A `_full` copy that could not be completed; the position is as before, but bytes that
    /// were copied stay copied.
    #[error("copied {done} of {want} bytes")]
    Short {
        /// Bytes to copy.
        want: usize,
        /// Bytes copied.
        done: usize,
    },
}
