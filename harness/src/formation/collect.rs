//! collect: what a person would look at next, fetched while the guests still live.
//!
//! Tolerant of dead parts: each item has its own deadline, and what cannot be had is named, never a failure.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::time::Duration;

use futures::future::join_all;

use crate::event::EventSink;
use crate::formation::context::Context;
use crate::guest::{Guest, GuestError};
use crate::lab::Lab;
use crate::plan::Phase;
use crate::printable::printable;
use crate::record::{RunDir, private_file};
use crate::redact::redact;

/// File in the node's folder, and the command whose output it holds. A run that passed has its journals, with the kernel's
/// lines in them, and needs no more.
const ITEMS: [(&str, &str); 9] = [
    // The kernel counts from boot, which `clock.json` places on the host's clock; its own idea of the time of day may be wrong.
    ("dmesg.log", "dmesg"),
    (
        "ip.txt",
        "ip -d -s link; echo; ip addr; echo; ip route show table all; echo; ip neigh; for b in /proc/net/bonding/*; do [ -e \"$b\" ] && echo && echo \"$b\" && cat \"$b\"; done; for v in /proc/net/vlan/*; do [ -e \"$v\" ] && echo && echo \"$v\" && cat \"$v\"; done",
    ),
    (
        "units.txt",
        "systemctl --no-pager --failed; systemctl --no-pager show -p Id,ActiveState,SubState,Result,NRestarts,ExecMainStatus,ExecMainStartTimestamp k3s-server.service k3s-agent.service; systemctl --no-pager status k3s-server.service k3s-agent.service",
    ),
    ("sockets.txt", "ss -lntup"),
    (
        "resources.txt",
        "df -h; echo; df -i; echo; free -m; echo; cat /proc/loadavg /proc/pressure/* 2>/dev/null; echo; ps -eo pid,ppid,stat,pcpu,rss,etime,args --sort=-pcpu | head -40",
    ),
    ("k3s.txt", K3S),
    ("etcd.txt", ETCD),
    // What could not be followed to its end, say because sshd answered late.
    ("journal-tail.txt", "journalctl --no-pager --boot --output=short-iso-precise --lines=500"),
    (
        "files.txt",
        "ls -laR /var/lib/rancher/k3s/server 2>/dev/null | head -200; file -b /usr/local/bin/k3s 2>/dev/null; od -An -tx1 -N20 /usr/local/bin/k3s",
    ),
];

/// Flags and configuration. In a configuration file the token stands behind a word too common to be looked for everywhere, so
/// it is taken out here. The version is asked for last: a k3s that hangs costs only that.
const K3S: &str = "for f in /etc/default/k3s-server /etc/default/k3s-agent /etc/rancher/k3s/config.yaml /etc/rancher/k3s/config.yaml.d/*; do \
    [ -e \"$f\" ] && echo \"# $f\" && sed -E 's/^([[:space:]]*\"?(agent-)?token\"?[[:space:]]*:).*/\\1 <token redacted>/' \"$f\"; done; \
    for p in $(pidof k3s); do tr '\\0' ' ' <\"/proc/$p/cmdline\"; echo; done; timeout 5 k3s --version";

/// etcd's members, from its peer port (whose certificate may well be what is wrong, so it is not checked; HTTP/2 is for gRPC there), and what `endpoint status` would say: version, leader, size, raft's indexes.
const ETCD: &str = "d=/var/lib/rancher/k3s/server/tls/etcd; a=$(sed -n 's/.*--node-ip \\([0-9.]*\\).*/\\1/p' /etc/default/k3s-server); \
    peer=\"--cacert $d/peer-ca.crt --cert $d/peer-server-client.crt --key $d/peer-server-client.key\"; \
    echo '# members'; curl -sSkm 3 --http1.1 $peer \"https://$a:2380/members\"; echo; \
    echo '# version'; curl -sSkm 3 --http1.1 $peer \"https://$a:2380/version\"; echo; \
    echo '# health'; curl -sSm 3 http://127.0.0.1:2381/health; echo; \
    echo '# status'; curl -sSm 3 http://127.0.0.1:2381/metrics | grep -E '^etcd_(server_(has_leader|is_leader|is_learner|id|leader_changes_seen_total|proposals_(committed_total|applied_total|pending|failed_total)|heartbeat_send_failures_total|slow_apply_total)|mvcc_db_total_size(_in_use)?_in_bytes|disk_wal_fsync_duration_seconds_(sum|count)|network_peer_round_trip_time_seconds_(sum|count))'";

/// What a command that does not keep to its own deadline, and so says nothing of what it had, is given beyond it.
const BACKSTOP: Duration = Duration::from_secs(2);
/// After so many items in a row without a byte, a guest is taken to be hung.
const SILENT_MAX: u32 = 2;

/// `1 item`, `2 items`.
fn counted(how_many: usize, what: &str) -> String {
    format!("{how_many} {what}{}", if how_many == 1 { "" } else { "s" })
}

/// Fetches what is to be had from every node that was reached, where a run failed.
pub(super) async fn collect(cx: &Context, lab: &Lab, guests: &BTreeMap<String, Guest>) {
    if guests.is_empty() {
        cx.skip(Phase::Collect, "no guest was reached");
        return;
    }
    let deadline = cx.deadline(Phase::Collect);
    // Not raced against the alarm: it may well be what there is evidence to collect of. Each item has a deadline.
    let began =
        cx.begin(Phase::Collect, &format!("{} of {}", counted(ITEMS.len(), "item"), counted(guests.len(), "node")));
    let missed = tokio::select! {
        missed = join_all(guests.values().map(|guest| {
            collect_living(&cx.record, &cx.sink, guest, lab.falls_silent(guest.node()), &ITEMS, deadline)
        })) => missed.concat(),
        signal = cx.guard.interruption() => vec![format!("the rest, interrupted by {signal}")],
    };
    let note = if missed.is_empty() { "complete".to_owned() } else { format!("without {}", missed.join(", ")) };
    cx.end(Phase::Collect, began, missed.is_empty(), note);
}

/// A guest that is gone or held would let every item run into its deadline: it is only named. One may be so a moment after
/// the evidence that ended the run: a kernel prints its panic before QEMU is told of it.
async fn collect_living(
    record: &RunDir,
    sink: &EventSink,
    guest: &Guest,
    silent: impl Future<Output = String>,
    items: &[(&str, &str)],
    deadline: Duration,
) -> Vec<String> {
    tokio::select! {
        biased;
        why = silent => vec![format!("{} ({why})", guest.node())],
        missed = collect_node(record, sink, guest, items, deadline) => missed,
    }
}

/// Fetches a node's items, one after the other, each with its share of the deadline. What is missing is returned in words.
async fn collect_node(
    record: &RunDir,
    sink: &EventSink,
    guest: &Guest,
    items: &[(&str, &str)],
    deadline: Duration,
) -> Vec<String> {
    let dir = match record.node(guest.node()) {
        Ok(dir) => dir,
        Err(error) => {
            sink.warn(format!("nothing is collected from {}: {error}", guest.node()));
            return vec![guest.node().to_owned()];
        }
    };
    let each = deadline / u32::try_from(items.len().max(1)).unwrap_or(1);
    let mut missed = Vec::new();
    let mut silent = 0;
    for (file, command) in items {
        if silent >= SILENT_MAX {
            missed.push(format!("{}/{file} and what follows (it does not answer any more)", guest.node()));
            break;
        }
        let name = format!("{}/{file}", guest.node());
        let (output, trouble) = match tokio::time::timeout(each + BACKSTOP, guest.exec(command, each)).await {
            Ok(Ok(output)) => (output, None),
            Ok(Err(GuestError::Deadline { partial, .. })) => {
                silent = if partial.stdout.is_empty() && partial.stderr.is_empty() { silent + 1 } else { 0 };
                (*partial, Some("cut at its deadline".to_owned()))
            }
            Ok(Err(error)) if error.is_connection() => {
                missed.push(format!("{} ({error})", guest.node()));
                break;
            }
            Ok(Err(error)) => {
                missed.push(format!("{name} ({error})"));
                continue;
            }
            Err(_) => {
                missed.push(format!("{name} (no answer)"));
                continue;
            }
        };
        if let Some(trouble) = trouble {
            missed.push(format!("{name} ({trouble})"));
        }
        let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.stderr.is_empty() {
            text.push_str("\n--- standard error ---\n");
            text.push_str(&String::from_utf8_lossy(&output.stderr));
        }
        let written =
            private_file(&dir.join(file)).and_then(|mut out| out.write_all(printable(&redact(&text)).as_bytes()));
        if let Err(error) = written {
            missed.push(format!("{name} ({error})"));
        }
    }
    missed
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::guest::testing::{Door, Sshd};
    use crate::record::testing::run_dir;

    #[tokio::test]
    async fn a_part_that_hangs_costs_itself_only_and_no_token_is_kept() {
        let state = tempfile::tempdir().unwrap();
        let record = run_dir(&state);
        let sshd = Sshd::start();
        let guest = sshd.guest().await;
        let items = [
            ("a.txt", "echo first"),
            ("hangs.txt", "echo begun; exec sleep 1000"),
            ("b.txt", "echo k3s server --token s3cret --node-ip 1; echo trouble >&2"),
        ];
        let began = Instant::now();
        let missed = collect_node(&record, &EventSink::new().0, &guest, &items, Duration::from_secs(6)).await;
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
        assert_eq!(missed, ["server-1/hangs.txt (cut at its deadline)"]);
        let read = |file: &str| std::fs::read_to_string(record.node("server-1").unwrap().join(file)).unwrap();
        assert_eq!((read("a.txt").as_str(), read("hangs.txt").as_str()), ("first\n", "begun\n"));
        assert_eq!(
            read("b.txt"),
            "k3s server --token <token redacted> --node-ip 1\n\n--- standard error ---\ntrouble\n"
        );
    }

    #[tokio::test]
    async fn a_guest_that_falls_silent_under_the_collection_is_not_asked_on() {
        let state = tempfile::tempdir().unwrap();
        let record = run_dir(&state);
        let sshd = Sshd::start();
        let guest = sshd.guest().await;
        let items = [("a.txt", "exec sleep 1000"), ("b.txt", "exec sleep 1000")];
        let silent = async {
            tokio::time::sleep(Duration::from_millis(300)).await;
            "its vCPUs are stopped (guest-panicked)".to_owned()
        };
        let began = Instant::now();
        let missed =
            collect_living(&record, &EventSink::new().0, &guest, silent, &items, Duration::from_secs(60)).await;
        assert_eq!(missed, ["server-1 (its vCPUs are stopped (guest-panicked))"]);
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    }

    #[tokio::test]
    async fn a_node_that_is_gone_is_named_once() {
        let state = tempfile::tempdir().unwrap();
        let record = run_dir(&state);
        let sshd = Sshd::start();
        let guest = sshd.guest().await;
        sshd.set(Door::Refusing);
        sshd.kill_sessions();
        let items = [("a.txt", "echo a"), ("b.txt", "echo b")];
        let missed = collect_node(&record, &EventSink::new().0, &guest, &items, Duration::from_secs(2)).await;
        assert!(!missed.is_empty() && missed.iter().all(|missed| missed.contains("server-1")), "{missed:?}");
    }

    #[test]
    fn the_token_of_a_configuration_file_is_taken_out_in_the_guest() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.yaml");
        std::fs::write(&file, "server: https://a\ntoken: s3cret\n  \"agent-token\": 'other'\ntoken-file: /x\n")
            .unwrap();
        let script = K3S.replace("/etc/rancher/k3s/config.yaml ", &format!("{} ", file.display()));
        let output = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(text.contains("server: https://a\ntoken: <token redacted>\n"), "{text}");
        assert!(text.contains("token-file: /x"), "{text}");
        assert!(!text.contains("s3cret") && !text.contains("other"), "{text}");
    }
}
