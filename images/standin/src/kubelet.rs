//! The node's own part, kubelet-like: it registers a node object, makes it Ready once what a
//! runtime needs is seen to be there, and renews its heartbeat.

use std::sync::Arc;
use std::time::Duration;

use hyper::Method;
use serde_json::{Value, json};

use crate::VERSION;
use crate::cli::Settings;
use crate::etcd::client::EtcdClient;
use crate::host::{self, NodeFacts};
use crate::logfmt;
use crate::net::{Client, NetError};
use crate::nodes::{self, NodeError};

/// kubelet's default node-status-update-frequency.
const HEARTBEAT: Duration = Duration::from_secs(10);
/// How soon a node that is not Ready looks again.
const RETRY: Duration = Duration::from_secs(1);
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
const UPDATE_ATTEMPTS: u32 = 5;

/// Why the node object could not be brought up to date.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KubeletError {
    #[error(transparent)]
    Node(#[from] NodeError),
    #[error("{url}: {source}")]
    Net { url: String, source: NetError },
    #[error("{url}: {status}")]
    Status { url: String, status: String },
}

/// How a node reaches its object: a server through its own etcd, an agent through a server.
pub(crate) enum NodeApi {
    Local(Arc<EtcdClient>),
    Remote(Client),
}

impl NodeApi {
    async fn get(&self, name: &str) -> Result<Option<Value>, KubeletError> {
        let found = match self {
            Self::Local(etcd) => nodes::get(etcd, name).await.map_err(KubeletError::from),
            Self::Remote(_) => self.remote(Method::GET, &format!("/api/v1/nodes/{name}"), None).await,
        };
        match found {
            Ok(node) => Ok(Some(node)),
            Err(KubeletError::Node(NodeError::NotFound(_))) => Ok(None),
            Err(e) => Err(e),
        }
    }

    async fn put(&self, node: Value, create: bool) -> Result<Value, KubeletError> {
        let path = if create { "/api/v1/nodes".to_owned() } else { format!("/api/v1/nodes/{}", nodes::name(&node)) };
        match self {
            Self::Local(etcd) if create => Ok(nodes::create(etcd, node).await?),
            Self::Local(etcd) => Ok(nodes::update(etcd, node).await?),
            Self::Remote(_) => self.remote(if create { Method::POST } else { Method::PUT }, &path, Some(node)).await,
        }
    }

    async fn remote(&self, method: Method, path: &str, body: Option<Value>) -> Result<Value, KubeletError> {
        let Self::Remote(client) = self else {
            return Err(NodeError::Invalid("not a remote API".to_owned()).into());
        };
        let url = format!("https://{}{path}", client.endpoint);
        let body = body.map(|b| b.to_string().into_bytes()).unwrap_or_default();
        let answer = client
            .request(method, path, body, CALL_TIMEOUT)
            .await
            .map_err(|source| KubeletError::Net { url: url.clone(), source })?;
        let name = path.rsplit('/').next().unwrap_or_default().to_owned();
        match answer.status.as_u16() {
            200..=299 => serde_json::from_slice(&answer.body)
                .map_err(|e| KubeletError::Status { url, status: format!("{}: {e}", answer.status) }),
            404 => Err(NodeError::NotFound(name).into()),
            409 => Err(NodeError::Conflict(name).into()),
            _ => Err(KubeletError::Status { url, status: answer.status.to_string() }),
        }
    }
}

/// What a node says of itself.
pub(crate) struct Kubelet {
    settings: Arc<Settings>,
    facts: NodeFacts,
    server: bool,
    etcd_name: Option<String>,
    api: NodeApi,
}

impl Kubelet {
    pub(crate) fn new(settings: Arc<Settings>, server: bool, etcd_name: Option<String>, api: NodeApi) -> Self {
        Self { settings, facts: host::node_facts(), server, etcd_name, api }
    }

    /// What keeps the node from being Ready, if anything.
    fn not_ready_reason(&self, node: &Value) -> Option<String> {
        let network = "container runtime network not ready: NetworkReady=false reason:NetworkPluginNotReady message:";
        if !host::overlay_supported() {
            return Some("container runtime is down: overlayfs is not supported by this kernel".to_owned());
        }
        let interface = self.settings.flannel_iface.clone().or_else(host::default_interface);
        match interface {
            None => return Some(format!("{network}no default route: set --flannel-iface")),
            Some(name) if !host::interface_exists(&name) => {
                return Some(format!("{network}unable to find interface {name}"));
            }
            Some(_) => {}
        }
        if node["spec"]["podCIDR"].as_str().is_none() {
            logfmt::info(format!("Waiting for node {} CIDR not assigned yet", self.settings.node_name));
            return Some(format!("{network}cni plugin not initialized: no pod CIDR yet"));
        }
        None
    }

    fn describe(&self, node: &mut Value) {
        let s = &self.settings;
        let ip = s.node_ip.to_string();
        node["apiVersion"] = json!("v1");
        node["kind"] = json!("Node");
        node["metadata"]["name"] = json!(s.node_name);
        let mut labels = vec![
            ("beta.kubernetes.io/arch", "amd64"),
            ("beta.kubernetes.io/instance-type", "k3s"),
            ("beta.kubernetes.io/os", "linux"),
            ("kubernetes.io/arch", "amd64"),
            ("kubernetes.io/hostname", s.node_name.as_str()),
            ("kubernetes.io/os", "linux"),
            ("node.kubernetes.io/instance-type", "k3s"),
        ];
        if self.server {
            labels.extend([
                ("node-role.kubernetes.io/control-plane", "true"),
                ("node-role.kubernetes.io/etcd", "true"),
                ("node-role.kubernetes.io/master", "true"),
            ]);
        }
        labels.extend(s.node_labels.iter().map(|(k, v)| (k.as_str(), v.as_str())));
        for (key, value) in labels {
            node["metadata"]["labels"][key] = json!(value);
        }
        let args = json!(s.args).to_string();
        let mut annotations = vec![
            ("k3s.io/hostname", self.facts.hostname.as_str()),
            ("k3s.io/internal-ip", ip.as_str()),
            ("k3s.io/node-args", args.as_str()),
            ("flannel.alpha.coreos.com/public-ip", ip.as_str()),
        ];
        if let Some(name) = &self.etcd_name {
            annotations.push(("etcd.k3s.cattle.io/node-name", name));
            annotations.push(("etcd.k3s.cattle.io/node-address", &ip));
        }
        for (key, value) in annotations {
            node["metadata"]["annotations"][key] = json!(value);
        }
        node["spec"]["providerID"] = json!(format!("k3s://{}", s.node_name));
        let taints: Vec<Value> = s.node_taints.iter().filter_map(|t| taint(t)).collect();
        if !taints.is_empty() {
            node["spec"]["taints"] = json!(taints);
        }
        let capacity = json!({
            "cpu": self.facts.cpus.to_string(), "memory": format!("{}Ki", self.facts.memory_kib), "pods": "110",
        });
        let status = &mut node["status"];
        status["addresses"] =
            json!([{"type": "InternalIP", "address": ip}, {"type": "Hostname", "address": s.node_name}]);
        status["allocatable"] = capacity.clone();
        status["capacity"] = capacity;
        status["daemonEndpoints"] = json!({"kubeletEndpoint": {"Port": 10250}});
        status["nodeInfo"] = json!({
            "architecture": "amd64", "operatingSystem": "linux",
            "bootID": self.facts.boot_id, "machineID": self.facts.machine_id, "systemUUID": self.facts.machine_id,
            "kernelVersion": self.facts.kernel, "osImage": self.facts.os_image,
            "containerRuntimeVersion": "none://stand-in",
            "kubeletVersion": VERSION, "kubeProxyVersion": VERSION,
        });
    }

    /// Brings the node object up to date. Returns whether the node is Ready.
    async fn beat(&self) -> Result<bool, KubeletError> {
        let name = &self.settings.node_name;
        for attempt in 1.. {
            let found = self.api.get(name).await?;
            let create = found.is_none();
            let now = nodes::now_text();
            let mut node = found.unwrap_or_else(
                || json!({"metadata": {"creationTimestamp": now, "uid": new_uid()}, "spec": {}, "status": {}}),
            );
            self.describe(&mut node);
            let reason = self.not_ready_reason(&node);
            for (kind, word) in [("MemoryPressure", "Memory"), ("DiskPressure", "Disk"), ("PIDPressure", "PID")] {
                let (reason, message) = match word {
                    "Memory" => ("KubeletHasSufficientMemory", "kubelet has sufficient memory available"),
                    "Disk" => ("KubeletHasNoDiskPressure", "kubelet has no disk pressure"),
                    _ => ("KubeletHasSufficientPID", "kubelet has sufficient PID available"),
                };
                nodes::set_condition(&mut node, kind, "False", reason, message, &now);
            }
            match &reason {
                None => {
                    let message = "kubelet is posting ready status";
                    nodes::set_condition(&mut node, "Ready", "True", "KubeletReady", message, &now);
                }
                Some(why) => nodes::set_condition(&mut node, "Ready", "False", "KubeletNotReady", why, &now),
            }
            match self.api.put(node, create).await {
                Ok(_) => {
                    if create {
                        logfmt::klog(
                            'I',
                            "kubelet_node_status.go:74",
                            &format!("\"Successfully registered node\" node=\"{name}\""),
                        );
                    }
                    return Ok(reason.is_none());
                }
                // Somebody else (the node controller) wrote in between: read again.
                Err(KubeletError::Node(NodeError::Conflict(_) | NodeError::AlreadyExists(_)))
                    if attempt < UPDATE_ATTEMPTS => {}
                Err(e) => return Err(e),
            }
        }
        Ok(false)
    }

    /// Registers, then keeps the heartbeat for ever. `registered` hears of the first success.
    pub(crate) async fn run(self, registered: tokio::sync::oneshot::Sender<()>) {
        let mut registered = Some(registered);
        let mut was_ready = false;
        loop {
            let pause = match self.beat().await {
                Ok(ready) => {
                    if let Some(tell) = registered.take() {
                        let _ = tell.send(());
                    }
                    if ready && !was_ready {
                        logfmt::klog(
                            'I',
                            "kubelet_node_status.go:500",
                            "\"Fast updating node status as it just became ready\"",
                        );
                    }
                    was_ready = ready;
                    if ready { HEARTBEAT } else { RETRY }
                }
                Err(error) => {
                    let name = &self.settings.node_name;
                    logfmt::klog(
                        'E',
                        "kubelet_node_status.go:470",
                        &format!(
                            "\"Error updating node status, will retry\" err=\"error getting node \\\"{name}\\\": {error}\""
                        ),
                    );
                    if was_ready { HEARTBEAT } else { RETRY }
                }
            };
            tokio::time::sleep(pause).await;
        }
    }
}

/// `key=value:Effect` or `key:Effect`.
fn taint(text: &str) -> Option<Value> {
    let (pair, effect) = text.rsplit_once(':')?;
    let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
    Some(json!({"key": key, "value": value, "effect": effect}))
}

/// A random (version 4) UUID; the kernel makes them.
fn new_uid() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/uuid").map(|u| u.trim().to_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taints_come_apart() {
        assert_eq!(taint("a=b:NoSchedule").unwrap(), json!({"key": "a", "value": "b", "effect": "NoSchedule"}));
        assert_eq!(taint("a:NoExecute").unwrap()["value"], "");
        assert!(taint("a").is_none());
    }
}
