//! Borrowed descriptors of eventfds.
#![expect(
    unsafe_code,
    reason = "EventFd shows its descriptor only as an integer"
)]

use std::os::fd::{AsRawFd, BorrowedFd};

use vmm_sys_util::eventfd::EventFd;

/// The descriptor of an eventfd, for as long as the eventfd is borrowed.
#[must_use]
pub fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: `event` owns the descriptor, keeps it open, and is borrowed for as long as the result.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
