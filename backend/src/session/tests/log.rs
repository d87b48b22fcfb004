//! When the messages about the log are answered, and what the workers are told before that.

use super::*;

const LOG_ALL: u64 = 1 << 26;
const ACKED: u64 = PROTOCOL | VERSION_1;

/// A log for the first regions, so many bytes of it.
fn log(size: u64) -> Message {
    let file = memfd_create("log", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, size).unwrap();
    Message::SetLogBase {
        size,
        offset: 0,
        file,
    }
}

/// A session whose vring 1 has started, with nothing logged.
fn started() -> (Session, Notes) {
    let (mut session, crew) = ready();
    session.send(kick(1), &crew).unwrap();
    crew.take();
    (session, crew)
}

/// As above, with a log for just the memory there is, and everything logged.
fn logging() -> (Session, Notes) {
    let (mut session, crew) = started();
    session.send(log(SIZE / 4096 / 8), &crew).unwrap();
    session
        .send(Message::SetFeatures(ACKED | LOG_ALL), &crew)
        .unwrap();
    crew.take();
    (session, crew)
}

/// Commands by name, each with its worker.
fn names(told: &[(usize, Command)]) -> Vec<(usize, &'static str)> {
    told.iter()
        .map(|(worker, command)| {
            let name = match command {
                Command::SetLog(_, Some(_)) => "log",
                Command::SetLog(_, None) => "no log",
                Command::SetFeatures(_, acked) if acked & LOG_ALL != 0 => "log all",
                Command::SetFeatures(..) => "log nothing",
                Command::SetUsedLog(_, Some(_)) => "log used",
                Command::SetUsedLog(_, None) => "log no used",
                Command::Fence(..) => "fence",
                other @ (Command::SetTable { .. }
                | Command::Start(..)
                | Command::Stop(..)
                | Command::Enable(..)
                | Command::SetKick(..)
                | Command::SetCall(..)
                | Command::SetErr(..)
                | Command::Resize(_)
                | Command::SetPins(..)
                | Command::Quit) => panic!("{other:?}"),
            };
            (*worker, name)
        })
        .collect()
}

/// The answer comes when the last worker has obeyed, and not before; what it is.
fn answered_by_all(session: &mut Session, crew: &Notes, wait: Wait, fence: u64) -> Option<Reply> {
    assert!(session.settle(wait).is_none(), "nobody has obeyed");
    session.reported(1, Report::Fenced(DEVICE, fence), crew);
    assert!(session.settle(wait).is_none(), "worker 0 may still mark");
    session.reported(0, Report::Fenced(DEVICE, fence), crew);
    session.settle(wait).expect("both have obeyed").unwrap()
}

#[test]
fn a_log_is_answered_for_when_no_worker_marks_another() {
    let (mut session, crew) = started();
    for size in [1 << 12, 1 << 10] {
        let step = session.send(log(size), &crew).unwrap();
        let Step::Wait(wait @ Wait::Logged { fence, .. }) = step else {
            panic!("{step:?}");
        };
        let told = crew.take();
        let each = [(0, "log"), (1, "log"), (0, "fence"), (1, "fence")];
        assert_eq!(names(&told), each);
        let reply = answered_by_all(&mut session, &crew, wait, fence);
        assert_eq!(reply, Some(Reply::Log { size, offset: 0 }));
    }
}

#[test]
fn logging_is_acknowledged_when_every_worker_does_or_does_not() {
    let (mut session, crew) = started();
    session.send(log(32), &crew).unwrap();
    crew.take();
    let on: &[_] = &[(0, "log all"), (1, "log all"), (0, "fence"), (1, "fence")];
    let off: &[_] = &[
        (0, "no log"),
        (1, "no log"),
        (0, "log nothing"),
        (1, "log nothing"),
        (0, "fence"),
        (1, "fence"),
    ];
    for (acked, expected) in [(ACKED | LOG_ALL, on), (ACKED, off)] {
        let step = session.send(Message::SetFeatures(acked), &crew).unwrap();
        let Step::Wait(wait @ Wait::Fenced(fence)) = step else {
            panic!("{step:?}");
        };
        assert_eq!(names(&crew.take()), expected);
        assert_eq!(answered_by_all(&mut session, &crew, wait, fence), None);
    }
}

#[test]
fn a_used_ring_is_logged_when_that_is_acknowledged() {
    let (mut session, crew) = logging();
    for (log_used, told) in [(true, "log used"), (false, "log no used")] {
        let message = Message::SetVringAddr {
            index: 1,
            addresses: addresses(),
            log_used,
            log_addr: 0x2000,
        };
        let step = session.send(message, &crew).unwrap();
        let Step::Wait(wait @ Wait::Fenced(fence)) = step else {
            panic!("{step:?}");
        };
        assert_eq!(
            names(&crew.take()),
            [(1, told), (0, "fence"), (1, "fence")],
            "its own worker marks it"
        );
        assert_eq!(answered_by_all(&mut session, &crew, wait, fence), None);
    }
}

#[test]
fn what_is_refused_is_told_to_no_worker() {
    let (mut session, crew) = logging();
    let beyond = Message::SetVringAddr {
        index: 1,
        addresses: addresses(),
        log_used: true,
        log_addr: SIZE - 6,
    };
    let table = vec![(region(0), ram()), (region(1), ram())];
    for message in [
        log(SIZE / 4096 / 8 - 1),
        log(0),
        beyond,
        Message::AddMemReg(region(1), ram()),
        Message::SetMemTable(table),
        Message::SetLogFd(ram()),
    ] {
        assert!(session.send(message, &crew).is_err());
        assert!(crew.take().is_empty());
    }
    // The log is still the one that was set: what it covers is not refused.
    let inside = Message::SetVringAddr {
        index: 1,
        addresses: addresses(),
        log_used: true,
        log_addr: SIZE - 6 - 8 * 8,
    };
    session.send(inside, &crew).unwrap();
}

/// Clearing LOG_ALL is never refused: the front end does not look, and gives the log back.
#[test]
fn logging_ends_whatever_else_is_wrong() {
    let (mut session, crew) = logging();
    let message = Message::SetVringAddr {
        index: 1,
        addresses: addresses(),
        log_used: true,
        log_addr: 0x2000,
    };
    session.send(message, &crew).unwrap();
    session.send(base_of(1), &crew).unwrap();
    crew.take();
    // One vring is about to stop, and its used ring is still logged.
    session.send(Message::SetFeatures(ACKED), &crew).unwrap();
    let told = names(&crew.take());
    assert!(
        told.starts_with(&[(0, "no log"), (1, "no log")]),
        "{told:?}"
    );
}
