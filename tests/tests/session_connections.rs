//! Front ends that come, go, and come again; daemons that are told to leave.

use std::fs;
use std::io::ErrorKind;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Mutex;

use blockdev::fault::{FaultHandle, FaultPlan};
use blockdev::open;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vublk::control::{ControlError, Listen, ListenError};
use vublk_tests::frontend::{
    FrontEnd, Kind, Options, Outcome, PeerError, ServeOptions, Served, code, open_descriptors,
    words,
};

/// Descriptors are counted for the whole process, so tests that open any take turns.
static TURN: Mutex<()> = Mutex::new(());

macro_rules! turn {
    () => {
        let _turn = TURN
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
    };
}

fn sticky() -> Outcome<(ServeOptions, FaultHandle)> {
    let (storage, handle) = open::fault(FaultPlan::benign(4 << 20, 512, 7))?;
    Ok((
        ServeOptions {
            storage: Some(storage),
            ..ServeOptions::default()
        },
        handle,
    ))
}

fn scratch(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("vublk-{}-{name}", std::process::id()))
}

/// Why a daemon did not start.
fn why(served: Outcome<Served>) -> Outcome<ListenError> {
    let error = served.err().ok_or("it started")?;
    match *error.downcast::<ControlError>()? {
        ControlError::Listen(error) => Ok(error),
        other @ (ControlError::Setup { .. }
        | ControlError::Events(_)
        | ControlError::Interrupted
        | ControlError::DrainTimedOut { .. }) => Err(other.into()),
    }
}

#[test]
fn front_ends_leave_no_descriptor_behind() -> Outcome {
    turn!();
    let served = Served::start()?;
    let mut counts = Vec::new();
    for round in 0..12 {
        let options = Options {
            vrings: 4,
            ..Options::default()
        };
        let mut front_end = FrontEnd::start(served.connect()?, options)?;
        front_end.verify(round)?;
        // Everything a front end can hand over, some of it refused.
        let (socket, other) = UnixStream::pair()?;
        let file = 9_u64.to_ne_bytes();
        front_end
            .peer
            .confirm(code::SET_BACKEND_REQ_FD, &[], &[other.as_fd()])?;
        front_end
            .peer
            .refused(code::SET_VRING_KICK, &file, &[socket.as_fd()])?;
        front_end
            .peer
            .tell(code::SET_OWNER, &[], &[socket.as_fd(); 8])?;
        front_end.peer.tell(99, &[], &[socket.as_fd(); 8])?;
        match round % 3 {
            0 => drop(front_end.peer.vring_base(0)?),
            1 => front_end.peer.send_bytes(&[1, 0, 0], &[socket.as_fd()])?,
            _ => front_end.peer.still_served()?,
        }
        drop((front_end, socket, other));
        // The next one is accepted only when everything of the last one is closed.
        let next = served.connect()?;
        // Every worker has gone round once more, and has closed what it was done with.
        next.confirm(code::SET_PROTOCOL_FEATURES, &8_u64.to_ne_bytes(), &[])?;
        next.confirm(code::SET_MEM_TABLE, &words(&[0, 0]), &[])?;
        counts.push(open_descriptors()?);
    }
    assert!(
        counts.windows(2).skip(1).all(|pair| pair[0] == pair[1]),
        "{counts:?}"
    );
    served.stop()
}

#[test]
fn a_second_front_end_waits_for_the_first_to_leave() -> Outcome {
    turn!();
    let served = Served::start()?;
    let mut first = FrontEnd::start(served.connect()?, Options::default())?;
    let second = served.connect()?;
    second.tell(code::GET_FEATURES, &[], &[])?;
    first.verify(40)?;
    second.stream().set_nonblocking(true)?;
    let waiting = second.reply().err().ok_or("it was served")?;
    let PeerError::Io(waiting) = waiting else {
        return Err(waiting.into());
    };
    assert_eq!(waiting.kind(), ErrorKind::WouldBlock);
    second.stream().set_nonblocking(false)?;
    drop(first);
    second.reply_to(code::GET_FEATURES)?;
    FrontEnd::start(second, Options::default())?.verify(41)?;
    served.stop()
}

#[test]
fn sigterm_waits_for_requests_in_flight() -> Outcome {
    turn!();
    let (options, handle) = sticky()?;
    let served = Served::start_with(&options)?;
    let mut front_end = FrontEnd::start(served.connect()?, Options::default())?;
    handle.stick();
    let head = front_end.submit(0, 0, (Kind::Out, 0), &[1; 512])?;
    while handle.stuck_now() == 0 {
        std::thread::yield_now();
    }
    let path = served.path().to_owned();
    served.stop_handle().stop()?;
    while path.exists() {
        // Until nobody can connect to a daemon that leaves.
        std::thread::yield_now();
    }
    assert_eq!(front_end.vring(0)?.ring.used_index()?, 0);
    // A front end takes the end of the connection for the end of everything, so it stays open.
    let a_while = Timespec {
        tv_sec: 0,
        tv_nsec: 100_000_000,
    };
    let mut polled = [PollFd::new(front_end.peer.stream(), PollFlags::IN)];
    assert_eq!(
        poll(&mut polled, Some(&a_while))?,
        0,
        "the connection ended first"
    );
    handle.release();
    assert!(front_end.peer.closed()?);
    let used = front_end.vring(0)?.ring.take_used()?;
    assert_eq!(used, Some((u32::from(head), 1)));
    served.left()
}

#[test]
fn a_second_sigterm_does_not_wait() -> Outcome {
    turn!();
    let (options, handle) = sticky()?;
    let served = Served::start_with(&options)?;
    let mut front_end = FrontEnd::start(served.connect()?, Options::default())?;
    handle.stick();
    front_end.submit(0, 0, (Kind::Out, 0), &[1; 512])?;
    while handle.stuck_now() == 0 {
        std::thread::yield_now();
    }
    let (stop, path) = (served.stop_handle(), served.path().to_owned());
    stop.stop()?;
    while path.exists() {
        std::thread::yield_now();
    }
    stop.stop()?;
    let left = served
        .left()
        .err()
        .ok_or("it left as if nothing was in flight")?;
    assert!(matches!(
        *left.downcast::<ControlError>()?,
        ControlError::Interrupted
    ));
    handle.release();
    Ok(())
}

#[test]
fn a_connected_socket_is_served_until_its_front_end_leaves() -> Outcome {
    turn!();
    let (served, peer) = Served::connected(&ServeOptions::default())?;
    let mut front_end = FrontEnd::start(peer, Options::default())?;
    front_end.verify(42)?;
    drop(front_end);
    served.left()
}

#[test]
fn a_listening_socket_that_was_handed_over_is_listened_on() -> Outcome {
    turn!();
    let path = scratch("handed-over");
    let listener = OwnedFd::from(UnixListener::bind(&path)?);
    let served = Served::listen(Listen::Fd(listener), path.clone(), &ServeOptions::default())?;
    for round in 43..45 {
        FrontEnd::start(served.connect()?, Options::default())?.verify(round)?;
    }
    served.stop()?;
    assert!(path.exists(), "whoever made the socket removes it");
    Ok(fs::remove_file(path)?)
}

#[test]
fn descriptors_that_are_no_sockets_of_ours_are_told() -> Outcome {
    turn!();
    let start = |fd: OwnedFd| {
        why(Served::listen(
            Listen::Fd(fd),
            PathBuf::new(),
            &ServeOptions::default(),
        ))
    };
    let file = fs::File::open("/dev/null")?;
    assert!(matches!(start(file.into())?, ListenError::WrongKind { .. }));
    let (datagram, _other) = UnixDatagram::pair()?;
    assert!(matches!(
        start(datagram.into())?,
        ListenError::WrongKind { .. }
    ));
    let tcp = std::net::TcpListener::bind("127.0.0.1:0")?;
    assert!(matches!(start(tcp.into())?, ListenError::WrongKind { .. }));
    Ok(())
}

#[test]
fn a_stale_socket_is_replaced_and_a_live_one_is_not() -> Outcome {
    turn!();
    let path = scratch("stale");
    drop(UnixListener::bind(&path)?);
    assert!(path.exists());
    let start = || {
        Served::listen(
            Listen::Path(path.clone()),
            path.clone(),
            &ServeOptions::default(),
        )
    };
    let served = start()?;
    FrontEnd::start(served.connect()?, Options::default())?.verify(46)?;
    assert!(matches!(why(start())?, ListenError::InUse(taken) if taken == path));
    FrontEnd::start(served.connect()?, Options::default())?.verify(47)?;
    served.stop()?;
    assert!(!path.exists(), "it is removed when the daemon leaves");
    Ok(())
}

#[test]
fn a_full_backlog_is_not_taken_for_a_stale_socket() -> Outcome {
    turn!();
    let path = scratch("backlog");
    let listener = UnixListener::bind(&path)?;
    rustix::net::listen(&listener, 0)?;
    let _waits = UnixStream::connect(&path)?;
    let served = Served::listen(
        Listen::Path(path.clone()),
        path.clone(),
        &ServeOptions::default(),
    );
    assert!(matches!(why(served)?, ListenError::InUse(taken) if taken == path));
    Ok(fs::remove_file(path)?)
}

#[test]
fn a_file_at_the_path_is_left_alone() -> Outcome {
    turn!();
    let path = scratch("file");
    fs::write(&path, "kept")?;
    let start = Served::listen(
        Listen::Path(path.clone()),
        path.clone(),
        &ServeOptions::default(),
    );
    assert!(matches!(why(start)?, ListenError::NotSocket(taken) if taken == path));
    assert_eq!(fs::read(&path)?, b"kept");
    fs::remove_file(&path)?;
    let nowhere = PathBuf::from("/nowhere/vublk.sock");
    let start = Served::listen(
        Listen::Path(nowhere.clone()),
        nowhere,
        &ServeOptions::default(),
    );
    assert!(matches!(why(start)?, ListenError::Bind { .. }));
    Ok(())
}

#[test]
fn a_socket_that_took_the_place_of_ours_is_not_removed() -> Outcome {
    turn!();
    let served = Served::start()?;
    let path = served.path().to_owned();
    fs::remove_file(&path)?;
    let _other = UnixListener::bind(&path)?;
    served.stop()?;
    assert!(path.exists());
    Ok(fs::remove_file(path)?)
}

#[test]
fn a_front_end_that_stops_reading_loses_its_connection() -> Outcome {
    turn!();
    let served = Served::start()?;
    let peer = served.connect()?;
    // Replies pile up until the socket is full; the daemon never waits for room.
    let flooded = loop {
        if let Err(error) = peer.tell(code::GET_FEATURES, &[], &[]) {
            break error;
        }
    };
    assert!(matches!(flooded, PeerError::Gone), "{flooded}");
    FrontEnd::start(served.connect()?, Options::default())?.verify(48)?;
    served.stop()
}

#[test]
fn a_flood_of_refused_messages_changes_nothing() -> Outcome {
    turn!();
    let served = Served::start()?;
    let mut front_end = FrontEnd::start(served.connect()?, Options::default())?;
    for index in 0..5000 {
        front_end
            .peer
            .tell(code::SET_VRING_NUM, &words(&[index, 3]), &[])?;
    }
    front_end.verify(49)?;
    served.stop()
}
