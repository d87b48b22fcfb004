//! The device that misbehaves does so as planned.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail like the test")]

use std::sync::Arc;
use std::time::Duration;

use blockdev::conformance::rig::Rig;
use blockdev::fault::{FaultCounts, FaultHandle, FaultPlan};
use blockdev::{Abort, BlockDevice, Durability, Engine, IoError, Op, Tag, Wait, open};

const ENGINES: [Engine; 2] = [Engine::IoUring, Engine::Threads];
const SIZE: u64 = 1 << 20;

fn benign(seed: u64) -> FaultPlan {
    FaultPlan::benign(SIZE, 512, seed)
}

fn device(plan: FaultPlan) -> (Arc<dyn BlockDevice>, FaultHandle) {
    open::fault(plan).unwrap()
}

/// A hundred writes; how each of them ended, in the order they were prepped.
fn outcomes(plan: FaultPlan) -> (Vec<Result<(), IoError>>, FaultCounts) {
    let (device, handle) = device(plan);
    let mut rig = Rig::new(&device, Engine::Threads);
    let ops =
        (0..100).map(|n| rig.write_op(n * 8, &[(n as usize * 4096, 4096)], Durability::Cached));
    let ops: Vec<Op> = ops.collect();
    let mut ended = rig.run_all(ops);
    ended.sort_by_key(|(tag, ..)| *tag);
    (
        ended.into_iter().map(|(_, _, outcome)| outcome).collect(),
        handle.counts(),
    )
}

#[test]
fn a_seed_decides_what_happens_to_each_op() {
    let plan = |seed| FaultPlan {
        fail: 200,
        shorten: 200,
        delay: 300,
        reorder: 300,
        ..benign(seed)
    };
    let (first, counts) = outcomes(plan(7));
    let (second, again) = outcomes(plan(7));
    assert_eq!((&first, counts), (&second, again));
    assert_ne!(first, outcomes(plan(8)).0);
    assert_eq!(counts.taken, 100);
    let failed = first
        .iter()
        .filter(|outcome| matches!(outcome, Err(IoError::Os(_))))
        .count();
    let short = first
        .iter()
        .filter(|outcome| matches!(outcome, Err(IoError::Short { .. })))
        .count();
    assert_eq!(
        (failed as u64, short as u64),
        (counts.failed, counts.shortened)
    );
    assert!(failed > 0 && short > 0 && counts.delayed > 0 && counts.reordered > 0);
    assert_eq!(
        first.iter().filter(|outcome| outcome.is_ok()).count(),
        100 - failed - short
    );
}

#[test]
fn a_short_write_stores_what_it_says_and_no_more() {
    let (device, _) = device(FaultPlan {
        shorten: 1000,
        ..benign(3)
    });
    let mut rig = Rig::new(&device, Engine::IoUring);
    rig.fill(&[(0, 4096)], &[0x77; 4096]);
    let op = rig.write_op(0, &[(0, 4096)], Durability::Cached);
    let Err(IoError::Short { want: 4096, got }) = rig.run(op) else {
        panic!("it is shortened")
    };
    // Reads are shortened too, so the rest is looked at bit by bit.
    let mut stored = 0;
    for _ in 0..200 {
        rig.fill(&[(8192, 4096)], &[0xee; 4096]);
        let op = rig.read_op(0, &[(8192, 4096)]);
        let Err(IoError::Short { got: read, .. }) = rig.run(op) else {
            panic!("shortened")
        };
        let bytes = rig.peek(&[(8192, 4096)]);
        let (arrived, rest) = bytes.split_at(read as usize);
        assert!(
            rest.iter().all(|byte| *byte == 0xee),
            "no more than it says"
        );
        let (old, new) = arrived.split_at(arrived.len().min(got as usize));
        assert!(old.iter().all(|byte| *byte == 0x77) && new.iter().all(|byte| *byte == 0));
        stored = stored.max(arrived.len());
    }
    assert!(stored > got as usize, "some reads saw beyond the write");
}

#[test]
fn ops_can_end_in_another_order() {
    // Long enough for the next op to come on a machine that is busy.
    let (device, _) = device(FaultPlan {
        reorder: 500,
        max_delay: Duration::from_millis(500),
        ..benign(5)
    });
    let mut rig = Rig::new(&device, Engine::IoUring);
    let ops: Vec<Op> = (0..50).map(|_| rig.flush_op()).collect();
    let tags: Vec<Tag> = rig.run_all(ops).into_iter().map(|(tag, ..)| tag).collect();
    assert!(!tags.is_sorted(), "{tags:?}");
}

#[test]
fn stuck_ops_end_when_they_are_released() {
    for engine in ENGINES {
        let (device, handle) = device(benign(1));
        assert_eq!(device.capabilities().abort, Abort::Possible);
        let mut rig = Rig::new(&device, engine);
        handle.stick();
        rig.fill(&[(0, 512)], &[9; 512]);
        let first = rig.write_op(0, &[(0, 512)], Durability::Cached);
        let second = rig.flush_op();
        rig.prep(first);
        rig.prep(second);
        rig.ring().submit(Wait::No).unwrap();
        assert!(rig.reap().is_empty());
        assert_eq!(
            (handle.stuck_now(), rig.holds(), rig.ring().in_flight()),
            (2, 2, 2)
        );
        handle.release();
        let ended = rig.drain();
        assert!(ended.iter().all(|(_, _, outcome)| outcome.is_ok()));
        assert_eq!((handle.stuck_now(), rig.holds()), (0, 0));
        let op = rig.read_op(0, &[(4096, 512)]);
        assert_eq!(rig.run(op), Ok(()));
        assert_eq!(rig.peek(&[(4096, 512)]), [9; 512]);
    }
}

#[test]
fn aborted_ops_end_without_effect() {
    for engine in ENGINES {
        let max_delay = Duration::from_secs(3600);
        let plan = FaultPlan {
            stick: 500,
            delay: 1000,
            max_delay,
            ..benign(2)
        };
        let (device, handle) = device(plan);
        let mut rig = Rig::new(&device, engine);
        rig.fill(&[(0, 4096)], &[0x55; 4096]);
        for n in 0..20 {
            let op = match n % 2 {
                0 => rig.write_op(n * 8, &[(0, 4096)], Durability::Cached),
                _ => rig.read_op(0, &[(4096, 4096)]),
            };
            rig.prep(op);
        }
        rig.ring().submit(Wait::No).unwrap();
        assert!(
            (1..20).contains(&handle.stuck_now()),
            "some stick, some are delayed for an hour"
        );
        rig.fill(&[(4096, 4096)], &[0xee; 4096]);
        handle.abort();
        let ended = rig.drain();
        assert_eq!(ended.len(), 20);
        assert!(
            ended
                .iter()
                .all(|end| end.2 == Err(IoError::Aborted) && end.1 == 0)
        );
        assert_eq!(handle.counts().aborted, 20);
        assert_eq!(
            rig.peek(&[(4096, 4096)]),
            [0xee; 4096],
            "memory was not touched"
        );
        for n in 0..20 {
            let op = rig.read_op(n * 8, &[(8192, 4096)]);
            rig.prep(op);
        }
        // Nothing sticks that was aborted, and what comes now sticks by the dice again.
        rig.ring().submit(Wait::No).unwrap();
        handle.abort();
        assert_eq!(rig.drain().len(), 20);
    }
}

#[test]
fn one_stuck_op_is_taken_back_and_the_others_stay() {
    for engine in ENGINES {
        let (device, handle) = device(benign(1));
        let mut rig = Rig::new(&device, engine);
        handle.stick();
        rig.fill(&[(0, 512)], &[9; 512]);
        let ops = (0..3).map(|n| rig.write_op(n, &[(0, 512)], Durability::Cached));
        let ops: Vec<Op> = ops.collect();
        let tags: Vec<Tag> = ops.into_iter().map(|op| rig.prep(op)).collect();
        rig.abort(tags[1]);
        rig.ring().submit(Wait::Event).unwrap();
        assert_eq!(rig.reap(), [(tags[1], 0, Err(IoError::Aborted))]);
        assert_eq!((handle.stuck_now(), handle.counts().aborted), (2, 1));
        // It has ended: nothing is left to take back.
        rig.abort(tags[1]);
        handle.release();
        let mut ended = rig.drain();
        ended.sort_by_key(|(tag, ..)| *tag);
        assert_eq!(ended, [(tags[0], 512, Ok(())), (tags[2], 512, Ok(()))]);
        let op = rig.read_op(0, &[(4096, 1536)]);
        assert_eq!(rig.run(op), Ok(()));
        let stored = [[9; 512], [0; 512], [9; 512]].concat();
        assert_eq!(rig.peek(&[(4096, 1536)]), stored);
    }
}

#[test]
fn a_ring_goes_with_its_stuck_ops() {
    for engine in ENGINES {
        let (device, handle) = device(benign(1));
        handle.stick();
        let mut rig = Rig::new(&device, engine);
        for _ in 0..10 {
            let op = rig.flush_op();
            rig.prep(op);
        }
        assert_eq!(handle.stuck_now(), 10);
        rig.abandon();
        assert_eq!((rig.holds(), handle.stuck_now()), (0, 0));
        // The next front end's ring is not told of them.
        handle.release();
        let mut next = Rig::new(&device, engine);
        let op = next.flush_op();
        assert_eq!(next.run(op), Ok(()));
    }
}
