//! A guest sees its disk grow while fio works on it.

use std::fs::File;

use vublk_tests::guest::{DaemonSpec, Disk, Fio, Guest, GuestError, Scratch};

const MIB: u64 = 1 << 20;
const SIGHUP: i32 = 1;

/// Waits until fio has read and written more than when this was called.
fn wait_busy(guest: &mut Guest) -> Result<(), GuestError> {
    guest.shell(
        "stat=/run/disk0/stat
        read -r reads _ _ _ writes _ <$stat
        while read -r r _ _ _ w _ <$stat
            [ $r -lt $((reads + 200)) -o $w -lt $((writes + 200)) ]
        do sleep 0.1; done",
    )?;
    Ok(())
}

#[test]
fn a_disk_grows_under_fio() -> Result<(), GuestError> {
    let scratch = Scratch::new()?;
    let image = scratch.image("disk", 128 * MIB)?;
    let daemon = DaemonSpec::file(&image).queues(2).start(&scratch)?;
    let mut guest = Guest::builder()
        .cpus(2)
        .disk(Disk::of(&daemon))
        .boot(&scratch)?;
    let load = Fio::new("/dev/disk0", "randrw")
        .option("bs", "4k")
        .option("iodepth", 16)
        .option("size", "64m")
        .option("time_based", 1)
        .option("runtime", 36_000);
    guest.shell(&format!(
        "{} >/tmp/load 2>&1 & echo $! >/tmp/pid",
        load.command()
    ))?;
    for mib in [192, 512] {
        wait_busy(&mut guest)?;
        let grown = File::options()
            .write(true)
            .open(&image)
            .and_then(|file| file.set_len(mib * MIB));
        grown.map_err(GuestError::host("grow the image"))?;
        daemon.signal(SIGHUP)?;
        let sectors = mib * MIB / 512;
        guest.shell(&format!(
            "while [ $(cat /run/disk0/size) != {sectors} ]; do sleep 0.1; done"
        ))?;
        // What is new is zero, and can be written to its end.
        let last = mib - 1;
        guest.shell(&format!(
            "cd /tmp; head -c {MIB} /dev/zero >zeroes; yes 'block {mib}' | head -c {MIB} >data
            dd if=/dev/disk0 of=read iflag=direct bs=1M skip={last} count=1 && cmp read zeroes
            dd if=data of=/dev/disk0 oflag=direct bs=1M seek={last} count=1
            dd if=/dev/disk0 of=read iflag=direct bs=1M skip={last} count=1 && cmp read data"
        ))?;
    }
    // fio has not noticed.
    wait_busy(&mut guest)?;
    guest.shell(
        "kill -0 $(cat /tmp/pid) && killall -INT fio; while pidof fio; do sleep 0.1; done",
    )?;
    let said = guest.shell("cat /tmp/load")?;
    assert!(said.contains("err= 0"), "{said}");
    let check = Fio::new("/dev/disk0", "randrw")
        .option("bs", "4k")
        .option("iodepth", 16)
        .option("offset", "192m")
        .option("size", "8m")
        .verified();
    let report = check.run(&mut guest)?;
    assert_eq!((report.errors, report.jobs), (0, 1), "{report:?}");
    guest.power_off()?;
    daemon.stop()
}
