//! Checks of data: what is read is what was written.

use std::sync::Arc;

use super::rig::{MEMORY, Rig, Run, total};
use super::{Contents, LEAST_SIZE, Subject};
use crate::{Durability, Engine, Op, SECTOR_SHIFT, Unmap};

/// Writes bytes from the runs to `sector`.
pub(super) fn write(rig: &mut Rig, sector: u64, runs: &[Run], bytes: &[u8]) {
    rig.fill(runs, bytes);
    let op = rig.write_op(sector, runs, Durability::Cached);
    assert_eq!(rig.run(op), Ok(()), "write at sector {sector}");
}

/// Reads into the runs, which hold something else before.
pub(super) fn read(rig: &mut Rig, sector: u64, runs: &[Run]) -> Vec<u8> {
    rig.fill(runs, &vec![STALE; total(runs)]);
    let op = rig.read_op(sector, runs);
    assert_eq!(rig.run(op), Ok(()), "read at sector {sector}");
    rig.peek(runs)
}

/// Checks what a read gave against what a device should hold.
pub(super) fn check(subject: &Subject, read: &[u8], written: &[u8], what: &str) {
    match subject.contents {
        Contents::Kept => {
            let wrong = read
                .iter()
                .zip(written)
                .position(|(read, written)| read != written);
            assert_eq!(
                wrong,
                None,
                "{what}: the first wrong byte of {}",
                written.len()
            );
            assert_eq!(read.len(), written.len(), "{what}");
        }
        Contents::Ignored => {
            assert!(
                read.iter().all(|byte| *byte == STALE),
                "{what}: memory stays as it is"
            );
        }
    }
}

/// Reproducible noise.
pub(super) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut bytes = vec![0; len];
    rng.fill(&mut bytes);
    bytes
}

/// Bytes of a block.
pub(super) fn block(subject: &Subject) -> usize {
    subject.device.geometry().block_size as usize
}

/// Sectors of a block.
pub(super) fn sectors(subject: &Subject) -> u64 {
    u64::from(subject.device.geometry().block_size) >> SECTOR_SHIFT
}

/// Blocks the suite works on.
pub(super) fn blocks(subject: &Subject) -> u64 {
    LEAST_SIZE / block(subject) as u64
}

/// Runs of `block` bytes each with a gap between them, so that none join into one.
fn apart(count: usize, len: usize, gap: usize) -> Vec<Run> {
    (0..count).map(|index| (index * (len + gap), len)).collect()
}

/// One segment, many offsets and lengths.
pub fn what_was_written_is_read(subject: &Subject, engine: Engine) {
    let mut rig = Rig::new(&subject.device, engine);
    let block = block(subject);
    for (number, blocks) in [1usize, 2, 3, 8, 64, 1000].into_iter().enumerate() {
        let len = (blocks * block).min(4 << 20);
        let sector = number as u64 * 7 * sectors(subject);
        let bytes = noise(number as u64, len);
        write(&mut rig, sector, &[(0, len)], &bytes);
        let got = read(&mut rig, sector, &[(8 << 20, len)]);
        check(subject, &got, &bytes, &format!("{blocks} blocks"));
    }
}

/// From one segment to more than one call takes (1024).
pub fn segments_of_every_shape_are_moved(subject: &Subject, engine: Engine) {
    let mut rig = Rig::new(&subject.device, engine);
    let block = block(subject);
    for (number, count) in [1usize, 2, 7, 130, 1025, 1500].into_iter().enumerate() {
        let len = block
            .min(LEAST_SIZE as usize / 2 / count / block * block)
            .max(block);
        let runs = apart(count, len, block);
        let bytes = noise(100 + number as u64, total(&runs));
        write(&mut rig, sectors(subject), &runs, &bytes);
        let one = [(MEMORY / 2, bytes.len())];
        check(
            subject,
            &read(&mut rig, sectors(subject), &one),
            &bytes,
            "written in segments",
        );
        check(
            subject,
            &read(&mut rig, sectors(subject), &runs),
            &bytes,
            "read in segments",
        );
    }
}

/// Odd addresses and odd lengths: what the device cannot take as it is goes through a bounce
/// buffer.
pub fn memory_of_any_alignment_is_moved(subject: &Subject, engine: Engine) {
    let mut rig = Rig::new(&subject.device, engine);
    let block = block(subject);
    let shapes: [Vec<Run>; 4] = [
        vec![(1, 4 * block)],
        vec![(3, block - 1), (2 * block, 1)],
        vec![(0, 1), (block + 5, 2 * block - 2), (4 * block, 1)],
        (0..64)
            .map(|index| (index * 1000 + 1, 2 * block / 64))
            .collect(),
    ];
    for (number, runs) in shapes.iter().enumerate() {
        let bytes = noise(200 + number as u64, total(runs));
        write(&mut rig, 0, runs, &bytes);
        check(
            subject,
            &read(&mut rig, 0, runs),
            &bytes,
            "unaligned both ways",
        );
        let aligned = [(MEMORY / 2, bytes.len())];
        check(
            subject,
            &read(&mut rig, 0, &aligned),
            &bytes,
            "aligned again",
        );
    }
}

/// The end of the device is as good as its start.
pub fn the_last_block_is_a_block(subject: &Subject, engine: Engine) {
    let mut rig = Rig::new(&subject.device, engine);
    let capacity = subject.device.geometry().capacity.0;
    let sector = capacity - sectors(subject);
    let runs = [(0, block(subject))];
    let bytes = noise(300, total(&runs));
    write(&mut rig, sector, &runs, &bytes);
    check(
        subject,
        &read(&mut rig, sector, &runs),
        &bytes,
        "the last block",
    );
    assert!(crate::Extent::new(crate::Sector(capacity), 1, crate::Sector(capacity)).is_err());
}

/// Writes, zeroes and reads at random places, against a plain vector.
pub fn random_ops_match_a_model(subject: &Subject, engine: Engine) {
    let mut rig = Rig::new(&subject.device, engine);
    let mut rng = fastrand::Rng::with_seed(400);
    let (block, per_block) = (block(subject), sectors(subject));
    let blocks = 256.min(blocks(subject)) as usize;
    let mut model = noise(401, blocks * block);
    write(&mut rig, 0, &[(0, model.len())], &model);
    for round in 0..300 {
        let first = rng.usize(0..blocks);
        let count = rng.usize(1..=(blocks - first).min(16));
        let (start, len) = (first * block, count * block);
        let sector = first as u64 * per_block;
        let runs = apart(rng.usize(1..=4), len, rng.usize(0..3) * block);
        let run = &runs[rng.usize(0..runs.len())..][..1];
        match rng.u8(0..3) {
            0 => {
                let bytes = noise(round, len);
                write(&mut rig, sector, run, &bytes);
                model[start..start + len].copy_from_slice(&bytes);
            }
            1 if subject.device.capabilities().write_zeroes.is_some() => {
                let unmap = if rng.bool() {
                    Unmap::Allowed
                } else {
                    Unmap::Forbidden
                };
                let op = rig.zero_op(sector, len, unmap, Durability::Cached);
                assert_eq!(rig.run(op), Ok(()));
                model[start..start + len].fill(0);
            }
            _ => {
                let got = read(&mut rig, sector, run);
                check(
                    subject,
                    &got,
                    &model[start..start + len],
                    &format!("round {round}"),
                );
            }
        }
    }
    let got = read(&mut rig, 0, &[(0, model.len())]);
    check(subject, &got, &model, "at the end");
}

/// Two workers with a ring each, on threads of their own: what one wrote the other reads, and what
/// each writes for itself stays.
pub fn channels_see_each_others_writes(subject: &Subject, engine: Engine) {
    let (block, per_block) = (block(subject), sectors(subject));
    let len = 8 * block;
    let bytes_of = |worker: u64, round: u64| noise(500 + worker * 1000 + round, len);
    std::thread::scope(|scope| {
        for worker in 0..4u64 {
            let device = Arc::clone(&subject.device);
            let contents = subject.contents;
            scope.spawn(move || {
                let own = Subject {
                    device,
                    contents,
                    keep: Box::new(()),
                };
                let mut rig = Rig::new(&own.device, engine);
                for round in 0..20 {
                    let sector = (worker * 20 + round) * 8 * per_block;
                    let bytes = noise(500 + worker * 1000 + round, len);
                    write(&mut rig, sector, &[(0, len)], &bytes);
                    check(
                        &own,
                        &read(&mut rig, sector, &[(0, len)]),
                        &bytes,
                        "one's own",
                    );
                }
            });
        }
    });
    let mut rig = Rig::new(&subject.device, engine);
    for worker in 0..4 {
        for round in 0..20 {
            let sector = (worker * 20 + round) * 8 * per_block;
            let got = read(&mut rig, sector, &[(0, len)]);
            check(subject, &got, &bytes_of(worker, round), "another's");
        }
    }
}

/// Whether an op is one of those that move data.
pub(super) fn moves_data(op: &Op) -> bool {
    op.payload() > 0
}

/// What memory holds before it is read into.
const STALE: u8 = 0xee;
