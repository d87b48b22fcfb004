//! Whose storage it is: taken before the first vring is popped, given back after the last one has
//! stopped.

use std::collections::HashSet;
use std::io;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use crate::blk::BlkDevice;
use crate::worker::ClaimEnd;
use crate::worker::claim::{claim, release};

/// The storage of a device, shared by its lanes.
#[derive(Debug)]
pub(super) struct Custody {
    device: Arc<BlkDevice>,
    /// Vrings that run, by index. The storage is ours while there is one.
    running: Mutex<HashSet<u16>>,
}

impl Custody {
    pub(super) fn new(device: Arc<BlkDevice>) -> Custody {
        Custody {
            device,
            running: Mutex::new(HashSet::new()),
        }
    }

    /// A vring wants to be popped: waits for the storage, for as long as the device's lock may
    /// take.
    ///
    /// # Errors
    /// `TimedOut` when another process has it, else the storage's.
    pub(super) fn start(&self, vring: u16) -> io::Result<()> {
        let mut running = self.running();
        if running.is_empty() {
            self.take()?;
        }
        running.insert(vring);
        Ok(())
    }

    /// Vrings stopped, with nothing in flight.
    pub(super) fn stop(&self, vrings: impl IntoIterator<Item = u16>) {
        let mut running = self.running();
        let mut stopped = false;
        for vring in vrings {
            stopped |= running.remove(&vring);
        }
        if stopped && running.is_empty() {
            release(&self.device);
        }
    }

    fn take(&self) -> io::Result<()> {
        let sleeping = |pause| {
            thread::sleep(pause);
            ControlFlow::Continue(())
        };
        match claim(&self.device, self.device.lock_timeout(), sleeping)? {
            ClaimEnd::Held => Ok(()),
            ClaimEnd::TimedOut | ClaimEnd::Failed | ClaimEnd::GivenUp => {
                Err(io::ErrorKind::TimedOut.into())
            }
        }
    }

    fn running(&self) -> MutexGuard<'_, HashSet<u16>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
