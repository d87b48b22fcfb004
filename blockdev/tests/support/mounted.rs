//! A small file system that tests may fill and freeze.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use blockdev::Access;
use vmm_sys_util::tempdir::TempDir;

use super::support::{LoopDevice, Place};

/// An ext4 of 16 MiB, mounted for as long as the value lives.
pub(crate) struct Mounted {
    dir: TempDir,
    _disk: LoopDevice,
}

impl Mounted {
    pub(crate) fn new() -> Self {
        let disk = LoopDevice::new(16 << 20, 512, Access::ReadWrite);
        run(Command::new("mkfs.ext4")
            .args(["-q", "-F", "-m", "0"])
            .arg(disk.path()));
        let dir = TempDir::new().expect("a directory");
        run(Command::new("mount").arg(disk.path()).arg(dir.as_path()));
        Self { dir, _disk: disk }
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.as_path()
    }

    /// A file without any blocks.
    pub(crate) fn file(&self, size: u64) -> PathBuf {
        let path = self.path().join("image");
        let made = File::create(&path).and_then(|file| file.set_len(size));
        made.expect("a file takes no space yet");
        path
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Lazily: a device of the test may be open still.
        run(Command::new("umount").arg("-l").arg(self.path()));
    }
}

/// Runs a program that has to succeed.
pub(crate) fn run(command: &mut Command) {
    let status = command.status();
    assert!(
        status.is_ok_and(|status| status.success()),
        "{command:?} (tests need root)"
    );
}
