//! What the kernel knows about a file that blocks are stored in.

#![expect(
    unsafe_code,
    reason = "statx, fcntl and the block layer's ioctls take raw pointers"
)]

pub(super) mod nowait;

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};

use crate::ring::FileKind;

/// Everything [`super::FileDevice`] asks at open. Sizes are in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Facts {
    pub(super) kind: FileKind,
    pub(super) size: u64,
    /// The smallest unit the medium addresses; 1 for a file in a file system.
    pub(super) logical: u32,
    /// The smallest unit the medium writes without reading first.
    pub(super) physical: u32,
    /// Where the first physical block starts.
    pub(super) alignment_offset: u32,
    pub(super) io_min: u32,
    pub(super) io_opt: u32,
    pub(super) discard: Option<DiscardFacts>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct DiscardFacts {
    pub(super) granularity: u32,
    pub(super) max: u64,
}

/// What O_DIRECT asks of a request, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DirectNeeds {
    pub(super) memory: u32,
    pub(super) offset: u32,
}

/// Whether blocks can be stored there at all.
pub(super) fn stores_blocks(metadata: &std::fs::Metadata) -> bool {
    metadata.file_type().is_file() || metadata.file_type().is_block_device()
}

/// What kind of storage an open file is.
pub(super) fn kind(file: &File) -> io::Result<FileKind> {
    if file.metadata()?.file_type().is_block_device() {
        return Ok(FileKind::Block {
            sector_size: ask(file, libc::BLKSSZGET)?,
        });
    }
    Ok(FileKind::Regular)
}

/// Asks for everything but O_DIRECT's needs.
pub(super) fn facts(file: &File, kind: FileKind) -> io::Result<Facts> {
    let size = size(file, kind)?;
    let metadata = file.metadata()?;
    match kind {
        FileKind::Regular => {
            let unit = u32::try_from(metadata.blksize()).unwrap_or(4096);
            Ok(Facts {
                kind,
                size,
                logical: 1,
                physical: unit,
                alignment_offset: 0,
                io_min: unit,
                io_opt: 0,
                discard: Some(DiscardFacts {
                    granularity: unit,
                    max: u64::MAX,
                }),
            })
        }
        FileKind::Block { sector_size } => Ok(Facts {
            kind,
            size,
            logical: sector_size,
            physical: ask(file, libc::BLKPBSZGET)?,
            // -1 is the kernel's word for a stack of devices that cannot be aligned.
            alignment_offset: ask(file, BLKALIGNOFF).unwrap_or(0),
            io_min: ask(file, libc::BLKIOMIN)?,
            io_opt: ask(file, libc::BLKIOOPT)?,
            discard: discard_facts(metadata.rdev()),
        }),
    }
}

/// The size, now. Metadata says 0 for every block special.
pub(super) fn size(file: &File, kind: FileKind) -> io::Result<u64> {
    match kind {
        FileKind::Regular => Ok(file.metadata()?.len()),
        FileKind::Block { .. } => {
            let mut size = 0u64;
            // SAFETY: BLKGETSIZE64 writes one u64 to the pointer, which is a local.
            let result = unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64, &raw mut size) };
            if result == 0 {
                Ok(size)
            } else {
                Err(io::Error::last_os_error())
            }
        }
    }
}

/// Whether the block layer takes no writes for this device, whatever the file's mode.
pub(super) fn is_read_only(file: &File, kind: FileKind) -> bool {
    kind != FileKind::Regular && ask(file, BLKROGET).is_ok_and(|flag| flag != 0)
}

/// Switches O_DIRECT on and says what it needs; `None`, with O_DIRECT off, when the file system
/// cannot do it.
pub(super) fn go_direct(file: &File, facts: &Facts) -> io::Result<Option<DirectNeeds>> {
    match set_direct(file, true) {
        Ok(()) => {}
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(None),
        Err(error) => return Err(error),
    }
    let needs = match asked_needs(file) {
        Some(needs) => needs,
        None => match facts.kind {
            FileKind::Block { .. } => Some(DirectNeeds {
                memory: facts.logical,
                offset: facts.logical,
            }),
            FileKind::Regular => tried_needs(file, facts.size),
        },
    };
    if needs.is_none() {
        set_direct(file, false)?;
    }
    Ok(needs)
}

/// Switches O_DIRECT off.
pub(super) fn go_buffered(file: &File) -> io::Result<()> {
    set_direct(file, false)
}

/// statx(STATX_DIOALIGN), Linux 6.1: the outer `None` when this kernel or file system does not
/// say, the inner one when it says that O_DIRECT is not possible.
fn asked_needs(file: &File) -> Option<Option<DirectNeeds>> {
    // SAFETY: `statx` is plain old data, for which all zeroes is a value.
    let mut answer: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path is a static empty string, and the answer a local of the kernel's type.
    let result = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            &raw mut answer,
        )
    };
    if result != 0 || answer.stx_mask & libc::STATX_DIOALIGN == 0 {
        return None;
    }
    let (memory, offset) = (answer.stx_dio_mem_align, answer.stx_dio_offset_align);
    if memory == 0 || offset == 0 {
        return Some(None);
    }
    Some(Some(DirectNeeds { memory, offset }))
}

/// Without an answer from the kernel: the smallest aligned read that works. Memory gets the same
/// alignment, which no file system asks more of.
fn tried_needs(file: &File, size: u64) -> Option<DirectNeeds> {
    let mut buffer = vec![0u8; 2 * PAGE];
    let skip = buffer.as_ptr().align_offset(PAGE);
    let aligned = buffer.get_mut(skip..skip + PAGE)?;
    for unit in [512u32, PAGE as u32] {
        // At the end of an empty file every read succeeds and proves nothing.
        let worked =
            size >= u64::from(unit) && file.read_at(&mut aligned[..unit as usize], 0).is_ok();
        if worked || unit == PAGE as u32 {
            return Some(DirectNeeds {
                memory: unit,
                offset: unit,
            });
        }
    }
    None
}

/// Sets or clears O_DIRECT of an open file.
fn set_direct(file: &File, on: bool) -> io::Result<()> {
    // SAFETY: F_GETFL takes no pointer.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    let flags = if on {
        flags | libc::O_DIRECT
    } else {
        flags & !libc::O_DIRECT
    };
    // SAFETY: F_SETFL takes no pointer.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// One of the block layer's questions that are answered with a number.
fn ask(file: &File, question: libc::Ioctl) -> io::Result<u32> {
    let mut answer = 0i32;
    // SAFETY: the questions asked here write one 32-bit number to the pointer, which is a local.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), question, &raw mut answer) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    u32::try_from(answer).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// Discard as sysfs describes it; `None` when the device cannot, or nothing says that it can.
fn discard_facts(device: u64) -> Option<DiscardFacts> {
    let node = format!(
        "/sys/dev/block/{}:{}",
        libc::major(device),
        libc::minor(device)
    );
    // A partition has no queue of its own: its disk's is one level up.
    let read = |name: &str| {
        [
            format!("{node}/queue/{name}"),
            format!("{node}/../queue/{name}"),
        ]
        .iter()
        .find_map(|path| std::fs::read_to_string(path).ok())
        .and_then(|text| text.trim().parse::<u64>().ok())
    };
    let max = read("discard_max_bytes").filter(|max| *max > 0)?;
    let granularity = read("discard_granularity").and_then(|bytes| u32::try_from(bytes).ok());
    Some(DiscardFacts {
        granularity: granularity.unwrap_or(0).max(512),
        max,
    })
}

const PAGE: usize = 4096;

/// `_IOR(0x12, 114, size_t)` of linux/fs.h.
const BLKGETSIZE64: libc::Ioctl = 0x8008_1272;

/// `_IO(0x12, 94)` of linux/fs.h.
const BLKROGET: libc::Ioctl = 0x125E;

/// `_IO(0x12, 122)` of linux/fs.h.
const BLKALIGNOFF: libc::Ioctl = 0x127A;
