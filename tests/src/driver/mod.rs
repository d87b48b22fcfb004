//! A front end without a virtual machine: the crate virtio-driver, another project's, connected
//! to a real daemon. It negotiates, shares memory, fills the vrings, kicks, and is called.
//!
//! ```no_run
//! use std::time::Duration;
//! use vublk_tests::driver::{Spec, connect};
//!
//! # fn main() -> Result<(), vublk_tests::driver::DriverError> {
//! let mut queues = connect("/tmp/vublk.sock".as_ref(), &Spec::default())?;
//! let queue = &mut queues[0];
//! queue.set_calls(true);
//! let whole = 0..4096;
//! queue.read(0, 0, &[whole])?;
//! queue.kick()?;
//! while queue.wait(Duration::from_secs(10))? {
//!     if let Some(done) = queue.completion() {
//!         assert_eq!((done.slot, done.result), (0, 0));
//!         break;
//!     }
//! }
//! # Ok(())
//! # }
//! ```

mod memory;
mod queue;
pub mod verify;

use std::io;
use std::path::Path;
use std::sync::Arc;

use virtio_driver::{
    VhostUser, VirtioBlkConfig, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkTransport,
    VirtioFeatureFlags,
};

use memory::Memory;
pub use queue::{Done, Queue, wait_any};

/// What a front end asks for.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Whether VIRTIO_F_EVENT_IDX is acknowledged (virtio 2.7.7, 2.7.10).
    pub event_idx: bool,
    /// The number of vrings.
    pub queues: usize,
    /// Descriptors in each vring, a power of two.
    pub queue_size: u16,
    /// Slots for data in each queue: the requests it may have in flight.
    pub slots: u32,
    /// The size of a slot, in bytes.
    pub slot_bytes: usize,
}

impl Default for Spec {
    fn default() -> Self {
        Self {
            event_idx: true,
            queues: 1,
            queue_size: 256,
            slots: 1,
            slot_bytes: 4096,
        }
    }
}

/// What the device told at connection.
#[derive(Clone, Copy, Debug)]
pub struct Disk {
    /// Its size, in bytes.
    pub capacity: u64,
    /// Its logical block size, in bytes.
    pub block_size: u32,
    /// The virtio feature bits that were negotiated.
    pub features: u64,
    /// The longest DISCARD, in bytes; 0 where it is not offered.
    pub max_discard: u64,
    /// The longest WRITE_ZEROES, in bytes; 0 where it is not offered.
    pub max_write_zeroes: u64,
}

/// Why a front end cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// The driver, the operating system or the back end's answer to a message refused.
    #[error("cannot {what}")]
    Refused {
        /// What was attempted.
        what: &'static str,
        /// The reason.
        source: io::Error,
    },
    /// The memory for data cannot be mapped.
    #[error("cannot map memory")]
    Map(#[from] vm_memory::mmap::MmapRegionError),
    /// A slot or a range of a slot that does not exist.
    #[error("slot {slot} has no bytes {start}..{end}")]
    NoSuchSlot {
        /// The slot.
        slot: u32,
        /// The first byte asked for.
        start: usize,
        /// The end of what was asked for.
        end: usize,
    },
}

fn refused(what: &'static str) -> impl FnOnce(io::Error) -> DriverError {
    move |source| DriverError::Refused { what, source }
}

/// What the queues of a connection share; the connection lasts as long as the last queue.
struct Connection {
    // Declared before the memory: the socket is closed first.
    transport: Box<VirtioBlkTransport>,
    memory: Memory,
    disk: Disk,
}

/// Connects to the vhost-user back end at `socket` and starts the vrings.
///
/// # Errors
/// `Refused` when the back end cannot be reached or answers with an error, `Map` when there is no
/// memory for the slots.
pub fn connect(socket: &Path, spec: &Spec) -> Result<Vec<Queue>, DriverError> {
    let path = socket
        .to_str()
        .ok_or_else(|| refused("use the socket's name")(io::ErrorKind::InvalidInput.into()))?;
    let mut transport: Box<VirtioBlkTransport> =
        Box::new(VhostUser::new(path, wanted_features(spec)).map_err(refused("connect"))?);
    let memory = Memory::new(spec)?;
    memory.register(transport.as_mut())?;
    let config = transport
        .get_config()
        .map_err(refused("read the configuration"))?;
    let vrings = VirtioBlkQueue::setup_queues(transport.as_mut(), spec.queues, spec.queue_size)
        .map_err(refused("start the vrings"))?;
    let disk = describe(&config, transport.get_features());
    let connection = Arc::new(Connection {
        transport,
        memory,
        disk,
    });
    let queue = |(index, vring)| Queue::new(&connection, index, vring);
    Ok(vrings.into_iter().enumerate().map(queue).collect())
}

fn wanted_features(spec: &Spec) -> u64 {
    let mut ring = VirtioFeatureFlags::VERSION_1;
    ring.set(VirtioFeatureFlags::RING_EVENT_IDX, spec.event_idx);
    let device = VirtioBlkFeatureFlags::SEG_MAX
        | VirtioBlkFeatureFlags::BLK_SIZE
        | VirtioBlkFeatureFlags::FLUSH
        | VirtioBlkFeatureFlags::MQ
        | VirtioBlkFeatureFlags::DISCARD
        | VirtioBlkFeatureFlags::WRITE_ZEROES;
    ring.bits() | device.bits()
}

fn describe(config: &VirtioBlkConfig, features: u64) -> Disk {
    let offered = |flag: VirtioBlkFeatureFlags| features & flag.bits() != 0;
    let limit = |flag, sectors| {
        if offered(flag) {
            u64::from(u32::from(sectors)) << SECTOR_SHIFT
        } else {
            0
        }
    };
    Disk {
        capacity: u64::from(config.capacity) << SECTOR_SHIFT,
        block_size: if offered(VirtioBlkFeatureFlags::BLK_SIZE) {
            config.blk_size.into()
        } else {
            1 << SECTOR_SHIFT
        },
        features,
        max_discard: limit(VirtioBlkFeatureFlags::DISCARD, config.max_discard_sectors),
        max_write_zeroes: limit(
            VirtioBlkFeatureFlags::WRITE_ZEROES,
            config.max_write_zeroes_sectors,
        ),
    }
}

const SECTOR_SHIFT: u32 = 9;
