//! Indirect tables, read one descriptor at a time.
#![deny(
    clippy::as_conversions,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

use virtio_queue::desc::split::Descriptor;
use vm_memory::{ByteValued, VolatileMemory, VolatileSlice};

use super::ChainFault;
use crate::view::View;

/// An indirect table. It may lie at any address (virtio asks for no alignment) and may cross
/// regions, and then even inside a descriptor.
pub(super) struct IndirectTable<'a> {
    view: &'a View,
    guest: u64,
    /// Descriptors in the table: 1 to 65536.
    size: u32,
    /// The table's memory, if all of it lies in one region.
    whole: Option<VolatileSlice<'a>>,
}

impl<'a> IndirectTable<'a> {
    /// The table of `len` bytes at `guest`.
    #[inline]
    pub(super) fn new(view: &'a View, guest: u64, len: u32) -> Result<Self, ChainFault> {
        let size = len / DESCRIPTOR_SIZE;
        if len == 0 || !len.is_multiple_of(DESCRIPTOR_SIZE) || size > MAX_DESCRIPTORS {
            return Err(ChainFault::IndirectLength { len });
        }
        let first = view
            .segment(guest, len)
            .ok_or(ChainFault::IndirectUnmapped { guest })?;
        let whole = if first.len == len {
            view.table().slice(&first)
        } else {
            None
        };
        Ok(Self {
            view,
            guest,
            size,
            whole,
        })
    }

    #[inline]
    pub(super) fn size(&self) -> u32 {
        self.size
    }

    /// One copy of descriptor `index`.
    #[inline]
    pub(super) fn load(&self, index: u16) -> Result<Descriptor, ChainFault> {
        if u32::from(index) >= self.size {
            return Err(ChainFault::NextOutOfRange {
                next: index,
                size: self.size,
            });
        }
        let Some(whole) = &self.whole else {
            return self.load_pieces(index);
        };
        let offset = usize::from(index).wrapping_mul(size_of::<Descriptor>());
        match whole.get_ref::<Descriptor>(offset) {
            Ok(descriptor) => Ok(descriptor.load()),
            Err(_outside) => Err(ChainFault::NextOutOfRange {
                next: index,
                size: self.size,
            }),
        }
    }

    /// As [`load`](Self::load), for a table that crosses regions: each piece is read once.
    #[cold]
    fn load_pieces(&self, index: u16) -> Result<Descriptor, ChainFault> {
        let offset = u64::from(index).wrapping_mul(u64::from(DESCRIPTOR_SIZE));
        // Where this wraps, nothing is mapped: no region ends beyond the address space.
        let guest = self.guest.wrapping_add(offset);
        let mut descriptor = Descriptor::default();
        let mut rest = descriptor.as_mut_slice();
        for piece in self.view.segments(guest, DESCRIPTOR_SIZE) {
            let unmapped = ChainFault::IndirectUnmapped { guest };
            let piece = piece.map_err(|_unmapped| unmapped)?;
            let memory = self.view.table().slice(&piece).ok_or(unmapped)?;
            let (now, later) = rest.split_at_mut_checked(piece.size()).ok_or(unmapped)?;
            memory.copy_to(now);
            rest = later;
        }
        Ok(descriptor)
    }
}

/// Bytes of a descriptor (virtio 2.7.5).
const DESCRIPTOR_SIZE: u32 = 16;
/// Descriptors a 16-bit `next` can tell apart.
const MAX_DESCRIPTORS: u32 = 65536;
