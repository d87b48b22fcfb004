//! The direction of a transfer, as a type.

use std::fmt::Debug;

/// Which way bytes move through an [`IovIter`](crate::IovIter). Sealed: [`Source`] and [`Dest`]
/// are the only two there are.
pub trait Direction: sealed::Sealed + Copy + Debug + 'static {
    /// The direction's name, for logs and errors.
    const NAME: &'static str;
}

/// Memory the device reads from: descriptors without `VRING_DESC_F_WRITE` (virtio 2.7.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {}

/// Memory the device writes to: descriptors with `VRING_DESC_F_WRITE` (virtio 2.7.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dest {}

impl Direction for Source {
    const NAME: &'static str = "source";
}

impl Direction for Dest {
    const NAME: &'static str = "dest";
}

pub(crate) mod sealed {
    pub trait Sealed {
        /// Whether a transfer in this direction changes the memory, and so owes a dirty mark.
        const CHANGES_MEMORY: bool;
    }

    impl Sealed for super::Source {
        const CHANGES_MEMORY: bool = false;
    }

    impl Sealed for super::Dest {
        const CHANGES_MEMORY: bool = true;
    }
}
