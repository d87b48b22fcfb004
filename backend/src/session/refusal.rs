//! Why a message was refused. The front end broke the specification; everything else goes on.

use std::io;

use iov_iter::MemoryError;
use thiserror::Error;

use super::state::StateError;
use crate::blk::ConfigError;
use crate::inflight::RegionError;
use crate::limits::MAX_VRINGS;
use crate::proto::Malformed;
use crate::vring::VringError;

/// Why a message was refused.
#[derive(Debug, Error)]
pub enum Refusal {
    /// It is not a message, or none of ours.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// Its protocol feature was not negotiated.
    #[error("it belongs to protocol feature {0}, which was not negotiated")]
    NotNegotiated(&'static str),
    /// Features were acknowledged that are not offered.
    #[error("features {0:#x} are not offered")]
    Features(u64),
    /// Features that shape a ring changed while one runs.
    #[error("features {0:#x} cannot change while a vring is started")]
    FeaturesInUse(u64),
    /// There is no such vring.
    #[error("vring {0}: there are {MAX_VRINGS}")]
    VringIndex(u32),
    /// The vring is started, and this cannot change while it is.
    #[error("vring {0} is started")]
    Started(u16),
    /// The vring is about to stop.
    #[error("vring {0} is about to stop")]
    Stopping(u16),
    /// The vring was told to start before it was told everything it needs.
    #[error("vring {index} has no {missing} yet")]
    NotReady {
        /// The vring.
        index: u16,
        /// The message that is missing.
        missing: &'static str,
    },
    /// The vring's size or a part of it cannot be used.
    #[error("vring {index}")]
    Vring {
        /// The vring.
        index: u16,
        /// What is wrong with it.
        source: VringError,
    },
    /// A number is beyond what its field means.
    #[error("{what} {value} is out of range")]
    OutOfRange {
        /// The field.
        what: &'static str,
        /// Its value.
        value: u32,
    },
    /// A kick, call or err that is not an eventfd.
    #[error("the file descriptor is not an eventfd but {0}")]
    NotEventFd(String),
    /// A kick, call or err that cannot be examined.
    #[error("the file descriptor cannot be examined")]
    Descriptor(#[source] io::Error),
    /// The back-end channel is not a socket.
    #[error("the file descriptor is not a socket")]
    NotSocket,
    /// The memory table cannot be had.
    #[error("guest memory")]
    Memory(#[from] MemoryError),
    /// The dirty log cannot be had.
    #[error("the dirty log")]
    Log(#[source] MemoryError),
    /// Something would be changed that the log has no bit for.
    #[error("a dirty log of {size} bytes has no bit for what ends at guest address {end:#x}")]
    LogTooSmall {
        /// Bytes of the log.
        size: u64,
        /// The end of what has to be logged.
        end: u64,
    },
    /// The in-flight region cannot be had or used.
    #[error("in-flight tracking")]
    Inflight(#[from] RegionError),
    /// It is for a device that is suspended, and a vring is started.
    #[error("a vring is started, so that the device is not suspended")]
    NotSuspended,
    /// The device's state cannot be saved or loaded.
    #[error("the device's state")]
    State(#[from] StateError),
    /// The region cannot change under a vring that is recorded in it.
    #[error("in-flight tracking cannot change while vring {0} is started")]
    InflightInUse(u16),
    /// Somebody else has the storage.
    #[error(
        "{0} is locked by another process, or by requests of one that was killed (stop the other \
         one, or give it more time with --lock-timeout)"
    )]
    Locked(String),
    /// The storage cannot be locked, or nobody waits for that any more.
    #[error("{0} cannot be locked")]
    NotLocked(String),
    /// What was written may not be stable.
    #[error("{0} cannot be synced")]
    NotSynced(String),
    /// The range of the configuration space cannot be read.
    #[error("{size} bytes of the configuration space at {offset:#x} cannot be read")]
    ConfigRange {
        /// First byte asked for.
        offset: u32,
        /// Bytes asked for.
        size: u32,
    },
    /// The configuration space cannot be written so.
    #[error("the configuration space")]
    Config(#[from] ConfigError),
}

impl Refusal {
    /// Whether a front end that asked for no answer would wait for ever for what it wanted, or rely
    /// on what it does not have, so that the end of the connection has to tell it.
    pub(super) fn ends_connection(&self) -> bool {
        matches!(
            self,
            Refusal::Locked(_)
                | Refusal::NotLocked(_)
                | Refusal::Inflight(_)
                | Refusal::InflightInUse(_)
        )
    }
}
