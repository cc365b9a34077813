//! One authenticated connection, and a session on it that leaves nothing running in the guest.

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use futures::FutureExt;
use russh::client::{Handle, Msg};
use russh::{Channel, ChannelOpenFailure, ChannelReadHalf, ChannelWriteHalf};
use tokio::sync::{OwnedSemaphorePermit, mpsc};

use super::connect::Pinned;

/// Pause before a session that was refused is asked for again.
pub(super) const REFUSED_PAUSE: Duration = Duration::from_millis(25);
/// The library tells of a refusal first, and of its words right after, from the same task: this much later only where that
/// does not run.
const WORDS_WITHIN: Duration = Duration::from_secs(5);

/// One authenticated connection.
pub(super) struct Connection {
    pub(super) handle: Handle<Pinned>,
    ended: Arc<OnceLock<String>>,
    /// The server's words on TCP connections it could not make, in their order: the library's error has only a number.
    refused: tokio::sync::Mutex<mpsc::Receiver<String>>,
    /// A session channel opened ahead of its use, which saves every command a round trip.
    reserve: Mutex<Option<Channel<Msg>>>,
    /// Whether that is being opened.
    refilling: AtomicBool,
    /// Held while an abandoned command is killed: one at a time, to stay within the server's sessions.
    killing: tokio::sync::Mutex<()>,
}

impl Connection {
    pub(super) fn new(handle: Handle<Pinned>, ended: Arc<OnceLock<String>>, refused: mpsc::Receiver<String>) -> Self {
        Connection {
            handle,
            ended,
            refused: tokio::sync::Mutex::new(refused),
            reserve: Mutex::new(None),
            refilling: AtomicBool::new(false),
            killing: tokio::sync::Mutex::new(()),
        }
    }

    /// The words of the refusal the caller has just learnt of. Of two at the same moment they may be exchanged.
    pub(super) async fn refusal(&self) -> String {
        let told = async { self.refused.lock().await.recv().await };
        tokio::time::timeout(WORDS_WITHIN, told).await.ok().flatten().unwrap_or_default()
    }

    /// Opens a session channel for the connection's own use. A refusal's words are taken and let go: they are nobody else's.
    async fn open_session(&self) -> Result<Channel<Msg>, russh::Error> {
        let opened = self.handle.channel_open_session().await;
        if matches!(opened, Err(russh::Error::ChannelOpenFailure(ChannelOpenFailure::ConnectFailed))) {
            self.refusal().await;
        }
        opened
    }

    fn reserve(&self) -> std::sync::MutexGuard<'_, Option<Channel<Msg>>> {
        // A poisoned lock still guards a whole value: nothing is left half-done under it.
        self.reserve.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub(super) fn ended(&self) -> String {
        self.ended.get().cloned().unwrap_or_else(|| "connection closed".into())
    }

    /// The reserved channel, unless the server has closed it meanwhile.
    pub(super) fn take_reserve(&self) -> Option<Channel<Msg>> {
        let mut channel = self.reserve().take()?;
        match channel.wait().now_or_never() {
            None | Some(Some(russh::ChannelMsg::WindowAdjusted { .. })) => Some(channel),
            Some(_) => None,
        }
    }
}

/// A session channel in use. Dropping it before its end closes it and kills what runs on it.
///
/// A closed channel alone would not do: sshd lets the command run on, keeps the session in use until it
/// ends, and takes no signal requests for root (`session_signal_req`). So every command carries a tag in
/// its environment, by which its process group is found and killed.
pub(super) struct Session {
    pub(super) reader: ChannelReadHalf,
    pub(super) writer: Arc<ChannelWriteHalf<Msg>>,
    connection: Arc<Connection>,
    tag: String,
    kill_limit: Duration,
    started: bool,
    permit: Option<OwnedSemaphorePermit>,
    finished: bool,
}

impl Session {
    pub(super) fn new(
        reader: ChannelReadHalf,
        writer: ChannelWriteHalf<Msg>,
        connection: Arc<Connection>,
        permit: OwnedSemaphorePermit,
        kill_limit: Duration,
    ) -> Self {
        Self {
            reader,
            writer: Arc::new(writer),
            connection,
            tag: new_tag(),
            kill_limit,
            started: false,
            permit: Some(permit),
            finished: false,
        }
    }

    /// Asks for the command to be run. An error means that the connection is lost.
    pub(super) async fn exec(&mut self, command: &str) -> Result<(), russh::Error> {
        self.started = true;
        self.writer.exec(true, format!("export {TAG}={};{command}", self.tag)).await
    }

    /// What ended the connection below, for messages.
    pub(super) fn lost(&self) -> String {
        self.connection.ended()
    }

    /// The server has closed the channel: nothing is left to clean up, and the next one can be opened ahead.
    pub(super) fn finish(mut self) {
        self.finished = true;
        let connection = Arc::clone(&self.connection);
        let wanted = !connection.handle.is_closed() && connection.reserve().is_none();
        if !wanted || connection.refilling.swap(true, Ordering::SeqCst) {
            return;
        }
        tokio::spawn(async move {
            // Refused or lost, there is just none: the next command opens its own.
            if let Ok(channel) = connection.open_session().await {
                *connection.reserve() = Some(channel);
            }
            connection.refilling.store(false, Ordering::SeqCst);
        });
    }

    /// The command is over, and only something that it left behind on purpose holds the channel open.
    pub(super) async fn abandon_channel(mut self) {
        self.finished = true;
        let _ = self.writer.close().await;
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if self.finished || self.connection.handle.is_closed() {
            return;
        }
        let writer = Arc::clone(&self.writer);
        let connection = Arc::clone(&self.connection);
        let (tag, limit, permit) = (std::mem::take(&mut self.tag), self.kill_limit, self.permit.take());
        let started = self.started;
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                let _ = tokio::time::timeout(limit, async {
                    let _ = writer.close().await;
                    if started {
                        connection.kill(&tag).await;
                    }
                })
                .await;
                drop(permit);
            });
        }
    }
}

/// The environment variable that carries a command's tag.
const TAG: &str = "HARNESS_EXEC";

/// A tag that no other command has, of this process or another.
fn new_tag() -> String {
    static PROCESS: OnceLock<u64> = OnceLock::new();
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let process = PROCESS.get_or_init(|| RandomState::new().hash_one(std::process::id()));
    format!("{process:016x}{:08x}", COUNT.fetch_add(1, Ordering::Relaxed))
}

/// The command that kills the process group started with `tag`.
///
/// The shell that was started by sshd leads its group and has the tag in its command line, and what it
/// replaced itself with has it in its environment. The pattern is put together by the shell, so that this
/// command's own line does not match; of the other hits only group leaders are hit by `kill -- -PID`.
/// A second look is for a shell that sshd was only about to start.
fn kill_command(tag: &str) -> String {
    let (head, tail) = tag.split_at(tag.len() / 2);
    format!(
        "exec 2>/dev/null; for n in 1 2; do \
           for f in $(grep -lsaF {TAG}={head}''{tail} /proc/[0-9]*/cmdline /proc/[0-9]*/environ); do \
             p=${{f#/proc/}}; kill -KILL -- \"-${{p%%/*}}\" && exit 0; \
           done; sleep 1; \
         done"
    )
}

impl Connection {
    /// Kills the process group of a command, as well as that can be done. Nobody waits for it.
    async fn kill(&self, tag: &str) {
        let _one_at_a_time = self.killing.lock().await;
        let mut channel = loop {
            if let Some(channel) = self.take_reserve() {
                break channel;
            }
            match self.open_session().await {
                Ok(channel) => break channel,
                // The caller's time limit bounds it.
                Err(russh::Error::ChannelOpenFailure(_)) => tokio::time::sleep(REFUSED_PAUSE).await,
                Err(_) => return,
            }
        };
        if channel.exec(false, kill_command(tag)).await.is_ok() {
            while !matches!(channel.wait().await, Some(russh::ChannelMsg::Close) | None) {}
        }
    }
}
