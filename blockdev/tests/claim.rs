//! Who may write to a file, and what the page cache is told when that changes.

#![expect(unsafe_code, reason = "maps a file to ask what of it is cached")]
#![expect(clippy::unwrap_used, reason = "a test's helpers fail like the test")]

mod support;

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;

use blockdev::conformance::rig::Rig;
use blockdev::{Access, BlockDevice, Claim, Direct, Durability, Engine, FileOptions, Ring, open};
use support::{LoopDevice, Place, Scratch, options};

const ENGINES: [Engine; 2] = [Engine::IoUring, Engine::Threads];
const SIZE: u64 = 1 << 20;

fn opened(path: &Path, access: Access) -> Arc<dyn BlockDevice> {
    let options = FileOptions {
        access,
        ..options(Direct::On, None)
    };
    open::file(path, options).unwrap()
}

fn one_writer_or_many_readers(path: &Path) {
    let busy = Claim::Busy;
    let [one, two] = [(); 2].map(|()| opened(path, Access::ReadWrite));
    let [reader, other] = [(); 2].map(|()| opened(path, Access::ReadOnly));
    assert_eq!(one.claim().unwrap(), Claim::Held);
    for device in [&two, &reader] {
        assert_eq!(device.claim().unwrap(), busy);
        // What it does not hold it cannot give back either.
        device.release().unwrap();
        assert_eq!(device.claim().unwrap(), busy);
    }
    one.release().unwrap();
    assert_eq!(reader.claim().unwrap(), Claim::Held);
    assert_eq!(other.claim().unwrap(), Claim::Held);
    assert_eq!(two.claim().unwrap(), busy);
    reader.release().unwrap();
    assert_eq!(two.claim().unwrap(), busy);
    drop(other);
    assert_eq!(two.claim().unwrap(), Claim::Held);
    assert_eq!(one.claim().unwrap(), busy);
}

#[test]
fn a_file_has_one_writer_or_many_readers() {
    let scratch = Scratch::on_disk(SIZE);
    one_writer_or_many_readers(scratch.path());
    let tmpfs = Scratch::in_dir("/dev/shm", SIZE);
    one_writer_or_many_readers(tmpfs.path());
}

#[test]
fn a_block_special_has_one_writer_or_many_readers() {
    let disk = LoopDevice::new(SIZE, 512, Access::ReadWrite);
    one_writer_or_many_readers(disk.path());
}

#[test]
fn the_whole_file_is_held_whatever_its_size_becomes() {
    let scratch = Scratch::on_disk(SIZE);
    let device = opened(scratch.path(), Access::ReadWrite);
    assert_eq!(device.claim().unwrap(), Claim::Held);
    let file = OpenOptions::new().write(true).open(scratch.path()).unwrap();
    file.set_len(SIZE * 4).unwrap();
    for start in [0, 100, 1 << 20, (4 << 20) - 1, 1 << 40] {
        let mut byte = libc::flock {
            l_type: libc::c_short::try_from(libc::F_WRLCK).unwrap(),
            l_whence: 0,
            l_start: start,
            l_len: 1,
            l_pid: 0,
        };
        // SAFETY: F_OFD_SETLK reads one `flock` from the pointer, which is a local.
        let locked = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw mut byte) };
        assert_eq!(locked, -1, "the byte at {start} can be locked");
    }
}

#[test]
fn a_process_with_a_lock_of_the_older_kind_is_waited_for_too() {
    let scratch = Scratch::on_disk(SIZE);
    let device = opened(scratch.path(), Access::ReadWrite);
    let file = OpenOptions::new().write(true).open(scratch.path()).unwrap();
    let mut all = libc::flock {
        l_type: libc::c_short::try_from(libc::F_WRLCK).unwrap(),
        l_whence: 0,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: F_SETLK reads one `flock` from the pointer, which is a local.
    let locked = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLK, &raw mut all) };
    assert_eq!(locked, 0);
    assert_eq!(device.claim().unwrap(), Claim::Busy);
    drop(file);
    assert_eq!(device.claim().unwrap(), Claim::Held);
}

#[test]
fn a_ring_holds_the_claim_of_a_device_that_was_dropped() {
    for engine in ENGINES {
        let scratch = Scratch::on_disk(SIZE);
        let first = opened(scratch.path(), Access::ReadWrite);
        let second = opened(scratch.path(), Access::ReadWrite);
        let mut ring = Ring::new(engine).unwrap();
        let channel = first.open_channel(&mut ring).unwrap();
        assert_eq!(first.claim().unwrap(), Claim::Held);
        drop((first, channel));
        assert_eq!(second.claim().unwrap(), Claim::Busy);
        drop(ring);
        // io_uring lets go of its files a moment after its descriptor was closed.
        while second.claim().unwrap() != Claim::Held {
            std::thread::yield_now();
        }
    }
}

/// Pages of the file that are cached.
fn cached(path: &Path) -> usize {
    let file = File::open(path).unwrap();
    let size = usize::try_from(file.metadata().unwrap().len()).unwrap();
    let mut pages = vec![0_u8; size.div_ceil(4096)];
    // SAFETY: a new mapping of a file, at an address of the kernel's choice, never dereferenced.
    let mapping = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            size,
            libc::PROT_READ,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        )
    };
    assert_ne!(mapping, libc::MAP_FAILED);
    // SAFETY: the mapping is that long, and the vector has a byte for each page of it.
    let asked = unsafe { libc::mincore(mapping, size, pages.as_mut_ptr()) };
    // SAFETY: the mapping was made above and nothing points into it.
    unsafe { libc::munmap(mapping, size) };
    assert_eq!(asked, 0);
    pages.iter().filter(|page| **page & 1 != 0).count()
}

/// A buffered device with a megabyte written through the page cache.
fn written(path: &Path) -> Arc<dyn BlockDevice> {
    let device = open::file(path, options(Direct::Off, None)).unwrap();
    assert_eq!(device.claim().unwrap(), Claim::Held);
    let mut rig = Rig::new(&device, Engine::IoUring);
    let all = [(0, 1 << 20)];
    rig.fill(&all, &vec![0x77; 1 << 20]);
    let op = rig.write_op(0, &all, Durability::Cached);
    assert_eq!(rig.run(op), Ok(()));
    device
}

#[test]
fn a_claim_empties_the_page_cache_and_nothing_of_it_is_lost() {
    let scratch = Scratch::on_disk(SIZE);
    let device = written(scratch.path());
    assert_eq!(cached(scratch.path()), 256);
    assert_eq!(device.claim().unwrap(), Claim::Held);
    assert_eq!(cached(scratch.path()), 0);
    assert_eq!(std::fs::read(scratch.path()).unwrap(), vec![0x77; 1 << 20]);
}

#[test]
fn a_buffered_file_is_written_back_when_it_is_given_back() {
    let scratch = Scratch::on_disk(SIZE);
    let device = written(scratch.path());
    device.release().unwrap();
    // Only clean pages can be dropped without a sync.
    let file = File::open(scratch.path()).unwrap();
    // SAFETY: posix_fadvise takes no pointer.
    let advice = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    assert_eq!((advice, cached(scratch.path())), (0, 0));
}
