//! QEMU dies in the middle of I/O and a new one comes to the same daemon.

use vublk_tests::guest::{DaemonSpec, Disk, Engine, Fio, Guest, GuestError, Load, Scratch};

const MIB: u64 = 1 << 20;
/// The load reads below this and verifies what it reads.
const KNOWN_END: u64 = 32 * MIB;
/// Each round leaves a block of this size between the load's part and the part that is overwritten.
const MARK: u64 = 64 << 10;
const WRITTEN_START: u64 = 64 * MIB;
const DISK: u64 = 128 * MIB;

/// Kills QEMU again and again under verified reads and under writes of all sizes. Only one guest
/// boots: each QEMU goes on from the same state, in which the requests have just been stopped.
fn survives(
    kills: u64,
    cpus: u16,
    shape: impl FnOnce(DaemonSpec) -> DaemonSpec,
) -> Result<(), GuestError> {
    let scratch = Scratch::new()?;
    let load = Load::new(2).read_only().pages(512);
    assert_eq!(load.disk_bytes(), KNOWN_END);
    let image = scratch.image("disk", DISK)?;
    load.prepare(&image)?;
    let mut daemon = shape(DaemonSpec::file(&image)).start(&scratch)?;
    let builder = Guest::builder().cpus(cpus).disk(Disk::of(&daemon));
    let mut guest = builder.boot(&scratch)?;
    let load = load.start(&mut guest)?;
    let writes = Fio::new("/dev/disk0", "randwrite")
        .option("bssplit", "4k/60:64k/30:512k/10")
        .option("iodepth", 32)
        .option("numjobs", cpus)
        .option("offset", WRITTEN_START)
        .option("time_based", 1)
        .option("runtime", 36_000);
    guest.shell(&format!("{} >/tmp/writes 2>&1 & echo", writes.command()))?;
    wait_busy(&mut guest)?;
    let state = scratch.file("state");
    guest.save(&state)?;
    for round in 0..kills {
        let mut guest = builder.restore(&state, &scratch)?;
        // What the last guest wrote and synced is there, whatever was in flight when it died.
        if let Some(last) = round.checked_sub(1) {
            verify_mark(&mut guest, last)?;
        }
        write_mark(&mut guest, round)?;
        load.work_on(&mut guest, 1)?;
        wait_busy(&mut guest)?;
        guest.kill()?;
        daemon.check_running()?;
    }
    let mut guest = builder.restore(&state, &scratch)?;
    for round in 0..kills {
        verify_mark(&mut guest, round)?;
    }
    let counts = load.stop(&mut guest)?;
    assert!(counts.reads > 0 && counts.sweeps > 0, "{counts:?}");
    guest.shell("killall -INT fio; while pidof fio; do sleep 0.1; done")?;
    let errors = guest.shell("dmesg | grep -c 'I/O error' || true")?;
    assert_eq!(errors, "0", "the guest's kernel saw errors");
    guest.power_off()?;
    daemon.stop()
}

/// Waits until requests of both directions have completed and others are on their way.
fn wait_busy(guest: &mut Guest) -> Result<(), GuestError> {
    guest.shell(
        "cd /run/disk0
        read -r reads _ _ _ writes _ <stat
        while read -r r _ _ _ w _ <stat; [ $((r - reads)) -lt 50 -o $((w - writes)) -lt 50 ]
        do sleep 0.05; done
        while read -r r w <inflight; [ $r = 0 -o $w = 0 ]; do :; done",
    )?;
    Ok(())
}

fn mark_block(round: u64) -> u64 {
    KNOWN_END / MARK + round
}

fn write_mark(guest: &mut Guest, round: u64) -> Result<(), GuestError> {
    let block = mark_block(round);
    guest.shell(&format!(
        "yes 'round {round}' | dd of=/dev/disk0 bs={MARK} count=1 iflag=fullblock seek={block} \
         oflag=direct conv=fsync"
    ))?;
    Ok(())
}

fn verify_mark(guest: &mut Guest, round: u64) -> Result<(), GuestError> {
    let block = mark_block(round);
    let lines = guest.shell(&format!(
        "dd if=/dev/disk0 iflag=direct bs={MARK} skip={block} count=1 | head -n 1000 | uniq -c"
    ))?;
    let words: Vec<&str> = lines.split_whitespace().collect();
    assert_eq!(words, ["1000", "round", round.to_string().as_str()]);
    Ok(())
}

#[test]
fn killed_qemu_is_followed_by_another() -> Result<(), GuestError> {
    survives(5, 1, |spec| spec)
}

#[test]
fn twenty_killed_qemus_are_followed_by_another_with_4_queues() -> Result<(), GuestError> {
    survives(20, 4, |spec| spec.queues(4).direct(true))
}

#[test]
fn killed_qemu_is_followed_by_another_with_threads_engine() -> Result<(), GuestError> {
    survives(5, 2, |spec| spec.queues(2).engine(Engine::Threads))
}
