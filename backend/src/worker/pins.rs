//! The thread that registers a device's guest memory, and what workers count of it.
//!
//! Registering takes seconds for a gibibyte that nobody has touched, so neither the control thread
//! nor the helper, which front ends wait for, does it. Memory is registered after its message was
//! answered, and given back before the one that takes it away is.

use std::io;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Weak};
use std::thread::Builder;

use blockdev::{Buffers, Engine, MAX_SLOTS, Op, Progress, RegisteredBuffers};
use iov_iter::{HoldFlags, MemoryTable, Region};
use log::{debug, error, info, warn};
use vmm_sys_util::eventfd::EventFd;

use super::log_gate::LogGate;
use super::{NOBODY, Outcome, Report, TableEpoch, WorkerError};
use crate::blk::{BlkDevice, Counters, Pin};

/// One device's pinning thread. Dropping it lets the thread go, with all that is registered.
#[derive(Debug)]
pub(super) struct Pinner(Sender<Wanted>);

/// What is to be registered, and nothing else.
struct Wanted {
    epoch: TableEpoch,
    table: Arc<MemoryTable>,
}

/// The thread's side.
struct Thread {
    device: Arc<BlkDevice>,
    buffers: Buffers,
    inbox: Receiver<Wanted>,
    reports: Sender<(usize, Report)>,
    told: Arc<EventFd>,
    table: Arc<MemoryTable>,
    /// Regions that cannot be registered.
    refused: Vec<Weak<Region>>,
    refusals: LogGate,
}

/// What the memory of `devices[place]` is registered in; none where it is not to be, or cannot.
pub(super) fn prepare(devices: &[Arc<BlkDevice>], place: usize, engine: Engine) -> Option<Buffers> {
    let device = devices.get(place)?;
    let Pin::Registered { slot_shift } = device.pins().wanted() else {
        return None;
    };
    let name = device.name();
    if device.storage().capabilities().buffers == RegisteredBuffers::Unused {
        warn!("{name}: guest memory is not pinned: the device does not move it by io_uring");
        return None;
    }
    if engine == Engine::Threads {
        warn!("{name}: guest memory is not pinned: only io_uring can use that");
        return None;
    }
    let share = MAX_SLOTS / u16::try_from(devices.len()).unwrap_or(MAX_SLOTS);
    let first = share.checked_mul(u16::try_from(place).ok()?)?;
    match Buffers::new(first..first.checked_add(share)?, slot_shift) {
        Ok(buffers) => {
            device.pins().go_live();
            Some(buffers)
        }
        Err(error) => {
            warn!(
                "{name}: guest memory is not pinned: registered memory cannot be shared between \
                 rings, which Linux 6.13 and later can: {error}"
            );
            None
        }
    }
}

impl Pinner {
    /// Starts the thread. It sleeps until there is memory.
    pub(super) fn start(
        device: Arc<BlkDevice>,
        buffers: Buffers,
        reports: Sender<(usize, Report)>,
        told: Arc<EventFd>,
    ) -> Result<Pinner, WorkerError> {
        let (send, inbox) = channel();
        let thread = Thread {
            device,
            buffers,
            inbox,
            reports,
            told,
            table: Arc::new(MemoryTable::empty()),
            refused: Vec::new(),
            refusals: LogGate::default(),
        };
        // Nobody waits for its end: with the last session, all that was registered is given back.
        Builder::new()
            .name("pins".into())
            .spawn(move || thread.run())
            .map_err(WorkerError::Thread)?;
        Ok(Pinner(send))
    }

    /// Gives back what is not in this table, reports [`Outcome::Unpinned`], and registers what is;
    /// the workers have nothing left that is not in it.
    pub(super) fn turn_to(&self, epoch: TableEpoch, table: Arc<MemoryTable>) {
        if self.0.send(Wanted { epoch, table }).is_err() {
            error!("a device's pinning thread is gone");
        }
    }
}

impl Thread {
    fn run(mut self) {
        loop {
            let missing = self.missing();
            // A table that has come goes first: its message waits for what is to be given back.
            let wanted = match missing {
                None => self
                    .inbox
                    .recv()
                    .map_err(|_gone| TryRecvError::Disconnected),
                Some(_) => self.inbox.try_recv(),
            };
            match (wanted, missing) {
                (Ok(wanted), _) => self.turn_to(wanted),
                (Err(TryRecvError::Empty), Some(region)) => self.register(&region),
                (Err(_), _) => break,
            }
        }
        // Nobody takes it any more, and `buffers` would wait for that.
        drop(self.device.pins().take());
    }

    /// The next region to register.
    fn missing(&self) -> Option<Arc<Region>> {
        let mut regions = self.table.regions().iter();
        let is_missing = |region: &&Arc<Region>| {
            let mut refused = self.refused.iter();
            !self.buffers.has(region)
                && !refused.any(|refused| std::ptr::eq(refused.as_ptr(), Arc::as_ptr(region)))
        };
        regions.find(is_missing).cloned()
    }

    fn turn_to(&mut self, wanted: Wanted) {
        let Wanted { epoch, table } = wanted;
        // What was lent and not taken yet may be of memory that goes now.
        drop(self.device.pins().take());
        self.buffers.retain(|pinned| pinned.is_of(&table));
        // With the old table goes the last that keeps its regions mapped.
        self.table = table;
        self.refused.retain(|region| region.strong_count() > 0);
        self.show();
        self.tell(Outcome::Unpinned(epoch));
        // The workers may not have shared what was lent last.
        self.lend();
    }

    /// Goes on registering a region.
    fn register(&mut self, region: &Arc<Region>) {
        match self.buffers.register(region) {
            Ok(Progress::Begun) => {}
            Ok(Progress::Complete) => {
                debug!("{}: {} is pinned", self.device.name(), name_of(region));
                self.show();
                self.lend();
            }
            Err(error) => {
                self.refused.push(Arc::downgrade(region));
                self.complain(region, &error);
            }
        }
    }

    /// Has the workers share what is registered as a whole.
    fn lend(&mut self) {
        if self.buffers.complete() > 0 {
            self.device.pins().put(self.buffers.lend());
            self.tell(Outcome::Pinned);
        }
    }

    fn show(&self) {
        let regions = self.table.regions().len();
        self.device.pins().show(regions, self.buffers.complete());
    }

    fn complain(&mut self, region: &Region, error: &io::Error) {
        if let Some(held_back) = self.refusals.open() {
            warn!(
                "{}: {} is not pinned, its requests go without: {error}{} ({held_back} more)",
                self.device.name(),
                name_of(region),
                mend(error)
            );
        }
    }

    fn tell(&self, outcome: Outcome) {
        let report = Report::Helper(self.device.id(), outcome);
        // A control thread that is gone has nobody left to tell.
        let _ = self.reports.send((NOBODY, report));
        let _ = self.told.write(1);
    }
}

/// Counts how the memory of an op is held.
#[inline]
pub(super) fn count(op: &Op, device: &BlkDevice, counters: &Counters) {
    let hold = match op {
        Op::Read { into, .. } => into.hold(),
        Op::Write { from, .. } => from.hold(),
        Op::Flush { .. } | Op::Discard { .. } | Op::WriteZeroes { .. } => return,
    };
    let flags = hold.flags();
    if flags.contains(HoldFlags::BOUNCED) {
        counters.bounced.add(1);
    }
    if flags.contains(HoldFlags::PINNED) {
        counters.pinned.add(1);
    } else if device.pins().is_live() {
        counters.pin_fallbacks.add(1);
        if hold.view().has_pins() && device.pins().first_fallback() {
            info!(
                "{}: requests of several parts, over a slot's edge, through a bounce buffer or in \
                 memory that is not pinned go without pins (said once; counted as pin_fallbacks)",
                device.name()
            );
        }
    }
}

fn name_of(region: &Region) -> String {
    let (start, mib) = (region.guest_addr(), region.size() >> 20);
    format!("guest memory at {start:#x} ({mib} MiB)")
}

/// What can be done about a refusal, for the end of a line.
fn mend(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOMEM) => {
            "; the limit of locked memory is per user: raise it (ulimit -l, LimitMEMLOCK=), or \
             give the daemon CAP_IPC_LOCK"
        }
        Some(libc::EFAULT | libc::EOPNOTSUPP) => {
            "; memory can be pinned in a memfd, tmpfs or hugetlbfs, and not in a file on a disk"
        }
        Some(libc::ENOSPC) => "; all slots are taken",
        _ => "",
    }
}
