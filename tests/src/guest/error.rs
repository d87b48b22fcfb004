//! What can go wrong with a guest, told so that a test's output is enough to act on.

use std::error::Error;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

use super::agent::Output;

/// Why a guest, its daemon or a command in it failed.
#[derive(thiserror::Error)]
pub enum GuestError {
    /// The kernel, the initramfs or the tools disk has not been prepared.
    #[error("{} is missing: run ci/test.sh guest", .path.display())]
    NoImages {
        /// The file that was looked for.
        path: PathBuf,
    },
    /// No vublk binary stands where the tests look for one.
    #[error("no vublk binary at {}: run ci/test.sh guest, or set VUBLK_BIN", .path.display())]
    NoBinary {
        /// The last place that was looked at.
        path: PathBuf,
    },
    /// An environment variable holds a value that means nothing here.
    #[error("{name}={value} is not understood, expected {expected}")]
    Environment {
        /// The variable.
        name: &'static str,
        /// Its value.
        value: String,
        /// The values it may have.
        expected: &'static str,
    },
    /// The daemon asked for has no such device or option.
    #[error("{daemon} cannot serve {what}")]
    Unsupported {
        /// The daemon's name.
        daemon: &'static str,
        /// What was asked of it.
        what: String,
    },
    /// The host refused something the harness needs.
    #[error("{what}")]
    Host {
        /// What was attempted, with the file or program it was attempted on.
        what: String,
        /// The operating system's reason.
        source: io::Error,
    },
    /// A program ended while it was still needed, or ended badly.
    #[error("{program} ended with {status}; its output:\n{log}")]
    Ended {
        /// The program.
        program: String,
        /// How it ended.
        status: ExitStatus,
        /// What it wrote to its standard output and error.
        log: String,
    },
    /// Something did not happen in time.
    #[error("{what} took longer than {limit:?}\n{context}")]
    TimedOut {
        /// What was waited for.
        what: String,
        /// The limit.
        limit: Duration,
        /// The guest's console, or a program's output.
        context: String,
    },
    /// A virtual CPU lost its timer during the boot, which is TCG's fault and no disk's.
    #[error("a virtual CPU lost its timer\n--- console\n{console}")]
    LostTimer {
        /// The end of the guest's console.
        console: String,
    },
    /// A command ran in the guest and failed.
    #[error("in the guest: {command}\n{output}")]
    Command {
        /// The command.
        command: String,
        /// Its status and outputs.
        output: Output,
    },
    /// The agent in the guest, QMP or fio said something that cannot be understood.
    #[error("{who} said what cannot be understood: {what}")]
    Garbled {
        /// Who said it.
        who: &'static str,
        /// What was said, or what is wrong with it.
        what: String,
    },
    /// QMP answered a command with an error.
    #[error("QMP refused {command}: {reason}")]
    Qmp {
        /// The command.
        command: String,
        /// QEMU's reason.
        reason: String,
    },
}

/// A test that returns an error shows it by `Debug`; this one keeps consoles and logs readable.
impl fmt::Debug for GuestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")?;
        match self.source() {
            Some(source) => write!(f, "\ncaused by: {source}"),
            None => Ok(()),
        }
    }
}

impl GuestError {
    /// A `map_err` that adds what was attempted to an operating system's error.
    pub fn host(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Host { what, source }
    }
}
