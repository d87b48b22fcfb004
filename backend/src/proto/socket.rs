//! The front end's socket: whole messages with their descriptors, never blocking.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use thiserror::Error;

use super::code::Code;
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
    /// A message is refused that is owed a reply, and its reply cannot say no.
    #[error("{0} cannot be answered, and its reply cannot say so")]
    Unanswerable(Code),
    /// The socket failed.
    #[error("the socket failed")]
    Io(#[source] Errno),
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
    /// Takes a connected stream.
    #[must_use]
    pub fn new(stream: UnixStream) -> Connection {
        Connection {
            stream,
            head: [0; HEADER_BYTES],
            header: None,
            payload: Vec::new(),
            have: 0,
            fds: Vec::new(),
        }
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

    /// Sends a whole reply, with a file if it has one.
    ///
    /// # Errors
    /// When it cannot be sent at once: a front end waits for each reply before it sends more, so a
    /// full socket means that it stopped reading.
    pub fn send(&self, reply: &[u8], file: Option<BorrowedFd<'_>>) -> Result<(), ConnectionError> {
        let files = file.as_slice();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !files.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(files));
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        loop {
            return match sendmsg(&self.stream, &[IoSlice::new(reply)], &mut control, flags) {
                Ok(sent) if sent == reply.len() => Ok(()),
                Ok(_) => Err(ConnectionError::Stuck),
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => Err(ConnectionError::Stuck),
                Err(Errno::PIPE | Errno::CONNRESET) => Err(ConnectionError::HungUp),
                Err(error) => Err(ConnectionError::Io(error)),
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
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_MESSAGE_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let received = loop {
        match recvmsg(stream, &mut [IoSliceMut::new(into)], &mut control, flags) {
            Ok(received) => break received,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(None),
            Err(Errno::CONNRESET) => return Err(ConnectionError::HungUp),
            Err(error) => return Err(ConnectionError::Io(error)),
        }
    };
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    // The kernel cuts off what does not fit and closes it; alignment may leave room for one more.
    if received.flags.contains(ReturnFlags::CTRUNC) || fds.len() > MAX_MESSAGE_FDS {
        return Err(ConnectionError::TooManyDescriptors);
    }
    Ok(Some((received.bytes, fds)))
}

#[cfg(test)]
mod tests;
