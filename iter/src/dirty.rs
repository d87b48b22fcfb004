//! The dirty log: which pages of guest memory the device changed (vhost-user, *Migration*).
#![deny(
    clippy::as_conversions,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;

use crate::memory::{Area, MemoryError};

/// Bytes of guest memory that one bit of the log stands for, whatever the host's pages are.
pub const LOG_PAGE: u64 = 4096;

/// What remembers which guest memory was changed.
///
/// A mark comes after the change and before anybody is told of it. Whoever reads the log takes the
/// bits and copies the pages at any time: a mark that came first could be taken before the data is
/// there, and one that came after the used index would be lost with a crash in between.
pub trait DirtyLog {
    /// The `len` bytes from guest address `guest` on were changed. What was stored before the call
    /// is visible to whoever sees the mark.
    fn mark(&self, guest: u64, len: u64);
}

/// The log that a front end shares: one bit for each [`LOG_PAGE`] of guest addresses from zero on.
///
/// It belongs to a device, not to its regions: a region that is added later is logged like all
/// others. The front end takes bits out while they are set, so every mark is an atomic OR.
#[derive(Clone, Debug)]
pub struct SharedLog {
    bits: Area,
    size: u64,
}

impl SharedLog {
    /// Maps the `size` bytes of `file` from `offset` on (SET_LOG_BASE).
    ///
    /// # Errors
    /// As for a region of guest memory: no bytes, no regular file, or one that is too short.
    pub fn new(file: OwnedFd, offset: u64, size: u64) -> Result<Self, MemoryError> {
        let bits = Area::map(file, offset, size)?;
        Ok(Self { bits, size })
    }

    /// Whether every byte before guest address `end` has a bit.
    pub fn covers(&self, end: u64) -> bool {
        end.div_ceil(LOG_PAGE).div_ceil(8) <= self.size
    }

    /// Bytes of the log.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether a SIGBUS hit the log: its file was truncated.
    pub fn poisoned(&self) -> bool {
        self.bits.poisoned()
    }

    /// Sets the bits of `mask` in the word that starts with the bit of page `first`.
    #[inline]
    fn or(&self, first: u64, mask: u64) {
        let Ok(at) = usize::try_from(first >> 3) else {
            return;
        };
        if let Some(word) = self.bits.atomic_u64(at) {
            // The bits are counted from the lowest byte on: a little-endian word.
            word.fetch_or(mask.to_le(), Ordering::Release);
            return;
        }
        self.or_bytes(at, mask);
    }

    /// As [`or`](Self::or), where the word is not aligned or ends beyond the log.
    #[cold]
    fn or_bytes(&self, at: usize, mask: u64) {
        for (offset, bits) in mask.to_le_bytes().into_iter().enumerate() {
            let byte = at
                .checked_add(offset)
                .and_then(|at| self.bits.atomic_u8(at));
            if let Some(byte) = byte.filter(|_| bits != 0) {
                byte.fetch_or(bits, Ordering::Release);
            }
        }
    }
}

impl DirtyLog for SharedLog {
    /// Whoever set the log made sure that it covers all guest memory; a mark beyond its end is
    /// dropped.
    #[inline]
    fn mark(&self, guest: u64, len: u64) {
        let Some(beyond) = len.checked_sub(1) else {
            return;
        };
        let mut page = guest / LOG_PAGE;
        if beyond < LOG_PAGE && guest % LOG_PAGE < LOG_PAGE.wrapping_sub(beyond) {
            return self.or(page & !63, 1 << (page & 63));
        }
        let last = guest.saturating_add(beyond) / LOG_PAGE;
        while page <= last {
            let first = page & !63;
            let in_word = last.min(first | 63);
            let low = u64::MAX << (page & 63);
            let high = u64::MAX >> (63 & !in_word);
            self.or(first, low & high);
            let Some(next) = in_word.checked_add(1) else {
                return;
            };
            page = next;
        }
    }
}

#[cfg(test)]
mod tests {
    #![expect(unsafe_code, reason = "makes a memory file")]
    #![expect(clippy::arithmetic_side_effects, reason = "an overflow fails the test")]

    use std::fs::File;
    use std::os::fd::FromRawFd;
    use std::os::unix::fs::FileExt;
    use std::thread;

    use super::*;

    fn file(len: u64) -> File {
        // SAFETY: the name is a C string that outlives the call, which gives a new descriptor.
        let fd = unsafe { libc::memfd_create(c"log".as_ptr(), libc::MFD_CLOEXEC) };
        assert!(fd >= 0);
        // SAFETY: the kernel has just made it, for nobody else.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        file.set_len(len).unwrap();
        file
    }

    fn log(file: &File, offset: u64, size: u64) -> SharedLog {
        SharedLog::new(file.try_clone().unwrap().into(), offset, size).unwrap()
    }

    fn bytes(file: &File, offset: u64, size: u64) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(size).unwrap()];
        file.read_exact_at(&mut bytes, offset).unwrap();
        bytes
    }

    /// As the specification has it: `log[page / 8] |= 1 << (page % 8)` for every page touched.
    fn naive(size: u64, marks: &[(u64, u64)]) -> Vec<u8> {
        let mut bits = vec![0; usize::try_from(size).unwrap()];
        for &(guest, len) in marks.iter().filter(|(_, len)| *len > 0) {
            for page in guest / 4096..=(guest + (len - 1)) / 4096 {
                if let Some(byte) = bits.get_mut(usize::try_from(page / 8).unwrap()) {
                    *byte |= 1 << (page % 8);
                }
            }
        }
        bits
    }

    #[test]
    fn marks_are_where_the_specification_has_them() {
        const PAGES: u64 = 8 * 100;
        let mut random = fastrand::Rng::with_seed(11);
        // Sizes that are and are not whole words, at offsets that are and are not aligned.
        for (offset, size) in [
            (0, 104),
            (0, 100),
            (0, 97),
            (8, 96),
            (4096, 7),
            (3, 96),
            (5, 41),
        ] {
            for _ in 0..200 {
                let file = file(offset + size + 64);
                let log = log(&file, offset, size);
                let marks: Vec<(u64, u64)> = (0..random.usize(1..6))
                    .map(|_| {
                        let guest = random.u64(0..PAGES * 4096);
                        let len = match random.u8(..4) {
                            0 => random.u64(0..3),
                            1 => random.u64(0..3 * 4096),
                            2 => 4096 * random.u64(0..200),
                            _ => random.u64(0..200 * 4096),
                        };
                        (guest, len)
                    })
                    .collect();
                for &(guest, len) in &marks {
                    log.mark(guest, len);
                }
                let got = bytes(&file, offset, size);
                assert_eq!(got, naive(size, &marks), "{marks:?} at {offset}+{size}");
                let around = bytes(&file, 0, offset + size + 64);
                let (before, rest) = around.split_at(usize::try_from(offset).unwrap());
                let behind = &rest[usize::try_from(size).unwrap()..];
                assert!(before.iter().chain(behind).all(|byte| *byte == 0));
            }
        }
    }

    #[test]
    fn a_page_belongs_to_a_range_that_touches_one_byte_of_it() {
        for (guest, len, pages) in [
            (4095, 1, 0..=0),
            (4095, 2, 0..=1),
            (4096, 4096, 1..=1),
            (4096, 4097, 1..=2),
            (63 * 4096, 4097, 63..=64),
            (127 * 4096 + 4095, 1, 127..=127),
        ] {
            let file = file(64);
            log(&file, 0, 64).mark(guest, len);
            let bits = bytes(&file, 0, 64);
            let marked: Vec<usize> = (0..512)
                .filter(|page| bits[page / 8] & (1 << (page % 8)) != 0)
                .collect();
            assert_eq!(marked, pages.collect::<Vec<_>>(), "{guest}+{len}");
        }
    }

    #[test]
    fn the_ends_of_the_address_space_are_no_trouble() {
        let file = file(16);
        let log = log(&file, 0, 16);
        log.mark(u64::MAX, 1);
        log.mark(u64::MAX - 4096, u64::MAX);
        log.mark(u64::MAX, u64::MAX);
        log.mark(0, 0);
        assert_eq!(bytes(&file, 0, 16), [0; 16]);
    }

    #[test]
    fn a_log_covers_what_has_a_bit() {
        let file = file(4096);
        let log = log(&file, 0, 2);
        assert!(log.covers(0) && log.covers(16 * 4096));
        assert!(!log.covers(16 * 4096 + 1) && !log.covers(u64::MAX));
    }

    #[test]
    fn a_log_that_does_not_fit_its_file_is_refused() {
        let file = file(4096);
        for (offset, size) in [(0, 4097), (4096, 1), (0, 0), (u64::MAX, 2), (8, u64::MAX)] {
            let refused = SharedLog::new(file.try_clone().unwrap().into(), offset, size);
            assert!(refused.is_err(), "{offset}+{size}: {refused:?}");
        }
    }

    #[test]
    fn marks_of_many_threads_and_a_reader_that_clears_lose_nothing() {
        let file = file(64);
        let seen: Vec<u64> = thread::scope(|scope| {
            let marking: Vec<_> = (0..4_u64)
                .map(|thread| {
                    let log = log(&file, 0, 64);
                    scope.spawn(move || {
                        (thread..512)
                            .step_by(4)
                            .for_each(|page| log.mark(page << 12, 1))
                    })
                })
                .collect();
            let reader = log(&file, 0, 64);
            let mut seen = vec![0; 8];
            loop {
                let over = marking.iter().all(|thread| thread.is_finished());
                for (place, seen) in seen.iter_mut().enumerate() {
                    let word = reader.bits.atomic_u64(place * 8).unwrap();
                    *seen |= u64::from_le(word.swap(0, Ordering::SeqCst));
                }
                if over {
                    break seen;
                }
            }
        });
        assert_eq!(seen, [u64::MAX; 8]);
    }
}
