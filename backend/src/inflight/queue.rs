//! One split vring's part of an in-flight region (`QueueRegionSplit`).

#![deny(
    clippy::as_conversions,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};

use iov_iter::Area;

use crate::failpoint::reached;

/// Bytes before the descriptors' entries.
pub(super) const HEADER_BYTES: usize = 16;
/// Bytes of a descriptor's entry.
pub(super) const DESC_BYTES: usize = 16;

/// Offsets in the header: `features` at zero has no bits yet.
const VERSION: usize = 8;
const DESC_NUM: usize = 10;
const LAST_BATCH_HEAD: usize = 12;
const USED_IDX: usize = 14;
/// A descriptor's entry (`DescStateSplit`) as two words: whether it is in flight in byte 0 and the
/// next entry of its batch in bytes 6 and 7 of the first, its counter in the second.
type Entry = [AtomicU64; 2];

/// The only version there is; zero says that no vring has used the part yet.
const CURRENT: u16 = 1;

/// A split vring's record of the chains it has taken, in memory that outlives the daemon.
///
/// What matters is the order of the stores. A daemon that is killed has done all of them up to some
/// instruction and none after it, so program order is enough, and a release store is how a compiler
/// is told to keep it.
#[derive(Debug)]
pub struct QueueRegion {
    header: Area,
    /// All there are, of which the vring may use fewer.
    entries: Area,
    size: u16,
}

/// What an earlier daemon left.
#[derive(Debug, PartialEq, Eq)]
pub struct Recovered {
    /// The heads it had taken and not answered, in the order it took them.
    pub heads: Vec<u16>,
    /// The number that the next chain gets.
    pub counter: u64,
}

impl QueueRegion {
    /// The part with this header and these entries, used by a vring of `size`.
    pub(super) fn new(header: Area, entries: Area, size: u16) -> QueueRegion {
        QueueRegion {
            header,
            entries,
            size,
        }
    }

    /// Says that no vring has used the part yet.
    pub(super) fn forget(&self) {
        self.version().store(0, Ordering::Release);
    }

    /// Finds what an earlier daemon had in flight, given the used index in guest memory.
    ///
    /// If that index is ahead of the recorded one, the last batch was published and its entries
    /// were perhaps not cleared: they are the ones that were linked last.
    pub(super) fn recover(&self, used: u16) -> Recovered {
        // A ring of another size is another ring: its driver began anew, and knows nothing of what
        // was in flight.
        let is_known = self.version().load(Ordering::Acquire) == CURRENT
            && self.field(DESC_NUM).load(Ordering::Acquire) == self.size;
        if is_known {
            self.clear_last_batch(used);
        } else {
            self.wipe();
        }
        self.field(USED_IDX).store(used, Ordering::Release);
        self.field(DESC_NUM).store(self.size, Ordering::Release);
        self.version().store(CURRENT, Ordering::Release);

        let recorded = (0..self.size).filter_map(|head| {
            let [state, counter] = self.entry(head);
            let counter = || counter.load(Ordering::Acquire);
            is_in_flight(state.load(Ordering::Acquire)).then(|| (counter(), head))
        });
        let mut found: Vec<(u64, u16)> = recorded.collect();
        found.sort_unstable();
        let last = found.last().map_or(0, |(counter, _)| *counter);
        Recovered {
            heads: found.into_iter().map(|(_, head)| head).collect(),
            counter: last.wrapping_add(1),
        }
    }

    /// Records a chain that was taken; says whether it was not recorded already.
    #[inline]
    #[must_use]
    pub(super) fn enter(&self, head: u16, counter: u64) -> bool {
        let [state, place] = self.entry(head);
        if is_in_flight(state.load(Ordering::Acquire)) {
            return false;
        }
        place.store(counter, Ordering::Release);
        state.store(in_flight(0), Ordering::Release);
        true
    }

    /// Links the chains of a batch whose used elements were written and that is to be published,
    /// each to the one before it and the first to `last`.
    #[inline]
    pub(super) fn link(&self, batch: &[u16], last: u16) {
        let entries = self.entries.pairs();
        let mut last = last;
        for &head in batch {
            if let Some([state, _]) = entries.get(usize::from(head)) {
                state.store(in_flight(last), Ordering::Release);
            }
            last = head;
        }
        self.field(LAST_BATCH_HEAD).store(last, Ordering::Release);
    }

    /// The chains of a batch that was published are no longer in flight. They stay linked as
    /// [`link`](Self::link) did it, for a successor that finds the batch half cleared. Gives the
    /// last of them.
    #[inline]
    pub(super) fn clear(&self, batch: &[u16], last: u16) -> u16 {
        let entries = self.entries.pairs();
        let mut last = last;
        for &head in batch {
            if let Some([state, _]) = entries.get(usize::from(head)) {
                state.store(idle(last), Ordering::Release);
            }
            reached("cleared");
            last = head;
        }
        last
    }

    /// The chain that was linked most recently.
    pub(super) fn last(&self) -> u16 {
        self.field(LAST_BATCH_HEAD).load(Ordering::Acquire)
    }

    /// All of a batch was cleared; the driver sees its chains up to `used`.
    #[inline]
    pub(super) fn close(&self, used: u16) {
        self.field(USED_IDX).store(used, Ordering::Release);
    }

    fn clear_last_batch(&self, used: u16) {
        let batch = used.wrapping_sub(self.field(USED_IDX).load(Ordering::Acquire));
        let mut head = self.field(LAST_BATCH_HEAD).load(Ordering::Acquire);
        // A batch is never larger than the ring; the front end may have written anything.
        for _ in 0..batch.min(self.size) {
            if head >= self.size {
                return;
            }
            let [state, _] = self.entry(head);
            let next = next_of(state.load(Ordering::Acquire));
            state.store(idle(next), Ordering::Release);
            head = next;
        }
    }

    fn wipe(&self) {
        for [state, _] in self.entries.pairs() {
            state.store(idle(0), Ordering::Release);
        }
        self.field(LAST_BATCH_HEAD).store(0, Ordering::Release);
    }

    fn version(&self) -> &AtomicU16 {
        self.field(VERSION)
    }

    fn field(&self, offset: usize) -> &AtomicU16 {
        self.header.atomic_u16(offset).unwrap_or(&NOWHERE_16)
    }

    /// A head's entry. Heads are checked against the ring's size before they get here.
    #[inline]
    fn entry(&self, head: u16) -> &Entry {
        let entries = self.entries.pairs();
        entries.get(usize::from(head)).unwrap_or(&NOWHERE)
    }
}

/// The first word of an entry that is in flight.
#[inline]
fn in_flight(next: u16) -> u64 {
    let [low, high] = next.to_ne_bytes();
    u64::from_ne_bytes([1, 0, 0, 0, 0, 0, low, high])
}

/// The first word of one that is not.
#[inline]
fn idle(next: u16) -> u64 {
    let [low, high] = next.to_ne_bytes();
    u64::from_ne_bytes([0, 0, 0, 0, 0, 0, low, high])
}

#[inline]
fn is_in_flight(state: u64) -> bool {
    let [in_flight, ..] = state.to_ne_bytes();
    in_flight == 1
}

fn next_of(state: u64) -> u16 {
    let [.., low, high] = state.to_ne_bytes();
    u16::from_ne_bytes([low, high])
}

/// What an entry outside the region reads as. There is none: the region was checked to be large
/// enough, and everything in it is aligned.
static NOWHERE: Entry = [AtomicU64::new(0), AtomicU64::new(0)];
/// The same for a field of the header.
static NOWHERE_16: AtomicU16 = AtomicU16::new(0);
