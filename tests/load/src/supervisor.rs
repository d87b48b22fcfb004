//! Starts the processes and waits for them.

use std::env;
use std::fs::{self, File};
use std::process::{Child, Command};
use std::thread;
use std::time::Duration;

use crate::error::LoadError;
use crate::options::Load;
use crate::progress::stop_file;

const POLL: Duration = Duration::from_millis(100);

/// Runs the load until it is told to stop or the first process fails, which ends the others.
pub(crate) fn run(load: &Load) -> Result<(), LoadError> {
    let state = &load.state;
    fs::create_dir_all(state).map_err(LoadError::system("create the state's folder"))?;
    let program = env::current_exe().map_err(LoadError::system("find this program"))?;
    let mut children = Vec::new();
    for number in 0..load.layout.processes {
        let child = Command::new(&program)
            .arg("work")
            .args(["--number", &number.to_string()])
            .args(arguments(load))
            .spawn()
            .map_err(LoadError::system("start a process"))?;
        children.push((number, child));
    }
    let mut result = Ok(());
    while !children.is_empty() {
        let mut running = Vec::new();
        for (number, mut child) in children {
            match ended(number, &mut child) {
                Ok(false) => running.push((number, child)),
                Ok(true) => {}
                Err(error) => {
                    // The first failure is the one that counts; the others end in order.
                    result = result.and(Err(error));
                    let stop = stop_file(state);
                    File::create(stop).map_err(LoadError::system("stop the load"))?;
                }
            }
        }
        children = running;
        thread::sleep(POLL);
    }
    result
}

/// Whether a process has ended, well.
fn ended(number: u32, child: &mut Child) -> Result<bool, LoadError> {
    let status = child
        .try_wait()
        .map_err(LoadError::system("wait for a process"))?;
    match status {
        None => Ok(false),
        Some(status) if status.success() => Ok(true),
        Some(status) => Err(LoadError::Process {
            number,
            status: status.to_string(),
        }),
    }
}

fn arguments(load: &Load) -> Vec<String> {
    let Load {
        layout,
        state,
        pages,
        depth,
        seed,
    } = load;
    vec![
        layout.disk.display().to_string(),
        format!("--processes={}", layout.processes),
        format!("--known-sectors={}", layout.known_sectors),
        format!("--own-sectors={}", layout.own_sectors),
        format!("--state={}", state.display()),
        format!("--pages={pages}"),
        format!("--depth={depth}"),
        format!("--seed={seed}"),
    ]
}
