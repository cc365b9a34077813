//! Leader election as client-go does it (15 s lease, 10 s renew deadline, a try every 2 s) on a
//! lease object in etcd, and the leader's node controller: pod CIDRs for new nodes, and
//! Ready=Unknown for nodes whose heartbeat stopped.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;

use crate::etcd::client::{EtcdClient, EtcdError, Expect};
use crate::logfmt;
use crate::nodes::{self, NodeError};

const LOCK: &str = "kube-system/kube-controller-manager";
const LOCK_KEY: &str = "/registry/leases/kube-system/kube-controller-manager";
const LEASE_DURATION: Duration = Duration::from_secs(15);
const RENEW_DEADLINE: Duration = Duration::from_secs(10);
const RETRY_PERIOD: Duration = Duration::from_secs(2);
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a node may be silent (kube-controller-manager's node-monitor-grace-period).
const GRACE: Duration = Duration::from_secs(40);

/// What one member of the election remembers: others' leases are timed by our own clock, from
/// when a change was last seen.
pub(crate) struct Elector {
    etcd: Arc<EtcdClient>,
    identity: String,
    cluster_cidr: String,
    seen: Option<(i64, Instant)>,
    leading: bool,
    heartbeats: BTreeMap<String, (String, Instant)>,
}

impl Elector {
    pub(crate) fn new(etcd: Arc<EtcdClient>, identity: String, cluster_cidr: String) -> Self {
        Self { etcd, identity, cluster_cidr, seen: None, leading: false, heartbeats: BTreeMap::new() }
    }

    /// One try to take or renew the lease, or (another leads) to see that the datastore answers.
    async fn try_lease(&mut self) -> Result<bool, EtcdError> {
        let found = self.etcd.get(LOCK_KEY, CALL_TIMEOUT).await?;
        let now = nodes::now_text();
        let lease = |transitions: i64, acquired: &Value| {
            json!({
                "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
                "metadata": {"namespace": "kube-system", "name": "kube-controller-manager"},
                "spec": {
                    "holderIdentity": self.identity, "leaseDurationSeconds": LEASE_DURATION.as_secs(),
                    "acquireTime": acquired, "renewTime": now, "leaseTransitions": transitions,
                },
            })
            .to_string()
            .into_bytes()
        };
        let (expect, value) = match found {
            None => (Expect::Absent, lease(0, &json!(now))),
            Some(kv) => {
                let old: Value = serde_json::from_slice(&kv.value).unwrap_or_default();
                let spec = &old["spec"];
                let transitions = spec["leaseTransitions"].as_i64().unwrap_or_default();
                if spec["holderIdentity"] == json!(self.identity) {
                    (Expect::Revision(kv.mod_revision), lease(transitions, &spec["acquireTime"]))
                } else {
                    match self.seen {
                        Some((revision, at)) if revision == kv.mod_revision => {
                            if at.elapsed() < LEASE_DURATION {
                                return Ok(false);
                            }
                        }
                        _ => {
                            self.seen = Some((kv.mod_revision, Instant::now()));
                            return Ok(false);
                        }
                    }
                    (Expect::Revision(kv.mod_revision), lease(transitions + 1, &json!(now)))
                }
            }
        };
        Ok(self.etcd.put_if(LOCK_KEY, &value, expect, CALL_TIMEOUT).await?.is_some())
    }

    /// How long the datastore may be silent: the holder of the lease has the renew deadline, the
    /// others the time after which they would take the lease over. A mere change of etcd's leader
    /// (up to 9.5 s) then does not end all servers at once.
    fn deadline(&self) -> Duration {
        if self.leading { RENEW_DEADLINE } else { LEASE_DURATION }
    }

    /// Runs until the datastore has not answered for longer than the deadline.
    pub(crate) async fn run(mut self) {
        logfmt::klog('I', "leaderelection.go:243", &format!("attempting to acquire leader lease {LOCK}..."));
        let mut last_success = Instant::now();
        loop {
            let started = Instant::now();
            let left = self.deadline().saturating_sub(last_success.elapsed());
            let answered = match tokio::time::timeout(left, self.try_lease()).await {
                Ok(Ok(leading)) => {
                    last_success = started;
                    if leading && !self.leading {
                        logfmt::klog('I', "leaderelection.go:253", &format!("successfully acquired lease {LOCK}"));
                    }
                    self.leading = leading;
                    true
                }
                Ok(Err(error)) => {
                    let message = format!("error retrieving resource lock {LOCK}: {error}");
                    logfmt::klog('E', "leaderelection.go:325", &message);
                    false
                }
                Err(_) => {
                    let message = format!("error retrieving resource lock {LOCK}: context deadline exceeded");
                    logfmt::klog('E', "leaderelection.go:325", &message);
                    false
                }
            };
            if last_success.elapsed() >= self.deadline() {
                let message = format!("failed to renew lease {LOCK}: timed out waiting for the condition");
                logfmt::klog('I', "leaderelection.go:278", &message);
                return;
            }
            if self.leading && answered {
                let left = self.deadline().saturating_sub(last_success.elapsed());
                match tokio::time::timeout(left, self.control_nodes()).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => logfmt::klog(
                        'E',
                        "node_lifecycle_controller.go:1108",
                        &format!("Error monitoring node health: {error}"),
                    ),
                    Err(_) => {}
                }
            }
            tokio::time::sleep_until(started + RETRY_PERIOD).await;
        }
    }

    /// The node controller's round.
    async fn control_nodes(&mut self) -> Result<(), NodeError> {
        let (all, _) = nodes::list(&self.etcd).await?;
        let mut used: BTreeSet<String> =
            all.iter().filter_map(|n| n["spec"]["podCIDR"].as_str().map(str::to_owned)).collect();
        self.heartbeats.retain(|name, _| all.iter().any(|n| nodes::name(n) == name));
        for mut node in all {
            let name = nodes::name(&node).to_owned();
            let mut changed = false;
            if node["spec"]["podCIDR"].as_str().is_none()
                && let Some(cidr) = free_pod_cidr(&self.cluster_cidr, &used)
            {
                logfmt::klog('I', "range_allocator.go:373", &format!("Set node {name} PodCIDR to [{cidr}]"));
                node["spec"]["podCIDR"] = json!(cidr);
                node["spec"]["podCIDRs"] = json!([cidr]);
                used.insert(cidr);
                changed = true;
            }
            if self.silent(&name, &node, Instant::now()) {
                logfmt::klog(
                    'I',
                    "event.go:291",
                    &format!(
                        "\"Event occurred\" object=\"{name}\" kind=\"Node\" apiVersion=\"v1\" type=\"Normal\" reason=\"NodeNotReady\" message=\"Node {name} status is now: NodeNotReady\""
                    ),
                );
                let now = nodes::now_text();
                for kind in ["MemoryPressure", "DiskPressure", "PIDPressure", "Ready"] {
                    let heartbeat = nodes::condition(&node, kind).map(|c| c["lastHeartbeatTime"].clone());
                    let message = "Kubelet stopped posting node status.";
                    nodes::set_condition(&mut node, kind, "Unknown", "NodeStatusUnknown", message, &now);
                    // The heartbeat is the kubelet's: it stays what it was.
                    if let Some(slot) = node["status"]["conditions"]
                        .as_array_mut()
                        .and_then(|c| c.iter_mut().find(|c| c["type"] == kind))
                    {
                        slot["lastHeartbeatTime"] = heartbeat.unwrap_or(Value::Null);
                    }
                }
                changed = true;
            }
            if changed {
                match nodes::update(&self.etcd, node).await {
                    Ok(_) => {}
                    // The kubelet wrote in between, so it is alive; a CIDR waits for the next round.
                    Err(NodeError::Conflict(_)) => {}
                    Err(e) => return Err(e),
                }
            }
        }
        Ok(())
    }

    /// Whether a node not yet marked has been silent for longer than the grace period.
    fn silent(&mut self, name: &str, node: &Value, now: Instant) -> bool {
        let Some(ready) = nodes::condition(node, "Ready") else { return false };
        let heartbeat = ready["lastHeartbeatTime"].as_str().unwrap_or_default().to_owned();
        let seen = self.heartbeats.entry(name.to_owned()).or_insert_with(|| (heartbeat.clone(), now));
        if seen.0 != heartbeat {
            *seen = (heartbeat, now);
        }
        ready["status"] != "Unknown" && now.duration_since(seen.1) > GRACE
    }
}

/// The first free /24 of the cluster network.
fn free_pod_cidr(cluster: &str, used: &BTreeSet<String>) -> Option<String> {
    let (network, bits) = cluster.split(',').next()?.split_once('/')?;
    let network = u32::from(network.parse::<std::net::Ipv4Addr>().ok()?);
    let bits: u32 = bits.parse().ok().filter(|b| *b <= 24)?;
    (0..1_u32 << (24 - bits))
        .map(|n| format!("{}/24", std::net::Ipv4Addr::from(network + (n << 8))))
        .find(|c| !used.contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::Endpoint;

    #[test]
    fn a_node_is_silent_after_forty_seconds_by_our_clock() {
        let tls = crate::tls::insecure_client().unwrap();
        let etcd = Arc::new(EtcdClient::new(Endpoint { host: "127.0.0.1".into(), port: 1 }, tls));
        let mut elector = Elector::new(etcd, "n1".into(), "10.42.0.0/16".into());
        let mut node = json!({"metadata": {"name": "n"}});
        let start = Instant::now();
        let at = |s: u64| start + Duration::from_secs(s);
        nodes::set_condition(&mut node, "Ready", "True", "r", "m", "t1");
        assert!(!elector.silent("n", &node, at(0)));
        assert!(!elector.silent("n", &node, at(40)));
        assert!(elector.silent("n", &node, at(41)));
        nodes::set_condition(&mut node, "Ready", "True", "r", "m", "t2");
        assert!(!elector.silent("n", &node, at(41)), "a new heartbeat starts the time anew");
        nodes::set_condition(&mut node, "Ready", "Unknown", "r", "m", "t2");
        assert!(!elector.silent("n", &node, at(200)), "marked once is enough");
    }

    #[test]
    fn pod_networks_are_handed_out_in_order() {
        let mut used = BTreeSet::new();
        assert_eq!(free_pod_cidr("10.42.0.0/16", &used).as_deref(), Some("10.42.0.0/24"));
        used.insert("10.42.0.0/24".to_owned());
        assert_eq!(free_pod_cidr("10.42.0.0/16", &used).as_deref(), Some("10.42.1.0/24"));
        assert_eq!(free_pod_cidr("10.42.0.0/24", &used), None);
    }
}
