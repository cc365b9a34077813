//! etcd watches: events of a key prefix from a revision on, read from the gateway's stream of
//! JSON lines.

use http_body_util::BodyExt as _;
use hyper::Method;
use hyper::body::Incoming;
use serde_json::{Value, json};

use crate::etcd::client::{EtcdClient, EtcdError, KeyValue, encode, key_value, number, prefix_end};
use crate::net::NetError;

const MAX_LINE_BYTES: usize = 8 << 20;

/// One change.
#[derive(Debug)]
pub(crate) struct Event {
    pub(crate) deleted: bool,
    pub(crate) kv: KeyValue,
    pub(crate) previous: Option<KeyValue>,
}

/// What a watch says next.
#[derive(Debug)]
pub(crate) enum Message {
    Events(Vec<Event>),
    /// The revision asked for is gone.
    Compacted,
}

/// An open watch. Dropping it ends it.
pub(crate) struct Watch {
    body: Incoming,
    buffer: Vec<u8>,
    // The connection lives as long as its sender.
    _connection: Box<dyn std::any::Any + Send + Sync>,
}

impl EtcdClient {
    /// Watches all keys with `prefix` from `start_revision` on.
    pub(crate) async fn watch(&self, prefix: &str, start_revision: i64) -> Result<Watch, EtcdError> {
        let body = json!({"create_request": {
            "key": encode(prefix),
            "range_end": encode(prefix_end(prefix)),
            "start_revision": start_revision.to_string(),
            "prev_kv": true,
        }});
        let (response, sender) = self.http.open(Method::POST, "/v3/watch", body.to_string().into_bytes()).await?;
        if !response.status().is_success() {
            return Err(EtcdError::Refused(format!("watch: {}", response.status())));
        }
        Ok(Watch { body: response.into_body(), buffer: Vec::new(), _connection: Box::new(sender) })
    }
}

impl Watch {
    /// The next message. Cancel-safe: what was read stays in the buffer.
    pub(crate) async fn next(&mut self) -> Result<Message, EtcdError> {
        loop {
            while let Some(end) = self.buffer.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                if let Some(message) = parse_line(&line)? {
                    return Ok(message);
                }
            }
            if self.buffer.len() > MAX_LINE_BYTES {
                return Err(NetError::TooLarge.into());
            }
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.buffer.extend_from_slice(&data);
                    }
                }
                Some(Err(_)) | None => return Err(NetError::Eof.into()),
            }
        }
    }
}

fn parse_line(line: &[u8]) -> Result<Option<Message>, EtcdError> {
    if line.iter().all(u8::is_ascii_whitespace) {
        return Ok(None);
    }
    let value: Value = serde_json::from_slice(line).map_err(|e| EtcdError::Answer(e.to_string()))?;
    if let Some(error) = value.get("error") {
        let message = error["message"].as_str().unwrap_or("watch ended");
        return Err(EtcdError::Refused(message.to_owned()));
    }
    let result = &value["result"];
    if number(&result["compact_revision"]) != 0 {
        return Ok(Some(Message::Compacted));
    }
    if result["canceled"].as_bool().unwrap_or_default() {
        let reason = result["cancel_reason"].as_str().unwrap_or("watch canceled");
        return Err(EtcdError::Refused(reason.to_owned()));
    }
    let events = result["events"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|e| {
            Ok(Event {
                deleted: e["type"].as_str() == Some("DELETE"),
                kv: key_value(&e["kv"])?,
                previous: e.get("prev_kv").map(key_value).transpose()?,
            })
        })
        .collect::<Result<Vec<_>, EtcdError>>()?;
    Ok((!events.is_empty()).then_some(Message::Events(events)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_gateway() {
        assert!(parse_line(b"{\"result\":{\"header\":{\"revision\":\"5\"},\"created\":true}}\n").unwrap().is_none());
        let line = b"{\"result\":{\"events\":[{\"kv\":{\"key\":\"L2E=\",\"value\":\"eA==\",\"create_revision\":\"2\",\"mod_revision\":\"3\"}},{\"type\":\"DELETE\",\"kv\":{\"key\":\"L2E=\",\"mod_revision\":\"4\"},\"prev_kv\":{\"key\":\"L2E=\",\"value\":\"eA==\"}}]}}\n";
        let Some(Message::Events(events)) = parse_line(line).unwrap() else { panic!("no events") };
        assert_eq!((events[0].deleted, events[0].kv.key.as_str(), events[0].kv.mod_revision), (false, "/a", 3));
        assert!(events[1].deleted && events[1].previous.is_some());
        let line = b"{\"result\":{\"canceled\":true,\"compact_revision\":\"9\"}}\n";
        assert!(matches!(parse_line(line).unwrap(), Some(Message::Compacted)));
    }
}
