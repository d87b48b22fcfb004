//! A guest's memory grows, shrinks and moves under a load that sees every wrong byte.

use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use vublk_tests::guest::{DaemonSpec, Disk, Guest, GuestError, Load, Qmp, Scratch};

const MIB: u64 = 1 << 20;
/// A memory block of Linux: what can be taken online and offline at once.
const DIMM: u64 = 128 * MIB;
const MEMORY_MIB: u32 = 256;
const BLOCKS: &str = "/sys/devices/system/memory";
/// A guard against a balloon that hangs, far above what a loaded machine needs.
const LIMIT: Duration = Duration::from_secs(300);

/// Plugs a dimm in. Linux gives it to what can be moved away again, a process's pages for example.
fn plug(guest: &mut Guest, qmp: &mut Qmp, name: &str) -> Result<(), GuestError> {
    let blocks = memory_blocks(guest)?;
    qmp.execute(
        "object-add",
        json!({
            "qom-type": "memory-backend-memfd", "id": format!("{name}-memory"),
            "size": DIMM, "share": true,
        }),
    )?;
    let dimm = json!({ "driver": "pc-dimm", "id": name, "memdev": format!("{name}-memory") });
    qmp.execute("device_add", dimm)?;
    guest.shell(&format!(
        "cd {BLOCKS}; online=0
        until [ $online = 1 ]; do
            sleep 0.1; online=0
            for block in memory[0-9]*; do
                case ' {blocks} ' in *\" $block \"*) continue ;; esac
                grep -qx online $block/state || {{ online=0; break; }}
                online=1
            done
        done"
    ))?;
    Ok(())
}

/// Takes a dimm out again, after Linux has moved what it held elsewhere: `blocks` were there before
/// it.
fn unplug(guest: &mut Guest, qmp: &mut Qmp, name: &str, blocks: &str) -> Result<(), GuestError> {
    // A request that is under way keeps its pages where they are, and that try fails.
    guest.shell(&format!(
        "cd {BLOCKS}; for block in memory*; do
            case ' {blocks} ' in *\" $block \"*) continue ;; esac
            until echo offline >$block/state 2>/dev/null || grep -q offline $block/state
            do sleep 0.1; done
        done"
    ))?;
    qmp.execute("device_del", json!({ "id": name }))?;
    loop {
        let event = qmp.wait_event("DEVICE_DELETED")?;
        if event.pointer("/data/device").and_then(|id| id.as_str()) == Some(name) {
            break;
        }
    }
    qmp.execute("object-del", json!({ "id": format!("{name}-memory") }))?;
    assert_eq!(memory_blocks(guest)?, blocks);
    Ok(())
}

fn memory_blocks(guest: &mut Guest) -> Result<String, GuestError> {
    guest.shell(&format!("cd {BLOCKS}; echo memory[0-9]*"))
}

/// The pages of plugged memory that are in use.
fn movable_pages(guest: &mut Guest) -> Result<u64, GuestError> {
    guest.number(
        "awk '/zone +Movable/ { here = 1 }
            here && $1 == \"pages\" { free = $3 }
            here && $1 == \"managed\" { print $2 - free; exit }' /proc/zoneinfo",
    )
}

/// Tells the balloon to leave the guest so much memory, in bytes, and waits until it does.
fn balloon(qmp: &mut Qmp, left: u64) -> Result<(), GuestError> {
    qmp.execute("balloon", json!({ "value": left }))?;
    let deadline = Instant::now() + LIMIT;
    loop {
        let info = qmp.execute("query-balloon", json!({}))?;
        if info.get("actual").and_then(serde_json::Value::as_u64) == Some(left) {
            return Ok(());
        }
        assert!(Instant::now() < deadline, "the balloon stays at {info}");
        thread::sleep(Duration::from_millis(100));
    }
}

fn changes(queues: u16) -> Result<(), GuestError> {
    let scratch = Scratch::new()?;
    let load = Load::new(4);
    let image = scratch.image("disk", load.disk_bytes())?;
    load.prepare(&image)?;
    let daemon = DaemonSpec::file(&image)
        .queues(queues)
        .debug_log()
        .start(&scratch)?;
    let mut guest = Guest::builder()
        .cpus(queues.max(2))
        .memory_mib(MEMORY_MIB)
        .memory_slots(4, 1024)
        .disk(Disk::of(&daemon))
        .argument("-device")
        .argument("virtio-balloon-pci,addr=0x1c")
        .boot(&scratch)?;
    let mut qmp = guest.qmp()?;
    guest.shell(&format!("echo online_movable >{BLOCKS}/auto_online_blocks"))?;
    let blocks = memory_blocks(&mut guest)?;
    let messages = |name: &str| daemon.log().lines().filter(|l| l.contains(name)).count();
    let (added, removed) = (messages("ADD_MEM_REG"), messages("REM_MEM_REG"));

    // The pages of the load come to stand in the dimm, and leave it while they are read into.
    plug(&mut guest, &mut qmp, "first")?;
    let load = load.start(&mut guest)?;
    let used = movable_pages(&mut guest)?;
    assert!(used > 2048, "only {used} pages of the dimm are in use");
    unplug(&mut guest, &mut qmp, "first", &blocks)?;
    load.work_on(&mut guest, 1)?;

    let all = u64::from(MEMORY_MIB) * MIB;
    for name in ["second", "third"] {
        plug(&mut guest, &mut qmp, name)?;
        balloon(&mut qmp, all + DIMM - 96 * MIB)?;
        load.work_on(&mut guest, 1)?;
        balloon(&mut qmp, all + DIMM)?;
        unplug(&mut guest, &mut qmp, name, &blocks)?;
        load.work_on(&mut guest, 1)?;
    }
    let (added, removed) = (
        messages("ADD_MEM_REG") - added,
        messages("REM_MEM_REG") - removed,
    );
    assert!(
        added >= 3 && removed >= 3,
        "{added} added, {removed} removed"
    );
    let counts = load.stop(&mut guest)?;
    assert!(counts.reads > 0 && counts.read_backs > 0, "{counts:?}");
    guest.power_off()?;
    daemon.stop()
}

#[test]
fn memory_is_plugged_and_unplugged_under_load() -> Result<(), GuestError> {
    changes(1)
}

#[test]
fn memory_is_plugged_and_unplugged_under_load_with_4_queues() -> Result<(), GuestError> {
    changes(4)
}
