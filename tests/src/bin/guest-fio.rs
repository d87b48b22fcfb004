//! fio inside a guest, on vublk and on qemu-storage-daemon in turn, as a table.
//!
//! Both daemons serve the same file to the same kind of guest, one after the other and several
//! times over, so that what else happens on the machine meets both. The medians are compared.
//! `ci/guest-fio.sh` prepares what this needs.

use std::env;
use std::error::Error;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use vublk_tests::guest::{Daemon, DaemonKind, DaemonSpec, Disk, Fio, FioReport, Guest, Scratch};

const USAGE: &str =
    "usage: guest-fio [--rounds N] [--seconds N] [--queues N] [--size MIB] [--file PATH]
                 [--direct on|off]";
const MIB: u64 = 1 << 20;
const KINDS: [DaemonKind; 2] = [DaemonKind::Vublk, DaemonKind::QemuStorageDaemon];

/// What is measured: a pattern of fio's, a block size and a depth.
struct Load {
    name: &'static str,
    pattern: &'static str,
    block: &'static str,
    depth: u32,
}

const LOADS: [Load; 5] = [
    Load {
        name: "4k randread, depth 1",
        pattern: "randread",
        block: "4k",
        depth: 1,
    },
    Load {
        name: "4k randread, depth 32",
        pattern: "randread",
        block: "4k",
        depth: 32,
    },
    Load {
        name: "4k randwrite, depth 1",
        pattern: "randwrite",
        block: "4k",
        depth: 1,
    },
    Load {
        name: "4k randwrite, depth 32",
        pattern: "randwrite",
        block: "4k",
        depth: 32,
    },
    Load {
        name: "128k read, depth 8",
        pattern: "read",
        block: "128k",
        depth: 8,
    },
];

struct Options {
    rounds: usize,
    seconds: u64,
    queues: u16,
    size_mib: u64,
    file: Option<PathBuf>,
    direct: bool,
}

impl Options {
    fn from_args(mut args: impl Iterator<Item = String>) -> Result<Self, Box<dyn Error>> {
        let mut options = Self {
            rounds: 5,
            seconds: 5,
            queues: 1,
            size_mib: 1024,
            file: None,
            direct: true,
        };
        while let Some(name) = args.next() {
            let value = args.next().ok_or(USAGE)?;
            match name.as_str() {
                "--rounds" => options.rounds = value.parse()?,
                "--seconds" => options.seconds = value.parse()?,
                "--queues" => options.queues = value.parse()?,
                "--size" => options.size_mib = value.parse()?,
                "--file" => options.file = Some(value.into()),
                "--direct" if value == "on" => options.direct = true,
                "--direct" if value == "off" => options.direct = false,
                _ => return Err(USAGE.into()),
            }
        }
        if options.rounds == 0 || options.queues == 0 || options.size_mib == 0 {
            return Err(USAGE.into());
        }
        Ok(options)
    }
}

/// One measurement.
#[derive(Clone, Copy)]
struct Sample {
    iops: f64,
    latency_us: f64,
    /// The daemon's CPU time for one request, kernel and user.
    cpu_us: f64,
}

/// The samples of one load, a list for each kind in the order of `KINDS`.
type Samples = [Vec<Sample>; KINDS.len()];

fn main() -> Result<(), Box<dyn Error>> {
    let options = Options::from_args(env::args().skip(1))?;
    let scratch = Scratch::new()?;
    let file = match &options.file {
        Some(file) => file.clone(),
        None => filled(&scratch, options.size_mib)?,
    };
    let mut table: [Samples; LOADS.len()] = Default::default();
    for round in 0..options.rounds {
        let mut order = [0, 1];
        // Whoever comes first in a round comes second in the next.
        order.rotate_left(round % KINDS.len());
        for index in order {
            let kind = KINDS[index];
            let results = measure(kind, &file, &options, &scratch)?;
            for (samples, sample) in table.iter_mut().zip(results) {
                samples[index].push(sample);
            }
            eprintln!(
                "round {} of {}: {kind:?} is done",
                round + 1,
                options.rounds
            );
        }
    }
    print_table(&options, &table);
    Ok(())
}

/// A file without holes: holes read faster than data, and differ from one file system to another.
fn filled(scratch: &Scratch, mib: u64) -> Result<PathBuf, Box<dyn Error>> {
    let path = scratch.image("disk", 0)?;
    let mut file = File::options().append(true).open(&path)?;
    let mut random = fastrand::Rng::with_seed(1);
    let mut chunk = vec![0; usize::try_from(MIB)?];
    for _ in 0..mib {
        random.fill(&mut chunk);
        file.write_all(&chunk)?;
    }
    file.sync_all()?;
    Ok(path)
}

/// Boots a guest on a daemon of this kind and runs every load once.
fn measure(
    kind: DaemonKind,
    file: &Path,
    options: &Options,
    scratch: &Scratch,
) -> Result<Vec<Sample>, Box<dyn Error>> {
    let spec = DaemonSpec::file(file)
        .kind(kind)
        .queues(options.queues)
        .direct(options.direct);
    let daemon = spec.start(scratch)?;
    let builder = Guest::builder()
        .cpus(options.queues)
        .disk(Disk::of(&daemon));
    let mut guest = builder.boot(scratch)?;
    let mut results = Vec::with_capacity(LOADS.len());
    for load in &LOADS {
        let fio = Fio::new("/dev/disk0", load.pattern)
            .option("bs", load.block)
            .option("iodepth", load.depth)
            .option("numjobs", options.queues)
            .option("randrepeat", 0)
            .option("time_based", 1)
            .option("runtime", options.seconds);
        let before = cpu_us(&daemon)?;
        let report = fio.run(&mut guest)?;
        let spent = cpu_us(&daemon)? - before;
        if report.errors > 0 {
            return Err(format!("{}: fio reports errors: {report:?}", load.name).into());
        }
        results.push(sample(&report, spent));
    }
    guest.power_off()?;
    daemon.stop()?;
    Ok(results)
}

fn sample(report: &FioReport, cpu_us: u64) -> Sample {
    // A load goes in one direction, so that the other side is empty.
    let side = if report.read.ios > 0 {
        report.read
    } else {
        report.write
    };
    Sample {
        iops: side.iops,
        latency_us: side.mean_us,
        cpu_us: as_f64(cpu_us) / as_f64(side.ios.max(1)),
    }
}

/// The CPU time a daemon has used with all its threads, in microseconds.
fn cpu_us(daemon: &Daemon) -> Result<u64, Box<dyn Error>> {
    // proc(5): utime and stime are fields 14 and 15, in ticks of 10 ms; the name in field 2 may
    // hold blanks, so that counting begins behind its closing bracket.
    let stat = fs::read_to_string(format!("/proc/{}/stat", daemon.pid()))?;
    let fields = stat
        .rsplit(')')
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .skip(11)
        .take(2);
    let ticks = fields.map(str::parse::<u64>).sum::<Result<u64, _>>()?;
    Ok(ticks * 10_000)
}

fn print_table(options: &Options, table: &[Samples]) {
    let Options {
        rounds,
        seconds,
        queues,
        ..
    } = options;
    let cache = if options.direct {
        "O_DIRECT"
    } else {
        "page cache"
    };
    println!("medians of {rounds} rounds of {seconds} s, {queues} queues, {cache}");
    println!(
        "{:<24} {:>9} {:>9} {:>6}   {:>9} {:>9}   {:>8} {:>8}",
        "", "vublk", "qsd", "ratio", "vublk", "qsd", "vublk", "qsd"
    );
    println!(
        "{:<24} {:>9} {:>9} {:>6}   {:>9} {:>9}   {:>8} {:>8}",
        "", "IOPS", "IOPS", "", "mean us", "mean us", "CPU us", "CPU us"
    );
    for (load, samples) in LOADS.iter().zip(table) {
        let [iops, latency, cpu] = [
            |sample: &Sample| sample.iops,
            |sample: &Sample| sample.latency_us,
            |sample: &Sample| sample.cpu_us,
        ]
        .map(|field| [0, 1].map(|kind| median(samples[kind].iter().map(field).collect())));
        println!(
            "{:<24} {:>9.0} {:>9.0} {:>6.2}   {:>9.1} {:>9.1}   {:>8.1} {:>8.1}",
            load.name,
            iops[0],
            iops[1],
            iops[0] / iops[1],
            latency[0],
            latency[1],
            cpu[0],
            cpu[1]
        );
    }
}

/// The median; the mean of the middle two for an even count, not a number for none.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match (values.len() % 2, values.as_slice()) {
        (_, []) => f64::NAN,
        (0, all) => f64::midpoint(all[middle - 1], all[middle]),
        (_, all) => all[middle],
    }
}

#[expect(
    clippy::as_conversions,
    clippy::cast_precision_loss,
    reason = "counts far below 2^52"
)]
fn as_f64(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_stands_in_the_middle() {
        assert_eq!(median(vec![5.0, 1.0, 3.0]).to_bits(), 3f64.to_bits());
        assert_eq!(median(vec![5.0, 1.0, 3.0, 2.0]).to_bits(), 2.5f64.to_bits());
        assert!(median(Vec::new()).is_nan());
    }

    #[test]
    fn options_are_read_and_nonsense_is_refused() {
        let parse = |line: &str| Options::from_args(line.split_whitespace().map(str::to_owned));
        let options = parse("--rounds 3 --direct off --queues 4").unwrap();
        assert_eq!(
            (options.rounds, options.direct, options.queues),
            (3, false, 4)
        );
        for line in [
            "--rounds",
            "--rounds x",
            "--rounds 0",
            "--nothing 1",
            "--direct maybe",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
