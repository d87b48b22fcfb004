//! Which way the calls of a file go.

use std::fs::File;
use std::path::Path;

use super::probe::DirectNeeds;
use super::probe::nowait::{is_memory, reads_nowait, writes_nowait};
use crate::ring::{FileKind, Way, Ways};

/// What decides.
#[derive(Clone, Copy, Debug)]
struct Facts {
    kind: FileKind,
    /// Whether a read or a write is a copy.
    memory: bool,
    /// Whether the kernel has RWF_NOWAIT for reads.
    reads: bool,
    /// Whether it has it for writes.
    writes: bool,
}

/// Finds the ways of a file that is open as it will be served, and logs them.
pub(super) fn find(path: &Path, file: &File, kind: FileKind, direct: Option<DirectNeeds>) -> Ways {
    let reads = reads_nowait(file, direct);
    let facts = Facts {
        kind,
        memory: is_memory(file, kind),
        reads,
        writes: reads && writes_nowait(file, kind, direct),
    };
    let ways = facts.ways();
    let level = match ways == Ways::all(Way::Engine) {
        true => log::Level::Debug,
        false => log::Level::Info,
    };
    let nowait = |has| if has { "NOWAIT" } else { "no NOWAIT" };
    log::log!(
        level,
        "{}: {}, reads are made {} ({}), writes {} ({})",
        path.display(),
        if facts.memory { "memory" } else { "storage" },
        ways.reads,
        nowait(facts.reads),
        ways.writes,
        nowait(facts.writes),
    );
    ways
}

impl Facts {
    /// The fastest ways. For 4 KiB of a tmpfs file the worker takes 4 us at depth 1 and 2.1 us at
    /// depth 32, io_uring's threads 12 to 25 us and 2.4 us, and helper threads 13 us and 3.6 us (of
    /// one CPU, Linux 6.18).
    fn ways(self) -> Ways {
        let way = |nowait| match (nowait, self.memory) {
            (false, true) => Way::Inline,
            // With NOWAIT io_uring makes the call in the submit itself. Without it the call may
            // take any time, and io_uring's threads are nowhere slower than the helper threads: at
            // depth 32 they take 3.7 against 5.2 us of CPU for a write to ext4's page cache, and 82
            // against 137 us for one that a FUSE server answers after a millisecond.
            (true, _) | (false, false) => Way::Engine,
        };
        Ways {
            reads: way(self.reads),
            writes: match self.kind {
                // The page cache above a disk in memory makes writers wait for it now and then.
                FileKind::Block { .. } if self.reads => Way::Engine,
                FileKind::Regular | FileKind::Block { .. } => way(self.writes),
            },
            // A file in memory has no stable storage to wait for; a disk in memory has the host's
            // page cache above it, which may have a lot to write.
            syncs: match self.kind {
                FileKind::Regular if self.memory => Way::Inline,
                FileKind::Regular | FileKind::Block { .. } => Way::Engine,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: FileKind = FileKind::Block { sector_size: 512 };

    fn ways(kind: FileKind, memory: bool, reads: bool, writes: bool) -> (Way, Way, Way) {
        let facts = Facts {
            kind,
            memory,
            reads,
            writes,
        };
        let ways = facts.ways();
        (ways.reads, ways.writes, ways.syncs)
    }

    #[test]
    fn only_memory_without_nowait_is_moved_inline() {
        let engine = (Way::Engine, Way::Engine, Way::Engine);
        for (reads, writes) in [(true, true), (true, false), (false, false)] {
            assert_eq!(ways(FileKind::Regular, false, reads, writes), engine);
            assert_eq!(ways(BLOCK, false, reads, writes), engine);
        }
        let (inline, by_engine) = (Way::Inline, Way::Engine);
        let tmpfs = ways(FileKind::Regular, true, false, false);
        assert_eq!(tmpfs, (inline, inline, inline));
        let zram = ways(BLOCK, true, false, false);
        assert_eq!(zram, (inline, inline, by_engine));
        let ramdisk = ways(BLOCK, true, true, true);
        assert_eq!(ramdisk, engine);
        let buffered_ramdisk = ways(BLOCK, true, true, false);
        assert_eq!(buffered_ramdisk, engine);
    }
}
