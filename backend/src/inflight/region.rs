//! The memory that is shared with the front end: one part for each vring, and one for the device.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;

use iov_iter::{Area, MemoryError};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::io::Errno;
use thiserror::Error;

use super::queue::{DESC_BYTES, HEADER_BYTES, QueueRegion};
use crate::blk::WriteCache;
use crate::limits::{MAX_VRING_SIZE, MAX_VRINGS};

/// What each vring's part is a multiple of, in bytes.
const ALIGNMENT: u64 = 64;
/// Bytes behind the vrings' parts that are the device's.
const TRAILER_BYTES: u64 = 64;
/// Marks a trailer: the front end hands back whatever it was given, also by another program.
const MAGIC: u64 = u64::from_le_bytes(*b"vublk\0\0\x01");
/// Offset of the write cache's mode in the trailer; zero says nothing.
const CACHE_AT: usize = 8;

/// Where a region is in its file, and what it is for (`VhostUserInflight`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Description {
    /// Bytes of the region.
    pub mmap_size: u64,
    /// Offset of its first byte in the file.
    pub mmap_offset: u64,
    /// Vrings it has room for.
    pub queues: u16,
    /// Entries of the largest of them.
    pub queue_size: u16,
}

/// A region for in-flight tracking, mapped.
///
/// How far the vrings' parts are apart is for us to say, and must never change: the region outlives
/// the program that laid it out.
#[derive(Debug)]
pub struct Region {
    memory: Area,
    file: OwnedFd,
    description: Description,
    has_trailer: bool,
}

/// Why there is no region.
#[derive(Debug, Error)]
pub enum RegionError {
    /// A number of vrings that no device has.
    #[error("{0} vrings: between 1 and {MAX_VRINGS}")]
    Queues(u16),
    /// A size that no vring has.
    #[error("vrings of {0} entries: between 1 and {MAX_VRING_SIZE}")]
    QueueSize(u16),
    /// It is too small for what it is said to hold.
    #[error("{got} bytes cannot hold {queues} vrings of {queue_size} entries, which take {want}")]
    TooSmall {
        /// Bytes it has.
        got: u64,
        /// Bytes it needs.
        want: u64,
        /// Vrings it is said to hold.
        queues: u16,
        /// Entries of each.
        queue_size: u16,
    },
    /// It starts where its fields would not be aligned.
    #[error("offset {0:#x} in its file is not a multiple of {ALIGNMENT}")]
    Misaligned(u64),
    /// A vring is not one of those the region was made for.
    #[error("vring {index} of {size} entries is none of {queues} vrings of {queue_size} entries")]
    NoRoom {
        /// The vring.
        index: u16,
        /// Its entries.
        size: u16,
        /// Vrings the region has.
        queues: u16,
        /// Entries of each.
        queue_size: u16,
    },
    /// The file cannot be mapped.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The kernel has no memory file for us.
    #[error("a memory file cannot be made")]
    Create(#[source] Errno),
}

impl Region {
    /// A new region that nobody can make smaller (GET_INFLIGHT_FD). All of it is zero, which says
    /// that no vring has used it yet.
    ///
    /// # Errors
    /// Numbers that make no sense, or the kernel's refusal.
    pub fn allocate(queues: u16, queue_size: u16) -> Result<Region, RegionError> {
        let mmap_size = queues_bytes(queues, queue_size)? + TRAILER_BYTES;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = memfd_create("vublk-inflight", flags).map_err(RegionError::Create)?;
        ftruncate(&file, mmap_size).map_err(RegionError::Create)?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        fcntl_add_seals(&file, seals).map_err(RegionError::Create)?;
        let description = Description {
            mmap_size,
            mmap_offset: 0,
            queues,
            queue_size,
        };
        let region = Region::map(file, description)?;
        if let Some(magic) = region
            .trailer(0)
            .and_then(|at| region.memory.atomic_u64(at))
        {
            magic.store(MAGIC, Ordering::Release);
        }
        Ok(region.with_trailer())
    }

    /// The region that the front end hands back (SET_INFLIGHT_FD), with what an earlier daemon left
    /// in it.
    ///
    /// # Errors
    /// Numbers that make no sense, or a file that does not hold them.
    pub fn adopt(file: OwnedFd, description: Description) -> Result<Region, RegionError> {
        Ok(Region::map(file, description)?.with_trailer())
    }

    fn map(file: OwnedFd, description: Description) -> Result<Region, RegionError> {
        let Description {
            mmap_size,
            mmap_offset,
            queues,
            queue_size,
        } = description;
        let want = queues_bytes(queues, queue_size)?;
        if mmap_size < want {
            return Err(RegionError::TooSmall {
                got: mmap_size,
                want,
                queues,
                queue_size,
            });
        }
        // Ours starts at zero; anything else would leave fields that are not aligned.
        if !mmap_offset.is_multiple_of(ALIGNMENT) {
            return Err(RegionError::Misaligned(mmap_offset));
        }
        // Only what is used is mapped: the front end may say more.
        let len = mmap_size.min(want + TRAILER_BYTES);
        let mapped = file.try_clone().map_err(MemoryError::Stat)?;
        let memory = Area::map(mapped, mmap_offset, len)?;
        Ok(Region {
            memory,
            file,
            description,
            has_trailer: false,
        })
    }

    fn with_trailer(mut self) -> Region {
        let magic = self.trailer(0).and_then(|at| self.memory.atomic_u64(at));
        self.has_trailer = magic.is_some_and(|magic| magic.load(Ordering::Acquire) == MAGIC);
        self
    }

    /// Writes anything anywhere, as a front end may.
    #[cfg(test)]
    pub(super) fn scribble(&self, at: usize, bytes: u64) {
        if let Some(field) = self.memory.atomic_u64(at) {
            field.store(bytes, Ordering::Relaxed);
        }
    }

    /// Where it is, for the front end.
    #[must_use]
    pub fn description(&self) -> Description {
        self.description
    }

    /// Its file, for the front end.
    #[must_use]
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Whether a SIGBUS hit it: its file was truncated.
    #[must_use]
    pub fn poisoned(&self) -> bool {
        self.memory.poisoned()
    }

    /// The part of a vring with `size` entries.
    ///
    /// # Errors
    /// [`RegionError::NoRoom`] when the region was made for fewer or smaller vrings.
    pub fn queue(&self, index: u16, size: u16) -> Result<QueueRegion, RegionError> {
        let Description {
            queues, queue_size, ..
        } = self.description;
        let no_room = RegionError::NoRoom {
            index,
            size,
            queues,
            queue_size,
        };
        if index >= queues || size > queue_size {
            return Err(no_room);
        }
        let at = u64::from(index) * stride(queue_size);
        let at = usize::try_from(at).unwrap_or(usize::MAX);
        let header = self.memory.part(at, HEADER_BYTES);
        let entries = usize::from(queue_size) * DESC_BYTES;
        let entries = self.memory.part(at.saturating_add(HEADER_BYTES), entries);
        match header.zip(entries) {
            Some((header, entries)) => Ok(QueueRegion::new(header, entries, size)),
            None => Err(no_room),
        }
    }

    /// Forgets what is recorded of every vring.
    pub fn forget(&self) {
        for index in 0..self.description.queues {
            if let Ok(queue) = self.queue(index, self.description.queue_size) {
                queue.forget();
            }
        }
    }

    /// The write cache's mode as it was when the last daemon used the region, if one of ours did:
    /// front ends do not set it again for a new daemon.
    #[must_use]
    pub fn write_cache(&self) -> Option<WriteCache> {
        match self.cache_mode()?.load(Ordering::Acquire) {
            1 => Some(WriteCache::Writethrough),
            2 => Some(WriteCache::Writeback),
            _ => None,
        }
    }

    /// Keeps the write cache's mode for the next daemon.
    pub fn set_write_cache(&self, cache: WriteCache) {
        let mode = match cache {
            WriteCache::Writethrough => 1,
            WriteCache::Writeback => 2,
        };
        if let Some(kept) = self.cache_mode() {
            kept.store(mode, Ordering::Release);
        }
    }

    fn cache_mode(&self) -> Option<&std::sync::atomic::AtomicU8> {
        let at = self.trailer(CACHE_AT).filter(|_| self.has_trailer)?;
        self.memory.atomic_u8(at)
    }

    /// Offset of a byte of the trailer.
    fn trailer(&self, offset: usize) -> Option<usize> {
        let Description {
            queues, queue_size, ..
        } = self.description;
        let start = queues_bytes(queues, queue_size).ok()?;
        usize::try_from(start).ok()?.checked_add(offset)
    }
}

/// Bytes from one vring's part to the next one's.
fn stride(queue_size: u16) -> u64 {
    (HEADER_BYTES as u64 + DESC_BYTES as u64 * u64::from(queue_size)).next_multiple_of(ALIGNMENT)
}

/// Bytes of all vrings' parts.
fn queues_bytes(queues: u16, queue_size: u16) -> Result<u64, RegionError> {
    if !(1..=MAX_VRINGS).contains(&queues) {
        return Err(RegionError::Queues(queues));
    }
    if !(1..=MAX_VRING_SIZE).contains(&queue_size) {
        return Err(RegionError::QueueSize(queue_size));
    }
    Ok(stride(queue_size) * u64::from(queues))
}

#[cfg(test)]
mod tests {
    use rustix::fs::fcntl_get_seals;

    use super::*;

    fn handed_back(region: &Region) -> Result<Region, RegionError> {
        let file = region.file().try_clone_to_owned().unwrap();
        Region::adopt(file, region.description())
    }

    #[test]
    fn a_region_comes_back_as_it_was_left() {
        let region = Region::allocate(4, 128).unwrap();
        assert_eq!(region.write_cache(), None, "nobody said anything yet");
        region.set_write_cache(WriteCache::Writethrough);
        let again = handed_back(&region).unwrap();
        assert_eq!(again.write_cache(), Some(WriteCache::Writethrough));
        again.set_write_cache(WriteCache::Writeback);
        assert_eq!(region.write_cache(), Some(WriteCache::Writeback));
    }

    #[test]
    fn a_region_of_another_program_keeps_no_write_cache() {
        let theirs = Region::allocate(1, 128).unwrap();
        let short = Description {
            mmap_size: stride(128),
            ..theirs.description()
        };
        let file = || theirs.file().try_clone_to_owned().unwrap();
        let region = Region::adopt(file(), short).unwrap();
        region.set_write_cache(WriteCache::Writethrough);
        assert_eq!((region.write_cache(), theirs.write_cache()), (None, None));
        // Of another shape, so that the trailer is not where the magic is.
        let other = Description {
            queue_size: 64,
            ..theirs.description()
        };
        let region = Region::adopt(file(), other).unwrap();
        region.set_write_cache(WriteCache::Writethrough);
        assert_eq!(region.write_cache(), None);
    }

    #[test]
    fn nobody_makes_a_region_of_ours_smaller() {
        let region = Region::allocate(1, 1).unwrap();
        let seals = fcntl_get_seals(region.file()).unwrap();
        assert!(seals.contains(SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL));
        assert!(ftruncate(region.file(), 0).is_err());
    }

    #[test]
    fn a_region_that_does_not_fit_is_refused() {
        for (queues, size) in [(0, 1), (MAX_VRINGS + 1, 1), (1, 0), (1, MAX_VRING_SIZE + 1)] {
            assert!(Region::allocate(queues, size).is_err(), "{queues} {size}");
        }
        let region = Region::allocate(2, 256).unwrap();
        let good = region.description();
        let file = || region.file().try_clone_to_owned().unwrap();
        for (mmap_size, mmap_offset) in [
            (2 * stride(256) - 1, 0),
            (0, 0),
            (good.mmap_size, 4096),
            (2 * stride(256), 8),
            (good.mmap_size, u64::MAX),
            (u64::MAX, u64::MAX),
        ] {
            let bad = Description {
                mmap_size,
                mmap_offset,
                ..good
            };
            let refused = Region::adopt(file(), bad);
            assert!(refused.is_err(), "{bad:?} gave {refused:?}");
        }
        let null = std::fs::File::open("/dev/null").unwrap();
        assert!(Region::adopt(null.into(), good).is_err());
    }

    #[test]
    fn a_vring_beyond_the_region_has_no_part() {
        let region = Region::allocate(2, 256).unwrap();
        assert!(region.queue(1, 256).is_ok());
        assert!(region.queue(1, 128).is_ok(), "smaller ones fit");
        for (index, size) in [(2, 256), (0, 512)] {
            let refused = region.queue(index, size).unwrap_err();
            assert!(matches!(refused, RegionError::NoRoom { .. }), "{refused}");
        }
    }

    #[test]
    fn the_largest_region_is_laid_out_without_overflow() {
        let all = queues_bytes(MAX_VRINGS, MAX_VRING_SIZE).unwrap();
        assert_eq!(all, 256 * (16 + 16 * 32768_u64).next_multiple_of(64));
    }
}
