//! The file device against real file systems: what it learns at open, and what happens when the
//! storage underneath changes or ends.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail like the test")]

#[path = "support/mounted.rs"]
mod mounted;
mod support;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use blockdev::conformance::rig::Rig;
use blockdev::{
    Access, BlockDevice, Caching, Direct, Durability, Engine, Extent, FileOptions, IoError, Op,
    Sector, Unmap, Wait, open,
};
use mounted::Mounted;
use support::{LoopDevice, Place, Scratch, options};
use vmm_sys_util::tempdir::TempDir;

const ENGINES: [Engine; 2] = [Engine::IoUring, Engine::Threads];
const SIZE: u64 = 8 << 20;
/// A folder on a disk.
const DISK: &str = env!("CARGO_TARGET_TMPDIR");

fn open_as(place: &impl Place, direct: Direct, block_size: Option<u32>) -> Arc<dyn BlockDevice> {
    open::file(place.path(), options(direct, block_size)).unwrap()
}

fn refusal(path: &Path, options: FileOptions) -> String {
    match open::file(path, options) {
        Ok(device) => format!("opened: {device:?}"),
        Err(error) => error.to_string(),
    }
}

/// 512-byte blocks of the host's storage that the file takes.
fn allocated(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().blocks()
}

#[test]
fn an_error_at_open_names_the_file_and_the_mend() {
    let dir = TempDir::new().unwrap();
    let there = |name: &str| dir.as_path().join(name);
    let plain = options(Direct::Off, None);

    let text = refusal(&there("missing"), plain);
    assert!(
        text.contains("missing: cannot find it") && text.contains("create it"),
        "{text}"
    );
    let text = refusal(dir.as_path(), plain);
    assert!(
        text.contains("not a regular file or a block special"),
        "{text}"
    );
    let text = refusal(Path::new("/dev/null"), plain);
    assert!(text.contains("/dev/null: not a regular file"), "{text}");
    let fifo = there("fifo");
    assert!(
        Command::new("mkfifo")
            .arg(&fifo)
            .status()
            .unwrap()
            .success()
    );
    let text = refusal(&fifo, plain);
    assert!(text.contains("fifo: not a regular file"), "{text}");

    let short = there("short");
    File::create(&short).unwrap().set_len(511).unwrap();
    let text = refusal(&short, plain);
    assert!(
        text.contains("511 bytes hold not one block of 512"),
        "{text}"
    );
    for size in [0, 256, 513, 131_072] {
        let text = refusal(&short, options(Direct::Off, Some(size)));
        assert!(
            text.contains(&format!("block size of {size} is not possible")),
            "{text}"
        );
    }
}

#[test]
fn a_block_special_that_takes_no_writes_opens_read_only() {
    let disk = LoopDevice::new(SIZE, 512, Access::ReadOnly);
    let text = refusal(disk.path(), options(Direct::On, None));
    assert!(text.contains("read-only"), "{text}");
    let read_only = FileOptions {
        access: Access::ReadOnly,
        ..options(Direct::On, None)
    };
    let device = open::file(disk.path(), read_only).unwrap();
    assert_eq!(device.geometry().access, Access::ReadOnly);
}

#[test]
fn a_file_has_its_size_in_whole_blocks() {
    let place = Scratch::on_disk(SIZE + 4096 + 700);
    for (block_size, sectors) in [(512, 16384 + 8 + 1), (1024, 16384 + 8), (4096, 16384 + 8)] {
        let geometry = open_as(&place, Direct::Off, Some(block_size)).geometry();
        assert_eq!(
            (geometry.capacity.0, geometry.block_size),
            (sectors, block_size)
        );
    }
}

#[test]
fn a_block_special_has_the_kernels_size_and_sectors() {
    for sector_size in [512u32, 4096] {
        let disk = LoopDevice::new(SIZE, sector_size, Access::ReadWrite);
        assert_eq!(
            std::fs::metadata(disk.path()).unwrap().len(),
            0,
            "metadata knows nothing"
        );
        for direct in [Direct::On, Direct::Off] {
            let device = open_as(&disk, direct, None);
            let geometry = device.geometry();
            assert_eq!(geometry.capacity, Sector::floor(SIZE));
            assert_eq!(geometry.block_size, sector_size);
            assert!(device.capabilities().discard.is_some());
        }
    }
}

#[test]
fn o_direct_decides_on_blocks_and_memory_unless_the_block_size_is_too_small() {
    let disk = LoopDevice::new(SIZE, 4096, Access::ReadWrite);
    let needs = |direct, block_size| {
        let device = open_as(&disk, direct, block_size);
        let memory = device.capabilities().memory;
        (device.geometry().block_size, memory.len_align)
    };
    assert_eq!(needs(Direct::On, None), (4096, 4096));
    assert_eq!(needs(Direct::On, Some(4096)), (4096, 4096));
    assert_eq!(needs(Direct::On, Some(8192)), (8192, 4096));
    assert_eq!(
        needs(Direct::On, Some(512)),
        (512, 1),
        "through the page cache"
    );
    assert_eq!(needs(Direct::Off, None), (4096, 1));
    assert_eq!(needs(Direct::Off, Some(512)), (512, 1));

    let file = Scratch::on_disk(SIZE);
    let device = open_as(&file, Direct::On, None);
    let (block_size, memory) = (device.geometry().block_size, device.capabilities().memory);
    assert!(memory.len_align > 1, "O_DIRECT is on: {memory:?}");
    assert!(block_size >= memory.len_align);
}

#[test]
fn a_read_only_device_refuses_every_change() {
    for engine in ENGINES {
        let place = Scratch::on_disk(SIZE);
        let read_only = FileOptions {
            access: Access::ReadOnly,
            ..options(Direct::Off, None)
        };
        let device = open::file(place.path(), read_only).unwrap();
        let capabilities = device.capabilities();
        assert!(capabilities.discard.is_none() && capabilities.write_zeroes.is_none());
        let mut rig = Rig::new(&device, engine);
        let ops = [
            rig.write_op(0, &[(0, 4096)], Durability::Cached),
            rig.discard_op(0, 4096, Durability::Cached),
            rig.zero_op(0, 4096, Unmap::Allowed, Durability::Durable),
        ];
        for op in ops {
            assert_eq!(rig.run(op), Err(IoError::ReadOnly));
        }
        let op = rig.read_op(0, &[(0, 4096)]);
        assert_eq!(rig.run(op), Ok(()));
        let op = rig.flush_op();
        assert_eq!(rig.run(op), Ok(()));
    }
}

#[test]
fn a_flush_has_something_to_do() {
    let place = Scratch::on_disk(SIZE);
    for direct in [Direct::On, Direct::Off] {
        assert_eq!(
            open_as(&place, direct, None).capabilities().caching,
            Caching::Volatile
        );
    }
}

#[test]
fn a_file_truncated_underneath_reads_short_and_never_as_success() {
    for engine in ENGINES {
        for (direct, parent) in [
            (Direct::On, DISK),
            (Direct::Off, DISK),
            (Direct::Off, "/dev/shm"),
        ] {
            let place = Scratch::in_dir(parent, SIZE);
            let device = open_as(&place, direct, Some(4096));
            let mut rig = Rig::new(&device, engine);
            let file = OpenOptions::new().write(true).open(place.path()).unwrap();
            // In the middle of the range, in the middle of a block, and before the range.
            for (left, got) in [(8192u64, 8192u32), (8192 + 1000, 8192 + 1000), (0, 0)] {
                file.set_len(left).unwrap();
                let runs = [(0, 4096), (8192, 4096), (16384, 8192)];
                let op = rig.read_op(0, &runs);
                let expected = IoError::Short { want: 16384, got };
                assert_eq!(
                    rig.run(op),
                    Err(expected),
                    "{engine}, {direct:?}, {parent}, {left} left"
                );
            }
        }
    }
}

#[test]
fn what_lies_in_memory_is_answered_in_the_batch_that_asked() {
    for engine in ENGINES {
        let place = Scratch::in_dir("/dev/shm", SIZE);
        let device = open_as(&place, Direct::On, None);
        let mut rig = Rig::new(&device, engine);
        for round in 0..4 {
            rig.ring().submit(Wait::No).unwrap();
            let mut ops: Vec<_> = (0..4)
                .map(|n| rig.write_op(n * 128, &[(0, 65536)], Durability::Durable))
                .collect();
            ops.push(rig.flush_op());
            ops.push(rig.read_op(0, &[(0, 512), (4096, 512)]));
            let tags: Vec<_> = ops.into_iter().map(|op| rig.prep(op)).collect();
            let ended = rig.reap().into_iter().map(|(tag, _, outcome)| {
                assert_eq!(outcome, Ok(()));
                tag
            });
            assert_eq!(ended.collect::<Vec<_>>(), tags, "{engine}, round {round}");
        }
    }
}

#[test]
fn what_would_hold_up_a_worker_is_left_to_the_kernel() {
    let place = Scratch::in_dir("/dev/shm", SIZE);
    let device = open_as(&place, Direct::On, None);
    let mut rig = Rig::new(&device, Engine::IoUring);
    let long = rig.read_op(0, &[(0, 1 << 20)]);
    let long = rig.prep(long);
    let short = rig.read_op(0, &[(2 << 20, 4096)]);
    let short = rig.prep(short);
    let reaped = |rig: &mut Rig| {
        rig.reap()
            .into_iter()
            .map(|(tag, ..)| tag)
            .collect::<Vec<_>>()
    };
    assert_eq!(reaped(&mut rig), [short]);
    let ended: Vec<_> = rig.drain().into_iter().map(|(tag, ..)| tag).collect();
    assert_eq!(ended, [long]);
}

#[test]
fn a_resize_is_seen_at_refresh_and_ops_beyond_it_fail() {
    for engine in ENGINES {
        let place = Scratch::on_disk(SIZE);
        let device = open_as(&place, Direct::Off, None);
        let mut rig = Rig::new(&device, engine);
        let file = OpenOptions::new().write(true).open(place.path()).unwrap();
        let (durability, last) = (Durability::Cached, SIZE / 512 - 8);
        let stale = rig.write_op(last, &[(0, 4096)], durability);

        file.set_len(SIZE / 2 + 100).unwrap();
        assert_eq!(
            device.geometry().capacity,
            Sector::floor(SIZE),
            "not asked again yet"
        );
        assert_eq!(device.refresh().unwrap().capacity, Sector::floor(SIZE / 2));
        assert_eq!(device.geometry().capacity, Sector::floor(SIZE / 2));
        assert_eq!(rig.run(stale), Err(IoError::OutOfRange));
        assert_eq!(
            file.metadata().unwrap().len(),
            SIZE / 2 + 100,
            "the file did not grow"
        );

        file.set_len(2 * SIZE).unwrap();
        assert_eq!(device.refresh().unwrap().capacity, Sector::floor(2 * SIZE));
        let op = rig.write_op(2 * SIZE / 512 - 8, &[(0, 4096)], durability);
        assert_eq!(rig.run(op), Ok(()));
    }
}

#[test]
fn a_full_file_system_fails_writes() {
    let mounted = Mounted::new();
    let image = mounted.file(64 << 20);
    for (engine, direct) in ENGINES
        .into_iter()
        .flat_map(|e| [Direct::On, Direct::Off].map(|d| (e, d)))
    {
        let device = open::file(&image, options(direct, Some(4096))).unwrap();
        let mut rig = Rig::new(&device, engine);
        let mut failed = 0;
        for chunk in 0..64u64 {
            let op = rig.write_op(chunk * 2048, &[(0, 1 << 20)], Durability::Durable);
            match rig.run(op) {
                Ok(()) => assert!(chunk < 16, "{engine}: there is no room for {chunk} MiB"),
                Err(IoError::Os(errno)) => {
                    assert_eq!(errno, libc::ENOSPC, "{engine}, {direct:?}, chunk {chunk}");
                    failed += 1;
                }
                Err(error) => panic!("{engine}, {direct:?}, chunk {chunk}: {error}"),
            }
        }
        assert!(
            failed >= 48,
            "{engine}, {direct:?}: only {failed} writes failed"
        );
        // Zeroing in place needs space too where there was none; giving it back makes room.
        let op = rig.zero_op(63 * 2048, 1 << 20, Unmap::Forbidden, Durability::Durable);
        assert_eq!(
            rig.run(op),
            Err(IoError::Os(libc::ENOSPC)),
            "{engine}, {direct:?}"
        );
        let op = rig.discard_op(0, 16 << 20, Durability::Durable);
        assert_eq!(rig.run(op), Ok(()), "{engine}, {direct:?}");
        let op = rig.write_op(0, &[(0, 1 << 20)], Durability::Durable);
        assert_eq!(rig.run(op), Ok(()), "{engine}, {direct:?}");
        let op = rig.discard_op(0, 16 << 20, Durability::Durable);
        assert_eq!(rig.run(op), Ok(()), "{engine}, {direct:?}");
    }
}

#[test]
fn space_comes_back_when_it_may_and_stays_when_it_must() {
    for engine in ENGINES {
        let place = Scratch::on_disk(SIZE);
        let device = open_as(&place, Direct::On, None);
        let mut rig = Rig::new(&device, engine);
        let fill = |rig: &mut Rig| {
            rig.fill(&[(0, SIZE as usize)], &vec![1; SIZE as usize]);
            let op = rig.write_op(0, &[(0, SIZE as usize)], Durability::Durable);
            assert_eq!(rig.run(op), Ok(()));
            assert!(
                allocated(place.path()) >= SIZE / 512,
                "{engine}: written is allocated"
            );
        };
        let half = (SIZE / 2) as usize;

        fill(&mut rig);
        let op = rig.zero_op(0, half, Unmap::Forbidden, Durability::Durable);
        assert_eq!(rig.run(op), Ok(()));
        assert!(
            allocated(place.path()) >= SIZE / 512,
            "{engine}: the space stays"
        );
        let op = rig.zero_op(0, half, Unmap::Allowed, Durability::Durable);
        assert_eq!(rig.run(op), Ok(()));
        assert!(
            allocated(place.path()) < SIZE / 512 * 3 / 4,
            "{engine}: the space is given back"
        );

        fill(&mut rig);
        let op = rig.discard_op(0, half, Durability::Cached);
        assert_eq!(rig.run(op), Ok(()));
        assert!(
            allocated(place.path()) < SIZE / 512 * 3 / 4,
            "{engine}: discarded is given back"
        );
        assert_eq!(
            std::fs::metadata(place.path()).unwrap().len(),
            SIZE,
            "the size stays"
        );
    }
}

#[test]
fn zeroes_are_written_where_ranges_cannot_be_zeroed_and_across_many_calls() {
    // A tmpfs punches holes and zeroes nothing in place; 5 MiB are more than one call writes.
    for engine in ENGINES {
        let place = Scratch::in_dir("/dev/shm", SIZE);
        let device = open_as(&place, Direct::Off, None);
        let mut rig = Rig::new(&device, engine);
        rig.fill(&[(0, SIZE as usize)], &vec![1; SIZE as usize]);
        let op = rig.write_op(0, &[(0, SIZE as usize)], Durability::Cached);
        assert_eq!(rig.run(op), Ok(()));
        let len = (5 << 20) + 512;
        for durability in [Durability::Cached, Durability::Durable] {
            let op = rig.zero_op(1, len, Unmap::Forbidden, durability);
            assert_eq!(rig.run(op), Ok(()), "{engine}");
        }
        let bytes = std::fs::read(place.path()).unwrap();
        let zeroes = 512..512 + len;
        assert!(
            bytes[zeroes.clone()].iter().all(|byte| *byte == 0),
            "{engine}"
        );
        assert!(
            bytes[..zeroes.start].iter().all(|byte| *byte == 1),
            "{engine}"
        );
        assert!(
            bytes[zeroes.end..].iter().all(|byte| *byte == 1),
            "{engine}"
        );
        assert!(
            allocated(place.path()) >= SIZE / 512,
            "{engine}: the space stays"
        );
    }
}

#[test]
fn the_longest_ranges_are_whole_blocks() {
    for block_size in [512, 4096, 65536] {
        let place = Scratch::on_disk(SIZE);
        let device = open_as(&place, Direct::Off, Some(block_size));
        let capabilities = device.capabilities();
        let (discard, zeroes) = (
            capabilities.discard.unwrap(),
            capabilities.write_zeroes.unwrap(),
        );
        for max in [discard.max_sectors, zeroes.max_sectors] {
            assert!(max > 0 && (max * 512).is_multiple_of(block_size), "{max}");
        }
        assert!(discard.alignment_sectors * 512 >= block_size);
    }
}

#[test]
fn a_range_beyond_what_the_kernel_counts_fails() {
    // Only a device that changed size underneath lets such an extent through to the file.
    let place = Scratch::on_disk(SIZE);
    let device = open_as(&place, Direct::Off, None);
    for engine in ENGINES {
        let mut rig = Rig::new(&device, engine);
        let capacity = Sector(u64::MAX >> 9);
        let at = Extent::new(Sector(capacity.0 - 8), 4096, capacity).unwrap();
        let op = Op::Read {
            at,
            into: rig.dest(&[(0, 4096)]),
        };
        assert_eq!(rig.run(op), Err(IoError::OutOfRange));
    }
}
