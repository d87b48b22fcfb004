//! The options of the benchmark.

use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;

use super::case::{Case, Operation, Switch, WaitingName};
use super::contender::Contender;

/// Measures vublk with virtio-driver, beside qemu-storage-daemon, fio and bare loops.
///
/// The driver runs on one CPU and the back end on another. Options that take a list make a case of
/// every combination. Each contender is measured once a round in every case, in alternating order;
/// what is shown is the median of the rounds and their range. Back ends that are not installed are
/// left out, and that is said.
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

    /// Requests kept in flight on each queue, 1 to 64
    #[arg(long, value_delimiter = ',', value_name = "LIST", default_value = "1,32",
        value_parser = clap::value_parser!(u32).range(1..=64))]
    pub depths: Vec<u32>,

    /// The length of each request, up to 1M
    #[arg(long = "block-size", value_delimiter = ',', value_name = "LIST", default_value = "4K",
        value_parser = block)]
    pub blocks: Vec<u64>,

    /// What each request does, at random offsets; mixed is 7 reads of 10
    #[arg(
        long = "operation",
        value_delimiter = ',',
        value_name = "LIST",
        default_value = "read"
    )]
    pub operations: Vec<Operation>,

    /// The number of queues, 1 to 4, all driven by one thread
    #[arg(long, value_delimiter = ',', value_name = "LIST", default_value = "1",
        value_parser = clap::value_parser!(u16).range(1..=4))]
    pub queues: Vec<u16>,

    /// Whether the driver takes VIRTIO_F_EVENT_IDX
    #[arg(long, value_delimiter = ',', value_name = "LIST", default_value = "on")]
    pub event_idx: Vec<Switch>,

    /// How often everything is measured
    #[arg(long, value_name = "N", default_value_t = 5,
        value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub rounds: u32,

    /// The length of one measurement, in seconds; latencies and system calls are counted after it,
    /// in a quarter of that each
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = seconds)]
    pub seconds: Duration,

    /// What runs before each measurement and is not counted, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "0.2", value_parser = seconds)]
    pub warm_up: Duration,

    /// How long the daemons are watched while their front ends ask for nothing, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    pub idle: Duration,

    /// The file that is served; made and fully written unless it is there [default: bench/disk in
    /// the target folder]
    #[arg(long, value_name = "PATH")]
    pub file: Option<PathBuf>,

    /// The size of the file, of that on a tmpfs, and of the null devices
    #[arg(long, value_name = "BYTES", default_value = "1G", value_parser = size)]
    pub size: u64,

    /// The driver's CPU and the back end's [default: the first two that may be used]
    #[arg(long, value_delimiter = ',', num_args = 2, value_name = "CPU")]
    pub cpus: Option<Vec<usize>>,

    /// Count the instructions of a request instead, with callgrind: plain, with in-flight tracking,
    /// with the dirty log, and with both; at the greatest of the depths
    #[arg(long)]
    pub instructions: bool,

    /// Measure what the bars name and nothing else, and say which are met
    #[arg(long, conflicts_with_all = ["instructions", "contenders", "waiting", "depths", "blocks",
        "operations", "queues", "event_idx"])]
    pub bars: bool,

    /// Leave with status 1 when a bar is missed or cannot be measured
    #[arg(long, requires = "bars")]
    pub strict: bool,

    /// Also write the figures to this file, as JSON
    #[arg(long, value_name = "PATH")]
    pub json: Option<PathBuf>,

    /// Also write the figures to this file, as a page with plots
    #[arg(long, value_name = "PATH")]
    pub report: Option<PathBuf>,
}

impl Options {
    /// Every combination of the lists; the depth changes first.
    pub(super) fn cases(&self) -> Vec<Case> {
        let mut cases = Vec::new();
        for &waiting in &self.waiting {
            for &operation in &self.operations {
                for &event_idx in &self.event_idx {
                    for &queues in &self.queues {
                        for &block in &self.blocks {
                            cases.extend(self.depths.iter().map(|&depth| Case {
                                waiting,
                                operation,
                                block,
                                queues: queues.into(),
                                event_idx,
                                depth,
                            }));
                        }
                    }
                }
            }
        }
        cases
    }
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

/// The length of a request.
fn block(text: &str) -> Result<u64, String> {
    let bytes = size(text)?;
    if bytes <= MAX_BLOCK {
        Ok(bytes)
    } else {
        Err(format!("{text} is more than 1M"))
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    text.parse()
        .ok()
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .ok_or_else(|| format!("{text} is no number of seconds"))
}

const MAX_BLOCK: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_options_fit_together() {
        Options::command().debug_assert();
        let options = Options::try_parse_from(["bench"]).unwrap();
        assert_eq!(options.depths, [1, 32]);
        assert_eq!(options.blocks, [4096]);
        assert_eq!(options.contenders.len(), Contender::DEFAULT.len());
    }

    #[test]
    fn lists_make_every_combination_once() {
        let cases = |line: &str| {
            let words = std::iter::once("bench").chain(line.split_whitespace());
            Options::try_parse_from(words).map(|options| options.cases())
        };
        let all = cases(
            "--depths 1,64 --block-size 4K,128K,1M --operation read,write,mixed --queues 1,4 \
             --event-idx on,off --waiting sleeping",
        );
        let all = all.unwrap();
        assert_eq!(all.len(), 2 * 3 * 3 * 2 * 2);
        for (at, case) in all.iter().enumerate() {
            assert!(!all[..at].contains(case), "{case} is there twice");
        }
        assert_eq!((all[0].depth, all[1].depth), (1, 64));
        for wrong in [
            "--depths 0",
            "--depths 65",
            "--queues 5",
            "--block-size 2M",
            "--operation trim",
            "--strict",
            "--bars --depths 1",
        ] {
            assert!(cases(wrong).is_err(), "{wrong}");
        }
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
