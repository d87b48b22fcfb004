//! In-flight regions over a session: how they are asked for and handed back, what they keep, and
//! what a hostile front end makes of them.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use blockdev::fault::{FaultHandle, FaultPlan};
use blockdev::open;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vublk::fds::borrow;
use vublk_tests::frontend::{
    FrontEnd, InflightFile, Kind, NEED_REPLY, Options, Outcome, Peer, ServeOptions, Served, code,
    words,
};

/// Bytes of a description, as the specification has it and as QEMU pads it.
const SIZES: [usize; 2] = [20, 24];

fn options() -> Options {
    Options {
        vrings: 2,
        size: 64,
        features: 0,
    }
}

/// A description of so many vrings of so many entries.
fn description(mmap: [u64; 2], queues: u16, queue_size: u16) -> Vec<u8> {
    let mut payload: Vec<u8> = mmap.iter().flat_map(|word| word.to_ne_bytes()).collect();
    payload.extend(queues.to_ne_bytes());
    payload.extend(queue_size.to_ne_bytes());
    payload.resize(24, 0);
    payload
}

fn memory(bytes: u64) -> Outcome<OwnedFd> {
    let file = memfd_create("inflight", MemfdFlags::CLOEXEC)?;
    ftruncate(&file, bytes)?;
    Ok(file)
}

/// A front end that has agreed on everything, and has started nothing.
fn attached(served: &Served) -> Outcome<FrontEnd> {
    FrontEnd::attach(served.connect()?, options())
}

fn set_writeback(peer: &Peer, on: u8) -> Outcome {
    let payload = [words(&[32, 1, 0]), vec![on]].concat();
    Ok(peer.confirm(code::SET_CONFIG, &payload, &[])?)
}

#[test]
fn a_region_is_described_as_it_was_asked_for() -> Outcome {
    let served = Served::start()?;
    let front_end = attached(&served)?;
    for bytes in SIZES {
        let mut payload = description([0, 0], 2, 64);
        payload.truncate(bytes);
        let (said, file) = front_end
            .peer
            .ask_file(code::GET_INFLIGHT_FD, &payload, &[])?;
        let file = file.ok_or("no file came")?;
        assert_eq!(said.len(), bytes, "in the size that it was asked in");
        let (size, rest) = said.split_first_chunk::<8>().ok_or("too short")?;
        let size = u64::from_ne_bytes(*size);
        assert_eq!(size, file.metadata()?.len());
        assert!(size >= 2 * (16 + 64 * 16), "room for every descriptor");
        assert_eq!(
            rest.get(..12),
            payload.get(8..20),
            "offset, vrings, entries"
        );
        front_end
            .peer
            .confirm(code::SET_INFLIGHT_FD, &said, &[file.as_fd()])?;
    }
    served.stop()
}

#[test]
fn regions_are_asked_for_and_set_as_often_as_a_front_end_likes() -> Outcome {
    let served = Served::start()?;
    let mut front_end = attached(&served)?;
    let first = InflightFile::get(&front_end.peer, 2, 64)?;
    let second = InflightFile::get(&front_end.peer, 2, 128)?;
    first.set(&front_end.peer)?;
    second.set(&front_end.peer)?;
    second.set(&front_end.peer)?;
    // A region may be made while another one is set, and that one stays.
    let third = InflightFile::get(&front_end.peer, 2, 64)?;
    for index in 0..2 {
        front_end.start_vring(index, 0)?;
    }
    front_end.verify(70)?;
    // The version of a vring's part is zero until a daemon has used it.
    for (region, used) in [(&first, false), (&second, true), (&third, false)] {
        assert_eq!(region.bytes()?.get(8..10), Some(&[u8::from(used), 0][..]));
    }
    served.stop()
}

/// What is in flight is found again whenever the region comes before the kick.
#[test]
fn a_region_comes_in_any_order_before_the_start() -> Outcome {
    for place in 0..4 {
        let (served, handle) = sticky()?;
        let mut front_end = attached(&served)?;
        let inflight = InflightFile::get(&front_end.peer, 2, 64)?;
        inflight.set(&front_end.peer)?;
        for index in 0..2 {
            front_end.start_vring(index, 0)?;
        }
        front_end.verify(71)?;
        handle.stick();
        let data = [0x3c; 2048];
        let head = front_end.submit(1, 2, (Kind::Out, 40), &data)?;
        while handle.stuck_now() < 1 {
            std::thread::yield_now();
        }
        let (nobody, _) = UnixStream::pair()?;
        front_end.peer = Peer::new(nobody)?;
        handle.release();

        front_end.peer = served.connect()?;
        let FrontEnd { peer, vrings, .. } = &front_end;
        let vring = vrings.get(1).ok_or("two vrings")?;
        let file = 1_u64.to_ne_bytes();
        front_end.negotiate(0)?;
        front_end.share_memory()?;
        // DPDK fell over a region that came before SET_VRING_BASE.
        for step in 0..4 {
            if step == place {
                inflight.set(peer)?;
            }
            match step {
                0 => peer.confirm(code::SET_VRING_NUM, &words(&[1, 64]), &[])?,
                1 => peer.confirm(code::SET_VRING_BASE, &words(&[1, 0x4321]), &[])?,
                2 => peer.confirm(code::SET_VRING_ADDR, &vring.addr_payload(1), &[])?,
                _ => peer.confirm(code::SET_VRING_CALL, &file, &[borrow(&vring.call)])?,
            }
        }
        front_end.kick_vring(1, NEED_REPLY)?;
        front_end.vring_kicked(1)?;
        assert_eq!(front_end.wait(1, head)?, 0, "set before step {place}");
        assert_eq!(front_end.read(1, 40, 2048)?, data);
        let base = front_end.peer.vring_base(1)?;
        let next = front_end.vring(1)?.ring.next_avail();
        assert_eq!(base, u32::from(next), "SET_VRING_BASE meant nothing");
        served.stop()?;
    }
    Ok(())
}

fn sticky() -> Outcome<(Served, FaultHandle)> {
    let (device, handle) = open::fault(FaultPlan::benign(4 << 20, 512, 1))?;
    let served = Served::start_with(&ServeOptions {
        storage: Some(device),
        ..ServeOptions::default()
    })?;
    Ok((served, handle))
}

/// A guest that was promised write-through does not get less from the next daemon, though no front
/// end says it again.
#[test]
fn the_write_cache_is_as_it_was_when_the_daemon_went() -> Outcome {
    let mut kept: Option<InflightFile> = None;
    for (before, after) in [(1, 0), (0, 1), (1, 1)] {
        let served = Served::start()?;
        let front_end = attached(&served)?;
        let peer = &front_end.peer;
        assert_eq!(peer.config(32, 1)?, [1], "as every device begins");
        match &kept {
            Some(region) => region.set(peer)?,
            None => {
                let region = InflightFile::get(peer, 2, 64)?;
                region.set(peer)?;
                kept = Some(region);
            }
        }
        assert_eq!(peer.config(32, 1)?, [before]);
        set_writeback(peer, after)?;
        served.stop()?;
    }
    // A region that nobody has used yet gets what the guest has asked for already.
    let served = Served::start()?;
    let front_end = attached(&served)?;
    set_writeback(&front_end.peer, 0)?;
    let region = InflightFile::get(&front_end.peer, 2, 64)?;
    region.set(&front_end.peer)?;
    served.stop()?;
    let served = Served::start()?;
    let front_end = attached(&served)?;
    region.set(&front_end.peer)?;
    assert_eq!(front_end.peer.config(32, 1)?, [0]);
    served.stop()
}

#[test]
fn a_region_does_not_change_under_a_started_vring() -> Outcome {
    let served = Served::start()?;
    let mut front_end = attached(&served)?;
    let region = InflightFile::get(&front_end.peer, 2, 64)?;
    region.set(&front_end.peer)?;
    front_end.start_vring(1, 0)?;
    assert!(region.set(&front_end.peer).is_err());
    front_end.write(1, 0, &[1; 512])?;
    front_end.peer.vring_base(1)?;
    region.set(&front_end.peer)?;
    served.stop()
}

#[test]
fn a_vring_without_a_place_in_the_region_does_not_start() -> Outcome {
    let served = Served::start()?;
    for (queues, queue_size, starts) in [(2, 64, true), (1, 64, false), (2, 32, false)] {
        let front_end = attached(&served)?;
        let region = InflightFile::get(&front_end.peer, queues, queue_size)?;
        region.set(&front_end.peer)?;
        front_end.describe_vring(1, 0)?;
        front_end.kick_vring(1, NEED_REPLY)?;
        let answer = front_end.peer.reply_to(code::SET_VRING_KICK)?.payload;
        assert_eq!(
            answer == 0_u64.to_ne_bytes(),
            starts,
            "{queues} of {queue_size}"
        );
        if starts {
            continue;
        }
        // QEMU asks for no answer, and would wait for its requests for ever.
        front_end.kick_vring(1, 0)?;
        assert!(front_end.peer.closed()?);
    }
    served.stop()
}

#[test]
fn a_region_that_is_truncated_costs_only_its_own_session() -> Outcome {
    let served = Served::start()?;
    let other = Served::start()?;
    let mut bystander = FrontEnd::start(other.connect()?, options())?;
    let mut front_end = attached(&served)?;
    // One of the front end's own, since nobody truncates one of ours.
    let file = memory(1 << 16)?;
    let payload = description([1 << 16, 0], 2, 64);
    front_end
        .peer
        .confirm(code::SET_INFLIGHT_FD, &payload, &[file.as_fd()])?;
    for index in 0..2 {
        front_end.start_vring(index, 0)?;
    }
    front_end.verify(72)?;
    ftruncate(&file, 0)?;
    front_end.submit(0, 0, (Kind::In, 0), &[0; 512])?;
    assert!(front_end.peer.closed()?);
    FrontEnd::start(served.connect()?, options())?.verify(73)?;
    bystander.verify(74)?;
    other.stop()?;
    served.stop()
}

#[test]
fn regions_that_make_no_sense_are_not_made() -> Outcome {
    let served = Served::start()?;
    // The largest of each, alone and together.
    for (queues, queue_size) in [(256, 1), (1, 32768), (256, 32768)] {
        let front_end = attached(&served)?;
        InflightFile::get(&front_end.peer, queues, queue_size)?.set(&front_end.peer)?;
    }
    for (queues, queue_size) in [(0, 64), (2, 0), (257, 64), (2, 32769), (u16::MAX, u16::MAX)] {
        let front_end = attached(&served)?;
        let payload = description([0, 0], queues, queue_size);
        front_end.peer.tell(code::GET_INFLIGHT_FD, &payload, &[])?;
        assert!(front_end.peer.closed()?, "{queues} of {queue_size}");
    }
    FrontEnd::start(served.connect()?, options())?.verify(75)?;
    served.stop()
}

#[test]
fn a_region_that_cannot_be_ends_the_connection() -> Outcome {
    let served = Served::start()?;
    let event = EventFd::new(EFD_NONBLOCK)?;
    let (socket, _ours) = UnixStream::pair()?;
    let null = File::options().read(true).write(true).open("/dev/null")?;
    let file = memory(8192)?;
    let file = file.as_fd();
    let fits = [8192, 0];
    let cases: &[(&str, Vec<u8>, &[BorrowedFd<'_>])] = &[
        ("no vrings", description(fits, 0, 64), &[file]),
        ("vrings without entries", description(fits, 2, 0), &[file]),
        ("257 vrings", description([1 << 30, 0], 257, 64), &[file]),
        (
            "vrings too large",
            description([1 << 30, 0], 1, 32769),
            &[file],
        ),
        ("no bytes", description([0, 0], 2, 64), &[file]),
        (
            "too few bytes",
            description([2 * (16 + 64 * 16) - 1, 0], 2, 64),
            &[file],
        ),
        (
            "more than its file has",
            description([1 << 20, 0], 4, 256),
            &[file],
        ),
        (
            "an offset beyond its file",
            description([8192, 8192], 2, 64),
            &[file],
        ),
        (
            "an offset between fields",
            description([4096, 1], 2, 64),
            &[file],
        ),
        (
            "an offset that wraps",
            description([8192, !63], 2, 64),
            &[file],
        ),
        ("an eventfd", description(fits, 2, 64), &[borrow(&event)]),
        ("a socket", description(fits, 2, 64), &[socket.as_fd()]),
        ("a device", description(fits, 2, 64), &[null.as_fd()]),
    ];
    for (what, payload, files) in cases {
        let front_end = attached(&served)?;
        let refused = front_end
            .peer
            .refused(code::SET_INFLIGHT_FD, payload, files)?;
        assert!(refused, "{what}");
        // Without an answer to look at, the front end would rely on a region that is not used.
        front_end.peer.tell(code::SET_INFLIGHT_FD, payload, files)?;
        assert!(front_end.peer.closed()?, "{what}");
    }
    // What is no message at all is refused like any other.
    let front_end = attached(&served)?;
    let payload = description(fits, 2, 64);
    for files in [&[][..], &[file, file]] {
        let refused = front_end
            .peer
            .refused(code::SET_INFLIGHT_FD, &payload, files)?;
        assert!(refused, "{} files", files.len());
    }
    drop(front_end);
    FrontEnd::start(served.connect()?, options())?.verify(76)?;
    served.stop()
}
