//! virtio-blk (virtio 5.2): features, configuration space and requests.

mod config;
mod counters;
mod device;
mod features;
mod pins;
mod profile;
mod ranges;
mod request;
mod room;
#[cfg(test)]
mod tests;

pub use config::ConfigError;
pub use counters::Counters;
pub use device::{
    BlkDevice, BlkOptions, BlkOptionsError, DEFAULT_LOCK_TIMEOUT, SERIAL_BYTES, WriteCache,
};
pub use pins::{Pin, Pins};
pub use profile::Profile;
pub use ranges::Range;
pub use request::{Admitted, Driver, Header, Kind, Malformed, RangeOp, Request, Status, refuse};
