//! The daemon as a process that can be killed.

use std::env;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::{Outcome, Peer};

/// Every step of a chain's life, in the order they come, as the daemon's failpoints name them.
pub const STEPS: [&str; 10] = [
    "entered",
    "landed",
    "marked",
    "element-written",
    "linked",
    "element-marked",
    "index-published",
    "index-marked",
    "cleared",
    "closed",
];

/// Names the daemon that was built with the feature `failpoints`.
const FAILPOINTS_BIN: &str = "VUBLK_FAILPOINTS_BIN";

/// How long a line of the log may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// A running daemon; killed when it is dropped.
#[derive(Debug)]
pub struct Program {
    child: Child,
    socket: PathBuf,
    log: PathBuf,
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
        let output = File::options().create(true).append(true).open(log)?;
        let mut option = std::ffi::OsString::from("--socket-path=");
        option.push(socket);
        let child = Command::new(binary)
            .arg(option)
            .args(args)
            .args(extra_args(args))
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(output)
            .spawn()?;
        Ok(Program {
            child,
            socket: socket.to_owned(),
            log: log.to_owned(),
        })
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
            thread::yield_now();
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

    /// Waits for its end, which is to come by itself; how it was.
    ///
    /// # Errors
    /// When it does not come for a long time.
    pub fn leaves(&mut self) -> Outcome<ExitStatus> {
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE {
            if let Some(status) = self.ended()? {
                return Ok(status);
            }
            thread::sleep(Duration::from_millis(5));
        }
        Err(format!("it does not leave: {}", self.logged()?).into())
    }

    /// Kills it with SIGKILL and waits until it is gone.
    ///
    /// # Errors
    /// The kernel's.
    pub fn kill(&mut self) -> Outcome<ExitStatus> {
        self.child.kill()?;
        Ok(self.child.wait()?)
    }

    /// Sends it a signal. SIGKILL may leave threads behind that hang in the kernel.
    ///
    /// # Errors
    /// The kernel's.
    pub fn signal(&self, signal: Signal) -> Outcome {
        Ok(kill_process(Pid::from_child(&self.child), signal)?)
    }

    /// What it has logged so far.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn logged(&self) -> Outcome<String> {
        Ok(fs::read_to_string(&self.log)?)
    }

    /// Waits until its log has a line with both of these; the line.
    ///
    /// # Errors
    /// When it ends, or goes on for a long time, without.
    pub fn says(&mut self, one: &str, other: &str) -> Outcome<String> {
        let begun = Instant::now();
        loop {
            let ended = self.ended()?;
            let log = self.logged()?;
            let mut lines = log.lines();
            if let Some(line) = lines.find(|line| line.contains(one) && line.contains(other)) {
                return Ok(line.to_owned());
            }
            if ended.is_some() || begun.elapsed() > PATIENCE {
                return Err(format!("no line with '{one}' and '{other}' in: {log}").into());
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until it says that it waits for the lock on its image, which `peer` has asked it to
    /// start on.
    ///
    /// # Errors
    /// When it answers `peer` instead, or does neither for a long time.
    pub fn waits_for_lock(&mut self, peer: &Peer) -> Outcome {
        let begun = Instant::now();
        while !self.logged()?.contains("waiting for its lock") {
            // It may have waited, said so and been answered since the last look.
            if !peer.is_quiet()? && !self.logged()?.contains("waiting for its lock") {
                return Err("it did not wait for the lock".into());
            }
            if begun.elapsed() > PATIENCE {
                return Err("it does not say that it waits for the lock".into());
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// The states of its threads, by the letters of proc(5); none when it is gone.
    #[must_use]
    pub fn thread_states(&self) -> Vec<char> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.id()));
        let state = |task: io::Result<fs::DirEntry>| {
            // Threads come and go meanwhile.
            let stat = fs::read_to_string(task.ok()?.path().join("stat")).ok()?;
            stat.rsplit_once(") ")?.1.chars().next()
        };
        tasks
            .map(|tasks| tasks.filter_map(state).collect())
            .unwrap_or_default()
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

/// Options that every daemon of a test run gets beside its own, from VUBLK_DAEMON_ARGS: a suite is
/// run once more with `--poll=always`, say. An option that a test gives itself stays as it is.
#[must_use]
pub fn extra_args<S: AsRef<OsStr>>(given: &[S]) -> Vec<String> {
    let name = |arg: &str| arg.split('=').next().unwrap_or(arg).to_owned();
    let given: Vec<_> = given
        .iter()
        .map(|arg| name(&arg.as_ref().to_string_lossy()))
        .collect();
    let extra = env::var("VUBLK_DAEMON_ARGS").unwrap_or_default();
    let extra = extra.split_whitespace();
    extra
        .filter(|arg| !given.contains(&name(arg)))
        .map(str::to_owned)
        .collect()
}
