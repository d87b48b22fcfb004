//! Tells every control thread of the process that guest memory went away under a worker.

use std::io;
use std::sync::{Mutex, PoisonError};

use iov_iter::sigbus;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::fds;

/// The one event the SIGBUS handler writes. It is never read: each control thread watches it
/// edge-triggered, so that each one sees every write.
static EVENT: Mutex<Option<EventFd>> = Mutex::new(None);

/// Installs the SIGBUS handler, and gives the event that a fault makes readable.
///
/// # Errors
/// The kernel's, from making the event or installing the handler.
pub(super) fn watch() -> io::Result<EventFd> {
    let mut shared = EVENT.lock().unwrap_or_else(PoisonError::into_inner);
    let event = match shared.take() {
        Some(event) => event,
        None => {
            let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
            sigbus::install(Some(fds::borrow(&event)))?;
            event
        }
    };
    let ours = event.try_clone();
    *shared = Some(event);
    ours
}
