//! A running guest.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use super::agent::{Agent, Output, Silence};
use super::lines::Lines;
use super::process::{POLL, Process};
use super::qemu::Paths;
use super::{Builder, GuestError, Qmp};

/// Limits against a guest that hangs, far above what a loaded machine needs.
const BOOT_LIMIT: Duration = Duration::from_secs(180);
const COMMAND_LIMIT: Duration = Duration::from_secs(300);
/// How often the console of a guest that boots is looked at.
const BOOT_CHECK: Duration = Duration::from_secs(2);
/// How often a boot that TCG lost is tried again.
const BOOT_RETRIES: u32 = 2;
/// What Linux says on its console, 21 s later and then for ever, when a virtual CPU lost its timer.
const LOST_TIMER: &str = "kthread timer wakeup didn't happen for";
/// How much of the console an error shows, in bytes.
const CONSOLE_TAIL: usize = 8 << 10;

/// A QEMU with a Linux guest in it. QEMU is killed on drop.
#[derive(Debug)]
pub struct Guest {
    qemu: Process,
    agent: Agent,
    paths: Paths,
    boot_id: Option<String>,
    /// Where the console of the last boot starts, in bytes.
    boot_start: usize,
}

impl Guest {
    /// A guest to be put together.
    #[must_use]
    pub fn builder() -> Builder {
        Builder::default()
    }

    pub(super) fn start(command: Command, paths: Paths) -> Result<Self, GuestError> {
        let mut qemu = Process::start(command, paths.log.clone())?;
        let agent = Agent::new(connect(&mut qemu, &paths.agent)?);
        Ok(Self {
            qemu,
            agent,
            paths,
            boot_id: None,
            boot_start: 0,
        })
    }

    /// Waits until the guest has booted, again if it did before.
    ///
    /// # Errors
    /// `Ended` when QEMU left, `TimedOut` with the console when the agent says nothing, `LostTimer`
    /// when the console says that it never will.
    pub fn wait_ready(&mut self) -> Result<(), GuestError> {
        let boot_id = self.next_boot_id()?;
        if self.boot_id.as_ref() == Some(&boot_id) {
            let what = format!("boot {boot_id} twice");
            return Err(GuestError::Garbled {
                who: "the agent",
                what,
            });
        }
        self.boot_id = Some(boot_id);
        Ok(())
    }

    fn next_boot_id(&mut self) -> Result<String, GuestError> {
        let deadline = Instant::now() + BOOT_LIMIT;
        loop {
            let check = deadline.min(Instant::now() + BOOT_CHECK);
            match self.agent.ready(check) {
                Ok(boot_id) => return Ok(boot_id),
                Err(Silence::Late) if Instant::now() < deadline => self.check_timer()?,
                Err(silence) => return self.explain(silence, "the boot", BOOT_LIMIT),
            }
        }
    }

    /// A `LostTimer` error if the console of this boot says so.
    fn check_timer(&self) -> Result<(), GuestError> {
        let console = fs::read(&self.paths.console).unwrap_or_default();
        let boot = console.get(self.boot_start..).unwrap_or_default();
        if !says_lost_timer(&String::from_utf8_lossy(boot)) {
            return Ok(());
        }
        Err(GuestError::LostTimer {
            console: self.console(),
        })
    }

    /// Runs a shell command and returns how it ended, whatever its status.
    ///
    /// # Errors
    /// `Ended` when QEMU left. `TimedOut` after five minutes; the guest is killed then, and the
    /// error shows its console.
    pub fn run(&mut self, command: &str) -> Result<Output, GuestError> {
        self.run_for(command, COMMAND_LIMIT)
    }

    /// `run` with another limit.
    ///
    /// # Errors
    /// As `run`.
    pub fn run_for(&mut self, command: &str, limit: Duration) -> Result<Output, GuestError> {
        let deadline = Instant::now() + limit;
        let answer = match self.agent.send(command) {
            Ok(id) => self.agent.answer(id, deadline),
            Err(error) => Err(error.into()),
        };
        answer.or_else(|silence| self.explain(silence, command, limit))
    }

    /// Runs a shell command that must succeed and returns its standard output without the white
    /// space around it.
    ///
    /// # Errors
    /// As `run`; `Command` for any status but zero.
    pub fn shell(&mut self, command: &str) -> Result<String, GuestError> {
        let output = self.run(command)?;
        if output.status == 0 {
            return Ok(output.stdout.trim().to_owned());
        }
        Err(GuestError::Command {
            command: command.to_owned(),
            output,
        })
    }

    /// Runs a shell command that must succeed and print a number.
    ///
    /// # Errors
    /// As `shell`; `Garbled` when it prints something else.
    pub fn number(&mut self, command: &str) -> Result<u64, GuestError> {
        let text = self.shell(command)?;
        text.parse().map_err(|error| {
            let what = format!("{text:?} from {command}: {error}");
            GuestError::Garbled {
                who: "the guest",
                what,
            }
        })
    }

    /// Reboots without an orderly shutdown and waits for the guest to come back; a boot that TCG
    /// lost is tried again. What the guest wants to keep, it has to sync before.
    ///
    /// # Errors
    /// As `wait_ready`, and as `reset` when a boot was lost.
    pub fn reboot(&mut self) -> Result<(), GuestError> {
        self.boot_start = self.console_end();
        let sent = self
            .agent
            .send("reboot -f")
            .map(drop)
            .map_err(Silence::from);
        sent.or_else(|silence| self.explain(silence, "reboot -f", COMMAND_LIMIT))?;
        let is_lost = |error: &GuestError| matches!(error, GuestError::LostTimer { .. });
        try_again(self.wait_ready(), is_lost, || self.reset())
    }

    /// Resets the machine, whatever the guest is doing, and waits for the guest to come back.
    ///
    /// # Errors
    /// As `wait_ready`; `Qmp` when QEMU refuses. Nobody else may be connected to its control
    /// socket.
    pub fn reset(&mut self) -> Result<(), GuestError> {
        self.boot_start = self.console_end();
        self.qmp()?.execute("system_reset", json!({}))?;
        self.wait_ready()
    }

    /// Powers the guest off and waits until QEMU has left.
    ///
    /// # Errors
    /// `Ended` unless QEMU leaves with status 0, `TimedOut` with the console.
    pub fn power_off(mut self) -> Result<(), GuestError> {
        let sent = self
            .agent
            .send("poweroff -f")
            .map(drop)
            .map_err(Silence::from);
        sent.or_else(|silence| self.explain(silence, "poweroff -f", COMMAND_LIMIT))?;
        match self.qemu.wait_success(BOOT_LIMIT) {
            Err(GuestError::TimedOut {
                what,
                limit,
                context,
            }) => {
                let context = format!("{}\n{context}", self.console());
                Err(GuestError::TimedOut {
                    what,
                    limit,
                    context,
                })
            }
            result => result,
        }
    }

    /// Waits until QEMU has left, as QMP told it to.
    pub(super) fn wait_end(mut self) -> Result<(), GuestError> {
        self.qemu.wait_success(BOOT_LIMIT)
    }

    /// Kills QEMU with SIGKILL, whatever it is doing, and waits until it is gone.
    ///
    /// # Errors
    /// `Host` when it cannot be reaped.
    pub fn kill(mut self) -> Result<(), GuestError> {
        self.qemu.kill().map(drop)
    }

    /// A connection to QEMU's control socket. QEMU serves one at a time.
    ///
    /// # Errors
    /// `Ended`, `Host`, `TimedOut` or `Garbled` when QEMU does not answer.
    pub fn qmp(&mut self) -> Result<Qmp, GuestError> {
        Qmp::new(connect(&mut self.qemu, &self.paths.qmp)?)
    }

    /// The end of what the guest wrote to its console.
    #[must_use]
    pub fn console(&self) -> String {
        let bytes = fs::read(&self.paths.console).unwrap_or_default();
        let start = bytes.len().saturating_sub(CONSOLE_TAIL);
        String::from_utf8_lossy(bytes.get(start..).unwrap_or_default()).into_owned()
    }

    /// The console's length, in bytes.
    fn console_end(&self) -> usize {
        let length = fs::metadata(&self.paths.console).map_or(0, |metadata| metadata.len());
        usize::try_from(length).unwrap_or(usize::MAX)
    }

    /// Turns the agent's silence into an error that says what happened to the guest.
    fn explain<T>(
        &mut self,
        silence: Silence,
        what: &str,
        limit: Duration,
    ) -> Result<T, GuestError> {
        let error = match silence {
            Silence::Late => {
                self.qemu.check_running()?;
                self.qemu.kill()?;
                let context = format!("--- console\n{}", self.console());
                GuestError::TimedOut {
                    what: what.to_owned(),
                    limit,
                    context,
                }
            }
            Silence::Closed(source) => {
                // QEMU closes its sockets a moment before it can be waited for.
                let status = self.qemu.wait(Duration::from_secs(10))?;
                let log = format!("{}\n--- console\n{}", self.qemu.log(), self.console());
                let program = format!("QEMU, while the host awaited: {what} ({source})");
                GuestError::Ended {
                    program,
                    status,
                    log,
                }
            }
            Silence::Garbled(error) => error,
        };
        Err(error)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!(
                "--- QEMU ---\n{}--- console ---\n{}",
                self.qemu.log(),
                self.console()
            );
        }
    }
}

/// Boots again as long as TCG lost the boot, up to `BOOT_RETRIES` times.
pub(super) fn try_again<T>(
    mut booted: Result<T, GuestError>,
    is_lost: impl Fn(&GuestError) -> bool,
    mut boot: impl FnMut() -> Result<T, GuestError>,
) -> Result<T, GuestError> {
    for _ in 0..BOOT_RETRIES {
        match &booted {
            // Said, so that a run shows how often; any other failure is the test's.
            Err(error) if is_lost(error) => {
                eprintln!("TCG lost a boot by itself, which is tried again: {error}");
            }
            Ok(_) | Err(_) => break,
        }
        booted = boot();
    }
    booted
}

fn says_lost_timer(console: &str) -> bool {
    console.contains(LOST_TIMER)
}

/// Connects to a socket that QEMU makes a moment after it starts.
fn connect(qemu: &mut Process, path: &Path) -> Result<Lines, GuestError> {
    let deadline = Instant::now() + BOOT_LIMIT;
    loop {
        let error = match Lines::connect(path) {
            Ok(lines) => return Ok(lines),
            Err(error) => error,
        };
        qemu.check_running()?;
        if Instant::now() >= deadline {
            return Err(GuestError::host(format!("connect to {}", path.display()))(
                error,
            ));
        }
        thread::sleep(POLL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_words_on_a_lost_timer_are_recognised() {
        let console = "\
            [   22.218101] rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:\n\
            [   22.219337] rcu: \t1-...!: (46 ticks this GP) idle=2d50/0/0x0 softirq=14/16 fqs=1\n\
            [   22.221990] rcu: rcu_preempt kthread timer wakeup didn't happen for 5249 jiffies!\n\
            [   22.221990] rcu: \tPossible timer handling issue on cpu=1 timer-softirq=4\n";
        assert!(says_lost_timer(console));
    }

    #[test]
    fn other_trouble_on_the_console_is_no_lost_timer() {
        for console in [
            "",
            "[   22.218101] rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:\n",
            "[   22.218101] rcu: INFO: rcu_preempt self-detected stall on CPU\n",
            "[   22.221990] rcu: rcu_preempt kthread starved for 5250 jiffies! g-1163 f0x0\n",
            "[    3.000000] watchdog: BUG: soft lockup - CPU#1 stuck for 22s!\n",
            "[    1.000000] Kernel panic - not syncing: VFS: Unable to mount root fs\n",
            "[    1.437900] clocksource: timekeeping watchdog on CPU1: Marking clocksource\n",
        ] {
            assert!(!says_lost_timer(console), "{console}");
        }
    }
}
