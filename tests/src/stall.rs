//! Storage that hangs in the kernel for as long as a test wants it to. Needs root.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::frontend::Outcome;
use crate::guest::Scratch;

/// Bytes of the file system that the image lies in.
const FILE_SYSTEM: u64 = 64 << 20;

/// What a daemon is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Image {
    /// A file in a file system that freezes: whoever writes to it hangs.
    File,
    /// A block special over such a file: requests hang, and whoever is not made to wait for them
    /// does not.
    Block,
}

/// An image in an ext4 of its own, which can be frozen: every write to it hangs from then on, as on
/// a disk that does not answer, and is done when it is thawed.
#[derive(Debug)]
pub struct Stall {
    folder: PathBuf,
    file: PathBuf,
    block: Option<PathBuf>,
    frozen: bool,
}

impl Stall {
    /// An image of `size` bytes.
    ///
    /// # Errors
    /// When there is no loop device, or no root to ask for it.
    pub fn new(scratch: &Scratch, kind: Image, size: u64) -> Outcome<Stall> {
        let disk = scratch.image("stall-disk", FILE_SYSTEM)?;
        let folder = scratch.file("stall");
        fs::create_dir(&folder)?;
        run(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&disk))?;
        run(Command::new("mount")
            .args(["-o", "loop"])
            .args([&disk, &folder]))?;
        let mut stall = Stall {
            file: folder.join("image"),
            folder,
            block: None,
            frozen: false,
        };
        File::create_new(&stall.file)?.set_len(size)?;
        if kind == Image::Block {
            let made = run(Command::new("losetup")
                .args(["--find", "--show"])
                .arg(&stall.file))?;
            stall.block = Some(PathBuf::from(made.trim_end()));
        }
        Ok(stall)
    }

    /// What to give the daemon.
    #[must_use]
    pub fn image(&self) -> &Path {
        self.block.as_deref().unwrap_or(&self.file)
    }

    /// What the image has on its storage.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn contents(&self) -> Outcome<Vec<u8>> {
        Ok(fs::read(&self.file)?)
    }

    /// Requests that the kernel has of a block special.
    ///
    /// # Errors
    /// When the image is none.
    pub fn in_flight(&self) -> Outcome<u64> {
        let name = self.block.as_deref().and_then(Path::file_name);
        let name = name.ok_or("it is no block special")?.to_string_lossy();
        let counts = fs::read_to_string(format!("/sys/block/{name}/inflight"))?;
        let mut sum = 0;
        for count in counts.split_whitespace() {
            sum += count.parse::<u64>()?;
        }
        Ok(sum)
    }

    /// From now on writes hang.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn freeze(&mut self) -> Outcome {
        run(Command::new("fsfreeze").arg("-f").arg(&self.folder))?;
        self.frozen = true;
        Ok(())
    }

    /// Writes do not hang any longer.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn thaw(&mut self) -> Outcome {
        self.frozen = false;
        run(Command::new("fsfreeze").arg("-u").arg(&self.folder)).map(drop)
    }
}

impl Drop for Stall {
    fn drop(&mut self) {
        if self.frozen {
            let _ = self.thaw();
        }
        if let Some(block) = &self.block {
            let _ = run(Command::new("losetup").arg("-d").arg(block));
        }
        // Lazily: a daemon of the test may have the image open still.
        let _ = run(Command::new("umount").arg("-l").arg(&self.folder));
    }
}

/// Runs a program that has to succeed; what it printed.
fn run(command: &mut Command) -> Outcome<String> {
    let output = command.output()?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{command:?} (needs root): {said}").into());
    }
    Ok(String::from_utf8(output.stdout)?)
}
