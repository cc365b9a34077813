//! Node objects in etcd below `/registry/minions/`, where Kubernetes keeps them (as JSON here).
//! `metadata.resourceVersion` is not stored: it is the key's revision.

use std::time::Duration;

use serde_json::{Value, json};

use crate::etcd::client::{EtcdClient, EtcdError, Expect, KeyValue};

pub(crate) const PREFIX: &str = "/registry/minions/";
const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// What cannot be done with a node object.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NodeError {
    #[error("nodes \"{0}\" already exists")]
    AlreadyExists(String),
    #[error("nodes \"{0}\" not found")]
    NotFound(String),
    #[error(
        "Operation cannot be fulfilled on nodes \"{0}\": the object has been modified; please apply your changes to the latest version and try again"
    )]
    Conflict(String),
    #[error("{0}")]
    Invalid(String),
    #[error(transparent)]
    Etcd(#[from] EtcdError),
}

fn key(name: &str) -> String {
    format!("{PREFIX}{name}")
}

/// The object of a stored key, with its resource version.
pub(crate) fn object(kv: &KeyValue) -> Result<Value, NodeError> {
    let mut object: Value = serde_json::from_slice(&kv.value).map_err(|e| EtcdError::Answer(e.to_string()))?;
    object["metadata"]["resourceVersion"] = json!(kv.mod_revision.to_string());
    Ok(object)
}

/// The name of an object.
pub(crate) fn name(object: &Value) -> &str {
    object["metadata"]["name"].as_str().unwrap_or_default()
}

/// A DNS subdomain, as Kubernetes demands of node names.
pub(crate) fn valid_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 253
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.')
        && !name.starts_with(['-', '.'])
        && !name.ends_with(['-', '.'])
}

/// All nodes and the revision they were read at.
pub(crate) async fn list(etcd: &EtcdClient) -> Result<(Vec<Value>, i64), NodeError> {
    list_prefix(etcd, PREFIX).await
}

/// All objects below a prefix and the revision they were read at.
pub(crate) async fn list_prefix(etcd: &EtcdClient, prefix: &str) -> Result<(Vec<Value>, i64), NodeError> {
    let (kvs, revision) = etcd.list(prefix, CALL_TIMEOUT).await?;
    Ok((kvs.iter().map(object).collect::<Result<_, _>>()?, revision))
}

/// One node.
pub(crate) async fn get(etcd: &EtcdClient, node: &str) -> Result<Value, NodeError> {
    let kv = etcd.get(&key(node), CALL_TIMEOUT).await?;
    object(&kv.ok_or_else(|| NodeError::NotFound(node.to_owned()))?)
}

fn stored(mut object: Value) -> Vec<u8> {
    if let Some(metadata) = object["metadata"].as_object_mut() {
        metadata.remove("resourceVersion");
    }
    object.to_string().into_bytes()
}

fn with_revision(mut object: Value, revision: i64) -> Value {
    object["metadata"]["resourceVersion"] = json!(revision.to_string());
    object
}

/// Creates a node.
pub(crate) async fn create(etcd: &EtcdClient, object: Value) -> Result<Value, NodeError> {
    let node = name(&object).to_owned();
    if !valid_name(&node) {
        return Err(NodeError::Invalid(format!("Node \"{node}\" is invalid: metadata.name")));
    }
    match etcd.put_if(&key(&node), &stored(object.clone()), Expect::Absent, CALL_TIMEOUT).await? {
        Some(revision) => Ok(with_revision(object, revision)),
        None => Err(NodeError::AlreadyExists(node)),
    }
}

/// Replaces a node, provided it is still what `metadata.resourceVersion` says.
pub(crate) async fn update(etcd: &EtcdClient, object: Value) -> Result<Value, NodeError> {
    let node = name(&object).to_owned();
    let version = object["metadata"]["resourceVersion"]
        .as_str()
        .and_then(|v| v.parse().ok())
        .ok_or_else(|| NodeError::Invalid("metadata.resourceVersion: must be specified for an update".to_owned()))?;
    match etcd.put_if(&key(&node), &stored(object.clone()), Expect::Revision(version), CALL_TIMEOUT).await? {
        Some(revision) => Ok(with_revision(object, revision)),
        None => Err(NodeError::Conflict(node)),
    }
}

/// Deletes a node and returns what it was.
pub(crate) async fn delete(etcd: &EtcdClient, node: &str) -> Result<Value, NodeError> {
    let kv = etcd.get(&key(node), CALL_TIMEOUT).await?.ok_or_else(|| NodeError::NotFound(node.to_owned()))?;
    match etcd.delete_if(&key(node), Expect::Revision(kv.mod_revision), CALL_TIMEOUT).await? {
        Some(_) => object(&kv),
        None => Err(NodeError::Conflict(node.to_owned())),
    }
}

/// Sets a condition; `lastTransitionTime` moves only with the status.
pub(crate) fn set_condition(object: &mut Value, kind: &str, status: &str, reason: &str, message: &str, now: &str) {
    let conditions = &mut object["status"]["conditions"];
    if !conditions.is_array() {
        *conditions = json!([]);
    }
    let Some(conditions) = conditions.as_array_mut() else { return };
    let before = conditions.iter_mut().find(|c| c["type"] == kind);
    let transition = match &before {
        Some(c) if c["status"] == status => c["lastTransitionTime"].clone(),
        _ => json!(now),
    };
    let condition = json!({
        "type": kind, "status": status, "reason": reason, "message": message,
        "lastHeartbeatTime": now, "lastTransitionTime": transition,
    });
    match before {
        Some(slot) => *slot = condition,
        None => conditions.push(condition),
    }
}

/// A condition's status (`True`, `False`, `Unknown`), or nothing.
pub(crate) fn condition<'a>(object: &'a Value, kind: &str) -> Option<&'a Value> {
    object["status"]["conditions"].as_array()?.iter().find(|c| c["type"] == kind)
}

/// The time as Kubernetes writes it: whole seconds, UTC.
pub(crate) fn now_text() -> String {
    format!("{:.0}", jiff::Timestamp::now())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transition_time_moves_only_with_the_status() {
        let mut node = json!({"metadata": {"name": "n"}});
        set_condition(&mut node, "Ready", "False", "r", "m", "t1");
        set_condition(&mut node, "Ready", "False", "r", "m", "t2");
        let ready = condition(&node, "Ready").unwrap();
        assert_eq!((&ready["lastTransitionTime"], &ready["lastHeartbeatTime"]), (&json!("t1"), &json!("t2")));
        set_condition(&mut node, "Ready", "True", "r", "m", "t3");
        assert_eq!(condition(&node, "Ready").unwrap()["lastTransitionTime"], "t3");
    }

    #[test]
    fn times_have_whole_seconds() {
        let now = now_text();
        assert!(now.ends_with('Z') && !now.contains('.'), "{now}");
        assert_eq!(now.len(), "2026-11-21T02:32:29Z".len());
    }

    #[test]
    fn names_are_dns_subdomains() {
        assert!(valid_name("server-1.lab"));
        assert!(!valid_name("Server") && !valid_name("") && !valid_name("a/b") && !valid_name("-a"));
    }
}
