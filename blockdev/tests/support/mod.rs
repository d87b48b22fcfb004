//! Files and block specials to test on.

#![expect(unsafe_code, reason = "sets loop devices up by ioctl")]
#![expect(clippy::unwrap_used, clippy::panic, reason = "only tests use it")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use blockdev::{Access, Direct, FileOptions};
use vmm_sys_util::tempdir::TempDir;

/// Something with a path that goes away with the value.
pub(crate) trait Place: 'static {
    fn path(&self) -> &Path;
}

/// Read-write, with these choices.
pub(crate) fn options(direct: Direct, block_size: Option<u32>) -> FileOptions {
    FileOptions {
        access: Access::ReadWrite,
        direct,
        block_size,
    }
}

/// A scratch file, and the directory it lies in.
pub(crate) struct Scratch {
    path: PathBuf,
    _dir: TempDir,
}

impl Scratch {
    /// Where the build lies: on a disk, where O_DIRECT and holes are what users have.
    pub(crate) fn on_disk(size: u64) -> Self {
        Self::in_dir(env!("CARGO_TARGET_TMPDIR"), size)
    }

    /// Somewhere else; /dev/shm is a tmpfs, which zeroes no ranges in place.
    pub(crate) fn in_dir(parent: &str, size: u64) -> Self {
        let dir = TempDir::new_in(Path::new(parent)).unwrap();
        let path = dir.as_path().join("disk");
        File::create(&path).unwrap().set_len(size).unwrap();
        Self { path, _dir: dir }
    }
}

impl Place for Scratch {
    fn path(&self) -> &Path {
        &self.path
    }
}

/// A block special over a scratch file. Needs root.
pub(crate) struct LoopDevice {
    path: PathBuf,
    file: File,
    _backing: Scratch,
}

/// `struct loop_config` of linux/loop.h.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

/// `struct loop_info64` of linux/loop.h.
#[repr(C)]
struct LoopInfo {
    places: [u64; 5],
    number_and_encryption: [u32; 3],
    flags: u32,
    names: [u64; 22],
}

/// LO_FLAGS_READ_ONLY of linux/loop.h.
const READ_ONLY: u32 = 1;

const LOOP_CLR_FD: libc::Ioctl = 0x4C01;
const LOOP_CONFIGURE: libc::Ioctl = 0x4C0A;
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4C82;

impl LoopDevice {
    /// One that takes no writes has them refused by the kernel, as by a disk with a switch.
    pub(crate) fn new(size: u64, sector_size: u32, access: Access) -> Self {
        let flags = match access {
            Access::ReadWrite => 0,
            Access::ReadOnly => READ_ONLY,
        };
        let backing = Scratch::on_disk(size);
        let backing_file = open_both_ways(backing.path());
        loop {
            let (path, file) = free_device();
            let config = LoopConfig {
                fd: u32::try_from(backing_file.as_raw_fd()).unwrap(),
                block_size: sector_size,
                info: LoopInfo {
                    places: [0; 5],
                    number_and_encryption: [0; 3],
                    flags,
                    names: [0; 22],
                },
                reserved: [0; 8],
            };
            // SAFETY: LOOP_CONFIGURE reads one `loop_config` from the pointer.
            match unsafe { libc::ioctl(file.as_raw_fd(), LOOP_CONFIGURE, &raw const config) } {
                0 => {
                    return Self {
                        path,
                        file,
                        _backing: backing,
                    };
                }
                // Another test took it in the meantime.
                _ if io::Error::last_os_error().raw_os_error() == Some(libc::EBUSY) => {}
                _ => panic!("{}: {}", path.display(), io::Error::last_os_error()),
            }
        }
    }
}

impl Place for LoopDevice {
    fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // SAFETY: LOOP_CLR_FD takes no pointer.
        unsafe { libc::ioctl(self.file.as_raw_fd(), LOOP_CLR_FD) };
    }
}

/// A loop device nobody uses, at this moment.
fn free_device() -> (PathBuf, File) {
    let control = open_both_ways(Path::new("/dev/loop-control"));
    // SAFETY: LOOP_CTL_GET_FREE takes no pointer.
    let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
    assert!(
        number >= 0,
        "no loop device: {}",
        io::Error::last_os_error()
    );
    let path = PathBuf::from(format!("/dev/loop{number}"));
    let file = open_both_ways(&path);
    (path, file)
}

fn open_both_ways(path: &Path) -> File {
    let file = OpenOptions::new().read(true).write(true).open(path);
    file.unwrap_or_else(|error| panic!("{} (tests need root): {error}", path.display()))
}
