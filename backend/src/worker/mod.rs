//! Workers: the threads that own vrings.
//!
//! A worker owns its vrings outright and shares nothing with other workers on a request's path. The
//! control thread sends it [`Command`]s and receives [`Report`]s.

mod attachment;
mod command;
pub mod hosted;
mod log_gate;
mod path;
mod pool;
mod run;
mod slots;
mod token;

pub use command::{
    Command, DeviceId, Enablement, LogSetup, Report, StopMode, TableEpoch, VringId, VringSetup,
};
pub use pool::{WorkerError, Workers, WorkersConfig};
