#![expect(
    unsafe_code,
    reason = "a child that dies with its test needs prctl; a signal needs kill"
)]
//! Programs that a test starts and that never outlive it.

use std::fs::{self, File};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::GuestError;

/// How often a program or a socket that has no descriptor to wait on is looked at.
pub(super) const POLL: Duration = Duration::from_millis(10);

/// A running program. It is killed on drop, and by the kernel when the thread that started it ends,
/// so that neither a failed test nor a killed one leaves it behind.
#[derive(Debug)]
pub(super) struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command` with its standard output and error in the file `log`.
    pub(super) fn start(mut command: Command, log: PathBuf) -> Result<Self, GuestError> {
        let name = command.get_program().to_string_lossy().into_owned();
        let output = File::create(&log)
            .and_then(|file| Ok((file.try_clone()?, file)))
            .map_err(GuestError::host(format!("create {}", log.display())))?;
        command
            .stdin(Stdio::null())
            .stdout(output.0)
            .stderr(output.1);
        let parent = std::process::id();
        // SAFETY: the closure runs in the forked child before exec and calls only prctl and
        // getppid, which are async-signal-safe; it allocates nothing.
        unsafe { command.pre_exec(move || die_with_parent(parent)) };
        let child = command
            .spawn()
            .map_err(GuestError::host(format!("start {name}")))?;
        Ok(Self { name, child, log })
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What the program wrote so far.
    pub(super) fn log(&self) -> String {
        let bytes = fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// An `Ended` error if the program is no longer running.
    pub(super) fn check_running(&mut self) -> Result<(), GuestError> {
        match self.try_wait()? {
            None => Ok(()),
            Some(status) => Err(self.ended(status)),
        }
    }

    /// Sends SIGTERM.
    pub(super) fn terminate(&self) -> Result<(), GuestError> {
        self.signal(libc::SIGTERM)
    }

    pub(super) fn signal(&self, signal: i32) -> Result<(), GuestError> {
        // SAFETY: kill touches no memory of ours. The pid is that of a child which `self.child`
        // has not reaped, so it cannot belong to another process yet.
        let result = unsafe { libc::kill(self.child.id().cast_signed(), signal) };
        if result == 0 {
            return Ok(());
        }
        let what = format!("send signal {signal} to {}", self.name);
        Err(GuestError::Host {
            what,
            source: io::Error::last_os_error(),
        })
    }

    /// Kills the program with SIGKILL and reaps it.
    pub(super) fn kill(&mut self) -> Result<ExitStatus, GuestError> {
        let what = format!("kill {}", self.name);
        self.child
            .kill()
            .and_then(|()| self.child.wait())
            .map_err(GuestError::host(what))
    }

    /// Waits until the program ends by itself.
    pub(super) fn wait(&mut self, limit: Duration) -> Result<ExitStatus, GuestError> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.try_wait()? {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                let what = format!("the end of {}", self.name);
                return Err(GuestError::TimedOut {
                    what,
                    limit,
                    context: self.log(),
                });
            }
            thread::sleep(POLL);
        }
    }

    /// Waits like `wait`; any status but zero is an error.
    pub(super) fn wait_success(&mut self, limit: Duration) -> Result<(), GuestError> {
        let status = self.wait(limit)?;
        if status.success() {
            Ok(())
        } else {
            Err(self.ended(status))
        }
    }

    fn try_wait(&mut self) -> Result<Option<ExitStatus>, GuestError> {
        self.child
            .try_wait()
            .map_err(GuestError::host(format!("wait for {}", self.name)))
    }

    fn ended(&self, status: ExitStatus) -> GuestError {
        GuestError::Ended {
            program: self.name.clone(),
            status,
            log: self.log(),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only for a child that is gone already, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Asks the kernel for a SIGKILL when the parent ends; a parent that ended before is an error.
fn die_with_parent(parent: u32) -> io::Result<()> {
    // SAFETY: this option of prctl takes one integer and touches no memory of ours.
    if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } != 0 {
        return Err(io::Error::last_os_error());
    }
    if std::os::unix::process::parent_id() == parent {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(libc::ESRCH))
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::tempdir::TempDir;

    use super::*;

    fn shell(script: &str, folder: &TempDir) -> Process {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Process::start(command, folder.as_path().join("log")).unwrap()
    }

    fn is_alive(pid: u32) -> bool {
        fs::exists(format!("/proc/{pid}")).unwrap()
    }

    #[test]
    fn a_program_is_killed_on_drop() {
        let folder = TempDir::new().unwrap();
        let process = shell("sleep 1000", &folder);
        let pid = process.pid();
        assert!(is_alive(pid));
        drop(process);
        assert!(!is_alive(pid));
    }

    #[test]
    fn a_program_dies_with_the_thread_that_started_it() {
        let folder = TempDir::new().unwrap();
        let mut process = thread::scope(|scope| {
            scope
                .spawn(|| shell("exec sleep 1000", &folder))
                .join()
                .unwrap()
        });
        let status = process.wait(Duration::from_secs(60)).unwrap();
        assert_eq!(
            std::os::unix::process::ExitStatusExt::signal(&status),
            Some(libc::SIGKILL)
        );
    }

    #[test]
    fn a_bad_end_carries_the_status_and_the_output() {
        let folder = TempDir::new().unwrap();
        let mut process = shell("echo out; echo err >&2; exit 3", &folder);
        let error = process.wait_success(Duration::from_secs(60)).unwrap_err();
        let GuestError::Ended { status, log, .. } = error else {
            panic!("{error}")
        };
        assert_eq!(status.code(), Some(3));
        assert_eq!(log, "out\nerr\n");
    }

    #[test]
    fn sigterm_reaches_the_program() {
        let folder = TempDir::new().unwrap();
        let mut process = shell(
            "trap 'exit 0' TERM; echo set; while :; do sleep 0.01; done",
            &folder,
        );
        while process.log() != "set\n" {
            process.check_running().unwrap();
            thread::sleep(POLL);
        }
        process.terminate().unwrap();
        process.wait_success(Duration::from_secs(60)).unwrap();
    }
}
