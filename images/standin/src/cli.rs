//! The command line: `k3s server|agent|kubectl|--version`, made into plain settings.

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use crate::flags::{self, FlagError, Values};
use crate::host;
use crate::layout::Layout;
use crate::{VERSION, config};

/// What was asked for.
#[derive(Debug)]
pub(crate) enum Command {
    Server(Box<Settings>),
    Agent(Box<Settings>),
    Kubectl(Vec<String>),
    Version,
    Help,
}

/// A command line or configuration that cannot be used; exit status 1 as with k3s.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CliError {
    #[error(transparent)]
    Flag(#[from] FlagError),
    #[error("No help topic for '{0}'")]
    UnknownCommand(String),
    #[error(transparent)]
    Config(#[from] config::ConfigError),
    #[error("open {path}: {source}")]
    Open { path: String, source: std::io::Error },
    #[error("invalid value \"{value}\" for --{flag}")]
    Value { flag: &'static str, value: String },
    #[error("no address for this node: set --node-ip")]
    NoAddress,
    #[error("no name for this node: set --node-name")]
    NoName,
}

/// Everything `server` and `agent` need to know.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) layout: Layout,
    pub(crate) token: Option<String>,
    pub(crate) server_url: Option<String>,
    pub(crate) cluster_init: bool,
    pub(crate) node_name: String,
    pub(crate) node_ip: IpAddr,
    pub(crate) advertise: IpAddr,
    pub(crate) bind: Option<IpAddr>,
    pub(crate) https_port: u16,
    pub(crate) flannel_iface: Option<String>,
    pub(crate) tls_sans: Vec<String>,
    pub(crate) node_labels: Vec<(String, String)>,
    pub(crate) node_taints: Vec<String>,
    pub(crate) cluster_cidr: String,
    pub(crate) service_cidr: String,
    pub(crate) kubeconfig: PathBuf,
    pub(crate) kubeconfig_mode: u32,
    /// 127.0.0.1, but for tests on one host.
    pub(crate) loopback: IpAddr,
    pub(crate) keep_host: bool,
    pub(crate) args: Vec<String>,
    pub(crate) without_effect: Vec<&'static str>,
}

/// The text of `k3s --help`.
pub(crate) fn help() -> String {
    format!(
        "NAME:\n   k3s - stand-in for k3s during cluster formation ({VERSION})\n\nUSAGE:\n   k3s [global options] command [command options]\n\n\
         COMMANDS:\n   server   Run management server\n   agent    Run node agent\n   kubectl  get nodes [NAME] [-o wide|json|name], get --raw PATH\n\n\
         GLOBAL OPTIONS:\n   --help, -h     show help\n   --version, -v  print the version\n"
    )
}

/// Reads the command line (without the program's name).
pub(crate) fn parse(args: &[String]) -> Result<Command, CliError> {
    let Some((command, rest)) = args.split_first() else {
        return Ok(Command::Help);
    };
    match command.as_str() {
        "--version" | "-v" => Ok(Command::Version),
        "help" | "--help" | "-h" => Ok(Command::Help),
        "server" | "agent" if rest.iter().any(|a| a == "--help" || a == "-h") => Ok(Command::Help),
        "server" => Ok(Command::Server(Box::new(settings(rest, true)?))),
        "agent" => Ok(Command::Agent(Box::new(settings(rest, false)?))),
        "kubectl" => Ok(Command::Kubectl(rest.to_vec())),
        other => match other.strip_prefix('-') {
            Some(flag) => Err(FlagError::Undefined(flag.trim_start_matches('-').to_owned()).into()),
            None => Err(CliError::UnknownCommand(other.to_owned())),
        },
    }
}

fn settings(args: &[String], server: bool) -> Result<Settings, CliError> {
    let env = |name: &str| std::env::var(name).ok();
    let mut values = flags::parse(args, server, env)?;
    let etc = PathBuf::from(values.last("standin-etc-dir").unwrap_or("/etc/rancher"));
    let default_config = etc.join("k3s/config.yaml");
    let config_path = values.last("config").map_or(default_config, PathBuf::from);
    match fs::read_to_string(&config_path) {
        Ok(text) => {
            let mut all = config::to_args(&text)?;
            all.extend_from_slice(args);
            values = flags::parse(&all, server, env)?;
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && values.last("config").is_none() => {}
        Err(source) => return Err(CliError::Open { path: config_path.display().to_string(), source }),
    }
    build(&values, args, etc, server)
}

fn number<T: std::str::FromStr>(values: &Values, flag: &'static str) -> Result<Option<T>, CliError> {
    values.last(flag).map(|v| v.parse().map_err(|_| CliError::Value { flag, value: v.to_owned() })).transpose()
}

fn build(values: &Values, args: &[String], etc: PathBuf, server: bool) -> Result<Settings, CliError> {
    let data = PathBuf::from(values.last("data-dir").unwrap_or("/var/lib/rancher/k3s"));
    let layout = Layout { data, etc };
    let token = match (values.last("token"), values.last("token-file")) {
        (Some(token), _) => Some(token.to_owned()),
        (None, Some(path)) => Some(
            fs::read_to_string(path)
                .map_err(|source| CliError::Open { path: path.to_owned(), source })?
                .trim()
                .to_owned(),
        ),
        (None, None) => None,
    };
    let node_ip = match values.list("node-ip").first() {
        Some(text) => text.parse().map_err(|_| CliError::Value { flag: "node-ip", value: text.clone() })?,
        None => host::default_address().ok_or(CliError::NoAddress)?,
    };
    let bind: Option<IpAddr> = number(values, "bind-address")?;
    let mode = values.last("write-kubeconfig-mode").unwrap_or("600");
    let kubeconfig_mode = u32::from_str_radix(mode, 8)
        .map_err(|_| CliError::Value { flag: "write-kubeconfig-mode", value: mode.to_owned() })?;
    let mut node_labels = Vec::new();
    for label in values.list("node-label") {
        let (key, value) =
            label.split_once('=').ok_or_else(|| CliError::Value { flag: "node-label", value: label.clone() })?;
        node_labels.push((key.to_owned(), value.to_owned()));
    }
    let kubeconfig = values.last("write-kubeconfig").map_or_else(|| layout.kubeconfig(), PathBuf::from);
    Ok(Settings {
        token,
        server_url: values.last("server").map(str::to_owned),
        cluster_init: values.is_set("cluster-init"),
        node_name: values
            .last("node-name")
            .map(str::to_owned)
            .or_else(host::hostname)
            .filter(|n| !n.is_empty())
            .ok_or(CliError::NoName)?
            .to_lowercase(),
        node_ip,
        advertise: number(values, "advertise-address")?.unwrap_or(node_ip),
        bind: bind.filter(|b| !b.is_unspecified()),
        https_port: number(values, "https-listen-port")?.unwrap_or(6443),
        flannel_iface: values.last("flannel-iface").map(str::to_owned),
        tls_sans: values.list("tls-san"),
        node_labels,
        node_taints: values.list("node-taint"),
        cluster_cidr: values.last("cluster-cidr").unwrap_or("10.42.0.0/16").to_owned(),
        service_cidr: values.last("service-cidr").unwrap_or("10.43.0.0/16").to_owned(),
        kubeconfig,
        kubeconfig_mode,
        loopback: number(values, "standin-loopback")?.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST)),
        keep_host: values.is_set("standin-keep-host"),
        args: std::iter::once(if server { "server" } else { "agent" }.to_owned()).chain(redact(args)).collect(),
        without_effect: values.without_effect(),
        layout,
    })
}

/// The arguments as k3s writes them on the node, without the token.
fn redact(args: &[String]) -> Vec<String> {
    let mut out = Vec::with_capacity(args.len());
    let mut hide = false;
    for arg in args {
        let name = arg.trim_start_matches('-').split('=').next().unwrap_or_default();
        let secret = arg.starts_with('-') && matches!(name, "token" | "t" | "agent-token");
        out.push(match (hide, secret, arg.contains('=')) {
            (true, ..) => "********".to_owned(),
            (false, true, true) => format!("--{name}=********"),
            _ => arg.clone(),
        });
        hide = secret && !arg.contains('=');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_token_is_not_shown_on_the_node() {
        let args: Vec<String> = ["--token", "secret", "--token=secret", "--node-name", "n"].map(str::to_owned).to_vec();
        assert_eq!(redact(&args), ["--token", "********", "--token=********", "--node-name", "n"]);
    }

    #[test]
    fn unknown_commands_and_flags_are_refused() {
        let parse = |words: &[&str]| parse(&words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>());
        assert_eq!(parse(&["--bogus"]).unwrap_err().to_string(), "flag provided but not defined: -bogus");
        assert_eq!(parse(&["ctr"]).unwrap_err().to_string(), "No help topic for 'ctr'");
        assert!(matches!(parse(&["--version"]), Ok(Command::Version)));
    }

    #[test]
    fn a_config_file_comes_before_the_command_line() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.yaml");
        fs::write(&file, "node-name: from-file\ntls-san:\n- a\nhttps-listen-port: 7443\n").unwrap();
        let args =
            ["--config", file.to_str().unwrap(), "--node-ip", "10.0.0.1", "--node-name", "cli", "--tls-san", "b"]
                .map(str::to_owned);
        let s = settings(&args, true).unwrap();
        assert_eq!((s.node_name.as_str(), s.https_port), ("cli", 7443));
        assert_eq!(s.tls_sans, ["a", "b"]);
        assert_eq!(s.advertise, s.node_ip);
    }
}
