//! `k3s kubectl`, for people at a guest's console: `get nodes [NAME] [-o wide|json|name]`,
//! `get --raw PATH`.

use std::path::PathBuf;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;

use crate::net::{Client, Endpoint, NetError};
use crate::nodes;
use crate::tls;

const TIMEOUT: Duration = Duration::from_secs(30);

/// Why kubectl cannot answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KubectlError {
    #[error("error: the stand-in's kubectl knows only: get nodes [NAME] [-o wide|json|name], get --raw PATH")]
    Usage,
    #[error("error: error loading config file \"{path}\": {detail}")]
    Config { path: String, detail: String },
    #[error("Unable to connect to the server: {0}")]
    Net(#[from] NetError),
    #[error("Error from server ({reason}): {message}")]
    Server { reason: String, message: String },
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Request {
    kubeconfig: Option<String>,
    raw: Option<String>,
    node: Option<String>,
    output: String,
}

fn parse(args: &[String]) -> Option<Request> {
    let mut request = Request::default();
    let mut words = Vec::new();
    let mut rest = args.iter();
    while let Some(arg) = rest.next() {
        let (name, inline) = match arg.split_once('=') {
            Some((name, value)) if arg.starts_with('-') => (name, Some(value.to_owned())),
            _ => (arg.as_str(), None),
        };
        let mut value = || inline.clone().or_else(|| rest.next().cloned());
        match name {
            "--kubeconfig" => request.kubeconfig = Some(value()?),
            "--raw" => request.raw = Some(value()?),
            "-o" | "--output" => request.output = value()?,
            "-A" | "--all-namespaces" => {}
            _ if name.starts_with('-') => return None,
            _ => words.push(arg.as_str()),
        }
    }
    if !matches!(request.output.as_str(), "" | "wide" | "json" | "name") {
        return None;
    }
    match (words.as_slice(), &request.raw) {
        (["get"], Some(path)) if path.starts_with('/') => {}
        (["get", "nodes" | "node" | "no"], None) => {}
        (["get", "nodes" | "node" | "no", name], None) => request.node = Some((*name).to_owned()),
        _ => return None,
    }
    Some(request)
}

fn client(path: PathBuf) -> Result<Client, KubectlError> {
    let error = |detail: String| KubectlError::Config { path: path.display().to_string(), detail };
    let text = std::fs::read_to_string(&path).map_err(|e| error(e.to_string()))?;
    let field = |name: &str| {
        text.lines()
            .find_map(|l| l.trim().strip_prefix(name).and_then(|v| v.strip_prefix(": ")))
            .ok_or_else(|| error(format!("no {name} in it")))
    };
    let decoded = |name: &str| STANDARD.decode(field(name)?).map_err(|e| error(format!("{name}: {e}")));
    let identity = tls::identity_pem(&decoded("client-certificate-data")?, &decoded("client-key-data")?)
        .map_err(|e| error(e.to_string()))?;
    let config =
        tls::client(&decoded("certificate-authority-data")?, Some(identity)).map_err(|e| error(e.to_string()))?;
    Ok(Client::new(Endpoint::parse(field("server")?, 6443)?, config))
}

async fn fetch(client: &Client, path: &str) -> Result<Vec<u8>, KubectlError> {
    let answer = client.get(path, TIMEOUT).await?;
    if answer.status.is_success() {
        return Ok(answer.body.to_vec());
    }
    let status: Option<Value> = serde_json::from_slice(&answer.body).ok();
    let part = |name: &str| status.as_ref().and_then(|s| s[name].as_str()).map(str::to_owned);
    Err(KubectlError::Server {
        reason: part("reason").unwrap_or_else(|| "InternalError".to_owned()),
        message: part("message").unwrap_or_else(|| {
            let text = String::from_utf8_lossy(&answer.body);
            format!("an error on the server ({text:?}) has prevented the request from succeeding")
        }),
    })
}

/// Runs one command and returns what it prints.
pub(crate) async fn run(args: &[String]) -> Result<String, KubectlError> {
    let request = parse(args).ok_or(KubectlError::Usage)?;
    let kubeconfig = request.kubeconfig.clone().or_else(|| std::env::var("KUBECONFIG").ok());
    let client = client(PathBuf::from(kubeconfig.unwrap_or_else(|| "/etc/rancher/k3s/k3s.yaml".to_owned())))?;
    if let Some(path) = &request.raw {
        return Ok(String::from_utf8_lossy(&fetch(&client, path).await?).into_owned());
    }
    let path = request.node.as_ref().map_or_else(|| "/api/v1/nodes".to_owned(), |n| format!("/api/v1/nodes/{n}"));
    let body = fetch(&client, &path).await?;
    let value: Value = serde_json::from_slice(&body)
        .map_err(|e| KubectlError::Server { reason: "InternalError".to_owned(), message: e.to_string() })?;
    let items = value["items"].as_array().cloned().unwrap_or_else(|| vec![value.clone()]);
    Ok(match request.output.as_str() {
        "json" => format!("{value:#}\n"),
        "name" => items.iter().map(|n| format!("node/{}\n", nodes::name(n))).collect(),
        output => table(&items, output == "wide", jiff::Timestamp::now()),
    })
}

fn age(created: &str, now: jiff::Timestamp) -> String {
    let Ok(created) = created.parse::<jiff::Timestamp>() else { return "<unknown>".to_owned() };
    let s = (now.as_second() - created.as_second()).max(0);
    match s {
        0..120 => format!("{s}s"),
        120..600 if s % 60 != 0 => format!("{}m{}s", s / 60, s % 60),
        120..10_800 => format!("{}m", s / 60),
        10_800..172_800 => format!("{}h", s / 3600),
        _ => format!("{}d", s / 86_400),
    }
}

fn table(items: &[Value], wide: bool, now: jiff::Timestamp) -> String {
    let mut rows =
        vec![vec!["NAME", "STATUS", "ROLES", "AGE", "VERSION"].into_iter().map(str::to_owned).collect::<Vec<_>>()];
    if wide {
        rows[0].extend(
            ["INTERNAL-IP", "EXTERNAL-IP", "OS-IMAGE", "KERNEL-VERSION", "CONTAINER-RUNTIME"].map(str::to_owned),
        );
    }
    for node in items {
        let text = |v: &Value| v.as_str().filter(|t| !t.is_empty()).unwrap_or("<none>").to_owned();
        let ready = nodes::condition(node, "Ready").is_some_and(|c| c["status"] == "True");
        let labels = node["metadata"]["labels"].as_object();
        let mut roles: Vec<&str> =
            labels.into_iter().flatten().filter_map(|(k, _)| k.strip_prefix("node-role.kubernetes.io/")).collect();
        roles.sort_unstable();
        let mut row = vec![
            nodes::name(node).to_owned(),
            if ready { "Ready" } else { "NotReady" }.to_owned(),
            if roles.is_empty() { "<none>".to_owned() } else { roles.join(",") },
            age(node["metadata"]["creationTimestamp"].as_str().unwrap_or_default(), now),
            text(&node["status"]["nodeInfo"]["kubeletVersion"]),
        ];
        if wide {
            let info = &node["status"]["nodeInfo"];
            let addresses = node["status"]["addresses"].as_array();
            let address = |kind: &str| {
                addresses
                    .into_iter()
                    .flatten()
                    .find(|a| a["type"] == kind)
                    .map_or("<none>".to_owned(), |a| text(&a["address"]))
            };
            row.extend([
                address("InternalIP"),
                address("ExternalIP"),
                text(&info["osImage"]),
                text(&info["kernelVersion"]),
                text(&info["containerRuntimeVersion"]),
            ]);
        }
        rows.push(row);
    }
    let widths: Vec<usize> =
        (0..rows[0].len()).map(|c| rows.iter().map(|r| r[c].chars().count()).max().unwrap_or_default()).collect();
    rows.iter()
        .map(|row| {
            let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, w)| format!("{cell:w$}")).collect();
            format!("{}\n", cells.join("   ").trim_end())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_table_is_kubectls() {
        let node = json!({
            "metadata": {"name": "server-1", "creationTimestamp": "2026-11-21T02:32:29Z",
                "labels": {"node-role.kubernetes.io/master": "true", "node-role.kubernetes.io/etcd": "true"}},
            "status": {"conditions": [{"type": "Ready", "status": "True"}], "nodeInfo": {"kubeletVersion": "v0"}},
        });
        let now = "2026-11-21T02:35:24Z".parse().unwrap();
        assert_eq!(
            table(&[node], false, now),
            "NAME       STATUS   ROLES         AGE     VERSION\nserver-1   Ready    etcd,master   2m55s   v0\n"
        );
    }

    #[test]
    fn commands_it_knows() {
        let parse = |line: &str| parse(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>());
        assert_eq!(parse("get nodes -o wide").unwrap().output, "wide");
        assert_eq!(parse("get --raw /readyz?verbose").unwrap().raw.as_deref(), Some("/readyz?verbose"));
        assert_eq!(parse("get --raw=/version").unwrap().raw.as_deref(), Some("/version"));
        assert_eq!(parse("get node n1").unwrap().node.as_deref(), Some("n1"));
        for line in ["get pods", "apply -f x", "get nodes -o yaml", "get", ""] {
            assert_eq!(parse(line), None, "{line}");
        }
    }
}
