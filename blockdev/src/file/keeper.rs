//! Keeping a file to ourselves while it is served.

#![expect(unsafe_code, reason = "open file description locks have no wrapper")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use crate::device::Claim;
use crate::geometry::Access;

/// Takes an open file description lock over the whole file: a write lock for a device that may be
/// written, a read lock for one that may not.
///
/// It belongs to the description that the kernel's requests refer to. So the kernel keeps it for a
/// process that was killed until the last request of that process ended, and whoever gets it after
/// that is not overtaken by an old write.
pub(super) fn lock(file: &File, access: Access) -> io::Result<Claim> {
    let kind = match access {
        Access::ReadWrite => libc::F_WRLCK,
        Access::ReadOnly => libc::F_RDLCK,
    };
    let Err(error) = set(file, kind) else {
        return Ok(Claim::Held);
    };
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Ok(Claim::Busy),
        _ if has_no_locks(&error) => Ok(Claim::Unguarded),
        _ => Err(error),
    }
}

/// Gives the lock up, where there can be one.
pub(super) fn unlock(file: &File) -> io::Result<()> {
    match set(file, libc::F_UNLCK) {
        Err(error) if has_no_locks(&error) => Ok(()),
        result => result,
    }
}

/// Whether this is what a file system without locks says.
fn has_no_locks(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENOLCK | libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL)
    )
}

/// Lets go of what the page cache has of the file, as far as it is not dirty.
pub(super) fn drop_cache(file: &File) -> io::Result<()> {
    // SAFETY: the call takes no pointer.
    match unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) } {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

fn set(file: &File, kind: libc::c_int) -> io::Result<()> {
    // SAFETY: all zeroes is a valid flock, which covers all of the file.
    let mut whole: libc::flock = unsafe { std::mem::zeroed() };
    whole.l_type = libc::c_short::try_from(kind).unwrap_or_default();
    whole.l_whence = libc::c_short::try_from(libc::SEEK_SET).unwrap_or_default();
    // SAFETY: `whole` is an initialised flock that lives across the call.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &whole) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
