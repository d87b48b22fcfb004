//! A device's helper thread: what may take as long as storage takes, and needs no vring.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::Builder;
use std::time::Duration;

use log::error;
use vmm_sys_util::eventfd::EventFd;

use super::claim::{claim, release};
use super::{ClaimEnd, Errand, NOBODY, Outcome, Report, WorkerError};
use crate::blk::BlkDevice;

/// One device's helper. Dropping it lets the thread go as soon as storage lets it.
#[derive(Debug)]
pub(super) struct Helper(Sender<Errand>);

/// The thread's side.
struct Thread {
    device: Arc<BlkDevice>,
    errands: Receiver<Errand>,
    reports: Sender<(usize, Report)>,
    told: Arc<EventFd>,
}

impl Helper {
    /// Starts the thread. It sleeps until it is sent on an errand.
    pub(super) fn start(
        device: Arc<BlkDevice>,
        reports: Sender<(usize, Report)>,
        told: Arc<EventFd>,
    ) -> Result<Helper, WorkerError> {
        let (send, errands) = channel();
        let thread = Thread {
            device,
            errands,
            reports,
            told,
        };
        // Nobody waits for its end: storage that hangs would keep the daemon from leaving.
        Builder::new()
            .name("helper".into())
            .spawn(move || thread.run())
            .map_err(WorkerError::Thread)?;
        Ok(Helper(send))
    }

    /// Sends it on an errand; it reports when it has done it.
    pub(super) fn send(&self, errand: Errand) {
        if self.0.send(errand).is_err() {
            error!("a device's helper thread is gone");
        }
    }
}

impl Thread {
    fn run(self) {
        while let Ok(errand) = self.errands.recv() {
            let outcome = match errand {
                Errand::Claim(patience) => Outcome::Claimed(self.claim(patience)),
                // Nothing is being claimed any more: that it ended was reported.
                Errand::GiveUpClaim => continue,
                Errand::Release => {
                    release(&self.device);
                    Outcome::Released
                }
                Errand::Sync => Outcome::Synced(self.done("sync", &self.device.storage().sync())),
                Errand::Refresh => self.refresh(),
            };
            self.tell(outcome);
        }
    }

    fn tell(&self, outcome: Outcome) {
        let report = Report::Helper(self.device.id(), outcome);
        // A control thread that is gone has nobody left to tell.
        let _ = self.reports.send((NOBODY, report));
        let _ = self.told.write(1);
    }

    fn refresh(&self) -> Outcome {
        let size = self.device.storage().refresh();
        self.done("ask for the size of", &size.map(drop));
        Outcome::Refreshed
    }

    fn claim(&self, patience: Duration) -> ClaimEnd {
        let claimed = claim(&self.device, patience, |pause| self.pause(pause));
        claimed.unwrap_or_else(|error| {
            error!("{}: it cannot be locked: {error}", self.device.name());
            ClaimEnd::Failed
        })
    }

    /// Waits, unless the control thread wants something else.
    fn pause(&self, pause: Duration) -> ControlFlow<()> {
        match self.errands.recv_timeout(pause) {
            Err(RecvTimeoutError::Timeout) => ControlFlow::Continue(()),
            // Whoever asks for the size need not have the storage.
            Ok(Errand::Refresh) => {
                self.tell(self.refresh());
                ControlFlow::Continue(())
            }
            Err(RecvTimeoutError::Disconnected)
            | Ok(Errand::Claim(_) | Errand::GiveUpClaim | Errand::Release | Errand::Sync) => {
                ControlFlow::Break(())
            }
        }
    }

    fn done(&self, what: &str, result: &std::io::Result<()>) -> bool {
        if let Err(error) = result {
            error!("cannot {what} {}: {error}", self.device.name());
        }
        result.is_ok()
    }
}
