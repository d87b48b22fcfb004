//! The two places where a wake-up could get lost.
//!
//! Each side first makes its work visible and then asks whether the other side wants to be told;
//! the other side first says that it wants to be told and then looks for work. Both need a full
//! fence between the two steps (virtio 2.7.13.4.1, 2.7.10.1): with acquire and release alone both
//! sides may read the old value, and both sleep. The functions are generic over the word so that
//! the model checker runs these very lines.

use std::sync::atomic::{AtomicU16, Ordering, fence};

/// A 16-bit word that driver and device share.
pub(super) trait Word {
    /// Reads the word.
    fn get(&self, order: Ordering) -> u16;
    /// Writes the word.
    fn set(&self, value: u16, order: Ordering);
    /// A sequentially consistent fence.
    fn full_fence();
}

impl Word for AtomicU16 {
    #[inline]
    fn get(&self, order: Ordering) -> u16 {
        self.load(order)
    }

    #[inline]
    fn set(&self, value: u16, order: Ordering) {
        self.store(value, order);
    }

    #[inline]
    fn full_fence() {
        fence(Ordering::SeqCst);
    }
}

/// Makes work visible under `index`, then reads what the other side asked for.
#[inline]
pub(super) fn publish<W: Word>(index: &W, value: u16, wanted: &W) -> u16 {
    index.set(value, Ordering::Release);
    W::full_fence();
    wanted.get(Ordering::Relaxed)
}

/// Asks to be told by storing `ask`, then reads how far the other side has come.
#[inline]
pub(super) fn arm<W: Word>(wanted: &W, ask: u16, index: &W) -> u16 {
    wanted.set(ask, Ordering::Relaxed);
    W::full_fence();
    index.get(Ordering::Acquire)
}

/// Whether a side that asked to be told at `event` is told when the index moved from `old` to
/// `new` (virtio 2.7.10, `vring_need_event`).
#[inline]
pub(super) fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_needed_when_the_index_passed_it() {
        assert!(need_event(0, 1, 0));
        assert!(!need_event(1, 1, 0));
        assert!(need_event(4, 5, 0));
        assert!(!need_event(5, 5, 0));
        assert!(need_event(0xffff, 0, 0xffff));
        assert!(need_event(0xffff, 3, 0xfffe));
        assert!(!need_event(3, 3, 0xfffe));
        assert!(!need_event(10, 3, 3), "nothing moved, nobody is told");
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use loom::sync::Arc;
    use loom::sync::atomic::{AtomicBool, AtomicU16};
    use loom::thread;

    use super::*;

    impl Word for AtomicU16 {
        fn get(&self, order: Ordering) -> u16 {
            self.load(order)
        }

        fn set(&self, value: u16, order: Ordering) {
            self.store(value, order);
        }

        fn full_fence() {
            loom::sync::atomic::fence(Ordering::SeqCst);
        }
    }

    /// One side publishes two entries, the other serves what it sees, arms and goes to sleep. At
    /// the end either everything was served or a wake-up is pending.
    fn no_wake_up_is_lost(told: fn(u16, u16, u16) -> bool, asks: fn(u16) -> u16, start: u16) {
        loom::model(move || {
            let index = Arc::new(AtomicU16::new(0));
            let wanted = Arc::new(AtomicU16::new(start));
            let wake_up = Arc::new(AtomicBool::new(false));
            let publisher = {
                let (index, wanted, wake_up) = (index.clone(), wanted.clone(), wake_up.clone());
                thread::spawn(move || {
                    for new in 1..=2 {
                        let event = publish(&*index, new, &*wanted);
                        if told(event, new, new - 1) {
                            wake_up.store(true, Ordering::SeqCst);
                        }
                    }
                })
            };
            let mut served = 0;
            loop {
                served = index.load(Ordering::Acquire).max(served);
                if arm(&*wanted, asks(served), &*index) == served {
                    break;
                }
            }
            publisher.join().unwrap();
            let all = index.load(Ordering::Acquire);
            assert!(
                served == all || wake_up.load(Ordering::SeqCst),
                "a wake-up was lost"
            );
        });
    }

    #[test]
    fn loom_event_index_loses_no_wake_up() {
        no_wake_up_is_lost(need_event, |served| served, 0xffff);
    }

    #[test]
    fn loom_flags_lose_no_wake_up() {
        // The flag's value 1 means: do not tell me. The sleeper clears it.
        no_wake_up_is_lost(|flags, _, _| flags & 1 == 0, |_| 0, 1);
    }
}
