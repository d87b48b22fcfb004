//! What the tests and benchmarks share.

pub mod bench;
pub mod driver;
pub mod frontend;
pub mod guest;
pub mod interleaving;
pub mod pins;
pub mod stall;
