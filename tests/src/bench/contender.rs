//! What is compared.

use clap::ValueEnum;

use super::case::{Case, Switch, WaitingName};
use crate::guest::{DaemonKind, Engine};

/// A back end, or a measuring stick.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Contender {
    /// A thread that spins on the vring and completes at once: the least a back end can do.
    Ring,
    /// vublk with a device that stores nothing.
    VublkNull,
    /// The same, and it never sleeps.
    VublkPollNull,
    /// qemu-storage-daemon with a device that stores nothing.
    QsdNull,
    /// An io_uring loop on the file, with no vring; it waits as the driver does.
    Uring,
    /// That loop, always spinning.
    UringSpin,
    /// That loop, always sleeping.
    UringSleep,
    /// fio on the file, with io_uring.
    Fio,
    /// vublk with the file.
    VublkFile,
    /// The same, and it never sleeps.
    VublkPollFile,
    /// vublk with the file, and guest memory registered with io_uring.
    VublkPinnedFile,
    /// vublk with the file, and threads in the place of io_uring.
    VublkThreads,
    /// qemu-storage-daemon with the file.
    QsdFile,
    /// vublk with a file in memory.
    VublkTmpfs,
    /// qemu-storage-daemon with a file in memory.
    QsdTmpfs,
}

/// Everything that tells one contender from another.
#[derive(Clone, Copy, Debug)]
pub(super) struct About {
    /// What the table calls it.
    pub(super) name: &'static str,
    /// What is done to measure it.
    pub(super) form: Form,
    /// What its requests go to.
    pub(super) disk: Disk,
}

/// What is done to measure a contender.
#[derive(Clone, Copy, Debug)]
pub(super) enum Form {
    /// A vring on a thread of this process.
    Spinner,
    /// An io_uring loop on this thread, with its own way of waiting or the driver's.
    Bare(Option<WaitingName>),
    /// fio.
    Fio,
    /// A daemon, with these options beside its storage.
    Daemon(DaemonKind, Engine, &'static [(&'static str, &'static str)]),
}

/// What requests go to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Disk {
    /// Nothing is stored.
    Null,
    /// A file on a real file system, past the page cache.
    File,
    /// A file in memory.
    Tmpfs,
}

impl Disk {
    /// All of them, in the order of a report.
    pub(super) const ALL: [Self; 3] = [Self::Null, Self::File, Self::Tmpfs];

    /// What a report calls it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Null => "null device",
            Self::File => "file",
            Self::Tmpfs => "tmpfs",
        }
    }
}

impl Contender {
    /// The names of those that are measured unless others are asked for.
    pub(super) const DEFAULT: [&str; 9] = [
        "ring",
        "vublk-null",
        "vublk-poll-null",
        "qsd-null",
        "uring",
        "fio",
        "vublk-file",
        "vublk-poll-file",
        "qsd-file",
    ];

    /// What there is to know of it.
    pub(super) fn about(self) -> About {
        const RING: Engine = Engine::IoUring;
        const PIN: &[(&str, &str)] = &[("--pin", "registered")];
        let vublk = |engine, options| Form::Daemon(DaemonKind::Vublk, engine, options);
        let qsd = Form::Daemon(DaemonKind::QemuStorageDaemon, RING, &[]);
        let (name, form, disk) = match self {
            Self::Ring => ("ring", Form::Spinner, Disk::Null),
            Self::VublkNull => ("vublk-null", vublk(RING, &[]), Disk::Null),
            Self::VublkPollNull => ("vublk-poll-null", vublk(RING, POLL), Disk::Null),
            Self::QsdNull => ("qsd-null", qsd, Disk::Null),
            Self::Uring => ("uring", Form::Bare(None), Disk::File),
            Self::UringSpin => ("uring-spin", Form::Bare(Some(POLLING)), Disk::File),
            Self::UringSleep => ("uring-sleep", Form::Bare(Some(SLEEPING)), Disk::File),
            Self::Fio => ("fio", Form::Fio, Disk::File),
            Self::VublkFile => ("vublk-file", vublk(RING, &[]), Disk::File),
            Self::VublkPollFile => ("vublk-poll-file", vublk(RING, POLL), Disk::File),
            Self::VublkPinnedFile => ("vublk-pinned-file", vublk(RING, PIN), Disk::File),
            Self::VublkThreads => ("vublk-threads", vublk(Engine::Threads, &[]), Disk::File),
            Self::QsdFile => ("qsd-file", qsd, Disk::File),
            Self::VublkTmpfs => ("vublk-tmpfs", vublk(RING, &[]), Disk::Tmpfs),
            Self::QsdTmpfs => ("qsd-tmpfs", qsd, Disk::Tmpfs),
        };
        About { name, form, disk }
    }

    /// What the table calls it.
    pub(super) fn name(self) -> &'static str {
        self.about().name
    }

    /// Whether it is a program of its own that a front end connects to.
    pub(super) fn is_daemon(self) -> bool {
        matches!(self.about().form, Form::Daemon(..))
    }

    /// Whether it is a daemon that never sleeps.
    pub(super) fn never_sleeps(self) -> bool {
        matches!(self.about().form, Form::Daemon(_, _, options) if options == POLL)
    }

    /// The program it needs beside this workspace's own.
    pub(super) fn program(self) -> Option<&'static str> {
        match self.about().form {
            Form::Daemon(DaemonKind::QemuStorageDaemon, ..) => Some("qemu-storage-daemon"),
            Form::Fio => Some("fio"),
            Form::Spinner | Form::Bare(_) | Form::Daemon(DaemonKind::Vublk, ..) => None,
        }
    }

    /// Whether it can be asked in this way: the spinning ring has one vring and never calls.
    pub(super) fn fits(self, case: &Case) -> bool {
        match self.about().form {
            Form::Spinner => case.waiting == POLLING && case.queues == 1,
            Form::Bare(_) | Form::Fio | Form::Daemon(..) => true,
        }
    }

    /// The case without what makes no difference to this contender: no driver waits for a loop
    /// without a vring. Two cases that are the same to it are measured once.
    pub(super) fn essence(self, case: &Case) -> Case {
        let waiting = match self.about().form {
            Form::Spinner | Form::Daemon(..) => return *case,
            Form::Bare(own) => own.unwrap_or(case.waiting),
            Form::Fio => SLEEPING,
        };
        Case {
            waiting,
            event_idx: Switch::On,
            ..*case
        }
    }
}

/// The option of a daemon that never sleeps.
const POLL: &[(&str, &str)] = &[("--poll", "always")];

const POLLING: WaitingName = WaitingName::Polling;
const SLEEPING: WaitingName = WaitingName::Sleeping;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_the_names_of_the_options() {
        for contender in Contender::value_variants() {
            let option = contender.to_possible_value().unwrap();
            assert_eq!(option.get_name(), contender.name());
        }
    }
}
