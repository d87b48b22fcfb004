//! One socket and the front ends that come to it.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events};
use log::error;

use super::listen::{Listen, ListenError, Socket};
use crate::blk::BlkDevice;
use crate::proto::Connection;
use crate::session::{Crew, Link, Remains, Wants};
use crate::worker::{Command, Outcome, Report, StopMode};

/// A device, the socket it is served on, and its front end.
#[derive(Debug)]
pub(super) struct Port {
    device: Arc<BlkDevice>,
    door: Door,
    link: Option<Link>,
    /// What the last link left, while there is none.
    remains: Option<Remains>,
    /// What of the link's socket is watched now.
    watched: Watched,
    /// The last front end that knocked could not be accepted.
    refused: bool,
}

/// Where the next front end comes from.
#[derive(Debug)]
enum Door {
    /// From a listener, which is watched for all the time.
    Open(Socket),
    /// From nowhere: the only front end there would be has come, or the daemon leaves.
    Shut,
}

/// What of the link's socket the event loop watches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Watched {
    fd: Option<RawFd>,
    wants: Wants,
}

/// Which socket of a port an event is for; travels as the event's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// The listener.
    Door,
    /// The front end's socket.
    Link,
}

impl Port {
    pub(super) fn open(
        listen: Listen,
        device: Arc<BlkDevice>,
        workers: usize,
    ) -> Result<Port, ListenError> {
        Ok(Port {
            device,
            door: Door::Open(Socket::open(listen)?),
            link: None,
            remains: Some(Remains::new(workers)),
            watched: Watched {
                fd: None,
                wants: Wants::Nothing,
            },
            refused: false,
        })
    }

    pub(super) fn device(&self) -> &Arc<BlkDevice> {
        &self.device
    }

    /// Whether no front end is served, and none will come.
    pub(super) fn is_done(&self) -> bool {
        self.link.is_none() && matches!(self.door, Door::Shut)
    }

    /// Begins to serve: watches the listener, or takes the connected front end.
    pub(super) fn start(
        &mut self,
        place: u32,
        ops: &mut EventOps<'_>,
    ) -> Result<(), event_manager::Error> {
        match std::mem::replace(&mut self.door, Door::Shut) {
            Door::Open(Socket::Connected(stream)) => {
                self.attach(Connection::new(stream));
                self.watch_link(place, ops)
            }
            Door::Open(Socket::Listening(listener, path)) => {
                let events = Events::with_data(&listener, data(place, Side::Door), EventSet::IN);
                self.door = Door::Open(Socket::Listening(listener, path));
                ops.add(events)
            }
            Door::Shut => Ok(()),
        }
    }

    /// A front end knocks. One is served at a time; the others wait in the listener's backlog.
    pub(super) fn knocked(&mut self, place: u32, crew: &dyn Crew, ops: &mut EventOps<'_>) {
        let Door::Open(Socket::Listening(listener, _)) = &self.door else {
            return;
        };
        if let Some(link) = &mut self.link {
            link.knocked();
            return;
        }
        match listener.accept() {
            Ok((stream, _)) => {
                self.attach(Connection::new(stream));
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return,
            Err(error) => {
                let name = self.device.name();
                error!("{name}: a front end cannot be accepted until another knocks: {error}");
                // Level-triggered it would be tried, and said, without end.
                if !std::mem::replace(&mut self.refused, true) {
                    self.watch_door(place, EDGES, ops);
                }
                return;
            }
        }
        self.refused = false;
        // While this one is served a knock is only logged. Edge-triggered, it is seen once.
        self.watch_door(place, EDGES, ops);
        self.refresh(place, crew, ops);
    }

    /// The front end's socket has something.
    pub(super) fn ready(
        &mut self,
        place: u32,
        set: EventSet,
        crew: &dyn Crew,
        ops: &mut EventOps<'_>,
    ) {
        let Some(link) = &mut self.link else { return };
        match link.wants() {
            // A front end that left may have sent messages before: they are read first.
            Wants::Messages => link.readable(crew),
            Wants::HangUp if set.intersects(GONE) => link.hung_up(crew),
            Wants::HangUp | Wants::Nothing => {}
        }
        self.refresh(place, crew, ops);
    }

    /// A worker reported.
    pub(super) fn reported(
        &mut self,
        place: u32,
        (worker, report): (usize, Report),
        crew: &dyn Crew,
        ops: &mut EventOps<'_>,
    ) {
        if let Some(link) = &mut self.link {
            link.reported(worker, report, crew);
            self.refresh(place, crew, ops);
        } else if matches!(report, Report::Helper(_, Outcome::Refreshed)) {
            self.resize(crew);
        }
    }

    /// The device's size changed while nobody uses it. The workers hear of it before they hear of
    /// the next vring.
    fn resize(&self, crew: &dyn Crew) {
        for worker in 0..crew.count() {
            crew.send(worker, Command::Resize(self.device.id()));
        }
        self.device.publish_capacity();
    }

    /// Guest memory of some front end went away.
    pub(super) fn check_memory(&mut self, place: u32, crew: &dyn Crew, ops: &mut EventOps<'_>) {
        if let Some(link) = &mut self.link {
            link.check_memory(crew);
            self.refresh(place, crew, ops);
        }
    }

    /// Takes no more front ends, and lets the one there is finish what is in flight.
    pub(super) fn drain(&mut self, place: u32, crew: &dyn Crew, ops: &mut EventOps<'_>) {
        if let Door::Open(Socket::Listening(listener, _)) = &self.door {
            self.forget(listener.as_raw_fd(), ops);
        }
        self.door = Door::Shut;
        if let Some(link) = &mut self.link {
            link.end(StopMode::Drain, crew);
            self.refresh(place, crew, ops);
        }
    }

    /// What the front end's session waits for, if it waits.
    pub(super) fn waits_for(&self) -> Option<(Duration, String)> {
        self.link.as_ref().and_then(Link::waits_for)
    }

    fn attach(&mut self, connection: Connection) {
        let Some(remains) = self.remains.take() else {
            return;
        };
        self.link = Some(Link::new(connection, self.device.clone(), remains));
    }

    /// Watches what the link wants now, and lets go of a link that is over.
    fn refresh(&mut self, place: u32, crew: &dyn Crew, ops: &mut EventOps<'_>) {
        if let Err(error) = self.watch_link(place, ops) {
            let name = self.device.name();
            error!("{name}: the front end's socket cannot be watched: {error}");
            // Nothing more would be heard of it, so it ends here.
            if let Some(link) = &mut self.link {
                link.end(StopMode::Abandon, crew);
                link.close();
            }
            self.watched = Watched {
                fd: None,
                wants: Wants::Nothing,
            };
        }
        let Some(link) = self.link.take_if(|link| link.is_over()) else {
            return;
        };
        self.remains = Some(link.into_remains());
        // The session may have ended before it could tell of a size that came with its end.
        if self.device.is_resized() {
            self.resize(crew);
        }
        self.watch_door(place, EventSet::IN, ops);
    }

    fn watch_link(
        &mut self,
        place: u32,
        ops: &mut EventOps<'_>,
    ) -> Result<(), event_manager::Error> {
        let Some(link) = &mut self.link else {
            return Ok(());
        };
        let now = Watched {
            fd: link.socket(),
            wants: link.wants(),
        };
        if now == self.watched {
            return Ok(());
        }
        let set = match now.wants {
            Wants::Messages => EventSet::IN | EventSet::READ_HANG_UP,
            Wants::HangUp => EventSet::READ_HANG_UP,
            Wants::Nothing => {
                // The socket leaves the event loop before it is closed and its number used again.
                if let Some(fd) = self.watched.fd {
                    remove(fd, &self.device, ops);
                }
                link.close();
                self.watched = Watched {
                    fd: None,
                    wants: Wants::Nothing,
                };
                return Ok(());
            }
        };
        let Some(fd) = now.fd else { return Ok(()) };
        let events = Events::with_data_raw(fd, data(place, Side::Link), set);
        let known = self.watched.fd == Some(fd);
        let watched = if known {
            ops.modify(events)
        } else {
            ops.add(events)
        };
        self.watched = now;
        watched
    }

    fn watch_door(&self, place: u32, set: EventSet, ops: &EventOps<'_>) {
        let Door::Open(Socket::Listening(listener, _)) = &self.door else {
            return;
        };
        let events = Events::with_data(listener, data(place, Side::Door), set);
        if let Err(error) = ops.modify(events) {
            error!(
                "{}: the listener cannot be watched: {error}",
                self.device.name()
            );
        }
    }

    fn forget(&self, fd: RawFd, ops: &mut EventOps<'_>) {
        remove(fd, &self.device, ops);
    }
}

/// A knock is seen once, whether it is answered or not.
const EDGES: EventSet = EventSet::IN.union(EventSet::EDGE_TRIGGERED);

/// What says that a front end left.
const GONE: EventSet = EventSet::READ_HANG_UP
    .union(EventSet::HANG_UP)
    .union(EventSet::ERROR);

fn remove(fd: RawFd, device: &BlkDevice, ops: &mut EventOps<'_>) {
    if let Err(error) = ops.remove(Events::empty_raw(fd)) {
        error!("{}: a socket cannot be forgotten: {error}", device.name());
    }
}

/// The data of an event of the port at `place`.
fn data(place: u32, side: Side) -> u32 {
    let side = match side {
        Side::Door => 0,
        Side::Link => 1,
    };
    PORTS + place * 2 + side
}

/// The data of the first port's events; below it are those of the daemon itself.
pub(super) const PORTS: u32 = 16;

/// Which port and side an event is for.
pub(super) fn side(data: u32) -> Option<(u32, Side)> {
    let data = data.checked_sub(PORTS)?;
    Some((
        data / 2,
        if data % 2 == 0 {
            Side::Door
        } else {
            Side::Link
        },
    ))
}
