//! Handlers of the messages about vrings (vhost-user, *Ring states*).

use std::os::fd::OwnedFd;

use vmm_sys_util::eventfd::EventFd;

use super::eventfd::eventfd;
use super::{Crew, Refusal, Session, Step, Wait};
use crate::inflight::QueueRegion;
use crate::limits::MAX_VRINGS;
use crate::proto::{InFlight, Reply};
use crate::vring::{Addresses, check_size, resolve};
use crate::worker::{Command, Enablement, StopMode, VringId, VringSetup};

/// Where a vring is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Life {
    /// The session has it: its parts may be set.
    Stopped,
    /// A worker has it.
    Started,
    /// A worker has it and was told to stop it.
    Stopping,
}

/// What of a vring's setup had to be checked.
#[derive(Debug)]
pub(super) struct Ready {
    size: u16,
    addresses: Addresses,
    next_avail: u16,
    inflight: Option<QueueRegion>,
}

/// A vring as the front end described it so far.
#[derive(Debug)]
pub(super) struct Vring {
    pub(super) life: Life,
    pub(super) enablement: Enablement,
    pub(super) size: Option<u16>,
    /// The guest address to log writes to the used ring at, if they are to be logged.
    pub(super) log_used: Option<u64>,
    addresses: Option<Addresses>,
    next_avail: Option<u16>,
    call: Option<EventFd>,
    err: Option<EventFd>,
}

impl Vring {
    /// Stopped and disabled, as every vring is at first.
    pub(super) fn new() -> Vring {
        Vring {
            life: Life::Stopped,
            enablement: Enablement::Disabled,
            size: None,
            log_used: None,
            addresses: None,
            next_avail: None,
            call: None,
            err: None,
        }
    }

    /// Notes that a worker has stopped it and where it was.
    pub(super) fn stopped(&mut self, next_avail: u16) {
        self.life = Life::Stopped;
        self.next_avail = Some(next_avail);
    }

    pub(super) fn next_avail(&self) -> u16 {
        self.next_avail.unwrap_or(0)
    }
}

impl Session {
    /// SET_VRING_NUM.
    pub(super) fn set_vring_num(&mut self, index: u32, size: u32) -> Result<Step, Refusal> {
        let (id, vring) = self.stopped_vring(index)?;
        let size = check_size(size).map_err(|source| Refusal::Vring {
            index: id.index,
            source,
        })?;
        vring.size = Some(size);
        Ok(Step::DONE)
    }

    /// SET_VRING_ADDR. On a started vring it comes to switch logging, and must not move anything:
    /// QEMU sends it so when a migration begins and ends.
    pub(super) fn set_vring_addr(
        &mut self,
        index: u32,
        addresses: Addresses,
        log_used: Option<u64>,
        crew: &dyn Crew,
    ) -> Result<Step, Refusal> {
        let table = self.table.clone();
        let (_, vring) = self.vring(index)?;
        let size = vring.size;
        self.check_logged_ring(size, log_used)?;
        let (id, vring) = self.vring(index)?;
        match vring.life {
            Life::Started if vring.addresses == Some(addresses) => {
                vring.log_used = log_used;
                crew.send(crew.owner(id), Command::SetUsedLog(id, log_used));
                return Ok(self.fence(crew));
            }
            Life::Started => return Err(Refusal::Started(id.index)),
            Life::Stopping => return Err(Refusal::Stopping(id.index)),
            Life::Stopped => {}
        }
        // Refused as early as the answer can be known, which is where front ends ask for one.
        if let Some(size) = vring.size
            && !table.regions().is_empty()
        {
            resolve(&addresses, size, &table).map_err(|source| Refusal::Vring {
                index: id.index,
                source,
            })?;
        }
        vring.addresses = Some(addresses);
        vring.log_used = log_used;
        Ok(Step::DONE)
    }

    /// SET_VRING_BASE: of a split ring, the avail index; the used index is in guest memory.
    pub(super) fn set_vring_base(&mut self, index: u32, base: u32) -> Result<Step, Refusal> {
        let (_, vring) = self.stopped_vring(index)?;
        let beyond = Refusal::OutOfRange {
            what: "avail index",
            value: base,
        };
        vring.next_avail = Some(u16::try_from(base).ok().ok_or(beyond)?);
        Ok(Step::DONE)
    }

    /// GET_VRING_BASE: answered when nothing of the vring is in flight, since it was done or, where
    /// that was negotiated and asked for, taken back.
    pub(super) fn get_vring_base(
        &mut self,
        index: u32,
        in_flight: InFlight,
        crew: &dyn Crew,
    ) -> Result<Step, Refusal> {
        let mode = match in_flight {
            InFlight::Recorded if self.negotiation.may_suspend() => StopMode::Suspend,
            InFlight::Recorded | InFlight::Done => StopMode::Drain,
        };
        let (id, vring) = self.vring(index)?;
        match vring.life {
            Life::Stopped => {
                let base = vring.next_avail();
                return Ok(Step::Done(Some(Reply::VringBase { index, base })));
            }
            Life::Stopping => return Err(Refusal::Stopping(id.index)),
            Life::Started => {}
        }
        vring.life = Life::Stopping;
        crew.send(crew.owner(id), Command::Stop(id, mode));
        Ok(Step::Wait(Wait::Stopped(id.index)))
    }

    /// SET_VRING_KICK: starts a vring, or replaces the kick of a started one.
    pub(super) fn set_vring_kick(
        &mut self,
        index: u32,
        fd: Option<OwnedFd>,
        crew: &dyn Crew,
    ) -> Result<Step, Refusal> {
        let kick = fd.map(eventfd).transpose()?;
        let (id, vring) = self.vring(index)?;
        match vring.life {
            Life::Started => crew.send(crew.owner(id), Command::SetKick(id, kick)),
            Life::Stopping => return Err(Refusal::Stopping(id.index)),
            Life::Stopped => return self.begin(id, kick, crew),
        }
        Ok(Step::DONE)
    }

    /// SET_VRING_CALL: kept for the start, or given to the worker.
    pub(super) fn set_vring_call(
        &mut self,
        index: u32,
        fd: Option<OwnedFd>,
        crew: &dyn Crew,
    ) -> Result<Step, Refusal> {
        let call = fd.map(eventfd).transpose()?;
        let (id, vring) = self.vring(index)?;
        match vring.life {
            Life::Started => crew.send(crew.owner(id), Command::SetCall(id, call)),
            Life::Stopped | Life::Stopping => vring.call = call,
        }
        Ok(Step::DONE)
    }

    /// SET_VRING_ERR: kept for the start, or given to the worker.
    pub(super) fn set_vring_err(
        &mut self,
        index: u32,
        fd: Option<OwnedFd>,
        crew: &dyn Crew,
    ) -> Result<Step, Refusal> {
        let err = fd.map(eventfd).transpose()?;
        let (id, vring) = self.vring(index)?;
        match vring.life {
            Life::Started => crew.send(crew.owner(id), Command::SetErr(id, err)),
            Life::Stopped | Life::Stopping => vring.err = err,
        }
        Ok(Step::DONE)
    }

    /// SET_VRING_ENABLE.
    pub(super) fn set_vring_enable(
        &mut self,
        index: u32,
        enable: u32,
        crew: &dyn Crew,
    ) -> Result<Step, Refusal> {
        let (id, _) = self.vring(index)?;
        let enablement = match enable {
            0 => Enablement::Disabled,
            1 => Enablement::Enabled,
            value => {
                return Err(Refusal::OutOfRange {
                    what: "enable",
                    value,
                });
            }
        };
        self.enable(id, enablement, crew);
        Ok(self.fence(crew))
    }

    /// Enables or disables every vring.
    pub(super) fn enable_all(&mut self, enablement: Enablement, crew: &dyn Crew) {
        for index in 0..MAX_VRINGS {
            self.enable(self.id(index), enablement, crew);
        }
    }

    /// Tells the workers to stop every vring they have.
    pub(super) fn stop_all(&mut self, mode: StopMode, crew: &dyn Crew) {
        for index in 0..MAX_VRINGS {
            let id = self.id(index);
            let Some(vring) = self.vrings.get_mut(usize::from(index)) else {
                continue;
            };
            match (vring.life, mode) {
                (Life::Started, _) => {}
                // Draining for an answer that nobody waits for any more: its worker gives it up,
                // and still reports it once.
                (Life::Stopping, StopMode::Suspend | StopMode::Abandon) => {}
                (Life::Stopping, StopMode::Drain) | (Life::Stopped, _) => continue,
            }
            vring.life = Life::Stopping;
            crew.send(crew.owner(id), Command::Stop(id, mode));
        }
    }

    fn enable(&mut self, id: VringId, enablement: Enablement, crew: &dyn Crew) {
        let Some(vring) = self.vrings.get_mut(usize::from(id.index)) else {
            return;
        };
        vring.enablement = enablement;
        if vring.life == Life::Started {
            crew.send(crew.owner(id), Command::Enable(id, enablement));
        }
    }

    /// Everything that a vring needs to start was said, and can be had.
    pub(super) fn readiness(&mut self, index: u16) -> Result<Ready, Refusal> {
        let missing = |missing| Refusal::NotReady { index, missing };
        let table = self.table.clone();
        let (_, vring) = self.vring(u32::from(index))?;
        let size = vring.size.ok_or(missing("SET_VRING_NUM"))?;
        let addresses = vring.addresses.ok_or(missing("SET_VRING_ADDR"))?;
        let next_avail = vring.next_avail.ok_or(missing("SET_VRING_BASE"))?;
        let log_used = vring.log_used;
        resolve(&addresses, size, &table).map_err(|source| Refusal::Vring { index, source })?;
        self.check_logged_ring(Some(size), log_used)?;
        let region = self.regions.set.as_ref();
        let inflight = region.map(|region| region.queue(index, size)).transpose()?;
        Ok(Ready {
            size,
            addresses,
            next_avail,
            inflight,
        })
    }

    /// Starts a vring: the storage is ours.
    pub(super) fn start(
        &mut self,
        id: VringId,
        kick: Option<EventFd>,
        crew: &dyn Crew,
    ) -> Result<(), Refusal> {
        let Ready {
            size,
            addresses,
            next_avail,
            inflight,
        } = self.readiness(id.index)?;
        let features = self.negotiation.features;
        self.catch_up_log(crew);
        let (_, vring) = self.vring(u32::from(id.index))?;
        vring.life = Life::Started;
        let setup = VringSetup {
            size,
            addresses,
            next_avail,
            inflight,
            log_used: vring.log_used,
            features,
            enablement: vring.enablement,
            kick,
            call: vring.call.take(),
            err: vring.err.take(),
        };
        crew.send(crew.owner(id), Command::Start(id, Box::new(setup)));
        self.tell_resized();
        Ok(())
    }

    fn vring(&mut self, index: u32) -> Result<(VringId, &mut Vring), Refusal> {
        let small = u16::try_from(index)
            .ok()
            .ok_or(Refusal::VringIndex(index))?;
        let id = self.id(small);
        let vring = self
            .vrings
            .get_mut(usize::from(small))
            .ok_or(Refusal::VringIndex(index))?;
        Ok((id, vring))
    }

    fn stopped_vring(&mut self, index: u32) -> Result<(VringId, &mut Vring), Refusal> {
        let (id, vring) = self.vring(index)?;
        match vring.life {
            Life::Stopped => Ok((id, vring)),
            Life::Started => Err(Refusal::Started(id.index)),
            Life::Stopping => Err(Refusal::Stopping(id.index)),
        }
    }

    fn id(&self, index: u16) -> VringId {
        VringId {
            device: self.device.id(),
            index,
        }
    }
}
