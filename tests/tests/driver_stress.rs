//! One request at a time and a driver that sleeps: the first kick or call that is lost stops it.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test's helpers fail like the test"
)]

use std::env;
use std::hint;
use std::thread;
use std::time::{Duration, Instant};

use vublk_tests::driver::verify::{Waiting, next_completion};
use vublk_tests::driver::{Queue, Spec, connect};
use vublk_tests::guest::{DaemonSpec, Engine, Scratch, Storage};

/// Overrides how long each test runs, in seconds.
const SECONDS: &str = "VUBLK_STRESS_SECONDS";

/// Without any progress for so long, a kick or a call was lost, however busy the machine is.
const LIMIT: Duration = Duration::from_secs(60);

#[test]
fn no_kick_or_call_is_lost_with_event_idx() {
    stress(&DaemonSpec::new(Storage::Null(SIZE)), true);
}

#[test]
fn no_kick_or_call_is_lost_with_flags() {
    stress(&DaemonSpec::new(Storage::Null(SIZE)), false);
}

#[test]
fn no_kick_or_call_is_lost_with_the_threads_engine() {
    let scratch = Scratch::new().unwrap();
    let image = scratch.image("disk", SIZE).unwrap();
    let file = DaemonSpec::file(&image).direct(false);
    stress(&file.engine(Engine::Threads), true);
}

/// Two queues on one worker, so that each also wakes the worker while it goes to sleep for the
/// other.
fn stress(daemon: &DaemonSpec, event_idx: bool) {
    let scratch = Scratch::new().unwrap();
    let daemon = daemon.clone().queues(2).workers(1).start(&scratch).unwrap();
    let spec = Spec {
        event_idx,
        queues: 2,
        ..Spec::default()
    };
    let end = Instant::now() + length();
    let counts: Vec<u64> = thread::scope(|scope| {
        let queues = connect(daemon.socket(), &spec).unwrap();
        let threads: Vec<_> = queues
            .into_iter()
            .enumerate()
            .map(|(seed, queue)| scope.spawn(move || one_at_a_time(queue, seed as u64, end)))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    for count in counts {
        println!("{count} requests");
        assert!(count > 0);
    }
    daemon.stop().unwrap();
}

/// Reads until `end`, with pauses from nothing to longer than a worker goes on looking: some
/// requests arrive exactly while it arms its kick.
fn one_at_a_time(mut queue: Queue, seed: u64, end: Instant) -> u64 {
    let mut rng = fastrand::Rng::with_seed(seed);
    queue.set_calls(true);
    let mut count = 0;
    while Instant::now() < end {
        let offset = rng.u64(0..SIZE / 4096) * 4096;
        let whole = 0..4096;
        queue.read(0, offset, &[whole]).unwrap();
        queue.kick().unwrap();
        match next_completion(&mut queue, Waiting::Sleeping, 1, LIMIT) {
            Ok(done) => assert_eq!(done.result, 0),
            Err(error) => panic!("after {count} requests: {error}"),
        }
        count += 1;
        let longest = 1 << rng.u32(0..=18);
        let resume = Instant::now() + Duration::from_nanos(rng.u64(0..longest));
        while Instant::now() < resume {
            hint::spin_loop();
        }
    }
    count
}

fn length() -> Duration {
    let seconds = match env::var(SECONDS) {
        Ok(seconds) => seconds.parse().unwrap(),
        Err(_) if env::var("CI").is_ok_and(|ci| ci == "true") => 60,
        Err(_) => 20,
    };
    Duration::from_secs(seconds)
}

const SIZE: u64 = 64 << 20;
