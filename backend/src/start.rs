//! From the command line to a daemon that is ready to serve.

use std::env;
use std::fmt::Write;
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::available_parallelism;
use std::time::Duration;

use blockdev::{Access, BlockDevice, Direct, Engine, FileOptions, OpenError, Ring};
use log::{info, warn};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use thiserror::Error;

use crate::blk::{BlkDevice, BlkOptions, BlkOptionsError};
use crate::cli::{Args, DEFAULT_MEMORY, DEFAULT_SOCKET, EngineName, PinName, Size, Switch};
use crate::control::{Control, ControlError, Listen, Signals};
use crate::fds::adopt;
use crate::limits::{MAX_VRINGS, MAX_WORKERS};
use crate::worker::{DeviceId, WorkerError, Workers, WorkersConfig};

/// The block size of devices that have none of their own, in bytes.
const DEFAULT_BLOCK_SIZE: u32 = 512;

/// Why the daemon cannot start.
#[derive(Debug, Error)]
pub enum StartError {
    /// The storage does not open.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The options make no device.
    #[error(transparent)]
    Options(#[from] BlkOptionsError),
    /// The workers do not run.
    #[error(transparent)]
    Worker(#[from] WorkerError),
    /// The socket cannot be served.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// Signals cannot be waited for.
    #[error("signals cannot be waited for")]
    Signals(#[source] io::Error),
    /// `--fd` names no open descriptor, or one of the standard ones.
    #[error("--fd={fd}: hand over an open socket with a number of 3 or more")]
    Fd {
        /// The descriptor.
        fd: RawFd,
        /// Why.
        source: io::Error,
    },
}

/// A daemon that is ready to serve.
#[derive(Debug)]
pub struct Start {
    /// What serves it.
    pub control: Control,
    /// What the user does next; none where the socket was handed over.
    pub advice: Option<String>,
}

impl Start {
    /// Opens everything the options name.
    ///
    /// # Errors
    /// The first thing that cannot be had; what was opened is closed again.
    pub fn new(args: &Args) -> Result<Start, StartError> {
        // Before anything is opened that could get the number of an inherited socket.
        let inherited = args.fd.map(inherit).transpose()?;
        // Every vring has three eventfds and every region of guest memory a file, which is more
        // than the usual soft limit of 1024.
        raise_limit(Resource::Nofile, "open files");
        if args.pin == PinName::Registered {
            raise_limit(Resource::Memlock, "locked memory");
        }
        // Threads inherit what is blocked, so this comes before the first of them.
        let signals = Signals::block().map_err(StartError::Signals)?;
        let storage = storage(args)?;
        let cpus = available_parallelism().map_or(1, usize::from);
        let num_queues = args.num_queues.unwrap_or_else(|| at_most(cpus, MAX_VRINGS));
        let workers = args
            .workers
            .map_or(cpus.min(num_queues.into()), usize::from);
        let options = BlkOptions {
            serial: args.serial.clone(),
            num_queues,
        };
        let device = BlkDevice::new(DeviceId(0), storage, &options)?;
        let lock_timeout = Duration::from_secs(args.lock_timeout);
        let device = device.with_lock_timeout(lock_timeout);
        let device = Arc::new(device.with_pin(args.pin.into()));
        let config = WorkersConfig {
            workers: workers.min(MAX_WORKERS),
            cpus: args.cpus.clone().map_or(Vec::new(), |list| list.0),
            engine: engine(args.engine),
            poll: args.poll.into(),
        };
        let (listen, advice) = match inherited {
            Some(socket) => (Listen::Fd(socket), None),
            None => listen(args, num_queues),
        };
        let crew = Workers::spawn(&config, std::slice::from_ref(&device))?;
        info!(
            "{}: {} sectors, {} queues, {} workers, {}",
            device.name(),
            device.profile().capacity.0,
            num_queues,
            config.workers,
            config.engine,
        );
        let control = Control::new(
            vec![(listen, device)],
            crew,
            Some(signals),
            Some(Duration::from_secs(args.drain_timeout)),
        )?;
        Ok(Start { control, advice })
    }
}

fn storage(args: &Args) -> Result<Arc<dyn BlockDevice>, OpenError> {
    let block_size = args.block_size.unwrap_or(DEFAULT_BLOCK_SIZE);
    if let Some(path) = &args.blk_file {
        let options = FileOptions {
            access: if args.read_only {
                Access::ReadOnly
            } else {
                Access::ReadWrite
            },
            direct: match args.direct {
                Switch::On => Direct::On,
                Switch::Off => Direct::Off,
            },
            block_size: args.block_size,
        };
        blockdev::open::file(path, options)
    } else if let Some(Size(size)) = args.null {
        blockdev::open::null(size, block_size)
    } else {
        blockdev::open::memory(
            args.memory.map_or(DEFAULT_MEMORY, |size| size.0),
            block_size,
        )
    }
}

/// The engine that was asked for, or the best that the host has.
fn engine(name: Option<EngineName>) -> Engine {
    match name {
        Some(EngineName::IoUring) => Engine::IoUring,
        Some(EngineName::Threads) => Engine::Threads,
        None => match Ring::new(Engine::IoUring) {
            Ok(_ring) => Engine::IoUring,
            Err(error) => {
                warn!("{error}: I/O is done by threads, which is slower");
                Engine::Threads
            }
        },
    }
}

/// Allows as much as the host does.
fn raise_limit(resource: Resource, what: &str) {
    let limit = getrlimit(resource);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if let Err(error) = setrlimit(resource, raised) {
        warn!(
            "the limit of {what} cannot be raised, it stays {:?}: {error}",
            limit.current
        );
    }
}

fn inherit(fd: RawFd) -> Result<OwnedFd, StartError> {
    adopt(fd).map_err(|source| StartError::Fd { fd, source })
}

fn listen(args: &Args, num_queues: u16) -> (Listen, Option<String>) {
    let path = args
        .socket_path
        .clone()
        .unwrap_or_else(|| PathBuf::from(DEFAULT_SOCKET));
    let advice = advice(&path, num_queues);
    (Listen::Path(path), Some(advice))
}

/// The lines to give QEMU and Cloud Hypervisor.
fn advice(socket: &Path, num_queues: u16) -> String {
    let socket = env::current_dir().map_or(socket.to_owned(), |here| here.join(socket));
    let socket = socket.components().collect::<PathBuf>();
    let socket = socket.display();
    let mut text = format!("Serving on {socket}\n");
    // Writing to a string cannot fail.
    let _ = write!(
        text,
        "
QEMU: add to the command line (the guest's memory has to be shared)
  -object memory-backend-memfd,id=mem,size=1G,share=on -m 1G -machine q35,memory-backend=mem \\
  -chardev socket,id=vublk,path={socket} \\
  -device vhost-user-blk-pci,chardev=vublk,num-queues={num_queues}

Cloud Hypervisor: add to the command line
  --memory size=1G,shared=on \\
  --disk vhost_user=true,socket={socket},num_queues={num_queues},queue_size=256
"
    );
    text
}

fn at_most(value: usize, limit: u16) -> u16 {
    u16::try_from(value).map_or(limit, |value| value.min(limit))
}
