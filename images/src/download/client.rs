//! One request and its answer: redirects, time limits, refusals.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use reqwest::header::{self, HeaderMap};
use reqwest::redirect;
use reqwest::{Response, Url};
use tokio::time::Instant;

use super::error::classify;
use super::{DownloadError, DownloadEvent, OnEvent, Options};
use crate::retry::{Class, retry};

/// Who the servers see.
const USER_AGENT: &str = concat!("harness/", env!("CARGO_PKG_VERSION"));

/// Fewer bytes than these in a stall's time are a stall: a server that drips holds a run as one that is silent does.
const MIN_BYTES_PER_STALL: u64 = 1024;

/// An HTTP client with its limits.
pub(crate) struct Client {
    http: reqwest::Client,
    has_authorities: bool,
    pub(super) options: Options,
}

/// Where a download goes on.
pub(super) struct Resume {
    /// Bytes that are there.
    pub(super) offset: u64,
    /// What tells the file they are of from another version of it.
    pub(super) validator: Option<String>,
}

/// An answer whose body has not been read.
pub(super) struct Answer {
    response: Response,
    url: String,
    stall_timeout: Duration,
    /// End of the current stretch, and what came in it.
    window: (Instant, u64),
}

impl Client {
    pub(crate) fn new(options: Options) -> Result<Self, DownloadError> {
        let fail = |reason: String| DownloadError::Client { reason };
        let mut roots = rustls::RootCertStore::empty();
        let native = rustls_native_certs::load_native_certs();
        for error in &native.errors {
            tracing::warn!(%error, "certificate authorities of this host that could not be read");
        }
        let (trusted, _) = roots.add_parsable_certificates(native.certs);
        // The provider is named rather than installed: which one a process uses is not a library's to decide.
        let tls = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(|error| fail(error.to_string()))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let mut builder = reqwest::Client::builder()
            .tls_backend_preconfigured(tls)
            .user_agent(USER_AGENT)
            .connect_timeout(options.connect_timeout)
            // What is tried again and where a redirect leads is decided here, in one place.
            .retry(reqwest::retry::never())
            .redirect(redirect::Policy::none())
            .referer(false)
            .http1_only()
            .pool_max_idle_per_host(0)
            .no_proxy();
        for proxy in options.proxies.proxies()? {
            builder = builder.proxy(proxy);
        }
        let http = builder.build().map_err(|error| fail(error.without_url().to_string()))?;
        Ok(Self { http, has_authorities: trusted > 0, options })
    }

    /// Asks for `url`, following redirects, until an answer with a body worth reading comes: 200, 206 or 416.
    pub(super) async fn open(&self, url: &Url, resume: Option<&Resume>) -> Result<Answer, DownloadError> {
        let asked = shown(url);
        let mut target = url.clone();
        for _ in 0..=self.options.max_redirects {
            let response = self.send(&target, resume).await?;
            let status = response.status();
            match status.as_u16() {
                200 | 206 | 416 => {
                    let stall_timeout = self.options.stall_timeout;
                    let window = (Instant::now() + stall_timeout, 0);
                    return Ok(Answer { response, url: shown(&target), stall_timeout, window });
                }
                301 | 302 | 303 | 307 | 308 => target = next_hop(&asked, &target, response.headers())?,
                code => {
                    // Only these two say when to come back; elsewhere the header means something else (RFC 9110, 10.2.3).
                    let asked_to_wait = retry_after(response.headers(), jiff::Timestamp::now());
                    let retry_after = asked_to_wait.filter(|_| matches!(code, 429 | 503));
                    let patient = retry_after.is_none_or(|wait| wait <= self.options.max_retry_after);
                    let passing = matches!(code, 429 | 500 | 502 | 503 | 504);
                    let class = if passing && patient { Class::Transient } else { Class::Permanent };
                    let (url, status) = (shown(&target), status.to_string());
                    return Err(DownloadError::Status { url, status, code, retry_after, class });
                }
            }
        }
        let reason = format!("more than {} times, at last to {}", self.options.max_redirects, shown(&target));
        Err(DownloadError::Redirect { url: asked, reason })
    }

    async fn send(&self, url: &Url, resume: Option<&Resume>) -> Result<Response, DownloadError> {
        if url.scheme() == "https" && !self.has_authorities {
            return Err(DownloadError::NoAuthorities { url: shown(url) });
        }
        // A digest is of the file, not of a compressed form of it.
        let mut request = self.http.get(url.clone()).header(header::ACCEPT_ENCODING, "identity");
        if let Some(resume) = resume {
            request = request.header(header::RANGE, format!("bytes={}-", resume.offset));
            if let Some(validator) = &resume.validator {
                request = request.header(header::IF_RANGE, validator);
            }
        }
        let after = self.options.connect_timeout + self.options.stall_timeout;
        match tokio::time::timeout(after, request.send()).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => Err(classify(&shown(url), self.options.proxies.shown(url.scheme()).as_deref(), &error)),
            Err(_) => Err(DownloadError::Stalled { url: shown(url), began: false, after }),
        }
    }

    /// Runs `attempt` by the policy; a pause a server asks for is kept where it is longer than the policy's.
    pub(super) async fn retried<T, F, Fut>(
        &self,
        url: &Url,
        on_event: OnEvent<'_>,
        mut attempt: F,
    ) -> Result<T, DownloadError>
    where
        F: FnMut() -> Fut,
        Fut: Future<Output = Result<T, DownloadError>>,
    {
        let not_before: Mutex<Option<Instant>> = Mutex::new(None);
        let held = || not_before.lock().unwrap_or_else(PoisonError::into_inner);
        let told = |attempt: u32, error: &DownloadError, pause: Duration| {
            let asked = match error {
                DownloadError::Status { retry_after: Some(wait), .. } => *wait,
                _ => Duration::ZERO,
            };
            *held() = Some(Instant::now() + asked);
            let (url, error) = (shown(url), error.to_string());
            on_event(DownloadEvent::Retrying { url, attempt, error, pause: pause.max(asked) });
        };
        let result = retry(&self.options.policy, DownloadError::class, told, |_| {
            let until = held().take();
            let run = attempt();
            async move {
                if let Some(until) = until {
                    tokio::time::sleep_until(until).await;
                }
                run.await
            }
        });
        result.await.map(|done| done.value).map_err(|failed| failed.error)
    }

    /// Reads a small text whole.
    pub(super) async fn text(&self, url: &Url, max_bytes: u64, on_event: OnEvent<'_>) -> Result<String, DownloadError> {
        let body = self.retried(url, on_event, || async {
            let mut answer = self.open(url, None).await?;
            answer.expect_plain()?;
            if answer.code() != 200 {
                return Err(DownloadError::Protocol { url: shown(url), reason: answer.unasked() });
            }
            let mut body = Vec::new();
            while let Some(chunk) = answer.chunk().await? {
                if body.len() as u64 + chunk.len() as u64 > max_bytes {
                    return Err(DownloadError::TooLarge { url: shown(url), limit: max_bytes });
                }
                body.extend_from_slice(&chunk);
            }
            Ok(body)
        });
        String::from_utf8(body.await?)
            .map_err(|_| DownloadError::Sums { url: shown(url), reason: "it is no text".to_owned() })
    }
}

impl Answer {
    pub(super) fn code(&self) -> u16 {
        self.response.status().as_u16()
    }

    pub(super) fn url(&self) -> &str {
        &self.url
    }

    /// What an answer of 206 or 416 to a request for the whole is.
    pub(super) fn unasked(&self) -> String {
        format!("{} to a request for the whole", self.response.status())
    }

    /// The length of what follows.
    pub(super) fn length(&self) -> Option<u64> {
        self.response.content_length()
    }

    /// First byte and total length of a part (RFC 9110, 14.4); the total may be unknown.
    pub(super) fn content_range(&self) -> Option<(u64, Option<u64>)> {
        content_range(self.text_of(header::CONTENT_RANGE)?)
    }

    /// What `If-Range` may carry for this answer: a strong entity tag, else the time of the last change (RFC 9110, 13.1.5).
    pub(super) fn validator(&self) -> Option<String> {
        let tag = self.text_of(header::ETAG).filter(|tag| tag.starts_with('"'));
        tag.or_else(|| self.text_of(header::LAST_MODIFIED)).map(str::to_owned)
    }

    /// Refuses a body in a form that was not asked for.
    pub(super) fn expect_plain(&self) -> Result<(), DownloadError> {
        match self.text_of(header::CONTENT_ENCODING) {
            None => Ok(()),
            Some(coding) if coding.eq_ignore_ascii_case("identity") => Ok(()),
            Some(coding) => Err(DownloadError::Protocol {
                url: self.url.clone(),
                reason: format!("a body in the coding {coding:?} that was not asked for"),
            }),
        }
    }

    fn text_of(&self, name: header::HeaderName) -> Option<&str> {
        self.response.headers().get(name)?.to_str().ok()
    }

    /// The next bytes of the body.
    pub(super) async fn chunk(&mut self) -> Result<Option<impl std::ops::Deref<Target = [u8]> + use<>>, DownloadError> {
        loop {
            let (end, came) = self.window;
            if came >= MIN_BYTES_PER_STALL {
                self.window = (Instant::now() + self.stall_timeout, 0);
                continue;
            }
            return match tokio::time::timeout_at(end, self.response.chunk()).await {
                Ok(Ok(chunk)) => {
                    self.window.1 += chunk.as_ref().map_or(0, |chunk| chunk.len() as u64);
                    Ok(chunk)
                }
                Ok(Err(error)) => Err(classify(&self.url, None, &error)),
                Err(_) => {
                    let (url, after) = (self.url.clone(), self.stall_timeout);
                    Err(DownloadError::Stalled { url, began: true, after })
                }
            };
        }
    }
}

/// A URL as messages show it: without a password, and without a query, which signs the address of a stored release.
pub(crate) fn shown(url: &Url) -> String {
    let mut url = url.clone();
    // Both fail only for URLs without a host, which http and https ones have.
    let _ = url.set_password(None);
    let _ = url.set_username("");
    url.set_query(None);
    url.set_fragment(None);
    url.into()
}

/// Where a redirect leads, if it may be followed there.
fn next_hop(asked: &str, from: &Url, headers: &HeaderMap) -> Result<Url, DownloadError> {
    let fail = |reason: String| DownloadError::Redirect { url: asked.to_owned(), reason };
    let location = headers.get(header::LOCATION).ok_or_else(|| fail("without saying where to".to_owned()))?;
    let location = location.to_str().map_err(|_| fail("to an address that is no text".to_owned()))?;
    let to = from.join(location).map_err(|error| fail(format!("to an address that is none: {error}")))?;
    match (from.scheme(), to.scheme()) {
        ("https", "http") => Err(fail(format!("from https to http, to {}, which is not followed", shown(&to)))),
        (_, "http" | "https") if to.has_host() => Ok(to),
        (_, scheme) => Err(fail(format!("to a {scheme} address, which is not followed"))),
    }
}

/// `Retry-After`: seconds, or a date (RFC 9110, 10.2.3; its preferred form is one of RFC 5322's).
fn retry_after(headers: &HeaderMap, now: jiff::Timestamp) -> Option<Duration> {
    let text = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = jiff::fmt::rfc2822::DateTimeParser::new().relaxed_weekday(true).parse_timestamp(text).ok()?;
    // A date that has passed asks for no wait.
    Some(Duration::try_from(date.duration_since(now)).unwrap_or_default())
}

fn content_range(text: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (start, end) = range.split_once('-')?;
    let (start, end): (u64, u64) = (start.parse().ok()?, end.parse().ok()?);
    let total: Option<u64> = if total == "*" { None } else { Some(total.parse().ok()?) };
    (start <= end && total.is_none_or(|total| end < total)).then_some((start, total))
}

#[cfg(test)]
mod tests {
    use reqwest::header::HeaderValue;

    use super::*;

    fn hop(from: &str, to: &str) -> Result<String, String> {
        let mut headers = HeaderMap::new();
        headers.insert(header::LOCATION, HeaderValue::from_str(to).unwrap());
        let from = Url::parse(from).unwrap();
        next_hop(&shown(&from), &from, &headers).map(Into::into).map_err(|error| error.to_string())
    }

    #[test]
    fn redirects_go_on_but_never_down() {
        assert_eq!(hop("https://a/x/k3s", "/y").unwrap(), "https://a/y");
        assert_eq!(hop("https://a/x/k3s", "//b/y?sig=1").unwrap(), "https://b/y?sig=1");
        assert_eq!(hop("http://a/x", "https://b/").unwrap(), "https://b/");
        let error = hop("https://a/x", "http://b/y?sig=1").unwrap_err();
        assert_eq!(error, "https://a/x redirects from https to http, to http://b/y, which is not followed");
        assert!(hop("https://a/x", "file:///etc/passwd").unwrap_err().contains("to a file address"));
        assert!(hop("https://a/x", "https://[").unwrap_err().contains("an address that is none"));
    }

    #[test]
    fn secrets_are_not_shown() {
        let url = Url::parse("https://me:secret@mirror.example/k3s?X-Amz-Signature=abc#f").unwrap();
        assert_eq!(shown(&url), "https://mirror.example/k3s");
    }

    #[test]
    fn both_forms_of_retry_after_are_read() {
        let now: jiff::Timestamp = "1994-11-06T08:49:30Z".parse().unwrap();
        let read = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::RETRY_AFTER, HeaderValue::from_str(text).unwrap());
            retry_after(&headers, now)
        };
        assert_eq!(read("120"), Some(Duration::from_secs(120)));
        assert_eq!(read("Sun, 06 Nov 1994 08:49:37 GMT"), Some(Duration::from_secs(7)));
        assert_eq!(read("Sun, 06 Nov 1994 08:49:20 GMT"), Some(Duration::ZERO));
        assert_eq!(read("soon"), None);
        assert_eq!(read("-1"), None);
    }

    #[test]
    fn a_range_that_contradicts_itself_is_none() {
        assert_eq!(content_range("bytes 5-9/10"), Some((5, Some(10))));
        assert_eq!(content_range("bytes 5-9/*"), Some((5, None)));
        for text in ["bytes 5-9/9", "bytes 9-5/10", "bytes */10", "items 5-9/10", "bytes 5-9", "bytes x-9/10"] {
            assert_eq!(content_range(text), None, "{text}");
        }
    }
}
