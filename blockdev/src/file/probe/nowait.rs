//! What the kernel can do of a file without waiting, and what never has to wait.

#![expect(unsafe_code, reason = "preadv2 and fstatfs take raw pointers")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::DirectNeeds;
use crate::ring::FileKind;

/// Whether the kernel has RWF_NOWAIT for reads of a file that is open as it will be served. Tries
/// it at the start of the file, which an empty one has, too; any answer but "not supported" says
/// that it has.
///
/// tmpfs, zram, overlayfs and some network file systems have not. io_uring hands each of their
/// requests to a thread of its own.
pub(in crate::file) fn reads_nowait(file: &File, direct: Option<DirectNeeds>) -> bool {
    let (align, len) = match direct {
        Some(needs) => (needs.memory.max(1) as usize, needs.offset as usize),
        None => (1, 1),
    };
    let mut buffer = vec![0u8; align + len];
    let skip = buffer.as_ptr().align_offset(align);
    let Some(aligned) = buffer.get_mut(skip..skip + len) else {
        return true;
    };
    let vector = libc::iovec {
        iov_base: aligned.as_mut_ptr().cast(),
        iov_len: aligned.len(),
    };
    // SAFETY: the vector is a local, and leads to memory of ours that outlives the call.
    let got = unsafe { libc::preadv2(file.as_raw_fd(), &raw const vector, 1, 0, libc::RWF_NOWAIT) };
    got >= 0 || io::Error::last_os_error().raw_os_error() != Some(libc::EOPNOTSUPP)
}

/// Whether the kernel has RWF_NOWAIT for writes of a file that has it for reads. It cannot be tried
/// without writing: O_DIRECT knows no difference, and through the page cache two file systems can.
pub(in crate::file) fn writes_nowait(
    file: &File,
    kind: FileKind,
    direct: Option<DirectNeeds>,
) -> bool {
    let through_cache = || {
        let magic = magic(file);
        kind == FileKind::Regular && matches!(magic, Some(XFS_MAGIC | BTRFS_MAGIC))
    };
    direct.is_some() || through_cache()
}

/// Whether what is stored there lies in the host's memory, so that a read or a write of it is a
/// copy. What the host has swapped out is read back first.
pub(in crate::file) fn is_memory(file: &File, kind: FileKind) -> bool {
    match kind {
        FileKind::Regular => matches!(
            magic(file),
            Some(TMPFS_MAGIC | RAMFS_MAGIC | HUGETLBFS_MAGIC)
        ),
        FileKind::Block { .. } => file
            .metadata()
            .is_ok_and(|metadata| is_memory_disk(metadata.rdev())),
    }
}

/// Whether a block special is a ramdisk, or a zram that keeps everything compressed in memory.
fn is_memory_disk(device: u64) -> bool {
    let node = format!(
        "/sys/dev/block/{}:{}",
        libc::major(device),
        libc::minor(device)
    );
    let Ok(place) = std::fs::canonicalize(node) else {
        return false;
    };
    match driver(&place) {
        Some("ram") => true,
        // Where zram may move pages to a disk, it names that.
        Some("zram") => match std::fs::read_to_string(place.join("backing_dev")) {
            Ok(disk) => disk.trim() == "none",
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        },
        Some(_) | None => false,
    }
}

/// What the names of a driver's disks begin with, from a disk's place in sysfs or a partition's:
/// "zram" of .../virtual/block/zram0.
fn driver(place: &Path) -> Option<&str> {
    let mut names = place.iter().skip_while(|name| *name != "block").skip(1);
    let disk = names.next()?.to_str()?;
    Some(disk.trim_end_matches(|letter: char| letter.is_ascii_digit()))
}

/// Which file system a file lies in.
fn magic(file: &File) -> Option<u32> {
    // SAFETY: `statfs` is plain old data, for which all zeroes is a value.
    let mut answer: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the answer is a local of the kernel's type.
    let result = unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut answer) };
    // The numbers have 32 bits; some machines have them in a signed field.
    (result == 0).then_some(answer.f_type as u32)
}

// Of linux/magic.h, and of linux/xfs_fs.h in xfsprogs.
const TMPFS_MAGIC: u32 = 0x0102_1994;
const RAMFS_MAGIC: u32 = 0x8584_58F6;
const HUGETLBFS_MAGIC: u32 = 0x9584_58F6;
const XFS_MAGIC: u32 = 0x5846_5342;
const BTRFS_MAGIC: u32 = 0x9123_683E;

#[cfg(test)]
mod tests {
    use super::super::{facts, go_buffered, go_direct};
    use super::*;
    use std::fs::OpenOptions;
    use std::time::{Duration, SystemTime};
    use vmm_sys_util::tempdir::TempDir;

    const SIZE: u64 = 1 << 20;

    /// A folder where the build lies, on a disk.
    fn on_disk() -> TempDir {
        let program = std::env::current_exe().unwrap();
        TempDir::new_in(program.parent().unwrap()).unwrap()
    }

    /// A folder in memory.
    fn in_memory() -> TempDir {
        TempDir::new_in(Path::new("/dev/shm")).unwrap()
    }

    /// A file of this size, open for reading only.
    fn file(folder: &TempDir, size: u64) -> File {
        let path = folder.as_path().join("disk");
        std::fs::write(&path, vec![0x5a; usize::try_from(size).unwrap()]).unwrap();
        File::open(path).unwrap()
    }

    fn direct(file: &File) -> DirectNeeds {
        let facts = facts(file, FileKind::Regular).unwrap();
        go_direct(file, &facts).unwrap().expect("O_DIRECT is there")
    }

    #[test]
    fn a_disk_has_nowait_and_memory_has_not() {
        let (disk, memory) = (on_disk(), in_memory());
        // Many blocks, one, less than one, none.
        for size in [SIZE, 4096, 100, 0] {
            let file = file(&disk, size);
            assert!(
                reads_nowait(&file, None),
                "{size} bytes through the page cache"
            );
            assert!(
                !writes_nowait(&file, FileKind::Regular, None),
                "but ext4 does not write"
            );
            let needs = direct(&file);
            assert!(
                reads_nowait(&file, Some(needs)),
                "{size} bytes with O_DIRECT"
            );
            assert!(writes_nowait(&file, FileKind::Regular, Some(needs)));
            assert!(!is_memory(&file, FileKind::Regular));
        }
        for size in [SIZE, 100, 0] {
            let file = file(&memory, size);
            assert!(!reads_nowait(&file, None), "{size} bytes of tmpfs");
            assert!(is_memory(&file, FileKind::Regular));
        }
    }

    #[test]
    fn asking_leaves_no_trace() {
        for folder in [on_disk(), in_memory()] {
            let file = file(&folder, SIZE);
            let path = folder.as_path().join("disk");
            let old = SystemTime::UNIX_EPOCH + Duration::from_secs(1 << 30);
            let writable = OpenOptions::new().write(true).open(&path).unwrap();
            writable.set_modified(old).unwrap();
            for open in [&file, &writable] {
                for needs in [Some(direct(open)), None] {
                    if needs.is_none() {
                        go_buffered(open).unwrap();
                    }
                    reads_nowait(open, needs);
                    writes_nowait(open, FileKind::Regular, needs);
                    is_memory(open, FileKind::Regular);
                }
            }
            let metadata = std::fs::metadata(&path).unwrap();
            assert_eq!(metadata.modified().unwrap(), old);
            assert_eq!(std::fs::read(&path).unwrap(), vec![0x5a; SIZE as usize]);
        }
    }

    #[test]
    fn a_disk_is_known_by_its_drivers_name() {
        for (place, name) in [
            ("/sys/devices/virtual/block/zram0", Some("zram")),
            ("/sys/devices/virtual/block/ram15/ram15p1", Some("ram")),
            ("/sys/devices/pci0000:00/block/sda/sda1", Some("sda")),
            ("/sys/devices/virtual/block", None),
            ("/sys/devices/virtual/net/ram0", None),
        ] {
            assert_eq!(driver(Path::new(place)), name, "{place}");
        }
    }
}
