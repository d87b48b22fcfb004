//! Huge pages for a guest's memory.

use std::fs::{self, File};
use std::path::Path;

use super::{GuestError, images};

const POOL: &str = "/proc/sys/vm/nr_hugepages";
const PAGE_MIB: u32 = 2;

/// Huge pages of 2 MiB that were added to the system's pool, taken out again on drop. One test at a
/// time holds them, over all processes that use the same images.
#[derive(Debug)]
pub struct HugePages {
    added: u32,
    /// Held until the pool has its old size again.
    _lock: File,
}

impl HugePages {
    /// Adds `mib` mebibytes of free huge pages to the pool.
    ///
    /// # Errors
    /// `Host` when the pool cannot be changed (it takes root) or memory is too fragmented.
    pub fn reserve(mib: u32) -> Result<Self, GuestError> {
        let path = images::folder().join("hugepages.lock");
        let what = format!("lock {}", path.display());
        let lock = File::create(&path)
            .and_then(|file| file.lock().map(|()| file))
            .map_err(GuestError::host(what))?;
        let before = read(POOL)?;
        let wanted = before + mib.div_ceil(PAGE_MIB);
        // Compaction first: pages in a row are what the kernel lacks on a machine that ran long.
        write("/proc/sys/vm/compact_memory", 1)?;
        write(POOL, wanted)?;
        let now = read(POOL)?;
        let this = Self {
            added: now.saturating_sub(before),
            _lock: lock,
        };
        if now < wanted {
            let reason = format!("the kernel found {now} of {wanted} pages");
            let what = format!("reserve {mib} MiB of huge pages");
            return Err(GuestError::Host {
                what,
                source: std::io::Error::other(reason),
            });
        }
        Ok(this)
    }

    /// The pages of the pool that nobody uses.
    ///
    /// # Errors
    /// `Host` or `Garbled` when the kernel does not say.
    pub fn free() -> Result<u32, GuestError> {
        read("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        // Not the old size: others may have changed the pool meanwhile.
        let result = read(POOL).and_then(|now| write(POOL, now.saturating_sub(self.added)));
        if let Err(error) = result {
            eprintln!("the pool of huge pages keeps its size: {error}");
        }
    }
}

fn read(path: &str) -> Result<u32, GuestError> {
    let text = fs::read_to_string(path).map_err(GuestError::host(format!("read {path}")))?;
    text.trim().parse().map_err(|error| {
        let what = format!("{text:?} in {path}: {error}");
        GuestError::Garbled {
            who: "the kernel",
            what,
        }
    })
}

fn write(path: impl AsRef<Path>, value: u32) -> Result<(), GuestError> {
    let path = path.as_ref();
    let what = format!("write {value} to {}", path.display());
    fs::write(path, value.to_string()).map_err(GuestError::host(what))
}
