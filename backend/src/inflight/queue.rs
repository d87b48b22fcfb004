//! One split vring's part of an in-flight region (`QueueRegionSplit`).

#![deny(
    clippy::as_conversions,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use iov_iter::Area;

/// Bytes before the descriptors' entries.
pub(super) const HEADER_BYTES: usize = 16;
/// Bytes of a descriptor's entry.
pub(super) const DESC_BYTES: usize = 16;

/// Offsets in the header: `features` at zero has no bits yet.
const VERSION: usize = 8;
const DESC_NUM: usize = 10;
const LAST_BATCH_HEAD: usize = 12;
const USED_IDX: usize = 14;
/// Offsets in a descriptor's entry (`DescStateSplit`).
const INFLIGHT: usize = 0;
const NEXT: usize = 6;
const COUNTER: usize = 8;

/// The only version there is; zero says that no vring has used the part yet.
const CURRENT: u16 = 1;

/// A split vring's record of the chains it has taken, in memory that outlives the daemon.
///
/// What matters is the order of the stores. A daemon that is killed has done all of them up to some
/// instruction and none after it, so program order is enough, and a release store is how a compiler
/// is told to keep it.
#[derive(Debug)]
pub struct QueueRegion {
    memory: Area,
    at: usize,
    size: u16,
    /// Entries there are, of which the vring may use fewer.
    capacity: u16,
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
    /// The part at byte `at`, used by a vring of `size` entries.
    pub(super) fn new(memory: Area, at: usize, size: u16, capacity: u16) -> QueueRegion {
        QueueRegion {
            memory,
            at,
            size,
            capacity,
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
            && self.header(DESC_NUM).load(Ordering::Acquire) == self.size;
        if is_known {
            self.clear_last_batch(used);
        } else {
            self.wipe();
        }
        self.header(USED_IDX).store(used, Ordering::Release);
        self.header(DESC_NUM).store(self.size, Ordering::Release);
        self.version().store(CURRENT, Ordering::Release);

        let recorded = (0..self.size).filter(|&head| self.is_recorded(head));
        let mut found: Vec<(u64, u16)> = recorded
            .map(|head| (self.counter(head).load(Ordering::Acquire), head))
            .collect();
        found.sort_unstable();
        let last = found.last().map_or(0, |(counter, _)| *counter);
        Recovered {
            heads: found.into_iter().map(|(_, head)| head).collect(),
            counter: last.wrapping_add(1),
        }
    }

    /// Records a chain that was taken.
    #[inline]
    pub(super) fn enter(&self, head: u16, counter: u64) {
        self.counter(head).store(counter, Ordering::Release);
        self.state(head).store(1, Ordering::Release);
    }

    /// Whether a head is recorded as taken.
    #[inline]
    pub(super) fn is_recorded(&self, head: u16) -> bool {
        self.state(head).load(Ordering::Acquire) == 1
    }

    /// Links a chain whose used element was written into the batch that is to be published.
    #[inline]
    pub(super) fn link(&self, head: u16) {
        let last = self.header(LAST_BATCH_HEAD);
        self.next(head)
            .store(last.load(Ordering::Acquire), Ordering::Release);
        last.store(head, Ordering::Release);
    }

    /// A chain of a batch that was published is no longer in flight.
    #[inline]
    pub(super) fn clear(&self, head: u16) {
        self.state(head).store(0, Ordering::Release);
    }

    /// All of a batch was cleared; the driver sees its chains up to `used`.
    #[inline]
    pub(super) fn close(&self, used: u16) {
        self.header(USED_IDX).store(used, Ordering::Release);
    }

    fn clear_last_batch(&self, used: u16) {
        let batch = used.wrapping_sub(self.header(USED_IDX).load(Ordering::Acquire));
        let mut head = self.header(LAST_BATCH_HEAD).load(Ordering::Acquire);
        // A batch is never larger than the ring; the front end may have written anything.
        for _ in 0..batch.min(self.size) {
            if head >= self.size {
                return;
            }
            self.clear(head);
            head = self.next(head).load(Ordering::Acquire);
        }
    }

    fn wipe(&self) {
        for head in 0..self.capacity {
            self.clear(head);
        }
        self.header(LAST_BATCH_HEAD).store(0, Ordering::Release);
    }

    fn version(&self) -> &AtomicU16 {
        self.header(VERSION)
    }

    fn header(&self, offset: usize) -> &AtomicU16 {
        let at = self.at.saturating_add(offset);
        self.memory.atomic_u16(at).unwrap_or(&NOWHERE_16)
    }

    fn state(&self, head: u16) -> &AtomicU8 {
        let at = self.entry(head).saturating_add(INFLIGHT);
        self.memory.atomic_u8(at).unwrap_or(&NOWHERE_8)
    }

    fn next(&self, head: u16) -> &AtomicU16 {
        let at = self.entry(head).saturating_add(NEXT);
        self.memory.atomic_u16(at).unwrap_or(&NOWHERE_16)
    }

    fn counter(&self, head: u16) -> &AtomicU64 {
        let at = self.entry(head).saturating_add(COUNTER);
        self.memory.atomic_u64(at).unwrap_or(&NOWHERE_64)
    }

    /// Offset of a head's entry. Heads are checked against the ring's size before they get here.
    fn entry(&self, head: u16) -> usize {
        usize::from(head)
            .saturating_mul(DESC_BYTES)
            .saturating_add(HEADER_BYTES)
            .saturating_add(self.at)
    }
}

/// What a field outside the region reads as. There is none: the region was checked to be large
/// enough, and everything in it is aligned.
static NOWHERE_8: AtomicU8 = AtomicU8::new(0);
static NOWHERE_16: AtomicU16 = AtomicU16::new(0);
static NOWHERE_64: AtomicU64 = AtomicU64::new(0);
