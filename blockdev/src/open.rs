//! How devices come to be: one function per device, and the error they share.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use thiserror::Error;

use crate::device::BlockDevice;
use crate::fault::{FaultDevice, FaultHandle, FaultPlan};
use crate::file::FileDevice;
use crate::geometry::{Access, BLOCK_SIZES};
use crate::memory::MemoryDevice;
use crate::null::NullDevice;
#[cfg(feature = "conformance")]
use crate::ring::Way;

/// Whether a file is read and written past the host's page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direct {
    /// With O_DIRECT, where the file and the block size allow it.
    On,
    /// Through the page cache.
    Off,
}

/// How a file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileOptions {
    /// Read-only files are opened read-only, so the file's mode and mount decide too.
    pub access: Access,
    /// Whether the page cache is left out.
    pub direct: Direct,
    /// The block size in bytes. `None` asks the kernel; a size below what O_DIRECT needs for
    /// offsets opens the file without O_DIRECT, since an unaligned write would have to read first.
    pub block_size: Option<u32>,
}

/// A regular file or a block special.
///
/// # Errors
/// [`OpenError`], naming the file and what can be done about it.
pub fn file(path: &Path, options: FileOptions) -> Result<Arc<dyn BlockDevice>, OpenError> {
    Ok(Arc::new(FileDevice::open(path, options)?))
}

/// The same with all its calls made one way, for tests; [`file()`] finds the best one.
///
/// # Errors
/// As there.
#[cfg(feature = "conformance")]
pub fn file_by(
    path: &Path,
    options: FileOptions,
    way: Way,
) -> Result<Arc<dyn BlockDevice>, OpenError> {
    Ok(Arc::new(FileDevice::by(path, options, way)?))
}

/// `size` bytes of the daemon's memory, zero at first and gone with the device. Memory is taken
/// from the host only where something was written.
///
/// # Errors
/// When the block size is not one, there is not a whole block, or the host has not that much.
pub fn memory(size: u64, block_size: u32) -> Result<Arc<dyn BlockDevice>, OpenError> {
    Ok(Arc::new(MemoryDevice::new(size, block_size)?))
}

/// A device of `size` bytes that stores nothing: writes go nowhere and reads leave the memory they
/// are given as it is. For measuring everything but storage.
///
/// # Errors
/// When the block size is not one, or there is not a whole block.
pub fn null(size: u64, block_size: u32) -> Result<Arc<dyn BlockDevice>, OpenError> {
    Ok(Arc::new(NullDevice::new(size, block_size)?))
}

/// A device in memory that misbehaves by plan, and the handle that steers it.
///
/// # Errors
/// When the block size is not one, there is not a whole block, or the host has no memory or no
/// thread left.
pub fn fault(plan: FaultPlan) -> Result<(Arc<dyn BlockDevice>, FaultHandle), OpenError> {
    let (device, handle) = FaultDevice::new(plan)?;
    Ok((Arc::new(device), handle))
}

/// A device could not be opened. It says what to do about it where there is something.
#[derive(Debug, Error)]
pub enum OpenError {
    /// A system call on the path failed.
    #[error("{}: cannot {action}: {source}{}", path.display(), mend(source))]
    File {
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The path leads to something that stores no blocks.
    #[error("{}: not a regular file or a block special (give it an image or a disk)", .0.display())]
    NotStorage(PathBuf),
    /// The block size is no power of two, or out of bounds.
    #[error(
        "a block size of {given} is not possible (give it a power of two from {} to {})",
        BLOCK_SIZES.start(), BLOCK_SIZES.end()
    )]
    BlockSize {
        /// What was asked for, in bytes.
        given: u32,
    },
    /// The device would not have a single block.
    #[error("{name}: {size} bytes hold not one block of {block_size} (make it larger)")]
    TooSmall {
        /// The device.
        name: String,
        /// Its size in bytes.
        size: u64,
        /// Its block size in bytes.
        block_size: u32,
    },
    /// The host has no room for a memory device.
    #[error("cannot map {size} bytes of memory (make the device smaller): {source}")]
    Memory {
        /// The size asked for, in bytes.
        size: u64,
        /// Why it failed.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A channel found no descriptor or thread left.
    #[error("{name}: cannot open another channel: {source}{}", mend(source))]
    Channel {
        /// The device.
        name: String,
        /// Why it failed.
        source: io::Error,
    },
}

/// What can be done about an errno, for the end of a message.
fn mend(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOENT) => " (create it first, or correct the path)",
        Some(libc::EACCES | libc::EPERM) => {
            " (give the daemon's user access to it, or open it read-only)"
        }
        Some(libc::EROFS) => " (open it read-only)",
        Some(libc::EBUSY) => " (something else uses it: unmount or close it there)",
        Some(libc::EMFILE | libc::ENFILE) => " (raise the limit on open files)",
        Some(libc::EISDIR) => " (give it an image or a disk)",
        _ => "",
    }
}
