//! [`Guest`]: one SSH connection per node, repaired when it breaks, with many channels on it.
//!
//! The SSH library hands a channel's data to that channel's queue and stops reading the connection while
//! the queue is full: a slow reader of one channel would hold up all of them. So whoever reads a channel
//! here reads it to the end, and drops (marked) or reopens (the journal) where its own reader is too slow.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use russh::client::Msg;
use russh::keys::{PrivateKey, PublicKey};
use russh::{Channel, ChannelOpenFailure, ChannelStream, Disconnect};
use tokio::sync::{Semaphore, oneshot};
use tokio::time::Instant;

use super::connect;
use super::error::GuestError;
use super::news::{NewsSink, SshNews};
use super::session::{Connection, REFUSED_PAUSE, Session};

/// Session channels in use at one time. sshd's default `MaxSessions` is 10; one more is kept in reserve, one
/// may be killing, and sshd counts a closed one until it has gone through what it has read.
const SESSIONS_MAX: u32 = 6;
/// How long a session that was refused is asked for again.
const REFUSED_LIMIT: Duration = Duration::from_secs(2);
/// Time a channel may take to open.
const OPEN_LIMIT: Duration = Duration::from_secs(20);
/// Time for killing what an abandoned command left running.
const KILL_LIMIT: Duration = Duration::from_secs(10);
/// How often an operation that has not had its effect yet moves to a new connection.
const OPEN_ATTEMPTS: u32 = 5;

/// A TCP connection made by the guest's sshd, carried by a channel.
pub type GuestStream = ChannelStream<Msg>;

/// Where a guest is and how it is known.
#[derive(Clone)]
pub struct SshTarget {
    /// The node's name, for messages.
    pub node: String,
    /// The forwarded port on the host.
    pub addr: SocketAddr,
    /// The login name.
    pub user: String,
    /// The only host key that is accepted.
    pub host_key: PublicKey,
    /// The key to log in with.
    pub identity: Arc<PrivateKey>,
    /// How much slower than under hardware virtualization the guest may be (1.0 = not at all). Scales
    /// keepalive, handshake and channel times, not the deadlines that callers give.
    pub patience: f64,
    /// Told of every failure on the way to the guest.
    pub news: NewsSink,
}

impl SshTarget {
    /// A duration scaled by the patience, between once and thirty times as long.
    pub(super) fn scaled(&self, duration: Duration) -> Duration {
        duration.mul_f64(if self.patience.is_finite() { self.patience.clamp(1.0, 30.0) } else { 1.0 })
    }
}

impl std::fmt::Debug for SshTarget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SshTarget")
            .field("node", &self.node)
            .field("addr", &self.addr)
            .field("user", &self.user)
            .finish_non_exhaustive()
    }
}

/// A guest, reached over SSH. Clones share the connection.
///
/// A broken connection is repaired by the next operation, within that operation's deadline and against the
/// same pinned key. An operation that was under way when it broke ends with
/// [`GuestError::ConnectionLost`]: it is never repeated behind the caller's back.
#[derive(Clone)]
pub struct Guest {
    inner: Arc<Inner>,
}

impl std::fmt::Debug for Guest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guest").field("target", &self.inner.target).finish_non_exhaustive()
    }
}

struct Inner {
    target: SshTarget,
    connection: tokio::sync::Mutex<Option<Arc<Connection>>>,
    sessions: Arc<Semaphore>,
    closed: AtomicBool,
    connections: AtomicU64,
}

impl Guest {
    /// Connects with one attempt of at most `attempt_timeout`.
    pub async fn connect_once(target: SshTarget, attempt_timeout: Duration) -> Result<Guest, GuestError> {
        let connection = connect::once(&target, attempt_timeout).await?;
        Ok(Guest::over(target, connection))
    }

    /// Connects as soon as the guest answers, for at most `deadline`.
    ///
    /// Returns at once with [`GuestError::HostKeyMismatch`] or [`GuestError::AuthRefused`], which no
    /// waiting mends; otherwise [`GuestError::Unreachable`] at the deadline. Cancel-safe.
    pub async fn connect(target: SshTarget, deadline: Duration) -> Result<Guest, GuestError> {
        let connection = connect::until(&target, Instant::now() + deadline, None).await?;
        Ok(Guest::over(target, connection))
    }

    /// As [`Guest::connect`], paced by what somebody sees of the guest from outside.
    pub async fn connect_seen(
        target: SshTarget,
        deadline: Duration,
        seen: &connect::Sightings,
    ) -> Result<Guest, GuestError> {
        let connection = connect::until(&target, Instant::now() + deadline, Some(seen)).await?;
        Ok(Guest::over(target, connection))
    }

    fn over(target: SshTarget, connection: Connection) -> Guest {
        Guest {
            inner: Arc::new(Inner {
                target,
                connection: tokio::sync::Mutex::new(Some(Arc::new(connection))),
                sessions: Arc::new(Semaphore::new(SESSIONS_MAX as usize)),
                closed: AtomicBool::new(false),
                connections: AtomicU64::new(1),
            }),
        }
    }

    /// The node's name.
    pub fn node(&self) -> &str {
        &self.inner.target.node
    }

    /// Where and how the guest is reached.
    pub fn target(&self) -> &SshTarget {
        &self.inner.target
    }

    /// How many connections there have been: 1 means that it never broke.
    pub fn connections(&self) -> u64 {
        self.inner.connections.load(Ordering::Relaxed)
    }

    /// Opens a TCP connection from the guest to `host:port`. No process is started in the guest.
    ///
    /// # Errors
    /// [`GuestError::ChannelRefused`] with the guest's own words where it does not get there: `Connection refused`, `No route to
    /// host`. A lost connection.
    pub async fn direct_tcpip(&self, host: &str, port: u16) -> Result<GuestStream, GuestError> {
        self.tcpip(host, port, true).await.map(Channel::into_stream)
    }

    /// Whether TCP from the guest to `host:port` is answered: by a connection, which is closed at once, or by a refusal. A port
    /// that nothing listens on costs the other side no process.
    ///
    /// # Errors
    /// As [`Guest::direct_tcpip`].
    pub async fn tcp_answered(&self, host: &str, port: u16) -> Result<(), GuestError> {
        match self.tcpip(host, port, false).await {
            Ok(channel) => {
                // A connection that is lost meanwhile has been answered.
                let _ = channel.close().await;
                Ok(())
            }
            Err(error) if error.is_tcp_refusal() => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn tcpip(&self, host: &str, port: u16, refusal_is_news: bool) -> Result<Channel<Msg>, GuestError> {
        let what = format!("a connection to {host}:{port}");
        let limit = self.inner.target.scaled(OPEN_LIMIT);
        let open = self.open(&what, Instant::now() + limit, |connection| {
            let host = host.to_owned();
            async move { connection.handle.channel_open_direct_tcpip(host, u32::from(port), "127.0.0.1", 0).await }
        });
        let opened = match tokio::time::timeout(limit, open).await {
            Ok(opened) => opened.map(|(_, channel)| channel),
            Err(_) => Err(GuestError::ChannelRefused {
                node: self.node().to_owned(),
                what,
                reason: format!("no answer within {:.0} s", limit.as_secs_f64()),
            }),
        };
        if let Err(error) = &opened
            && (refusal_is_news || !error.is_tcp_refusal())
        {
            self.tell_refusal(error);
        }
        opened
    }

    fn tell_refusal(&self, error: &GuestError) {
        if let GuestError::ChannelRefused { what, reason, .. } = error {
            self.inner.target.news.tell(SshNews::ChannelRefused { what: what.clone(), reason: reason.clone() });
        }
    }

    /// Says goodbye and ends the connection. Other clones get [`GuestError::Closed`] from then on.
    pub async fn disconnect(self) {
        self.inner.closed.store(true, Ordering::SeqCst);
        let connection = self.inner.connection.lock().await.take();
        if let Some(connection) = connection {
            // A guest that is gone already has nothing to be told.
            let _ = connection.handle.disconnect(Disconnect::ByApplication, "done", "en").await;
        }
    }

    /// Waits until no command is under way, and none that was abandoned is still being killed.
    pub(super) async fn idle(&self) {
        // The semaphore is never closed.
        let _ = self.inner.sessions.acquire_many(SESSIONS_MAX).await;
    }

    /// A session channel ready for a command, on a repaired connection if need be.
    pub(super) async fn session(&self, end: Instant) -> Result<Session, GuestError> {
        let closed = || GuestError::Closed { node: self.node().to_owned() };
        let permit = Arc::clone(&self.inner.sessions).acquire_owned().await.map_err(|_| closed())?;
        let refused_until = Instant::now() + self.inner.target.scaled(REFUSED_LIMIT);
        let (connection, channel) = loop {
            let connection = self.connection(end).await?;
            if let Some(channel) = connection.take_reserve() {
                break (connection, channel);
            }
            let opened = self.open("a session", end, |c| async move { c.handle.channel_open_session().await }).await;
            if let Err(error) = &opened {
                self.tell_refusal(error);
            }
            match opened {
                Ok(opened) => break opened,
                Err(GuestError::ChannelRefused { .. }) if Instant::now() < refused_until => {
                    tokio::time::sleep(REFUSED_PAUSE).await;
                }
                Err(e) => return Err(e),
            }
        };
        let (reader, writer) = channel.split();
        let kill_limit = self.inner.target.scaled(KILL_LIMIT);
        Ok(Session::new(reader, writer, connection, permit, kill_limit))
    }

    /// The live connection, or a new one made before `end`.
    async fn connection(&self, end: Instant) -> Result<Arc<Connection>, GuestError> {
        let mut current = self.inner.connection.lock().await;
        if self.inner.closed.load(Ordering::SeqCst) {
            return Err(GuestError::Closed { node: self.node().to_owned() });
        }
        if let Some(connection) = &*current
            && !connection.handle.is_closed()
        {
            return Ok(Arc::clone(connection));
        }
        if let Some(dead) = current.take() {
            self.inner.target.news.tell(SshNews::Lost { reason: dead.ended() });
        }
        let connection = Arc::new(connect::until(&self.inner.target, end, None).await?);
        self.inner.connections.fetch_add(1, Ordering::Relaxed);
        *current = Some(Arc::clone(&connection));
        Ok(connection)
    }

    /// Opens a channel with `open`; moves to a new connection when the old one turns out to be dead.
    async fn open<F, O>(&self, what: &str, end: Instant, open: F) -> Result<(Arc<Connection>, Channel<Msg>), GuestError>
    where
        F: Fn(Arc<Connection>) -> O,
        O: Future<Output = Result<Channel<Msg>, russh::Error>> + Send + 'static,
    {
        let mut reason = String::new();
        for _ in 0..OPEN_ATTEMPTS {
            let connection = self.connection(end).await?;
            let opening = open(Arc::clone(&connection));
            let (sender, receiver) = oneshot::channel();
            let refusing = Arc::clone(&connection);
            // In a task of its own: a caller that gives up must not leave an open channel on the server, nor a refusal's
            // words to the next one.
            tokio::spawn(async move {
                let opened = opening.await;
                let words = match &opened {
                    Err(russh::Error::ChannelOpenFailure(ChannelOpenFailure::ConnectFailed)) => {
                        refusing.refusal().await
                    }
                    _ => String::new(),
                };
                if let Err((Ok(unwanted), _)) = sender.send((opened, words)) {
                    let unwanted: Channel<Msg> = unwanted;
                    let _ = unwanted.close().await;
                }
            });
            match receiver.await {
                Ok((Ok(channel), _)) => return Ok((connection, channel)),
                Ok((Err(russh::Error::ChannelOpenFailure(why)), words)) => {
                    let reason = match words.is_empty() {
                        true => why_refused(why),
                        false => format!("{}: {words}", why_refused(why)),
                    };
                    return Err(GuestError::ChannelRefused {
                        node: self.node().to_owned(),
                        what: what.to_owned(),
                        reason,
                    });
                }
                Ok((Err(e), _)) => reason = format!("{e} ({})", connection.ended()),
                Err(_) => reason = connection.ended(),
            }
            // The connection's end is seen by its senders a moment before `is_closed` shows it.
            tokio::task::yield_now().await;
        }
        Err(GuestError::ConnectionLost {
            node: self.node().to_owned(),
            during: format!("while opening {what}"),
            reason,
        })
    }
}

/// The reasons of RFC 4254, 5.1, of what the guest's sshd was asked to do.
fn why_refused(why: ChannelOpenFailure) -> String {
    match why {
        ChannelOpenFailure::AdministrativelyProhibited => "it is not allowed to".to_owned(),
        ChannelOpenFailure::ConnectFailed => "it could not connect".to_owned(),
        ChannelOpenFailure::UnknownChannelType => "it does not know how".to_owned(),
        ChannelOpenFailure::ResourceShortage => "it is short of resources".to_owned(),
        ChannelOpenFailure::Other { code, reason } => format!("{reason} (code {code})"),
    }
}
