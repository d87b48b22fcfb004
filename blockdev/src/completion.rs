//! How an operation ended.

use std::io;

use thiserror::Error;

use crate::op::{Op, Tag};

/// An op that came back, with everything it was given.
#[derive(Debug)]
#[must_use = "a completion carries the request's memory and is owed an answer"]
pub struct Completion {
    /// The tag it was prepped with.
    pub tag: Tag,
    /// The op, with its memory.
    pub op: Op,
    /// Bytes that arrived: in memory for a read, at the device for a write. On an error of a read,
    /// memory beyond them may have changed too.
    pub moved: u32,
    /// What the device says.
    pub outcome: Result<(), IoError>,
}

impl Completion {
    /// An op that failed before anything moved.
    pub fn failed(tag: Tag, op: Op, error: IoError) -> Self {
        Self {
            tag,
            op,
            moved: 0,
            outcome: Err(error),
        }
    }
}

/// Why an op failed. All of these are the host's fault or the device's, never the guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum IoError {
    /// The kernel refused or failed it; an errno.
    #[error("{}", io::Error::from_raw_os_error(*.0))]
    Os(i32),
    /// The transfer ended early and would not go on.
    #[error("only {got} of {want} bytes were transferred")]
    Short {
        /// Bytes asked for.
        want: u32,
        /// Bytes transferred.
        got: u32,
    },
    /// The offset or the length is not a multiple of the block size.
    #[error("offset or length is not a multiple of the block size, {block_size}")]
    Misaligned {
        /// The device's block size in bytes.
        block_size: u32,
    },
    /// The device became smaller since the extent was checked.
    #[error("the range ends beyond the device")]
    OutOfRange,
    /// A change, on a read-only device.
    #[error("the device is read-only")]
    ReadOnly,
    /// The device cannot do this op.
    #[error("the device does not support this operation")]
    Unsupported,
    /// The device was told to give up what it had in flight.
    #[error("the operation was aborted")]
    Aborted,
}

/// What has to happen after one system call of a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Everything arrived.
    Done,
    /// This much more arrived; the rest is still wanted.
    Partial(u32),
    /// Nothing happened; the same call may work now.
    Again,
    /// It is over.
    Failed(IoError),
}

/// Judges one call of a transfer: `want` bytes were still missing and the kernel answered `res`.
///
/// This is the only place that does: a short transfer is never a success, and one that makes no
/// progress is an error (the device ends there, or it is broken).
#[must_use]
pub fn settle(want: u32, res: i32) -> Verdict {
    match u32::try_from(res) {
        Ok(got) if got >= want => Verdict::Done,
        Ok(0) => Verdict::Failed(IoError::Short { want, got: 0 }),
        Ok(got) => Verdict::Partial(got),
        Err(_) => match res.saturating_neg() {
            libc::EINTR | libc::EAGAIN => Verdict::Again,
            errno => Verdict::Failed(IoError::Os(errno)),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_answer_of_a_transfer_is_judged() {
        assert_eq!(settle(4096, 4096), Verdict::Done);
        assert_eq!(settle(0, 0), Verdict::Done);
        assert_eq!(settle(4096, 512), Verdict::Partial(512));
        assert_eq!(
            settle(4096, 0),
            Verdict::Failed(IoError::Short { want: 4096, got: 0 })
        );
        assert_eq!(settle(4096, -libc::EAGAIN), Verdict::Again);
        assert_eq!(settle(4096, -libc::EINTR), Verdict::Again);
        assert_eq!(
            settle(4096, -libc::EIO),
            Verdict::Failed(IoError::Os(libc::EIO))
        );
        assert_eq!(
            settle(0, -libc::EIO),
            Verdict::Failed(IoError::Os(libc::EIO))
        );
        assert_eq!(settle(1, i32::MIN), Verdict::Failed(IoError::Os(i32::MAX)));
    }

    #[test]
    fn an_error_says_what_happened() {
        let text = IoError::Os(libc::ENOSPC).to_string();
        assert!(text.contains("No space left"), "{text}");
        let text = IoError::Short { want: 8, got: 3 }.to_string();
        assert!(text.contains("3 of 8"), "{text}");
    }
}
