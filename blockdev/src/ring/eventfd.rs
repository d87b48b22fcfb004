//! Eventfds, written and read by system calls of their own.

#![expect(unsafe_code, reason = "reads and writes local arrays")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

/// Adds one to an eventfd at once. EAGAIN says that it is saturated, which is as good.
pub(super) fn write(fd: BorrowedFd<'_>) {
    let one = 1u64.to_ne_bytes();
    // SAFETY: the buffer is a local array of the length given.
    let written = unsafe { libc::write(fd.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    if written < 0 {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::WouldBlock {
            log::debug!("an eventfd cannot be written to: {error}");
        }
    }
}

/// Takes an eventfd's counter.
pub(super) fn read(fd: RawFd) {
    let mut counter = [0u8; 8];
    // SAFETY: the buffer is a local array of the length given.
    let got = unsafe { libc::read(fd, counter.as_mut_ptr().cast(), counter.len()) };
    if got < 0 {
        log::debug!("an eventfd cannot be read: {}", io::Error::last_os_error());
    }
}
