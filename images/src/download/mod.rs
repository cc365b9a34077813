//! Downloads: a file of a known digest, fetched once, continued where it stopped, never used before it is whole.
//!
//! What is retried is decided by [`DownloadError::class`]: time-outs, lost connections and the answers 429, 500, 502, 503
//! and 504. A refusal, a missing file and a wrong digest are not. Dropping the future of a download ends it at once and
//! leaves a part that the next one continues.

mod client;
mod error;
mod part;
mod proxy;
mod sums;

use std::time::Duration;

use camino::Utf8PathBuf;
use reqwest::Url;

use crate::retry::Policy;

pub(crate) use client::{Client, shown};
pub use error::DownloadError;
pub(crate) use part::{Wanted, fetch};
pub use proxy::ProxyVars;
pub(crate) use sums::Sums;

/// Environment variable that names another server than [`RELEASE_BASE_URL`].
pub const BASE_URL_ENV: &str = "HARNESS_K3S_BASE_URL";

/// Where k3s publishes its releases; a release's files lie in a folder named by its version.
pub const RELEASE_BASE_URL: &str = "https://github.com/k3s-io/k3s/releases/download";

/// Largest list of digests that is read.
const MAX_SUMS_BYTES: u64 = 256 * 1024;

/// From where and with which patience files are fetched.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// What a release's folder lies in; http or https.
    pub base_url: String,
    /// How long a connection may take to come about.
    pub connect_timeout: Duration,
    /// How long a server may be as good as silent.
    pub stall_timeout: Duration,
    /// The longest pause a server may ask for; one that asks for more is not asked again.
    pub max_retry_after: Duration,
    /// Redirects that are followed for one request.
    pub max_redirects: u32,
    /// When another attempt follows a transient error.
    pub policy: Policy,
    /// The proxies.
    pub proxies: ProxyVars,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            base_url: RELEASE_BASE_URL.to_owned(),
            connect_timeout: Duration::from_secs(15),
            stall_timeout: Duration::from_secs(30),
            max_retry_after: Duration::from_secs(60),
            max_redirects: 5,
            // Elapsed time counts from the first attempt: a slow line that breaks late still gets its further attempts.
            policy: Policy::Exponential {
                initial: Duration::from_millis(500),
                max_interval: Duration::from_secs(10),
                max_elapsed: Duration::from_secs(3_600),
                max_attempts: 6,
            },
            proxies: ProxyVars::default(),
        }
    }
}

impl Options {
    /// The defaults with what the environment says: [`BASE_URL_ENV`] and the proxy variables.
    #[must_use]
    pub fn from_env() -> Self {
        let base_url = std::env::var(BASE_URL_ENV).ok().filter(|url| !url.is_empty());
        Self {
            base_url: base_url.unwrap_or_else(|| RELEASE_BASE_URL.to_owned()),
            proxies: ProxyVars::from_env(),
            ..Self::default()
        }
    }

    /// The same with `base_url`, where one is given: what somebody says wins over the environment.
    #[must_use]
    pub fn with_base_url(mut self, base_url: Option<&str>) -> Self {
        if let Some(url) = base_url {
            url.clone_into(&mut self.base_url);
        }
        self
    }

    /// Whether files could be fetched from below `base_url`.
    ///
    /// # Errors
    /// Where it is no http or https URL.
    pub fn check_base_url(base_url: &str) -> Result<(), DownloadError> {
        Self { base_url: base_url.to_owned(), ..Self::default() }.url("v0.0.0", "").map(drop)
    }

    /// The URL of a release's file. The `+` of a version is escaped: servers read a bare one as a blank.
    pub(crate) fn url(&self, version: &str, name: &str) -> Result<Url, DownloadError> {
        // What comes before an @ may hold a password.
        let bare = self.base_url.rsplit('@').next().unwrap_or_default();
        let fail = |reason: String| DownloadError::Url { text: bare.to_owned(), reason };
        let text = format!("{}/{}/{name}", self.base_url.trim_end_matches('/'), version.replace('+', "%2B"));
        let url = Url::parse(&text).map_err(|error| fail(error.to_string()))?;
        match url.scheme() {
            "http" | "https" => Ok(url),
            scheme => Err(fail(format!("its scheme is {scheme}"))),
        }
    }
}

/// What a download does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DownloadEvent {
    /// The file is in the cache.
    Cached {
        /// The file.
        path: Utf8PathBuf,
    },
    /// Another process has the same download under way.
    Waiting {
        /// The lock that is waited for.
        lock: Utf8PathBuf,
    },
    /// A file in the cache is not what was recorded and is fetched anew.
    Damaged {
        /// The file.
        path: Utf8PathBuf,
        /// What differs.
        reason: String,
    },
    /// A server begins to send.
    Started {
        /// The URL.
        url: String,
        /// Bytes that were there already.
        resumed_from: u64,
        /// The whole length in bytes, where the server says it.
        total: Option<u64>,
    },
    /// More has come.
    Progress {
        /// Bytes that are there.
        received: u64,
        /// The whole length in bytes, where the server says it.
        total: Option<u64>,
    },
    /// An attempt failed and another follows.
    Retrying {
        /// The URL.
        url: String,
        /// The number of the attempt that failed, from 1.
        attempt: u32,
        /// Why it failed.
        error: String,
        /// The pause before the next.
        pause: Duration,
    },
    /// What was put together from several attempts is not the published file and is fetched anew in one.
    Restarted {
        /// The URL.
        url: String,
    },
    /// The file is whole, its digest is the published one, and it is in the cache.
    Finished {
        /// The file.
        path: Utf8PathBuf,
        /// Its length.
        bytes: u64,
    },
}

/// Who is told of a download's events; called often, and must not block.
pub type OnEvent<'a> = &'a (dyn Fn(DownloadEvent) + Send + Sync);

/// Fetches the list of digests at `url`.
pub(crate) async fn fetch_sums(client: &Client, url: &Url, on_event: OnEvent<'_>) -> Result<Sums, DownloadError> {
    let text = client.text(url, MAX_SUMS_BYTES, on_event).await?;
    Sums::parse(&text).map_err(|reason| DownloadError::Sums { url: shown(url), reason })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_escaped_and_other_schemes_refused() {
        let url = |base: &str| {
            let options = Options { base_url: base.to_owned(), ..Options::default() };
            options.url("v1.35.0+k3s1", "k3s-arm64").map(String::from).map_err(|error| error.to_string())
        };
        let expected = "https://github.com/k3s-io/k3s/releases/download/v1.35.0%2Bk3s1/k3s-arm64";
        assert_eq!(url(RELEASE_BASE_URL).unwrap(), expected);
        assert_eq!(url("http://mirror/k3s/").unwrap(), "http://mirror/k3s/v1.35.0%2Bk3s1/k3s-arm64");
        assert!(url("ftp://mirror").unwrap_err().contains("its scheme is ftp"));
        assert!(url("mirror").unwrap_err().contains("\"mirror\" is no http or https URL"));
    }
}
