//! The machine that measures, and what is installed on it.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Map, Value};

use crate::guest::vublk_path;

/// What a reader has to know of a machine to compare figures.
#[derive(Clone, Debug, Default)]
pub struct Host {
    /// Names and what they stand for, in the order of a report.
    pub facts: Vec<(&'static str, String)>,
}

impl Host {
    /// This machine; the file is the one that is measured, if there is one.
    pub(super) fn describe(file: Option<&Path>) -> Self {
        let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpus.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            (name.trim() == "model name").then(|| value.trim().to_owned())
        });
        let count = cpus.lines().filter(|line| line.starts_with("processor"));
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").ok();
        let binary = vublk_path().ok();
        let vublk = binary.and_then(|binary| first_line(&mut Command::new(binary), &["--version"]));
        let source = env!("CARGO_MANIFEST_DIR");
        let commit = ["-C", source, "describe", "--always", "--dirty", "--tags"];
        let file_system = file.and_then(|file| {
            let name = file.to_str()?;
            first_line(
                &mut Command::new("findmnt"),
                &["--noheadings", "--output=FSTYPE", "--target", name],
            )
        });
        let facts = [
            ("CPU", model),
            ("CPUs", Some(count.count().to_string())),
            ("kernel", kernel.map(|text| text.trim().to_owned())),
            ("file system", file_system),
            ("QEMU", version("qemu-storage-daemon")),
            ("fio", version("fio")),
            ("vublk", vublk),
            ("commit", first_line(&mut Command::new("git"), &commit)),
        ];
        let told = |(name, value): (_, Option<String>)| Some((name, value?));
        Self {
            facts: facts.into_iter().filter_map(told).collect(),
        }
    }

    /// Its part of a report.
    pub(super) fn json(&self) -> Value {
        let fact = |(name, value): &(&'static str, String)| {
            ((*name).to_owned(), Value::from(value.as_str()))
        };
        self.facts.iter().map(fact).collect::<Map<_, _>>().into()
    }
}

/// What a program says of its version; none when it is not installed.
pub(super) fn version(program: &str) -> Option<String> {
    first_line(&mut Command::new(program), &["--version"])
}

/// Whether this build of vublk has an option; others of its age may not.
pub(super) fn vublk_takes(option: &str) -> bool {
    let help = vublk_path()
        .ok()
        .and_then(|binary| output(&mut Command::new(binary), &["--help"]));
    help.is_some_and(|help| help.split_whitespace().any(|word| word == option))
}

fn first_line(command: &mut Command, arguments: &[&str]) -> Option<String> {
    let text = output(command, arguments)?;
    text.lines().next().map(|line| line.trim().to_owned())
}

fn output(command: &mut Command, arguments: &[&str]) -> Option<String> {
    command.args(arguments).stdin(Stdio::null());
    let output = command.stderr(Stdio::null()).output().ok()?;
    let is_good = output.status.success();
    is_good.then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_has_a_kernel() {
        let host = Host::describe(Some(Path::new("/proc")));
        let json = host.json();
        assert!(json["kernel"].as_str().unwrap().contains('.'), "{json}");
        assert_eq!(json["file system"], "proc");
        assert_eq!(version("no-such-program"), None);
    }
}
