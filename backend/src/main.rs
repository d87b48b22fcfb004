//! The vublk daemon: see `vublk --help`.

use std::env;
use std::error::Error;
use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use env_logger::Env;
use log::error;
use vublk::cli::{Args, CAPABILITIES};
use vublk::start::{Start, StartError};

fn main() -> ExitCode {
    // The conventions want everything else on the command line ignored.
    if env::args_os().any(|arg| arg == "--print-capabilities") {
        return say(CAPABILITIES);
    }
    let args = Args::parse();
    #[cfg(feature = "failpoints")]
    let _failpoints = fail::FailScenario::setup();
    env_logger::Builder::from_env(Env::default().default_filter_or("info")).init();
    match serve(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            error!("{}", chain(&failure));
            ExitCode::FAILURE
        }
    }
}

fn serve(args: &Args) -> Result<(), StartError> {
    let Start { control, advice } = Start::new(args)?;
    if let Some(advice) = advice {
        let _ = say(&advice);
    }
    Ok(control.run()?)
}

/// Writes to standard output; whoever closed it does not want to know.
fn say(text: &str) -> ExitCode {
    match writeln!(std::io::stdout(), "{text}") {
        Ok(()) => ExitCode::SUCCESS,
        Err(_closed) => ExitCode::FAILURE,
    }
}

/// An error with everything that caused it, in one line.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        cause = error.source();
    }
    text
}
