#![expect(unsafe_code, reason = "submission entries point to memory")]
//! A measuring stick: what io_uring gives on the file, with no vring and no second process.

use std::fs::{File, OpenOptions};
use std::hint;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use fastrand::Rng;
use io_uring::{IoUring, opcode, types};
use vm_memory::VolatileMemory as _;
use vm_memory::mmap::MmapRegion;

use super::BenchError;
use super::case::{Case, Operation};
use super::error::host;
use super::latency::{Latency, Stopwatch};
use super::load::Progress;
use crate::driver::DriverError;
use crate::driver::verify::Waiting;

/// Random requests on a file over one io_uring, always as many in flight.
///
/// # Invariants
/// `memory` has a block for each request in flight; dropping waits for all of them.
pub(super) struct Bare {
    ring: IoUring,
    memory: MmapRegion,
    /// Open as long as the ring, which has it registered.
    _file: File,
    case: Case,
    waiting: Waiting,
    blocks: u64,
    rng: Rng,
    in_flight: u32,
    watch: Option<Stopwatch>,
}

impl Bare {
    /// Opens the file and starts the requests, those of all queues on one ring.
    pub(super) fn start(path: &Path, size: u64, case: Case) -> Result<Self, BenchError> {
        let file = OpenOptions::new()
            .read(true)
            .write(case.operation != Operation::Read)
            .custom_flags(libc::O_DIRECT)
            .open(path)
            .map_err(host(format!("open {}", path.display())))?;
        let waiting = case.waiting.waiting();
        let ring = build(waiting).map_err(host("set up io_uring"))?;
        ring.submitter()
            .register_files(&[file.as_raw_fd()])
            .map_err(host("register a file"))?;
        let bytes = case.block as usize * case.in_flight() as usize;
        let memory = MmapRegion::new(bytes).map_err(DriverError::from)?;
        let mut bare = Self {
            ring,
            memory,
            _file: file,
            case,
            waiting,
            blocks: (size / case.block).max(1),
            rng: Rng::with_seed(7),
            in_flight: 0,
            watch: None,
        };
        for slot in 0..case.in_flight() {
            bare.request(slot)?;
        }
        Ok(bare)
    }

    /// Goes on for `time`, and until something came back.
    pub(super) fn run(&mut self, time: Duration) -> Result<Progress, BenchError> {
        let start = Instant::now();
        let mut requests = 0;
        loop {
            self.wait().map_err(host("wait for io_uring"))?;
            let mut now = None;
            while let Some(slot) = self.next()? {
                requests += 1;
                if let Some(watch) = &mut self.watch {
                    watch.lap(slot, *now.get_or_insert_with(Instant::now));
                }
                self.request(slot)?;
            }
            let elapsed = start.elapsed();
            if elapsed >= time && requests > 0 {
                return Ok(Progress { requests, elapsed });
            }
        }
    }

    /// Goes on for `time` with an eye on each request.
    pub(super) fn latency(&mut self, time: Duration) -> Result<Option<Latency>, BenchError> {
        self.watch = Some(Stopwatch::new(self.case.in_flight())?);
        self.run(time)?;
        Ok(self.watch.take().and_then(|watch| watch.latency()))
    }

    /// Hands over what is queued, and waits until something is there.
    fn wait(&mut self) -> io::Result<()> {
        match self.waiting {
            Waiting::Sleeping => loop {
                match self.ring.submit_and_wait(1) {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    other => return other.map(drop),
                }
            },
            Waiting::Polling => {
                self.ring.submit()?;
                while self.ring.completion().is_empty() {
                    hint::spin_loop();
                }
                Ok(())
            }
        }
    }

    fn next(&mut self) -> Result<Option<u32>, BenchError> {
        let Some(entry) = self.ring.completion().next() else {
            return Ok(None);
        };
        self.in_flight -= 1;
        let result = entry.result();
        if u64::try_from(result) != Ok(self.case.block) {
            return Err(BenchError::Request { result });
        }
        Ok(u32::try_from(entry.user_data()).ok())
    }

    fn request(&mut self, slot: u32) -> Result<(), BenchError> {
        let len = self.case.block as usize;
        let memory = self
            .memory
            .get_slice(slot as usize * len, len)
            .map_err(|error| host("find memory")(io::Error::other(error)))?;
        let address = memory.ptr_guard_mut().as_ptr();
        let offset = self.rng.u64(0..self.blocks) * self.case.block;
        let (file, len) = (types::Fixed(0), self.case.block as u32);
        let entry = if self.case.operation.reads(&mut self.rng) {
            opcode::Read::new(file, address, len).offset(offset).build()
        } else {
            opcode::Write::new(file, address, len)
                .offset(offset)
                .build()
        };
        let entry = entry.user_data(slot.into());
        // SAFETY: the address is that of `memory`, which this value unmaps only after its drop
        // waited for every request; nothing else touches it.
        unsafe { self.ring.submission().push(&entry) }
            .map_err(|full| host("queue a request")(io::Error::other(full)))?;
        self.in_flight += 1;
        Ok(())
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        while self.in_flight > 0 {
            if let Err(error) = self.ring.submit_and_wait(1) {
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                // The kernel may still write there.
                let memory = MmapRegion::new(1);
                if let Ok(memory) = memory {
                    std::mem::forget(std::mem::replace(&mut self.memory, memory));
                }
                return;
            }
            while self.ring.completion().next().is_some() {
                self.in_flight -= 1;
            }
        }
    }
}

/// The set-up that suits the way of waiting: a loop that sleeps lets completions run when it
/// enters the kernel anyway; a loop that spins has to be interrupted for them.
fn build(waiting: Waiting) -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    builder.setup_single_issuer();
    match waiting {
        Waiting::Sleeping => builder.setup_defer_taskrun(),
        Waiting::Polling => &mut builder,
    };
    match builder.build(ENTRIES) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => IoUring::new(ENTRIES),
        other => other,
    }
}

/// As many as four queues have in flight.
const ENTRIES: u32 = 256;
