//! The files a ring does I/O on.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use super::way::Ways;
use crate::geometry::Extent;

/// What kind of file a device does I/O on; decides how space is given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A file in a file system.
    Regular,
    /// A block special. It gives space back and zeroes in whole sectors of its own only, even where
    /// the page cache takes smaller writes.
    Block {
        /// The size of its sectors in bytes.
        sector_size: u32,
    },
}

/// A file that a ring knows; made by [`super::Ring::register_file`] and only valid for that ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileSlot(pub(super) u32);

/// One registered file. The ring has a descriptor of its own, so the device may close its one.
#[derive(Debug)]
pub(super) struct File {
    fd: OwnedFd,
    pub(super) kind: FileKind,
    pub(super) ways: Ways,
    /// The index in io_uring's table of registered files, when it is there.
    pub(super) fixed: Option<u32>,
    /// Whether FALLOC_FL_PUNCH_HOLE has not been refused yet.
    pub(super) punches: bool,
    /// Whether FALLOC_FL_ZERO_RANGE has not been refused yet.
    pub(super) zeroes: bool,
}

impl File {
    pub(super) fn new(fd: BorrowedFd<'_>, kind: FileKind, ways: Ways) -> io::Result<Self> {
        let fd = fd.try_clone_to_owned()?;
        Ok(Self {
            fd,
            kind,
            ways,
            fixed: None,
            punches: true,
            zeroes: true,
        })
    }

    pub(super) fn raw(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// Whether a range can be given back or zeroed without writing.
    pub(super) fn changes(&self, at: Extent) -> bool {
        match self.kind {
            FileKind::Regular => true,
            FileKind::Block { sector_size } => at.is_aligned(sector_size),
        }
    }

    /// The part of a range that a discard can reach.
    pub(super) fn whole_sectors(&self, at: Extent) -> Extent {
        match self.kind {
            FileKind::Regular => at,
            FileKind::Block { sector_size } => at.whole_units(sector_size),
        }
    }

    /// Punching was refused; write-zeroes takes another way from now on.
    pub(super) fn cannot_punch(&mut self) {
        if std::mem::replace(&mut self.punches, false) {
            log::debug!("holes cannot be punched here: write-zeroes keeps the space");
        }
    }

    /// Zeroing in place was refused; zeroes are written from now on.
    pub(super) fn cannot_zero(&mut self) {
        if std::mem::replace(&mut self.zeroes, false) {
            log::debug!("ranges cannot be zeroed in place here: write-zeroes writes zeroes");
        }
    }
}
