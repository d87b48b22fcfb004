//! Whose storage it is: taken before the device's first vring starts, given back after its last
//! one has stopped.

use vmm_sys_util::eventfd::EventFd;

use super::{Crew, Ending, Refusal, Session, Step, Wait};
use crate::worker::{ClaimEnd, Errand, Outcome, VringId};

/// How a session stands with the storage.
#[derive(Debug, Default)]
pub(super) struct Custody {
    state: State,
    /// The vring that starts once the storage is ours.
    starting: Option<(VringId, Option<EventFd>)>,
    /// What became of that, for the message that asked for it.
    started: Option<Result<(), Refusal>>,
    /// What became of a sync, for the message that asked for it.
    synced: Option<Result<(), Refusal>>,
}

/// Whose it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    /// Anybody's.
    #[default]
    Free,
    /// It is being taken.
    Taking,
    /// Ours.
    Held,
    /// It is being given back.
    Giving,
}

impl Session {
    /// Starts a vring, at once if the storage is ours.
    pub(super) fn begin(
        &mut self,
        id: VringId,
        kick: Option<EventFd>,
        crew: &dyn Crew,
    ) -> Result<Step, Refusal> {
        // Nobody should wait for a lock only to hear that it was for nothing.
        self.readiness(id.index)?;
        match self.custody.state {
            State::Held => {
                self.start(id, kick, crew)?;
                Ok(Step::DONE)
            }
            State::Free => {
                self.custody.starting = Some((id, kick));
                self.take(crew);
                Ok(Step::Wait(Wait::Claimed))
            }
            // It is taken again once it was given back.
            State::Giving => {
                self.custody.starting = Some((id, kick));
                Ok(Step::Wait(Wait::Claimed))
            }
            // Messages come one at a time, and this is waited for.
            State::Taking => Err(Refusal::Stopping(id.index)),
        }
    }

    fn take(&mut self, crew: &dyn Crew) {
        self.custody.state = State::Taking;
        let patience = self.device.lock_timeout();
        crew.errand(self.device.id(), Errand::Claim(patience));
    }

    /// Makes what was answered stable before the message is.
    pub(super) fn sync(&self, crew: &dyn Crew) -> Step {
        crew.errand(self.device.id(), Errand::Sync);
        Step::Wait(Wait::Synced)
    }

    /// The helper thread has done an errand.
    pub(super) fn helped(&mut self, outcome: Outcome, crew: &dyn Crew) {
        match outcome {
            Outcome::Claimed(ClaimEnd::Held) => {
                self.custody.state = State::Held;
                let starting = self.custody.starting.take();
                if self.ending == Ending::NotYet
                    && let Some((id, kick)) = starting
                {
                    self.custody.started = Some(self.start(id, kick, crew));
                }
                self.give_back(crew);
            }
            Outcome::Claimed(end) => {
                self.custody.state = State::Free;
                self.custody.starting = None;
                let name = self.device.name();
                self.custody.started = Some(Err(match end {
                    ClaimEnd::TimedOut => Refusal::Locked(name),
                    ClaimEnd::Held | ClaimEnd::Failed | ClaimEnd::GivenUp => {
                        Refusal::NotLocked(name)
                    }
                }));
            }
            Outcome::Released => {
                self.custody.state = State::Free;
                if self.ending == Ending::NotYet && self.custody.starting.is_some() {
                    self.take(crew);
                }
            }
            Outcome::Synced(done) => {
                let name = self.device.name();
                self.custody.synced = Some(if done {
                    Ok(())
                } else {
                    Err(Refusal::NotSynced(name))
                });
            }
            Outcome::Refreshed => self.resize(crew),
            Outcome::Unpinned(epoch) => self.unpinned(epoch),
            Outcome::Pinned => self.share_pins(crew),
        }
    }

    /// Gives the storage back if no vring is left that could touch it.
    pub(super) fn give_back(&mut self, crew: &dyn Crew) {
        if self.custody.state == State::Held && self.all_stopped() {
            self.custody.state = State::Giving;
            crew.errand(self.device.id(), Errand::Release);
        }
    }

    /// Nobody is left to wait for the storage.
    pub(super) fn give_up_claim(&self, crew: &dyn Crew) {
        if self.custody.state == State::Taking {
            crew.errand(self.device.id(), Errand::GiveUpClaim);
        }
    }

    /// Whether the storage is anybody's, or ours: nothing is on its way.
    pub(super) fn is_settled(&self) -> bool {
        matches!(self.custody.state, State::Free | State::Held)
    }

    /// What is on its way, for the log.
    pub(super) fn custody_text(&self) -> &'static str {
        match self.custody.state {
            State::Taking => "the lock on",
            State::Giving => "to give back",
            State::Free | State::Held => "",
        }
    }

    /// Whether the storage is not ours, and is not becoming so.
    pub(super) fn has_given_back(&self) -> bool {
        self.custody.state == State::Free
    }

    pub(super) fn take_started(&mut self) -> Option<Result<(), Refusal>> {
        self.custody.started.take()
    }

    pub(super) fn take_synced(&mut self) -> Option<Result<(), Refusal>> {
        self.custody.synced.take()
    }
}
