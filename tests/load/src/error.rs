//! What can go wrong, the disk's contents above all.

use std::io;
use std::time::Duration;

use thiserror::Error;

use crate::pages::WrongWord;
use crate::pattern::Stamp;

/// Why a load ends before it is told to.
#[derive(Debug, Error)]
pub(crate) enum LoadError {
    /// The system refused something.
    #[error("{what}: {source}")]
    System { what: String, source: io::Error },
    /// A request failed.
    #[error("{what} failed: {source}")]
    Request { what: String, source: io::Error },
    /// A request moved another number of bytes than it was to.
    #[error("{what} moved {moved} of {length} bytes")]
    Short {
        what: String,
        moved: i64,
        length: usize,
    },
    /// What a read has just brought is not what the disk holds.
    #[error("wrong data in {what}: {wrong}")]
    WrongData { what: String, wrong: Wrong },
    /// A page that was right after its read is not any more.
    #[error("stale page {page}, offset {offset}, {age:?} after its read: {wrong}")]
    StalePage {
        page: usize,
        offset: usize,
        age: Duration,
        wrong: Wrong,
    },
    /// A process ended badly and has said why.
    #[error("process {number} ended with {status}")]
    Process { number: u32, status: String },
}

/// What was expected and what was found.
#[derive(Debug, Error)]
#[error(
    "expected {expected}, found {found:#018x} in word {index} of what says it is {claimed}",
    index = .word.index,
    found = .word.found,
    claimed = .word.claimed
)]
pub(crate) struct Wrong {
    pub(crate) expected: Stamp,
    pub(crate) word: WrongWord,
}

impl LoadError {
    /// A `map_err` that adds what was attempted to an operating system's error.
    pub(crate) fn system(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::System { what, source }
    }
}
