//! Verified random I/O from a guest, over every shape of ring and every engine.

use vublk_tests::guest::{
    Builder, DaemonKind, DaemonSpec, Disk, Engine, Fio, Guest, GuestError, HugePages, Scratch,
    Storage,
};

const MIB: u64 = 1 << 20;
/// What each job of fio covers, in a part of the disk that is its own.
const PART_MIB: u64 = 24;

/// A file of 128 MiB and the daemon for it, with more to be said.
fn file(scratch: &Scratch) -> Result<DaemonSpec, GuestError> {
    Ok(DaemonSpec::file(&scratch.image("disk", 128 * MIB)?))
}

/// Random reads and writes of mixed sizes at depth 16, every block written read back and checked.
fn mixed(jobs: u64, seed: u64) -> Fio {
    Fio::new("/dev/disk0", "randrw")
        .option("bssplit", "512/10:4k/40:12k/10:64k/20:256k/15:1m/5")
        .option("iodepth", 16)
        .option("numjobs", jobs)
        .option("size", format!("{PART_MIB}m"))
        .option("offset_increment", format!("{PART_MIB}m"))
        .option("randseed", seed)
        .verified()
}

/// Runs the mixed load twice, with one job a CPU, and asserts that nothing was lost or wrong. The
/// second run writes other blocks with other contents, so that a lost write leaves a block whose
/// header carries the first run's seed, which fio finds.
fn verify(spec: &DaemonSpec, guest: &Builder, scratch: &Scratch) -> Result<(), GuestError> {
    verify_shaped(spec, guest, |disk| disk, scratch)
}

/// `verify` with a disk that `shape` changes.
fn verify_shaped(
    spec: &DaemonSpec,
    guest: &Builder,
    shape: impl FnOnce(Disk) -> Disk,
    scratch: &Scratch,
) -> Result<(), GuestError> {
    let daemon = spec.start(scratch)?;
    let mut guest = guest.clone().disk(shape(Disk::of(&daemon))).boot(scratch)?;
    let jobs = guest.number("nproc")?;
    for seed in [20_260_917, 3] {
        let report = mixed(jobs, seed).run(&mut guest)?;
        assert_eq!(report.errors, 0, "{report:?}");
        assert_eq!(report.jobs, jobs, "{report:?}");
        // About half of what is covered is written, and that half is read again in the check.
        let covered = jobs * PART_MIB * MIB;
        assert!(report.write.bytes > covered / 4, "{report:?}");
        assert!(report.read.bytes >= report.write.bytes, "{report:?}");
    }
    guest.power_off()?;
    daemon.stop()
}

/// One test for each pair of EVENT_IDX and indirect descriptors.
macro_rules! ring_features {
    ($queues:literal queues:
        $($name:ident(event_idx $event_idx:literal, indirect $indirect:literal);)*
    ) => {
        $(
            #[test]
            fn $name() -> Result<(), GuestError> {
                let scratch = Scratch::new()?;
                let spec = file(&scratch)?.queues($queues);
                let guest = Guest::builder().cpus($queues);
                let shape = |disk: Disk| disk.event_idx($event_idx).indirect($indirect);
                verify_shaped(&spec, &guest, shape, &scratch)
            }
        )*
    };
}

ring_features! { 1 queues:
    fio_verify_1_queue_event_idx_indirect(event_idx true, indirect true);
    fio_verify_1_queue_event_idx_direct(event_idx true, indirect false);
    fio_verify_1_queue_flags_indirect(event_idx false, indirect true);
    fio_verify_1_queue_flags_direct(event_idx false, indirect false);
}

ring_features! { 4 queues:
    fio_verify_4_queues_event_idx_indirect(event_idx true, indirect true);
    fio_verify_4_queues_event_idx_direct(event_idx true, indirect false);
    fio_verify_4_queues_flags_indirect(event_idx false, indirect true);
    fio_verify_4_queues_flags_direct(event_idx false, indirect false);
}

#[test]
fn fio_verify_4_queues_on_2_workers() -> Result<(), GuestError> {
    let scratch = Scratch::new()?;
    let spec = file(&scratch)?.queues(4).workers(2);
    verify(&spec, &Guest::builder().cpus(4), &scratch)
}

#[test]
fn fio_verify_small_vring() -> Result<(), GuestError> {
    let scratch = Scratch::new()?;
    // Smaller than many of the chains, which go through indirect tables.
    let shape = |disk: Disk| disk.queue_size(8);
    verify_shaped(&file(&scratch)?, &Guest::builder(), shape, &scratch)
}

#[test]
fn fio_verify_large_vring() -> Result<(), GuestError> {
    let scratch = Scratch::new()?;
    let shape = |disk: Disk| disk.queue_size(1024);
    verify_shaped(&file(&scratch)?, &Guest::builder(), shape, &scratch)
}

#[test]
fn fio_verify_threads_engine() -> Result<(), GuestError> {
    let scratch = Scratch::new()?;
    let spec = file(&scratch)?.queues(2).engine(Engine::Threads);
    verify(&spec, &Guest::builder(), &scratch)
}

#[test]
fn fio_verify_io_uring_engine_page_cache() -> Result<(), GuestError> {
    let scratch = Scratch::new()?;
    let spec = file(&scratch)?
        .queues(2)
        .engine(Engine::IoUring)
        .direct(false);
    verify(&spec, &Guest::builder(), &scratch)
}

#[test]
fn fio_verify_io_uring_engine_o_direct() -> Result<(), GuestError> {
    let scratch = Scratch::new()?;
    let spec = file(&scratch)?
        .queues(2)
        .engine(Engine::IoUring)
        .direct(true);
    verify(&spec, &Guest::builder(), &scratch)
}

#[test]
fn fio_verify_io_uring_engine_pinned() -> Result<(), GuestError> {
    let scratch = Scratch::new()?;
    let spec = file(&scratch)?.queues(2).kind(DaemonKind::Vublk).pinned();
    verify(&spec, &Guest::builder(), &scratch)
}

#[test]
fn fio_verify_memory_device() -> Result<(), GuestError> {
    let scratch = Scratch::new()?;
    let spec = match DaemonKind::from_env()? {
        DaemonKind::Vublk => DaemonSpec::new(Storage::Memory(128 * MIB)),
        // It stores blocks in files only.
        DaemonKind::QemuStorageDaemon => file(&scratch)?,
    };
    verify(&spec.queues(2), &Guest::builder(), &scratch)
}

#[test]
fn fio_verify_huge_pages() -> Result<(), GuestError> {
    const MEMORY_MIB: u32 = 256;
    let scratch = Scratch::new()?;
    let before = HugePages::free()?;
    let pages = HugePages::reserve(MEMORY_MIB)?;
    let spec = file(&scratch)?.queues(2);
    let daemon = spec.start(&scratch)?;
    let guest = Guest::builder().memory_mib(MEMORY_MIB).huge_pages();
    {
        let mut guest = guest.clone().disk(Disk::of(&daemon)).boot(&scratch)?;
        let taken = HugePages::free()?;
        assert!(
            taken < before + MEMORY_MIB / 2,
            "the guest's memory took no huge page"
        );
        let report = mixed(2, 5).run(&mut guest)?;
        assert_eq!((report.errors, report.jobs), (0, 2), "{report:?}");
        guest.power_off()?;
    }
    daemon.stop()?;
    assert!(
        HugePages::free()? >= before + MEMORY_MIB / 2,
        "the daemon kept huge pages"
    );
    drop(pages);
    Ok(())
}
