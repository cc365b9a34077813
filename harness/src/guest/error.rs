//! What can go wrong between the harness and a guest.

use std::net::SocketAddr;
use std::time::Duration;

use super::exec::ExecOutput;

/// An operation on a guest failed. Every variant names the node.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GuestError {
    /// The guest presented another host key than its seed carries. Permanent: whoever answers is not our guest.
    #[error("{node}: host key mismatch: expected {expected}, got {offered}")]
    HostKeyMismatch {
        /// The node.
        node: String,
        /// Fingerprint of the pinned key.
        expected: String,
        /// Fingerprint of the key that was offered, or why none of the pinned kind was.
        offered: String,
    },
    /// The guest refused the harness's key. Permanent: asking again with the same key changes nothing.
    #[error("{node}: ssh login as {user} refused (server offers: {methods})")]
    AuthRefused {
        /// The node.
        node: String,
        /// The login name.
        user: String,
        /// Authentication methods the server would still take.
        methods: String,
    },
    /// No connection came about in the time given.
    #[error("{node}: no ssh at {addr} after {} ({attempts} attempts, last: {last})", seconds(.waited))]
    Unreachable {
        /// The node.
        node: String,
        /// Where the guest was looked for.
        addr: SocketAddr,
        /// How long it was tried.
        waited: Duration,
        /// TCP connections opened.
        attempts: u32,
        /// What the last attempt ended with.
        last: String,
    },
    /// The connection broke while an operation was under way. Whether a command had its effect is unknown.
    #[error("{node}: ssh connection lost {during}: {reason}")]
    ConnectionLost {
        /// The node.
        node: String,
        /// What was under way.
        during: String,
        /// What ended the connection.
        reason: String,
    },
    /// A command did not end in its time.
    #[error("{node}: `{command}` did not end within {}{}", seconds(.limit), partial_tail(.partial))]
    Deadline {
        /// The node.
        node: String,
        /// The command, shortened.
        command: String,
        /// The time it had.
        limit: Duration,
        /// What it had said until then.
        partial: Box<ExecOutput>,
    },
    /// A command ended with another status than 0, or by a signal.
    #[error("{node}: `{command}` {how}{}", tail_of(.stderr_tail))]
    Failed {
        /// The node.
        node: String,
        /// The command, shortened.
        command: String,
        /// `exited 1`, `was killed by signal KILL`, `ended without a status`.
        how: String,
        /// Exit status, when there was one.
        status: Option<u32>,
        /// The end of what it wrote to stderr (or to stdout when stderr was empty).
        stderr_tail: String,
    },
    /// The server did not open a channel or did not take a request on it.
    #[error("{node}: ssh server refused {what}: {reason}")]
    ChannelRefused {
        /// The node.
        node: String,
        /// What was asked for.
        what: String,
        /// The server's reason.
        reason: String,
    },
    /// An answer was longer than the caller allows.
    #[error("{node}: {what} is longer than {limit_bytes} bytes")]
    TooLong {
        /// The node.
        node: String,
        /// What was read.
        what: String,
        /// The limit.
        limit_bytes: usize,
    },
    /// [`super::Guest::disconnect`] was called.
    #[error("{node}: ssh connection was closed by the harness")]
    Closed {
        /// The node.
        node: String,
    },
    /// An answer that is not what the protocol or the command promises.
    #[error("{node}: {what}: {reason}")]
    Malformed {
        /// The node.
        node: String,
        /// What was read.
        what: String,
        /// Why it cannot be used.
        reason: String,
    },
    /// A local socket could not be had.
    #[error("{node}: {what}: {source}")]
    Local {
        /// The node.
        node: String,
        /// What was attempted.
        what: String,
        /// The operating system's answer.
        source: std::io::Error,
    },
    /// A key could not be made, read or written.
    #[error("ssh key: {0}")]
    Key(String),
}

impl GuestError {
    /// The server's refusal to run a command.
    pub(super) fn denied(node: &str, command: &str) -> Self {
        Self::ChannelRefused {
            node: node.to_owned(),
            what: format!("`{}`", brief(command)),
            reason: "the request to run it was denied".into(),
        }
    }

    /// Whether the other side of a TCP connection was there and refused it, in sshd's words (`strerror(3)`).
    pub fn is_tcp_refusal(&self) -> bool {
        matches!(self, Self::ChannelRefused { reason, .. } if reason.ends_with("Connection refused"))
    }

    /// Whether trying the same again is pointless.
    pub fn is_permanent(&self) -> bool {
        matches!(
            self,
            GuestError::HostKeyMismatch { .. }
                | GuestError::AuthRefused { .. }
                | GuestError::Closed { .. }
                | GuestError::Key(_)
        )
    }

    /// Whether the connection, not the command, is what failed.
    pub fn is_connection(&self) -> bool {
        matches!(self, GuestError::ConnectionLost { .. } | GuestError::Unreachable { .. } | GuestError::Closed { .. })
    }
}

/// The longest piece of a command that an error message carries, in characters.
const COMMAND_CHARS: usize = 160;

/// A command, shortened for a message.
pub(super) fn brief(command: &str) -> String {
    let line = command.replace('\n', "; ");
    if line.chars().count() <= COMMAND_CHARS {
        return line;
    }
    line.chars().take(COMMAND_CHARS).chain("…".chars()).collect()
}

/// The last lines of an output as printable text: at most `bytes` of it, control characters removed.
pub(super) fn tail(output: &[u8], bytes: usize) -> String {
    let from = output.len().saturating_sub(bytes);
    String::from_utf8_lossy(&output[from..])
        .chars()
        .map(|c| if c == '\n' || c == '\t' || !c.is_control() { c } else { '·' })
        .collect::<String>()
        .trim()
        .to_owned()
}

fn seconds(duration: &Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}

fn tail_of(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!(": {text}") }
}

fn partial_tail(output: &ExecOutput) -> String {
    let said = if output.stderr.is_empty() { &output.stdout } else { &output.stderr };
    let text = tail(said, 256);
    if text.is_empty() { "; no output".to_owned() } else { format!("; last output: {text}") }
}
