//! Sizes and positions on a device, each in its own type.

use thiserror::Error;

/// log2 of the unit virtio-blk counts in, whatever the block size (virtio 5.2.4).
pub const SECTOR_SHIFT: u32 = 9;

/// Bytes of one sector.
pub const SECTOR_SIZE: u64 = 1 << SECTOR_SHIFT;

/// A position or an amount in 512-byte sectors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sector(pub u64);

impl Sector {
    /// The byte this sector starts at, or `None` beyond 2^64.
    #[must_use]
    pub const fn bytes(self) -> Option<u64> {
        // `checked_shl` only guards the shift amount; it drops high bits without a word.
        self.0.checked_mul(SECTOR_SIZE)
    }

    /// The last whole sector that `bytes` bytes have room for.
    #[must_use]
    pub const fn floor(bytes: u64) -> Self {
        Self(bytes >> SECTOR_SHIFT)
    }
}

/// A range of bytes that lies inside a device.
///
/// # Invariants
/// `offset + len` does not overflow and was not beyond the capacity the extent was checked against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    offset: u64,
    len: u64,
}

impl Extent {
    /// `len` bytes from sector `start` of a device with `capacity` sectors.
    ///
    /// # Errors
    /// [`OutOfRange`] when the range ends beyond the capacity, or beyond 2^64 bytes.
    pub fn new(start: Sector, len: u64, capacity: Sector) -> Result<Self, OutOfRange> {
        let refused = OutOfRange {
            start,
            len,
            capacity,
        };
        let offset = start.bytes().ok_or(refused)?;
        let limit = capacity.bytes().ok_or(refused)?;
        let end = offset.checked_add(len).ok_or(refused)?;
        if end <= limit {
            Ok(Self { offset, len })
        } else {
            Err(refused)
        }
    }

    /// No bytes, at the start of the device.
    pub(crate) const EMPTY: Self = Self { offset: 0, len: 0 };

    /// The first byte, from the start of the device.
    #[must_use]
    pub const fn offset(&self) -> u64 {
        self.offset
    }

    /// The length in bytes.
    #[must_use]
    pub const fn len(&self) -> u64 {
        self.len
    }

    /// Whether the range has no bytes.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The first byte after the range.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.offset + self.len
    }

    /// Whether both ends lie on a multiple of `block` bytes; `block` is a power of two.
    #[must_use]
    pub const fn is_aligned(&self, block: u32) -> bool {
        let mask = (block as u64).wrapping_sub(1);
        (self.offset | self.len) & mask == 0
    }

    /// The extent without its first `bytes` bytes; empty when it has no more than that.
    #[must_use]
    pub const fn advance(self, bytes: u64) -> Self {
        let step = if bytes < self.len { bytes } else { self.len };
        Self {
            offset: self.offset + step,
            len: self.len - step,
        }
    }
}

impl Extent {
    /// The part of the extent that consists of whole units of `unit` bytes, a power of two.
    pub(crate) fn whole_units(self, unit: u32) -> Self {
        let unit = u64::from(unit.max(1));
        let last = self.end() - self.end() % unit;
        match self.offset.checked_next_multiple_of(unit) {
            Some(first) if first < last => Self {
                offset: first,
                len: last - first,
            },
            Some(_) | None => Self {
                offset: self.offset,
                len: 0,
            },
        }
    }

    /// The part of the extent before byte `end` of the device.
    pub(crate) const fn until(self, end: u64) -> Self {
        let room = end.saturating_sub(self.offset);
        Self {
            offset: self.offset,
            len: if room < self.len { room } else { self.len },
        }
    }
}

/// A range that ends beyond the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("{len} bytes from sector {} end beyond the device's {} sectors", start.0, capacity.0)]
pub struct OutOfRange {
    /// Where the range starts.
    pub start: Sector,
    /// How long it is, in bytes.
    pub len: u64,
    /// What the device has.
    pub capacity: Sector,
}

/// Whether a device takes writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reads and writes.
    ReadWrite,
    /// Reads only: writes, discards and write-zeroes end in [`crate::IoError::ReadOnly`].
    ReadOnly,
}

/// What a device looks like: size, block size and topology (virtio 5.2.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// The size. Always a whole number of blocks.
    pub capacity: Sector,
    /// The smallest unit of a transfer and of an offset, in bytes; a power of two, 512 at least.
    pub block_size: u32,
    /// log2 of the logical blocks in one physical block.
    pub physical_block_exp: u8,
    /// The first logical block that starts a physical one.
    pub alignment_offset: u8,
    /// The smallest transfer that is not slower than it need be, in logical blocks.
    pub min_io_blocks: u16,
    /// The transfer size the device likes best, in logical blocks; 0 when it does not say.
    pub opt_io_blocks: u32,
    /// Whether it takes writes.
    pub access: Access,
}

impl Geometry {
    /// A device without a topology of its own: every block is a physical block.
    ///
    /// `size` is in bytes; what does not fill a block is left out.
    #[must_use]
    pub const fn flat(size: u64, block_size: u32, access: Access) -> Self {
        Self {
            capacity: Sector::floor(size - size % block_size as u64),
            block_size,
            physical_block_exp: 0,
            alignment_offset: 0,
            min_io_blocks: 1,
            opt_io_blocks: 0,
            access,
        }
    }
}

/// The smallest and the largest block size a device may have, in bytes.
pub const BLOCK_SIZES: std::ops::RangeInclusive<u32> = 512..=65536;

/// Whether `block_size` is a power of two that [`BLOCK_SIZES`] allows.
#[must_use]
pub fn is_block_size(block_size: u32) -> bool {
    block_size.is_power_of_two() && BLOCK_SIZES.contains(&block_size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_extent_may_end_at_the_capacity_and_not_beyond() {
        let whole = Extent::new(Sector(0), 8 << SECTOR_SHIFT, Sector(8)).unwrap();
        assert_eq!((whole.offset(), whole.len(), whole.end()), (0, 4096, 4096));
        let last = Extent::new(Sector(7), 512, Sector(8)).unwrap();
        assert_eq!((last.offset(), last.end()), (3584, 4096));
        assert!(Extent::new(Sector(7), 513, Sector(8)).is_err());
        assert!(Extent::new(Sector(8), 1, Sector(8)).is_err());
        assert!(Extent::new(Sector(8), 0, Sector(8)).unwrap().is_empty());
        assert!(Extent::new(Sector(9), 0, Sector(8)).is_err());
    }

    #[test]
    fn a_sector_does_not_wrap_when_it_becomes_a_byte() {
        assert_eq!(Sector(1 << 55).bytes(), None);
        assert!(Extent::new(Sector(1 << 55), 512, Sector(8)).is_err());
        assert!(Extent::new(Sector((1 << 55) - 1), 513, Sector((1 << 55) - 1)).is_err());
        assert!(Extent::new(Sector(1), u64::MAX, Sector((1 << 55) - 1)).is_err());
        assert!(Extent::new(Sector(0), 512, Sector(u64::MAX)).is_err());
    }

    #[test]
    fn alignment_looks_at_both_ends() {
        let at = |start, len| Extent::new(Sector(start), len, Sector(64)).unwrap();
        assert!(at(8, 4096).is_aligned(4096));
        assert!(!at(1, 4096).is_aligned(4096));
        assert!(!at(8, 512).is_aligned(4096));
        assert!(at(1, 512).is_aligned(512));
        assert!(!at(1, 511).is_aligned(512));
    }

    #[test]
    fn advancing_stops_at_the_end() {
        let at = Extent::new(Sector(2), 1024, Sector(64)).unwrap();
        assert_eq!(
            (at.advance(512).offset(), at.advance(512).len()),
            (1536, 512)
        );
        assert_eq!(
            (at.advance(9999).offset(), at.advance(9999).len()),
            (2048, 0)
        );
    }

    #[test]
    fn whole_units_lie_inside_the_extent() {
        let whole = |start, len| {
            let at = Extent::new(Sector(start), len, Sector(64))
                .unwrap()
                .whole_units(4096);
            (at.offset(), at.len())
        };
        assert_eq!(whole(0, 4096), (0, 4096));
        assert_eq!(whole(1, 4096).1, 0);
        assert_eq!(whole(1, 4096 + 3584), (4096, 4096));
        assert_eq!(whole(9, 512).1, 0);
        assert_eq!(whole(7, 3 * 4096), (4096, 8192));
    }

    #[test]
    fn a_flat_geometry_leaves_out_the_part_of_a_block() {
        let geometry = Geometry::flat(4096 * 3 + 512, 4096, Access::ReadWrite);
        assert_eq!(geometry.capacity, Sector(24));
        assert!(is_block_size(512) && is_block_size(4096) && is_block_size(65536));
        assert!(!is_block_size(0) && !is_block_size(256) && !is_block_size(520));
    }
}
