//! Where a vring's three parts are, and where they are mapped.

use std::sync::Arc;

use iov_iter::{Area, MemoryError, MemoryTable};
use thiserror::Error;

use crate::limits::MAX_VRING_SIZE;

/// Bytes of one descriptor (virtio 2.7.5).
pub(super) const DESCRIPTOR_BYTES: usize = 16;
/// Bytes of one used element (virtio 2.7.8).
const USED_ELEMENT_BYTES: usize = 8;
/// Bytes beside the entries of the avail ring and of the used ring: flags, index and event
/// (virtio 2.7).
const RING_FIELD_BYTES: usize = 6;

/// The three parts of a vring as the front end names them (SET_VRING_ADDR): addresses in the front
/// end's own address space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Addresses {
    /// The descriptor table.
    pub desc: u64,
    /// The avail ring.
    pub avail: u64,
    /// The used ring.
    pub used: u64,
}

/// The three parts of a vring, found in one memory table.
#[derive(Clone, Debug)]
pub struct Areas {
    /// The descriptor table.
    pub desc: Area,
    /// The avail ring.
    pub avail: Area,
    /// The used ring.
    pub used: Area,
}

/// Why a vring cannot be placed.
#[derive(Debug, Error)]
pub enum VringError {
    /// SET_VRING_NUM gave a size that virtio 2.7 forbids.
    #[error("a vring of {0} entries: the size is a power of two, at most {MAX_VRING_SIZE}")]
    Size(u32),
    /// A part is not inside one region of the memory table.
    #[error("the {part} at front-end address {address:#x} is in no region of the memory table")]
    Unmapped {
        /// Which part.
        part: &'static str,
        /// Where the front end says it is.
        address: u64,
    },
    /// A part is in a region, but not usable there.
    #[error("the {part} at front-end address {address:#x} cannot be used")]
    Unusable {
        /// Which part.
        part: &'static str,
        /// Where the front end says it is.
        address: u64,
        /// What is wrong with it.
        source: MemoryError,
    },
}

/// Checks a vring's size, in entries.
///
/// # Errors
/// [`VringError::Size`] unless it is a power of two between 1 and [`MAX_VRING_SIZE`].
pub fn check_size(size: u32) -> Result<u16, VringError> {
    u16::try_from(size)
        .ok()
        .filter(|size| size.is_power_of_two() && *size <= MAX_VRING_SIZE)
        .ok_or(VringError::Size(size))
}

/// Bytes of the used ring of a vring with `size` entries (virtio 2.7).
#[must_use]
pub fn used_ring_bytes(size: u16) -> u64 {
    (usize::from(size) * USED_ELEMENT_BYTES + RING_FIELD_BYTES) as u64
}

/// Finds the three parts of a vring of `size` entries in a memory table.
///
/// Each part must lie in one region: a front end that maps its memory in pieces still hands out
/// rings from one of them. The alignments are those of virtio 2.7.
///
/// # Errors
/// The part that is unmapped or misaligned.
pub fn resolve(
    addresses: &Addresses,
    size: u16,
    table: &Arc<MemoryTable>,
) -> Result<Areas, VringError> {
    let size = usize::from(check_size(u32::from(size))?);
    let find = |part: &'static str, address: u64, len: usize, align: usize| {
        let guest = table
            .front_end_to_guest(address, len as u64)
            .ok_or(VringError::Unmapped { part, address })?;
        table
            .area(guest, len, align)
            .map_err(|source| VringError::Unusable {
                part,
                address,
                source,
            })
    };
    Ok(Areas {
        desc: find(
            "descriptor table",
            addresses.desc,
            size * DESCRIPTOR_BYTES,
            16,
        )?,
        avail: find(
            "avail ring",
            addresses.avail,
            size * 2 + RING_FIELD_BYTES,
            2,
        )?,
        used: find(
            "used ring",
            addresses.used,
            size * USED_ELEMENT_BYTES + RING_FIELD_BYTES,
            4,
        )?,
    })
}
