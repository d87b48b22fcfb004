//! Nothing is allocated between one batch and the next once a ring has warmed up.

#![expect(unsafe_code, reason = "an allocator that counts")]

#[path = "support/pump.rs"]
mod pump;
mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use blockdev::{Access, BlockDevice, Direct, Engine, open};
use pump::{Pump, Work};
use support::{LoopDevice, Place, Scratch, options};

/// Counts the allocations of all threads but the harness's own, the first one of the process: it
/// speaks up when a test takes long.
struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

fn count() {
    // SAFETY: neither takes an argument.
    let (thread, process) = unsafe { (libc::gettid(), libc::getpid()) };
    if thread != process {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: every call is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: the caller's promise is passed on.
        unsafe { System.realloc(memory, layout, size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Waits until all threads but this one sleep. One that was started allocates when it first runs,
/// which may be long after that.
fn wait_until_others_sleep() {
    // SAFETY: it takes no argument.
    let this = unsafe { libc::gettid() }.to_string();
    let is_awake = |task: std::io::Result<std::fs::DirEntry>| {
        let task = task.expect("procfs");
        // Threads come and go meanwhile.
        let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        task.file_name() != this.as_str() && !stat.contains(") S ")
    };
    while std::fs::read_dir("/proc/self/task")
        .expect("procfs")
        .any(is_awake)
    {
        std::thread::yield_now();
    }
}

fn check(name: &str, device: &Arc<dyn BlockDevice>, ops: u32) {
    for engine in [Engine::IoUring, Engine::Threads] {
        for segments in [1, 4] {
            let mut pump = Pump::new(device, engine, segments);
            for work in [Work::Write, Work::Read] {
                pump.run(work, 64, 5000);
            }
            wait_until_others_sleep();
            let before = ALLOCATIONS.load(Ordering::Relaxed);
            assert!(before > 0, "they are counted");
            for work in [Work::Write, Work::Read] {
                pump.run(work, 64, ops);
            }
            let allocated = ALLOCATIONS.load(Ordering::Relaxed) - before;
            assert_eq!(allocated, 0, "{name}, {engine}, {segments} segments");
        }
    }
}

/// One test, so that nothing else allocates meanwhile.
#[test]
fn a_warm_ring_allocates_nothing() {
    check(
        "null",
        &open::null(64 << 20, 512).expect("null opens"),
        50_000,
    );
    check(
        "memory",
        &open::memory(64 << 20, 512).expect("memory opens"),
        50_000,
    );
    let buffered = Scratch::in_dir("/dev/shm", 8 << 20);
    let file = open::file(buffered.path(), options(Direct::Off, None)).expect("it opens");
    check("file", &file, 10_000);
    let direct = LoopDevice::new(8 << 20, 512, Access::ReadWrite);
    let file = open::file(direct.path(), options(Direct::On, None)).expect("it opens");
    check("block special", &file, 2000);
}
