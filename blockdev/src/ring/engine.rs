//! What the two engines have in common.

use std::fmt;
use std::io;

use thiserror::Error;

/// How a ring reaches the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// io_uring: one system call per batch, which also waits.
    IoUring,
    /// epoll and a pool of threads, for hosts without io_uring. io_uring is not touched at all.
    Threads,
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::IoUring => "io_uring",
            Self::Threads => "threads",
        })
    }
}

/// A ring could not be made.
#[derive(Debug, Error)]
pub enum RingError {
    /// The kernel refuses io_uring: it is too old, or a sysctl or a seccomp filter forbids it.
    #[error("io_uring is not available, the threads engine is: {0}")]
    IoUring(#[source] io::Error),
    /// The threads engine could not be set up.
    #[error("cannot set up epoll: {0}")]
    Epoll(#[source] io::Error),
}

/// What an engine reports, one at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Report {
    /// The kernel answered a call of the op in slot `index`.
    Answer {
        index: u32,
        generation: u32,
        res: i32,
    },
    /// A watched fd was written to; the watch's token.
    Ready(u32),
    /// The helper threads finished something.
    Helpers,
    /// Nothing refers to a watched fd any more; the watch's token.
    Unwatched(u32),
}
