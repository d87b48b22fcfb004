//! Our device under the stock daemon of the rust-vmm crates: everything a driver asks of it, and
//! everything that has to wait for what is in flight.

use std::fs;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use blockdev::fault::{FaultHandle, FaultPlan};
use blockdev::{Access, BlockDevice, Claim, Direct, Engine, FileOptions, open};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vublk_tests::driver::verify::{
    Counts, Model, Placement, Waiting, Workload, check_all, run, slot_bytes,
};
use vublk_tests::driver::{Spec, connect};
use vublk_tests::frontend::{
    Descriptor, FrontEnd, GuestRam, Kind, Layout, Options, Outcome, Peer, ServeOptions, Stock,
    code, region_payload, words,
};
use vublk_tests::guest::Scratch;

const ENGINES: [Engine; 2] = [Engine::IoUring, Engine::Threads];

/// Bytes of the part of the device that one queue has.
const AREA: u64 = 24 << 20;
/// A file without the page cache.
const DIRECT: FileOptions = FileOptions {
    access: Access::ReadWrite,
    direct: Direct::On,
    block_size: None,
};
/// Bytes of the longest transfer.
const LONGEST: usize = 1 << 20;

fn stock(engine: Engine, workers: usize, storage: Option<Arc<dyn BlockDevice>>) -> Outcome<Stock> {
    Stock::start(&ServeOptions {
        storage,
        workers,
        engine,
        ..ServeOptions::default()
    })
}

#[test]
fn every_request_is_answered_as_a_front_end_expects() -> Outcome {
    for engine in ENGINES {
        let stock = stock(engine, 2, None)?;
        let options = Options {
            vrings: 4,
            ..Options::default()
        };
        let mut front_end = FrontEnd::start(stock.connect()?, options)?;
        front_end.verify(1)?;
        let head = front_end.submit(1, 0, (Kind::GetId, 0), &[0xa5; 20])?;
        assert_eq!(front_end.wait(1, head)?, 0);
        let [_, _, bytes] = front_end.vring(1)?.places(0);
        assert_eq!(
            front_end.ram.read(bytes, 20)?,
            b"vublk-test\0\0\0\0\0\0\0\0\0\0"
        );
        // Beyond the end of the device.
        assert_eq!(
            front_end.request(2, (Kind::In, 1 << 20), &[0; 512])?,
            1,
            "IOERR"
        );
        front_end.verify(2)?;
        drop(front_end);
        stock.left()?;
    }
    Ok(())
}

#[test]
fn another_projects_driver_finds_what_it_wrote_in_memory() -> Outcome {
    for engine in ENGINES {
        verify_all(&open::memory(4 * AREA, 512)?, engine)?;
    }
    Ok(())
}

#[test]
fn another_projects_driver_finds_what_it_wrote_to_a_file() -> Outcome {
    for engine in ENGINES {
        let scratch = Scratch::new()?;
        let image = scratch.image("disk", 4 * AREA)?;
        let models = verify_all(&open::file(&image, DIRECT)?, engine)?;
        let bytes = fs::read(&image)?;
        for mut model in models {
            let area = model.area();
            let part = usize::try_from(area.start)?..usize::try_from(area.end)?;
            model.check(area.start, bytes.get(part).ok_or("a short image")?)?;
        }
    }
    Ok(())
}

/// Random requests at several depths, with one queue and four, with and without EVENT_IDX; each on
/// a daemon of its own, since it serves one connection.
fn verify_all(storage: &Arc<dyn BlockDevice>, engine: Engine) -> Outcome<Vec<Model>> {
    let mut models: Vec<Model> = (0..4)
        .map(|index| Model::zeroed(&(index * AREA..(index + 1) * AREA)))
        .collect();
    let mut sum = Counts::default();
    for (queues, workers) in [(1, 1), (4, 1), (4, 4)] {
        for (depth, event_idx, waiting) in [
            (1, true, Waiting::Sleeping),
            (4, false, Waiting::Sleeping),
            (16, true, Waiting::Polling),
            (64, true, Waiting::Sleeping),
        ] {
            let stock = stock(engine, workers, Some(storage.clone()))?;
            let spec = Spec {
                event_idx,
                queues,
                queue_size: 1024,
                slots: depth,
                slot_bytes: slot_bytes(LONGEST),
            };
            let workload = Workload {
                depth,
                waiting,
                sizes: (512, LONGEST),
                placement: Placement::Sectors,
                requests: 80,
                seed: u64::from(depth),
            };
            for counts in all_queues(&stock, &spec, &mut models, &workload)? {
                assert_eq!(counts.deepest, depth);
                sum.reads += counts.reads;
                sum.writes += counts.writes;
                sum.flushes += counts.flushes;
                sum.discards += counts.discards;
                sum.write_zeroes += counts.write_zeroes;
            }
            stock.left()?;
        }
    }
    let Counts {
        reads,
        writes,
        flushes,
        discards,
        write_zeroes,
        ..
    } = sum;
    let counts = [reads, writes, flushes, discards, write_zeroes];
    assert!(counts.iter().all(|count| *count > 0), "{sum:?}");
    let stock = stock(engine, 1, Some(storage.clone()))?;
    let spec = Spec {
        slot_bytes: LONGEST,
        ..Spec::default()
    };
    let mut queues = connect(stock.path(), &spec)?;
    for model in &mut models {
        check_all(queues.first_mut().ok_or("no queue")?, model, LONGEST)?;
    }
    drop(queues);
    stock.left()?;
    Ok(models)
}

/// One thread a queue, each in an area of its own, all of one connection.
fn all_queues(
    stock: &Stock,
    spec: &Spec,
    models: &mut [Model],
    workload: &Workload,
) -> Outcome<Vec<Counts>> {
    let queues = connect(stock.path(), spec)?;
    thread::scope(|scope| {
        let threads: Vec<_> = (0..)
            .zip(queues)
            .zip(models)
            .map(|((index, mut queue), model)| {
                let workload = Workload {
                    seed: workload.seed * 100 + index,
                    ..workload.clone()
                };
                scope.spawn(move || run(&mut queue, model, &workload))
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| {
                let ran = thread.join().map_err(|panic| format!("{panic:?}"))?;
                Ok(ran?)
            })
            .collect()
    })
}

/// A daemon whose storage can stick, with a started front end of two vrings.
fn sticky() -> Outcome<(Stock, FaultHandle, FrontEnd)> {
    let (storage, handle) = open::fault(FaultPlan::benign(4 << 20, 512, 7))?;
    let stock = stock(Engine::IoUring, 2, Some(storage))?;
    let options = Options {
        vrings: 2,
        ..Options::default()
    };
    let front_end = FrontEnd::start(stock.connect()?, options)?;
    Ok((stock, handle, front_end))
}

fn wait_stuck(handle: &FaultHandle, count: usize) {
    while handle.stuck_now() < count {
        thread::yield_now();
    }
}

/// Whether nothing comes for a while.
fn is_silent(peer: &Peer) -> Outcome<bool> {
    let fd = peer.stream().as_fd();
    let mut polled = [PollFd::new(&fd, PollFlags::IN)];
    let a_while = Timespec::try_from(Duration::from_millis(100))?;
    Ok(poll(&mut polled, Some(&a_while))? == 0)
}

#[test]
fn a_stop_waits_for_what_is_in_flight() -> Outcome {
    let (stock, handle, mut front_end) = sticky()?;
    handle.stick();
    let heads = [
        front_end.submit(0, 0, (Kind::Out, 0), &[1; 512])?,
        front_end.submit(0, 1, (Kind::In, 8), &[2; 512])?,
    ];
    wait_stuck(&handle, 2);
    // The other thread's vring is at rest.
    assert_eq!(front_end.peer.vring_base(1)?, 0);
    front_end
        .peer
        .tell(code::GET_VRING_BASE, &words(&[0, 0]), &[])?;
    assert!(is_silent(&front_end.peer)?, "it is answered too early");
    handle.release();
    let reply = front_end.peer.reply_to(code::GET_VRING_BASE)?.payload;
    assert_eq!(reply, words(&[0, 2]));
    // What was in flight is used, and nothing comes after.
    assert_eq!(front_end.vring(0)?.ring.used_index()?, 2);
    for head in heads {
        assert_eq!(front_end.wait(0, head)?, 0);
    }
    let late = front_end.submit(0, 2, (Kind::Out, 0), &[3; 512])?;
    front_end.start_vring(1, 0)?;
    front_end.write(1, 16, &[4; 512])?;
    assert_eq!(front_end.vring(0)?.ring.used_index()?, 2);
    front_end.start_vring(0, 2)?;
    assert_eq!(front_end.wait(0, late)?, 0);
    assert_eq!(front_end.read(0, 0, 512)?, [3; 512]);
    drop(front_end);
    stock.left()
}

#[test]
fn a_change_of_memory_waits_for_what_is_in_flight() -> Outcome {
    let (stock, handle, mut front_end) = sticky()?;
    let more = GuestRam::at(Layout {
        guest: 1 << 32,
        size: 4096,
        offset: 4096,
    })?;
    let region = [vec![0; 8], region_payload(more.numbers())].concat();
    let peer = &front_end.peer;
    peer.confirm(code::ADD_MEM_REG, &region, &[more.fd()])?;
    front_end.write(0, 16, &[0x77; 512])?;
    let ram = front_end.ram.clone();
    let vring = front_end.vring(0)?;
    let [header, status, _] = vring.places(0);
    let chain = [
        Descriptor::source(header, 16),
        Descriptor::dest((1 << 32) + 512, 512),
        Descriptor::dest(status, 1),
    ];
    ram.write(header, &Kind::In.header(16))?;
    vring.ring.offer_chain(0, &chain)?;
    vring.kick.write(1)?;
    assert_eq!(front_end.wait(0, 0)?, 0);
    assert_eq!(more.read((1 << 32) + 512, 512)?, [0x77; 512]);
    handle.stick();
    let head = front_end.submit(1, 0, (Kind::Out, 0), &[5; 512])?;
    wait_stuck(&handle, 1);
    front_end.peer.send(code::REM_MEM_REG, 0x9, &region, &[])?;
    assert!(is_silent(&front_end.peer)?, "it is answered too early");
    // What is offered meanwhile is not forgotten.
    let next = front_end.submit(1, 1, (Kind::Out, 8), &[6; 512])?;
    handle.release();
    let reply = front_end.peer.reply_to(code::REM_MEM_REG)?.payload;
    assert_eq!(reply, [0; 8]);
    assert_eq!(front_end.wait(1, head)?, 0);
    assert_eq!(front_end.wait(1, next)?, 0);
    assert_eq!(front_end.read(0, 8, 512)?, [6; 512]);
    front_end.verify(3)?;
    drop(front_end);
    stock.left()
}

#[test]
fn a_reset_waits_for_what_is_in_flight() -> Outcome {
    let (stock, handle, mut front_end) = sticky()?;
    handle.stick();
    let head = front_end.submit(0, 0, (Kind::Out, 0), &[7; 512])?;
    wait_stuck(&handle, 1);
    front_end.peer.send(code::RESET_DEVICE, 0x9, &[], &[])?;
    assert!(is_silent(&front_end.peer)?, "it is answered too early");
    handle.release();
    assert_eq!(front_end.peer.reply_to(code::RESET_DEVICE)?.payload, [0; 8]);
    assert_eq!(front_end.wait(0, head)?, 0);
    drop(front_end);
    stock.left()
}

#[test]
fn the_end_of_the_daemon_waits_for_what_is_in_flight() -> Outcome {
    let (stock, handle, mut front_end) = sticky()?;
    handle.stick();
    front_end.submit(0, 0, (Kind::Out, 0), &[8; 512])?;
    front_end.submit(1, 0, (Kind::In, 0), &[9; 512])?;
    wait_stuck(&handle, 2);
    drop(front_end);
    let leaving = thread::spawn(move || stock.left());
    thread::sleep(Duration::from_millis(100));
    assert!(!leaving.is_finished(), "requests are left behind");
    handle.release();
    leaving
        .join()
        .map_err(|panic| format!("it panicked: {panic:?}"))?
}

#[test]
fn a_driver_that_breaks_one_ring_keeps_the_others() -> Outcome {
    let stock = stock(Engine::IoUring, 1, None)?;
    let options = Options {
        vrings: 3,
        ..Options::default()
    };
    let mut front_end = FrontEnd::start(stock.connect()?, options)?;
    front_end.verify(4)?;
    // An index far ahead on the first ring, a head out of range on the second.
    let broken = front_end.vring(0)?;
    let next = broken.ring.next_avail();
    broken.ring.set_avail_index(next.wrapping_add(500))?;
    broken.kick.write(1)?;
    front_end.write(1, 3, &[1; 512])?;
    let used = front_end.vring(1)?.ring.used_index()?;
    let broken = front_end.vring(1)?;
    broken.ring.offer(40_000)?;
    broken.kick.write(1)?;
    // Kicks are taken in their order.
    front_end.write(2, 3, &[2; 512])?;
    // Not a word for the head, and a stop mends the ring.
    assert_eq!(front_end.vring(1)?.ring.used_index()?, used);
    let next = front_end.vring(1)?.ring.next_avail();
    assert_eq!(front_end.peer.vring_base(1)?, u32::from(next));
    front_end.start_vring(1, next)?;
    front_end.write(1, 4, &[3; 512])?;
    drop(front_end);
    stock.left()
}

#[test]
fn the_image_is_taken_while_a_ring_runs() -> Outcome {
    let scratch = Scratch::new()?;
    let image = scratch.image("disk", 4 << 20)?;
    let other = open::file(&image, DIRECT)?;
    assert_eq!(other.claim()?, Claim::Held);
    let stock = stock(Engine::IoUring, 2, Some(open::file(&image, DIRECT)?))?;
    let options = Options {
        vrings: 2,
        ..Options::default()
    };
    let mut front_end = FrontEnd::start(stock.connect()?, options)?;
    let head = front_end.submit(0, 0, (Kind::Out, 0), &[1; 512])?;
    thread::sleep(Duration::from_millis(200));
    let used = front_end.vring(0)?.ring.used_index()?;
    assert_eq!(used, 0, "another one has the image");
    other.release()?;
    assert_eq!(front_end.wait(0, head)?, 0);
    front_end.write(1, 8, &[2; 512])?;
    assert_eq!(other.claim()?, Claim::Busy);
    front_end.peer.vring_base(0)?;
    assert_eq!(other.claim()?, Claim::Busy, "one ring is left");
    front_end.peer.vring_base(1)?;
    assert_eq!(other.claim()?, Claim::Held, "none is");
    other.release()?;
    // A front end that hangs up stops no ring; the end of the daemon does.
    front_end.start_vring(1, 1)?;
    front_end.write(1, 8, &[3; 512])?;
    assert_eq!(other.claim()?, Claim::Busy);
    drop(front_end);
    stock.left()?;
    assert_eq!(other.claim()?, Claim::Held);
    Ok(())
}
