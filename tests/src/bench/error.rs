//! What can go wrong with a measurement.

use std::error::Error;
use std::io;

use crate::driver::DriverError;
use crate::driver::verify::VerifyError;
use crate::guest::GuestError;

/// Why a benchmark ended early.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The host refused something.
    #[error("cannot {what}")]
    Host {
        /// What was attempted.
        what: String,
        /// The reason.
        source: io::Error,
    },
    /// A daemon did not start, or ended.
    #[error(transparent)]
    Daemon(#[from] GuestError),
    /// The driver cannot go on.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// Nothing came back, or not what was asked for.
    #[error(transparent)]
    Load(#[from] VerifyError),
    /// A request failed.
    #[error("a request came back with {result}")]
    Request {
        /// The result, a negative errno.
        result: i32,
    },
    /// fio failed, or said what cannot be understood.
    #[error("fio: {what}")]
    Fio {
        /// What it said.
        what: String,
    },
    /// The front end in this process cannot go on.
    #[error("the front end cannot go on")]
    FrontEnd(#[source] Box<dyn Error + Send + Sync>),
}

/// A `map_err` that adds what was attempted to an operating system's error.
pub(super) fn host(what: impl Into<String>) -> impl FnOnce(io::Error) -> BenchError {
    let what = what.into();
    move |source| BenchError::Host { what, source }
}
