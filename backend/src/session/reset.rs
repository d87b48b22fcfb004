//! Handlers of the messages that take everything back.

use super::vrings::{Life, Vring};
use super::{Crew, Session, Step, Wait};
use crate::worker::{Enablement, StopMode};

impl Session {
    /// RESET_OWNER: deprecated, and understood in several ways; disabling all vrings is the one
    /// the specification allows beside doing nothing.
    pub(super) fn reset_owner(&mut self, crew: &dyn Crew) -> Step {
        self.enable_all(Enablement::Disabled, crew);
        self.fence(crew)
    }

    /// RESET_DEVICE: every vring stops as GET_VRING_BASE would stop it, and then the device is as
    /// at first. Who owns it, its memory and the protocol features stay.
    pub(super) fn reset_device(&mut self, crew: &dyn Crew) -> Step {
        self.stop_all(StopMode::Drain, crew);
        Step::Wait(Wait::Reset)
    }

    /// Whether every vring came back from its worker.
    pub(super) fn all_stopped(&self) -> bool {
        self.vrings.iter().all(|vring| vring.life == Life::Stopped)
    }

    /// The second half of RESET_DEVICE.
    pub(super) fn finish_reset(&mut self) {
        self.vrings.fill_with(Vring::new);
        self.negotiation.features = 0;
        self.log.forget();
        self.device.reset();
        self.forget_inflight();
    }
}
