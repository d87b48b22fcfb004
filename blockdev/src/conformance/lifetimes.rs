//! Checks of ownership: every op comes back once, and every hold is given back.

use std::collections::HashSet;

use super::contents::{block, blocks, moves_data, sectors};
use super::rig::Rig;
use super::{Subject, outstanding};
use crate::{Durability, Engine, Op, Unmap, Wait};

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
