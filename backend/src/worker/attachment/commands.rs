//! What the control thread asks of a worker's part of a device.

use std::sync::Arc;

use blockdev::{Lease, Ring};
use iov_iter::{MemoryTable, View};
use log::{debug, error, warn};
use vmm_sys_util::eventfd::EventFd;

use super::{Attachment, Lent, Vring, in_flight_vring};
use crate::fds::borrow;
use crate::vring::{RingBroken, Started, Stopped, logs_all};
use crate::worker::path::Path;
use crate::worker::token::Token;
use crate::worker::{Command, LogSetup, Report, StopMode, TableEpoch, VringId, VringSetup};

impl Attachment {
    /// Carries out a command that is for this device.
    pub(in crate::worker) fn apply(&mut self, command: Command, lent: &mut Lent<'_>) {
        // What was used until now is published, and marked, as things were when it was used.
        self.publish_used(lent);
        match command {
            Command::SetTable { epoch, table, .. } => self.set_table(epoch, table, lent),
            Command::Start(id, setup) => self.start(id, *setup, lent),
            Command::Stop(id, mode) => self.stop(id, mode, lent),
            Command::Enable(id, enablement) => {
                if let Some((local, vring)) = self.started(id) {
                    vring.set_enablement(enablement);
                    // Whoever serves it next may not look before it is kicked. The driver is asked
                    // now: once this is acknowledged nothing is written any more.
                    let arms = vring.is_disabled() && vring.may_take() && !vring.is_armed();
                    match arms.then(|| vring.arm_kick()) {
                        Some(Err(error)) => {
                            self.broke_down(local, &RingBroken::from(error), lent);
                        }
                        Some(Ok(_)) | None => self.wake(local),
                    }
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
            Command::Resize(_) => self.path.resize(),
            Command::SetPins(_, lease) => self.set_pins(&lease, lent.ring),
            // Answered with the next batch: what was used until now is published by then.
            Command::Fence(_, number) => self.fences.push(number),
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
            }
        }
        for local in 0..self.vrings.len() {
            self.wake(local);
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
        view.set_pins(&self.pins);
        self.retired
            .push_back(std::mem::replace(&mut self.path.view, view));
        // One that was left alone because of the old table may have chains.
        for local in 0..self.vrings.len() {
            self.wake(local);
        }
        self.epoch = epoch;
        lent.reports.push(Report::Adopted(device, epoch));
        self.release_owed = true;
        self.finish_retired(lent);
    }

    /// Shares what is registered. What was shared before is either still registered, in the same
    /// slots, or was given back.
    fn set_pins(&mut self, lease: &Lease, ring: &mut Ring) {
        match ring.adopt_buffers(lease) {
            Ok(()) => {
                self.pins = lease.regions().to_vec();
                self.path.view.set_pins(&self.pins);
            }
            Err(error) => {
                let name = self.path.device.name();
                warn!("{name}: a worker cannot share pinned memory and goes without: {error}");
            }
        }
    }

    /// Gives back the slots of memory that is not in the table any more. No request is on an
    /// earlier one.
    pub(super) fn drop_pins(&mut self, ring: &mut Ring) {
        let table = self.path.view.table();
        let gone = self.pins.extract_if(.., |pinned| !pinned.is_of(table));
        let emptied: Result<Vec<()>, _> = gone.map(|pin| ring.empty_buffers(pin.slots())).collect();
        if let Err(error) = emptied {
            let name = self.path.device.name();
            error!("{name}: a worker cannot give single slots back, and gave back all: {error}");
            self.pins.clear();
            self.path.view.set_pins(&[]);
        }
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
                self.wake(local);
            }
            Err(error) => {
                self.path.complain(id, &error);
                lent.reports.push(Report::Broken(id));
            }
        }
    }

    /// Gives up whatever is still started: nobody is left who could stop it.
    pub(in crate::worker) fn stop_all(&mut self, lent: &mut Lent<'_>) {
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
        self.wake(local);
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
}

/// Signals a call that has just been set: the driver may have been told of earlier used elements
/// through one that nobody listened to, and would never ask again.
fn call_once(vring: &Started, ring: &mut Ring) {
    if let Some(call) = &vring.fds.call {
        ring.notify(borrow(call));
    }
}

/// Gives up what is not with the device; what is recorded stays so.
fn give_up(path: &mut Path<Box<LogSetup>>, vring: &mut Started, local: usize) {
    for _ in 0..path.abandon_parked(local) {
        vring.settle(None);
    }
    vring.leave_again();
}
