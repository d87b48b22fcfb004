//! The ring by itself: what it promises about eventfds, tags and waiting, on both engines.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail like the test")]

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use blockdev::conformance::rig::{Rig, eventfd};
use blockdev::{Durability, Engine, Event, IoError, Ring, Tag, Wait, Watch, open};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

const ENGINES: [Engine; 2] = [Engine::IoUring, Engine::Threads];

fn signal(event: &File) {
    (&*event).write_all(&1u64.to_ne_bytes()).unwrap();
}

fn counter(event: &File) -> Option<u64> {
    let mut bytes = [0; 8];
    std::io::Read::read_exact(&mut &*event, &mut bytes).ok()?;
    Some(u64::from_ne_bytes(bytes))
}

/// Everything the ring reports without waiting.
fn reports(ring: &mut Ring) -> Vec<Event> {
    ring.submit(Wait::No).unwrap();
    std::iter::from_fn(|| ring.reap()).collect()
}

/// Waits for one event.
fn wait(ring: &mut Ring) -> Event {
    loop {
        ring.submit(Wait::Event).unwrap();
        if let Some(event) = ring.reap() {
            return event;
        }
    }
}

fn watched(engine: Engine, token: u32) -> (Ring, File, Watch) {
    let mut ring = Ring::new(engine).unwrap();
    let event = eventfd();
    let watch = ring.watch(event.as_fd(), token).unwrap();
    assert!(reports(&mut ring).is_empty());
    (ring, event, watch)
}

#[test]
fn every_write_after_the_watch_is_reported_and_the_counter_stays() {
    for engine in ENGINES {
        let (mut ring, event, _) = watched(engine, 7);
        for count in 1..=1000u64 {
            signal(&event);
            assert!(
                matches!(wait(&mut ring), Event::Ready(7)),
                "{engine}: write {count}"
            );
            assert!(reports(&mut ring).is_empty(), "{engine}: once per write");
        }
        assert_eq!(counter(&event), Some(1000), "{engine}: nobody read it");
        assert!(
            reports(&mut ring).is_empty(),
            "{engine}: reading it is no event"
        );
        signal(&event);
        assert!(
            matches!(wait(&mut ring), Event::Ready(7)),
            "{engine}: after it was read"
        );
    }
}

#[test]
fn a_write_before_the_watch_is_reported_once() {
    for engine in ENGINES {
        let mut ring = Ring::new(engine).unwrap();
        let event = eventfd();
        signal(&event);
        signal(&event);
        ring.watch(event.as_fd(), 3).unwrap();
        assert!(matches!(wait(&mut ring), Event::Ready(3)));
        assert!(reports(&mut ring).is_empty());
        assert_eq!(counter(&event), Some(2));
    }
}

#[test]
fn writes_of_another_thread_wake_the_ring() {
    for engine in ENGINES {
        let (mut ring, event, _) = watched(engine, 1);
        let theirs = event.try_clone().unwrap();
        let answer = eventfd();
        let heard = answer.try_clone().unwrap();
        let thread = std::thread::spawn(move || {
            for _ in 0..500 {
                signal(&theirs);
                // Only goes on once the ring has woken up: a lost wake-up hangs the test.
                while counter(&heard).is_none() {
                    std::thread::yield_now();
                }
            }
        });
        for _ in 0..500 {
            assert!(matches!(wait(&mut ring), Event::Ready(1)));
            ring.notify(answer.as_fd());
            ring.submit(Wait::No).unwrap();
        }
        thread.join().unwrap();
    }
}

#[test]
fn an_ended_watch_says_so_once_and_is_silent_from_then_on() {
    for engine in ENGINES {
        let (mut ring, event, watch) = watched(engine, 5);
        signal(&event);
        assert!(matches!(wait(&mut ring), Event::Ready(5)));
        ring.unwatch(watch);
        assert!(matches!(wait(&mut ring), Event::Unwatched(5)), "{engine}");
        signal(&event);
        ring.unwatch(watch);
        assert!(reports(&mut ring).is_empty(), "{engine}");
        // The next watch takes the same place, and the old handle does not end it.
        let again = ring.watch(event.as_fd(), 6).unwrap();
        assert_ne!(again, watch);
        assert!(matches!(wait(&mut ring), Event::Ready(6)));
        ring.unwatch(watch);
        assert!(reports(&mut ring).is_empty());
        signal(&event);
        assert!(matches!(wait(&mut ring), Event::Ready(6)));
    }
}

#[test]
fn a_watch_that_ends_while_its_fd_is_written_to_still_ends() {
    for engine in ENGINES {
        let mut ring = Ring::new(engine).unwrap();
        let event = eventfd();
        let theirs = event.try_clone().unwrap();
        let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            while !stopped.load(std::sync::atomic::Ordering::Relaxed) {
                signal(&theirs);
            }
        });
        for token in 0..300 {
            let watch = ring.watch(event.as_fd(), token).unwrap();
            assert!(matches!(wait(&mut ring), Event::Ready(t) if t == token));
            ring.unwatch(watch);
            loop {
                match wait(&mut ring) {
                    Event::Ready(t) => assert_eq!(t, token),
                    Event::Unwatched(t) => break assert_eq!(t, token),
                    Event::Done(completion) => panic!("nothing was prepped: {completion:?}"),
                }
            }
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        thread.join().unwrap();
    }
}

#[test]
fn the_caller_may_close_what_is_watched() {
    for engine in ENGINES {
        let (mut ring, event, watch) = watched(engine, 9);
        let theirs = event.try_clone().unwrap();
        drop(event);
        signal(&theirs);
        assert!(matches!(wait(&mut ring), Event::Ready(9)));
        ring.unwatch(watch);
        assert!(matches!(wait(&mut ring), Event::Unwatched(9)));
    }
}

#[test]
fn many_watches_are_told_apart() {
    for engine in ENGINES {
        let mut ring = Ring::new(engine).unwrap();
        let events: Vec<File> = (0..300).map(|_| eventfd()).collect();
        for (token, event) in (0u32..).zip(&events) {
            ring.watch(event.as_fd(), token).unwrap();
        }
        let mut left: std::collections::BTreeSet<u32> = (0..300).collect();
        events.iter().for_each(signal);
        while !left.is_empty() {
            let event = wait(&mut ring);
            let Event::Ready(token) = event else {
                panic!("{event:?}")
            };
            assert!(left.remove(&token), "{token} once");
        }
    }
}

#[test]
fn a_notification_adds_one_and_never_waits() {
    for engine in ENGINES {
        let mut ring = Ring::new(engine).unwrap();
        let event = eventfd();
        for _ in 0..1000 {
            ring.notify(event.as_fd());
        }
        assert!(
            reports(&mut ring).is_empty(),
            "{engine}: no completion to reap"
        );
        assert_eq!(counter(&event), Some(1000), "{engine}");
        // The counter stops two below 2^64; a blocking write would hang here.
        (&event).write_all(&(u64::MAX - 1).to_ne_bytes()).unwrap();
        ring.notify(event.as_fd());
        assert!(
            reports(&mut ring).is_empty(),
            "{engine}: saturated counts as signalled"
        );
        assert_eq!(counter(&event), Some(u64::MAX - 1), "{engine}");
    }
}

#[test]
fn notifications_to_what_is_no_eventfd_are_survived() {
    for engine in ENGINES {
        let mut ring = Ring::new(engine).unwrap();
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        ring.notify(writer.as_fd());
        assert!(reports(&mut ring).is_empty());
        let event = eventfd();
        ring.notify(event.as_fd());
        assert!(reports(&mut ring).is_empty());
        assert_eq!(counter(&event), Some(1));
    }
}

#[test]
fn a_tag_in_flight_is_refused_and_its_first_op_goes_on() {
    for engine in ENGINES {
        let dir = vmm_sys_util::tempdir::TempDir::new().unwrap();
        let path = dir.as_path().join("disk");
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let options = open::FileOptions {
            access: blockdev::Access::ReadWrite,
            direct: open::Direct::Off,
            block_size: None,
        };
        let device = open::file(&path, options).unwrap();
        let rig = Rig::new(&device, engine);
        let mut ring = Ring::new(engine).unwrap();
        let mut channel = device.open_channel(&mut ring).unwrap();
        let (first, second) = (rig.flush_op(), rig.read_op(0, &[(0, 512)]));
        channel.prep(&mut ring, Tag(4), first);
        channel.prep(&mut ring, Tag(4), second);
        assert_eq!(ring.in_flight(), 2);
        let mut outcomes = Vec::new();
        while outcomes.len() < 2 {
            let event = wait(&mut ring);
            let Event::Done(completion) = event else {
                panic!("{event:?}")
            };
            assert_eq!(completion.tag, Tag(4));
            outcomes.push((completion.op.payload(), completion.outcome));
        }
        outcomes.sort_by_key(|(payload, _)| *payload);
        assert_eq!(outcomes[0], (0, Ok(())));
        assert_eq!(outcomes[1], (512, Err(IoError::Os(libc::EBUSY))));
        assert_eq!(ring.in_flight(), 0);
    }
}

#[test]
fn parked_ops_end_when_their_device_says_so() {
    for engine in ENGINES {
        let device = open::null(1 << 20, 512).unwrap();
        let rig = Rig::new(&device, engine);
        let mut ring = Ring::new(engine).unwrap();
        ring.park(Tag(0), rig.write_op(8, &[(0, 4096)], Durability::Cached))
            .unwrap();
        ring.park(Tag(70), rig.flush_op()).unwrap();
        assert_eq!((ring.in_flight(), rig.holds()), (2, 2));
        assert!(ring.parked(Tag(1)).is_none() && ring.parked(Tag(71)).is_none());
        assert_eq!(ring.parked(Tag(0)).unwrap().payload(), 4096);
        assert!(reports(&mut ring).is_empty());
        ring.finish_parked(Tag(0), 512, Err(IoError::Aborted));
        ring.finish_parked(Tag(0), 4096, Ok(()));
        ring.finish_parked(Tag(9), 4096, Ok(()));
        // With something to reap, waiting returns at once.
        let Event::Done(completion) = wait(&mut ring) else {
            panic!("a completion")
        };
        assert_eq!(
            (completion.moved, completion.outcome),
            (512, Err(IoError::Aborted))
        );
        drop(completion);
        assert!(reports(&mut ring).is_empty());
        assert_eq!((ring.in_flight(), rig.holds()), (1, 1));
        drop(ring);
        assert_eq!(rig.holds(), 0, "dropping the ring drops what is parked");
    }
}

#[test]
fn a_poller_sees_completions_without_ever_waiting() {
    for engine in ENGINES {
        let dir = vmm_sys_util::tempdir::TempDir::new().unwrap();
        let path = dir.as_path().join("disk");
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let options = open::FileOptions {
            access: blockdev::Access::ReadWrite,
            direct: open::Direct::On,
            block_size: None,
        };
        let device = open::file(&path, options).unwrap();
        let mut rig = Rig::new(&device, engine);
        for round in 0..20 {
            let ops = [
                rig.write_op(0, &[(0, 4096)], Durability::Durable),
                rig.read_op(8, &[(8192, 4096)]),
                rig.zero_op(16, 4096, blockdev::Unmap::Allowed, Durability::Cached),
            ];
            for op in ops {
                rig.prep(op);
            }
            let mut ended = 0;
            while ended < 3 {
                rig.ring().submit(Wait::No).unwrap();
                let reaped = rig.reap();
                assert!(
                    reaped.iter().all(|(_, _, outcome)| outcome.is_ok()),
                    "round {round}"
                );
                ended += reaped.len();
            }
        }
    }
}

/// Whether the ring's descriptor becomes readable within `limit` milliseconds.
fn readable(ring: &Ring, limit: i32) -> bool {
    let epoll = Epoll::new().unwrap();
    let event = EpollEvent::new(EventSet::IN, 0);
    let fd = ring.as_fd().as_raw_fd();
    epoll.ctl(ControlOperation::Add, fd, event).unwrap();
    loop {
        // The kernel may finish work of the ring's on this thread, and ends the wait for it.
        match epoll.wait(limit, &mut [EpollEvent::default()]) {
            Ok(count) => return count > 0,
            Err(error) => assert_eq!(error.kind(), ErrorKind::Interrupted),
        }
    }
}

#[test]
fn a_loop_that_waits_elsewhere_misses_nothing() {
    for engine in ENGINES {
        let (mut ring, event, _) = watched(engine, 7);
        for count in 1..=100 {
            assert!(!readable(&ring, 0), "{engine}: nothing came");
            signal(&event);
            assert!(readable(&ring, 60_000), "{engine}: write {count}");
            assert!(matches!(reports(&mut ring)[..], [Event::Ready(7)]));
        }

        let dir = vmm_sys_util::tempdir::TempDir::new().unwrap();
        let path = dir.as_path().join("disk");
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let options = open::FileOptions {
            access: blockdev::Access::ReadWrite,
            direct: open::Direct::On,
            block_size: None,
        };
        let device = open::file(&path, options).unwrap();
        let mut rig = Rig::new(&device, engine);
        for _ in 0..20 {
            let ops = [
                rig.write_op(0, &[(0, 4096)], Durability::Durable),
                rig.read_op(8, &[(8192, 4096)]),
                rig.zero_op(16, 4096, blockdev::Unmap::Allowed, Durability::Cached),
            ];
            for op in ops {
                rig.prep(op);
            }
            let mut ended = 0;
            while ended < 3 {
                rig.ring().submit(Wait::No).unwrap();
                let reaped = rig.reap();
                ended += reaped.len();
                // What was reaped may have been followed by another call of its op.
                rig.ring().submit(Wait::No).unwrap();
                assert!(
                    ended == 3 || readable(rig.ring(), 60_000),
                    "{engine}: {ended} of 3 ended"
                );
            }
        }
    }
}
