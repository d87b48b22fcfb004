//! Handlers of the messages about the configuration space.

use super::{Crew, Refusal, Session, Step};
use crate::blk::WriteCache;
use crate::proto::{ConfigRange, Reply};

impl Session {
    /// GET_CONFIG: the reply has exactly as many bytes as were asked for.
    pub(super) fn get_config(&self, range: ConfigRange) -> Result<Step, Refusal> {
        let ConfigRange {
            offset,
            size,
            flags: _,
        } = range;
        let bytes = self.device.read_config(offset, size);
        let bytes = bytes.ok_or(Refusal::ConfigRange { offset, size })?;
        Ok(Step::Done(Some(Reply::Config(range, bytes))))
    }

    /// SET_CONFIG.
    ///
    /// When the write cache goes off, what was answered while it was on is made stable first: a
    /// driver may rely on every answer from then on.
    pub(super) fn set_config(
        &self,
        range: ConfigRange,
        bytes: &[u8],
        crew: &dyn Crew,
    ) -> Result<Step, Refusal> {
        let before = self.device.write_cache();
        self.device.write_config(range.offset, bytes)?;
        self.keep_write_cache();
        match (before, self.device.write_cache()) {
            (WriteCache::Writeback, WriteCache::Writethrough) => Ok(self.sync(crew)),
            (WriteCache::Writeback | WriteCache::Writethrough, _) => Ok(Step::DONE),
        }
    }
}
