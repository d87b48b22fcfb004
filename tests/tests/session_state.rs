//! The device's state, carried from one daemon to another (vhost-user, *Migrating back-end state*).

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use vublk_tests::frontend::{FrontEnd, Options, Outcome, Peer, Served, code, words};

/// Where the write cache's mode is in the configuration space, and SET_CONFIG's payload.
const WRITEBACK: u32 = 32;
const SAVE: u32 = 0;
const LOAD: u32 = 1;
/// Success, and no file of the daemon's.
const TRANSFER: u64 = 1 << 8;
/// As above, and an error.
const REFUSED: u64 = 1 << 8 | 1;

fn transfer(peer: &Peer, direction: u32, file: impl AsFd) -> Outcome<u64> {
    let payload = words(&[direction, 0]);
    let (reply, ours) = peer.ask_file(code::SET_DEVICE_STATE_FD, &payload, &[file.as_fd()])?;
    assert!(ours.is_none(), "no file comes back");
    Ok(u64::from_ne_bytes(reply.as_slice().try_into()?))
}

fn check(peer: &Peer) -> Outcome<u64> {
    Ok(peer.ask_number(code::CHECK_DEVICE_STATE)?)
}

fn saved(peer: &Peer) -> Outcome<Vec<u8>> {
    let (mut read, write) = std::io::pipe()?;
    assert_eq!(transfer(peer, SAVE, &write)?, TRANSFER);
    drop(write);
    let mut state = Vec::new();
    read.read_to_end(&mut state)?;
    assert_eq!(check(peer)?, 0);
    Ok(state)
}

fn loaded(peer: &Peer, state: &[u8]) -> Outcome<u64> {
    let (read, mut write) = std::io::pipe()?;
    assert_eq!(transfer(peer, LOAD, &read)?, TRANSFER);
    write.write_all(state)?;
    drop(write);
    check(peer)
}

fn set_writeback(peer: &Peer, on: u8) -> Outcome {
    let payload = [words(&[WRITEBACK, 1, 0]), vec![on]].concat();
    Ok(peer.confirm(code::SET_CONFIG, &payload, &[])?)
}

#[test]
fn a_guests_write_through_goes_with_it() -> Outcome {
    let [source, destination] = [Served::start()?, Served::start()?];
    let from = FrontEnd::attach(source.connect()?, Options::default())?;
    let to = FrontEnd::attach(destination.connect()?, Options::default())?;
    for on in [0, 1] {
        set_writeback(&from.peer, on)?;
        let state = saved(&from.peer)?;
        assert_eq!(state.len(), 16);
        set_writeback(&to.peer, 1 - on)?;
        assert_eq!(loaded(&to.peer, &state)?, 0);
        assert_eq!(to.peer.config(WRITEBACK, 1)?, [on]);
    }
    source.stop()?;
    destination.stop()
}

#[test]
fn what_is_no_state_is_refused_and_changes_nothing() -> Outcome {
    let served = Served::start()?;
    let front_end = FrontEnd::attach(served.connect()?, Options::default())?;
    let peer = &front_end.peer;
    assert_eq!(check(peer)?, 1, "nothing was transferred");
    let good = saved(peer)?;
    assert_eq!(check(peer)?, 1, "it was checked already");
    let mut later = good.clone();
    later[8] = 2;
    let mut odd = good.clone();
    odd[12] = 7;
    for bad in [
        &[][..],
        &good[..15],
        &[good.clone(), vec![0]].concat(),
        &later,
        &odd,
        &[0; 8192],
    ] {
        assert_eq!(loaded(peer, bad)?, 1, "{bad:?}");
    }
    assert_eq!(peer.config(WRITEBACK, 1)?, [1]);
    assert_eq!(loaded(peer, &good)?, 0);
    served.stop()
}

#[test]
fn no_transfer_waits_for_its_other_end() -> Outcome {
    let served = Served::start()?;
    let mut front_end = FrontEnd::attach(served.connect()?, Options::default())?;
    let peer = &front_end.peer;
    // Nobody has written, and nobody has closed.
    let (ours, theirs) = UnixStream::pair()?;
    assert_eq!(transfer(peer, LOAD, &theirs)?, TRANSFER);
    assert_eq!(check(peer)?, 1);
    drop(ours);
    let null = File::options().read(true).write(true).open("/dev/null")?;
    assert_eq!(transfer(peer, SAVE, &null)?, REFUSED);
    // A pipe that is full.
    let (_read, mut write) = std::io::pipe()?;
    write.write_all(&[0; 65536])?;
    assert_eq!(transfer(peer, SAVE, &write)?, REFUSED);
    let (_read, write) = std::io::pipe()?;
    for (direction, phase) in [(2, 0), (0, 1)] {
        let payload = words(&[direction, phase]);
        let (reply, _) = peer.ask_file(code::SET_DEVICE_STATE_FD, &payload, &[write.as_fd()])?;
        assert_eq!(reply, REFUSED.to_ne_bytes());
    }
    // Only while nothing runs.
    front_end.start_vring(0, 0)?;
    assert_eq!(transfer(&front_end.peer, SAVE, &write)?, REFUSED);
    front_end.verify(1)?;
    served.stop()
}
