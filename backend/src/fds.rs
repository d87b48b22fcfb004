//! Descriptors that come as integers.
#![expect(
    unsafe_code,
    reason = "EventFd shows its descriptor only as an integer, and a command line has nothing else"
)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use vmm_sys_util::eventfd::EventFd;

/// The descriptor of an eventfd, for as long as the eventfd is borrowed.
#[must_use]
pub fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: `event` owns the descriptor, keeps it open, and is borrowed for as long as the
    // result.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// Takes over a descriptor that the process inherited, and closes it on exec. Has to be called
/// before the process opens anything of its own, which could have the same number.
///
/// # Errors
/// A descriptor that is not open, or one of the standard three.
pub fn adopt(fd: RawFd) -> io::Result<OwnedFd> {
    if fd <= libc::STDERR_FILENO {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the call takes no pointer and changes one flag of a descriptor.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open, and whoever named it on the command line gave it to us.
    // Nothing else in this process owns it: the caller opened nothing yet.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
