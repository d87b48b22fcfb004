//! Cache lines that are asked for before they are used.

/// A cache line by an address in it, to be fetched ahead of a load and for nothing else: it keeps
/// nothing mapped, and may be of memory that is gone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Line(usize);

impl Line {
    #[inline]
    pub(crate) fn at(address: *const u8) -> Self {
        Self(address.addr())
    }

    /// Asks the CPU for the line, and waits for nothing. Nothing happens on CPUs other than x86-64.
    #[inline]
    pub fn fetch(self) {
        #[cfg(target_arch = "x86_64")]
        super::prefetch::prefetch(self.0);
    }
}
