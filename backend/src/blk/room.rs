//! What a request may write to, from its walk to its end.

#![deny(
    clippy::as_conversions,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

use iov_iter::{Dest, DirtyLog, Hold, IovIter, Segment};

/// The memory that a request may write, its status byte left out: one segment, as most reads have
/// it, or nothing, until it is asked for as an iterator.
#[derive(Debug)]
pub(super) struct Room {
    plain: Option<Segment>,
    lists: Option<IovIter<Dest>>,
}

impl Room {
    /// One segment, or nothing.
    #[inline]
    pub(super) fn plain(plain: Option<Segment>) -> Room {
        Room { plain, lists: None }
    }

    /// Any number of segments.
    pub(super) fn lists(lists: IovIter<Dest>) -> Room {
        Room {
            plain: None,
            lists: Some(lists),
        }
    }

    /// As an iterator, from wherever it was left.
    pub(super) fn iter(&mut self) -> &mut IovIter<Dest> {
        let plain = self.plain.as_slice();
        self.lists
            .get_or_insert_with(|| IovIter::from_segments(plain))
    }

    /// Zeroes all beyond the first `moved` bytes.
    #[inline]
    pub(super) fn zero_after(&mut self, moved: usize, hold: &Hold) {
        let is_full = self.plain.is_none_or(|segment| moved >= segment.size());
        if self.lists.is_some() || !is_full {
            self.zero_rest(moved, hold);
        }
    }

    fn zero_rest(&mut self, moved: usize, hold: &Hold) {
        let room = self.iter();
        room.rewind();
        room.advance(moved);
        let rest = room.count();
        if rest > 0 {
            room.zero(hold, rest);
        }
    }

    /// Marks all of it, wherever it was left.
    #[inline]
    pub(super) fn mark<L: DirtyLog>(&self, log: &L) {
        match (&self.lists, self.plain) {
            (Some(lists), _) if lists.must_log() => {
                for segment in lists.segments() {
                    log.mark(segment.guest, segment.len.into());
                }
            }
            (None, Some(segment)) => log.mark(segment.guest, segment.len.into()),
            (Some(_), _) | (None, None) => {}
        }
    }
}
