//! One way of asking: how the requests are, and how the driver waits for them.

use std::fmt::{self, Display, Formatter};

use clap::ValueEnum;
use fastrand::Rng;
use serde_json::{Value, json};

use crate::driver::verify::Waiting;

/// What the requests of one measurement are like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Case {
    /// How the driver waits.
    pub waiting: WaitingName,
    /// What each request does, at random offsets.
    pub operation: Operation,
    /// The length of each request, in bytes.
    pub block: u64,
    /// Vrings, all of them driven by one thread.
    pub queues: usize,
    /// Whether VIRTIO_F_EVENT_IDX is taken.
    pub event_idx: Switch,
    /// Requests in flight on each vring.
    pub depth: u32,
}

impl Case {
    /// Requests in flight on all vrings.
    pub(super) fn in_flight(&self) -> u32 {
        self.depth * self.queues as u32
    }

    /// Its part of a report.
    pub(super) fn json(&self) -> Value {
        json!({
            "waiting": self.waiting.name(),
            "operation": self.operation.name(),
            "block_size": self.block,
            "queues": self.queues,
            "event_idx": self.event_idx == Switch::On,
            "depth": self.depth,
        })
    }
}

impl Display for Case {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self {
            waiting,
            operation,
            block,
            queues,
            event_idx,
            depth,
        } = self;
        let block = bytes(*block);
        let (waiting, operation) = (waiting.name(), operation.name());
        write!(f, "{waiting} driver, {operation} {block}, depth {depth}")?;
        if *queues > 1 {
            write!(f, ", {queues} queues")?;
        }
        match event_idx {
            Switch::On => Ok(()),
            Switch::Off => f.write_str(", no event index"),
        }
    }
}

/// How the driver waits, by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum WaitingName {
    /// It looks at the used ring all the time.
    Polling,
    /// It sleeps until it is called.
    Sleeping,
}

impl WaitingName {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Polling => "polling",
            Self::Sleeping => "sleeping",
        }
    }

    pub(super) fn waiting(self) -> Waiting {
        match self {
            Self::Polling => Waiting::Polling,
            Self::Sleeping => Waiting::Sleeping,
        }
    }
}

/// What each request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Operation {
    /// It reads.
    Read,
    /// It writes.
    Write,
    /// Seven of ten read, the others write.
    Mixed,
}

impl Operation {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Mixed => "mixed",
        }
    }

    /// Whether the next request reads.
    #[inline]
    pub(super) fn reads(self, rng: &mut Rng) -> bool {
        match self {
            Self::Read => true,
            Self::Write => false,
            Self::Mixed => rng.u8(..100) < READ_PERCENT,
        }
    }
}

/// On or off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// On.
    On,
    /// Off.
    Off,
}

/// A number of bytes, as people write it: 512, 4K, 1M.
pub(super) fn bytes(count: u64) -> String {
    let units = [(30, "G"), (20, "M"), (10, "K")];
    let whole = |&(shift, _): &(u32, _)| count > 0 && count.is_multiple_of(1 << shift);
    match units.into_iter().find(whole) {
        Some((shift, unit)) => format!("{}{unit}", count >> shift),
        None => count.to_string(),
    }
}

/// The part of a mixed load that reads, in percent.
pub(super) const READ_PERCENT: u8 = 70;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mixed_load_reads_seven_times_of_ten() {
        let mut rng = Rng::with_seed(3);
        let reads = (0..10_000).filter(|_| Operation::Mixed.reads(&mut rng));
        let reads = reads.count();
        assert!((6_800..7_200).contains(&reads), "{reads}");
        assert!(Operation::Read.reads(&mut rng) && !Operation::Write.reads(&mut rng));
    }

    #[test]
    fn bytes_are_written_shortly() {
        let written = [512, 4096, 6144, 1 << 20, 3 << 30].map(bytes);
        assert_eq!(written, ["512", "4K", "6K", "1M", "3G"]);
    }
}
