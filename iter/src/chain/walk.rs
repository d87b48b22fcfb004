//! The walk itself: from descriptors to two lists of segments.
#![deny(
    clippy::as_conversions,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

use std::rc::Rc;

use virtio_bindings::bindings::virtio_ring::{
    VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use virtio_queue::desc::split::Descriptor;

use super::indirect::IndirectTable;
use super::{ChainFault, ChainLimits};
use crate::direction::Direction;
use crate::iov::IovIter;
use crate::kind::{Kind, List};
use crate::memory::Area;
use crate::segment::{Segment, StatusSlot};
use crate::view::View;

/// A walk under way.
pub(super) struct Walk<'a> {
    view: &'a Rc<View>,
    limits: &'a ChainLimits,
    source: Side,
    dest: Side,
    /// Non-empty descriptors met.
    descriptors: u32,
    bytes: u64,
    /// Borders between regions that descriptors crossed.
    crossings: usize,
    /// The first rule that was broken. The walk goes on after it, to find the chain's end.
    fault: Option<ChainFault>,
    /// Once a rule was broken: the last segment, while it is a dest one.
    last_dest: Option<Segment>,
}

/// One direction's segments, and the sum of their lengths.
pub(super) struct Side {
    list: List,
    bytes: usize,
}

impl Side {
    #[inline]
    pub(super) fn into_iter<D: Direction>(self) -> IovIter<D> {
        IovIter::from_kind(Kind::Guest(self.list), self.bytes)
    }
}

impl<'a> Walk<'a> {
    #[inline]
    pub(super) fn new(view: &'a Rc<View>, limits: &'a ChainLimits) -> Self {
        let side = || Side {
            list: List::new(),
            bytes: 0,
        };
        Self {
            view,
            limits,
            source: side(),
            dest: side(),
            descriptors: 0,
            bytes: 0,
            crossings: 0,
            fault: None,
            last_dest: None,
        }
    }

    /// Walks the chain at `head` to its end.
    pub(super) fn ring(&mut self, table: &Area, size: u16, head: u16) -> Result<(), ChainFault> {
        if head >= size {
            return Err(self.give_up(ChainFault::HeadOutOfRange { head, size }));
        }
        let mut index = head;
        for _ in 0..size {
            let offset = usize::from(index).wrapping_mul(size_of::<Descriptor>());
            let Some(descriptor) = table.load::<Descriptor>(offset) else {
                return Err(self.out_of_range(index, size.into()));
            };
            let flags = u32::from(descriptor.flags());
            if flags & VRING_DESC_F_INDIRECT != 0 {
                return self.indirect(&descriptor);
            }
            self.take(&descriptor);
            if flags & VRING_DESC_F_NEXT == 0 {
                return self.end();
            }
            index = descriptor.next();
            if index >= size {
                return Err(self.out_of_range(index, size.into()));
            }
        }
        Err(self.give_up(ChainFault::Cycle { size: size.into() }))
    }

    /// Walks the table that `descriptor` refers to; nothing follows it.
    fn indirect(&mut self, descriptor: &Descriptor) -> Result<(), ChainFault> {
        if u32::from(descriptor.flags()) & VRING_DESC_F_NEXT != 0 {
            return Err(self.give_up(ChainFault::IndirectNext));
        }
        // The descriptor's WRITE flag says nothing here (virtio 2.7.5.3.2).
        let view = self.view;
        let table = IndirectTable::new(view, descriptor.addr().0, descriptor.len());
        let table = table.map_err(|fault| self.give_up(fault))?;
        let mut index = 0;
        for _ in 0..table.size() {
            let descriptor = table.load(index).map_err(|fault| self.give_up(fault))?;
            let flags = u32::from(descriptor.flags());
            if flags & VRING_DESC_F_INDIRECT != 0 {
                return Err(self.give_up(ChainFault::IndirectNested));
            }
            self.take(&descriptor);
            if flags & VRING_DESC_F_NEXT == 0 {
                return self.end();
            }
            index = descriptor.next();
            if u32::from(index) >= table.size() {
                return Err(self.out_of_range(index, table.size()));
            }
        }
        Err(self.give_up(ChainFault::Cycle { size: table.size() }))
    }

    /// Where a status can go although the chain is broken.
    pub(super) fn status(&self) -> Option<StatusSlot> {
        self.last_dest.as_ref().and_then(StatusSlot::last_of)
    }

    /// What was found, source and dest.
    #[inline]
    pub(super) fn into_sides(self) -> (Side, Side) {
        (self.source, self.dest)
    }

    /// Takes one descriptor's buffer.
    #[inline]
    fn take(&mut self, descriptor: &Descriptor) {
        let (guest, len) = (descriptor.addr().0, descriptor.len());
        if len == 0 {
            return;
        }
        let writable = u32::from(descriptor.flags()) & VRING_DESC_F_WRITE != 0;
        self.count(len, writable);
        match self.view.segment(guest, len) {
            Some(segment) if segment.len == len => self.push(segment, writable),
            Some(_) | None => self.take_parts(guest, len, writable),
        }
    }

    /// Takes a buffer that crosses regions, or that is not wholly mapped.
    #[cold]
    fn take_parts(&mut self, guest: u64, len: u32, writable: bool) {
        let view = self.view;
        for (i, segment) in view.segments(guest, len).enumerate() {
            let Ok(segment) = segment else {
                self.note(ChainFault::Unmapped { guest, len });
                self.last_dest = None;
                return;
            };
            self.push(segment, writable);
            self.crossings = self.crossings.saturating_add(usize::from(i > 0));
        }
        // A driver whose buffers do not overlap crosses each border once at most.
        if self.crossings > view.table().regions().len() {
            self.note(ChainFault::TooManySegments {
                limit: self.limits.max_segments,
            });
        }
    }

    /// Counts a descriptor against the limits, and checks its place in the order.
    #[inline]
    fn count(&mut self, len: u32, writable: bool) {
        self.descriptors = self.descriptors.saturating_add(1);
        self.bytes = self.bytes.saturating_add(u64::from(len));
        let ChainLimits {
            max_segments,
            max_bytes,
        } = *self.limits;
        if self.descriptors > max_segments {
            self.note(ChainFault::TooManySegments {
                limit: max_segments,
            });
        }
        if self.bytes > max_bytes {
            self.note(ChainFault::TooManyBytes { limit: max_bytes });
        }
        if !writable && !self.dest.list.is_empty() {
            self.note(ChainFault::ReadableAfterWritable);
        }
    }

    #[inline]
    fn push(&mut self, segment: Segment, writable: bool) {
        if self.fault.is_some() {
            self.last_dest = writable.then_some(segment);
            return;
        }
        let side = if writable {
            &mut self.dest
        } else {
            &mut self.source
        };
        // Cannot overflow: `count` keeps the sum of both below `max_bytes`, or notes a fault.
        side.bytes = side.bytes.saturating_add(segment.size());
        side.list.push(self.view.pools(), segment);
    }

    /// Notes the first broken rule that does not hide the chain's end.
    #[cold]
    fn note(&mut self, fault: ChainFault) {
        if self.fault.is_none() {
            self.fault = Some(fault);
            // Until now the order was kept, so dest segments, if there are any, came last.
            self.last_dest = self.dest.list.last().copied();
        }
    }

    /// Ends a walk that cannot find the chain's end.
    #[cold]
    fn give_up(&mut self, fault: ChainFault) -> ChainFault {
        self.last_dest = None;
        *self.fault.get_or_insert(fault)
    }

    #[cold]
    fn out_of_range(&mut self, next: u16, size: u32) -> ChainFault {
        self.give_up(ChainFault::NextOutOfRange { next, size })
    }

    #[inline]
    fn end(&self) -> Result<(), ChainFault> {
        self.fault.map_or(Ok(()), Err)
    }
}
