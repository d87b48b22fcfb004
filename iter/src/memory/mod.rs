//! Guest memory: regions, the table of them, and what happens when it goes away.

mod area;
mod error;
mod line;
#[cfg(target_arch = "x86_64")]
mod prefetch;
mod region;
pub mod sigbus;
mod table;

pub use area::Area;
pub use error::MemoryError;
pub use line::Line;
pub use region::{Region, RegionSpec};
pub use table::{MAX_REGIONS, MemoryTable};
