//! Registered buffers, with the kernel itself: that ops use them, and when they are gone.

#![expect(unsafe_code, reason = "takes memory away under the kernel")]
#![expect(clippy::unwrap_used, reason = "a test's helpers fail like the test")]

use std::fs;
use std::path::Path;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use blockdev::conformance::rig::{GUEST_BASE, MEMORY, Rig, Run};
use blockdev::{
    Access, BlockDevice, Buffers, Direct, Durability, Engine, FileOptions, IoError, Lease,
    Progress, RegisteredBuffers, open,
};
use iov_iter::{MemoryTable, PinnedRegion, Region, RegionSpec};
use vmm_sys_util::tempfile::TempFile;

/// Slots of a mebibyte.
const SHIFT: u32 = 20;
const SLOT: usize = 1 << SHIFT;
/// Pages of guest memory.
const PAGES: u64 = MEMORY as u64 / 4096;

/// Only one test at a time counts the pages that the process has pinned.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    wait_pinned(0);
    alone
}

/// Rings are taken down in the background, and give their clones back then.
fn wait_pinned(pages: u64) {
    let begun = Instant::now();
    while pinned_pages() != pages {
        assert!(begun.elapsed() < Duration::from_secs(60));
        thread::sleep(Duration::from_millis(5));
    }
}

/// Pages that the kernel charges this process for as pinned (proc(5), VmPin).
fn pinned_pages() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmPin:"));
    let kib: u64 = line
        .and_then(|line| line.split_whitespace().nth(1))
        .unwrap()
        .parse()
        .unwrap();
    kib / 4
}

fn image() -> (TempFile, Arc<dyn BlockDevice>) {
    // On a disk, where O_DIRECT moves to and from the pages themselves.
    let image = TempFile::new_in(Path::new(env!("CARGO_TARGET_TMPDIR"))).unwrap();
    image.as_file().set_len(64 << 20).unwrap();
    let options = FileOptions {
        access: Access::ReadWrite,
        direct: Direct::On,
        block_size: Some(512),
    };
    let device = open::file(image.as_path(), options).unwrap();
    (image, device)
}

/// Registers all of a region, slot by slot.
fn register(buffers: &mut Buffers, region: &Arc<Region>) {
    while buffers.register(region).unwrap() == Progress::Begun {
        assert!(!buffers.has(region), "it is not lent before it is whole");
    }
    assert!(buffers.has(region));
}

/// A worker whose memory is registered.
fn pinned(device: &Arc<dyn BlockDevice>) -> (Rig, Buffers) {
    let mut rig = Rig::new(device, Engine::IoUring);
    let mut buffers = Buffers::new(0..64, SHIFT).unwrap();
    let region = rig.view().table().regions()[0].clone();
    register(&mut buffers, &region);
    adopt(&mut rig, &buffers.lend());
    (rig, buffers)
}

fn adopt(rig: &mut Rig, lease: &Lease) {
    rig.ring().adopt_buffers(lease).unwrap();
    rig.view().set_pins(lease.regions());
}

/// Bytes that are never the same twice in a row.
fn pattern(seed: u8, len: usize) -> Vec<u8> {
    let mut rng = fastrand::Rng::with_seed(seed.into());
    std::iter::repeat_with(|| rng.u8(..)).take(len).collect()
}

/// What the file has, past every cache of ours.
fn contents(image: &TempFile, at: usize, len: usize) -> Vec<u8> {
    fs::read(image.as_path()).unwrap()[at..at + len].to_vec()
}

/// Takes a page out of guest memory's file, as a balloon does; who has it pinned keeps it.
fn punch(rig: &Rig, offset: usize) {
    let region = &rig.view().table().regions()[0];
    let page = region.slice(offset as u64, 4096).unwrap();
    let at = page.ptr_guard_mut().as_ptr().cast();
    // SAFETY: the page is mapped shared, is only ever used as volatile memory, and reads zero then.
    let done = unsafe { libc::madvise(at, 4096, libc::MADV_REMOVE) };
    assert_eq!(done, 0);
}

#[test]
fn only_what_the_ring_moves_itself_wants_buffers() {
    let (_image, file) = image();
    assert_eq!(file.capabilities().buffers, RegisteredBuffers::Used);
    let there = |folder: &str| TempFile::new_in(Path::new(folder)).unwrap();
    let shared = there("/dev/shm");
    shared.as_file().set_len(1 << 20).unwrap();
    let options = FileOptions {
        access: Access::ReadWrite,
        direct: Direct::On,
        block_size: None,
    };
    for device in [
        open::file(shared.as_path(), options).unwrap(),
        open::memory(1 << 20, 512).unwrap(),
        open::null(1 << 20, 512).unwrap(),
    ] {
        assert_eq!(device.capabilities().buffers, RegisteredBuffers::Unused);
    }
}

#[test]
fn ops_of_every_shape_move_the_right_bytes() {
    let _alone = alone();
    let (image, device) = image();
    let (mut rig, _buffers) = pinned(&device);
    let shapes: [&[Run]; 7] = [
        &[(0, 512)],
        &[(4096, 4096)],
        &[(SLOT - 4096, 4096)],
        // Over a slot's edge, and several runs: not pinned, and as right.
        &[(SLOT - 4096, 8192)],
        &[(3 * SLOT, SLOT)],
        &[(0, 4096), (8192, 512), (SLOT, 4096)],
        &[(MEMORY - 512, 512)],
    ];
    for (seed, runs) in (0u8..).zip(shapes) {
        for durability in [Durability::Cached, Durability::Durable] {
            let len = runs.iter().map(|(_, len)| len).sum();
            let bytes = pattern(seed, len);
            rig.fill(runs, &bytes);
            rig.run(rig.write_op(64, runs, durability)).unwrap();
            assert_eq!(contents(&image, 64 * 512, len), bytes);
            rig.fill(runs, &vec![0; len]);
            rig.run(rig.read_op(64, runs)).unwrap();
            assert_eq!(rig.peek(runs), bytes, "{runs:?}");
        }
    }
}

#[test]
fn a_pinned_op_uses_the_registered_page_and_no_other() {
    let _alone = alone();
    let (_image, device) = image();
    let (mut rig, mut buffers) = pinned(&device);
    let run = [(8192, 4096)];
    let bytes = pattern(1, 4096);
    rig.fill(&run, &bytes);
    rig.run(rig.write_op(0, &run, Durability::Cached)).unwrap();
    // The page that is registered is the guest's no longer: what is read into it, nobody sees.
    punch(&rig, 8192);
    rig.run(rig.read_op(0, &run)).unwrap();
    assert_eq!(rig.peek(&run), [0; 4096]);
    // Without its slot the same op finds the page that is there now.
    rig.view().set_pins(&[]);
    rig.run(rig.read_op(0, &run)).unwrap();
    assert_eq!(rig.peek(&run), bytes);
    rig.ring().empty_buffers(0..32).unwrap();
    buffers.retain(|_| false);
}

#[test]
fn a_slot_that_is_not_there_costs_no_request() {
    let _alone = alone();
    let (_image, device) = image();
    let (mut rig, _buffers) = pinned(&device);
    rig.fill(&[(0, 4096)], &pattern(2, 4096));
    rig.ring().empty_buffers(0..32).unwrap();
    assert!(rig.view().has_pins());
    rig.run(rig.write_op(8, &[(0, 4096)], Durability::Durable))
        .unwrap();
    rig.fill(&[(0, 4096)], &[0; 4096]);
    rig.run(rig.read_op(8, &[(0, 4096)])).unwrap();
    assert_eq!(rig.peek(&[(0, 4096)]), pattern(2, 4096));
}

#[test]
fn workers_share_what_is_charged_once_and_the_last_to_empty_its_slots_frees_it() {
    let _alone = alone();
    let before = pinned_pages();
    let (_image, device) = image();
    let (mut one, mut buffers) = pinned(&device);
    assert_eq!(pinned_pages(), before + PAGES);
    let mut two = Rig::new(&device, Engine::IoUring);
    let lease = buffers.lend();
    two.ring().adopt_buffers(&lease).unwrap();
    drop(lease);
    assert_eq!(pinned_pages(), before + PAGES, "a clone is not charged");
    one.view().set_pins(&[]);
    one.ring().empty_buffers(0..32).unwrap();
    two.ring().empty_buffers(0..32).unwrap();
    assert_eq!(pinned_pages(), before + PAGES, "the source has them still");
    buffers.retain(|_| false);
    assert_eq!(pinned_pages(), before);
    // A clone that was not emptied keeps them, which is why workers go first.
    let region = one.view().table().regions()[0].clone();
    register(&mut buffers, &region);
    two.ring().adopt_buffers(&buffers.lend()).unwrap();
    buffers.retain(|_| false);
    assert_eq!(pinned_pages(), before + PAGES);
    two.ring().empty_buffers(0..32).unwrap();
    assert_eq!(pinned_pages(), before);
}

#[test]
fn a_region_that_is_not_whole_is_shared_with_nobody() {
    let _alone = alone();
    let before = pinned_pages();
    let (_image, device) = image();
    let mut rig = Rig::new(&device, Engine::IoUring);
    let mut buffers = Buffers::new(0..64, SHIFT).unwrap();
    let region = rig.view().table().regions()[0].clone();
    while pinned_pages() < before + PAGES / 4 {
        assert_eq!(buffers.register(&region).unwrap(), Progress::Begun);
    }
    let lease = buffers.lend();
    assert!(lease.regions().is_empty());
    adopt(&mut rig, &lease);
    drop(lease);
    buffers.retain(|_| false);
    assert_eq!(pinned_pages(), before, "no worker has them");
}

#[test]
fn a_region_is_mapped_for_as_long_as_it_is_registered() {
    let _alone = alone();
    let before = pinned_pages();
    let (_image, device) = image();
    let (rig, mut buffers) = pinned(&device);
    let region = Arc::downgrade(&rig.view().table().regions()[0]);
    drop(rig);
    assert!(region.upgrade().is_some(), "its slots keep it");
    buffers.retain(|_| true);
    assert!(region.upgrade().is_some());
    buffers.retain(|_| false);
    assert!(region.upgrade().is_none());
    wait_pinned(before);
}

#[test]
fn nothing_changes_while_a_lease_is_out() {
    let _alone = alone();
    let (_image, device) = image();
    let rig = Rig::new(&device, Engine::IoUring);
    let region = rig.view().table().regions()[0].clone();
    let mut buffers = Buffers::new(0..64, SHIFT).unwrap();
    register(&mut buffers, &region);
    let lease = buffers.lend();
    let copy = lease.clone();
    let (done, is_done) = channel();
    let thread = thread::spawn(move || {
        buffers.retain(|_| false);
        done.send(()).unwrap();
    });
    drop(lease);
    let early = is_done.recv_timeout(Duration::from_millis(100));
    assert!(early.is_err(), "a worker may still have to clone it");
    assert_eq!(copy.regions().len(), 1);
    drop(copy);
    is_done.recv_timeout(Duration::from_secs(60)).unwrap();
    thread.join().unwrap();
}

/// Regions of these sizes, each in a file of its own.
fn table(sizes: &[u64]) -> MemoryTable {
    let mut guest_addr = GUEST_BASE;
    let specs = sizes.iter().map(|&size| {
        let file = TempFile::new_in(Path::new("/dev/shm")).unwrap().into_file();
        file.set_len(size).unwrap();
        let spec = RegionSpec {
            guest_addr,
            size,
            front_end_addr: guest_addr,
            mmap_offset: 0,
            file: file.into(),
        };
        guest_addr += size;
        spec
    });
    MemoryTable::new(specs.collect()).unwrap()
}

#[test]
fn slots_are_given_out_once_and_again_when_they_are_free() {
    let _alone = alone();
    let before = pinned_pages();
    let slot = SLOT as u64;
    // Lengths that are no multiple of a slot, nor of a page's neighbour.
    let table = table(&[slot + 4096, slot, 2 * slot, 4096]);
    let regions = table.regions();
    let mut buffers = Buffers::new(10..14, SHIFT).unwrap();
    for region in &regions[..2] {
        register(&mut buffers, region);
    }
    let full = buffers.register(&regions[2]).unwrap_err();
    assert_eq!(
        full.raw_os_error(),
        Some(libc::ENOSPC),
        "one is left of four"
    );
    register(&mut buffers, &regions[3]);
    let slots = |buffers: &mut Buffers| -> Vec<_> {
        let lease = buffers.lend();
        let mut slots: Vec<_> = lease.regions().iter().map(PinnedRegion::slots).collect();
        slots.sort_by_key(|slots| slots.start);
        slots
    };
    assert_eq!(slots(&mut buffers), [10..12, 12..13, 13..14]);
    buffers.retain(|pinned| !Arc::ptr_eq(pinned.region(), &regions[0]));
    assert_eq!(buffers.complete(), 2);
    register(&mut buffers, &regions[2]);
    assert_eq!(slots(&mut buffers), [10..12, 12..13, 13..14]);
    let pages = (slot + 2 * slot + 4096) / 4096;
    assert_eq!(pinned_pages(), before + pages);
    drop(buffers);
    assert_eq!(pinned_pages(), before);
}

#[test]
fn memory_that_cannot_be_pinned_for_long_is_refused_as_a_whole() {
    let _alone = alone();
    let before = pinned_pages();
    let file = TempFile::new_in(Path::new(env!("CARGO_TARGET_TMPDIR"))).unwrap();
    let file = file.into_file();
    file.set_len(4 << 20).unwrap();
    let spec = RegionSpec {
        guest_addr: 0,
        size: 4 << 20,
        front_end_addr: 0,
        mmap_offset: 0,
        file: file.try_clone().unwrap().into(),
    };
    let on_disk = MemoryTable::new(vec![spec]).unwrap();
    let mut buffers = Buffers::new(0..8, SHIFT).unwrap();
    let error = buffers.register(&on_disk.regions()[0]).unwrap_err();
    let known = [Some(libc::EFAULT), Some(libc::EOPNOTSUPP)];
    assert!(known.contains(&error.raw_os_error()), "{error}");
    // What was registered before the refusal is given back: here the file has lost its end.
    let table = table(&[4 << 20]);
    let region = &table.regions()[0];
    assert_eq!(buffers.register(region).unwrap(), Progress::Begun);
    assert_eq!(pinned_pages(), before + SLOT as u64 / 4096);
    assert_eq!(buffers.register(region).unwrap(), Progress::Begun);
    let page = region.slice(2 << 20, 4096).unwrap();
    let at = page.ptr_guard_mut().as_ptr().cast();
    // SAFETY: the region is mapped and nobody touches the page; it is mapped as unreadable.
    let done = unsafe { libc::mprotect(at, 4096, libc::PROT_NONE) };
    assert_eq!(done, 0);
    let error = buffers.register(region).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
    assert_eq!(pinned_pages(), before);
    assert!(!buffers.has(region));
    assert!(buffers.lend().regions().is_empty());
}

#[test]
fn the_threads_engine_ignores_slots() {
    let (_image, device) = image();
    let mut rig = Rig::new(&device, Engine::Threads);
    let region = rig.view().table().regions()[0].clone();
    rig.view()
        .set_pins(&[PinnedRegion::new(region, 0, SHIFT).unwrap()]);
    rig.fill(&[(0, 4096)], &pattern(3, 4096));
    rig.run(rig.write_op(0, &[(0, 4096)], Durability::Durable))
        .unwrap();
    rig.fill(&[(0, 4096)], &[0; 4096]);
    rig.run(rig.read_op(0, &[(0, 4096)])).unwrap();
    assert_eq!(rig.peek(&[(0, 4096)]), pattern(3, 4096));
    let mut buffers = Buffers::new(0..8, SHIFT).unwrap();
    let refused = rig.ring().adopt_buffers(&buffers.lend()).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::Unsupported);
}

#[test]
fn a_real_fault_is_not_tried_for_ever() {
    let _alone = alone();
    let (_image, device) = image();
    let (mut rig, _buffers) = pinned(&device);
    rig.ring().empty_buffers(0..32).unwrap();
    let region = rig.view().table().regions()[0].clone();
    let page = region.slice(0, 4096).unwrap();
    let at = page.ptr_guard_mut().as_ptr().cast();
    // SAFETY: the page is guest memory that nothing here touches meanwhile.
    let protect = |how| assert_eq!(unsafe { libc::mprotect(at, 4096, how) }, 0);
    protect(libc::PROT_NONE);
    let failed = rig.run(rig.read_op(0, &[(0, 4096)]));
    protect(libc::PROT_READ | libc::PROT_WRITE);
    assert_eq!(failed, Err(IoError::Os(libc::EFAULT)));
}
