//! One front end's session: the state its messages build up, and what they make the workers do.
//!
//! A [`Session`] never blocks and never touches a vring's hot state: it sends commands to the
//! workers, and a message whose answer depends on them becomes a [`Wait`] that their reports end.
//! A [`Link`] ties a session to its socket.

mod chatter;
mod claim;
mod config;
mod crew;
mod eventfd;
mod features;
mod inflight;
mod link;
mod log;
mod memory;
mod negotiation;
mod pins;
mod refusal;
mod reset;
mod resize;
mod state;
mod vrings;

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use iov_iter::MemoryTable;

pub use chatter::Causes;
pub use crew::Crew;
pub use features::{Feature, OFFERED, OfferedBy};
pub use link::{Link, Remains, Wants};
pub use memory::Epochs;
pub use refusal::Refusal;
pub use state::StateError;

use crate::blk::BlkDevice;
use crate::inflight::Region;
use crate::limits::{MAX_REGIONS, MAX_VRINGS};
use crate::proto::{Code, Message, Reply};
use crate::worker::{Report, StopMode, TableEpoch};
use claim::Custody;
use features::Negotiation;
use inflight::Regions;
use log::Log;
use pins::Pinning;
use resize::Resize;
use state::Transferred;
use vrings::{Life, Vring};

/// What became of a message.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// It is done; its own reply, if it has one.
    Done(Option<Reply>),
    /// It is done when the workers have reported.
    Wait(Wait),
}

impl Step {
    /// Done, without a reply of its own.
    const DONE: Step = Step::Done(None);
}

/// What a message waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Every worker uses this table.
    Adopted(TableEpoch),
    /// No worker has a request on a table before this one.
    Released(TableEpoch),
    /// Every worker did what it was told before this fence.
    Fenced(u64),
    /// As [`Fenced`](Self::Fenced), for a log that the answer describes.
    Logged {
        /// The fence.
        fence: u64,
        /// Bytes of the log.
        size: u64,
        /// Where it starts in its file, in bytes.
        offset: u64,
    },
    /// This vring has stopped; if it was the last, the storage was given back.
    Stopped(u16),
    /// The storage is ours, and the vring that needed it has started.
    Claimed,
    /// What was answered so far is stable.
    Synced,
    /// Every vring has stopped, so that the device can be reset.
    Reset,
}

/// The state of one front end's session.
#[derive(Debug)]
pub struct Session {
    device: Arc<BlkDevice>,
    negotiation: Negotiation,
    table: Arc<MemoryTable>,
    epochs: Epochs,
    pinning: Pinning,
    vrings: Vec<Vring>,
    log: Log,
    regions: Regions,
    custody: Custody,
    resize: Resize,
    transferred: Transferred,
    /// The socket for messages of ours (SET_BACKEND_REQ_FD), kept for as long as the session.
    back_channel: Option<OwnedFd>,
    ending: Ending,
}

/// How far the end of a session is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    /// It has not ended.
    NotYet,
    /// Its vrings stop. They need their memory until they have, to say what was used.
    Stopping,
    /// Its memory goes: the workers were given this table without any.
    Emptying(TableEpoch),
}

impl Session {
    /// A new session with `device`; every vring of an earlier one is stopped by now.
    #[must_use]
    pub fn new(device: Arc<BlkDevice>, epochs: Epochs) -> Session {
        device.reset();
        let abort = device.storage().capabilities().abort;
        Session {
            device,
            negotiation: Negotiation::new(abort),
            table: Arc::new(MemoryTable::empty()),
            pinning: Pinning::new(epochs.latest()),
            epochs,
            vrings: (0..MAX_VRINGS).map(|_| Vring::new()).collect(),
            log: Log::default(),
            regions: Regions::default(),
            custody: Custody::default(),
            resize: Resize::default(),
            transferred: Transferred::default(),
            back_channel: None,
            ending: Ending::NotYet,
        }
    }

    /// Handles a message.
    ///
    /// # Errors
    /// Why the message was refused; the session is as it was.
    pub fn handle(
        &mut self,
        code: Code,
        message: Message,
        crew: &dyn Crew,
    ) -> Result<Step, Refusal> {
        self.negotiation.check(code)?;
        let number = |value| Ok(Step::Done(Some(Reply::U64(value))));
        match message {
            Message::GetFeatures => number(self.offered_features()),
            Message::SetFeatures(acked) => self.set_features(acked, crew),
            Message::GetProtocolFeatures => number(self.negotiation.offered()),
            Message::SetProtocolFeatures(acked) => self.set_protocol_features(acked),
            // Whoever holds the socket owns the session; saying so again changes nothing.
            Message::SetOwner => Ok(Step::DONE),
            Message::ResetOwner => Ok(self.reset_owner(crew)),
            Message::ResetDevice => Ok(self.reset_device(crew)),
            Message::SetMemTable(regions) => self.set_mem_table(regions, crew),
            Message::GetMaxMemSlots => number(u64::try_from(MAX_REGIONS).unwrap_or(u64::MAX)),
            Message::AddMemReg(region, fd) => self.add_mem_reg(region, fd, crew),
            Message::RemMemReg(region) => self.rem_mem_reg(region, crew),
            Message::GetQueueNum => number(u64::from(MAX_VRINGS)),
            Message::SetVringNum { index, size } => self.set_vring_num(index, size),
            Message::SetLogBase { size, offset, file } => {
                self.set_log_base(size, offset, file, crew)
            }
            Message::SetLogFd(fd) => self.set_log_fd(fd, crew),
            Message::GetInflightFd { wanted, layout } => self.get_inflight_fd(wanted, layout),
            Message::SetInflightFd(description, file) => self.set_inflight_fd(description, file),
            Message::SetVringAddr {
                index,
                addresses,
                log_used,
                log_addr,
            } => {
                let log_used = log_used.then_some(log_addr);
                self.set_vring_addr(index, addresses, log_used, crew)
            }
            Message::SetVringBase { index, base } => self.set_vring_base(index, base),
            Message::GetVringBase { index, in_flight } => {
                self.get_vring_base(index, in_flight, crew)
            }
            Message::SetDeviceStateFd(transfer, file) => self.set_device_state(transfer, file),
            Message::CheckDeviceState => self.check_device_state(),
            Message::SetVringKick { index, fd } => self.set_vring_kick(index, fd, crew),
            Message::SetVringCall { index, fd } => self.set_vring_call(index, fd, crew),
            Message::SetVringErr { index, fd } => self.set_vring_err(index, fd, crew),
            Message::SetVringEnable { index, enable } => self.set_vring_enable(index, enable, crew),
            Message::SetBackendReqFd(fd) => self.set_backend_req_fd(fd),
            Message::GetConfig(range) => self.get_config(range),
            Message::SetConfig(range, bytes) => self.set_config(range, &bytes, crew),
        }
    }

    /// Takes a worker's report.
    pub fn reported(&mut self, worker: usize, report: Report, crew: &dyn Crew) {
        self.epochs.reported(worker, report);
        if let Report::Stopped { id, next_avail } = report
            && let Some(vring) = self.vrings.get_mut(usize::from(id.index))
            && vring.life == Life::Stopping
        {
            vring.stopped(next_avail);
            self.give_back(crew);
        }
        if let Report::Helper(_, outcome) = report {
            self.helped(outcome, crew);
        }
        self.go_on_resizing();
        self.go_on_pinning(crew);
        self.go_on_ending(crew);
    }

    /// What a wait came to, once it is over.
    pub fn settle(&mut self, wait: Wait) -> Option<Result<Option<Reply>, Refusal>> {
        let silently = |done: Result<(), Refusal>| done.map(|()| None);
        match wait {
            Wait::Claimed => self.take_started().map(silently),
            Wait::Synced => self.take_synced().map(silently),
            Wait::Adopted(_)
            | Wait::Released(_)
            | Wait::Fenced(_)
            | Wait::Logged { .. }
            | Wait::Stopped(_)
            | Wait::Reset => self.condition(wait).map(Ok),
        }
    }

    /// The reply of a wait that cannot fail, once its condition holds.
    fn condition(&mut self, wait: Wait) -> Option<Option<Reply>> {
        match wait {
            Wait::Claimed | Wait::Synced => None,
            Wait::Adopted(epoch) => self.epochs.all_adopted(epoch).then_some(None),
            Wait::Released(epoch) => self.is_released(epoch).then_some(None),
            Wait::Fenced(fence) => self.epochs.all_fenced(fence).then_some(None),
            Wait::Logged {
                fence,
                size,
                offset,
            } => {
                let done = self.epochs.all_fenced(fence);
                done.then_some(Some(Reply::Log { size, offset }))
            }
            Wait::Stopped(index) => {
                let vring = self.vrings.get(usize::from(index))?;
                let base = vring.next_avail();
                let reply = Reply::VringBase {
                    index: u32::from(index),
                    base,
                };
                let stopped = vring.life == Life::Stopped && self.is_settled();
                stopped.then_some(Some(reply))
            }
            Wait::Reset => (self.all_stopped() && self.has_given_back()).then(|| {
                self.finish_reset();
                None
            }),
        }
    }

    /// Ends the session: every vring stops, and then every region is given back. A later call may
    /// turn a drain into an abandonment.
    pub fn end(&mut self, mode: StopMode, crew: &dyn Crew) {
        match (self.ending, mode) {
            (Ending::NotYet, _) => {
                self.ending = Ending::Stopping;
                self.back_channel = None;
                self.give_up_claim(crew);
                self.stop_all(mode, crew);
            }
            (Ending::Stopping, StopMode::Suspend | StopMode::Abandon) => self.stop_all(mode, crew),
            (Ending::Stopping, StopMode::Drain) | (Ending::Emptying(_), _) => {}
        }
        self.go_on_ending(crew);
    }

    fn go_on_ending(&mut self, crew: &dyn Crew) {
        if self.ending == Ending::Stopping && self.all_stopped() && self.has_given_back() {
            self.log.forget();
            self.catch_up_log(crew);
            self.ending = Ending::Emptying(self.send_table(MemoryTable::empty(), crew));
        }
    }

    /// Whether the session has ended and no request of it is left.
    #[must_use]
    pub fn is_over(&self) -> bool {
        match self.ending {
            Ending::NotYet | Ending::Stopping => false,
            Ending::Emptying(last) => self.is_released(last),
        }
    }

    /// What a session that has ended leaves for the next one.
    #[must_use]
    pub fn into_epochs(self) -> Epochs {
        self.epochs
    }

    /// Whether the front end took memory away that it had given: the guest's, the log's or that of
    /// the in-flight region.
    #[must_use]
    pub fn poisoned(&self) -> bool {
        let region = self.regions.set.as_ref();
        self.table.poisoned() || self.log.poisoned() || region.is_some_and(Region::poisoned)
    }

    /// What of a wait has not come yet, for the log.
    #[must_use]
    pub fn missing(&self, wait: Wait) -> Missing<'_> {
        Missing {
            session: self,
            wait: Some(wait),
        }
    }

    /// What the end of the session still waits for, for the log.
    #[must_use]
    pub fn leftovers(&self) -> Missing<'_> {
        let wait = match self.ending {
            Ending::NotYet | Ending::Stopping => None,
            Ending::Emptying(last) => Some(Wait::Released(last)),
        };
        Missing {
            session: self,
            wait,
        }
    }
}

/// Says what has not come yet.
#[derive(Debug)]
pub struct Missing<'a> {
    session: &'a Session,
    wait: Option<Wait>,
}

impl fmt::Display for Missing<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Missing { session, wait } = self;
        match wait {
            Some(Wait::Released(epoch)) => {
                let workers = session.epochs.holders(*epoch);
                if workers.is_empty() {
                    return f.write_str("pinned guest memory to be given back");
                }
                write!(
                    f,
                    "requests of workers {workers:?} that use earlier guest memory"
                )
            }
            Some(Wait::Fenced(_) | Wait::Logged { .. }) => {
                f.write_str("workers that have not obeyed yet")
            }
            Some(Wait::Claimed) => write!(f, "the lock on {}", session.device.name()),
            Some(Wait::Synced) => write!(f, "{} to be stable", session.device.name()),
            _ if session.all_stopped() && !session.has_given_back() => {
                write!(f, "{} {}", session.custody_text(), session.device.name())
            }
            Some(Wait::Adopted(_)) => f.write_str("workers that have not taken the new memory"),
            Some(Wait::Stopped(_) | Wait::Reset) | None => {
                let all = session.vrings.iter().enumerate();
                let stopping = all.filter(|(_, vring)| vring.life == Life::Stopping);
                let vrings: Vec<usize> = stopping.map(|(index, _)| index).collect();
                write!(f, "requests in flight of vrings {vrings:?}")
            }
        }
    }
}

#[cfg(test)]
mod tests;
