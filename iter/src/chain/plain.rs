//! Chains of the shape that nearly every request has, recognized without the general walk.
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

use super::ChainLimits;
use super::indirect::IndirectTable;
use crate::direction::{Dest, Source};
use crate::hold::Hold;
use crate::iov::IovIter;
use crate::memory::Area;
use crate::segment::{Segment, StatusSlot};
use crate::view::View;

/// Three buffers: a header to read, data in one region, and one byte to write.
#[derive(Clone, Copy, Debug)]
pub struct Plain {
    /// The index the chain is known by.
    pub head: u16,
    /// What the device reads first.
    pub header: Segment,
    /// What it reads or writes then.
    pub data: Data,
    /// The byte it writes at the end.
    pub status: StatusSlot,
}

/// The data of a [`Plain`] chain, in the direction it moves.
#[derive(Clone, Copy, Debug)]
pub enum Data {
    /// The device reads it: data moves from there.
    From(Segment),
    /// The device writes it: data moves into there.
    Into(Segment),
}

impl Plain {
    /// As [`Chain::walk`](super::Chain::walk), for a chain that has the shape and breaks no rule.
    /// What is not recognized is for that walk, which reads the descriptors again and believes
    /// nothing that was read here.
    #[inline]
    pub fn walk(
        view: &Rc<View>,
        table: &Area,
        size: u16,
        head: u16,
        limits: &ChainLimits,
    ) -> Option<(Self, Hold)> {
        let plain = Self::recognize(view, table, size, head, limits)?;
        Some((plain, view.hold()))
    }

    #[inline]
    fn recognize(
        view: &View,
        table: &Area,
        size: u16,
        head: u16,
        limits: &ChainLimits,
    ) -> Option<Self> {
        let first = in_ring(table, size, head)?;
        let [header, data, status] = if flags(&first) == VRING_DESC_F_INDIRECT {
            let table = IndirectTable::new(view, first.addr().0, first.len()).ok()?;
            follow(table.load(0).ok()?, |index| table.load(index).ok())?
        } else {
            follow(first, |index| in_ring(table, size, index))?
        };
        let bytes = u64::from(header.len())
            .checked_add(u64::from(data.len()))?
            .checked_add(u64::from(status.len()))?;
        if bytes > limits.max_bytes || limits.max_segments < 3 {
            return None;
        }
        let segment = |descriptor: &Descriptor| {
            let (guest, len) = (descriptor.addr().0, descriptor.len());
            view.segment(guest, len)
                .filter(|segment| len > 0 && segment.len == len)
        };
        let part = segment(&data)?;
        Some(Self {
            head,
            header: segment(&header)?,
            data: if flags(&data) & VRING_DESC_F_WRITE == 0 {
                Data::From(part)
            } else {
                Data::Into(part)
            },
            status: StatusSlot::only_of(&segment(&status)?)?,
        })
    }
}

impl Plain {
    /// The same as two lists: what the device reads, and what it writes.
    pub fn into_iters(self) -> (IovIter<Source>, IovIter<Dest>) {
        let Self {
            header,
            data,
            status,
            ..
        } = self;
        match data {
            Data::From(data) => (
                IovIter::from_segments(&[header, data]),
                IovIter::from_segments(&[status.segment()]),
            ),
            Data::Into(data) => (
                IovIter::from_segments(&[header]),
                IovIter::from_segments(&[data, status.segment()]),
            ),
        }
    }
}

/// The three descriptors of a chain that begins with `first`, if their flags are as they should be.
#[inline]
fn follow(first: Descriptor, load: impl Fn(u16) -> Option<Descriptor>) -> Option<[Descriptor; 3]> {
    if flags(&first) != VRING_DESC_F_NEXT {
        return None;
    }
    let second = load(first.next())?;
    if flags(&second) & !VRING_DESC_F_WRITE != VRING_DESC_F_NEXT {
        return None;
    }
    let third = load(second.next())?;
    (flags(&third) == VRING_DESC_F_WRITE).then_some([first, second, third])
}

#[inline]
fn in_ring(table: &Area, size: u16, index: u16) -> Option<Descriptor> {
    if index >= size {
        return None;
    }
    table.load(usize::from(index).wrapping_mul(size_of::<Descriptor>()))
}

#[inline]
fn flags(descriptor: &Descriptor) -> u32 {
    u32::from(descriptor.flags())
}
