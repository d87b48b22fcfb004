//! Block devices behind one trait.
//!
//! A [`BlockDevice`] is what stores blocks; a [`Channel`] is one worker's path into it; a [`Ring`]
//! belongs to one worker and owns every op in flight:
//!
//! ```text
//!  Channel::prep(&mut Ring, Tag, Op)   the op and its memory move into the ring
//!  Ring::submit(Wait)                  one system call for the whole batch, which also waits
//!  Ring::reap() -> Event               completions, and readiness of the eventfds it watches
//! ```
//!
//! An op carries its memory by value ([`iov_iter::Held`]) and comes back, whatever happens, in
//! exactly one [`Completion`]. No virtio here: sectors, extents and bytes only.

mod completion;
#[cfg(feature = "conformance")]
pub mod conformance;
mod device;
mod event;
pub mod fault;
mod file;
mod geometry;
mod memory;
mod null;
mod op;
pub mod open;
mod ring;
mod store;

pub use completion::{Completion, IoError, Verdict, settle};
pub use device::{
    Abort, BlockDevice, Caching, Capabilities, Channel, Claim, DiscardLimits, MayUnmap,
    RegisteredBuffers, WriteZeroesLimits,
};
pub use geometry::{
    Access, BLOCK_SIZES, Extent, Geometry, OutOfRange, SECTOR_SHIFT, SECTOR_SIZE, Sector,
    is_block_size,
};
pub use op::{Durability, Op, Tag, Unmap};
pub use open::{Direct, FileOptions, OpenError};
pub use ring::buffers::{Buffers, Lease, MAX_SLOTS, Progress, SLOT_SHIFT};
pub use ring::{Engine, Event, FileKind, FileSlot, Ring, RingError, Wait, Watch, Way, Ways};
