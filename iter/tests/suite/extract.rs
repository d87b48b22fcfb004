//! Extraction, bounce buffers and holds: what is used is given back, exactly once, on every path.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;

use iov_iter::{
    Dest, ExtractErrorKind, HoldFlags, IovIter, MemoryNeeds, Pools, Source, Stability, View,
};

use crate::guest::{FRONT_END_BASE, Guest, assert_outstanding};

const SIZE: u64 = 0x400_0000;
const STABLE: MemoryNeeds = MemoryNeeds {
    address_align: 1,
    len_align: 1,
    stability: Stability::Stable,
};
const SECTORS: MemoryNeeds = MemoryNeeds {
    address_align: 512,
    len_align: 512,
    stability: Stability::AsIs,
};

fn dest(guest: &Guest, ranges: &[(u64, u32)]) -> IovIter<Dest> {
    IovIter::guest(&guest.view, ranges).unwrap()
}

#[test]
fn aligned_memory_is_extracted_where_it_lies() {
    let guest = Guest::new(&[(0, SIZE)]);
    let mut iter = dest(&guest, &[(0x1000, 512), (0x3000, 1024), (0x5000, 512)]);
    let mut held = iter.extract(guest.view.hold(), 1536, &SECTORS).unwrap();
    assert_eq!(
        (held.len(), held.is_empty(), iter.count()),
        (1536, false, 512)
    );
    let lens: Vec<_> = held.vectors().iter().map(|v| v.iov_len).collect();
    assert_eq!(
        (lens, held.hold().flags()),
        (vec![512, 1024], HoldFlags::REFFED)
    );
    let first = held.vectors()[0].iov_base;
    held.advance(100);
    assert_eq!(held.vectors()[0].iov_base, first.wrapping_byte_add(100));
    held.advance(412);
    assert_eq!((held.vectors().len(), held.len()), (1, 1024));
    held.advance(usize::MAX);
    assert_eq!(
        (held.vectors().len(), held.len(), held.moved()),
        (0, 0, 1536)
    );
    assert!(held.is_empty());
}

#[test]
fn neighbours_in_a_region_become_one_vector_and_neighbours_across_do_not() {
    let guest = Guest::new(&[(0, 0x8000), (0x8000, 0x8000)]);
    // 256 bytes each is no sector, but the two of them are one.
    let mut iter = dest(
        &guest,
        &[(0x1000, 256), (0x1100, 256), (0x7e00, 512), (0x8000, 512)],
    );
    let held = iter
        .extract(guest.view.hold(), usize::MAX, &SECTORS)
        .unwrap();
    let lens: Vec<_> = held.vectors().iter().map(|v| v.iov_len).collect();
    assert_eq!((lens, held.is_bounced()), (vec![512, 512, 512], false));
    // The segments, for the log, are still the driver's.
    assert_eq!(iter.segments().count(), 4);
}

#[test]
fn regions_that_are_neighbours_in_the_daemon_stay_two_vectors() {
    let regions: Vec<_> = (0..8).map(|i| (i * 0x8000, 0x8000)).collect();
    let start = |guest: &Guest, i: usize| {
        guest.table.regions()[i]
            .slice(0, 1)
            .unwrap()
            .ptr_guard()
            .as_ptr()
            .addr()
    };
    // Where the kernel maps a region is its own affair; it often fills up from the top down.
    let (guest, low, high) = (0..1000)
        .find_map(|_| {
            let guest = Guest::new(&regions);
            let pairs = (0..8).flat_map(|low| (0..8).map(move |high| (low, high)));
            let next =
                |(low, high): &(usize, usize)| start(&guest, *low) + 0x8000 == start(&guest, *high);
            let (low, high) = pairs.into_iter().find(next)?;
            Some((guest, low as u64, high as u64))
        })
        .expect("two of eight mappings are neighbours");
    let ends = [(low * 0x8000 + 0x7e00, 512), (high * 0x8000, 512)];
    let held = dest(&guest, &ends)
        .extract(guest.view.hold(), 1024, &SECTORS)
        .unwrap();
    let [first, second] = held.vectors() else {
        panic!("{held:?}")
    };
    assert_eq!(first.iov_base.wrapping_byte_add(512), second.iov_base);
}

#[test]
fn more_segments_than_one_call_of_the_kernel_takes() {
    let guest = Guest::new(&[(0, SIZE)]);
    let ranges: Vec<_> = (0..1500).map(|i| (i * 1024, 512)).collect();
    let mut iter = dest(&guest, &ranges);
    let mut held = iter
        .extract(guest.view.hold(), usize::MAX, &SECTORS)
        .unwrap();
    assert_eq!((held.vectors().len(), held.is_bounced()), (1500, false));
    for (i, slice) in held.slices().enumerate() {
        slice.copy_from(&[i as u8; 512]);
    }
    held.advance(1024 * 512);
    assert_eq!(held.vectors().len(), 476);
    drop(held.land(1500 * 512));
    for (i, (at, _)) in ranges.iter().enumerate() {
        assert_eq!(
            guest.read(*at, 513)[..],
            [&[i as u8; 512][..], &[0]].concat()
        );
    }
}

#[test]
fn what_no_copy_mends_is_refused() {
    let guest = Guest::new(&[(0, SIZE)]);
    let mut iter = dest(&guest, &[(0x1000, 1000)]);
    let refused = iter.extract(guest.view.hold(), 1000, &SECTORS).unwrap_err();
    let misaligned = ExtractErrorKind::Misaligned {
        len: 1000,
        align: 512,
    };
    assert_eq!(
        (refused.kind, iter.count(), guest.view.holds()),
        (misaligned, 1000, 1)
    );
    assert_eq!(
        refused.to_string(),
        "1000 bytes are not a multiple of the 512 that the device needs"
    );
}

#[test]
fn the_budget_is_fixed_and_shared_and_refills() {
    let guest = Guest::with_bounce(&[(0, SIZE)], 3 * 4096);
    let mut iters: Vec<_> = (0..4)
        .map(|i| dest(&guest, &[(i * 0x1000, 4096)]))
        .collect();
    let mut extract = |i: usize| iters[i].extract(guest.view.hold(), 4096, &STABLE);
    let mut held: Vec<_> = (0..3).map(|i| extract(i).unwrap()).collect();
    assert_eq!(guest.pools.bounce_in_use(), 3 * 4096);
    let refused = extract(3).unwrap_err();
    assert_eq!(refused.kind, ExtractErrorKind::NoBounce { len: 4096 });
    assert_eq!(refused.hold.flags(), HoldFlags::REFFED);
    drop(refused);
    drop(held.swap_remove(1).land(0));
    assert_eq!(guest.pools.bounce_in_use(), 2 * 4096);
    held.push(extract(3).unwrap());
    drop(held);
    assert_eq!((guest.pools.bounce_in_use(), guest.view.holds()), (0, 0));
    assert_outstanding(0);
}

#[test]
fn idle_buffers_of_one_size_make_room_for_another() {
    let guest = Guest::with_bounce(&[(0, SIZE)], 64 << 10);
    for round in 0..3 {
        for (at, len) in [(0, 64 << 10), (0x1000, 4096), (0x8000, 20_000), (0, 1)] {
            let mut iter = dest(&guest, &[(at, len)]);
            let held = iter
                .extract(guest.view.hold(), usize::MAX, &STABLE)
                .unwrap();
            assert!(held.is_bounced(), "{round}");
            let (used, allocated) = (guest.pools.bounce_in_use(), guest.pools.bounce_allocated());
            assert!(used >= len as usize && used <= allocated && allocated <= 64 << 10);
            drop(held);
        }
    }
    let mut iter = dest(&guest, &[(0, (64 << 10) + 1)]);
    let refused = iter
        .extract(guest.view.hold(), usize::MAX, &STABLE)
        .unwrap_err();
    assert_eq!(
        refused.kind,
        ExtractErrorKind::NoBounce {
            len: (64 << 10) + 1
        }
    );
}

#[test]
fn the_largest_request_bounces_and_one_byte_more_does_not() {
    let guest = Guest::new(&[(0, SIZE)]);
    let mut iter = dest(&guest, &[(1, 16 << 20)]);
    let held = iter
        .extract(guest.view.hold(), usize::MAX, &SECTORS)
        .unwrap();
    let address = held.vectors()[0].iov_base.addr();
    assert_eq!(
        (held.vectors().len(), address % 4096, held.len()),
        (1, 0, 16 << 20)
    );
    assert_eq!(guest.pools.bounce_in_use(), 16 << 20);
    drop(held);
    let mut iter = dest(&guest, &[(1, (16 << 20) + 512)]);
    let refused = iter
        .extract(guest.view.hold(), usize::MAX, &SECTORS)
        .unwrap_err();
    assert_eq!(
        refused.kind,
        ExtractErrorKind::NoBounce {
            len: (16 << 20) + 512
        }
    );
    assert_eq!(iter.count(), (16 << 20) + 512);
}

#[test]
fn a_request_in_parts_has_one_buffer_at_a_time() {
    let guest = Guest::with_bounce(&[(0, SIZE)], 4096);
    let data: Vec<u8> = (0..10_000).map(|i| (i % 253) as u8).collect();
    guest.write(0x1001, &data);
    let mut iter = IovIter::<Source>::guest(&guest.view, &[(0x1001, 10_000)]).unwrap();
    let mut hold = guest.view.hold();
    let mut seen = Vec::new();
    while iter.count() > 0 {
        let held = iter.extract(hold, 4096, &STABLE).unwrap();
        assert_eq!(guest.pools.bounce_in_use(), 4096);
        let mut part = vec![0_u8; held.len()];
        held.slices()
            .for_each(|slice| assert_eq!(slice.copy_to(&mut part), part.len()));
        seen.extend(part);
        hold = held.into_hold();
    }
    assert_eq!(seen, data);
    drop(hold);
    assert_eq!(guest.pools.bounce_in_use(), 0);
    assert_outstanding(0);
}

#[test]
fn a_failed_bounced_read_leaves_the_guest_alone() {
    let guest = Guest::new(&[(0, SIZE)]);
    guest.write(0x1001, &[3; 512]);
    let mut iter = dest(&guest, &[(0x1001, 512)]);
    let held = iter
        .extract(guest.view.hold(), usize::MAX, &SECTORS)
        .unwrap();
    held.slices()
        .for_each(|slice| slice.copy_from(&[9_u8; 512]));
    drop(held.land(0));
    assert_eq!(guest.read(0x1001, 512), [3; 512]);
    // Dropped without landing, as when a connection ends: nothing is copied either.
    iter.revert(512).unwrap();
    let held = iter
        .extract(guest.view.hold(), usize::MAX, &SECTORS)
        .unwrap();
    held.slices()
        .for_each(|slice| slice.copy_from(&[9_u8; 512]));
    drop(held);
    assert_eq!(guest.read(0x1001, 512), [3; 512]);
    assert_eq!(guest.pools.bounce_in_use(), 0);
    assert_outstanding(0);
}

#[test]
fn a_bounced_part_lands_where_it_was_taken_from() {
    let guest = Guest::new(&[(0, SIZE)]);
    let mut iter = dest(&guest, &[(0x1001, 300), (0x3001, 300), (0x5001, 1000)]);
    iter.advance(100);
    let needs = MemoryNeeds {
        address_align: 4096,
        ..MemoryNeeds::NONE
    };
    let held = iter.extract(guest.view.hold(), 1000, &needs).unwrap();
    held.slices()
        .for_each(|slice| slice.copy_from(&[4_u8; 1000]));
    // The iterator's own position has nothing to do with it any more.
    iter.revert(1100).unwrap();
    drop(held.land(900));
    assert_eq!(
        guest.read(0x1001, 301),
        [&[0; 100][..], &[4; 200], &[0]].concat()
    );
    assert_eq!(guest.read(0x3001, 301), [&[4; 300][..], &[0]].concat());
    assert_eq!(
        guest.read(0x5001, 1001),
        [&[4; 400][..], &[0; 601]].concat()
    );
}

#[test]
fn aliasing_segments_are_read_and_written_in_order() {
    let guest = Guest::new(&[(0, SIZE)]);
    guest.write(0x1000, b"abcdefgh");
    let aliases = [(0x1000, 6), (0x1002, 6)];
    let mut source = IovIter::<Source>::guest(&guest.view, &aliases).unwrap();
    let held = source.extract(guest.view.hold(), 12, &STABLE).unwrap();
    let mut seen = [0_u8; 12];
    held.slices()
        .for_each(|slice| assert_eq!(slice.copy_to(&mut seen), 12));
    assert_eq!(&seen, b"abcdefcdefgh");
    let mut iter = dest(&guest, &aliases);
    let held = iter.extract(guest.view.hold(), 12, &STABLE).unwrap();
    held.slices()
        .for_each(|slice| slice.copy_from(b"ABCDEFuvwxyz"));
    drop(held.land(12));
    assert_eq!(guest.read(0x1000, 8), b"ABuvwxyz");
}

#[test]
fn a_hold_keeps_its_table_through_every_change() {
    let guest = Guest::new(&[(0, SIZE)]);
    guest.write(0x1000, b"before");
    let Guest {
        table, pools, view, ..
    } = guest;
    let mut iter = IovIter::<Source>::guest(&view, &[(0x1000, 6)]).unwrap();
    let hold = view.hold();
    let emptied = Arc::new(table.without_region(0, SIZE, FRONT_END_BASE).unwrap());
    let old = Arc::downgrade(&table);
    let new_view = View::new(emptied, pools);
    drop((table, view));
    assert_eq!(new_view.holds(), 0);
    let held = iter.extract(hold, 6, &MemoryNeeds::NONE).unwrap();
    let mut seen = [0_u8; 6];
    held.slices()
        .for_each(|slice| assert_eq!(slice.copy_to(&mut seen), 6));
    assert_eq!((&seen, old.strong_count()), (b"before", 1));
    drop(held);
    assert_eq!(old.strong_count(), 0);
    assert_outstanding(0);
}

#[test]
fn an_unwinding_thread_gives_its_holds_back() {
    let guest = Guest::new(&[(0, SIZE)]);
    let unwound = catch_unwind(AssertUnwindSafe(|| {
        let mut iter = dest(&guest, &[(0x1001, 512)]);
        let _plain = guest.view.hold();
        let _held = iter.extract(guest.view.hold(), 512, &SECTORS).unwrap();
        assert_outstanding(2);
        panic!("in the middle of a request");
    }));
    assert!(unwound.is_err());
    assert_eq!((guest.view.holds(), guest.pools.bounce_in_use()), (0, 0));
    assert_outstanding(0);
}

#[cfg(debug_assertions)]
#[test]
fn the_ledger_counts_every_hold_of_its_thread() {
    use iov_iter::ledger;

    let before = ledger::acquired();
    let guest = Guest::new(&[(0, SIZE)]);
    let holds: Vec<_> = (0..5).map(|_| guest.view.hold()).collect();
    assert_eq!((ledger::outstanding(), ledger::acquired()), (5, before + 5));
    let elsewhere = std::thread::spawn(ledger::outstanding).join().unwrap();
    assert_eq!((elsewhere, guest.view.holds()), (0, 5));
    drop(holds);
    assert_eq!((ledger::outstanding(), ledger::acquired()), (0, before + 5));
}

#[test]
fn pools_outlive_the_views_that_use_them() {
    let pools = Pools::new(1 << 20);
    let guest = Guest::new(&[(0, SIZE)]);
    let view = View::new(Arc::clone(&guest.table), Rc::clone(&pools));
    let ranges: Vec<_> = (0..10).map(|i| (i * 0x1000, 8)).collect();
    let mut iter = IovIter::<Dest>::guest(&view, &ranges).unwrap();
    let held = iter.extract(view.hold(), 80, &STABLE).unwrap();
    drop(view);
    assert_eq!(pools.bounce_in_use(), 4096);
    drop((held, iter));
    assert_eq!((pools.bounce_in_use(), Rc::strong_count(&pools)), (0, 1));
}
