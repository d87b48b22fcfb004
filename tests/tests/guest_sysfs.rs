//! What the guest's kernel learned from the device's features and configuration space.

use vublk_tests::guest::{DaemonKind, DaemonSpec, Disk, Guest, GuestError, Scratch};

const MIB: u64 = 1 << 20;

/// Feature bits, virtio 1.3: 5.2.3 for the block device, 6 for the ring and the transport.
const BLK_F_SEG_MAX: usize = 2;
const BLK_F_RO: usize = 5;
const BLK_F_BLK_SIZE: usize = 6;
const BLK_F_FLUSH: usize = 9;
const BLK_F_TOPOLOGY: usize = 10;
const BLK_F_CONFIG_WCE: usize = 11;
const BLK_F_MQ: usize = 12;
const BLK_F_DISCARD: usize = 13;
const BLK_F_WRITE_ZEROES: usize = 14;
const RING_F_INDIRECT_DESC: usize = 28;
const RING_F_EVENT_IDX: usize = 29;
const F_VERSION_1: usize = 32;

/// A file under the disk's folder in sysfs.
fn sysfs(guest: &mut Guest, name: &str) -> Result<String, GuestError> {
    guest.shell(&format!("cat /run/disk0/{name}"))
}

fn number(guest: &mut Guest, name: &str) -> Result<u64, GuestError> {
    guest.number(&format!("cat /run/disk0/{name}"))
}

/// The negotiated feature bits, the lowest first.
fn features(guest: &mut Guest) -> Result<Vec<bool>, GuestError> {
    Ok(sysfs(guest, "device/features")?
        .chars()
        .map(|bit| bit == '1')
        .collect())
}

#[test]
fn guest_sees_size_serial_queues_and_features() -> Result<(), GuestError> {
    let scratch = Scratch::new()?;
    // A size that is no multiple of a mebibyte.
    let size = 100 * MIB + 3 * 4096;
    let image = scratch.image("disk", size)?;
    let daemon = DaemonSpec::file(&image)
        .queues(4)
        .serial("vublk-0123456789")
        .start(&scratch)?;
    let mut guest = Guest::builder()
        .cpus(4)
        .disk(Disk::of(&daemon))
        .boot(&scratch)?;

    assert_eq!(number(&mut guest, "size")?, size / 512);
    assert_eq!(number(&mut guest, "ro")?, 0);
    assert_eq!(sysfs(&mut guest, "serial")?, daemon.serial().unwrap());
    assert_eq!(number(&mut guest, "queue/logical_block_size")?, 512);
    let queues = guest.shell("ls /run/disk0/mq")?;
    assert_eq!(queues.split_whitespace().count(), 4);
    assert!(number(&mut guest, "queue/discard_max_bytes")? > 0);
    assert!(number(&mut guest, "queue/write_zeroes_max_bytes")? > 0);
    assert!(number(&mut guest, "queue/max_segments")? > 1);

    let features = features(&mut guest)?;
    for bit in [
        BLK_F_SEG_MAX,
        BLK_F_BLK_SIZE,
        BLK_F_FLUSH,
        BLK_F_TOPOLOGY,
        BLK_F_CONFIG_WCE,
        BLK_F_MQ,
        BLK_F_DISCARD,
        BLK_F_WRITE_ZEROES,
        RING_F_INDIRECT_DESC,
        RING_F_EVENT_IDX,
        F_VERSION_1,
    ] {
        assert!(features[bit], "feature bit {bit} is not negotiated");
    }
    assert!(!features[BLK_F_RO]);
    guest.power_off()?;
    daemon.stop()
}

/// GET_ID moves nothing to or from the storage, so that its answer comes before the daemon has
/// waited for anything: on every queue, again and again after it has gone to sleep.
#[test]
fn guest_reads_the_serial_through_every_queue() -> Result<(), GuestError> {
    let scratch = Scratch::new()?;
    let image = scratch.image("disk", 64 * MIB)?;
    let spec = DaemonSpec::file(&image)
        .queues(4)
        .serial("through every queue");
    let daemon = spec.start(&scratch)?;
    let mut guest = Guest::builder()
        .cpus(4)
        .disk(Disk::of(&daemon))
        .boot(&scratch)?;
    let expected = [daemon.serial().unwrap(); 10].join("\n");
    for cpu in [3, 0, 2, 1] {
        let read = guest.shell(&format!(
            "for n in 1 2 3 4 5 6 7 8 9 10; do
                taskset -c {cpu} cat /run/disk0/serial; echo; sleep 0.1
            done | grep ."
        ))?;
        assert_eq!(read, expected);
    }
    guest.power_off()?;
    daemon.stop()
}

#[test]
fn guest_sees_a_block_size_of_4096() -> Result<(), GuestError> {
    let scratch = Scratch::new()?;
    let image = scratch.image("disk", 64 * MIB)?;
    let daemon = DaemonSpec::file(&image).block_size(4096).start(&scratch)?;
    // QEMU's own property, 512 by default, does not reach the guest over vhost-user.
    let mut guest = Guest::builder().disk(Disk::of(&daemon)).boot(&scratch)?;
    assert_eq!(number(&mut guest, "queue/logical_block_size")?, 4096);
    assert_eq!(number(&mut guest, "size")?, 64 * MIB / 512);
    // The kernel takes no smaller request, and those it takes work.
    assert_ne!(
        guest
            .run("dd if=/dev/disk0 iflag=direct bs=512 count=1 of=/dev/null")?
            .status,
        0
    );
    guest.shell("dd if=/dev/disk0 iflag=direct bs=4096 count=1 of=/dev/null")?;
    guest.shell("mke2fs -q -t ext4 /dev/disk0 && e2fsck -fn /dev/disk0")?;
    guest.power_off()?;
    daemon.stop()
}

#[test]
fn guest_switches_the_write_cache() -> Result<(), GuestError> {
    let scratch = Scratch::new()?;
    let image = scratch.image("disk", 64 * MIB)?;
    let daemon = DaemonSpec::file(&image).start(&scratch)?;
    let mut guest = Guest::builder().disk(Disk::of(&daemon)).boot(&scratch)?;
    let switch =
        |guest: &mut Guest, mode: &str| guest.shell(&format!("echo {mode} >/run/disk0/cache_type"));
    // qemu-storage-daemon begins with write through.
    if daemon.kind() == DaemonKind::Vublk {
        assert_eq!(sysfs(&mut guest, "cache_type")?, "write back");
    }
    // The driver reads the byte back from the device's configuration space.
    for mode in ["write through", "write back", "write through"] {
        switch(&mut guest, mode)?;
        assert_eq!(sysfs(&mut guest, "cache_type")?, mode);
        assert_eq!(sysfs(&mut guest, "queue/write_cache")?, mode);
        guest.shell(&format!(
            "echo {mode} | dd of=/dev/disk0 bs=512 conv=sync oflag=direct"
        ))?;
        let text = guest.shell("dd if=/dev/disk0 bs=512 count=1 iflag=direct | tr -d '\\0'")?;
        assert_eq!(text, mode);
    }
    guest.reboot()?;
    // QEMU keeps the byte over a reset of the machine, and what the guest reads is QEMU's.
    assert_eq!(sysfs(&mut guest, "cache_type")?, "write through");
    guest.power_off()?;
    daemon.stop()
}

#[test]
fn guest_cannot_write_to_a_read_only_disk() -> Result<(), GuestError> {
    let scratch = Scratch::new()?;
    let image = scratch.image("disk", 64 * MIB)?;
    std::fs::write(&image, vec![b'Z'; 64 << 20]).unwrap();
    let daemon = DaemonSpec::file(&image).read_only().start(&scratch)?;
    let mut guest = Guest::builder().disk(Disk::of(&daemon)).boot(&scratch)?;
    assert_eq!(number(&mut guest, "ro")?, 1);
    assert!(features(&mut guest)?[BLK_F_RO]);
    // The kernel keeps a disk read-only that its device calls read-only.
    guest.run("blockdev --setrw /dev/disk0")?;
    for write in [
        "dd if=/dev/zero of=/dev/disk0 bs=4096 count=1 oflag=direct",
        "dd if=/dev/zero of=/dev/disk0 bs=4096 count=1 conv=fsync",
        "blkdiscard /dev/disk0",
        "blkdiscard --zeroout /dev/disk0",
        "mke2fs -F -q /dev/disk0",
    ] {
        let output = guest.run(write)?;
        assert_ne!(output.status, 0, "{write}: {output}");
    }
    guest.shell("dd if=/dev/zero bs=1M count=64 | tr '\\0' Z | cmp - /dev/disk0")?;
    guest.power_off()?;
    daemon.stop()?;
    let content = std::fs::read(&image).unwrap();
    assert!(content.len() == 64 << 20 && content.iter().all(|&byte| byte == b'Z'));
    Ok(())
}
