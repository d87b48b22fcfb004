//! Guest memory in several regions, each with a copy elsewhere that follows by the dirty log.

use std::collections::BTreeSet;
use std::rc::Rc;

use crate::frontend::{GuestRam, Layout, Outcome, PAGE, region_payload, words};

/// Guest addresses below this are logged.
pub(super) const END: u64 = 64 << 20;
/// Where the regions that come and go lie, and where in their files.
const DIMMS: [(u64, u64); 2] = [(16 << 20, 0), (32 << 20, 4096)];

/// One region.
#[derive(Debug)]
struct Region {
    ram: Rc<GuestRam>,
    copy: Vec<u8>,
    mapped: bool,
    /// What is in it, while the daemon must not touch it.
    untouched: Option<Vec<u8>>,
}

/// All of guest memory. The first region has the rings and is always mapped.
#[derive(Debug)]
pub struct Memory(Vec<Region>);

impl Memory {
    /// The memory of a front end, and two more regions of `dimm` bytes that are not mapped.
    ///
    /// # Errors
    /// The kernel's.
    pub fn new(main: &Rc<GuestRam>, dimm: u64) -> Outcome<Memory> {
        let mut regions = vec![Region::new(main.clone())?];
        for (guest, offset) in DIMMS {
            regions.push(Region::new(Rc::new(GuestRam::at(Layout {
                guest,
                size: dimm,
                offset,
            })?))?);
        }
        regions[0].mapped = true;
        for region in &mut regions[1..] {
            region.untouched = Some(region.all()?);
        }
        Ok(Memory(regions))
    }

    /// The regions, from the first.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Where a region starts.
    #[must_use]
    pub fn start(&self, region: usize) -> u64 {
        self.0[region].ram.layout().guest
    }

    /// Whether the daemon has a region.
    #[must_use]
    pub fn is_mapped(&self, region: usize) -> bool {
        self.0[region].mapped
    }

    /// A region's memory.
    #[must_use]
    pub fn ram(&self, region: usize) -> &GuestRam {
        &self.0[region].ram
    }

    /// The daemon has these regions from now on.
    pub fn map(&mut self, regions: &BTreeSet<usize>) {
        for &region in regions {
            self.0[region].mapped = true;
            self.0[region].untouched = None;
        }
    }

    /// The daemon has given a region back: whatever it does to it from now on is found out.
    ///
    /// # Errors
    /// When the region is not there.
    pub fn unmap(&mut self, region: usize, poison: u8) -> Outcome {
        let Region { ram, copy, .. } = &self.0[region];
        let bytes = vec![poison; copy.len()];
        self.write(ram.layout().guest, &bytes)?;
        self.0[region].mapped = false;
        self.0[region].untouched = Some(bytes);
        Ok(())
    }

    /// Whether nobody else wrote to the regions that the daemon has not.
    ///
    /// # Errors
    /// When somebody did.
    pub fn check_untouched(&self) -> Outcome {
        for region in &self.0 {
            if let Some(expected) = &region.untouched
                && region.all()? != *expected
            {
                let guest = region.ram.layout().guest;
                return Err(
                    format!("the region at {guest:#x} was touched after its removal").into(),
                );
            }
        }
        Ok(())
    }

    /// The guest writes, which its host knows of without the daemon.
    ///
    /// # Errors
    /// When there is no memory.
    pub fn write(&mut self, guest: u64, bytes: &[u8]) -> Outcome {
        let region = self.region(guest)?;
        region.ram.write(guest, bytes)?;
        let at = usize::try_from(guest - region.ram.layout().guest)?;
        region.copy[at..at + bytes.len()].copy_from_slice(bytes);
        if let Some(expected) = &mut region.untouched {
            expected[at..at + bytes.len()].copy_from_slice(bytes);
        }
        Ok(())
    }

    /// The guest reads.
    ///
    /// # Errors
    /// When there is no memory.
    pub fn read(&mut self, guest: u64, count: usize) -> Outcome<Vec<u8>> {
        self.region(guest)?.ram.read(guest, count)
    }

    /// Copies everything.
    ///
    /// # Errors
    /// When there is no memory.
    pub fn copy_all(&mut self) -> Outcome {
        for region in &mut self.0 {
            region.copy = region.all()?;
        }
        Ok(())
    }

    /// Copies some pages.
    ///
    /// # Errors
    /// When one of them is not in memory.
    pub fn copy_pages(&mut self, pages: &[u64]) -> Outcome {
        for page in pages {
            let guest = page * PAGE;
            let region = self.region(guest)?;
            let at = usize::try_from(guest - region.ram.layout().guest)?;
            let bytes = region.ram.read(guest, usize::try_from(PAGE)?)?;
            region.copy[at..at + bytes.len()].copy_from_slice(&bytes);
        }
        Ok(())
    }

    /// Whether the copy is what memory is, but for pages that only the driver writes.
    ///
    /// # Errors
    /// When it is not.
    pub fn check_copy(&self, but: impl Fn(u64) -> bool) -> Outcome {
        for region in &self.0 {
            let now = region.all()?;
            let page_bytes = usize::try_from(PAGE)?;
            let pages = now.chunks(page_bytes).zip(region.copy.chunks(page_bytes));
            for (page, (now, copy)) in (region.ram.layout().guest / PAGE..).zip(pages) {
                if now != copy && !but(page) {
                    let at = now.iter().zip(copy).position(|(now, copy)| now != copy);
                    return Err(format!("page {page:#x} was not marked: byte {at:?}").into());
                }
            }
        }
        Ok(())
    }

    /// The payload of SET_MEM_TABLE for the first region and some more.
    #[must_use]
    pub fn table(&self, more: &BTreeSet<usize>) -> (Vec<u8>, Vec<usize>) {
        let mut listed: Vec<usize> = more.iter().rev().copied().collect();
        listed.push(0);
        let count = u32::try_from(listed.len()).unwrap_or(u32::MAX);
        let mut payload = words(&[count, 0]);
        for &region in &listed {
            payload.extend(region_payload(self.0[region].ram.numbers()));
        }
        (payload, listed)
    }

    fn region(&mut self, guest: u64) -> Outcome<&mut Region> {
        let inside = |region: &&mut Region| {
            let Layout {
                guest: from, size, ..
            } = region.ram.layout();
            (from..from + size).contains(&guest)
        };
        let found = self.0.iter_mut().find(inside);
        Ok(found.ok_or_else(|| format!("no memory at {guest:#x}"))?)
    }
}

impl Region {
    fn new(ram: Rc<GuestRam>) -> Outcome<Region> {
        Ok(Region {
            copy: vec![0; usize::try_from(ram.layout().size)?],
            ram,
            mapped: false,
            untouched: None,
        })
    }

    fn all(&self) -> Outcome<Vec<u8>> {
        let Layout { guest, size, .. } = self.ram.layout();
        self.ram.read(guest, usize::try_from(size)?)
    }
}
