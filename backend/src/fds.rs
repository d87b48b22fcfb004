//! Descriptors that come as integers.
#![expect(
    unsafe_code,
    reason = "EventFd shows its descriptor only as an integer, and a command line has nothing else"
)]

use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::{ReadWriteFlags, preadv2};
use vmm_sys_util::eventfd::EventFd;

/// The descriptor of an eventfd, for as long as the eventfd is borrowed.
#[must_use]
pub fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: `event` owns the descriptor, keeps it open, and is borrowed for as long as the
    // result.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// Takes an eventfd's counter, without waiting for one: the flag that keeps a read from blocking is
/// shared with the front end, which may have cleared it, so this read carries its own.
///
/// # Errors
/// `WouldBlock` for a counter of zero.
pub fn take(event: &EventFd) -> io::Result<u64> {
    let mut counter = [0; 8];
    let mut buffers = [IoSliceMut::new(&mut counter)];
    // An offset of all ones reads where a stream is.
    preadv2(
        borrow(event),
        &mut buffers,
        u64::MAX,
        ReadWriteFlags::NOWAIT,
    )?;
    Ok(u64::from_ne_bytes(counter))
}

/// Adds one to an eventfd of the front end's. A write has no flag of its own, so the shared one is
/// set again first.
///
/// # Errors
/// `WouldBlock` for a counter that is saturated.
pub fn signal(event: &EventFd) -> io::Result<()> {
    let fd = borrow(event);
    let flags = fcntl_getfl(fd)?;
    if !flags.contains(OFlags::NONBLOCK) {
        fcntl_setfl(fd, flags | OFlags::NONBLOCK)?;
    }
    event.write(1)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_is_taken_without_waiting_whatever_the_flag_says() {
        let event = EventFd::new(0).unwrap();
        let empty = take(&event).unwrap_err();
        assert_eq!(
            empty.kind(),
            io::ErrorKind::WouldBlock,
            "a blocking eventfd does not block"
        );
        event.write(3).unwrap();
        assert_eq!(take(&event).unwrap(), 3);
        assert!(take(&event).is_err());
    }

    #[test]
    fn a_saturated_counter_is_not_waited_for() {
        let event = EventFd::new(0).unwrap();
        event.write(u64::MAX - 1).unwrap();
        let full = signal(&event).unwrap_err();
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
        assert_eq!(take(&event).unwrap(), u64::MAX - 1);
        signal(&event).unwrap();
        assert_eq!(take(&event).unwrap(), 1);
    }
}
