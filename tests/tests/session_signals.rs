//! Signals, sent to the one thread that has them blocked. Alone in its process: signal masks and
//! dispositions belong to all of it.
#![expect(unsafe_code, reason = "pthread_kill is C")]

use std::os::unix::thread::JoinHandleExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread;

use blockdev::{Engine, open};
use vublk::blk::{BlkDevice, BlkOptions};
use vublk::control::{Control, Listen, Signals};
use vublk::worker::{DeviceId, PollMode, Workers, WorkersConfig};
use vublk_tests::frontend::{FrontEnd, Options, Outcome, Peer};

#[test]
fn signals_report_and_then_end_the_daemon() -> Outcome {
    let path: PathBuf =
        std::env::temp_dir().join(format!("vublk-{}-signals.sock", std::process::id()));
    let listen = Listen::Path(path.clone());
    let (ready, is_ready) = channel();
    let daemon = thread::spawn(move || -> Outcome {
        let signals = Signals::block()?;
        let options = BlkOptions {
            serial: String::new(),
            num_queues: 1,
        };
        let device = BlkDevice::new(DeviceId(0), open::memory(4 << 20, 512)?, &options)?;
        let device = Arc::new(device);
        let config = WorkersConfig {
            workers: 1,
            cpus: Vec::new(),
            engine: Engine::IoUring,
            poll: PollMode::default(),
        };
        let workers = Workers::spawn(&config, std::slice::from_ref(&device))?;
        let control = Control::new(vec![(listen, device)], workers, Some(signals), None)?;
        ready.send(())?;
        Ok(control.run()?)
    });
    is_ready.recv()?;
    let send = |signal| {
        // SAFETY: the thread is joined below and not before, so its handle is valid here.
        unsafe { libc::pthread_kill(daemon.as_pthread_t(), signal) }
    };
    let mut front_end = FrontEnd::start(Peer::connect(&path)?, Options::default())?;
    front_end.verify(1)?;
    assert_eq!(send(libc::SIGUSR1), 0);
    front_end.verify(2)?;
    assert_eq!(send(libc::SIGTERM), 0);
    assert!(front_end.peer.closed()?);
    daemon.join().map_err(|_panic| "the daemon panicked")??;
    assert!(!path.exists());
    Ok(())
}
