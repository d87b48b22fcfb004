//! The command line: the vhost-user program conventions, and options of our own.

mod values;

use std::os::fd::RawFd;
use std::path::PathBuf;

use blockdev::SLOT_SHIFT;
use clap::{ArgGroup, Parser, ValueEnum};

use crate::blk::{DEFAULT_LOCK_TIMEOUT, Pin, SERIAL_BYTES};
use crate::worker::PollMode;
use values::{cpu_list, serial, size};

pub use values::{CpuList, Size};

/// What `--print-capabilities` answers (vhost-user, *Backend program conventions*).
pub const CAPABILITIES: &str = r#"{"type":"block","features":["read-only","blk-file"]}"#;

/// Where the socket is when nothing is said.
pub const DEFAULT_SOCKET: &str = "./vublk.sock";

/// The size of the memory device that is served when nothing is said, in bytes.
pub const DEFAULT_MEMORY: u64 = 1 << 30;

/// How long requests in flight are waited for at the end when nothing is said, in seconds.
pub const DEFAULT_DRAIN_TIMEOUT: u64 = 60;

/// Serves a block device to a virtual machine over vhost-user.
///
/// Without any option it serves 1 GiB of memory on ./vublk.sock, and prints what to give QEMU or
/// Cloud Hypervisor. It runs in the foreground; SIGTERM and SIGINT drain what is in flight and
/// leave, SIGUSR1 logs a line of counters per device, SIGHUP asks for the image's size again.
/// RUST_LOG=debug says more.
#[derive(Clone, Debug, Parser)]
#[command(name = "vublk", version, max_term_width = 100)]
#[command(group = ArgGroup::new("storage").args(["blk_file", "memory", "null"]))]
#[command(group = ArgGroup::new("listen").args(["socket_path", "fd"]))]
pub struct Args {
    /// Listen on this unix socket [default: ./vublk.sock]
    #[arg(long, value_name = "PATH")]
    pub socket_path: Option<PathBuf>,

    /// Use this inherited unix socket, listening or connected
    #[arg(long, value_name = "N")]
    pub fd: Option<RawFd>,

    /// Print what this program can do as JSON, and leave
    #[arg(long)]
    pub print_capabilities: bool,

    /// Serve a file or a block device
    #[arg(long, value_name = "PATH")]
    pub blk_file: Option<PathBuf>,

    /// Serve memory that is lost at the end: 512M, 10G [default: 1G]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub memory: Option<Size>,

    /// Serve a device that stores nothing, for measurements
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub null: Option<Size>,

    /// Serve the file read-only: nothing in the guest can write to it
    #[arg(long, requires = "blk_file", conflicts_with_all = ["memory", "null"])]
    pub read_only: bool,

    /// The number of queues recommended to the guest [default: one per CPU]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub num_queues: Option<u16>,

    /// The number of threads that serve queues [default: one per queue, at most one per CPU]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub workers: Option<u16>,

    /// Bind the workers to these CPUs, in turn: 2,4-7
    #[arg(long, value_name = "LIST", value_parser = cpu_list)]
    pub cpus: Option<CpuList>,

    /// What the guest sees as the serial, at most 20 characters
    #[arg(long, value_name = "TEXT", default_value = "vublk", value_parser = serial)]
    pub serial: String,

    /// The block size the guest sees, in bytes [default: what the storage asks for]
    #[arg(long, value_name = "BYTES", value_parser = values::block_size)]
    pub block_size: Option<u32>,

    /// Bypass the host's page cache
    #[arg(long, value_name = "on|off", default_value = "on")]
    pub direct: Switch,

    /// How long to wait for an image that another process has locked
    #[arg(long, value_name = "SECONDS", default_value_t = DEFAULT_LOCK_TIMEOUT.as_secs())]
    pub lock_timeout: u64,

    /// How long SIGTERM waits for requests in flight
    #[arg(long, value_name = "SECONDS", default_value_t = DEFAULT_DRAIN_TIMEOUT)]
    pub drain_timeout: u64,

    /// How workers wait for work
    #[arg(long, value_name = "MODE", default_value = "adaptive")]
    pub poll: PollName,

    /// Whether guest memory is pinned
    ///
    /// registered: the kernel finds the guest's pages once and not for every request, which saves
    /// a part of a microsecond each. It has a price. All guest memory is taken at once and charged
    /// to the daemon (its cgroup, and the limit of locked memory of its user), and pages that a
    /// balloon, virtio-mem or free-page reporting takes from the guest are not given back to the
    /// host: the device goes on using the old pages, and THE GUEST READS WRONG DATA. Only for
    /// guests that have none of these.
    #[arg(long, value_name = "off|registered", default_value = "off")]
    pub pin: PinName,

    /// How I/O is done [default: io_uring, threads on hosts without it]
    #[arg(long, value_name = "ENGINE")]
    pub engine: Option<EngineName>,
}

/// On or off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// On.
    On,
    /// Off.
    Off,
}

/// The ways to wait by their names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PollName {
    /// Never sleep while a guest is attached: least latency, a whole CPU for each worker.
    Always,
    /// Look again while that has paid of late, and sleep when idle.
    Adaptive,
    /// Sleep as soon as there is nothing to do: least CPU.
    Never,
}

/// The ways to pin by their names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PinName {
    /// The kernel finds the pages anew for every request.
    Off,
    /// Guest memory is registered with the kernel.
    Registered,
}

/// The engines by their names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum EngineName {
    /// io_uring: one ring a worker for everything.
    #[value(name = "io_uring")]
    IoUring,
    /// A pool of threads with preadv2 and pwritev2.
    Threads,
}

impl From<PollName> for PollMode {
    fn from(name: PollName) -> PollMode {
        match name {
            PollName::Always => PollMode::Always,
            PollName::Adaptive => PollMode::Adaptive,
            PollName::Never => PollMode::Never,
        }
    }
}

impl From<PinName> for Pin {
    fn from(name: PinName) -> Pin {
        match name {
            PinName::Off => Pin::Off,
            PinName::Registered => Pin::Registered {
                slot_shift: SLOT_SHIFT,
            },
        }
    }
}

const _: () = assert!(SERIAL_BYTES == 20, "the help of --serial says so");

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_options_fit_together() {
        Args::command().debug_assert();
    }

    #[test]
    fn the_conventions_options_are_understood() {
        let args =
            Args::try_parse_from(["vublk", "--socket-path=/s", "--blk-file=/b", "--read-only"]);
        let args = args.unwrap();
        assert_eq!(args.socket_path, Some(PathBuf::from("/s")));
        assert_eq!(args.blk_file, Some(PathBuf::from("/b")));
        assert!(args.read_only);
        assert_eq!(
            Args::try_parse_from(["vublk", "--fd=5"]).unwrap().fd,
            Some(5)
        );
    }

    #[test]
    fn what_excludes_each_other_is_refused() {
        for wrong in [
            &["vublk", "--socket-path=/s", "--fd=3"][..],
            &["vublk", "--memory=1G", "--null=1G"],
            &["vublk", "--memory=1G", "--blk-file=/b"],
            &["vublk", "--memory=1G", "--read-only"],
            &["vublk", "--num-queues=0"],
            &["vublk", "--num-queues=257"],
            &["vublk", "--workers=0"],
            &["vublk", "--block-size=1000"],
            &["vublk", "--direct=maybe"],
            &["vublk", "--pin=on"],
            &["vublk", "--engine=aio"],
            &["vublk", "--poll=sometimes"],
            &["vublk", "--serial=123456789012345678901"],
            &["vublk", "/dev/sda"],
        ] {
            assert!(Args::try_parse_from(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn capabilities_are_as_the_conventions_have_them() {
        assert!(CAPABILITIES.starts_with(r#"{"type":"block","features":["#));
    }
}
