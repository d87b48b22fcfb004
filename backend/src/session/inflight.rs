//! Handlers of the messages about in-flight tracking (vhost-user, *Inflight I/O tracking*).

use std::os::fd::{BorrowedFd, OwnedFd};

use super::vrings::Life;
use super::{Refusal, Session, Step};
use crate::inflight::{Description, Region};
use crate::proto::{InflightLayout, Reply};

/// The regions of a session.
#[derive(Debug, Default)]
pub(super) struct Regions {
    /// The one that vrings use.
    pub(super) set: Option<Region>,
    /// The one that was made last, for its file to go with the reply.
    made: Option<Region>,
}

impl Session {
    /// GET_INFLIGHT_FD: makes a region. It is used once the front end has handed it back.
    pub(super) fn get_inflight_fd(
        &mut self,
        wanted: Description,
        layout: InflightLayout,
    ) -> Result<Step, Refusal> {
        let region = Region::allocate(wanted.queues, wanted.queue_size)?;
        let reply = Reply::Inflight(region.description(), layout);
        self.regions.made = Some(region);
        Ok(Step::Done(Some(reply)))
    }

    /// SET_INFLIGHT_FD: uses a region, with what an earlier daemon may have left in it. Vrings that
    /// start from now on do again what it had in flight.
    ///
    /// The write cache's mode is there, too: a front end does not set it again for a new daemon,
    /// and a guest that was promised write-through must not get less.
    pub(super) fn set_inflight_fd(
        &mut self,
        description: Description,
        file: OwnedFd,
    ) -> Result<Step, Refusal> {
        let mut vrings = (0..).zip(&self.vrings);
        if let Some((index, _)) = vrings.find(|(_, vring)| vring.life != Life::Stopped) {
            return Err(Refusal::InflightInUse(index));
        }
        // Were this one refused, an earlier one would be one that the front end does not keep.
        self.regions.set = None;
        let region = Region::adopt(file, description)?;
        match region.write_cache() {
            Some(cache) => self.device.set_write_cache(cache),
            None => region.set_write_cache(self.device.write_cache()),
        }
        self.regions.set = Some(region);
        Ok(Step::DONE)
    }

    /// The device was reset: nothing is in flight any more, and nothing is to be done again.
    pub(super) fn forget_inflight(&mut self) {
        if let Some(region) = self.regions.set.take() {
            region.set_write_cache(self.device.write_cache());
            region.forget();
        }
    }

    /// The write cache's mode changed: the next daemon has to know.
    pub(super) fn keep_write_cache(&self) {
        if let Some(region) = &self.regions.set {
            region.set_write_cache(self.device.write_cache());
        }
    }

    /// The file that goes with a reply, if one does.
    pub(super) fn file_for(&self, reply: &Reply) -> Option<BorrowedFd<'_>> {
        match reply {
            Reply::Inflight(..) => self.regions.made.as_ref().map(Region::file),
            Reply::U64(_)
            | Reply::VringBase { .. }
            | Reply::Config(..)
            | Reply::Log { .. }
            | Reply::ConfigError => None,
        }
    }
}
