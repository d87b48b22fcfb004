//! The dirty log over a session: what it has to cover, how long it is kept, and what a hostile
//! front end makes of it.

use std::fs::{File, read_to_string};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;

use rustix::fs::ftruncate;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vublk::fds::borrow;
use vublk_tests::frontend::{
    Descriptor, DirtyLog, FrontEnd, GuestRam, Kind, LOG_ALL, Layout, Options, Outcome, PAGE,
    Served, code, region_payload, wait_readable, words,
};

fn options() -> Options {
    Options {
        vrings: 2,
        size: 64,
        features: 0,
    }
}

/// A region as ADD_MEM_REG and REM_MEM_REG name it.
fn single(region: [u64; 4]) -> Vec<u8> {
    [vec![0; 8], region_payload(region)].concat()
}

/// The payload of SET_LOG_BASE.
fn base(size: u64, offset: u64) -> Vec<u8> {
    [size.to_ne_bytes(), offset.to_ne_bytes()].concat()
}

/// The payload of SET_VRING_ADDR, with writes to the used ring logged from `guest` on.
fn logged_at(front_end: &mut FrontEnd, index: u16, guest: u64) -> Outcome<Vec<u8>> {
    let vring = front_end.vring(index)?;
    (vring.log_used, vring.log_guest) = (true, guest);
    Ok(vring.addr_payload(u32::from(index)))
}

/// Memory far above the guest's first, of sixteen pages.
fn above() -> Outcome<GuestRam> {
    GuestRam::at(Layout {
        guest: 1 << 32,
        size: 16 * PAGE,
        offset: 0,
    })
}

/// How often this process, daemon included, has the log mapped.
fn mappings(log: &DirtyLog) -> Outcome<usize> {
    let inode = File::from(log.fd().try_clone_to_owned()?).metadata()?.ino();
    let maps = read_to_string("/proc/self/maps")?;
    let of_log = |line: &&str| line.split_whitespace().nth(4) == Some(&inode.to_string());
    Ok(maps.lines().filter(of_log).count())
}

#[test]
fn a_log_covers_all_memory_or_is_refused() -> Outcome {
    let served = Served::start()?;
    for (missing, works) in [(0, true), (1, false)] {
        let mut front_end = FrontEnd::start(served.connect()?, options())?;
        let ram = front_end.ram.layout().size;
        let log = DirtyLog::new(ram, 0)?;
        let needed = ram.div_ceil(PAGE).div_ceil(8);
        let payload = base(needed - missing, 0);
        front_end
            .peer
            .tell(code::SET_LOG_BASE, &payload, &[log.fd()])?;
        if works {
            let reply = front_end.peer.reply_to(code::SET_LOG_BASE)?.payload;
            assert_eq!(reply, payload);
            front_end.verify(60)?;
        } else {
            // QEMU does not look at the answer, and would believe in a log that has gaps.
            assert!(front_end.peer.closed()?);
        }
    }
    served.stop()
}

#[test]
fn what_could_not_be_marked_is_refused_and_changes_nothing() -> Outcome {
    let served = Served::start()?;
    let mut front_end = FrontEnd::start(served.connect()?, options())?;
    let log = DirtyLog::new(front_end.ram.layout().size, 0)?;
    front_end.start_logging(&log, 0)?;

    let more = above()?;
    let region = single(more.numbers());
    assert!(
        front_end
            .peer
            .refused(code::ADD_MEM_REG, &region, &[more.fd()])?
    );
    let mut both = words(&[2, 0]);
    both.extend(region_payload(front_end.ram.numbers()));
    both.extend(region_payload(more.numbers()));
    let files = [front_end.ram.fd(), more.fd()];
    assert!(front_end.peer.refused(code::SET_MEM_TABLE, &both, &files)?);

    // The used ring's last byte is the log's last bit, or one beyond.
    let end = log.size() * 8 * PAGE;
    let used_bytes = 6 + 8 * u64::from(options().size);
    for guest in [end - used_bytes + 1, end, u64::MAX] {
        let beyond = logged_at(&mut front_end, 1, guest)?;
        assert!(
            front_end.peer.refused(code::SET_VRING_ADDR, &beyond, &[])?,
            "{guest:#x}"
        );
    }
    // Everything is as it was.
    let used = front_end.vring(1)?.ring.used_addr();
    front_end.vring(1)?.log_guest = used;
    log.take()?;
    front_end.read(1, 0, 512)?;
    let [_, status, data] = front_end.vring(1)?.places(0);
    front_end.assert_marked(&log.take()?, &[used / PAGE, status / PAGE, data / PAGE]);
    front_end.verify(61)?;
    served.stop()
}

#[test]
fn a_used_ring_is_marked_where_the_front_end_says() -> Outcome {
    let served = Served::start()?;
    let mut front_end = FrontEnd::start(served.connect()?, options())?;
    let log = DirtyLog::new(front_end.ram.layout().size, 0)?;
    front_end.start_logging(&log, 0)?;
    // Outside of the memory table, but inside the log.
    let end = log.size() * 8 * PAGE;
    let outside = logged_at(&mut front_end, 1, end - PAGE)?;
    assert!(end - PAGE >= front_end.ram.layout().size);
    front_end
        .peer
        .confirm(code::SET_VRING_ADDR, &outside, &[])?;
    log.take()?;
    front_end.read(1, 0, 512)?;
    let [_, status, data] = front_end.vring(1)?.places(0);
    front_end.assert_marked(&log.take()?, &[status / PAGE, data / PAGE, end / PAGE - 1]);
    // The flag is that vring's alone.
    front_end.vring(1)?.log_used = false;
    let unlogged = front_end.vring(1)?.addr_payload(1);
    front_end
        .peer
        .confirm(code::SET_VRING_ADDR, &unlogged, &[])?;
    log.take()?;
    front_end.read(1, 0, 512)?;
    front_end.assert_marked(&log.take()?, &[status / PAGE, data / PAGE]);
    front_end.read(0, 0, 512)?;
    let used = front_end.vring(0)?.ring.used_addr() / PAGE;
    assert!(log.take()?.contains(&used));
    served.stop()
}

/// What a stopped vring was told of its log holds when it starts, whichever message came last.
#[test]
fn a_vring_does_not_start_where_it_could_not_be_marked() -> Outcome {
    let served = Served::start()?;
    let mut front_end = FrontEnd::attach(served.connect()?, options())?;
    front_end.start_vring(0, 0)?;
    let log = DirtyLog::new(front_end.ram.layout().size, 0)?;
    front_end.start_logging(&log, 0)?;
    // Without its size nobody knows yet how far it reaches.
    let end = log.size() * 8 * PAGE;
    let last = end - 6 - 8 * 32;
    let payload = logged_at(&mut front_end, 1, last)?;
    let peer = &front_end.peer;
    peer.confirm(code::SET_VRING_NUM, &words(&[1, 32]), &[])?;
    peer.confirm(code::SET_VRING_BASE, &words(&[1, 0]), &[])?;
    peer.confirm(code::SET_VRING_ADDR, &payload, &[])?;
    peer.confirm(code::SET_VRING_NUM, &words(&[1, 64]), &[])?;
    let kick = EventFd::new(EFD_NONBLOCK)?;
    let index = 1_u64.to_ne_bytes();
    assert!(peer.refused(code::SET_VRING_KICK, &index, &[borrow(&kick)])?);
    peer.confirm(code::SET_VRING_NUM, &words(&[1, 32]), &[])?;
    peer.confirm(code::SET_VRING_KICK, &index, &[borrow(&kick)])?;
    served.stop()
}

#[test]
fn the_log_stays_when_memory_comes_and_goes() -> Outcome {
    let served = Served::start()?;
    let mut front_end = FrontEnd::start(served.connect()?, options())?;
    let more = above()?;
    let region = single(more.numbers());
    let end = more.layout().guest + more.layout().size;
    let log = DirtyLog::new(end, 0)?;
    front_end.start_logging(&log, 0)?;
    let [_, status, data] = front_end.vring(0)?.places(0);
    let used = front_end.vring(0)?.ring.used_addr();
    let old = [used / PAGE, status / PAGE, data / PAGE];

    // A region that comes later is logged like all others.
    front_end
        .peer
        .confirm(code::ADD_MEM_REG, &region, &[more.fd()])?;
    log.take()?;
    read_into(&mut front_end, more.layout().guest + PAGE - 1)?;
    let new = more.layout().guest / PAGE;
    front_end.assert_marked(&log.take()?, &[used / PAGE, status / PAGE, new, new + 1]);

    front_end.peer.confirm(code::REM_MEM_REG, &region, &[])?;
    log.take()?;
    front_end.read(0, 0, 512)?;
    front_end.assert_marked(&log.take()?, &old);

    // QEMU without CONFIGURE_MEM_SLOTS sends all of it again.
    front_end.share_memory()?;
    log.take()?;
    front_end.read(0, 0, 512)?;
    front_end.assert_marked(&log.take()?, &old);
    served.stop()
}

/// Reads a sector of the first vring's device to a guest address.
fn read_into(front_end: &mut FrontEnd, guest: u64) -> Outcome {
    let ram = front_end.ram.clone();
    let vring = front_end.vring(0)?;
    let [header, status, _] = vring.places(0);
    ram.write(header, &Kind::In.header(0))?;
    ram.write(status, &[0xff])?;
    let chain = [
        Descriptor::source(header, 16),
        Descriptor::dest(guest, 512),
        Descriptor::dest(status, 1),
    ];
    vring.ring.offer_chain(0, &chain)?;
    vring.kick.write(1)?;
    assert_eq!(front_end.wait(0, 0)?, 0);
    Ok(())
}

/// The front end gives a log back as soon as it has the answer.
#[test]
fn no_log_is_kept_longer_than_it_is_used() -> Outcome {
    let served = Served::start()?;
    let mut front_end = FrontEnd::start(served.connect()?, options())?;
    let size = front_end.ram.layout().size;
    let logs = (0..4)
        .map(|_| DirtyLog::new(size, 0))
        .collect::<Outcome<Vec<_>>>()?;
    let [swapped, cleared, reset, left] = logs.as_slice() else {
        return Err("four logs".into());
    };
    front_end.start_logging(swapped, 0)?;
    assert_eq!(mappings(swapped)?, 2);
    front_end.set_log(cleared)?;
    assert_eq!((mappings(swapped)?, mappings(cleared)?), (1, 2), "a swap");
    let acked = front_end.peer.ask_number(code::GET_FEATURES)? & !LOG_ALL;
    let acked = acked & (1 << 30 | 1 << 32);
    front_end
        .peer
        .confirm(code::SET_FEATURES, &acked.to_ne_bytes(), &[])?;
    assert_eq!(mappings(cleared)?, 1, "LOG_ALL not acknowledged any more");

    front_end.start_logging(reset, 0)?;
    assert_eq!(mappings(reset)?, 2);
    front_end.peer.confirm(code::RESET_DEVICE, &[], &[])?;
    // A guest that reboots while QEMU migrates it: the next log comes after the start.
    let logging = (acked | LOG_ALL).to_ne_bytes();
    front_end.peer.confirm(code::SET_FEATURES, &logging, &[])?;
    for index in 0..2 {
        front_end.vring(index)?.ring.start_over()?;
        front_end.start_vring(index, 0)?;
    }
    assert_eq!(mappings(reset)?, 1, "a reset");

    front_end.set_log(left)?;
    front_end.verify(62)?;
    assert_eq!(mappings(left)?, 2);
    drop(front_end);
    FrontEnd::start(served.connect()?, options())?.verify(63)?;
    assert_eq!(mappings(left)?, 1, "the end of the session");
    served.stop()
}

#[test]
fn the_front_end_is_told_of_marks_when_it_wants_to() -> Outcome {
    let served = Served::start()?;
    let mut front_end = FrontEnd::start(served.connect()?, options())?;
    let [log, next] = [0, 8].map(|offset| DirtyLog::new(front_end.ram.layout().size, offset));
    let event = EventFd::new(EFD_NONBLOCK)?;
    front_end
        .peer
        .confirm(code::SET_LOG_FD, &[], &[borrow(&event)])?;
    front_end.read(0, 0, 512)?;
    assert!(event.read().is_err(), "nothing is logged yet");
    front_end.start_logging(&log?, 0)?;
    front_end.read(0, 0, 512)?;
    wait_readable(&event)?;
    // It belongs to the device, not to one log.
    front_end.set_log(&next?)?;
    front_end.read(1, 0, 512)?;
    wait_readable(&event)?;
    let pair = UnixStream::pair()?;
    let refused = front_end
        .peer
        .refused(code::SET_LOG_FD, &[], &[pair.0.as_fd()])?;
    assert!(refused, "a socket is no eventfd");
    served.stop()
}

#[test]
fn a_log_that_is_truncated_costs_only_its_own_session() -> Outcome {
    let served = Served::start()?;
    let other = Served::start()?;
    let mut bystander = FrontEnd::start(other.connect()?, options())?;
    let mut front_end = FrontEnd::start(served.connect()?, options())?;
    let log = DirtyLog::new(front_end.ram.layout().size, 0)?;
    front_end.start_logging(&log, 0)?;
    front_end.verify(64)?;
    ftruncate(log.fd(), 0)?;
    front_end.submit(0, 0, (Kind::In, 0), &[0; 512])?;
    assert!(front_end.peer.closed()?);
    FrontEnd::start(served.connect()?, options())?.verify(65)?;
    bystander.verify(66)?;
    other.stop()?;
    served.stop()
}

/// A front end that is refused a log has to know, and it does not look at the answer.
#[test]
fn a_log_that_cannot_be_ends_the_connection() -> Outcome {
    let served = Served::start()?;
    let event = EventFd::new(EFD_NONBLOCK)?;
    let (socket, _ours) = UnixStream::pair()?;
    let null = File::options().read(true).write(true).open("/dev/null")?;
    let read_only = File::open("/proc/self/exe")?;
    let ram = GuestRam::new(1 << 20)?;
    let file = ram.fd();
    let cases: &[(&str, u64, u64, &[BorrowedFd<'_>])] = &[
        ("no bytes", 0, 0, &[file]),
        ("bytes beyond its file", (1 << 20) + 1, 0, &[file]),
        ("an offset beyond its file", 4096, 1 << 20, &[file]),
        ("an offset that wraps around", 1 << 16, u64::MAX, &[file]),
        ("a size that wraps around", u64::MAX, 4096, &[file]),
        ("all there is", u64::MAX, u64::MAX, &[file]),
        ("half of all there is", 1 << 63, 0, &[file]),
        ("an eventfd", 4096, 0, &[borrow(&event)]),
        ("a socket", 4096, 0, &[socket.as_fd()]),
        ("a device", 4096, 0, &[null.as_fd()]),
        (
            "a file that cannot be written",
            4096,
            0,
            &[read_only.as_fd()],
        ),
        ("no file", 4096, 0, &[]),
        ("two files", 4096, 0, &[file, file]),
    ];
    for (what, size, offset, files) in cases {
        let front_end = FrontEnd::start(served.connect()?, Options::default())?;
        front_end
            .peer
            .tell(code::SET_LOG_BASE, &base(*size, *offset), files)?;
        assert!(front_end.peer.closed()?, "{what}");
    }
    // Half a description, and one that was not negotiated.
    let front_end = FrontEnd::start(served.connect()?, Options::default())?;
    front_end.peer.tell(code::SET_LOG_BASE, &[0; 8], &[file])?;
    assert!(front_end.peer.closed()?);
    let peer = served.connect()?;
    peer.tell(code::SET_LOG_BASE, &base(1 << 16, 0), &[file])?;
    assert!(peer.closed()?);
    drop(peer);
    FrontEnd::start(served.connect()?, Options::default())?.verify(67)?;
    served.stop()
}
