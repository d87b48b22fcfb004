//! The suite every device must pass.
//!
//! One line in a test file runs all of it, on both engines:
//!
//! ```text
//! blockdev::conformance!(memory, || Subject::kept(open::memory(16 << 20, 512).unwrap()));
//! ```
//!
//! Every check makes a device of its own, of [`LEAST_SIZE`] bytes at least, with any contents. That
//! a range beyond the end cannot be asked for is [`crate::Extent`]'s promise and tested there.

#![expect(
    clippy::missing_panics_doc,
    reason = "all of it panics when something goes wrong"
)]

pub mod claims;
pub mod contents;
pub mod lifetimes;
pub mod ranges;
pub mod rig;

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use crate::BlockDevice;

/// Bytes a device needs for the suite.
pub const LEAST_SIZE: u64 = 16 << 20;

/// A device under test.
pub struct Subject {
    /// The device.
    pub device: Arc<dyn BlockDevice>,
    /// Whether what is written can be read.
    pub contents: Contents,
    /// What has to live as long as the device: a scratch file, a loop device.
    pub keep: Box<dyn Any>,
}

/// What a device does with data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contents {
    /// It stores them.
    Kept,
    /// It stores nothing, and leaves memory as it is when it is read.
    Ignored,
}

impl Subject {
    /// A device that stores what it is given.
    #[must_use]
    pub fn kept(device: Arc<dyn BlockDevice>) -> Self {
        Self {
            device,
            contents: Contents::Kept,
            keep: Box::new(()),
        }
    }

    /// A device that stores nothing.
    #[must_use]
    pub fn ignored(device: Arc<dyn BlockDevice>) -> Self {
        Self {
            device,
            contents: Contents::Ignored,
            keep: Box::new(()),
        }
    }

    /// The same, with something that lives as long.
    #[must_use]
    pub fn keeping(self, keep: impl Any) -> Self {
        Self {
            keep: Box::new(keep),
            ..self
        }
    }
}

impl fmt::Debug for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            device,
            contents,
            keep: _,
        } = self;
        f.debug_struct("Subject")
            .field("device", device)
            .field("contents", contents)
            .finish_non_exhaustive()
    }
}

/// Holds of this thread that are out, where builds count them.
pub(crate) fn outstanding() -> usize {
    #[cfg(debug_assertions)]
    return iov_iter::ledger::outstanding();
    #[cfg(not(debug_assertions))]
    return 0;
}

/// Runs the whole suite on the device that an expression makes, once per engine:
/// `conformance!(name, || Subject::kept(device))`.
#[macro_export]
macro_rules! conformance {
    ($name:ident, $subject:expr) => {
        mod $name {
            #[expect(
                unused_imports,
                reason = "not every device needs the outer file's items"
            )]
            use super::*;
            mod io_uring {
                #[expect(unused_imports, reason = "as above")]
                use super::*;
                $crate::conformance_checks!($crate::Engine::IoUring, $subject);
            }
            mod threads {
                #[expect(unused_imports, reason = "as above")]
                use super::*;
                $crate::conformance_checks!($crate::Engine::Threads, $subject);
            }
        }
    };
}

/// The checks of [`conformance!`], one test each.
#[doc(hidden)]
#[macro_export]
macro_rules! conformance_checks {
    ($engine:expr, $subject:expr) => {
        $crate::conformance_checks! { @each $engine, $subject;
            contents: what_was_written_is_read,
            contents: segments_of_every_shape_are_moved,
            contents: memory_of_any_alignment_is_moved,
            contents: the_last_block_is_a_block,
            contents: random_ops_match_a_model,
            contents: channels_see_each_others_writes,
            ranges: a_flush_succeeds,
            ranges: a_durable_write_is_read,
            ranges: a_discard_keeps_to_its_range,
            ranges: zeroes_are_read_where_they_were_asked_for,
            ranges: what_is_no_whole_block_is_refused,
            ranges: memory_of_another_length_is_refused,
            ranges: empty_ranges_succeed,
            lifetimes: a_long_batch_completes_each_op_once,
            lifetimes: many_rounds_reuse_what_they_took,
            lifetimes: a_ring_that_goes_waits_for_its_ops,
            lifetimes: ops_never_submitted_are_given_back,
            lifetimes: an_op_taken_back_comes_back_once_and_did_nothing_or_all,
            claims: what_was_written_outlives_every_claim,
        }
    };
    (@each $engine:expr, $subject:expr; $($group:ident: $check:ident,)*) => {
        $(
            #[test]
            fn $check() {
                let subject: $crate::conformance::Subject = ($subject)();
                $crate::conformance::$group::$check(&subject, $engine);
            }
        )*
    };
}
