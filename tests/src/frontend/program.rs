//! The daemon as a process that can be killed.

use std::env;
use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use super::{Outcome, Peer};

/// Names the daemon that was built with the feature `failpoints`.
const FAILPOINTS_BIN: &str = "VUBLK_FAILPOINTS_BIN";

/// A running daemon; killed when it is dropped.
#[derive(Debug)]
pub struct Program {
    child: Child,
    socket: PathBuf,
}

impl Program {
    /// Starts the daemon at `binary` on `socket`; what it logs is appended to `log`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start<S: AsRef<OsStr>>(
        binary: &Path,
        socket: &Path,
        args: &[S],
        environment: &[(&str, &str)],
        log: &Path,
    ) -> Outcome<Program> {
        let log = File::options().create(true).append(true).open(log)?;
        let mut option = std::ffi::OsString::from("--socket-path=");
        option.push(socket);
        let child = Command::new(binary)
            .arg(option)
            .args(args)
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()?;
        let socket = socket.to_owned();
        Ok(Program { child, socket })
    }

    /// Connects as soon as it listens.
    ///
    /// # Errors
    /// When it ends before.
    pub fn connect(&mut self) -> Outcome<Peer> {
        loop {
            if let Ok(peer) = Peer::connect(&self.socket) {
                return Ok(peer);
            }
            if let Some(status) = self.ended()? {
                return Err(format!("the daemon ended: {status}").into());
            }
            std::thread::yield_now();
        }
    }

    /// How it ended, if it has.
    ///
    /// # Errors
    /// The kernel's.
    pub fn ended(&mut self) -> Outcome<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// The kernel's.
    pub fn wait(&mut self) -> Outcome<ExitStatus> {
        Ok(self.child.wait()?)
    }

    /// Kills it with SIGKILL and waits until it is gone.
    ///
    /// # Errors
    /// The kernel's.
    pub fn kill(&mut self) -> Outcome<ExitStatus> {
        self.child.kill()?;
        Ok(self.child.wait()?)
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

/// The daemon that was built with the feature `failpoints`.
///
/// # Errors
/// When the environment does not name it.
pub fn failpoints_binary() -> Outcome<PathBuf> {
    let path = env::var_os(FAILPOINTS_BIN).map(PathBuf::from);
    path.filter(|path| path.is_file()).ok_or_else(|| {
        format!(
            "{FAILPOINTS_BIN} has to name a daemon that was built with `cargo build -p vublk \
             --features failpoints`; ci/test.sh failpoints does"
        )
        .into()
    })
}
