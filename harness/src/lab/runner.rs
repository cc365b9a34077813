//! The tools of the image builder, run by the one place that starts processes.

use std::time::Duration;

use images::tool::{ToolCommand, ToolError, ToolExit, ToolFuture, ToolRunner};
use kvm::{CommandSpec, Process, Sink, Stdin, Supervisor};

/// How long a tool may take to end by itself after SIGTERM.
const GRACE: Duration = Duration::from_secs(3);
/// How much of a tool's output an error can quote.
const TAIL_BYTES: usize = 16 * 1024;
/// Largest log kept of one tool.
const LOG_MAX_BYTES: u64 = 64 * 1024 * 1024;

/// Runs tools as children of the harness: they end when their future is dropped, when the harness ends, and
/// when it is killed.
#[derive(Debug, Clone)]
pub struct OwnedTools {
    supervisor: Supervisor,
}

impl OwnedTools {
    /// A runner on the run's supervisor.
    #[must_use]
    pub fn new(supervisor: Supervisor) -> Self {
        Self { supervisor }
    }

    async fn run_to_end(&self, command: ToolCommand) -> Result<ToolExit, ToolError> {
        let sink = || match &command.log {
            Some(path) => {
                Sink::FileAndTail { path: path.clone(), file_max_bytes: LOG_MAX_BYTES, tail_bytes: TAIL_BYTES }
            }
            None => Sink::Tail { bytes: TAIL_BYTES },
        };
        let (stdout, stderr) = (sink(), sink());
        let spec = CommandSpec {
            name: command.name.clone(),
            program: command.program.clone(),
            args: command.args,
            env: command.env,
            cwd: command.cwd,
            stdin: Stdin::Null,
            stdout,
            stderr,
        };
        let process = self.supervisor.spawn(spec).await.map_err(|error| match error {
            kvm::Error::ProgramNotFound { .. } => ToolError::NotFound { program: command.program.clone() },
            kvm::Error::ShuttingDown { .. } => {
                ToolError::Aborted { name: command.name.clone(), reason: "the harness is shutting down".to_owned() }
            }
            other => ToolError::Start { program: command.program.clone(), reason: other.to_string() },
        })?;
        let mut owned = EndOnDrop { process: Some(process) };
        let Some(process) = owned.process.as_ref() else {
            return Err(ToolError::Aborted { name: command.name, reason: "it is already gone".to_owned() });
        };
        let exit = match command.deadline {
            None => process.exited().await,
            Some(deadline) => match tokio::time::timeout(deadline, process.exited()).await {
                Ok(exit) => exit,
                Err(_) => {
                    let ended = process.terminate(GRACE).await;
                    let output_tail = tails(process);
                    owned.process = None;
                    return Err(match ended {
                        Ok(_) => ToolError::DeadlineExceeded { name: command.name, deadline, output_tail },
                        Err(survivor) => ToolError::Aborted { name: command.name, reason: survivor.to_string() },
                    });
                }
            },
        };
        let output_tail = tails(process);
        owned.process = None;
        Ok(ToolExit { code: exit.code, signal: exit.signal, output_tail })
    }
}

impl ToolRunner for OwnedTools {
    fn run<'a>(&'a self, command: ToolCommand) -> ToolFuture<'a> {
        Box::pin(self.run_to_end(command))
    }
}

fn tails(process: &Process) -> String {
    let (mut out, err) = (process.stdout_tail(), process.stderr_tail());
    if !out.is_empty() && !err.is_empty() && !out.ends_with('\n') {
        out.push('\n');
    }
    out + &err
}

/// A dropped future must not leave its tool behind.
struct EndOnDrop {
    process: Option<Process>,
}

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        let Some(process) = self.process.take() else { return };
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                if let Err(survivor) = process.terminate(GRACE).await {
                    tracing::error!(%survivor, "a tool is left behind");
                }
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str) -> ToolCommand {
        ToolCommand::new("test", "sh").args(["-c", script])
    }

    #[tokio::test]
    async fn a_tool_ends_with_its_status_and_the_end_of_its_output() {
        let tools = OwnedTools::new(Supervisor::new().unwrap());
        let exit = tools.run(sh("echo out; echo err >&2; exit 7")).await.unwrap();
        assert_eq!(exit.code, Some(7));
        assert_eq!(exit.output_tail, "out\nerr\n");
    }

    #[tokio::test]
    async fn a_deadline_ends_the_tool_and_keeps_its_words() {
        let supervisor = Supervisor::new().unwrap();
        let tools = OwnedTools::new(supervisor.clone());
        let error =
            tools.run(sh("echo started; exec sleep 600").deadline(Duration::from_millis(300))).await.unwrap_err();
        assert!(
            matches!(&error, ToolError::DeadlineExceeded { output_tail, .. } if output_tail == "started\n"),
            "{error}"
        );
        assert!(supervisor.running().is_empty());
    }

    #[tokio::test]
    async fn a_dropped_future_ends_the_tool() {
        let supervisor = Supervisor::new().unwrap();
        let tools = OwnedTools::new(supervisor.clone());
        let waited = tokio::time::timeout(Duration::from_millis(200), tools.run(sh("exec sleep 600"))).await;
        assert!(waited.is_err());
        // Its end is an event of the supervisor; shutdown waits for it and reports what is left.
        assert!(supervisor.shutdown(Duration::from_secs(2)).await.is_empty());
        assert!(supervisor.running().is_empty());
    }

    #[tokio::test]
    async fn a_missing_tool_is_named() {
        let tools = OwnedTools::new(Supervisor::new().unwrap());
        let error = tools.run(ToolCommand::new("t", "no-such-tool-here")).await.unwrap_err();
        assert!(matches!(&error, ToolError::NotFound { program } if program == "no-such-tool-here"), "{error}");
    }
}
