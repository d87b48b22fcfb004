//! The requests a worker has in flight, by tag.

use blockdev::Tag;

use crate::blk::{Range, RangeOp, Request};

/// A request in flight.
#[derive(Debug)]
pub(super) struct InFlight {
    /// The device it came to, as a place in the worker's list.
    pub(super) device: usize,
    /// The vring it came from, as a place in the device's list.
    pub(super) vring: usize,
    /// What is owed.
    pub(super) request: Request,
    /// What goes on.
    pub(super) job: Job,
}

/// What an op's completion means for its request.
#[derive(Clone, Copy, Debug)]
pub(super) enum Job {
    /// The op is all there is.
    Single,
    /// The op is one of the ranges in the slot; the next one follows it.
    Ranges {
        /// What is done to them.
        op: RangeOp,
        /// The place of the next one.
        next: usize,
    },
}

/// The table of requests in flight. It grows to the most there ever were at once, and never
/// shrinks: nothing is allocated for a request after that.
#[derive(Debug, Default)]
pub(super) struct Slots {
    slots: Vec<Slot>,
    free: Vec<Tag>,
    in_flight: usize,
}

#[derive(Debug, Default)]
struct Slot {
    in_flight: Option<InFlight>,
    ranges: Vec<Range>,
}

impl Slots {
    /// Requests in flight.
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Finds a place for a request; the ranges it needs, if any, are swapped in.
    pub(super) fn insert(&mut self, in_flight: InFlight, ranges: Option<&mut Vec<Range>>) -> Tag {
        let tag = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            Tag(u32::try_from(self.slots.len() - 1).unwrap_or(u32::MAX))
        });
        let slot = &mut self.slots[place(tag)];
        slot.in_flight = Some(in_flight);
        if let Some(ranges) = ranges {
            std::mem::swap(&mut slot.ranges, ranges);
        }
        self.in_flight += 1;
        tag
    }

    /// The ranges of the request at `tag`.
    pub(super) fn ranges(&self, tag: Tag) -> &[Range] {
        self.slots.get(place(tag)).map_or(&[], |slot| &slot.ranges)
    }

    /// The tags of a vring's requests.
    pub(super) fn tags_of(&self, device: usize, vring: usize) -> impl Iterator<Item = Tag> {
        (0..).zip(&self.slots).filter_map(move |(tag, slot)| {
            let in_flight = slot.in_flight.as_ref()?;
            (in_flight.device == device && in_flight.vring == vring).then_some(Tag(tag))
        })
    }

    /// The request at `tag`, which stays.
    pub(super) fn get_mut(&mut self, tag: Tag) -> Option<&mut InFlight> {
        self.slots.get_mut(place(tag))?.in_flight.as_mut()
    }

    /// Takes the request at `tag` out.
    pub(super) fn remove(&mut self, tag: Tag) -> Option<InFlight> {
        let in_flight = self.slots.get_mut(place(tag))?.in_flight.take()?;
        self.free.push(tag);
        self.in_flight -= 1;
        Some(in_flight)
    }
}

fn place(tag: Tag) -> usize {
    tag.0 as usize
}
