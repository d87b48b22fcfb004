//! The memory a front end shares for the data of its requests.

use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd;

use rustix::fs::MemfdFlags;
use virtio_driver::VirtioBlkTransport;
use vm_memory::mmap::MmapRegion;
use vm_memory::{FileOffset, VolatileMemory, VolatileSlice};

use super::{DriverError, Spec, refused};

/// One shared mapping, cut into equal slots: those of the first queue, then of the second.
pub(super) struct Memory {
    region: MmapRegion,
    file: File,
    slots: u32,
    slot_bytes: usize,
}

impl Memory {
    pub(super) fn new(spec: &Spec) -> Result<Self, DriverError> {
        // Slots start on pages, so that a slot's own alignment is the device's concern only when
        // a test asks for it.
        let slot_bytes = spec.slot_bytes.next_multiple_of(PAGE);
        let bytes = slot_bytes * spec.slots as usize * spec.queues;
        let file = rustix::fs::memfd_create("front-end-memory", MemfdFlags::CLOEXEC)
            .map_err(|errno| refused("create shared memory")(errno.into()))?;
        let file = File::from(file);
        file.set_len(bytes as u64)
            .map_err(refused("size the shared memory"))?;
        let duplicate = file
            .try_clone()
            .map_err(refused("duplicate a descriptor"))?;
        let region = MmapRegion::from_file(FileOffset::new(duplicate, 0), bytes)?;
        // Pages are there before the first request: a measurement is not of page faults.
        if let Ok(all) = region.get_slice(0, bytes) {
            all.copy_from(&vec![0_u8; bytes]);
        }
        Ok(Self {
            region,
            file,
            slots: spec.slots,
            slot_bytes,
        })
    }

    /// Shares the mapping with the back end, at its own addresses.
    pub(super) fn register(&self, transport: &mut VirtioBlkTransport) -> Result<(), DriverError> {
        let address = self.region.as_ptr() as usize;
        transport
            .map_mem_region(address, self.region.size(), self.file.as_raw_fd(), 0)
            .map(drop)
            .map_err(refused("share memory"))
    }

    /// The bytes `range` of a queue's slot.
    pub(super) fn slice(
        &self,
        queue: usize,
        slot: u32,
        range: &Range<usize>,
    ) -> Result<VolatileSlice<'_>, DriverError> {
        let missing = || DriverError::NoSuchSlot {
            slot,
            start: range.start,
            end: range.end,
        };
        if slot >= self.slots || range.end > self.slot_bytes || range.start > range.end {
            return Err(missing());
        }
        let first = (queue * self.slots as usize + slot as usize) * self.slot_bytes;
        self.region
            .get_slice(first + range.start, range.len())
            .ok()
            .ok_or_else(missing)
    }
}

const PAGE: usize = 4096;
