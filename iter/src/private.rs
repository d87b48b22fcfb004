//! Memory of the daemon's own: bounce buffers, staging, tests.
#![expect(unsafe_code, reason = "advises the kernel about a mapping")]

use std::io;

use vm_memory::mmap::MmapRegionError;
use vm_memory::{MmapRegion, VolatileMemory, VolatileSlice};

/// Page-aligned memory that belongs to the daemon alone and is never logged.
///
/// Zero at first. Kept out of forked children, where copy-on-write could leave a device's data in
/// the wrong process.
#[derive(Debug)]
pub struct PrivateMemory {
    mapping: MmapRegion<()>,
    len: usize,
}

impl PrivateMemory {
    /// Memory of `len` bytes.
    ///
    /// # Errors
    /// The kernel's; `InvalidInput` when `len` is zero.
    pub fn new(len: usize) -> io::Result<Self> {
        let mapping = MmapRegion::new(len).map_err(|error| match error {
            MmapRegionError::Mmap(error) => error,
            other @ (MmapRegionError::InvalidOffsetLength
            | MmapRegionError::InvalidPointer
            | MmapRegionError::MapFixed
            | MmapRegionError::MappingOverlap
            | MmapRegionError::MappingPastEof) => io::Error::other(other),
        })?;
        let advice = libc::MADV_DONTFORK;
        // SAFETY: `mapping` owns the range; the advice changes no contents.
        if unsafe { libc::madvise(mapping.as_ptr().cast(), mapping.size(), advice) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { mapping, len })
    }

    /// Length in bytes; never zero.
    #[expect(clippy::len_without_is_empty, reason = "private memory is never empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// The `len` bytes from `offset` on, or nothing if they do not lie inside.
    #[inline]
    pub fn slice(&self, offset: usize, len: usize) -> Option<VolatileSlice<'_>> {
        self.mapping.get_slice(offset, len).ok()
    }

    /// Copies from `offset` on into `buf`; the bytes copied, fewer if the memory ends before.
    pub fn read(&self, offset: usize, buf: &mut [u8]) -> usize {
        let len = buf.len().min(self.len.saturating_sub(offset));
        self.slice(offset, len)
            .map_or(0, |slice| slice.copy_to(buf))
    }

    /// Copies `buf` to `offset` and on; the bytes copied, fewer if the memory ends before.
    pub fn write(&self, offset: usize, buf: &[u8]) -> usize {
        let len = buf.len().min(self.len.saturating_sub(offset));
        let Some(slice) = self.slice(offset, len) else {
            return 0;
        };
        slice.copy_from(buf);
        len
    }
}
