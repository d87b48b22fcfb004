//! Handlers of the messages that change guest memory (vhost-user, *Memory access*).

use std::os::fd::OwnedFd;
use std::sync::Arc;

use iov_iter::{MemoryTable, RegionSpec};

use super::{Crew, Refusal, Session, Step, Wait};
use crate::proto::RegionMessage;
use crate::worker::{Command, Report, TableEpoch};

/// How far each worker is with the memory tables of one device. Outlives sessions: a worker
/// remembers the last table it was given, whoever gave it.
#[derive(Debug)]
pub struct Epochs {
    latest: TableEpoch,
    adopted: Vec<TableEpoch>,
    released: Vec<TableEpoch>,
    latest_fence: u64,
    fenced: Vec<u64>,
}

impl Epochs {
    /// Before any table was sent.
    #[must_use]
    pub fn new(workers: usize) -> Epochs {
        let none = vec![TableEpoch::default(); workers];
        Epochs {
            latest: TableEpoch::default(),
            adopted: none.clone(),
            released: none,
            latest_fence: 0,
            fenced: vec![0; workers],
        }
    }

    /// Whether every worker uses this table, or a later one, for what it starts.
    pub(super) fn all_adopted(&self, epoch: TableEpoch) -> bool {
        self.adopted.iter().all(|&adopted| adopted >= epoch)
    }

    /// The workers that still have requests on tables before this one.
    pub(super) fn holders(&self, epoch: TableEpoch) -> Vec<usize> {
        let late = |(worker, &released): (usize, &TableEpoch)| (released < epoch).then_some(worker);
        self.released.iter().enumerate().filter_map(late).collect()
    }

    /// Whether every worker has come to this fence.
    pub(super) fn all_fenced(&self, fence: u64) -> bool {
        self.fenced.iter().all(|&fenced| fenced >= fence)
    }

    /// The number of the last table that was sent.
    pub(super) fn latest(&self) -> TableEpoch {
        self.latest
    }

    fn next(&mut self) -> TableEpoch {
        self.latest = TableEpoch(self.latest.0.saturating_add(1));
        self.latest
    }

    pub(super) fn reported(&mut self, worker: usize, report: Report) {
        let (list, epoch) = match report {
            Report::Adopted(_, epoch) => (&mut self.adopted, epoch),
            Report::Released(_, epoch) => (&mut self.released, epoch),
            Report::Fenced(_, fence) => {
                if let Some(known) = self.fenced.get_mut(worker) {
                    *known = fence.max(*known);
                }
                return;
            }
            Report::Stopped { .. } | Report::Broken(_) | Report::Helper(..) => return,
        };
        if let Some(known) = list.get_mut(worker) {
            *known = epoch.max(*known);
        }
    }
}

impl Session {
    /// SET_MEM_TABLE: replaces all regions. Answered when no request can touch an earlier one: the
    /// front end gives the memory back as soon as it has the answer.
    pub(super) fn set_mem_table(
        &mut self,
        regions: Vec<(RegionMessage, OwnedFd)>,
        crew: &dyn Crew,
    ) -> Result<Step, Refusal> {
        let specs = regions
            .into_iter()
            .map(|(region, fd)| spec(region, fd))
            .collect();
        let table = MemoryTable::new(specs)?;
        self.check_logged(&table)?;
        Ok(Step::Wait(Wait::Released(self.send_table(table, crew))))
    }

    /// ADD_MEM_REG: answered when every worker knows the region, since a request of the guest may
    /// name it as soon as the front end has the answer.
    pub(super) fn add_mem_reg(
        &mut self,
        region: RegionMessage,
        fd: OwnedFd,
        crew: &dyn Crew,
    ) -> Result<Step, Refusal> {
        let table = self.table.with_region(spec(region, fd))?;
        self.check_logged(&table)?;
        Ok(Step::Wait(Wait::Adopted(self.send_table(table, crew))))
    }

    /// REM_MEM_REG: names a region by its addresses and size; its offset means nothing.
    pub(super) fn rem_mem_reg(
        &mut self,
        region: RegionMessage,
        crew: &dyn Crew,
    ) -> Result<Step, Refusal> {
        let table =
            self.table
                .without_region(region.guest_addr, region.size, region.front_end_addr)?;
        Ok(Step::Wait(Wait::Released(self.send_table(table, crew))))
    }

    /// Waits until everything that was sent to the workers so far is in force: an acknowledgement
    /// before that would not be true. While every vring is stopped there is nothing to wait for.
    pub(super) fn fence(&mut self, crew: &dyn Crew) -> Step {
        if self.all_stopped() {
            return Step::DONE;
        }
        Step::Wait(Wait::Fenced(self.send_fence(crew)))
    }

    /// Sends every worker a fence, and says which number it got.
    pub(super) fn send_fence(&mut self, crew: &dyn Crew) -> u64 {
        self.epochs.latest_fence = self.epochs.latest_fence.saturating_add(1);
        let fence = self.epochs.latest_fence;
        for worker in 0..crew.count() {
            crew.send(worker, Command::Fence(self.device.id(), fence));
        }
        fence
    }

    /// Gives every worker a table, and says which number it got.
    pub(super) fn send_table(&mut self, table: MemoryTable, crew: &dyn Crew) -> TableEpoch {
        self.table = Arc::new(table);
        let epoch = self.epochs.next();
        for worker in 0..crew.count() {
            let table = self.table.clone();
            crew.send(
                worker,
                Command::SetTable {
                    device: self.device.id(),
                    epoch,
                    table,
                },
            );
        }
        epoch
    }
}

fn spec(region: RegionMessage, fd: OwnedFd) -> RegionSpec {
    let RegionMessage {
        guest_addr,
        size,
        front_end_addr,
        mmap_offset,
    } = region;
    RegionSpec {
        guest_addr,
        size,
        front_end_addr,
        mmap_offset,
        file: fd,
    }
}
