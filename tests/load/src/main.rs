//! Reads and writes a disk for as long as it is told to, and never stops checking what it read.
//!
//! Several processes each keep thousands of pages filled by direct reads of known sectors, several
//! in flight, and compare all of their pages again and again: a page that a migration left behind
//! shows as stale however long ago it was read. Each process also writes a part of the disk that is
//! its own and remembers the generation of every sector, so that a write that was acknowledged and
//! then lost shows too.

mod aio;
mod error;
mod options;
mod own;
mod pages;
mod pattern;
mod pool;
mod prepare;
mod progress;
mod supervisor;
mod worker;

use std::io::{self, Write as _};
use std::process::ExitCode;

use clap::Parser as _;

use options::{Mode, Options};

fn main() -> ExitCode {
    let result = match Options::parse().mode {
        Mode::Prepare(layout) => prepare::run(&layout),
        Mode::Run(load) => supervisor::run(&load),
        Mode::Work { load, number } => worker::run(&load, number),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // In one piece, since several processes may write at a time; nobody reads it if this
            // fails.
            let line = format!("guest-load: {error}\n");
            let _ = io::stderr().write_all(line.as_bytes());
            ExitCode::FAILURE
        }
    }
}
