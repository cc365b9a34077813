//! One command in a guest and back: the harness's own SSH client against multiplexed OpenSSH, by turns in one guest.
//!
//! `cargo bench -p harness --bench exec -- LAB_JSON OPENSSH_CONTROL_SOCKET ROUNDS` for a living lab's first node; prints the
//! medians as JSON. `ci/bench` makes the lab.

#![expect(clippy::unwrap_used, reason = "a benchmark that cannot go on fails")]

use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use harness::guest::{Guest, NewsSink, SshTarget};
use harness::lab::inventory::LabRecord;

const LIMIT: Duration = Duration::from_secs(30);

fn main() {
    // Cargo adds an option of its own.
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    // `cargo test --benches` starts this without words: there is nothing to test.
    let [lab, control, rounds] = &args[..] else { return };
    let rounds: usize = rounds.parse().unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (ours, openssh) = runtime.block_on(measure(lab, control, rounds));
    println!("{}", serde_json::json!({ "rounds": rounds, "harness_ms": median(ours), "openssh_ms": median(openssh) }));
}

async fn measure(lab: &str, control: &str, rounds: usize) -> (Vec<f64>, Vec<f64>) {
    let record: LabRecord = serde_json::from_slice(&std::fs::read(lab).unwrap()).unwrap();
    let node = record.nodes.first().unwrap();
    let key = std::path::Path::new(lab).with_file_name("client_key");
    let identity = russh::keys::PrivateKey::from_openssh(std::fs::read_to_string(key).unwrap()).unwrap();
    let target = SshTarget {
        node: node.name.clone(),
        addr: SocketAddr::from(([127, 0, 0, 1], node.ssh_port)),
        user: node.user.clone(),
        host_key: russh::keys::PublicKey::from_openssh(&node.host_key).unwrap(),
        identity: Arc::new(identity),
        patience: record.slowdown,
        news: NewsSink::none(),
    };
    let guest = Guest::connect(target, LIMIT).await.unwrap();
    let (mut ours, mut openssh) = (Vec::new(), Vec::new());
    // The first of each is for warming up.
    for round in 0..=rounds {
        let began = Instant::now();
        guest.exec_ok("true", LIMIT).await.unwrap();
        let mine = began.elapsed();
        let began = Instant::now();
        let mut ssh = Command::new("ssh");
        ssh.args(["-F", "none", "-S", control, "bench", "true"]).stdin(Stdio::null());
        assert!(ssh.status().unwrap().success());
        if round > 0 {
            ours.push(mine.as_secs_f64() * 1e3);
            openssh.push(began.elapsed().as_secs_f64() * 1e3);
        }
    }
    (ours, openssh)
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}
