//! One child, from its start to its end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::output::{Drain, NewOutput, OutputPosition, Tail};
use super::supervisor::Registry;
use super::{ExitInfo, Survivor};

/// How long a process may take to be gone after SIGKILL: longer means it hangs in the kernel.
const KILL_WAIT: Duration = Duration::from_secs(5);

/// How long outputs are still read after the process ended. Its group is dead by then, so only a process that left the group could hold them open.
const DRAIN_WAIT: Duration = Duration::from_secs(1);

/// What is known of a child; shared by its owner, the registry and the task that waits for it.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) pid: u32,
    pub(super) name: String,
    /// Told only after the outputs were read to their end.
    pub(super) exit: watch::Sender<Option<ExitInfo>>,
    /// Set as soon as the process is gone: from then on its id may be somebody else's.
    pub(super) reaped: AtomicBool,
    pub(super) stdout: Arc<Tail>,
    pub(super) stderr: Arc<Tail>,
}

impl Shared {
    /// Sends a signal to the child's whole group. That it is gone already is no error.
    pub(super) fn signal(&self, signal: Signal) {
        if self.reaped.load(Ordering::Acquire) {
            return;
        }
        signal_group(self.pid, signal);
    }

    pub(super) async fn exited(&self) -> ExitInfo {
        let mut exit = self.exit.subscribe();
        let seen = exit.wait_for(Option::is_some).await.map(|info| *info);
        // `self` holds the sender, so the channel cannot be closed here.
        seen.ok().flatten().unwrap_or(ExitInfo { code: None, signal: None })
    }

    /// SIGTERM, the grace, SIGKILL.
    pub(super) async fn terminate(&self, grace: Duration) -> Result<ExitInfo, Survivor> {
        self.signal(Signal::SIGTERM);
        // A stopped process would not act on SIGTERM.
        self.signal(Signal::SIGCONT);
        if let Ok(info) = timeout(grace, self.exited()).await {
            return Ok(info);
        }
        self.signal(Signal::SIGKILL);
        timeout(KILL_WAIT, self.exited()).await.map_err(|_| Survivor { pid: self.pid, name: self.name.clone() })
    }
}

fn signal_group(pid: u32, signal: Signal) {
    if let Ok(pid) = i32::try_from(pid)
        && pid > 1
    {
        let _ = killpg(Pid::from_raw(pid), signal);
    }
}

/// Waits for the child's end, then for that of its outputs, and only then tells: whoever sees the exit sees all it wrote.
pub(super) async fn watch_over(
    mut child: tokio::process::Child,
    drains: [Option<Drain>; 2],
    shared: Arc<Shared>,
    registry: Arc<Registry>,
) {
    // Holds a stdin pipe open until the child has ended.
    let _stdin = child.stdin.take();
    let [drain_out, drain_err] = drains;
    let mut outputs = JoinSet::new();
    if let (Some(drain), Some(pipe)) = (drain_out, child.stdout.take()) {
        outputs.spawn(drain.run(pipe, shared.stdout.clone()));
    }
    if let (Some(drain), Some(pipe)) = (drain_err, child.stderr.take()) {
        outputs.spawn(drain.run(pipe, shared.stderr.clone()));
    }
    let status = child.wait().await;
    shared.reaped.store(true, Ordering::Release);
    // The group ends with its leader. Right here the group's id cannot belong to anybody else yet: ids are handed out in turn.
    signal_group(shared.pid, Signal::SIGKILL);
    let _ = timeout(DRAIN_WAIT, async { while outputs.join_next().await.is_some() {} }).await;
    let info = match status {
        Ok(status) => ExitInfo { code: status.code(), signal: std::os::unix::process::ExitStatusExt::signal(&status) },
        Err(error) => {
            tracing::warn!(name = %shared.name, pid = shared.pid, %error, "the exit status of a child could not be read");
            ExitInfo { code: None, signal: None }
        }
    };
    registry.remove(shared.pid);
    shared.exit.send_replace(Some(info));
}

/// A child process, owned: dropping this kills its group at once.
#[derive(Debug)]
pub struct Process {
    pub(super) shared: Arc<Shared>,
    /// The thread that started the child must outlive it, or the kernel takes that for our death.
    pub(super) _supervisor: super::Supervisor,
}

impl Process {
    /// Its process id, which is its group's id as well.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.shared.pid
    }

    /// What it was called when it was started.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// Waits for its end. Cancel-safe; any number of callers may wait.
    pub async fn exited(&self) -> ExitInfo {
        self.shared.exited().await
    }

    /// How it ended, if it has.
    #[must_use]
    pub fn try_exited(&self) -> Option<ExitInfo> {
        *self.shared.exit.borrow()
    }

    /// SIGTERM to its group, the grace, SIGKILL.
    ///
    /// # Errors
    /// The process itself, where it is still there 5 s after SIGKILL.
    pub async fn terminate(&self, grace: Duration) -> Result<ExitInfo, Survivor> {
        self.shared.terminate(grace).await
    }

    /// SIGKILL to its group, without waiting.
    pub fn kill_now(&self) {
        self.shared.signal(Signal::SIGKILL);
    }

    /// The end of its standard error, where that is drained.
    #[must_use]
    pub fn stderr_tail(&self) -> String {
        self.shared.stderr.text()
    }

    /// The end of its standard output, where that is drained.
    #[must_use]
    pub fn stdout_tail(&self) -> String {
        self.shared.stdout.text()
    }

    /// What it has written to its drained outputs since `position`, which is moved past it.
    pub fn new_output(&self, position: &mut OutputPosition) -> NewOutput {
        // Asked first: an end is told only after the outputs were read to theirs.
        let ended = self.try_exited().is_some();
        let mut new = NewOutput::default();
        self.shared.stdout.read_on(&mut position.stdout_bytes, ended, &mut new);
        self.shared.stderr.read_on(&mut position.stderr_bytes, ended, &mut new);
        new
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill_now();
    }
}
