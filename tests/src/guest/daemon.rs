//! A daemon behind a guest's disk.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use super::process::{POLL, Process};
use super::{DaemonKind, DaemonSpec, GuestError, Scratch};

const START_LIMIT: Duration = Duration::from_secs(60);
const STOP_LIMIT: Duration = Duration::from_secs(120);
/// What qemu-storage-daemon answers to GET_ID; it has no option for it.
const STORAGE_DAEMON_SERIAL: &str = "vhost_user_blk";

/// A running daemon; killed on drop, which shows its log: a test that passes ends its daemons.
#[derive(Debug)]
pub struct Daemon {
    kind: DaemonKind,
    process: Process,
    socket: PathBuf,
    spec: DaemonSpec,
    /// Set once a test has ended it as it meant to.
    has_ended: bool,
}

impl Daemon {
    /// Starts `command` and waits until it listens at `socket`.
    pub(super) fn start(
        spec: DaemonSpec,
        kind: DaemonKind,
        command: Command,
        socket: &Path,
        log: PathBuf,
    ) -> Result<Self, GuestError> {
        let mut daemon = Self {
            kind,
            process: Process::start(command, log)?,
            socket: socket.to_owned(),
            spec,
            has_ended: false,
        };
        daemon.wait_listening()?;
        Ok(daemon)
    }

    /// Which program it is.
    #[must_use]
    pub fn kind(&self) -> DaemonKind {
        self.kind
    }

    /// Where it listens.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The number of request queues it offers.
    #[must_use]
    pub fn queues(&self) -> u16 {
        self.spec.queues
    }

    /// The serial a guest must see; `None` where the daemon chooses one itself.
    #[must_use]
    pub fn serial(&self) -> Option<&str> {
        match self.kind {
            DaemonKind::Vublk => self.spec.serial.as_deref(),
            DaemonKind::QemuStorageDaemon => Some(STORAGE_DAEMON_SERIAL),
        }
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// What it logged so far.
    #[must_use]
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// Sends a signal, SIGUSR1 for example.
    ///
    /// # Errors
    /// `Host` when there is no such process or no such signal.
    pub fn signal(&self, signal: i32) -> Result<(), GuestError> {
        self.process.signal(signal)
    }

    /// What it has counted under a name so far; it logs a line for that. Only vublk does.
    ///
    /// # Errors
    /// `Host` when it is gone, `TimedOut` when it has no such count.
    pub fn counted(&self, name: &str) -> Result<u64, GuestError> {
        let lines = self.log().lines().count();
        self.signal(10)?;
        let deadline = Instant::now() + STOP_LIMIT;
        loop {
            let log = self.log();
            let mut words = log.lines().skip(lines).flat_map(str::split_whitespace);
            let count = words.find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
            if let Some(count) = count.and_then(|count| count.parse().ok()) {
                return Ok(count);
            }
            if Instant::now() >= deadline {
                return Err(GuestError::TimedOut {
                    what: format!("its count of {name}"),
                    limit: STOP_LIMIT,
                    context: log,
                });
            }
            thread::sleep(POLL);
        }
    }

    /// Makes sure that it still runs.
    ///
    /// # Errors
    /// `Ended`, with its output.
    pub fn check_running(&mut self) -> Result<(), GuestError> {
        self.process.check_running()
    }

    /// Ends it with SIGTERM.
    ///
    /// # Errors
    /// `Ended` unless it leaves with status 0, `TimedOut` when it does not leave.
    pub fn stop(mut self) -> Result<(), GuestError> {
        self.process.check_running()?;
        self.process.terminate()?;
        self.process.wait_success(STOP_LIMIT)?;
        self.has_ended = true;
        Ok(())
    }

    /// Ends it with SIGKILL, whatever it is doing, and starts another one at once at the same
    /// socket. The log of the one before is kept beside the new one.
    ///
    /// # Errors
    /// As `kill` and `DaemonSpec::start`.
    pub fn crash(self, scratch: &Scratch) -> Result<Self, GuestError> {
        let (spec, kind, socket) = (self.spec.clone(), self.kind, self.socket.clone());
        self.kill()?;
        let log = scratch.file(&format!("{}.log", scratch.unique("daemon")));
        spec.start_at(&socket, kind, log)
    }

    /// Ends it with SIGKILL.
    ///
    /// # Errors
    /// `Host` when it cannot be reaped.
    pub fn kill(mut self) -> Result<(), GuestError> {
        self.process.kill()?;
        self.has_ended = true;
        Ok(())
    }

    /// A connection made only to see whether someone listens would be a front end to the daemon,
    /// so the kernel's list of listening sockets is asked instead.
    fn wait_listening(&mut self) -> Result<(), GuestError> {
        let deadline = Instant::now() + START_LIMIT;
        loop {
            self.process.check_running()?;
            let what = "read /proc/net/unix";
            let sockets = fs::read("/proc/net/unix").map_err(GuestError::host(what))?;
            if is_listening(&sockets, &self.socket) {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(GuestError::TimedOut {
                    what: format!(
                        "{} to listen on {}",
                        self.kind.name(),
                        self.socket.display()
                    ),
                    limit: START_LIMIT,
                    context: self.log(),
                });
            }
            thread::sleep(POLL);
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if !self.has_ended {
            eprintln!("--- {} ---\n{}", self.kind.name(), self.log());
        }
    }
}

/// Whether the kernel's table of unix sockets has a listening one at `path`. Its columns are slot,
/// count, protocol, flags, type, state, inode, path; flag 0x10000 is a listener.
fn is_listening(table: &[u8], path: &Path) -> bool {
    table.split(|&byte| byte == b'\n').any(|line| {
        let mut fields = line
            .split(|&byte| byte == b' ')
            .filter(|field| !field.is_empty());
        fields.nth(3) == Some(b"00010000".as_slice())
            && fields.nth(3) == Some(path.as_os_str().as_bytes())
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_listening_socket_is_told_from_a_file_and_a_closed_one() {
        let folder = vmm_sys_util::tempdir::TempDir::new().unwrap();
        let path = folder.as_path().join("socket");
        let listening = || is_listening(&fs::read("/proc/net/unix").unwrap(), &path);
        assert!(!listening());
        let listener = UnixListener::bind(&path).unwrap();
        assert!(listening());
        drop(listener);
        assert!(path.exists());
        assert!(!listening());
    }
}
