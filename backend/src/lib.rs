//! The vhost-user-blk daemon as a library; `main.rs` is a thin shell over it.

pub mod blk;
pub mod cli;
pub mod control;
mod failpoint;
pub mod fds;
pub mod inflight;
pub mod limits;
pub mod proto;
pub mod session;
pub mod start;
#[cfg(test)]
mod testing;
pub mod vring;
pub mod worker;

pub use worker::hosted;
