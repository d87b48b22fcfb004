//! What a device is asked to do.

use iov_iter::{Dest, Held, Hold, Source};

use crate::completion::IoError;
use crate::geometry::{Access, Extent, Geometry};

/// The index of a request in flight, chosen by whoever preps it and unique on its ring.
///
/// The ring keeps one slot per tag up to the highest it has seen, so tags are small numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag(pub u32);

/// When a change counts as done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// When the device has taken it; a later flush makes it stable.
    Cached,
    /// When it is on stable storage.
    Durable,
}

/// What write-zeroes may do with the space (virtio 5.2.6, the unmap flag).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unmap {
    /// The space may be given back.
    Allowed,
    /// The space stays allocated.
    Forbidden,
}

/// One operation, with the memory it works on by value.
#[derive(Debug)]
pub enum Op {
    /// Device to memory.
    Read {
        /// Where on the device.
        at: Extent,
        /// Where in memory; as long as `at`.
        into: Held<Dest>,
    },
    /// Memory to device.
    Write {
        /// Where on the device.
        at: Extent,
        /// Where in memory; as long as `at`.
        from: Held<Source>,
        /// When it is done.
        durability: Durability,
    },
    /// Makes every write that completed before stable.
    Flush {
        /// Keeps the request's memory mapped for its status byte.
        hold: Hold,
    },
    /// The contents are no longer needed; what is read afterwards is unspecified.
    Discard {
        /// Where on the device.
        at: Extent,
        /// When it is done.
        durability: Durability,
        /// Keeps the request's memory mapped for its status byte.
        hold: Hold,
    },
    /// What is read afterwards is zero.
    WriteZeroes {
        /// Where on the device.
        at: Extent,
        /// Whether the space may be given back.
        unmap: Unmap,
        /// When it is done.
        durability: Durability,
        /// Keeps the request's memory mapped for its status byte.
        hold: Hold,
    },
}

impl Op {
    /// Where on the device it works; `None` for a flush.
    #[must_use]
    pub fn extent(&self) -> Option<Extent> {
        match self {
            Self::Read { at, .. }
            | Self::Write { at, .. }
            | Self::Discard { at, .. }
            | Self::WriteZeroes { at, .. } => Some(*at),
            Self::Flush { .. } => None,
        }
    }

    /// When it counts as done; reads and flushes have no choice and say `Cached`.
    #[must_use]
    pub fn durability(&self) -> Durability {
        match self {
            Self::Write { durability, .. }
            | Self::Discard { durability, .. }
            | Self::WriteZeroes { durability, .. } => *durability,
            Self::Read { .. } | Self::Flush { .. } => Durability::Cached,
        }
    }

    /// Bytes it transfers between memory and the device: zero for all but read and write.
    #[must_use]
    pub fn payload(&self) -> u64 {
        match self {
            Self::Read { at, .. } | Self::Write { at, .. } => at.len(),
            Self::Flush { .. } | Self::Discard { .. } | Self::WriteZeroes { .. } => 0,
        }
    }

    /// Whether a device of this geometry can do it at all. Every channel asks before it starts.
    ///
    /// # Errors
    /// What the op's completion has to say when it cannot: the capacity may have shrunk since the
    /// extent was checked, and only the device knows its block size and access.
    pub fn check(&self, geometry: &Geometry) -> Result<(), IoError> {
        let (at, memory, writes) = match self {
            Self::Read { at, into } => (at, Some(into.len()), false),
            Self::Write { at, from, .. } => (at, Some(from.len()), true),
            Self::Discard { at, .. } | Self::WriteZeroes { at, .. } => (at, None, true),
            Self::Flush { .. } => return Ok(()),
        };
        if writes && geometry.access == Access::ReadOnly {
            return Err(IoError::ReadOnly);
        }
        if !at.is_aligned(geometry.block_size) {
            return Err(IoError::Misaligned {
                block_size: geometry.block_size,
            });
        }
        if geometry
            .capacity
            .bytes()
            .is_none_or(|limit| at.end() > limit)
        {
            return Err(IoError::OutOfRange);
        }
        match memory {
            Some(len) if len as u64 != at.len() || u32::try_from(len).is_err() => {
                Err(IoError::Os(libc::EINVAL))
            }
            Some(_) | None => Ok(()),
        }
    }
}
