//! What becomes of the connection to a guest, told to whoever keeps evidence.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

/// Failed attempts are told together, at the latest after this time.
const TOLD_EVERY: Duration = Duration::from_secs(30);

/// Why a connection attempt came to nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum AttemptClass {
    /// Nobody listens on the forwarded port: QEMU is not there.
    PortClosed,
    /// The connection was ended before sshd's banner: the guest is up, its sshd is not.
    EndedBeforeBanner,
    /// Nothing was heard: the guest's network is not up, or it is starved.
    Silent,
    /// The key exchange or the login broke off.
    Handshake,
}

impl AttemptClass {
    /// A word for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::PortClosed => "port-closed",
            Self::EndedBeforeBanner => "ended-before-banner",
            Self::Silent => "silent",
            Self::Handshake => "handshake",
        }
    }
}

/// One piece of news of the connection to a guest. Displayed as a line of evidence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SshNews {
    /// Attempts of one class that came to nothing, however many.
    Failed {
        /// Their class.
        class: AttemptClass,
        /// How many.
        count: u32,
        /// From the first to the last.
        over: Duration,
        /// What the last one ended with.
        last: String,
    },
    /// A connection was made.
    Connected {
        /// Since it was looked for.
        after: Duration,
        /// TCP connections opened for it.
        attempts: u32,
    },
    /// A connection that was there is gone.
    Lost {
        /// What ended it.
        reason: String,
    },
    /// The guest can never be reached: another host key, a refused login.
    Refused {
        /// Why.
        reason: String,
    },
    /// The server would not open a channel.
    ChannelRefused {
        /// What for.
        what: String,
        /// Its reason.
        reason: String,
    },
    /// The journal's reader in the guest ended and is started again at its cursor.
    JournalInterrupted {
        /// What ended it.
        reason: String,
    },
}

impl SshNews {
    /// What kind of news it is, for counting.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Failed { class, .. } => class.as_str(),
            Self::Connected { .. } => "connected",
            Self::Lost { .. } => "lost",
            Self::Refused { .. } => "refused",
            Self::ChannelRefused { .. } => "channel-refused",
            Self::JournalInterrupted { .. } => "journal-interrupted",
        }
    }
}

impl fmt::Display for SshNews {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failed { class, count, over, last } => {
                let over = over.as_secs_f64();
                write!(
                    f,
                    "{count} connection attempts came to nothing within {over:.1} s ({}), the last: {last}",
                    class.as_str()
                )
            }
            Self::Connected { after, attempts } => {
                write!(f, "connected after {:.1} s, {attempts} connections tried", after.as_secs_f64())
            }
            Self::Lost { reason } => write!(f, "connection lost: {reason}"),
            Self::Refused { reason } => write!(f, "refused for good: {reason}"),
            Self::ChannelRefused { what, reason } => write!(f, "no channel for {what}: {reason}"),
            Self::JournalInterrupted { reason } => write!(f, "journal interrupted, taken up at its cursor: {reason}"),
        }
    }
}

/// Who is told. Called in the middle of things: it must not block.
#[derive(Clone)]
pub struct NewsSink(Arc<dyn Fn(SshNews) + Send + Sync>);

impl NewsSink {
    /// Tells `listener`.
    pub fn new(listener: impl Fn(SshNews) + Send + Sync + 'static) -> Self {
        Self(Arc::new(listener))
    }

    /// Tells nobody.
    #[must_use]
    pub fn none() -> Self {
        Self::new(drop)
    }

    pub(super) fn tell(&self, news: SshNews) {
        (self.0)(news);
    }
}

/// Attempts of one search that came to nothing, counted by class. What was counted is told when the search ends, however it
/// does, and every half minute of a long one: a thousand refused connections are one line.
pub(super) struct Attempts<'a> {
    sink: &'a NewsSink,
    failed: BTreeMap<AttemptClass, Count>,
    told: Instant,
}

struct Count {
    count: u32,
    first: Instant,
    last_at: Instant,
    last: String,
}

impl<'a> Attempts<'a> {
    pub(super) fn new(sink: &'a NewsSink) -> Self {
        Self { sink, failed: BTreeMap::new(), told: Instant::now() }
    }

    pub(super) fn failed(&mut self, class: AttemptClass, why: &str) {
        let now = Instant::now();
        let count =
            self.failed.entry(class).or_insert(Count { count: 0, first: now, last_at: now, last: String::new() });
        count.count = count.count.saturating_add(1);
        count.last_at = now;
        why.clone_into(&mut count.last);
        if now - self.told >= TOLD_EVERY {
            self.tell();
        }
    }

    fn tell(&mut self) {
        self.told = Instant::now();
        for (class, Count { count, first, last_at, last }) in std::mem::take(&mut self.failed) {
            self.sink.tell(SshNews::Failed { class, count, over: last_at - first, last });
        }
    }
}

impl Drop for Attempts<'_> {
    fn drop(&mut self) {
        self.tell();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_thousand_refusals_are_one_line_with_a_count() {
        let told = Arc::new(Mutex::new(Vec::new()));
        let sink = NewsSink::new({
            let told = Arc::clone(&told);
            move |news: SshNews| told.lock().unwrap().push(news.to_string())
        });
        {
            let mut attempts = Attempts::new(&sink);
            for _ in 0..1000 {
                attempts.failed(AttemptClass::EndedBeforeBanner, "closed before the banner");
                tokio::time::advance(Duration::from_millis(10)).await;
            }
            attempts.failed(AttemptClass::Silent, "no banner");
            assert!(told.lock().unwrap().is_empty(), "told too soon");
        }
        assert_eq!(
            *told.lock().unwrap(),
            [
                "1000 connection attempts came to nothing within 10.0 s (ended-before-banner), the last: closed before the banner",
                "1 connection attempts came to nothing within 0.0 s (silent), the last: no banner",
            ]
        );
    }
}
