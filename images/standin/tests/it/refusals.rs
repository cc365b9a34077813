//! What a node must refuse, in k3s's words and with its exit status.

use std::process::Command;
use std::time::Duration;

use crate::common::{BIN, Node};

const EXIT_TIMEOUT: Duration = Duration::from_secs(30);
const DIFFERENT: &str = "panic: bootstrap data already found and encrypted with different token\n\ngoroutine ";

#[test]
fn data_of_another_token_panics() {
    let mut node = Node::new(2, 1);
    node.start("server", &["--cluster-init", "--token", "baked-into-the-image"]);
    node.wait_ready();
    assert!(node.token().ends_with("::server:baked-into-the-image"));
    assert_eq!(node.stop().code(), Some(0));

    // The same datastore, another token: as a new cluster and as one that joins (nobody is asked).
    let nobody = "https://127.77.2.99:6443";
    for args in [vec!["--cluster-init"], vec!["--server", nobody]] {
        let args = [args, vec!["--token", "another"]].concat();
        node.start("server", &args);
        assert_eq!(node.wait_exit(EXIT_TIMEOUT).code(), Some(2), "{}", node.log());
        let log = node.log();
        assert!(log.rfind(DIFFERENT).is_some_and(|at| log[at..].contains("created by ")), "{log}");
    }

    // The right one, remembered, still opens it.
    node.start("server", &["--cluster-init"]);
    node.wait_ready();
    assert!(node.token().ends_with("::server:baked-into-the-image"));
}

#[test]
fn joins_that_cannot_be_say_why() {
    let mut first = Node::new(3, 1);
    first.start("server", &["--cluster-init"]);
    first.wait_ready();
    let (url, token) = (first.url(), first.token());
    let mut joiner = Node::new(3, 2);
    let hash = token.strip_prefix("K10").and_then(|t| t.split("::").next()).unwrap().to_owned();
    let wrong_password = format!("K10{hash}::server:0123456789abcdef0123456789abcdef");
    let zeros = "0".repeat(64);
    let wrong_hash = token.replace(&hash, &zeros);
    let prefix = "level=fatal msg=\"starting kubernetes: preparing server: ";
    let nobody = "https://127.77.3.99:6443";
    for (args, expected) in [
        (vec!["--server", &url], format!("{prefix}K3S_TOKEN is required to join a cluster\"")),
        (
            vec!["--server", &url, "--token", &wrong_password],
            format!("{prefix}{url}/v1-k3s/server-bootstrap: 401 Unauthorized\""),
        ),
        (
            vec!["--server", &url, "--token", &wrong_hash],
            format!("{prefix}token CA hash does not match the Cluster CA certificate hash: {zeros} != {hash}\""),
        ),
        (
            vec!["--server", nobody, "--token", &token],
            format!(
                "{prefix}failed to get CA certs: Get \\\"{nobody}/cacerts\\\": dial tcp 127.77.3.99:6443: connect: connection refused\""
            ),
        ),
        (vec![], format!("{prefix}the stand-in has no SQLite datastore: give --cluster-init or --server\"")),
    ] {
        joiner.start("server", &args);
        assert_eq!(joiner.wait_exit(EXIT_TIMEOUT).code(), Some(1));
        let log = joiner.log();
        assert!(log.trim_end().ends_with(&expected), "{log}\n\nexpected {expected}");
    }
    // None of it left a member behind, and the right token still joins.
    let args = ["--server", url.as_str(), "--token", token.as_str()];
    joiner.start("server", &args);
    joiner.wait_ready();

    // A third server with a name that is taken.
    let mut twin = Node::new(3, 3);
    twin.name = joiner.name.clone();
    twin.start("server", &args);
    assert_eq!(twin.wait_exit(EXIT_TIMEOUT).code(), Some(1));
    assert!(twin.log().contains("etcd cluster join failed: duplicate node name found"), "{}", twin.log());

    // An agent with a wrong token waits and says so; an agent whose name is taken is rejected.
    let mut agent = Node::new(3, 4);
    agent.start("agent", &["--server", &url, "--token", &wrong_hash]);
    crate::common::wait_until("the agent complains", Duration::from_secs(10), || {
        agent.log().contains("level=error msg=\"token CA hash does not match")
    });
    assert_eq!(agent.stop().code(), Some(0));
    agent.name = joiner.name.clone();
    agent.start("agent", &["--server", &url, "--token", &token]);
    crate::common::wait_until("the agent is rejected", Duration::from_secs(10), || {
        agent.log().contains("server is not ready: ")
            && agent.log().contains("Node password rejected, duplicate hostname")
    });
}

#[test]
fn command_lines() {
    let run = |args: &[&str]| {
        let out = Command::new(BIN).args(args).output().unwrap();
        let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
        (out.status.code(), text(&out.stdout), text(&out.stderr))
    };
    let (code, out, _) = run(&["--version"]);
    assert_eq!(code, Some(0));
    assert!(out.starts_with("k3s version v0.0.0-standin ("), "{out}");
    let (code, out, err) = run(&["server", "--no-deploy", "traefik"]);
    assert_eq!(code, Some(1));
    assert!(out.starts_with("Incorrect Usage: flag provided but not defined: -no-deploy"), "{out}");
    assert!(err.trim_end().ends_with("level=fatal msg=\"flag provided but not defined: -no-deploy\""), "{err}");
    let (code, _, err) = run(&["kubectl", "apply", "-f", "x"]);
    assert_eq!(code, Some(1));
    assert!(err.starts_with("error: the stand-in's kubectl knows only"), "{err}");
}
