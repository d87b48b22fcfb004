//! Guests that move from one QEMU and daemon to the next, under a load that sees every stale page.

use vublk_tests::guest::{
    Builder, DaemonSpec, Disk, Guest, GuestError, Load, Migration, RunningLoad, Scratch,
    failpoints_path,
};

const MIGRATIONS: u32 = 5;
/// How often QEMU must have fetched the dirty log while the load ran.
const PASSES: u64 = 3;

/// Moves a guest `count` times, each time to a new QEMU and a new daemon on the same file, under
/// one load.
fn chain(queues: u16, count: u32) -> Result<(), GuestError> {
    let scratch = Scratch::new()?;
    let load = Load::new(4);
    let image = scratch.image("disk", load.disk_bytes())?;
    load.prepare(&image)?;
    let spec = DaemonSpec::file(&image).queues(queues);
    let mut daemon = spec.start(&scratch)?;
    let builder = Guest::builder().cpus(queues.max(2));
    let mut guest = builder.with_disks([Disk::of(&daemon)]).boot(&scratch)?;
    let load = load.start(&mut guest)?;
    for _ in 0..count {
        let next = spec.start(&scratch)?;
        let passes;
        (guest, passes) = migrate(
            guest,
            &load,
            &builder.with_disks([Disk::of(&next)]),
            &scratch,
        )?;
        assert!(passes >= PASSES, "{passes} passes");
        daemon.stop()?;
        daemon = next;
    }
    let counts = load.stop(&mut guest)?;
    assert!(counts.writes > 0 && counts.read_backs > 0, "{counts:?}");
    guest.power_off()?;
    daemon.stop()
}

/// Moves a guest to what `builder` starts, and waits until the load has checked all its pages.
fn migrate(
    guest: Guest,
    load: &RunningLoad,
    builder: &Builder,
    scratch: &Scratch,
) -> Result<(Guest, u64), GuestError> {
    let destination = builder.start_incoming(scratch)?;
    let mut migration = Migration::start(guest, destination, scratch)?;
    migration.wait_passes(PASSES)?;
    load.work_on(migration.source(), 1)?;
    let (mut guest, passes) = migration.finish()?;
    load.work_on(&mut guest, 2)?;
    Ok((guest, passes))
}

#[test]
fn a_chain_of_migrations_loses_nothing() -> Result<(), GuestError> {
    chain(1, MIGRATIONS)
}

#[test]
fn a_chain_of_migrations_with_4_queues_loses_nothing() -> Result<(), GuestError> {
    chain(4, MIGRATIONS)
}

/// The load itself is tried: a daemon that leaves out the marks of its data is found out.
#[test]
fn a_missing_mark_shows_as_a_stale_page() -> Result<(), GuestError> {
    let scratch = Scratch::new()?;
    let load = Load::new(4);
    let image = scratch.image("disk", load.disk_bytes())?;
    load.prepare(&image)?;
    let spec = DaemonSpec::file(&image);
    let daemon = spec
        .clone()
        .failpoints(&failpoints_path()?, "skip-marks=return")
        .start(&scratch)?;
    let next = spec.start(&scratch)?;
    let builder = Guest::builder();
    let mut guest = builder.with_disks([Disk::of(&daemon)]).boot(&scratch)?;
    let load = load.start(&mut guest)?;
    let destination = builder
        .with_disks([Disk::of(&next)])
        .start_incoming(&scratch)?;
    let mut migration = Migration::start(guest, destination, &scratch)?;
    migration.wait_passes(PASSES)?;
    let (mut guest, _) = migration.finish()?;
    let error = load.stop(&mut guest).unwrap_err();
    let GuestError::Command { output, .. } = error else {
        panic!("{error}")
    };
    assert!(output.stderr.contains("stale page"), "{output}");
    guest.power_off()?;
    daemon.stop()?;
    next.stop()
}
