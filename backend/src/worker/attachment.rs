//! One worker's part of one device: its vrings, its channel, its view of the guest's memory.

mod commands;

use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;

use blockdev::{Channel, Completion, Ring};
use iov_iter::{MemoryTable, PinnedRegion, Pools, View, sigbus};
use vmm_sys_util::eventfd::EventFd;

use super::path::{Finish, Path};
use super::slots::Slots;
use super::{LogSetup, Report, StopMode, TableEpoch, VringId};
use crate::blk::BlkDevice;
use crate::fds::borrow;
use crate::limits::{MAX_BOUNCE_BYTES, MAX_REQUEST_BYTES};
use crate::vring::{Draining, RingBroken, Started, Stopped};

/// Chains taken before those among them that were answered at once are published: a driver that
/// runs on another CPU takes them while the next ones are served.
const BATCH: usize = 8;

/// Batches a vring may have in its first turn: the storage is to begin soon.
const FIRST_TURN: usize = 1;

/// Batches a vring may have in each turn after that, before other vrings, commands and completions
/// get theirs: a few large submits cost less than many small ones.
const TURN: usize = 3;

/// As many chains in one turn.
pub(super) const CHAINS_PER_TURN: usize = TURN * BATCH;

/// What a worker lends to its devices while it serves them.
pub(super) struct Lent<'a> {
    pub(super) ring: &'a mut Ring,
    pub(super) slots: &'a mut Slots,
    /// Eventfds that were replaced, to be closed once the next submit returned: until then the ring
    /// may refer to them.
    pub(super) outgoing: &'a mut Vec<EventFd>,
    /// What the control thread is told.
    pub(super) reports: &'a mut Vec<Report>,
}

/// A vring, in one of its states.
#[derive(Debug)]
enum Vring {
    Stopped(Stopped),
    Started(Box<Started>),
    Draining(Draining),
}

/// How a vring was left after its turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Look {
    /// It goes on being looked at, and had nothing more.
    Empty,
    /// It has more than its turn allowed.
    More,
    /// It is not looked at any more.
    NoMore,
}

/// What a look at the vrings brought.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Served {
    /// Chains that were taken.
    pub(super) chains: usize,
    /// Whether a vring had its turn and has more.
    pub(super) is_more: bool,
}

/// Which of the workers this is, and how many share the device: vring `i` belongs to worker
/// `i % of`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Share {
    pub(super) worker: usize,
    pub(super) of: usize,
}

/// One worker's part of one device.
pub(super) struct Attachment {
    path: Path<Box<LogSetup>>,
    share: Share,
    place: usize,
    vrings: Vec<Vring>,
    /// Vrings that are looked at without a kick: until they are armed again, none is asked for.
    awake: Vec<usize>,
    /// Batches that each vring may have in its next turn.
    turn: usize,
    draining: usize,
    epoch: TableEpoch,
    /// Views of older tables that requests still hold, oldest first.
    retired: VecDeque<Rc<View>>,
    /// What of its memory has slots in the ring.
    pins: Vec<PinnedRegion>,
    /// Whether the control thread waits for them.
    release_owed: bool,
    /// Fences to be answered once no disabled vring has anything in flight.
    fences: Vec<u64>,
    /// Contained faults up to which the memory is known to be all there.
    faults: usize,
}

impl Attachment {
    /// Attaches a worker to a device, as the `place`th of the worker's.
    pub(super) fn new(
        device: Arc<BlkDevice>,
        channel: Box<dyn Channel>,
        place: usize,
        share: Share,
    ) -> Attachment {
        let budget = (MAX_BOUNCE_BYTES / share.of).max(MAX_REQUEST_BYTES as usize);
        let view = View::new(Arc::new(MemoryTable::empty()), Pools::new(budget));
        Attachment {
            path: Path::new(device, channel, place, view),
            share,
            place,
            vrings: Vec::new(),
            awake: Vec::new(),
            turn: FIRST_TURN,
            draining: 0,
            epoch: TableEpoch::default(),
            retired: VecDeque::new(),
            pins: Vec::new(),
            release_owed: false,
            fences: Vec::new(),
            faults: 0,
        }
    }

    /// Whether every vring is stopped.
    pub(super) fn is_stopped(&self) -> bool {
        self.vrings
            .iter()
            .all(|vring| matches!(vring, Vring::Stopped(_)))
    }

    /// Whether a vring may have chains to pop.
    #[inline]
    pub(super) fn is_served(&self) -> bool {
        self.vrings
            .iter()
            .any(|vring| matches!(vring, Vring::Started(vring) if vring.may_pop()))
    }

    /// Whether a vring that is looked at has chains that could be served now. If so, what the first
    /// of them is likely to be made of is on its way from the driver's CPU when they are.
    #[inline]
    pub(super) fn has_news(&self) -> bool {
        let has_chains = |local: &usize| match self.vrings.get(*local) {
            Some(Vring::Started(vring)) if vring.has_chains() => {
                vring.fetch_ahead();
                self.path.fetch_ahead(*local);
                true
            }
            Some(Vring::Started(_) | Vring::Stopped(_) | Vring::Draining(_)) | None => false,
        };
        self.path.parked.is_empty() && self.awake.iter().any(has_chains)
    }

    /// Moves what the channel's threads finished into the ring.
    pub(super) fn collect(&mut self, ring: &mut Ring) {
        self.path.channel.collect(ring);
    }

    /// A vring was kicked.
    pub(super) fn kicked(&mut self, local: usize) {
        self.path.counters.kicks.add(1);
        self.wake(local);
    }

    fn wake(&mut self, local: usize) {
        if !self.awake.contains(&local) {
            self.awake.push(local);
        }
    }

    /// Pops and starts what the vrings that are awake have, each a turn's worth at the most.
    pub(super) fn serve(&mut self, served: &mut Served, lent: &mut Lent<'_>) {
        while let Some((local, used)) = self.path.retry_parked(lent) {
            served.chains += 1;
            if let (Some(used), Some(vring)) = (used, in_flight_vring(&mut self.vrings, local)) {
                self.path.settle(vring, local, Some(used));
            }
        }
        let mut is_more = false;
        let mut at = 0;
        while let Some(&local) = self.awake.get(at).filter(|_| self.path.parked.is_empty()) {
            match self.serve_one(local, served, lent) {
                Look::Empty => at += 1,
                Look::More => {
                    is_more = true;
                    at += 1;
                }
                Look::NoMore => {
                    self.awake.swap_remove(at);
                }
            }
        }
        self.turn = if is_more { TURN } else { FIRST_TURN };
        served.is_more |= is_more;
    }

    /// Serves one vring for a turn.
    fn serve_one(&mut self, local: usize, served: &mut Served, lent: &mut Lent<'_>) -> Look {
        for _ in 0..self.turn {
            let Some(Vring::Started(vring)) = self.vrings.get_mut(local) else {
                return Look::NoMore;
            };
            if !vring.may_pop() {
                return Look::NoMore;
            }
            vring.suppress_kicks();
            let mut taken = 0;
            while taken < BATCH {
                match vring.pop() {
                    Ok(Some(head)) => self.path.start(vring, local, head, lent),
                    Ok(None) => break,
                    Err(error) => return self.broke_down(local, &error, lent),
                }
                taken += 1;
                if !self.path.parked.is_empty() || !vring.is_sound() {
                    break;
                }
                // A front end that took its memory away is about to lose its session. Going on
                // would read zeroes where the memory was, and map a page for every one that is
                // touched.
                let faults = sigbus::faults();
                if faults != self.faults {
                    if self.path.view.table().poisoned() {
                        return Look::NoMore;
                    }
                    self.faults = faults;
                }
            }
            served.chains += taken;
            if !vring.is_sound() {
                lent.reports.push(Report::Broken(self.id(local)));
                return Look::NoMore;
            }
            if taken < BATCH || !vring.has_chains() {
                return Look::Empty;
            }
            self.publish_used(lent);
        }
        Look::More
    }

    /// Asks for kicks wherever none was wanted while the vrings were looked at; whether there is
    /// something to do all the same. What is parked waits for the storage, and its vrings with it.
    pub(super) fn arm(&mut self, lent: &mut Lent<'_>) -> bool {
        if !self.path.parked.is_empty() {
            return false;
        }
        let mut at = 0;
        while let Some(&local) = self.awake.get(at) {
            if self.arm_one(local, lent) {
                at += 1;
            } else {
                self.awake.swap_remove(at);
            }
        }
        !self.awake.is_empty()
    }

    /// Asks for one vring's kicks; says whether it has to be looked at without one.
    fn arm_one(&mut self, local: usize, lent: &mut Lent<'_>) -> bool {
        let Some(Vring::Started(vring)) = self.vrings.get_mut(local) else {
            return false;
        };
        if !vring.may_pop() {
            return false;
        }
        match vring.arm_kick() {
            Ok(waiting) => vring.is_polled() || vring.has_again() || waiting > 0,
            Err(error) => {
                self.broke_down(local, &RingBroken::from(error), lent);
                false
            }
        }
    }

    /// A vring cannot go on, and nothing of it is looked at any more.
    fn broke_down(&mut self, local: usize, error: &RingBroken, lent: &mut Lent<'_>) -> Look {
        let id = self.id(local);
        if let Some(vring) = in_flight_vring(&mut self.vrings, local) {
            vring.break_down();
        }
        self.path.complain(id, error);
        lent.reports.push(Report::Broken(id));
        Look::NoMore
    }

    /// An op came back from the device.
    pub(super) fn complete(&mut self, local: usize, done: Completion, lent: &mut Lent<'_>) {
        let (vring, mode) = match self.vrings.get_mut(local) {
            Some(Vring::Started(vring)) => (&mut **vring, StopMode::Drain),
            Some(Vring::Draining(draining)) => (&mut *draining.vring, draining.mode),
            Some(Vring::Stopped(_)) | None => {
                debug_assert!(false, "a vring stopped while a request of it was in flight");
                return;
            }
        };
        match self.path.complete(done, mode, lent) {
            Finish::GoesOn => {}
            Finish::Used(used) => self.path.settle(vring, local, Some(used)),
            Finish::Abandoned => self.path.settle(vring, local, None),
        }
    }

    /// Publishes what was used since the last time, and answers what waited for it.
    pub(super) fn publish(&mut self, lent: &mut Lent<'_>) {
        self.publish_used(lent);
        if self.draining > 0 {
            self.finish_draining(lent);
        }
        if self.release_owed {
            self.finish_retired(lent);
        }
        self.finish_fences(lent);
    }

    fn publish_used(&mut self, lent: &mut Lent<'_>) {
        let mut poke = false;
        while let Some(local) = self.path.touched.pop() {
            let Some(vring) = in_flight_vring(&mut self.vrings, local) else {
                continue;
            };
            if vring.publish()
                && let Some(call) = &vring.fds.call
            {
                self.path.counters.calls.add(1);
                lent.ring.notify(borrow(call));
            }
            poke = true;
        }
        if poke
            && self.path.logging
            && let Some(setup) = &self.path.log
            && let Some(event) = &setup.event
        {
            lent.ring.notify(borrow(event));
        }
    }

    /// A front end that disabled a vring may take the acknowledgement for its end: one that pauses
    /// its guest for a migration stops no vring, and copies the last pages.
    fn finish_fences(&mut self, lent: &mut Lent<'_>) {
        let busy = |vring: &Vring| match vring {
            Vring::Started(vring) => vring.is_disabled() && vring.is_busy(),
            Vring::Stopped(_) | Vring::Draining(_) => false,
        };
        if self.fences.is_empty() || self.vrings.iter().any(busy) {
            return;
        }
        let device = self.path.device.id();
        let answered = self.fences.drain(..);
        lent.reports
            .extend(answered.map(|number| Report::Fenced(device, number)));
    }

    fn finish_draining(&mut self, lent: &mut Lent<'_>) {
        for local in 0..self.vrings.len() {
            let id = self.id(local);
            let slot = &mut self.vrings[local];
            let Vring::Draining(_) = slot else { continue };
            let taken = std::mem::replace(slot, Vring::Stopped(Stopped::default()));
            let Vring::Draining(draining) = taken else {
                continue;
            };
            *slot = match draining.try_finish() {
                Err(draining) => Vring::Draining(draining),
                Ok((stopped, fds)) => {
                    lent.outgoing.extend(fds.call);
                    self.draining -= 1;
                    let next_avail = stopped.next_avail();
                    lent.reports.push(Report::Stopped { id, next_avail });
                    Vring::Stopped(stopped)
                }
            };
        }
    }

    fn finish_retired(&mut self, lent: &mut Lent<'_>) {
        while self.retired.front().is_some_and(|view| view.holds() == 0) {
            self.retired.pop_front();
        }
        if self.retired.is_empty() {
            self.release_owed = false;
            self.drop_pins(lent.ring);
            lent.reports
                .push(Report::Released(self.path.device.id(), self.epoch));
        }
    }

    /// A vring's kick is not watched any more.
    pub(super) fn unwatched(&mut self, local: usize, lent: &mut Lent<'_>) {
        let id = self.id(local);
        let Some(vring) = in_flight_vring(&mut self.vrings, local) else {
            return;
        };
        let was_sound = vring.is_sound();
        vring.kick_unwatched();
        if was_sound && !vring.is_sound() {
            lent.reports.push(Report::Broken(id));
        }
    }

    fn started(&mut self, id: VringId) -> Option<(usize, &mut Started)> {
        let local = usize::from(id.index) / self.share.of;
        match self.vrings.get_mut(local)? {
            Vring::Started(vring) => Some((local, vring)),
            Vring::Stopped(_) | Vring::Draining(_) => None,
        }
    }

    fn id(&self, local: usize) -> VringId {
        let index = local * self.share.of + self.share.worker;
        VringId {
            device: self.path.device.id(),
            index: u16::try_from(index).unwrap_or(u16::MAX),
        }
    }
}

/// A vring that may have requests in flight.
fn in_flight_vring(vrings: &mut [Vring], local: usize) -> Option<&mut Started> {
    match vrings.get_mut(local)? {
        Vring::Started(vring) => Some(vring),
        Vring::Draining(draining) => Some(&mut draining.vring),
        Vring::Stopped(_) => None,
    }
}
