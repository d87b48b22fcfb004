//! A measuring stick: the least that a vhost-user back end can do.
//!
//! A thread that speaks just enough of the protocol for virtio-driver, and then looks at one split
//! vring without ever sleeping. It walks each chain to the status byte, writes that, and
//! completes. It checks nothing but what keeps its own memory safe.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};

use vm_memory::mmap::MmapRegion;
use vm_memory::{FileOffset, VolatileMemory as _, VolatileSlice};
use vmm_sys_util::sock_ctrl_msg::ScmSocket as _;

use super::BenchError;
use super::error::host;
use super::machine::{Watched, bind};

/// The thread, and where it listens.
pub(super) struct Spinner {
    thread: Option<JoinHandle<io::Result<()>>>,
    stop: Arc<AtomicBool>,
    watched: Watched,
}

impl Spinner {
    /// Listens at `socket` for one front end, and serves it on `cpu`.
    pub(super) fn start(socket: &Path, size: u64, cpu: usize) -> Result<Self, BenchError> {
        let listener = UnixListener::bind(socket).map_err(host("listen"))?;
        let stop = Arc::new(AtomicBool::new(false));
        let (tell, told): (Sender<_>, Receiver<_>) = channel();
        let thread = {
            let stop = Arc::clone(&stop);
            thread::spawn(move || {
                let ready = bind(cpu).and_then(|()| Watched::this_thread());
                // The other end waits for this as long as the thread runs.
                let _ = tell.send(ready);
                let (socket, _) = listener.accept()?;
                BackEnd::new(socket, size).serve(&stop)
            })
        };
        let watched = told
            .recv()
            .map_err(|gone| host("start a thread")(io::Error::other(gone)))??;
        Ok(Self {
            thread: Some(thread),
            stop,
            watched,
        })
    }

    pub(super) fn watched(&self) -> &Watched {
        &self.watched
    }

    /// Ends the thread; the front end must have connected.
    pub(super) fn stop(mut self) -> Result<(), BenchError> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(served)) => served.map_err(host("serve a vring")),
            Some(Err(_)) | None => Err(host("serve a vring")(io::ErrorKind::Other.into())),
        }
    }
}

impl Drop for Spinner {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// One connection.
struct BackEnd {
    socket: UnixStream,
    size: u64,
    regions: Vec<(u64, MmapRegion)>,
    vring_size: u16,
    /// Descriptor table, used ring, avail ring, as SET_VRING_ADDR has them.
    addresses: [u64; 3],
}

impl BackEnd {
    fn new(socket: UnixStream, size: u64) -> Self {
        Self {
            socket,
            size,
            regions: Vec::new(),
            vring_size: 0,
            addresses: [0; 3],
        }
    }

    fn serve(mut self, stop: &AtomicBool) -> io::Result<()> {
        while !self.message()? {}
        Ring::new(&self)?.spin(stop)
    }

    /// Answers one message; true when the vring is to be served.
    fn message(&mut self) -> io::Result<bool> {
        let mut header = [0; 12];
        let (got, file) = self
            .socket
            .recv_with_fd(&mut header)
            .map_err(|errno| io::Error::from_raw_os_error(errno.errno()))?;
        if got == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.socket.read_exact(&mut header[got..])?;
        let [code, flags, len] = [0, 4, 8].map(|at| u32_at(&header, at));
        let mut payload = vec![0; len as usize];
        self.socket.read_exact(&mut payload)?;
        let answer = match code {
            GET_FEATURES => Some(VERSION_1 | PROTOCOL_FEATURES),
            GET_PROTOCOL_FEATURES => Some(REPLY_ACK | CONFIG | CONFIGURE_MEM_SLOTS),
            GET_MAX_MEM_SLOTS => Some(8),
            GET_CONFIG => {
                // Header (offset, size, flags), then the space, which starts with the capacity.
                if let Some(capacity) = payload.get_mut(12..20) {
                    capacity.copy_from_slice(&(self.size >> 9).to_le_bytes());
                }
                self.reply(code, &payload)?;
                return Ok(false);
            }
            _ => {
                self.take(code, &payload, file)?;
                (flags & NEED_REPLY != 0).then_some(0)
            }
        };
        if let Some(answer) = answer {
            self.reply(code, &u64::to_ne_bytes(answer))?;
        }
        Ok(code == SET_VRING_ENABLE)
    }

    fn take(&mut self, code: u32, payload: &[u8], file: Option<File>) -> io::Result<()> {
        match code {
            ADD_MEM_REG => {
                // Padding, guest address, size, front-end address, offset in the file.
                let [guest, size, _, offset] = [8, 16, 24, 32].map(|at| u64_at(payload, at));
                let file = file.ok_or(io::ErrorKind::InvalidInput)?;
                let file = FileOffset::new(file, offset);
                let region =
                    MmapRegion::from_file(file, size as usize).map_err(io::Error::other)?;
                self.regions.push((guest, region));
            }
            SET_VRING_NUM => self.vring_size = u32_at(payload, 4) as u16,
            SET_VRING_ADDR => self.addresses = [8, 16, 24].map(|at| u64_at(payload, at)),
            _ => {}
        }
        Ok(())
    }

    fn reply(&mut self, code: u32, payload: &[u8]) -> io::Result<()> {
        let header = [code, VERSION | REPLY, payload.len() as u32];
        let mut message = header.map(u32::to_ne_bytes).concat();
        message.extend_from_slice(payload);
        self.socket.write_all(&message)
    }

    fn find(&self, address: u64, len: usize) -> Option<VolatileSlice<'_>> {
        self.regions.iter().find_map(|(start, region)| {
            let offset = usize::try_from(address.checked_sub(*start)?).ok()?;
            region.get_slice(offset, len).ok()
        })
    }
}

/// A split vring (virtio 2.7), and nothing that is not needed at once.
struct Ring<'b> {
    back_end: &'b BackEnd,
    size: u16,
    descriptors: VolatileSlice<'b>,
    avail: VolatileSlice<'b>,
    used: VolatileSlice<'b>,
}

impl<'b> Ring<'b> {
    fn new(back_end: &'b BackEnd) -> io::Result<Self> {
        let size = back_end.vring_size;
        let [descriptors, used, avail] = back_end.addresses;
        let find = |address, len| {
            back_end
                .find(address, len)
                .ok_or_else(|| io::Error::other("a vring that is in no region"))
        };
        let entries = usize::from(size);
        if !size.is_power_of_two() {
            return Err(io::Error::other("a vring of no size"));
        }
        Ok(Self {
            back_end,
            size,
            descriptors: find(descriptors, 16 * entries)?,
            avail: find(avail, 4 + 2 * entries)?,
            used: find(used, 4 + 8 * entries)?,
        })
    }

    fn spin(&self, stop: &AtomicBool) -> io::Result<()> {
        let broken = io::Error::other;
        let avail_index: &AtomicU16 = self.avail.get_atomic_ref(2).map_err(broken)?;
        let used_index: &AtomicU16 = self.used.get_atomic_ref(2).map_err(broken)?;
        let used_flags: &AtomicU16 = self.used.get_atomic_ref(0).map_err(broken)?;
        used_flags.store(NO_NOTIFY, Ordering::Relaxed);
        let mut next = 0_u16;
        let mut idle = 0_u32;
        loop {
            let end = avail_index.load(Ordering::Acquire);
            if end == next {
                std::hint::spin_loop();
                idle += 1;
                if idle.is_multiple_of(1024) && stop.load(Ordering::Relaxed) {
                    return Ok(());
                }
                continue;
            }
            while next != end {
                self.complete(next).map_err(broken)?;
                next = next.wrapping_add(1);
            }
            used_index.store(next, Ordering::Release);
        }
    }

    /// Writes the status of one chain and its used element. Avail and used index are the same, for
    /// every chain is completed in its turn.
    fn complete(&self, index: u16) -> Result<(), vm_memory::VolatileMemoryError> {
        let mask = self.size - 1;
        let at = usize::from(index & mask);
        let head: u16 = self.avail.get_ref(4 + 2 * at)?.load();
        let mut descriptor = self.descriptor(head & mask)?;
        for _ in 0..self.size {
            if descriptor.flags & NEXT == 0 {
                break;
            }
            descriptor = self.descriptor(descriptor.next & mask)?;
        }
        let end = descriptor.address.wrapping_add(descriptor.len.into());
        if let Some(status) = self.back_end.find(end.wrapping_sub(1), 1) {
            status.get_ref(0)?.store(0_u8);
        }
        self.used.get_ref(4 + 8 * at)?.store(u32::from(head));
        self.used.get_ref(8 + 8 * at)?.store(1_u32);
        Ok(())
    }

    fn descriptor(&self, index: u16) -> Result<Descriptor, vm_memory::VolatileMemoryError> {
        let at = 16 * usize::from(index);
        Ok(Descriptor {
            address: self.descriptors.get_ref(at)?.load(),
            len: self.descriptors.get_ref(at + 8)?.load(),
            flags: self.descriptors.get_ref(at + 12)?.load(),
            next: self.descriptors.get_ref(at + 14)?.load(),
        })
    }
}

struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..at + 4)
        .and_then(|bytes| bytes.try_into().ok())
        .map_or(0, u32::from_ne_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes
        .get(at..at + 8)
        .and_then(|bytes| bytes.try_into().ok())
        .map_or(0, u64::from_ne_bytes)
}

// Messages (vhost-user, *Front-end message types*).
const GET_FEATURES: u32 = 1;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_VRING_ENABLE: u32 = 18;
const GET_CONFIG: u32 = 24;
const GET_MAX_MEM_SLOTS: u32 = 36;
const ADD_MEM_REG: u32 = 37;

// Flags of a message's header.
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// VIRTIO_F_VERSION_1 (virtio 6).
const VERSION_1: u64 = 1 << 32;
/// VHOST_USER_F_PROTOCOL_FEATURES.
const PROTOCOL_FEATURES: u64 = 1 << 30;

// Protocol features (vhost-user, *Protocol features*).
const REPLY_ACK: u64 = 1 << 3;
const CONFIG: u64 = 1 << 9;
const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;

/// VIRTQ_DESC_F_NEXT (virtio 2.7.5).
const NEXT: u16 = 1;
/// VIRTQ_USED_F_NO_NOTIFY (virtio 2.7.8).
const NO_NOTIFY: u16 = 1;
