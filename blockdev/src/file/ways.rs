//! Which way the calls of a file go.

use std::fs::File;
use std::path::Path;

use super::probe::DirectNeeds;
use super::probe::nowait::{is_memory, reads_nowait, writes_nowait};
use crate::ring::{FileKind, Way, Ways};

/// What decides for a file in memory, where a read or a write is a copy.
///
/// What is on a disk goes to the engine: with NOWAIT io_uring makes the call in the submit itself,
/// and without it the call may take any time, and io_uring's threads are nowhere slower than the
/// helper threads. At depth 32 they take 3.7 against 5.2 us of CPU for a write to ext4's page
/// cache, and 82 against 137 us for one that a FUSE server answers after a millisecond.
#[derive(Clone, Copy, Debug)]
struct Facts {
    kind: FileKind,
    /// Whether the kernel has RWF_NOWAIT for reads.
    reads: bool,
    /// Whether it has it for writes.
    writes: bool,
}

/// Finds the ways of a file that is open as it will be served, and logs them.
pub(super) fn find(path: &Path, file: &File, kind: FileKind, direct: Option<DirectNeeds>) -> Ways {
    let name = path.display();
    if !is_memory(file, kind) {
        // Not even asked: with or without NOWAIT, a disk that hangs would hang the question.
        log::debug!("{name}: storage, reads and writes are made {}", Way::Engine);
        return Ways::all(Way::Engine);
    }
    let reads = reads_nowait(file, direct);
    let facts = Facts {
        kind,
        reads,
        writes: reads && writes_nowait(file, kind, direct),
    };
    let ways = facts.ways();
    let nowait = |has| if has { "NOWAIT" } else { "no NOWAIT" };
    log::info!(
        "{name}: memory, reads are made {} ({}), writes {} ({})",
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
        let way = |nowait| match nowait {
            false => Way::Inline,
            true => Way::Engine,
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
                FileKind::Regular => Way::Inline,
                FileKind::Block { .. } => Way::Engine,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: FileKind = FileKind::Block { sector_size: 512 };

    fn ways(kind: FileKind, reads: bool, writes: bool) -> (Way, Way, Way) {
        let facts = Facts {
            kind,
            reads,
            writes,
        };
        let ways = facts.ways();
        (ways.reads, ways.writes, ways.syncs)
    }

    #[test]
    fn memory_without_nowait_is_moved_inline() {
        let (inline, by_engine) = (Way::Inline, Way::Engine);
        let tmpfs = ways(FileKind::Regular, false, false);
        assert_eq!(tmpfs, (inline, inline, inline));
        let zram = ways(BLOCK, false, false);
        assert_eq!(zram, (inline, inline, by_engine));
        let ramdisk = ways(BLOCK, true, true);
        assert_eq!(ramdisk, (by_engine, by_engine, by_engine));
        let buffered_ramdisk = ways(BLOCK, true, false);
        assert_eq!(buffered_ramdisk, (by_engine, by_engine, by_engine));
    }
}
