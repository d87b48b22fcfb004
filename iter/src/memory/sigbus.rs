//! SIGBUS contained: a peer that takes its memory away loses its session, nobody else's.
//!
//! A file truncated under a mapping, or hugetlb without free pages, raises SIGBUS at the next
//! access. The one handler here looks the address up in a fixed table of guarded mappings, maps
//! an anonymous page of the mapping's page size over the fault, flags the mapping as poisoned and
//! wakes whoever asked; the access is then repeated and succeeds. Any other address gets the
//! previous disposition back and faults again.
#![expect(
    unsafe_code,
    reason = "installs a signal handler that maps pages over lost ones"
)]

use std::ffi::{c_int, c_void};
use std::fmt;
use std::io;
use std::mem::zeroed;
use std::os::fd::{AsRawFd, BorrowedFd, IntoRawFd};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering, fence};
use std::sync::{Mutex, OnceLock, PoisonError};

use vm_memory::{MmapRegion, VolatileMemory, VolatileSlice};

/// How many mappings can be guarded at a time: several full memory tables, with their logs and
/// in-flight regions.
pub const MAX_GUARDED: usize = 4096;

/// Installs the handler, once per process, and sets what it wakes.
///
/// `on_fault` is an eventfd (duplicated here) that is written at every hit; `None` leaves an
/// earlier one in place. Guarding a mapping installs the handler too.
///
/// # Errors
/// The kernel's, from `sigaction` or `dup`.
pub fn install(on_fault: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let mut writer = lock_writer();
    if !writer.installed {
        install_handler()?;
        writer.installed = true;
    }
    if let Some(fd) = on_fault {
        set_event(fd)?;
    }
    Ok(())
}

/// A mapping that the SIGBUS handler knows. Unmapped, if it owns its pages, when dropped.
pub struct Guarded {
    slot: usize,
    // After `drop` took it out of the table, dropping this field unmaps it.
    mapping: MmapRegion<()>,
}

impl Guarded {
    /// Takes `mapping`, made of pages of `page_size` bytes, under guard.
    ///
    /// # Errors
    /// `OutOfMemory` when [`MAX_GUARDED`] mappings are guarded already, else the kernel's refusal
    /// to install the handler.
    pub fn new(mapping: MmapRegion<()>, page_size: usize) -> io::Result<Self> {
        install(None)?;
        let mut writer = lock_writer();
        let slot = match writer.vacant.pop() {
            Some(slot) => slot,
            None if writer.used < MAX_GUARDED => {
                writer.used += 1;
                writer.used - 1
            }
            None => {
                let full = "the table of guarded mappings is full";
                return Err(io::Error::new(io::ErrorKind::OutOfMemory, full));
            }
        };
        if let Some(entry) = TABLE.get(slot) {
            entry.publish(mapping.as_ptr().addr(), mapping.size(), page_size);
        }
        // The handler looks no further than this; it never shrinks.
        USED.store(writer.used, Ordering::Release);
        Ok(Self { slot, mapping })
    }

    /// Whether a SIGBUS hit the mapping: what it held there is gone, and reads zeroes since.
    #[inline]
    pub fn poisoned(&self) -> bool {
        TABLE
            .get(self.slot)
            .is_some_and(|entry| entry.hit.load(Ordering::Relaxed))
    }

    /// The `len` bytes from `offset` on.
    ///
    /// # Errors
    /// If they do not lie inside the mapping.
    #[inline]
    pub fn get_slice(
        &self,
        offset: usize,
        len: usize,
    ) -> Result<VolatileSlice<'_>, vm_memory::VolatileMemoryError> {
        self.mapping.get_slice(offset, len)
    }

    /// Size of the mapping in bytes.
    pub fn size(&self) -> usize {
        self.mapping.size()
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        let mut writer = lock_writer();
        if let Some(entry) = TABLE.get(self.slot) {
            entry.publish(0, 0, 1);
        }
        writer.vacant.push(self.slot);
    }
}

impl fmt::Debug for Guarded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guarded")
            .field("size", &self.mapping.size())
            .field("poisoned", &self.poisoned())
            .finish()
    }
}

/// One guarded range. Written under the writer's lock only, read by the handler in any thread.
///
/// A sequence count makes the fields change as one for the handler: odd while they are written.
/// An entry that changes while the handler reads it cannot be the one it looks for, because the
/// faulting thread got its pointer after that one was published and before it is withdrawn.
struct Entry {
    sequence: AtomicUsize,
    start: AtomicUsize,
    len: AtomicUsize,
    page_size: AtomicUsize,
    hit: AtomicBool,
}

impl Entry {
    const fn vacant() -> Self {
        Self {
            sequence: AtomicUsize::new(0),
            start: AtomicUsize::new(0),
            len: AtomicUsize::new(0),
            page_size: AtomicUsize::new(1),
            hit: AtomicBool::new(false),
        }
    }

    fn publish(&self, start: usize, len: usize, page_size: usize) {
        let sequence = self.sequence.load(Ordering::Relaxed);
        self.sequence
            .store(sequence.wrapping_add(1), Ordering::Relaxed);
        // Orders the odd count before the fields for whoever sees one of the new fields.
        fence(Ordering::Release);
        self.start.store(start, Ordering::Relaxed);
        self.len.store(len, Ordering::Relaxed);
        self.page_size.store(page_size, Ordering::Relaxed);
        self.hit.store(false, Ordering::Relaxed);
        self.sequence
            .store(sequence.wrapping_add(2), Ordering::Release);
    }

    /// The page of this range that `addr` lies in: its start and size.
    fn page_of(&self, addr: usize) -> Option<(usize, usize)> {
        let sequence = self.sequence.load(Ordering::Acquire);
        let start = self.start.load(Ordering::Relaxed);
        let len = self.len.load(Ordering::Relaxed);
        let page_size = self.page_size.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        let stable =
            sequence.is_multiple_of(2) && self.sequence.load(Ordering::Relaxed) == sequence;
        let offset = addr.wrapping_sub(start);
        if !stable || offset >= len {
            return None;
        }
        Some((start + offset - offset % page_size, page_size))
    }
}

/// What only registering and installing threads touch.
struct Writer {
    installed: bool,
    /// Entries ever used; those below and not in `vacant` are in use.
    used: usize,
    vacant: Vec<usize>,
}

/// Faults contained so far.
static FAULTS: AtomicUsize = AtomicUsize::new(0);

static TABLE: [Entry; MAX_GUARDED] = [const { Entry::vacant() }; MAX_GUARDED];
static USED: AtomicUsize = AtomicUsize::new(0);
static WRITER: Mutex<Writer> = Mutex::new(Writer {
    installed: false,
    used: 0,
    vacant: Vec::new(),
});

/// The eventfd to write at a hit, or -1.
static EVENT: AtomicI32 = AtomicI32::new(-1);
static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();

fn lock_writer() -> std::sync::MutexGuard<'static, Writer> {
    // Every change under the lock is complete before the next call that could panic.
    WRITER.lock().unwrap_or_else(PoisonError::into_inner)
}

fn install_handler() -> io::Result<()> {
    // SAFETY: an all-zero sigaction is a valid one: no handler, no flags, an empty mask.
    let (mut action, mut previous): (libc::sigaction, libc::sigaction) = unsafe { zeroed() };
    let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = on_sigbus;
    action.sa_sigaction = handler as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
    // The previous disposition is read first: the handler may run as soon as it is installed.
    // SAFETY: a null action only reads; `previous` is a place for one sigaction.
    if unsafe { libc::sigaction(libc::SIGBUS, ptr::null(), &mut previous) } != 0 {
        return Err(io::Error::last_os_error());
    }
    PREVIOUS.get_or_init(|| previous);
    // SAFETY: `action` is a complete sigaction, and `on_sigbus` does only what a signal handler
    // may: atomic loads and stores, mmap, write, sigaction, and no locks.
    if unsafe { libc::sigaction(libc::SIGBUS, &action, ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Makes a duplicate of `fd` what the handler writes to.
fn set_event(fd: BorrowedFd<'_>) -> io::Result<()> {
    let current = EVENT.load(Ordering::Acquire);
    if current < 0 {
        let duplicate = fd.try_clone_to_owned()?;
        // Never closed: the handler may be about to write to it.
        EVENT.store(duplicate.into_raw_fd(), Ordering::Release);
        return Ok(());
    }
    // SAFETY: both are open; `current` is ours alone and is replaced in one step.
    if unsafe { libc::dup3(fd.as_raw_fd(), current, libc::O_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The handler. May run in any thread at any instruction, so: no locks, no allocation.
extern "C" fn on_sigbus(_signal: c_int, info: *mut libc::siginfo_t, _context: *mut c_void) {
    // SAFETY: the C library gives the calling thread its own errno, always valid.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above; saved because the interrupted code may be about to read it.
    let saved = unsafe { *errno };
    // SAFETY: with SA_SIGINFO the kernel passes a valid siginfo.
    let code = unsafe { (*info).si_code };
    // SAFETY: as above, and every SIGBUS of the kernel's own carries the address.
    let addr = unsafe { (*info).si_addr() }.addr();
    // Zero and below: sent by a process, which means no address.
    if code <= 0 || !contain(addr) {
        pass_on(code);
    }
    // SAFETY: as above.
    unsafe { *errno = saved };
}

/// How many faults were contained so far, in the whole process. A cheap way to learn that some
/// table may be poisoned: as long as the number stays, none has become so.
#[inline]
#[must_use]
pub fn faults() -> usize {
    FAULTS.load(Ordering::Acquire)
}

/// Maps a page over the fault, if it lies in a guarded range.
fn contain(addr: usize) -> bool {
    let used = USED.load(Ordering::Acquire);
    for entry in TABLE.iter().take(used) {
        let Some((page, page_size)) = entry.page_of(addr) else {
            continue;
        };
        // First: whoever reads the new page's zeroes must be able to know what they are.
        entry.hit.store(true, Ordering::SeqCst);
        FAULTS.fetch_add(1, Ordering::SeqCst);
        // SAFETY: the page belongs to a guarded mapping, which the faulting access itself keeps
        // in use, and what was behind it is gone: nothing that could be read is replaced.
        let mapped = unsafe {
            libc::mmap(
                ptr::without_provenance_mut(page),
                page_size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if mapped == libc::MAP_FAILED {
            return false;
        }
        wake();
        return true;
    }
    false
}

fn wake() {
    let fd = EVENT.load(Ordering::Acquire);
    if fd >= 0 {
        let one = 1_u64.to_ne_bytes();
        // A full counter has woken its reader already, so the outcome does not matter.
        // SAFETY: `one` is eight readable bytes; the descriptor is never closed.
        let _ = unsafe { libc::write(fd, one.as_ptr().cast(), one.len()) };
    }
}

/// Gives SIGBUS back to whom it belonged; the repeated access, or the signal sent again, then
/// ends as it would have without this handler.
fn pass_on(code: c_int) {
    match PREVIOUS.get() {
        // SAFETY: `previous` is a complete sigaction, and never written again.
        Some(previous) => unsafe {
            libc::sigaction(libc::SIGBUS, previous, ptr::null_mut());
        },
        // SAFETY: SIG_DFL is a valid disposition.
        None => unsafe {
            libc::signal(libc::SIGBUS, libc::SIG_DFL);
        },
    }
    if code <= 0 {
        // SAFETY: takes no pointer; delivered when this handler returns.
        unsafe { libc::raise(libc::SIGBUS) };
    }
}
