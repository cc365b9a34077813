//! The thread that starts all children.
//!
//! `PR_SET_PDEATHSIG` follows the thread that forked, not the process: a child started from a runtime's worker would be killed when that worker retires. So one
//! thread does nothing but fork, and ends only when no supervisor and no [`super::Process`] is left.

use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot, watch};

use super::child::{Shared, watch_over};
use super::output::{Drain, Tail};
use super::supervisor::Registry;
use crate::error::Error;
use crate::sys;

/// How many starts may wait for the thread.
const QUEUE: usize = 32;

/// A child to be started, with everything that can fail beforehand done.
pub(super) struct Request {
    pub(super) name: String,
    pub(super) program: String,
    pub(super) command: Command,
    pub(super) drains: [Option<Drain>; 2],
    pub(super) runtime: Handle,
    pub(super) reply: oneshot::Sender<Result<Arc<Shared>, Error>>,
}

/// Starts the thread.
pub(super) fn start(registry: Arc<Registry>) -> std::io::Result<mpsc::Sender<Request>> {
    let (sender, mut requests) = mpsc::channel::<Request>(QUEUE);
    std::thread::Builder::new().name("spawner".to_owned()).spawn(move || {
        while let Some(request) = requests.blocking_recv() {
            serve(request, &registry);
        }
    })?;
    Ok(sender)
}

fn serve(request: Request, registry: &Arc<Registry>) {
    let Request { name, program, mut command, drains, runtime, reply } = request;
    if reply.is_closed() {
        return;
    }
    command.process_group(0);
    sys::die_with_parent(&mut command);
    let mut command = tokio::process::Command::from(command);
    command.kill_on_drop(true);
    let spawned = {
        let _entered = runtime.enter();
        registry.admit(&name).and_then(|()| {
            let child = command.spawn().map_err(|source| Error::Spawn { name: name.clone(), program, source })?;
            let pid = child.id().ok_or_else(|| Error::ShuttingDown { name: name.clone() })?;
            Ok((child, pid))
        })
    };
    let answer = spawned.map(|(child, pid)| {
        let shared = Arc::new(Shared {
            pid,
            name,
            exit: watch::Sender::new(None),
            reaped: AtomicBool::new(false),
            stdout: Arc::new(Tail::default()),
            stderr: Arc::new(Tail::default()),
        });
        registry.insert(shared.clone());
        runtime.spawn(watch_over(child, drains, shared.clone(), registry.clone()));
        shared
    });
    // A caller that gave up in the meantime does not get to own the child, so it must not go on.
    if let Err(Ok(orphan)) = reply.send(answer) {
        orphan.signal(nix::sys::signal::Signal::SIGKILL);
    }
}
