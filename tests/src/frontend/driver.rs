//! The driver's half of a split ring (virtio 2.7), with nothing checked.

use std::rc::Rc;

use super::{GuestRam, Outcome, PAGE};

/// VRING_DESC_F_NEXT.
pub const DESC_NEXT: u16 = 1;
/// VRING_DESC_F_WRITE.
pub const DESC_WRITE: u16 = 2;
/// VRING_DESC_F_INDIRECT.
pub const DESC_INDIRECT: u16 = 4;

/// Bytes of a descriptor.
const DESCRIPTOR_BYTES: u64 = 16;

/// A descriptor as the driver writes it (virtio 2.7.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// NEXT, WRITE, INDIRECT.
    pub flags: u16,
    /// The next descriptor of the chain.
    pub next: u16,
}

impl Descriptor {
    /// Memory the device reads.
    #[must_use]
    pub fn source(addr: u64, len: u32) -> Descriptor {
        Descriptor {
            addr,
            len,
            flags: 0,
            next: 0,
        }
    }

    /// Memory the device writes.
    #[must_use]
    pub fn dest(addr: u64, len: u32) -> Descriptor {
        Descriptor {
            addr,
            len,
            flags: DESC_WRITE,
            next: 0,
        }
    }

    /// Its sixteen bytes.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.addr.to_le_bytes().to_vec();
        bytes.extend(self.len.to_le_bytes());
        bytes.extend(self.flags.to_le_bytes());
        bytes.extend(self.next.to_le_bytes());
        bytes
    }
}

/// A chain: descriptors that [`DriverRing::offer_chain`] links one to the next.
pub type Chain = Vec<Descriptor>;

/// The kinds of virtio-blk requests the tests send (virtio 5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// VIRTIO_BLK_T_IN.
    In = 0,
    /// VIRTIO_BLK_T_OUT.
    Out = 1,
    /// VIRTIO_BLK_T_FLUSH.
    Flush = 4,
    /// VIRTIO_BLK_T_GET_ID.
    GetId = 8,
}

impl Kind {
    /// The header of a request of this kind.
    #[must_use]
    pub fn header(self, sector: u64) -> Vec<u8> {
        let mut bytes = u32::to_le_bytes(self as u32).to_vec();
        bytes.extend([0; 4]);
        bytes.extend(sector.to_le_bytes());
        bytes
    }
}

/// The driver's half of a split ring.
#[derive(Debug)]
pub struct DriverRing {
    ram: Rc<GuestRam>,
    size: u16,
    desc: u64,
    avail: u64,
    used: u64,
    next_avail: u16,
    last_used: u16,
}

impl DriverRing {
    /// A ring of `size` entries whose parts follow each other from `base`, each on its own page.
    #[must_use]
    pub fn new(ram: &Rc<GuestRam>, size: u16, base: u64) -> DriverRing {
        let page = |bytes: u64| bytes.next_multiple_of(4096);
        let entries = u64::from(size);
        let avail = base + page(entries * DESCRIPTOR_BYTES);
        let used = avail + page(6 + 2 * entries);
        DriverRing {
            ram: ram.clone(),
            size,
            desc: base,
            avail,
            used,
            next_avail: 0,
            last_used: 0,
        }
    }

    /// The first guest address behind it.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.used + self.used_bytes().next_multiple_of(4096)
    }

    /// Its entries.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Front-end addresses of descriptor table, used ring and avail ring, in the order of
    /// SET_VRING_ADDR.
    #[must_use]
    pub fn addresses(&self) -> [u64; 3] {
        [self.desc, self.used, self.avail].map(|guest| self.ram.front_end(guest))
    }

    /// Guest address of the used ring.
    #[must_use]
    pub fn used_addr(&self) -> u64 {
        self.used
    }

    /// Bytes of the used ring.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        6 + 8 * u64::from(self.size)
    }

    /// The pages of memory that the driver itself writes: descriptor table and avail ring.
    #[must_use]
    pub fn pages_of_driver(&self) -> std::ops::Range<u64> {
        self.desc / PAGE..self.used / PAGE
    }

    /// The avail index that comes next.
    #[must_use]
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// Writes a descriptor into the table.
    ///
    /// # Errors
    /// When it lies outside of memory.
    pub fn put(&self, index: u16, descriptor: Descriptor) -> Outcome {
        let place = self.desc + u64::from(index) * DESCRIPTOR_BYTES;
        self.ram.write(place, &descriptor.bytes())
    }

    /// Makes a head available, whatever it is.
    ///
    /// # Errors
    /// When the ring lies outside of memory.
    pub fn offer(&mut self, head: u16) -> Outcome {
        let slot = u64::from(self.next_avail % self.size);
        self.ram
            .write(self.avail + 4 + 2 * slot, &head.to_le_bytes())?;
        self.next_avail = self.next_avail.wrapping_add(1);
        self.set_avail_index(self.next_avail)
    }

    /// Sets the avail index, whatever was made available.
    ///
    /// # Errors
    /// When the ring lies outside of memory.
    pub fn set_avail_index(&mut self, index: u16) -> Outcome {
        self.next_avail = index;
        self.ram.store(self.avail + 2, index)
    }

    /// Empties the ring, as a driver does that sets the device up again.
    ///
    /// # Errors
    /// When the ring lies outside of memory.
    pub fn start_over(&mut self) -> Outcome {
        self.last_used = 0;
        self.ram.store(self.used + 2, 0)?;
        self.set_avail_index(0)
    }

    /// Sets the avail ring's flags (virtio 2.7.6: NO_INTERRUPT).
    ///
    /// # Errors
    /// When the ring lies outside of memory.
    pub fn set_avail_flags(&self, flags: u16) -> Outcome {
        self.ram.store(self.avail, flags)
    }

    /// Links descriptors from `head` on and makes them available.
    ///
    /// # Errors
    /// When the ring lies outside of memory.
    pub fn offer_chain(&mut self, head: u16, chain: &[Descriptor]) -> Outcome {
        let mut index = head;
        for (place, descriptor) in chain.iter().enumerate() {
            let mut linked = *descriptor;
            let next = (index + 1) % self.size;
            if place + 1 < chain.len() {
                linked.flags |= DESC_NEXT;
                linked.next = next;
            }
            self.put(index, linked)?;
            index = next;
        }
        self.offer(head)
    }

    /// The next used element, head and bytes written, if there is one.
    ///
    /// # Errors
    /// When the ring lies outside of memory.
    pub fn take_used(&mut self) -> Outcome<Option<(u32, u32)>> {
        if self.ram.load(self.used + 2)? == self.last_used {
            return Ok(None);
        }
        let slot = u64::from(self.last_used % self.size);
        let bytes = self.ram.read(self.used + 4 + 8 * slot, 8)?;
        self.last_used = self.last_used.wrapping_add(1);
        let (head, len) = bytes.split_at(4);
        Ok(Some((
            u32::from_le_bytes(head.try_into()?),
            u32::from_le_bytes(len.try_into()?),
        )))
    }

    /// The used index in memory.
    ///
    /// # Errors
    /// When the ring lies outside of memory.
    pub fn used_index(&self) -> Outcome<u16> {
        self.ram.load(self.used + 2)
    }
}
