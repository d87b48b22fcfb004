//! Real guests under QEMU: a Linux kernel whose disks a daemon serves over vhost-user.
//!
//! ```no_run
//! use vublk_tests::guest::{DaemonSpec, Disk, Guest, Scratch};
//!
//! # fn main() -> Result<(), vublk_tests::guest::GuestError> {
//! let scratch = Scratch::new()?;
//! let image = scratch.image("disk", 512 << 20)?;
//! let daemon = DaemonSpec::file(&image).queues(4).start(&scratch)?;
//! let mut guest = Guest::builder().cpus(4).disk(Disk::of(&daemon)).boot(&scratch)?;
//! assert_eq!(guest.number("cat /run/disk0/size")?, 1 << 20);
//! guest.power_off()?;
//! daemon.stop()?;
//! # Ok(())
//! # }
//! ```
//!
//! The kernel, an initramfs with a small agent and a disk with fio and the ext4 tools come from
//! `ci/guest-images.sh`. Guests run under TCG, which every machine has; `VUBLK_GUEST_ACCEL=kvm`
//! asks for KVM. `VUBLK_GUEST_DAEMON=qemu-storage-daemon` puts QEMU's own back end where vublk
//! stands: a test that fails there too is at fault itself.

mod agent;
mod daemon;
mod error;
mod fio;
mod hugepages;
mod images;
mod lines;
mod load;
mod migration;
mod process;
mod qemu;
mod qmp;
mod scratch;
mod spec;
mod vm;

pub use agent::Output;
pub use daemon::Daemon;
pub use error::GuestError;
pub use fio::{Fio, FioReport, Side};
pub use hugepages::HugePages;
pub use images::Images;
pub use load::{Load, LoadCounts, RunningLoad};
pub use migration::Migration;
pub use qemu::{Builder, Disk};
pub use qmp::Qmp;
pub use scratch::Scratch;
pub use spec::{DaemonKind, DaemonSpec, Engine, Storage, failpoints_path, vublk_path};
pub use vm::Guest;
