//! The vring suite: what every layout and every state has to do.

use std::sync::Arc;

use iov_iter::MemoryTable;
use proptest::prelude::*;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::inflight::Region;
use crate::limits::MAX_VRING_SIZE;
use crate::testing::{DriverRing, FRONT_END, Log, Ram};
use crate::worker::{Enablement, StopMode, VringSetup};

const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
/// No page is marked.
const NONE: [u64; 0] = [];
/// VHOST_F_LOG_ALL.
const LOG_ALL: u64 = 1 << 26;

fn ring(size: u16) -> (Ram, DriverRing) {
    (Ram::new(2 << 20), DriverRing::new(0, size))
}

fn split(ram: &Ram, driver: &DriverRing, start: u16, features: u64) -> Split {
    driver.put_used_index(ram, start);
    driver.put_avail_index(ram, start);
    Split::new(driver.areas(ram), driver.size, start, features)
}

/// Makes `heads` available from `index` on.
fn offer(ram: &Ram, driver: &DriverRing, index: u16, heads: &[u16]) -> u16 {
    let mut index = index;
    for head in heads {
        driver.put_avail(ram, index, *head);
        index = index.wrapping_add(1);
    }
    driver.put_avail_index(ram, index);
    index
}

fn drain(split: &mut Split) -> Vec<u16> {
    std::iter::from_fn(|| split.pop()).collect()
}

#[test]
fn heads_come_in_the_order_of_the_avail_ring() {
    for size in [1, 2, 256, MAX_VRING_SIZE] {
        for start in [0, 1, 0xfffe, 0xffff, 0x8000] {
            let (ram, driver) = ring(size);
            let mut split = split(&ram, &driver, start, 0);
            assert_eq!(split.refresh(), Ok(0));
            assert_eq!(split.pop(), None);
            let heads: Vec<u16> = (0..size).rev().collect();
            let end = offer(&ram, &driver, start, &heads);
            assert_eq!(split.pop(), None, "nothing is popped that was not seen");
            assert_eq!(split.refresh(), Ok(size));
            assert_eq!(drain(&mut split), heads);
            assert_eq!(split.next_avail(), end);
        }
    }
}

#[test]
fn an_avail_index_beyond_the_ring_is_broken() {
    let (ram, driver) = ring(8);
    let mut split = split(&ram, &driver, 0xfffc, 0);
    driver.put_avail_index(&ram, 0xfffc_u16.wrapping_add(8));
    assert_eq!(split.refresh(), Ok(8));
    driver.put_avail_index(&ram, 0xfffc_u16.wrapping_add(9));
    let broken = AvailBroken {
        index: 5,
        next: 0xfffc,
        size: 8,
    };
    assert_eq!(split.refresh(), Err(broken));
    assert_eq!(split.arm_kick(), Err(broken));
    assert_eq!(
        broken.to_string(),
        "avail index 5 is 9 ahead of 65532, in a ring of 8"
    );
    driver.put_avail_index(&ram, 0xfffb);
    assert!(
        split.refresh().is_err(),
        "an index that went back is broken too"
    );
}

#[test]
fn used_elements_are_seen_only_when_published() {
    let (ram, driver) = ring(4);
    let mut split = split(&ram, &driver, 0xffff, 0);
    for (head, len) in [(3, 513), (1, 1), (0, u32::MAX)] {
        split.push_used(Used { head, len });
    }
    assert_eq!((driver.used_index(&ram), split.unpublished()), (0xffff, 3));
    assert!(split.publish(), "the flags do not forbid the call");
    assert_eq!((driver.used_index(&ram), split.unpublished()), (2, 0));
    assert_eq!(driver.used_element(&ram, 0xffff), (3, 513));
    assert_eq!(driver.used_element(&ram, 0), (1, 1));
    assert_eq!(driver.used_element(&ram, 1), (0, u32::MAX));
}

#[test]
fn flags_suppress_calls_and_kicks() {
    let (ram, driver) = ring(4);
    let mut split = split(&ram, &driver, 0, 0);
    driver.put_avail_flags(&ram, 1);
    split.push_used(Used { head: 0, len: 0 });
    assert!(!split.publish(), "VRING_AVAIL_F_NO_INTERRUPT");
    split.suppress_kicks();
    assert_eq!(driver.used_flags(&ram), 1, "VRING_USED_F_NO_NOTIFY");
    assert_eq!(split.arm_kick(), Ok(0));
    assert_eq!(driver.used_flags(&ram), 0);
    offer(&ram, &driver, 0, &[2]);
    assert_eq!(split.arm_kick(), Ok(1), "what came while arming is seen");
}

#[test]
fn event_indices_ask_for_the_next_chain() {
    let (ram, driver) = ring(4);
    let mut split = split(&ram, &driver, 7, EVENT_IDX);
    split.suppress_kicks();
    assert_eq!(
        driver.used_flags(&ram),
        0,
        "flags are not used with event indices"
    );
    assert_eq!(split.arm_kick(), Ok(0));
    assert_eq!(driver.avail_event(&ram), 7);
    offer(&ram, &driver, 7, &[1, 2]);
    assert_eq!(split.arm_kick(), Ok(2));
    assert_eq!(drain(&mut split), [1, 2]);
    assert_eq!(split.arm_kick(), Ok(0));
    assert_eq!(driver.avail_event(&ram), 9);
}

#[test]
fn the_first_batch_after_a_start_is_always_told() {
    let (ram, driver) = ring(4);
    let mut split = split(&ram, &driver, 100, EVENT_IDX);
    driver.put_used_event(&ram, 50);
    split.push_used(Used { head: 0, len: 0 });
    assert!(
        split.publish(),
        "what the driver was told before is not known"
    );
    split.push_used(Used { head: 1, len: 0 });
    assert!(!split.publish(), "index 50 has long passed");
}

proptest! {
    /// The driver asks for a call at some index; whatever the batches are, it is told exactly when
    /// the used index passes it.
    #[test]
    fn a_call_is_made_when_its_index_is_passed(
        start: u16,
        ahead in 0_u16..64,
        batches in prop::collection::vec(1_u16..16, 1..12),
    ) {
        let (ram, driver) = ring(64);
        let mut split = split(&ram, &driver, start, EVENT_IDX);
        split.push_used(Used { head: 0, len: 0 });
        let _first = split.publish();
        let mut index = start.wrapping_add(1);
        let event = index.wrapping_add(ahead);
        driver.put_used_event(&ram, event);
        let mut left = u32::from(ahead) + 1;
        for batch in batches {
            for _ in 0..batch {
                split.push_used(Used { head: 0, len: 0 });
            }
            index = index.wrapping_add(batch);
            let passes = left > 0 && left <= u32::from(batch);
            left = left.saturating_sub(u32::from(batch));
            prop_assert_eq!(split.publish(), passes, "event {} index {}", event, index);
        }
    }
}

#[test]
fn sizes_are_powers_of_two_within_the_limit() {
    for size in [1, 2, 1024, u32::from(MAX_VRING_SIZE)] {
        assert_eq!(u32::from(check_size(size).unwrap()), size);
    }
    for size in [
        0,
        3,
        1023,
        u32::from(MAX_VRING_SIZE) + 1,
        65536,
        1 << 17,
        u32::MAX,
    ] {
        assert!(
            matches!(check_size(size), Err(VringError::Size(s)) if s == size),
            "{size}"
        );
    }
}

#[test]
fn each_part_has_to_lie_in_one_region() {
    let ram = Ram::split(&[(0, 0x1000), (0x1000, 0x1000)]);
    let good = Addresses {
        desc: FRONT_END,
        avail: FRONT_END + 0x800,
        used: FRONT_END + 0x1000,
    };
    assert!(
        resolve(&good, 16, &ram.table).is_ok(),
        "parts may be in different regions"
    );
    let across = Addresses {
        desc: FRONT_END + 0xff0,
        ..good
    };
    let outside = Addresses {
        used: FRONT_END + 0x1ff0,
        ..good
    };
    let nowhere = Addresses { avail: 0, ..good };
    for (wrong, name) in [
        (across, "descriptor table"),
        (outside, "used ring"),
        (nowhere, "avail ring"),
    ] {
        match resolve(&wrong, 16, &ram.table) {
            Err(VringError::Unmapped { part, .. }) => assert_eq!(part, name),
            other => panic!("{name}: {other:?}"),
        }
    }
}

#[test]
fn each_part_has_to_be_aligned() {
    let ram = Ram::new(0x10000);
    let good = Addresses {
        desc: FRONT_END,
        avail: FRONT_END + 0x1000,
        used: FRONT_END + 0x2000,
    };
    let desc = Addresses {
        desc: FRONT_END + 8,
        ..good
    };
    let avail = Addresses {
        avail: FRONT_END + 0x1001,
        ..good
    };
    let used = Addresses {
        used: FRONT_END + 0x2002,
        ..good
    };
    for wrong in [desc, avail, used] {
        let found = resolve(&wrong, 16, &ram.table);
        assert!(
            matches!(found, Err(VringError::Unusable { .. })),
            "{found:?}"
        );
    }
}

fn setup(driver: &DriverRing, next_avail: u16) -> (VringSetup, EventFd, EventFd) {
    let event = || EventFd::new(EFD_NONBLOCK).unwrap();
    let (kick, err) = (event(), event());
    let setup = VringSetup {
        size: driver.size,
        addresses: driver.addresses(),
        next_avail,
        inflight: None,
        log_used: None,
        features: 0,
        enablement: Enablement::Enabled,
        kick: Some(kick.try_clone().unwrap()),
        call: None,
        err: Some(err.try_clone().unwrap()),
    };
    (setup, kick, err)
}

#[test]
fn a_stop_waits_for_what_is_in_flight() {
    let (ram, driver) = ring(8);
    let (setup, kick, _) = setup(&driver, 0);
    let mut started = Stopped::start(setup, &ram.table).unwrap();
    offer(&ram, &driver, 0, &[5, 6, 7]);
    kick.write(1).unwrap();
    assert_eq!(started.pop(), Ok(Some(5)));
    assert_eq!(started.pop(), Ok(Some(6)));
    assert_eq!(started.in_flight(), 2);
    let draining = started.drain(StopMode::Drain);
    let mut draining = draining.try_finish().expect_err("two requests are out");
    assert!(draining.vring.settle(Some(Used { head: 5, len: 1 })));
    assert!(
        !draining.vring.settle(Some(Used { head: 6, len: 1 })),
        "the batch began before"
    );
    assert!(draining.vring.publish());
    let (stopped, _) = draining.try_finish().expect("nothing is out");
    assert_eq!(stopped.next_avail(), 2);
    assert_eq!(driver.used_index(&ram), 2);
    assert_eq!(
        kick.read().unwrap(),
        1,
        "chain 7 waits: the kick is left for the next owner"
    );
}

#[test]
fn a_kick_that_was_served_is_not_left_behind() {
    let (ram, driver) = ring(8);
    let (setup, kick, _) = setup(&driver, 0);
    let mut started = Stopped::start(setup, &ram.table).unwrap();
    offer(&ram, &driver, 0, &[5]);
    kick.write(1).unwrap();
    assert_eq!(started.pop(), Ok(Some(5)));
    started.settle(Some(Used { head: 5, len: 1 }));
    let (stopped, _) = started
        .drain(StopMode::Drain)
        .try_finish()
        .expect("nothing is out");
    assert_eq!(stopped.next_avail(), 1);
    assert!(kick.read().is_err(), "the counter is empty");
}

/// A driver that is asked not to kick does not, and the next owner of the vring has to hear of what
/// it made available all the same; so has it where nobody was asked anything since an earlier owner
/// was killed.
#[test]
fn a_stop_hands_over_the_kick_that_was_not_made() {
    for features in [0, EVENT_IDX] {
        for looked_at in [true, false] {
            for waiting in [true, false] {
                let (ram, driver) = ring(8);
                let (mut setup, kick, _) = setup(&driver, 0);
                setup.features = features;
                let mut started = Stopped::start(setup, &ram.table).unwrap();
                if looked_at {
                    started.suppress_kicks();
                }
                assert!(!started.is_armed());
                if waiting {
                    offer(&ram, &driver, 0, &[5]);
                }
                let draining = started.drain(StopMode::Drain);
                let (stopped, _) = draining.try_finish().expect("nothing is out");
                assert_eq!(stopped.next_avail(), 0);
                assert_eq!(kick.read().is_ok(), waiting, "for the next owner");
            }
        }
    }
}

#[test]
fn a_broken_vring_tells_the_front_end_and_is_not_popped() {
    let (ram, driver) = ring(8);
    let (setup, _, err) = setup(&driver, 0);
    let mut started = Stopped::start(setup, &ram.table).unwrap();
    assert!(started.may_pop());
    driver.put_avail_index(&ram, 9);
    assert!(started.pop().is_err());
    started.break_down();
    assert!(!started.may_pop());
    assert_eq!(err.read().unwrap(), 1);
}

#[test]
fn a_vring_goes_on_in_another_mapping() {
    let (ram, driver) = ring(8);
    let (setup, _, _) = setup(&driver, 0);
    let mut started = Stopped::start(setup, &ram.table).unwrap();
    offer(&ram, &driver, 0, &[1]);
    assert_eq!(started.pop(), Ok(Some(1)));
    let other = Ram::new(2 << 20);
    offer(&other, &driver, 1, &[2]);
    started.rebase(&other.table).unwrap();
    assert_eq!(started.pop(), Ok(Some(2)));
    started.settle(Some(Used { head: 1, len: 4 }));
    assert!(started.publish());
    assert_eq!(driver.used_element(&other, 0), (1, 4));
    assert_eq!(driver.used_index(&ram), 0, "the old memory is not touched");
    assert!(started.rebase(&Arc::new(MemoryTable::empty())).is_err());
    started.lose();
    assert!(!started.settle(Some(Used { head: 2, len: 4 })));
    assert!(!started.publish());
    assert_eq!(driver.used_index(&other), 1, "a lost ring is not written");
}

#[test]
fn no_more_chains_are_in_flight_than_the_ring_has_descriptors() {
    let (ram, driver) = ring(2);
    let (setup, _, _) = setup(&driver, 0);
    let mut started = Stopped::start(setup, &ram.table).unwrap();
    offer(&ram, &driver, 0, &[0, 1]);
    assert_eq!([started.pop(), started.pop()], [Ok(Some(0)), Ok(Some(1))]);
    offer(&ram, &driver, 2, &[0]);
    let broken = started.pop().unwrap_err();
    assert!(matches!(broken, RingBroken::InFlight(_)), "{broken}");
}

/// The used ring of 1024 entries is three pages long; it is logged as if it began in the middle of
/// page 100, which is not where it is.
const LOGGED_AT: u64 = 100 * 4096 + 2048;

#[test]
fn each_write_to_the_used_ring_is_marked_where_the_front_end_wants_it() {
    for features in [0, EVENT_IDX] {
        let (ram, driver) = ring(1024);
        let mut split = split(&ram, &driver, 0, features);
        let log = Log::new(1024);
        split.push_used(Used { head: 1, len: 1 });
        assert_eq!(log.take(), NONE, "nothing is logged yet");
        let guest = LOGGED_AT;
        split.set_log(Some(UsedLog {
            log: log.log.clone(),
            guest,
        }));
        assert_eq!(log.take(), [100, 101, 102], "all of the ring, once");
        split.push_used(Used { head: 2, len: 1 });
        assert_eq!(log.take(), NONE, "with the batch");
        let _ = split.publish();
        assert_eq!(log.take(), [100], "elements 0 and 1, and the index");
        for head in 2..256 {
            split.push_used(Used { head, len: 1 });
        }
        let _ = split.publish();
        // Element 255 begins at byte 2044 of the ring and so ends in the next page.
        assert_eq!(log.take(), [100, 101], "elements 2 to 255, and the index");
        for head in 0..1024 {
            split.push_used(Used { head, len: 1 });
        }
        let _ = split.publish();
        assert_eq!(log.take(), [100, 101, 102], "around the end");
        split.push_used(Used { head: 0, len: 1 });
        let _ = split.publish();
        // Element 256 is in the next page, the index is not.
        assert_eq!(log.take(), [100, 101], "one element, and the index");
        split.suppress_kicks();
        let by_flags = features == 0;
        assert_eq!(log.take(), vec![100; usize::from(by_flags)], "the flags");
        split.arm_kick().unwrap();
        let armed = if by_flags { 100 } else { 102 };
        assert_eq!(log.take(), [armed], "the flags, or avail_event");
        split.set_log(None);
        split.push_used(Used { head: 3, len: 1 });
        let _ = split.publish();
        split.arm_kick().unwrap();
        assert_eq!(log.take(), NONE, "nothing is logged any more");
    }
}

#[test]
fn the_used_ring_is_logged_if_everything_is_and_its_flag_says_so() {
    for (features, flagged, logged) in [
        (LOG_ALL, Some(0), true),
        (LOG_ALL, None, false),
        (0, Some(0), false),
    ] {
        let (ram, driver) = ring(8);
        let (mut setup, _kick, _) = setup(&driver, 0);
        setup.features = features;
        setup.log_used = flagged;
        let mut started = Stopped::start(setup, &ram.table).unwrap();
        let log = Log::new(8);
        started.relog(Some(&log.log));
        assert_eq!(!log.take().is_empty(), logged);
        offer(&ram, &driver, 0, &[5]);
        assert_eq!(started.pop(), Ok(Some(5)));
        started.settle(Some(Used { head: 5, len: 1 }));
        assert!(started.publish());
        assert_eq!(!log.take().is_empty(), logged);
        started.set_features(features ^ LOG_ALL);
        started.relog(Some(&log.log));
        assert_eq!(!log.take().is_empty(), features == 0, "switched over");
        started.set_log_used(None);
        started.relog(Some(&log.log));
        assert_eq!(log.take(), NONE, "the flag is cleared");
    }
}

#[test]
fn nothing_is_taken_while_there_is_no_log_to_mark_it_in() {
    let (ram, driver) = ring(8);
    let (mut setup, _kick, _) = setup(&driver, 0);
    setup.features = LOG_ALL;
    let mut started = Stopped::start(setup, &ram.table).unwrap();
    started.relog(None);
    assert!(!started.may_pop() && !started.may_take());
    started.relog(Some(&Log::new(8).log));
    assert!(started.may_pop());
    started.relog(None);
    assert!(!started.may_pop());
    started.set_features(0);
    started.relog(None);
    assert!(started.may_pop(), "nothing is to be logged");
}

fn recorded(region: &Region, driver: &DriverRing, base: u16) -> VringSetup {
    let (mut setup, _, _) = setup(driver, base);
    setup.inflight = Some(region.queue(0, driver.size).unwrap());
    setup
}

#[test]
fn a_successor_does_again_what_was_taken_and_goes_on_behind_it() {
    for start in [0, 1, 0xfffe] {
        let (ram, driver) = ring(8);
        driver.put_used_index(&ram, start);
        driver.put_avail_index(&ram, start);
        let region = Region::allocate(1, 8).unwrap();
        // SET_VRING_BASE is not looked at: it is wrong here.
        let mut first = Stopped::start(recorded(&region, &driver, 77), &ram.table).unwrap();
        let next = offer(&ram, &driver, start, &[3, 0, 6, 1]);
        for head in [3, 0, 6, 1] {
            assert_eq!(first.pop(), Ok(Some(head)));
        }
        // A batch of two is published, and one more is answered and not published.
        first.settle(Some(Used { head: 0, len: 1 }));
        first.settle(Some(Used { head: 1, len: 1 }));
        assert!(first.publish());
        first.settle(Some(Used { head: 6, len: 1 }));
        drop(first);

        let mut second = Stopped::start(recorded(&region, &driver, 0), &ram.table).unwrap();
        assert_eq!(second.in_flight(), 2);
        offer(&ram, &driver, next, &[1]);
        let taken = [second.pop(), second.pop(), second.pop(), second.pop()];
        assert_eq!(taken, [Ok(Some(3)), Ok(Some(6)), Ok(Some(1)), Ok(None)]);
        for head in [1, 6, 3] {
            second.settle(Some(Used { head, len: 1 }));
        }
        assert!(second.publish());
        assert_eq!(driver.used_index(&ram), start.wrapping_add(5));
        let stopped = second.drain(StopMode::Drain).try_finish().unwrap().0;
        assert_eq!(stopped.next_avail(), start.wrapping_add(5));

        let mut third = Stopped::start(recorded(&region, &driver, 0), &ram.table).unwrap();
        assert_eq!((third.in_flight(), third.pop()), (0, Ok(None)));
    }
}

#[test]
fn what_is_abandoned_stays_recorded() {
    let (ram, driver) = ring(8);
    let region = Region::allocate(1, 8).unwrap();
    let mut first = Stopped::start(recorded(&region, &driver, 0), &ram.table).unwrap();
    offer(&ram, &driver, 0, &[4, 5]);
    assert_eq!([first.pop(), first.pop()], [Ok(Some(4)), Ok(Some(5))]);
    first.settle(None);
    first.settle(None);
    let stopped = first.drain(StopMode::Suspend).try_finish().unwrap().0;
    assert_eq!(stopped.next_avail(), 2);
    // One that comes and goes before it could do them again leaves them as well.
    for _ in 0..2 {
        let mut next = Stopped::start(recorded(&region, &driver, 0), &ram.table).unwrap();
        assert_eq!(next.in_flight(), 2);
        next.leave_again();
        assert_eq!(next.in_flight(), 0);
    }
    let mut last = Stopped::start(recorded(&region, &driver, 0), &ram.table).unwrap();
    let taken = [last.pop(), last.pop(), last.pop()];
    assert_eq!(taken, [Ok(Some(4)), Ok(Some(5)), Ok(None)]);
}

#[test]
fn a_head_that_is_in_flight_is_not_taken_twice() {
    let (ram, driver) = ring(8);
    let region = Region::allocate(1, 8).unwrap();
    let mut started = Stopped::start(recorded(&region, &driver, 0), &ram.table).unwrap();
    offer(&ram, &driver, 0, &[4, 4]);
    assert_eq!(started.pop(), Ok(Some(4)));
    let broken = started.pop().unwrap_err();
    assert!(matches!(broken, RingBroken::InFlight(_)), "{broken}");
}
