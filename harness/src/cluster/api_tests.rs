//! Against a small API server on loopback that does what a starting k3s does to its clients.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;

use super::api::*;
use super::testing::{Pki, closed_port, request_path};

/// What the server does with one request. One connection, one request.
enum Turn {
    /// Closes the TCP connection before TLS.
    Reset,
    /// Answers with a status and a body.
    Answer(u16, &'static str, String),
    /// Answers a watch with these events, each after a pause, and then breaks the connection (`false`) or ends the body.
    Watch(Vec<(u64, Value)>, bool),
}

struct Server {
    addr: SocketAddr,
    asked: Arc<Mutex<Vec<String>>>,
}

/// Serves the turns in their order, then refuses.
async fn server(pki: &Pki, turns: Vec<Turn>) -> Server {
    let acceptor = pki.acceptor();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let asked = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&asked);
    tokio::spawn(async move {
        let mut turns: VecDeque<Turn> = turns.into();
        while let Some(turn) = turns.pop_front() {
            let (tcp, _) = listener.accept().await.unwrap();
            if matches!(turn, Turn::Reset) {
                seen.lock().unwrap().push("reset".into());
                continue;
            }
            let Ok(mut stream) = acceptor.accept(tcp).await else { continue };
            let Some(path) = request_path(&mut stream).await else { continue };
            seen.lock().unwrap().push(path);
            match turn {
                Turn::Reset => {}
                Turn::Answer(code, kind, body) => {
                    let head = format!(
                        "HTTP/1.1 {code} X\r\ncontent-type: {kind}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
                        body.len()
                    );
                    stream.write_all(head.as_bytes()).await.unwrap();
                    stream.write_all(body.as_bytes()).await.unwrap();
                    let _ = stream.shutdown().await;
                }
                Turn::Watch(events, orderly) => {
                    let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n";
                    stream.write_all(head.as_bytes()).await.unwrap();
                    for (pause_ms, event) in events {
                        stream.flush().await.unwrap();
                        tokio::time::sleep(Duration::from_millis(pause_ms)).await;
                        let line = format!("{event}\n");
                        let chunk = format!("{:x}\r\n{line}\r\n", line.len());
                        stream.write_all(chunk.as_bytes()).await.unwrap();
                        stream.flush().await.unwrap();
                    }
                    if orderly {
                        stream.write_all(b"0\r\n\r\n").await.unwrap();
                        let _ = stream.shutdown().await;
                    }
                }
            }
        }
    });
    Server { addr, asked }
}

fn node(name: &str, ready: Option<bool>, roles: &[&str]) -> Value {
    let labels: serde_json::Map<String, Value> =
        roles.iter().map(|role| (format!("node-role.kubernetes.io/{role}"), json!("true"))).collect();
    let conditions = ready.map_or(json!([]), |ready| {
        json!([
            {"type": "MemoryPressure", "status": "False"},
            {"type": "Ready", "status": if ready { "True" } else { "False" },
             "reason": "KubeletNotReady", "message": "cni plugin not initialized"},
        ])
    });
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": name, "labels": labels, "resourceVersion": "7"},
        "status": {
            "conditions": conditions,
            "addresses": [{"type": "Hostname", "address": name}, {"type": "InternalIP", "address": "192.168.200.1"}],
            "nodeInfo": {"architecture": "amd64", "bootID": "", "containerRuntimeVersion": "", "kernelVersion": "",
                "kubeProxyVersion": "", "kubeletVersion": "v1.35.0+k3s1", "machineID": "", "operatingSystem": "linux",
                "osImage": "", "systemUUID": ""},
        },
    })
}

fn list(nodes: &[Value]) -> Turn {
    let body = json!({"apiVersion": "v1", "kind": "NodeList", "metadata": {"resourceVersion": "41"}, "items": nodes});
    Turn::Answer(200, "application/json", body.to_string())
}

fn event(kind: &str, object: Value) -> Value {
    json!({"type": kind, "object": object})
}

fn expected(name: &str) -> ExpectedNode {
    let roles = ["control-plane", "etcd"].map(str::to_owned).into();
    ExpectedNode { name: name.into(), roles }
}

const ROLES: &[&str] = &["control-plane", "etcd", "master"];

async fn api(pki: &Pki, addr: SocketAddr) -> ClusterApi {
    ClusterApi::new("server-1", &pki.kubeconfig(), addr).await.unwrap()
}

#[tokio::test]
async fn a_node_becomes_ready_through_every_kind_of_flap() {
    let pki = Pki::new();
    let status = |code: u16, reason: &str| json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": reason, "reason": reason, "code": code});
    let gone = status(410, "Expired");
    let server = server(
        &pki,
        vec![
            Turn::Reset,
            Turn::Answer(503, "text/plain", "starting".into()),
            Turn::Answer(200, "text/plain", "starting".into()),
            Turn::Answer(500, "application/json", status(500, "etcdserver: leader changed").to_string()),
            Turn::Answer(401, "application/json", status(401, "Unauthorized").to_string()),
            list(&[]),
            Turn::Watch(vec![(0, event("ADDED", node("server-1", None, &[])))], false),
            list(&[node("server-1", Some(false), &[])]),
            Turn::Watch(
                vec![
                    (
                        0,
                        event(
                            "BOOKMARK",
                            json!({"apiVersion": "v1", "kind": "Node", "metadata": {"resourceVersion": "50"}}),
                        ),
                    ),
                    (0, event("ERROR", gone)),
                ],
                true,
            ),
            list(&[node("server-1", Some(false), ROLES)]),
            Turn::Reset,
            list(&[node("server-1", Some(false), ROLES)]),
            Turn::Watch(
                vec![
                    (0, event("MODIFIED", node("server-1", Some(true), &["control-plane"]))),
                    (50, event("MODIFIED", node("server-1", Some(true), ROLES))),
                ],
                false,
            ),
        ],
    )
    .await;
    let api = api(&pki, server.addr).await;
    let mut shown = Vec::new();
    let mut flaps = Vec::new();
    let wanted = [expected("server-1")];
    let wait = api.wait_nodes_ready(&wanted, |note| match note {
        WatchNote::Nodes(nodes) => shown.push(nodes.iter().map(|n| (n.ready, n.roles.len())).collect::<Vec<_>>()),
        WatchNote::Flap(e) => flaps.push(e.to_string()),
    });
    let nodes = tokio::time::timeout(Duration::from_secs(20), wait).await.unwrap();
    assert_eq!(nodes.len(), 1);
    assert!(nodes[0].ready && nodes[0].reason.is_empty());
    assert_eq!(nodes[0].internal_ip.as_deref(), Some("192.168.200.1"));
    assert_eq!(nodes[0].version.as_deref(), Some("v1.35.0+k3s1"));
    assert_eq!(
        shown,
        [
            vec![],
            vec![(false, 0)],
            vec![(false, 0)], // the reason has changed
            vec![(false, 3)],
            vec![(true, 1)],
            vec![(true, 3)],
        ]
    );
    assert!(flaps.iter().any(|f| f.contains("500: etcdserver: leader changed")), "{flaps:#?}");
    assert!(flaps.iter().any(|f| f.contains("401: Unauthorized")), "{flaps:#?}");
    let asked = server.asked.lock().unwrap().clone();
    assert_eq!(asked.len(), 13, "{asked:#?}");
    assert!(asked[6].contains("watch=true") && asked[6].contains("resourceVersion=41"), "{}", asked[6]);
}

#[tokio::test]
async fn ready_is_noticed_as_it_happens() {
    let pki = Pki::new();
    let ready = event("MODIFIED", node("server-1", Some(true), ROLES));
    let server =
        server(&pki, vec![list(&[node("server-1", Some(false), ROLES)]), Turn::Watch(vec![(600, ready)], true)]).await;
    let api = api(&pki, server.addr).await;
    let started = Instant::now();
    api.wait_nodes_ready(&[expected("server-1")], |_| {}).await;
    let elapsed = started.elapsed();
    // Asked for again, it would be a minute: the end of the watch.
    assert!(elapsed >= Duration::from_millis(600) && elapsed < Duration::from_secs(10), "{elapsed:?}");
}

#[tokio::test]
async fn all_expected_nodes_have_to_be_ready_and_a_deleted_one_is_not() {
    let pki = Pki::new();
    let two = |second| list(&[node("server-1", Some(true), ROLES), second]);
    let server = server(
        &pki,
        vec![
            two(node("server-2", Some(false), ROLES)),
            Turn::Watch(vec![(0, event("DELETED", node("server-2", Some(false), ROLES)))], true),
            two(node("server-2", Some(true), ROLES)),
        ],
    )
    .await;
    let api = api(&pki, server.addr).await;
    let mut counts = Vec::new();
    let nodes = api
        .wait_nodes_ready(&[expected("server-1"), expected("server-2")], |note| {
            if let WatchNote::Nodes(nodes) = note {
                counts.push(nodes.len());
            }
        })
        .await;
    assert_eq!(counts, [2, 1, 2]);
    assert_eq!(nodes.iter().map(|n| n.name.as_str()).collect::<Vec<_>>(), ["server-1", "server-2"]);
}

#[tokio::test]
async fn an_api_that_is_not_there_is_waited_for_and_told_once() {
    let pki = Pki::new();
    let api = api(&pki, closed_port()).await;
    let mut flaps = 0;
    let wanted = [expected("server-1")];
    let wait = api.wait_nodes_ready(&wanted, |_| flaps += 1);
    assert!(tokio::time::timeout(Duration::from_millis(700), wait).await.is_err());
    assert_eq!(flaps, 1);
    assert!(matches!(api.nodes().await, Err(ClusterError::Unavailable { .. })));
}

#[tokio::test]
async fn a_server_of_another_cluster_is_not_believed() {
    let (ours, theirs) = (Pki::new(), Pki::new());
    let server = server(&theirs, vec![list(&[node("server-1", Some(true), ROLES)])]).await;
    let error = api(&ours, server.addr).await.nodes().await.unwrap_err();
    assert!(error.to_string().to_lowercase().contains("certificate"), "{error}");
}

#[tokio::test]
async fn readyz_is_read_when_it_fails_too() {
    let pki = Pki::new();
    let body = "[+]ping ok\n[-]etcd failed: reason withheld\n[-]poststarthook/rbac/bootstrap-roles failed: reason withheld\nreadyz check failed\n";
    let server = server(
        &pki,
        vec![
            Turn::Answer(500, "text/plain", body.into()),
            Turn::Answer(200, "text/plain", "[+]ping ok\n[+]etcd ok\nreadyz check passed\n".into()),
            Turn::Answer(401, "application/json", "{}".into()),
            Turn::Answer(503, "text/plain", "starting".into()),
        ],
    )
    .await;
    let api = api(&pki, server.addr).await;
    let bad = api.readyz().await.unwrap();
    assert_eq!((bad.ok, bad.etcd_ok), (false, Some(false)));
    assert_eq!(bad.failing, ["etcd", "poststarthook/rbac/bootstrap-roles"]);
    assert_eq!(bad.raw, body);
    let good = api.readyz().await.unwrap();
    assert_eq!((good.ok, good.etcd_ok, good.failing.len()), (true, Some(true), 0));
    assert!(matches!(api.readyz().await, Err(ClusterError::Answered { code: 401, .. })));
    assert!(matches!(api.readyz().await, Err(ClusterError::Answered { code: 503, .. })));
    assert_eq!(server.asked.lock().unwrap()[0], "/readyz?verbose");
}

#[test]
fn readyz_without_an_etcd_line_says_nothing_of_etcd() {
    assert_eq!(Readyz::parse(true, "ok").etcd_ok, None);
    assert_eq!(Readyz::parse(true, "[+]etcd-readiness ok\n").etcd_ok, None);
}

#[tokio::test]
async fn a_kubeconfig_that_cannot_be_used_says_so() {
    let via = closed_port();
    for text in ["", "hello", "{", "apiVersion: v1\nkind: Config\n"] {
        let error = ClusterApi::new("server-1", text, via).await.unwrap_err();
        assert!(matches!(error, ClusterError::Kubeconfig { .. }), "{text:?}: {error}");
    }
}

/// Everything that is awaited can be awaited in a spawned task.
#[expect(dead_code, reason = "checked by the compiler")]
fn futures_are_send(api: &ClusterApi, peer: &super::EtcdPeer, guest: &crate::guest::Guest) {
    fn send<F: Future + Send>(_: F) {}
    let ip = std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);
    send(ClusterApi::new("", "", closed_port()));
    send(api.nodes());
    send(api.readyz());
    send(api.wait_nodes_ready(&[], |_| {}));
    send(super::EtcdPeer::load(guest, Duration::ZERO));
    send(peer.members(ip, Duration::ZERO));
    send(super::health(guest, Duration::ZERO));
    send(super::prewarm(guest, ([127, 0, 0, 1], 1).into(), "", Duration::ZERO));
}
