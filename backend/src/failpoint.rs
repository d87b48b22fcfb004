//! Places where a test can kill the daemon, or make it forget something, between two exact steps.
//!
//! They exist only in a build with the feature `failpoints`, which is for tests alone: what the
//! environment variable FAILPOINTS names (see the crate `fail`) happens there. Without the feature
//! they are nothing.

/// A step was done: the daemon dies here, as by SIGKILL, if FAILPOINTS says so.
///
/// `FAILPOINTS="index-published=99*off->return"` lets it live 99 times.
#[cfg(feature = "failpoints")]
pub(crate) fn reached(step: &'static str) {
    fail::fail_point!(step, |_| {
        let _ =
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    });
}

/// Whether something is left out here that must never be: tests have to notice.
#[cfg(feature = "failpoints")]
pub(crate) fn skips(what: &'static str) -> bool {
    fail::fail_point!(what, |_| true);
    false
}

/// A step was done.
#[cfg(not(feature = "failpoints"))]
#[inline(always)]
pub(crate) fn reached(_step: &'static str) {}

/// Whether something is left out here: never.
#[cfg(not(feature = "failpoints"))]
#[inline(always)]
pub(crate) fn skips(_what: &'static str) -> bool {
    false
}
