//! Signals as events.
#![expect(unsafe_code, reason = "signalfd and signal dispositions are C")]

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use vmm_sys_util::signal::{block_signal, create_sigset};

/// The signals that are obeyed.
const OBEYED: [i32; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGUSR1, libc::SIGHUP];

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// Drain and leave.
    Leave,
    /// Log a line for each device.
    Report,
    /// Ask every device's storage for its size.
    Refresh,
}

/// The signals of the process, taken from their default actions.
#[derive(Debug)]
pub struct Signals(File);

impl Signals {
    /// Blocks SIGTERM, SIGINT, SIGUSR1 and SIGHUP in this thread and in those it starts later, so
    /// that they arrive here only, and ignores SIGPIPE.
    ///
    /// # Errors
    /// The kernel's, from the mask or the signalfd.
    pub fn block() -> io::Result<Signals> {
        for signal in OBEYED {
            block_signal(signal).map_err(|error| io::Error::other(error.to_string()))?;
        }
        // SAFETY: SIG_IGN is a disposition, no handler of ours is called.
        if unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) } == libc::SIG_ERR {
            return Err(io::Error::last_os_error());
        }
        let mask = create_sigset(&OBEYED).map_err(io::Error::from)?;
        // SAFETY: `mask` is an initialised set on the stack, read during the call only.
        let fd = unsafe { libc::signalfd(-1, &mask, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(Signals(File::from(unsafe { OwnedFd::from_raw_fd(fd) })))
    }

    /// The next signal that came, if one did.
    pub(super) fn next(&mut self) -> Option<Request> {
        // A signalfd gives whole records; the number is the first field of each.
        let mut record = [0; size_of::<libc::signalfd_siginfo>()];
        self.0.read_exact(&mut record).ok()?;
        let (number, _) = record.split_first_chunk::<4>()?;
        match i32::from_ne_bytes(*number) {
            libc::SIGUSR1 => Some(Request::Report),
            libc::SIGHUP => Some(Request::Refresh),
            _ => Some(Request::Leave),
        }
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
