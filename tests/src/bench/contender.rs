//! What is compared.

use clap::ValueEnum;

/// A back end, or a measuring stick.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Contender {
    /// A thread that spins on the vring and completes at once: the least a back end can do.
    Ring,
    /// vublk with a device that stores nothing.
    VublkNull,
    /// qemu-storage-daemon with a device that stores nothing.
    QsdNull,
    /// An io_uring loop on the file, with no vring.
    Uring,
    /// fio on the file, with io_uring.
    Fio,
    /// vublk with the file.
    VublkFile,
    /// vublk with the file, and threads in the place of io_uring.
    VublkThreads,
    /// qemu-storage-daemon with the file.
    QsdFile,
}

impl Contender {
    /// The names of those that are measured unless others are asked for.
    pub(super) const DEFAULT: [&str; 7] = [
        "ring",
        "vublk-null",
        "qsd-null",
        "uring",
        "fio",
        "vublk-file",
        "qsd-file",
    ];

    /// What the table calls it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Ring => "ring",
            Self::VublkNull => "vublk-null",
            Self::QsdNull => "qsd-null",
            Self::Uring => "uring",
            Self::Fio => "fio",
            Self::VublkFile => "vublk-file",
            Self::VublkThreads => "vublk-threads",
            Self::QsdFile => "qsd-file",
        }
    }

    /// Whether it needs the file.
    pub(super) fn is_on_file(self) -> bool {
        match self {
            Self::Ring | Self::VublkNull | Self::QsdNull => false,
            Self::Uring | Self::Fio | Self::VublkFile | Self::VublkThreads | Self::QsdFile => true,
        }
    }

    /// The program it needs beside this workspace's own.
    pub(super) fn program(self) -> Option<&'static str> {
        match self {
            Self::QsdNull | Self::QsdFile => Some("qemu-storage-daemon"),
            Self::Fio => Some("fio"),
            Self::Ring | Self::VublkNull | Self::Uring | Self::VublkFile | Self::VublkThreads => {
                None
            }
        }
    }
}
