//! Regular files and block specials.

mod keeper;
mod probe;
mod ways;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use iov_iter::{MemoryNeeds, Stability};

use self::probe::{DirectNeeds, Facts};
use crate::completion::Completion;
use crate::device::{
    Abort, BlockDevice, Caching, Capabilities, Channel, Claim, DiscardLimits, MayUnmap,
    RegisteredBuffers, WriteZeroesLimits,
};
use crate::geometry::{Access, Geometry, SECTOR_SIZE, Sector, is_block_size};
use crate::op::{Op, Tag};
use crate::open::{Direct, FileOptions, OpenError};
use crate::ring::{FileSlot, Ring, Way, Ways};

/// A file, opened once and shared by all channels.
#[derive(Debug)]
pub(crate) struct FileDevice {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    path: PathBuf,
    file: File,
    facts: Facts,
    geometry: Geometry,
    direct: Option<DirectNeeds>,
    ways: Ways,
    /// The capacity in sectors: the one part of the geometry that changes.
    sectors: AtomicU64,
}

impl FileDevice {
    pub(crate) fn open(path: &Path, options: FileOptions) -> Result<Self, OpenError> {
        let failed = |action| {
            move |source| OpenError::File {
                path: path.to_owned(),
                action,
                source,
            }
        };
        // Looked at before it is opened: opening a fifo would wait for its other end.
        let metadata = std::fs::metadata(path).map_err(failed("find it"))?;
        if !probe::stores_blocks(&metadata) {
            return Err(OpenError::NotStorage(path.to_owned()));
        }
        let file = OpenOptions::new()
            .read(true)
            .write(options.access == Access::ReadWrite)
            .custom_flags(libc::O_NOCTTY)
            .open(path)
            .map_err(failed("open it"))?;
        let opened = file.metadata().map_err(failed("look at it"))?;
        if !probe::stores_blocks(&opened) {
            return Err(OpenError::NotStorage(path.to_owned()));
        }
        let kind = probe::kind(&file).map_err(failed("ask for its sector size"))?;
        if options.access == Access::ReadWrite && probe::is_read_only(&file, kind) {
            return Err(failed("write to it")(io::Error::from_raw_os_error(
                libc::EROFS,
            )));
        }
        let facts = probe::facts(&file, kind).map_err(failed("ask for its size"))?;
        let (direct, block_size) = Self::settle_direct(path, &file, &facts, options)?;
        let geometry = geometry(&facts, block_size, options.access);
        check_size(path, &facts, &geometry)?;
        let ways = ways::find(path, &file, facts.kind, direct);
        let sectors = AtomicU64::new(geometry.capacity.0);
        let path = path.to_owned();
        Ok(Self {
            shared: Arc::new(Shared {
                path,
                file,
                facts,
                geometry,
                direct,
                ways,
                sectors,
            }),
        })
    }

    /// The same with every call made this way, whatever is the best one.
    #[cfg(feature = "conformance")]
    pub(crate) fn by(path: &Path, options: FileOptions, way: Way) -> Result<Self, OpenError> {
        let mut device = Self::open(path, options)?;
        if let Some(shared) = Arc::get_mut(&mut device.shared) {
            shared.ways = Ways::all(way);
        }
        Ok(device)
    }

    /// Decides between O_DIRECT and the page cache, and on the block size: it is never below what
    /// O_DIRECT needs for offsets, since then a guest's write could need a read before it.
    fn settle_direct(
        path: &Path,
        file: &File,
        facts: &Facts,
        options: FileOptions,
    ) -> Result<(Option<DirectNeeds>, u32), OpenError> {
        let failed = |source| OpenError::File {
            path: path.to_owned(),
            action: "set O_DIRECT on it",
            source,
        };
        if let Some(size) = options.block_size
            && !is_block_size(size)
        {
            return Err(OpenError::BlockSize { given: size });
        }
        let own_size = facts.logical.max(512);
        let name = path.display();
        if options.direct == Direct::Off {
            return Ok((None, options.block_size.unwrap_or(own_size)));
        }
        let Some(needs) = probe::go_direct(file, facts).map_err(failed)? else {
            log::warn!("{name}: O_DIRECT is not possible here, the page cache is used");
            return Ok((None, options.block_size.unwrap_or(own_size)));
        };
        let needed = needs.offset.max(own_size);
        match options.block_size {
            Some(size) if size < needed => {
                log::warn!(
                    "{name}: O_DIRECT needs blocks of {needed} bytes, so with a block size of \
                     {size} the page cache is used"
                );
                probe::go_buffered(file).map_err(failed)?;
                Ok((None, size))
            }
            Some(size) => Ok((Some(needs), size)),
            None => Ok((Some(needs), needed)),
        }
    }
}

impl BlockDevice for FileDevice {
    fn name(&self) -> String {
        self.shared.path.display().to_string()
    }

    fn geometry(&self) -> Geometry {
        self.shared.geometry()
    }

    fn capabilities(&self) -> Capabilities {
        let Shared {
            facts,
            geometry,
            direct,
            ways,
            ..
        } = &*self.shared;
        let writable = geometry.access == Access::ReadWrite;
        let (address_align, len_align) = match direct {
            // Before Linux 6.18 each segment's length has to be a multiple of it, not only the sum.
            Some(needs) => (needs.memory, needs.offset),
            None => (1, 1),
        };
        Capabilities {
            discard: facts
                .discard
                .filter(|_| writable)
                .map(|discard| DiscardLimits {
                    max_sectors: sectors_within(discard.max, geometry.block_size),
                    alignment_sectors: (discard.granularity.max(geometry.block_size) / 512).max(1),
                }),
            write_zeroes: writable.then_some(WriteZeroesLimits {
                max_sectors: sectors_within(u64::MAX, geometry.block_size),
                may_unmap: MayUnmap::Yes,
            }),
            memory: MemoryNeeds {
                address_align,
                len_align,
                stability: Stability::AsIs,
            },
            caching: Caching::Volatile,
            abort: Abort::Impossible,
            buffers: match (ways.reads, ways.writes) {
                (Way::Inline, Way::Inline) => RegisteredBuffers::Unused,
                (Way::Engine, _) | (_, Way::Engine) => RegisteredBuffers::Used,
            },
        }
    }

    fn open_channel(&self, ring: &mut Ring) -> Result<Box<dyn Channel>, OpenError> {
        let Shared {
            file, facts, ways, ..
        } = &*self.shared;
        let slot = ring
            .register_file(file.as_fd(), facts.kind, *ways)
            .map_err(|source| OpenError::Channel {
                name: self.name(),
                source,
            })?;
        Ok(Box::new(FileChannel {
            shared: Arc::clone(&self.shared),
            slot,
        }))
    }

    fn refresh(&self) -> io::Result<Geometry> {
        let Shared {
            file,
            facts,
            geometry,
            sectors,
            ..
        } = &*self.shared;
        let size = probe::size(file, facts.kind)?;
        let capacity = Sector::floor(size - size % u64::from(geometry.block_size));
        sectors.store(capacity.0, Ordering::Relaxed);
        Ok(self.shared.geometry())
    }

    fn claim(&self) -> io::Result<Claim> {
        let Shared {
            file,
            geometry,
            direct,
            ..
        } = &*self.shared;
        let claim = keeper::lock(file, geometry.access)?;
        // What the page cache kept from an earlier time may not be what the file holds now.
        if claim != Claim::Busy
            && direct.is_none()
            && let Err(error) = file.sync_data().and_then(|()| keeper::drop_cache(file))
        {
            // Whoever is told that a claim failed does not give it back.
            keeper::unlock(file)?;
            return Err(error);
        }
        Ok(claim)
    }

    fn release(&self) -> io::Result<()> {
        let synced = match self.shared.direct {
            None => self.sync(),
            Some(_) => Ok(()),
        };
        let unlocked = keeper::unlock(&self.shared.file);
        synced.and(unlocked)
    }

    fn sync(&self) -> io::Result<()> {
        match self.shared.geometry.access {
            Access::ReadWrite => self.shared.file.sync_data(),
            Access::ReadOnly => Ok(()),
        }
    }
}

impl Shared {
    fn geometry(&self) -> Geometry {
        let capacity = Sector(self.sectors.load(Ordering::Relaxed));
        Geometry {
            capacity,
            ..self.geometry
        }
    }
}

#[derive(Debug)]
struct FileChannel {
    shared: Arc<Shared>,
    slot: FileSlot,
}

impl Channel for FileChannel {
    fn prep(&mut self, ring: &mut Ring, tag: Tag, op: Op) {
        match op.check(&self.shared.geometry()) {
            Ok(()) => ring.start(self.slot, tag, op),
            Err(error) => ring.complete(Completion::failed(tag, op, error)),
        }
    }

    fn event(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn collect(&mut self, _ring: &mut Ring) {}
}

/// What the guest is told, from what the kernel said.
fn geometry(facts: &Facts, block_size: u32, access: Access) -> Geometry {
    let flat = Geometry::flat(facts.size, block_size, access);
    // A physical block is a power of two of logical ones, or the kernel said something odd.
    let physical = match facts.physical {
        size if size.is_power_of_two() && size > block_size => size,
        _ => block_size,
    };
    let blocks = |bytes: u32| bytes / block_size;
    Geometry {
        physical_block_exp: u8::try_from(blocks(physical).ilog2()).unwrap_or(0),
        alignment_offset: u8::try_from(blocks(facts.alignment_offset)).unwrap_or(0),
        min_io_blocks: u16::try_from(blocks(facts.io_min))
            .unwrap_or(u16::MAX)
            .max(1),
        opt_io_blocks: blocks(facts.io_opt),
        ..flat
    }
}

/// A file that is not a whole number of blocks loses its end, and says so; one without any block
/// is refused.
fn check_size(path: &Path, facts: &Facts, geometry: &Geometry) -> Result<(), OpenError> {
    let block_size = geometry.block_size;
    if geometry.capacity == Sector(0) {
        let name = path.display().to_string();
        return Err(OpenError::TooSmall {
            name,
            size: facts.size,
            block_size,
        });
    }
    let rest = facts.size % u64::from(block_size);
    if rest != 0 {
        log::warn!(
            "{}: its last {rest} bytes are not a block of {block_size} and are left out",
            path.display()
        );
    }
    Ok(())
}

/// The longest discard or write-zeroes: what the medium takes, at most [`MAX_RANGE_BYTES`], in
/// sectors of whole blocks.
fn sectors_within(max: u64, block_size: u32) -> u32 {
    let bytes = max.min(MAX_RANGE_BYTES);
    let blocks = (bytes / u64::from(block_size)).max(1);
    u32::try_from(blocks * (u64::from(block_size) / SECTOR_SIZE)).unwrap_or(u32::MAX)
}

/// 512 MiB: where a file system can only write zeroes, one op still ends within a second or two.
const MAX_RANGE_BYTES: u64 = 512 << 20;
