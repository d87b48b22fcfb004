//! Virtqueues as vhost-user knows them.
//!
//! [`Split`] is the layout (virtio 2.7) and nothing else: it knows no file descriptor and no
//! request. [`Stopped`], [`Started`] and [`Draining`] are the states of a vring; a transition
//! consumes the state it leaves, so that a stop cannot be answered while requests are out.

mod areas;
mod notify;
mod split;
mod state;
#[cfg(test)]
mod tests;

pub use areas::{Addresses, Areas, VringError, check_size, resolve, used_ring_bytes};
pub use split::{AvailBroken, Split, Used, UsedLog};
pub use state::{Draining, Fds, RingBroken, Started, Stopped, logs_all};
