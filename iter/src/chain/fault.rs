//! What a driver can get wrong in a chain.

/// Why a chain was refused. All of it is the driver's fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainFault {
    /// The head is not an index of the descriptor table.
    #[error("head {head} in a ring of {size}")]
    HeadOutOfRange {
        /// The head.
        head: u16,
        /// The ring's size.
        size: u16,
    },
    /// A `next` field is not an index of its table.
    #[error("next descriptor {next} in a table of {size}")]
    NextOutOfRange {
        /// The index.
        next: u16,
        /// Descriptors in the table.
        size: u32,
    },
    /// More descriptors than the table has, so some of them come twice (virtio 2.7.5.2: chains
    /// must not be longer than the queue; loops).
    #[error("cycle among the {size} descriptors of a table")]
    Cycle {
        /// Descriptors in the table.
        size: u32,
    },
    /// A source descriptor after a dest descriptor (virtio 2.7.4.2).
    #[error("a readable descriptor follows a writable one")]
    ReadableAfterWritable,
    /// A descriptor's buffer that no region covers.
    #[error("descriptor for {len:#x} bytes at guest address {guest:#x} is not mapped")]
    Unmapped {
        /// Start of the buffer.
        guest: u64,
        /// Its length in bytes.
        len: u32,
    },
    /// An indirect table that no region covers where it is read.
    #[error("indirect table at guest address {guest:#x} is not mapped")]
    IndirectUnmapped {
        /// Where it is not mapped.
        guest: u64,
    },
    /// An indirect table whose length is zero, not a multiple of 16, or more than 65536
    /// descriptors (virtio 2.7.5.3).
    #[error("indirect table of {len:#x} bytes")]
    IndirectLength {
        /// Its length in bytes.
        len: u32,
    },
    /// An indirect descriptor in an indirect table (virtio 2.7.5.3.1).
    #[error("an indirect table refers to an indirect table")]
    IndirectNested,
    /// A descriptor with both INDIRECT and NEXT (virtio 2.7.5.3.1).
    #[error("a descriptor has both INDIRECT and NEXT")]
    IndirectNext,
    /// More non-empty descriptors than the limit, or more region crossings than regions.
    #[error("more than {limit} segments")]
    TooManySegments {
        /// The limit.
        limit: u32,
    },
    /// More bytes than the limit.
    #[error("more than {limit} bytes")]
    TooManyBytes {
        /// The limit.
        limit: u64,
    },
}
