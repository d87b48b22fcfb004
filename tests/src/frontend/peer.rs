//! The front end's end of the socket.
#![expect(
    unsafe_code,
    reason = "SIOCOUTQ is an ioctl that no crate at hand wraps"
)]

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use thiserror::Error;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::Outcome;

/// The codes of the messages, by name (vhost-user, *Front-end message types*).
pub mod code {
    #![expect(missing_docs, reason = "the names are the specification's")]
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const RESET_OWNER: u32 = 4;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_LOG_FD: u32 = 7;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    pub const SET_DEVICE_STATE_FD: u32 = 42;
    pub const CHECK_DEVICE_STATE: u32 = 43;
    pub const GET_VRING_BASE_SKIP_DRAIN: u32 = 45;
}

/// Every code of the specification.
pub const CODES: std::ops::RangeInclusive<u32> = 1..=45;

/// The flags of every message: version 1.
pub const VERSION: u32 = 1;
/// The flag that asks for an answer (REPLY_ACK).
pub const NEED_REPLY: u32 = 1 << 3;
/// The flags of every reply.
const REPLY: u32 = VERSION | 1 << 2;
/// The bit of a kick, call or err message that says that no descriptor comes.
pub const NO_FD: u64 = 1 << 8;
/// SET_VRING_KICK, CALL and ERR.
pub const CALL: [u32; 3] = [
    code::SET_VRING_KICK,
    code::SET_VRING_CALL,
    code::SET_VRING_ERR,
];

/// How long the daemon may take for an answer before the test is given up.
const PATIENCE: Duration = Duration::from_secs(60);

/// What went wrong on the socket.
#[derive(Debug, Error)]
pub enum PeerError {
    /// The daemon closed the connection.
    #[error("the daemon closed the connection")]
    Gone,
    /// The socket failed.
    #[error("the socket failed")]
    Io(#[from] io::Error),
    /// The reply is not for the message.
    #[error("message {code} was answered with code {got}, flags {flags:#x}")]
    NotIts {
        /// What was sent.
        code: u32,
        /// The code of the reply.
        got: u32,
        /// Its flags.
        flags: u32,
    },
    /// The reply is of the wrong size.
    #[error("message {code} was answered with {got} bytes, not {want}")]
    Size {
        /// What was sent.
        code: u32,
        /// Bytes a reply has.
        want: usize,
        /// Bytes that came.
        got: usize,
    },
    /// The message was refused.
    #[error("message {0} was refused")]
    Refused(u32),
}

/// A reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Its code.
    pub code: u32,
    /// Its flags.
    pub flags: u32,
    /// Its payload.
    pub payload: Vec<u8>,
}

/// The front end's end of the socket.
#[derive(Debug)]
pub struct Peer(UnixStream);

impl Peer {
    /// Takes a connected socket.
    ///
    /// # Errors
    /// The kernel's.
    pub fn new(stream: UnixStream) -> io::Result<Peer> {
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Peer(stream))
    }

    /// Connects to a daemon.
    ///
    /// # Errors
    /// The kernel's.
    pub fn connect(path: &Path) -> io::Result<Peer> {
        Peer::new(UnixStream::connect(path)?)
    }

    /// Sends bytes, whatever they mean, with descriptors on the first of them.
    ///
    /// # Errors
    /// The kernel's.
    pub fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), PeerError> {
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        match self.0.send_with_fds(&[bytes], &raw) {
            Ok(sent) if sent == bytes.len() => Ok(()),
            Ok(_) => Err(io::Error::from(io::ErrorKind::WriteZero).into()),
            Err(error) => Err(match io::Error::from(error) {
                error if gone(&error) => PeerError::Gone,
                error => error.into(),
            }),
        }
    }

    /// Sends a message with these flags.
    ///
    /// # Errors
    /// The kernel's.
    pub fn send(
        &self,
        code: u32,
        flags: u32,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), PeerError> {
        let size = u32::try_from(payload.len()).map_err(io::Error::other)?;
        let mut bytes: Vec<u8> = words(&[code, flags, size]);
        bytes.extend_from_slice(payload);
        self.send_bytes(&bytes, fds)
    }

    /// Sends a message that asks for no answer.
    ///
    /// # Errors
    /// The kernel's.
    pub fn tell(&self, code: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), PeerError> {
        self.send(code, VERSION, payload, fds)
    }

    /// Sends a message with NEED_REPLY, and wants it acknowledged.
    ///
    /// # Errors
    /// [`PeerError::Refused`] when it was refused.
    pub fn confirm(
        &self,
        code: u32,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), PeerError> {
        self.send(code, VERSION | NEED_REPLY, payload, fds)?;
        match self.number(code)? {
            0 => Ok(()),
            _ => Err(PeerError::Refused(code)),
        }
    }

    /// Whether a message with NEED_REPLY was refused, rather than acknowledged.
    ///
    /// # Errors
    /// When it got neither answer.
    pub fn refused(
        &self,
        code: u32,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<bool, PeerError> {
        match self.confirm(code, payload, fds) {
            Ok(()) => Ok(false),
            Err(PeerError::Refused(_)) => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// Sends a message that has an answer of its own, and gives it.
    ///
    /// # Errors
    /// When there is none, or one of another message.
    pub fn ask(&self, code: u32, payload: &[u8]) -> Result<Vec<u8>, PeerError> {
        self.tell(code, payload, &[])?;
        Ok(self.reply_to(code)?.payload)
    }

    /// Sends a message whose answer brings a descriptor, and gives both; no descriptor where none
    /// came.
    ///
    /// # Errors
    /// When there is no answer, or one of another message.
    pub fn ask_file(
        &self,
        code: u32,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(Vec<u8>, Option<File>), PeerError> {
        self.tell(code, payload, fds)?;
        let mut header = [0; 12];
        let (count, file) = self
            .0
            .recv_with_fd(&mut header)
            .map_err(|errno| io::Error::from_raw_os_error(errno.errno()))?;
        match count {
            0 => return Err(PeerError::Gone),
            12 => {}
            _ => return Err(size(code, 12, count)),
        }
        let answer = self.body(&header)?;
        Peer::check(code, &answer)?;
        Ok((answer.payload, file))
    }

    /// As [`ask`](Self::ask), with NEED_REPLY as well: there is still one answer only.
    ///
    /// # Errors
    /// When there is none, or one of another message.
    pub fn ask_eagerly(&self, code: u32, payload: &[u8]) -> Result<Vec<u8>, PeerError> {
        self.send(code, VERSION | NEED_REPLY, payload, &[])?;
        Ok(self.reply_to(code)?.payload)
    }

    /// Asks for a number.
    ///
    /// # Errors
    /// When no number comes back.
    pub fn ask_number(&self, code: u32) -> Result<u64, PeerError> {
        self.tell(code, &[], &[])?;
        self.number(code)
    }

    /// Stops a vring; the avail index that is next.
    ///
    /// # Errors
    /// When it is not answered.
    pub fn vring_base(&self, index: u32) -> Result<u32, PeerError> {
        let payload = self.ask(code::GET_VRING_BASE, &words(&[index, 0]))?;
        match <[u8; 8]>::try_from(payload.as_slice()) {
            Ok([a, b, c, d, base @ ..]) if u32::from_ne_bytes([a, b, c, d]) == index => {
                Ok(u32::from_ne_bytes(base))
            }
            _ => Err(size(code::GET_VRING_BASE, 8, payload.len())),
        }
    }

    /// Reads the configuration space.
    ///
    /// # Errors
    /// When it is not answered, or with other than the bytes asked for.
    pub fn config(&self, offset: u32, size_wanted: u32) -> Result<Vec<u8>, PeerError> {
        let header = words(&[offset, size_wanted, 1]);
        let mut request = header.clone();
        let want = usize::try_from(size_wanted).map_err(io::Error::other)?;
        request.resize(header.len() + want, 0);
        let payload = self.ask(code::GET_CONFIG, &request)?;
        match payload.strip_prefix(header.as_slice()) {
            Some(bytes) if bytes.len() == want => Ok(bytes.to_vec()),
            _ => Err(size(code::GET_CONFIG, request.len(), payload.len())),
        }
    }

    /// The next reply, which has to be to `code`.
    ///
    /// # Errors
    /// When it is not.
    pub fn reply_to(&self, code: u32) -> Result<Answer, PeerError> {
        let answer = self.reply()?;
        Peer::check(code, &answer)?;
        Ok(answer)
    }

    /// Whether the answer is the message's. QEMU compares the flags of a reply with exactly these.
    fn check(code: u32, answer: &Answer) -> Result<(), PeerError> {
        if answer.code != code || answer.flags != REPLY {
            return Err(PeerError::NotIts {
                code,
                got: answer.code,
                flags: answer.flags,
            });
        }
        Ok(())
    }

    /// The next reply.
    ///
    /// # Errors
    /// When there is none.
    pub fn reply(&self) -> Result<Answer, PeerError> {
        let header = self.take(12)?;
        self.body(&header)
    }

    /// The answer that a header begins.
    fn body(&self, header: &[u8]) -> Result<Answer, PeerError> {
        let mut fields = header
            .chunks_exact(4)
            .map(|bytes| match <[u8; 4]>::try_from(bytes) {
                Ok(bytes) => u32::from_ne_bytes(bytes),
                Err(_) => 0,
            });
        let mut next = || fields.next().unwrap_or(0);
        let (code, flags, size) = (next(), next(), next());
        let payload = self.take(usize::try_from(size).map_err(io::Error::other)?)?;
        Ok(Answer {
            code,
            flags,
            payload,
        })
    }

    /// Whether the daemon has sent nothing that was not read, and has not closed the connection.
    ///
    /// # Errors
    /// The kernel's.
    pub fn is_quiet(&self) -> Result<bool, PeerError> {
        let mut polled = [PollFd::new(&self.0, PollFlags::IN)];
        let ready = poll(&mut polled, Some(&Timespec::default())).map_err(io::Error::from)?;
        Ok(ready == 0)
    }

    /// Waits until the daemon has closed the connection; false if it sends something instead.
    ///
    /// # Errors
    /// When it does neither for a long time.
    pub fn closed(&self) -> Result<bool, PeerError> {
        match self.take(1) {
            Ok(_) => Ok(false),
            Err(PeerError::Gone) => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// Whether the connection is open and everything sent so far was handled: a message that is
    /// always answered comes back.
    ///
    /// # Errors
    /// When it is not.
    pub fn still_served(&self) -> Result<(), PeerError> {
        self.ask_number(code::GET_FEATURES).map(drop)
    }

    /// The socket.
    #[must_use]
    pub fn into_stream(self) -> UnixStream {
        self.0
    }

    /// The socket.
    #[must_use]
    pub fn stream(&self) -> &UnixStream {
        &self.0
    }

    fn number(&self, code: u32) -> Result<u64, PeerError> {
        let payload = self.reply_to(code)?.payload;
        let bytes = <[u8; 8]>::try_from(payload.as_slice());
        bytes
            .map(u64::from_ne_bytes)
            .ok()
            .ok_or(size(code, 8, payload.len()))
    }

    fn take(&self, count: usize) -> Result<Vec<u8>, PeerError> {
        let mut bytes = vec![0; count];
        match (&self.0).read_exact(&mut bytes) {
            Ok(()) => Ok(bytes),
            Err(error) if gone(&error) => Err(PeerError::Gone),
            Err(error) => Err(error.into()),
        }
    }
}

/// Numbers as a payload has them.
#[must_use]
pub fn words(values: &[u32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_ne_bytes())
        .collect()
}

/// A memory region as SET_MEM_TABLE lists it: guest address, size, front-end address, offset.
#[must_use]
pub fn region_payload(region: [u64; 4]) -> Vec<u8> {
    region
        .iter()
        .flat_map(|value| value.to_ne_bytes())
        .collect()
}

/// Bytes the daemon has not taken yet, as the kernel counts them for the sender (SIOCOUTQ).
///
/// # Errors
/// The kernel's.
pub fn outgoing_bytes(peer: &Peer) -> Outcome<u32> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: SIOCOUTQ writes one int, and `bytes` is one that outlives the call.
    let asked = unsafe { libc::ioctl(peer.0.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    if asked != 0 {
        return Err(io::Error::last_os_error().into());
    }
    Ok(u32::try_from(bytes)?)
}

fn size(code: u32, want: usize, got: usize) -> PeerError {
    PeerError::Size { code, want, got }
}

fn gone(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionReset | UnexpectedEof)
}
