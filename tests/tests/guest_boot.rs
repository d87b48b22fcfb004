//! A guest boots on a served disk, comes back after a reboot, and sees what the host sees.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use vublk_tests::guest::{DaemonSpec, Disk, Guest, GuestError, Scratch};

const MIB: u64 = 1 << 20;

/// Bytes that differ from page to page and from seed to seed.
fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    std::iter::repeat_with(|| random.u8(..)).take(len).collect()
}

#[test]
fn guest_reads_what_the_host_wrote_and_writes_what_the_host_reads() -> Result<(), GuestError> {
    let scratch = Scratch::new()?;
    let image = scratch.image("disk", 64 * MIB)?;
    let file = File::options().read(true).write(true).open(&image).unwrap();
    let written = pattern(1, 3 * 4096 + 512);
    file.write_all_at(&written, 5 * MIB + 512).unwrap();
    file.sync_all().unwrap();

    let daemon = DaemonSpec::file(&image).start(&scratch)?;
    let mut guest = Guest::builder().disk(Disk::of(&daemon)).boot(&scratch)?;
    let skip = 5 * MIB / 512 + 1;
    let count = written.len() / 512;
    let dump = guest.shell(&format!(
        "dd if=/dev/disk0 iflag=direct bs=512 skip={skip} count={count} | xxd -p | tr -d '\\n'"
    ))?;
    let expected: String = written.iter().map(|byte| format!("{byte:02x}")).collect();
    assert!(
        dump == expected,
        "the guest read other bytes than the host wrote"
    );

    // A mebibyte of known bytes, written with O_DIRECT at an odd sector.
    guest.shell("yes vublk | dd of=/tmp/known bs=1M count=1 iflag=fullblock")?;
    guest.shell("dd if=/tmp/known of=/dev/disk0 oflag=direct bs=4096 seek=1000 conv=fsync")?;
    let mut read = vec![0; usize::try_from(MIB).unwrap()];
    file.read_exact_at(&mut read, 1000 * 4096).unwrap();
    let known: Vec<u8> = b"vublk\n"
        .iter()
        .copied()
        .cycle()
        .take(read.len())
        .collect();
    assert!(
        read == known,
        "the host read other bytes than the guest wrote"
    );

    guest.power_off()?;
    daemon.stop()
}

#[test]
fn guest_powers_off_and_the_daemon_serves_the_next_one() -> Result<(), GuestError> {
    let scratch = Scratch::new()?;
    let image = scratch.image("disk", 64 * MIB)?;
    let daemon = DaemonSpec::file(&image).start(&scratch)?;
    for round in 0..3 {
        let mut guest = Guest::builder().disk(Disk::of(&daemon)).boot(&scratch)?;
        let text = guest.shell("dd if=/dev/disk0 iflag=direct bs=512 count=1 | tr -d '\\0'")?;
        assert_eq!(
            text,
            if round == 0 {
                String::new()
            } else {
                format!("round {}", round - 1)
            }
        );
        guest.shell(&format!(
            "echo round {round} | dd of=/dev/disk0 bs=512 conv=sync,fsync oflag=direct"
        ))?;
        guest.power_off()?;
    }
    daemon.stop()
}

#[test]
fn guest_reboots_under_the_same_qemu() -> Result<(), GuestError> {
    let scratch = Scratch::new()?;
    let image = scratch.image("disk", 64 * MIB)?;
    let daemon = DaemonSpec::file(&image).queues(2).start(&scratch)?;
    let mut guest = Guest::builder().disk(Disk::of(&daemon)).boot(&scratch)?;
    for round in 0..3 {
        guest.shell(&format!(
            "echo {round} | dd of=/dev/disk0 bs=4096 seek={round} conv=sync,fsync oflag=direct"
        ))?;
        // The ring is busy when the machine is reset.
        guest.shell(
            "fio --name=load --filename=/dev/disk0 --rw=randread --bs=4k --direct=1 \
            --ioengine=libaio --iodepth=16 --time_based --runtime=600 >/dev/null 2>&1 & sleep 2",
        )?;
        guest.reboot()?;
        for earlier in 0..=round {
            let text = guest.shell(&format!(
                "dd if=/dev/disk0 iflag=direct bs=4096 skip={earlier} count=1 | tr -d '\\0'"
            ))?;
            assert_eq!(text, earlier.to_string());
        }
    }
    guest.power_off()?;
    daemon.stop()
}

#[test]
fn guest_has_several_disks_from_several_daemons() -> Result<(), GuestError> {
    let scratch = Scratch::new()?;
    let mut builder = Guest::builder();
    let mut daemons = Vec::new();
    for number in 0..3u64 {
        let image = scratch.image(&format!("disk{number}"), (number + 1) * 16 * MIB)?;
        let daemon = DaemonSpec::file(&image).start(&scratch)?;
        builder = builder.disk(Disk::of(&daemon));
        daemons.push((daemon, image));
    }
    let mut guest = builder.boot(&scratch)?;
    for number in 0..3u64 {
        let size = guest.shell(&format!("blockdev --getsize64 /dev/disk{number}"))?;
        assert_eq!(size, ((number + 1) * 16 * MIB).to_string());
        guest.shell(&format!(
            "printf 'disk %s' {number} | dd of=/dev/disk{number} conv=fsync"
        ))?;
    }
    guest.power_off()?;
    for (number, (daemon, image)) in daemons.into_iter().enumerate() {
        daemon.stop()?;
        let content = fs::read(image).unwrap();
        assert!(content.starts_with(format!("disk {number}").as_bytes()));
    }
    Ok(())
}

#[test]
fn guest_commands_return_their_exact_output_and_status() -> Result<(), GuestError> {
    let scratch = Scratch::new()?;
    let image = scratch.image("disk", MIB)?;
    let daemon = DaemonSpec::file(&image).start(&scratch)?;
    let mut guest = Guest::builder().disk(Disk::of(&daemon)).boot(&scratch)?;
    let output = guest.run("printf 'a\\nb\\001 \\342\\202\\254'; printf err >&2; exit 7")?;
    assert_eq!(output.status, 7);
    assert_eq!(output.stdout, "a\nb\u{1} \u{20ac}");
    assert_eq!(output.stderr, "err");
    let long = guest.run("seq 1 20000")?;
    let expected: String = (1..=20000).map(|number| format!("{number}\n")).collect();
    assert_eq!(long.stdout, expected);
    assert_eq!(guest.run("kill -9 $$")?.status, 128 + 9);
    let status = guest
        .qmp()?
        .execute("query-status", serde_json::json!({}))?;
    assert_eq!(status["status"], "running");
    guest.kill()
}

/// What Linux says when TCG lost a virtual CPU's timer, as a shell prints it.
const LOST_TIMER: &str = "echo kthread timer wakeup didn\\'t happen for 5249 jiffies!";

#[test]
fn a_boot_that_lost_its_timer_is_tried_twice_more() -> Result<(), GuestError> {
    let scratch = Scratch::new()?;
    let options = format!(
        "console=ttyS0 panic=-1 quiet rdinit=/bin/busybox -- sh -c \"{LOST_TIMER}; sleep 1000\""
    );
    // The last -append counts.
    let builder = Guest::builder().argument("-append").argument(options);
    let error = builder.boot(&scratch).unwrap_err();
    assert!(matches!(error, GuestError::LostTimer { .. }), "{error}");
    let consoles = fs::read_dir(scratch.path()).unwrap().filter(|entry| {
        let path = entry.as_ref().unwrap().path();
        path.extension()
            .is_some_and(|extension| extension == "console")
    });
    assert_eq!(consoles.count(), 3);
    Ok(())
}

#[test]
fn a_guest_that_lost_its_timer_comes_back_from_a_reset() -> Result<(), GuestError> {
    let scratch = Scratch::new()?;
    let mut guest = Guest::builder().boot(&scratch)?;
    guest.shell(&format!("{LOST_TIMER} >/dev/console"))?;
    let error = guest.wait_ready().unwrap_err();
    assert!(matches!(error, GuestError::LostTimer { .. }), "{error}");
    // What the console said before is the earlier boot's.
    guest.reset()?;
    guest.shell("true")?;
    guest.reboot()?;
    guest.power_off()
}
