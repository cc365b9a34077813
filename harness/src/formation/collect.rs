//! collect: what a person would look at next, fetched while the guests still live.
//!
//! Tolerant of dead parts: each item has its own deadline, and what cannot be had is named, never a failure.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::time::Duration;

use futures::future::join_all;

use crate::formation::context::Context;
use crate::guest::{Guest, GuestError};
use crate::lab::Lab;
use crate::plan::Phase;
use crate::printable::printable;
use crate::record::private_file;
use crate::redact::redact;

/// File in the node's folder, and the command whose output it holds. The kernel counts from boot, which `clock.json` places
/// on the host's clock; its own idea of the time of day may be wrong.
const ALWAYS: [(&str, &str); 1] = [("dmesg.log", "dmesg")];

/// What is fetched besides where a run failed.
const ON_FAILURE: [(&str, &str); 6] = [
    (
        "ip.txt",
        "ip -d link; echo; ip addr; echo; ip route; echo; ip neigh; for b in /proc/net/bonding/*; do [ -e \"$b\" ] && echo && echo \"$b\" && cat \"$b\"; done; for v in /proc/net/vlan/*; do echo; echo \"$v\"; cat \"$v\"; done",
    ),
    (
        "units.txt",
        "systemctl --no-pager --failed; systemctl --no-pager show -p Id,ActiveState,SubState,Result,NRestarts,ExecMainStatus,ExecMainStartTimestamp k3s-server.service k3s-agent.service; systemctl --no-pager status k3s-server.service k3s-agent.service",
    ),
    ("sockets.txt", "ss -lntup"),
    (
        "resources.txt",
        "df -h; echo; free -m; echo; cat /proc/loadavg /proc/pressure/* 2>/dev/null; echo; ps -eo pid,ppid,stat,pcpu,rss,etime,args --sort=-pcpu | head -40",
    ),
    (
        "k3s.txt",
        "cat /etc/default/k3s-server /etc/default/k3s-agent 2>/dev/null; ls -laR /var/lib/rancher/k3s/server 2>/dev/null | head -200; k3s --version",
    ),
    (
        "etcd.txt",
        "d=/var/lib/rancher/k3s/server/tls/etcd; curl -sm 5 http://127.0.0.1:2381/health; echo; a=$(sed -n 's/.*--node-ip \\([0-9.]*\\).*/\\1/p' /etc/default/k3s-server); curl -sm 5 --cacert $d/peer-ca.crt --cert $d/peer-server-client.crt --key $d/peer-server-client.key https://$a:2380/members",
    ),
];

/// After so many items in a row without a byte, a guest is taken to be hung.
const SILENT_MAX: u32 = 2;

/// `1 item`, `2 items`.
fn counted(how_many: usize, what: &str) -> String {
    format!("{how_many} {what}{}", if how_many == 1 { "" } else { "s" })
}

/// Fetches what is to be had from every node that was reached.
pub(super) async fn collect(cx: &Context, lab: &Lab, guests: &BTreeMap<String, Guest>, failed: bool) {
    if guests.is_empty() {
        cx.skip(Phase::Collect, "no guest was reached");
        return;
    }
    let items = ALWAYS.iter().chain(if failed { &ON_FAILURE[..] } else { &[] }).copied().collect::<Vec<_>>();
    let deadline = cx.deadline(Phase::Collect);
    // Not raced against the alarm: it may well be what there is evidence to collect of. Each item has a deadline.
    let began =
        cx.begin(Phase::Collect, &format!("{} of {}", counted(items.len(), "item"), counted(guests.len(), "node")));
    let missed = tokio::select! {
        missed = join_all(guests.values().map(|guest| collect_node(cx, lab, guest, &items, deadline))) => missed.concat(),
        signal = cx.guard.interruption() => vec![format!("the rest, interrupted by {signal}")],
    };
    let note = if missed.is_empty() { "complete".to_owned() } else { format!("without {}", missed.join(", ")) };
    cx.end(Phase::Collect, began, missed.is_empty(), note);
}

async fn collect_node(
    cx: &Context,
    lab: &Lab,
    guest: &Guest,
    items: &[(&str, &str)],
    deadline: Duration,
) -> Vec<String> {
    // A guest that is gone or held would let every item run into its deadline.
    if let Some(why) = lab.silenced(guest.node()).await {
        return vec![format!("{} ({why})", guest.node())];
    }
    let dir = match cx.record.node(guest.node()) {
        Ok(dir) => dir,
        Err(error) => {
            cx.sink.warn(format!("nothing is collected from {}: {error}", guest.node()));
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
        let (output, trouble) = match tokio::time::timeout(each, guest.exec(command, each)).await {
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
