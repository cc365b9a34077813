//! A cluster forms, is watched by a standard client, loses its quorum, comes back: on real etcd.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use crate::common::{Node, gone, wait_until};
use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::core::v1::Node as KubeNode;
use kube::api::{Api, ListParams, WatchEvent, WatchParams};
use nix::sys::signal::Signal;

fn ready(node: &KubeNode) -> Option<String> {
    let conditions = node.status.as_ref()?.conditions.as_ref()?;
    conditions.iter().find(|c| c.type_ == "Ready").map(|c| c.status.clone())
}

/// Watches until all of `names` are Ready; returns the events seen per node.
async fn watch_ready(api: &Api<KubeNode>, names: &[&str]) -> BTreeMap<String, Vec<String>> {
    let list = api.list(&ListParams::default()).await.unwrap();
    let mut seen: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for node in &list.items {
        seen.entry(node.metadata.name.clone().unwrap()).or_default().push(format!("LIST {:?}", ready(node)));
    }
    let version = list.metadata.resource_version.unwrap();
    let done = |seen: &BTreeMap<String, Vec<String>>| {
        names.iter().all(|n| seen.get(*n).and_then(|e| e.last()).is_some_and(|e| e.ends_with("Some(\"True\")")))
    };
    if done(&seen) {
        return seen;
    }
    let mut events = api.watch(&WatchParams::default().timeout(30), &version).await.unwrap().boxed();
    while let Some(event) = events.try_next().await.unwrap() {
        let (kind, node) = match event {
            WatchEvent::Added(n) => ("ADDED", n),
            WatchEvent::Modified(n) => ("MODIFIED", n),
            WatchEvent::Bookmark(_) => continue,
            other => panic!("{other:?}"),
        };
        let entry = seen.entry(node.metadata.name.clone().unwrap()).or_default();
        entry.push(format!("{kind} {:?}", ready(&node)));
        if done(&seen) {
            return seen;
        }
    }
    panic!("watch ended before {names:?} were Ready: {seen:?}");
}

fn roles(node: &KubeNode) -> Vec<String> {
    let labels = node.metadata.labels.clone().unwrap_or_default();
    labels.keys().filter_map(|k| k.strip_prefix("node-role.kubernetes.io/")).map(str::to_owned).collect()
}

fn check_files(node: &Node) {
    let token = node.token();
    let (hash, rest) = token.strip_prefix("K10").unwrap().split_once("::server:").unwrap();
    assert!(hash.len() == 64 && rest.len() == 32 && (hash.to_owned() + rest).bytes().all(|b| b.is_ascii_hexdigit()));
    assert_eq!(node.mode("data/server/token"), 0o600);
    assert_eq!(fs::read_link(node.server("node-token")).unwrap(), node.server("token"));
    for (file, mode) in [
        ("data/server/tls/server-ca.crt", 0o644),
        ("data/server/tls/server-ca.key", 0o600),
        ("data/server/tls/etcd/peer-server-client.crt", 0o644),
        ("data/server/tls/etcd/peer-server-client.key", 0o600),
        ("data/server/tls/etcd/server-client.crt", 0o644),
        ("data/server/tls/etcd/client.key", 0o600),
        ("data/server/tls/dynamic-cert.json", 0o600),
        ("data/server/cred/passwd", 0o600),
        ("data/server/cred/admin.kubeconfig", 0o644),
        ("data/server/db/etcd/config", 0o600),
        ("data/server/db/etcd/name", 0o600),
        ("etc/k3s/k3s.yaml", 0o640),
        ("etc/node/password", 0o600),
        ("data/server", 0o700),
    ] {
        assert_eq!(node.mode(file), mode, "{file}");
    }
    assert!(node.server("db/etcd/member/wal").is_dir());
    let name = fs::read_to_string(node.server("db/etcd/name")).unwrap();
    let suffix = name.strip_prefix(&format!("{}-", node.name)).unwrap();
    assert!(suffix.len() == 8 && suffix.bytes().all(|b| b.is_ascii_hexdigit()), "{name}");
}

async fn check_statuses(node: &Node) {
    for (path, status) in [
        ("/ping", 200),
        ("/cacerts", 200),
        ("/healthz", 401),
        ("/livez", 401),
        ("/readyz", 401),
        ("/readyz?verbose", 401),
        ("/version", 401),
        ("/api/v1/nodes", 401),
        ("/v1-k3s/server-bootstrap", 403),
        ("/v1-k3s/config", 403),
    ] {
        let (got, body) = node.request(path, None, None).await;
        assert_eq!(got, status, "{path}: {body}");
        if status == 401 {
            let value: serde_json::Value = serde_json::from_str(&body).unwrap();
            assert_eq!((&value["kind"], &value["code"]), (&"Status".into(), &401.into()));
        }
    }
    let ca = fs::read_to_string(node.server("tls/server-ca.crt")).unwrap();
    assert_eq!(node.request("/cacerts", None, None).await.1, ca);
    assert_eq!(node.request("/ping", None, None).await.1, "pong");
    let (status, body) = node.request("/readyz?verbose", None, Some("client-admin")).await;
    assert_eq!(status, 200);
    assert!(
        body.starts_with("[+]ping ok\n[+]log ok\n[+]etcd ok\n") && body.ends_with("readyz check passed\n"),
        "{body}"
    );
    // The token's password authenticates servers; a wrong one is 401 on k3s's paths.
    let token = node.token();
    let password = token.rsplit(':').next().unwrap();
    let basic = |user, password| Some((user, password));
    assert_eq!(node.request("/v1-k3s/server-bootstrap", basic("server", password), None).await.0, 200);
    assert_eq!(node.request("/v1-k3s/server-bootstrap", basic("node", password), None).await.0, 403);
    assert_eq!(node.request("/v1-k3s/server-bootstrap", basic("server", "wrong"), None).await.0, 401);
    assert_eq!(node.request("/api/v1/nodes", basic("server", "wrong"), None).await.0, 401);
    assert_eq!(node.request("/api/v1/nonsense", None, Some("client-admin")).await.0, 404);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_forms_and_lives() {
    let (mut first, mut second, mut agent) = (Node::new(1, 1), Node::new(1, 2), Node::new(1, 3));
    first.start("server", &["--cluster-init", "--write-kubeconfig-mode", "0640", "--disable", "traefik,servicelb"]);
    first.wait_ready();
    check_files(&first);
    check_statuses(&first).await;
    assert!(first.etcd_health().await.contains("{\"health\":\"true\"}"));

    // A second server and an agent, watched by a standard client.
    let client = first.kube().await;
    let api: Api<KubeNode> = Api::all(client.clone());
    let (url, token) = (first.url(), first.token());
    let watching = tokio::spawn({
        let (api, names) = (api.clone(), [first.name.clone(), second.name.clone(), agent.name.clone()]);
        async move { watch_ready(&api, &[&names[0], &names[1], &names[2]]).await }
    });
    second.start("server", &["--server", &url, "--token", &token, "--node-label", "disk=fast"]);
    second.wait_ready();
    agent.start("agent", &["--server", &url, "--token", &token]);
    agent.wait_ready();
    let seen = watching.await.unwrap();
    assert_eq!(seen[&agent.name].first().map(String::as_str), Some("ADDED Some(\"False\")"), "{seen:?}");

    let members = first.members().await;
    let names: Vec<&str> = members.as_array().unwrap().iter().map(|m| m["name"].as_str().unwrap()).collect();
    assert_eq!(names.len(), 2, "{members}");
    assert!(names.iter().any(|n| n.starts_with("node-2-")), "{names:?}");
    assert_eq!(second.members().await.as_array().map(Vec::len), Some(2));
    assert_eq!(second.token(), token, "servers share their token");

    // Both servers tell the same, selectors select.
    let other: Api<KubeNode> = Api::all(second.kube().await);
    let list = other.list(&ListParams::default()).await.unwrap();
    assert_eq!(list.items.len(), 3);
    for node in &list.items {
        let expected: &[&str] =
            if node.metadata.name.as_deref() == Some("node-3") { &[] } else { &["control-plane", "etcd", "master"] };
        assert_eq!(roles(node), expected);
    }
    let fast = other.list(&ListParams::default().labels("disk=fast")).await.unwrap();
    assert_eq!(fast.items.iter().filter_map(|n| n.metadata.name.as_deref()).collect::<Vec<_>>(), ["node-2"]);
    let node = other.get("node-1").await.unwrap();
    let status = node.status.unwrap();
    assert!(status.addresses.unwrap().iter().any(|a| a.type_ == "InternalIP" && a.address == first.ip));
    assert!(node.spec.unwrap().pod_cidr.unwrap().starts_with("10.42."));
    assert_eq!(client.apiserver_version().await.unwrap().git_version, "v0.0.0-standin");

    // SIGTERM ends a server and its etcd quickly; a restart resumes on the same data.
    let etcd = second.etcd_pid();
    assert_eq!(second.stop().code(), Some(0));
    wait_until("etcd is gone", Duration::from_secs(2), || gone(etcd));
    second.start("server", &["--server", &url, "--token", &token]);
    second.wait_ready();
    assert!(second.log().contains("Managed etcd cluster bootstrap already complete and initialized"));
    assert_eq!(first.members().await.as_array().map(Vec::len), Some(2));

    // SIGKILL takes etcd along. One of two is no quorum: not ready, and then the end.
    let etcd = second.etcd_pid();
    second.signal(Signal::SIGKILL);
    second.wait_exit(Duration::from_secs(2));
    wait_until("etcd is gone", Duration::from_secs(2), || gone(etcd));
    let (status, body) = first.request("/readyz?verbose", None, Some("client-admin")).await;
    assert_eq!(status, 500, "{body}");
    assert!(body.contains("[-]etcd failed: reason withheld\n") && body.ends_with("readyz check failed\n"), "{body}");
    let etcd = first.etcd_pid();
    assert_eq!(first.wait_exit(Duration::from_secs(25)).code(), Some(1));
    assert!(gone(etcd));
    let log = first.log();
    let lease = "failed to renew lease kube-system/kube-controller-manager: timed out waiting for the condition";
    assert!(log.contains(lease), "{log}");
    assert!(log.trim_end().ends_with("level=fatal msg=\"leaderelection lost for k3s\""), "{log}");

    // systemd restarts both: the cluster is back with its nodes.
    first.start("server", &["--cluster-init"]);
    second.start("server", &["--server", &url, "--token", &token]);
    first.wait_ready();
    second.wait_ready();
    assert_eq!(first.token(), token);
    watch_ready(&Api::all(first.kube().await), &["node-1", "node-2", "node-3"]).await;
    assert_eq!(agent.stop().code(), Some(0));
}
