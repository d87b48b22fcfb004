//! Guests that move from one QEMU and daemon to the next, under a load that sees every stale page.

use vublk_tests::guest::{
    Builder, Daemon, DaemonSpec, Disk, Guest, GuestError, Load, Migration, RunningLoad, Scratch,
    failpoints_path,
};

const MIGRATIONS: u32 = 5;
/// How often QEMU must have fetched the dirty log while the load ran.
const PASSES: u64 = 3;
/// Two pieces of shared memory that are no part of the guest's RAM, in these PCI slots.
const SHARED_MEMORY: [(&str, &str); 2] = [("shared0", "0x1d"), ("shared1", "0x1e")];

/// QEMU's property for the memory to migrate with the guest, in the words it has for it.
const OWNER: &str = concat!("mas", "ter");

/// A guest on its way from daemon to daemon, all of them on one file, and its load.
struct Journey {
    scratch: Scratch,
    spec: DaemonSpec,
    builder: Builder,
    guest: Guest,
    daemon: Daemon,
    load: RunningLoad,
}

impl Journey {
    /// Fills an image, starts a daemon as `shape` says, the guest and the load.
    fn start(
        load: &Load,
        builder: &Builder,
        shape: impl FnOnce(DaemonSpec) -> DaemonSpec,
    ) -> Result<Self, GuestError> {
        let scratch = Scratch::new()?;
        let image = scratch.image("disk", load.disk_bytes())?;
        load.prepare(&image)?;
        let spec = shape(DaemonSpec::file(&image));
        let daemon = spec.start(&scratch)?;
        let mut guest = builder.with_disks([disk(&daemon)]).boot(&scratch)?;
        let load = load.start(&mut guest)?;
        Ok(Self {
            scratch,
            spec,
            builder: builder.clone(),
            guest,
            daemon,
            load,
        })
    }

    /// Moves the guest to a new QEMU and a new daemon, and waits until the load has checked all its
    /// pages there. `during` happens while the migration goes on, with the daemon that is left,
    /// which it hands back; the third thing returned is that daemon's log.
    fn go(
        self,
        during: impl FnOnce(
            Daemon,
            &mut Migration,
            &RunningLoad,
            &Scratch,
        ) -> Result<Daemon, GuestError>,
    ) -> Result<(Self, String), GuestError> {
        let next = self.spec.start(&self.scratch)?;
        let builder = self.builder.with_disks([disk(&next)]);
        let destination = builder.start_incoming(&self.scratch)?;
        let mut migration = Migration::start(self.guest, destination, &self.scratch)?;
        migration.wait_passes(PASSES)?;
        let daemon = during(self.daemon, &mut migration, &self.load, &self.scratch)?;
        self.load.work_on(migration.source(), 1)?;
        let (mut guest, passes) = migration.finish()?;
        assert!(passes > PASSES, "{passes} passes");
        self.load.work_on(&mut guest, 2)?;
        let log = daemon.log();
        daemon.stop()?;
        let journey = Self {
            guest,
            daemon: next,
            ..self
        };
        Ok((journey, log))
    }

    /// Moves the guest while nothing else happens.
    fn go_quietly(self) -> Result<Self, GuestError> {
        let (journey, _) = self.go(|daemon, _, _, _| Ok(daemon))?;
        Ok(journey)
    }

    /// Ends the load, which then compares all that it has and wrote, the guest and the daemon.
    fn end(mut self) -> Result<(), GuestError> {
        let counts = self.load.stop(&mut self.guest)?;
        assert!(counts.reads > 0 && counts.sweeps > 0, "{counts:?}");
        self.guest.power_off()?;
        self.daemon.stop()
    }
}

fn disk(daemon: &Daemon) -> Disk {
    Disk::of(daemon).reconnect()
}

/// Moves a guest again and again under one load.
fn chain(queues: u16) -> Result<(), GuestError> {
    let builder = Guest::builder().cpus(queues.max(2));
    let mut journey = Journey::start(&Load::new(4), &builder, |spec| spec.queues(queues))?;
    for _ in 0..MIGRATIONS {
        journey = journey.go_quietly()?;
    }
    journey.end()
}

#[test]
fn a_chain_of_migrations_loses_nothing() -> Result<(), GuestError> {
    chain(1)
}

#[test]
fn a_chain_of_migrations_with_4_queues_loses_nothing() -> Result<(), GuestError> {
    chain(4)
}

#[test]
fn a_disk_in_the_page_cache_migrates_and_comes_back() -> Result<(), GuestError> {
    let builder = Guest::builder();
    let journey = Journey::start(&Load::new(4), &builder, |spec| spec.direct(false))?;
    journey.go_quietly()?.go_quietly()?.end()
}

#[test]
fn a_read_only_disk_migrates() -> Result<(), GuestError> {
    let load = Load::new(4).read_only();
    let journey = Journey::start(&load, &Guest::builder(), DaemonSpec::read_only)?;
    journey.go_quietly()?.end()
}

/// QEMU 10.0 forgets what was marked between its last look at the log and the moment it sees that
/// the daemon is gone (it calls the device stopped, and does not look at the log of a stopped one),
/// whatever serves. So the load rests from one look to the crash, while other pages keep the
/// migration going; what is read and written after the crash is marked by the successor.
#[test]
fn a_crash_during_a_migration_loses_nothing() -> Result<(), GuestError> {
    let builder = Guest::builder().cpus(4);
    let journey = Journey::start(&Load::new(4), &builder, |spec| spec.queues(4).debug_log())?;
    let (journey, log) = journey.go(|daemon, migration, load, scratch| {
        migration.source().shell(
            "while [ ! -e /run/dirty.stop ]; do
                cat /tools/bin/* | dd of=/tmp/dirty bs=64k conv=notrunc
            done >/run/dirty.out 2>&1 &
            killall -STOP guest-load",
        )?;
        migration.wait_more_passes(2)?;
        let daemon = daemon.crash(scratch)?;
        migration
            .source()
            .shell("killall -CONT guest-load; touch /run/dirty.stop")?;
        load.work_on(migration.source(), 3)?;
        Ok(daemon)
    })?;
    for message in ["SET_INFLIGHT_FD", "SET_LOG_BASE"] {
        assert!(log.contains(message), "no {message} in {log}");
    }
    journey.end()
}

/// Crashes under full load while the log is in force: the migration is given up, for the reason
/// above, and the guest goes on where it is.
#[test]
fn crashes_while_the_log_is_in_force_lose_nothing() -> Result<(), GuestError> {
    let builder = Guest::builder().cpus(4);
    let mut journey = Journey::start(&Load::new(4), &builder, |spec| spec.queues(4).debug_log())?;
    let next = journey.spec.start(&journey.scratch)?;
    let destination = journey
        .builder
        .with_disks([disk(&next)])
        .start_incoming(&journey.scratch)?;
    let mut migration = Migration::start(journey.guest, destination, &journey.scratch)?;
    migration.wait_passes(PASSES)?;
    for _ in 0..3 {
        journey.daemon = journey.daemon.crash(&journey.scratch)?;
        journey.load.work_on(migration.source(), 1)?;
        let log = journey.daemon.log();
        assert!(log.contains("SET_LOG_BASE"), "{log}");
    }
    let mut guest = migration.cancel()?;
    journey.load.work_on(&mut guest, 1)?;
    next.stop()?;
    Journey { guest, ..journey }.end()
}

/// A guest with the shared memory. It has one CPU: TCG sends accesses of another astray while the
/// map of the devices changes.
fn with_shared_memory() -> Builder {
    let mut builder = Guest::builder().cpus(1);
    for (id, slot) in SHARED_MEMORY {
        builder = builder
            .argument("-object")
            .argument(format!("memory-backend-memfd,id={id},share=on,size=16M"))
            .argument("-device")
            .argument(format!("ivshmem-plain,memdev={id},{OWNER}=on,addr={slot}"));
    }
    builder
}

/// Switches shared memory of the guest off and on, over and over, until /run/decode.stop exists:
/// each time QEMU takes a region out of the table and puts it back. `which` is a command that
/// chooses from the devices, which it is given in the order of their addresses.
fn toggle_memory(guest: &mut Guest, which: &str) -> Result<(), GuestError> {
    // The third line of `resource` starts with the address of BAR 2, the shared memory. Bit 1 of
    // the command register, at offset 4, is the one that decodes memory addresses.
    guest.shell(&format!(
        r"cd /sys/bus/pci/devices
        chosen=$(for device in 0000:00:1d.0 0000:00:1e.0; do
            echo $(sed -n 3p $device/resource | cut -d ' ' -f 1) $device
        done | sort | cut -d ' ' -f 2 | {which})
        decode() {{
            for device in $chosen; do
                printf $1 | dd of=$device/config bs=1 seek=4 conv=notrunc
            done
        }}
        while [ ! -e /run/decode.stop ]; do
            decode '\000'; sleep 0.3; decode '\002'; sleep 0.3
        done >/run/decode.out 2>&1 & echo"
    ))?;
    Ok(())
}

/// How often each of the messages was logged after the migration had switched the log on.
fn count_messages(log: &str) -> [usize; 3] {
    let (_, log) = log.split_once("SET_LOG_BASE").unwrap_or_default();
    ["REM_MEM_REG", "ADD_MEM_REG", "SET_LOG_BASE"].map(|message| log.matches(message).count())
}

/// A region that other memory lies above comes and goes: the log keeps its size.
#[test]
fn memory_changes_during_a_migration_lose_nothing() -> Result<(), GuestError> {
    let builder = with_shared_memory();
    let mut journey = Journey::start(&Load::new(4), &builder, DaemonSpec::debug_log)?;
    toggle_memory(&mut journey.guest, "head -n 1")?;
    let (mut journey, log) = journey.go(|daemon, migration, load, _| {
        load.work_on(migration.source(), 10)?;
        Ok(daemon)
    })?;
    journey.guest.shell("touch /run/decode.stop")?;
    let [removed, added, logs] = count_messages(&log);
    assert!(removed >= 3 && added >= 3, "{log}");
    assert_eq!(logs, 0, "{log}");
    journey.end()
}

/// The topmost memory comes and goes, so that QEMU gives a log of another size each time. QEMU 10.0
/// no longer looks at RAM in a log it has resized (`vhost_log_put` takes the device from those that
/// scan, and nobody puts it back), so that no such migration can end well, whatever serves: this
/// one is given up, and the guest goes on where it is.
#[test]
fn logs_of_other_sizes_during_a_migration_are_taken() -> Result<(), GuestError> {
    let builder = with_shared_memory();
    let mut journey = Journey::start(&Load::new(4), &builder, DaemonSpec::debug_log)?;
    toggle_memory(&mut journey.guest, "cat")?;
    let next = journey.spec.start(&journey.scratch)?;
    let destination = journey
        .builder
        .with_disks([disk(&next)])
        .start_incoming(&journey.scratch)?;
    let mut migration = Migration::start(journey.guest, destination, &journey.scratch)?;
    migration.wait_passes(2)?;
    // What the disk changes is not seen any more, and the rest may be sent before it is given up.
    migration.slow_down()?;
    journey.load.work_on(migration.source(), 10)?;
    let mut guest = migration.cancel()?;
    journey.load.work_on(&mut guest, 1)?;
    guest.shell("touch /run/decode.stop")?;
    let counts = count_messages(&journey.daemon.log());
    assert!(counts.iter().all(|count| *count >= 3), "{counts:?}");
    next.stop()?;
    Journey { guest, ..journey }.end()
}

/// The load itself is tried: a daemon that leaves out the marks of its data is found out.
#[test]
fn a_missing_mark_shows_as_a_stale_page() -> Result<(), GuestError> {
    let binary = failpoints_path()?;
    let journey = Journey::start(&Load::new(4), &Guest::builder(), |spec| {
        spec.failpoints(&binary, "skip-marks=return")
    })?;
    let next = journey.spec.start(&journey.scratch)?;
    let builder = journey.builder.with_disks([disk(&next)]);
    let destination = builder.start_incoming(&journey.scratch)?;
    let mut migration = Migration::start(journey.guest, destination, &journey.scratch)?;
    migration.wait_passes(PASSES)?;
    let (mut guest, _) = migration.finish()?;
    let error = journey.load.stop(&mut guest).unwrap_err();
    let GuestError::Command { output, .. } = error else {
        panic!("{error}")
    };
    // A page that is seen right after its read is no less stale than one that is seen later.
    let is_found = ["stale page", "just read"].map(|text| output.stderr.contains(text));
    assert!(is_found.contains(&true), "{output}");
    guest.power_off()?;
    journey.daemon.stop()?;
    next.stop()
}
