//! Getting the k3s of a command, with its download shown as plain lines.

use std::io::Write as _;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use camino::Utf8Path;
use images::download::DownloadEvent;
use images::k3s::{K3sBinary, K3sError, K3sSource};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::cli::runtime;
use crate::error::CommandError;
use crate::exit::Blame;

/// The shortest time between two lines about how far a download is.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

/// Finds the binary of `source`, or fetches it into `cache`. Nothing else has been started yet; SIGINT, SIGTERM and SIGHUP
/// end it at once.
pub(super) fn resolve(source: &K3sSource, cache: &Utf8Path) -> Result<K3sBinary, CommandError> {
    let runtime = runtime()?;
    let result = runtime.block_on(interruptible(source, cache));
    // A name that is still being looked up is left behind; waiting for it would hold up an interrupted command.
    runtime.shutdown_background();
    result
}

async fn interruptible(source: &K3sSource, cache: &Utf8Path) -> Result<K3sBinary, CommandError> {
    let open =
        |kind| signal(kind).map_err(|error| CommandError::new(Blame::Environment, "listening for signals", &error));
    let (mut int, mut term, mut hup) =
        (open(SignalKind::interrupt())?, open(SignalKind::terminate())?, open(SignalKind::hangup())?);
    let lines = Lines::default();
    let told = |event| lines.tell(&event);
    let interrupted = |name: &str| Err(CommandError::plain(Blame::Interrupted, format!("interrupted by {name}")));
    tokio::select! {
        found = source.resolve_in(cache, &told) => found.map_err(|error| command_error(source, &error)),
        () = received(&mut int) => interrupted("SIGINT"),
        () = received(&mut term) => interrupted("SIGTERM"),
        () = received(&mut hup) => interrupted("SIGHUP"),
    }
}

/// Waits for a signal; one that can no longer come is waited for without end.
async fn received(signal: &mut Signal) {
    if signal.recv().await.is_none() {
        std::future::pending::<()>().await;
    }
}

fn command_error(source: &K3sSource, error: &K3sError) -> CommandError {
    let blame = match error {
        K3sError::Syntax { .. } | K3sError::Version { .. } => Blame::Usage,
        K3sError::Interrupted => Blame::Interrupted,
        _ => Blame::Environment,
    };
    let shown = CommandError::new(blame, format!("getting k3s from {source}"), error);
    match error.hint() {
        Some(hint) => shown.hint(hint),
        None => shown,
    }
}

/// Events as lines on standard error.
#[derive(Default)]
struct Lines {
    last_progress: Mutex<Option<Instant>>,
}

impl Lines {
    fn tell(&self, event: &DownloadEvent) {
        if matches!(event, DownloadEvent::Progress { .. }) {
            let mut last = self.last_progress.lock().unwrap_or_else(PoisonError::into_inner);
            // The first line comes after a while: what is short needs none.
            let since = last.get_or_insert_with(Instant::now);
            if since.elapsed() < PROGRESS_INTERVAL {
                return;
            }
            *last = Some(Instant::now());
        }
        if let Some(line) = words(event) {
            // Nobody may be listening; the download goes on.
            let _ = writeln!(std::io::stderr(), "k3s: {line}");
        }
    }
}

/// One line for an event; `None` where there is nothing to say.
fn words(event: &DownloadEvent) -> Option<String> {
    use DownloadEvent as E;
    Some(match event {
        E::Cached { .. } => return None,
        E::Waiting { lock } => format!("another process is fetching it; waiting for {lock}"),
        E::Damaged { path, reason } => format!("{path} is not used: {reason}"),
        E::Started { url, resumed_from: 0, total } => format!("fetching {url}{}", size(*total)),
        E::Started { url, resumed_from, total } => {
            format!("fetching {url}{}, going on after {}", size(*total), mib(*resumed_from))
        }
        E::Progress { received, total: Some(total) } => {
            let percent = received.saturating_mul(100).checked_div(*total).unwrap_or(100);
            format!("{} of {} ({percent} %)", mib(*received), mib(*total))
        }
        E::Progress { received, total: None } => mib(*received),
        E::Retrying { attempt, error, pause, .. } => {
            format!("attempt {attempt} failed: {error}; again in {:.1} s", pause.as_secs_f64())
        }
        E::Restarted { url } => {
            format!("what came of {url} in several parts is not the published file; fetching it in one")
        }
        E::Finished { path, bytes } => format!("{} fetched and checked: {path}", mib(*bytes)),
    })
}

fn size(total: Option<u64>) -> String {
    total.map_or_else(String::new, |total| format!(", {}", mib(total)))
}

#[expect(clippy::cast_precision_loss, reason = "shown with one decimal")]
fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / (1024.0 * 1024.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn downloads_are_told_in_words() {
        let total = Some(73_400_320);
        let url = "https://mirror/k3s".to_owned();
        let told = |event| words(&event).unwrap();
        assert_eq!(
            told(DownloadEvent::Started { url: url.clone(), resumed_from: 0, total }),
            "fetching https://mirror/k3s, 70.0 MiB"
        );
        assert_eq!(
            told(DownloadEvent::Started { url: url.clone(), resumed_from: 36_700_160, total: None }),
            "fetching https://mirror/k3s, going on after 35.0 MiB"
        );
        assert_eq!(told(DownloadEvent::Progress { received: 36_700_160, total }), "35.0 MiB of 70.0 MiB (50 %)");
        assert_eq!(told(DownloadEvent::Progress { received: 0, total: Some(0) }), "0.0 MiB of 0.0 MiB (100 %)");
        let error = "https://mirror/k3s answered 503 Service Unavailable".to_owned();
        assert_eq!(
            told(DownloadEvent::Retrying { url, attempt: 1, error, pause: Duration::from_millis(1_500) }),
            "attempt 1 failed: https://mirror/k3s answered 503 Service Unavailable; again in 1.5 s"
        );
        assert_eq!(words(&DownloadEvent::Cached { path: "/cache/k3s".into() }), None);
    }
}
