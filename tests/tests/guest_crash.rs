//! The daemon is killed under load and another one takes its place at the same socket.

use std::thread;
use std::time::Duration;

use vublk_tests::guest::{DaemonSpec, Disk, Guest, GuestError, Load, Scratch};

const CRASHES: u32 = 10;

/// Kills the daemon again and again under the load of four processes.
fn survives(queues: u16) -> Result<(), GuestError> {
    let scratch = Scratch::new()?;
    let load = Load::new(4);
    let image = scratch.image("disk", load.disk_bytes())?;
    load.prepare(&image)?;
    let spec = DaemonSpec::file(&image).queues(queues);
    let mut daemon = spec.start(&scratch)?;
    let mut guest = Guest::builder()
        .cpus(queues.max(2))
        .disk(Disk::of(&daemon).reconnect())
        .boot(&scratch)?;
    let load = load.start(&mut guest)?;
    for crash in 0..CRASHES {
        // Not always in the same moment of a process's work.
        thread::sleep(Duration::from_millis(u64::from(37 * crash)));
        daemon = daemon.crash(&scratch)?;
        load.work_on(&mut guest, 1)?;
    }
    let counts = load.stop(&mut guest)?;
    assert!(counts.writes > 0 && counts.read_backs > 0, "{counts:?}");
    let errors = guest.shell("dmesg | grep -c 'I/O error' || true")?;
    assert_eq!(errors, "0", "the guest's kernel saw errors");
    guest.power_off()?;
    daemon.stop()
}

#[test]
fn ten_crashes_under_load_lose_nothing() -> Result<(), GuestError> {
    survives(1)
}

#[test]
fn ten_crashes_under_load_with_4_queues_lose_nothing() -> Result<(), GuestError> {
    survives(4)
}
