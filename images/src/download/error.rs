//! What can go wrong on the way from a server to a file, and what of it may pass by itself.

use std::error::Error as StdError;
use std::io::ErrorKind;
use std::time::Duration;

use camino::Utf8PathBuf;

use crate::elf::ElfError;
use crate::fs::FolderError;
use crate::retry::Class;

/// Why a file could not be downloaded. URLs are shown without the password they may carry.
#[derive(Debug, thiserror::Error)]
pub enum DownloadError {
    /// The text is no URL, or one of a scheme that is not spoken.
    #[error("{text:?} is no http or https URL: {reason}")]
    Url {
        /// The text.
        text: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A proxy variable that cannot be followed.
    #[error("{variable} names no usable proxy: {reason}")]
    Proxy {
        /// The variable.
        variable: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The HTTP client could not be made.
    #[error("the http client cannot be set up: {reason}")]
    Client {
        /// What it said.
        reason: String,
    },
    /// There is no certificate authority to trust.
    #[error("{url} cannot be trusted: this host has no certificate authorities (apt-get install ca-certificates)")]
    NoAuthorities {
        /// The URL.
        url: String,
    },
    /// No connection came about.
    #[error("no connection to the server of {url}{}: {reason}", via(.proxy.as_deref()))]
    Connect {
        /// The URL.
        url: String,
        /// The proxy it was to go through.
        proxy: Option<String>,
        /// What the system said.
        reason: String,
        /// Whether it may come about at another attempt.
        class: Class,
    },
    /// The server did not answer, or the answer stopped coming.
    #[error("{url} stalled: {} within {} s", if *.began { "next to nothing came" } else { "no answer came" }, .after.as_secs_f64())]
    Stalled {
        /// The URL.
        url: String,
        /// Whether the body had begun.
        began: bool,
        /// For how long it was waited.
        after: Duration,
    },
    /// The connection ended before the answer did.
    #[error("the connection broke while {url} was read: {reason}")]
    Broken {
        /// The URL.
        url: String,
        /// What was seen.
        reason: String,
    },
    /// What was there before cannot be continued; the next attempt starts anew.
    #[error("{url} cannot be continued: {reason}")]
    NotResumable {
        /// The URL.
        url: String,
        /// What differs.
        reason: String,
    },
    /// The server's answer is not HTTP as it should be.
    #[error("{url} gave a wrong answer: {reason}")]
    Protocol {
        /// The URL.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The server refused.
    #[error("{url} answered {status}{}", wait(.retry_after.as_ref()))]
    Status {
        /// The URL.
        url: String,
        /// The status line's code and reason.
        status: String,
        /// The code.
        code: u16,
        /// How long the server asks to wait (RFC 9110, 10.2.3).
        retry_after: Option<Duration>,
        /// Whether it may answer better at another attempt.
        class: Class,
    },
    /// The server redirects too often, or to where nobody should follow.
    #[error("{url} redirects {reason}")]
    Redirect {
        /// The URL that was asked for.
        url: String,
        /// Where to, and why that is not followed.
        reason: String,
    },
    /// More comes than a file of this kind can have.
    #[error("{url} is larger than {limit} bytes, which no such file is")]
    TooLarge {
        /// The URL.
        url: String,
        /// The limit.
        limit: u64,
    },
    /// The list of digests is none.
    #[error("{url} is no list of sha256 sums: {reason}")]
    Sums {
        /// The URL.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The list of digests does not name the file.
    #[error("{url} does not list {name}")]
    NotListed {
        /// The list's URL.
        url: String,
        /// The file, or the files any of which would do.
        name: String,
    },
    /// The content is not the one that was published.
    #[error("{url} is not what was published: its sha256 is {found}, the release's list says {expected}{note}")]
    Digest {
        /// The URL.
        url: String,
        /// The digest of what came.
        found: String,
        /// The digest in the list.
        expected: String,
        /// What it looks like instead, if that can be told.
        note: &'static str,
    },
    /// The content is what was published and yet no program for the guests.
    #[error("what {url} serves is no program for the guests: {source}")]
    Elf {
        /// The URL.
        url: String,
        /// What is wrong with it.
        source: ElfError,
    },
    /// A file operation failed.
    #[error("could not {doing} {path}: {source}")]
    Io {
        /// The operation.
        doing: &'static str,
        /// The file.
        path: Utf8PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The cache lies where no download may be kept.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// The lock of the download could not be had.
    #[error("could not lock the download: {reason}")]
    Lock {
        /// What was said.
        reason: String,
    },
    /// The program is shutting down.
    #[error("interrupted")]
    Interrupted,
}

fn via(proxy: Option<&str>) -> String {
    proxy.map_or_else(String::new, |proxy| format!(" through the proxy {proxy}"))
}

fn wait(retry_after: Option<&Duration>) -> String {
    retry_after.map_or_else(String::new, |wait| format!(" and asks to wait {} s", wait.as_secs()))
}

impl DownloadError {
    /// An adapter for `map_err` on file operations.
    pub(crate) fn io(doing: &'static str, path: impl Into<Utf8PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { doing, path, source }
    }

    /// Whether another attempt may end better.
    #[must_use]
    pub fn class(&self) -> Class {
        match self {
            Self::Connect { class, .. } | Self::Status { class, .. } => *class,
            Self::Stalled { .. } | Self::Broken { .. } | Self::NotResumable { .. } => Class::Transient,
            _ => Class::Permanent,
        }
    }
}

/// Sorts an error that came before there was an answer, or in the middle of one.
pub(super) fn classify(url: &str, proxy: Option<&str>, error: &reqwest::Error) -> DownloadError {
    let reason = innermost(error);
    let url = url.to_owned();
    let io = chain(error).find_map(|cause| cause.downcast_ref::<std::io::Error>()).map(std::io::Error::kind);
    let hyper = chain(error).find_map(|cause| cause.downcast_ref::<hyper::Error>());
    if error.is_connect() {
        let class = if connection_may_pass(io, error.is_timeout()) { Class::Transient } else { Class::Permanent };
        return DownloadError::Connect { url, proxy: proxy.map(str::to_owned), reason, class };
    }
    if error.is_builder() {
        return DownloadError::Client { reason };
    }
    // A message that cannot be parsed is a server that speaks something else; one that ends early is a broken connection.
    match hyper {
        Some(hyper) if hyper.is_parse() || hyper.is_parse_too_large() => DownloadError::Protocol { url, reason },
        _ => DownloadError::Broken { url, reason },
    }
}

/// A port where nothing listens, a name that is not known and a certificate that is not trusted stay so; a connection
/// that was lost or not answered may be had a moment later.
fn connection_may_pass(io: Option<ErrorKind>, timed_out: bool) -> bool {
    timed_out
        || matches!(
            io,
            Some(
                ErrorKind::ConnectionReset
                    | ErrorKind::ConnectionAborted
                    | ErrorKind::BrokenPipe
                    | ErrorKind::UnexpectedEof
                    | ErrorKind::TimedOut
            )
        )
}

fn chain<'a>(error: &'a (dyn StdError + 'static)) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    // A bound, should an error ever name itself as its cause.
    std::iter::successors(Some(error), |error: &&'a (dyn StdError + 'static)| StdError::source(*error)).take(16)
}

fn innermost(error: &reqwest::Error) -> String {
    let reasons: Vec<String> = chain(error).skip(1).map(ToString::to_string).collect();
    reasons.last().cloned().unwrap_or_else(|| "no reason was given".to_owned()).to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lost_is_tried_again_and_what_is_refused_is_not() {
        assert!(connection_may_pass(Some(ErrorKind::ConnectionReset), false));
        assert!(connection_may_pass(None, true));
        assert!(!connection_may_pass(Some(ErrorKind::ConnectionRefused), false));
        assert!(!connection_may_pass(Some(ErrorKind::InvalidData), false), "a certificate that is not trusted");
        assert!(!connection_may_pass(None, false), "a name that is not known");
    }
}
