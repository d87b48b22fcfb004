//! Fills a disk.

use std::fs::OpenOptions;
use std::io::{BufWriter, Write as _};

use crate::error::LoadError;
use crate::options::Layout;
use crate::pattern::Stamp;

/// Writes generation 0 to every sector and waits until the disk has it.
pub(crate) fn run(layout: &Layout) -> Result<(), LoadError> {
    let failed = || LoadError::system(format!("fill {}", layout.disk.display()));
    let disk = OpenOptions::new().write(true).open(&layout.disk);
    let disk = disk.map_err(failed())?;
    let mut writer = BufWriter::with_capacity(1 << 20, disk);
    for sector in 0..layout.sectors() {
        let stamp = Stamp {
            sector,
            generation: 0,
        };
        for word in stamp.words() {
            writer.write_all(&word.to_ne_bytes()).map_err(failed())?;
        }
    }
    let disk = writer.into_inner().map_err(|error| error.into_error());
    disk.and_then(|disk| disk.sync_all()).map_err(failed())
}
