//! Getting the k3s of a command, with its download shown as plain lines.

use std::io::Write as _;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use camino::Utf8Path;
use images::airgap::AirgapImages;
use images::download::{DownloadEvent, Options};
use images::k3s::{K3sBinary, K3sError, K3sSource};

use crate::cli::runtime;
use crate::cli::signals::Signals;
use crate::error::CommandError;
use crate::exit::Blame;

/// The shortest time between two lines about how far a download is.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

/// Where what k3s needs is fetched from, and what goes with it.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct K3sArgs {
    /// What releases are fetched from: a mirror of k3s's releases, http or https [default: $HARNESS_K3S_BASE_URL, else
    /// k3s's own]
    #[arg(long, value_name = "URL", value_parser = base_url)]
    k3s_base_url: Option<String>,
    /// A tarball of images laid into every node for k3s to import: release, release:VERSION, file:/path/to/images.tar.zst
    /// or none [default: the scenario's, else none]
    #[arg(long, value_name = "SOURCE")]
    airgap_images: Option<AirgapImages>,
}

fn base_url(text: &str) -> Result<String, String> {
    Options::check_base_url(text).map(|()| text.to_owned()).map_err(|error| error.to_string())
}

impl K3sArgs {
    /// What is said here wins over the environment.
    pub(super) fn options(&self) -> Options {
        Options::from_env().with_base_url(self.k3s_base_url.as_deref())
    }

    /// The air-gap images for `k3s`: what is said here wins over `scenario`.
    pub(super) fn airgap_images(&self, k3s: &K3sSource, scenario: &AirgapImages) -> Result<AirgapImages, CommandError> {
        let chosen = self.airgap_images.as_ref().unwrap_or(scenario);
        chosen.version(k3s).map_err(|error| command_error("choosing the air-gap images", &error))?;
        Ok(chosen.clone())
    }
}

/// A k3s and what goes with it.
#[derive(Debug)]
pub(super) struct Wanted<'a> {
    pub(super) source: &'a K3sSource,
    pub(super) airgap_images: &'a AirgapImages,
    pub(super) options: &'a Options,
}

/// The k3s of a command, and what the command goes on with.
pub(super) struct Resolved {
    /// The binary.
    pub(super) binary: K3sBinary,
    /// Has listened since before the binary was looked for: a signal that comes between that and the command's own work is
    /// not lost.
    pub(super) signals: Signals,
    /// What the signals are heard in.
    pub(super) runtime: tokio::runtime::Runtime,
}

/// Finds the binary that is wanted, or fetches it into `cache`. Nothing else has been started yet; SIGINT, SIGTERM and SIGHUP
/// end it at once.
pub(super) fn resolve(wanted: &Wanted<'_>, cache: &Utf8Path) -> Result<Resolved, CommandError> {
    let runtime = runtime()?;
    match runtime.block_on(interruptible(wanted, cache)) {
        Ok((binary, signals)) => Ok(Resolved { binary, signals, runtime }),
        Err(error) => {
            // A name that is still being looked up is left behind; waiting for it would hold up an interrupted command.
            runtime.shutdown_background();
            Err(error)
        }
    }
}

async fn interruptible(wanted: &Wanted<'_>, cache: &Utf8Path) -> Result<(K3sBinary, Signals), CommandError> {
    let mut signals = Signals::open()?;
    let lines = Lines::default();
    let told = |event| lines.tell(&event);
    let Wanted { source, airgap_images, options } = wanted;
    let found = tokio::select! {
        found = source.resolve_with(airgap_images, cache, options, &told) => {
            found.map_err(|error| command_error(&format!("getting k3s from {source}"), &error))
        }
        signal = signals.next() => Err(CommandError::plain(Blame::Interrupted, format!("interrupted by {signal}"))),
    }?;
    Ok((found, signals))
}

fn command_error(doing: &str, error: &K3sError) -> CommandError {
    let blame = match error {
        K3sError::Syntax { .. } | K3sError::Version { .. } | K3sError::AirgapNoRelease { .. } => Blame::Usage,
        K3sError::Interrupted => Blame::Interrupted,
        _ => Blame::Environment,
    };
    let shown = CommandError::new(blame, doing, error);
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
    fn a_signal_between_the_download_and_the_run_is_heard_by_the_run() {
        let own = std::env::current_exe().unwrap();
        let source = K3sSource::File(own.try_into().unwrap());
        let (airgap_images, options) = (&AirgapImages::None, &Options::from_env());
        let wanted = Wanted { source: &source, airgap_images, options };
        let cache = tempfile::tempdir().unwrap();
        let resolved = resolve(&wanted, Utf8Path::from_path(cache.path()).unwrap()).unwrap();
        nix::sys::signal::raise(nix::sys::signal::Signal::SIGHUP).unwrap();
        let (bell, guard) = crate::lab::alarm::alarm();
        let heard = resolved.runtime.block_on(async {
            let supervisor = kvm::Supervisor::new().unwrap();
            let sink = crate::event::EventSink::new().0;
            let listener = crate::cli::signals::listen(resolved.signals, bell, sink, supervisor, |_, _| ());
            let heard = tokio::time::timeout(Duration::from_secs(5), guard.interruption()).await;
            listener.abort();
            heard
        });
        assert_eq!(heard.unwrap(), "SIGHUP");
    }

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
