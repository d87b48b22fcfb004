//! A guest that moves from one QEMU to another while it runs.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{Guest, GuestError, Qmp, Scratch};

/// A limit against a migration that hangs, far above what a loaded machine needs.
const LIMIT: Duration = Duration::from_secs(300);
const POLL: Duration = Duration::from_millis(50);
/// What the last pass may take, in milliseconds, once the migration shall end.
const DOWNTIME_MS: u32 = 10_000;
/// Bytes a second before that: slow, so that the guest dirties pages between the passes.
const THROTTLED: u64 = 48 << 20;
/// So slow that what a guest does by itself in a pass is more than the pass sends.
const TRICKLE: u64 = 1 << 20;
const UNTHROTTLED: u64 = 4 << 30;

impl Guest {
    /// Stops the guest, writes all of its state but the disks to the file `state` and ends its
    /// QEMU. `Builder::restore` goes on from there, as often as it is wanted.
    ///
    /// # Errors
    /// `Qmp` when QEMU refuses or the migration fails, `TimedOut` when it does not end.
    pub fn save(mut self, state: &Path) -> Result<(), GuestError> {
        let mut qmp = self.qmp()?;
        // Nothing changes any more, so that one pass is enough.
        qmp.execute("stop", json!({}))?;
        let limits = json!({ "max-bandwidth": UNTHROTTLED, "downtime-limit": DOWNTIME_MS });
        qmp.execute("migrate-set-parameters", limits)?;
        let uri = format!("file:{}", state.display());
        qmp.execute("migrate", json!({ "uri": uri }))?;
        let deadline = Instant::now() + LIMIT;
        loop {
            let state = qmp.execute("query-migrate", json!({}))?;
            if status(&state) == "completed" {
                break;
            }
            if !is_active(&state) {
                return Err(refused(&state));
            }
            wait(deadline, &state)?;
        }
        qmp.execute("quit", json!({}))?;
        self.wait_end()
    }

    /// Lets a guest go on that was stopped when it was saved.
    pub(super) fn go_on(&mut self) -> Result<(), GuestError> {
        let mut qmp = self.qmp()?;
        wait_status(&mut qmp, "paused")?;
        qmp.execute("cont", json!({}))?;
        wait_status(&mut qmp, "running")
    }
}

/// Waits until a guest that comes from elsewhere has arrived and is what is wanted.
fn wait_status(qmp: &mut Qmp, wanted: &str) -> Result<(), GuestError> {
    let deadline = Instant::now() + LIMIT;
    loop {
        let state = qmp.execute("query-status", json!({}))?;
        if status(&state) == wanted {
            return Ok(());
        }
        wait(deadline, &state)?;
    }
}

/// A migration under way. It does not end before `finish` as long as the load goes on.
#[derive(Debug)]
pub struct Migration {
    source: Guest,
    qmp: Qmp,
    destination: Guest,
}

impl Migration {
    /// Starts to move `source` to `destination`, which `Builder::start_incoming` started.
    ///
    /// # Errors
    /// `Qmp` when a QEMU refuses, a device without what migration needs for example.
    pub fn start(
        mut source: Guest,
        mut destination: Guest,
        scratch: &Scratch,
    ) -> Result<Self, GuestError> {
        let socket = scratch.socket(&scratch.unique("migration"));
        let uri = format!("unix:{}", socket.display());
        let mut qmp = destination.qmp()?;
        qmp.execute("migrate-incoming", json!({ "uri": uri }))?;
        let mut qmp = source.qmp()?;
        qmp.execute(
            "migrate-set-parameters",
            json!({ "max-bandwidth": THROTTLED, "downtime-limit": 1 }),
        )?;
        qmp.execute("migrate", json!({ "uri": uri }))?;
        Ok(Self {
            source,
            qmp,
            destination,
        })
    }

    /// The guest, where it still runs.
    pub fn source(&mut self) -> &mut Guest {
        &mut self.source
    }

    /// Waits until QEMU has fetched the dirty log `count` times.
    ///
    /// # Errors
    /// `Qmp` when the migration has failed or ended before, `TimedOut` when it does not get on.
    pub fn wait_passes(&mut self, count: u64) -> Result<(), GuestError> {
        let deadline = Instant::now() + LIMIT;
        loop {
            let state = self.query()?;
            if passes(&state) >= count {
                return Ok(());
            }
            if !is_active(&state) {
                return Err(refused(&state));
            }
            wait(deadline, &state)?;
        }
    }

    /// Waits until QEMU has fetched the dirty log `count` more times.
    ///
    /// # Errors
    /// As `wait_passes`.
    pub fn wait_more_passes(&mut self, count: u64) -> Result<(), GuestError> {
        let now = passes(&self.query()?);
        self.wait_passes(now + count)
    }

    /// Sends so little from now on that the migration does not end, even if only the guest's own
    /// CPUs change memory.
    ///
    /// # Errors
    /// `Qmp` when QEMU refuses.
    pub fn slow_down(&mut self) -> Result<(), GuestError> {
        let limit = json!({ "max-bandwidth": TRICKLE });
        self.qmp.execute("migrate-set-parameters", limit)?;
        Ok(())
    }

    /// Lets the migration end, ends the source's QEMU and returns the guest at its destination,
    /// with the passes that it took.
    ///
    /// # Errors
    /// `Qmp` when the migration failed, `TimedOut` when it does not end.
    pub fn finish(mut self) -> Result<(Guest, u64), GuestError> {
        self.qmp.execute(
            "migrate-set-parameters",
            json!({ "max-bandwidth": UNTHROTTLED, "downtime-limit": DOWNTIME_MS }),
        )?;
        let deadline = Instant::now() + LIMIT;
        let passes = loop {
            let state = self.query()?;
            if status(&state) == "completed" {
                break passes(&state);
            }
            if !is_active(&state) {
                return Err(refused(&state));
            }
            wait(deadline, &state)?;
        };
        self.qmp.execute("quit", json!({}))?;
        drop(self.qmp);
        self.source.wait_end()?;
        let mut qmp = self.destination.qmp()?;
        wait_status(&mut qmp, "running")?;
        Ok((self.destination, passes))
    }

    /// Gives the migration up and returns the guest where it has run all the time.
    ///
    /// # Errors
    /// `Qmp` when the migration ended in another way, `TimedOut` when it does not end.
    pub fn cancel(mut self) -> Result<Guest, GuestError> {
        self.qmp.execute("migrate_cancel", json!({}))?;
        let deadline = Instant::now() + LIMIT;
        loop {
            let state = self.query()?;
            match status(&state) {
                "cancelled" => break,
                "cancelling" | "setup" | "active" => wait(deadline, &state)?,
                _ => return Err(refused(&state)),
            }
        }
        self.destination.kill()?;
        Ok(self.source)
    }

    fn query(&mut self) -> Result<Value, GuestError> {
        self.qmp.execute("query-migrate", json!({}))
    }
}

fn status(state: &Value) -> &str {
    let status = state.get("status").and_then(Value::as_str);
    status.unwrap_or_default()
}

fn is_active(state: &Value) -> bool {
    matches!(status(state), "setup" | "active" | "device" | "")
}

/// How often QEMU has fetched the dirty log.
fn passes(state: &Value) -> u64 {
    let count = state.pointer("/ram/dirty-sync-count");
    count.and_then(Value::as_u64).unwrap_or_default()
}

fn wait(deadline: Instant, state: &Value) -> Result<(), GuestError> {
    if Instant::now() >= deadline {
        return Err(GuestError::TimedOut {
            what: "a migration".to_owned(),
            limit: LIMIT,
            context: state.to_string(),
        });
    }
    thread::sleep(POLL);
    Ok(())
}

fn refused(state: &Value) -> GuestError {
    GuestError::Qmp {
        command: "migrate".to_owned(),
        reason: state.to_string(),
    }
}
