//! Images that grow and shrink while they are served.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use rustix::process::Signal;
use vublk_tests::frontend::{FrontEnd, Kind, Options, Outcome, Program, code};
use vublk_tests::guest::{Scratch, vublk_path};

const SIZE: u64 = 4 << 20;
/// What VIRTIO_BLK_S_IOERR is.
const IOERR: u8 = 1;

const TWO: Options = Options {
    vrings: 2,
    size: 16,
    features: 0,
};

/// A daemon, its image, and the socket on which it may say something.
struct Run {
    daemon: Program,
    image: PathBuf,
    channel: UnixStream,
    theirs: UnixStream,
    _scratch: Scratch,
}

impl Run {
    fn new() -> Outcome<Run> {
        let scratch = Scratch::new()?;
        let image = scratch.image("disk", SIZE)?;
        let args = [
            format!("--blk-file={}", image.display()),
            "--num-queues=2".to_owned(),
            "--workers=2".to_owned(),
        ];
        let (socket, log) = (scratch.socket("resize"), scratch.file("log"));
        let daemon = Program::start(&vublk_path()?, &socket, &args, &[], &log)?;
        let (channel, theirs) = UnixStream::pair()?;
        channel.set_read_timeout(Some(std::time::Duration::from_secs(60)))?;
        Ok(Run {
            daemon,
            image,
            channel,
            theirs,
            _scratch: scratch,
        })
    }

    /// A front end with a back-end channel and two vrings that run.
    fn front_end(&mut self) -> Outcome<FrontEnd> {
        let front_end = FrontEnd::start(self.daemon.connect()?, TWO)?;
        let channel = [self.theirs.as_fd()];
        front_end
            .peer
            .confirm(code::SET_BACKEND_REQ_FD, &[], &channel)?;
        Ok(front_end)
    }

    /// Makes the image this large and says so to the daemon.
    fn resize(&self, bytes: u64) -> Outcome {
        File::options()
            .write(true)
            .open(&self.image)?
            .set_len(bytes)?;
        self.daemon.signal(Signal::HUP)
    }

    /// Waits for the message that says that the configuration changed, which is a header only.
    fn told(&mut self) -> Outcome {
        let mut header = [0; 12];
        self.channel.read_exact(&mut header)?;
        let words: Vec<u32> = header
            .chunks_exact(4)
            .map(|word| word.try_into().map(u32::from_ne_bytes))
            .collect::<Result<_, _>>()?;
        // CONFIG_CHANGE_MSG, version 1, no payload.
        assert_eq!(words, [2, 1, 0]);
        Ok(())
    }

    /// Whether nothing came on the channel.
    fn is_silent(&mut self) -> Outcome<bool> {
        self.channel.set_nonblocking(true)?;
        let read = self.channel.read(&mut [0; 12]);
        self.channel.set_nonblocking(false)?;
        Ok(read.is_err_and(|error| error.kind() == ErrorKind::WouldBlock))
    }
}

fn capacity(front_end: &FrontEnd) -> Outcome<u64> {
    let bytes = front_end.peer.config(0, 8)?;
    Ok(u64::from_le_bytes(bytes.as_slice().try_into()?))
}

fn outcomes(front_end: &mut FrontEnd, sector: u64) -> Outcome<Vec<u8>> {
    let mut outcomes = Vec::new();
    for vring in 0..2 {
        for kind in [Kind::Out, Kind::In] {
            outcomes.push(front_end.request(vring, (kind, sector), &[0x5a; 512])?);
        }
    }
    Ok(outcomes)
}

#[test]
fn a_disk_grows_and_shrinks_under_a_front_end_that_is_told() -> Outcome {
    let mut run = Run::new()?;
    let mut front_end = run.front_end()?;
    assert_eq!(capacity(&front_end)?, SIZE / 512);
    assert_eq!(outcomes(&mut front_end, SIZE / 512)?, [IOERR; 4]);
    run.resize(2 * SIZE)?;
    run.told()?;
    assert_eq!(capacity(&front_end)?, 2 * SIZE / 512);
    // Every vring takes what the configuration space shows.
    assert_eq!(outcomes(&mut front_end, 2 * SIZE / 512 - 1)?, [0; 4]);
    assert_eq!(outcomes(&mut front_end, 2 * SIZE / 512)?, [IOERR; 4]);
    run.daemon.says("16384 sectors", "8192")?;
    run.resize(SIZE / 2)?;
    run.told()?;
    assert_eq!(capacity(&front_end)?, SIZE / 1024);
    assert_eq!(outcomes(&mut front_end, SIZE / 1024 - 1)?, [0; 4]);
    assert_eq!(outcomes(&mut front_end, SIZE / 1024)?, [IOERR; 4]);
    assert_eq!(
        std::fs::metadata(&run.image)?.len(),
        SIZE / 2,
        "nothing was written beyond the end"
    );
    // What has not changed is not told.
    run.daemon.signal(Signal::HUP)?;
    run.resize(SIZE)?;
    run.told()?;
    front_end.peer.still_served()?;
    assert!(run.is_silent()?);
    Ok(())
}

#[test]
fn a_front_end_whose_vrings_are_stopped_is_told_when_the_first_starts() -> Outcome {
    let mut run = Run::new()?;
    let mut front_end = run.front_end()?;
    let bases = [front_end.peer.vring_base(0)?, front_end.peer.vring_base(1)?];
    run.resize(2 * SIZE)?;
    run.daemon.says("16384 sectors", "8192")?;
    assert_eq!(capacity(&front_end)?, 2 * SIZE / 512);
    assert!(run.is_silent()?);
    front_end.start_vring(1, u16::try_from(bases[1])?)?;
    run.told()?;
    front_end.start_vring(0, u16::try_from(bases[0])?)?;
    assert_eq!(outcomes(&mut front_end, 2 * SIZE / 512 - 1)?, [0; 4]);
    assert!(run.is_silent()?);
    Ok(())
}

#[test]
fn a_front_end_without_a_channel_sees_the_new_size_when_it_looks() -> Outcome {
    let mut run = Run::new()?;
    let mut front_end = FrontEnd::start(run.daemon.connect()?, TWO)?;
    run.resize(2 * SIZE)?;
    run.daemon.says("16384 sectors", "8192")?;
    assert_eq!(capacity(&front_end)?, 2 * SIZE / 512);
    assert_eq!(outcomes(&mut front_end, 2 * SIZE / 512 - 1)?, [0; 4]);
    Ok(())
}

#[test]
fn a_disk_that_grows_between_two_front_ends_is_as_large_as_it_says() -> Outcome {
    let mut run = Run::new()?;
    drop(run.front_end()?);
    run.daemon.says("session is over", "")?;
    for (grown, sectors) in [(2, "16384 sectors"), (3, "24576 sectors")] {
        run.resize(grown * SIZE)?;
        run.daemon.says(sectors, "")?;
        let mut front_end = FrontEnd::start(run.daemon.connect()?, TWO)?;
        assert_eq!(capacity(&front_end)?, grown * SIZE / 512);
        assert_eq!(outcomes(&mut front_end, grown * SIZE / 512 - 1)?, [0; 4]);
    }
    Ok(())
}

#[test]
fn a_front_end_that_does_not_read_its_channel_is_served_all_the_same() -> Outcome {
    let mut run = Run::new()?;
    let mut front_end = run.front_end()?;
    // Its socket is full before the daemon says the first word.
    run.theirs.set_nonblocking(true)?;
    while std::io::Write::write(&mut run.theirs, &[0; 4096]).is_ok() {}
    run.theirs.set_nonblocking(false)?;
    for grown in 2..6 {
        run.resize(grown * SIZE)?;
        run.daemon
            .says(&format!("{} sectors", grown * SIZE / 512), "")?;
        assert_eq!(capacity(&front_end)?, grown * SIZE / 512);
    }
    front_end.verify(7)?;
    front_end.peer.still_served()?;
    Ok(())
}
