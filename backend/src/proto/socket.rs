//! The front end's socket: whole messages with their descriptors, never blocking.
#![expect(
    unsafe_code,
    reason = "ScmSocket reads into raw vectors and hands out raw descriptors"
)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use thiserror::Error;
use vmm_sys_util::errno;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::header::{HEADER_BYTES, Header, StreamFault};
use crate::limits::MAX_MESSAGE_FDS;

/// A message as it came.
#[derive(Debug)]
pub struct RawMessage {
    /// Its header.
    pub header: Header,
    /// Its payload, as long as the header says.
    pub payload: Vec<u8>,
    /// Its file descriptors, close-on-exec.
    pub fds: Vec<OwnedFd>,
}

/// Why a connection is over.
#[derive(Debug, Error)]
pub enum ConnectionError {
    /// The front end left between two messages.
    #[error("the front end hung up")]
    HungUp,
    /// The front end left inside a message.
    #[error("the front end hung up in the middle of a message")]
    Torn,
    /// The stream cannot be read any further.
    #[error("the stream is broken: {0}")]
    Stream(#[from] StreamFault),
    /// Descriptors came with bytes other than the first of a header (*Communication*).
    #[error("file descriptors came in the middle of a message")]
    StrayDescriptors,
    /// More descriptors came than any message has, or than this process may open.
    #[error(
        "a message carried more than {MAX_MESSAGE_FDS} file descriptors, or more than may be open"
    )]
    TooManyDescriptors,
    /// The front end does not read its replies.
    #[error("the front end does not read its replies")]
    Stuck,
    /// The socket failed.
    #[error("the socket failed")]
    Io(#[source] io::Error),
}

/// One front end's connection, with what of a message came so far.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    head: [u8; HEADER_BYTES],
    header: Option<Header>,
    payload: Vec<u8>,
    /// Bytes that came of the header, or of the payload once the header is there.
    have: usize,
    fds: Vec<OwnedFd>,
}

impl Connection {
    /// Takes a connected stream and makes it non-blocking.
    ///
    /// # Errors
    /// When the kernel refuses that.
    pub fn new(stream: UnixStream) -> io::Result<Connection> {
        stream.set_nonblocking(true)?;
        Ok(Connection {
            stream,
            head: [0; HEADER_BYTES],
            header: None,
            payload: Vec::new(),
            have: 0,
            fds: Vec::new(),
        })
    }

    /// The next message, or none if it has not come whole yet.
    ///
    /// Exactly one message's bytes are read at a time: the kernel gives descriptors with the bytes
    /// they were sent with, and reading ahead would lose which message they belong to.
    ///
    /// # Errors
    /// When the connection is over.
    pub fn receive(&mut self) -> Result<Option<RawMessage>, ConnectionError> {
        let header = match self.header {
            Some(header) => header,
            None => match self.receive_header()? {
                Some(header) => header,
                None => return Ok(None),
            },
        };
        while self.have < header.size {
            let rest = self.payload.get_mut(self.have..).unwrap_or_default();
            let Some((bytes, fds)) = read(&self.stream, rest)? else {
                return Ok(None);
            };
            match bytes {
                0 => return Err(ConnectionError::Torn),
                1.. if !fds.is_empty() => return Err(ConnectionError::StrayDescriptors),
                1.. => self.have = self.have.saturating_add(bytes),
            }
        }
        self.header = None;
        self.have = 0;
        let payload = std::mem::take(&mut self.payload);
        Ok(Some(RawMessage {
            header,
            payload,
            fds: std::mem::take(&mut self.fds),
        }))
    }

    /// Sends a whole reply.
    ///
    /// # Errors
    /// When it cannot be sent at once: a front end waits for each reply before it sends more, so a
    /// full socket means that it stopped reading.
    pub fn send(&self, reply: &[u8]) -> Result<(), ConnectionError> {
        loop {
            return match self.stream.send_with_fds(&[reply], &[]) {
                Ok(sent) if sent == reply.len() => Ok(()),
                Ok(_) => Err(ConnectionError::Stuck),
                Err(error) => match error.errno() {
                    libc::EINTR => continue,
                    libc::EAGAIN => Err(ConnectionError::Stuck),
                    libc::EPIPE | libc::ECONNRESET => Err(ConnectionError::HungUp),
                    _ => Err(ConnectionError::Io(error.into())),
                },
            };
        }
    }

    fn receive_header(&mut self) -> Result<Option<Header>, ConnectionError> {
        while self.have < HEADER_BYTES {
            let rest = self.head.get_mut(self.have..).unwrap_or_default();
            let Some((bytes, fds)) = read(&self.stream, rest)? else {
                return Ok(None);
            };
            match (bytes, self.have) {
                (0, 0) => return Err(ConnectionError::HungUp),
                (0, 1..) => return Err(ConnectionError::Torn),
                (1.., 1..) if !fds.is_empty() => return Err(ConnectionError::StrayDescriptors),
                (1.., 1..) => {}
                (1.., 0) => self.fds = fds,
            }
            self.have = self.have.saturating_add(bytes);
        }
        let header = Header::decode(&self.head)?;
        self.header = Some(header);
        self.payload = vec![0; header.size];
        self.have = 0;
        Ok(Some(header))
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl AsRawFd for Connection {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}

/// Reads what is there, at most `into.len()` bytes; none if nothing is there now.
fn read(
    stream: &UnixStream,
    into: &mut [u8],
) -> Result<Option<(usize, Vec<OwnedFd>)>, ConnectionError> {
    let mut raw: [RawFd; MAX_MESSAGE_FDS] = [-1; MAX_MESSAGE_FDS];
    loop {
        let mut vectors = [libc::iovec {
            iov_base: into.as_mut_ptr().cast(),
            iov_len: into.len(),
        }];
        // SAFETY: the one vector covers `into`, which is borrowed mutably for the whole call, and
        // any bytes are valid in it.
        match unsafe { stream.recv_with_fds(&mut vectors, &mut raw) } {
            Ok((bytes, count)) => {
                let fds = raw.iter().take(count).map(|&fd| adopt(fd)).collect();
                return Ok(Some((bytes, fds)));
            }
            Err(error) => match error.errno() {
                libc::EINTR => {}
                libc::EAGAIN => return Ok(None),
                // What ScmSocket says when control data was cut off; it closed what did arrive.
                libc::ENOBUFS => return Err(ConnectionError::TooManyDescriptors),
                libc::ECONNRESET => return Err(ConnectionError::HungUp),
                _ => return Err(io_error(error)),
            },
        }
    }
}

/// Takes a descriptor that has just arrived, and makes it close-on-exec.
fn adopt(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just installed `fd` for this process and `read` is given every number
    // once, so nobody else owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: F_SETFD takes an integer and touches no memory; `fd` is open.
    if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
        log::warn!(
            "a received descriptor stays open over exec: {}",
            io::Error::last_os_error()
        );
    }
    fd
}

fn io_error(error: errno::Error) -> ConnectionError {
    ConnectionError::Io(error.into())
}

#[cfg(test)]
mod tests;
