//! A worker's loop with nothing in it but the device: keeps a number of ops in flight.

use std::rc::Rc;
use std::sync::Arc;

use blockdev::conformance::rig::{GUEST_BASE, guest_memory};
use blockdev::{
    BlockDevice, Channel, Durability, Engine, Event, Extent, Geometry, Op, Ring, Sector, Tag, Wait,
};
use iov_iter::{Dest, IovIter, MemoryNeeds, Source, View};

/// What the ops do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    Read,
    Write,
}

/// A channel, and memory for one op per tag.
pub(crate) struct Pump {
    channel: Box<dyn Channel>,
    ring: Ring,
    view: Rc<View>,
    geometry: Geometry,
    needs: MemoryNeeds,
    segments: usize,
    rng: fastrand::Rng,
}

/// Bytes per op.
pub(crate) const BYTES: u64 = 4096;

impl Pump {
    /// Ops of 4 KiB in this many segments, all over the device.
    pub(crate) fn new(device: &Arc<dyn BlockDevice>, engine: Engine, segments: usize) -> Self {
        let mut ring = Ring::new(engine).expect("the engine is available");
        Self {
            channel: device.open_channel(&mut ring).expect("a channel opens"),
            ring,
            view: guest_memory(),
            geometry: device.geometry(),
            needs: device.capabilities().memory,
            segments,
            rng: fastrand::Rng::with_seed(1),
        }
    }

    /// Does `total` ops with `depth` of them in flight, all of which must succeed.
    pub(crate) fn run(&mut self, work: Work, depth: u32, total: u32) {
        let depth = depth.min(total);
        let mut started = depth;
        (0..depth).for_each(|tag| self.prep(Tag(tag), work));
        let mut ended = 0;
        while ended < total {
            self.ring.submit(Wait::Event).expect("the ring works");
            while let Some(event) = self.ring.reap() {
                let Event::Done(completion) = event else {
                    continue;
                };
                assert_eq!(completion.outcome, Ok(()));
                ended += 1;
                let tag = completion.tag;
                drop(completion);
                if started < total {
                    started += 1;
                    self.prep(tag, work);
                }
            }
        }
    }

    fn prep(&mut self, tag: Tag, work: Work) {
        let blocks = self.geometry.capacity.0 / (BYTES / 512);
        let start = Sector(self.rng.u64(0..blocks) * (BYTES / 512));
        let at = Extent::new(start, BYTES, self.geometry.capacity).expect("inside the device");
        let len = BYTES as usize / self.segments;
        let slot = GUEST_BASE + u64::from(tag.0) * 64 * 1024;
        // Every other piece, so that they do not join into one segment.
        let ranges: [(u64, u32); 8] =
            std::array::from_fn(|n| (slot + (2 * n * len) as u64, len as u32));
        let ranges = &ranges[..self.segments];
        let (hold, bytes) = (self.view.hold(), BYTES as usize);
        let op = match work {
            Work::Read => {
                let mut iter = IovIter::<Dest>::guest(&self.view, ranges).expect("it is mapped");
                let into = iter
                    .extract(hold, bytes, &self.needs)
                    .expect("it fits the device");
                Op::Read { at, into }
            }
            Work::Write => {
                let mut iter = IovIter::<Source>::guest(&self.view, ranges).expect("it is mapped");
                let from = iter
                    .extract(hold, bytes, &self.needs)
                    .expect("it fits the device");
                Op::Write {
                    at,
                    from,
                    durability: Durability::Cached,
                }
            }
        };
        self.channel.prep(&mut self.ring, tag, op);
    }
}
