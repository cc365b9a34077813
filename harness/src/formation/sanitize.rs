//! sanitize: no k3s of an earlier boot is running and nothing it wrote is left (FM-2).
//!
//! Stopping alone is never enough: an image that enables k3s with a baked token has initialised a datastore
//! with it by the time the harness can stop it, and the join with another token then panics.

use std::time::Duration;

use crate::exit::Blame;
use crate::failure::Failure;
use crate::formation::context::{Context, Done};
use crate::guest::Guest;
use crate::plan::Phase;

/// What k3s keeps under its data folder that binds a node to a cluster, and the node's own identity.
const STATE: [&str; 6] = [
    "/var/lib/rancher/k3s/server/db",
    "/var/lib/rancher/k3s/server/tls",
    "/var/lib/rancher/k3s/server/cred",
    "/var/lib/rancher/k3s/server/token",
    "/var/lib/rancher/k3s/server/node-token",
    "/etc/rancher/node/password",
];

/// Stops, removes, and looks. Prints `was-running`, `removed PATH`, `left PATH` and `alive PID NAME` lines.
fn script() -> String {
    let state = STATE.join(" ");
    // Few programs are started: each costs an emulated CPU dearly. `is-active` prints one state per unit, in order.
    format!(
        r#"
set -- k3s-server.service k3s-agent.service k3s.service
running= failed=
for state in $(systemctl is-active "$@" 2>/dev/null); do
  case $state in
    active|activating|reloading|deactivating) echo "was-running $1"; running="$running $1" ;;
    failed) failed="$failed $1" ;;
  esac
  shift
done
[ -z "$running" ] || systemctl stop $running
[ -z "$running$failed" ] || systemctl reset-failed $running $failed 2>/dev/null
each() {{
  for comm in /proc/[0-9]*/comm; do
    read -r name <"$comm" 2>/dev/null || continue
    case $name in k3s|k3s-*|containerd|containerd-shim*|etcd) pid=${{comm#/proc/}}; "$1" "${{pid%/comm}}" "$name" ;; esac
  done
}}
end() {{ kill -9 "$1" 2>/dev/null && echo "killed $2"; }}
alive() {{ echo "alive $1 $2"; }}
each end
for path in {state}; do
  if [ -e "$path" ] || [ -L "$path" ]; then rm -rf "$path" && echo "removed $path"; fi
done
for path in {state}; do
  if [ -e "$path" ] || [ -L "$path" ]; then echo "left $path"; fi
done
each alive
echo done
"#
    )
}

/// Cleans one node and looks that it is clean.
///
/// # Errors
/// What was left, or why the node could not be cleaned.
pub(super) async fn sanitize(cx: &Context, guest: &Guest) -> Result<(), Failure> {
    let node = guest.node();
    cx.phase(Phase::Sanitize, Some(node), "no k3s process and no k3s state", async {
        let output = guest
            .exec_ok(&script(), cx.limit(Duration::from_secs(15)))
            .await
            .map_err(|error| Failure::from_error(Blame::Environment, "cleaning the node", &error))?;
        let found = Found::read(&output.text());
        if !found.finished {
            return Err(Failure::environment("cleaning the node did not come to its end"));
        }
        if !found.left.is_empty() {
            return Err(Failure::product(format!("k3s state would not go: {}", found.left.join(", ")))
                .hint("a datastore of an earlier start makes a join with another token panic (FM-2)"));
        }
        Ok(Done::new((), found.note()))
    })
    .await
}

/// What the script saw.
#[derive(Debug, Default, PartialEq, Eq)]
struct Found {
    was_running: Vec<String>,
    removed: Vec<String>,
    left: Vec<String>,
    finished: bool,
}

impl Found {
    fn read(text: &str) -> Self {
        let mut found = Self::default();
        for line in text.lines() {
            match line.split_once(' ') {
                Some(("was-running" | "killed", what)) => found.was_running.push(what.to_owned()),
                Some(("removed", path)) => found.removed.push(path.to_owned()),
                Some(("left", path)) => found.left.push(path.to_owned()),
                Some(("alive", process)) => found.left.push(format!("process {process}")),
                _ => found.finished |= line == "done",
            }
        }
        found
    }

    fn note(&self) -> String {
        if self.was_running.is_empty() && self.removed.is_empty() {
            return "nothing to clean".to_owned();
        }
        let mut note = Vec::new();
        if !self.was_running.is_empty() {
            note.push(format!(
                "stopped {} (started by the image: an auto-start race prevented)",
                self.was_running.join(", ")
            ));
        }
        if !self.removed.is_empty() {
            note.push(format!("removed {}", self.removed.join(", ")));
        }
        note.join("; ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_told_from_what_went() {
        let found =
            Found::read("was-running k3s-server.service\nkilled etcd\nremoved /a\nleft /b\nalive 12 k3s\ndone\n");
        assert_eq!(found.was_running, ["k3s-server.service", "etcd"]);
        assert_eq!(found.removed, ["/a"]);
        assert_eq!(found.left, ["/b", "process 12 k3s"]);
        assert!(found.finished);
        assert!(!Found::read("removed /a\n").finished);
    }
}
