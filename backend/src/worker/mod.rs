//! Workers: the threads that own vrings.
//!
//! A worker owns its vrings outright and shares nothing with other workers on a request's path. The
//! control thread sends it [`Command`]s and receives [`Report`]s.

mod attachment;
mod claim;
mod command;
mod helper;
pub mod hosted;
mod idle;
mod log_gate;
mod path;
mod pins;
mod pool;
mod run;
mod slots;
mod token;

pub use command::{
    ClaimEnd, Command, DeviceId, Enablement, Errand, LogSetup, Outcome, Report, StopMode,
    TableEpoch, VringId, VringSetup,
};
pub use idle::PollMode;
pub use pool::{WorkerError, Workers, WorkersConfig};

/// Who reports that is no worker.
const NOBODY: usize = usize::MAX;
