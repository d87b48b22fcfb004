//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

/// What the disk holds: first the known sectors, then a part for each process.
#[derive(Debug, Clone, Args)]
pub(crate) struct Layout {
    /// The disk.
    pub(crate) disk: PathBuf,
    /// Processes that work at a time, each with sectors of its own.
    #[arg(long, default_value_t = 4)]
    pub(crate) processes: u32,
    /// Sectors that every process reads and none writes.
    #[arg(long, default_value_t = 65536)]
    pub(crate) known_sectors: u32,
    /// Sectors that each process has for itself; without any, the load only reads.
    #[arg(long, default_value_t = 16384)]
    pub(crate) own_sectors: u32,
}

impl Layout {
    /// The size of the disk, in sectors.
    pub(crate) fn sectors(&self) -> u64 {
        u64::from(self.known_sectors) + u64::from(self.processes) * u64::from(self.own_sectors)
    }

    /// The first sector that belongs to process `number`.
    pub(crate) fn own_start(&self, number: u32) -> u64 {
        u64::from(self.known_sectors) + u64::from(number) * u64::from(self.own_sectors)
    }
}

/// The load of all processes.
#[derive(Debug, Clone, Args)]
pub(crate) struct Load {
    #[command(flatten)]
    pub(crate) layout: Layout,
    /// A folder for the progress of each process; a file `stop` in it ends the load.
    #[arg(long)]
    pub(crate) state: PathBuf,
    /// Pages that each process keeps filled and checks.
    #[arg(long, default_value_t = 2048)]
    pub(crate) pages: u32,
    /// Requests in flight in each process.
    #[arg(long, default_value_t = 8)]
    pub(crate) depth: u32,
    /// What the sizes and places of the requests follow from.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Mode {
    /// Fills the disk with the contents of generation 0.
    Prepare(Layout),
    /// Starts the processes and waits for them.
    Run(Load),
    /// One of the processes.
    #[command(hide = true)]
    Work {
        #[command(flatten)]
        load: Load,
        /// Which one it is, from 0.
        #[arg(long)]
        number: u32,
    },
}

/// A load on a disk that checks every byte it reads.
#[derive(Debug, Parser)]
pub(crate) struct Options {
    #[command(subcommand)]
    pub(crate) mode: Mode,
}
