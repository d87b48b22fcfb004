//! Why a memory table, a region or a part of one was refused.

use std::io;

use vm_memory::mmap::MmapRegionError;

use super::table::MAX_REGIONS;

/// Why guest memory was refused. All but [`Advise`](Self::Advise), [`Stat`](Self::Stat) and
/// [`Contain`](Self::Contain) are the front end's doing; [`Map`](Self::Map) may be either's.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The region has no bytes.
    #[error("region at guest address {guest_addr:#x} has size zero")]
    ZeroSize {
        /// Where the region was to be.
        guest_addr: u64,
    },
    /// The region does not end inside the 64-bit address space.
    #[error("region at {which} {start:#x} with size {size:#x} wraps around")]
    WrapsAround {
        /// Which of the region's numbers wraps: guest address, front-end address, file offset.
        which: &'static str,
        /// The number.
        start: u64,
        /// The region's size.
        size: u64,
    },
    /// More regions than [`MAX_REGIONS`].
    #[error("more than {MAX_REGIONS} memory regions")]
    TooManyRegions,
    /// Two regions share addresses.
    #[error("regions at {which}es {first:#x} and {second:#x} overlap")]
    Overlap {
        /// In which address space: guest address or front-end address.
        which: &'static str,
        /// Start of the lower region.
        first: u64,
        /// Start of the upper region.
        second: u64,
    },
    /// The descriptor is not a file that can be mapped and has a size.
    #[error("memory at guest address {guest_addr:#x} is not a regular file, memfd or hugetlb file")]
    NotAFile {
        /// Where the region was to be.
        guest_addr: u64,
    },
    /// The descriptor is not open for reading and writing.
    #[error("memory file at guest address {guest_addr:#x} is not open for reading and writing")]
    ReadOnly {
        /// Where the region was to be.
        guest_addr: u64,
    },
    /// The region ends beyond its file.
    #[error("region ends at file offset {end:#x}, beyond the file's {file_len:#x} bytes")]
    BeyondFile {
        /// End of the region in the file, in bytes.
        end: u64,
        /// The file's length, in bytes.
        file_len: u64,
    },
    /// The file's kind, length or page size could not be asked.
    #[error("cannot examine a memory file")]
    Stat(#[source] io::Error),
    /// The kernel refused to map the file.
    #[error("cannot map the region at guest address {guest_addr:#x}")]
    Map {
        /// Where the region was to be.
        guest_addr: u64,
        /// The kernel's reason.
        source: MmapRegionError,
    },
    /// The kernel refused to keep the mapping out of forks and core dumps.
    #[error("cannot keep guest memory out of forks and core dumps")]
    Advise(#[source] io::Error),
    /// The mapping cannot be guarded against SIGBUS.
    #[error("cannot guard a mapping against SIGBUS")]
    Contain(#[source] io::Error),
    /// No region has exactly these numbers.
    #[error("no region at guest address {guest_addr:#x}, size {size:#x}, {front_end_addr:#x}")]
    NoSuchRegion {
        /// Guest address asked for.
        guest_addr: u64,
        /// Size asked for.
        size: u64,
        /// Front-end address asked for.
        front_end_addr: u64,
    },
    /// The range does not lie inside one region.
    #[error("guest range {guest_addr:#x}+{len:#x} does not lie inside one region")]
    NotMapped {
        /// Start of the range.
        guest_addr: u64,
        /// Its length in bytes.
        len: usize,
    },
    /// The address is not aligned as its use requires.
    #[error("guest address {guest_addr:#x} is not aligned to {align} bytes")]
    Misaligned {
        /// The address.
        guest_addr: u64,
        /// The alignment required, in bytes.
        align: usize,
    },
}
