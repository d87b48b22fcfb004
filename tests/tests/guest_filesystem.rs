//! A file system on a served disk, over reboots, daemons and checks.

use vublk_tests::guest::{DaemonSpec, Disk, Engine, Guest, GuestError, Scratch};

const MIB: u64 = 1 << 20;

/// Writes a tree of files and leaves its checksums in the file system itself.
const FILL: &str = "set -e
mount -t ext4 /dev/disk0 /mnt
for directory in 0 1 2 3; do
    mkdir -p /mnt/$directory
    for file in 0 1 2 3 4 5 6 7; do
        seq $((directory * 1000)) $((directory * 1000 + 10000 * (file + 1))) >/mnt/$directory/$file
    done
done
rm -r /mnt/3
mv /mnt/2/0 /mnt/1/moved
cd /mnt && find . -type f ! -name sums | sort | xargs sha256sum >/tmp/sums
cp /tmp/sums /mnt/sums
cd / && sync && umount /mnt";

/// Checks the file system and every file; prints how many files there were.
const CHECK: &str = "set -e
e2fsck -fn /dev/disk0 >&2
mount -t ext4 -o ro /dev/disk0 /mnt
cd /mnt && sha256sum -c sums >/tmp/checked
cd / && umount /mnt
grep -c ': OK$' /tmp/checked";

/// Three directories of eight files are left when the script is done.
const FILES: &str = "24";

fn survives(spec: &DaemonSpec, scratch: &Scratch) -> Result<(), GuestError> {
    let daemon = spec.start(scratch)?;
    let mut guest = Guest::builder().disk(Disk::of(&daemon)).boot(scratch)?;
    guest.shell("mke2fs -q -t ext4 -O metadata_csum /dev/disk0")?;
    guest.shell(FILL)?;
    guest.reboot()?;
    assert_eq!(guest.shell(CHECK)?, FILES);
    guest.power_off()?;
    daemon.stop()?;

    let daemon = spec.start(scratch)?;
    let mut guest = Guest::builder().disk(Disk::of(&daemon)).boot(scratch)?;
    assert_eq!(guest.shell(CHECK)?, FILES);
    guest.power_off()?;
    daemon.stop()
}

#[test]
fn filesystem_survives_reboot_and_restart() -> Result<(), GuestError> {
    let scratch = Scratch::new()?;
    let image = scratch.image("disk", 256 * MIB)?;
    survives(&DaemonSpec::file(&image).queues(2), &scratch)
}

#[test]
fn filesystem_survives_with_threads_engine() -> Result<(), GuestError> {
    let scratch = Scratch::new()?;
    let image = scratch.image("disk", 256 * MIB)?;
    survives(
        &DaemonSpec::file(&image).queues(2).engine(Engine::Threads),
        &scratch,
    )
}

#[test]
fn filesystem_survives_with_o_direct() -> Result<(), GuestError> {
    let scratch = Scratch::new()?;
    let image = scratch.image("disk", 256 * MIB)?;
    survives(&DaemonSpec::file(&image).direct(true), &scratch)
}

#[test]
fn filesystem_replays_its_journal_after_a_reset() -> Result<(), GuestError> {
    let scratch = Scratch::new()?;
    let image = scratch.image("disk", 256 * MIB)?;
    let daemon = DaemonSpec::file(&image).queues(2).start(&scratch)?;
    let mut guest = Guest::builder().disk(Disk::of(&daemon)).boot(&scratch)?;
    guest.shell("mke2fs -q -t ext4 /dev/disk0")?;
    guest.shell(FILL)?;
    // Files are written, some of them synced, and the machine is reset while that goes on.
    guest.shell(
        "mount -t ext4 /dev/disk0 /mnt && mkdir /mnt/load && echo kept >/mnt/load/kept &&
        sync && (while :; do seq 1 5000 >/mnt/load/$((n += 1)); [ $((n % 20)) = 0 ] && sync
        done >/dev/null 2>&1 &) && sleep 3",
    )?;
    guest.reboot()?;
    guest.shell("mount -t ext4 /dev/disk0 /mnt && grep -q kept /mnt/load/kept && umount /mnt")?;
    assert_eq!(guest.shell(CHECK)?, FILES);
    guest.power_off()?;
    daemon.stop()
}
