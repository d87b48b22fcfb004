//! Lines over a unix socket, with a deadline.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// A socket that carries one message a line, as the agent and QMP do.
#[derive(Debug)]
pub(super) struct Lines {
    stream: UnixStream,
    /// What was received and not yet handed out; it may end within a line.
    received: Vec<u8>,
}

impl Lines {
    pub(super) fn connect(path: &Path) -> io::Result<Self> {
        Ok(Self {
            stream: UnixStream::connect(path)?,
            received: Vec::new(),
        })
    }

    pub(super) fn send(&mut self, line: &str) -> io::Result<()> {
        self.stream.write_all(format!("{line}\n").as_bytes())
    }

    /// The next line without its end; `None` when the deadline passed, which loses nothing of a
    /// line that came in part. The peer's leaving is `UnexpectedEof`.
    pub(super) fn receive(&mut self, deadline: Instant) -> io::Result<Option<String>> {
        loop {
            if let Some(end) = self.received.iter().position(|&byte| byte == b'\n') {
                let rest = self.received.split_off(end + 1);
                let line = std::mem::replace(&mut self.received, rest);
                let text = String::from_utf8_lossy(&line);
                return Ok(Some(text.trim_end().to_owned()));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left < Duration::from_millis(1) {
                return Ok(None);
            }
            self.stream.set_read_timeout(Some(left))?;
            let mut buffer = [0; 16 << 10];
            match self.stream.read(&mut buffer) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(count) => self.received.extend(buffer.iter().take(count)),
                Err(error) if is_retry(&error) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

fn is_retry(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Lines, UnixStream) {
        let (stream, peer) = UnixStream::pair().unwrap();
        (
            Lines {
                stream,
                received: Vec::new(),
            },
            peer,
        )
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    #[test]
    fn a_line_that_comes_in_parts_is_kept_over_a_deadline() {
        let (mut lines, mut peer) = pair();
        peer.write_all(b"one\ntw").unwrap();
        assert_eq!(lines.receive(soon()).unwrap().as_deref(), Some("one"));
        assert_eq!(lines.receive(Instant::now()).unwrap(), None);
        peer.write_all(b"o\n\nthree\n").unwrap();
        assert_eq!(lines.receive(soon()).unwrap().as_deref(), Some("two"));
        assert_eq!(lines.receive(soon()).unwrap().as_deref(), Some(""));
        assert_eq!(lines.receive(soon()).unwrap().as_deref(), Some("three"));
    }

    #[test]
    fn a_peer_that_leaves_is_an_error() {
        let (mut lines, peer) = pair();
        drop(peer);
        let error = lines.receive(soon()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
    }
}
