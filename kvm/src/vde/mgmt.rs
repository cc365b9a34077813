//! `vde_switch`'s management protocol, as version 2.3.2 speaks it.
//!
//! A greeting, then a prompt `vde$ ` before each command. An answer is, where there is data, a line `0000 DATA END WITH '.'`, the data, a line `.`; then a line of a four-digit code from
//! 1000 and a text, of which `1000 Success` is the good one (1000 + errno otherwise).

use std::time::Duration;

use camino::Utf8Path;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::{Instant, timeout_at};

use crate::unix::connect_when_there;

const PROMPT: &[u8] = b"vde$ ";

/// The longest answer that is read: the MAC table of a large lab is some 100 KiB.
const ANSWER_MAX_BYTES: usize = 1024 * 1024;

/// How long a command may take; the switch answers within a millisecond unless the host stands still.
pub(super) const COMMAND_TIMEOUT: Duration = Duration::from_secs(10);

/// A connection that stands at a prompt.
#[derive(Debug)]
pub(super) struct Mgmt {
    stream: UnixStream,
}

/// What a command came to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Success(Vec<String>),
    Refused(String),
}

impl Mgmt {
    /// Connects, waiting for the switch to listen.
    pub(super) async fn connect(path: &Utf8Path, deadline: Instant) -> Result<Self, String> {
        let stream = connect_when_there(path, deadline)
            .await
            .map_err(|error| format!("could not connect to management socket {path}: {error}"))?;
        let mut mgmt = Self { stream };
        timeout_at(deadline, mgmt.until_prompt(false))
            .await
            .map_err(|_| "management socket sent no prompt in time".to_owned())??;
        Ok(mgmt)
    }

    /// Runs one command. After an error, or when cancelled, the connection stands somewhere in an answer and must be dropped.
    pub(super) async fn command(&mut self, command: &str) -> Result<Answer, String> {
        if command.contains(|c: char| c.is_control()) {
            return Err(format!("not one management command: {command:?}"));
        }
        let deadline = Instant::now() + COMMAND_TIMEOUT;
        let run = async {
            self.stream
                .write_all(format!("{command}\n").as_bytes())
                .await
                .map_err(|error| format!("`{command}` could not be sent: {error}"))?;
            self.until_prompt(true).await
        };
        let text = timeout_at(deadline, run)
            .await
            .map_err(|_| format!("`{command}` unanswered after {} ms", COMMAND_TIMEOUT.as_millis()))??;
        parse_answer(&text).ok_or_else(|| {
            format!("`{command}` answered out of protocol: {:?}", text.chars().take(200).collect::<String>())
        })
    }

    async fn until_prompt(&mut self, answer: bool) -> Result<String, String> {
        let mut received = Vec::new();
        let mut chunk = [0u8; 4096];
        loop {
            // The prompt's text could be data as well: it ends an answer only behind a complete one.
            if received.ends_with(PROMPT) && (!answer || parse_answer(&String::from_utf8_lossy(&received)).is_some()) {
                return Ok(String::from_utf8_lossy(&received).into_owned());
            }
            if received.len() > ANSWER_MAX_BYTES {
                return Err(format!("answer of more than {ANSWER_MAX_BYTES} bytes"));
            }
            match self.stream.read(&mut chunk).await {
                Ok(0) => return Err("management socket closed by the switch".to_owned()),
                Ok(n) => received.extend_from_slice(&chunk[..n]),
                Err(error) => return Err(format!("management socket: {error}")),
            }
        }
    }
}

/// The answer in `text`; `None` where there is no whole one.
fn parse_answer(text: &str) -> Option<Answer> {
    let mut lines = text.lines().map(|line| line.trim_end_matches('\r'));
    let mut data = Vec::new();
    while let Some(line) = lines.next() {
        if line.starts_with("0000 DATA END WITH '.'") {
            loop {
                match lines.next()? {
                    "." => break,
                    line => data.push(line.to_owned()),
                }
            }
        } else if is_code(line) {
            return Some(if line.starts_with("1000 ") {
                Answer::Success(data)
            } else {
                Answer::Refused(line.to_owned())
            });
        }
    }
    None
}

fn is_code(line: &str) -> bool {
    let bytes = line.as_bytes();
    bytes.len() > 5 && bytes[0] == b'1' && bytes[..4].iter().all(u8::is_ascii_digit) && bytes[4] == b' '
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_with_data_without_and_refusals() {
        let listing = "0000 DATA END WITH '.'\nVLAN 0000\n1000 not the end\n.\n1000 Success\n\nvde$ ";
        assert_eq!(parse_answer(listing), Some(Answer::Success(vec!["VLAN 0000".into(), "1000 not the end".into()])));
        assert_eq!(parse_answer("1000 Success\n\nvde$ "), Some(Answer::Success(vec![])));
        assert_eq!(
            parse_answer("1022 Invalid argument\n\nvde$ "),
            Some(Answer::Refused("1022 Invalid argument".into()))
        );
        assert_eq!(parse_answer("0000 DATA END WITH '.'\nvde$ "), None, "a listing that is not over");
        assert_eq!(parse_answer("vde$ "), None);
    }
}
