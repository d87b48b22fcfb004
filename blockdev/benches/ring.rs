//! What a device costs per op, with everything above it left out.
//!
//! Figures for files mean something on a disk with O_DIRECT only, and where the file is written in
//! full: holes and unwritten extents are answered without the disk.

#[path = "../tests/support/pump.rs"]
mod pump;

use std::io::Write;
use std::sync::Arc;

use blockdev::{Access, BlockDevice, Direct, Engine, FileOptions, open};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use pump::{Pump, Work};
use vmm_sys_util::tempdir::TempDir;

const SIZE: usize = 64 << 20;

/// Ops per measurement: enough that filling and draining the ring disappears.
const OPS: u32 = 1024;

fn measure(criterion: &mut Criterion, name: &str, device: &Arc<dyn BlockDevice>) {
    let mut group = criterion.benchmark_group(name);
    group
        .throughput(Throughput::Elements(u64::from(OPS)))
        .sample_size(20);
    for engine in [Engine::IoUring, Engine::Threads] {
        for (work, depth, segments) in [
            (Work::Read, 1, 1),
            (Work::Read, 32, 1),
            (Work::Read, 32, 4),
            (Work::Write, 32, 1),
        ] {
            let mut pump = Pump::new(device, engine, segments);
            let label = format!("{engine}/{work:?}/depth {depth}/segments {segments}");
            group.bench_function(label, |bencher| bencher.iter(|| pump.run(work, depth, OPS)));
        }
    }
    group.finish();
}

fn devices(criterion: &mut Criterion) {
    let size = SIZE as u64;
    measure(
        criterion,
        "null",
        &open::null(size, 512).expect("null opens"),
    );
    measure(
        criterion,
        "memory",
        &open::memory(size, 512).expect("memory opens"),
    );
    let dir = TempDir::new_in(env!("CARGO_TARGET_TMPDIR").as_ref()).expect("a directory");
    let path = dir.as_path().join("disk");
    let mut file = std::fs::File::create(&path).expect("a file");
    file.write_all(&vec![0x5a; SIZE])
        .and_then(|()| file.sync_all())
        .expect("room for it");
    for (name, direct) in [("direct file", Direct::On), ("cached file", Direct::Off)] {
        let options = FileOptions {
            access: Access::ReadWrite,
            direct,
            block_size: None,
        };
        measure(
            criterion,
            name,
            &open::file(&path, options).expect("it opens"),
        );
    }
}

criterion_group!(benches, devices);
criterion_main!(benches);
