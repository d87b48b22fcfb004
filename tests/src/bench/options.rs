//! The options of the benchmark.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, ValueEnum};

use super::contender::Contender;
use crate::driver::verify::Waiting;

/// Measures vublk with virtio-driver, beside qemu-storage-daemon, fio and bare loops.
///
/// The driver runs on one CPU and the back end on another. Each contender is measured once a
/// round, in alternating order; what is shown is the median of the rounds and their range, in
/// nanoseconds a request. Back ends that are not installed are left out, and that is said.
#[derive(Clone, Debug, Parser)]
#[command(name = "bench", max_term_width = 100)]
pub struct Options {
    /// What is measured
    #[arg(long, value_delimiter = ',', value_name = "LIST", default_values = Contender::DEFAULT)]
    pub contenders: Vec<Contender>,

    /// How the driver waits
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "LIST",
        default_value = "polling,sleeping"
    )]
    pub waiting: Vec<WaitingName>,

    /// Requests kept in flight, 1 to 64
    #[arg(long, value_delimiter = ',', value_name = "LIST", default_value = "1,32",
        value_parser = clap::value_parser!(u32).range(1..=64))]
    pub depths: Vec<u32>,

    /// The length of each request
    #[arg(long, value_name = "BYTES", default_value = "4K", value_parser = size)]
    pub block_size: u64,

    /// What each request does, at random offsets
    #[arg(long, value_name = "WHAT", default_value = "read")]
    pub operation: Operation,

    /// Whether the driver takes VIRTIO_F_EVENT_IDX
    #[arg(long, value_name = "on|off", default_value = "on")]
    pub event_idx: EventIdx,

    /// How often everything is measured
    #[arg(long, value_name = "N", default_value_t = 5,
        value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub rounds: u32,

    /// The length of one measurement, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "2", value_parser = seconds)]
    pub seconds: Duration,

    /// What runs before each measurement and is not counted, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "0.3", value_parser = seconds)]
    pub warm_up: Duration,

    /// How long each daemon is watched while its front end asks for nothing, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "3", value_parser = seconds)]
    pub idle: Duration,

    /// The file that is served; made and fully written unless it is there [default: bench/disk in
    /// the target folder]
    #[arg(long, value_name = "PATH")]
    pub file: Option<PathBuf>,

    /// The size of the file and of the null devices
    #[arg(long, value_name = "BYTES", default_value = "1G", value_parser = size)]
    pub size: u64,

    /// The driver's CPU and the back end's [default: the first two that may be used]
    #[arg(long, value_delimiter = ',', num_args = 2, value_name = "CPU")]
    pub cpus: Option<Vec<usize>>,

    /// Also write the figures to this file, as JSON
    #[arg(long, value_name = "PATH")]
    pub json: Option<PathBuf>,
}

/// How the driver waits, by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum WaitingName {
    /// It looks at the used ring all the time.
    Polling,
    /// It sleeps until it is called.
    Sleeping,
}

impl WaitingName {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Polling => "polling",
            Self::Sleeping => "sleeping",
        }
    }

    pub(super) fn waiting(self) -> Waiting {
        match self {
            Self::Polling => Waiting::Polling,
            Self::Sleeping => Waiting::Sleeping,
        }
    }
}

/// What each request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Operation {
    /// It reads.
    Read,
    /// It writes.
    Write,
}

impl Operation {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
        }
    }
}

/// Whether VIRTIO_F_EVENT_IDX is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum EventIdx {
    /// Event indices, where the back end offers them.
    On,
    /// Flags.
    Off,
}

/// A number of bytes: 512, 4K, 128K, 1G.
fn size(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text} is not a multiple of 512 like 512, 4K or 1G");
    let split = text.len() - usize::from(text.ends_with(['K', 'M', 'G']));
    let (digits, unit) = text.split_at(split);
    let shift = match unit {
        "K" => 10,
        "M" => 20,
        "G" => 30,
        _ => 0,
    };
    let number: u64 = digits.parse().ok().ok_or_else(wrong)?;
    number
        .checked_mul(1 << shift)
        .filter(|bytes| *bytes > 0 && bytes.is_multiple_of(512))
        .ok_or_else(wrong)
}

fn seconds(text: &str) -> Result<Duration, String> {
    text.parse()
        .ok()
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .ok_or_else(|| format!("{text} is no number of seconds"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_options_fit_together() {
        Options::command().debug_assert();
        let options = Options::try_parse_from(["bench"]).unwrap();
        assert_eq!(options.depths, [1, 32]);
        assert_eq!(options.block_size, 4096);
        assert_eq!(options.contenders.len(), Contender::DEFAULT.len());
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!(size("512"), Ok(512));
        assert_eq!(size("128K"), Ok(128 << 10));
        assert_eq!(size("2G"), Ok(2 << 30));
        for wrong in ["", "K", "0", "513", "4k", "99999999999G", "-4K"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }
}
