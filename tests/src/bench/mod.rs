//! The benchmark on the host: virtio-driver against vublk, beside qemu-storage-daemon and beside
//! measuring sticks that show what the machine itself allows.
//!
//! Everything is measured in the same run and in alternating order, for a machine has good and bad
//! minutes. `ci/bench.sh` prepares what this needs; `bench --help` has the options.

mod bare;
mod contender;
mod error;
mod fio;
mod image;
mod load;
mod machine;
mod options;
mod report;
mod run;
mod spinner;

pub use error::BenchError;
pub use options::Options;
pub use report::{Cell, Report};
pub use run::run;
