//! The benchmark on the host; see `--help`.

use std::error::Error;
use std::fs;
use std::process::ExitCode;

use clap::Parser as _;
use vublk_tests::bench::{Options, run};

fn main() -> ExitCode {
    match measure(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprint!("bench: {error}");
            let mut cause = error.source();
            while let Some(error) = cause {
                eprint!(": {error}");
                cause = error.source();
            }
            eprintln!();
            ExitCode::FAILURE
        }
    }
}

fn measure(options: &Options) -> Result<(), Box<dyn Error>> {
    let report = run(options)?;
    print!("{report}");
    if let Some(path) = &options.json {
        let text = serde_json::to_string_pretty(&report.json())?;
        fs::write(path, text)?;
    }
    Ok(())
}
