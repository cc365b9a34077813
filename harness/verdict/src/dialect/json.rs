//! JSON wrappers: `journalctl -o json`, Docker's json-file driver, and what log shippers make of a line.

use std::borrow::Cow;

use jiff::Timestamp;
use serde::Deserialize;

use super::time;

/// What a JSON wrapper holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unwrapped {
    /// The wrapped line.
    pub message: Vec<u8>,
    /// Its time.
    pub at: Option<Timestamp>,
    /// Host name.
    pub node: Option<String>,
    /// Program.
    pub unit: Option<String>,
    /// Process id.
    pub pid: Option<u32>,
}

/// journald prints a field as text, as an array of bytes (not printable), as an array of texts (repeated), or as null
/// (too large).
fn field(value: Option<&serde_json::Value>) -> Option<Vec<u8>> {
    match value? {
        serde_json::Value::String(text) => Some(text.clone().into_bytes()),
        serde_json::Value::Array(items) => {
            let bytes: Option<Vec<u8>> = items.iter().map(|i| i.as_u64().and_then(|b| u8::try_from(b).ok())).collect();
            bytes.or_else(|| items.first().and_then(|i| i.as_str()).map(|s| s.as_bytes().to_vec()))
        }
        _ => None,
    }
}

fn text(value: Option<&serde_json::Value>) -> Option<String> {
    field(value).and_then(|bytes| String::from_utf8(bytes).ok())
}

/// Docker's json-file line.
#[derive(Deserialize)]
struct DockerLine<'a> {
    #[serde(borrow)]
    log: Cow<'a, str>,
    #[serde(borrow, default)]
    time: Option<Cow<'a, str>>,
}

/// Unwraps a JSON line, `None` where it is no wrapper (zap and audit lines are messages, not wrappers).
#[must_use]
pub fn unwrap(line: &[u8]) -> Option<Unwrapped> {
    let line = line.trim_ascii();
    if line.first() != Some(&b'{') || line.last() != Some(&b'}') {
        return None;
    }
    if line.starts_with(b"{\"log\":") {
        let docker: DockerLine<'_> = serde_json::from_slice(line).ok()?;
        let at = docker.time.as_deref().and_then(|t| time::full(t.as_bytes())).and_then(|s| s.at);
        let message = docker.log.trim_end_matches(['\n', '\r']).as_bytes().to_vec();
        return Some(Unwrapped { message, at, node: None, unit: None, pid: None });
    }
    // One look before the line is parsed: etcd's own lines are the most of all lines in braces.
    if line.starts_with(b"{\"level\":") {
        return None;
    }
    let fields: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(line).ok()?;
    if !fields.contains_key("MESSAGE") {
        return shipped(&fields);
    }
    let message = field(fields.get("MESSAGE"))?;
    let at = ["_SOURCE_REALTIME_TIMESTAMP", "__REALTIME_TIMESTAMP"]
        .iter()
        .find_map(|key| text(fields.get(*key)).and_then(|t| time::realtime_us(&t)));
    let unit = ["SYSLOG_IDENTIFIER", "_COMM"].iter().find_map(|key| text(fields.get(*key)));
    let pid = ["_PID", "SYSLOG_PID"].iter().find_map(|key| text(fields.get(*key)).and_then(|p| p.parse().ok()));
    Some(Unwrapped { message, at, node: text(fields.get("_HOSTNAME")), unit, pid })
}

/// A line as Docker with options (`attrs` before `log`), Loki (`line`), Vector or Fluent Bit (`message`) print it.
/// A program's own JSON line has a level or a caller of its own and is no wrapper.
fn shipped(fields: &serde_json::Map<String, serde_json::Value>) -> Option<Unwrapped> {
    if ["level", "caller", "msg", "kind"].iter().any(|key| fields.contains_key(*key)) {
        return None;
    }
    let of = |keys: &[&str]| keys.iter().find_map(|key| fields.get(*key)?.as_str().map(str::to_owned));
    let message = of(&["log", "line", "message"])?.trim_end_matches(['\n', '\r']).as_bytes().to_vec();
    let at = of(&["time", "timestamp", "@timestamp"]).and_then(|t| time::full(t.as_bytes()).and_then(|s| s.at));
    Some(Unwrapped { message, at, node: of(&["host", "hostname"]), unit: None, pid: None })
}

#[cfg(test)]
mod tests {
    use super::unwrap;

    #[test]
    fn log_shippers_are_unwrapped_and_programs_are_not() {
        for line in [
            r#"{"attrs":{"tag":"k3s"},"log":"lost\n","stream":"stderr","time":"2026-11-21T02:44:00.1Z"}"#,
            r#"{"timestamp":"2026-11-21T02:44:00.1Z","line":"lost","fields":{}}"#,
            r#"{"message":"lost","host":"server-1","@timestamp":"2026-11-21T02:44:00.1Z"}"#,
        ] {
            let got = unwrap(line.as_bytes()).unwrap();
            assert_eq!((got.message.as_slice(), got.at.is_some()), (&b"lost"[..], true), "{line}");
        }
        assert_eq!(unwrap(br#"{"ts":1795228957.1,"caller":"app/x.go:1","msg":"x","message":"y"}"#), None);
    }

    #[test]
    fn journald_text_bytes_and_repeated_fields() {
        let line = br#"{"MESSAGE":"hello","_HOSTNAME":"server-1","__REALTIME_TIMESTAMP":"1795228957000000","SYSLOG_IDENTIFIER":"k3s","_PID":"357"}"#;
        let got = unwrap(line).unwrap();
        assert_eq!(
            (got.message.as_slice(), got.node.as_deref(), got.unit.as_deref(), got.pid),
            (&b"hello"[..], Some("server-1"), Some("k3s"), Some(357))
        );
        assert_eq!(got.at.unwrap().to_string(), "2026-11-21T02:42:37Z");
        assert_eq!(unwrap(br#"{"MESSAGE" : [27, 91, 109, 104, 105]}"#).unwrap().message, b"\x1b[mhi");
        assert_eq!(unwrap(br#"{"MESSAGE":["one","two"]}"#).unwrap().message, b"one");
        assert_eq!(unwrap(br#"{"MESSAGE":null}"#), None);
    }

    #[test]
    fn docker_is_unwrapped_and_zap_is_not() {
        let got = unwrap(br#"{"log":"F1121 x \"q\"\n","stream":"stderr","time":"2026-11-21T02:44:00.1Z"}"#).unwrap();
        assert_eq!(got.message, br#"F1121 x "q""#);
        assert_eq!(
            unwrap(br#"{"level":"info","ts":"2026-11-21T02:32:37.596Z","caller":"embed/etcd.go:117","msg":"x"}"#),
            None
        );
        assert_eq!(unwrap(br#"{"log":"cut"#), None);
    }
}
