//! Stops, starts and memory tables: what may have to wait for requests.

use std::collections::BTreeSet;
use std::os::fd::BorrowedFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::World;
use crate::frontend::{NEED_REPLY, Outcome, VERSION, code, region_payload, words};

/// A message that was sent and may not have been answered.
#[derive(Debug)]
pub(super) struct Pending {
    what: What,
    /// Requests hung when it was sent, and have not been let go since: it must not be answered.
    pub(super) waits: bool,
}

#[derive(Debug)]
enum What {
    /// GET_VRING_BASE.
    Stop(usize),
    /// REM_MEM_REG or SET_MEM_TABLE: the message, and the regions that are left.
    Table {
        code: u32,
        kept: BTreeSet<usize>,
        poison: u8,
    },
}

impl World {
    /// Stops a vring that runs, starts one that does not.
    pub(super) fn stop_or_start(&mut self, dice: &mut fastrand::Rng) -> Outcome {
        let vring = dice.usize(0..self.slots.len());
        self.settle(dice.bool())?;
        if self.stopped[vring].is_some() {
            return self.start(vring);
        }
        self.stop(vring)?;
        self.maybe_settle(dice)
    }

    /// Asks for a vring's base, if it runs.
    pub(super) fn stop(&mut self, vring: usize) -> Outcome {
        if self.stopped[vring].is_some() {
            return Ok(());
        }
        self.note(format!("stop vring {vring}"));
        let payload = words(&[u32::try_from(vring)?, 0]);
        self.front.peer.tell(code::GET_VRING_BASE, &payload, &[])?;
        self.counts.stops += 1;
        self.counts.waited += u64::from(self.handle.stuck_now() > 0);
        self.pending = Some(Pending {
            what: What::Stop(vring),
            waits: false,
        });
        Ok(())
    }

    /// Starts a vring, if it is stopped.
    pub(super) fn start(&mut self, vring: usize) -> Outcome {
        if let Some(base) = self.stopped[vring].take() {
            self.note(format!("start vring {vring} at {base}"));
            self.front.start_vring(u16::try_from(vring)?, base)?;
        }
        Ok(())
    }

    /// Adds a region, removes one, or replaces the table.
    pub(super) fn change_table(&mut self, dice: &mut fastrand::Rng) -> Outcome {
        self.settle(dice.bool())?;
        let region = dice.usize(1..self.memory.count());
        let poison = dice.u8(1..);
        if dice.u8(0..4) == 0 {
            let regions = (1..self.memory.count()).filter(|_| dice.bool()).collect();
            self.replace_table(regions, poison)?;
            return self.maybe_settle(dice);
        }
        let payload = [
            vec![0; 8],
            region_payload(self.memory.ram(region).numbers()),
        ]
        .concat();
        if !self.memory.is_mapped(region) {
            self.note(format!("add region {region}"));
            self.prepare(&BTreeSet::from([region]))?;
            let fd = self.memory.ram(region).fd();
            self.front
                .peer
                .confirm(code::ADD_MEM_REG, &payload, &[fd])?;
            return Ok(());
        }
        self.note(format!("remove region {region}"));
        let mut kept = self.mapped();
        kept.remove(&region);
        self.send_table(code::REM_MEM_REG, &payload, kept, poison)?;
        self.maybe_settle(dice)
    }

    /// Has the daemon use the first region and these.
    pub(super) fn replace_table(&mut self, kept: BTreeSet<usize>, poison: u8) -> Outcome {
        self.note(format!("table of {kept:?}"));
        let added = kept.difference(&self.mapped()).copied().collect();
        self.prepare(&added)?;
        let (payload, _) = self.memory.table(&kept);
        self.send_table(code::SET_MEM_TABLE, &payload, kept, poison)
    }

    /// The regions that are mapped, but for the first.
    pub(super) fn mapped(&self) -> BTreeSet<usize> {
        (1..self.memory.count())
            .filter(|&region| self.memory.is_mapped(region))
            .collect()
    }

    /// Regions are about to be mapped: nobody touched them, and what requests that wait expect in
    /// them is there again.
    fn prepare(&mut self, added: &BTreeSet<usize>) -> Outcome {
        self.memory.check_untouched()?;
        for &region in added {
            let mut slots = std::mem::take(&mut self.slots);
            for request in slots.iter_mut().flatten().flatten() {
                if request.touches(region) {
                    request.unsettled = true;
                    self.fill(request, Some(region))?;
                }
            }
            self.slots = slots;
        }
        self.memory.map(added);
        Ok(())
    }

    fn send_table(
        &mut self,
        code: u32,
        payload: &[u8],
        kept: BTreeSet<usize>,
        poison: u8,
    ) -> Outcome {
        let waits = self.handle.stuck_now() > 0;
        for region in self.mapped().difference(&kept) {
            let requests = self.slots.iter_mut().flatten().flatten();
            for request in requests.filter(|request| request.touches(*region)) {
                request.unsettled = true;
            }
        }
        let fds: Vec<BorrowedFd<'_>> = if code == code::SET_MEM_TABLE {
            let (_, listed) = self.memory.table(&kept);
            let rams = listed.into_iter().map(|region| self.memory.ram(region));
            rams.map(|ram| ram.fd()).collect()
        } else {
            Vec::new()
        };
        let flags = VERSION | NEED_REPLY;
        self.front.peer.send(code, flags, payload, &fds)?;
        self.counts.waited += u64::from(waits);
        self.pending = Some(Pending {
            what: What::Table { code, kept, poison },
            waits,
        });
        Ok(())
    }

    /// Waits for the answer, or leaves that for later.
    fn maybe_settle(&mut self, dice: &mut fastrand::Rng) -> Outcome {
        if dice.bool() {
            return Ok(());
        }
        self.settle(dice.bool())
    }

    /// Waits for the answer to what was sent, if there is one to wait for; looks first whether it
    /// comes too early.
    pub(super) fn settle(&mut self, hasty: bool) -> Outcome {
        let Some(Pending { what, waits }) = self.pending.take() else {
            return Ok(());
        };
        if self.sticking {
            let millis = if hasty { 0 } else { 3 };
            if waits && self.is_answered(millis)? {
                return Err(format!("{what:?} was answered while requests hung").into());
            }
            self.note("release for the answer");
            self.release();
        }
        self.note(format!("answer to {what:?}"));
        match what {
            What::Stop(vring) => self.has_stopped(vring),
            What::Table { code, kept, poison } => {
                let answer = self.front.peer.reply_to(code)?.payload;
                if answer != [0; 8] {
                    return Err(format!("message {code} was answered with {answer:?}").into());
                }
                // What was answered until now is looked at before its memory is given away.
                self.reap_all()?;
                for region in self.mapped().difference(&kept) {
                    self.counts.removals += 1;
                    self.memory.unmap(*region, poison)?;
                }
                Ok(())
            }
        }
    }

    /// A vring's base came: nothing of it is in flight, and everything popped was answered.
    fn has_stopped(&mut self, vring: usize) -> Outcome {
        let payload = self.front.peer.reply_to(code::GET_VRING_BASE)?.payload;
        let base = match <[u8; 8]>::try_from(payload.as_slice())? {
            [_, _, _, _, base @ ..] => u16::try_from(u32::from_ne_bytes(base))?,
        };
        self.reap(vring)?;
        let ring = &self.front.vrings[vring].ring;
        let (used, next) = (ring.used_index()?, ring.next_avail());
        let left = usize::from(next.wrapping_sub(base));
        if used != base || left != self.outstanding(vring) {
            let owed = self.outstanding(vring);
            return Err(format!(
                "vring {vring} stopped at {base} of {next} with {used} used and {owed} owed"
            )
            .into());
        }
        self.stopped[vring] = Some(base);
        Ok(())
    }

    /// Whether something can be read within a while.
    fn is_answered(&self, millis: u32) -> Outcome<bool> {
        let mut polled = [PollFd::new(self.front.peer.stream(), PollFlags::IN)];
        let a_while = Timespec {
            tv_sec: 0,
            tv_nsec: i64::from(millis) * 1_000_000,
        };
        Ok(poll(&mut polled, Some(&a_while))? > 0)
    }
}
