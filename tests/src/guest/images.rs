//! The files every guest starts from.

use std::env;
use std::path::{Path, PathBuf};

use super::GuestError;

/// The kernel, the initramfs and the tools disk that `ci/guest-images.sh` prepared.
#[derive(Debug, Clone)]
pub struct Images {
    /// The distribution's kernel.
    pub kernel: PathBuf,
    /// Busybox, the virtio modules and the agent.
    pub initramfs: PathBuf,
    /// An ext4 image with fio, the ext4 tools, the load and the libraries they need.
    pub tools: PathBuf,
    /// The program of `tests/load`, for the host.
    pub load: PathBuf,
}

impl Images {
    /// Finds the images.
    ///
    /// # Errors
    /// `NoImages` names the first file that is missing.
    pub fn find() -> Result<Self, GuestError> {
        let folder = folder();
        let existing = |name: &str| {
            let path = folder.join(name);
            if path.is_file() {
                Ok(path)
            } else {
                Err(GuestError::NoImages { path })
            }
        };
        Ok(Self {
            kernel: existing("vmlinuz")?,
            initramfs: existing("initramfs.gz")?,
            tools: existing("tools.ext4")?,
            load: existing("guest-load")?,
        })
    }
}

/// Where the images stand: `VUBLK_GUEST_DIR`, or `target/guest` in the workspace.
pub(super) fn folder() -> PathBuf {
    env::var_os("VUBLK_GUEST_DIR").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/guest"),
        PathBuf::from,
    )
}
