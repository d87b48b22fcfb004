//! Handlers of the messages about the configuration space.

use super::{Refusal, Session, Step};
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
    pub(super) fn set_config(&self, range: ConfigRange, bytes: &[u8]) -> Result<Step, Refusal> {
        self.device.write_config(range.offset, bytes)?;
        self.keep_write_cache();
        Ok(Step::DONE)
    }
}
