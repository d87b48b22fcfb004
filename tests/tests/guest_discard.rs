//! DISCARD and WRITE_ZEROES as the host's file shows them.

use std::error::Error;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use vublk_tests::guest::{DaemonSpec, Disk, Engine, Guest, Scratch};

const MIB: usize = 1 << 20;
const SIZE_MIB: usize = 64;
const FILL: u8 = 0xa5;

fn allocated_mib(path: &Path) -> io::Result<u64> {
    Ok(fs::metadata(path)?.blocks() * 512 / MIB as u64)
}

/// A guest on a fully allocated image of 64 MiB of 0xa5.
fn filled(scratch: &Scratch) -> io::Result<PathBuf> {
    let image = scratch.file("disk");
    fs::write(&image, vec![FILL; SIZE_MIB * MIB])?;
    File::open(&image)?.sync_all()?;
    assert!(allocated_mib(&image)? >= SIZE_MIB as u64);
    Ok(image)
}

/// Asserts that exactly the mebibytes in `zeroed` are zero and all others hold their bytes.
fn assert_zeroed(image: &Path, zeroed: Range<usize>) -> io::Result<()> {
    let file = File::open(image)?;
    let mut chunk = vec![0; MIB];
    for number in 0..SIZE_MIB {
        file.read_exact_at(&mut chunk, (number * MIB) as u64)?;
        let expected = if zeroed.contains(&number) { 0 } else { FILL };
        let wrong = chunk.iter().position(|&byte| byte != expected);
        assert_eq!(wrong, None, "first wrong byte of mebibyte {number}");
    }
    Ok(())
}

fn discards(spec: &DaemonSpec, image: &Path, scratch: &Scratch) -> Result<(), Box<dyn Error>> {
    let daemon = spec.start(scratch)?;
    let mut guest = Guest::builder().disk(Disk::of(&daemon)).boot(scratch)?;
    let before = allocated_mib(image)?;
    guest.shell("blkdiscard --offset 16M --length 32M /dev/disk0")?;
    let after = allocated_mib(image)?;
    assert!(
        after + 31 <= before,
        "{before} MiB were allocated before, {after} MiB are now"
    );
    let sum = guest
        .shell("dd if=/dev/disk0 iflag=direct bs=1M skip=16 count=32 | tr -d '\\0' | wc -c")?;
    assert_eq!(sum, "0");
    guest.power_off()?;
    daemon.stop()?;
    Ok(assert_zeroed(image, 16..48)?)
}

#[test]
fn discard_gives_the_hosts_blocks_back() -> Result<(), Box<dyn Error>> {
    let scratch = Scratch::new()?;
    let image = filled(&scratch)?;
    discards(&DaemonSpec::file(&image), &image, &scratch)
}

#[test]
fn discard_gives_the_hosts_blocks_back_with_threads_engine() -> Result<(), Box<dyn Error>> {
    let scratch = Scratch::new()?;
    let image = filled(&scratch)?;
    discards(
        &DaemonSpec::file(&image).engine(Engine::Threads),
        &image,
        &scratch,
    )
}

#[test]
fn write_zeroes_zeroes_exactly_its_range() -> Result<(), Box<dyn Error>> {
    let scratch = Scratch::new()?;
    let image = filled(&scratch)?;
    let daemon = DaemonSpec::file(&image).start(&scratch)?;
    let mut guest = Guest::builder().disk(Disk::of(&daemon)).boot(&scratch)?;
    let limit = guest.shell("cat /run/disk0/queue/write_zeroes_max_bytes")?;
    assert_ne!(limit, "0", "the guest would write zeroes of its own");
    guest.shell("blkdiscard --zeroout --offset 8M --length 24M /dev/disk0 && sync")?;
    guest.power_off()?;
    daemon.stop()?;
    Ok(assert_zeroed(&image, 8..32)?)
}

#[test]
fn discard_by_the_file_system_shrinks_the_image() -> Result<(), Box<dyn Error>> {
    let scratch = Scratch::new()?;
    let image = scratch.image("disk", 256 << 20)?;
    let daemon = DaemonSpec::file(&image).start(&scratch)?;
    let mut guest = Guest::builder().disk(Disk::of(&daemon)).boot(&scratch)?;
    // Nothing is left to the kernel to initialise later, which would allocate blocks meanwhile.
    guest.shell(
        "mke2fs -q -t ext4 -E lazy_itable_init=0,lazy_journal_init=0 /dev/disk0 &&
        mount -t ext4 -o discard /dev/disk0 /mnt &&
        dd if=/dev/urandom of=/mnt/large bs=1M count=64 conv=fsync && sync",
    )?;
    let full = allocated_mib(&image)?;
    assert!(
        full >= 64,
        "{full} MiB are allocated under a file of 64 MiB"
    );
    guest.shell("rm /mnt/large && sync")?;
    // The file system discards in its own time, and drops what is left of that at an unmount.
    let mut left = full;
    for _ in 0..600 {
        left = allocated_mib(&image)?;
        if left + 60 <= full {
            break;
        }
        sleep(Duration::from_millis(100));
    }
    assert!(
        left + 60 <= full,
        "{full} MiB with the file, {left} MiB without"
    );
    guest.shell("umount /mnt && e2fsck -fn /dev/disk0")?;
    guest.power_off()?;
    Ok(daemon.stop()?)
}
