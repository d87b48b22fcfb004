//! Guest memory, directed iterators over descriptor chains, and holds.
//!
//! A request's memory goes through here in five steps:
//!
//! 1. A [`MemoryTable`] maps what the front end shares; a worker looks at it through its [`View`].
//! 2. [`Chain::walk`] reads a head's descriptors, once, and takes the [`Hold`] that keeps the
//!    table mapped until the request ends.
//! 3. [`Chain::split`] gives an [`IovIter<Source>`](IovIter) to read from and an
//!    [`IovIter<Dest>`](IovIter) to write to. The direction is a type: the wrong one does not
//!    compile.
//! 4. [`IovIter::extract`] turns the next part of one into [`Held`] memory for a device.
//! 5. Dropping the hold is the only cleanup.
//!
//! Guest memory is never a `&[u8]`: guests write to it while it is read, so it is copied, or
//! handed on as vectors.

mod bounce;
mod chain;
mod copy;
mod direction;
mod dirty;
mod error;
mod extract;
mod hold;
mod iov;
mod kind;
#[cfg(debug_assertions)]
pub mod ledger;
pub mod memory;
mod pin;
mod pools;
mod private;
mod query;
mod segment;
mod view;

pub use chain::{BrokenChain, Chain, ChainFault, ChainLimits, Data, Plain};
pub use direction::{Dest, Direction, Source};
pub use dirty::{DirtyLog, LOG_PAGE, SharedLog};
pub use error::IterError;
pub use extract::{ExtractError, ExtractErrorKind, Held, MemoryNeeds, Stability};
pub use hold::{Hold, HoldFlags};
pub use iov::{Cursor, IovIter};
pub use memory::{Area, Line, MAX_REGIONS, MemoryError, MemoryTable, Region, RegionSpec, sigbus};
pub use pin::PinnedRegion;
pub use pools::Pools;
pub use private::PrivateMemory;
pub use segment::{Segment, StatusSlot};
pub use view::View;
