//! A device under a rust-vmm daemon: [`vhost_user_backend::VhostUserBackend`] over the code that
//! carries out this daemon's own requests.
//!
//! The host owns connection, rings and threads; [`Hosted`] does the I/O. Each of the host's threads
//! has a lane: a [`blockdev::Ring`], a channel to the device, and the requests that the thread's
//! vrings have in flight. A kick wakes the lane through the host's own event loop, completions wake
//! it through a descriptor that [`Hosted::attach`] adds to that loop.
//!
//! What the host's trait lets a device do is done: a stop, a reset and a change of memory are
//! answered when nothing is in flight any more, and what the device writes to guest memory is
//! marked in the regions' bitmaps before its used element. What the trait has no place for is not
//! there: no in-flight tracking, no CONFIG_CHANGE, no err event, and of the log what the host makes
//! of it.
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use blockdev::open;
//! use vhost_user_backend::VhostUserDaemon;
//! use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
//! use vublk::blk::{BlkDevice, BlkOptions};
//! use vublk::hosted::{HostOptions, Hosted};
//! use vublk::worker::DeviceId;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let options = BlkOptions { serial: "hosted-0".into(), num_queues: 4 };
//! let device = BlkDevice::new(DeviceId(0), open::memory(64 << 20, 512)?, &options)?;
//! let hosted = Arc::new(Hosted::new(Arc::new(device), HostOptions::default())?);
//!
//! let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
//! let mut daemon = VhostUserDaemon::new("disk".into(), hosted.clone(), memory)
//!     .map_err(|error| error.to_string())?;
//! hosted.attach(&daemon)?;
//! daemon.serve("/run/disk.sock").map_err(|error| error.to_string())?;
//! # Ok(())
//! # }
//! ```

mod custody;
mod gate;
mod lane;
mod memory;

use std::cell::RefCell;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use blockdev::Engine;
use iov_iter::MemoryError;
use log::error;
use thiserror::Error;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::bitmap::BitmapMmapRegion;
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon, VringMutex};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

use self::custody::Custody;
use self::gate::{Answer, Ask, Gate};
use self::lane::Lane;
use super::attachment::Share;
use crate::blk::BlkDevice;
use crate::limits::MAX_VRING_SIZE;

/// Guest memory as the host maps it, with the bitmaps that its log is.
pub type Memory = GuestMemoryMmap<BitmapMmapRegion>;
/// A vring of the host's.
pub type Vring = VringMutex<GuestMemoryAtomic<Memory>>;

/// Queues a host can serve: its masks have that many bits.
const MAX_QUEUES: u16 = 64;

/// How a device is hosted.
#[derive(Clone, Copy, Debug)]
pub struct HostOptions {
    /// How the lanes do I/O.
    pub engine: Engine,
    /// Threads the host is to have; queue `i` belongs to thread `i % threads`.
    pub threads: usize,
}

impl Default for HostOptions {
    /// One thread over io_uring.
    fn default() -> HostOptions {
        HostOptions {
            engine: Engine::IoUring,
            threads: 1,
        }
    }
}

/// Why a device cannot be hosted, or not any longer.
#[derive(Debug, Error)]
pub enum HostError {
    /// The host has no masks for so many.
    #[error("{0} queues: a host serves {MAX_QUEUES} at most")]
    Queues(u16),
    /// A thread without a queue, or none at all.
    #[error("{threads} threads for {queues} queues")]
    Threads {
        /// Threads asked for.
        threads: usize,
        /// Queues of the device.
        queues: u16,
    },
    /// The kernel gives no descriptor for a thread's events.
    #[error("no events for a thread")]
    Events(#[source] io::Error),
    /// The host does not take a thread's events.
    #[error("the host does not listen to a thread's events")]
    Listen(#[source] io::Error),
    /// [`Hosted::attach`] was not called.
    #[error("the device is not attached to its host")]
    Detached,
    /// A thread cannot do I/O, or ended; the log says why.
    #[error("a thread of the host serves the device no more")]
    Gone,
    /// A region of guest memory has no file that could be mapped.
    #[error("the region at guest address {0:#x} has no file")]
    NoFile(u64),
    /// A region's descriptor cannot be duplicated.
    #[error("no descriptor for a region")]
    Duplicate(#[source] io::Error),
    /// A region cannot be mapped.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

impl From<HostError> for io::Error {
    fn from(error: HostError) -> io::Error {
        io::Error::other(error)
    }
}

/// A device for a rust-vmm daemon to host.
#[derive(Debug)]
pub struct Hosted {
    device: Arc<BlkDevice>,
    options: HostOptions,
    /// One for each thread.
    gates: Vec<Arc<Gate>>,
    custody: Arc<Custody>,
    attached: AtomicBool,
}

thread_local! {
    /// The lanes of this thread: one for each device that is hosted here.
    static LANES: RefCell<Vec<Lane>> = const { RefCell::new(Vec::new()) };
}

impl Hosted {
    /// A device that waits for its host.
    ///
    /// # Errors
    /// Options that no host can keep, or no descriptor left.
    pub fn new(device: Arc<BlkDevice>, options: HostOptions) -> Result<Hosted, HostError> {
        let queues = device.num_queues();
        if queues > MAX_QUEUES {
            return Err(HostError::Queues(queues));
        }
        let threads = options.threads;
        if !(1..=usize::from(queues)).contains(&threads) {
            return Err(HostError::Threads { threads, queues });
        }
        let gates: Result<_, _> = (0..threads).map(|_| Gate::new().map(Arc::new)).collect();
        Ok(Hosted {
            custody: Arc::new(Custody::new(device.clone())),
            device,
            options,
            gates: gates.map_err(HostError::Events)?,
            attached: AtomicBool::new(false),
        })
    }

    /// Has the daemon's threads serve completions, and waits until each of them can. Called once,
    /// before the daemon accepts a connection.
    ///
    /// # Errors
    /// A thread that cannot.
    pub fn attach(
        self: &Arc<Self>,
        daemon: &VhostUserDaemon<Arc<Hosted>>,
    ) -> Result<(), HostError> {
        let handlers = daemon.get_epoll_handlers();
        for (gate, handler) in self.gates.iter().zip(&handlers) {
            handler
                .register_listener(gate.as_raw_fd(), EventSet::IN, self.gate_event().into())
                .map_err(HostError::Listen)?;
        }
        self.attached.store(true, Ordering::Release);
        self.ask_all(|| Ask::Nothing)
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &Arc<BlkDevice> {
        &self.device
    }

    /// The number of the event that completions wake a thread by. Below it are the host's own:
    /// those of the vrings, and one to leave by.
    fn gate_event(&self) -> u16 {
        self.device.num_queues() + 1
    }

    /// Asks every thread, and waits until all have done it.
    fn ask_all(&self, ask: impl Fn() -> Ask) -> Result<(), HostError> {
        let asked: Result<Vec<Answer>, _> = self
            .gates
            .iter()
            .map(|gate| self.ask(gate, ask()))
            .collect();
        asked?.into_iter().try_for_each(Answer::wait)
    }

    fn ask(&self, gate: &Gate, ask: Ask) -> Result<Answer, HostError> {
        if self.attached.load(Ordering::Acquire) {
            gate.ask(ask)
        } else {
            Err(HostError::Detached)
        }
    }

    fn share(&self, thread: usize) -> Share {
        Share {
            worker: thread,
            of: self.options.threads,
        }
    }

    /// Does something with this thread's lane, which is made the first time.
    fn with_lane(
        &self,
        thread: usize,
        act: impl FnOnce(&mut Lane) -> io::Result<()>,
    ) -> io::Result<()> {
        let gate = self.gates.get(thread).ok_or(io::ErrorKind::InvalidInput)?;
        LANES.with_borrow_mut(|lanes| {
            if let Some(lane) = lanes.iter_mut().find(|lane| lane.is_behind(gate)) {
                return act(lane);
            }
            let made = Lane::new(
                self.device.clone(),
                self.options.engine,
                self.share(thread),
                gate.clone(),
                self.custody.clone(),
            );
            match made {
                Ok(lane) => lanes.push(lane),
                Err(error) => {
                    error!("{}: thread {thread}: {error}", self.device.name());
                    gate.close();
                    return Err(io::Error::other(error));
                }
            }
            lanes.last_mut().map_or(Ok(()), act)
        })
    }
}

impl VhostUserBackend for Hosted {
    type Bitmap = BitmapMmapRegion;
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        usize::from(self.device.num_queues())
    }

    fn max_queue_size(&self) -> usize {
        usize::from(MAX_VRING_SIZE)
    }

    fn features(&self) -> u64 {
        self.device.offered_features() | VhostUserVirtioFeatures::LOG_ALL.bits()
    }

    /// Returns when every thread goes by the new features, logging above all.
    fn acked_features(&self, features: u64) {
        if let Err(error) = self.ask_all(|| Ask::Features(features)) {
            error!("{}: {error}", self.device.name());
        }
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::LOG_SHMFD
    }

    /// Returns when nothing is in flight any more.
    fn reset_device(&self) {
        if let Err(error) = self.ask_all(|| Ask::Drain(None)) {
            error!("{}: {error}", self.device.name());
        }
        self.device.reset();
        self.acked_features(0);
    }

    /// The host's queues know it themselves.
    fn set_event_idx(&self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        self.device.read_config(offset, size).unwrap_or_default()
    }

    fn set_config(&self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        let written = self.device.write_config(offset, bytes);
        written.map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))
    }

    /// Returns when no request can touch the memory there was before. The host has unmapped it by
    /// then as far as it goes; the lanes have mappings of their own, over the same files, which
    /// stay until the last request that uses them came back.
    fn update_memory(&self, memory: GuestMemoryAtomic<Memory>) -> io::Result<()> {
        let memory = memory.memory().into_inner();
        let table = Arc::new(memory::table(&memory)?);
        Ok(self.ask_all(|| Ask::Memory {
            table: table.clone(),
            memory: memory.clone(),
        })?)
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        let threads = self.options.threads;
        let mask = |thread| {
            (thread..self.num_queues())
                .step_by(threads)
                .fold(0, |mask, queue| mask | 1 << queue)
        };
        (0..threads).map(mask).collect()
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC).ok()
    }

    /// Returns when nothing of the vring is in flight any more, and all of it was used and called
    /// for. With the last one the storage is given back.
    fn stop_vring(&self, index: u32) -> io::Result<()> {
        let index = u16::try_from(index).map_err(io::Error::other)?;
        let queue = usize::from(index);
        let threads = self.options.threads;
        let gate = self.gates.get(queue % threads);
        let gate = gate.ok_or(io::ErrorKind::InvalidInput)?;
        self.ask(gate, Ask::Drain(Some(queue / threads)))?.wait()?;
        self.custody.stop([index]);
        Ok(())
    }

    fn handle_event(
        &self,
        event: u16,
        _events: EventSet,
        vrings: &[Vring],
        thread: usize,
    ) -> io::Result<()> {
        self.with_lane(thread, |lane| {
            let kicked = Some(event).filter(|event| *event != self.gate_event());
            lane.serve(kicked.map(usize::from), vrings)
        })
    }
}
