//! Descriptor chains of a split ring: the one walk over a head's descriptors.
#![deny(
    clippy::as_conversions,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

mod fault;
mod indirect;
mod plain;
mod walk;

use std::fmt;
use std::rc::Rc;

pub use fault::ChainFault;
pub use plain::{Data, Plain};

use self::walk::{Side, Walk};
use crate::direction::{Dest, Source};
use crate::hold::Hold;
use crate::iov::IovIter;
use crate::memory::Area;
use crate::segment::StatusSlot;
use crate::view::View;

/// How large a chain may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChainLimits {
    /// Non-empty descriptors. One that crosses regions becomes several segments, of which there
    /// can be as many more as there are regions.
    pub max_segments: u32,
    /// Bytes, of both directions together.
    pub max_bytes: u64,
}

/// The walked descriptors of one head: the memory to read, the memory to write, and the hold.
///
/// Everything was copied from guest memory exactly once; what the driver changes in its
/// descriptors from now on changes nothing here.
pub struct Chain {
    head: u16,
    source: Side,
    dest: Side,
    hold: Hold,
}

/// A chain that breaks the rules, told from one that is merely short.
#[derive(Debug)]
pub struct BrokenChain {
    /// What is wrong with it: the first thing that was found.
    pub fault: ChainFault,
    /// Where a status can go all the same: the last byte, if the chain could be followed to its
    /// end and ends with a writable one.
    pub status: Option<StatusSlot>,
    /// The hold, for writing it.
    pub hold: Hold,
}

impl Chain {
    /// Walks the chain at `head` of the descriptor table `table`, which has `size` descriptors,
    /// and takes the hold.
    ///
    /// Descriptors of length zero are skipped. INDIRECT is followed whether it was negotiated or
    /// not, as Windows uses it anyway; it may come after direct descriptors, and its table may
    /// have more of them than the ring.
    ///
    /// # Errors
    /// The chain is broken; whoever gets the error still owes the driver its head.
    // One descriptor at a time is copied and checked, so a driver that changes them under the
    // walk gets a chain of what was read, or a fault, but never memory outside of the table.
    pub fn walk(
        view: &Rc<View>,
        table: &Area,
        size: u16,
        head: u16,
        limits: &ChainLimits,
    ) -> Result<Self, BrokenChain> {
        let hold = view.hold();
        let mut walk = Walk::new(view, limits);
        match walk.ring(table, size, head) {
            Ok(()) => {
                let (source, dest) = walk.into_sides();
                Ok(Self {
                    head,
                    source,
                    dest,
                    hold,
                })
            }
            Err(fault) => Err(BrokenChain {
                fault,
                status: walk.status(),
                hold,
            }),
        }
    }

    /// The index the chain is known by.
    #[inline]
    pub fn head(&self) -> u16 {
        self.head
    }

    /// The chain's parts: what the device reads, what it writes, and what keeps both mapped.
    #[inline]
    pub fn split(self) -> (IovIter<Source>, IovIter<Dest>, Hold) {
        (self.source.into_iter(), self.dest.into_iter(), self.hold)
    }
}

impl fmt::Debug for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Chain")
            .field("head", &self.head)
            .finish_non_exhaustive()
    }
}
