//! The eventfd by which one of our threads tells a ring that it finished something.

#![expect(unsafe_code, reason = "vmm-sys-util's eventfd has no borrowed form")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// A non-blocking eventfd that is written to and watched, and never read.
#[derive(Debug)]
pub(crate) struct Event {
    fd: EventFd,
}

impl Event {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            fd: EventFd::new(EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
        })
    }

    /// Wakes whoever watches it.
    pub(crate) fn signal(&self) {
        // The counter would need 2^64 writes to saturate.
        if let Err(error) = self.fd.write(1) {
            log::error!("a helper thread cannot wake its ring: {error}");
        }
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the eventfd is open for as long as `self` is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.fd.as_raw_fd()) }
    }
}
