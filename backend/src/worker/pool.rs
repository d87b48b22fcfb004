//! All workers, as the control thread sees them.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Builder, JoinHandle};

use blockdev::{Engine, OpenError, RingError};
use iov_iter::MemoryTable;
use log::{error, warn};
use rustix::thread::{CpuSet, sched_setaffinity};
use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::attachment::Share;
use super::helper::Helper;
use super::idle::{Idle, PollMode};
use super::pins::{self, Pinner};
use super::run::{Wire, Worker};
use super::{Command, DeviceId, Errand, Report, TableEpoch, VringId};
use crate::blk::BlkDevice;
use crate::limits::MAX_WORKERS;

/// How many workers there are, where they run and how they do I/O.
#[derive(Clone, Debug)]
pub struct WorkersConfig {
    /// The number of workers.
    pub workers: usize,
    /// The CPUs they are bound to, in turn; none leaves it to the scheduler.
    pub cpus: Vec<usize>,
    /// How they do I/O.
    pub engine: Engine,
    /// How they wait for work.
    pub poll: PollMode,
}

/// Why the workers do not run.
#[derive(Debug, Error)]
pub enum WorkerError {
    /// A number that makes no sense.
    #[error("{0} workers: between 1 and {MAX_WORKERS}")]
    Count(usize),
    /// A thread cannot be started.
    #[error("a worker's thread cannot be started")]
    Thread(#[source] io::Error),
    /// An eventfd cannot be made or watched.
    #[error("a worker's eventfd cannot be used")]
    Watch(#[source] io::Error),
    /// The ring cannot be made.
    #[error("a worker's ring cannot be made; --engine threads needs none")]
    Ring(#[source] RingError),
    /// A device does not open.
    #[error("{name} cannot be opened by a worker")]
    Open {
        /// The device.
        name: String,
        /// Why.
        source: OpenError,
    },
    /// The CPU does not exist, or may not be used.
    #[error("a worker cannot be bound to CPU {cpu}; see --cpus")]
    Affinity {
        /// The CPU.
        cpu: usize,
        /// Why.
        source: io::Error,
    },
    /// The thread ended before it said how it started.
    #[error("a worker ended before it served")]
    Died,
}

/// The handles of all workers. Dropping them without [`join`](Self::join) tells the workers to
/// leave and does not wait for them.
#[derive(Debug)]
pub struct Workers {
    handles: Vec<Handle>,
    helpers: Vec<Helper>,
    /// By device; none for those whose memory is not pinned.
    pinners: Vec<Option<Pinner>>,
    reports: Receiver<(usize, Report)>,
    told: Arc<EventFd>,
}

#[derive(Debug)]
struct Handle {
    commands: Sender<Command>,
    wake: Arc<EventFd>,
    thread: JoinHandle<()>,
}

impl Workers {
    /// Starts the workers and opens every device on each of them.
    ///
    /// # Errors
    /// The first thing that failed on any of them; the others have left by then.
    pub fn spawn(
        config: &WorkersConfig,
        devices: &[Arc<BlkDevice>],
    ) -> Result<Workers, WorkerError> {
        if !(1..=MAX_WORKERS).contains(&config.workers) {
            return Err(WorkerError::Count(config.workers));
        }
        let (tell, reports) = channel();
        let told = Arc::new(event()?);
        let mut workers = Workers {
            handles: Vec::new(),
            helpers: Vec::new(),
            pinners: Vec::new(),
            reports,
            told: told.clone(),
        };
        for (place, device) in devices.iter().enumerate() {
            let buffers = pins::prepare(devices, place, config.engine);
            let start =
                |buffers| Pinner::start(device.clone(), buffers, tell.clone(), told.clone());
            workers.pinners.push(buffers.map(start).transpose()?);
        }
        for worker in 0..config.workers {
            let share = Share {
                worker,
                of: config.workers,
            };
            let cpu = config.cpus.get(worker % config.cpus.len().max(1)).copied();
            let (commands, inbox) = channel();
            let wake = Arc::new(event()?);
            let wire = Wire {
                commands: inbox,
                wake: wake.clone(),
                reports: tell.clone(),
                told: told.clone(),
            };
            let thread = start(config, share, cpu, devices.to_vec(), wire)?;
            workers.handles.push(Handle {
                commands,
                wake,
                thread,
            });
        }
        for device in devices {
            let helper = Helper::start(device.clone(), tell.clone(), told.clone())?;
            workers.helpers.push(helper);
        }
        Ok(workers)
    }

    /// The number of workers.
    #[must_use]
    pub fn count(&self) -> usize {
        self.handles.len()
    }

    /// The worker that owns a vring.
    #[must_use]
    pub fn owner(&self, id: VringId) -> usize {
        usize::from(id.index) % self.handles.len()
    }

    /// Sends a command to one worker.
    pub fn send(&self, worker: usize, command: Command) {
        let Some(handle) = self.handles.get(worker) else {
            return;
        };
        if handle.commands.send(command).is_err() {
            error!("worker {worker} is gone");
            return;
        }
        if let Err(error) = handle.wake.write(1) {
            warn!("worker {worker} could not be woken: {error}");
        }
    }

    /// Sends a command to the worker that owns a vring.
    pub fn send_to_owner(&self, id: VringId, command: Command) {
        self.send(self.owner(id), command);
    }

    /// Sends a device's helper thread on an errand.
    pub fn errand(&self, device: DeviceId, errand: Errand) {
        if let Some(helper) = self.helpers.get(device.0 as usize) {
            helper.send(errand);
        }
    }

    /// Has a device's guest memory registered: all of this table and nothing else. No worker has
    /// requests on, or slots of, anything else. Reported by [`super::Outcome::Unpinned`] when what
    /// is not in it was given back, and [`super::Outcome::Pinned`] whenever there is more to share.
    pub fn pin(&self, device: DeviceId, epoch: TableEpoch, table: Arc<MemoryTable>) {
        if let Some(Some(pinner)) = self.pinners.get(device.0 as usize) {
            pinner.turn_to(epoch, table);
        }
    }

    /// Sends every worker the command that `command` makes for it.
    pub fn send_all(&self, command: impl Fn(usize) -> Command) {
        for worker in 0..self.count() {
            self.send(worker, command(worker));
        }
    }

    /// Readable when there are reports.
    #[must_use]
    pub fn event(&self) -> &EventFd {
        &self.told
    }

    /// Takes the reports that have come, with the worker each is from.
    #[must_use]
    pub fn reports(&self) -> Vec<(usize, Report)> {
        // Empty when somebody took the reports before their eventfd was seen: nothing is lost.
        let _ = self.told.read();
        self.reports.try_iter().collect()
    }

    /// Tells every worker to leave and waits until they did.
    pub fn join(mut self) {
        self.send_all(|_| Command::Quit);
        for (worker, handle) in std::mem::take(&mut self.handles).into_iter().enumerate() {
            if handle.thread.join().is_err() {
                error!("worker {worker} panicked");
            }
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.send_all(|_| Command::Quit);
    }
}

fn event() -> Result<EventFd, WorkerError> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(WorkerError::Watch)
}

/// Starts a thread and waits until its worker is ready, or says why it is not.
fn start(
    config: &WorkersConfig,
    share: Share,
    cpu: Option<usize>,
    devices: Vec<Arc<BlkDevice>>,
    wire: Wire,
) -> Result<JoinHandle<()>, WorkerError> {
    let (ready, outcome) = channel();
    let (engine, idle) = (config.engine, Idle::new(config.poll));
    let thread = Builder::new()
        .name(format!("worker-{}", share.worker))
        .spawn(move || {
            let made = bind(cpu).and_then(|()| Worker::new(engine, idle, share, &devices, wire));
            match made {
                Ok(worker) => {
                    let _ = ready.send(Ok(()));
                    worker.run();
                }
                Err(error) => {
                    let _ = ready.send(Err(error));
                }
            }
        })
        .map_err(WorkerError::Thread)?;
    outcome.recv().unwrap_or(Err(WorkerError::Died))?;
    Ok(thread)
}

fn bind(cpu: Option<usize>) -> Result<(), WorkerError> {
    let Some(cpu) = cpu else { return Ok(()) };
    let mut set = CpuSet::new();
    if cpu >= CpuSet::MAX_CPU {
        let source = io::Error::from(io::ErrorKind::InvalidInput);
        return Err(WorkerError::Affinity { cpu, source });
    }
    set.set(cpu);
    sched_setaffinity(None, &set).map_err(|errno| WorkerError::Affinity {
        cpu,
        source: errno.into(),
    })
}
