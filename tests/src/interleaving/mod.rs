//! A front end that does everything at once, as dice decide, and knows what has to come of it.
//!
//! One seed is one run: a daemon on a fault device, and a few hundred steps among requests, stops,
//! changes of the memory table, of the log and of the connection, and storage that hangs. The dice
//! of a step depend on the seed and the step's number alone, so that a seed that fails can be
//! tried again; what threads do in between is up to the machine.
//!
//! What is checked all the time, and once more at the end when nothing is in flight:
//! - every head is answered once, over all connections;
//! - a stop is answered with nothing of its vring in flight;
//! - no region is touched once its removal was acknowledged;
//! - no log is written to once it was given back, and the logs bring a copy of guest memory to
//!   exactly what guest memory is;
//! - what is read is what the [`Sectors`] may hold.

mod connection;
mod logging;
mod memory;
mod requests;
mod sectors;
mod stops;
mod world;

pub use memory::Memory;
pub use sectors::Sectors;
pub use world::{Counts, World};
