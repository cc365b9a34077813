//! A client of etcd's v3 API through the gRPC gateway's JSON (`/v3/kv/range` and so on), which
//! etcd serves on its client port. Keys and values are base64, 64-bit numbers are strings, fields
//! with a zero value are left out. Source: etcd 3.4 `Documentation/dev-guide/api_grpc_gateway.md`.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hyper::Method;
use rustls::ClientConfig;
use serde_json::{Value, json};

use crate::net::{Client, Endpoint, NetError};

/// Why etcd did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EtcdError {
    #[error(transparent)]
    Net(#[from] NetError),
    #[error("{0}")]
    Refused(String),
    #[error("unexpected answer of etcd: {0}")]
    Answer(String),
}

impl EtcdError {
    /// A learner answers only serializable reads and status.
    pub(crate) fn is_learner(&self) -> bool {
        matches!(self, Self::Refused(m) if m.contains("not supported for learner"))
    }
}

/// A key with its value.
#[derive(Debug, Clone)]
pub(crate) struct KeyValue {
    pub(crate) key: String,
    pub(crate) value: Vec<u8>,
    pub(crate) create_revision: i64,
    pub(crate) mod_revision: i64,
}

/// A member of the cluster.
#[derive(Debug, Clone)]
pub(crate) struct Member {
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) peer_urls: Vec<String>,
    pub(crate) client_urls: Vec<String>,
    pub(crate) learner: bool,
}

/// What a conditional write expects of the key.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Expect {
    Absent,
    Revision(i64),
}

/// A client of one etcd member.
#[derive(Debug)]
pub(crate) struct EtcdClient {
    pub(crate) http: Client,
}

pub(crate) fn encode(bytes: impl AsRef<[u8]>) -> String {
    STANDARD.encode(bytes)
}

/// A 64-bit number as the gateway writes it: a string, a number, or left out for zero.
pub(crate) fn number(value: &Value) -> i64 {
    match value {
        Value::String(s) => s.parse().unwrap_or_default(),
        other => other.as_i64().unwrap_or_default(),
    }
}

fn bytes(value: &Value) -> Result<Vec<u8>, EtcdError> {
    match value.as_str() {
        None => Ok(Vec::new()),
        Some(text) => STANDARD.decode(text).map_err(|e| EtcdError::Answer(e.to_string())),
    }
}

pub(crate) fn key_value(value: &Value) -> Result<KeyValue, EtcdError> {
    Ok(KeyValue {
        key: String::from_utf8_lossy(&bytes(&value["key"])?).into_owned(),
        value: bytes(&value["value"])?,
        create_revision: number(&value["create_revision"]),
        mod_revision: number(&value["mod_revision"]),
    })
}

/// The end of the range of all keys with a prefix.
pub(crate) fn prefix_end(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    while let Some(last) = end.pop() {
        if last < 0xff {
            end.push(last + 1);
            return end;
        }
    }
    vec![0]
}

pub(crate) fn members(answer: &Value) -> Vec<Member> {
    let strings = |v: &Value| -> Vec<String> {
        v.as_array().into_iter().flatten().filter_map(|s| s.as_str().map(str::to_owned)).collect()
    };
    answer["members"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|m| Member {
            id: m["ID"].as_str().unwrap_or_default().to_owned(),
            name: m["name"].as_str().unwrap_or_default().to_owned(),
            peer_urls: strings(&m["peerURLs"]),
            client_urls: strings(&m["clientURLs"]),
            learner: m["isLearner"].as_bool().unwrap_or_default(),
        })
        .collect()
}

impl EtcdClient {
    pub(crate) fn new(endpoint: Endpoint, tls: Arc<ClientConfig>) -> Self {
        Self { http: Client::new(endpoint, tls) }
    }

    /// One call of the gateway.
    pub(crate) async fn call(&self, path: &str, body: &Value, timeout: Duration) -> Result<Value, EtcdError> {
        let answer = self.http.request(Method::POST, path, body.to_string().into_bytes(), timeout).await?;
        let value: Value = serde_json::from_slice(&answer.body).map_err(|_| {
            let text = String::from_utf8_lossy(&answer.body);
            EtcdError::Answer(format!("{}: {}", answer.status, text.chars().take(200).collect::<String>()))
        })?;
        if answer.status.is_success() {
            return Ok(value);
        }
        let message = value["error"].as_str().or_else(|| value["message"].as_str());
        Err(EtcdError::Refused(message.unwrap_or("unknown error").to_owned()))
    }

    /// Keys with a prefix (linearizable) and the store's revision.
    pub(crate) async fn list(&self, prefix: &str, timeout: Duration) -> Result<(Vec<KeyValue>, i64), EtcdError> {
        let body = json!({"key": encode(prefix), "range_end": encode(prefix_end(prefix))});
        let answer = self.call("/v3/kv/range", &body, timeout).await?;
        let kvs = answer["kvs"].as_array().into_iter().flatten().map(key_value).collect::<Result<_, _>>()?;
        Ok((kvs, number(&answer["header"]["revision"])))
    }

    /// One key (linearizable).
    pub(crate) async fn get(&self, key: &str, timeout: Duration) -> Result<Option<KeyValue>, EtcdError> {
        let answer = self.call("/v3/kv/range", &json!({"key": encode(key)}), timeout).await?;
        answer["kvs"].as_array().and_then(|kvs| kvs.first()).map(key_value).transpose()
    }

    /// Writes `key` if it is as expected. `Some(revision)` where it was.
    pub(crate) async fn put_if(
        &self,
        key: &str,
        value: &[u8],
        expect: Expect,
        timeout: Duration,
    ) -> Result<Option<i64>, EtcdError> {
        let put = json!({"request_put": {"key": encode(key), "value": encode(value)}});
        self.txn(key, expect, &put, timeout).await
    }

    /// Deletes `key` if it is as expected. `Some(revision)` where it was.
    pub(crate) async fn delete_if(
        &self,
        key: &str,
        expect: Expect,
        timeout: Duration,
    ) -> Result<Option<i64>, EtcdError> {
        let delete = json!({"request_delete_range": {"key": encode(key)}});
        self.txn(key, expect, &delete, timeout).await
    }

    async fn txn(&self, key: &str, expect: Expect, op: &Value, timeout: Duration) -> Result<Option<i64>, EtcdError> {
        let compare = match expect {
            Expect::Absent => {
                json!({"key": encode(key), "target": "CREATE", "result": "EQUAL", "create_revision": "0"})
            }
            Expect::Revision(r) => {
                json!({"key": encode(key), "target": "MOD", "result": "EQUAL", "mod_revision": r.to_string()})
            }
        };
        let answer = self.call("/v3/kv/txn", &json!({"compare": [compare], "success": [op]}), timeout).await?;
        Ok(answer["succeeded"].as_bool().unwrap_or_default().then(|| number(&answer["header"]["revision"])))
    }

    pub(crate) async fn member_list(&self, timeout: Duration) -> Result<Vec<Member>, EtcdError> {
        Ok(members(&self.call("/v3/cluster/member/list", &json!({}), timeout).await?))
    }

    /// Adds a learner, as k3s does: it has no vote until it is promoted.
    pub(crate) async fn member_add_learner(&self, peer_url: &str, timeout: Duration) -> Result<(), EtcdError> {
        let body = json!({"peerURLs": [peer_url], "isLearner": true});
        self.call("/v3/cluster/member/add", &body, timeout).await.map(drop)
    }

    pub(crate) async fn member_promote(&self, id: &str, timeout: Duration) -> Result<(), EtcdError> {
        self.call("/v3/cluster/member/promote", &json!({"ID": id}), timeout).await.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_come_in_three_shapes() {
        assert_eq!(number(&json!("17")), 17);
        assert_eq!(number(&json!(17)), 17);
        assert_eq!(number(&Value::Null), 0);
    }

    #[test]
    fn a_prefix_ends_before_its_successor() {
        assert_eq!(prefix_end("/bootstrap"), b"/bootstraq");
    }
}
