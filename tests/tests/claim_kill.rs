//! A daemon is killed while the kernel has a write of it, and its successor starts at once on the
//! same image: the old write does not land after a new one.

use std::thread;
use std::time::Duration;

use rustix::process::Signal;
use vublk_tests::frontend::{FrontEnd, Kind, NEED_REPLY, Options, Outcome, Program};
use vublk_tests::guest::{Scratch, vublk_path};
use vublk_tests::stall::{Image, Stall};

const SIZE: u64 = 8 << 20;
const BLOCK: usize = 4096;

/// What is frozen, who writes how, and what follows from that.
#[derive(Clone, Copy, Debug)]
struct Case {
    image: Image,
    engine: &'static str,
    direct: &'static str,
}

/// Everything of a run. The image goes first, so that nothing hangs any longer when the daemons are
/// waited for.
struct Run {
    stall: Stall,
    first: Program,
    second: Option<Program>,
    case: Case,
    scratch: Scratch,
}

impl Run {
    fn new(case: Case) -> Outcome<Run> {
        let scratch = Scratch::new()?;
        let stall = Stall::new(&scratch, case.image, SIZE)?;
        let first = daemon(&scratch, &stall, case, "first")?;
        Ok(Run {
            stall,
            first,
            second: None,
            case,
            scratch,
        })
    }

    /// The byte that the whole first block of the image consists of.
    fn first_block(&self) -> Outcome<u8> {
        let contents = self.stall.contents()?;
        let block = contents.get(..BLOCK).ok_or("the image is too small")?;
        match block.first() {
            Some(byte) if block.iter().all(|other| other == byte) => Ok(*byte),
            _ => Err("the block is torn".into()),
        }
    }

    /// Waits until the kernel has the first daemon's write and does not get on with it.
    fn wait_until_stuck(&self) -> Outcome {
        match self.case.image {
            Image::Block => {
                while self.stall.in_flight()? == 0 {
                    thread::yield_now();
                }
            }
            Image::File => {
                let mut rounds = 0;
                while rounds < 20 {
                    let is_stuck = self.first.thread_states().contains(&'D');
                    rounds = if is_stuck { rounds + 1 } else { 0 };
                    thread::sleep(Duration::from_millis(5));
                }
            }
        }
        Ok(())
    }

    /// Whether the kernel still works for the first daemon.
    fn is_busy(&self) -> Outcome<bool> {
        match self.case.image {
            Image::Block => Ok(self.stall.in_flight()? > 0),
            Image::File => Ok(self.first.thread_states().contains(&'D')),
        }
    }
}

fn daemon(scratch: &Scratch, stall: &Stall, case: Case, name: &str) -> Outcome<Program> {
    let args = [
        format!("--blk-file={}", stall.image().display()),
        format!("--engine={}", case.engine),
        format!("--direct={}", case.direct),
        "--num-queues=1".to_owned(),
        "--lock-timeout=600".to_owned(),
    ];
    let (socket, log) = (scratch.socket(name), scratch.file(&format!("{name}.log")));
    Program::start(&vublk_path()?, &socket, &args, &[], &log)
}

fn killed_with_a_write_in_the_kernel(case: Case) -> Outcome {
    let mut run = Run::new(case)?;
    let mut old = FrontEnd::start(run.first.connect()?, Options::default())?;
    old.write(0, 0, &[0x11; BLOCK])?;
    assert_eq!(old.request(0, (Kind::Flush, 0), &[])?, 0);
    run.stall.freeze()?;
    old.submit(0, 0, (Kind::Out, 0), &[0x22; BLOCK])?;
    run.wait_until_stuck()?;
    run.first.signal(Signal::KILL)?;

    let second = daemon(&run.scratch, &run.stall, case, "second")?;
    let second = run.second.insert(second);
    let mut new = FrontEnd::attach(second.connect()?, Options::default())?;
    new.describe_vring(0, 0)?;
    new.kick_vring(0, NEED_REPLY)?;
    second.waits_for_lock(&new.peer)?;
    assert!(new.peer.is_quiet()? && run.is_busy()?, "{case:?}");
    assert_eq!(run.first_block()?, 0x11, "{case:?}");

    run.stall.thaw()?;
    new.vring_kicked(0)?;
    assert!(
        !run.is_busy()?,
        "{case:?}: a request is left of the dead daemon"
    );
    let landed = run.first_block()?;
    // A write that its killed thread had not begun may be dropped; one that a disk has is done.
    assert!(
        landed == 0x22 || (landed == 0x11 && case.image == Image::File),
        "{case:?}: {landed:#x}"
    );
    new.write(0, 0, &[0x33; BLOCK])?;
    assert_eq!(new.request(0, (Kind::Flush, 0), &[])?, 0);
    assert_eq!(run.first_block()?, 0x33, "{case:?}");
    assert_eq!(new.read(0, 0, BLOCK)?, vec![0x33; BLOCK]);
    drop((old, new));
    run.first.wait()?;
    assert_eq!(
        run.first_block()?,
        0x33,
        "{case:?}: the old write came last"
    );
    Ok(())
}

#[test]
fn a_disk_that_hangs_keeps_the_successor_of_io_uring_waiting() -> Outcome {
    killed_with_a_write_in_the_kernel(Case {
        image: Image::Block,
        engine: "io_uring",
        direct: "on",
    })
}

#[test]
fn a_disk_that_hangs_keeps_the_successor_of_threads_waiting() -> Outcome {
    killed_with_a_write_in_the_kernel(Case {
        image: Image::Block,
        engine: "threads",
        direct: "on",
    })
}

#[test]
fn a_file_that_hangs_keeps_the_successor_of_io_uring_waiting() -> Outcome {
    for direct in ["on", "off"] {
        killed_with_a_write_in_the_kernel(Case {
            image: Image::File,
            engine: "io_uring",
            direct,
        })?;
    }
    Ok(())
}

#[test]
fn a_file_that_hangs_keeps_the_successor_of_threads_waiting() -> Outcome {
    for direct in ["on", "off"] {
        killed_with_a_write_in_the_kernel(Case {
            image: Image::File,
            engine: "threads",
            direct,
        })?;
    }
    Ok(())
}
