//! What the integration tests share.

use std::process::Stdio;

use images::tool::{ToolCommand, ToolError, ToolExit, ToolFuture, ToolRunner};
use tokio::process::Command;

/// Bytes of a tool's output that are kept.
const TAIL_BYTES: usize = 16 * 1024;

/// Runs tools for real. The products' runner is the harness's.
pub(crate) struct Runner;

impl ToolRunner for Runner {
    fn run<'a>(&'a self, command: ToolCommand) -> ToolFuture<'a> {
        Box::pin(async move {
            let start = |error: std::io::Error| match error.kind() {
                std::io::ErrorKind::NotFound => ToolError::NotFound { program: command.program.clone() },
                _ => ToolError::Start { program: command.program.clone(), reason: error.to_string() },
            };
            let log = tempfile::NamedTempFile::new().map_err(start)?;
            let path = command.log.clone().map_or_else(|| log.path().to_owned(), Into::into);
            let out = std::fs::File::create(&path).map_err(start)?;
            let err = out.try_clone().map_err(start)?;
            let mut child = Command::new(&command.program)
                .args(&command.args)
                .envs(command.env.iter().cloned())
                .stdin(Stdio::null())
                .stdout(out)
                .stderr(err)
                .kill_on_drop(true)
                .spawn()
                .map_err(start)?;
            let tail = || {
                let text = std::fs::read(&path).unwrap_or_default();
                String::from_utf8_lossy(&text[text.len().saturating_sub(TAIL_BYTES)..]).into_owned()
            };
            let status = match command.deadline {
                None => child.wait().await,
                Some(deadline) => match tokio::time::timeout(deadline, child.wait()).await {
                    Ok(status) => status,
                    Err(_) => {
                        child.kill().await.map_err(start)?;
                        let name = command.name.clone();
                        return Err(ToolError::DeadlineExceeded { name, deadline, output_tail: tail() });
                    }
                },
            };
            let status = status.map_err(start)?;
            let signal = std::os::unix::process::ExitStatusExt::signal(&status);
            Ok(ToolExit { code: status.code(), signal, output_tail: tail() })
        })
    }
}
