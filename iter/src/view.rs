//! Views: one worker's hold counter on one memory table.
#![deny(
    clippy::as_conversions,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

use std::cell::Cell;
use std::fmt;
use std::rc::Rc;
use std::sync::Arc;

use crate::hold::Hold;
use crate::memory::MemoryTable;
use crate::pin::{PinnedRegion, Pins};
use crate::pools::Pools;
use crate::segment::Segment;

/// A memory table as one worker uses it: the table, and how many of the worker's requests hold
/// it. The count is the worker's own, so no other core's cache line moves.
pub struct View {
    table: Arc<MemoryTable>,
    pools: Rc<Pools>,
    holds: Cell<usize>,
    pins: Pins,
    /// The region that the last look-up found; the next one is likely in the same. Small structures
    /// and large ones, headers and data, may well lie apart.
    last_region: [Cell<u32>; 2],
}

impl View {
    /// A view of `table` that takes its vectors and bounce buffers from `pools`.
    pub fn new(table: Arc<MemoryTable>, pools: Rc<Pools>) -> Rc<Self> {
        Rc::new(Self {
            table,
            pools,
            holds: Cell::new(0),
            pins: Pins::new(),
            last_region: Default::default(),
        })
    }

    /// The table.
    #[inline]
    pub fn table(&self) -> &Arc<MemoryTable> {
        &self.table
    }

    /// The worker's pools.
    #[inline]
    pub fn pools(&self) -> &Rc<Pools> {
        &self.pools
    }

    /// Holds taken and not yet released.
    pub fn holds(&self) -> usize {
        self.holds.get()
    }

    /// From now on, what lies in one of these regions is extracted with its slot. Replaces what was
    /// set before; regions of other tables are left out.
    pub fn set_pins(&self, pinned: &[PinnedRegion]) {
        self.pins.set(&self.table, pinned);
    }

    /// Whether any region has slots.
    pub fn has_pins(&self) -> bool {
        !self.pins.is_empty()
    }

    /// Holds that keep a slot in place too.
    pub fn pinned(&self) -> usize {
        self.pins.holds()
    }

    pub(crate) fn pins(&self) -> &Pins {
        &self.pins
    }

    /// Takes a hold that is not a chain's: for transfers the daemon itself begins.
    pub fn hold(self: &Rc<Self>) -> Hold {
        Hold::new(Rc::clone(self))
    }

    /// The first part of the guest range that lies in one region, of `len` bytes at most.
    #[inline(always)]
    pub(crate) fn segment(&self, guest: u64, len: u32) -> Option<Segment> {
        let [small, large] = &self.last_region;
        let last_region = if len < LARGE { small } else { large };
        let place = self.table.find(guest, last_region.get())?;
        last_region.set(place.region);
        let len = u32::try_from(place.left).unwrap_or(u32::MAX).min(len);
        Some(Segment {
            guest,
            offset: place.offset,
            region: place.region,
            len,
        })
    }

    /// All parts of the guest range, one per region it crosses, in order. Ends early, after
    /// `Err`, where nothing is mapped.
    pub(crate) fn segments(
        &self,
        guest: u64,
        len: u32,
    ) -> impl Iterator<Item = Result<Segment, Unmapped>> {
        let mut rest = Some((guest, len));
        std::iter::from_fn(move || {
            let (guest, len) = rest.take().filter(|(_, len)| *len > 0)?;
            let Some(segment) = self.segment(guest, len) else {
                return Some(Err(Unmapped));
            };
            let next = guest.checked_add(u64::from(segment.len));
            rest = match (next, len.saturating_sub(segment.len)) {
                (_, 0) => None,
                (Some(next), left) => Some((next, left)),
                // Nothing is mapped beyond the end of the address space.
                (None, left) => Some((u64::MAX, left)),
            };
            Some(Ok(segment))
        })
    }

    #[inline]
    pub(crate) fn add_hold(&self) {
        self.holds.set(self.holds.get().wrapping_add(1));
    }

    #[inline]
    pub(crate) fn remove_hold(&self) {
        self.holds.set(self.holds.get().wrapping_sub(1));
    }
}

/// From this many bytes on, what is looked up counts as data.
const LARGE: u32 = 512;

/// A part of a guest range lies in no region.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unmapped;

impl fmt::Debug for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("View")
            .field("regions", &self.table.regions().len())
            .field("holds", &self.holds.get())
            .finish()
    }
}
