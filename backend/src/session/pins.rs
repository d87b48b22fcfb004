//! Registered guest memory: when it is to be registered, shared and given back.
//!
//! A table goes to the pinning thread once no worker has a request on an earlier one, and slots of
//! what is not in it. So memory that was removed is registered nowhere but there by then.

use super::{Crew, Session};
use crate::worker::{Command, TableEpoch};

/// How far the pinning thread is.
#[derive(Debug)]
pub(super) struct Pinning {
    /// The last table it was sent.
    asked: TableEpoch,
    /// The last table that all memory which is not in it was given back for.
    done: TableEpoch,
}

impl Pinning {
    /// Nothing is registered of tables up to this one.
    pub(super) fn new(latest: TableEpoch) -> Pinning {
        Pinning {
            asked: latest,
            done: latest,
        }
    }
}

impl Session {
    /// Whether nothing can touch memory that is not in this table any more.
    pub(super) fn is_released(&self, epoch: TableEpoch) -> bool {
        let unpinned = !self.device.pins().is_live() || self.pinning.done >= epoch;
        unpinned && self.epochs.holders(epoch).is_empty()
    }

    /// Sends the pinning thread the newest table, as soon as no worker has anything of others.
    pub(super) fn go_on_pinning(&mut self, crew: &dyn Crew) {
        let latest = self.epochs.latest();
        if self.device.pins().is_live()
            && self.pinning.asked < latest
            && self.epochs.holders(latest).is_empty()
        {
            self.pinning.asked = latest;
            crew.pin(self.device.id(), latest, self.table.clone());
        }
    }

    /// The pinning thread has given everything back that is not in this table.
    pub(super) fn unpinned(&mut self, epoch: TableEpoch) {
        self.pinning.done = self.pinning.done.max(epoch);
    }

    /// Has every worker share what is registered. Not if some of it was removed meanwhile: a worker
    /// that has given its slots back must not take them again.
    pub(super) fn share_pins(&self, crew: &dyn Crew) {
        let Some(lease) = self.device.pins().take() else {
            return;
        };
        let mut regions = lease.regions().iter();
        if regions.all(|pinned| pinned.is_of(&self.table)) {
            for worker in 0..crew.count() {
                crew.send(worker, Command::SetPins(self.device.id(), lease.clone()));
            }
        }
    }
}
