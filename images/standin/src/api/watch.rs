//! Watches: JSON lines of ADDED, MODIFIED, DELETED and BOOKMARK events from a resource version on,
//! fed by an etcd watch.

use std::time::Duration;

use hyper::Response;
use hyper::body::Bytes;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::api::kube::{self, Resource};
use crate::api::selector::{Filter, Query};
use crate::api::{App, Body, respond};
use crate::etcd::watch::{Event, Message, Watch};
use crate::nodes;

/// Events waiting for a slow client; a client that does not read holds its own watch up.
const QUEUE: usize = 64;
const BOOKMARK_INTERVAL: Duration = Duration::from_secs(55);
/// An API server's watches end after half an hour to an hour unless the client says otherwise.
const DEFAULT_TIMEOUT_S: u64 = 1800;

struct Stream {
    tx: mpsc::Sender<Bytes>,
    kind: &'static str,
    filter: Filter,
    bookmarks: bool,
    revision: i64,
}

pub(super) async fn start(app: &App, resource: Resource, filter: Filter, query: &Query) -> Response<Body> {
    let from = match query.get("resourceVersion").unwrap_or_default() {
        "" | "0" => None,
        text => match text.parse::<i64>() {
            Ok(revision) => Some(revision),
            Err(_) => return respond::status(400, "BadRequest", &format!("invalid resourceVersion {text:?}")),
        },
    };
    let send_initial = query.is_true("sendInitialEvents");
    let timeout_s =
        query.get("timeoutSeconds").and_then(|t| t.parse().ok()).filter(|t| *t > 0).unwrap_or(DEFAULT_TIMEOUT_S);
    let mut initial = Vec::new();
    let mut revision = from.unwrap_or_default();
    if send_initial || from.is_none() {
        match kube::list(app, resource, &filter).await {
            Ok((items, at)) => (initial, revision) = (items, at),
            Err(error) => return respond::node_error(&error),
        }
    }
    let watch = match app.etcd.watch(resource.prefix, revision + 1).await {
        Ok(watch) => watch,
        Err(error) => return respond::status(500, "InternalError", &error.to_string()),
    };
    let (tx, rx) = mpsc::channel(QUEUE);
    let stream = Stream {
        tx,
        kind: resource.kind,
        filter,
        bookmarks: query.is_true("allowWatchBookmarks") || send_initial,
        revision,
    };
    tokio::spawn(async move {
        let deadline = Instant::now() + Duration::from_secs(timeout_s);
        stream.run(initial, send_initial, watch, deadline).await;
    });
    respond::stream(rx)
}

impl Stream {
    /// Sends one event; false when nobody listens any more.
    async fn send(&self, kind: &str, object: &Value) -> bool {
        let mut line = json!({"type": kind, "object": object}).to_string();
        line.push('\n');
        self.tx.send(Bytes::from(line)).await.is_ok()
    }

    async fn bookmark(&self, initial_end: bool) -> bool {
        let mut metadata = json!({"resourceVersion": self.revision.to_string(), "creationTimestamp": null});
        if initial_end {
            metadata["annotations"] = json!({"k8s.io/initial-events-end": "true"});
        }
        self.send("BOOKMARK", &json!({"kind": self.kind, "apiVersion": "v1", "metadata": metadata})).await
    }

    async fn run(mut self, initial: Vec<Value>, send_initial: bool, mut watch: Watch, deadline: Instant) {
        for object in &initial {
            if !self.send("ADDED", object).await {
                return;
            }
        }
        if send_initial && !self.bookmark(true).await {
            return;
        }
        let mut bookmark_at = Instant::now() + BOOKMARK_INTERVAL;
        loop {
            tokio::select! {
                () = self.tx.closed() => return,
                () = tokio::time::sleep_until(deadline) => {
                    if self.bookmarks {
                        self.bookmark(false).await;
                    }
                    return;
                }
                () = tokio::time::sleep_until(bookmark_at), if self.bookmarks => {
                    bookmark_at = Instant::now() + BOOKMARK_INTERVAL;
                    if !self.bookmark(false).await {
                        return;
                    }
                }
                message = watch.next() => match message {
                    Ok(Message::Events(events)) => {
                        for event in events {
                            if !self.event(&event).await {
                                return;
                            }
                        }
                    }
                    Ok(Message::Compacted) => {
                        let text = format!("too old resource version: {}", self.revision);
                        self.send("ERROR", &respond::status_object(410, "Expired", &text)).await;
                        return;
                    }
                    // etcd went away: the client starts over from its last version.
                    Err(_) => return,
                }
            }
        }
    }

    async fn event(&mut self, event: &Event) -> bool {
        self.revision = event.kv.mod_revision;
        match classify(&self.filter, event) {
            Some((kind, object)) => self.send(kind, &object).await,
            None => true,
        }
    }
}

/// What an etcd event is to a client with this filter.
fn classify(filter: &Filter, event: &Event) -> Option<(&'static str, Value)> {
    let before = event.previous.as_ref().and_then(|kv| nodes::object(kv).ok());
    let matched = before.as_ref().is_some_and(|o| filter.matches(o));
    if event.deleted {
        let mut object = before.filter(|_| matched)?;
        object["metadata"]["resourceVersion"] = json!(event.kv.mod_revision.to_string());
        return Some(("DELETED", object));
    }
    let object = nodes::object(&event.kv).ok()?;
    let created = event.kv.create_revision == event.kv.mod_revision;
    match (filter.matches(&object), matched && !created) {
        (true, true) => Some(("MODIFIED", object)),
        (true, false) => Some(("ADDED", object)),
        (false, true) => Some(("DELETED", object)),
        (false, false) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::etcd::client::KeyValue;

    fn kv(label: &str, create: i64, revision: i64) -> KeyValue {
        let value = json!({"metadata": {"name": "n", "labels": {"role": label}}}).to_string().into_bytes();
        KeyValue { key: "/registry/minions/n".into(), value, create_revision: create, mod_revision: revision }
    }

    #[test]
    fn objects_enter_and_leave_a_selection() {
        let filter = Filter::parse(&Query::parse("labelSelector=role=a")).unwrap();
        let kind = |e: &Event| classify(&filter, e).map(|(k, _)| k);
        let put = |kv, previous| Event { deleted: false, kv, previous };
        assert_eq!(kind(&put(kv("a", 2, 2), None)), Some("ADDED"));
        assert_eq!(kind(&put(kv("a", 2, 3), Some(kv("a", 2, 2)))), Some("MODIFIED"));
        assert_eq!(kind(&put(kv("b", 2, 4), Some(kv("a", 2, 3)))), Some("DELETED"));
        assert_eq!(kind(&put(kv("b", 2, 5), Some(kv("b", 2, 4)))), None);
        assert_eq!(kind(&put(kv("a", 2, 6), Some(kv("b", 2, 5)))), Some("ADDED"));
        let gone = Event { deleted: true, kv: kv("", 0, 7), previous: Some(kv("a", 2, 6)) };
        let (kind, object) = classify(&filter, &gone).unwrap();
        assert_eq!((kind, object["metadata"]["resourceVersion"].as_str()), ("DELETED", Some("7")));
    }
}
