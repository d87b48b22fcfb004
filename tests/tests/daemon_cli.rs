//! The daemon as its user meets it: options, messages, signals, exit statuses.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use vmm_sys_util::tempdir::TempDir;
use vublk_tests::frontend::{FrontEnd, Kind, Options, Outcome, Peer};
use vublk_tests::guest::{Scratch, vublk_path};

/// A running daemon; killed when the test ends early.
struct Running {
    child: Child,
    log: BufReader<ChildStderr>,
}

impl Running {
    /// Starts the daemon.
    fn start(socket: &Path, args: &[&str]) -> Outcome<Running> {
        let mut child = Command::new(vublk_path()?)
            .arg(format!("--socket-path={}", socket.display()))
            .args(args)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        let log = BufReader::new(child.stderr.take().ok_or("no standard error")?);
        Ok(Running { child, log })
    }

    /// Connects as soon as it listens.
    fn connect(&mut self, socket: &Path) -> Outcome<Peer> {
        loop {
            if let Ok(peer) = Peer::connect(socket) {
                return Ok(peer);
            }
            if let Some(status) = self.child.try_wait()? {
                return Err(format!("the daemon ended: {status}").into());
            }
            std::thread::yield_now();
        }
    }

    fn signal(&self, signal: Signal) -> Outcome {
        let pid = Pid::from_child(&self.child);
        Ok(kill_process(pid, signal)?)
    }

    /// The next line of the log that has this in it.
    fn line(&mut self, text: &str) -> Outcome<String> {
        loop {
            let mut line = String::new();
            if self.log.read_line(&mut line)? == 0 {
                return Err(format!("the log ended without '{text}'").into());
            }
            if line.contains(text) {
                return Ok(line);
            }
        }
    }

    /// Waits for its end; the status and the rest of the log.
    fn ended(&mut self) -> Outcome<(Option<i32>, String)> {
        let mut rest = String::new();
        self.log.read_to_string(&mut rest)?;
        Ok((self.child.wait()?.code(), rest))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs the daemon to its end.
fn run(args: &[&str]) -> Outcome<Output> {
    Ok(Command::new(vublk_path()?)
        .args(args)
        .stdin(Stdio::null())
        .output()?)
}

/// Runs the daemon, which has to refuse and to say each of these.
fn refused(args: &[&str], says: &[&str]) -> Outcome {
    let output = run(args)?;
    let said = String::from_utf8(output.stderr)?;
    assert!(!output.status.success(), "{args:?} is taken");
    assert!(output.status.code().is_some(), "{args:?} ends by a signal");
    for text in says {
        assert!(
            said.contains(text),
            "{args:?} does not say '{text}': {said}"
        );
    }
    Ok(())
}

/// The counts of a line that SIGUSR1 logged.
fn counts(line: &str) -> Outcome<HashMap<String, u64>> {
    line.split_whitespace()
        .filter_map(|word| word.split_once('='))
        .map(|(name, count)| Ok((name.to_owned(), count.parse()?)))
        .collect()
}

#[test]
fn sigusr1_logs_what_was_done() -> Outcome {
    let scratch = Scratch::new()?;
    let image = scratch.image("disk", 1 << 20)?;
    let socket = scratch.socket("counts");
    let file = format!("--blk-file={}", image.display());
    let mut daemon = Running::start(&socket, &[&file, "--num-queues=1"])?;
    let mut front_end = FrontEnd::start(daemon.connect(&socket)?, Options::default())?;
    for sector in 0..3 {
        front_end.write(0, sector * 8, &[1; 4096])?;
    }
    assert_eq!(front_end.read(0, 0, 8192)?, vec![1; 8192]);
    assert_eq!(front_end.request(0, (Kind::Flush, 0), &[])?, 0);
    assert_eq!(front_end.request(0, (Kind::GetId, 0), &[0; 20])?, 0);
    assert_eq!(front_end.request(0, (Kind::In, 1 << 40), &[0; 512])?, 1);
    daemon.signal(Signal::USR1)?;
    let counts = counts(&daemon.line("reads=")?)?;
    for (name, expected) in [
        ("reads", 2),
        ("writes", 3),
        ("flushes", 1),
        ("get_ids", 1),
        ("discards", 0),
        ("read_bytes", 8192),
        ("written_bytes", 3 * 4096),
        ("errors", 1),
        ("broken_chains", 0),
        ("reffed", 7),
        ("parked", 0),
    ] {
        assert_eq!(counts.get(name), Some(&expected), "{name} of {counts:?}");
    }
    assert!(counts.contains_key("bounced"), "{counts:?}");
    daemon.signal(Signal::TERM)?;
    assert_eq!(daemon.ended()?.0, Some(0));
    Ok(())
}

#[test]
fn an_image_in_memory_is_told_of() -> Outcome {
    let memory = TempDir::new_in(Path::new("/dev/shm"))?;
    let image = memory.as_path().join("disk");
    fs::write(&image, vec![0; 1 << 20])?;
    let scratch = Scratch::new()?;
    let socket = scratch.socket("memory");
    let file = format!("--blk-file={}", image.display());
    let mut daemon = Running::start(&socket, &[&file])?;
    let line = daemon.line("reads are made")?;
    let expected = format!(
        "{}: memory, reads are made inline (no NOWAIT), writes inline (no NOWAIT)",
        image.display()
    );
    assert!(line.contains(&expected), "{line}");
    let mut front_end = FrontEnd::start(daemon.connect(&socket)?, Options::default())?;
    front_end.write(0, 8, &[7; 4096])?;
    assert_eq!(front_end.read(0, 8, 4096)?, vec![7; 4096]);
    assert_eq!(fs::read(&image)?.get(4096..8192), Some(&[7; 4096][..]));
    Ok(())
}

#[test]
fn signals_end_it_with_success_and_without_its_socket() -> Outcome {
    let scratch = Scratch::new()?;
    for signal in [Signal::TERM, Signal::INT] {
        let socket = scratch.socket("ends");
        let mut daemon = Running::start(&socket, &["--memory=64M"])?;
        drop(daemon.connect(&socket)?);
        daemon.signal(signal)?;
        let (status, log) = daemon.ended()?;
        assert_eq!(status, Some(0), "{log}");
        assert!(!socket.exists(), "the socket is left behind");
    }
    Ok(())
}

#[test]
fn a_second_front_end_is_told_of_in_the_log() -> Outcome {
    let scratch = Scratch::new()?;
    let socket = scratch.socket("second");
    let mut daemon = Running::start(&socket, &["--memory=64M"])?;
    let first = FrontEnd::start(daemon.connect(&socket)?, Options::default())?;
    let second = Peer::connect(&socket)?;
    daemon.line("another front end")?;
    drop(first);
    FrontEnd::start(second, Options::default())?.verify(1)
}

#[test]
fn without_options_it_serves_memory_and_says_how_to_attach_it() -> Outcome {
    let scratch = Scratch::new()?;
    // A socket's path is short; a build's folder may not be.
    let folder = scratch.socket("here");
    fs::create_dir(&folder)?;
    let mut child = Command::new(vublk_path()?)
        .current_dir(&folder)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let mut said = BufReader::new(child.stdout.take().ok_or("no standard output")?);
    let socket = folder.join("vublk.sock");
    let mut advice = String::new();
    while !advice.contains("queue_size") {
        assert_ne!(said.read_line(&mut advice)?, 0, "{advice}");
    }
    for text in [
        "memory-backend-memfd",
        "vhost-user-blk-pci",
        "vhost_user=true",
    ] {
        assert!(advice.contains(text), "{advice}");
    }
    assert!(
        advice.contains(&format!("path={}", socket.display())),
        "{advice}"
    );
    let peer = loop {
        if let Ok(peer) = Peer::connect(&socket) {
            break peer;
        }
        std::thread::yield_now();
    };
    let mut front_end = FrontEnd::start(peer, Options::default())?;
    front_end.verify(3)?;
    let capacity = front_end.peer.config(0, 8)?;
    assert_eq!(
        capacity,
        (1_u64 << 21).to_le_bytes(),
        "a gibibyte of sectors"
    );
    kill_process(Pid::from_child(&child), Signal::TERM)?;
    assert_eq!(child.wait()?.code(), Some(0));
    Ok(())
}

#[test]
fn capabilities_are_printed_whatever_else_is_said() -> Outcome {
    for args in [
        &["--print-capabilities"][..],
        &[
            "--socket-path=/nowhere/at/all",
            "--print-capabilities",
            "--no-such-option",
        ],
    ] {
        let output = run(args)?;
        assert_eq!(output.status.code(), Some(0));
        let said: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        assert_eq!(said["type"], "block");
        assert_eq!(
            said["features"],
            serde_json::json!(["read-only", "blk-file"])
        );
    }
    Ok(())
}

#[test]
fn the_capability_file_describes_the_program() -> Outcome {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../backend/share/50-vublk.json");
    let said: serde_json::Value = serde_json::from_slice(&fs::read(file)?)?;
    assert_eq!(said["type"], "block");
    assert!(
        said["binary"]
            .as_str()
            .is_some_and(|path| path.ends_with("/vublk"))
    );
    assert!(said["description"].is_string() && said["tags"].is_array());
    Ok(())
}

#[test]
fn storage_that_cannot_be_served_is_named() -> Outcome {
    let scratch = Scratch::new()?;
    let missing = scratch.file("missing");
    let folder = scratch.path().display().to_string();
    let small = scratch.image("small", 511)?;
    let dangling = scratch.file("dangling");
    symlink(&missing, &dangling)?;
    for path in [
        missing,
        PathBuf::from(&folder),
        small,
        dangling,
        PathBuf::from("/dev/null"),
    ] {
        let path = path.display().to_string();
        refused(&[&format!("--blk-file={path}")], &[&path])?;
    }
    refused(&["--blk-file="], &["blk-file"])?;
    refused(&["--memory=100T"], &["memory"])
}

#[test]
fn wrong_options_are_named() -> Outcome {
    refused(&["--memory=much"], &["--memory", "much", "512M"])?;
    refused(&["--num-queues=0"], &["--num-queues", "0"])?;
    refused(&["--workers=1000"], &["--workers", "1000"])?;
    refused(&["--cpus=100000"], &["--cpus", "100000"])?;
    refused(&["--cpus=1000", "--memory=64M"], &["CPU 1000", "--cpus"])?;
    refused(&["--serial=123456789012345678901"], &["--serial", "20"])?;
    refused(&["--block-size=1000"], &["--block-size", "1000"])?;
    refused(&["--fd=99", "--memory=64M"], &["--fd=99"])?;
    refused(&["--fd=1", "--memory=64M"], &["--fd=1"])?;
    refused(&["--fd=3", "--socket-path=/x"], &["--fd", "--socket-path"])?;
    refused(&["--memory=1G", "--null=1G"], &["--memory", "--null"])?;
    refused(
        &["--socket-path=/no/such/folder/s", "--memory=64M"],
        &["/no/such/folder/s"],
    )?;
    refused(&["disk.img"], &["disk.img"])
}

#[test]
fn a_socket_that_is_served_is_not_taken_away() -> Outcome {
    let scratch = Scratch::new()?;
    let socket = scratch.socket("live");
    let listener = UnixListener::bind(&socket)?;
    let path = socket.display().to_string();
    refused(
        &[&format!("--socket-path={path}"), "--memory=64M"],
        &[&path, "another"],
    )?;
    assert!(socket.exists());
    drop(listener);
    // What is left of a daemon that was killed is in nobody's way.
    let mut daemon = Running::start(&socket, &["--memory=64M"])?;
    FrontEnd::start(daemon.connect(&socket)?, Options::default())?.verify(5)?;
    daemon.signal(Signal::TERM)?;
    assert_eq!(daemon.ended()?.0, Some(0));
    Ok(())
}
