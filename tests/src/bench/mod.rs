//! The benchmark on the host: virtio-driver against vublk, beside qemu-storage-daemon and beside
//! measuring sticks that show what the machine itself allows.
//!
//! Everything is measured in the same run and in alternating order, for a machine has good and bad
//! minutes. `ci/bench.sh` prepares what this needs; `bench --help` has the options.

mod bare;
mod bars;
mod case;
mod contender;
mod error;
mod figures;
mod fio;
mod host;
mod html;
mod image;
mod instructions;
mod latency;
mod load;
mod machine;
mod measure;
mod options;
mod plot;
mod report;
mod rest;
mod run;
mod schedule;
mod spinner;
mod syscalls;

pub use bars::Verdict;
pub use case::{Case, Operation, Switch, WaitingName};
pub use contender::Contender;
pub use error::BenchError;
pub use figures::{Cell, Idle, Sample};
pub use host::Host;
pub use html::Page;
pub use instructions::{Instructions, Setting};
pub use latency::Latency;
pub use options::Options;
pub use report::Report;
pub use run::run;
