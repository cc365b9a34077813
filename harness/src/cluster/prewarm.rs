//! One probe of the path from a joiner to its server, made inside the joiner with curl.
//!
//! How often and at what spacing a path is probed is the caller's policy.

use std::time::Duration;

use crate::guest::{Guest, GuestError, quote};

/// Time beyond curl's own limit before the guest, not the path, is to blame.
const OVERHEAD: Duration = Duration::from_secs(10);

const FORMAT: &str = r"%{http_code} %{time_connect} %{time_appconnect} %{time_total} %{errormsg}";

/// Why a probe failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PrewarmError {
    /// No answer in time.
    Timeout,
    /// No way to the address: a missing link, VLAN or route.
    NoRoute,
    /// The host is there and nothing listens.
    Refused,
    /// TCP came about, TLS did not.
    Tls,
    /// Anything else; see [`PrewarmSample::message`].
    Other,
}

/// The outcome of one probe.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct PrewarmSample {
    /// Whether an HTTP answer came, whatever its status.
    pub ok: bool,
    /// HTTP status; 0 when there was none.
    pub http_code: u16,
    /// From the start until TCP was connected.
    pub connect_ms: f64,
    /// From the start until TLS was negotiated; 0 when it was not.
    pub tls_ms: f64,
    /// From the start until the end.
    pub total_ms: f64,
    /// What failed.
    pub error: Option<PrewarmError>,
    /// curl's words on it, with the operating system's where it gives them.
    pub message: String,
}

impl PrewarmSample {
    /// Reads curl's exit status, the line written by `--write-out`, and the notes written by `--verbose`.
    pub fn parse(status: Option<u32>, line: &str, notes: &str) -> Result<PrewarmSample, String> {
        let mut fields = line.trim().splitn(5, ' ');
        let mut field = |name: &str| fields.next().ok_or_else(|| format!("no {name} in `{}`", line.trim()));
        let code = field("http_code")?;
        let http_code = code.parse().map_err(|_| format!("http_code `{code}`"))?;
        let mut ms = |name: &str| -> Result<f64, String> {
            let text = field(name)?;
            let seconds: f64 = text.parse().map_err(|_| format!("{name} `{text}`"))?;
            Ok((seconds * 1e6).round() / 1e3)
        };
        let (connect_ms, tls_ms, total_ms) = (ms("time_connect")?, ms("time_appconnect")?, ms("time_total")?);
        let mut message = fields.next().unwrap_or_default().trim().to_owned();
        // `* connect to IP port N failed: No route to host`, `* Immediate connect fail for IP: Network is
        // unreachable`: only there is the errno told.
        let why = notes.lines().rev().find_map(|line| {
            let failed = line.strip_prefix("* connect to ").and_then(|l| l.split_once(" failed: "));
            failed.or_else(|| line.strip_prefix("* Immediate connect fail for ").and_then(|l| l.split_once(": ")))
        });
        if let Some((_, why)) = why {
            message = format!("{message}: {}", why.trim()).trim_start_matches(": ").to_owned();
        }
        let ok = status == Some(0) && http_code != 0;
        let error = (!ok).then(|| kind(status, &message));
        Ok(PrewarmSample { ok, http_code, connect_ms, tls_ms, total_ms, error, message })
    }
}

/// curl's exit statuses are listed in curl(1), `EXIT CODES`.
fn kind(status: Option<u32>, message: &str) -> PrewarmError {
    let message = message.to_ascii_lowercase();
    match status {
        Some(28) => PrewarmError::Timeout,
        Some(7) if message.contains("no route") || message.contains("unreachable") => PrewarmError::NoRoute,
        Some(7) if message.contains("timed out") => PrewarmError::Timeout,
        Some(7) if message.contains("refused") => PrewarmError::Refused,
        Some(35 | 51 | 53 | 54 | 58 | 59 | 60 | 64 | 66 | 77 | 80 | 82 | 83 | 90 | 91) => PrewarmError::Tls,
        _ => PrewarmError::Other,
    }
}

/// Asks `https://HOST:PORT/PATH` from inside the guest, once, for at most `limit` (whole seconds, at least 1).
///
/// A path that does not work is an `Ok` that says how; an `Err` is a guest that could not be asked.
pub async fn prewarm(guest: &Guest, url: &str, limit: Duration) -> Result<PrewarmSample, GuestError> {
    let seconds = limit.as_secs().max(1);
    let command = format!(
        "exec curl --silent --verbose --insecure --noproxy '*' --output /dev/null --max-time {seconds} --write-out {} -- {}",
        quote(FORMAT),
        quote(url),
    );
    let output = guest.exec(&command, Duration::from_secs(seconds) + OVERHEAD).await?;
    let notes = String::from_utf8_lossy(&output.stderr);
    PrewarmSample::parse(output.status, &output.text(), &notes).map_err(|reason| GuestError::Malformed {
        node: guest.node().to_owned(),
        what: format!("curl's answer for {url} ({})", output.how()),
        reason,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_of_any_status_is_a_working_path() {
        let sample = PrewarmSample::parse(Some(0), "401 0.000614 0.153814 0.154302 ", "").unwrap();
        assert!(sample.ok);
        assert_eq!((sample.http_code, sample.error), (401, None));
        assert_eq!((sample.connect_ms, sample.tls_ms, sample.total_ms), (0.614, 153.814, 154.302));
    }

    /// Lines and notes of curl 7.88.1 (Debian 12).
    #[test]
    fn failures_are_told_apart() {
        let failed = |status, line: &str, notes: &str| PrewarmSample::parse(Some(status), line, notes).unwrap();
        let connect = "000 0.000000 0.000000 0.000518 Failed to connect to 192.168.200.1 port 6443 after 0 ms: Couldn't connect to server";
        let note = |why: &str| {
            format!(
                "*   Trying 192.168.200.1:6443...\n* connect to 192.168.200.1 port 6443 failed: {why}\n* Closing connection 0\n"
            )
        };
        let sample = failed(7, connect, &note("Connection refused"));
        assert_eq!((sample.ok, sample.error), (false, Some(PrewarmError::Refused)));
        assert!(sample.message.ends_with("Couldn't connect to server: Connection refused"), "{}", sample.message);
        assert_eq!(failed(7, connect, &note("No route to host")).error, Some(PrewarmError::NoRoute));
        let immediate = "* Immediate connect fail for 192.168.200.1: Network is unreachable\n* Closing connection 0\n";
        assert_eq!(failed(7, connect, immediate).error, Some(PrewarmError::NoRoute));
        assert_eq!(failed(7, connect, "").error, Some(PrewarmError::Other));
        let timeout = "000 0.000000 0.000000 2.001012 Connection timed out after 2001 milliseconds";
        assert_eq!(failed(28, timeout, "").error, Some(PrewarmError::Timeout));
        let tls = "000 0.000300 0.000000 0.000912 error:0A00010B:SSL routines::wrong version number";
        assert_eq!(failed(35, tls, "").error, Some(PrewarmError::Tls));
        assert_eq!(failed(52, "000 0.1 0.2 0.3 Empty reply from server", "").error, Some(PrewarmError::Other));
    }

    #[test]
    fn what_is_not_curls_line_is_an_error() {
        for line in ["", "curl: not found", "200 0.1", "200 a b c "] {
            assert!(PrewarmSample::parse(Some(127), line, "").is_err(), "{line}");
        }
    }
}
