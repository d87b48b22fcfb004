//! Handlers of the messages that agree on features and ownership.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;

use vhost::vhost_user::message::VhostUserVirtioFeatures;

use super::vrings::Life;
use super::{Crew, Refusal, Session, Step};
use crate::worker::{Command, Enablement};

impl Session {
    /// The device's features and the log's, which is a matter of the connection.
    pub(super) fn offered_features(&self) -> u64 {
        self.device.offered_features() | VhostUserVirtioFeatures::LOG_ALL.bits()
    }

    /// SET_FEATURES.
    pub(super) fn set_features(&mut self, acked: u64, crew: &dyn Crew) -> Result<Step, Refusal> {
        let beyond = acked & !self.offered_features();
        if beyond != 0 {
            return Err(Refusal::Features(beyond));
        }
        // LOG_ALL is meant to change under running rings; a ring's layout cannot.
        let changed =
            (acked ^ self.negotiation.features) & !VhostUserVirtioFeatures::LOG_ALL.bits();
        let idle = self.vrings.iter().all(|vring| vring.life == Life::Stopped);
        if changed != 0 && !idle {
            return Err(Refusal::FeaturesInUse(changed));
        }
        self.negotiation.features = acked;
        self.log_features(acked, crew);
        for worker in 0..crew.count() {
            crew.send(worker, Command::SetFeatures(self.device.id(), acked));
        }
        // A front end without protocol features cannot enable a vring (*Ring states*).
        if acked & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            self.enable_all(Enablement::Enabled, crew);
        }
        Ok(self.fence(crew))
    }

    /// SET_PROTOCOL_FEATURES.
    pub(super) fn set_protocol_features(&mut self, acked: u64) -> Result<Step, Refusal> {
        self.negotiation.acknowledge(acked)?;
        Ok(Step::DONE)
    }

    /// SET_BACKEND_REQ_FD: the socket is kept; a later one replaces it.
    pub(super) fn set_backend_req_fd(&mut self, fd: OwnedFd) -> Result<Step, Refusal> {
        let file = File::from(fd);
        let metadata = file.metadata().map_err(Refusal::Descriptor)?;
        if !metadata.file_type().is_socket() {
            return Err(Refusal::NotSocket);
        }
        self.back_channel = Some(file.into());
        Ok(Step::DONE)
    }
}
