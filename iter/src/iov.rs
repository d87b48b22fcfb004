//! `IovIter`: a position in a list of segments, with a direction.
#![deny(
    clippy::as_conversions,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

use std::cell::Cell;
use std::fmt;
use std::marker::PhantomData;
use std::rc::Rc;

use crate::direction::{Dest, Direction};
use crate::error::IterError;
use crate::hold::Hold;
use crate::kind::{Kind, List};
use crate::private::PrivateMemory;
use crate::segment::{Segment, StatusSlot};
use crate::view::View;

/// A position in memory that a device reads from ([`Source`](crate::Source)) or writes to
/// ([`Dest`]).
///
/// All counts are bytes. The iterator knows its origin, so a revert past it is refused, and its
/// end, so a truncation can be taken back. It does not keep the memory mapped: operations that
/// touch memory ask for the [`Hold`] that does, and look every segment up in that hold's table.
///
/// # Invariants
/// `consumed + count <= total`, which is the sum of the segments' lengths; no segment is empty;
/// `index` and `skip` name byte `consumed`: at the start of a segment rather than at the end of
/// the one before, unless there is no byte after it.
pub struct IovIter<D: Direction> {
    pub(crate) kind: Kind,
    /// Bytes from the origin to the end.
    total: usize,
    /// Bytes from the origin to the position.
    consumed: usize,
    /// Bytes from the position to the end, or to where the iterator is truncated.
    pub(crate) count: usize,
    /// The segment of the position, and the bytes before the position in it.
    pub(crate) index: usize,
    pub(crate) skip: u32,
    /// Tells this iterator's cursors from others'.
    serial: u64,
    direction: PhantomData<D>,
}

/// A saved position and count of one iterator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cursor {
    serial: u64,
    consumed: usize,
    count: usize,
    index: usize,
    skip: u32,
}

impl<D: Direction> IovIter<D> {
    /// An iterator over `ranges` of guest memory (guest address, length), in this order. A range
    /// that crosses regions becomes several segments; empty ones are left out.
    ///
    /// # Errors
    /// [`IterError::Unmapped`], and [`IterError::Overflow`] if the lengths have no sum.
    pub fn guest(view: &Rc<View>, ranges: &[(u64, u32)]) -> Result<Self, IterError> {
        let mut list = List::new();
        for &(guest, len) in ranges {
            for segment in view.segments(guest, len) {
                let segment = segment.map_err(|_unmapped| IterError::Unmapped { guest, len })?;
                list.push(view.pools(), segment);
            }
        }
        let total = sum(&list).ok_or(IterError::Overflow)?;
        Ok(Self::from_kind(Kind::Guest(list), total))
    }

    /// An iterator over segments that `keeper` keeps mapped, whatever hold its operations are
    /// given: how one request becomes several transfers.
    ///
    /// # Errors
    /// [`IterError::Unmapped`] for a segment that is not of `keeper`'s table,
    /// [`IterError::Overflow`] if the lengths have no sum.
    pub fn lent(keeper: &Rc<Hold>, segments: &[Segment]) -> Result<Self, IterError> {
        let mut list = List::new();
        for segment in segments.iter().filter(|segment| segment.len > 0) {
            let Segment { guest, len, .. } = *segment;
            let table = keeper.view().table();
            table
                .slice(segment)
                .ok_or(IterError::Unmapped { guest, len })?;
            list.push(keeper.view().pools(), *segment);
        }
        let total = sum(&list).ok_or(IterError::Overflow)?;
        Ok(Self::from_kind(
            Kind::Lent {
                list,
                keeper: Rc::clone(keeper),
            },
            total,
        ))
    }

    /// An iterator over the daemon's own memory. Never logged.
    pub fn private(memory: Rc<PrivateMemory>) -> Self {
        let total = memory.len();
        Self::from_kind(Kind::Private { memory, start: 0 }, total)
    }

    /// Bytes that remain.
    #[inline]
    pub fn count(&self) -> usize {
        self.count
    }

    /// Moves on by `n` bytes, or by all that remain; how many it were.
    pub fn advance(&mut self, n: usize) -> usize {
        let n = n.min(self.count);
        self.moved_on(n);
        if let Some(list) = self.kind.list() {
            let mut left = n;
            while let Some(segment) = list.get(self.index) {
                let rest = segment.part(self.skip, segment.size()).size();
                if left < rest {
                    // Below a segment's length, so it fits.
                    self.skip = self
                        .skip
                        .saturating_add(u32::try_from(left).unwrap_or(u32::MAX));
                    break;
                }
                left = left.saturating_sub(rest);
                self.index = self.index.saturating_add(1);
                self.skip = 0;
            }
        }
        n
    }

    /// Goes back by `n` bytes; they remain again.
    ///
    /// # Errors
    /// [`IterError::RevertPastStart`], and the position stays.
    pub fn revert(&mut self, n: usize) -> Result<(), IterError> {
        let consumed = self.consumed;
        let past_start = IterError::RevertPastStart { by: n, consumed };
        self.consumed = consumed.checked_sub(n).ok_or(past_start)?;
        // Cannot overflow: consumed + count is at most the total, before and after.
        self.count = self.count.saturating_add(n);
        let Some(list) = self.kind.list() else {
            return Ok(());
        };
        let mut left = n;
        loop {
            let before = usize::try_from(self.skip).unwrap_or(usize::MAX);
            if left <= before {
                self.skip = self
                    .skip
                    .saturating_sub(u32::try_from(left).unwrap_or(u32::MAX));
                return Ok(());
            }
            left = left.saturating_sub(before);
            self.index = self.index.saturating_sub(1);
            self.skip = list.get(self.index).map_or(0, |segment| segment.len);
        }
    }

    /// Hides what remains after the next `limit` bytes; does nothing if that is all.
    pub fn truncate(&mut self, limit: usize) {
        self.count = self.count.min(limit);
    }

    /// Makes `count` bytes remain, what a truncation hid among them.
    ///
    /// # Errors
    /// [`IterError::ExpandPastEnd`], and the count stays.
    pub fn reexpand(&mut self, count: usize) -> Result<(), IterError> {
        let left = self.left();
        if count > left {
            return Err(IterError::ExpandPastEnd { count, left });
        }
        self.count = count;
        Ok(())
    }

    /// The position and the count, to come back to.
    pub fn save(&self) -> Cursor {
        let Self {
            serial,
            consumed,
            count,
            index,
            skip,
            ..
        } = *self;
        Cursor {
            serial,
            consumed,
            count,
            index,
            skip,
        }
    }

    /// Comes back to where `cursor` was saved.
    ///
    /// # Errors
    /// [`IterError::ForeignCursor`] if another iterator saved it, or this one before a split or a
    /// byte taken off its end made it too short.
    pub fn restore(&mut self, cursor: Cursor) -> Result<(), IterError> {
        let end = cursor.consumed.saturating_add(cursor.count);
        if cursor.serial != self.serial || end > self.total {
            return Err(IterError::ForeignCursor);
        }
        let Cursor {
            serial: _,
            consumed,
            count,
            index,
            skip,
        } = cursor;
        (self.consumed, self.count, self.index, self.skip) = (consumed, count, index, skip);
        Ok(())
    }

    /// Comes back to the origin, and to the end.
    pub fn rewind(&mut self) {
        (self.consumed, self.index, self.skip) = (0, 0, 0);
        self.count = self.total;
    }

    /// Splits off everything after the next `n` bytes, what a truncation hid included: `self`
    /// ends there, and the rest begins a new iterator with its origin there.
    ///
    /// # Errors
    /// [`IterError::SplitPastEnd`], and nothing is split.
    pub fn split(&mut self, n: usize) -> Result<Self, IterError> {
        let Some(rest) = self.count.checked_sub(n) else {
            return Err(IterError::SplitPastEnd {
                at: n,
                count: self.count,
            });
        };
        let total = self.left().saturating_sub(n);
        let at = self.save();
        self.advance(n);
        let list = match self.kind.list_mut() {
            Some(list) => list.cut(self.index, self.skip),
            None => List::new(),
        };
        let mut tail = Self::from_kind(self.kind.over(list, self.consumed), total);
        tail.count = rest;
        self.total = self.consumed;
        (self.consumed, self.index, self.skip) = (at.consumed, at.index, at.skip);
        self.count = n;
        Ok(tail)
    }

    /// The whole list, from the origin to the end, wherever the position is: for the dirty log.
    /// Empty for memory that is not a guest's.
    pub fn segments(&self) -> impl Iterator<Item = Segment> + '_ {
        self.kind
            .list()
            .into_iter()
            .flat_map(|list| list.iter().copied())
    }

    /// Whether changes through this iterator are to be logged: it is a [`Dest`], and its memory
    /// is a guest's.
    pub fn must_log(&self) -> bool {
        D::CHANGES_MEMORY && self.kind.is_guest_memory()
    }

    /// Whether extraction leaves memory that only a hold keeps in place, whatever the direction;
    /// otherwise its owner does. Known before extraction and not changed by it.
    pub fn will_pin(&self) -> bool {
        self.kind.is_guest_memory()
    }

    /// An iterator over one or two segments of guest memory, none of them empty, as a walk found
    /// them. Which table they are of is seen when the memory is touched.
    #[inline]
    pub fn from_segments(segments: &[Segment]) -> Self {
        let total = segments
            .iter()
            .fold(0_usize, |sum, segment| sum.saturating_add(segment.size()));
        Self::from_kind(Kind::Guest(List::of(segments)), total)
    }

    #[inline]
    pub(crate) fn from_kind(kind: Kind, total: usize) -> Self {
        Self {
            kind,
            total,
            consumed: 0,
            count: total,
            index: 0,
            skip: 0,
            serial: next_serial(),
            direction: PhantomData,
        }
    }

    /// The segment parts from the position on, `n` bytes in all at most.
    #[inline]
    pub(crate) fn parts(&self, n: usize) -> impl Iterator<Item = Segment> + '_ {
        let list = self
            .kind
            .list()
            .and_then(|list| list.get(self.index..))
            .unwrap_or_default();
        let mut skip = self.skip;
        let mut left = n.min(self.count);
        list.iter().map_while(move |segment| {
            let part = segment.part(skip, left);
            skip = 0;
            left = left.saturating_sub(part.size());
            (part.len > 0).then_some(part)
        })
    }

    /// The private memory at the position, for that kind.
    pub(crate) fn private_place(&self) -> Option<(&Rc<PrivateMemory>, usize)> {
        match &self.kind {
            Kind::Private { memory, start } => Some((memory, start.saturating_add(self.consumed))),
            Kind::Guest(_) | Kind::Lent { .. } | Kind::Sink => None,
        }
    }

    /// The same memory from the position on, `n` bytes of it: what an extraction took.
    pub(crate) fn extracted_part(&self, n: usize, pools: &Rc<crate::Pools>) -> Kind {
        let mut list = List::new();
        for part in self.parts(n) {
            list.push(pools, part);
        }
        self.kind.over(list, self.consumed)
    }

    /// Bytes from the position to the end, truncated ones included.
    fn left(&self) -> usize {
        self.total.saturating_sub(self.consumed)
    }

    #[inline]
    fn moved_on(&mut self, n: usize) {
        self.consumed = self.consumed.saturating_add(n);
        self.count = self.count.saturating_sub(n);
    }
}

impl IovIter<Dest> {
    /// An iterator that swallows `len` bytes and stores none. Never logged.
    pub fn sink(len: usize) -> Self {
        Self::from_kind(Kind::Sink, len)
    }

    /// Takes the last byte off, for a status. Only of guest memory, and only while the position
    /// is before it. Cursors saved at the very end become foreign.
    pub fn take_last_byte(&mut self) -> Option<StatusSlot> {
        let Kind::Guest(list) = &mut self.kind else {
            return None;
        };
        if self.consumed >= self.total {
            return None;
        }
        let byte = list.take_last_byte()?;
        self.total = self.total.saturating_sub(1);
        self.count = self.count.min(self.total.saturating_sub(self.consumed));
        StatusSlot::last_of(&byte)
    }
}

impl<D: Direction> fmt::Debug for IovIter<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            kind,
            total,
            consumed,
            count,
            ..
        } = self;
        write!(
            f,
            "{} {kind:?}: {count} left after {consumed} of {total}",
            D::NAME
        )
    }
}

/// The sum of the segments' lengths, in bytes.
fn sum(list: &[Segment]) -> Option<usize> {
    list.iter()
        .try_fold(0_usize, |sum, segment| sum.checked_add(segment.size()))
}

#[inline]
fn next_serial() -> u64 {
    thread_local! {
        static NEXT: Cell<u64> = const { Cell::new(0) };
    }
    let serial = NEXT.get();
    NEXT.set(serial.wrapping_add(1));
    serial
}
