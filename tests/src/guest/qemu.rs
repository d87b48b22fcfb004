//! How a guest is put together.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::spec::on_off;
use super::vm::try_again;
use super::{Daemon, Guest, GuestError, Images, Scratch};

const ACCELERATOR: &str = "VUBLK_GUEST_ACCEL";
/// The agent looks for its port under this name, and for the disks in these PCI slots.
const AGENT_PORT: &str = "vublk.agent";
const TOOLS_SLOT: u8 = 0x08;
const FIRST_DISK_SLOT: u8 = 0x10;

/// What QEMU 10.0 says when it aborts over a race of its own TCG, whatever device it has: one boot
/// did.
const TCG_ASSERTION: &str = "iotlb_to_section: Assertion";

/// On a loaded host, the interrupts that Linux checks the timer with come late: the check is left
/// out, and the timers stay periodic.
///
/// TCG now and then sends a CPU's access to a wrong device when the map of the devices changes
/// under it, which the scan of the PCI bus does over and over. When that access ends a timer
/// interrupt, the CPU gets no other. So Linux scans with one CPU, and the init starts the others.
const KERNEL_OPTIONS: &str =
    "console=ttyS0 panic=-1 quiet no_timer_check nohz=off highres=off maxcpus=1";

/// A disk of the guest, served over vhost-user. What is not set is QEMU's default.
#[derive(Debug, Clone)]
pub struct Disk {
    socket: PathBuf,
    queues: u16,
    reconnects: bool,
    properties: Vec<(String, String)>,
}

impl Disk {
    /// The disk a daemon serves, with as many queues as the daemon offers.
    #[must_use]
    pub fn of(daemon: &Daemon) -> Self {
        Self::at(daemon.socket(), daemon.queues())
    }

    /// The disk that is served behind `socket`.
    #[must_use]
    pub fn at(socket: &Path, queues: u16) -> Self {
        Self {
            socket: socket.to_owned(),
            queues,
            reconnects: false,
            properties: Vec::new(),
        }
    }

    /// The number of request queues the guest gets.
    #[must_use]
    pub fn queues(mut self, queues: u16) -> Self {
        self.queues = queues;
        self
    }

    /// Looks for the daemon again, ten times a second, when its connection ends.
    #[must_use]
    pub fn reconnect(mut self) -> Self {
        self.reconnects = true;
        self
    }

    /// The size of each vring, in entries.
    #[must_use]
    pub fn queue_size(self, entries: u16) -> Self {
        self.property("queue-size", &entries.to_string())
    }

    /// Whether VIRTIO_RING_F_EVENT_IDX is let through.
    #[must_use]
    pub fn event_idx(self, on: bool) -> Self {
        self.property("event_idx", on_off(on))
    }

    /// Whether VIRTIO_RING_F_INDIRECT_DESC is let through.
    #[must_use]
    pub fn indirect(self, on: bool) -> Self {
        self.property("indirect_desc", on_off(on))
    }

    fn add_to(&self, command: &mut Command, slot: u8) {
        let id = format!("disk{}", slot - FIRST_DISK_SLOT);
        let reconnect = if self.reconnects {
            ",reconnect-ms=100"
        } else {
            ""
        };
        command.arg("-chardev").arg(with_path(
            &format!("socket,id={id},path="),
            &self.socket,
            reconnect,
        ));
        let queues = self.queues;
        let mut device =
            format!("vhost-user-blk-pci,chardev={id},addr={slot:#x},num-queues={queues}");
        for (name, value) in &self.properties {
            device.push_str(&format!(",{name}={value}"));
        }
        command.args(["-device", &device]);
    }

    /// Any other property of QEMU's vhost-user-blk-pci.
    #[must_use]
    pub fn property(mut self, name: &str, value: &str) -> Self {
        self.properties.push((name.to_owned(), value.to_owned()));
        self
    }
}

/// What `Guest::builder` returns: a guest with two CPUs, 256 MiB of plain memory and no disk.
#[derive(Debug, Clone)]
pub struct Builder {
    memory_mib: u32,
    huge_pages: bool,
    slots: Option<(u8, u32)>,
    cpus: u16,
    disks: Vec<Disk>,
    arguments: Vec<OsString>,
}

impl Default for Builder {
    fn default() -> Self {
        Self {
            memory_mib: 256,
            huge_pages: false,
            slots: None,
            cpus: 2,
            disks: Vec::new(),
            arguments: Vec::new(),
        }
    }
}

impl Builder {
    /// The size of the guest's memory, in MiB.
    #[must_use]
    pub fn memory_mib(mut self, mib: u32) -> Self {
        self.memory_mib = mib;
        self
    }

    /// Takes the guest's memory from huge pages; the caller reserves them with `HugePages`.
    #[must_use]
    pub fn huge_pages(mut self) -> Self {
        self.huge_pages = true;
        self
    }

    /// Leaves room to plug memory in: so many slots, up to so many MiB in all.
    #[must_use]
    pub fn memory_slots(mut self, slots: u8, max_mib: u32) -> Self {
        self.slots = Some((slots, max_mib));
        self
    }

    /// The number of virtual CPUs. Linux uses no more queues of a disk than it has CPUs.
    #[must_use]
    pub fn cpus(mut self, cpus: u16) -> Self {
        self.cpus = cpus;
        self
    }

    /// Adds a disk: /dev/disk0 in the guest for the first, /dev/disk1 for the second, up to eight.
    #[must_use]
    pub fn disk(mut self, disk: Disk) -> Self {
        self.disks.push(disk);
        self
    }

    /// Adds an argument to QEMU's command line.
    #[must_use]
    pub fn argument(mut self, argument: impl Into<OsString>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// Starts QEMU and waits until the agent in the guest is ready; a boot that TCG lost is tried
    /// again.
    ///
    /// # Errors
    /// `NoImages`; `Ended` with QEMU's output, `TimedOut` with the guest's console, `LostTimer`.
    pub fn boot(&self, scratch: &Scratch) -> Result<Guest, GuestError> {
        try_again(self.boot_once(scratch), is_lost_by_tcg, || {
            self.boot_once(scratch)
        })
    }

    fn boot_once(&self, scratch: &Scratch) -> Result<Guest, GuestError> {
        let mut guest = self.start(scratch)?;
        guest.wait_ready()?;
        Ok(guest)
    }

    /// Starts QEMU and does not wait for the guest, which may never boot: the destination of a
    /// migration, for example.
    ///
    /// # Errors
    /// As `boot`, but only for QEMU itself.
    pub fn start(&self, scratch: &Scratch) -> Result<Guest, GuestError> {
        let name = scratch.unique("guest");
        let paths = Paths::new(scratch, &name);
        let command = self.command(&Images::find()?, &paths)?;
        Guest::start(command, paths)
    }

    /// Starts a QEMU that waits for a guest to migrate to it.
    ///
    /// # Errors
    /// As `start`.
    pub fn start_incoming(&self, scratch: &Scratch) -> Result<Guest, GuestError> {
        let builder = self.clone().argument("-incoming").argument("defer");
        builder.start(scratch)
    }

    /// Starts a QEMU that goes on with the guest that `Guest::save` wrote to `state`, and waits
    /// until it runs. The machine must be the same; its disks may be others.
    ///
    /// # Errors
    /// As `start`; `Qmp` or `TimedOut` when the guest does not come to run.
    pub fn restore(&self, state: &Path, scratch: &Scratch) -> Result<Guest, GuestError> {
        let builder = self
            .clone()
            .argument("-incoming")
            .argument(with_path("file:", state, ""));
        let mut guest = builder.start(scratch)?;
        guest.go_on()?;
        Ok(guest)
    }

    /// The same guest on other disks, as a migration's destination has it.
    #[must_use]
    pub fn with_disks(&self, disks: impl IntoIterator<Item = Disk>) -> Self {
        let disks = disks.into_iter().collect();
        Self {
            disks,
            ..self.clone()
        }
    }

    fn command(&self, images: &Images, paths: &Paths) -> Result<Command, GuestError> {
        let memory = self.memory_mib;
        let backend = if self.huge_pages {
            ",hugetlb=on,hugetlbsize=2M"
        } else {
            ""
        };
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args(accelerator()?)
            .args([
                "-smp",
                &self.cpus.to_string(),
                "-m",
                &match self.slots {
                    None => format!("{memory}M"),
                    Some((slots, max)) => format!("{memory}M,slots={slots},maxmem={max}M"),
                },
                "-object",
            ])
            .arg(format!(
                "memory-backend-memfd,id=mem,size={memory}M,share=on{backend}"
            ))
            .args(["-machine", "q35,memory-backend=mem"])
            .arg("-kernel")
            .arg(&images.kernel)
            .arg("-initrd")
            .arg(&images.initramfs)
            .args(["-append", KERNEL_OPTIONS])
            .arg("-serial")
            .arg(with_path("file:", &paths.console, ""))
            .arg("-qmp")
            .arg(with_path("unix:", &paths.qmp, ",server=on,wait=off"))
            .args(["-device", "virtio-serial-pci,addr=0x06", "-chardev"])
            .arg(with_path(
                "socket,id=agent,path=",
                &paths.agent,
                ",server=on,wait=off",
            ))
            .args([
                "-device",
                &format!("virtserialport,chardev=agent,name={AGENT_PORT}"),
                "-drive",
            ])
            .arg(with_path(
                "if=none,id=tools,format=raw,readonly=on,file=",
                &images.tools,
                "",
            ))
            .args([
                "-device",
                &format!("virtio-blk-pci,drive=tools,addr={TOOLS_SLOT:#x}"),
            ]);
        for (slot, disk) in (FIRST_DISK_SLOT..).zip(&self.disks) {
            disk.add_to(&mut command, slot);
        }
        command.args(&self.arguments);
        Ok(command)
    }
}

/// The sockets and files of one QEMU.
#[derive(Debug)]
pub(super) struct Paths {
    pub(super) agent: PathBuf,
    pub(super) qmp: PathBuf,
    pub(super) console: PathBuf,
    pub(super) log: PathBuf,
}

impl Paths {
    fn new(scratch: &Scratch, name: &str) -> Self {
        Self {
            agent: scratch.socket(&format!("{name}.agent")),
            qmp: scratch.socket(&format!("{name}.qmp")),
            console: scratch.file(&format!("{name}.console")),
            log: scratch.file(&format!("{name}.log")),
        }
    }
}

fn is_lost_by_tcg(error: &GuestError) -> bool {
    if let GuestError::Ended { log, .. } = error {
        return log.contains(TCG_ASSERTION);
    }
    matches!(error, GuestError::LostTimer { .. })
}

fn accelerator() -> Result<[&'static str; 4], GuestError> {
    match env::var(ACCELERATOR).as_deref() {
        Err(_) | Ok("tcg") => Ok(["-accel", "tcg,thread=multi", "-cpu", "max"]),
        Ok("kvm") => Ok(["-accel", "kvm", "-cpu", "host"]),
        Ok(value) => Err(GuestError::Environment {
            name: ACCELERATOR,
            value: value.to_owned(),
            expected: "tcg or kvm",
        }),
    }
}

/// QEMU splits its arguments at commas; a comma in a path is written twice.
fn with_path(prefix: &str, path: &Path, suffix: &str) -> OsString {
    let mut argument = OsString::from(prefix);
    argument.push(path.to_string_lossy().replace(',', ",,"));
    argument.push(suffix);
    argument
}
