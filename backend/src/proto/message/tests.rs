use std::fs::File;

use proptest::prelude::*;

use super::*;

fn fds(count: usize) -> Vec<OwnedFd> {
    (0..count)
        .map(|_| File::open("/dev/null").unwrap().into())
        .collect()
}

fn words(values: &[u64]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_ne_bytes())
        .collect()
}

fn halves(values: &[u32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_ne_bytes())
        .collect()
}

fn decode(request: FrontendReq, payload: &[u8], fds: Vec<OwnedFd>) -> Result<Message, Malformed> {
    Message::decode(Code::of(request), payload, fds)
}

fn table(count: u32, regions: &[[u64; 4]]) -> Vec<u8> {
    let mut payload = halves(&[count, 0]);
    regions
        .iter()
        .for_each(|region| payload.extend(words(region)));
    payload
}

#[test]
fn a_memory_table_takes_a_descriptor_for_each_region_in_order() {
    let payload = table(2, &[[0, 4096, 0x7000, 0], [4096, 8192, 0x9000, 4096]]);
    let Ok(Message::SetMemTable(regions)) = decode(FrontendReq::SET_MEM_TABLE, &payload, fds(2))
    else {
        panic!("not a table");
    };
    let second = RegionMessage {
        guest_addr: 4096,
        size: 8192,
        front_end_addr: 0x9000,
        mmap_offset: 4096,
    };
    assert_eq!(regions[1].0, second);
}

#[test]
fn a_memory_table_is_taken_at_the_limit_of_descriptors_and_refused_one_beyond() {
    let region = |place: usize| {
        let address = u64::try_from(place).unwrap() * 4096;
        [address, 4096, address, 0]
    };
    let full: Vec<_> = (0..MAX_MESSAGE_FDS).map(region).collect();
    let count = u32::try_from(MAX_MESSAGE_FDS).unwrap();
    let taken = decode(
        FrontendReq::SET_MEM_TABLE,
        &table(count, &full),
        fds(MAX_MESSAGE_FDS),
    );
    assert!(matches!(taken, Ok(Message::SetMemTable(regions)) if regions.len() == 8));

    let beyond: Vec<_> = (0..=MAX_MESSAGE_FDS).map(region).collect();
    let refused = decode(
        FrontendReq::SET_MEM_TABLE,
        &table(count + 1, &beyond),
        fds(8),
    );
    assert_eq!(refused.unwrap_err(), Malformed::Regions(count + 1));
}

#[test]
fn a_memory_table_whose_parts_do_not_agree_is_refused() {
    let one = [[0, 4096, 0x7000, 0]];
    let refuse = |payload: &[u8], count| {
        decode(FrontendReq::SET_MEM_TABLE, payload, fds(count)).unwrap_err()
    };
    assert_eq!(
        refuse(&table(1, &one), 0),
        Malformed::Descriptors { want: 1, got: 0 }
    );
    assert_eq!(
        refuse(&table(1, &one), 2),
        Malformed::Descriptors { want: 1, got: 2 }
    );
    assert_eq!(
        refuse(&table(2, &one), 2),
        Malformed::PayloadSize { want: 64, got: 32 }
    );
    assert_eq!(
        refuse(&table(0, &one), 0),
        Malformed::PayloadSize { want: 0, got: 32 }
    );
    assert_eq!(
        refuse(&table(u32::MAX, &one), 1),
        Malformed::Regions(u32::MAX)
    );
    assert_eq!(
        refuse(&table(1, &[[0, 0, 0x7000, 0]]), 1),
        Malformed::Region(0)
    );
    let wraps = [u64::MAX - 100, 4096, 0x7000, 0];
    assert_eq!(refuse(&table(2, &[one[0], wraps]), 2), Malformed::Region(1));
    assert_eq!(
        refuse(&[1, 2, 3], 1),
        Malformed::PayloadSize { want: 8, got: 3 }
    );
}

#[test]
fn a_vring_file_comes_exactly_when_its_message_says_so() {
    let decode =
        |value: u64, count| decode(FrontendReq::SET_VRING_KICK, &words(&[value]), fds(count));
    assert!(matches!(
        decode(255, 1),
        Ok(Message::SetVringKick {
            index: 255,
            fd: Some(_)
        })
    ));
    assert!(matches!(
        decode(0x1ff, 0),
        Ok(Message::SetVringKick {
            index: 255,
            fd: None
        })
    ));
    assert_eq!(
        decode(0, 0).unwrap_err(),
        Malformed::Descriptors { want: 1, got: 0 }
    );
    assert_eq!(
        decode(0, 2).unwrap_err(),
        Malformed::Descriptors { want: 1, got: 2 }
    );
    assert_eq!(
        decode(0x100, 1).unwrap_err(),
        Malformed::Descriptors { want: 0, got: 1 }
    );
}

#[test]
fn a_vring_whose_parts_are_not_aligned_is_refused() {
    let message = |desc: u64, used: u64, avail: u64, flags: u32| {
        let payload = [halves(&[1, flags]), words(&[desc, used, avail, 77])].concat();
        decode(FrontendReq::SET_VRING_ADDR, &payload, Vec::new())
    };
    let Ok(Message::SetVringAddr {
        index,
        addresses,
        log_used,
        log_addr,
    }) = message(0x1000, 0x2004, 0x3002, 1)
    else {
        panic!("not an address");
    };
    assert_eq!((index, log_used, log_addr), (1, true, 77));
    assert_eq!(
        addresses,
        Addresses {
            desc: 0x1000,
            avail: 0x3002,
            used: 0x2004
        }
    );
    for refused in [
        message(0x1008, 0x2004, 0x3002, 0),
        message(0x1000, 0x2002, 0x3002, 0),
        message(0x1000, 0x2004, 0x3001, 0),
        message(0x1000, 0x2004, 0x3002, 2),
    ] {
        assert_eq!(refused.unwrap_err(), Malformed::VringAddr);
    }
}

#[test]
fn config_is_read_with_and_without_room_for_the_answer() {
    let bare = halves(&[0, 60, 1]);
    let padded = [bare.clone(), vec![0; 60]].concat();
    for payload in [bare, padded] {
        let read = decode(FrontendReq::GET_CONFIG, &payload, Vec::new());
        let want = ConfigRange {
            offset: 0,
            size: 60,
            flags: 1,
        };
        assert!(matches!(read, Ok(Message::GetConfig(range)) if range == want));
    }
    let write = decode(
        FrontendReq::SET_CONFIG,
        &[halves(&[32, 1, 0]), vec![1]].concat(),
        vec![],
    );
    assert!(matches!(write, Ok(Message::SetConfig(_, bytes)) if bytes == [1]));
    let short = decode(FrontendReq::SET_CONFIG, &halves(&[32, 1, 0]), Vec::new());
    assert_eq!(
        short.unwrap_err(),
        Malformed::PayloadSize { want: 1, got: 0 }
    );
}

#[test]
fn a_removal_may_carry_a_descriptor_and_an_addition_must() {
    let payload = words(&[0, 4096, 4096, 0x7000, 0]);
    let removal = |count| decode(FrontendReq::REM_MEM_REG, &payload, fds(count));
    assert!(matches!(removal(0), Ok(Message::RemMemReg(_))));
    assert!(matches!(removal(1), Ok(Message::RemMemReg(_))));
    let addition = |count| decode(FrontendReq::ADD_MEM_REG, &payload, fds(count));
    assert!(matches!(addition(1), Ok(Message::AddMemReg(_, _))));
    assert_eq!(
        addition(0).unwrap_err(),
        Malformed::Descriptors { want: 1, got: 0 }
    );
}

#[test]
fn unknown_and_unoffered_messages_are_told_apart() {
    let refuse = |code| Message::decode(Code(code), &[], Vec::new()).unwrap_err();
    assert_eq!(refuse(0), Malformed::Unknown);
    assert_eq!(refuse(46), Malformed::Unknown);
    for request in [FrontendReq::POSTCOPY_ADVISE, FrontendReq::GPU_SET_SOCKET] {
        assert_eq!(refuse(Code::of(request).0), Malformed::NotOffered);
    }
}

proptest! {
    /// Whatever comes, decoding says yes or no, and never keeps a descriptor it does not need.
    #[test]
    fn any_bytes_decode_or_are_refused(
        code in prop_oneof![0_u32..50, any::<u32>()],
        payload in proptest::collection::vec(any::<u8>(), 0..300),
        count in 0_usize..4,
    ) {
        let decoded = Message::decode(Code(code), &payload, fds(count));
        if let Ok(Message::SetMemTable(regions)) = decoded {
            prop_assert_eq!(regions.len(), count);
        }
    }
}
