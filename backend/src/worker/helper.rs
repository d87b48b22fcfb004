//! A device's helper thread: what may take as long as storage takes, and needs no vring.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::Builder;
use std::time::{Duration, Instant};

use blockdev::Claim;
use log::{error, info, warn};
use vmm_sys_util::eventfd::EventFd;

use super::{ClaimEnd, Errand, Outcome, Report, WorkerError};
use crate::blk::BlkDevice;

/// How long the first pause is before a lock is tried again, and the longest.
const PAUSES: [Duration; 2] = [Duration::from_millis(10), Duration::from_millis(250)];

/// Who reports that is no worker.
const NOBODY: usize = usize::MAX;

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
                    self.release();
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

    /// Tries to get the storage until it has it, is told to stop, or has waited long enough.
    fn claim(&self, patience: Duration) -> ClaimEnd {
        let begun = Instant::now();
        let [mut pause, longest] = PAUSES;
        let mut waited = false;
        loop {
            match self.device.storage().claim() {
                Ok(Claim::Held) => break,
                Ok(Claim::Unguarded) => {
                    let name = self.device.name();
                    warn!("{name}: its file system has no locks, nothing keeps others out");
                    break;
                }
                Ok(Claim::Busy) => {}
                Err(error) => {
                    error!("{}: it cannot be locked: {error}", self.device.name());
                    return ClaimEnd::Failed;
                }
            }
            let left = patience.saturating_sub(begun.elapsed());
            if left.is_zero() {
                return ClaimEnd::TimedOut;
            }
            if !waited {
                waited = true;
                warn!(
                    "{}: waiting for its lock, for {} s at most (--lock-timeout): another process \
                     serves it, or requests of one that was killed are still on their way",
                    self.device.name(),
                    patience.as_secs()
                );
            }
            match self.errands.recv_timeout(pause.min(left)) {
                Err(RecvTimeoutError::Timeout) => pause = longest.min(pause * 2),
                // Whoever asks for the size need not have the storage.
                Ok(Errand::Refresh) => self.tell(self.refresh()),
                Err(RecvTimeoutError::Disconnected)
                | Ok(Errand::Claim(_) | Errand::GiveUpClaim | Errand::Release | Errand::Sync) => {
                    return ClaimEnd::GivenUp;
                }
            }
        }
        if waited {
            let (name, waited) = (self.device.name(), begun.elapsed());
            info!("{name}: locked after {:.1} s", waited.as_secs_f32());
        }
        ClaimEnd::Held
    }

    fn release(&self) {
        if let Err(error) = self.device.storage().release() {
            error!(
                "{}: what was written may not be stable: {error}",
                self.device.name()
            );
        }
    }

    fn done(&self, what: &str, result: &std::io::Result<()>) -> bool {
        if let Err(error) = result {
            error!("cannot {what} {}: {error}", self.device.name());
        }
        result.is_ok()
    }
}
