//! vhost-user on the wire: bytes and file descriptors to typed messages, and replies back to bytes.
//!
//! [`Header`], [`Message`] and [`Reply`] do no I/O; only [`Connection`] touches the socket.
//! Numbers are in the byte order of the machine (vhost-user, *Message Specification*).
#![deny(
    clippy::as_conversions,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

mod code;
mod header;
mod message;
mod payload;
mod reply;
mod socket;

pub use code::{Answer, Code};
pub use header::{HEADER_BYTES, Header, StreamFault};
pub use message::{
    ConfigRange, InFlight, InflightLayout, Malformed, Message, RegionMessage, Transfer,
};
pub use reply::{Reply, config_changed};
pub use socket::{Connection, ConnectionError, RawMessage};
