//! Checks of everything that is not plain data: flush, discard, write-zeroes, refusals.

use super::Subject;
use super::contents::{block, check, noise, read, sectors, write};
use super::rig::Rig;
use crate::{Durability, Engine, Extent, IoError, Op, Sector, Unmap};

const DURABILITIES: [Durability; 2] = [Durability::Cached, Durability::Durable];

/// With nothing written, and after writes.
pub fn a_flush_succeeds(subject: &Subject, engine: Engine) {
    let mut rig = Rig::new(&subject.device, engine);
    for round in 0..3 {
        let op = rig.flush_op();
        assert_eq!(rig.run(op), Ok(()));
        let bytes = noise(round, block(subject));
        write(
            &mut rig,
            round * sectors(subject),
            &[(0, bytes.len())],
            &bytes,
        );
    }
}

/// Durable writes go another way to the kernel, with one segment and with several.
pub fn a_durable_write_is_read(subject: &Subject, engine: Engine) {
    let mut rig = Rig::new(&subject.device, engine);
    let block = block(subject);
    for runs in [vec![(0, 2 * block)], vec![(0, block), (3 * block, block)]] {
        let bytes = noise(runs.len() as u64, 2 * block);
        rig.fill(&runs, &bytes);
        let op = rig.write_op(0, &runs, Durability::Durable);
        assert_eq!(rig.run(op), Ok(()));
        check(
            subject,
            &read(&mut rig, 0, &runs),
            &bytes,
            "a durable write",
        );
    }
}

/// What a discard leaves behind is unspecified, but only where it was asked for. A device that
/// offers none refuses it.
pub fn a_discard_keeps_to_its_range(subject: &Subject, engine: Engine) {
    let mut rig = Rig::new(&subject.device, engine);
    let (block, per_block) = (block(subject), sectors(subject));
    let bytes = noise(0, 96 * block);
    for durability in DURABILITIES {
        for (first, count) in [(0usize, 1usize), (3, 5), (5, 30), (16, 64), (95, 1)] {
            write(&mut rig, 0, &[(0, bytes.len())], &bytes);
            let op = rig.discard_op(first as u64 * per_block, count * block, durability);
            let outcome = rig.run(op);
            match subject.device.capabilities().discard {
                Some(_) => assert_eq!(outcome, Ok(()), "{count} blocks at {first}"),
                None => assert_eq!(outcome, Err(IoError::Unsupported)),
            }
            let got = read(&mut rig, 0, &[(0, bytes.len())]);
            let (start, end) = (first * block, (first + count) * block);
            check(
                subject,
                &got[..start],
                &bytes[..start],
                "before the discard",
            );
            check(subject, &got[end..], &bytes[end..], "after the discard");
        }
    }
}

/// With and without unmap, cached and durable.
pub fn zeroes_are_read_where_they_were_asked_for(subject: &Subject, engine: Engine) {
    let mut rig = Rig::new(&subject.device, engine);
    let (block, per_block) = (block(subject), sectors(subject));
    let bytes = noise(0, 256 * block);
    for (durability, unmap) in DURABILITIES
        .into_iter()
        .flat_map(|durability| [Unmap::Allowed, Unmap::Forbidden].map(|unmap| (durability, unmap)))
    {
        for (first, count) in [(0usize, 1usize), (3, 5), (7, 249)] {
            write(&mut rig, 0, &[(0, bytes.len())], &bytes);
            let op = rig.zero_op(first as u64 * per_block, count * block, unmap, durability);
            assert_eq!(rig.run(op), Ok(()), "{unmap:?}, {count} blocks at {first}");
            let mut expected = bytes.clone();
            expected[first * block..(first + count) * block].fill(0);
            let got = read(&mut rig, 0, &[(0, bytes.len())]);
            check(
                subject,
                &got,
                &expected,
                &format!("{unmap:?} {durability:?}"),
            );
        }
    }
}

/// The block size is the device's to defend: a misaligned range fails, and changes nothing.
pub fn what_is_no_whole_block_is_refused(subject: &Subject, engine: Engine) {
    let mut rig = Rig::new(&subject.device, engine);
    let geometry = subject.device.geometry();
    let block = block(subject);
    let refused = Err(IoError::Misaligned {
        block_size: geometry.block_size,
    });
    let bytes = noise(0, 4 * block);
    write(&mut rig, 0, &[(0, bytes.len())], &bytes);
    let mut extents = vec![Extent::new(Sector(0), block as u64 - 1, geometry.capacity)];
    if block > 512 {
        extents.push(Extent::new(Sector(1), block as u64, geometry.capacity));
        extents.push(Extent::new(Sector(0), 512, geometry.capacity));
        extents.push(Extent::new(
            Sector(sectors(subject)),
            512,
            geometry.capacity,
        ));
    }
    for at in extents {
        let at = at.expect("inside the device");
        let (durability, hold) = (Durability::Cached, rig.hold());
        let op = Op::WriteZeroes {
            at,
            unmap: Unmap::Forbidden,
            durability,
            hold,
        };
        assert_eq!(rig.run(op), refused, "write-zeroes of {at:?}");
        let op = Op::Discard {
            at,
            durability,
            hold: rig.hold(),
        };
        assert_eq!(rig.run(op), refused, "discard of {at:?}");
        // Memory of whole blocks, so that the extent is the only thing wrong.
        let op = Op::Write {
            at,
            from: rig.source(&[(0, block)]),
            durability,
        };
        assert_eq!(rig.run(op), refused, "write of {at:?}");
        let op = Op::Read {
            at,
            into: rig.dest(&[(0, block)]),
        };
        assert_eq!(rig.run(op), refused, "read of {at:?}");
    }
    let got = read(&mut rig, 0, &[(0, bytes.len())]);
    check(subject, &got, &bytes, "nothing changed");
}

/// An op whose memory is longer or shorter than its extent would touch what nobody checked.
pub fn memory_of_another_length_is_refused(subject: &Subject, engine: Engine) {
    let mut rig = Rig::new(&subject.device, engine);
    let block = block(subject);
    let at = rig.extent(0, 2 * block);
    for len in [block, 3 * block] {
        let op = Op::Read {
            at,
            into: rig.dest(&[(0, len)]),
        };
        assert_eq!(rig.run(op), Err(IoError::Os(libc::EINVAL)));
        let from = rig.source(&[(0, len)]);
        let op = Op::Write {
            at,
            from,
            durability: Durability::Cached,
        };
        assert_eq!(rig.run(op), Err(IoError::Os(libc::EINVAL)));
    }
}

/// Discarding or zeroing nothing is done at once.
pub fn empty_ranges_succeed(subject: &Subject, engine: Engine) {
    let mut rig = Rig::new(&subject.device, engine);
    for durability in DURABILITIES {
        let op = rig.zero_op(0, 0, Unmap::Allowed, durability);
        assert_eq!(rig.run(op), Ok(()));
        if subject.device.capabilities().discard.is_some() {
            let op = rig.discard_op(0, 0, durability);
            assert_eq!(rig.run(op), Ok(()));
        }
    }
}
