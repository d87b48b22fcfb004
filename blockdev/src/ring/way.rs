//! Who makes the calls of a file: io_uring's own workers are not the fastest everywhere.

use std::fmt;

use super::call::Call;

/// Who makes a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// The ring's engine: io_uring, or the helper threads.
    Engine,
    /// The worker itself, at once. It is right where a call is a copy between two places in memory,
    /// which takes less time than asking for it. What is too long for that the engine makes.
    Inline,
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Engine => "by the engine",
            Self::Inline => "inline",
        })
    }
}

/// Who makes which calls of a file. The slow ones (fallocate, BLKDISCARD) are always the engine's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ways {
    /// preadv2.
    pub reads: Way,
    /// pwritev2; zeroes may be written, too.
    pub writes: Way,
    /// fdatasync.
    pub syncs: Way,
}

impl Ways {
    /// The same for all.
    #[must_use]
    pub const fn all(way: Way) -> Self {
        Self {
            reads: way,
            writes: way,
            syncs: way,
        }
    }

    /// Who makes this call, of an op that has `bytes` left to move.
    pub(super) fn choose(self, call: &Call, bytes: u64, allowance: &mut Allowance) -> Way {
        let way = match call {
            Call::Read { .. } => self.reads,
            Call::Write { .. } => self.writes,
            Call::Sync => self.syncs,
            Call::Fallocate { .. } | Call::Discard { .. } => Way::Engine,
        };
        match way {
            Way::Inline if !allowance.take(bytes) => Way::Engine,
            Way::Inline | Way::Engine => way,
        }
    }
}

/// Bytes that a worker may still move itself before it looks after its other work.
#[derive(Debug)]
pub(super) struct Allowance(u64);

impl Allowance {
    /// As much as one batch has.
    pub(super) fn new() -> Self {
        Self(INLINE_BYTES)
    }

    /// Takes what a call moves; false when it is more than is left.
    fn take(&mut self, bytes: u64) -> bool {
        let left = self.0.checked_sub(bytes);
        self.0 = left.unwrap_or(self.0);
        left.is_some()
    }
}

/// What a worker moves itself in one batch: 128 ops of 4 KiB, and less than a tenth of a
/// millisecond.
const INLINE_BYTES: u64 = 512 << 10;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::call::Vectors;

    fn read() -> Call {
        Call::Read {
            memory: Vectors::new(&[]),
            offset: 0,
        }
    }

    fn write() -> Call {
        Call::Write {
            memory: Vectors::new(&[]),
            offset: 0,
            flags: 0,
        }
    }

    #[test]
    fn each_kind_of_call_has_its_own_way() {
        let engine = Ways::all(Way::Engine);
        let reads = Ways {
            reads: Way::Inline,
            ..engine
        };
        let writes = Ways {
            writes: Way::Inline,
            ..engine
        };
        let syncs = Ways {
            syncs: Way::Inline,
            ..engine
        };
        let slow = Call::Discard { offset: 0, len: 0 };
        let calls = [read(), write(), Call::Sync, slow];
        let inline = |ways: Ways| {
            calls.map(|call| ways.choose(&call, 0, &mut Allowance::new()) == Way::Inline)
        };
        assert_eq!(inline(engine), [false; 4]);
        assert_eq!(inline(reads), [true, false, false, false]);
        assert_eq!(inline(writes), [false, true, false, false]);
        assert_eq!(inline(syncs), [false, false, true, false]);
        assert_eq!(inline(Ways::all(Way::Inline)), [true, true, true, false]);
    }

    #[test]
    fn a_batch_moves_only_so_much_inline() {
        let inline = Ways::all(Way::Inline);
        let mut allowance = Allowance::new();
        let mut way = |bytes| inline.choose(&read(), bytes, &mut allowance);
        assert_eq!(way(INLINE_BYTES + 1), Way::Engine, "longer than a batch");
        assert_eq!(way(INLINE_BYTES - 4096), Way::Inline);
        assert_eq!(way(8192), Way::Engine, "longer than what is left");
        assert_eq!(way(4096), Way::Inline, "which is still there for others");
        assert_eq!(way(512), Way::Engine);
    }
}
