//! How this crate has tools run for it: it never starts a process by itself.
//!
//! The harness owns every process it starts in one place; `images` states what it wants run and gets an exit back.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use camino::Utf8PathBuf;

/// The future a [`ToolRunner`] hands back.
pub type ToolFuture<'a> = Pin<Box<dyn Future<Output = Result<ToolExit, ToolError>> + Send + 'a>>;

/// Runs tools on behalf of this crate.
///
/// Dropping the returned future must end the tool and, as far as the platform allows, what the tool started. A tool that
/// outlives its deadline is ended and answered with [`ToolError::DeadlineExceeded`]. An exit that is not a success is an
/// `Ok`: whether it is a failure is the caller's judgement.
pub trait ToolRunner: Send + Sync {
    /// Runs one tool to its end.
    fn run<'a>(&'a self, command: ToolCommand) -> ToolFuture<'a>;
}

/// One tool to run, as plain data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToolCommand {
    /// What the run is called in messages, such as `rootfs`.
    pub name: String,
    /// The program, looked up in `PATH` unless it holds a slash.
    pub program: String,
    /// Arguments, the program itself not among them.
    pub args: Vec<String>,
    /// Variables added to the caller's environment.
    pub env: Vec<(String, String)>,
    /// Working directory; the caller's where absent.
    pub cwd: Option<Utf8PathBuf>,
    /// File that gets stdout and stderr, both, as they come.
    pub log: Option<Utf8PathBuf>,
    /// How long the tool may take in all.
    pub deadline: Option<Duration>,
}

impl ToolCommand {
    /// A command of `program` without arguments, log or deadline.
    pub fn new(name: impl Into<String>, program: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            program: program.into(),
            args: Vec::new(),
            env: Vec::new(),
            cwd: None,
            log: None,
            deadline: None,
        }
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<I, S>(mut self, args: I) -> Self
    where
        I: IntoIterator<Item = S>,
        S: Into<String>,
    {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Sets the deadline.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = Some(deadline);
        self
    }

    /// Sets the log file.
    #[must_use]
    pub fn log(mut self, log: impl Into<Utf8PathBuf>) -> Self {
        self.log = Some(log.into());
        self
    }
}

/// How a tool ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToolExit {
    /// Exit status, if it exited.
    pub code: Option<i32>,
    /// Signal, if one ended it.
    pub signal: Option<i32>,
    /// The end of what it wrote to stdout and stderr, bounded by the runner.
    pub output_tail: String,
}

impl ToolExit {
    /// Whether the tool exited with status 0.
    pub fn success(&self) -> bool {
        self.code == Some(0)
    }
}

impl std::fmt::Display for ToolExit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.code, self.signal) {
            (Some(code), _) => write!(f, "exited {code}"),
            (None, Some(signal)) => write!(f, "killed by signal {signal}"),
            (None, None) => f.write_str("ended in an unknown way"),
        }
    }
}

/// Why a tool has no exit.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// The program is not on this machine.
    #[error("{program} not found on this machine")]
    NotFound {
        /// The program asked for.
        program: String,
    },
    /// The program is there and could not be started.
    #[error("could not start {program}: {reason}")]
    Start {
        /// The program asked for.
        program: String,
        /// What the system said.
        reason: String,
    },
    /// The deadline passed; the tool has been ended.
    #[error("{name} did not end within {deadline:?}{}", tail_block(.output_tail))]
    DeadlineExceeded {
        /// The command's name.
        name: String,
        /// The deadline it had.
        deadline: Duration,
        /// The end of what it wrote.
        output_tail: String,
    },
    /// The runner is shutting down or otherwise cannot serve.
    #[error("{name} was not run to its end: {reason}")]
    Aborted {
        /// The command's name.
        name: String,
        /// Why.
        reason: String,
    },
}

/// A tool's last lines as an indented block that follows a message, empty where there are none.
pub(crate) fn tail_block(tail: &str) -> String {
    const LINES: usize = 20;
    let lines: Vec<&str> = tail.lines().filter(|line| !line.trim().is_empty()).collect();
    let skipped = lines.len().saturating_sub(LINES);
    let mut out = String::new();
    for line in &lines[skipped..] {
        out.push_str("\n  | ");
        out.extend(line.chars().take(300).filter(|c| !c.is_control() || *c == '\t'));
    }
    out
}
