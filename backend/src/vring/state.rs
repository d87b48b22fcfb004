//! The states of a vring (vhost-user, *Ring states*).

use std::io;
use std::sync::Arc;

use blockdev::{Ring, Watch};
use iov_iter::{Area, MemoryTable, SharedLog};
use log::warn;
use thiserror::Error;
use vhost::vhost_user::message::VhostUserVirtioFeatures;
use vmm_sys_util::eventfd::EventFd;

use super::{Addresses, AvailBroken, Split, Used, UsedLog, VringError, resolve};
use crate::failpoint::reached;
use crate::fds::{borrow, signal, take};
use crate::inflight::{EnterError, Inflight};
use crate::worker::{Enablement, StopMode, VringSetup};

/// A vring that is not started. What it needs to start comes with the command that starts it.
#[derive(Debug, Default)]
pub struct Stopped {
    next_avail: u16,
}

/// Its three eventfds.
#[derive(Debug, Default)]
pub struct Fds {
    /// The driver made chains available.
    pub kick: Option<EventFd>,
    /// We used chains.
    pub call: Option<EventFd>,
    /// The vring broke.
    pub err: Option<EventFd>,
}

/// A started vring: popped while it is enabled and sound.
#[derive(Debug)]
pub struct Started {
    layout: Split,
    addresses: Addresses,
    features: u64,
    enablement: Enablement,
    soundness: Soundness,
    logging: Logging,
    /// The guest address to log writes to the used ring at, if they are to be logged.
    log_used: Option<u64>,
    inflight: Inflight,
    /// Heads that an earlier daemon had taken, last first: they are done again before anything is
    /// popped.
    again: Vec<u16>,
    /// The eventfds.
    pub fds: Fds,
    /// The watch over the kick, while there is one.
    watch: Option<Watch>,
    /// Watches that were ended and of which the ring has not said yet that they are over.
    ending: u32,
}

/// What the driver did to a ring that cannot be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum RingBroken {
    /// The avail index is not to be believed.
    #[error(transparent)]
    Avail(#[from] AvailBroken),
    /// A chain is offered that cannot be in flight.
    #[error(transparent)]
    InFlight(#[from] EnterError),
}

/// Whether what a request changes is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Logging {
    /// As the front end wants it: in its log, or not at all.
    Settled,
    /// It is to be logged and there is no log yet, so nothing may be changed.
    NoLog,
}

/// Whether the ring's indices can still be believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Soundness {
    Sound,
    /// The driver wrote what no driver may: nothing is popped, what is in flight is answered.
    Broken,
    /// The ring is not in the memory table any more: it is not touched at all.
    Lost,
}

/// A vring that pops nothing more and waits for what is in flight.
#[derive(Debug)]
pub struct Draining {
    /// The vring as it was.
    pub vring: Box<Started>,
    /// What becomes of the requests that come back.
    pub mode: StopMode,
}

impl Stopped {
    /// The avail index a later start would go on from.
    #[must_use]
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// Starts the vring.
    ///
    /// # Errors
    /// A part of the ring that the table does not hold; nothing was started.
    pub fn start(setup: VringSetup, table: &Arc<MemoryTable>) -> Result<Box<Started>, VringError> {
        let areas = resolve(&setup.addresses, setup.size, table)?;
        let VringSetup {
            size,
            addresses,
            next_avail,
            inflight,
            log_used,
            features,
            enablement,
            kick,
            call,
            err,
        } = setup;
        let mut layout = Split::new(areas, size, next_avail, features);
        let (inflight, mut again) = match inflight {
            None => (Inflight::new(size), Vec::new()),
            Some(region) => Inflight::recover(size, region, layout.used_index()),
        };
        if inflight.is_recorded() {
            // Everything popped is either used or recorded (*Inflight I/O tracking*).
            layout.resume_at(layout.used_index().wrapping_add(inflight.count()));
        }
        again.reverse();
        Ok(Box::new(Started {
            layout,
            addresses,
            features,
            enablement,
            soundness: Soundness::Sound,
            logging: Logging::Settled,
            log_used,
            inflight,
            again,
            fds: Fds { kick, call, err },
            watch: None,
            ending: 0,
        }))
    }
}

impl Started {
    /// Whether chains may be popped.
    #[must_use]
    pub fn may_pop(&self) -> bool {
        self.enablement == Enablement::Enabled && self.may_take()
    }

    /// Whether chains may be taken were the vring enabled: what was in flight when an earlier
    /// daemon ended is finished whether it is enabled or not.
    #[must_use]
    pub fn may_take(&self) -> bool {
        self.soundness == Soundness::Sound && self.logging == Logging::Settled
    }

    /// Whether nobody kicks it, so that it has to be polled.
    #[must_use]
    pub fn is_polled(&self) -> bool {
        self.fds.kick.is_none() && self.may_pop()
    }

    /// The virtio features the driver acknowledged.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.features
    }

    /// The driver acknowledged other features. The ring's own bits are fixed at its start.
    pub fn set_features(&mut self, features: u64) {
        self.features = features;
    }

    /// Logs writes to the used ring at this guest address, or not at all; in force after
    /// [`relog`](Self::relog).
    pub fn set_log_used(&mut self, guest: Option<u64>) {
        self.log_used = guest;
    }

    /// The features, the log or the used ring's address in it changed: `log` is what the front end
    /// set, whether it is in use or not.
    pub fn relog(&mut self, log: Option<&SharedLog>) {
        let wanted = logs_all(self.features);
        self.logging = if wanted && log.is_none() {
            Logging::NoLog
        } else {
            Logging::Settled
        };
        let log = log.filter(|_| wanted && !self.is_lost()).cloned();
        let used_log = log.zip(self.log_used);
        self.layout
            .set_log(used_log.map(|(log, guest)| UsedLog { log, guest }));
    }

    /// Enables or disables popping.
    pub fn set_enablement(&mut self, enablement: Enablement) {
        self.enablement = enablement;
    }

    /// Entries of the ring.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.layout.size()
    }

    /// The descriptor table.
    #[must_use]
    pub fn descriptors(&self) -> &Area {
        self.layout.descriptors()
    }

    /// Finds the ring again in a new memory table.
    ///
    /// # Errors
    /// A part that the new table does not hold; the ring still refers to the old one.
    pub fn rebase(&mut self, table: &Arc<MemoryTable>) -> Result<(), VringError> {
        self.layout
            .rebase(resolve(&self.addresses, self.layout.size(), table)?);
        Ok(())
    }

    /// Whether there are chains to take: the driver's, or an earlier daemon's.
    #[inline]
    #[must_use]
    pub fn has_chains(&self) -> bool {
        self.layout.has_chains() || self.has_again()
    }

    /// See [`Split::fetch_ahead`].
    #[inline]
    pub fn fetch_ahead(&self) {
        self.layout.fetch_ahead();
    }

    /// Takes the next chain; it is in flight until [`settle`](Self::settle).
    ///
    /// # Errors
    /// The driver offers what it cannot have.
    #[inline]
    pub fn pop(&mut self) -> Result<Option<u16>, RingBroken> {
        if !self.again.is_empty() {
            return Ok(self.take_again());
        }
        let head = match self.layout.pop() {
            Some(head) => head,
            None if self.layout.refresh()? == 0 => return Ok(None),
            None => match self.layout.pop() {
                Some(head) => head,
                None => return Ok(None),
            },
        };
        self.inflight.enter(head)?;
        reached("entered");
        Ok(Some(head))
    }

    /// Takes the next chain that an earlier daemon had in flight; it is in flight until
    /// [`settle`](Self::settle).
    pub fn take_again(&mut self) -> Option<u16> {
        self.again.pop()
    }

    /// Whether chains of an earlier daemon wait to be taken again.
    #[inline]
    #[must_use]
    pub fn has_again(&self) -> bool {
        !self.again.is_empty()
    }

    /// Whether anything that was taken is not yet answered where the driver can see it. Chains of
    /// an earlier daemon that were not taken again do not count: nobody touches their memory.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        usize::from(self.inflight.count()) > self.again.len() || self.layout.unpublished() > 0
    }

    /// Whether it is started and not to be popped.
    #[must_use]
    pub fn is_disabled(&self) -> bool {
        self.enablement == Enablement::Disabled
    }

    /// Leaves the chains that an earlier daemon had in flight, and that were not taken again, to
    /// the next one.
    pub fn leave_again(&mut self) {
        for _ in self.again.drain(..) {
            self.inflight.leave();
        }
    }

    /// See [`Split::suppress_kicks`].
    #[inline]
    pub fn suppress_kicks(&mut self) {
        self.layout.suppress_kicks();
    }

    /// See [`Split::is_armed`].
    #[must_use]
    pub fn is_armed(&self) -> bool {
        self.layout.is_armed()
    }

    /// See [`Split::arm_kick`].
    ///
    /// # Errors
    /// The avail index is not to be believed.
    #[inline]
    pub fn arm_kick(&mut self) -> Result<u16, AvailBroken> {
        self.layout.arm_kick()
    }

    /// A chain came back: its used element, or none where it is abandoned. Says whether the element
    /// is the first since the last [`publish`](Self::publish).
    #[inline]
    pub fn settle(&mut self, used: Option<Used>) -> bool {
        self.inflight.leave();
        match used {
            Some(used) if self.soundness != Soundness::Lost => {
                self.layout.push_used(used);
                self.inflight.used(used.head);
                self.layout.unpublished() == 1
            }
            Some(_) | None => false,
        }
    }

    /// Publishes what was settled; says whether a call is owed.
    #[inline]
    #[must_use = "a call that is not made is a driver that sleeps for ever"]
    pub fn publish(&mut self) -> bool {
        if self.layout.unpublished() == 0 {
            return false;
        }
        self.inflight.link();
        reached("linked");
        let call = self.layout.publish();
        reached("index-marked");
        self.inflight.clear(self.layout.used_index());
        reached("closed");
        call
    }

    /// Chains taken and not yet settled.
    #[must_use]
    pub fn in_flight(&self) -> u16 {
        self.inflight.count()
    }

    /// The driver broke the virtio specification in a way that cannot be answered: the ring is
    /// never popped again, and the front end is told through err.
    pub fn break_down(&mut self) {
        self.fail(Soundness::Broken);
    }

    /// The ring is in no region of the memory table any more.
    pub fn lose(&mut self) {
        self.fail(Soundness::Lost);
    }

    /// Whether it can still be popped, were it enabled.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.soundness == Soundness::Sound
    }

    /// Whether the memory table has no place for it any more.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.soundness == Soundness::Lost
    }

    fn fail(&mut self, soundness: Soundness) {
        self.soundness = soundness;
        if let Some(Err(error)) = self.fds.err.as_ref().map(signal) {
            warn!("the front end could not be told that a vring broke: {error}");
        }
    }

    /// Stops popping.
    #[must_use]
    pub fn drain(self: Box<Self>, mode: StopMode) -> Draining {
        Draining { vring: self, mode }
    }
}

impl Draining {
    /// Gives the vring back once nothing of it is in flight and its kick is not watched.
    ///
    /// The kick's counter is left as the next owner needs it: set if chains wait in the ring, zero
    /// if not. A front end that finds it set although nothing waits may take that for a kick.
    ///
    /// # Errors
    /// The vring itself, when it has to go on waiting.
    pub fn try_finish(self) -> Result<(Stopped, Fds), Draining> {
        if self.vring.in_flight() > 0 || self.vring.watch.is_some() || self.vring.ending > 0 {
            return Err(self);
        }
        let mut vring = self.vring;
        match self.mode {
            StopMode::Drain | StopMode::Suspend => vring.hand_over_kick(),
            StopMode::Abandon => {}
        }
        Ok((
            Stopped {
                next_avail: vring.layout.next_avail(),
            },
            vring.fds,
        ))
    }
}

/// Whether a driver with these features has all changes of its memory logged.
#[must_use]
pub fn logs_all(features: u64) -> bool {
    features & VhostUserVirtioFeatures::LOG_ALL.bits() != 0
}

/// The kick.
impl Started {
    /// Lets the ring say `token` at every kick; nothing for a vring that nobody kicks.
    ///
    /// # Errors
    /// The kick cannot be watched.
    pub fn watch_kick(&mut self, ring: &mut Ring, token: u32) -> io::Result<()> {
        if let Some(kick) = &self.fds.kick {
            self.watch = Some(ring.watch(borrow(kick), token)?);
        }
        Ok(())
    }

    /// Ends the watch over the kick; it is over once [`kick_unwatched`](Self::kick_unwatched) is
    /// told.
    pub fn unwatch_kick(&mut self, ring: &mut Ring) {
        if let Some(watch) = self.watch.take() {
            ring.unwatch(watch);
            self.ending += 1;
        }
    }

    /// The ring said that a watch is over. One that nobody ended leaves the vring without kicks, so
    /// that it cannot go on.
    pub fn kick_unwatched(&mut self) {
        match self.ending.checked_sub(1) {
            Some(left) => self.ending = left,
            None => {
                self.watch = None;
                self.break_down();
            }
        }
    }

    fn hand_over_kick(&mut self) {
        let Some(kick) = self
            .fds
            .kick
            .as_ref()
            .filter(|_| self.soundness == Soundness::Sound)
        else {
            return;
        };
        // An empty counter is the usual case and an error for a non-blocking read. A driver that
        // was asked for no kick made none.
        let was_set = take(kick).is_ok() || !self.layout.is_armed();
        let waiting = self.layout.arm_kick().is_ok_and(|waiting| waiting > 0);
        if was_set && waiting && signal(kick).is_err() {
            warn!("a kick could not be handed back; the next owner scans the ring");
        }
    }
}
