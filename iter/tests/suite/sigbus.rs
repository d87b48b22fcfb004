//! Guest memory that goes away: contained where it is ours, fatal where it is not.
#![expect(unsafe_code, reason = "maps and touches memory that is not guarded")]

use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::sync::Arc;

use iov_iter::{Dest, ExtractErrorKind, IovIter, Line, MemoryNeeds, MemoryTable, Source, sigbus};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::guest::{Guest, memfd, spec};

const SIZE: u64 = 0x10000;

#[test]
fn a_truncated_file_poisons_its_table_and_no_other() {
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    // SAFETY: `event` is open for as long as the test runs.
    sigbus::install(Some(event_fd(&event))).unwrap();
    let (victim, neighbour) = (Guest::new(&[(0, SIZE)]), Guest::new(&[(0, SIZE)]));
    neighbour.write(0x2000, b"still here");
    victim.file(0).set_len(0).unwrap();

    let hold = victim.view.hold();
    let mut source = IovIter::<Source>::guest(&victim.view, &[(0x2000, 10)]).unwrap();
    let mut bytes = [1; 10];
    assert_eq!(source.copy_from(&hold, &mut bytes), 0);
    assert_eq!(source.count(), 10);
    assert!(victim.table.poisoned() && victim.table.regions()[0].poisoned());
    assert!(event.read().is_ok(), "the fault was signalled");

    // From now on the region's memory is private pages, and every copy says so.
    let mut dest = IovIter::<Dest>::guest(&victim.view, &[(0x5000, 10), (0x8000, 10)]).unwrap();
    assert_eq!(dest.copy_to(&hold, &[3; 20]), 0);
    assert_eq!(dest.zero(&hold, 20), 0);
    assert!(dest.copy_to_full(&hold, &[3; 20]).is_err());
    assert_eq!(dest.count(), 20);
    let refused = dest.extract(hold, 20, &MemoryNeeds::NONE).unwrap_err();
    assert_eq!(refused.kind, ExtractErrorKind::Faulted);
    assert_eq!(dest.count(), 20);
    assert_eq!(refused.hold.view().holds(), 1);

    assert!(!neighbour.table.poisoned());
    let hold = neighbour.view.hold();
    let mut source = IovIter::<Source>::guest(&neighbour.view, &[(0x2000, 10)]).unwrap();
    assert_eq!(source.copy_from(&hold, &mut bytes), 10);
    assert_eq!(&bytes, b"still here");
}

fn event_fd(event: &EventFd) -> std::os::fd::BorrowedFd<'_> {
    use std::os::fd::{AsRawFd, BorrowedFd};
    // SAFETY: the descriptor is open while `event` is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

#[test]
fn a_copy_stops_at_the_region_that_faulted() {
    let guest = Guest::new(&[(0, SIZE), (SIZE, SIZE)]);
    guest.write(SIZE - 4, b"good");
    guest.file(1).set_len(0).unwrap();
    let hold = guest.view.hold();
    let mut source = IovIter::<Source>::guest(&guest.view, &[(SIZE - 4, 8)]).unwrap();
    let mut bytes = [0; 8];
    assert!(source.copy_from_full(&hold, &mut bytes).is_err());
    assert_eq!(source.count(), 8);
    assert_eq!(source.copy_from(&hold, &mut bytes), 4);
    assert_eq!((&bytes[..4], source.count()), (&b"good"[..], 4));
    let poisoned: Vec<_> = guest.table.regions().iter().map(|r| r.poisoned()).collect();
    assert_eq!(poisoned, [false, true]);
}

/// A fault would show, or end the process.
#[test]
fn cache_lines_of_memory_that_goes_away_are_fetched_without_a_fault() {
    let guest = Guest::new(&[(0, SIZE)]);
    let area = guest.table.area(0x1000, 64, 16).unwrap();
    let lines = [0, 63, 64, 0x10000, usize::MAX].map(|offset| area.line(offset));
    lines.iter().for_each(|line| line.fetch());
    guest.file(0).set_len(0).unwrap();
    lines.iter().for_each(|line| line.fetch());
    assert!(!guest.table.poisoned());
    drop(area);
    drop(guest);
    lines.iter().for_each(|line| line.fetch());
    Line::default().fetch();
}

#[test]
fn a_ring_that_goes_away_reads_zeroes() {
    let file = memfd(SIZE);
    let table = Arc::new(MemoryTable::new(vec![spec(0, SIZE, &file)]).unwrap());
    let area = table.area(0x3000, 64, 2).unwrap();
    assert_eq!(area.store(0, 7_u16), Some(()));
    file.set_len(0x3000).unwrap();
    let index = area.atomic_u16(0).unwrap();
    assert_eq!(index.load(std::sync::atomic::Ordering::Acquire), 0);
    assert!(area.poisoned() && table.poisoned());
}

#[test]
fn a_poisoned_place_in_the_table_is_used_again_clean() {
    for _ in 0..100 {
        let file = memfd(SIZE);
        let table = MemoryTable::new(vec![spec(0, SIZE, &file)]).unwrap();
        assert!(!table.poisoned());
        file.set_len(0).unwrap();
        let mut byte = [1_u8];
        assert_eq!(
            table.regions()[0].slice(0, 1).unwrap().copy_to(&mut byte),
            1
        );
        assert!(table.poisoned());
    }
}

#[test]
fn faults_are_contained_while_other_threads_map_and_unmap() {
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let file = memfd(SIZE);
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    let specs = (0..16).map(|i| spec(i * SIZE, SIZE, &file)).collect();
                    let table = MemoryTable::new(specs).unwrap();
                    assert!(!table.poisoned());
                }
            });
        }
        for _ in 0..200 {
            let file = memfd(SIZE);
            let table = MemoryTable::new(vec![spec(0, SIZE, &file)]).unwrap();
            file.set_len(0).unwrap();
            let byte = table.regions()[0].slice(0x7000, 1).unwrap();
            byte.copy_from(&[1_u8]);
            assert!(table.poisoned());
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}

#[test]
fn the_table_of_guarded_mappings_is_bounded() {
    if !is_child("full") {
        let output = child("the_table_of_guarded_mappings_is_bounded", "full");
        assert!(output.status.success(), "{output:?}");
        return;
    }
    let file = memfd(0x1000);
    let table = || MemoryTable::new(vec![spec(0, 0x1000, &file)]);
    let mut tables: Vec<_> = (0..sigbus::MAX_GUARDED).map(|_| table().unwrap()).collect();
    let full = table().unwrap_err();
    assert!(matches!(full, iov_iter::MemoryError::Contain(_)), "{full}");
    tables.pop();
    assert!(table().is_ok());
}

#[test]
fn a_fault_outside_of_guarded_memory_still_kills() {
    if is_child("foreign") {
        let file = memfd(0x1000);
        let _guarded = MemoryTable::new(vec![spec(0, 0x1000, &file)]).unwrap();
        touch_unguarded();
        return;
    }
    let output = child("a_fault_outside_of_guarded_memory_still_kills", "foreign");
    assert_eq!(output.status.signal(), Some(libc::SIGBUS), "{output:?}");
}

#[test]
fn a_sigbus_that_a_process_sends_still_kills() {
    if is_child("sent") {
        sigbus::install(None).unwrap();
        for _ in 0..2 {
            // The standard library's own handler, the previous one, swallows the first.
            // SAFETY: takes no pointer.
            unsafe { libc::raise(libc::SIGBUS) };
        }
        return;
    }
    let output = child("a_sigbus_that_a_process_sends_still_kills", "sent");
    assert_eq!(output.status.signal(), Some(libc::SIGBUS), "{output:?}");
}

/// Faults in a mapping that nobody guards.
fn touch_unguarded() {
    use std::os::fd::AsRawFd;
    let file = memfd(0x1000);
    let (read_write, shared) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
    let fd = file.as_fd().as_raw_fd();
    // SAFETY: a new mapping wherever the kernel likes; checked below.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), 0x1000, read_write, shared, fd, 0) };
    assert_ne!(at, libc::MAP_FAILED);
    file.set_len(0).unwrap();
    // SAFETY: mapped above; the fault is what the test is about.
    unsafe { at.cast::<u8>().write_volatile(1) };
}

const CHILD: &str = "IOV_ITER_SIGBUS_CHILD";

fn is_child(role: &str) -> bool {
    std::env::var(CHILD).is_ok_and(|set| set == role)
}

/// Runs one test of this binary in a process of its own, without ASan's own report of SIGBUS.
fn child(test: &str, role: &str) -> std::process::Output {
    Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            &format!("sigbus::{test}"),
            "--nocapture",
            "--test-threads=1",
        ])
        .env(CHILD, role)
        .env("ASAN_OPTIONS", "handle_sigbus=0")
        .output()
        .unwrap()
}
