//! The conversation with the agent in the guest (`tests/guest/init`).

use std::fmt;
use std::io;
use std::time::Instant;

use super::GuestError;
use super::lines::Lines;

const WHO: &str = "the agent";

/// How a command in the guest ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// The exit status, 128 and the signal's number for a command that a signal ended.
    pub status: i32,
    /// Standard output, exactly.
    pub stdout: String,
    /// Standard error, exactly.
    pub stderr: String,
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            status,
            stdout,
            stderr,
        } = self;
        write!(
            f,
            "status {status}\n--- stdout\n{stdout}\n--- stderr\n{stderr}"
        )
    }
}

/// The host's end of the agent's port.
#[derive(Debug)]
pub(super) struct Agent {
    lines: Lines,
    next_id: u32,
}

/// Why the agent gave no answer.
#[derive(Debug)]
pub(super) enum Silence {
    /// The deadline passed.
    Late,
    /// The port closed: QEMU is gone.
    Closed(io::Error),
    /// The answer makes no sense.
    Garbled(GuestError),
}

impl From<io::Error> for Silence {
    fn from(error: io::Error) -> Self {
        Self::Closed(error)
    }
}

impl Agent {
    pub(super) fn new(lines: Lines) -> Self {
        Self { lines, next_id: 1 }
    }

    /// Waits for a boot to finish and returns its boot id.
    pub(super) fn ready(&mut self, deadline: Instant) -> Result<String, Silence> {
        loop {
            let line = self.lines.receive(deadline)?.ok_or(Silence::Late)?;
            // Other lines are what an earlier boot left unfinished.
            if let Some(boot) = line.strip_prefix("ready ") {
                return Ok(boot.to_owned());
            }
        }
    }

    /// Sends a command and returns the id its answer will carry.
    pub(super) fn send(&mut self, command: &str) -> io::Result<u32> {
        let id = self.next_id;
        self.next_id += 1;
        self.lines
            .send(&format!("{id} {}", to_hex(command.as_bytes())))?;
        Ok(id)
    }

    /// Waits for the answer to the command `id`.
    pub(super) fn answer(&mut self, id: u32, deadline: Instant) -> Result<Output, Silence> {
        let line = self.lines.receive(deadline)?.ok_or(Silence::Late)?;
        parse_answer(id, &line).ok_or_else(|| {
            let what = format!("{line:?} as the answer to command {id}");
            Silence::Garbled(GuestError::Garbled { who: WHO, what })
        })
    }
}

fn parse_answer(id: u32, line: &str) -> Option<Output> {
    let mut fields = line.split(' ');
    if fields.next()?.parse() != Ok(id) {
        return None;
    }
    let status = fields.next()?.parse().ok()?;
    let stdout = decode(fields.next()?)?;
    let stderr = decode(fields.next()?)?;
    fields.next().is_none().then_some(Output {
        status,
        stdout,
        stderr,
    })
}

fn decode(field: &str) -> Option<String> {
    if field == "-" {
        return Some(String::new());
    }
    Some(String::from_utf8_lossy(&from_hex(field)?).into_owned())
}

fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let pairs = text.as_bytes().chunks(2);
    pairs
        .map(|pair| u8::from_str_radix(str::from_utf8(pair).ok()?, 16).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_carries_status_and_both_outputs() {
        let answer = parse_answer(7, "7 3 610a 2d").unwrap();
        let expected = Output {
            status: 3,
            stdout: "a\n".into(),
            stderr: "-".into(),
        };
        assert_eq!(answer, expected);
        assert_eq!(parse_answer(7, "7 0 - -").unwrap().stdout, "");
    }

    #[test]
    fn an_answer_to_another_command_or_a_torn_one_is_refused() {
        for line in [
            "8 0 - -",
            "7 0 -",
            "7 0 - - -",
            "7 x - -",
            "7 0 6g -",
            "ready 7",
            "",
        ] {
            assert_eq!(parse_answer(7, line), None, "{line}");
        }
    }

    #[test]
    fn hex_returns_what_went_in() {
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!(from_hex(&to_hex(&all)), Some(all));
    }
}
