//! The authorities and certificates of a server under the names k3s gives them, and the
//! credentials made of them (kubeconfigs, passwd, node password).

use std::net::IpAddr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;

use crate::cli::Settings;
use crate::host;
use crate::layout::{self, FileError, Layout};
use crate::pki::{Ca, Leaf, PkiError, load_or_create_key};
use crate::token::{TokenError, random_hex};

/// What goes wrong while credentials are made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CertsError {
    #[error(transparent)]
    Pki(#[from] PkiError),
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Token(#[from] TokenError),
}

/// The authorities a running server signs with.
pub(crate) struct Authorities {
    pub(crate) server: Ca,
    pub(crate) client: Ca,
}

const MASTERS: Option<&str> = Some("system:masters");

/// Client certificates: file, common name, organisation, kubeconfig.
const CLIENTS: &[(&str, &str, Option<&str>, &str)] = &[
    ("client-admin", "system:admin", MASTERS, "admin.kubeconfig"),
    ("client-controller", "system:kube-controller-manager", None, "controller.kubeconfig"),
    ("client-scheduler", "system:kube-scheduler", None, "scheduler.kubeconfig"),
    ("client-kube-apiserver", "kube-apiserver", None, "api-server.kubeconfig"),
    ("client-kube-proxy", "system:kube-proxy", None, ""),
    ("client-k3s-controller", "system:k3s-controller", None, ""),
    ("client-k3s-cloud-controller", "k3s-cloud-controller-manager", None, "cloud-controller.kubeconfig"),
];

/// Makes what is missing. `void` says that the authorities were replaced, so that every leaf is
/// issued anew.
pub(crate) fn ensure(settings: &Settings, void: bool) -> Result<Authorities, CertsError> {
    let layout = &settings.layout;
    let load = |name: &str, prefix: &str| -> Result<Ca, PkiError> {
        let mut ca =
            Ca::load_or_create(&layout.tls(&format!("{name}.crt")), &layout.tls(&format!("{name}.key")), prefix)?;
        ca.fresh |= void;
        Ok(ca)
    };
    let pair = |name: &str| (layout.tls(&format!("{name}.crt")), layout.tls(&format!("{name}.key")));

    let client = load("client-ca", "k3s-client-ca")?;
    for (file, cn, org, kubeconfig) in CLIENTS {
        let (crt, key) = pair(file);
        client.ensure(&crt, &key, &Leaf { cn, org: *org, sans: &[], server: false, client: true })?;
        if !kubeconfig.is_empty() {
            let text = file_kubeconfig(layout, settings, file);
            layout::write(&layout.cred(kubeconfig), 0o644, text.as_bytes())?;
        }
    }
    let server = load("server-ca", "k3s-server-ca")?;
    let request_header = load("request-header-ca", "k3s-request-header-ca")?;
    let (crt, key) = pair("client-auth-proxy");
    let proxy = Leaf { cn: "system:auth-proxy", org: None, sans: &[], server: false, client: true };
    request_header.ensure(&crt, &key, &proxy)?;

    let etcd_server = load("etcd/server-ca", "etcd-server-ca")?;
    let etcd_peer = load("etcd/peer-ca", "etcd-peer-ca")?;
    let ips: Vec<String> = unique([settings.loopback, settings.node_ip, settings.advertise]);
    let mut sans = vec!["localhost".to_owned(), settings.node_name.clone()];
    sans.retain(|s| is_dns_name(s));
    sans.extend(ips);
    // etcd's JSON gateway calls etcd itself with the serving certificate: both usages.
    let (crt, key) = pair("etcd/server-client");
    etcd_server.ensure(&crt, &key, &Leaf { cn: "etcd-server", org: None, sans: &sans, server: true, client: true })?;
    let (crt, key) = pair("etcd/client");
    etcd_server.ensure(&crt, &key, &Leaf { cn: "etcd-client", org: None, sans: &[], server: false, client: true })?;
    let (crt, key) = pair("etcd/peer-server-client");
    etcd_peer.ensure(&crt, &key, &Leaf { cn: "etcd-peer", org: None, sans: &sans, server: true, client: true })?;

    for key in ["service.key", "client-kubelet.key", "serving-kubelet.key"] {
        load_or_create_key(&layout.tls(key))?;
    }
    Ok(Authorities { server, client })
}

/// The certificate the API is served with: issued at every start, for the addresses of today.
pub(crate) fn serving(settings: &Settings, authorities: &Authorities) -> Result<(), CertsError> {
    let layout = &settings.layout;
    let mut sans: Vec<String> = [
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "kubernetes.default.svc.cluster.local",
        "localhost",
        &settings.node_name,
    ]
    .iter()
    .filter(|s| is_dns_name(s))
    .map(|s| (*s).to_owned())
    .collect();
    sans.extend(settings.tls_sans.iter().filter(|s| s.parse::<IpAddr>().is_ok() || is_dns_name(s)).cloned());
    let mut addresses = vec![IpAddr::from([127, 0, 0, 1]), settings.loopback, settings.node_ip, settings.advertise];
    addresses.extend(settings.bind);
    addresses.extend(service_address(&settings.service_cidr));
    addresses.extend(host::local_addresses());
    sans.extend(unique(addresses));
    let mut seen = std::collections::BTreeSet::new();
    sans.retain(|s| seen.insert(s.clone()));

    let (crt, key) = (layout.tls("serving-kube-apiserver.crt"), layout.tls("serving-kube-apiserver.key"));
    let leaf = Leaf { cn: "k3s", org: Some("k3s"), sans: &sans, server: true, client: false };
    authorities.server.issue(&crt, &key, &leaf)?;
    let secret = json!({
        "kind": "Secret", "apiVersion": "v1", "type": "kubernetes.io/tls",
        "metadata": {"name": "k3s-serving", "namespace": "kube-system"},
        "data": {
            "tls.crt": STANDARD.encode(layout::read(&crt)?),
            "tls.key": STANDARD.encode(layout::read(&key)?),
        },
    });
    layout::write(&layout.tls("dynamic-cert.json"), 0o600, secret.to_string().as_bytes())?;
    Ok(())
}

/// Certificates of a node's kubelet, signed for the key both k3s versions with one key per cluster
/// and the stand-in use. PEM of certificate and key.
pub(crate) fn kubelet_pair(
    layout: &Layout,
    ca: &Ca,
    serving: bool,
    node_name: &str,
    node_ips: &[String],
) -> Result<String, CertsError> {
    let file = if serving { "serving-kubelet.key" } else { "client-kubelet.key" };
    let key = load_or_create_key(&layout.tls(file))?;
    let cn = if serving { node_name.to_owned() } else { format!("system:node:{node_name}") };
    let mut sans = Vec::new();
    if serving {
        sans.extend([node_name, "localhost"].iter().filter(|s| is_dns_name(s)).map(|s| (*s).to_owned()));
        sans.push("127.0.0.1".to_owned());
        sans.extend(node_ips.iter().filter(|ip| ip.parse::<IpAddr>().is_ok()).cloned());
    }
    let org = (!serving).then_some("system:nodes");
    let leaf = Leaf { cn: &cn, org, sans: &sans, server: serving, client: !serving };
    Ok(ca.sign(&leaf, &key)? + &key.serialize_pem())
}

/// Takes what [`kubelet_pair`] returned apart: certificates and key.
pub(crate) fn split_pair(pem: &str) -> (&str, &str) {
    const END: &str = "-----END CERTIFICATE-----\n";
    pem.split_at(pem.rfind(END).map_or(0, |at| at + END.len()))
}

fn unique(addresses: impl IntoIterator<Item = IpAddr>) -> Vec<String> {
    let mut out: Vec<String> = Vec::new();
    for address in addresses {
        let text = address.to_string();
        if !out.contains(&text) {
            out.push(text);
        }
    }
    out
}

fn is_dns_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 253
        && name.parse::<IpAddr>().is_err()
        && name.split('.').all(|l| {
            (1..=63).contains(&l.len())
                && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
                && !l.starts_with('-')
                && !l.ends_with('-')
        })
}

/// The first address of the service network: that of the `kubernetes` service.
fn service_address(cidr: &str) -> Option<IpAddr> {
    let network: std::net::Ipv4Addr = cidr.split('/').next()?.parse().ok()?;
    Some(IpAddr::V4((u32::from(network) + 1).into()))
}

/// A kubeconfig that names its files, as those below `server/cred` do.
fn file_kubeconfig(layout: &Layout, settings: &Settings, client: &str) -> String {
    format!(
        "apiVersion: v1\nclusters:\n- cluster:\n    server: https://{host}:{port}\n    certificate-authority: {ca}\n  name: local\n\
         contexts:\n- context:\n    cluster: local\n    namespace: default\n    user: user\n  name: Default\n\
         current-context: Default\nkind: Config\npreferences: {{}}\nusers:\n- name: user\n  user:\n    client-certificate: {crt}\n    client-key: {key}\n",
        host = settings.bind.unwrap_or(settings.loopback),
        port = settings.https_port,
        ca = layout.tls("server-ca.crt").display(),
        crt = layout.tls(&format!("{client}.crt")).display(),
        key = layout.tls(&format!("{client}.key")).display(),
    )
}

/// `/etc/rancher/k3s/k3s.yaml`: the administrator's kubeconfig, everything embedded.
pub(crate) fn write_admin_kubeconfig(settings: &Settings) -> Result<(), CertsError> {
    let layout = &settings.layout;
    let embed = |file: &str| -> Result<String, FileError> { Ok(STANDARD.encode(layout::read(&layout.tls(file))?)) };
    let text = format!(
        "apiVersion: v1\nclusters:\n- cluster:\n    certificate-authority-data: {ca}\n    server: https://{host}:{port}\n  name: default\n\
         contexts:\n- context:\n    cluster: default\n    user: default\n  name: default\n\
         current-context: default\nkind: Config\npreferences: {{}}\nusers:\n- name: default\n  user:\n    client-certificate-data: {crt}\n    client-key-data: {key}\n",
        ca = embed("server-ca.crt")?,
        host = settings.bind.unwrap_or(settings.loopback),
        port = settings.https_port,
        crt = embed("client-admin.crt")?,
        key = embed("client-admin.key")?,
    );
    if let Some(parent) = settings.kubeconfig.parent() {
        layout::make_dir(parent, 0o755)?;
    }
    Ok(layout::write(&settings.kubeconfig, settings.kubeconfig_mode, text.as_bytes())?)
}

/// The password of servers in `cred/passwd`, if there is one.
pub(crate) fn stored_password(layout: &Layout) -> Result<Option<String>, CertsError> {
    let text = layout::read_if_there(&layout.cred("passwd"))?.unwrap_or_default();
    Ok(text.lines().find_map(|l| {
        let mut fields = l.split(',');
        let password = fields.next()?;
        (fields.next()? == "server" && !password.is_empty()).then(|| password.to_owned())
    }))
}

/// Writes `ipsec.psk` and, as long as no datastore was made under an earlier one, the password.
pub(crate) fn write_secrets(layout: &Layout, password: &str, initialised: bool) -> Result<(), CertsError> {
    let stored = stored_password(layout)?;
    if stored.is_none() || (!initialised && stored.as_deref() != Some(password)) {
        let text = format!("{password},node,node,k3s:agent\n{password},server,server,k3s:server\n");
        layout::write(&layout.cred("passwd"), 0o600, text.as_bytes())?;
    }
    let psk = layout.cred("ipsec.psk");
    if !psk.exists() {
        layout::write(&psk, 0o600, format!("{}\n", random_hex(48)?).as_bytes())?;
    }
    Ok(())
}

/// The password that binds this node's name to this node, made at the first start.
pub(crate) fn node_password(layout: &Layout) -> Result<String, CertsError> {
    let path = layout.node_password();
    if let Some(text) = layout::read_if_there(&path)?.filter(|t| !t.trim().is_empty()) {
        return Ok(text.trim().to_owned());
    }
    let password = random_hex(16)?;
    layout::write(&path, 0o600, format!("{password}\n").as_bytes())?;
    Ok(password)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kubernetes_service_is_the_first_address() {
        assert_eq!(service_address("10.43.0.0/16"), "10.43.0.1".parse().ok());
        assert_eq!(service_address("nonsense"), None);
    }

    #[test]
    fn names_that_cannot_stand_in_a_certificate_are_left_out() {
        assert!(is_dns_name("server-1") && is_dns_name("a.b"));
        assert!(!is_dns_name("under_score") && !is_dns_name("-x") && !is_dns_name("10.0.0.1") && !is_dns_name(""));
    }
}
