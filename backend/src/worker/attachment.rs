//! One worker's part of one device: its vrings, its channel, its view of the guest's memory.

use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;

use blockdev::{Channel, Completion, Ring};
use iov_iter::{MemoryTable, Pools, View, sigbus};
use log::debug;
use vmm_sys_util::eventfd::EventFd;

use super::path::{Finish, Path};
use super::slots::Slots;
use super::token::Token;
use super::{Command, LogSetup, Report, StopMode, TableEpoch, VringId, VringSetup};
use crate::blk::BlkDevice;
use crate::fds::borrow;
use crate::limits::{MAX_BOUNCE_BYTES, MAX_REQUEST_BYTES};
use crate::vring::{Draining, RingBroken, Started, Stopped, logs_all};

/// Chains a vring may have started before other vrings, commands and completions get their turn.
const CHAINS_PER_TURN: usize = 128;

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

/// Which of the workers this is, and how many share the device: vring `i` belongs to worker
/// `i % of`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Share {
    pub(super) worker: usize,
    pub(super) of: usize,
}

/// One worker's part of one device.
pub(super) struct Attachment {
    path: Path,
    share: Share,
    place: usize,
    vrings: Vec<Vring>,
    /// Vrings that may have chains to pop.
    ready: Vec<usize>,
    draining: usize,
    epoch: TableEpoch,
    /// Views of older tables that requests still hold, oldest first.
    retired: VecDeque<Rc<View>>,
    /// Whether the control thread waits for them.
    release_owed: bool,
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
            ready: Vec::new(),
            draining: 0,
            epoch: TableEpoch::default(),
            retired: VecDeque::new(),
            release_owed: false,
            faults: 0,
        }
    }

    /// Whether there is something to do that nobody will tell us of.
    pub(super) fn has_work(&self) -> bool {
        !self.ready.is_empty() && self.path.parked.is_empty()
    }

    /// Whether every vring is stopped.
    pub(super) fn is_stopped(&self) -> bool {
        self.vrings
            .iter()
            .all(|vring| matches!(vring, Vring::Stopped(_)))
    }

    /// Moves what the channel's threads finished into the ring.
    pub(super) fn collect(&mut self, ring: &mut Ring) {
        self.path.channel.collect(ring);
    }

    /// A vring was kicked.
    pub(super) fn kicked(&mut self, local: usize) {
        self.path.counters.kicks.add(1);
        self.make_ready(local);
    }

    fn make_ready(&mut self, local: usize) {
        if !self.ready.contains(&local) {
            self.ready.push(local);
        }
    }

    /// Pops and starts what the vrings have, each [`CHAINS_PER_TURN`] at the most.
    pub(super) fn serve(&mut self, lent: &mut Lent<'_>) {
        while let Some((local, used)) = self.path.retry_parked(lent) {
            if let (Some(used), Some(vring)) = (used, in_flight_vring(&mut self.vrings, local)) {
                self.path.settle(vring, local, Some(used));
            }
        }
        let mut at = 0;
        while let Some(&local) = self.ready.get(at).filter(|_| self.path.parked.is_empty()) {
            if self.serve_one(local, lent) {
                at += 1;
            } else {
                self.ready.swap_remove(at);
            }
        }
    }

    /// Serves one vring; says whether it has to be served again without a kick.
    fn serve_one(&mut self, local: usize, lent: &mut Lent<'_>) -> bool {
        let id = self.id(local);
        let Some(Vring::Started(vring)) = self.vrings.get_mut(local) else {
            return false;
        };
        if !vring.may_pop() {
            return false;
        }
        vring.suppress_kicks();
        let mut broken = None;
        for _ in 0..CHAINS_PER_TURN {
            match vring.pop() {
                Ok(Some(head)) => self.path.start(vring, local, head, lent),
                Ok(None) => break,
                Err(error) => {
                    broken = Some(error);
                    break;
                }
            }
            if !self.path.parked.is_empty() || !vring.is_sound() {
                break;
            }
            // A front end that took its memory away is about to lose its session. Going on would
            // read zeroes where the memory was, and map a page for every one that is touched.
            let faults = sigbus::faults();
            if faults != self.faults {
                if self.path.view.table().poisoned() {
                    return false;
                }
                self.faults = faults;
            }
        }
        let waiting = match broken {
            Some(error) => Err(error),
            None if vring.is_sound() => vring.arm_kick().map_err(RingBroken::from),
            None => Ok(0),
        };
        if let Err(error) = waiting {
            vring.break_down();
            self.path.complain(id, &error);
        }
        if !vring.is_sound() {
            lent.reports.push(Report::Broken(id));
            return false;
        }
        vring.is_polled() || waiting.is_ok_and(|waiting| waiting > 0)
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
        if self.draining > 0 {
            self.finish_draining(lent);
        }
        if self.release_owed {
            self.finish_retired(lent);
        }
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
}

/// Commands.
impl Attachment {
    /// Carries out a command that is for this device.
    pub(super) fn apply(&mut self, command: Command, lent: &mut Lent<'_>) {
        match command {
            Command::SetTable { epoch, table, .. } => self.set_table(epoch, table, lent),
            Command::Start(id, setup) => self.start(id, *setup, lent),
            Command::Stop(id, mode) => self.stop(id, mode, lent),
            Command::Enable(id, enablement) => {
                if let Some((local, vring)) = self.started(id) {
                    vring.set_enablement(enablement);
                    self.make_ready(local);
                }
            }
            Command::SetKick(id, kick) => self.set_kick(id, kick, lent),
            Command::SetCall(id, call) => {
                if let Some((_, vring)) = self.started(id) {
                    lent.outgoing
                        .extend(std::mem::replace(&mut vring.fds.call, call));
                    call_once(vring, lent.ring);
                }
            }
            Command::SetErr(id, err) => {
                if let Some((_, vring)) = self.started(id) {
                    vring.fds.err = err;
                }
            }
            Command::SetFeatures(_, features) => {
                self.path.logging = logs_all(features);
                for local in 0..self.vrings.len() {
                    if let Some(vring) = in_flight_vring(&mut self.vrings, local) {
                        vring.set_features(features);
                    }
                }
                self.relog();
            }
            Command::SetLog(_, log) => {
                self.replace_log(log, lent);
                self.relog();
            }
            Command::SetUsedLog(id, guest) => {
                let local = usize::from(id.index) / self.share.of;
                if let Some(vring) = in_flight_vring(&mut self.vrings, local) {
                    vring.set_log_used(guest);
                    vring.relog(self.path.log.as_ref().map(|setup| &setup.log));
                }
            }
            Command::Fence(device, number) => lent.reports.push(Report::Fenced(device, number)),
            Command::Quit => {}
        }
    }

    fn replace_log(&mut self, log: Option<Box<LogSetup>>, lent: &mut Lent<'_>) {
        let old = std::mem::replace(&mut self.path.log, log);
        lent.outgoing.extend(old.and_then(|setup| setup.event));
    }

    /// The log, or whether it is used, changed for all vrings.
    fn relog(&mut self) {
        let log = self.path.log.as_ref().map(|setup| &setup.log);
        for local in 0..self.vrings.len() {
            if let Some(vring) = in_flight_vring(&mut self.vrings, local) {
                vring.relog(log);
                if !self.ready.contains(&local) {
                    self.ready.push(local);
                }
            }
        }
    }

    fn set_table(&mut self, epoch: TableEpoch, table: Arc<MemoryTable>, lent: &mut Lent<'_>) {
        let device = self.path.device.id();
        for local in 0..self.vrings.len() {
            let id = self.id(local);
            let Some(vring) = in_flight_vring(&mut self.vrings, local) else {
                continue;
            };
            if vring.is_lost() {
                continue;
            }
            if let Err(error) = vring.rebase(&table) {
                vring.lose();
                self.path.complain(id, &error);
                lent.reports.push(Report::Broken(id));
            }
        }
        let view = View::new(table, self.path.view.pools().clone());
        self.retired
            .push_back(std::mem::replace(&mut self.path.view, view));
        self.epoch = epoch;
        lent.reports.push(Report::Adopted(device, epoch));
        self.release_owed = true;
        self.finish_retired(lent);
    }

    fn start(&mut self, id: VringId, setup: VringSetup, lent: &mut Lent<'_>) {
        let local = usize::from(id.index) / self.share.of;
        if self.vrings.len() <= local {
            self.vrings
                .resize_with(local + 1, || Vring::Stopped(Stopped::default()));
        }
        if !matches!(self.vrings[local], Vring::Stopped(_)) {
            debug_assert!(false, "a vring is started twice");
            return;
        }
        match Stopped::start(setup, self.path.view.table()) {
            Ok(mut vring) => {
                self.path.logging = logs_all(vring.features());
                vring.relog(self.path.log.as_ref().map(|setup| &setup.log));
                debug!("{}: vring {} starts", self.path.device.name(), id.index);
                call_once(&vring, lent.ring);
                self.vrings[local] = Vring::Started(vring);
                self.watch_kick(local, lent);
                self.make_ready(local);
            }
            Err(error) => {
                self.path.complain(id, &error);
                lent.reports.push(Report::Broken(id));
            }
        }
    }

    /// Gives up whatever is still started: nobody is left who could stop it.
    pub(super) fn stop_all(&mut self, lent: &mut Lent<'_>) {
        for local in 0..self.vrings.len() {
            if !matches!(self.vrings[local], Vring::Stopped(_)) {
                self.stop(self.id(local), StopMode::Abandon, lent);
            }
        }
    }

    fn stop(&mut self, id: VringId, mode: StopMode, lent: &mut Lent<'_>) {
        let local = usize::from(id.index) / self.share.of;
        match self.vrings.get_mut(local) {
            Some(slot @ Vring::Started(_)) => {
                let taken = std::mem::replace(slot, Vring::Stopped(Stopped::default()));
                let Vring::Started(mut vring) = taken else {
                    return;
                };
                match mode {
                    StopMode::Drain => self.take_again(&mut vring, local, lent),
                    StopMode::Suspend => {
                        give_up(&mut self.path, &mut vring, local);
                        self.path.abort(local, lent);
                    }
                    StopMode::Abandon => give_up(&mut self.path, &mut vring, local),
                }
                vring.unwatch_kick(lent.ring);
                self.vrings[local] = Vring::Draining(vring.drain(mode));
                self.draining += 1;
            }
            // A front end that hangs up while it waits for a drain turns it into an abandonment.
            Some(Vring::Draining(draining)) => match mode {
                StopMode::Drain => {}
                StopMode::Suspend | StopMode::Abandon => {
                    draining.mode = mode;
                    give_up(&mut self.path, &mut draining.vring, local);
                    if mode == StopMode::Suspend {
                        self.path.abort(local, lent);
                    }
                }
            },
            Some(Vring::Stopped(stopped)) => {
                let next_avail = stopped.next_avail();
                lent.reports.push(Report::Stopped { id, next_avail });
            }
            None => lent.reports.push(Report::Stopped { id, next_avail: 0 }),
        }
    }

    /// A stop waits for what is in flight, and what an earlier daemon had in flight is: it is begun
    /// now, unless nothing may be.
    fn take_again(&mut self, vring: &mut Started, local: usize, lent: &mut Lent<'_>) {
        while vring.may_take()
            && let Some(head) = vring.take_again()
        {
            self.path.start(vring, local, head, lent);
        }
        vring.leave_again();
    }

    fn set_kick(&mut self, id: VringId, kick: Option<EventFd>, lent: &mut Lent<'_>) {
        let Some((local, vring)) = self.started(id) else {
            return;
        };
        vring.unwatch_kick(lent.ring);
        vring.fds.kick = kick;
        self.watch_kick(local, lent);
        // The old kick may have come after its last look, so the ring is scanned once.
        self.make_ready(local);
    }

    fn watch_kick(&mut self, local: usize, lent: &mut Lent<'_>) {
        let token = Token::Kick {
            device: self.place,
            vring: local,
        }
        .pack();
        let id = self.id(local);
        let Some(Vring::Started(vring)) = self.vrings.get_mut(local) else {
            return;
        };
        if let Err(error) = vring.watch_kick(lent.ring, token) {
            vring.break_down();
            self.path.complain(id, &error);
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

/// Signals a call that has just been set: the driver may have been told of earlier used elements
/// through one that nobody listened to, and would never ask again.
fn call_once(vring: &Started, ring: &mut Ring) {
    if let Some(call) = &vring.fds.call {
        ring.notify(borrow(call));
    }
}

/// Gives up what is not with the device; what is recorded stays so.
fn give_up(path: &mut Path, vring: &mut Started, local: usize) {
    for _ in 0..path.abandon_parked(local) {
        vring.settle(None);
    }
    vring.leave_again();
}

/// A vring that may have requests in flight.
fn in_flight_vring(vrings: &mut [Vring], local: usize) -> Option<&mut Started> {
    match vrings.get_mut(local)? {
        Vring::Started(vring) => Some(vring),
        Vring::Draining(draining) => Some(&mut draining.vring),
        Vring::Stopped(_) => None,
    }
}
