use std::fs::File;
use std::io::{Read, Write};

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::*;
use crate::proto::{Code, Reply};

fn pair() -> (UnixStream, Connection) {
    let (theirs, ours) = UnixStream::pair().unwrap();
    (theirs, Connection::new(ours))
}

fn message(code: u32, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(payload.len()).unwrap();
    let mut bytes: Vec<u8> = [code, 1, size]
        .iter()
        .flat_map(|n| n.to_ne_bytes())
        .collect();
    bytes.extend_from_slice(payload);
    bytes
}

fn send_with_fds(stream: &UnixStream, bytes: &[u8], count: usize) {
    let files: Vec<File> = (0..count)
        .map(|_| File::open("/dev/null").unwrap())
        .collect();
    let raw: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
    assert_eq!(stream.send_with_fds(&[bytes], &raw).unwrap(), bytes.len());
}

#[test]
fn a_message_may_come_byte_by_byte() {
    let (mut theirs, mut ours) = pair();
    let bytes = message(2, &7_u64.to_ne_bytes());
    let (last, before) = bytes.split_last().unwrap();
    for byte in before {
        theirs.write_all(&[*byte]).unwrap();
        assert!(ours.receive().unwrap().is_none());
    }
    theirs.write_all(&[*last]).unwrap();
    let received = ours.receive().unwrap().unwrap();
    assert_eq!(received.header.code, Code(2));
    assert_eq!(received.payload, 7_u64.to_ne_bytes());
    assert!(ours.receive().unwrap().is_none());
}

#[test]
fn descriptors_stay_with_their_message_when_several_wait() {
    let (theirs, mut ours) = pair();
    send_with_fds(&theirs, &message(12, &[0; 8]), 1);
    send_with_fds(&theirs, &message(1, &[]), 0);
    send_with_fds(&theirs, &message(5, &[0; 8]), MAX_MESSAGE_FDS);
    let counts: Vec<usize> = (0..3)
        .map(|_| ours.receive().unwrap().unwrap().fds.len())
        .collect();
    assert_eq!(counts, [1, 0, MAX_MESSAGE_FDS]);
}

#[test]
fn received_descriptors_are_close_on_exec() {
    let (theirs, mut ours) = pair();
    send_with_fds(&theirs, &message(12, &[0; 8]), 1);
    let received = ours.receive().unwrap().unwrap();
    let flags = rustix::io::fcntl_getfd(&received.fds[0]).unwrap();
    assert_eq!(flags, rustix::io::FdFlags::CLOEXEC);
}

#[test]
fn one_descriptor_too_many_ends_the_connection() {
    let (theirs, mut ours) = pair();
    send_with_fds(&theirs, &message(5, &[0; 8]), MAX_MESSAGE_FDS + 1);
    assert!(matches!(
        ours.receive(),
        Err(ConnectionError::TooManyDescriptors)
    ));
}

#[test]
fn descriptors_in_the_middle_of_a_message_end_the_connection() {
    for cut in [1, HEADER_BYTES, HEADER_BYTES + 3] {
        let (mut theirs, mut ours) = pair();
        let bytes = message(12, &[0; 8]);
        theirs.write_all(&bytes[..cut]).unwrap();
        assert!(ours.receive().unwrap().is_none());
        send_with_fds(&theirs, &bytes[cut..], 1);
        assert!(
            matches!(ours.receive(), Err(ConnectionError::StrayDescriptors)),
            "{cut}"
        );
    }
}

#[test]
fn leaving_between_messages_is_told_from_leaving_inside_one() {
    let (theirs, mut ours) = pair();
    drop(theirs);
    assert!(matches!(ours.receive(), Err(ConnectionError::HungUp)));
    for cut in [1, HEADER_BYTES, HEADER_BYTES + 3] {
        let (mut theirs, mut ours) = pair();
        theirs.write_all(&message(12, &[0; 8])[..cut]).unwrap();
        drop(theirs);
        assert!(
            matches!(ours.receive(), Err(ConnectionError::Torn)),
            "{cut}"
        );
    }
}

#[test]
fn a_payload_that_is_too_long_is_refused_before_it_is_read() {
    let (mut theirs, mut ours) = pair();
    let header: Vec<u8> = [24_u32, 1, 1 << 30]
        .iter()
        .flat_map(|n| n.to_ne_bytes())
        .collect();
    theirs.write_all(&header).unwrap();
    assert!(matches!(
        ours.receive(),
        Err(ConnectionError::Stream(StreamFault::TooLong { .. }))
    ));
    assert!(ours.payload.is_empty());
}

#[test]
fn a_front_end_that_does_not_read_is_stuck_and_one_that_left_has_hung_up() {
    let (mut theirs, ours) = pair();
    let reply = Reply::ACK.encode(Code(2));
    ours.send(&reply, None).unwrap();
    let mut back = vec![0; reply.len()];
    theirs.read_exact(&mut back).unwrap();
    assert_eq!(back, reply);

    let error = loop {
        if let Err(error) = ours.send(&reply, None) {
            break error;
        }
    };
    assert!(matches!(error, ConnectionError::Stuck), "{error}");
    drop(theirs);
    assert!(matches!(
        ours.send(&reply, None),
        Err(ConnectionError::HungUp)
    ));
}
