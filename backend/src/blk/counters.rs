//! What a device has done, counted by each worker for itself.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// One worker's counts for one device. The worker is the only writer, so a count costs a
        /// plain load and store; whoever sums them up reads at any time.
        #[derive(Debug, Default)]
        #[repr(align(128))] // a cache line pair of its own: no worker slows another down
        pub struct Counters {
            $($(#[$doc])* pub $name: Count,)*
        }

        impl Counters {
            /// Adds another worker's counts.
            pub(super) fn add(&self, other: &Counters) {
                $(self.$name.add(other.$name.get());)*
            }
        }

        impl fmt::Display for Counters {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let mut separator = "";
                $(
                    write!(f, "{separator}{}={}", stringify!($name), self.$name.get())?;
                    separator = " ";
                )*
                let _ = separator;
                Ok(())
            }
        }
    };
}

counters! {
    /// IN requests.
    reads,
    /// OUT requests.
    writes,
    /// FLUSH requests.
    flushes,
    /// GET_ID requests.
    get_ids,
    /// DISCARD requests.
    discards,
    /// WRITE_ZEROES requests.
    write_zeroes,
    /// Requests of a type we do not know.
    unsupported,
    /// Bytes that IN requests moved.
    read_bytes,
    /// Bytes that OUT requests moved.
    written_bytes,
    /// Requests answered with IOERR.
    errors,
    /// Chains that broke the virtio specification.
    broken_chains,
    /// Holds taken on the memory table.
    reffed,
    /// Requests that went through a bounce buffer.
    bounced,
    /// Requests whose memory was registered with the kernel.
    pinned,
    /// Requests that went without, although memory is to be pinned.
    pin_fallbacks,
    /// Requests that had to wait for a bounce buffer.
    parked,
    /// Requests handed to the storage.
    handed_over,
    /// Requests that the storage gave back.
    given_back,
    /// Requests given up because their front end was gone.
    abandoned,
    /// Calls made.
    calls,
    /// Kicks seen.
    kicks,
}

/// A count with one writer.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    /// Adds to the count. Only the thread that owns the counters may call it.
    #[inline]
    pub fn add(&self, n: u64) {
        self.0.store(self.get().wrapping_add(n), Ordering::Relaxed);
    }

    /// The count so far.
    #[inline]
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_add_up_and_are_named() {
        let (one, sum) = (Counters::default(), Counters::default());
        one.reads.add(3);
        one.read_bytes.add(4096);
        sum.add(&one);
        sum.add(&one);
        let line = sum.to_string();
        assert!(line.starts_with("reads=6 writes=0 "), "{line}");
        assert!(line.contains(" read_bytes=8192 "), "{line}");
    }
}
