//! What a process tells about itself while it works.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::error::LoadError;

const INTERVAL: Duration = Duration::from_millis(200);

/// Counts since the start.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    /// Reads into the pages that are kept filled.
    pub(crate) reads: u64,
    /// Writes to the sectors of its own that were acknowledged.
    pub(crate) writes: u64,
    /// Reads of sectors of its own that were compared.
    pub(crate) read_backs: u64,
    /// Comparisons of all pages.
    pub(crate) sweeps: u64,
}

/// The file that shows the counts, and the one that ends the load.
#[derive(Debug)]
pub(crate) struct Progress {
    file: PathBuf,
    new: PathBuf,
    stop: PathBuf,
    next: Instant,
}

impl Progress {
    pub(crate) fn new(state: &Path, number: u32) -> Self {
        Self {
            file: state.join(format!("progress.{number}")),
            new: state.join(format!("new.{number}")),
            stop: stop_file(state),
            next: Instant::now(),
        }
    }

    /// Shows the counts and looks whether the load shall end, both no more than a few times a
    /// second.
    pub(crate) fn is_stop_due(&mut self, counts: &Counts) -> Result<bool, LoadError> {
        if Instant::now() < self.next {
            return Ok(false);
        }
        self.show(counts)?;
        self.next = Instant::now() + INTERVAL;
        Ok(self.stop.exists())
    }

    /// Shows the counts now. Who reads the file sees either the old counts or the new ones.
    pub(crate) fn show(&self, counts: &Counts) -> Result<(), LoadError> {
        let Counts {
            reads,
            writes,
            read_backs,
            sweeps,
        } = counts;
        let text = format!("{reads} {writes} {read_backs} {sweeps}\n");
        fs::write(&self.new, text)
            .and_then(|()| fs::rename(&self.new, &self.file))
            .map_err(LoadError::system(format!("write {}", self.file.display())))
    }
}

/// The file whose existence ends the load.
pub(crate) fn stop_file(state: &Path) -> PathBuf {
    state.join("stop")
}
