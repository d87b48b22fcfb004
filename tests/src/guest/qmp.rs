//! QEMU's control socket.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::GuestError;
use super::lines::Lines;

const WHO: &str = "QMP";
const LIMIT: Duration = Duration::from_secs(120);

/// A QMP connection after its handshake.
#[derive(Debug)]
pub struct Qmp {
    lines: Lines,
    /// Events that came while an answer was waited for.
    events: VecDeque<Value>,
}

impl Qmp {
    pub(super) fn new(lines: Lines) -> Result<Self, GuestError> {
        let mut qmp = Self {
            lines,
            events: VecDeque::new(),
        };
        let greeting = qmp.receive("the greeting", Instant::now() + LIMIT)?;
        if greeting.get("QMP").is_none() {
            return Err(garbled(&greeting));
        }
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Executes a command and returns what it returns.
    ///
    /// # Errors
    /// `Qmp` when QEMU refuses it; `TimedOut`, `Host` and `Garbled` when there is no answer.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "arguments are written as json!({..}) in place"
    )]
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, GuestError> {
        let message = json!({ "execute": command, "arguments": arguments });
        let what = format!("send {command} over QMP");
        self.lines
            .send(&message.to_string())
            .map_err(GuestError::host(what))?;
        let deadline = Instant::now() + LIMIT;
        loop {
            let mut answer = self.receive(command, deadline)?;
            if let Some(result) = answer.get_mut("return") {
                return Ok(result.take());
            }
            if let Some(reason) = answer.get("error") {
                let command = command.to_owned();
                return Err(GuestError::Qmp {
                    command,
                    reason: reason.to_string(),
                });
            }
            if answer.get("event").is_none() {
                return Err(garbled(&answer));
            }
            self.events.push_back(answer);
        }
    }

    /// The next event called `name`, with its data; it may have come before. Events with other
    /// names stay for later calls.
    ///
    /// # Errors
    /// `TimedOut`, `Host` and `Garbled` when it does not come.
    pub fn wait_event(&mut self, name: &str) -> Result<Value, GuestError> {
        let is_wanted = |event: &Value| event.get("event").and_then(Value::as_str) == Some(name);
        if let Some(index) = self.events.iter().position(is_wanted) {
            return self
                .events
                .remove(index)
                .ok_or_else(|| garbled(&Value::Null));
        }
        let deadline = Instant::now() + LIMIT;
        loop {
            let event = self.receive(name, deadline)?;
            if is_wanted(&event) {
                return Ok(event);
            }
            self.events.push_back(event);
        }
    }

    fn receive(&mut self, what: &str, deadline: Instant) -> Result<Value, GuestError> {
        let line = self
            .lines
            .receive(deadline)
            .map_err(GuestError::host("read from QMP"))?;
        let Some(line) = line else {
            let what = format!("QMP's answer: {what}");
            return Err(GuestError::TimedOut {
                what,
                limit: LIMIT,
                context: String::new(),
            });
        };
        serde_json::from_str(&line).map_err(|error| {
            let what = format!("{line:?}: {error}");
            GuestError::Garbled { who: WHO, what }
        })
    }
}

fn garbled(message: &Value) -> GuestError {
    GuestError::Garbled {
        who: WHO,
        what: message.to_string(),
    }
}
