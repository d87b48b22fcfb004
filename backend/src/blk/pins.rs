//! Whether and how far a device's guest memory is pinned.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use blockdev::Lease;

/// Whether guest memory is registered with the kernel (`--pin`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pin {
    /// The kernel finds its pages anew for every request.
    #[default]
    Off,
    /// It is registered, in slots of `1 << slot_shift` bytes. Pages that are taken out of the guest
    /// stay registered: not for guests with a balloon, virtio-mem or free-page reporting.
    Registered {
        /// The length of a slot, as a power of two of bytes.
        slot_shift: u32,
    },
}

/// The pins of one device, as its threads tell each other of them.
#[derive(Debug, Default)]
pub struct Pins {
    wanted: Pin,
    /// Whether a thread is there that registers memory.
    live: AtomicBool,
    /// What the workers have to share next.
    lease: Mutex<Option<Lease>>,
    regions: AtomicUsize,
    pinned: AtomicUsize,
    fallback_said: AtomicBool,
}

impl Pins {
    pub(super) fn new(wanted: Pin) -> Pins {
        Pins {
            wanted,
            ..Pins::default()
        }
    }

    /// What the user wants.
    #[must_use]
    pub fn wanted(&self) -> Pin {
        self.wanted
    }

    /// Whether memory is registered. Does not change once the workers run.
    #[must_use]
    pub fn is_live(&self) -> bool {
        self.live.load(Ordering::Relaxed)
    }

    /// Memory is registered from now on.
    pub(crate) fn go_live(&self) {
        self.live.store(true, Ordering::Relaxed);
    }

    /// Leaves a lease for [`take`](Self::take), in place of one that nobody took.
    pub(crate) fn put(&self, lease: Lease) {
        let mut place = self.lease.lock().unwrap_or_else(PoisonError::into_inner);
        *place = Some(lease);
    }

    /// What every worker has to share, once.
    #[must_use]
    pub fn take(&self) -> Option<Lease> {
        let mut place = self.lease.lock().unwrap_or_else(PoisonError::into_inner);
        place.take()
    }

    /// How many regions there are, and how many of them are registered.
    pub(crate) fn show(&self, regions: usize, pinned: usize) {
        self.regions.store(regions, Ordering::Relaxed);
        self.pinned.store(pinned, Ordering::Relaxed);
    }

    /// Whether nobody has said yet that a request goes without a slot.
    pub(crate) fn first_fallback(&self) -> bool {
        !self.fallback_said.load(Ordering::Relaxed)
            && !self.fallback_said.swap(true, Ordering::Relaxed)
    }
}

impl fmt::Display for Pins {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (pinned, regions) = (&self.pinned, &self.regions);
        let (pinned, regions) = (
            pinned.load(Ordering::Relaxed),
            regions.load(Ordering::Relaxed),
        );
        write!(f, "pinned_regions={pinned}/{regions}")
    }
}
