//! The one place that starts and ends processes.
//!
//! Every child is in a process group of its own, is killed by the kernel when this process ends in whatever way, and ends by SIGTERM, a grace, SIGKILL. Whoever holds a
//! [`Process`] owns the child: dropping it kills the child's group at once, as a backstop to [`Process::terminate`].
//!
//! What the kernel's part cannot do: it ends the child itself, not what the child has started, when this process is killed with SIGKILL. QEMU, `vde_switch` and `vde_plug` start nothing.

mod child;
mod output;
mod spawner;
mod supervisor;

use std::fmt;

use camino::Utf8PathBuf;
use serde::{Deserialize, Serialize};
use thiserror::Error as ThisError;

pub use child::Process;
pub use output::{NewOutput, OutputPosition};
pub use supervisor::Supervisor;

/// How much of an output [`CommandSpec::new`] keeps.
pub const DEFAULT_TAIL_BYTES: usize = 16 * 1024;

/// What is to be started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommandSpec {
    /// What it is called in events, reports and errors.
    pub name: String,
    /// The program: a name in PATH, or a path.
    pub program: String,
    /// Its arguments, without the program itself.
    pub args: Vec<String>,
    /// Environment variables set on top of this process's.
    pub env: Vec<(String, String)>,
    /// Its working directory; this process's where `None`.
    pub cwd: Option<Utf8PathBuf>,
    /// Its standard input.
    pub stdin: Stdin,
    /// Its standard output.
    pub stdout: Sink,
    /// Its standard error.
    pub stderr: Sink,
}

impl CommandSpec {
    /// A command without arguments, with nothing on standard input and the tails of both outputs kept.
    #[must_use]
    pub fn new(name: impl Into<String>, program: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            program: program.into(),
            args: Vec::new(),
            env: Vec::new(),
            cwd: None,
            stdin: Stdin::Null,
            stdout: Sink::Tail { bytes: DEFAULT_TAIL_BYTES },
            stderr: Sink::Tail { bytes: DEFAULT_TAIL_BYTES },
        }
    }

    /// The same with these arguments.
    #[must_use]
    pub fn args<I: IntoIterator<Item = S>, S: Into<String>>(mut self, args: I) -> Self {
        self.args = args.into_iter().map(Into::into).collect();
        self
    }
}

/// Standard input of a child.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stdin {
    /// `/dev/null`: end of file at once.
    Null,
    /// A pipe that is held open for as long as the child runs, with nothing in it. For programs that take the end of their input as an order to exit.
    HeldOpen,
}

/// Where an output of a child goes. All but [`Sink::Null`] and [`Sink::File`] pass through this process and are always drained, so that a child never blocks on them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sink {
    /// `/dev/null`.
    Null,
    /// Drained; the last bytes are kept.
    Tail {
        /// How many.
        bytes: usize,
    },
    /// Appended to a file by the child itself, without a bound.
    File {
        /// The file.
        path: Utf8PathBuf,
    },
    /// Drained and appended to a file up to a bound; the last bytes are kept as well, those past the bound included.
    FileAndTail {
        /// The file.
        path: Utf8PathBuf,
        /// How many bytes are written to it before a mark ends it.
        file_max_bytes: u64,
        /// How many bytes are kept.
        tail_bytes: usize,
    },
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ExitInfo {
    /// The exit status, where it exited.
    pub code: Option<i32>,
    /// The signal, where one killed it.
    pub signal: Option<i32>,
}

impl ExitInfo {
    /// Whether it exited with status 0.
    #[must_use]
    pub fn success(&self) -> bool {
        self.code == Some(0)
    }
}

impl fmt::Display for ExitInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.code, self.signal) {
            (Some(code), _) => write!(f, "exited {code}"),
            (None, Some(signal)) => write!(f, "killed by signal {signal}"),
            (None, None) => f.write_str("ended in a way that was not recorded"),
        }
    }
}

/// A process that is still there after SIGTERM, its grace and SIGKILL.
#[derive(Debug, Clone, PartialEq, Eq, ThisError, Serialize, Deserialize)]
#[error("process {name} (pid {pid}) survived SIGKILL")]
pub struct Survivor {
    /// Its process id.
    pub pid: u32,
    /// Its name.
    pub name: String,
}
