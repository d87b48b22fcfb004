#![expect(unsafe_code, reason = "no crate at hand wraps the calls of sched(7)")]
//! Who runs before whom on a CPU.

use std::io;

use super::BenchError;
use super::error::host;

/// A scheduling policy and its priority.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Schedule {
    policy: libc::c_int,
    priority: libc::c_int,
}

impl Schedule {
    /// That of programs which asked for nothing else.
    ///
    /// A thread that never sleeps needs it: the kernel's helpers of its io_uring take over its
    /// policy and run on its CPU, and a real-time thread makes room for its equals only after a
    /// slice of 100 ms.
    pub(super) const NORMAL: Self = Self {
        policy: libc::SCHED_OTHER,
        priority: 0,
    };

    /// That of this thread.
    pub(super) fn current() -> Result<Self, BenchError> {
        let mut param = libc::sched_param { sched_priority: 0 };
        // SAFETY: 0 is this thread; the call writes one sched_param, and `param` is one.
        let got = unsafe { libc::sched_getparam(0, &raw mut param) };
        // SAFETY: 0 is this thread; the call touches no memory of ours.
        let policy = unsafe { libc::sched_getscheduler(0) };
        if got != 0 || policy < 0 {
            return Err(host("ask for the scheduling policy")(
                io::Error::last_os_error(),
            ));
        }
        Ok(Self {
            policy,
            priority: param.sched_priority,
        })
    }

    /// Makes it that of this thread, and of every program and thread it starts from now on.
    pub(super) fn apply(self) -> Result<(), BenchError> {
        let param = libc::sched_param {
            sched_priority: self.priority,
        };
        // SAFETY: 0 is this thread; the call reads one sched_param, and `param` is one.
        if unsafe { libc::sched_setscheduler(0, self.policy, &raw const param) } == 0 {
            return Ok(());
        }
        Err(host("set the scheduling policy")(io::Error::last_os_error()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_keeps_its_policy_until_another_is_applied() {
        let before = Schedule::current().unwrap();
        Schedule::NORMAL.apply().unwrap();
        assert_eq!(Schedule::current().unwrap(), Schedule::NORMAL);
        before.apply().unwrap();
        assert_eq!(Schedule::current().unwrap(), before);
    }
}
