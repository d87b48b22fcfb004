//! Guest memory as a front end has it.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU16, Ordering};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory, VolatileMemoryError};

use super::Outcome;

/// Where the front end says its memory is, in its own address space: anything will do, since the
/// back end only subtracts it.
const FRONT_END_BASE: u64 = 0x7f00_0000_0000;

/// Where a region is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Guest address.
    pub guest: u64,
    /// Bytes.
    pub size: u64,
    /// Offset in its file.
    pub offset: u64,
}

/// One region of guest memory in a memfd of its own.
#[derive(Debug)]
pub struct GuestRam {
    layout: Layout,
    file: File,
    region: MmapRegion<()>,
}

impl GuestRam {
    /// Memory of zeroes from guest address zero.
    ///
    /// # Errors
    /// The kernel's.
    pub fn new(size: u64) -> Outcome<GuestRam> {
        GuestRam::at(Layout {
            guest: 0,
            size,
            offset: 0,
        })
    }

    /// Memory of zeroes.
    ///
    /// # Errors
    /// The kernel's.
    pub fn at(layout: Layout) -> Outcome<GuestRam> {
        let file = File::from(memfd_create("guest-ram", MemfdFlags::CLOEXEC)?);
        ftruncate(&file, layout.offset + layout.size)?;
        let mapped = FileOffset::new(file.try_clone()?, layout.offset);
        let region = MmapRegion::from_file(mapped, usize::try_from(layout.size)?)?;
        Ok(GuestRam {
            layout,
            file,
            region,
        })
    }

    /// Where it is.
    #[must_use]
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Its file.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The front-end address of a guest address.
    #[must_use]
    pub fn front_end(&self, guest: u64) -> u64 {
        FRONT_END_BASE + guest
    }

    /// The region as a message lists it.
    #[must_use]
    pub fn numbers(&self) -> [u64; 4] {
        let Layout {
            guest,
            size,
            offset,
        } = self.layout;
        [guest, size, self.front_end(guest), offset]
    }

    /// Takes the file away under whoever has mapped it.
    ///
    /// # Errors
    /// The kernel's.
    pub fn truncate(&self, bytes: u64) -> Outcome {
        Ok(ftruncate(&self.file, bytes)?)
    }

    /// Writes bytes at a guest address.
    ///
    /// # Errors
    /// When they do not lie inside.
    pub fn write(&self, guest: u64, bytes: &[u8]) -> Outcome {
        self.slice(guest, bytes.len())?.copy_from(bytes);
        Ok(())
    }

    /// Reads bytes at a guest address.
    ///
    /// # Errors
    /// When they do not lie inside.
    pub fn read(&self, guest: u64, count: usize) -> Outcome<Vec<u8>> {
        let mut bytes = vec![0; count];
        self.slice(guest, count)?.copy_to(&mut bytes);
        Ok(bytes)
    }

    /// Loads a ring's index or flags, with what was written before it.
    ///
    /// # Errors
    /// When it does not lie inside.
    pub fn load(&self, guest: u64) -> Outcome<u16> {
        let offset = self.offset(guest)?;
        Ok(self
            .region
            .get_atomic_ref::<AtomicU16>(offset)?
            .load(Ordering::SeqCst))
    }

    /// Stores a ring's index or flags, after what was written before it.
    ///
    /// # Errors
    /// When it does not lie inside.
    pub fn store(&self, guest: u64, value: u16) -> Outcome {
        let offset = self.offset(guest)?;
        self.region
            .get_atomic_ref::<AtomicU16>(offset)?
            .store(value, Ordering::SeqCst);
        Ok(())
    }

    fn slice(
        &self,
        guest: u64,
        count: usize,
    ) -> Outcome<vm_memory::VolatileSlice<'_, impl BitmapSlice>> {
        Ok(self.region.get_slice(self.offset(guest)?, count)?)
    }

    fn offset(&self, guest: u64) -> Outcome<usize> {
        let offset = guest.checked_sub(self.layout.guest);
        let addr = usize::try_from(guest)?;
        let offset = offset.ok_or(VolatileMemoryError::OutOfBounds { addr })?;
        Ok(usize::try_from(offset)?)
    }
}
