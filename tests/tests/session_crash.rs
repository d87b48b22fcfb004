//! What a front end finds again when the daemon, or the connection, was gone for a while.

use blockdev::fault::FaultPlan;
use blockdev::open;
use vublk_tests::frontend::{
    DirtyLog, FrontEnd, InflightFile, Kind, LOG_ALL, Options, Outcome, ServeOptions, Served,
};

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
    let (device, handle) = open::fault(FaultPlan::benign(4 << 20, 512, 1))?;
    let served = Served::start_with(&ServeOptions {
        storage: Some(device),
        ..ServeOptions::default()
    })?;
    let (mut front_end, inflight) = recorded(&served)?;
    front_end.verify(1)?;
    handle.stick();
    let data = [0x5a; 4096];
    let writes: Vec<u16> = (0..5)
        .map(|place| front_end.submit(1, place, (Kind::Out, u64::from(place) * 8), &data))
        .collect::<Outcome<_>>()?;
    while handle.stuck_now() < 5 {
        std::thread::yield_now();
    }
    // The connection goes; what is stuck ends, and nobody is told.
    let (nobody, _) = std::os::unix::net::UnixStream::pair()?;
    front_end.peer = vublk_tests::frontend::Peer::new(nobody)?;
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
    assert_eq!(log.take()?, [status / 4096, data / 4096]);
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
    assert_eq!(first.take()?, read);
    front_end.set_log(&second)?;
    second.take()?;
    front_end.read(1, 0, 8192)?;
    assert_eq!((first.take()?, second.take()?), (vec![], read.to_vec()));
    front_end.write(1, 0, &[7; 8192])?;
    assert_eq!(second.take()?, [used, status / 4096]);

    front_end.stop_logging(0)?;
    second.take()?;
    front_end.read(1, 0, 8192)?;
    assert_eq!(second.take()?, [0_u64; 0], "the log was given back");
    served.stop()
}
