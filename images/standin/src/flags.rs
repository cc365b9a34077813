//! The table of k3s's flags and the parsing of a command line against it, with the error
//! phrasing of the library k3s uses (`flag provided but not defined: -name`).

use std::collections::BTreeMap;

/// What a flag takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Bool,
    Value,
    List,
}

/// Which sub-command knows the flag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scope {
    Both,
    Server,
}

/// One flag of k3s.
#[derive(Debug)]
pub(crate) struct Flag {
    pub(crate) name: &'static str,
    short: &'static str,
    kind: Kind,
    scope: Scope,
    env: &'static str,
    /// Whether the stand-in acts on it; the others are accepted and said to have no effect.
    pub(crate) effective: bool,
}

const fn flag(name: &'static str, kind: Kind, scope: Scope) -> Flag {
    Flag { name, short: "", kind, scope, env: "", effective: true }
}

const fn ignored(name: &'static str, kind: Kind, scope: Scope) -> Flag {
    Flag { name, short: "", kind, scope, env: "", effective: false }
}

impl Flag {
    const fn env(mut self, env: &'static str) -> Self {
        self.env = env;
        self
    }
    const fn short(mut self, short: &'static str) -> Self {
        self.short = short;
        self
    }
}

use Kind::{Bool, List, Value};
use Scope::{Both, Server};

/// k3s's flags (1.21 to 1.3x) and, at the end, three hidden ones for tests on one host.
pub(crate) const FLAGS: &[Flag] = &[
    flag("config", Value, Both).short("c").env("K3S_CONFIG_FILE"),
    flag("data-dir", Value, Both).short("d").env("K3S_DATA_DIR"),
    flag("token", Value, Both).short("t").env("K3S_TOKEN"),
    flag("token-file", Value, Both).env("K3S_TOKEN_FILE"),
    flag("server", Value, Both).short("s").env("K3S_URL"),
    flag("node-name", Value, Both).env("K3S_NODE_NAME"),
    flag("node-ip", List, Both).short("i"),
    flag("node-external-ip", List, Both),
    flag("node-label", List, Both),
    flag("node-taint", List, Both),
    flag("flannel-iface", Value, Both),
    flag("cluster-init", Bool, Server).env("K3S_CLUSTER_INIT"),
    flag("bind-address", Value, Server),
    flag("https-listen-port", Value, Server),
    flag("advertise-address", Value, Server),
    flag("advertise-port", Value, Server),
    flag("tls-san", List, Server),
    flag("cluster-cidr", Value, Server),
    flag("service-cidr", Value, Server),
    flag("write-kubeconfig", Value, Server).short("o").env("K3S_KUBECONFIG_OUTPUT"),
    flag("write-kubeconfig-mode", Value, Server).env("K3S_KUBECONFIG_MODE"),
    // Components the stand-in never runs: leaving them out is what it does anyway.
    flag("disable", List, Server),
    flag("disable-network-policy", Bool, Server),
    flag("disable-cloud-controller", Bool, Server),
    flag("disable-kube-proxy", Bool, Server),
    flag("disable-helm-controller", Bool, Server),
    ignored("agent-token", Value, Server).env("K3S_AGENT_TOKEN"),
    ignored("cluster-dns", Value, Server),
    ignored("cluster-domain", Value, Server),
    ignored("debug", Bool, Both).env("K3S_DEBUG"),
    ignored("default-local-storage-path", Value, Server),
    ignored("docker", Bool, Both),
    ignored("egress-selector-mode", Value, Server),
    ignored("embedded-registry", Bool, Server),
    ignored("etcd-arg", List, Server),
    ignored("etcd-disable-snapshots", Bool, Server),
    ignored("etcd-expose-metrics", Value, Server),
    ignored("etcd-snapshot-dir", Value, Server),
    ignored("etcd-snapshot-retention", Value, Server),
    ignored("etcd-snapshot-schedule-cron", Value, Server),
    ignored("flannel-backend", Value, Server),
    ignored("flannel-conf", Value, Both),
    ignored("kube-apiserver-arg", List, Server),
    ignored("kube-cloud-controller-manager-arg", List, Server),
    ignored("kube-controller-manager-arg", List, Server),
    ignored("kube-proxy-arg", List, Both),
    ignored("kube-scheduler-arg", List, Server),
    ignored("kubelet-arg", List, Both),
    ignored("lb-server-port", Value, Both),
    ignored("log", Value, Both).short("l"),
    ignored("pause-image", Value, Both),
    ignored("prefer-bundled-bin", Bool, Both),
    ignored("private-registry", Value, Both),
    ignored("protect-kernel-defaults", Bool, Both),
    ignored("resolv-conf", Value, Both),
    ignored("rootless", Bool, Both),
    ignored("secrets-encryption", Bool, Server),
    ignored("selinux", Bool, Both),
    ignored("service-node-port-range", Value, Server),
    ignored("snapshotter", Value, Both),
    ignored("v", Value, Both),
    ignored("vmodule", Value, Both),
    ignored("with-node-id", Bool, Both),
    // Hidden: another /etc/rancher, another address than 127.0.0.1, hands off the host's
    // modules and sysctls. A guest never sets them.
    flag("standin-etc-dir", Value, Both),
    flag("standin-loopback", Value, Both),
    flag("standin-keep-host", Bool, Both),
];

/// A command line that does not fit.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum FlagError {
    #[error("flag provided but not defined: -{0}")]
    Undefined(String),
    #[error("flag needs an argument: -{0}")]
    NeedsArgument(String),
    #[error("invalid boolean value \"{value}\" for -{name}: parse error")]
    Bool { name: String, value: String },
    #[error("bad flag syntax: {0}")]
    Syntax(String),
    #[error("unexpected argument \"{0}\"")]
    Positional(String),
}

/// Flags as given: scalars keep the last value, lists all of them (comma lists split).
#[derive(Debug, Default)]
pub(crate) struct Values(BTreeMap<&'static str, Vec<String>>);

impl Values {
    pub(crate) fn last(&self, name: &str) -> Option<&str> {
        self.0.get(name).and_then(|v| v.last()).map(String::as_str)
    }
    pub(crate) fn list(&self, name: &str) -> Vec<String> {
        let given = self.0.get(name).map(Vec::as_slice).unwrap_or_default();
        given.iter().flat_map(|v| v.split(',')).map(str::trim).filter(|v| !v.is_empty()).map(str::to_owned).collect()
    }
    pub(crate) fn is_set(&self, name: &str) -> bool {
        self.last(name) == Some("true")
    }
    /// Flags that were given and have no effect here.
    pub(crate) fn without_effect(&self) -> Vec<&'static str> {
        FLAGS.iter().filter(|f| !f.effective && self.0.contains_key(f.name)).map(|f| f.name).collect()
    }
}

fn find(name: &str, server: bool) -> Option<&'static Flag> {
    FLAGS
        .iter()
        .find(|f| f.name == name || (!f.short.is_empty() && f.short == name))
        .filter(|f| server || f.scope == Both)
}

/// Parses `args`; the environment stands in for scalars that were not given.
pub(crate) fn parse(args: &[String], server: bool, env: impl Fn(&str) -> Option<String>) -> Result<Values, FlagError> {
    let mut values = Values::default();
    let mut rest = args.iter();
    while let Some(arg) = rest.next() {
        let Some(body) = arg.strip_prefix("--").or_else(|| arg.strip_prefix('-')) else {
            return Err(FlagError::Positional(arg.clone()));
        };
        let (name, inline) = match body.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (body, None),
        };
        if name.is_empty() || name.starts_with('-') {
            return Err(FlagError::Syntax(arg.clone()));
        }
        let flag = find(name, server).ok_or_else(|| FlagError::Undefined(name.to_owned()))?;
        let value = match (flag.kind, inline) {
            (Bool, inline) => {
                let value = inline.unwrap_or_else(|| "true".to_owned());
                match value.as_str() {
                    "true" | "1" | "t" | "T" | "TRUE" | "True" => "true".to_owned(),
                    "false" | "0" | "f" | "F" | "FALSE" | "False" => "false".to_owned(),
                    _ => return Err(FlagError::Bool { name: name.to_owned(), value }),
                }
            }
            (Value | List, Some(value)) => value,
            (Value | List, None) => rest.next().ok_or_else(|| FlagError::NeedsArgument(name.to_owned()))?.clone(),
        };
        values.0.entry(flag.name).or_default().push(value);
    }
    for flag in FLAGS.iter().filter(|f| !f.env.is_empty() && (server || f.scope == Both)) {
        if let Some(value) = env(flag.env).filter(|v| !v.is_empty()) {
            values.0.entry(flag.name).or_insert_with(|| vec![value]);
        }
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(words: &str) -> Vec<String> {
        words.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn values_lists_and_booleans() {
        let v = parse(
            &args("--cluster-init --tls-san a,b --tls-san=c --node-ip 10.0.0.1 --node-name x --node-name y"),
            true,
            |_| None,
        )
        .unwrap();
        assert!(v.is_set("cluster-init"));
        assert_eq!(v.list("tls-san"), ["a", "b", "c"]);
        assert_eq!(v.last("node-name"), Some("y"));
    }

    #[test]
    fn unknown_flags_are_refused_in_k3s_words() {
        let error = parse(&args("--no-deploy traefik"), true, |_| None).unwrap_err();
        assert_eq!(error.to_string(), "flag provided but not defined: -no-deploy");
        let error = parse(&["--disable traefik".to_owned()], true, |_| None).unwrap_err();
        assert_eq!(error.to_string(), "flag provided but not defined: -disable traefik");
        let error = parse(&args("--cluster-init"), false, |_| None).unwrap_err();
        assert_eq!(error.to_string(), "flag provided but not defined: -cluster-init");
        let error = parse(&args("--token"), true, |_| None).unwrap_err();
        assert_eq!(error.to_string(), "flag needs an argument: -token");
    }

    #[test]
    fn the_environment_gives_way_to_the_command_line() {
        let env = |name: &str| (name == "K3S_TOKEN").then(|| "from-env".to_owned());
        assert_eq!(parse(&[], true, env).unwrap().last("token"), Some("from-env"));
        assert_eq!(parse(&args("-t x"), true, env).unwrap().last("token"), Some("x"));
    }

    #[test]
    fn flags_without_effect_are_named() {
        let v = parse(&args("--kubelet-arg a=b --disable traefik"), true, |_| None).unwrap();
        assert_eq!(v.without_effect(), ["kubelet-arg"]);
    }
}
