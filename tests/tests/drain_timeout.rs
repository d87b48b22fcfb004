//! A daemon that is told to leave while its storage hangs: it says what it waits for, leaves after
//! its time, and what is recorded is done by the next one.

use std::thread;

use rustix::process::Signal;
use vublk_tests::frontend::{FrontEnd, InflightFile, Kind, NEED_REPLY, Options, Outcome, Program};
use vublk_tests::guest::{Scratch, vublk_path};
use vublk_tests::stall::{Image, Stall};

const BLOCK: usize = 4096;

/// The image goes first, so that nothing hangs any longer when the daemons are waited for.
struct Run {
    stall: Stall,
    daemons: Vec<Program>,
    scratch: Scratch,
}

impl Run {
    fn new() -> Outcome<Run> {
        let scratch = Scratch::new()?;
        Ok(Run {
            stall: Stall::new(&scratch, Image::Block, 8 << 20)?,
            daemons: Vec::new(),
            scratch,
        })
    }

    fn daemon(&mut self, name: &str, more: &[&str]) -> Outcome<&mut Program> {
        let mut args = vec![
            format!("--blk-file={}", self.stall.image().display()),
            "--num-queues=1".to_owned(),
        ];
        args.extend(more.iter().map(|arg| (*arg).to_owned()));
        let socket = self.scratch.socket(name);
        let log = self.scratch.file(&format!("{name}.log"));
        let daemon = Program::start(&vublk_path()?, &socket, &args, &[], &log)?;
        self.daemons.push(daemon);
        Ok(self.daemons.last_mut().ok_or("it was pushed")?)
    }

    fn wait_until_stuck(&self, requests: u64) -> Outcome {
        while self.stall.in_flight()? < requests {
            thread::yield_now();
        }
        Ok(())
    }
}

#[test]
fn a_daemon_leaves_after_its_time_and_the_next_one_does_what_is_recorded() -> Outcome {
    let mut run = Run::new()?;
    let first = run.daemon("first", &["--drain-timeout=6", "--engine=io_uring"])?;
    let mut front_end = FrontEnd::attach(first.connect()?, Options::default())?;
    let inflight = InflightFile::get(&front_end.peer, 1, 16)?;
    inflight.set(&front_end.peer)?;
    front_end.start_vring(0, 0)?;
    front_end.write(0, 0, &[0x11; 3 * BLOCK])?;
    run.stall.freeze()?;
    let mut heads = Vec::new();
    for place in 0..3 {
        // Apart from each other, so that they stay several requests.
        let write = (Kind::Out, u64::from(place) * 1024);
        heads.push(front_end.submit(0, place, write, &[0x22; BLOCK])?);
    }
    run.wait_until_stuck(3)?;
    let first = run.daemons.first_mut().ok_or("it was started")?;
    first.signal(Signal::TERM)?;
    first.says("requests in flight", " s now")?;
    let status = first.leaves()?;
    let log = first.logged()?;
    assert!(
        status.code().is_some_and(|code| code != 0),
        "{status}: {log}"
    );
    assert!(log.contains("3 requests are left"), "{log}");
    assert_eq!(front_end.vring(0)?.ring.used_index()?, 1);

    // The kernel has them still, so that the next daemon waits before it does them again.
    run.daemon("second", &[])?;
    let second = run.daemons.last_mut().ok_or("it was started")?;
    front_end.peer = second.connect()?;
    front_end.negotiate(0)?;
    inflight.set(&front_end.peer)?;
    front_end.share_memory()?;
    front_end.describe_vring(0, 0)?;
    front_end.kick_vring(0, NEED_REPLY)?;
    second.waits_for_lock(&front_end.peer)?;
    run.stall.thaw()?;
    front_end.vring_kicked(0)?;
    for head in heads {
        assert_eq!(front_end.wait(0, head)?, 0);
    }
    assert_eq!(front_end.read(0, 2048, BLOCK)?, [0x22; BLOCK]);
    Ok(())
}

#[test]
fn a_drain_that_ends_in_time_is_a_success() -> Outcome {
    let mut run = Run::new()?;
    let daemon = run.daemon("patient", &["--drain-timeout=600", "--engine=threads"])?;
    let mut front_end = FrontEnd::start(daemon.connect()?, Options::default())?;
    run.stall.freeze()?;
    let head = front_end.submit(0, 0, (Kind::Out, 0), &[0x33; BLOCK])?;
    run.wait_until_stuck(1)?;
    let daemon = run.daemons.first_mut().ok_or("it was started")?;
    daemon.signal(Signal::TERM)?;
    daemon.says("requests in flight", " s now")?;
    assert!(front_end.peer.is_quiet()?);
    run.stall.thaw()?;
    assert_eq!(front_end.wait(0, head)?, 0);
    assert!(front_end.peer.closed()?);
    let status = daemon.leaves()?;
    assert_eq!(status.code(), Some(0), "{}", daemon.logged()?);
    Ok(())
}

#[test]
fn no_time_at_all_leaves_at_once() -> Outcome {
    let mut run = Run::new()?;
    let daemon = run.daemon("hasty", &["--drain-timeout=0", "--engine=io_uring"])?;
    let mut front_end = FrontEnd::start(daemon.connect()?, Options::default())?;
    run.stall.freeze()?;
    front_end.submit(0, 0, (Kind::Out, 0), &[0x44; BLOCK])?;
    run.wait_until_stuck(1)?;
    let daemon = run.daemons.first_mut().ok_or("it was started")?;
    daemon.signal(Signal::TERM)?;
    let status = daemon.leaves()?;
    assert!(status.code().is_some_and(|code| code != 0), "{status}");
    assert!(daemon.logged()?.contains("1 request is left"));
    Ok(())
}
