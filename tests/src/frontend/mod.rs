//! A front end in process: it speaks vhost-user, owns guest memory and drives virtio-blk rings,
//! and misbehaves wherever a test wants it to.
//!
//! - [`Peer`] is the socket: whole messages, raw bytes, any descriptors.
//! - [`GuestRam`] is memory in a memfd, as a front end shares it.
//! - [`DriverRing`] is the driver's half of a split ring, with nothing checked.
//! - [`FrontEnd`] puts them together and behaves.
//! - [`DirtyLog`] and [`InflightFile`] are what a front end shares for migrations and crashes.
//! - [`Served`] is the daemon itself, on a thread of this process.
//! - [`Stock`] is the daemon of the rust-vmm crates with our device in it.
//! - [`Program`] is the daemon as a process that can be killed.

mod behaved;
mod driver;
mod inflight;
mod log;
mod peer;
mod program;
mod ram;
mod served;
mod stock;

use std::error::Error;

pub use behaved::{FrontEnd, LOG_ALL, Options, Vring, wait_readable};
pub use driver::{Chain, DESC_INDIRECT, DESC_NEXT, DESC_WRITE, Descriptor, DriverRing, Kind};
pub use inflight::InflightFile;
pub use log::{DirtyLog, PAGE};
pub use peer::{
    Answer, CALL, CODES, NEED_REPLY, NO_FD, Peer, PeerError, VERSION, code, outgoing_bytes,
    region_payload, words,
};
pub use program::{Program, STEPS, extra_args, failpoints_binary};
pub use ram::{GuestRam, Layout};
pub use served::{Options as ServeOptions, Served, open_descriptors};
pub use stock::Stock;

/// What a test gives back: any error fails it.
pub type Outcome<T = ()> = Result<T, Box<dyn Error + Send + Sync>>;
