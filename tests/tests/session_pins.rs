//! Guest memory that is registered with the kernel: what it is used for, when it is given back, and
//! what happens where it cannot be.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use blockdev::{Access, BlockDevice, Direct, FileOptions, SLOT_SHIFT, open};
use rustix::fs::{FallocateFlags, fallocate, fstat};
use rustix::process::Signal;
use vublk::blk::Pin;
use vublk_tests::frontend::{
    Descriptor, FrontEnd, GuestRam, Kind, Layout, Options, Outcome, Program, ServeOptions, Served,
    code, region_payload, words,
};
use vublk_tests::guest::{Scratch, vublk_path};
use vublk_tests::pins::{
    machine_pins, pinned_pages, settled_machine_pins, wait_machine_pins, wait_pinned,
};
use vublk_tests::stall::{Image, Stall};

/// Where regions that are added lie.
const HIGH: u64 = 1 << 40;
/// Bytes of the device.
const DEVICE: u64 = 8 << 20;
const PAGE: u64 = 4096;
/// What others on the machine may have pinned for a transfer, in pages.
const SLACK: i64 = 2048;

/// One test at a time: they count the pages that this process has pinned.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn me() -> u32 {
    std::process::id()
}

fn storage(image: &Path) -> Outcome<Arc<dyn BlockDevice>> {
    let options = FileOptions {
        access: Access::ReadWrite,
        direct: Direct::On,
        block_size: None,
    };
    Ok(open::file(image, options)?)
}

/// A daemon over a file that pins guest memory in slots of this size.
fn served(scratch: &Scratch, pin: Pin) -> Outcome<Served> {
    serve(storage(&scratch.image("disk", DEVICE)?)?, pin)
}

fn serve(storage: Arc<dyn BlockDevice>, pin: Pin) -> Outcome<Served> {
    Served::start_with(&ServeOptions {
        storage: Some(storage),
        pin,
        ..ServeOptions::default()
    })
}

/// Slots as in production.
const REGISTERED: Pin = Pin::Registered {
    slot_shift: SLOT_SHIFT,
};
/// Slots that requests cross often.
const SMALL_SLOTS: Pin = Pin::Registered { slot_shift: 14 };

fn pages(ram: &GuestRam) -> u64 {
    ram.layout().size.div_ceil(PAGE)
}

/// How often this process has memory of that file mapped: the front end once, and the daemon.
fn mappings(ram: &GuestRam) -> Outcome<usize> {
    let inode = fstat(ram.fd())?.st_ino.to_string();
    let maps = fs::read_to_string("/proc/self/maps")?;
    let inodes = maps
        .lines()
        .filter_map(|line| line.split_whitespace().nth(4));
    Ok(inodes.filter(|other| *other == inode).count())
}

/// A count of the device's line.
fn count(served: &Served, name: &str) -> Outcome<String> {
    let line = served.device().counters_line();
    let mut words = line.split_whitespace();
    let value = words.find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    Ok(value.ok_or(format!("no {name} in {line}"))?.to_owned())
}

fn number(served: &Served, name: &str) -> Outcome<u64> {
    Ok(count(served, name)?.parse()?)
}

/// The payload of ADD_MEM_REG and REM_MEM_REG.
fn single(ram: &GuestRam) -> Vec<u8> {
    [vec![0; 8], region_payload(ram.numbers())].concat()
}

fn add(front_end: &FrontEnd, ram: &GuestRam) -> Outcome {
    let region = single(ram);
    Ok(front_end
        .peer
        .confirm(code::ADD_MEM_REG, &region, &[ram.fd()])?)
}

fn remove(front_end: &FrontEnd, ram: &GuestRam) -> Outcome {
    Ok(front_end
        .peer
        .confirm(code::REM_MEM_REG, &single(ram), &[])?)
}

fn high(size: u64) -> Outcome<GuestRam> {
    GuestRam::at(Layout {
        guest: HIGH,
        size,
        offset: 0,
    })
}

/// One request whose data is at `data`; its status.
fn request_at(
    front_end: &mut FrontEnd,
    (kind, sector): (Kind, u64),
    data: u64,
    len: u32,
) -> Outcome<u8> {
    submit_at(front_end, (kind, sector), data, len)?;
    front_end.wait(0, 0)
}

fn submit_at(
    front_end: &mut FrontEnd,
    (kind, sector): (Kind, u64),
    data: u64,
    len: u32,
) -> Outcome {
    let ram = front_end.ram.clone();
    let vring = front_end.vring(0)?;
    let [header, status, _] = vring.places(0);
    ram.write(header, &kind.header(sector))?;
    ram.write(status, &[0xff])?;
    let payload = match kind {
        Kind::Out => Descriptor::source(data, len),
        Kind::In | Kind::Flush | Kind::GetId => Descriptor::dest(data, len),
    };
    let chain = [
        Descriptor::source(header, 16),
        payload,
        Descriptor::dest(status, 1),
    ];
    vring.ring.offer_chain(0, &chain)?;
    Ok(vring.kick.write(1)?)
}

/// Reads to a place in guest memory until a worker does that with its slot.
fn until_pinned(served: &Served, front_end: &mut FrontEnd, place: u64) -> Outcome {
    let begun = Instant::now();
    loop {
        let before = number(served, "pinned")?;
        assert_eq!(request_at(front_end, (Kind::In, 0), place, 4096)?, 0);
        if number(served, "pinned")? == before + 1 {
            return Ok(());
        }
        if begun.elapsed() > Duration::from_secs(60) {
            return Err(format!("no worker uses a slot at {place:#x}").into());
        }
    }
}

/// Writes from guest memory and reads back to elsewhere in it; the bytes have to come through.
fn there_and_back(
    front_end: &mut FrontEnd,
    more: &GuestRam,
    places: [u64; 2],
    len: u32,
) -> Outcome {
    let bytes: Vec<u8> = (0..len)
        .map(|at| (at % 251) as u8 ^ places[0] as u8)
        .collect();
    more.write(places[0], &bytes)?;
    more.write(places[1], &vec![0; bytes.len()])?;
    assert_eq!(request_at(front_end, (Kind::Out, 64), places[0], len)?, 0);
    assert_eq!(request_at(front_end, (Kind::In, 64), places[1], len)?, 0);
    assert!(
        more.read(places[1], bytes.len())? == bytes,
        "at {places:x?}"
    );
    Ok(())
}

#[test]
fn memory_is_pinned_after_it_came_and_given_back_before_it_goes() -> Outcome {
    let _alone = alone();
    let scratch = Scratch::new()?;
    let machine = settled_machine_pins()?;
    let served = served(&scratch, REGISTERED)?;
    assert_eq!(pinned_pages(me())?, 0);
    let mut front_end = FrontEnd::start(served.connect()?, Options::default())?;
    let ram = pages(&front_end.ram);
    wait_pinned(me(), ram)?;
    let own = front_end.vring(0)?.places(3)[2];
    until_pinned(&served, &mut front_end, own)?;
    let before = number(&served, "pinned")?;
    front_end.verify(2)?;
    assert!(number(&served, "pinned")? > before, "requests use it");
    let more = high(64 << 20)?;
    let mut most = 0;
    for round in 0..3 {
        let before = machine_pins()?.min(machine);
        add(&front_end, &more)?;
        wait_pinned(me(), ram + pages(&more))?;
        most = most.max(machine_pins()? - before);
        until_pinned(&served, &mut front_end, HIGH)?;
        there_and_back(&mut front_end, &more, [HIGH, HIGH + (8 << 20)], 4096)?;
        assert_eq!(count(&served, "pinned_regions")?, "2/2");
        assert_eq!(mappings(&more)?, 2);
        remove(&front_end, &more)?;
        assert_eq!(mappings(&more)?, 1, "it is answered, and still mapped");
        assert_eq!(pinned_pages(me())?, ram, "round {round}: it is answered");
        assert_eq!(count(&served, "pinned_regions")?, "1/1");
        front_end.verify(round)?;
    }
    // Others may give theirs back while ours are counted, but not every time.
    assert!(most >= pages(&more) as i64 - SLACK, "{most} pins");
    wait_machine_pins(machine, SLACK + ram as i64)?;
    // A whole new table, as front ends send that have no messages for single regions.
    for _ in 0..3 {
        front_end.share_memory()?;
        wait_pinned(me(), ram)?;
        front_end.verify(3)?;
    }
    front_end
        .peer
        .confirm(code::SET_MEM_TABLE, &words(&[0, 0]), &[])?;
    assert_eq!(pinned_pages(me())?, 0);
    drop(front_end);
    served.stop()?;
    wait_machine_pins(machine, SLACK)
}

#[test]
fn nothing_is_pinned_for_a_front_end_that_left_nor_after_the_end() -> Outcome {
    let _alone = alone();
    let scratch = Scratch::new()?;
    let machine = settled_machine_pins()?;
    let served = served(&scratch, REGISTERED)?;
    for _ in 0..3 {
        let front_end = FrontEnd::start(served.connect()?, Options::default())?;
        let more = high(32 << 20)?;
        add(&front_end, &more)?;
        wait_pinned(me(), pages(&front_end.ram) + pages(&more))?;
        drop(front_end);
        // The next one is not served before.
        served.connect()?.ask_number(code::GET_FEATURES)?;
        assert_eq!(pinned_pages(me())?, 0);
    }
    wait_machine_pins(machine, SLACK)?;
    let mut front_end = FrontEnd::start(served.connect()?, Options::default())?;
    wait_pinned(me(), pages(&front_end.ram))?;
    front_end.verify(4)?;
    served.stop()?;
    assert_eq!(pinned_pages(me())?, 0, "it left its front end behind");
    wait_machine_pins(machine, SLACK)
}

#[test]
fn requests_over_a_slots_edge_move_the_right_bytes() -> Outcome {
    let _alone = alone();
    let scratch = Scratch::new()?;
    let served = served(&scratch, SMALL_SLOTS)?;
    let mut front_end = FrontEnd::start(served.connect()?, Options::default())?;
    let more = high((1 << 20) + 3 * PAGE)?;
    add(&front_end, &more)?;
    wait_pinned(me(), pages(&front_end.ram) + pages(&more))?;
    until_pinned(&served, &mut front_end, HIGH)?;
    let pinned = number(&served, "pinned")?;
    let fallbacks = number(&served, "pin_fallbacks")?;
    let slot = 1 << 14;
    let end = HIGH + more.layout().size;
    for (from, len) in [
        (HIGH, 4096),
        (HIGH + slot - 4096, 4096),
        (HIGH + slot - 4096, 8192),
        (HIGH + slot - 512, 1024),
        (HIGH + 5 * slot, 16384),
        (HIGH + 5 * slot + 512, 16384),
        (HIGH + 3 * slot, 65536),
        (end - 3 * PAGE, 3 * 4096),
    ] {
        let to = HIGH + 40 * slot;
        there_and_back(&mut front_end, &more, [from, to + from % slot], len)?;
    }
    front_end.verify(5)?;
    assert!(number(&served, "pinned")? >= pinned + 8);
    assert!(
        number(&served, "pin_fallbacks")? >= fallbacks + 6,
        "those over an edge"
    );
    drop(front_end);
    served.stop()
}

#[test]
fn a_region_longer_than_a_slot_is_pinned_in_several() -> Outcome {
    let _alone = alone();
    let scratch = Scratch::new()?;
    let served = served(&scratch, REGISTERED)?;
    let mut front_end = FrontEnd::start(served.connect()?, Options::default())?;
    let ram = pages(&front_end.ram);
    wait_pinned(me(), ram)?;
    let more = high(2 << 30)?;
    add(&front_end, &more)?;
    // While it is registered nobody waits for that: neither requests nor messages.
    front_end.verify(6)?;
    front_end.peer.ask_number(code::GET_FEATURES)?;
    wait_pinned(me(), ram + pages(&more))?;
    until_pinned(&served, &mut front_end, HIGH)?;
    front_end.verify(7)?;
    let edge = HIGH + (1 << 30);
    let before = number(&served, "pinned")?;
    there_and_back(&mut front_end, &more, [edge - 4096, edge], 4096)?;
    assert_eq!(number(&served, "pinned")?, before + 2);
    let before = number(&served, "pin_fallbacks")?;
    there_and_back(&mut front_end, &more, [edge - 4096, HIGH], 8192)?;
    assert_eq!(number(&served, "pin_fallbacks")?, before + 1);
    remove(&front_end, &more)?;
    assert_eq!(pinned_pages(me())?, ram);
    // Taken away in the middle of being registered: no slot stays behind.
    add(&front_end, &more)?;
    remove(&front_end, &more)?;
    assert_eq!(pinned_pages(me())?, ram);
    front_end.verify(8)?;
    drop(front_end);
    served.stop()
}

/// Regions come and go, front ends too, with requests in flight on all of them.
#[test]
fn memory_comes_and_goes_under_pinned_requests() -> Outcome {
    let _alone = alone();
    let scratch = Scratch::new()?;
    let served = served(&scratch, SMALL_SLOTS)?;
    let mut dice = fastrand::Rng::with_seed(16);
    for _ in 0..4 {
        let mut front_end = FrontEnd::start(served.connect()?, Options::default())?;
        let own = pages(&front_end.ram);
        let mut there: Vec<GuestRam> = Vec::new();
        let mut rounds = 0;
        for turn in 0..60 {
            match dice.u8(..10) {
                0..4 if there.len() < 5 => {
                    let layout = Layout {
                        guest: HIGH * (turn + 1),
                        size: PAGE * dice.u64(8..200),
                        offset: PAGE * dice.u64(..3),
                    };
                    let more = GuestRam::at(layout)?;
                    add(&front_end, &more)?;
                    there.push(more);
                }
                4..7 if !there.is_empty() => {
                    let gone = there.swap_remove(dice.usize(..there.len()));
                    let at = gone.layout().guest + 512 * dice.u64(..8);
                    submit_at(&mut front_end, (Kind::In, 0), at, 4096)?;
                    remove(&front_end, &gone)?;
                    let most = own + there.iter().map(pages).sum::<u64>();
                    let now = pinned_pages(me())?;
                    assert!(now <= most, "{now} pages, and there are {most}");
                    front_end.wait(0, 0)?;
                }
                _ => {}
            }
            if dice.bool() {
                let all = own + there.iter().map(pages).sum::<u64>();
                wait_pinned(me(), all)?;
            }
            if let Some(more) = there.get(dice.usize(..5)) {
                let layout = more.layout();
                let half = (layout.size / 2) & !511;
                let len = 512 * dice.u32(1..=u32::try_from(half / 512)?.min(64));
                let at = layout.guest + 512 * dice.u64(..=(half - u64::from(len)) / 512);
                there_and_back(&mut front_end, more, [at, at + half], len)?;
                rounds += 1;
            }
        }
        front_end.verify(17)?;
        assert!(rounds > 5, "only {rounds} rounds had memory to use");
    }
    assert!(number(&served, "pinned")? > 50);
    served.connect()?.ask_number(code::GET_FEATURES)?;
    assert_eq!(pinned_pages(me())?, 0);
    served.stop()
}

/// Takes a page from the guest as a balloon does, and reads a sector into where it was; whether the
/// guest sees what was read.
fn sees_what_is_read_after_a_balloon(pin: Pin) -> Outcome<bool> {
    let scratch = Scratch::new()?;
    let served = served(&scratch, pin)?;
    let mut front_end = FrontEnd::start(served.connect()?, Options::default())?;
    front_end.write(0, 8, &[0x5a; 4096])?;
    let more = high(1 << 20)?;
    more.write(HIGH, &[1; 8192])?;
    add(&front_end, &more)?;
    if pin != Pin::Off {
        wait_pinned(me(), pages(&front_end.ram) + pages(&more))?;
        until_pinned(&served, &mut front_end, HIGH + 4096)?;
    }
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(more.fd(), hole, 0, PAGE)?;
    assert_eq!(more.read(HIGH, 1)?, [0]);
    assert_eq!(request_at(&mut front_end, (Kind::In, 8), HIGH, 4096)?, 0);
    let seen = more.read(HIGH, 4096)?;
    drop(front_end);
    served.stop()?;
    Ok(seen == [0x5a; 4096])
}

#[test]
fn memory_that_a_balloon_took_is_the_guests_again_by_default() -> Outcome {
    let _alone = alone();
    assert!(sees_what_is_read_after_a_balloon(Pin::Off)?);
    assert_eq!(Pin::default(), Pin::Off);
    Ok(())
}

/// The price that `--pin=registered` names. Where this fails, the kernel has learned something, and
/// the warnings can go.
#[test]
fn memory_that_a_balloon_took_is_lost_when_it_is_pinned() -> Outcome {
    let _alone = alone();
    assert!(!sees_what_is_read_after_a_balloon(REGISTERED)?);
    Ok(())
}

#[test]
fn memory_in_a_file_on_a_disk_goes_without() -> Outcome {
    let _alone = alone();
    let scratch = Scratch::new()?;
    let served = served(&scratch, REGISTERED)?;
    let mut front_end = FrontEnd::start(served.connect()?, Options::default())?;
    let size = 4 << 20;
    let path = scratch.image("ram", size)?;
    let file = File::options().read(true).write(true).open(&path)?;
    let front = front_end.ram.front_end(HIGH);
    let region = [vec![0; 8], region_payload([HIGH, size, front, 0])].concat();
    front_end
        .peer
        .confirm(code::ADD_MEM_REG, &region, &[file.as_fd()])?;
    while count(&served, "pinned_regions")? != "1/2" {
        std::thread::yield_now();
    }
    fs::write(&path, vec![0x33; 8192])?;
    file.set_len(size)?;
    assert_eq!(request_at(&mut front_end, (Kind::Out, 16), HIGH, 8192)?, 0);
    assert_eq!(front_end.read(0, 16, 8192)?, [0x33; 8192]);
    assert!(number(&served, "pin_fallbacks")? > 0);
    front_end.verify(10)?;
    // What comes later is pinned all the same.
    let other = GuestRam::at(Layout {
        guest: HIGH * 2,
        size: 8 << 20,
        offset: PAGE,
    })?;
    add(&front_end, &other)?;
    wait_pinned(me(), pages(&front_end.ram) + pages(&other))?;
    front_end.peer.confirm(code::REM_MEM_REG, &region, &[])?;
    drop(front_end);
    served.stop()?;
    assert_eq!(pinned_pages(me())?, 0);
    Ok(())
}

#[test]
fn a_removal_waits_for_the_pinned_request_that_hangs() -> Outcome {
    let _alone = alone();
    let scratch = Scratch::new()?;
    let mut stall = Stall::new(&scratch, Image::File, DEVICE)?;
    let machine = settled_machine_pins()?;
    let served = serve(storage(stall.image())?, REGISTERED)?;
    let mut front_end = FrontEnd::start(served.connect()?, Options::default())?;
    let ram = pages(&front_end.ram);
    let more = high(16 << 20)?;
    more.write(HIGH, &[0x77; 4096])?;
    add(&front_end, &more)?;
    wait_pinned(me(), ram + pages(&more))?;
    until_pinned(&served, &mut front_end, HIGH + 4096)?;
    front_end.verify(11)?;
    let before = number(&served, "pinned")?;
    stall.freeze()?;
    submit_at(&mut front_end, (Kind::Out, 0), HIGH, 4096)?;
    while number(&served, "pinned")? == before {
        std::thread::yield_now();
    }
    front_end
        .peer
        .send(code::REM_MEM_REG, 0x9, &single(&more), &[])?;
    std::thread::sleep(Duration::from_millis(200));
    assert!(front_end.peer.is_quiet()?, "it is answered too early");
    assert_eq!(pinned_pages(me())?, ram + pages(&more));
    stall.thaw()?;
    assert_eq!(front_end.peer.reply_to(code::REM_MEM_REG)?.payload, [0; 8]);
    assert_eq!(front_end.wait(0, 0)?, 0);
    wait_pinned(me(), ram)?;
    assert_eq!(front_end.read(0, 0, 4096)?, [0x77; 4096]);
    // The same with the front end gone: the next one waits.
    stall.freeze()?;
    let frozen = front_end.submit(0, 1, (Kind::Out, 0), &[1; 4096])?;
    assert_eq!(frozen, 3);
    while served.device().in_flight() == 0 {
        std::thread::yield_now();
    }
    drop(front_end);
    let next = served.connect()?;
    next.tell(code::GET_FEATURES, &[], &[])?;
    std::thread::sleep(Duration::from_millis(200));
    assert!(next.is_quiet()?, "it is served too early");
    assert_eq!(pinned_pages(me())?, ram);
    stall.thaw()?;
    next.reply_to(code::GET_FEATURES)?;
    wait_pinned(me(), 0)?;
    drop(next);
    served.stop()?;
    wait_machine_pins(machine, SLACK)
}

/// A daemon that may lock so many bytes: a root without its capability is held to the limit like
/// everybody else.
fn limited(scratch: &Scratch, bytes: u64) -> Outcome<Program> {
    let name = format!("limited-{bytes}");
    let image = scratch.image(&name, DEVICE)?;
    let wrapper = scratch.file(&format!("{name}.sh"));
    let script = format!(
        "#!/bin/sh\nexec setpriv --bounding-set -ipc_lock --inh-caps -ipc_lock -- \
         prlimit --memlock={bytes}:{bytes} {} \"$@\"\n",
        vublk_path()?.display()
    );
    fs::write(&wrapper, script)?;
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755))?;
    let file = format!("--blk-file={}", image.display());
    let args = [
        file.as_str(),
        "--pin=registered",
        "--num-queues=2",
        "--workers=2",
    ];
    let log = scratch.file(&format!("{name}.log"));
    Program::start(&wrapper, &scratch.socket(&name), &args, &[], &log)
}

#[test]
fn a_front_end_whose_memory_may_not_be_locked_is_served() -> Outcome {
    let _alone = alone();
    let scratch = Scratch::new()?;
    let begun = Instant::now();
    // Enough for the rings, which are charged too since Linux 6.14, and not for the guest.
    let mut daemon = limited(&scratch, 512 << 10)?;
    let mut front_end = FrontEnd::start(daemon.connect()?, Options::default())?;
    let said = daemon.says("is not pinned", "")?;
    assert!(
        said.contains("Cannot allocate memory") && said.contains("LimitMEMLOCK"),
        "{said}"
    );
    front_end.verify(12)?;
    assert_eq!(pinned_pages(daemon.id())?, 0);
    for _ in 0..3 {
        front_end.share_memory()?;
        front_end.verify(13)?;
    }
    daemon.signal(Signal::USR1)?;
    let line = daemon.says("reads=", "pinned_regions=0/1")?;
    assert!(line.contains(" pinned=0 "), "{line}");
    // Four tables were refused: one line, and another every ten seconds at the most.
    let warnings = daemon.logged()?.matches("is not pinned").count() as u64;
    let most = 1 + begun.elapsed().as_secs() / 10;
    assert!((1..=most).contains(&warnings), "{}", daemon.logged()?);
    daemon.signal(Signal::TERM)?;
    assert!(daemon.leaves()?.success());
    Ok(())
}

#[test]
fn a_daemon_that_may_lock_next_to_nothing_serves() -> Outcome {
    let _alone = alone();
    let scratch = Scratch::new()?;
    let mut daemon = limited(&scratch, 64 << 10)?;
    let mut front_end = FrontEnd::start(daemon.connect()?, Options::default())?;
    front_end.verify(15)?;
    daemon.says("is not pinned", "")?;
    front_end.verify(16)?;
    assert_eq!(pinned_pages(daemon.id())?, 0);
    daemon.signal(Signal::TERM)?;
    assert!(daemon.leaves()?.success());
    Ok(())
}

#[test]
fn a_device_that_has_no_use_for_pins_says_so_and_pins_nothing() -> Outcome {
    let _alone = alone();
    for storage in [open::memory(DEVICE, 512)?, open::null(DEVICE, 512)?] {
        let is_memory = storage.name() == "memory";
        let served = serve(storage, REGISTERED)?;
        let mut front_end = FrontEnd::start(served.connect()?, Options::default())?;
        if is_memory {
            front_end.verify(14)?;
        }
        assert!(!served.device().pins().is_live());
        assert_eq!(number(&served, "pin_fallbacks")?, 0);
        assert_eq!(pinned_pages(me())?, 0);
        drop(front_end);
        served.stop()?;
    }
    Ok(())
}
