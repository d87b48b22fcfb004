//! A guest for tests: memory in memfds, which the tests reach through the files and not through
//! the mappings under test, and a driver that writes descriptors.
#![expect(unsafe_code, reason = "memfd_create has no safe wrapper")]

use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::rc::Rc;
use std::sync::Arc;

use iov_iter::{Area, ChainLimits, MemoryTable, Pools, RegionSpec, View};

pub(crate) const LIMITS: ChainLimits = ChainLimits {
    max_segments: 1026,
    max_bytes: 1 << 32,
};

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// Where front ends have what guests have at zero.
pub(crate) const FRONT_END_BASE: u64 = 0x7f00_0000_0000;

pub(crate) struct Guest {
    regions: Vec<(u64, u64, File)>,
    pub(crate) table: Arc<MemoryTable>,
    pub(crate) pools: Rc<Pools>,
    pub(crate) view: Rc<View>,
}

/// A descriptor as a driver writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Desc {
    pub(crate) addr: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

/// A memfd of `size` bytes, with `flags` of `memfd_create`.
pub(crate) fn memfd_with(size: u64, flags: u32) -> io::Result<File> {
    // SAFETY: the name is a C string; the result is checked.
    let fd = unsafe { libc::memfd_create(c"iov-iter test".as_ptr(), flags | libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made the descriptor for us.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(size)?;
    Ok(file)
}

pub(crate) fn memfd(size: u64) -> File {
    memfd_with(size, 0).unwrap()
}

pub(crate) fn spec(guest_addr: u64, size: u64, file: &File) -> RegionSpec {
    RegionSpec {
        guest_addr,
        size,
        front_end_addr: FRONT_END_BASE + guest_addr,
        mmap_offset: 0,
        file: OwnedFd::from(file.try_clone().unwrap()),
    }
}

impl Guest {
    /// A guest with regions (guest address, size) and room for 64 MiB of bounce buffers.
    pub(crate) fn new(regions: &[(u64, u64)]) -> Self {
        Self::with_bounce(regions, 64 << 20)
    }

    pub(crate) fn with_bounce(regions: &[(u64, u64)], budget: usize) -> Self {
        let regions: Vec<_> = regions
            .iter()
            .map(|&(at, size)| (at, size, memfd(size)))
            .collect();
        let specs = regions
            .iter()
            .map(|(at, size, file)| spec(*at, *size, file))
            .collect();
        let table = Arc::new(MemoryTable::new(specs).unwrap());
        let pools = Pools::new(budget);
        let view = View::new(Arc::clone(&table), Rc::clone(&pools));
        Self {
            regions,
            table,
            pools,
            view,
        }
    }

    pub(crate) fn file(&self, region: usize) -> &File {
        &self.regions[region].2
    }

    /// Writes through the files; the range may cross regions.
    pub(crate) fn write(&self, addr: u64, bytes: &[u8]) {
        let mut rest = bytes;
        while !rest.is_empty() {
            let (file, at, left) = self.place(addr + (bytes.len() - rest.len()) as u64);
            let (now, later) = rest.split_at(rest.len().min(left));
            file.write_all_at(now, at).unwrap();
            rest = later;
        }
    }

    /// Reads through the files; the range may cross regions.
    pub(crate) fn read(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let mut done = 0;
        while done < len {
            let (file, at, left) = self.place(addr + done as u64);
            let end = len.min(done + left);
            file.read_exact_at(&mut bytes[done..end], at).unwrap();
            done = end;
        }
        bytes
    }

    fn place(&self, addr: u64) -> (&File, u64, usize) {
        let (at, size, file) = self
            .regions
            .iter()
            .find(|(at, size, _)| (*at..*at + *size).contains(&addr))
            .expect("the test touches mapped memory only");
        (file, addr - at, (at + size - addr) as usize)
    }

    pub(crate) fn ring(&self, addr: u64, size: u16) -> Area {
        self.table.area(addr, usize::from(size) * 16, 16).unwrap()
    }

    /// Writes descriptors one after the other, from `addr` on.
    pub(crate) fn descriptors(&self, addr: u64, descs: &[Desc]) {
        let bytes: Vec<u8> = descs.iter().flat_map(Desc::bytes).collect();
        self.write(addr, &bytes);
    }
}

impl Desc {
    pub(crate) fn new(addr: u64, len: u32, flags: u16, next: u16) -> Self {
        Self {
            addr,
            len,
            flags,
            next,
        }
    }

    pub(crate) fn bytes(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// Links `buffers` (address, length, flags) in order, at indices 0 and on.
pub(crate) fn link(buffers: &[(u64, u32, u16)]) -> Vec<Desc> {
    let last = buffers.len() - 1;
    let desc = |(i, &(addr, len, flags)): (usize, &(u64, u32, u16))| {
        let more = if i < last { NEXT } else { 0 };
        Desc::new(addr, len, flags | more, (i + 1) as u16)
    };
    buffers.iter().enumerate().map(desc).collect()
}

pub(crate) fn seal_against_writing(file: &File) {
    use std::os::fd::AsRawFd;
    // SAFETY: takes no pointer; the result is checked.
    let sealed = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_WRITE) };
    assert_eq!(sealed, 0, "{}", io::Error::last_os_error());
}

/// Checks the ledger, in builds that keep one: this thread has `holds` out.
#[cfg(debug_assertions)]
pub(crate) fn assert_outstanding(holds: usize) {
    assert_eq!(iov_iter::ledger::outstanding(), holds);
}

#[cfg(not(debug_assertions))]
pub(crate) fn assert_outstanding(_holds: usize) {}
