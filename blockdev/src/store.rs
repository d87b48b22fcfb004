//! Blocks in anonymous memory: what the memory device and the fault device keep them in.

#![expect(unsafe_code, reason = "gives pages back to the kernel with madvise")]

use std::io;

use vm_memory::{MmapRegion, VolatileMemory, VolatileSlice};

use crate::geometry::Extent;
use crate::open::OpenError;

/// Memory that any number of channels read and write at once.
///
/// Nothing here is a Rust reference to the bytes: a guest may well write a block while it reads it,
/// and then gets a mixture, as it would from a disk.
#[derive(Debug)]
pub(crate) struct Store {
    region: MmapRegion,
}

impl Store {
    /// Zeroes. Pages are only taken from the host when they are written.
    pub(crate) fn new(size: u64) -> Result<Self, OpenError> {
        let bytes = usize::try_from(size).map_err(|source| OpenError::Memory {
            size,
            source: Box::new(source),
        })?;
        let region = MmapRegion::new(bytes).map_err(|source| OpenError::Memory {
            size,
            source: Box::new(source),
        })?;
        Ok(Self { region })
    }

    /// Copies from `offset` on into the slices, one after the other; gives the bytes copied.
    pub(crate) fn read<'a>(
        &self,
        offset: u64,
        into: impl Iterator<Item = VolatileSlice<'a>>,
    ) -> u64 {
        let mut here = offset;
        for slice in into {
            let Some(from) = self.slice(here, slice.len()) else {
                break;
            };
            from.copy_to_volatile_slice(slice);
            here += slice.len() as u64;
        }
        here - offset
    }

    /// Copies the slices, one after the other, to `offset` and on; gives the bytes copied.
    pub(crate) fn write<'a>(
        &self,
        offset: u64,
        from: impl Iterator<Item = VolatileSlice<'a>>,
    ) -> u64 {
        let mut here = offset;
        for slice in from {
            let Some(into) = self.slice(here, slice.len()) else {
                break;
            };
            slice.copy_to_volatile_slice(into);
            here += slice.len() as u64;
        }
        here - offset
    }

    /// Zeroes a range and keeps its pages.
    pub(crate) fn zero(&self, at: Extent) {
        let mut rest = at;
        while !rest.is_empty() {
            let step = rest.len().min(ZEROES.len() as u64);
            let count = usize::try_from(step).unwrap_or(ZEROES.len());
            if let Some(slice) = self.slice(rest.offset(), count) {
                slice.copy_from(&ZEROES[..count]);
            }
            rest = rest.advance(step);
        }
    }

    /// Zeroes a range, giving back the pages that lie wholly inside it.
    pub(crate) fn forget(&self, at: Extent) {
        let first_page = at.offset().next_multiple_of(PAGE);
        let last_page = at.end() - at.end() % PAGE;
        if first_page >= last_page || !self.drop_pages(first_page, last_page - first_page) {
            return self.zero(at);
        }
        self.zero(at.until(first_page));
        self.zero(at.advance(last_page - at.offset()));
    }

    /// Gives whole pages back, which makes them zero.
    fn drop_pages(&self, offset: u64, len: u64) -> bool {
        let Ok(count) = usize::try_from(len) else {
            return false;
        };
        let Some(slice) = self.slice(offset, count) else {
            return false;
        };
        let start = slice.ptr_guard_mut();
        // SAFETY: `slice` checked that the pages lie inside the region, a private anonymous mapping
        // that `self` owns; its bytes are only ever accessed as volatile, never by reference.
        let result = unsafe { libc::madvise(start.as_ptr().cast(), count, libc::MADV_DONTNEED) };
        if result != 0 {
            log::debug!("pages are not given back: {}", io::Error::last_os_error());
        }
        result == 0
    }

    fn slice(&self, offset: u64, len: usize) -> Option<VolatileSlice<'_>> {
        self.region
            .get_slice(usize::try_from(offset).ok()?, len)
            .ok()
    }
}

/// The unit madvise works in. Larger pages of other machines make it refuse, and then zeroes are
/// written instead.
const PAGE: u64 = 4096;

static ZEROES: [u8; 4096] = [0; 4096];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::Sector;

    fn fill(store: &Store, len: usize) {
        store.slice(0, len).unwrap().copy_from(&vec![0xa5u8; len]);
    }

    fn bytes(store: &Store, len: usize) -> Vec<u8> {
        let mut bytes = vec![0u8; len];
        store.slice(0, len).unwrap().copy_to(&mut bytes);
        bytes
    }

    #[test]
    fn forgetting_and_zeroing_touch_their_range_only() {
        const SIZE: usize = 64 * 1024;
        let capacity = Sector::floor(SIZE as u64);
        for (start, len) in [
            (0, SIZE),
            (1, 512),
            (1, 4096),
            (7, 9 * 512),
            (8, 4096),
            (9, 40960),
        ] {
            for forget in [false, true] {
                let store = Store::new(SIZE as u64).unwrap();
                fill(&store, SIZE);
                let at = Extent::new(Sector(start), len as u64, capacity).unwrap();
                if forget {
                    store.forget(at);
                } else {
                    store.zero(at);
                }
                let first = at.offset() as usize;
                for (index, byte) in bytes(&store, SIZE).into_iter().enumerate() {
                    let inside = (first..first + len).contains(&index);
                    assert_eq!(
                        byte,
                        if inside { 0 } else { 0xa5 },
                        "byte {index} of {at:?}"
                    );
                }
            }
        }
    }
}
