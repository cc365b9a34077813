//! From a closed port to an authenticated connection.
//!
//! QEMU's user-mode network takes a TCP connection to a forwarded port at once, whatever the guest does:
//! what shows that a guest is there is sshd's banner. Two facts of that network (libslirp) shape the search:
//!
//! - A guest whose network is not up yet leaves the forwarded SYN unanswered, and it is sent again only
//!   after 6 s and then every 12 s (`TCPTV_SRTTDFLT`, `TCPTV_REXMTMAX`; seen with QEMU 7.2: a connection
//!   opened 0.5 s after QEMU started showed the banner 5 s after one opened when sshd was listening).
//! - A guest whose network is up but whose sshd is not answers with a reset, and the connection ends. From
//!   then on the guest answers every SYN itself: one connection at a time, a short pause after each
//!   refusal, and a connection that stays open has sshd at its other end and is waited on.
//!
//! Each connection a guest takes costs it a process, those that were given up in the meantime too, and a starved guest
//! seconds. So who can see from outside how far the guest is says so ([`Sightings`]): no connection is opened before the
//! guest's network is up, and none follows one that was taken. Without that, connections follow each other at a fixed
//! spacing while nothing has been heard, and few live at once.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use russh::client::{self, AuthResult, DisconnectReason};
use russh::keys::{PrivateKeyWithHashAlg, PublicKey, PublicKeyOrCertificate};
use russh::{ChannelId, ChannelOpenFailure, Preferred, kex};
use tokio::net::TcpStream;
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep_until, timeout_at};

use super::error::GuestError;
use super::keys::fingerprint;
use super::news::{AttemptClass, Attempts, SshNews};
use super::session::Connection;
use super::ssh::SshTarget;

/// How long a guest that is watched from outside is left alone: in so long, one whose network does not come up has shown that
/// the watch does not see it.
const UNSEEN_PATIENCE: Duration = Duration::from_secs(15);
/// How long after its network came up connections follow each other closely: the first may find no address there yet.
const CLOSELY_FOR: Duration = Duration::from_secs(4);
/// How long after that the first one is opened. An interface that has just come up may drop its answer (its queue is
/// attached a moment later), and libslirp, asked in vain, asks again after 6 s, when nobody needs it any more.
const UP_PAUSE: Duration = Duration::from_millis(150);
/// Time between two connections then, and how long one is kept.
const CLOSE_SPACING: Duration = Duration::from_millis(250);
const CLOSE_LIFETIME: Duration = Duration::from_millis(1_500);
/// Time between two connections of which no one was taken, to a guest that has refused some: a frame was lost.
const LOST_SPACING: Duration = Duration::from_secs(1);
/// How much longer one is kept where the guest was seen to take one.
const TAKEN_LIFETIME: Duration = Duration::from_secs(8);
/// Time between two connections while the guest has not been heard of.
const SPACING: Duration = Duration::from_millis(400);
/// How long a connection is kept while the guest has not been heard of.
const UNHEARD_LIFETIME: Duration = Duration::from_millis(2_400);
/// Every eighth of them is kept this long: a guest too starved to show its banner sooner is found by it.
const PATIENT_LIFETIME: Duration = Duration::from_secs(25);
const PATIENT_EVERY: u32 = 8;
/// Connections open at one time.
const OUTSTANDING_MAX: usize = 14;
/// How long a connection is waited on once the guest is known to answer.
const HEARD_LIFETIME: Duration = Duration::from_secs(25);
/// Pause after the guest refused, before patience: an answer of its kernel's, on average half of this later than it could be.
const REFUSED_PAUSE: Duration = Duration::from_millis(25);
/// Pause after a handshake that failed for a passing reason (sshd restarting, too many start-ups).
const HANDSHAKE_PAUSE: Duration = Duration::from_millis(250);
/// The handshake's share of a connection attempt.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(20);
/// libslirp gives a SYN up after 75 s; an end that late says nothing about the guest.
const REFUSAL_AGE_MAX: Duration = Duration::from_secs(60);

/// What somebody outside sees of a guest that is being looked for.
#[derive(Debug, Default)]
pub struct Sightings {
    coming: Notify,
    up: AtomicBool,
    taking: Notify,
    taken: AtomicBool,
}

impl Sightings {
    /// The guest's network is up: what is sent to it is answered, by a refusal or by sshd.
    pub fn up(&self) {
        self.up.store(true, Ordering::Release);
        self.look();
    }

    /// Nobody can see from outside how far the guest is: it is looked for by connecting to it.
    pub fn look(&self) {
        // Kept for a search that is just between two looks.
        self.coming.notify_one();
    }

    /// The guest has taken a connection: it is waited on, and no other follows while it lasts.
    pub fn taken(&self) {
        self.taken.store(true, Ordering::Release);
        self.taking.notify_one();
    }
}

/// Checks the server's key, and keeps what ended the connection and what the server said of connections it could not make.
pub(super) struct Pinned {
    key: PublicKey,
    ended: Arc<OnceLock<String>>,
    refusals: mpsc::Sender<String>,
}

/// Refusals told and not yet taken, at most: each is taken by the task that opened the channel.
const REFUSALS_MAX: usize = 16;

/// An error inside a handshake: ours or the library's.
#[derive(Debug, thiserror::Error)]
pub(super) enum HandshakeError {
    #[error("host key {offered}")]
    HostKey { offered: String },
    #[error(transparent)]
    Ssh(#[from] russh::Error),
}

impl client::Handler for Pinned {
    type Error = HandshakeError;

    async fn check_server_key(&mut self, offered: &PublicKeyOrCertificate) -> Result<bool, Self::Error> {
        let offered = offered.public_key();
        if offered.key_data() == self.key.key_data() {
            return Ok(true);
        }
        Err(HandshakeError::HostKey { offered: fingerprint(&offered) })
    }

    async fn channel_open_failure(
        &mut self,
        _channel: ChannelId,
        reason: ChannelOpenFailure,
        description: &str,
        _language: &str,
        _session: &mut client::Session,
    ) -> Result<(), Self::Error> {
        if reason == ChannelOpenFailure::ConnectFailed {
            // Full, it holds words that nobody takes any more.
            let _ = self.refusals.try_send(description.to_owned());
        }
        Ok(())
    }

    async fn disconnected(&mut self, reason: DisconnectReason<Self::Error>) -> Result<(), Self::Error> {
        let text = match &reason {
            DisconnectReason::ReceivedDisconnect(info) => format!("server said: {}", info.message),
            DisconnectReason::Error(HandshakeError::Ssh(russh::Error::Disconnect)) => {
                "connection closed by the guest".to_owned()
            }
            DisconnectReason::Error(e) => e.to_string(),
        };
        // Only the first reason counts; a second call cannot happen.
        let _ = self.ended.set(text);
        Ok(())
    }
}

fn client_config(target: &SshTarget) -> client::Config {
    let keepalive_interval = target.scaled(Duration::from_secs(5));
    let keepalive_max = 3;
    client::Config {
        // The hybrid post-quantum exchange of the default list is a cost without a use on loopback.
        preferred: Preferred {
            kex: vec![
                kex::CURVE25519,
                kex::CURVE25519_PRE_RFC_8731,
                kex::EXTENSION_SUPPORT_AS_CLIENT,
                kex::EXTENSION_OPENSSH_STRICT_KEX_AS_CLIENT,
            ]
            .into(),
            // Asking for the pinned kind alone: a server that has only others fails here, not at the check.
            key: vec![target.host_key.algorithm()].into(),
            ..Preferred::DEFAULT
        },
        nodelay: true,
        channel_buffer_size: 256,
        keepalive_interval: Some(keepalive_interval),
        keepalive_max,
        // Keepalives are not sent while a write is stuck in a full socket: this ends such a connection too.
        inactivity_timeout: Some(keepalive_interval * (keepalive_max as u32 + 2)),
        ..client::Config::default()
    }
}

/// Why one TCP connection did not become a banner.
#[derive(Debug)]
enum NoBanner {
    /// Nobody listens on the local port.
    Local(std::io::Error),
    /// The connection was ended from the other side.
    Ended { reason: String, age: Duration },
    /// Nothing came in the time given.
    Silent,
}

async fn banner(target: &SshTarget, lifetime: Duration, seen: Option<&Sightings>) -> Result<TcpStream, NoBanner> {
    let opened = Instant::now();
    let wait = async {
        let stream = TcpStream::connect(target.addr).await.map_err(NoBanner::Local)?;
        // Without effect on correctness when refused; latency would only be worse.
        let _ = stream.set_nodelay(true);
        // Peeked, not read: the SSH library wants to see the banner itself.
        match stream.peek(&mut [0; 4]).await {
            Ok(0) => Err(NoBanner::Ended { reason: "closed before the banner".into(), age: opened.elapsed() }),
            Ok(_) => Ok(stream),
            Err(e) => Err(NoBanner::Ended { reason: e.to_string(), age: opened.elapsed() }),
        }
    };
    let over = async {
        tokio::time::sleep(lifetime).await;
        if seen.is_some_and(|seen| seen.taken.load(Ordering::Acquire)) {
            tokio::time::sleep(target.scaled(TAKEN_LIFETIME)).await;
        }
    };
    tokio::select! {
        biased;
        banner = wait => banner,
        () = over => Err(NoBanner::Silent),
    }
}

/// Key exchange and login on a connection whose banner has arrived.
async fn handshake(target: &SshTarget, stream: TcpStream) -> Result<Connection, GuestError> {
    let lost = |reason: String| GuestError::ConnectionLost {
        node: target.node.clone(),
        during: "during the handshake".into(),
        reason,
    };
    let mismatch = |offered: String| GuestError::HostKeyMismatch {
        node: target.node.clone(),
        expected: fingerprint(&target.host_key),
        offered,
    };
    let ended = Arc::new(OnceLock::new());
    let (refusals, refused) = mpsc::channel(REFUSALS_MAX);
    let handler = Pinned { key: target.host_key.clone(), ended: Arc::clone(&ended), refusals };
    let mut handle =
        client::connect_stream(Arc::new(client_config(target)), stream, handler).await.map_err(|e| match e {
            HandshakeError::HostKey { offered } => mismatch(offered),
            HandshakeError::Ssh(russh::Error::NoCommonAlgo { kind: russh::AlgorithmKind::Key, theirs, .. }) => {
                mismatch(format!("a key of another kind ({})", theirs.join(",")))
            }
            HandshakeError::Ssh(e) => lost(e.to_string()),
        })?;
    let key = PrivateKeyWithHashAlg::new(Arc::clone(&target.identity), None);
    let answer = handle.authenticate_publickey(&target.user, key).await.map_err(|e| lost(e.to_string()))?;
    match answer {
        AuthResult::Success => Ok(Connection::new(handle, ended, refused)),
        // The library reports a connection that broke during the login as a failure without alternatives.
        AuthResult::Failure { remaining_methods, .. } if remaining_methods.is_empty() && handle.is_closed() => {
            Err(lost(ended.get().cloned().unwrap_or_else(|| "closed during the login".into())))
        }
        AuthResult::Failure { remaining_methods, .. } => Err(GuestError::AuthRefused {
            node: target.node.clone(),
            user: target.user.clone(),
            methods: remaining_methods.iter().map(<&str>::from).collect::<Vec<_>>().join(","),
        }),
    }
}

/// One connection, one attempt, within `limit`.
pub(super) async fn once(target: &SshTarget, limit: Duration) -> Result<Connection, GuestError> {
    let started = Instant::now();
    let unreachable = |last: String| GuestError::Unreachable {
        node: target.node.clone(),
        addr: target.addr,
        waited: started.elapsed(),
        attempts: 1,
        last,
    };
    let stream = banner(target, limit, None).await.map_err(|e| unreachable(describe(&e)))?;
    timeout_at(started + limit, handshake(target, stream))
        .await
        .unwrap_or_else(|_| Err(unreachable("handshake did not end".into())))
}

fn class_of(failure: &NoBanner) -> AttemptClass {
    match failure {
        NoBanner::Local(_) => AttemptClass::PortClosed,
        NoBanner::Ended { .. } => AttemptClass::EndedBeforeBanner,
        NoBanner::Silent => AttemptClass::Silent,
    }
}

fn describe(failure: &NoBanner) -> String {
    match failure {
        NoBanner::Local(e) => e.to_string(),
        // libslirp takes every connection itself and ends it where the guest answers with a reset.
        NoBanner::Ended { reason, .. } => format!("{reason}: the guest's network is up, its sshd is not"),
        NoBanner::Silent => "no banner: the guest's network is not up, or the guest hangs".into(),
    }
}

/// Looks for the guest until `end`. A permanent refusal ends it at once.
///
/// What is `seen` of it from outside sets the pace.
pub(super) async fn until(
    target: &SshTarget,
    end: Instant,
    seen: Option<&Sightings>,
) -> Result<Connection, GuestError> {
    let started = Instant::now();
    let pace = target.patience.clamp(1.0, 4.0);
    let mut waiting = FuturesUnordered::new();
    let mut failed = Attempts::new(&target.news);
    let mut attempts = 0_u32;
    let mut heard = false;
    let mut last = "no banner".to_owned();
    let watched = seen.is_some();
    let mut next = if watched { started + UNSEEN_PATIENCE.mul_f64(pace) } else { started };
    let mut closely_until = started;
    loop {
        let taken = seen.is_none_or(|seen| seen.taken.load(Ordering::Acquire));
        let may_start = match heard {
            true => waiting.is_empty() || (!taken && waiting.len() < OUTSTANDING_MAX),
            false => waiting.len() < OUTSTANDING_MAX,
        };
        let told = |which: fn(&Sightings) -> &Notify| async move {
            match seen {
                Some(seen) => which(seen).notified().await,
                None => std::future::pending().await,
            }
        };
        let closely = Instant::now() < closely_until;
        tokio::select! {
            biased;
            () = sleep_until(end) => {
                return Err(GuestError::Unreachable {
                    node: target.node.clone(),
                    addr: target.addr,
                    waited: started.elapsed(),
                    attempts,
                    last,
                });
            }
            Some(outcome) = waiting.next(), if !waiting.is_empty() => match outcome {
                Ok(stream) => {
                    // The others are closed first: each would cost a starved guest a process.
                    waiting.clear();
                    heard = true;
                    let limit = end.min(Instant::now() + target.scaled(HANDSHAKE_LIMIT));
                    match timeout_at(limit, handshake(target, stream)).await {
                        Ok(Ok(connection)) => {
                            drop(failed);
                            target.news.tell(SshNews::Connected { after: started.elapsed(), attempts });
                            return Ok(connection);
                        }
                        Ok(Err(e)) if e.is_permanent() => {
                            drop(failed);
                            target.news.tell(SshNews::Refused { reason: e.to_string() });
                            return Err(e);
                        }
                        Ok(Err(e)) => last = e.to_string(),
                        Err(_) => last = "handshake did not end".into(),
                    }
                    failed.failed(AttemptClass::Handshake, &last);
                    next = Instant::now() + HANDSHAKE_PAUSE;
                }
                Err(failure) => {
                    last = describe(&failure);
                    failed.failed(class_of(&failure), &last);
                    let pause = REFUSED_PAUSE.mul_f64(pace);
                    match failure {
                        NoBanner::Ended { age, .. } if age < REFUSAL_AGE_MAX => {
                            heard = true;
                            // What else is open was made before the guest answered, and waits for a retransmission.
                            waiting.clear();
                            next = Instant::now() + pause;
                        }
                        NoBanner::Local(_) => next = next.max(Instant::now() + pause),
                        NoBanner::Ended { .. } | NoBanner::Silent => {}
                    }
                }
            },
            () = told(|seen| &seen.taking) => heard = true,
            () = told(|seen| &seen.coming) => {
                next = Instant::now();
                if seen.is_some_and(|seen| seen.up.load(Ordering::Acquire)) {
                    next += UP_PAUSE;
                    // Those made before the guest's network was up wait for a retransmission seconds away.
                    if !heard {
                        waiting.clear();
                    }
                    closely_until = next + CLOSELY_FOR.mul_f64(pace);
                }
            }
            () = sleep_until(next), if may_start => {
                let lifetime = match attempts {
                    _ if heard => target.scaled(HEARD_LIFETIME),
                    n if n % PATIENT_EVERY == 0 => target.scaled(PATIENT_LIFETIME),
                    _ if closely => CLOSE_LIFETIME,
                    _ => UNHEARD_LIFETIME.mul_f64(pace),
                };
                attempts = attempts.saturating_add(1);
                waiting.push(banner(target, lifetime, seen));
                next = Instant::now()
                    + match heard {
                        true => LOST_SPACING.mul_f64(pace),
                        false if closely => CLOSE_SPACING,
                        false => SPACING.mul_f64(pace),
                    };
            }
        }
    }
}
