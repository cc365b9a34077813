//! Who owns all children: starts them, knows them, ends them.

use std::collections::BTreeMap;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use super::child::{Process, Shared};
use super::output::OpenSink;
use super::spawner::{self, Request};
use super::{CommandSpec, Stdin, Survivor};
use crate::error::Error;

/// How many times [`Supervisor::shutdown`] looks for children that were being started while it began.
const SHUTDOWN_ROUNDS: u32 = 4;

/// The children that run.
#[derive(Debug, Default)]
pub(super) struct Registry {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    closed: bool,
    children: BTreeMap<u32, Arc<Shared>>,
}

impl Registry {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn admit(&self, name: &str) -> Result<(), Error> {
        if self.state().closed { Err(Error::ShuttingDown { name: name.to_owned() }) } else { Ok(()) }
    }

    pub(super) fn insert(&self, child: Arc<Shared>) {
        let mut state = self.state();
        if state.closed {
            child.signal(Signal::SIGKILL);
        }
        state.children.insert(child.pid, child);
    }

    pub(super) fn remove(&self, pid: u32) {
        self.state().children.remove(&pid);
    }

    fn close(&self) {
        self.state().closed = true;
    }

    fn all(&self) -> Vec<Arc<Shared>> {
        self.state().children.values().cloned().collect()
    }
}

/// Starts processes and ends them. Clones are the same supervisor.
#[derive(Debug, Clone)]
pub struct Supervisor {
    requests: mpsc::Sender<Request>,
    registry: Arc<Registry>,
}

impl Supervisor {
    /// A supervisor with its thread.
    ///
    /// # Errors
    /// [`Error::Spawn`] where the thread cannot be started.
    pub fn new() -> Result<Self, Error> {
        let registry = Arc::new(Registry::default());
        let requests = spawner::start(registry.clone()).map_err(|source| Error::Spawn {
            name: "spawner".to_owned(),
            program: "a thread".to_owned(),
            source,
        })?;
        Ok(Self { requests, registry })
    }

    /// Starts a process. Must be called within a tokio runtime, which then waits for the process's end and drains its outputs.
    ///
    /// A call that is cancelled leaves no process.
    ///
    /// # Errors
    /// [`Error::ProgramNotFound`], [`Error::Io`] for a log file, [`Error::Spawn`], and [`Error::ShuttingDown`] once [`Supervisor::shutdown`] has begun.
    pub async fn spawn(&self, spec: CommandSpec) -> Result<Process, Error> {
        self.registry.admit(&spec.name)?;
        let program =
            which::which(&spec.program).map_err(|_| Error::ProgramNotFound { program: spec.program.clone() })?;
        let (stdout, drain_out) = OpenSink::open(&spec.stdout)?.into_stdio();
        let (stderr, drain_err) = OpenSink::open(&spec.stderr)?.into_stdio();
        let mut command = Command::new(program);
        command.args(&spec.args).envs(spec.env).stdout(stdout).stderr(stderr).stdin(match spec.stdin {
            Stdin::Null => Stdio::null(),
            Stdin::HeldOpen => Stdio::piped(),
        });
        if let Some(cwd) = &spec.cwd {
            command.current_dir(cwd);
        }
        let (reply, answer) = oneshot::channel();
        let gone = || Error::ShuttingDown { name: spec.name.clone() };
        let request = Request {
            name: spec.name.clone(),
            program: spec.program,
            command,
            drains: [drain_out, drain_err],
            runtime: Handle::current(),
            reply,
        };
        self.requests.send(request).await.map_err(|_| gone())?;
        let shared = Answer { answer: Some(answer) }.wait().await.ok_or_else(gone)??;
        Ok(Process { shared, _supervisor: self.clone() })
    }

    /// The processes that run: process id and name.
    #[must_use]
    pub fn running(&self) -> Vec<(u32, String)> {
        self.registry.all().iter().map(|child| (child.pid, child.name.clone())).collect()
    }

    /// Ends all processes at once, each by SIGTERM, the grace, SIGKILL to its group; starts none any more. Returns those that are still there.
    pub async fn shutdown(&self, grace: Duration) -> Vec<Survivor> {
        self.registry.close();
        for _ in 0..SHUTDOWN_ROUNDS {
            let mut ends = JoinSet::new();
            for child in self.registry.all() {
                ends.spawn(async move { child.terminate(grace).await });
            }
            if ends.is_empty() {
                return Vec::new();
            }
            let survivors: Vec<Survivor> = ends.join_all().await.into_iter().filter_map(Result::err).collect();
            if !survivors.is_empty() {
                return survivors;
            }
        }
        self.running().into_iter().map(|(pid, name)| Survivor { pid, name }).collect()
    }

    /// SIGKILL to the group of every process, without waiting; starts none any more.
    pub fn kill_all_now(&self) {
        self.registry.close();
        for child in self.registry.all() {
            child.signal(Signal::SIGKILL);
        }
    }
}

/// The spawner's answer. The child may have been started, and the answer sent, at the very moment the caller is cancelled: then nobody owns it and it must not go on.
struct Answer {
    answer: Option<oneshot::Receiver<Result<Arc<Shared>, Error>>>,
}

impl Answer {
    async fn wait(mut self) -> Option<Result<Arc<Shared>, Error>> {
        let received = match self.answer.as_mut() {
            Some(answer) => answer.await.ok(),
            None => None,
        };
        self.answer = None;
        received
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if let Some(answer) = &mut self.answer {
            answer.close();
            if let Ok(Ok(child)) = answer.try_recv() {
                child.signal(Signal::SIGKILL);
            }
        }
    }
}
