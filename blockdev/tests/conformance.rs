//! Every device, one line each.

mod support;

use std::time::Duration;

use blockdev::conformance::Subject;
use blockdev::fault::FaultPlan;
use blockdev::{Access, Direct, FileOptions, Way, conformance, open};
use support::{LoopDevice, Place, Scratch, options};

const SIZE: u64 = 24 << 20;

/// A device over a place that lives as long as it.
fn disk(place: impl Place, options: FileOptions) -> Subject {
    let device = open::file(place.path(), options).expect("the place can be opened");
    Subject::kept(device).keeping(place)
}

/// The same, with its calls made this way and no other.
fn disk_by(way: Way, place: impl Place, direct: Direct) -> Subject {
    let device = open::file_by(place.path(), options(direct, None), way);
    Subject::kept(device.expect("the place can be opened")).keeping(place)
}

fn writable_loop(sector_size: u32) -> LoopDevice {
    LoopDevice::new(SIZE, sector_size, Access::ReadWrite)
}

conformance!(null, || Subject::ignored(open::null(SIZE, 512).unwrap()));
conformance!(null_4096, || Subject::ignored(
    open::null(SIZE, 4096).unwrap()
));
conformance!(memory, || Subject::kept(open::memory(SIZE, 512).unwrap()));
conformance!(memory_4096, || Subject::kept(
    open::memory(SIZE, 4096).unwrap()
));
conformance!(file, || disk(
    Scratch::on_disk(SIZE),
    options(Direct::Off, None)
));
conformance!(file_4096, || disk(
    Scratch::on_disk(SIZE),
    options(Direct::Off, Some(4096))
));
conformance!(file_direct, || disk(
    Scratch::on_disk(SIZE),
    options(Direct::On, None)
));
conformance!(file_direct_4096, || disk(
    Scratch::on_disk(SIZE),
    options(Direct::On, Some(4096))
));
conformance!(file_tmpfs, || disk(
    Scratch::in_dir("/dev/shm", SIZE),
    options(Direct::Off, None)
));
conformance!(file_tmpfs_direct, || disk(
    Scratch::in_dir("/dev/shm", SIZE),
    options(Direct::On, None)
));
conformance!(file_inline, || disk_by(
    Way::Inline,
    Scratch::on_disk(SIZE),
    Direct::Off
));
conformance!(file_direct_inline, || disk_by(
    Way::Inline,
    Scratch::on_disk(SIZE),
    Direct::On
));
conformance!(file_tmpfs_engine, || disk_by(
    Way::Engine,
    Scratch::in_dir("/dev/shm", SIZE),
    Direct::On
));
conformance!(block_inline, || disk_by(
    Way::Inline,
    writable_loop(512),
    Direct::On
));
conformance!(block_512, || disk(
    writable_loop(512),
    options(Direct::On, None)
));
conformance!(block_4096, || disk(
    writable_loop(4096),
    options(Direct::On, None)
));
conformance!(block_4096_small, || {
    disk(writable_loop(4096), options(Direct::On, Some(512)))
});
conformance!(fault, || {
    let plan = FaultPlan {
        delay: 300,
        reorder: 300,
        ..FaultPlan::benign(SIZE, 512, 1)
    };
    Subject::kept(open::fault(plan).unwrap().0)
});
conformance!(fault_aligned, || {
    let memory = iov_iter::MemoryNeeds {
        address_align: 4096,
        len_align: 4096,
        stability: iov_iter::Stability::Stable,
    };
    let max_delay = Duration::from_micros(200);
    let benign = FaultPlan::benign(SIZE, 4096, 2);
    let plan = FaultPlan {
        memory,
        delay: 500,
        reorder: 500,
        max_delay,
        ..benign
    };
    Subject::kept(open::fault(plan).unwrap().0)
});
