//! What a session needs of the workers.

use std::sync::Arc;

use iov_iter::MemoryTable;

use crate::worker::{Command, DeviceId, Errand, TableEpoch, VringId, Workers};

/// The workers of the daemon, as a session sees them: commands go in, reports come back to the
/// session through [`Session::reported`](super::Session::reported).
///
/// A trait, so that tests and fuzzers drive a session without threads.
pub trait Crew {
    /// How many workers there are.
    fn count(&self) -> usize;

    /// The worker that owns a vring.
    fn owner(&self, id: VringId) -> usize;

    /// Sends a command to one worker.
    fn send(&self, worker: usize, command: Command);

    /// Sends a device's helper thread on an errand.
    fn errand(&self, device: DeviceId, errand: Errand);

    /// Has a device's guest memory registered, all of this table and nothing else.
    fn pin(&self, device: DeviceId, epoch: TableEpoch, table: Arc<MemoryTable>);
}

impl Crew for Workers {
    fn count(&self) -> usize {
        Workers::count(self)
    }

    fn owner(&self, id: VringId) -> usize {
        Workers::owner(self, id)
    }

    fn send(&self, worker: usize, command: Command) {
        Workers::send(self, worker, command);
    }

    fn errand(&self, device: DeviceId, errand: Errand) {
        Workers::errand(self, device, errand);
    }

    fn pin(&self, device: DeviceId, epoch: TableEpoch, table: Arc<MemoryTable>) {
        Workers::pin(self, device, epoch, table);
    }
}
