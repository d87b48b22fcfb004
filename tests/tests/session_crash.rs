//! What a front end finds again when the daemon, or the connection, was gone for a while.

use std::os::unix::net::UnixStream;

use blockdev::fault::{FaultHandle, FaultPlan};
use blockdev::open;
use vublk_tests::frontend::{
    Descriptor, DirtyLog, FrontEnd, InflightFile, Kind, LOG_ALL, Options, Outcome, Peer,
    ServeOptions, Served, code, words,
};

/// Storage on which requests stick, and the daemon that serves it.
fn sticky() -> Outcome<(Served, FaultHandle)> {
    let (device, handle) = open::fault(FaultPlan::benign(4 << 20, 512, 1))?;
    let served = Served::start_with(&ServeOptions {
        storage: Some(device),
        ..ServeOptions::default()
    })?;
    Ok((served, handle))
}

fn wait_stuck(handle: &FaultHandle, count: usize) {
    while handle.stuck_now() < count {
        std::thread::yield_now();
    }
}

/// The front end's connection goes; the daemon learns of it.
fn hang_up(front_end: &mut FrontEnd) -> Outcome {
    let (nobody, _) = UnixStream::pair()?;
    front_end.peer = Peer::new(nobody)?;
    Ok(())
}

fn options() -> Options {
    Options {
        vrings: 2,
        size: 64,
        features: 0,
    }
}

/// A front end with an in-flight region, and both vrings started.
fn recorded(served: &Served) -> Outcome<(FrontEnd, InflightFile)> {
    let mut front_end = FrontEnd::attach(served.connect()?, options())?;
    let inflight = InflightFile::get(&front_end.peer, 2, 64)?;
    inflight.set(&front_end.peer)?;
    for index in 0..2 {
        front_end.start_vring(index, 0)?;
    }
    Ok((front_end, inflight))
}

#[test]
fn requests_of_a_lost_connection_are_done_again() -> Outcome {
    let (served, handle) = sticky()?;
    let (mut front_end, inflight) = recorded(&served)?;
    front_end.verify(1)?;
    handle.stick();
    let data = [0x5a; 4096];
    let writes: Vec<u16> = (0..5)
        .map(|place| front_end.submit(1, place, (Kind::Out, u64::from(place) * 8), &data))
        .collect::<Outcome<_>>()?;
    wait_stuck(&handle, 5);
    // What is stuck ends, and nobody is told.
    hang_up(&mut front_end)?;
    handle.release();
    let peer = served.connect()?;
    front_end.reconnect(peer, 0, &inflight)?;
    for head in writes {
        assert_eq!(front_end.wait(1, head)?, 0);
    }
    for place in 0..5 {
        assert_eq!(front_end.read(1, place * 8, 4096)?, data);
    }
    front_end.verify(2)?;
    for index in 0..2 {
        let base = front_end.peer.vring_base(u32::from(index))?;
        let vring = front_end.vring(index)?;
        assert_eq!(base, u32::from(vring.ring.next_avail()));
    }
    served.stop()
}

#[test]
fn nothing_is_popped_while_it_cannot_be_logged() -> Outcome {
    let served = Served::start()?;
    let mut front_end = FrontEnd::attach(
        served.connect()?,
        Options {
            features: LOG_ALL,
            ..options()
        },
    )?;
    for index in 0..2 {
        front_end.start_vring(index, 0)?;
    }
    let head = front_end.submit(0, 0, (Kind::In, 0), &[0; 512])?;
    // Everything that was said is done by the time this is answered.
    front_end.peer.still_served()?;
    front_end.log_used_rings(false)?;
    assert_eq!(front_end.vring(0)?.ring.used_index()?, 0);
    let log = DirtyLog::new(front_end.ram.layout().size, 0)?;
    front_end.set_log(&log)?;
    assert_eq!(front_end.wait(0, head)?, 0);
    let [_, status, data] = front_end.vring(0)?.places(0);
    front_end.assert_marked(&log.take()?, &[status / 4096, data / 4096]);
    served.stop()
}

#[test]
fn what_requests_change_is_marked_in_the_log_of_the_moment() -> Outcome {
    let served = Served::start()?;
    let mut front_end = FrontEnd::start(served.connect()?, options())?;
    front_end.verify(3)?;
    let size = front_end.ram.layout().size;
    let [first, second] = [DirtyLog::new(size, 0)?, DirtyLog::new(size, 4096)?];
    front_end.start_logging(&first, 0)?;
    let used = front_end.vring(1)?.ring.used_addr() / 4096;
    let all_used = front_end.vring(0)?.ring.used_addr() / 4096;
    assert_eq!(first.take()?, [all_used, used], "both used rings, once");
    let [_, status, data] = front_end.vring(1)?.places(0);
    let read = [used, status / 4096, data / 4096, data / 4096 + 1];

    front_end.read(1, 0, 8192)?;
    front_end.assert_marked(&first.take()?, &read);
    front_end.set_log(&second)?;
    front_end.assert_marked(&first.take()?, &[]);
    second.take()?;
    front_end.read(1, 0, 8192)?;
    assert_eq!(first.take()?, [0_u64; 0], "it was swapped");
    front_end.assert_marked(&second.take()?, &read);
    front_end.write(1, 0, &[7; 8192])?;
    front_end.assert_marked(&second.take()?, &[used, status / 4096]);

    front_end.stop_logging(0)?;
    second.take()?;
    front_end.read(1, 0, 8192)?;
    assert_eq!(second.take()?, [0_u64; 0], "the log was given back");
    served.stop()
}

/// Requests that read one sector each, all into the same memory.
fn offer_reads(front_end: &mut FrontEnd, count: u16) -> Outcome {
    let ram = front_end.ram.clone();
    let vring = front_end.vring(0)?;
    let [header, status, bytes] = vring.places(1);
    ram.write(header, &Kind::In.header(0))?;
    let chain = [
        Descriptor::source(header, 16),
        Descriptor::dest(bytes, 512),
        Descriptor::dest(status, 1),
    ];
    for place in 0..count {
        vring.ring.offer_chain(place * 3, &chain)?;
    }
    vring.kick.write(1)?;
    Ok(())
}

/// More than a vring may start at once, so that others get their turn.
#[test]
fn more_requests_than_fit_a_turn_are_done_again() -> Outcome {
    let (served, handle) = sticky()?;
    let options = Options {
        vrings: 1,
        size: 1024,
        features: 0,
    };
    let mut front_end = FrontEnd::attach(served.connect()?, options)?;
    let inflight = InflightFile::get(&front_end.peer, 1, 1024)?;
    inflight.set(&front_end.peer)?;
    front_end.start_vring(0, 0)?;
    for (round, count) in [(1, 129), (2, 300)] {
        handle.stick();
        offer_reads(&mut front_end, count)?;
        wait_stuck(&handle, count.into());
        hang_up(&mut front_end)?;
        handle.release();
        front_end.reconnect(served.connect()?, 0, &inflight)?;
        for place in 0..count {
            front_end.vring(0)?.wait_used(place * 3)?;
        }
        front_end.verify(round)?;
    }
    // A stop waits for all of them as well, popped or not.
    handle.stick();
    offer_reads(&mut front_end, 300)?;
    wait_stuck(&handle, 300);
    hang_up(&mut front_end)?;
    handle.release();
    front_end.reconnect(served.connect()?, 0, &inflight)?;
    let base = front_end.peer.vring_base(0)?;
    assert_eq!(base, u32::from(front_end.vring(0)?.ring.used_index()?));
    served.stop()
}

/// Cloud Hypervisor stops no vring when it pauses its guest to copy the last pages: it disables
/// them, and takes the acknowledgement for the end.
#[test]
fn a_disabled_vring_is_quiet_when_that_is_acknowledged() -> Outcome {
    let (served, handle) = sticky()?;
    let mut front_end = FrontEnd::start(served.connect()?, options())?;
    handle.stick();
    let heads: Vec<u16> = (0..3)
        .map(|place| front_end.submit(0, place, (Kind::In, 0), &[0xa5; 4096]))
        .collect::<Outcome<_>>()?;
    wait_stuck(&handle, 3);
    let releasing = std::thread::spawn(move || handle.release());
    let disable = words(&[0, 0]);
    front_end
        .peer
        .confirm(code::SET_VRING_ENABLE, &disable, &[])?;
    assert_eq!(
        front_end.vring(0)?.ring.used_index()?,
        3,
        "all of it came back"
    );
    assert!(releasing.join().is_ok());
    for head in heads {
        assert_eq!(front_end.wait(0, head)?, 0);
    }
    served.stop()
}

/// A vring stops without waiting for what is in flight, and another daemon would do that again.
#[test]
fn a_suspended_vring_leaves_its_requests_recorded() -> Outcome {
    for old_form in [false, true] {
        let (served, handle) = sticky()?;
        let (mut front_end, inflight) = recorded(&served)?;
        front_end.verify(4)?;
        let before = front_end.vring(1)?.ring.used_index()?;
        handle.stick();
        let data = [0x77; 4096];
        let heads: Vec<u16> = (0..4)
            .map(|place| front_end.submit(1, place, (Kind::Out, u64::from(place) * 8), &data))
            .collect::<Outcome<_>>()?;
        wait_stuck(&handle, 4);
        let base = if old_form {
            front_end.peer.ask(code::GET_VRING_BASE, &words(&[1, 1]))?
        } else {
            let skip = code::GET_VRING_BASE_SKIP_DRAIN;
            front_end.peer.ask(skip, &words(&[1, 0]))?
        };
        let next = u32::from(front_end.vring(1)?.ring.next_avail());
        assert_eq!(base, words(&[1, next]), "all of them were taken");
        assert_eq!(front_end.vring(1)?.ring.used_index()?, before);
        assert_eq!(handle.counts().aborted, 4, "and taken back");
        handle.release();
        // The other vring goes on; this one does again what it left.
        front_end.write(0, 1000, &[3; 512])?;
        front_end.start_vring(1, 0)?;
        for head in heads {
            assert_eq!(front_end.wait(1, head)?, 0);
        }
        assert_eq!(front_end.read(1, 24, 4096)?, data);
        drop(inflight);
        served.stop()?;
    }
    Ok(())
}

#[test]
fn storage_that_cannot_abort_does_not_offer_to_skip_the_drain() -> Outcome {
    let served = Served::start()?;
    let peer = served.connect()?;
    let offered = peer.ask_number(code::GET_PROTOCOL_FEATURES)?;
    assert_eq!(offered & (1 << 20 | 1 << 23), 0);
    drop(peer);
    // One that asks all the same, in the older form, gets what GET_VRING_BASE always gave.
    let mut front_end = FrontEnd::start(served.connect()?, options())?;
    front_end.verify(5)?;
    let base = front_end.peer.ask(code::GET_VRING_BASE, &words(&[1, 1]))?;
    let next = u32::from(front_end.vring(1)?.ring.next_avail());
    assert_eq!(base, words(&[1, next]));
    served.stop()
}
