//! Handlers of the messages about the dirty log (vhost-user, *Migration*).
//!
//! While there is a log and a vring that could mark something, the log covers everything that can
//! be marked: whatever would change that is refused before anything is changed. So no mark is ever
//! dropped for want of a bit.

use std::os::fd::OwnedFd;

use iov_iter::{MemoryTable, SharedLog};
use vmm_sys_util::eventfd::EventFd;

use super::eventfd::eventfd;
use super::{Crew, Refusal, Session, Step, Wait};
use crate::fds::borrow;
use crate::proto::Reply;
use crate::vring::{logs_all, used_ring_bytes};
use crate::worker::{Command, LogSetup};

/// What a front end set for the log.
#[derive(Debug, Default)]
pub(super) struct Log {
    shared: Option<SharedLog>,
    event: Option<EventFd>,
    /// The workers were not told of the last change: it came while every vring was stopped.
    untold: bool,
}

impl Log {
    /// Whether its file was truncated.
    pub(super) fn poisoned(&self) -> bool {
        self.shared.as_ref().is_some_and(SharedLog::poisoned)
    }

    /// There is no log any more.
    pub(super) fn forget(&mut self) {
        *self = Log {
            untold: self.untold || self.shared.is_some(),
            ..Log::default()
        };
    }

    /// What the workers are given.
    fn setup(&self) -> Option<Box<LogSetup>> {
        let log = self.shared.clone()?;
        // Without a descriptor for it the front end is not poked, and finds the marks all the same.
        let event = self.event.as_ref().and_then(|event| {
            let copy = borrow(event).try_clone_to_owned().ok()?;
            eventfd(copy).ok()
        });
        Some(Box::new(LogSetup { log, event }))
    }
}

impl Session {
    /// SET_LOG_BASE: sets the log, or swaps it. Answered when no worker marks the old one any
    /// more, since the front end gives it back then.
    pub(super) fn set_log_base(
        &mut self,
        size: u64,
        offset: u64,
        file: OwnedFd,
        crew: &dyn Crew,
    ) -> Result<Step, Refusal> {
        let log = SharedLog::new(file, offset, size).map_err(Refusal::Log)?;
        check_table(&log, &self.table)?;
        for vring in &self.vrings {
            check_used_ring(&log, vring.size, vring.log_used)?;
        }
        self.log.shared = Some(log);
        self.tell_log(crew);
        Ok(match self.fence(crew) {
            Step::Wait(Wait::Fenced(fence)) => Step::Wait(Wait::Logged {
                fence,
                size,
                offset,
            }),
            Step::Done(_) | Step::Wait(_) => Step::Done(Some(Reply::Log { size, offset })),
        })
    }

    /// SET_LOG_FD: signalled whenever something was marked.
    pub(super) fn set_log_fd(&mut self, fd: OwnedFd, crew: &dyn Crew) -> Result<Step, Refusal> {
        self.log.event = Some(eventfd(fd)?);
        self.tell_log(crew);
        Ok(self.fence(crew))
    }

    /// VHOST_F_LOG_ALL was acknowledged, or not any more: then the front end gives the log back as
    /// soon as it has its answer, and says nothing more of it.
    pub(super) fn log_features(&mut self, acked: u64, crew: &dyn Crew) {
        if !logs_all(acked) && self.log.shared.is_some() {
            self.log.shared = None;
            self.tell_log(crew);
        }
    }

    /// Whether all of a new memory table can be marked.
    pub(super) fn check_logged(&mut self, table: &MemoryTable) -> Result<(), Refusal> {
        let checked = match &self.log.shared {
            Some(log) => check_table(log, table),
            None => Ok(()),
        };
        self.or_forget_log(checked)
    }

    /// A log that is too small is an old one while every vring is stopped: QEMU gives it back
    /// without a word when it stops the device, and sets another one after it has started it again.
    /// Until then nothing is popped.
    fn or_forget_log(&mut self, checked: Result<(), Refusal>) -> Result<(), Refusal> {
        if checked.is_err() && self.all_stopped() {
            self.log.forget();
            return Ok(());
        }
        checked
    }

    /// Whether a used ring that is to be logged can be.
    pub(super) fn check_logged_ring(
        &mut self,
        size: Option<u16>,
        log_used: Option<u64>,
    ) -> Result<(), Refusal> {
        let checked = match &self.log.shared {
            Some(log) => check_used_ring(log, size, log_used),
            None => Ok(()),
        };
        self.or_forget_log(checked)
    }

    /// Tells the workers of the log as it is, if they do not know yet.
    pub(super) fn catch_up_log(&mut self, crew: &dyn Crew) {
        if self.log.untold {
            self.tell_log(crew);
        }
    }

    fn tell_log(&mut self, crew: &dyn Crew) {
        self.log.untold = false;
        for worker in 0..crew.count() {
            let setup = self.log.setup();
            crew.send(worker, Command::SetLog(self.device.id(), setup));
        }
    }
}

fn check_table(log: &SharedLog, table: &MemoryTable) -> Result<(), Refusal> {
    for region in table.regions() {
        // Regions do not wrap around the address space.
        covers(log, region.guest_addr().saturating_add(region.size()))?;
    }
    Ok(())
}

/// A ring whose size is not known yet is checked when it starts.
fn check_used_ring(
    log: &SharedLog,
    size: Option<u16>,
    log_used: Option<u64>,
) -> Result<(), Refusal> {
    match size.zip(log_used) {
        Some((size, guest)) => covers(log, guest.saturating_add(used_ring_bytes(size))),
        None => Ok(()),
    }
}

fn covers(log: &SharedLog, end: u64) -> Result<(), Refusal> {
    if log.covers(end) {
        return Ok(());
    }
    let size = log.size();
    Err(Refusal::LogTooSmall { size, end })
}
