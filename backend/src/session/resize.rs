//! A device whose size changed.

use std::os::fd::AsFd;

use log::warn;
use rustix::net::{SendFlags, send};

use super::{Crew, Session};
use crate::proto::config_changed;
use crate::worker::Command;

/// How far the session is with telling of a new size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Resize {
    /// The workers know of it once they have come to this fence.
    fence: Option<u64>,
    /// The front end is to be told, as soon as that is allowed.
    owed: bool,
}

impl Session {
    /// The storage was asked for its size. Before the configuration space shows another one, every
    /// worker has to go by it. They are told in any case: that it is shown already says only that
    /// somebody asked twice.
    pub(super) fn resize(&mut self, crew: &dyn Crew) {
        for worker in 0..crew.count() {
            crew.send(worker, Command::Resize(self.device.id()));
        }
        self.resize.fence = Some(self.send_fence(crew));
    }

    /// The workers came to a fence.
    pub(super) fn go_on_resizing(&mut self) {
        let Some(fence) = self.resize.fence else {
            return;
        };
        if !self.epochs.all_fenced(fence) {
            return;
        }
        self.resize.fence = None;
        if self.device.publish_capacity() {
            self.resize.owed = true;
            self.tell_resized();
        }
    }

    /// Tells the front end that the configuration space changed (CONFIG_CHANGE_MSG), unless all
    /// vrings are stopped: then it must not be sent anything (*Suspended device state*), and is
    /// told when the first one starts.
    pub(super) fn tell_resized(&mut self) {
        if !self.resize.owed || self.all_stopped() {
            return;
        }
        let Some(channel) = &self.back_channel else {
            return;
        };
        let message = config_changed();
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        match send(channel.as_fd(), &message, flags) {
            Ok(sent) if sent == message.len() => self.resize.owed = false,
            Ok(_) => self.give_up_channel("it takes only parts of messages"),
            Err(error) => self.give_up_channel(&error.to_string()),
        }
    }

    /// The front end does not read its channel. What it was not told it sees when it asks.
    fn give_up_channel(&mut self, why: &str) {
        warn!(
            "{}: the front end cannot be told of the new size: {why}",
            self.device.name()
        );
        self.back_channel = None;
    }
}
