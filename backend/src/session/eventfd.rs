//! Takes a kick, call or err from a front end.
#![expect(
    unsafe_code,
    reason = "an EventFd can only be made of a raw descriptor"
)]

use std::fs;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use vmm_sys_util::eventfd::EventFd;

use super::Refusal;

/// What the kernel calls an eventfd in /proc.
const EVENTFD: &str = "anon_inode:[eventfd]";

/// Makes sure that the descriptor is an eventfd, and that no read or write of it blocks.
///
/// Anything else would break the worker's promises: a memfd is always readable and would wake it
/// for ever, a pipe that is full would block it.
pub(super) fn eventfd(fd: OwnedFd) -> Result<EventFd, Refusal> {
    let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let kind = fs::read_link(link).map_err(Refusal::Descriptor)?;
    if kind.as_os_str() != EVENTFD {
        return Err(Refusal::NotEventFd(kind.display().to_string()));
    }
    let nonblocking = fcntl_getfl(&fd).and_then(|flags| fcntl_setfl(&fd, flags | OFlags::NONBLOCK));
    nonblocking.map_err(|errno| Refusal::Descriptor(errno.into()))?;
    // SAFETY: `into_raw_fd` gives up the only ownership there is of this descriptor.
    Ok(unsafe { EventFd::from_raw_fd(fd.into_raw_fd()) })
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io;

    use super::*;

    #[test]
    fn only_an_eventfd_is_taken_and_it_no_longer_blocks() {
        let blocking = EventFd::new(0).unwrap();
        // SAFETY: `into_raw_fd` gives up the only ownership there is of this descriptor.
        let fd = unsafe { OwnedFd::from_raw_fd(blocking.into_raw_fd()) };
        let taken = eventfd(fd).unwrap();
        let empty = taken.read().unwrap_err();
        assert_eq!(empty.kind(), io::ErrorKind::WouldBlock);

        let null = File::open("/dev/null").unwrap();
        assert!(
            matches!(eventfd(null.into()), Err(Refusal::NotEventFd(kind)) if kind == "/dev/null")
        );
    }
}
