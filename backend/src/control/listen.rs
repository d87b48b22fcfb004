//! Where front ends come from: a socket at a path, or one that was handed to the daemon.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use log::{info, warn};
use rustix::io::Errno;
use rustix::net::sockopt::{socket_acceptconn, socket_domain, socket_type};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, getpeername, socket_with,
};
use thiserror::Error;

/// Where front ends come from.
#[derive(Debug)]
pub enum Listen {
    /// A listening socket is made at this path, and removed when the daemon leaves.
    Path(PathBuf),
    /// A socket that was handed over: listening, or connected to its only front end.
    Fd(OwnedFd),
}

/// Why a socket cannot be served.
#[derive(Debug, Error)]
pub enum ListenError {
    /// A daemon listens at the path.
    #[error("{0}: another process listens there; stop it, or choose another --socket-path")]
    InUse(PathBuf),
    /// Something else is at the path.
    #[error(
        "{0}: there is a file that is not a socket; remove it, or choose another --socket-path"
    )]
    NotSocket(PathBuf),
    /// The path cannot be listened at.
    #[error("{path}: cannot listen there")]
    Bind {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The descriptor is no unix stream socket.
    #[error("--fd={fd}: not a unix stream socket; hand over one that listens or is connected")]
    WrongKind {
        /// The descriptor.
        fd: RawFd,
    },
    /// The descriptor is a socket that neither listens nor is connected.
    #[error("--fd={fd}: the socket neither listens nor is connected")]
    Unconnected {
        /// The descriptor.
        fd: RawFd,
    },
    /// The descriptor cannot be asked what it is.
    #[error("--fd={fd}: cannot be examined")]
    Examine {
        /// The descriptor.
        fd: RawFd,
        /// Why.
        source: io::Error,
    },
}

/// A socket that is served.
#[derive(Debug)]
pub(super) enum Socket {
    /// Front ends connect to it, one after the other.
    Listening(UnixListener, Option<BoundPath>),
    /// The only front end there will be.
    Connected(UnixStream),
}

impl Socket {
    /// Opens what was asked for.
    pub(super) fn open(listen: Listen) -> Result<Socket, ListenError> {
        match listen {
            Listen::Path(path) => bind(&path),
            Listen::Fd(fd) => tell_apart(fd),
        }
    }
}

/// The socket file we made. Dropping it removes the file, unless another has taken its place.
#[derive(Debug)]
pub(super) struct BoundPath {
    path: PathBuf,
    /// Device and inode of the file we made.
    identity: Option<(u64, u64)>,
}

impl Drop for BoundPath {
    fn drop(&mut self) {
        if self.identity.is_none() || identity(&self.path) != self.identity {
            return;
        }
        if let Err(error) = fs::remove_file(&self.path) {
            warn!(
                "{}: the socket cannot be removed: {error}",
                self.path.display()
            );
        }
    }
}

fn bind(path: &Path) -> Result<Socket, ListenError> {
    let failed = |source| ListenError::Bind {
        path: path.into(),
        source,
    };
    let listener = match UnixListener::bind(path) {
        Ok(listener) => listener,
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            remove_stale(path)?;
            UnixListener::bind(path).map_err(failed)?
        }
        Err(error) => return Err(failed(error)),
    };
    let bound = BoundPath {
        identity: identity(path),
        path: path.into(),
    };
    listener.set_nonblocking(true).map_err(failed)?;
    Ok(Socket::Listening(listener, Some(bound)))
}

/// Removes a socket that nobody listens at any more.
fn remove_stale(path: &Path) -> Result<(), ListenError> {
    let failed = |source| ListenError::Bind {
        path: path.into(),
        source,
    };
    let metadata = fs::symlink_metadata(path).map_err(failed)?;
    if !metadata.file_type().is_socket() {
        return Err(ListenError::NotSocket(path.into()));
    }
    let address = SocketAddrUnix::new(path).map_err(|errno| failed(errno.into()))?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let probe = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .map_err(|errno| failed(errno.into()))?;
    match connect(&probe, &address) {
        Err(Errno::CONNREFUSED) => {
            info!(
                "{}: replacing a socket that nobody listens at",
                path.display()
            );
            fs::remove_file(path).map_err(failed)
        }
        // Removed meanwhile, which is as good.
        Err(Errno::NOENT) => Ok(()),
        // A full backlog says EAGAIN: somebody listens, or did a moment ago.
        Ok(()) | Err(Errno::AGAIN) => Err(ListenError::InUse(path.into())),
        Err(errno) => Err(failed(errno.into())),
    }
}

fn tell_apart(fd: OwnedFd) -> Result<Socket, ListenError> {
    let raw = fd.as_raw_fd();
    let failed = |errno: Errno| ListenError::Examine {
        fd: raw,
        source: errno.into(),
    };
    match (socket_domain(&fd), socket_type(&fd)) {
        (Ok(AddressFamily::UNIX), Ok(SocketType::STREAM)) => {}
        (Ok(_), Ok(_)) | (Err(Errno::NOTSOCK), _) => {
            return Err(ListenError::WrongKind { fd: raw });
        }
        (Err(errno), _) | (_, Err(errno)) => return Err(failed(errno)),
    }
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC).map_err(failed)?;
    if socket_acceptconn(&fd).map_err(failed)? {
        let listener = UnixListener::from(fd);
        let nonblocking = listener.set_nonblocking(true);
        nonblocking.map_err(|source| ListenError::Examine { fd: raw, source })?;
        return Ok(Socket::Listening(listener, None));
    }
    match getpeername(&fd) {
        Ok(_) => Ok(Socket::Connected(UnixStream::from(fd))),
        Err(Errno::NOTCONN) => Err(ListenError::Unconnected { fd: raw }),
        Err(errno) => Err(failed(errno)),
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let metadata = fs::symlink_metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}
