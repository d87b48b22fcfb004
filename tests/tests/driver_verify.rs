//! The driver of another project against the real daemon: random requests at every depth, every
//! byte that is read checked against a model.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test's helpers fail like the test"
)]

use std::fs;
use std::ops::Range;
use std::path::Path;
use std::thread;

use vublk_tests::driver::verify::{
    Counts, Model, Placement, VerifyError, Waiting, Workload, check_all, run, slot_bytes,
};
use vublk_tests::driver::{Spec, connect};
use vublk_tests::guest::{Daemon, DaemonSpec, Engine, Scratch, Storage};

const DEPTHS: [u32; 7] = [1, 2, 4, 8, 16, 32, 64];
const LONGEST: usize = 1 << 20;
const AREA: u64 = 24 << 20;

#[test]
fn memory_with_event_idx() {
    every_depth(&memory(1), &Spec::default(), Placement::Sectors, 400);
}

#[test]
fn memory_without_event_idx() {
    let spec = Spec {
        event_idx: false,
        ..Spec::default()
    };
    every_depth(&memory(1), &spec, Placement::Sectors, 400);
}

#[test]
fn memory_from_any_address() {
    every_depth(&memory(1), &Spec::default(), Placement::Anywhere, 400);
}

#[test]
fn memory_with_four_queues_on_one_worker() {
    every_depth(
        &memory(4).workers(1),
        &four_queues(),
        Placement::Sectors,
        150,
    );
}

#[test]
fn memory_with_four_queues_on_four_workers() {
    every_depth(
        &memory(4).workers(4),
        &four_queues(),
        Placement::Sectors,
        150,
    );
}

#[test]
fn file_over_io_uring() {
    on_file(
        Engine::IoUring,
        &Spec::default(),
        Placement::Sectors,
        |file| file.direct(true),
    );
}

#[test]
fn file_over_io_uring_from_any_address() {
    on_file(
        Engine::IoUring,
        &Spec::default(),
        Placement::Anywhere,
        |file| file.direct(true),
    );
}

#[test]
fn file_over_io_uring_through_the_page_cache() {
    on_file(
        Engine::IoUring,
        &Spec::default(),
        Placement::Sectors,
        |file| file.direct(false),
    );
}

#[test]
fn file_over_io_uring_with_four_queues() {
    on_file(
        Engine::IoUring,
        &four_queues(),
        Placement::Sectors,
        |file| file.workers(2),
    );
}

#[test]
fn file_over_io_uring_pinned() {
    on_file(
        Engine::IoUring,
        &Spec::default(),
        Placement::Sectors,
        |file| file.direct(true).pinned(),
    );
}

#[test]
fn file_over_io_uring_pinned_from_any_address() {
    on_file(
        Engine::IoUring,
        &Spec::default(),
        Placement::Anywhere,
        |file| file.direct(true).pinned(),
    );
}

#[test]
fn file_over_io_uring_pinned_with_four_queues() {
    on_file(
        Engine::IoUring,
        &four_queues(),
        Placement::Sectors,
        |file| file.direct(false).workers(2).pinned(),
    );
}

#[test]
fn file_over_threads() {
    on_file(
        Engine::Threads,
        &Spec::default(),
        Placement::Sectors,
        |file| file.direct(true),
    );
}

#[test]
fn file_over_threads_with_four_queues() {
    on_file(
        Engine::Threads,
        &four_queues(),
        Placement::Anywhere,
        |file| file.workers(2),
    );
}

fn memory(queues: u16) -> DaemonSpec {
    DaemonSpec::new(Storage::Memory(4 * AREA)).queues(queues)
}

fn four_queues() -> Spec {
    Spec {
        queues: 4,
        ..Spec::default()
    }
}

/// Runs every depth on a file, and then compares the file itself.
fn on_file(
    engine: Engine,
    spec: &Spec,
    placement: Placement,
    options: impl FnOnce(DaemonSpec) -> DaemonSpec,
) {
    let scratch = Scratch::new().unwrap();
    let image = scratch.image("disk", 4 * AREA).unwrap();
    let daemon = options(
        DaemonSpec::file(&image)
            .engine(engine)
            .queues(spec.queues as u16),
    );
    let requests = 300 / spec.queues as u64;
    let mut models = every_depth(&daemon, spec, placement, requests);
    compare_file(&image, &mut models);
}

/// Runs all depths with a polling and with a sleeping driver, each on a connection of its own,
/// and then reads everything on one more.
fn every_depth(
    daemon: &DaemonSpec,
    spec: &Spec,
    placement: Placement,
    requests: u64,
) -> Vec<Model> {
    let scratch = Scratch::new().unwrap();
    let is_pinned = daemon.is_pinned();
    let daemon = daemon.start(&scratch).unwrap();
    let mut models: Vec<_> = areas(spec.queues)
        .map(|area| Model::zeroed(&area))
        .collect();
    let mut sum = Counts::default();
    for depth in DEPTHS {
        for waiting in [Waiting::Polling, Waiting::Sleeping] {
            let workload = Workload {
                depth,
                waiting,
                sizes: (512, LONGEST),
                placement,
                requests,
                seed: u64::from(depth),
            };
            let spec = Spec {
                queue_size: 1024,
                slots: depth,
                slot_bytes: slot_bytes(LONGEST),
                ..spec.clone()
            };
            for counts in all_queues(&daemon, &spec, &mut models, &workload) {
                assert_eq!(counts.deepest, depth);
                sum.reads += counts.reads;
                sum.writes += counts.writes;
                sum.flushes += counts.flushes;
                sum.discards += counts.discards;
                sum.write_zeroes += counts.write_zeroes;
            }
        }
    }
    for count in [
        sum.reads,
        sum.writes,
        sum.flushes,
        sum.discards,
        sum.write_zeroes,
    ] {
        assert!(count > 0, "{sum:?}");
    }
    let spec = Spec {
        slot_bytes: LONGEST,
        ..Spec::default()
    };
    let mut queues = connect(daemon.socket(), &spec).unwrap();
    for model in &mut models {
        check_all(&mut queues[0], model, LONGEST).unwrap();
    }
    drop(queues);
    assert_eq!(daemon.counted("pinned").unwrap() > 0, is_pinned);
    daemon.stop().unwrap();
    models
}

fn areas(queues: usize) -> impl Iterator<Item = Range<u64>> {
    let share = 4 * AREA / queues as u64;
    (0..queues as u64).map(move |index| index * share..(index + 1) * share)
}

/// One thread a queue, each in an area of its own, all of one connection.
fn all_queues(
    daemon: &Daemon,
    spec: &Spec,
    models: &mut [Model],
    workload: &Workload,
) -> Vec<Counts> {
    let queues = connect(daemon.socket(), spec).unwrap();
    assert_eq!(queues.len(), spec.queues);
    let event_idx = queues[0].disk().features & EVENT_IDX != 0;
    assert_eq!(event_idx, spec.event_idx, "negotiated");
    let done: Result<Vec<Counts>, VerifyError> = thread::scope(|scope| {
        let threads: Vec<_> = queues
            .into_iter()
            .zip(models)
            .enumerate()
            .map(|(index, (mut queue, model))| {
                let seed = workload.seed * 100 + index as u64;
                let workload = Workload {
                    seed,
                    ..workload.clone()
                };
                scope.spawn(move || run(&mut queue, model, &workload))
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    done.unwrap_or_else(|error| panic!("{workload:?}: {error}"))
}

/// The file on the host holds what the models say.
fn compare_file(image: &Path, models: &mut [Model]) {
    let bytes = fs::read(image).unwrap();
    for model in models {
        let area = model.area();
        let part = &bytes[area.start as usize..area.end as usize];
        model.check(area.start, part).unwrap();
    }
}

/// VIRTIO_F_EVENT_IDX (virtio 6).
const EVENT_IDX: u64 = 1 << 29;
