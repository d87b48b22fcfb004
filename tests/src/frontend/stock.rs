//! Our device under the stock daemon of the rust-vmm crates, on threads of this process.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::{Builder, JoinHandle};

use vhost::vhost_user::Error as HandleError;
use vhost::vhost_user::Listener;
use vhost_user_backend::{Error, VhostUserDaemon};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vublk::hosted::{HostOptions, Hosted};

use super::{Outcome, Peer, ServeOptions};

/// The stock daemon with our device in it. It serves one connection.
#[derive(Debug)]
pub struct Stock {
    path: PathBuf,
    thread: JoinHandle<Result<(), Error>>,
}

impl Stock {
    /// A daemon at a path nobody else uses; `workers` are its threads, and it has four queues.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start(options: &ServeOptions) -> Outcome<Stock> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("stock-{}-{count}.sock", std::process::id());
        let path = std::env::temp_dir().join(name);
        let device = options.device()?;
        let host = HostOptions {
            engine: options.engine,
            threads: options.workers,
        };
        let hosted = Arc::new(Hosted::new(device, host)?);
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let daemon = VhostUserDaemon::new("stock".into(), hosted.clone(), memory);
        let mut daemon = daemon.map_err(|error| error.to_string())?;
        hosted.attach(&daemon)?;
        let mut listener = Listener::new(&path, true)?;
        let thread = Builder::new().name("stock".into()).spawn(move || {
            daemon.start(&mut listener)?;
            daemon.wait()
        })?;
        Ok(Stock { path, thread })
    }

    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The front end's socket; there is one.
    ///
    /// # Errors
    /// When it does not accept.
    pub fn connect(&self) -> Outcome<Peer> {
        Ok(Peer::connect(&self.path)?)
    }

    /// Waits until it left, which it does when its front end hung up, with all its threads.
    ///
    /// # Errors
    /// The message that it could not go on after.
    pub fn left(self) -> Outcome {
        let ran = self
            .thread
            .join()
            .map_err(|panic| format!("it panicked: {panic:?}"))?;
        // The listener left its socket behind, or took it away.
        let _ = fs::remove_file(&self.path);
        match ran {
            Ok(()) | Err(Error::HandleRequest(HandleError::Disconnected)) => Ok(()),
            Err(Error::HandleRequest(HandleError::PartialMessage)) => Ok(()),
            Err(error) => Err(error.to_string().into()),
        }
    }
}
