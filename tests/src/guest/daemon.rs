//! The daemons that can stand behind a guest's disk.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use super::process::{POLL, Process};
use super::{GuestError, Scratch};

const START_LIMIT: Duration = Duration::from_secs(60);
const STOP_LIMIT: Duration = Duration::from_secs(120);
const CHOICE: &str = "VUBLK_GUEST_DAEMON";
/// What qemu-storage-daemon answers to GET_ID; it has no option for it.
const STORAGE_DAEMON_SERIAL: &str = "vhost_user_blk";

/// Which program serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DaemonKind {
    /// The binary of this workspace.
    Vublk,
    /// QEMU's own vhost-user-blk export, as a control.
    QemuStorageDaemon,
}

impl DaemonKind {
    /// The kind that `VUBLK_GUEST_DAEMON` names, vublk when it is not set.
    ///
    /// # Errors
    /// `Environment` when it names no kind.
    pub fn from_env() -> Result<Self, GuestError> {
        match env::var(CHOICE).as_deref() {
            Err(_) | Ok("vublk") => Ok(Self::Vublk),
            Ok("qemu-storage-daemon") => Ok(Self::QemuStorageDaemon),
            Ok(value) => Err(GuestError::Environment {
                name: CHOICE,
                value: value.to_owned(),
                expected: "vublk or qemu-storage-daemon",
            }),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Vublk => "vublk",
            Self::QemuStorageDaemon => "qemu-storage-daemon",
        }
    }
}

/// What the daemon moves the data with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// One io_uring a worker.
    IoUring,
    /// A pool of threads.
    Threads,
}

impl Engine {
    fn name(self) -> &'static str {
        match self {
            Self::IoUring => "io_uring",
            Self::Threads => "threads",
        }
    }
}

/// What holds the blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Storage {
    /// A regular file or a block special.
    File(PathBuf),
    /// Memory of the daemon, in bytes. Only vublk has it.
    Memory(u64),
    /// A device of so many bytes that stores nothing.
    Null(u64),
}

/// How a daemon is to be started. Options that are not set are left to the daemon.
#[derive(Debug, Clone)]
pub struct DaemonSpec {
    kind: Option<DaemonKind>,
    storage: Storage,
    queues: u16,
    workers: Option<u16>,
    read_only: bool,
    serial: Option<String>,
    block_size: Option<u32>,
    direct: Option<bool>,
    engine: Option<Engine>,
}

impl DaemonSpec {
    /// A daemon that serves the file at `path`.
    #[must_use]
    pub fn file(path: &Path) -> Self {
        Self::new(Storage::File(path.to_owned()))
    }

    /// A daemon with one queue that serves `storage`.
    #[must_use]
    pub fn new(storage: Storage) -> Self {
        Self {
            kind: None,
            storage,
            queues: 1,
            workers: None,
            read_only: false,
            serial: None,
            block_size: None,
            direct: None,
            engine: None,
        }
    }

    /// Which program serves, instead of what the environment says.
    #[must_use]
    pub fn kind(mut self, kind: DaemonKind) -> Self {
        self.kind = Some(kind);
        self
    }

    /// The number of request queues offered.
    #[must_use]
    pub fn queues(mut self, queues: u16) -> Self {
        self.queues = queues;
        self
    }

    /// The number of worker threads; qemu-storage-daemon has always one.
    #[must_use]
    pub fn workers(mut self, workers: u16) -> Self {
        self.workers = Some(workers);
        self
    }

    /// Serves the device read-only.
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.read_only = true;
        self
    }

    /// What GET_ID answers.
    #[must_use]
    pub fn serial(mut self, serial: &str) -> Self {
        self.serial = Some(serial.to_owned());
        self
    }

    /// The logical block size, in bytes.
    #[must_use]
    pub fn block_size(mut self, bytes: u32) -> Self {
        self.block_size = Some(bytes);
        self
    }

    /// O_DIRECT or the page cache.
    #[must_use]
    pub fn direct(mut self, direct: bool) -> Self {
        self.direct = Some(direct);
        self
    }

    /// What moves the data.
    #[must_use]
    pub fn engine(mut self, engine: Engine) -> Self {
        self.engine = Some(engine);
        self
    }

    /// Starts the daemon and waits until it listens.
    ///
    /// # Errors
    /// `NoBinary`, `Unsupported`, `Environment`; `Ended` and `TimedOut` with the daemon's output
    /// when it does not come to listen.
    pub fn start(&self, scratch: &Scratch) -> Result<Daemon, GuestError> {
        let kind = self.kind.map_or_else(DaemonKind::from_env, Ok)?;
        let name = scratch.unique("daemon");
        let socket = scratch.socket(&name);
        let command = match kind {
            DaemonKind::Vublk => self.vublk(&socket)?,
            DaemonKind::QemuStorageDaemon => self.storage_daemon(&socket)?,
        };
        let process = Process::start(command, scratch.file(&format!("{name}.log")))?;
        let mut daemon = Daemon {
            kind,
            process,
            socket,
            spec: self.clone(),
            has_ended: false,
        };
        daemon.wait_listening()?;
        Ok(daemon)
    }

    fn vublk(&self, socket: &Path) -> Result<Command, GuestError> {
        let mut command = Command::new(vublk_path()?);
        command.env(
            "RUST_LOG",
            env::var_os("RUST_LOG").unwrap_or_else(|| "info".into()),
        );
        command.arg(joined("--socket-path=", socket));
        match &self.storage {
            Storage::File(path) => command.arg(joined("--blk-file=", path)),
            Storage::Memory(size) => command.args(["--memory", &size.to_string()]),
            Storage::Null(size) => command.args(["--null", &size.to_string()]),
        };
        command.args(["--num-queues", &self.queues.to_string()]);
        if let Some(workers) = self.workers {
            command.args(["--workers", &workers.to_string()]);
        }
        if self.read_only {
            command.arg("--read-only");
        }
        if let Some(serial) = &self.serial {
            command.args(["--serial", serial]);
        }
        if let Some(bytes) = self.block_size {
            command.args(["--block-size", &bytes.to_string()]);
        }
        if let Some(direct) = self.direct {
            command.args(["--direct", on_off(direct)]);
        }
        if let Some(engine) = self.engine {
            command.args(["--engine", engine.name()]);
        }
        Ok(command)
    }

    fn storage_daemon(&self, socket: &Path) -> Result<Command, GuestError> {
        let mut node = match &self.storage {
            Storage::File(path) => {
                let engine = self.engine.unwrap_or(Engine::IoUring).name();
                let file = joined("driver=file,filename=", path);
                let mut node = file;
                node.push(format!(",aio={engine},cache.direct="));
                node.push(on_off(self.direct.unwrap_or(false)));
                node
            }
            Storage::Null(size) => format!("driver=null-co,size={size}").into(),
            Storage::Memory(size) => {
                let daemon = DaemonKind::QemuStorageDaemon.name();
                let what = format!("{size} bytes of its own memory");
                return Err(GuestError::Unsupported { daemon, what });
            }
        };
        let read_only = on_off(self.read_only);
        node.push(format!(
            ",node-name=disk,discard=unmap,read-only={read_only}"
        ));
        let mut export = joined(
            "type=vhost-user-blk,id=disk,addr.type=unix,addr.path=",
            socket,
        );
        let writable = on_off(!self.read_only);
        let queues = self.queues;
        export.push(format!(
            ",node-name=disk,writable={writable},num-queues={queues}"
        ));
        if let Some(bytes) = self.block_size {
            export.push(format!(",logical-block-size={bytes}"));
        }
        let mut command = Command::new("qemu-storage-daemon");
        command
            .arg("--blockdev")
            .arg(node)
            .arg("--export")
            .arg(export);
        Ok(command)
    }
}

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

/// `VUBLK_BIN`, or the release or else the debug binary of the target folder the test runs from.
///
/// # Errors
/// `NoBinary` when there is none.
pub fn vublk_path() -> Result<PathBuf, GuestError> {
    if let Some(path) = env::var_os("VUBLK_BIN") {
        let path = PathBuf::from(path);
        return if path.is_file() {
            Ok(path)
        } else {
            Err(GuestError::NoBinary { path })
        };
    }
    // Test executables stand in <target>/<profile>/deps, other binaries in <target>/<profile>.
    let this = env::current_exe().map_err(GuestError::host("find the test executable"))?;
    let profile = this
        .ancestors()
        .skip(1)
        .find(|folder| !folder.ends_with("deps"));
    let target = profile
        .and_then(Path::parent)
        .unwrap_or(Path::new("target"));
    let [release, debug] = ["release", "debug"].map(|name| target.join(name).join("vublk"));
    [release, debug.clone()]
        .into_iter()
        .find(|path| path.is_file())
        .ok_or(GuestError::NoBinary { path: debug })
}

fn joined(prefix: &str, path: &Path) -> OsString {
    let mut text = OsString::from(prefix);
    text.push(path);
    text
}

pub(super) fn on_off(on: bool) -> &'static str {
    if on { "on" } else { "off" }
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
