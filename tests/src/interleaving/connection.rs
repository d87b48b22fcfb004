//! Connections that are lost, with requests in flight.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::World;
use super::memory::END;
use crate::frontend::{DirtyLog, LOG_ALL, Outcome, Peer, code};

impl World {
    /// Leaves without a word, and comes back with the in-flight region.
    pub(super) fn lose_connection(&mut self, dice: &mut fastrand::Rng) -> Outcome {
        if self.inflight.is_none() {
            return Ok(());
        }
        self.note("lose the connection");
        self.counts.redone += self.slots.iter().flatten().flatten().count() as u64;
        // A removal that was not acknowledged has not happened.
        self.pending = None;
        let (nobody, _) = UnixStream::pair()?;
        self.front.peer = Peer::new(nobody)?;
        if dice.bool() {
            std::thread::sleep(Duration::from_micros(dice.u64(0..3000)));
            self.observe()?;
            self.reap_all()?;
        }
        // What hung ends, and nobody is told.
        self.release();
        self.front.peer = self.served.connect()?;
        let old = self.log.take();
        let features = if old.is_some() { LOG_ALL } else { 0 };
        // Answered when everything of the last connection came back.
        self.front.negotiate(features)?;
        let fresh = match old {
            Some(old) => {
                // Marked, too, is what requests wrote that nobody was told of.
                self.give_back(old)?;
                self.compare()?;
                Some(DirtyLog::new(END, 0)?)
            }
            None => None,
        };
        if let Some(inflight) = &self.inflight {
            inflight.set(&self.front.peer)?;
        }
        let (payload, listed) = self.memory.table(&self.mapped());
        let rams = listed.into_iter().map(|region| self.memory.ram(region));
        let fds: Vec<_> = rams.map(|ram| ram.fd()).collect();
        self.front
            .peer
            .confirm(code::SET_MEM_TABLE, &payload, &fds)?;
        let log_first = dice.bool();
        if log_first && let Some(log) = &fresh {
            self.front.set_log(log)?;
        }
        for vring in 0..self.slots.len() {
            self.stopped[vring] = None;
            self.front
                .start_vring(u16::try_from(vring)?, dice.u16(..))?;
        }
        if !log_first && let Some(log) = &fresh {
            self.front.set_log(log)?;
        }
        self.log = fresh;
        self.note("connected again");
        Ok(())
    }
}
