//! Kubernetes' API, as much of it as cluster formation needs: discovery, nodes with list, watch,
//! get, create, update and delete; namespaces and pods as the (empty) lists they are.

use http_body_util::{BodyExt as _, Limited};
use hyper::body::Incoming;
use hyper::{Method, Response};
use serde_json::{Value, json};

use crate::VERSION;
use crate::api::selector::{Filter, Query};
use crate::api::{App, Body, respond, watch};
use crate::nodes::{self, NodeError};

const MAX_BODY_BYTES: usize = 1 << 20;

/// A resource that can be listed and watched.
#[derive(Debug, Clone, Copy)]
pub(super) struct Resource {
    plural: &'static str,
    pub(super) kind: &'static str,
    pub(super) prefix: &'static str,
}

const RESOURCES: &[Resource] = &[
    Resource { plural: "nodes", kind: "Node", prefix: nodes::PREFIX },
    Resource { plural: "namespaces", kind: "Namespace", prefix: "/registry/namespaces/" },
    Resource { plural: "pods", kind: "Pod", prefix: "/registry/pods/" },
];

fn version() -> Value {
    json!({
        "major": "0", "minor": "0", "gitVersion": VERSION, "gitCommit": "", "gitTreeState": "clean",
        "buildDate": "1970-01-01T00:00:00Z", "goVersion": "", "compiler": "rustc", "platform": "linux/amd64",
    })
}

fn discovery() -> Value {
    let resources: Vec<Value> = RESOURCES
        .iter()
        .map(|r| {
            let verbs: &[&str] = if r.plural == "nodes" {
                &["create", "delete", "get", "list", "update", "watch"]
            } else {
                &["list", "watch"]
            };
            json!({
                "name": r.plural, "singularName": "", "kind": r.kind, "namespaced": r.plural == "pods", "verbs": verbs,
                "shortNames": if r.plural == "nodes" { json!(["no"]) } else { json!([]) },
            })
        })
        .collect();
    json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": "v1", "resources": resources})
}

pub(super) async fn route(app: &App, method: &Method, path: &str, query: &Query, body: Incoming) -> Response<Body> {
    let get = method == Method::GET || method == Method::HEAD;
    let words: Vec<&str> = path.trim_matches('/').split('/').collect();
    match words.as_slice() {
        ["version"] if get => respond::json(200, &version()),
        ["api"] if get => {
            let address = format!("{}:{}", app.settings.advertise, app.settings.https_port);
            respond::json(
                200,
                &json!({
                    "kind": "APIVersions", "versions": ["v1"],
                    "serverAddressByClientCIDRs": [{"clientCIDR": "0.0.0.0/0", "serverAddress": address}],
                }),
            )
        }
        ["apis"] if get => respond::json(200, &json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": []})),
        ["api", "v1"] if get => respond::json(200, &discovery()),
        ["api", "v1", "nodes"] if method == Method::POST => match object(body).await {
            Ok(node) => answer(201, nodes::create(&app.etcd, node).await),
            Err(response) => response,
        },
        ["api", "v1", plural] if get => match RESOURCES.iter().find(|r| r.plural == *plural) {
            Some(resource) => collection(app, *resource, query).await,
            None => not_found(),
        },
        // A node's status is no sub-resource of its own here: the whole object is replaced.
        ["api", "v1", "nodes", name] | ["api", "v1", "nodes", name, "status"] => match *method {
            Method::GET | Method::HEAD => answer(200, nodes::get(&app.etcd, name).await),
            Method::PUT => match object(body).await {
                Ok(node) if nodes::name(&node) == *name => answer(200, nodes::update(&app.etcd, node).await),
                Ok(_) => {
                    respond::status(400, "BadRequest", "the name of the object does not match the name on the URL")
                }
                Err(response) => response,
            },
            Method::DELETE => answer(200, nodes::delete(&app.etcd, name).await),
            _ => respond::status(
                405,
                "MethodNotAllowed",
                "the server does not allow this method on the requested resource",
            ),
        },
        _ => not_found(),
    }
}

fn not_found() -> Response<Body> {
    respond::status(404, "NotFound", "the server could not find the requested resource")
}

fn answer(code: u16, outcome: Result<Value, NodeError>) -> Response<Body> {
    outcome.map_or_else(|e| respond::node_error(&e), |object| respond::json(code, &object))
}

async fn object(body: Incoming) -> Result<Value, Response<Body>> {
    let bad = |m: &str| respond::status(400, "BadRequest", m);
    let bytes = Limited::new(body, MAX_BODY_BYTES)
        .collect()
        .await
        .map_err(|_| bad("the request body could not be read"))?
        .to_bytes();
    let value: Value = serde_json::from_slice(&bytes).map_err(|e| bad(&e.to_string()))?;
    if value.is_object() && value["metadata"].is_object() { Ok(value) } else { Err(bad("not an object with metadata")) }
}

async fn collection(app: &App, resource: Resource, query: &Query) -> Response<Body> {
    let filter = match Filter::parse(query) {
        Ok(filter) => filter,
        Err(message) => return respond::status(400, "BadRequest", &message),
    };
    if query.is_true("watch") {
        return watch::start(app, resource, filter, query).await;
    }
    match list(app, resource, &filter).await {
        Ok((items, revision)) => respond::json(
            200,
            &json!({
                "kind": format!("{}List", resource.kind), "apiVersion": "v1",
                "metadata": {"resourceVersion": revision.to_string()}, "items": items,
            }),
        ),
        Err(error) => respond::node_error(&error),
    }
}

/// Objects of a resource and the revision they were read at.
pub(super) async fn list(app: &App, resource: Resource, filter: &Filter) -> Result<(Vec<Value>, i64), NodeError> {
    let (mut items, revision) = nodes::list_prefix(&app.etcd, resource.prefix).await?;
    items.retain(|o| filter.matches(o));
    Ok((items, revision))
}
