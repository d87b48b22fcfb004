//! The dirty log as a front end has it.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

use super::Outcome;

/// Bytes of guest memory that a bit stands for.
pub const PAGE: u64 = 4096;

/// A dirty log in a memfd, which the front end reads by taking its bits out.
#[derive(Debug)]
pub struct DirtyLog {
    file: File,
    bits: MmapRegion<()>,
    offset: u64,
}

impl DirtyLog {
    /// A log with a bit for every page below guest address `end`, in whole words, `offset` bytes
    /// into its file.
    ///
    /// # Errors
    /// The kernel's.
    pub fn new(end: u64, offset: u64) -> Outcome<DirtyLog> {
        let size = end.div_ceil(PAGE).div_ceil(64) * 8;
        let file = File::from(memfd_create("dirty-log", MemfdFlags::CLOEXEC)?);
        ftruncate(&file, offset + size)?;
        let all = FileOffset::new(file.try_clone()?, 0);
        let bits = MmapRegion::from_file(all, usize::try_from(offset + size)?)?;
        Ok(DirtyLog { file, bits, offset })
    }

    /// Its file.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Bytes of the log.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.bits.size() as u64 - self.offset
    }

    /// The payload of SET_LOG_BASE.
    #[must_use]
    pub fn payload(&self) -> Vec<u8> {
        [self.size(), self.offset]
            .iter()
            .flat_map(|number| number.to_ne_bytes())
            .collect()
    }

    /// Takes the bits out, word by word, and gives the pages that were marked. What is marked
    /// after that is found the next time.
    ///
    /// # Errors
    /// When the log has no whole words.
    pub fn take(&self) -> Outcome<Vec<u64>> {
        let mut pages = Vec::new();
        for word in 0..self.size() / 8 {
            let at = usize::try_from(self.offset + word * 8)?;
            let word_bits = self.bits.get_atomic_ref::<AtomicU64>(at)?;
            if word_bits.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let taken = u64::from_le(word_bits.swap(0, Ordering::SeqCst));
            let marked = (0..64).filter(|bit| taken & (1 << bit) != 0);
            pages.extend(marked.map(|bit| word * 64 + bit));
        }
        Ok(pages)
    }
}
