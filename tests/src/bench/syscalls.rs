//! How many system calls threads make, counted by the kernel's own trace point.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process;

/// A trace buffer that the events of some threads go to, each entry of a system call.
///
/// Only its counters are read: they also count the events that were overwritten by later ones.
/// Tracing makes a system call slower, so nothing is timed while this is there.
pub(super) struct Syscalls {
    instance: PathBuf,
}

impl Syscalls {
    /// Watches these threads.
    ///
    /// # Errors
    /// The kernel's: without rights, or where tracefs is not mounted.
    pub(super) fn watch(threads: &[u32]) -> io::Result<Self> {
        let instance = Path::new(TRACING).join(format!("instances/vublk-bench-{}", process::id()));
        // One that a killed process of the same id left behind serves as well.
        fs::create_dir_all(&instance)?;
        let syscalls = Self { instance };
        let list: Vec<_> = threads.iter().map(u32::to_string).collect();
        // The list is for the events of this instance; the filter is there before any event.
        fs::write(syscalls.instance.join("set_event_pid"), list.join(" "))?;
        let event = syscalls.instance.join("events/raw_syscalls/sys_enter");
        fs::write(event.join("enable"), "1")?;
        Ok(syscalls)
    }

    /// The system calls since the beginning.
    pub(super) fn count(&self) -> io::Result<u64> {
        let mut count = 0;
        for cpu in fs::read_dir(self.instance.join("per_cpu"))? {
            count += events(&fs::read_to_string(cpu?.path().join("stats"))?);
        }
        Ok(count)
    }
}

impl Drop for Syscalls {
    fn drop(&mut self) {
        // It is the kernel's folder: one call takes it away with everything in it.
        let _ = fs::remove_dir(&self.instance);
    }
}

/// The events of one CPU's buffer, those that are in it and those that were overwritten.
fn events(stats: &str) -> u64 {
    let number = |line: &str| line.split(": ").nth(1)?.trim().parse::<u64>().ok();
    stats
        .lines()
        .filter(|line| line.starts_with("entries:") || line.starts_with("overrun:"))
        .filter_map(number)
        .sum()
}

const TRACING: &str = "/sys/kernel/tracing";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overwritten_events_are_counted() {
        let stats = "entries: 12\noverrun: 30\ncommit overrun: 7\nbytes: 900\ndropped events: 5\n";
        assert_eq!(events(stats), 42);
    }

    #[test]
    fn calls_of_this_thread_are_counted() {
        // Not every host lets a test trace.
        let thread = rustix::thread::gettid().as_raw_nonzero().get();
        let Ok(syscalls) = Syscalls::watch(&[thread.unsigned_abs()]) else {
            return;
        };
        let before = syscalls.count().unwrap();
        for _ in 0..10_000 {
            // A system call that no library answers by itself.
            let _ = fs::metadata("/proc/self/none");
        }
        let count = syscalls.count().unwrap() - before;
        assert!((10_000..10_200).contains(&count), "{count}");
    }
}
