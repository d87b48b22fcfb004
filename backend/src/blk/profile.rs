//! What a worker keeps of a device, to admit requests without asking it.

use blockdev::{Access, Caching, Capabilities, DiscardLimits, Geometry, Sector, WriteZeroesLimits};
use iov_iter::MemoryNeeds;

/// A device's geometry and capabilities, as requests are admitted by them.
#[derive(Clone, Copy, Debug)]
pub struct Profile {
    /// Its size.
    pub capacity: Sector,
    /// Its block size, in bytes; the unit of every transfer.
    pub block_size: u32,
    /// Whether it can be written.
    pub access: Access,
    /// Whether a flush means something to it.
    pub caching: Caching,
    /// What it asks of the memory it moves.
    pub memory: MemoryNeeds,
    /// Whether and how far it discards.
    pub discard: Option<DiscardLimits>,
    /// Whether and how far it writes zeroes.
    pub write_zeroes: Option<WriteZeroesLimits>,
}

impl Profile {
    pub(super) fn new(geometry: Geometry, capabilities: Capabilities) -> Profile {
        Profile {
            capacity: geometry.capacity,
            block_size: geometry.block_size,
            access: geometry.access,
            caching: capabilities.caching,
            memory: capabilities.memory,
            discard: capabilities.discard,
            write_zeroes: capabilities.write_zeroes,
        }
    }
}
