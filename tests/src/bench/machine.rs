//! CPUs, and what the kernel knows of a process.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use super::BenchError;
use super::error::host;

/// The CPUs this process may use.
pub(super) fn usable_cpus() -> Result<Vec<usize>, BenchError> {
    let set = sched_getaffinity(None).map_err(errno("ask for the usable CPUs"))?;
    let usable = |cpu: &usize| set.is_set(*cpu);
    Ok((0..CpuSet::MAX_CPU).filter(usable).collect())
}

/// Binds this thread, and every program and thread it starts from now on, to a CPU.
pub(super) fn bind(cpu: usize) -> Result<(), BenchError> {
    let mut set = CpuSet::new();
    if cpu < CpuSet::MAX_CPU {
        set.set(cpu);
    }
    sched_setaffinity(None, &set).map_err(errno(&format!("run on CPU {cpu}")))
}

/// What threads have used so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Usage {
    /// Time on a CPU, in nanoseconds.
    pub(super) cpu: u64,
    /// Time in which a thread could have run but had no CPU, in nanoseconds; without that of the
    /// helpers of an io_uring.
    pub(super) waited: u64,
    /// How often a thread went to sleep.
    pub(super) sleeps: u64,
    /// How often a thread had to make room for another.
    pub(super) preempted: u64,
}

/// Threads whose use of the machine is watched.
#[derive(Clone, Debug)]
pub(super) enum Watched {
    /// All threads of a process.
    Process(u32),
    /// One thread, by its folder in /proc.
    Thread(PathBuf),
}

impl Watched {
    /// The calling thread.
    pub(super) fn this_thread() -> Result<Self, BenchError> {
        let thread = fs::read_link("/proc/thread-self").map_err(host("find this thread"))?;
        Ok(Self::Thread(Path::new("/proc").join(thread)))
    }

    /// What its threads have used until now; those that have ended are not counted.
    pub(super) fn usage(&self) -> Result<Usage, BenchError> {
        let mut sum = Usage::default();
        for folder in self.threads()? {
            // A thread may end between the listing and the look.
            let Some(usage) = thread_usage(&folder) else {
                continue;
            };
            sum.cpu += usage.cpu;
            sum.waited += usage.waited;
            sum.sleeps += usage.sleeps;
            sum.preempted += usage.preempted;
        }
        Ok(sum)
    }

    /// The ids of its threads.
    pub(super) fn thread_ids(&self) -> Result<Vec<u32>, BenchError> {
        let id = |folder: PathBuf| folder.file_name()?.to_str()?.parse().ok();
        Ok(self.threads()?.into_iter().filter_map(id).collect())
    }

    fn threads(&self) -> Result<Vec<PathBuf>, BenchError> {
        match self {
            Self::Thread(folder) => Ok(vec![folder.clone()]),
            Self::Process(pid) => {
                let folder = format!("/proc/{pid}/task");
                let list = fs::read_dir(&folder)
                    .and_then(|tasks| tasks.collect::<Result<Vec<_>, io::Error>>())
                    .map_err(host(format!("list {folder}")))?;
                Ok(list.into_iter().map(|task| task.path()).collect())
            }
        }
    }
}

/// Lets the kernel forget the most memory a process has had.
pub(super) fn forget_peak(pid: u32) -> Result<(), BenchError> {
    let path = format!("/proc/{pid}/clear_refs");
    fs::write(&path, "5").map_err(host(format!("write {path}")))
}

/// The most memory a process has had since then, in bytes, without what it shares now: the guest's
/// memory, as long as a front end is connected.
pub(super) fn peak_memory(pid: u32) -> Result<u64, BenchError> {
    memory(pid, "VmHWM:")
}

/// The memory of a process, in bytes, without what it shares.
pub(super) fn own_memory(pid: u32) -> Result<u64, BenchError> {
    memory(pid, "VmRSS:")
}

fn memory(pid: u32, key: &str) -> Result<u64, BenchError> {
    let path = format!("/proc/{pid}/status");
    let status = fs::read_to_string(&path).map_err(host(format!("read {path}")))?;
    let kibibytes = |key| number(&status, key).unwrap_or(0);
    Ok(kibibytes(key).saturating_sub(kibibytes("RssShmem:")) << 10)
}

fn thread_usage(folder: &Path) -> Option<Usage> {
    let schedstat = fs::read_to_string(folder.join("schedstat")).ok()?;
    let status = fs::read_to_string(folder.join("status")).ok()?;
    // Those work for another thread of the process, which is what keeps them waiting.
    let is_helper = status.starts_with("Name:\tiou-");
    let mut times = schedstat.split_whitespace().map(str::parse);
    Some(Usage {
        cpu: times.next()?.ok()?,
        waited: times.next()?.ok().filter(|_| !is_helper).unwrap_or(0),
        sleeps: number(&status, "voluntary_ctxt_switches:")?,
        preempted: number(&status, "nonvoluntary_ctxt_switches:")?,
    })
}

fn number(status: &str, key: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    line.split_whitespace().next()?.parse().ok()
}

fn errno(what: &str) -> impl FnOnce(rustix::io::Errno) -> BenchError {
    let what = what.to_owned();
    move |errno| BenchError::Host {
        what,
        source: errno.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_works_uses_time() {
        let this = Watched::this_thread().unwrap();
        let before = this.usage().unwrap();
        while this.usage().unwrap().cpu < before.cpu + 1_000_000 {}
        let whole = Watched::Process(std::process::id()).usage().unwrap();
        assert!(whole.cpu >= before.cpu + 1_000_000);
    }

    #[test]
    fn a_thread_that_sleeps_is_counted() {
        let this = Watched::this_thread().unwrap();
        let before = this.usage().unwrap().sleeps;
        std::thread::sleep(std::time::Duration::from_millis(1));
        assert!(this.usage().unwrap().sleeps > before);
    }

    #[test]
    fn this_process_has_memory() {
        let pid = std::process::id();
        forget_peak(pid).unwrap();
        let peak = peak_memory(pid).unwrap();
        assert!(peak > 64 << 10);
        let mut bytes = vec![1_u8; 64 << 20];
        assert!(peak_memory(pid).unwrap() > peak + (48 << 20));
        bytes.fill(2);
        drop(bytes);
        forget_peak(pid).unwrap();
        assert!(peak_memory(pid).unwrap() < peak + (48 << 20));
        assert!(own_memory(pid).unwrap() <= peak_memory(pid).unwrap());
    }
}
