//! One region: a part of a front end's file, mapped.
#![expect(
    unsafe_code,
    reason = "asks the kernel about fds and advises it about mappings"
)]
#![deny(
    clippy::as_conversions,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::NonNull;

use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{FileOffset, MmapRegion, VolatileSlice};

use super::error::MemoryError;
use super::sigbus::Guarded;

/// What a front end says about a region (vhost-user: *Memory region description*).
#[derive(Debug)]
pub struct RegionSpec {
    /// Guest physical address of the first byte.
    pub guest_addr: u64,
    /// Size in bytes.
    pub size: u64,
    /// The front end's own virtual address of the first byte.
    pub front_end_addr: u64,
    /// Where the region starts in `file`, in bytes.
    pub mmap_offset: u64,
    /// The file to map; must be regular (memfd, tmpfs, hugetlbfs) and open for writing.
    pub file: OwnedFd,
}

/// A mapped region of guest memory.
///
/// # Invariants
/// The mapping covers the `size` bytes from `start` on, and stays where it is until the region is
/// dropped, which unmaps it; the file reached to its end when it was mapped.
#[derive(Debug)]
pub struct Region {
    guest_addr: u64,
    size: u64,
    front_end_addr: u64,
    mmap_offset: u64,
    page_size: usize,
    /// Where the region's first byte is mapped.
    start: NonNull<u8>,
    mapping: Guarded,
}

// SAFETY: `start` points into `mapping`, which is itself `Send` and `Sync`, and is only ever used
// for volatile or atomic accesses, from whatever thread.
unsafe impl Send for Region {}
// SAFETY: as for `Send`.
unsafe impl Sync for Region {}

impl Region {
    /// Maps what `spec` describes, in pages of the file's kind.
    ///
    /// # Errors
    /// Zero size, wrap-around, an fd that is not a writable file, a region that ends beyond its
    /// file, or the kernel's refusal.
    pub(crate) fn map(spec: RegionSpec) -> Result<Self, MemoryError> {
        let RegionSpec {
            guest_addr,
            size,
            front_end_addr,
            mmap_offset,
            file,
        } = spec;
        let end = check_numbers(guest_addr, size, front_end_addr, mmap_offset)?;
        let file = File::from(file);
        check_file(&file, guest_addr, end)?;

        let page_size = page_size(&file).map_err(MemoryError::Stat)?;
        let page = u64::try_from(page_size).unwrap_or(u64::MAX);
        let start = mmap_offset & !page.wrapping_sub(1);
        let too_large = || MemoryError::WrapsAround {
            which: "file offset",
            start,
            size,
        };
        let lead =
            usize::try_from(mmap_offset.wrapping_sub(start)).map_err(|_lossless| too_large());
        let lead = lead?;
        // Rounded up, because hugetlb is mapped and unmapped in whole pages only.
        let len = end
            .wrapping_sub(start)
            .checked_next_multiple_of(page)
            .and_then(|len| usize::try_from(len).ok())
            .filter(|len| isize::try_from(*len).is_ok())
            .ok_or_else(too_large)?;

        let map_error = |source| MemoryError::Map { guest_addr, source };
        let mapping = map_shared(file, start, len).map_err(map_error)?;
        keep_private(&mapping).map_err(MemoryError::Advise)?;
        let start = NonNull::new(mapping.as_ptr().wrapping_add(lead)).ok_or_else(too_large)?;
        let mapping = Guarded::new(mapping, page_size).map_err(MemoryError::Contain)?;
        Ok(Self {
            start,
            guest_addr,
            size,
            front_end_addr,
            mmap_offset,
            page_size,
            mapping,
        })
    }

    /// Guest physical address of the first byte.
    pub fn guest_addr(&self) -> u64 {
        self.guest_addr
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The front end's virtual address of the first byte.
    pub fn front_end_addr(&self) -> u64 {
        self.front_end_addr
    }

    /// Where the region starts in its file, in bytes.
    pub fn mmap_offset(&self) -> u64 {
        self.mmap_offset
    }

    /// Page size of the file, in bytes: the system's, or the huge page's.
    pub fn page_size(&self) -> usize {
        self.page_size
    }

    /// Whether a SIGBUS hit the region: part of its file was gone, and reads zeroes since.
    #[inline]
    pub fn poisoned(&self) -> bool {
        self.mapping.poisoned()
    }

    /// The `len` bytes from `offset` on, or nothing if they do not lie inside the region.
    #[inline]
    pub fn slice(&self, offset: u64, len: usize) -> Option<VolatileSlice<'_>> {
        let end = offset.checked_add(u64::try_from(len).ok()?)?;
        if end > self.size {
            return None;
        }
        let start = self
            .start
            .as_ptr()
            .wrapping_add(usize::try_from(offset).ok()?);
        // SAFETY: the `len` bytes from there on lie inside the mapping, which covers `size` bytes
        // from `self.start` on and stays in place while `self`, and so the result, is borrowed.
        // Others write to it at any time, and nobody makes a plain reference to it.
        Some(unsafe { VolatileSlice::new(start, len) })
    }
}

/// Checks what can be checked without the file; the region's end in the file.
pub(crate) fn check_numbers(
    guest_addr: u64,
    size: u64,
    front_end_addr: u64,
    mmap_offset: u64,
) -> Result<u64, MemoryError> {
    if size == 0 {
        return Err(MemoryError::ZeroSize { guest_addr });
    }
    let end = |which, start: u64| {
        start
            .checked_add(size)
            .ok_or(MemoryError::WrapsAround { which, start, size })
    };
    end("guest address", guest_addr)?;
    end("front-end address", front_end_addr)?;
    end("file offset", mmap_offset)
}

/// Checks that `file` is a regular file, writable, and at least `end` bytes long.
fn check_file(file: &File, guest_addr: u64, end: u64) -> Result<(), MemoryError> {
    let metadata = file.metadata().map_err(MemoryError::Stat)?;
    if !metadata.is_file() {
        return Err(MemoryError::NotAFile { guest_addr });
    }
    // SAFETY: F_GETFL takes no pointer, and `file` is open.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    if flags < 0 {
        return Err(MemoryError::Stat(io::Error::last_os_error()));
    }
    if flags & libc::O_ACCMODE != libc::O_RDWR {
        return Err(MemoryError::ReadOnly { guest_addr });
    }
    if end > metadata.len() {
        return Err(MemoryError::BeyondFile {
            end,
            file_len: metadata.len(),
        });
    }
    Ok(())
}

/// The page size that mappings of `file` are made of, in bytes.
fn page_size(file: &File) -> io::Result<usize> {
    let mut stat = MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: `stat` is a place for one statfs, and lives across the call.
    if unsafe { libc::fstatfs(file.as_raw_fd(), stat.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: fstatfs returned success, so the kernel filled it in.
    let stat = unsafe { stat.assume_init() };
    if stat.f_type == libc::HUGETLBFS_MAGIC {
        return usize::try_from(stat.f_bsize).map_err(io::Error::other);
    }
    // SAFETY: sysconf takes no pointer.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).map_err(io::Error::other)
}

/// Maps `len` bytes of `file` from `start` on, shared with whoever else maps it.
fn map_shared(file: File, start: u64, len: usize) -> Result<MmapRegion<()>, MmapRegionError> {
    MmapRegionBuilder::new(len)
        .with_file_offset(FileOffset::new(file, start))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
        .build()
}

/// Keeps a mapping out of forked children and of core dumps.
fn keep_private(mapping: &MmapRegion<()>) -> io::Result<()> {
    for advice in [libc::MADV_DONTFORK, libc::MADV_DONTDUMP] {
        // SAFETY: `mapping` owns the range and keeps it mapped; the advice changes no contents.
        let done = unsafe { libc::madvise(mapping.as_ptr().cast(), mapping.size(), advice) };
        if done != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
