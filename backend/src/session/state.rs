//! The device's state, for front ends that carry it to another host (vhost-user, *Migrating
//! back-end state*).
//!
//! There is little of it: what the guest configured and no front end says again. It travels as a
//! record of fixed size with a version, little-endian: magic (8 bytes), version (4), the write
//! cache's mode (1), zeroes (3).

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use thiserror::Error;

use super::{Refusal, Session, Step};
use crate::blk::WriteCache;
use crate::limits::MAX_STATE_BYTES;
use crate::proto::{Reply, Transfer};

/// What a record begins with.
const MAGIC: [u8; 8] = *b"vublk-st";
/// The only version there is.
const VERSION: u32 = 1;
/// Bytes of a record.
const RECORD_BYTES: usize = 16;

/// What became of the last transfer.
#[derive(Debug, Default)]
pub(super) enum Transferred {
    /// There was none.
    #[default]
    Never,
    /// All of it was written.
    Saved,
    /// It comes from this file.
    Loading(File),
}

/// Why a state is not loaded.
#[derive(Debug, Error)]
pub enum StateError {
    /// Nothing was transferred.
    #[error("no state was transferred")]
    Never,
    /// The file is not what states are transferred through.
    #[error("the file is neither a pipe nor a socket")]
    Kind,
    /// The file cannot be used.
    #[error("the file cannot be used")]
    File(#[source] io::Error),
    /// The front end has not closed its end, or nothing reads it.
    #[error("the other end was not closed, or does not take {RECORD_BYTES} bytes")]
    Unfinished,
    /// It is no record of ours.
    #[error("{0} bytes that are no state of this device")]
    Foreign(usize),
    /// A record that a later program wrote.
    #[error("version {0} of the state: this program knows {VERSION}")]
    Version(u32),
    /// The write cache has no such mode.
    #[error("write cache mode {0}")]
    Cache(u8),
}

impl Session {
    /// SET_DEVICE_STATE_FD: answered once the state is in the file, or as soon as there is one to
    /// load it from.
    pub(super) fn set_device_state(
        &mut self,
        transfer: Transfer,
        file: OwnedFd,
    ) -> Result<Step, Refusal> {
        if !self.all_stopped() {
            return Err(Refusal::NotSuspended);
        }
        self.transferred = Transferred::Never;
        let mut file = prepare(file)?;
        self.transferred = match transfer {
            Transfer::Save => {
                save(&mut file, self.device.write_cache())?;
                Transferred::Saved
            }
            Transfer::Load => Transferred::Loading(file),
        };
        Ok(Step::Done(Some(Reply::TRANSFER)))
    }

    /// CHECK_DEVICE_STATE: the front end has closed its end, so that all of a state is there.
    pub(super) fn check_device_state(&mut self) -> Result<Step, Refusal> {
        match std::mem::take(&mut self.transferred) {
            Transferred::Never => return Err(StateError::Never.into()),
            Transferred::Saved => {}
            Transferred::Loading(mut file) => {
                if !self.all_stopped() {
                    return Err(Refusal::NotSuspended);
                }
                self.device.set_write_cache(load(&mut file)?);
                self.keep_write_cache();
            }
        }
        Ok(Step::Done(Some(Reply::ACK)))
    }
}

/// Makes sure that using the file waits for nobody.
fn prepare(file: OwnedFd) -> Result<File, StateError> {
    let file = File::from(file);
    let kind = file.metadata().map_err(StateError::File)?.file_type();
    if !kind.is_fifo() && !kind.is_socket() {
        return Err(StateError::Kind);
    }
    let flags = fcntl_getfl(&file).and_then(|flags| fcntl_setfl(&file, flags | OFlags::NONBLOCK));
    flags.map_err(|errno| StateError::File(errno.into()))?;
    Ok(file)
}

fn save(file: &mut File, cache: WriteCache) -> Result<(), StateError> {
    let mut record = MAGIC.to_vec();
    record.extend(VERSION.to_le_bytes());
    record.push(match cache {
        WriteCache::Writethrough => 0,
        WriteCache::Writeback => 1,
    });
    record.resize(RECORD_BYTES, 0);
    match file.write(&record) {
        Ok(RECORD_BYTES) => Ok(()),
        Ok(_) => Err(StateError::Unfinished),
        Err(error) => Err(failed(error)),
    }
}

fn load(file: &mut File) -> Result<WriteCache, StateError> {
    let mut bytes = Vec::new();
    let mut limited = file.take(MAX_STATE_BYTES);
    limited.read_to_end(&mut bytes).map_err(failed)?;
    let foreign = || StateError::Foreign(bytes.len());
    let (magic, rest) = bytes.split_first_chunk().ok_or_else(foreign)?;
    if *magic != MAGIC {
        return Err(foreign());
    }
    let (version, rest) = rest.split_first_chunk().ok_or_else(foreign)?;
    match u32::from_le_bytes(*version) {
        VERSION => {}
        other => return Err(StateError::Version(other)),
    }
    match rest {
        [0, _, _, _] => Ok(WriteCache::Writethrough),
        [1, _, _, _] => Ok(WriteCache::Writeback),
        [other, _, _, _] => Err(StateError::Cache(*other)),
        _ => Err(foreign()),
    }
}

fn failed(error: io::Error) -> StateError {
    if error.kind() == io::ErrorKind::WouldBlock {
        return StateError::Unfinished;
    }
    StateError::File(error)
}
