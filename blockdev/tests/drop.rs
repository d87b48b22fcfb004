//! A ring that goes waits for what the kernel has. Alone in its process, so that the only thread
//! that hangs is the one that is meant to.

#[path = "support/mounted.rs"]
mod mounted;
mod support;

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use blockdev::conformance::rig::Rig;
use blockdev::{Direct, Durability, Engine, Wait, open};
use mounted::{Mounted, run};
use support::options;

/// A frozen file system, on which every write hangs; thawed when it goes.
struct Frozen<'a>(&'a Path);

impl<'a> Frozen<'a> {
    fn new(path: &'a Path) -> Self {
        run(Command::new("fsfreeze").arg("-f").arg(path));
        Self(path)
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        run(Command::new("fsfreeze").arg("-u").arg(self.0));
    }
}

/// The threads of this process that are blocked in the kernel, where no signal reaches them.
fn stuck() -> Vec<String> {
    let tasks = std::fs::read_dir("/proc/self/task").expect("procfs");
    let stuck = tasks.filter_map(|task| {
        // Threads come and go meanwhile.
        let path = task.ok()?.path();
        let stat = std::fs::read_to_string(path.join("stat")).ok()?;
        let is_stuck = stat.rsplit_once(") ")?.1.starts_with('D');
        is_stuck.then(|| path.display().to_string())
    });
    stuck.collect()
}

/// Waits until one thread hangs and goes on hanging.
fn wait_until_someone_hangs() {
    let mut before = Vec::new();
    let mut rounds = 0;
    while rounds < 20 {
        let now = stuck();
        rounds = if !now.is_empty() && now == before {
            rounds + 1
        } else {
            0
        };
        before = now;
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_ring_that_goes_waits_for_a_write_that_hangs() {
    for engine in [Engine::IoUring, Engine::Threads] {
        let mounted = Mounted::new();
        let image = mounted.file(1 << 20);
        let device = open::file(&image, options(Direct::Off, None)).unwrap();
        let mut rig = Rig::new(&device, engine);
        rig.fill(&[(0, 4096)], &[0x5a; 4096]);
        let frozen = Frozen::new(mounted.path());
        let op = rig.write_op(0, &[(0, 4096)], Durability::Cached);
        rig.prep(op);
        rig.ring().submit(Wait::No).unwrap();
        wait_until_someone_hangs();
        assert!(rig.reap().is_empty());
        let gone = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(200));
                let early = gone.load(Ordering::Relaxed);
                drop(frozen);
                assert!(!early, "{engine}: it did not wait");
            });
            rig.abandon();
            gone.store(true, Ordering::Relaxed);
        });
        assert_eq!(rig.holds(), 0);
        let stored = std::fs::read(&image).unwrap();
        assert!(
            stored[..4096].iter().all(|byte| *byte == 0x5a),
            "{engine}: the write is done"
        );
    }
}
