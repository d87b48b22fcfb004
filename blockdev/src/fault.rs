//! A device that misbehaves on purpose, and the same way each time.

mod lanes;
mod plan;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::VolatileSlice;

pub use self::plan::FaultPlan;

use self::lanes::{Lanes, Ready};
use self::plan::{Decision, Dice, Verdict};
use crate::completion::{Completion, IoError};
use crate::device::{
    Abort, BlockDevice, Caching, Capabilities, Channel, DiscardLimits, MayUnmap, RegisteredBuffers,
    WriteZeroesLimits,
};
use crate::event::Event;
use crate::geometry::Geometry;
use crate::memory::perform;
use crate::null::flat_geometry;
use crate::op::{Op, Tag};
use crate::open::OpenError;
use crate::ring::Ring;
use crate::store::Store;

/// Blocks in memory behind a thread that delays, reorders, shortens, fails and keeps ops.
#[derive(Debug)]
pub(crate) struct FaultDevice {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    plan: FaultPlan,
    geometry: Geometry,
    store: Store,
    lanes: Lanes,
    channels: AtomicU64,
    counts: Counters,
}

/// The reins of a fault device.
#[derive(Clone, Debug)]
pub struct FaultHandle {
    shared: Arc<Shared>,
}

/// What a fault device has decided so far. An op may be counted under several heads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultCounts {
    /// Ops taken.
    pub taken: u64,
    /// Ops that were to fail.
    pub failed: u64,
    /// Ops that were to end early.
    pub shortened: u64,
    /// Ops that were to take their time.
    pub delayed: u64,
    /// Ops that were to be overtaken.
    pub reordered: u64,
    /// Ops that the dice made stick; those of [`FaultHandle::stick`] are not among them.
    pub stuck: u64,
    /// Ops that were taken back.
    pub aborted: u64,
}

#[derive(Debug, Default)]
struct Counters {
    taken: AtomicU64,
    failed: AtomicU64,
    shortened: AtomicU64,
    delayed: AtomicU64,
    reordered: AtomicU64,
    stuck: AtomicU64,
    aborted: AtomicU64,
}

impl FaultDevice {
    pub(crate) fn new(plan: FaultPlan) -> Result<(Self, FaultHandle), OpenError> {
        let geometry = flat_geometry("fault", plan.size, plan.block_size)?;
        let store = Store::new(plan.size)?;
        let lanes = Lanes::new().map_err(|source| OpenError::Channel {
            name: "fault".to_owned(),
            source,
        })?;
        // Whoever reads the log of a failed test can repeat it.
        log::info!("fault device: {plan:?}");
        let (channels, counts) = (AtomicU64::new(0), Counters::default());
        let shared = Arc::new(Shared {
            plan,
            geometry,
            store,
            lanes,
            channels,
            counts,
        });
        Ok((
            Self {
                shared: Arc::clone(&shared),
            },
            FaultHandle { shared },
        ))
    }
}

impl BlockDevice for FaultDevice {
    fn name(&self) -> String {
        "fault".to_owned()
    }

    fn geometry(&self) -> Geometry {
        self.shared.geometry
    }

    fn capabilities(&self) -> Capabilities {
        let max_sectors = 128 * 1024;
        Capabilities {
            discard: Some(DiscardLimits {
                max_sectors,
                alignment_sectors: 8,
            }),
            write_zeroes: Some(WriteZeroesLimits {
                max_sectors,
                may_unmap: MayUnmap::Yes,
            }),
            memory: self.shared.plan.memory,
            caching: Caching::Volatile,
            abort: Abort::Possible,
            buffers: RegisteredBuffers::Unused,
        }
    }

    fn open_channel(&self, _ring: &mut Ring) -> Result<Box<dyn Channel>, OpenError> {
        let (lane, event) = self
            .shared
            .lanes
            .open()
            .map_err(|source| OpenError::Channel {
                name: self.name(),
                source,
            })?;
        let channel = self.shared.channels.fetch_add(1, Ordering::Relaxed);
        Ok(Box::new(FaultChannel {
            dice: Dice::new(self.shared.plan, channel),
            shared: Arc::clone(&self.shared),
            lane,
            event,
            ready: Vec::new(),
        }))
    }

    fn refresh(&self) -> io::Result<Geometry> {
        Ok(self.shared.geometry)
    }
}

impl FaultHandle {
    /// From now on every op sticks.
    pub fn stick(&self) {
        self.shared.lanes.stick();
    }

    /// Ops stop sticking, and those that are stuck end as they would have.
    pub fn release(&self) {
        self.shared.lanes.release();
    }

    /// Every op in flight ends now with [`IoError::Aborted`], without having taken effect.
    pub fn abort(&self) {
        self.shared.lanes.abort();
    }

    /// Ops that are stuck now.
    #[must_use]
    pub fn stuck_now(&self) -> usize {
        self.shared.lanes.stuck()
    }

    /// What was decided so far, on all channels.
    #[must_use]
    pub fn counts(&self) -> FaultCounts {
        let Counters {
            taken,
            failed,
            shortened,
            delayed,
            reordered,
            stuck,
            aborted,
        } = &self.shared.counts;
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        FaultCounts {
            taken: load(taken),
            failed: load(failed),
            shortened: load(shortened),
            delayed: load(delayed),
            reordered: load(reordered),
            stuck: load(stuck),
            aborted: load(aborted),
        }
    }
}

#[derive(Debug)]
struct FaultChannel {
    shared: Arc<Shared>,
    dice: Dice,
    lane: usize,
    event: Arc<Event>,
    ready: Vec<Ready>,
}

impl Channel for FaultChannel {
    fn prep(&mut self, ring: &mut Ring, tag: Tag, op: Op) {
        if let Err(error) = op.check(&self.shared.geometry) {
            return ring.complete(Completion::failed(tag, op, error));
        }
        let decision = self.dice.decide(&op);
        self.shared.counts.note(&decision);
        if let Err(completion) = ring.park(tag, op) {
            return ring.complete(completion);
        }
        self.shared
            .lanes
            .push(self.lane, tag, decision, self.shared.plan.max_delay);
    }

    fn abort(&mut self, _ring: &mut Ring, tag: Tag) {
        self.shared.lanes.abort_one(self.lane, tag);
    }

    fn event(&self) -> Option<BorrowedFd<'_>> {
        Some(self.event.as_fd())
    }

    fn collect(&mut self, ring: &mut Ring) {
        self.shared.lanes.collect(self.lane, &mut self.ready);
        for (tag, verdict) in self.ready.drain(..) {
            let Some(op) = ring.parked(tag) else { continue };
            let (moved, outcome) = self.shared.carry_out(op, verdict);
            ring.finish_parked(tag, moved, outcome);
        }
    }
}

impl Drop for FaultChannel {
    fn drop(&mut self) {
        self.shared.lanes.close(self.lane);
    }
}

impl Shared {
    /// Does to the op what was decided; gives the bytes that it says moved, and how it ended.
    fn carry_out(&self, op: &Op, verdict: Verdict) -> (u32, Result<(), IoError>) {
        match verdict {
            Verdict::Obey => match perform(&self.store, op) {
                Ok(moved) => (moved, Ok(())),
                Err(error) => (0, Err(error)),
            },
            Verdict::Shorten(got) => {
                self.transfer(op, got);
                let want = u32::try_from(op.payload()).unwrap_or(u32::MAX);
                (got, Err(IoError::Short { want, got }))
            }
            Verdict::Fail { errno, silently } => {
                self.transfer(op, silently);
                (0, Err(IoError::Os(errno)))
            }
            Verdict::Abort => {
                self.counts.aborted.fetch_add(1, Ordering::Relaxed);
                (0, Err(IoError::Aborted))
            }
        }
    }

    /// Moves the first bytes of a read or write.
    fn transfer(&self, op: &Op, bytes: u32) {
        match op {
            Op::Read { at, into } => {
                self.store.read(at.offset(), first(into.slices(), bytes));
            }
            Op::Write { at, from, .. } => {
                self.store.write(at.offset(), first(from.slices(), bytes));
            }
            Op::Flush { .. } | Op::Discard { .. } | Op::WriteZeroes { .. } => {}
        }
    }
}

impl Counters {
    fn note(&self, decision: &Decision) {
        let Decision {
            verdict,
            delay,
            hold_back,
            stuck,
        } = decision;
        let count = |counter: &AtomicU64, so: bool| {
            counter.fetch_add(u64::from(so), Ordering::Relaxed);
        };
        count(&self.taken, true);
        count(&self.failed, matches!(verdict, Verdict::Fail { .. }));
        count(&self.shortened, matches!(verdict, Verdict::Shorten(_)));
        count(&self.delayed, !delay.is_zero());
        count(&self.reordered, *hold_back);
        count(&self.stuck, *stuck);
    }
}

/// The first bytes of some slices.
fn first<'a>(
    slices: impl Iterator<Item = VolatileSlice<'a>>,
    bytes: u32,
) -> impl Iterator<Item = VolatileSlice<'a>> {
    let mut left = bytes as usize;
    slices.map_while(move |slice| {
        let len = slice.len().min(left);
        left -= len;
        slice.subslice(0, len).ok().filter(|_| len > 0)
    })
}
