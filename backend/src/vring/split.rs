//! The split virtqueue (virtio 2.7).

#![deny(
    clippy::as_conversions,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

use std::sync::atomic::{AtomicU16, Ordering};

use iov_iter::{Area, DirtyLog, SharedLog};
use thiserror::Error;
use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY,
};

use super::Areas;
use super::areas::DESCRIPTOR_BYTES;
use super::notify::{arm, need_event, publish};
use crate::failpoint::{reached, skips};

/// Offset of the flags in both rings, in bytes (virtio 2.7.6, 2.7.8).
const FLAGS: usize = 0;
/// Offset of the index in both rings, in bytes.
const INDEX: usize = 2;
/// Offset of the first entry in both rings, in bytes.
const ENTRIES: usize = 4;

/// `VRING_USED_F_NO_NOTIFY` as the flags field holds it.
const NO_NOTIFY: u16 = 1;
const _: () = assert!(VRING_USED_F_NO_NOTIFY == 1);

/// What a word outside its area reads as; see the invariants of [`Split`].
static NOWHERE: AtomicU16 = AtomicU16::new(0);

/// A used element: which chain, and how many bytes of it were written from its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// The head the chain was made available under.
    pub head: u16,
    /// Bytes written (virtio 2.7.8.2).
    pub len: u32,
}

/// The avail index claims more chains than the ring can hold, or cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("avail index {index} is {ahead} ahead of {next}, in a ring of {size}",
    ahead = index.wrapping_sub(*next))]
pub struct AvailBroken {
    /// What the driver wrote.
    pub index: u16,
    /// Where we are.
    pub next: u16,
    /// Entries of the ring.
    pub size: u16,
}

/// Where writes to a used ring are logged (vhost-user, *Migration*).
#[derive(Clone, Debug)]
pub struct UsedLog {
    /// The log.
    pub log: SharedLog,
    /// The guest address that the log knows the used ring by. It need not be in the memory table.
    pub guest: u64,
}

/// Who is told how (virtio 2.7.7, 2.7.10).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Suppression {
    /// By flags.
    Flags,
    /// By event indices.
    EventIdx,
}

/// What the driver was asked for last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kicks {
    /// Nothing yet: what it knows is an earlier owner's wish.
    Unknown,
    /// A kick for the next chain.
    Wanted,
    /// None.
    Unwanted,
}

/// A split virtqueue, device side.
///
/// # Invariants
/// `size` is a power of two and the areas are as long as `size` asks for; every offset is computed
/// from an index masked by `size`. So a read outside an area cannot happen, and is answered as if
/// the word were zero.
#[derive(Debug)]
pub struct Split {
    areas: Areas,
    size: u16,
    suppression: Suppression,
    /// The next avail entry to pop.
    next_avail: u16,
    /// The head that was popped last.
    last_head: u16,
    /// The avail index as last read.
    avail_seen: u16,
    /// The next used entry to write.
    next_used: u16,
    /// The used index the driver can see.
    published: u16,
    /// The used index when the driver was last told; none right after the start, when nothing is
    /// known of what it was told before.
    told: Option<u16>,
    kicks: Kicks,
    /// Where writes to the used ring are logged, if they are.
    log: Option<UsedLog>,
}

impl Split {
    /// A vring that goes on where `next_avail` and the used index in guest memory say
    /// (SET_VRING_BASE sets only the avail side of a split ring).
    #[must_use]
    pub fn new(areas: Areas, size: u16, next_avail: u16, features: u64) -> Split {
        let event_idx = features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let used = word(&areas.used, INDEX).load(Ordering::Acquire);
        Split {
            areas,
            size,
            suppression: if event_idx {
                Suppression::EventIdx
            } else {
                Suppression::Flags
            },
            next_avail,
            last_head: 0,
            avail_seen: next_avail,
            next_used: used,
            published: used,
            told: None,
            kicks: Kicks::Unknown,
            log: None,
        }
    }

    /// Goes on at another avail entry than it was told at first.
    pub fn resume_at(&mut self, next_avail: u16) {
        self.next_avail = next_avail;
        self.avail_seen = next_avail;
    }

    /// The used index as the driver can see it.
    #[must_use]
    pub fn used_index(&self) -> u16 {
        self.published
    }

    /// Logs writes to the used ring there from now on, or not at all. All of the ring is marked
    /// once: what was written to it before, perhaps by an earlier daemon that did not come to mark
    /// it, is then in this log too.
    pub fn set_log(&mut self, log: Option<UsedLog>) {
        self.log = log;
        self.mark(FLAGS, self.areas.used.len());
    }

    /// Entries of the ring.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The descriptor table.
    #[must_use]
    pub fn descriptors(&self) -> &Area {
        &self.areas.desc
    }

    /// The avail index to pop next: what GET_VRING_BASE answers.
    #[must_use]
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// Goes on with the same indices in other mappings (a new memory table).
    pub fn rebase(&mut self, areas: Areas) {
        self.areas = areas;
    }

    /// Reads how many chains the driver has made available.
    ///
    /// # Errors
    /// [`AvailBroken`] when they are more than the ring has entries.
    #[inline]
    pub fn refresh(&mut self) -> Result<u16, AvailBroken> {
        let index = self.avail(INDEX).load(Ordering::Acquire);
        self.saw(index)
    }

    /// Whether the driver has made chains available that were not popped.
    #[inline]
    #[must_use]
    pub fn has_chains(&self) -> bool {
        self.avail(INDEX).load(Ordering::Relaxed) != self.next_avail
    }

    /// Fetches the descriptors that the next chain is likely to have: drivers take those first that
    /// they got back last. They come while the avail ring does, and not after it.
    #[inline]
    pub fn fetch_ahead(&self) {
        let first = usize::from(self.last_head).wrapping_mul(DESCRIPTOR_BYTES);
        self.areas.desc.line(first).fetch();
        let last = first.wrapping_add(2 * DESCRIPTOR_BYTES);
        self.areas.desc.line(last).fetch();
    }

    /// Takes the next chain that [`refresh`](Self::refresh) saw.
    #[inline]
    pub fn pop(&mut self) -> Option<u16> {
        if self.next_avail == self.avail_seen {
            return None;
        }
        let head = self
            .avail(self.avail_entry(self.next_avail))
            .load(Ordering::Relaxed);
        self.next_avail = self.next_avail.wrapping_add(1);
        self.last_head = head;
        Some(head)
    }

    /// Writes a used element; the driver sees it at the next [`publish`](Self::publish).
    #[inline]
    pub fn push_used(&mut self, used: Used) {
        let at = usize::from(self.next_used & self.mask())
            .wrapping_mul(8)
            .wrapping_add(ENTRIES);
        // Two stores: an element is only 4-byte aligned.
        if let Some([id, len]) = self.areas.used.atomic_u32s(at) {
            id.store(u32::from(used.head), Ordering::Relaxed);
            len.store(used.len, Ordering::Relaxed);
        }
        reached("element-written");
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Marks the used elements that were not published yet.
    #[inline]
    fn mark_elements(&self) {
        if self.log.is_none() {
            return;
        }
        let (first, count) = (self.published & self.mask(), self.unpublished());
        let before_end = count.min(self.size.wrapping_sub(first));
        let bytes = |count: u16| usize::from(count).saturating_mul(8);
        self.mark(bytes(first).saturating_add(ENTRIES), bytes(before_end));
        self.mark(ENTRIES, bytes(count.wrapping_sub(before_end)));
    }

    /// Used elements written and not yet published.
    #[inline]
    #[must_use]
    pub fn unpublished(&self) -> u16 {
        self.next_used.wrapping_sub(self.published)
    }

    /// Publishes the used elements of a batch and says whether the driver wants a call.
    #[inline]
    #[must_use = "a call that is not made is a driver that sleeps for ever"]
    pub fn publish(&mut self) -> bool {
        let new = self.next_used;
        let asked = match self.suppression {
            Suppression::EventIdx => self.avail(self.avail_entries_end()),
            Suppression::Flags => self.avail(FLAGS),
        };
        self.mark_elements();
        reached("element-marked");
        let asked = publish(word(&self.areas.used, INDEX), new, asked);
        reached("index-published");
        self.mark(INDEX, 2);
        self.published = new;
        let old = self.told.replace(new);
        match (self.suppression, old) {
            (Suppression::EventIdx, Some(old)) => need_event(asked, new, old),
            (Suppression::EventIdx, None) => true,
            (Suppression::Flags, _) => u32::from(asked) & VRING_AVAIL_F_NO_INTERRUPT == 0,
        }
    }

    /// Whether a driver that makes a chain available now kicks, as far as is known.
    #[must_use]
    pub fn is_armed(&self) -> bool {
        self.kicks == Kicks::Wanted
    }

    /// Asks the driver not to kick while the ring is being looked at. With event indices there is
    /// nothing to do: a kick is wanted only for the index that was asked for.
    #[inline]
    pub fn suppress_kicks(&mut self) {
        if std::mem::replace(&mut self.kicks, Kicks::Unwanted) == Kicks::Unwanted {
            return;
        }
        match self.suppression {
            Suppression::EventIdx => {}
            Suppression::Flags => {
                self.used(FLAGS).store(NO_NOTIFY, Ordering::Relaxed);
                self.mark(FLAGS, 2);
            }
        }
    }

    /// Asks for a kick at the next chain, and says how many chains came in the meantime: only when
    /// there are none may the worker sleep.
    ///
    /// # Errors
    /// As [`refresh`](Self::refresh).
    #[inline]
    pub fn arm_kick(&mut self) -> Result<u16, AvailBroken> {
        let (ask_at, ask) = match self.suppression {
            Suppression::EventIdx => (self.used_entries_end(), self.next_avail),
            Suppression::Flags => (FLAGS, 0),
        };
        let index = arm(self.used(ask_at), ask, self.avail(INDEX));
        self.kicks = Kicks::Wanted;
        self.mark(ask_at, 2);
        self.saw(index)
    }

    fn saw(&mut self, index: u16) -> Result<u16, AvailBroken> {
        let ahead = index.wrapping_sub(self.next_avail);
        if ahead > self.size {
            return Err(AvailBroken {
                index,
                next: self.next_avail,
                size: self.size,
            });
        }
        self.avail_seen = index;
        Ok(ahead)
    }

    /// Marks bytes of the used ring that were written.
    #[inline]
    fn mark(&self, offset: usize, len: usize) {
        if let Some(UsedLog { log, guest }) = &self.log {
            if skips("skip-used-marks") {
                return;
            }
            let bytes = |count: usize| u64::try_from(count).unwrap_or(u64::MAX);
            log.mark(guest.saturating_add(bytes(offset)), bytes(len));
        }
    }

    fn avail(&self, offset: usize) -> &AtomicU16 {
        word(&self.areas.avail, offset)
    }

    fn used(&self, offset: usize) -> &AtomicU16 {
        word(&self.areas.used, offset)
    }

    fn mask(&self) -> u16 {
        self.size.wrapping_sub(1)
    }

    fn avail_entry(&self, index: u16) -> usize {
        usize::from(index & self.mask())
            .wrapping_mul(2)
            .wrapping_add(ENTRIES)
    }

    /// Offset of `used_event` in the avail ring.
    fn avail_entries_end(&self) -> usize {
        usize::from(self.size).wrapping_mul(2).wrapping_add(ENTRIES)
    }

    /// Offset of `avail_event` in the used ring.
    fn used_entries_end(&self) -> usize {
        usize::from(self.size)
            .saturating_mul(8)
            .saturating_add(ENTRIES)
    }
}

fn word(area: &Area, offset: usize) -> &AtomicU16 {
    area.atomic_u16(offset).unwrap_or(&NOWHERE)
}
