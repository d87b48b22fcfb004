//! Pins: which guest memory lies in buffers that the kernel has registered, and its slots there.
//!
//! Registered pages are found once, and not anew for every transfer. They are long-term pins: a
//! page that its owner punches out of the file stays registered, and transfers reach the old page.
#![deny(
    clippy::as_conversions,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

use std::cell::{Cell, RefCell};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::direction::Direction;
use crate::hold::{Extra, Hold};
use crate::iov::IovIter;
use crate::memory::{MemoryTable, Region};
use crate::segment::Segment;

/// A region whose memory is registered, in slots of one size (the last may be shorter).
///
/// It keeps its region mapped: an address that a slot stands for is nobody else's while the slot
/// lives.
#[derive(Clone, Debug)]
pub struct PinnedRegion {
    region: Arc<Region>,
    first: u16,
    slot_shift: u32,
}

impl PinnedRegion {
    /// Says that `region` lies in slots of `1 << slot_shift` bytes, from the slot `first` on;
    /// nothing if there are no such slots.
    pub fn new(region: Arc<Region>, first: u16, slot_shift: u32) -> Option<Self> {
        let last = region.size().checked_sub(1)?.checked_shr(slot_shift)?;
        let last = u16::try_from(last).ok()?;
        // The end has to be a number too.
        first.checked_add(last)?.checked_add(1)?;
        Some(Self {
            region,
            first,
            slot_shift,
        })
    }

    /// The region.
    pub fn region(&self) -> &Arc<Region> {
        &self.region
    }

    /// Its slots.
    pub fn slots(&self) -> Range<u16> {
        let last = self.slot_of(self.region.size().saturating_sub(1));
        self.first..last.unwrap_or(self.first).saturating_add(1)
    }

    /// The bytes of the region that a slot of it stands for, as offsets in the region.
    pub fn bytes_of(&self, slot: u16) -> Range<u64> {
        let index = u64::from(slot.saturating_sub(self.first));
        let at = |index: u64| {
            let start = 1u64.checked_shl(self.slot_shift);
            let start = start.and_then(|bytes| bytes.checked_mul(index));
            start.unwrap_or(u64::MAX).min(self.region.size())
        };
        at(index)..at(index.saturating_add(1))
    }

    /// Whether it is the very same mapping, not only the same numbers.
    pub fn is_of(&self, table: &MemoryTable) -> bool {
        let mut regions = table.regions().iter();
        regions.any(|region| Arc::ptr_eq(region, &self.region))
    }

    fn slot_of(&self, offset: u64) -> Option<u16> {
        let index = offset.checked_shr(self.slot_shift)?;
        self.first.checked_add(u16::try_from(index).ok()?)
    }
}

/// The pins of one view: the slots of its table's regions, and how many of its holds use one.
pub(crate) struct Pins {
    /// By the index of the region in the table; empty when nothing is registered.
    regions: RefCell<Vec<Option<PinnedRegion>>>,
    is_empty: Cell<bool>,
    holds: Cell<usize>,
}

impl Pins {
    pub(crate) const fn new() -> Self {
        Self {
            regions: RefCell::new(Vec::new()),
            is_empty: Cell::new(true),
            holds: Cell::new(0),
        }
    }

    /// From now on the regions of `table` that are among `pinned` are extracted with their slots.
    pub(crate) fn set(&self, table: &MemoryTable, pinned: &[PinnedRegion]) {
        let find = |region: &Arc<Region>| {
            let mut pinned = pinned.iter();
            pinned.find(|pin| Arc::ptr_eq(&pin.region, region)).cloned()
        };
        let mut regions: Vec<_> = table.regions().iter().map(find).collect();
        if regions.iter().all(Option::is_none) {
            regions.clear();
        }
        self.is_empty.set(regions.is_empty());
        self.regions.replace(regions);
    }

    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.is_empty.get()
    }

    /// What a hold owes for a segment of this view's table.
    #[inline]
    pub(crate) fn pin(&self, segment: &Segment) -> Extra {
        if self.is_empty() {
            return Extra::Nothing;
        }
        let slot = self.slot(segment, segment.size());
        slot.map_or(Extra::Nothing, Extra::Pinned)
    }

    /// The one slot that all `len` bytes from `start` on lie in, which lie in one region.
    fn slot(&self, start: &Segment, len: usize) -> Option<u16> {
        let regions = self.regions.borrow();
        let region = regions.get(usize::try_from(start.region).ok()?)?.as_ref()?;
        let last = u64::try_from(len).ok()?.checked_sub(1)?;
        let last = region.slot_of(start.offset.checked_add(last)?)?;
        region.slot_of(start.offset).filter(|slot| *slot == last)
    }

    /// Holds that use a slot now.
    pub(crate) fn holds(&self) -> usize {
        self.holds.get()
    }

    pub(crate) fn add_hold(&self) {
        self.holds.set(self.holds.get().wrapping_add(1));
    }

    pub(crate) fn remove_hold(&self) {
        self.holds.set(self.holds.get().wrapping_sub(1));
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        debug_assert_eq!(self.holds.get(), 0, "a pin outlives its view");
    }
}

impl fmt::Debug for Pins {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let regions = self.regions.borrow();
        f.debug_struct("Pins")
            .field("regions", &regions.iter().flatten().count())
            .field("holds", &self.holds.get())
            .finish()
    }
}

impl<D: Direction> IovIter<D> {
    /// What the hold owes for `len` bytes of guest memory that became these vectors: a slot, if
    /// they are one run inside one.
    pub(crate) fn pin(&self, hold: &Hold, vectors: &[libc::iovec], len: usize) -> Extra {
        let pins = hold.view().pins();
        let [_one] = vectors else {
            return Extra::Nothing;
        };
        if pins.is_empty() {
            return Extra::Nothing;
        }
        let start = self.parts(len).next();
        let slot = start.and_then(|start| pins.slot(&start, len));
        slot.map_or(Extra::Nothing, Extra::Pinned)
    }
}
