#![expect(
    unsafe_code,
    reason = "memory that the kernel reads and writes is no Rust slice"
)]
//! Memory that the kernel reads and writes while the program looks at other parts of it.

use std::io;
use std::ptr::{self, NonNull};

use crate::pattern::{SECTOR_BYTES, SECTOR_WORDS, Stamp};

/// Anonymous pages, locked where the guest lets us, in sectors.
///
/// # Invariants
/// `start` points to `sectors * SECTOR_BYTES` bytes mapped readable and writable until the drop.
#[derive(Debug)]
pub(crate) struct Pages {
    start: NonNull<u64>,
    sectors: usize,
}

/// A word that is not what it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct WrongWord {
    /// Its index in the sector.
    pub(crate) index: usize,
    /// What stands there.
    pub(crate) found: u64,
    /// What the sector's first two words say it is.
    pub(crate) claimed: Stamp,
}

impl Pages {
    /// Maps memory for so many sectors.
    pub(crate) fn new(sectors: usize) -> io::Result<Self> {
        let bytes = sectors * SECTOR_BYTES;
        // SAFETY: a new private mapping at an address that the kernel chooses touches no other.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let pages = Self {
            start: NonNull::new(start.cast()).ok_or_else(io::Error::last_os_error)?,
            sectors,
        };
        // SAFETY: the range is the mapping made above. Pages that cannot be locked still serve: the
        // guest has no swap.
        unsafe { libc::mlock(start, bytes) };
        Ok(pages)
    }

    /// The address of a run of sectors, for the kernel.
    pub(crate) fn address(&self, first: usize, count: usize) -> *mut u8 {
        assert!(first + count <= self.sectors, "a run within the pages");
        // SAFETY: the result stays within the mapping, or one past its end for an empty run.
        unsafe { self.start.add(first * SECTOR_WORDS) }
            .as_ptr()
            .cast()
    }

    /// Writes a sector's contents.
    pub(crate) fn fill(&mut self, index: usize, stamp: Stamp) {
        let start = self.address(index, 1).cast::<u64>();
        for (offset, word) in stamp.words().enumerate() {
            // SAFETY: `offset` is less than SECTOR_WORDS, so this stays in the sector checked by
            // `address`; the mapping is aligned to pages.
            unsafe { start.add(offset).write_volatile(word) };
        }
    }

    /// Compares a sector's contents.
    pub(crate) fn check(&self, index: usize, stamp: Stamp) -> Result<(), WrongWord> {
        for (offset, expected) in stamp.words().enumerate() {
            let found = self.word(index, offset);
            if found != expected {
                let claimed = Stamp {
                    sector: self.word(index, 0),
                    generation: self.word(index, 1),
                };
                return Err(WrongWord {
                    index: offset,
                    found,
                    claimed,
                });
            }
        }
        Ok(())
    }

    fn word(&self, index: usize, offset: usize) -> u64 {
        assert!(offset < SECTOR_WORDS, "a word within the sector");
        let start = self.address(index, 1).cast::<u64>();
        // SAFETY: the word lies in the sector that `address` checked, in a mapping aligned to
        // pages. The read is volatile since the kernel may write the memory.
        unsafe { start.add(offset).read_volatile() }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours alone, and whoever gave its addresses to the kernel has
        // awaited the kernel's answers before.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.sectors * SECTOR_BYTES) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_word_is_found_wherever_it_stands() {
        let mut pages = Pages::new(8).unwrap();
        let stamp = Stamp {
            sector: 99,
            generation: 4,
        };
        pages.fill(3, stamp);
        assert_eq!(pages.check(3, stamp), Ok(()));
        for index in 0..SECTOR_WORDS {
            pages.fill(3, stamp);
            let word = pages.address(3, 1).cast::<u64>();
            // SAFETY: the index is within the sector.
            unsafe { *word.add(index) ^= 1 << 63 };
            assert_eq!(pages.check(3, stamp).unwrap_err().index, index);
        }
        let wrong = pages.check(2, stamp).unwrap_err();
        assert_eq!((wrong.index, wrong.found), (0, 0));
    }
}
