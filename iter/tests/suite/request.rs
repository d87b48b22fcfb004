//! The life of a request's memory, from the walk to the dropped hold.

use iov_iter::{Chain, HoldFlags, MemoryNeeds, Stability};
use vm_memory::VolatileMemory;

use crate::guest::{Desc, Guest, INDIRECT, LIMITS, WRITE, assert_outstanding, link};

const RING: u64 = 0x1000;
const HEADER: u64 = 0x4000;
const DATA: u64 = 0x8000;
const STATUS: u64 = 0x4100;

fn guest() -> Guest {
    Guest::new(&[(0, 1 << 20)])
}

fn read_chain(len: u32) -> Vec<Desc> {
    link(&[(HEADER, 16, 0), (DATA, len, WRITE), (STATUS, 1, WRITE)])
}

#[test]
fn a_read_lands_in_the_guest_and_gives_everything_back() {
    let guest = guest();
    guest.descriptors(RING, &read_chain(4096));
    guest.write(HEADER, b"the header's 16 ");
    let ring = guest.ring(RING, 128);

    let chain = Chain::walk(&guest.view, &ring, 128, 0, &LIMITS).unwrap();
    assert_eq!(chain.head(), 0);
    assert_eq!(guest.view.holds(), 1);
    assert_outstanding(1);
    let (mut source, mut dest, hold) = chain.split();
    let status = dest.take_last_byte().unwrap();
    let mut header = [0; 16];
    source.copy_from_full(&hold, &mut header).unwrap();
    assert_eq!(&header, b"the header's 16 ");
    assert_eq!((source.count(), dest.count()), (0, 4096));

    let held = dest.extract(hold, usize::MAX, &MemoryNeeds::NONE).unwrap();
    assert_eq!(dest.count(), 0);
    assert_eq!(
        (held.len(), held.vectors().len(), held.is_bounced()),
        (4096, 1, false)
    );
    for slice in held.slices() {
        slice.copy_from(&[0x5a_u8; 4096]);
    }
    let hold = held.land(4096);
    assert_eq!(hold.flags(), HoldFlags::REFFED);
    status.write(&hold, 7);
    drop(hold);

    assert_eq!(guest.read(DATA, 4096), [0x5a_u8; 4096]);
    assert_eq!(guest.read(STATUS, 1), [7]);
    assert_eq!(guest.view.holds(), 0);
    assert_outstanding(0);
}

#[test]
fn a_misaligned_read_bounces_and_lands_only_what_arrived() {
    let guest = guest();
    let chain = link(&[(HEADER, 16, 0), (DATA + 1, 1024, WRITE), (STATUS, 1, WRITE)]);
    guest.descriptors(RING, &[Desc::new(0x6003, 48, INDIRECT, 0)]);
    guest.descriptors(0x6003, &chain);
    let ring = guest.ring(RING, 128);
    let chain = Chain::walk(&guest.view, &ring, 128, 0, &LIMITS).unwrap();
    let (_, mut dest, hold) = chain.split();
    let _status = dest.take_last_byte().unwrap();

    let needs = MemoryNeeds {
        address_align: 512,
        len_align: 512,
        stability: Stability::AsIs,
    };
    let mut held = dest.extract(hold, usize::MAX, &needs).unwrap();
    assert!(held.is_bounced());
    assert_eq!(guest.pools.bounce_in_use(), 4096);
    for slice in held.slices() {
        slice.copy_from(&[0xa5_u8; 1024]);
    }
    held.advance(600);
    assert_eq!(
        (held.len(), held.moved(), held.vectors()[0].iov_len),
        (424, 600, 424)
    );
    let hold = held.land(600);
    assert_eq!(hold.flags(), HoldFlags::REFFED | HoldFlags::BOUNCED);
    drop(hold);
    assert_eq!(guest.pools.bounce_in_use(), 0);
    assert_eq!(
        guest.read(DATA, 1026),
        [&[0][..], &[0xa5; 600], &[0; 425]].concat()
    );
}

#[test]
fn a_stable_write_does_not_see_later_changes() {
    let guest = guest();
    guest.descriptors(
        RING,
        &link(&[(DATA, 600, 0), (DATA + 4096, 424, 0), (STATUS, 1, WRITE)]),
    );
    guest.write(DATA, &[1; 600]);
    guest.write(DATA + 4096, &[2; 424]);
    let ring = guest.ring(RING, 128);
    let (mut source, _dest, hold) = Chain::walk(&guest.view, &ring, 128, 0, &LIMITS)
        .unwrap()
        .split();
    let needs = MemoryNeeds {
        stability: Stability::Stable,
        ..MemoryNeeds::NONE
    };
    let held = source.extract(hold, usize::MAX, &needs).unwrap();
    guest.write(DATA, &[9; 600]);
    let mut seen = vec![0_u8; held.len()];
    let slice = held.slices().next().unwrap();
    assert_eq!(slice.get_slice(0, 1024).unwrap().copy_to(&mut seen), 1024);
    assert_eq!(seen, [[1; 600].as_slice(), &[2; 424]].concat());
    drop(held.into_hold());
    assert_outstanding(0);
}
