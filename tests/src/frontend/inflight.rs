//! The in-flight region as a front end has it: it asks a daemon for one, keeps it, and hands it to
//! the next.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use super::{Outcome, Peer, code};

/// Bytes of the description, as QEMU sends it: with four of padding.
const DESCRIPTION_BYTES: usize = 24;

/// An in-flight region: what a daemon said of it, and its file.
#[derive(Debug)]
pub struct InflightFile {
    description: Vec<u8>,
    file: File,
}

impl InflightFile {
    /// Asks for a region (GET_INFLIGHT_FD).
    ///
    /// # Errors
    /// When none comes.
    pub fn get(peer: &Peer, queues: u16, queue_size: u16) -> Outcome<InflightFile> {
        let mut payload = vec![0; 16];
        payload.extend(queues.to_ne_bytes());
        payload.extend(queue_size.to_ne_bytes());
        payload.resize(DESCRIPTION_BYTES, 0);
        let (description, file) = peer.ask_file(code::GET_INFLIGHT_FD, &payload, &[])?;
        if description.len() != DESCRIPTION_BYTES {
            return Err(format!("a description of {} bytes", description.len()).into());
        }
        let file = file.ok_or("no region came")?;
        Ok(InflightFile { description, file })
    }

    /// Hands the region to a daemon (SET_INFLIGHT_FD).
    ///
    /// # Errors
    /// When it refuses.
    pub fn set(&self, peer: &Peer) -> Outcome {
        Ok(peer.confirm(
            code::SET_INFLIGHT_FD,
            &self.description,
            &[self.file.as_fd()],
        )?)
    }

    /// Hands the region to a daemon as QEMU does that: without wanting an answer.
    ///
    /// # Errors
    /// The kernel's.
    pub fn tell(&self, peer: &Peer) -> Outcome {
        Ok(peer.tell(
            code::SET_INFLIGHT_FD,
            &self.description,
            &[self.file.as_fd()],
        )?)
    }

    /// Everything in it.
    ///
    /// # Errors
    /// The kernel's.
    pub fn bytes(&self) -> Outcome<Vec<u8>> {
        let len = self.file.metadata()?.len();
        let mut bytes = vec![0; usize::try_from(len)?];
        self.file.read_exact_at(&mut bytes, 0)?;
        Ok(bytes)
    }
}
