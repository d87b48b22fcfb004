//! Checks of claims: a device is had, handed over and had again, and nothing of it is lost.

use super::contents::{block, sectors};
use super::rig::Rig;
use super::{Contents, Subject};
use crate::{Claim, Durability, Engine};

/// A claim holds however often it is made, is given back however often that is asked, and can be
/// had again; what was written under it is there whatever the caches were told.
pub fn what_was_written_outlives_every_claim(subject: &Subject, engine: Engine) {
    let device = &subject.device;
    let (block, per_block) = (block(subject), sectors(subject));
    let mut rig = Rig::new(device, engine);
    let worked = |result: std::io::Result<()>, what: &str| {
        assert!(result.is_ok(), "{what}: {result:?}");
    };
    worked(device.release(), "giving back what is not held");
    for round in 0..3_u8 {
        for _ in 0..2 {
            let claim = device.claim();
            assert!(
                matches!(claim, Ok(Claim::Held)),
                "nobody else has it in round {round}: {claim:?}"
            );
        }
        let sector = u64::from(round) * per_block;
        rig.fill(&[(0, block)], &vec![round + 1; block]);
        let op = rig.write_op(sector, &[(0, block)], Durability::Cached);
        assert_eq!(rig.run(op), Ok(()));
        match round {
            0 => worked(device.sync(), "a sync"),
            // Claimed once more: what is dirty in a cache is not dropped with it.
            1 => assert!(device.claim().is_ok()),
            _ => {}
        }
        worked(device.release(), "giving back");
        worked(device.release(), "giving back twice");
    }
    for round in 0..3_u8 {
        rig.fill(&[(0, block)], &vec![0; block]);
        let op = rig.read_op(u64::from(round) * per_block, &[(0, block)]);
        assert_eq!(rig.run(op), Ok(()));
        if subject.contents == Contents::Kept {
            assert_eq!(rig.peek(&[(0, block)]), vec![round + 1; block]);
        }
    }
}
