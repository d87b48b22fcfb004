//! Whose storage it is: taken before the first vring is popped, given back after the last one has
//! stopped.

use std::collections::HashSet;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use blockdev::Claim;
use log::{error, warn};

use crate::blk::BlkDevice;

/// The time between two attempts.
const PAUSE: Duration = Duration::from_millis(50);

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
            self.give_back();
        }
    }

    fn take(&self) -> io::Result<()> {
        let (device, begun) = (&self.device, Instant::now());
        let mut waited = false;
        loop {
            match device.storage().claim()? {
                Claim::Held => return Ok(()),
                Claim::Unguarded => {
                    let name = device.name();
                    warn!("{name}: its file system has no locks, nothing keeps others out");
                    return Ok(());
                }
                Claim::Busy => {}
            }
            if begun.elapsed() >= device.lock_timeout() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            if !std::mem::replace(&mut waited, true) {
                let limit = device.lock_timeout().as_secs();
                warn!(
                    "{}: waiting for its lock, for {limit} s at most",
                    device.name()
                );
            }
            thread::sleep(PAUSE);
        }
    }

    fn give_back(&self) {
        if let Err(error) = self.device.storage().release() {
            let name = self.device.name();
            error!("{name}: what was written may not be stable: {error}");
        }
    }

    fn running(&self) -> MutexGuard<'_, HashSet<u16>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
