//! The daemon, on a thread of this process.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::{Builder, JoinHandle};

use blockdev::{BlockDevice, Engine, open};
use clap::Parser;
use vublk::blk::{BlkDevice, BlkOptions, Pin};
use vublk::cli::{Args, EngineName};
use vublk::control::{Control, ControlError, Listen, StopHandle};
use vublk::worker::{DeviceId, PollMode, Workers, WorkersConfig};

use super::{Outcome, Peer, extra_args};

/// How the daemon is started.
#[derive(Clone, Debug)]
pub struct Options {
    /// What stores its blocks; none means 4 MiB of memory.
    pub storage: Option<Arc<dyn BlockDevice>>,
    /// Its workers.
    pub workers: usize,
    /// How they do I/O.
    pub engine: Engine,
    /// How they wait for work.
    pub poll: PollMode,
    /// Whether guest memory is pinned.
    pub pin: Pin,
}

impl Default for Options {
    /// As VUBLK_DAEMON_ARGS says it, where it says anything.
    fn default() -> Options {
        let args = Args::parse_from(["vublk".to_owned()].into_iter().chain(extra_args(&[""; 0])));
        Options {
            storage: None,
            workers: 2,
            engine: match args.engine {
                None | Some(EngineName::IoUring) => Engine::IoUring,
                Some(EngineName::Threads) => Engine::Threads,
            },
            poll: args.poll.into(),
            pin: args.pin.into(),
        }
    }
}

impl Options {
    /// The device that is served.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn device(&self) -> Outcome<Arc<BlkDevice>> {
        let storage = match &self.storage {
            Some(storage) => storage.clone(),
            None => open::memory(4 << 20, 512)?,
        };
        let blk = BlkOptions {
            serial: "vublk-test".into(),
            num_queues: 4,
        };
        let device = BlkDevice::new(DeviceId(0), storage, &blk)?;
        Ok(Arc::new(device.with_pin(self.pin)))
    }
}

/// The daemon, serving a path of its own or a connected socket.
#[derive(Debug)]
pub struct Served {
    path: PathBuf,
    device: Arc<BlkDevice>,
    stop: StopHandle,
    thread: JoinHandle<Result<(), ControlError>>,
}

impl Served {
    /// A daemon at a path nobody else uses.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start() -> Outcome<Served> {
        Served::start_with(&Options::default())
    }

    /// A daemon at a path nobody else uses.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start_with(options: &Options) -> Outcome<Served> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("vublk-{}-{count}.sock", std::process::id());
        let path = std::env::temp_dir().join(name);
        Served::listen(Listen::Path(path.clone()), path, options)
    }

    /// A daemon that was handed the other end of this front end's socket.
    ///
    /// # Errors
    /// When it does not start.
    pub fn connected(options: &Options) -> Outcome<(Served, Peer)> {
        let (theirs, ours) = UnixStream::pair()?;
        let served = Served::listen(Listen::Fd(theirs.into()), PathBuf::new(), options)?;
        Ok((served, Peer::new(ours)?))
    }

    /// A daemon with this socket.
    ///
    /// # Errors
    /// When it does not start.
    pub fn listen(listen: Listen, path: PathBuf, options: &Options) -> Outcome<Served> {
        let device = options.device()?;
        let config = WorkersConfig {
            workers: options.workers,
            cpus: Vec::new(),
            engine: options.engine,
            poll: options.poll,
        };
        let workers = Workers::spawn(&config, std::slice::from_ref(&device))?;
        let control = Control::new(vec![(listen, device.clone())], workers, None, None)?;
        let stop = control.stop_handle();
        let thread = Builder::new()
            .name("control".into())
            .spawn(move || control.run())?;
        Ok(Served {
            path,
            device,
            stop,
            thread,
        })
    }

    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The device it serves.
    #[must_use]
    pub fn device(&self) -> &Arc<BlkDevice> {
        &self.device
    }

    /// What stops it.
    #[must_use]
    pub fn stop_handle(&self) -> StopHandle {
        self.stop.clone()
    }

    /// A front end's socket.
    ///
    /// # Errors
    /// When it does not accept.
    pub fn connect(&self) -> Outcome<Peer> {
        Ok(Peer::connect(&self.path)?)
    }

    /// Drains it and waits until it left.
    ///
    /// # Errors
    /// When it failed.
    pub fn stop(self) -> Outcome {
        self.stop.stop()?;
        self.left()
    }

    /// Waits until it left by itself.
    ///
    /// # Errors
    /// When it failed.
    pub fn left(self) -> Outcome {
        let ran = self
            .thread
            .join()
            .map_err(|panic| format!("it panicked: {panic:?}"))?;
        Ok(ran?)
    }
}

/// The descriptors this process has open.
///
/// # Errors
/// When /proc is not there.
pub fn open_descriptors() -> Outcome<usize> {
    Ok(fs::read_dir("/proc/self/fd")?.count())
}
