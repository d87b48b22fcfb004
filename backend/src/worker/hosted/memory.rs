//! The host's guest memory, as a memory table and as a dirty log.

use std::sync::Arc;

use iov_iter::{DirtyLog, MemoryTable, RegionSpec};
use vm_memory::bitmap::Bitmap;
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::{HostError, Memory};

/// Maps the same files again. The host unmaps a region as soon as it replaced it, with requests
/// still in flight; and its mappings are neither guarded against a file that shrinks nor kept out
/// of core dumps. The front end's addresses are known to the host alone, and nobody here asks.
pub(super) fn table(memory: &Memory) -> Result<MemoryTable, HostError> {
    let specs: Result<Vec<_>, _> = memory.iter().map(spec).collect();
    Ok(MemoryTable::new(specs?)?)
}

fn spec<R: GuestMemoryRegion>(region: &R) -> Result<RegionSpec, HostError> {
    let guest_addr = region.start_addr().raw_value();
    let file = region.file_offset().ok_or(HostError::NoFile(guest_addr))?;
    let duplicate = file.file().try_clone().map_err(HostError::Duplicate)?;
    Ok(RegionSpec {
        guest_addr,
        size: region.len(),
        front_end_addr: guest_addr,
        mmap_offset: file.start(),
        file: duplicate.into(),
    })
}

/// The regions' bitmaps: what the host made of the front end's log. What a request moves by DMA, no
/// access through the host's memory marks.
#[derive(Debug)]
pub(super) struct Bitmaps(pub(super) Arc<Memory>);

impl DirtyLog for Bitmaps {
    fn mark(&self, guest: u64, len: u64) {
        let (mut guest, mut left) = (guest, len);
        while left > 0 {
            let Some(region) = self.0.find_region(GuestAddress(guest)) else {
                return;
            };
            let offset = guest - region.start_addr().raw_value();
            let here = left.min(region.len() - offset);
            if let (Ok(offset), Ok(here)) = (usize::try_from(offset), usize::try_from(here)) {
                region.bitmap().mark_dirty(offset, here);
            }
            left -= here;
            let Some(next) = guest.checked_add(here) else {
                return;
            };
            guest = next;
        }
    }
}
