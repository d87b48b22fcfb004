//! The loop of one worker.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError};

use blockdev::{Engine, Event, Ring, Wait};
use log::error;
use vmm_sys_util::eventfd::EventFd;

use super::attachment::{Attachment, Lent, Served, Share};
use super::idle::Idle;
use super::slots::Slots;
use super::token::Token;
use super::{Command, Report, WorkerError};
use crate::blk::BlkDevice;
use crate::fds::borrow;

/// A worker's two ends of the wire to the control thread.
pub(super) struct Wire {
    pub(super) commands: Receiver<Command>,
    /// Written to when there are commands.
    pub(super) wake: Arc<EventFd>,
    pub(super) reports: Sender<(usize, Report)>,
    /// Written to when there are reports.
    pub(super) told: Arc<EventFd>,
}

/// Everything one worker owns.
pub(super) struct Worker {
    share: Share,
    wire: Wire,
    /// Before the ring, which outlives every channel.
    attachments: Vec<Attachment>,
    ring: Ring,
    slots: Slots,
    outgoing: Vec<EventFd>,
    reports: Vec<Report>,
    idle: Idle,
    life: Life,
}

/// Looks at the rings' memory in a row.
const LOOKS_PER_TURN: u32 = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    Serving,
    Leaving,
}

impl Worker {
    /// Opens a channel to every device. Has to be called on the worker's own thread: its ring
    /// belongs to the thread that made it.
    ///
    /// # Errors
    /// The ring cannot be made, or a device does not open.
    pub(super) fn new(
        engine: Engine,
        idle: Idle,
        share: Share,
        devices: &[Arc<BlkDevice>],
        wire: Wire,
    ) -> Result<Worker, WorkerError> {
        let mut ring = Ring::new(engine).map_err(WorkerError::Ring)?;
        ring.watch(borrow(&wire.wake), Token::Command.pack())
            .map_err(WorkerError::Watch)?;
        let mut attachments = Vec::with_capacity(devices.len());
        for (place, device) in devices.iter().enumerate() {
            let open = device.storage().open_channel(&mut ring);
            let channel = open.map_err(|source| WorkerError::Open {
                name: device.name(),
                source,
            })?;
            if let Some(event) = channel.event() {
                let token = Token::Channel { device: place }.pack();
                ring.watch(event, token).map_err(WorkerError::Watch)?;
            }
            attachments.push(Attachment::new(device.clone(), channel, place, share));
        }
        Ok(Worker {
            share,
            wire,
            ring,
            slots: Slots::default(),
            attachments,
            outgoing: Vec::new(),
            reports: Vec::new(),
            idle,
            life: Life::Serving,
        })
    }

    /// Serves until told to leave, and until everything came back after that.
    pub(super) fn run(mut self) {
        while self.life == Life::Serving || !self.is_done() {
            let served = self.serve();
            // What was refused or answered at once is published with this batch.
            self.publish();
            let wait = self.wait(&served);
            if let Err(error) = self.ring.submit(wait) {
                self.storage_is_gone(&error);
            }
            self.outgoing.clear();
            // After the submit: a stop is not reported before the last call of its vring is made.
            self.report();
            let mut came = served.chains > 0;
            while let Some(event) = self.ring.reap() {
                self.route(event);
                came = true;
            }
            self.publish();
            if came {
                self.idle.ends();
            }
            // A call that is owed goes first.
            if wait == Wait::No && !served.is_more && !self.ring.has_queued() {
                self.look();
            }
        }
    }

    /// Whether the next submit may sleep. Before it does, every vring is told to kick.
    fn wait(&mut self, served: &Served) -> Wait {
        let owes = !self.reports.is_empty() || !self.outgoing.is_empty();
        let leaves = self.life == Life::Leaving && self.is_done();
        if owes || leaves || served.is_more || self.polls() || self.arm() {
            return Wait::No;
        }
        self.idle.sleeps(self.slots.in_flight());
        Wait::Event
    }

    /// Whether looking again may find something sooner than sleeping. A worker that serves no vring
    /// has nothing to look at.
    fn polls(&mut self) -> bool {
        self.idle.is_open(self.slots.in_flight())
            && self.attachments.iter().any(Attachment::is_served)
    }

    /// Looks at the rings until there is something to do, or it is time to sleep. Not everything
    /// shows there, so it comes back now and then for a turn.
    fn look(&mut self) {
        let in_flight = self.slots.in_flight();
        for _ in 0..LOOKS_PER_TURN {
            if self.attachments.iter().any(Attachment::has_news) || self.ring.has_news() {
                return self.idle.ends();
            }
            if !self.idle.looks_again(in_flight) {
                return;
            }
            std::hint::spin_loop();
        }
    }

    /// Asks every driver to kick; whether there is something to do all the same.
    fn arm(&mut self) -> bool {
        let (attachments, mut lent) = self.lend();
        let mut found = false;
        for attachment in attachments {
            found |= attachment.arm(&mut lent);
        }
        found || !self.reports.is_empty()
    }

    fn is_done(&self) -> bool {
        self.slots.in_flight() == 0 && self.attachments.iter().all(Attachment::is_stopped)
    }

    fn serve(&mut self) -> Served {
        let (attachments, mut lent) = self.lend();
        let mut served = Served::default();
        for attachment in attachments {
            attachment.serve(&mut served, &mut lent);
        }
        served
    }

    fn publish(&mut self) {
        let (attachments, mut lent) = self.lend();
        for attachment in attachments {
            attachment.publish(&mut lent);
        }
    }

    fn route(&mut self, event: Event) {
        match event {
            Event::Done(done) => {
                let Some(in_flight) = self.slots.get_mut(done.tag) else {
                    debug_assert!(false, "a completion without a request");
                    return;
                };
                let (device, vring) = (in_flight.device, in_flight.vring);
                let (attachments, mut lent) = self.lend();
                if let Some(attachment) = attachments.get_mut(device) {
                    attachment.complete(vring, done, &mut lent);
                }
            }
            Event::Ready(word) => match Token::unpack(word) {
                Some(Token::Command) => self.obey(),
                Some(Token::Channel { device }) => {
                    let (attachments, lent) = self.lend();
                    if let Some(attachment) = attachments.get_mut(device) {
                        attachment.collect(lent.ring);
                    }
                }
                Some(Token::Kick { device, vring }) => {
                    if let Some(attachment) = self.attachments.get_mut(device) {
                        attachment.kicked(vring);
                    }
                }
                None => {}
            },
            Event::Unwatched(word) => {
                if let Some(Token::Kick { device, vring }) = Token::unpack(word) {
                    let (attachments, mut lent) = self.lend();
                    if let Some(attachment) = attachments.get_mut(device) {
                        attachment.unwatched(vring, &mut lent);
                    }
                }
            }
        }
    }

    /// Applies the commands that have come.
    fn obey(&mut self) {
        loop {
            match self.wire.commands.try_recv() {
                Ok(Command::Quit) | Err(TryRecvError::Disconnected) => {
                    self.life = Life::Leaving;
                    let (attachments, mut lent) = self.lend();
                    for attachment in attachments {
                        attachment.stop_all(&mut lent);
                    }
                    return;
                }
                Ok(command) => {
                    let device = command.device().0 as usize;
                    let (attachments, mut lent) = self.lend();
                    if let Some(attachment) = attachments.get_mut(device) {
                        attachment.apply(command, &mut lent);
                    }
                }
                Err(TryRecvError::Empty) => return,
            }
        }
    }

    fn report(&mut self) {
        if self.reports.is_empty() {
            return;
        }
        for report in self.reports.drain(..) {
            // A control thread that is gone has nobody left to tell.
            let _ = self.wire.reports.send((self.share.worker, report));
        }
        let _ = self.wire.told.write(1);
    }

    /// The ring itself failed: nothing that is in flight can come back any more.
    fn storage_is_gone(&self, error: &io::Error) -> ! {
        error!(
            "worker {}: its ring failed and it cannot go on: {error}",
            self.share.worker
        );
        std::process::abort();
    }

    fn lend(&mut self) -> (&mut [Attachment], Lent<'_>) {
        let Worker {
            ring,
            slots,
            attachments,
            outgoing,
            reports,
            ..
        } = self;
        (
            attachments,
            Lent {
                ring,
                slots,
                outgoing,
                reports,
            },
        )
    }
}
