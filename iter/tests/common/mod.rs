//! A guest for tests: memory in memfds, which the tests reach through the files, not through the
//! mappings under test, and a driver that writes descriptors.
#![expect(dead_code, reason = "each test binary uses its part of it")]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::rc::Rc;
use std::sync::Arc;

use iov_iter::{Area, ChainLimits, MemoryTable, Pools, RegionSpec, View};

pub(crate) const LIMITS: ChainLimits = ChainLimits {
    max_segments: 1026,
    max_bytes: 1 << 32,
};
pub(crate) const PAGE: u64 = 4096;

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

pub(crate) fn memfd(size: u64) -> File {
    let file = vmm_sys_util::tempfile::TempFile::new_in(std::path::Path::new("/dev/shm")).unwrap();
    let file = file.as_file().try_clone().unwrap();
    file.set_len(size).unwrap();
    file
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

    pub(crate) fn write(&self, addr: u64, bytes: &[u8]) {
        for (i, byte) in bytes.iter().enumerate() {
            let (file, at) = self.place(addr + i as u64);
            // A range inside one region goes in one call.
            if i == 0 {
                let (_, end_at) = self.place(addr + (bytes.len() as u64).saturating_sub(1));
                if end_at == at + (bytes.len() as u64).saturating_sub(1) {
                    file.write_all_at(bytes, at).unwrap();
                    return;
                }
            }
            file.write_all_at(&[*byte], at).unwrap();
        }
    }

    pub(crate) fn read(&self, addr: u64, len: usize) -> Vec<u8> {
        (0..len as u64)
            .map(|i| {
                let (file, at) = self.place(addr + i);
                let mut byte = [0];
                file.read_exact_at(&mut byte, at).unwrap();
                byte[0]
            })
            .collect()
    }

    /// Reads a range that lies in one region.
    pub(crate) fn read_fast(&self, addr: u64, len: usize) -> Vec<u8> {
        let (file, at) = self.place(addr);
        let mut bytes = vec![0; len];
        file.read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    fn place(&self, addr: u64) -> (&File, u64) {
        let (at, _, file) = self
            .regions
            .iter()
            .find(|(at, size, _)| (*at..*at + *size).contains(&addr))
            .expect("the test writes to mapped memory only");
        (file, addr - at)
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
