//! Taking a device's storage and giving it back, for whoever serves it.

use std::io;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use blockdev::Claim;
use log::{error, info, warn};

use super::ClaimEnd;
use crate::blk::BlkDevice;

/// How long the first pause is before a lock is tried again, and the longest.
const PAUSES: [Duration; 2] = [Duration::from_millis(10), Duration::from_millis(250)];

/// Tries to get the storage until it has it, has waited for `patience`, or is told to stop by
/// `pause`, which waits for as long as it is given.
///
/// # Errors
/// The storage's, when it cannot be locked.
pub(super) fn claim(
    device: &BlkDevice,
    patience: Duration,
    mut pause: impl FnMut(Duration) -> ControlFlow<()>,
) -> io::Result<ClaimEnd> {
    let begun = Instant::now();
    let [mut next, longest] = PAUSES;
    let mut waited = false;
    loop {
        match device.storage().claim()? {
            Claim::Held => break,
            Claim::Unguarded => {
                let name = device.name();
                warn!("{name}: its file system has no locks, nothing keeps others out");
                break;
            }
            Claim::Busy => {}
        }
        let left = patience.saturating_sub(begun.elapsed());
        if left.is_zero() {
            return Ok(ClaimEnd::TimedOut);
        }
        if !waited {
            waited = true;
            warn!(
                "{}: waiting for its lock, for {} s at most (--lock-timeout): another process \
                 serves it, or requests of one that was killed are still on their way",
                device.name(),
                patience.as_secs()
            );
        }
        if pause(next.min(left)).is_break() {
            return Ok(ClaimEnd::GivenUp);
        }
        next = longest.min(next * 2);
    }
    if waited {
        let (name, waited) = (device.name(), begun.elapsed());
        info!("{name}: locked after {:.1} s", waited.as_secs_f32());
    }
    Ok(ClaimEnd::Held)
}

/// Gives the storage back.
pub(super) fn release(device: &BlkDevice) {
    if let Err(error) = device.storage().release() {
        error!(
            "{}: what was written may not be stable: {error}",
            device.name()
        );
    }
}
