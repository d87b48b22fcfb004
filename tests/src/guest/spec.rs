//! How a daemon is to be started.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Daemon, GuestError, Scratch};
use crate::frontend::extra_args;

const CHOICE: &str = "VUBLK_GUEST_DAEMON";
const FAILPOINTS: &str = "VUBLK_FAILPOINTS_BIN";

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

    pub(super) fn name(self) -> &'static str {
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
    pub(super) queues: u16,
    workers: Option<u16>,
    read_only: bool,
    pub(super) serial: Option<String>,
    block_size: Option<u32>,
    direct: Option<bool>,
    engine: Option<Engine>,
    is_pinned: bool,
    debug_log: bool,
    binary: Option<PathBuf>,
    failpoints: Option<String>,
    options: Vec<[String; 2]>,
    under: Vec<String>,
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
            is_pinned: false,
            debug_log: false,
            binary: None,
            failpoints: None,
            options: Vec::new(),
            under: Vec::new(),
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

    /// Pins the guest's memory.
    #[must_use]
    pub fn pinned(mut self) -> Self {
        self.is_pinned = true;
        self
    }

    /// Whether the guest's memory is pinned.
    #[must_use]
    pub fn is_pinned(&self) -> bool {
        self.is_pinned
    }

    /// Logs every message it receives.
    #[must_use]
    pub fn debug_log(mut self) -> Self {
        self.debug_log = true;
        self
    }

    /// A binary of vublk that has its feature `failpoints`, and which of them are to act.
    #[must_use]
    pub fn failpoints(mut self, binary: &Path, failpoints: &str) -> Self {
        self.binary = Some(binary.to_owned());
        self.failpoints = Some(failpoints.to_owned());
        self
    }

    /// One more option, which only vublk has.
    #[must_use]
    pub fn option(mut self, name: &str, value: &str) -> Self {
        self.options.push([name, value].map(str::to_owned));
        self
    }

    /// Runs vublk under another program, given with its own arguments.
    #[must_use]
    pub fn under(mut self, program: &[&str]) -> Self {
        self.under = program.iter().copied().map(str::to_owned).collect();
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
        self.start_at(
            &scratch.socket(&name),
            kind,
            scratch.file(&format!("{name}.log")),
        )
    }

    /// Starts the daemon at a socket of the caller's choice.
    pub(super) fn start_at(
        &self,
        socket: &Path,
        kind: DaemonKind,
        log: PathBuf,
    ) -> Result<Daemon, GuestError> {
        let command = match kind {
            DaemonKind::Vublk => self.vublk(socket)?,
            DaemonKind::QemuStorageDaemon => self.storage_daemon(socket)?,
        };
        Daemon::start(self.clone(), kind, command, socket, log)
    }

    fn vublk(&self, socket: &Path) -> Result<Command, GuestError> {
        let binary = match &self.binary {
            Some(binary) => binary.clone(),
            None => vublk_path()?,
        };
        let mut command = match self.under.split_first() {
            None => Command::new(binary),
            Some((program, arguments)) => {
                let mut command = Command::new(program);
                command.args(arguments).arg(binary);
                command
            }
        };
        let level = if self.debug_log { "debug" } else { "info" };
        let asked = env::var_os("RUST_LOG").filter(|_| !self.debug_log);
        command.env("RUST_LOG", asked.unwrap_or_else(|| level.into()));
        if let Some(failpoints) = &self.failpoints {
            command.env("FAILPOINTS", failpoints);
        }
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
        if self.is_pinned {
            command.arg("--pin=registered");
        }
        command.args(self.options.iter().flatten());
        let given: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
        command.args(extra_args(&given));
        Ok(command)
    }

    fn storage_daemon(&self, socket: &Path) -> Result<Command, GuestError> {
        let mut node = match &self.storage {
            Storage::File(path) => {
                let engine = self.engine.unwrap_or(Engine::IoUring).name();
                let file = joined("driver=file,filename=", path);
                let mut node = file;
                node.push(format!(",aio={engine},locking=off,cache.direct="));
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

/// The binary of vublk that `VUBLK_FAILPOINTS_BIN` names, built with its feature `failpoints`.
///
/// # Errors
/// `Environment` when the variable is not set, `NoBinary` when there is no such file.
pub fn failpoints_path() -> Result<PathBuf, GuestError> {
    let path = env::var_os(FAILPOINTS).ok_or_else(|| GuestError::Environment {
        name: FAILPOINTS,
        value: String::new(),
        expected: "vublk built with --features failpoints",
    })?;
    let path = PathBuf::from(path);
    if path.is_file() {
        Ok(path)
    } else {
        Err(GuestError::NoBinary { path })
    }
}

fn joined(prefix: &str, path: &Path) -> OsString {
    let mut text = OsString::from(prefix);
    text.push(path);
    text
}

pub(super) fn on_off(on: bool) -> &'static str {
    if on { "on" } else { "off" }
}
