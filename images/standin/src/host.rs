//! What the node is: names, addresses, kernel, memory; and what k3s asks of it before a node can
//! be Ready: kernel modules, sysctls, the flannel interface.

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use crate::logfmt;

/// Modules k3s loads at its start. Source: k3s `pkg/agent/syssetup`.
const MODULES: &[&str] = &["overlay", "nf_conntrack", "br_netfilter", "iptable_nat"];
const MODPROBE_TIMEOUT: Duration = Duration::from_secs(30);

/// Sysctls k3s sets at its start. Source: k3s `pkg/agent/syssetup`.
const SYSCTLS: &[(&str, &str)] = &[
    ("net/ipv4/ip_forward", "1"),
    ("net/ipv4/conf/all/forwarding", "1"),
    ("net/ipv4/conf/default/forwarding", "1"),
    ("net/bridge/bridge-nf-call-iptables", "1"),
];

fn first_line(path: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    text.lines().next().map(|l| l.trim().to_owned()).filter(|l| !l.is_empty())
}

/// The host's name.
pub(crate) fn hostname() -> Option<String> {
    first_line("/proc/sys/kernel/hostname")
}

/// The interface of the default route.
pub(crate) fn default_interface() -> Option<String> {
    let routes = fs::read_to_string("/proc/net/route").ok()?;
    routes.lines().skip(1).find_map(|line| {
        let mut fields = line.split_whitespace();
        let name = fields.next()?;
        (fields.next()? == "00000000").then(|| name.to_owned())
    })
}

/// The address this host would use towards its default route.
pub(crate) fn default_address() -> Option<IpAddr> {
    // Connecting a datagram socket sends nothing: the kernel only looks up the route.
    let socket = std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9)).ok()?;
    socket.local_addr().ok().map(|a| a.ip()).filter(|ip| !ip.is_unspecified())
}

/// All IPv4 addresses of this host.
pub(crate) fn local_addresses() -> Vec<IpAddr> {
    fs::read_to_string("/proc/net/fib_trie").map(|text| parse_fib_trie(&text)).unwrap_or_default()
}

fn parse_fib_trie(text: &str) -> Vec<IpAddr> {
    let mut found: Vec<IpAddr> = Vec::new();
    let mut last = None;
    for line in text.lines() {
        let line = line.trim();
        if let Some(address) = line.strip_prefix("|-- ") {
            last = address.parse::<IpAddr>().ok();
        } else if line == "/32 host LOCAL"
            && let Some(address) = last
            && !found.contains(&address)
        {
            found.push(address);
        }
    }
    found
}

/// Whether a network interface of that name is there.
pub(crate) fn interface_exists(name: &str) -> bool {
    !name.contains('/') && Path::new("/sys/class/net").join(name).exists()
}

/// Whether the kernel knows the overlay file system (the snapshotter needs it).
pub(crate) fn overlay_supported() -> bool {
    fs::read_to_string("/proc/filesystems")
        .is_ok_and(|t| t.lines().any(|l| l.split_whitespace().last() == Some("overlay")))
}

/// Loads what is missing of the modules, sets what differs of the sysctls; failures are logged as
/// k3s logs them and stop nothing.
pub(crate) async fn prepare() {
    for module in MODULES {
        if Path::new("/sys/module").join(module).exists() {
            continue;
        }
        let child = tokio::process::Command::new("modprobe")
            .arg("--")
            .arg(module)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .status();
        match tokio::time::timeout(MODPROBE_TIMEOUT, child).await {
            Ok(Ok(status)) if status.success() => logfmt::info(format!("Module {module} was loaded")),
            _ => logfmt::warn(format!("Failed to load kernel module {module} with modprobe")),
        }
    }
    for (name, value) in SYSCTLS {
        let path = format!("/proc/sys/{name}");
        if first_line(&path).as_deref() == Some(*value) {
            continue;
        }
        logfmt::info(format!("Set sysctl '{name}' to {value}"));
        if let Err(error) = fs::write(&path, value) {
            logfmt::error(format!("Failed to set sysctl: open {path}: {error}"));
        }
    }
}

/// Facts for the node object's `nodeInfo` and `capacity`.
#[derive(Debug, Default, Clone)]
pub(crate) struct NodeFacts {
    pub(crate) machine_id: String,
    pub(crate) boot_id: String,
    pub(crate) kernel: String,
    pub(crate) os_image: String,
    pub(crate) memory_kib: u64,
    pub(crate) cpus: usize,
    pub(crate) hostname: String,
}

/// Reads the facts once.
pub(crate) fn node_facts() -> NodeFacts {
    let os_release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let os_image = os_release
        .lines()
        .find_map(|l| l.strip_prefix("PRETTY_NAME="))
        .map_or_else(|| "Linux".to_owned(), |v| v.trim_matches('"').to_owned());
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let memory_kib = meminfo
        .lines()
        .find_map(|l| l.strip_prefix("MemTotal:"))
        .and_then(|v| v.split_whitespace().next())
        .and_then(|v| v.parse().ok())
        .unwrap_or_default();
    NodeFacts {
        machine_id: first_line("/etc/machine-id").unwrap_or_default(),
        boot_id: first_line("/proc/sys/kernel/random/boot_id").unwrap_or_default(),
        kernel: first_line("/proc/sys/kernel/osrelease").unwrap_or_default(),
        os_image,
        memory_kib,
        cpus: std::thread::available_parallelism().map_or(1, usize::from),
        hostname: hostname().unwrap_or_default(),
    }
}

/// Resolves a host without the C library's resolver, which a static binary cannot use: an
/// address, or a name in `/etc/hosts`.
pub(crate) fn resolve(host: &str) -> Option<IpAddr> {
    if let Ok(address) = host.trim_matches(['[', ']']).parse() {
        return Some(address);
    }
    let hosts = fs::read_to_string("/etc/hosts").ok()?;
    hosts.lines().find_map(|line| {
        let mut words = line.split('#').next()?.split_whitespace();
        let address = words.next()?.parse().ok()?;
        words.any(|w| w.eq_ignore_ascii_case(host)).then_some(address)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_addresses_come_from_the_routing_trie() {
        let text = "Local:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 192.168.200.1\n        /32 host LOCAL\n     |-- 192.168.200.255\n        /32 link BROADCAST\n     |-- 127.0.0.1\n        /32 host LOCAL\n";
        let expected: Vec<IpAddr> = ["192.168.200.1", "127.0.0.1"].map(|a| a.parse().unwrap()).to_vec();
        assert_eq!(parse_fib_trie(text), expected);
    }

    #[test]
    fn an_interface_is_there_or_not() {
        assert!(interface_exists("lo"));
        assert!(!interface_exists("no-such-iface"));
        assert!(!interface_exists("../lo"));
    }

    #[test]
    fn names_resolve_from_hosts_only() {
        assert_eq!(resolve("10.1.2.3"), "10.1.2.3".parse().ok());
        assert_eq!(resolve("no-such-host.invalid"), None);
    }
}
