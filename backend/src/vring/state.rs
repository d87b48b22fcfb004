//! The states of a vring (vhost-user, *Ring states*).

use std::io;
use std::sync::Arc;

use blockdev::{Ring, Watch};
use iov_iter::{Area, MemoryTable};
use log::warn;
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use super::{Addresses, AvailBroken, Split, Used, VringError, resolve};
use crate::fds::{borrow, signal, take};
use crate::inflight::{Inflight, TooMany};
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
    inflight: Inflight,
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
    /// More chains are in flight than there can be.
    #[error(transparent)]
    InFlight(#[from] TooMany),
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
            features,
            enablement,
            kick,
            call,
            err,
        } = setup;
        Ok(Box::new(Started {
            layout: Split::new(areas, size, next_avail, features),
            addresses,
            features,
            enablement,
            soundness: Soundness::Sound,
            inflight: Inflight::new(size),
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
        self.enablement == Enablement::Enabled && self.soundness == Soundness::Sound
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

    /// Takes the next chain; it is in flight until [`settle`](Self::settle).
    ///
    /// # Errors
    /// The driver offers what it cannot have.
    #[inline]
    pub fn pop(&mut self) -> Result<Option<u16>, RingBroken> {
        let head = match self.layout.pop() {
            Some(head) => head,
            None if self.layout.refresh()? == 0 => return Ok(None),
            None => match self.layout.pop() {
                Some(head) => head,
                None => return Ok(None),
            },
        };
        self.inflight.enter()?;
        Ok(Some(head))
    }

    /// See [`Split::suppress_kicks`].
    #[inline]
    pub fn suppress_kicks(&mut self) {
        self.layout.suppress_kicks();
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
                self.layout.unpublished() == 1
            }
            Some(_) | None => false,
        }
    }

    /// Publishes what was settled; says whether a call is owed.
    #[inline]
    #[must_use = "a call that is not made is a driver that sleeps for ever"]
    pub fn publish(&mut self) -> bool {
        self.layout.unpublished() > 0 && self.layout.publish()
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
        if self.mode == StopMode::Drain {
            vring.hand_over_kick();
        }
        Ok((
            Stopped {
                next_avail: vring.layout.next_avail(),
            },
            vring.fds,
        ))
    }
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
        // An empty counter is the usual case and an error for a non-blocking read.
        let was_set = take(kick).is_ok();
        let waiting = self.layout.refresh().is_ok_and(|waiting| waiting > 0);
        if was_set && waiting && signal(kick).is_err() {
            warn!("a kick could not be handed back; the next owner scans the ring");
        }
    }
}
