//! Checks of ownership: every op comes back once, and every hold is given back.

use std::collections::HashSet;

use super::contents::{block, blocks, moves_data, sectors};
use super::rig::Rig;
use super::{Contents, Subject, outstanding};
use crate::{Abort, Durability, Engine, IoError, Op, Tag, Unmap, Wait};

/// A mixture of all ops, each on blocks of its own.
fn mixture(subject: &Subject, rig: &Rig, count: usize) -> Vec<Op> {
    let (block, per_block) = (block(subject), sectors(subject));
    let blocks = blocks(subject) as usize;
    let op = |index: usize| {
        let sector = (index % blocks) as u64 * per_block;
        let memory = [((index % 4096) * block % (16 << 20), block)];
        match index % 7 {
            0 | 1 => rig.read_op(sector, &memory),
            2 | 3 => rig.write_op(sector, &memory, Durability::Cached),
            4 => rig.zero_op(sector, block, Unmap::Forbidden, Durability::Cached),
            5 => rig.flush_op(),
            _ => rig.zero_op(sector, block, Unmap::Allowed, Durability::Cached),
        }
    };
    (0..count).map(op).collect()
}

/// More ops in one batch than the kernel's queue holds: any order, each exactly once.
pub fn a_long_batch_completes_each_op_once(subject: &Subject, engine: Engine) {
    let before = outstanding();
    let mut rig = Rig::new(&subject.device, engine);
    let ops = mixture(subject, &rig, 1500);
    assert_eq!(rig.holds(), 1500);
    let ended = rig.run_all(ops);
    assert!(
        ended.iter().all(|(_, _, outcome)| outcome.is_ok()),
        "all of them succeed"
    );
    let tags: HashSet<_> = ended.iter().map(|(tag, ..)| *tag).collect();
    assert_eq!((ended.len(), tags.len()), (1500, 1500));
    assert_eq!(rig.holds(), 0);
    drop(rig);
    assert_eq!(outstanding(), before);
}

/// The same few slots again and again, never quite empty.
pub fn many_rounds_reuse_what_they_took(subject: &Subject, engine: Engine) {
    let mut rig = Rig::new(&subject.device, engine);
    let mut ended = 0;
    for _ in 0..40 {
        for op in mixture(subject, &rig, 16).into_iter().filter(moves_data) {
            rig.prep(op);
        }
        rig.ring().submit(Wait::No).expect("the ring works");
        ended += rig.reap().len();
    }
    ended += rig.drain().len();
    let per_round = (0..16).filter(|index| index % 7 < 4).count();
    assert_eq!(ended, 40 * per_round);
    assert_eq!(rig.holds(), 0);
}

/// Whatever the kernel or a thread is at, nothing is touched and nothing is held once the ring is
/// gone.
pub fn a_ring_that_goes_waits_for_its_ops(subject: &Subject, engine: Engine) {
    let before = outstanding();
    for count in [1, 7, 300] {
        let mut rig = Rig::new(&subject.device, engine);
        for op in mixture(subject, &rig, count) {
            rig.prep(op);
        }
        rig.ring().submit(Wait::No).expect("the ring works");
        rig.abandon();
        assert_eq!(rig.holds(), 0, "{count} ops");
    }
    assert_eq!(outstanding(), before);
}

/// A ring that never submitted owes nothing either.
pub fn ops_never_submitted_are_given_back(subject: &Subject, engine: Engine) {
    let mut rig = Rig::new(&subject.device, engine);
    for op in mixture(subject, &rig, 20) {
        rig.prep(op);
    }
    assert_eq!(rig.holds(), 20);
    rig.abandon();
    assert_eq!(rig.holds(), 0);
}

/// Writes are taken back while they fly: each still ends once, and its blocks are as they were or
/// as it wrote them, as its outcome says. A device that cannot take ops back ends all of them as
/// if it had not been asked.
pub fn an_op_taken_back_comes_back_once_and_did_nothing_or_all(subject: &Subject, engine: Engine) {
    const COUNT: usize = 64;
    let (block, per_block) = (block(subject), sectors(subject));
    let mut rig = Rig::new(&subject.device, engine);
    let run = |index: usize| [(index * block, block)];
    let sector = |index: usize| index as u64 * per_block;
    rig.fill(&[(0, COUNT * block)], &vec![0x11; COUNT * block]);
    let old = (0..COUNT).map(|at| rig.write_op(sector(at), &run(at), Durability::Cached));
    let old = old.collect();
    rig.run_all(old);
    rig.fill(&[(0, COUNT * block)], &vec![0x22; COUNT * block]);
    let mut tags = Vec::new();
    for index in 0..COUNT {
        let op = rig.write_op(sector(index), &run(index), Durability::Cached);
        tags.push(rig.prep(op));
    }
    // Some before the kernel heard of them, some after, some twice; and one that nobody knows.
    for tag in tags.iter().take(COUNT / 4) {
        rig.abort(*tag);
    }
    rig.ring().submit(Wait::No).expect("the ring works");
    for tag in tags.iter().skip(COUNT / 8).take(COUNT / 2) {
        rig.abort(*tag);
    }
    rig.abort(Tag(tags.iter().map(|tag| tag.0).max().unwrap_or(0) + 1));
    let ended = rig.drain();
    assert_eq!(ended.len(), COUNT, "each comes back");
    for (tag, moved, outcome) in ended {
        let index = tags.iter().position(|known| *known == tag);
        let index = index.expect("its tag is one of them");
        let taken_back = outcome.is_err();
        if taken_back {
            assert_eq!(outcome, Err(IoError::Aborted), "op {index}");
            assert_eq!(subject.device.capabilities().abort, Abort::Possible);
        }
        assert!(!taken_back || moved == 0, "op {index} moved {moved} bytes");
        assert!(!taken_back || index < COUNT / 8 + COUNT / 2, "nobody asked");
        rig.fill(&run(index), &vec![0; block]);
        let op = rig.read_op(sector(index), &run(index));
        assert_eq!(rig.run(op), Ok(()));
        if subject.contents == Contents::Kept {
            let wanted = if taken_back { 0x11 } else { 0x22 };
            assert_eq!(rig.peek(&run(index)), vec![wanted; block], "op {index}");
        }
    }
}
