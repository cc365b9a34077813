//! k3s's command line on each node.

use std::net::Ipv4Addr;

use crate::scenario::{POD_CIDR, Role, SERVICE_CIDR, Scenario, ScenarioNode};

/// What stands for the cluster's token in a plan; the first server makes the token up while it forms the cluster.
pub const TOKEN_PLACEHOLDER: &str = "${TOKEN}";

/// The port of k3s's API, which is also where nodes register.
pub const API_PORT: u16 = 6443;

/// What k3s on a node has to know of its place.
pub(super) struct Place<'a> {
    pub(super) node: &'a ScenarioNode,
    pub(super) ip: Ipv4Addr,
    pub(super) interface: &'a str,
    /// The first server's address, for every node but itself.
    pub(super) join: Option<Ipv4Addr>,
}

/// The arguments behind `k3s server` or `k3s agent`.
pub(super) fn args(scenario: &Scenario, place: &Place<'_>) -> Vec<String> {
    let ip = place.ip.to_string();
    let mut args = Vec::new();
    let mut flag = |name: &str, value: &str| args.extend([name.to_owned(), value.to_owned()]);
    if let Some(first) = place.join {
        flag("--server", &format!("https://{first}:{API_PORT}"));
        flag("--token", TOKEN_PLACEHOLDER);
    }
    flag("--node-name", &place.node.name);
    flag("--node-ip", &ip);
    flag("--flannel-iface", place.interface);
    if place.node.role == Role::Server {
        flag("--advertise-address", &ip);
        flag("--tls-san", &ip);
        flag("--cluster-cidr", POD_CIDR);
        flag("--service-cidr", SERVICE_CIDR);
        flag("--write-kubeconfig-mode", "0644");
        if !scenario.disable.is_empty() {
            flag("--disable", &scenario.disable.join(","));
        }
        if place.join.is_none() {
            args.insert(0, "--cluster-init".to_owned());
        }
    }
    args
}
