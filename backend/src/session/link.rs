//! A session and the socket it is held over.

use std::fmt;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::{Level, debug, log};

use super::chatter::{Causes, Chatter};
use super::{Crew, Epochs, Session, Step, Wait};
use crate::blk::BlkDevice;
use crate::proto::{Answer, Code, Connection, ConnectionError, Header, Message, RawMessage, Reply};
use crate::worker::{Report, StopMode};
use vhost::vhost_user::message::FrontendReq;

/// Messages handled before other sockets and signals get their turn.
const MESSAGES_PER_TURN: usize = 32;

/// A front end's session over its socket.
#[derive(Debug)]
pub struct Link {
    name: String,
    session: Session,
    /// None once the session has ended and the socket was taken to be closed.
    connection: Option<Connection>,
    phase: Phase,
    chatter: Chatter,
}

/// What outlives a link: how far the workers are, and how much its front ends may still log.
/// A front end that comes back again and again must not fill the log either.
#[derive(Debug)]
pub struct Remains {
    epochs: Epochs,
    chatter: Chatter,
}

impl Remains {
    /// Before the first front end.
    #[must_use]
    pub fn new(workers: usize) -> Remains {
        Remains {
            epochs: Epochs::new(workers),
            chatter: Chatter::new(Instant::now()),
        }
    }
}

/// What the owner of the event loop should watch the socket for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wants {
    /// Messages, and the front end's leaving.
    Messages,
    /// The front end's leaving only: a message waits for the workers.
    HangUp,
    /// Nothing more: the socket can be closed.
    Nothing,
}

/// How far the link is.
#[derive(Debug)]
enum Phase {
    /// Messages are read.
    Reading,
    /// A message waits for the workers, and no other is read before it is answered.
    Pending {
        header: Header,
        wait: Wait,
        since: Instant,
    },
    /// The session has ended; its requests come back.
    Ending { since: Instant, mode: StopMode },
}

impl Link {
    /// A new session over a connected socket.
    #[must_use]
    pub fn new(connection: Connection, device: Arc<BlkDevice>, remains: Remains) -> Link {
        let Remains { epochs, chatter } = remains;
        let mut link = Link {
            name: device.name(),
            session: Session::new(device, epochs),
            connection: Some(connection),
            phase: Phase::Reading,
            chatter,
        };
        link.say(Level::Info, format_args!("a front end connected"));
        link
    }

    /// The socket, while there is one.
    #[must_use]
    pub fn socket(&self) -> Option<RawFd> {
        self.connection.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// What to watch the socket for.
    #[must_use]
    pub fn wants(&self) -> Wants {
        match self.phase {
            Phase::Reading => Wants::Messages,
            Phase::Pending { .. } => Wants::HangUp,
            // What is drained is still published and called for: a front end that took the end of
            // the connection for the end of that would do the same requests again.
            Phase::Ending {
                mode: StopMode::Drain,
                ..
            } if !self.session.all_stopped() => Wants::HangUp,
            Phase::Ending { .. } => Wants::Nothing,
        }
    }

    /// Reads and handles the messages that are there, as many as fit one turn.
    pub fn readable(&mut self, crew: &dyn Crew) {
        for _ in 0..MESSAGES_PER_TURN {
            let Phase::Reading = self.phase else { return };
            let Some(connection) = &mut self.connection else {
                return;
            };
            let handled = match connection.receive() {
                Ok(Some(message)) => self.handle(message, crew),
                Ok(None) => return,
                Err(error) => Err(error),
            };
            if let Err(error) = handled {
                self.over(&error, crew);
            }
        }
    }

    /// The front end has left, whatever it was waiting for.
    pub fn hung_up(&mut self, crew: &dyn Crew) {
        self.over(&ConnectionError::HungUp, crew);
        self.end(StopMode::Abandon, crew);
    }

    /// Takes a worker's report, and answers the message it was missing for.
    pub fn reported(&mut self, worker: usize, report: Report, crew: &dyn Crew) {
        if let Report::Broken(id) = report {
            let index = id.index;
            self.say(
                Level::Warn,
                format_args!("vring {index} is broken and no longer served"),
            );
        }
        self.session.reported(worker, report, crew);
        let Phase::Pending { header, wait, .. } = self.phase else {
            return;
        };
        if let Some(settled) = self.session.settle(wait) {
            self.phase = Phase::Reading;
            let answered = match settled {
                Ok(reply) => self.answer(header, reply),
                Err(refusal) => self.refuse(header, &refusal),
            };
            if let Err(error) = answered {
                self.over(&error, crew);
            }
        }
    }

    /// Another front end knocks while this one is served.
    pub fn knocked(&mut self) {
        self.say(
            Level::Warn,
            format_args!("another front end waits until this one has left"),
        );
    }

    /// Ends the session because its memory went away, if it did.
    pub fn check_memory(&mut self, crew: &dyn Crew) {
        if self.session.poisoned() && !matches!(self.phase, Phase::Ending { .. }) {
            self.say(
                Level::Warn,
                format_args!("guest memory was truncated, the session ends"),
            );
            self.end(StopMode::Abandon, crew);
        }
    }

    /// Ends the session.
    pub fn end(&mut self, mode: StopMode, crew: &dyn Crew) {
        self.session.end(mode, crew);
        self.phase = match self.phase {
            // A drain may become an abandonment, and not the other way round.
            Phase::Ending {
                since,
                mode: StopMode::Drain,
            } => Phase::Ending { since, mode },
            Phase::Ending { .. } => return,
            Phase::Reading | Phase::Pending { .. } => Phase::Ending {
                since: Instant::now(),
                mode,
            },
        };
    }

    /// Closes the socket. Whoever watches it has to stop before.
    pub fn close(&mut self) {
        self.connection = None;
    }

    /// Whether the session has ended and nothing of it is left.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.connection.is_none() && self.session.is_over()
    }

    /// What a link that is over leaves for the next one.
    #[must_use]
    pub fn into_remains(mut self) -> Remains {
        self.say(Level::Info, format_args!("the front end's session is over"));
        Remains {
            epochs: self.session.into_epochs(),
            chatter: self.chatter,
        }
    }

    /// What the link waits for and for how long, if it waits.
    #[must_use]
    pub fn waits_for(&self) -> Option<(Duration, String)> {
        match self.phase {
            Phase::Reading => None,
            Phase::Pending {
                header,
                wait,
                since,
            } => {
                let text = format!("{} waits for {}", header.code, self.session.missing(wait));
                Some((since.elapsed(), text))
            }
            Phase::Ending { since, .. } => {
                let text = format!("the end waits for {}", self.session.leftovers());
                Some((since.elapsed(), text))
            }
        }
    }

    fn handle(&mut self, message: RawMessage, crew: &dyn Crew) -> Result<(), ConnectionError> {
        let RawMessage {
            header,
            payload,
            fds,
        } = message;
        debug!("{}: {}, {} descriptors", self.name, header.code, fds.len());
        let step = Message::decode(header.code, &payload, fds)
            .map_err(super::Refusal::from)
            .and_then(|message| self.session.handle(header.code, message, crew));
        match step {
            Ok(Step::Done(reply)) => self.answer(header, reply),
            Ok(Step::Wait(wait)) => {
                match self.session.settle(wait) {
                    Some(Ok(reply)) => return self.answer(header, reply),
                    Some(Err(refusal)) => return self.refuse(header, &refusal),
                    None => {
                        self.phase = Phase::Pending {
                            header,
                            wait,
                            since: Instant::now(),
                        }
                    }
                }
                Ok(())
            }
            Err(refusal) => self.refuse(header, &refusal),
        }
    }

    /// Sends a message's own reply, or the acknowledgement it asked for.
    fn answer(&self, header: Header, reply: Option<Reply>) -> Result<(), ConnectionError> {
        match reply.or_else(|| self.owes_ack(header).then_some(Reply::ACK)) {
            Some(reply) => self.send(header, &reply),
            None => Ok(()),
        }
    }

    /// Says no, in the form the message has for it. One that has none leaves its sender waiting
    /// for a reply that cannot come, and only the end of the connection tells it so.
    fn refuse(&mut self, header: Header, why: &super::Refusal) -> Result<(), ConnectionError> {
        let causes = Causes(why);
        self.say(
            Level::Warn,
            format_args!("{} is refused: {causes}", header.code),
        );
        match header.code.answer() {
            Answer::Config => self.send(header, &Reply::ConfigError),
            Answer::Status if header.code == Code::of(FrontendReq::SET_DEVICE_STATE_FD) => {
                self.send(header, &Reply::NO_TRANSFER)
            }
            Answer::Status => self.send(header, &Reply::NACK),
            Answer::Ack if self.owes_ack(header) => self.send(header, &Reply::NACK),
            Answer::Ack if why.ends_connection() => Err(ConnectionError::Unanswerable(header.code)),
            Answer::Ack => Ok(()),
            Answer::Value => Err(ConnectionError::Unanswerable(header.code)),
        }
    }

    fn owes_ack(&self, header: Header) -> bool {
        header.need_reply && self.session.negotiation.reply_ack()
    }

    fn send(&self, header: Header, reply: &Reply) -> Result<(), ConnectionError> {
        match &self.connection {
            Some(connection) => {
                let file = self.session.file_for(reply);
                connection.send(&reply.encode(header.code), file)
            }
            None => Ok(()),
        }
    }

    /// Ends the session because its connection is over.
    fn over(&mut self, why: &ConnectionError, crew: &dyn Crew) {
        if matches!(self.phase, Phase::Ending { .. }) {
            return;
        }
        let causes = Causes(why);
        match why {
            ConnectionError::HungUp => self.say(Level::Info, format_args!("{causes}")),
            ConnectionError::Torn
            | ConnectionError::Stream(_)
            | ConnectionError::StrayDescriptors
            | ConnectionError::TooManyDescriptors
            | ConnectionError::Stuck
            | ConnectionError::Unanswerable(_)
            | ConnectionError::Io(_) => {
                self.say(
                    Level::Warn,
                    format_args!("the connection is closed: {causes}"),
                );
            }
        }
        self.end(StopMode::Abandon, crew);
    }

    /// Logs a line about this front end, if it has not caused too many already.
    fn say(&mut self, level: Level, line: fmt::Arguments<'_>) {
        match self.chatter.line(Instant::now()) {
            Some(0) => log!(level, "{}: {line}", self.name),
            Some(held_back) => log!(level, "{}: {line} ({held_back} lines left out)", self.name),
            None => {}
        }
    }
}
