//! The benchmark on the host; see `--help`.

use std::error::Error;
use std::fs;
use std::io;
use std::path::Path;
use std::process::ExitCode;

use clap::Parser as _;
use vublk_tests::bench::{Options, Page, run};

fn main() -> ExitCode {
    let options = Options::parse();
    match measure(&options) {
        Ok(is_good) if is_good || !options.strict => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
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

/// Measures and writes; whether every bar that was asked for is met.
fn measure(options: &Options) -> Result<bool, Box<dyn Error>> {
    let report = run(options)?;
    print!("{report}");
    if let Some(path) = &options.json {
        write(path, &serde_json::to_string_pretty(&report.json())?)?;
    }
    if let Some(path) = &options.report {
        write(path, &Page(&report).to_string())?;
    }
    Ok(report.is_good())
}

fn write(path: &Path, text: &str) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(path, text)?;
    println!("written: {}", path.display());
    Ok(())
}
