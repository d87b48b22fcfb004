//! Several daemons and one image: who serves it, who waits, and who is told what.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::fs::{Advice, fadvise};
use rustix::process::Signal;
use vublk_tests::frontend::{
    FrontEnd, Kind, NEED_REPLY, Options, Outcome, PeerError, Program, code, words,
};
use vublk_tests::guest::{Scratch, vublk_path};

const SIZE: u64 = 4 << 20;
/// How long to look for what comes only now and then.
const PATIENCE: Duration = Duration::from_secs(60);

/// An image and what serves it.
struct Host {
    scratch: Scratch,
    image: PathBuf,
}

impl Host {
    fn new() -> Outcome<Host> {
        let scratch = Scratch::new()?;
        let image = scratch.image("disk", SIZE)?;
        Ok(Host { scratch, image })
    }

    /// A daemon that serves the image.
    fn daemon(&self, name: &str, more: &[&str]) -> Outcome<Program> {
        let mut args = vec![
            format!("--blk-file={}", self.image.display()),
            "--num-queues=2".to_owned(),
        ];
        args.extend(more.iter().map(|arg| (*arg).to_owned()));
        let (socket, log) = (
            self.scratch.socket(name),
            self.scratch.file(&format!("{name}.log")),
        );
        Program::start(&vublk_path()?, &socket, &args, &[], &log)
    }
}

const TWO: Options = Options {
    vrings: 2,
    size: 16,
    features: 0,
};

fn started(daemon: &mut Program) -> Outcome<FrontEnd> {
    FrontEnd::start(daemon.connect()?, TWO)
}

/// A front end of a daemon that has to wait for its image.
fn waiting(daemon: &mut Program) -> Outcome<FrontEnd> {
    let front_end = FrontEnd::attach(daemon.connect()?, TWO)?;
    front_end.describe_vring(0, 0)?;
    front_end.kick_vring(0, NEED_REPLY)?;
    daemon.waits_for_lock(&front_end.peer)?;
    Ok(front_end)
}

fn left(daemon: &mut Program) -> Outcome {
    let status = daemon.leaves()?;
    match status.code() {
        Some(0) => Ok(()),
        _ => Err(format!("{status}: {}", daemon.logged()?).into()),
    }
}

#[test]
fn an_image_is_handed_over_when_the_last_vring_stops() -> Outcome {
    let host = Host::new()?;
    let mut first = host.daemon("first", &[])?;
    let mut second = host.daemon("second", &[])?;
    let mut owner = started(&mut first)?;
    owner.write(0, 0, &[1; 512])?;
    let mut waiter = waiting(&mut second)?;
    assert!(second.logged()?.contains(&host.image.display().to_string()));
    // One vring is left.
    owner.peer.vring_base(1)?;
    owner.write(0, 1, &[2; 512])?;
    assert!(waiter.peer.is_quiet()?);
    owner.peer.vring_base(0)?;
    waiter.vring_kicked(0)?;
    assert_eq!(waiter.read(0, 0, 1024)?, [[1; 512], [2; 512]].concat());
    waiter.start_vring(1, 0)?;
    waiter.write(1, 0, &[3; 512])?;
    // And back, when the session ends.
    owner.describe_vring(1, 0)?;
    owner.kick_vring(1, NEED_REPLY)?;
    first.waits_for_lock(&owner.peer)?;
    assert!(owner.peer.is_quiet()?);
    drop(waiter);
    owner.vring_kicked(1)?;
    assert_eq!(owner.read(1, 0, 512)?, [3; 512]);
    Ok(())
}

#[test]
fn a_reset_and_the_end_of_a_daemon_hand_the_image_over_too() -> Outcome {
    let host = Host::new()?;
    let mut first = host.daemon("first", &[])?;
    let mut second = host.daemon("second", &[])?;
    let owner = started(&mut first)?;
    let mut waiter = waiting(&mut second)?;
    owner.peer.confirm(code::RESET_DEVICE, &[], &[])?;
    waiter.vring_kicked(0)?;
    waiter.write(0, 0, &[4; 512])?;
    let mut third = host.daemon("third", &[])?;
    let mut next = waiting(&mut third)?;
    second.signal(Signal::TERM)?;
    next.vring_kicked(0)?;
    assert_eq!(next.read(0, 0, 512)?, [4; 512]);
    left(&mut second)
}

#[test]
fn a_daemon_that_waited_long_enough_says_no() -> Outcome {
    let host = Host::new()?;
    let mut first = host.daemon("first", &[])?;
    let mut second = host.daemon("second", &["--lock-timeout=1"])?;
    let owner = started(&mut first)?;
    let waiter = waiting(&mut second)?;
    let refused = waiter.vring_kicked(0).err().ok_or("it started")?;
    let refused = *refused.downcast::<PeerError>()?;
    assert!(
        matches!(refused, PeerError::Refused(code::SET_VRING_KICK)),
        "{refused}"
    );
    let line = second.says("is refused", "--lock-timeout")?;
    assert!(line.contains(&host.image.display().to_string()), "{line}");
    // The vring is as it was, so that its start can be tried again.
    drop(owner);
    waiter.kick_vring(0, NEED_REPLY)?;
    waiter.vring_kicked(0)
}

#[test]
fn a_front_end_that_asks_for_no_answer_loses_its_connection() -> Outcome {
    let host = Host::new()?;
    let mut first = host.daemon("first", &[])?;
    let mut second = host.daemon("second", &["--lock-timeout=1"])?;
    let owner = started(&mut first)?;
    let waiter = FrontEnd::attach(second.connect()?, TWO)?;
    waiter.describe_vring(0, 0)?;
    waiter.kick_vring(0, 0)?;
    assert!(waiter.peer.closed()?);
    second.says("is refused", "--lock-timeout")?;
    drop(owner);
    started(&mut second)?.verify(1)
}

#[test]
fn readers_share_an_image_and_keep_writers_out() -> Outcome {
    let host = Host::new()?;
    let mut readers = [
        host.daemon("one", &["--read-only"])?,
        host.daemon("two", &["--read-only"])?,
    ];
    let mut front_ends = Vec::new();
    for reader in &mut readers {
        let mut front_end = started(reader)?;
        assert_eq!(front_end.read(0, 0, 512)?, [0; 512]);
        front_ends.push(front_end);
    }
    let mut writer = host.daemon("writer", &[])?;
    let mut waiter = waiting(&mut writer)?;
    front_ends.pop();
    assert!(waiter.peer.is_quiet()?);
    front_ends.pop();
    waiter.vring_kicked(0)?;
    waiter.write(0, 0, &[5; 512])?;
    waiting(&mut readers[0])?;
    Ok(())
}

#[test]
fn a_front_end_that_leaves_while_its_daemon_waits_leaves_no_lock() -> Outcome {
    let host = Host::new()?;
    let mut first = host.daemon("first", &[])?;
    let mut second = host.daemon("second", &["--lock-timeout=3600"])?;
    let owner = started(&mut first)?;
    drop(waiting(&mut second)?);
    second.says("session is over", "")?;
    // Nobody waits any more: whoever comes next has it at once.
    drop(owner);
    let mut owner = started(&mut first)?;
    owner.verify(2)?;
    let next = FrontEnd::attach(second.connect()?, TWO)?;
    next.describe_vring(0, 0)?;
    next.kick_vring(0, NEED_REPLY)?;
    drop(owner);
    next.vring_kicked(0)
}

#[test]
fn a_daemon_that_waits_leaves_when_it_is_told() -> Outcome {
    let host = Host::new()?;
    let mut first = host.daemon("first", &[])?;
    let mut second = host.daemon("second", &["--lock-timeout=3600"])?;
    let mut owner = started(&mut first)?;
    let waiter = waiting(&mut second)?;
    second.signal(Signal::TERM)?;
    left(&mut second)?;
    assert!(waiter.peer.closed()?);
    owner.verify(3)
}

#[test]
fn a_daemon_that_is_asked_for_the_size_goes_on_waiting() -> Outcome {
    let host = Host::new()?;
    let mut first = host.daemon("first", &[])?;
    let mut second = host.daemon("second", &[])?;
    let owner = started(&mut first)?;
    let waiter = waiting(&mut second)?;
    second.signal(Signal::HUP)?;
    // Both signals are obeyed in the order they came.
    second.signal(Signal::USR1)?;
    second.says("reads=", "")?;
    drop(owner);
    waiter.vring_kicked(0)
}

/// Pages of the file that are cached and would be missed if they were not: those that are not on
/// the storage.
fn dirty_pages(path: &Path) -> Outcome<u64> {
    // Pages that are clean are dropped, and the others stay.
    fadvise(std::fs::File::open(path)?, 0, None, Advice::DontNeed)?;
    let output = Command::new("fincore")
        .args(["--noheadings", "--bytes", "--output=PAGES"])
        .arg(path)
        .output()?;
    Ok(String::from_utf8(output.stdout)?.trim().parse()?)
}

#[test]
fn what_was_written_through_the_cache_is_stored_when_the_image_is_handed_over() -> Outcome {
    let host = Host::new()?;
    let mut daemon = host.daemon("buffered", &["--direct=off"])?;
    // VIRTIO_BLK_F_FLUSH: a driver without it gets every write stable before it is answered.
    let options = Options {
        features: 1 << 9,
        ..TWO
    };
    let mut front_end = FrontEnd::start(daemon.connect()?, options)?;
    // The kernel may store it before we look, but it does not do so every time.
    let begun = Instant::now();
    loop {
        front_end.write(0, 0, &[6; 32 << 10])?;
        front_end.peer.vring_base(1)?;
        if dirty_pages(&host.image)? > 0 {
            break;
        }
        assert!(begun.elapsed() < PATIENCE, "it is never in the cache only");
        front_end.start_vring(1, 0)?;
    }
    front_end.write(0, 64, &[7; 32 << 10])?;
    front_end.peer.vring_base(0)?;
    assert_eq!(dirty_pages(&host.image)?, 0);
    Ok(())
}

#[test]
fn writes_are_stable_once_the_write_cache_is_off() -> Outcome {
    let host = Host::new()?;
    let mut daemon = host.daemon("buffered", &["--direct=off"])?;
    // VIRTIO_BLK_F_CONFIG_WCE, and the byte of the configuration space that it is about.
    let (config_wce, writeback) = (1 << 11, 32);
    let options = Options {
        features: config_wce,
        ..TWO
    };
    let mut front_end = FrontEnd::start(daemon.connect()?, options)?;
    front_end.write(0, 0, &[8; 32 << 10])?;
    let mut payload = words(&[writeback, 1, 0]);
    payload.push(0);
    front_end.peer.confirm(code::SET_CONFIG, &payload, &[])?;
    assert_eq!(dirty_pages(&host.image)?, 0);
    front_end.write(0, 64, &[9; 32 << 10])?;
    assert_eq!(dirty_pages(&host.image)?, 0);
    assert_eq!(front_end.request(0, (Kind::Flush, 0), &[])?, 0);
    Ok(())
}
