//! In-flight tracking (vhost-user, *Inflight I/O tracking*): what survives when the daemon does
//! not.
//!
//! A [`Region`] is memory that the daemon shares with the front end, which keeps it while daemons
//! come and go. Every vring has a [`QueueRegion`] in it, and records there which chains it has
//! taken; the next daemon finds them and does them again. [`Inflight`] is one started vring's
//! account, with such a record or without.

mod account;
mod queue;
mod region;

pub use account::{EnterError, Inflight};
pub use queue::{QueueRegion, Recovered};
pub use region::{Description, Region, RegionError};
