//! Folders that live as long as a test.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use vmm_sys_util::tempdir::TempDir;

use super::{GuestError, images};

/// Two folders that are removed on drop. Sockets stand in a short path, since a socket's path may
/// have no more than 107 bytes; images stand beside the guest's own, on a real file system.
#[derive(Debug)]
pub struct Scratch {
    sockets: TempDir,
    files: TempDir,
    next: AtomicU32,
}

impl Scratch {
    /// Makes both folders.
    ///
    /// # Errors
    /// `Host` when a folder cannot be made.
    pub fn new() -> Result<Self, GuestError> {
        let run = images::folder().join("run");
        fs::create_dir_all(&run).map_err(GuestError::host(format!("create {}", run.display())))?;
        let folder = |prefix: PathBuf| {
            TempDir::new_with_prefix(&prefix).map_err(|source| GuestError::Host {
                what: format!("create a folder {}*", prefix.display()),
                source: source.into(),
            })
        };
        Ok(Self {
            sockets: folder(std::env::temp_dir().join("vublk-"))?,
            files: folder(run.join("test-"))?,
            next: AtomicU32::new(0),
        })
    }

    /// A new sparse file of `size` bytes.
    ///
    /// # Errors
    /// `Host` when the file cannot be made.
    pub fn image(&self, name: &str, size: u64) -> Result<PathBuf, GuestError> {
        let path = self.file(name);
        File::create_new(&path)
            .and_then(|file| file.set_len(size))
            .map_err(GuestError::host(format!("create {}", path.display())))?;
        Ok(path)
    }

    /// The path of a file in the images' folder; the file is not made.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.files.as_path().join(name)
    }

    /// The path of a socket; the socket is not made.
    #[must_use]
    pub fn socket(&self, name: &str) -> PathBuf {
        self.sockets.as_path().join(name)
    }

    /// A name nobody else has in this scratch.
    pub(super) fn unique(&self, stem: &str) -> String {
        format!("{stem}-{}", self.next.fetch_add(1, Ordering::Relaxed))
    }

    /// The folder of the images.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.files.as_path()
    }
}
