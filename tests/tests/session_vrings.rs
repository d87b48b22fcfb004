//! The life of a vring: started, enabled, replaced events, stopped, reset.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use blockdev::fault::{FaultHandle, FaultPlan};
use blockdev::open;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vublk::fds::borrow;
use vublk_tests::frontend::{
    CALL, FrontEnd, Kind, NO_FD, Options, Outcome, ServeOptions, Served, code, wait_readable, words,
};

/// A daemon over storage that can be made to keep requests.
fn sticky() -> Outcome<(Served, FaultHandle)> {
    let (storage, handle) = open::fault(FaultPlan::benign(4 << 20, 512, 7))?;
    let options = ServeOptions {
        storage: Some(storage),
        ..ServeOptions::default()
    };
    Ok((Served::start_with(&options)?, handle))
}

/// Waits until a request is with the storage and stays there.
fn wait_stuck(handle: &FaultHandle, count: usize) {
    while handle.stuck_now() < count {
        std::thread::yield_now();
    }
}

#[test]
fn a_vring_without_a_kick_is_polled() -> Outcome {
    let served = Served::start()?;
    let mut front_end = FrontEnd::start(served.connect()?, Options::default())?;
    front_end
        .peer
        .confirm(code::SET_VRING_KICK, &NO_FD.to_ne_bytes(), &[])?;
    // The front end still writes to its kick; nobody listens to it any more.
    front_end.verify(4)?;
    assert_ne!(front_end.vring(0)?.kick.read()?, 0);
    served.stop()
}

#[test]
fn a_vring_without_a_call_is_polled_by_the_driver() -> Outcome {
    let served = Served::start()?;
    let mut front_end = FrontEnd::start(served.connect()?, Options::default())?;
    // A call is signalled once when its vring starts.
    wait_readable(&front_end.vring(0)?.call)?;
    front_end
        .peer
        .confirm(code::SET_VRING_CALL, &NO_FD.to_ne_bytes(), &[])?;
    // Answered by the worker, which has heard of the call by then.
    front_end
        .peer
        .confirm(code::SET_VRING_ENABLE, &words(&[0, 1]), &[])?;
    let head = front_end.submit(0, 0, (Kind::Out, 1), &[9; 512])?;
    let vring = front_end.vring(0)?;
    let used = loop {
        match vring.ring.take_used()? {
            Some(used) => break used,
            None => std::thread::yield_now(),
        }
    };
    assert_eq!(used, (u32::from(head), 1));
    let silent = vring.call.read().map_err(|error| error.kind());
    assert_eq!(silent, Err(io::ErrorKind::WouldBlock));
    served.stop()
}

#[test]
fn a_call_that_is_set_late_is_signalled() -> Outcome {
    let served = Served::start()?;
    let mut front_end = FrontEnd::start(served.connect()?, Options::default())?;
    wait_readable(&front_end.vring(0)?.call)?;
    front_end
        .peer
        .confirm(code::SET_VRING_CALL, &NO_FD.to_ne_bytes(), &[])?;
    front_end.submit(0, 0, (Kind::Out, 1), &[9; 512])?;
    while front_end.vring(0)?.ring.take_used()?.is_none() {
        std::thread::yield_now();
    }
    // The driver was owed a call that could not be made.
    let call = EventFd::new(EFD_NONBLOCK)?;
    front_end
        .peer
        .confirm(code::SET_VRING_CALL, &0_u64.to_ne_bytes(), &[borrow(&call)])?;
    wait_readable(&call)?;
    served.stop()
}

#[test]
fn kicks_and_calls_are_replaced_without_losing_a_request() -> Outcome {
    let served = Served::start()?;
    let mut front_end = FrontEnd::start(served.connect()?, Options::default())?;
    for round in 0..20_u64 {
        let head = front_end.submit(0, 0, (Kind::Out, round), &[1; 512])?;
        let file = 0_u64.to_ne_bytes();
        let (kick, call) = (EventFd::new(EFD_NONBLOCK)?, EventFd::new(EFD_NONBLOCK)?);
        front_end
            .peer
            .tell(code::SET_VRING_KICK, &file, &[borrow(&kick)])?;
        // With the call replaced the old one may have been used, so both are looked at.
        front_end
            .peer
            .confirm(code::SET_VRING_CALL, &file, &[borrow(&call)])?;
        let vring = front_end.vring(0)?;
        while vring.ring.used_index()? != vring.ring.next_avail() {
            std::thread::yield_now();
        }
        assert_eq!(vring.ring.take_used()?, Some((u32::from(head), 1)));
        (vring.kick, vring.call) = (kick, call);
        front_end.read(0, round, 512)?;
    }
    front_end.verify(5)?;
    served.stop()
}

#[test]
fn events_that_are_no_eventfds_are_refused() -> Outcome {
    let served = Served::start()?;
    let front_end = FrontEnd::start(served.connect()?, Options::default())?;
    let null = File::open("/dev/null")?;
    let (reader, _writer) = io::pipe()?;
    let (socket, _other) = std::os::unix::net::UnixStream::pair()?;
    for message in CALL {
        for fd in [
            front_end.ram.fd(),
            null.as_fd(),
            reader.as_fd(),
            socket.as_fd(),
        ] {
            for index in [0_u64, 1] {
                assert!(
                    front_end
                        .peer
                        .refused(message, &index.to_ne_bytes(), &[fd])?
                );
            }
        }
    }
    let mut front_end = front_end;
    front_end.verify(6)?;
    served.stop()
}

#[test]
fn a_disabled_vring_is_not_popped() -> Outcome {
    let served = Served::start()?;
    let options = Options {
        vrings: 2,
        ..Options::default()
    };
    let mut front_end = FrontEnd::start(served.connect()?, options)?;
    front_end
        .peer
        .confirm(code::SET_VRING_ENABLE, &words(&[0, 0]), &[])?;
    let head = front_end.submit(0, 0, (Kind::Out, 3), &[7; 512])?;
    // Requests of the other vring go by while this one waits, and so do messages.
    for sector in 100..110 {
        front_end.write(1, sector, &[1; 512])?;
    }
    front_end.peer.still_served()?;
    assert_eq!(front_end.vring(0)?.ring.used_index()?, 0);
    front_end
        .peer
        .confirm(code::SET_VRING_ENABLE, &words(&[0, 1]), &[])?;
    assert_eq!(front_end.wait(0, head)?, 0);
    assert_eq!(front_end.read(0, 3, 512)?, [7; 512]);
    served.stop()
}

#[test]
fn a_front_end_without_protocol_features_needs_no_enabling() -> Outcome {
    let served = Served::start()?;
    let mut front_end = FrontEnd::attach(served.connect()?, Options::default())?;
    let version_1 = (1_u64 << 32).to_ne_bytes();
    front_end
        .peer
        .confirm(code::SET_FEATURES, &version_1, &[])?;
    let vring = front_end.vring(0)?;
    let messages = [
        (code::SET_VRING_NUM, words(&[0, 16])),
        (code::SET_VRING_BASE, words(&[0, 0])),
        (code::SET_VRING_ADDR, vring.addr_payload(0)),
    ];
    for (code, payload) in messages {
        front_end.peer.confirm(code, &payload, &[])?;
    }
    let (kick, call) = (
        borrow(&front_end.vrings[0].kick),
        borrow(&front_end.vrings[0].call),
    );
    front_end
        .peer
        .confirm(code::SET_VRING_CALL, &[0; 8], &[call])?;
    front_end
        .peer
        .confirm(code::SET_VRING_KICK, &[0; 8], &[kick])?;
    front_end.verify(7)?;
    served.stop()
}

#[test]
fn get_vring_base_is_answered_when_nothing_is_in_flight() -> Outcome {
    let (served, handle) = sticky()?;
    let mut front_end = FrontEnd::start(served.connect()?, Options::default())?;
    handle.stick();
    let heads = [
        front_end.submit(0, 0, (Kind::Out, 0), &[1; 512])?,
        front_end.submit(0, 1, (Kind::Out, 8), &[2; 512])?,
    ];
    wait_stuck(&handle, 2);
    front_end
        .peer
        .tell(code::GET_VRING_BASE, &words(&[0, 0]), &[])?;
    assert_eq!(front_end.vring(0)?.ring.used_index()?, 0);
    handle.release();
    let reply = front_end.peer.reply_to(code::GET_VRING_BASE)?;
    // Whatever was in flight is published before the answer leaves.
    assert_eq!(front_end.vring(0)?.ring.used_index()?, 2);
    assert_eq!(reply.payload, words(&[0, 2]));
    for head in heads {
        assert_eq!(front_end.wait(0, head)?, 0);
    }
    // It goes on where it stopped.
    front_end.start_vring(0, 2)?;
    assert_eq!(front_end.read(0, 8, 512)?, [2; 512]);
    front_end.verify(8)?;
    served.stop()
}

#[test]
fn requests_offered_to_a_stopped_vring_are_found_at_its_start() -> Outcome {
    let served = Served::start()?;
    let mut front_end = FrontEnd::start(served.connect()?, Options::default())?;
    front_end.verify(9)?;
    let base = front_end.peer.vring_base(0)?;
    let head = front_end.submit(0, 0, (Kind::Out, 5), &[5; 512])?;
    front_end.peer.still_served()?;
    // Its kick was taken before the start: the ring is scanned once all the same.
    front_end.vring(0)?.kick.read()?;
    front_end.start_vring(0, u16::try_from(base)?)?;
    assert_eq!(front_end.wait(0, head)?, 0);
    served.stop()
}

#[test]
fn a_stopped_kick_belongs_to_the_front_end_again() -> Outcome {
    let served = Served::start()?;
    let mut front_end = FrontEnd::start(served.connect()?, Options::default())?;
    front_end.verify(10)?;
    front_end.peer.vring_base(0)?;
    let vring = front_end.vring(0)?;
    let _ = vring.kick.read();
    vring.kick.write(3)?;
    front_end.peer.still_served()?;
    assert_eq!(
        front_end.vring(0)?.kick.read()?,
        3,
        "nobody else has taken it"
    );
    served.stop()
}

#[test]
fn a_device_reset_drains_and_starts_over() -> Outcome {
    let (served, handle) = sticky()?;
    let options = Options {
        vrings: 2,
        ..Options::default()
    };
    let mut front_end = FrontEnd::start(served.connect()?, options)?;
    handle.stick();
    for index in 0..2 {
        front_end.submit(index, 0, (Kind::Out, u64::from(index)), &[3; 512])?;
    }
    wait_stuck(&handle, 2);
    front_end.peer.send(code::RESET_DEVICE, 0x9, &[], &[])?;
    assert_eq!(front_end.vring(0)?.ring.used_index()?, 0);
    handle.release();
    assert_eq!(front_end.peer.reply_to(code::RESET_DEVICE)?.payload, [0; 8]);
    for index in 0..2 {
        assert_eq!(front_end.wait(index, 0)?, 0);
    }
    // Its vrings have nothing left of what they were told, its memory has stayed.
    let kick = front_end.vring(0)?.kick.try_clone()?;
    assert!(
        front_end
            .peer
            .refused(code::SET_VRING_KICK, &[0; 8], &[borrow(&kick)])?
    );
    front_end.negotiate(0)?;
    for index in 0..2 {
        front_end.start_vring(index, 1)?;
    }
    front_end.verify(11)?;
    served.stop()
}

#[test]
fn reset_owner_disables_and_forgets_nothing() -> Outcome {
    let served = Served::start()?;
    let mut front_end = FrontEnd::start(served.connect()?, Options::default())?;
    front_end.peer.confirm(code::RESET_OWNER, &[], &[])?;
    let head = front_end.submit(0, 0, (Kind::Out, 5), &[5; 512])?;
    front_end.peer.still_served()?;
    assert_eq!(front_end.vring(0)?.ring.used_index()?, 0);
    front_end
        .peer
        .confirm(code::SET_VRING_ENABLE, &words(&[0, 1]), &[])?;
    assert_eq!(front_end.wait(0, head)?, 0);
    served.stop()
}

#[test]
fn the_largest_ring_works_and_one_beyond_is_refused() -> Outcome {
    let served = Served::start()?;
    let options = Options {
        size: 32768,
        ..Options::default()
    };
    let mut front_end = FrontEnd::start(served.connect()?, options)?;
    front_end.verify(12)?;
    let sizes = [0, 3, 32769, 65536];
    for size in sizes {
        assert!(
            front_end
                .peer
                .refused(code::SET_VRING_NUM, &words(&[1, size]), &[])?
        );
    }
    served.stop()
}

#[test]
fn the_last_vring_works_and_one_beyond_is_refused() -> Outcome {
    let served = Served::start()?;
    let mut front_end = FrontEnd::attach(served.connect()?, Options::default())?;
    let payload = front_end.vring(0)?.addr_payload(255);
    let vring = &front_end.vrings[0];
    let peer = &front_end.peer;
    peer.confirm(code::SET_VRING_NUM, &words(&[255, 16]), &[])?;
    peer.confirm(code::SET_VRING_BASE, &words(&[255, 0]), &[])?;
    peer.confirm(code::SET_VRING_ADDR, &payload, &[])?;
    let file = 255_u64.to_ne_bytes();
    peer.confirm(code::SET_VRING_CALL, &file, &[borrow(&vring.call)])?;
    peer.confirm(code::SET_VRING_KICK, &file, &[borrow(&vring.kick)])?;
    peer.confirm(code::SET_VRING_ENABLE, &words(&[255, 1]), &[])?;
    assert!(peer.refused(code::SET_VRING_NUM, &words(&[256, 16]), &[])?);
    assert!(peer.refused(code::SET_VRING_ENABLE, &words(&[256, 1]), &[])?);
    front_end.verify(13)?;
    served.stop()
}
