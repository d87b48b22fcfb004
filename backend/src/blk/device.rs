//! A virtio-blk device: storage, and what its options say of it.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use blockdev::{BlockDevice, Geometry, Sector};
use log::info;
use thiserror::Error;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_ID_BYTES,
};

use super::features::bit;
use super::{ConfigError, Counters, Pin, Pins, Profile, config, features};
use crate::limits::MAX_VRINGS;
use crate::worker::DeviceId;

/// Bytes of the string GET_ID answers (virtio 5.2.6): shorter ones are padded with NUL.
pub const SERIAL_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;

/// How long the lock on a device's storage is waited for when nothing is said.
pub const DEFAULT_LOCK_TIMEOUT: Duration = Duration::from_secs(60);

/// Whether a write is answered before it is stable (virtio 5.2.5, `writeback`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum WriteCache {
    /// A write is stable when it is answered.
    Writethrough = 0,
    /// A write is stable when a later FLUSH is answered.
    Writeback = 1,
}

/// What the user says of a device.
#[derive(Clone, Debug)]
pub struct BlkOptions {
    /// What GET_ID answers; at most [`SERIAL_BYTES`] bytes.
    pub serial: String,
    /// The number of vrings the configuration space recommends to the driver.
    pub num_queues: u16,
}

/// Options that make no device.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BlkOptionsError {
    /// The serial is too long, or not printable ASCII.
    #[error("serial '{0}': at most {SERIAL_BYTES} printable ASCII characters")]
    Serial(String),
    /// Too many vrings, or none.
    #[error("{0} queues: between 1 and {MAX_VRINGS}")]
    Queues(u16),
}

/// A virtio-blk device.
#[derive(Debug)]
pub struct BlkDevice {
    id: DeviceId,
    storage: Arc<dyn BlockDevice>,
    serial: [u8; SERIAL_BYTES],
    num_queues: u16,
    lock_timeout: Duration,
    /// The capacity that the configuration space shows, in sectors: the storage's, once every
    /// worker goes by it.
    capacity: AtomicU64,
    cache: AtomicU8,
    counters: Mutex<Vec<Arc<Counters>>>,
    pins: Pins,
}

impl BlkDevice {
    /// A device over `storage`.
    ///
    /// # Errors
    /// Which option cannot be used.
    pub fn new(
        id: DeviceId,
        storage: Arc<dyn BlockDevice>,
        options: &BlkOptions,
    ) -> Result<BlkDevice, BlkOptionsError> {
        let text = options.serial.as_bytes();
        let mut serial = [0; SERIAL_BYTES];
        match serial.get_mut(..text.len()) {
            Some(start) if text.iter().all(|c| (b' '..=b'~').contains(c)) => {
                start.copy_from_slice(text);
            }
            _ => return Err(BlkOptionsError::Serial(options.serial.clone())),
        }
        if !(1..=MAX_VRINGS).contains(&options.num_queues) {
            return Err(BlkOptionsError::Queues(options.num_queues));
        }
        Ok(BlkDevice {
            id,
            lock_timeout: DEFAULT_LOCK_TIMEOUT,
            capacity: AtomicU64::new(storage.geometry().capacity.0),
            storage,
            serial,
            num_queues: options.num_queues,
            cache: AtomicU8::new(WriteCache::Writeback as u8),
            counters: Mutex::new(Vec::new()),
            pins: Pins::default(),
        })
    }

    /// The same, with another time to wait for the lock on its storage.
    #[must_use]
    pub fn with_lock_timeout(self, lock_timeout: Duration) -> BlkDevice {
        BlkDevice {
            lock_timeout,
            ..self
        }
    }

    /// The same, with its guest memory pinned like this.
    #[must_use]
    pub fn with_pin(self, pin: Pin) -> BlkDevice {
        BlkDevice {
            pins: Pins::new(pin),
            ..self
        }
    }

    /// Its pins.
    #[must_use]
    pub fn pins(&self) -> &Pins {
        &self.pins
    }

    /// How long to wait for the lock on its storage.
    #[must_use]
    pub fn lock_timeout(&self) -> Duration {
        self.lock_timeout
    }

    /// Whether the storage has another capacity than the configuration space shows.
    #[must_use]
    pub fn is_resized(&self) -> bool {
        self.storage.geometry().capacity != self.capacity()
    }

    /// Shows the storage's capacity in the configuration space, and says whether it is another one
    /// than before. All workers go by it already.
    pub fn publish_capacity(&self) -> bool {
        let new = self.storage.geometry().capacity.0;
        let old = self.capacity.swap(new, Ordering::AcqRel);
        if old != new {
            info!("{}: {new} sectors now, {old} before", self.name());
        }
        old != new
    }

    /// The capacity that the configuration space shows.
    fn capacity(&self) -> Sector {
        Sector(self.capacity.load(Ordering::Acquire))
    }

    /// Its place in the daemon.
    #[must_use]
    pub fn id(&self) -> DeviceId {
        self.id
    }

    /// Its storage's name, for logs.
    #[must_use]
    pub fn name(&self) -> String {
        self.storage.name()
    }

    /// What stores its blocks.
    #[must_use]
    pub fn storage(&self) -> &Arc<dyn BlockDevice> {
        &self.storage
    }

    /// What GET_ID answers.
    #[must_use]
    pub fn serial(&self) -> &[u8; SERIAL_BYTES] {
        &self.serial
    }

    /// The features it offers, the vhost-user bit included.
    #[must_use]
    pub fn offered_features(&self) -> u64 {
        features::offered(&self.storage.geometry(), &self.storage.capabilities())
    }

    /// The number of vrings it recommends.
    #[must_use]
    pub fn num_queues(&self) -> u16 {
        self.num_queues
    }

    /// What requests are admitted by.
    #[must_use]
    pub fn profile(&self) -> Profile {
        Profile::new(self.storage.geometry(), self.storage.capabilities())
    }

    /// Reads `len` bytes of the configuration space from `offset`; none where the message that asks
    /// so breaks the vhost-user specification.
    #[must_use]
    pub fn read_config(&self, offset: u32, len: u32) -> Option<Vec<u8>> {
        let geometry = Geometry {
            capacity: self.capacity(),
            ..self.storage.geometry()
        };
        let bytes = config::bytes(
            &geometry,
            &self.storage.capabilities(),
            self.num_queues,
            self.write_cache(),
        );
        config::read(&bytes, offset, len)
    }

    /// Writes to the configuration space.
    ///
    /// # Errors
    /// Anything but a valid write to the writeback byte.
    pub fn write_config(&self, offset: u32, bytes: &[u8]) -> Result<(), ConfigError> {
        let cache = config::write(offset, bytes)?;
        self.set_write_cache(cache);
        Ok(())
    }

    /// The write cache as it is configured.
    #[must_use]
    pub fn write_cache(&self) -> WriteCache {
        if self.cache.load(Ordering::Acquire) == WriteCache::Writeback as u8 {
            WriteCache::Writeback
        } else {
            WriteCache::Writethrough
        }
    }

    /// Configures the write cache as it was before this device came into its place.
    pub fn set_write_cache(&self, cache: WriteCache) {
        self.cache.store(cache as u8, Ordering::Release);
    }

    /// The write cache a driver with these features gets: the one it configured if it may, else
    /// none unless it knows how to flush it (virtio 5.2.5.2).
    #[inline]
    #[must_use]
    pub fn cache_for(&self, driver_features: u64) -> WriteCache {
        if driver_features & bit(VIRTIO_BLK_F_CONFIG_WCE) != 0 {
            self.write_cache()
        } else if driver_features & bit(VIRTIO_BLK_F_FLUSH) != 0 {
            WriteCache::Writeback
        } else {
            WriteCache::Writethrough
        }
    }

    /// The device is reset: the write cache is back at its default.
    pub fn reset(&self) {
        self.set_write_cache(WriteCache::Writeback);
    }

    /// Counters for one more worker.
    #[must_use]
    pub fn new_counters(&self) -> Arc<Counters> {
        let counters = Arc::new(Counters::default());
        self.counters
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(counters.clone());
        counters
    }

    /// One line of what it has done so far.
    #[must_use]
    pub fn counters_line(&self) -> String {
        let line = format!("{}: {}", self.name(), self.counts());
        match self.pins.wanted() {
            Pin::Off => line,
            Pin::Registered { .. } => format!("{line} {}", self.pins),
        }
    }

    /// Requests that the storage has now. While workers go on, one may be counted that has just
    /// come back.
    #[must_use]
    pub fn in_flight(&self) -> u64 {
        let counts = self.counts();
        counts
            .handed_over
            .get()
            .saturating_sub(counts.given_back.get())
    }

    /// The counts of all workers.
    fn counts(&self) -> Counters {
        let sum = Counters::default();
        for counters in self
            .counters
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
        {
            sum.add(counters);
        }
        sum
    }
}
