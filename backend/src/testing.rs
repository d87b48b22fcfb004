//! Guest memory for unit tests: a memory table over a memfd, and what a driver writes into it.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::rc::Rc;
use std::sync::Arc;

use iov_iter::{MemoryTable, Pools, RegionSpec, SharedLog, View};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use crate::vring::{Addresses, Areas, resolve};

/// Where the front end has the memory mapped, as seen from the guest: a front-end address is a
/// guest address plus this.
pub(crate) const FRONT_END: u64 = 0x7f00_0000_0000;

/// A guest with one region of memory, from guest address zero.
pub(crate) struct Ram {
    pub(crate) table: Arc<MemoryTable>,
    pub(crate) view: Rc<View>,
}

impl Ram {
    pub(crate) fn new(bytes: u64) -> Ram {
        Ram::split(&[(0, bytes)])
    }

    /// Regions at these guest addresses with these sizes, each over its own file.
    pub(crate) fn split(regions: &[(u64, u64)]) -> Ram {
        let specs = regions.iter().map(|&(guest_addr, size)| {
            let file = memfd_create("ram", MemfdFlags::CLOEXEC).unwrap();
            ftruncate(file.as_fd(), size).unwrap();
            RegionSpec {
                guest_addr,
                size,
                front_end_addr: FRONT_END + guest_addr,
                mmap_offset: 0,
                file,
            }
        });
        let table = Arc::new(MemoryTable::new(specs.collect()).unwrap());
        let view = View::new(table.clone(), Pools::new(16 << 20));
        Ram { table, view }
    }

    pub(crate) fn write(&self, guest: u64, bytes: &[u8]) {
        let (region, offset) = self.find(guest, bytes.len());
        self.table.regions()[region]
            .slice(offset, bytes.len())
            .unwrap()
            .copy_from(bytes);
    }

    pub(crate) fn read(&self, guest: u64, len: usize) -> Vec<u8> {
        let (region, offset) = self.find(guest, len);
        let mut bytes = vec![0; len];
        self.table.regions()[region]
            .slice(offset, len)
            .unwrap()
            .copy_to(&mut bytes[..]);
        bytes
    }

    fn find(&self, guest: u64, len: usize) -> (usize, u64) {
        let holds = |start: u64, size: u64| guest >= start && guest + len as u64 <= start + size;
        let regions = self.table.regions();
        let at = regions
            .iter()
            .position(|r| holds(r.guest_addr(), r.size()))
            .unwrap();
        (at, guest - regions[at].guest_addr())
    }
}

/// A dirty log of a front end's.
pub(crate) struct Log {
    file: File,
    pub(crate) log: SharedLog,
}

impl Log {
    /// A log for the first `pages` pages of guest addresses, a multiple of eight.
    pub(crate) fn new(pages: u64) -> Log {
        let file = File::from(memfd_create("log", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(pages / 8).unwrap();
        let log = SharedLog::new(file.try_clone().unwrap().into(), 0, pages / 8).unwrap();
        Log { file, log }
    }

    /// The pages that are marked, which are not any more.
    pub(crate) fn take(&self) -> Vec<u64> {
        let mut bits = vec![0; usize::try_from(self.log.size()).unwrap()];
        self.file.read_exact_at(&mut bits, 0).unwrap();
        self.file.write_all_at(&vec![0; bits.len()], 0).unwrap();
        let pages = 0..self.log.size() * 8;
        pages
            .filter(|&page| bits[page as usize / 8] & (1 << (page % 8)) != 0)
            .collect()
    }
}

/// A split ring as its driver sees it, in a [`Ram`].
pub(crate) struct DriverRing {
    pub(crate) size: u16,
    pub(crate) desc: u64,
    pub(crate) avail: u64,
    pub(crate) used: u64,
}

impl DriverRing {
    /// A ring at guest address `at`, which is a multiple of 16.
    pub(crate) fn new(at: u64, size: u16) -> DriverRing {
        let avail = at + 16 * u64::from(size);
        let used = (avail + 6 + 2 * u64::from(size)).next_multiple_of(4);
        DriverRing {
            size,
            desc: at,
            avail,
            used,
        }
    }

    pub(crate) fn addresses(&self) -> Addresses {
        Addresses {
            desc: FRONT_END + self.desc,
            avail: FRONT_END + self.avail,
            used: FRONT_END + self.used,
        }
    }

    pub(crate) fn areas(&self, ram: &Ram) -> Areas {
        resolve(&self.addresses(), self.size, &ram.table).unwrap()
    }

    pub(crate) fn put_descriptor(&self, ram: &Ram, index: u16, d: Descriptor) {
        ram.write(self.desc + 16 * u64::from(index), &d.bytes());
    }

    pub(crate) fn put_avail(&self, ram: &Ram, index: u16, head: u16) {
        let at = self.avail + 4 + 2 * u64::from(index % self.size);
        ram.write(at, &head.to_le_bytes());
    }

    pub(crate) fn put_avail_index(&self, ram: &Ram, index: u16) {
        ram.write(self.avail + 2, &index.to_le_bytes());
    }

    pub(crate) fn put_avail_flags(&self, ram: &Ram, flags: u16) {
        ram.write(self.avail, &flags.to_le_bytes());
    }

    pub(crate) fn put_used_event(&self, ram: &Ram, event: u16) {
        ram.write(
            self.avail + 4 + 2 * u64::from(self.size),
            &event.to_le_bytes(),
        );
    }

    pub(crate) fn put_used_index(&self, ram: &Ram, index: u16) {
        ram.write(self.used + 2, &index.to_le_bytes());
    }

    pub(crate) fn used_index(&self, ram: &Ram) -> u16 {
        word(&ram.read(self.used + 2, 2))
    }

    pub(crate) fn used_flags(&self, ram: &Ram) -> u16 {
        word(&ram.read(self.used, 2))
    }

    pub(crate) fn avail_event(&self, ram: &Ram) -> u16 {
        word(&ram.read(self.used + 4 + 8 * u64::from(self.size), 2))
    }

    /// Head and length of the used element at an index.
    pub(crate) fn used_element(&self, ram: &Ram, index: u16) -> (u32, u32) {
        let bytes = ram.read(self.used + 4 + 8 * u64::from(index % self.size), 8);
        let part = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        (part(0), part(4))
    }
}

/// A descriptor (virtio 2.7.5).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Descriptor {
    pub(crate) guest: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

impl Descriptor {
    pub(crate) fn bytes(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.guest.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

fn word(bytes: &[u8]) -> u16 {
    u16::from_le_bytes(bytes.try_into().unwrap())
}
