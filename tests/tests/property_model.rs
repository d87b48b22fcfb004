//! Requests, stops, memory tables, logs and connections in any order, as seeds have it.
//!
//! Runs for `VUBLK_PROPERTY_SECONDS` (60) with seeds of its own, or once with
//! `VUBLK_PROPERTY_SEED`:
//! ```text
//! VUBLK_PROPERTY_SECONDS=7200 cargo test -p vublk-tests --test property_model
//! VUBLK_PROPERTY_SEED=42 cargo test -p vublk-tests --test property_model
//! ```

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use vublk_tests::frontend::Outcome;
use vublk_tests::interleaving::{Counts, World};

/// Steps that are shown of a run that failed.
const SHOWN: usize = 80;

/// Panics on any thread: the daemon's are not this one's.
static PANICS: AtomicU64 = AtomicU64::new(0);

fn number(name: &str) -> Outcome<Option<u64>> {
    let value = std::env::var(name).ok();
    Ok(value.map(|value| value.parse()).transpose()?)
}

/// One run.
fn run(seed: u64) -> Outcome<Counts> {
    let mut world = World::new(seed)?;
    let mut ran = world.run();
    let (counts, trace) = (world.counts, std::mem::take(&mut world.trace));
    if ran.is_ok() {
        ran = world.leave();
    }
    if ran.is_ok() && PANICS.load(Ordering::Relaxed) > 0 {
        ran = Err("a thread of the daemon panicked".into());
    }
    if let Err(error) = ran {
        for step in &trace[trace.len().saturating_sub(SHOWN)..] {
            eprintln!("  {step}");
        }
        let again = format!("VUBLK_PROPERTY_SEED={seed}");
        return Err(format!("seed {seed} after {} steps: {error}\n{again}", trace.len()).into());
    }
    Ok(counts)
}

#[test]
fn any_interleaving_answers_every_request_once_and_marks_every_page() -> Outcome {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        PANICS.fetch_add(1, Ordering::Relaxed);
        before(panic);
    }));
    if let Some(seed) = number("VUBLK_PROPERTY_SEED")? {
        eprintln!("seed {seed}: {:?}", run(seed)?);
        return Ok(());
    }
    let patience = Duration::from_secs(number("VUBLK_PROPERTY_SECONDS")?.unwrap_or(60));
    let (began, first) = (Instant::now(), fastrand::u64(..1 << 48));
    let mut runs = 0_u64;
    let mut sum = Counts::default();
    // However slow the machine is, ten runs come across everything.
    while runs < 10 || began.elapsed() < patience {
        sum += run(first + runs)?;
        runs += 1;
    }
    eprintln!("{runs} runs from seed {first}: {sum:?}");
    assert!(
        sum.is_of_everything(),
        "{sum:?} after {runs} runs from {first}"
    );
    Ok(())
}
