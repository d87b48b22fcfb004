//! What the control thread asks of a worker, and what a worker answers.
//!
//! The control thread never touches a vring's hot state: it sends a [`Command`], the worker applies
//! it between two batches and, where the command owes an answer, sends a [`Report`] as soon as the
//! answer's condition holds. Commands to one worker are applied in the order they were sent.

use std::sync::Arc;
use std::time::Duration;

use blockdev::Lease;
use iov_iter::{DirtyLog, MemoryTable, SharedLog};
use vmm_sys_util::eventfd::EventFd;

use crate::inflight::QueueRegion;
use crate::vring::Addresses;

/// A device's place in the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DeviceId(pub u32);

/// A vring's place in the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct VringId {
    /// The device it belongs to.
    pub device: DeviceId,
    /// Its index in that device.
    pub index: u16,
}

/// Numbers the memory tables of a device, in the order they were sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct TableEpoch(pub u64);

/// Whether a started vring may be popped (vhost-user, *Ring states*).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Enablement {
    /// Popped as kicks come.
    Enabled,
    /// Started, but not popped; what is in flight finishes.
    Disabled,
}

/// What becomes of the requests in flight when a vring stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopMode {
    /// They are finished and published (GET_VRING_BASE).
    Drain,
    /// The front end does not want to wait: they are taken back from the device, and stay recorded
    /// in the in-flight region (GET_VRING_BASE_SKIP_DRAIN). Only for devices that can
    /// ([`blockdev::Abort::Possible`]).
    Suspend,
    /// The front end is gone: they are waited for and abandoned, guest memory is not written.
    Abandon,
}

/// Everything a vring needs to start.
#[derive(Debug)]
pub struct VringSetup {
    /// Entries, a power of two.
    pub size: u16,
    /// Where its parts are, as front-end addresses: they are resolved again at every new table.
    pub addresses: Addresses,
    /// The avail index to pop next (SET_VRING_BASE). With an in-flight region it is not looked at:
    /// what is recorded there and the used index say where to go on.
    pub next_avail: u16,
    /// The vring's part of the in-flight region, if the front end has one.
    pub inflight: Option<QueueRegion>,
    /// The guest address to log writes to the used ring at, where the front end wants them logged
    /// (VHOST_VRING_F_LOG).
    pub log_used: Option<u64>,
    /// The acknowledged virtio features.
    pub features: u64,
    /// Whether it may be popped at once.
    pub enablement: Enablement,
    /// Signalled by the driver when it made requests available; none means that the vring is
    /// polled.
    pub kick: Option<EventFd>,
    /// Signalled by us when requests were used; none means that the driver polls.
    pub call: Option<EventFd>,
    /// Signalled by us when the vring broke.
    pub err: Option<EventFd>,
}

/// The log a front end set.
#[derive(Debug)]
pub struct LogSetup {
    /// The log.
    pub log: SharedLog,
    /// Signalled after requests whose changes were marked were answered (SET_LOG_FD), if the front
    /// end wants that.
    pub event: Option<EventFd>,
}

impl DirtyLog for Box<LogSetup> {
    #[inline]
    fn mark(&self, guest: u64, len: u64) {
        self.log.mark(guest, len);
    }
}

/// What a device's helper thread is asked to do: what may take as long as storage takes. It does
/// one thing at a time, in the order it was asked, and reports each with [`Report::Helper`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Errand {
    /// Take the storage, within so much time.
    Claim(Duration),
    /// Stop trying to take it. Not answered; the claim is.
    GiveUpClaim,
    /// Make what completed stable where others would miss it, and give the storage back.
    Release,
    /// Make what completed stable.
    Sync,
    /// Ask for the size again.
    Refresh,
}

/// What became of an errand, or what a device's pinning thread did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Of a claim.
    Claimed(ClaimEnd),
    /// The storage was given back.
    Released,
    /// Whether what completed is stable.
    Synced(bool),
    /// The size was asked for.
    Refreshed,
    /// Of the memory that is registered nothing is outside the table with this number.
    Unpinned(TableEpoch),
    /// There is something to share ([`crate::blk::Pins::take`]).
    Pinned,
}

/// How a claim ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClaimEnd {
    /// The storage is ours.
    Held,
    /// Somebody else had it for all the time there was.
    TimedOut,
    /// The kernel would not have it locked.
    Failed,
    /// Nobody wants it any more.
    GivenUp,
}

/// What the control thread asks.
#[derive(Debug)]
pub enum Command {
    /// Adopt this memory table for the device. Answered twice: [`Report::Adopted`] when nothing new
    /// starts on an older table, [`Report::Released`] when no request of an older one is left.
    SetTable {
        /// The device.
        device: DeviceId,
        /// The number of the table.
        epoch: TableEpoch,
        /// The table.
        table: Arc<MemoryTable>,
    },
    /// Start a vring. Not answered; a vring that cannot start reports [`Report::Broken`].
    Start(VringId, Box<VringSetup>),
    /// Stop a vring: nothing more is popped. Answered by [`Report::Stopped`] when nothing of it is
    /// in flight and its kick is no longer watched. A vring that is not started answers at once.
    Stop(VringId, StopMode),
    /// Enable or disable a vring. Not answered; applied in order. After a [`Fence`](Self::Fence)
    /// nothing of a disabled vring is in flight.
    Enable(VringId, Enablement),
    /// Replace the kick of a started vring. No kick is lost: the vring is scanned once.
    SetKick(VringId, Option<EventFd>),
    /// Replace the call of a started vring.
    SetCall(VringId, Option<EventFd>),
    /// Replace the err of a started vring.
    SetErr(VringId, Option<EventFd>),
    /// The features the driver acknowledged changed (SET_FEATURES on running vrings). With
    /// VHOST_F_LOG_ALL among them nothing is popped before there is a log.
    SetFeatures(DeviceId, u64),
    /// Mark what is changed in this log from now on, or in none (SET_LOG_BASE). Not answered:
    /// after a [`Fence`](Self::Fence) nobody marks an earlier one.
    SetLog(DeviceId, Option<Box<LogSetup>>),
    /// Log writes to the used ring of a started vring at this guest address, or not at all
    /// (SET_VRING_ADDR). Not answered; applied in order.
    SetUsedLog(VringId, Option<u64>),
    /// The device's size changed: requests are admitted by the new one from now on. Not answered.
    Resize(DeviceId),
    /// Share what is registered of the device's memory. Not answered; a slot is given back before
    /// the [`Report::Released`] of the first table without its region.
    SetPins(DeviceId, Lease),
    /// Answered by [`Report::Fenced`] with the same number: everything sent before it is in force.
    Fence(DeviceId, u64),
    /// Leave, once every request came back. The answer is the end of the thread.
    Quit,
}

impl Command {
    /// The device it is for; the first one for a command that is for none.
    #[must_use]
    pub fn device(&self) -> DeviceId {
        match self {
            Command::SetTable { device, .. }
            | Command::SetFeatures(device, _)
            | Command::SetLog(device, _)
            | Command::Resize(device)
            | Command::SetPins(device, _)
            | Command::Fence(device, _) => *device,
            Command::Start(id, _)
            | Command::Stop(id, _)
            | Command::Enable(id, _)
            | Command::SetKick(id, _)
            | Command::SetCall(id, _)
            | Command::SetErr(id, _)
            | Command::SetUsedLog(id, _) => id.device,
            Command::Quit => DeviceId(0),
        }
    }
}

/// What a worker answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Report {
    /// The table with this number, or a newer one, is what new requests use.
    Adopted(DeviceId, TableEpoch),
    /// No request uses a table older than this number, and no slot memory that is not in it.
    Released(DeviceId, TableEpoch),
    /// What was sent before the fence with this number is in force.
    Fenced(DeviceId, u64),
    /// The vring is stopped; the index is what GET_VRING_BASE answers.
    Stopped {
        /// The vring.
        id: VringId,
        /// The avail index the next owner pops first.
        next_avail: u16,
    },
    /// The vring broke the virtio specification and is no longer popped; err was signalled.
    Broken(VringId),
    /// A device's helper thread has done an errand.
    Helper(DeviceId, Outcome),
}
