//! QEMU dies in the middle of I/O and a new one comes to the same daemon.

use vublk_tests::guest::{DaemonSpec, Disk, Engine, Fio, Guest, GuestError, Scratch};

const MIB: u64 = 1 << 20;
const ROUNDS: u64 = 3;

fn survives(spec: &DaemonSpec, cpus: u16, scratch: &Scratch) -> Result<(), GuestError> {
    let mut daemon = spec.start(scratch)?;
    let builder = Guest::builder().cpus(cpus).disk(Disk::of(&daemon));
    for round in 0..ROUNDS {
        let mut guest = builder.boot(scratch)?;
        // What earlier guests synced is there, whatever was in flight when they died.
        for earlier in 0..round {
            verify_block(&mut guest, earlier)?;
        }
        guest.shell(&format!(
            "yes 'round {round}' | dd of=/dev/disk0 bs=64k count=1 iflag=fullblock seek={round} \
             oflag=direct conv=fsync"
        ))?;
        let load = Fio::new("/dev/disk0", "randrw")
            .option("bssplit", "4k/60:64k/30:512k/10")
            .option("iodepth", 32)
            .option("numjobs", cpus)
            .option("offset", "64m")
            .option("time_based", 1)
            .option("runtime", 600);
        guest.shell(&format!("{} >/tmp/load 2>&1 & echo", load.command()))?;
        // Both directions are on their way before QEMU is killed.
        guest.shell(
            "stat=/run/disk0/stat
            while read -r reads _ _ _ writes _ <$stat; [ $reads -lt 200 -o $writes -lt 200 ]
            do sleep 0.1; done",
        )?;
        guest.kill()?;
        daemon.check_running()?;
    }
    let mut guest = builder.boot(scratch)?;
    for earlier in 0..ROUNDS {
        verify_block(&mut guest, earlier)?;
    }
    let check = Fio::new("/dev/disk0", "randrw")
        .option("bs", "4k")
        .option("iodepth", 16)
        .option("size", "16m")
        .option("offset", "64m")
        .verified();
    let report = check.run(&mut guest)?;
    assert_eq!((report.errors, report.jobs), (0, 1), "{report:?}");
    guest.power_off()?;
    daemon.stop()
}

fn verify_block(guest: &mut Guest, round: u64) -> Result<(), GuestError> {
    let lines = guest.shell(&format!(
        "dd if=/dev/disk0 iflag=direct bs=64k skip={round} count=1 | head -n 1000 | uniq -c"
    ))?;
    let words: Vec<&str> = lines.split_whitespace().collect();
    assert_eq!(words, ["1000", "round", round.to_string().as_str()]);
    Ok(())
}

#[test]
fn killed_qemu_is_followed_by_another() -> Result<(), GuestError> {
    let scratch = Scratch::new()?;
    let image = scratch.image("disk", 256 * MIB)?;
    survives(&DaemonSpec::file(&image), 1, &scratch)
}

#[test]
fn killed_qemu_is_followed_by_another_with_4_queues() -> Result<(), GuestError> {
    let scratch = Scratch::new()?;
    let image = scratch.image("disk", 256 * MIB)?;
    survives(
        &DaemonSpec::file(&image).queues(4).direct(true),
        4,
        &scratch,
    )
}

#[test]
fn killed_qemu_is_followed_by_another_with_threads_engine() -> Result<(), GuestError> {
    let scratch = Scratch::new()?;
    let image = scratch.image("disk", 256 * MIB)?;
    survives(
        &DaemonSpec::file(&image).queues(2).engine(Engine::Threads),
        2,
        &scratch,
    )
}
