//! The memory table: what it refuses, what it shares, how it looks things up.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use iov_iter::{MAX_REGIONS, MemoryError, MemoryTable, RegionSpec};
use vmm_sys_util::tempfile::TempFile;

use crate::guest::{FRONT_END_BASE, Guest, memfd, memfd_with, spec};

const SIZE: u64 = 0x10000;

fn refused(specs: Vec<RegionSpec>) -> MemoryError {
    MemoryTable::new(specs).unwrap_err()
}

#[test]
fn a_region_must_have_bytes() {
    let file = memfd(SIZE);
    assert!(matches!(
        refused(vec![spec(0, 0, &file)]),
        MemoryError::ZeroSize { .. }
    ));
}

#[test]
fn no_number_may_wrap_around() {
    let file = memfd(SIZE);
    let high = u64::MAX - 0xfff;
    let cases = [
        (
            "guest address",
            RegionSpec {
                guest_addr: high,
                ..spec(0, SIZE, &file)
            },
        ),
        (
            "front-end address",
            RegionSpec {
                front_end_addr: high,
                ..spec(0, SIZE, &file)
            },
        ),
        (
            "file offset",
            RegionSpec {
                mmap_offset: high,
                ..spec(0, SIZE, &file)
            },
        ),
    ];
    for (name, wrapping) in cases {
        let error = refused(vec![wrapping]);
        let MemoryError::WrapsAround {
            which,
            start,
            size: SIZE,
        } = error
        else {
            panic!("{name}: {error}");
        };
        assert_eq!((which, start), (name, high));
    }
}

#[test]
fn the_last_byte_of_the_address_space_is_out_of_reach() {
    let file = memfd(SIZE);
    let at = |guest_addr| RegionSpec {
        guest_addr,
        ..spec(0, SIZE, &file)
    };
    // Its end would be 2^64.
    let error = refused(vec![at(u64::MAX - SIZE + 1)]);
    assert!(matches!(
        error,
        MemoryError::WrapsAround {
            which: "guest address",
            ..
        }
    ));
    let below = at(u64::MAX - SIZE);
    assert_eq!(MemoryTable::new(vec![below]).unwrap().regions().len(), 1);
}

#[test]
fn regions_may_touch_but_not_overlap() {
    let file = memfd(2 * SIZE);
    let guests = |second: u64| {
        let mut other = spec(second, SIZE, &file);
        other.front_end_addr = 0;
        MemoryTable::new(vec![spec(0, SIZE, &file), other])
    };
    assert!(guests(SIZE).is_ok());
    let error = guests(SIZE - 1).unwrap_err();
    let (first, second) = (0, SIZE - 1);
    let expected = MemoryError::Overlap {
        which: "guest address",
        first,
        second,
    };
    assert_eq!(error.to_string(), expected.to_string());
    let mut other = spec(8 * SIZE, SIZE, &file);
    other.front_end_addr = FRONT_END_BASE + SIZE - 1;
    let overlap = refused(vec![other, spec(0, SIZE, &file)]);
    assert!(matches!(
        overlap,
        MemoryError::Overlap {
            which: "front-end address",
            ..
        }
    ));
}

#[test]
fn a_region_ends_inside_its_file() {
    let file = memfd(SIZE);
    let with_offset = |mmap_offset, size| RegionSpec {
        mmap_offset,
        ..spec(0, size, &file)
    };
    assert!(MemoryTable::new(vec![with_offset(0x1000, SIZE - 0x1000)]).is_ok());
    let error = refused(vec![with_offset(0x1000, SIZE - 0xfff)]);
    let expected = MemoryError::BeyondFile {
        end: SIZE + 1,
        file_len: SIZE,
    };
    assert_eq!(error.to_string(), expected.to_string());
}

#[test]
fn what_is_not_a_writable_file_is_refused() {
    let (pipe, _writer) = std::io::pipe().unwrap();
    let (socket, _peer) = UnixStream::pair().unwrap();
    let fds: [OwnedFd; 4] = [
        pipe.into(),
        socket.into(),
        File::options()
            .read(true)
            .write(true)
            .open("/dev/zero")
            .unwrap()
            .into(),
        File::open("/").unwrap().into(),
    ];
    for fd in fds {
        let error = refused(vec![RegionSpec {
            file: fd,
            ..spec(0, SIZE, &memfd(SIZE))
        }]);
        assert!(
            matches!(error, MemoryError::NotAFile { guest_addr: 0 }),
            "{error}"
        );
    }
    let temp = TempFile::new().unwrap();
    temp.as_file().set_len(SIZE).unwrap();
    for options in [File::options().read(true), File::options().write(true)] {
        let fd = options.open(temp.as_path()).unwrap();
        let error = refused(vec![RegionSpec {
            file: fd.into(),
            ..spec(0, SIZE, &memfd(SIZE))
        }]);
        assert!(
            matches!(error, MemoryError::ReadOnly { guest_addr: 0 }),
            "{error}"
        );
    }
}

#[test]
fn a_file_sealed_against_writing_is_refused_by_the_kernel() {
    let file = memfd_with(SIZE, libc::MFD_ALLOW_SEALING).unwrap();
    crate::guest::seal_against_writing(&file);
    let error = refused(vec![spec(0, SIZE, &file)]);
    assert!(
        matches!(error, MemoryError::Map { guest_addr: 0, .. }),
        "{error}"
    );
}

#[test]
fn as_many_regions_as_front_ends_can_send_and_not_one_more() {
    let file = memfd(0x1000);
    let specs = |n: usize| {
        (0..n as u64)
            .map(|i| spec(i * 0x2000, 0x1000, &file))
            .collect()
    };
    let full = MemoryTable::new(specs(MAX_REGIONS)).unwrap();
    assert_eq!(full.regions().len(), 509);
    assert!(matches!(
        refused(specs(MAX_REGIONS + 1)),
        MemoryError::TooManyRegions
    ));
    let one_more = full.with_region(spec(1 << 40, 0x1000, &file));
    assert!(matches!(one_more.unwrap_err(), MemoryError::TooManyRegions));
    // A look-up finds each of them, and none of the gaps.
    let full = Arc::new(full);
    for i in 0..MAX_REGIONS as u64 {
        assert_eq!(
            full.area(i * 0x2000 + 0xff8, 8, 8).unwrap().guest_addr(),
            i * 0x2000 + 0xff8
        );
        assert!(full.area(i * 0x2000 + 0x1000, 1, 1).is_err());
    }
}

#[test]
fn a_change_makes_a_new_table_and_shares_the_rest() {
    let (low, high) = (memfd(SIZE), memfd(SIZE));
    let one = MemoryTable::new(vec![spec(4 * SIZE, SIZE, &high)]).unwrap();
    let two = one.with_region(spec(0, SIZE, &low)).unwrap();
    let guests: Vec<_> = two.regions().iter().map(|r| r.guest_addr()).collect();
    assert_eq!(guests, [0, 4 * SIZE]);
    assert!(Arc::ptr_eq(&one.regions()[0], &two.regions()[1]));
    let overlap = two.with_region(spec(SIZE - 1, 2, &low)).unwrap_err();
    assert!(matches!(overlap, MemoryError::Overlap { .. }));

    for (guest, size, front_end) in [
        (0, SIZE, FRONT_END_BASE + 1),
        (0, SIZE - 1, FRONT_END_BASE),
        (1, SIZE, FRONT_END_BASE),
    ] {
        let error = two.without_region(guest, size, front_end).unwrap_err();
        assert!(matches!(error, MemoryError::NoSuchRegion { .. }));
    }
    let left = two.without_region(0, SIZE, FRONT_END_BASE).unwrap();
    assert!(Arc::ptr_eq(&one.regions()[0], &left.regions()[0]));
    assert_eq!(left.regions().len(), 1);
}

#[test]
fn the_mapping_goes_with_its_last_owner() {
    let file = memfd(SIZE);
    let inode = inode_of(&file);
    let table = Arc::new(MemoryTable::new(vec![spec(0, SIZE, &file)]).unwrap());
    let area = table.area(0x1000, 64, 16).unwrap();
    assert_eq!(mappings_of(inode), 1);
    let emptied = table.without_region(0, SIZE, FRONT_END_BASE).unwrap();
    drop(table);
    assert_eq!((emptied.regions().len(), mappings_of(inode)), (0, 1));
    assert_eq!(area.load::<u64>(0), Some(0));
    drop(area);
    assert_eq!(mappings_of(inode), 0);
}

fn inode_of(file: &File) -> u64 {
    use std::os::unix::fs::MetadataExt;
    file.metadata().unwrap().ino()
}

fn mappings_of(inode: u64) -> usize {
    let mut maps = String::new();
    File::open("/proc/self/maps")
        .unwrap()
        .read_to_string(&mut maps)
        .unwrap();
    let inode = inode.to_string();
    let ours = |line: &&str| {
        let mut fields = line.split_whitespace();
        fields.nth(4) == Some(&inode) && line.contains("memfd:iov-iter")
    };
    maps.lines().filter(ours).count()
}

#[test]
fn mappings_stay_out_of_forks_and_core_dumps() {
    let file = memfd(SIZE);
    let _table = MemoryTable::new(vec![spec(0, SIZE, &file)]).unwrap();
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let inode = format!(" {} ", inode_of(&file));
    let mut lines = smaps.lines().skip_while(|line| !line.contains(&inode));
    assert!(lines.next().is_some(), "the mapping is listed");
    let flags = lines.find(|line| line.starts_with("VmFlags:")).unwrap();
    let has = |flag| flags.split_whitespace().any(|word| word == flag);
    assert!(has("dc") && has("dd") && has("sh"), "{flags}");
}

#[test]
fn front_end_addresses_translate_inside_one_region() {
    let guest = Guest::new(&[(0, SIZE), (SIZE, SIZE), (0x10_0000, SIZE)]);
    let at = |addr, len| guest.table.front_end_to_guest(FRONT_END_BASE + addr, len);
    assert_eq!(at(0, SIZE), Some(0));
    assert_eq!(at(0x10_0010, SIZE - 0x10), Some(0x10_0010));
    assert_eq!(at(0x10_0010, SIZE - 0xf), None);
    // Neighbours are two mappings: a ring across them has no one address here.
    assert_eq!(at(SIZE - 8, 16), None);
    assert_eq!(at(2 * SIZE, 1), None);
    assert_eq!(at(0, u64::MAX), None);
    assert_eq!(guest.table.front_end_to_guest(0, 1), None);
}

#[test]
fn areas_are_checked_and_see_what_the_guest_writes() {
    let guest = Guest::new(&[(0x1000, SIZE)]);
    let area = guest.table.area(0x1010, 16, 16).unwrap();
    guest.write(0x1010, &0x1122_3344_5566_7788_u64.to_ne_bytes());
    assert_eq!((area.len(), area.guest_addr()), (16, 0x1010));
    let u64_at = |offset| area.atomic_u64(offset).map(|a| a.load(Ordering::Relaxed));
    let u32_at = |offset| area.atomic_u32(offset).map(|a| a.load(Ordering::Relaxed));
    let u16_at = |offset| area.atomic_u16(offset).map(|a| a.load(Ordering::Relaxed));
    assert_eq!(u64_at(0), Some(0x1122_3344_5566_7788));
    assert_eq!((u32_at(4), u16_at(2)), (Some(0x1122_3344), Some(0x5566)));
    assert_eq!(
        (u64_at(8), u32_at(12), u16_at(14)),
        (Some(0), Some(0), Some(0))
    );
    // Misaligned, then outside.
    assert_eq!((u64_at(4), u32_at(2), u16_at(1)), (None, None, None));
    assert_eq!((u64_at(16), u32_at(16), u16_at(16)), (None, None, None));
    assert_eq!(u16_at(usize::MAX - 1), None);
    assert_eq!(area.load::<u32>(13), None);
    assert_eq!(area.load::<u32>(usize::MAX), None);
    assert_eq!(area.store(12, 0xdead_beef_u32), Some(()));
    assert_eq!(area.store(13, 0_u32), None);
    assert_eq!(guest.read(0x101c, 4), 0xdead_beef_u32.to_ne_bytes());
}

#[test]
fn areas_are_refused_outside_of_one_region_and_off_their_alignment() {
    let guest = Guest::new(&[(0, SIZE), (SIZE, SIZE)]);
    let refused = |at, len, align| guest.table.area(at, len, align).unwrap_err();
    assert!(matches!(
        refused(SIZE - 8, 16, 2),
        MemoryError::NotMapped { .. }
    ));
    assert!(matches!(
        refused(2 * SIZE, 1, 1),
        MemoryError::NotMapped { .. }
    ));
    assert!(matches!(refused(0, 0, 1), MemoryError::NotMapped { .. }));
    assert!(matches!(
        refused(0, usize::MAX, 1),
        MemoryError::NotMapped { .. }
    ));
    assert!(matches!(
        refused(8, 16, 16),
        MemoryError::Misaligned { align: 16, .. }
    ));
    assert!(guest.table.area(SIZE - 16, 16, 16).is_ok());
}

#[test]
fn an_offset_inside_a_page_maps_from_the_page_on() {
    let file = memfd(SIZE);
    (&file).write_all(&[1; 0x1800]).unwrap();
    (&file).write_all(&[2; 0x800]).unwrap();
    let spec = RegionSpec {
        mmap_offset: 0x1800,
        ..spec(0x5_0800, 0x800, &file)
    };
    let table = Arc::new(MemoryTable::new(vec![spec]).unwrap());
    let region = &table.regions()[0];
    assert_eq!((region.page_size(), region.mmap_offset()), (4096, 0x1800));
    let mut bytes = [0_u8; 0x800];
    assert_eq!(region.slice(0, 0x800).unwrap().copy_to(&mut bytes), 0x800);
    assert_eq!(bytes, [2; 0x800]);
    // The page's other bytes are mapped, but not part of the region.
    assert!(region.slice(0, 0x801).is_none());
    assert!(region.slice(u64::MAX, 1).is_none());
    assert!(table.area(0x5_07ff, 1, 1).is_err());
    // Guest 0x5_0801 is host ...801: aligned to neither 2 nor more.
    assert!(matches!(
        table.area(0x5_0801, 2, 2),
        Err(MemoryError::Misaligned { .. })
    ));
}

#[test]
fn hugetlb_is_mapped_in_its_own_pages() {
    const HUGE: u64 = 2 << 20;
    let file = memfd_with(2 * HUGE, libc::MFD_HUGETLB | libc::MFD_HUGE_2MB).unwrap();
    let spec = RegionSpec {
        mmap_offset: HUGE + 0x3000,
        ..spec(0x3000, HUGE - 0x3000, &file)
    };
    let table = MemoryTable::new(vec![spec]).unwrap();
    let region = &table.regions()[0];
    assert_eq!(
        (region.page_size(), region.size()),
        (2 << 20, HUGE - 0x3000)
    );
    // Free pages or not: without any, the first access is a SIGBUS, and contained.
    let slice = region.slice(0x1000, 8).unwrap();
    slice.copy_from(&[7_u8; 8]);
    let mut back = [0_u8; 8];
    assert_eq!(slice.copy_to(&mut back), 8);
    assert_eq!(back, [7; 8]);
    let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    if free.is_ok_and(|free| free.trim() == "0") {
        assert!(region.poisoned());
    }
    assert_eq!(
        mappings_of(inode_of(&file)),
        usize::from(!region.poisoned())
    );
}
