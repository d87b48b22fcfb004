//! Segments: contiguous runs of guest memory inside one region.
#![deny(
    clippy::as_conversions,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

use vm_memory::{ByteValued, VolatileMemory};

use crate::hold::Hold;
use crate::memory::Line;

/// A contiguous run of guest memory inside one region of a memory table.
///
/// It knows its guest address (for the dirty log), its region and its offset there (for the host
/// address and registered buffers). It is a number, not a pointer: whoever touches the
/// memory resolves it through the table that a [`Hold`] keeps mapped, and that look-up is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest physical address of the first byte.
    pub guest: u64,
    /// Offset of the first byte from the region's start, in bytes.
    pub offset: u64,
    /// Index of the region in its memory table.
    pub region: u32,
    /// Length in bytes; never zero in an iterator.
    pub len: u32,
}

impl Segment {
    /// A place holder for unused entries of fixed arrays.
    pub(crate) const NOWHERE: Self = Self {
        guest: 0,
        offset: 0,
        region: u32::MAX,
        len: 0,
    };

    /// One copy of the value that the segment is as long as, and the cache line of its first byte;
    /// nothing if it is not as long, if the memory faulted, or if it is not of `hold`'s table.
    #[inline]
    pub fn load<T: ByteValued>(&self, hold: &Hold) -> Option<(T, Line)> {
        let (memory, region) = hold.view().table().resolve(self)?;
        let value = memory.get_ref::<T>(0).ok()?.load();
        let line = Line::at(memory.ptr_guard().as_ptr());
        (memory.len() == size_of::<T>() && !region.poisoned()).then_some((value, line))
    }

    /// Bytes, as the iterators count them.
    #[inline]
    pub fn size(&self) -> usize {
        usize::try_from(self.len).unwrap_or(usize::MAX)
    }

    /// The part of `len` bytes from byte `skip` on; shorter when the segment ends before.
    #[inline]
    pub(crate) fn part(&self, skip: u32, len: usize) -> Self {
        let rest = self.len.saturating_sub(skip);
        let skip = u64::from(self.len.min(skip));
        Self {
            guest: self.guest.wrapping_add(skip),
            offset: self.offset.wrapping_add(skip),
            region: self.region,
            len: u32::try_from(len).unwrap_or(u32::MAX).min(rest),
        }
    }
}

/// One guest byte, resolved: where a request's status goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusSlot {
    byte: Segment,
}

impl StatusSlot {
    /// The last byte of `segment`, if it has one.
    pub(crate) fn last_of(segment: &Segment) -> Option<Self> {
        let skip = segment.len.checked_sub(1)?;
        Some(Self {
            byte: segment.part(skip, 1),
        })
    }

    /// A segment of one byte.
    #[inline]
    pub(crate) fn only_of(segment: &Segment) -> Option<Self> {
        (segment.len == 1).then_some(Self { byte: *segment })
    }

    /// Writes the byte. `hold` is the one that came with the slot; through a hold on another
    /// table, where the byte does not lie, nothing is written.
    #[inline]
    pub fn write(&self, hold: &Hold, byte: u8) {
        if let Some(slice) = hold.view().table().slice(&self.byte)
            && let Ok(place) = slice.get_ref::<u8>(0)
        {
            place.store(byte);
        }
    }

    /// Guest physical address of the byte.
    pub fn guest(&self) -> u64 {
        self.byte.guest
    }

    /// The byte as a segment, for the dirty log.
    pub fn segment(&self) -> Segment {
        self.byte
    }
}
