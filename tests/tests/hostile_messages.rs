//! Messages that are wrong in every way: each is refused or ends its connection, and the same
//! daemon then serves a front end that behaves.

use std::os::fd::{AsFd, BorrowedFd};

use vublk_tests::frontend::{
    CODES, FrontEnd, NEED_REPLY, Options, Outcome, Peer, PeerError, Served, VERSION, code, words,
};

/// What a front end does, and what becomes of its connection.
type Case = (&'static str, fn(&Peer) -> Result<(), PeerError>, End);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Closed,
    Open,
}

fn header(code: u32, flags: u32, size: u32) -> Vec<u8> {
    words(&[code, flags, size])
}

const CASES: &[Case] = &[
    ("version 0", |p| p.send(1, 0, &[], &[]), End::Closed),
    ("version 2", |p| p.send(1, 2, &[], &[]), End::Closed),
    ("version 3", |p| p.send(1, 3, &[], &[]), End::Closed),
    ("a reply", |p| p.send(1, VERSION | 4, &[], &[]), End::Closed),
    (
        "4097 bytes",
        |p| p.send_bytes(&header(24, VERSION, 4097), &[]),
        End::Closed,
    ),
    (
        "4 GiB",
        |p| p.send_bytes(&header(24, VERSION, u32::MAX), &[]),
        End::Closed,
    ),
    (
        "4096 bytes",
        |p| p.send(24, VERSION, &[0; 4096], &[]),
        End::Open,
    ),
    (
        "reserved flags",
        |p| p.send(3, VERSION | 0xffff_fff0, &[], &[]),
        End::Open,
    ),
    ("code 0", |p| p.tell(0, &[], &[]), End::Open),
    ("code 46", |p| p.tell(46, &[1, 2, 3], &[]), End::Open),
    (
        "the largest code",
        |p| p.tell(u32::MAX, &[0; 64], &[]),
        End::Open,
    ),
    (
        "a short number",
        |p| p.tell(code::SET_FEATURES, &[0; 7], &[]),
        End::Open,
    ),
    (
        "a long number",
        |p| p.tell(code::SET_FEATURES, &[0; 9], &[]),
        End::Open,
    ),
    (
        "a question with a payload",
        |p| p.tell(code::GET_FEATURES, &[0; 8], &[]),
        End::Closed,
    ),
    (
        "a table without its regions",
        |p| p.tell(5, &words(&[1, 0]), &[]),
        End::Open,
    ),
    (
        "a table of too many",
        |p| p.tell(5, &words(&[u32::MAX, 0]), &[]),
        End::Open,
    ),
    (
        "a kick without its descriptor",
        |p| p.tell(12, &[0; 8], &[]),
        End::Open,
    ),
    (
        "a kick of no vring",
        |p| p.tell(8, &words(&[u32::MAX, 8]), &[]),
        End::Open,
    ),
    (
        "the base of no vring",
        |p| p.tell(11, &words(&[256, 0]), &[]),
        End::Closed,
    ),
    (
        "the base of half a vring",
        |p| p.tell(11, &[0; 4], &[]),
        End::Closed,
    ),
    (
        "a vring that is not aligned",
        |p| p.tell(9, &[1; 40], &[]),
        End::Open,
    ),
    (
        "inflight without its feature",
        |p| p.tell(31, &[0; 24], &[]),
        End::Closed,
    ),
    (
        "a log without its feature",
        |p| p.tell(6, &[0; 16], &[]),
        End::Closed,
    ),
    ("postcopy", |p| p.tell(29, &[], &[]), End::Open),
    ("a device state", |p| p.tell(43, &[], &[]), End::Open),
];

/// Says whether the connection is still open, having read whatever was answered.
fn end_of(peer: &Peer) -> Outcome<End> {
    if let Err(PeerError::Gone) = peer.tell(code::GET_FEATURES, &[], &[]) {
        return Ok(End::Closed);
    }
    loop {
        match peer.reply() {
            Ok(answer) if answer.code == code::GET_FEATURES => return Ok(End::Open),
            Ok(_) => {}
            Err(PeerError::Gone) => return Ok(End::Closed),
            Err(error) => return Err(error.into()),
        }
    }
}

fn behaves_next(served: &Served, seed: u64) -> Outcome {
    FrontEnd::start(served.connect()?, Options::default())?.verify(seed)
}

#[test]
fn every_wrong_message_is_refused_or_ends_its_connection() -> Outcome {
    let served = Served::start()?;
    for (seed, (name, misbehave, end)) in (0..).zip(CASES) {
        let peer = served.connect()?;
        misbehave(&peer)?;
        assert_eq!(end_of(&peer)?, *end, "{name}");
        drop(peer);
        behaves_next(&served, seed)?;
    }
    served.stop()
}

#[test]
fn every_message_is_survived_with_any_payload_and_descriptors() -> Outcome {
    let served = Served::start()?;
    let null = std::fs::File::open("/dev/null")?;
    let mut random = fastrand::Rng::with_seed(0x7e57);
    for code in CODES.chain([0, 46, 99]) {
        for size in [0_usize, 4, 8, 12, 16, 40, 72, 100] {
            let peer = served.connect()?;
            if random.bool() {
                // Everything that is offered is negotiated, so that nothing is refused early.
                let all = peer.ask_number(code::GET_PROTOCOL_FEATURES)?.to_ne_bytes();
                peer.confirm(code::SET_PROTOCOL_FEATURES, &all, &[])?;
            }
            let payload: Vec<u8> = (0..size).map(|_| random.u8(..)).collect();
            let fds: Vec<BorrowedFd<'_>> = (0..random.usize(0..9)).map(|_| null.as_fd()).collect();
            match peer.send(code, VERSION | NEED_REPLY, &payload, &fds) {
                Ok(()) | Err(PeerError::Gone) => {}
                Err(error) => return Err(error.into()),
            }
            end_of(&peer)?;
        }
    }
    behaves_next(&served, 50)?;
    served.stop()
}

#[test]
fn a_message_torn_at_any_byte_is_survived() -> Outcome {
    let served = Served::start()?;
    let mut message = header(code::SET_VRING_NUM, VERSION, 8);
    message.extend(words(&[0, 16]));
    for cut in 1..message.len() {
        let peer = served.connect()?;
        let (head, _) = message.split_at(cut);
        peer.send_bytes(head, &[])?;
        drop(peer);
    }
    behaves_next(&served, 51)?;
    served.stop()
}

#[test]
fn a_message_sent_byte_by_byte_is_a_message() -> Outcome {
    let served = Served::start()?;
    let peer = served.connect()?;
    for byte in header(code::GET_FEATURES, VERSION, 0) {
        peer.send_bytes(&[byte], &[])?;
    }
    peer.reply_to(code::GET_FEATURES)?;
    served.stop()
}

#[test]
fn several_messages_in_one_write_are_all_answered() -> Outcome {
    let served = Served::start()?;
    let peer = served.connect()?;
    let questions = [header(code::GET_FEATURES, VERSION, 0); 1]
        .concat()
        .repeat(100);
    peer.send_bytes(&questions, &[])?;
    for _ in 0..100 {
        peer.reply_to(code::GET_FEATURES)?;
    }
    served.stop()
}

#[test]
fn descriptors_beyond_the_limit_or_in_the_wrong_place_end_the_connection() -> Outcome {
    let served = Served::start()?;
    let null = std::fs::File::open("/dev/null")?;
    let fd = null.as_fd();
    let message = [header(code::SET_VRING_NUM, VERSION, 8), words(&[0, 16])].concat();

    let peer = served.connect()?;
    peer.send_bytes(&message, &[fd; 8])?;
    assert_eq!(end_of(&peer)?, End::Open, "eight are closed unused");
    drop(peer);

    let peer = served.connect()?;
    peer.send_bytes(&message, &[fd; 9])?;
    assert_eq!(end_of(&peer)?, End::Closed, "nine are too many");
    drop(peer);

    for cut in [1, 11, 12, 13, 19] {
        let peer = served.connect()?;
        let (before, after) = message.split_at(cut);
        peer.send_bytes(before, &[])?;
        // The daemon has to read what came before, or the kernel joins the two.
        wait_until_read(&peer)?;
        match peer.send_bytes(after, &[fd]) {
            Ok(()) | Err(PeerError::Gone) => {}
            Err(error) => return Err(error.into()),
        }
        assert_eq!(end_of(&peer)?, End::Closed, "{cut}");
    }
    behaves_next(&served, 52)?;
    served.stop()
}

/// Waits until the other end has taken everything sent so far.
fn wait_until_read(peer: &Peer) -> Outcome {
    while unread(peer)? > 0 {
        std::thread::yield_now();
    }
    Ok(())
}

/// Bytes the other end has not taken yet, as the kernel counts them for the sender.
fn unread(peer: &Peer) -> Outcome<u32> {
    vublk_tests::frontend::outgoing_bytes(peer)
}

#[test]
fn features_and_rings_in_the_wrong_order_are_refused() -> Outcome {
    let served = Served::start()?;
    let front_end = FrontEnd::attach(served.connect()?, Options::default())?;
    let peer = &front_end.peer;
    let vring = &front_end.vrings[0];
    let kick = vublk::fds::borrow(&vring.kick);
    assert!(
        peer.refused(code::SET_VRING_KICK, &[0; 8], &[kick])?,
        "nothing is known of it"
    );
    peer.confirm(code::SET_VRING_ADDR, &vring.addr_payload(0), &[])?;
    assert!(
        peer.refused(code::SET_VRING_KICK, &[0; 8], &[kick])?,
        "its size is not known"
    );
    peer.confirm(code::SET_VRING_NUM, &words(&[0, 16]), &[])?;
    assert!(
        peer.refused(code::SET_VRING_KICK, &[0; 8], &[kick])?,
        "its base is not known"
    );
    peer.confirm(code::SET_VRING_BASE, &words(&[0, 0]), &[])?;
    peer.confirm(code::SET_VRING_KICK, &[0; 8], &[kick])?;
    // Started: nothing that shapes it may change.
    assert!(peer.refused(code::SET_VRING_NUM, &words(&[0, 8]), &[])?);
    assert!(peer.refused(code::SET_VRING_BASE, &words(&[0, 3]), &[])?);
    let mut moved = vring.addr_payload(0);
    moved[9] ^= 0x10;
    assert!(peer.refused(code::SET_VRING_ADDR, &moved, &[])?);
    assert!(peer.refused(code::SET_FEATURES, &(1_u64 << 30).to_ne_bytes(), &[])?);
    peer.confirm(code::SET_VRING_ENABLE, &words(&[0, 1]), &[])?;
    assert!(peer.refused(code::SET_VRING_ENABLE, &words(&[0, 2]), &[])?);
    let mut front_end = front_end;
    let call = front_end.vring(0)?.call.try_clone()?;
    front_end
        .peer
        .confirm(code::SET_VRING_CALL, &[0; 8], &[vublk::fds::borrow(&call)])?;
    front_end.verify(53)?;
    served.stop()
}
