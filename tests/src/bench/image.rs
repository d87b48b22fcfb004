//! The file that is measured.

use std::env;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process;

use fastrand::Rng;

use super::BenchError;
use super::error::host;

/// The file that is asked for, or the one in the target folder; fully written, so that no request
/// meets a hole.
pub(super) fn prepare(asked: Option<&Path>, size: u64) -> Result<PathBuf, BenchError> {
    let path = match asked {
        Some(path) => path.to_owned(),
        None => default_path()?,
    };
    if is_written(&path, size) {
        return Ok(path);
    }
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(host(format!("create {}", folder.display())))?;
    }
    write(&path, size).map_err(host(format!("write {}", path.display())))?;
    Ok(path)
}

/// A file in memory, fully written; it is removed on drop.
pub(super) struct Tmpfs {
    path: PathBuf,
}

impl Tmpfs {
    /// A new one of `size` bytes.
    pub(super) fn new(size: u64) -> Result<Self, BenchError> {
        let path = PathBuf::from(format!("/dev/shm/vublk-bench-{}", process::id()));
        let tmpfs = Self { path };
        let what = format!("write {}", tmpfs.path.display());
        write(&tmpfs.path, size).map_err(host(what))?;
        Ok(tmpfs)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // A file that was not even made needs no removal.
        let _ = fs::remove_file(&self.path);
    }
}

fn default_path() -> Result<PathBuf, BenchError> {
    let this = env::current_exe().map_err(host("find this program"))?;
    // Binaries stand in <target>/<profile>.
    let target = this.ancestors().nth(2).unwrap_or(Path::new("target"));
    Ok(target.join("bench").join("disk"))
}

fn is_written(path: &Path, size: u64) -> bool {
    fs::metadata(path).is_ok_and(|file| file.len() == size && file.blocks() * 512 >= size)
}

fn write(path: &Path, size: u64) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    let mut rng = Rng::with_seed(1);
    let mut chunk = vec![0; 1 << 20];
    let mut left = size;
    while left > 0 {
        let len = left.min(chunk.len() as u64);
        rng.fill(&mut chunk[..len as usize]);
        file.write_all(&chunk[..len as usize])?;
        left -= len;
    }
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_with_holes_is_written_anew() {
        let folder = vmm_sys_util::tempdir::TempDir::new().unwrap();
        let path = folder.as_path().join("disk");
        let size = 3 << 20;
        File::create(&path).unwrap().set_len(size).unwrap();
        prepare(Some(&path), size).unwrap();
        assert!(is_written(&path, size));
        let first = fs::read(&path).unwrap();
        assert!(
            first
                .chunks(4096)
                .all(|page| page.iter().any(|&byte| byte != 0))
        );
    }
}
