//! `/healthz`, `/livez`, `/readyz`: the checks an API server lists, of which etcd's is the one that
//! can fail here and is really made (a linearizable read).

use std::time::Duration;

use hyper::Response;

use crate::api::selector::Query;
use crate::api::{App, Body, respond};
use crate::logfmt;

/// The API server's own limit for its etcd check.
const ETCD_TIMEOUT: Duration = Duration::from_secs(2);

const HOOKS: &[&str] = &[
    "start-kube-apiserver-admission-initializer",
    "generic-apiserver-start-informers",
    "priority-and-fairness-config-consumer",
    "priority-and-fairness-filter",
    "start-apiextensions-informers",
    "start-apiextensions-controllers",
    "crd-informer-synced",
    "bootstrap-controller",
    "rbac/bootstrap-roles",
    "scheduling/bootstrap-system-priority-classes",
    "priority-and-fairness-config-producer",
    "start-cluster-authentication-info-controller",
    "aggregator-reload-proxy-client-cert",
    "start-kube-aggregator-informers",
    "apiservice-registration-controller",
    "apiservice-status-available-controller",
    "kube-apiserver-autoregistration",
];

/// Which of the three.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Healthz,
    Livez,
    Readyz,
}

impl Kind {
    pub(super) fn of(path: &str) -> Option<Self> {
        let is = |base: &str| path.strip_prefix(base).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        [("/healthz", Self::Healthz), ("/livez", Self::Livez), ("/readyz", Self::Readyz)]
            .into_iter()
            .find(|(base, _)| is(base))
            .map(|(_, kind)| kind)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Healthz => "healthz",
            Self::Livez => "livez",
            Self::Readyz => "readyz",
        }
    }

    fn checks(self) -> Vec<String> {
        let mut checks = vec!["ping".to_owned(), "log".to_owned(), "etcd".to_owned()];
        if self == Self::Readyz {
            checks.push("informer-sync".to_owned());
        }
        checks.extend(HOOKS.iter().map(|h| format!("poststarthook/{h}")));
        checks.extend(["autoregister-completion".to_owned(), "poststarthook/apiservice-openapi-controller".to_owned()]);
        if self == Self::Readyz {
            checks.push("shutdown".to_owned());
        }
        checks
    }
}

async fn etcd_ok(app: &App) -> bool {
    match app.etcd.get("/registry/health", ETCD_TIMEOUT).await {
        Ok(_) => true,
        Err(error) => {
            logfmt::klog('I', "healthz.go:261", &format!("etcd check failed: {error}"));
            false
        }
    }
}

pub(super) async fn route(app: &App, kind: Kind, path: &str, query: &Query) -> Response<Body> {
    let checks = kind.checks();
    let one = path.trim_start_matches('/').split_once('/').map(|(_, check)| check);
    if let Some(check) = one {
        return match (checks.iter().any(|c| c == check), check == "etcd") {
            (false, _) => respond::text(404, "404 page not found\n"),
            (true, true) if !etcd_ok(app).await => {
                respond::text(500, "internal server error: etcd failed: reason withheld\n")
            }
            _ => respond::text(200, "ok"),
        };
    }
    let excluded: Vec<&str> = query.all("exclude").collect();
    let checks: Vec<&String> = checks.iter().filter(|c| !excluded.contains(&c.as_str())).collect();
    let etcd = !checks.iter().any(|c| *c == "etcd") || etcd_ok(app).await;
    if etcd && !query.is_true("verbose") {
        return respond::text(200, "ok");
    }
    let mut text = String::new();
    for check in checks {
        if check == "etcd" && !etcd {
            text.push_str("[-]etcd failed: reason withheld\n");
        } else {
            text.push_str(&format!("[+]{check} ok\n"));
        }
    }
    let verdict = if etcd { "passed" } else { "failed" };
    text.push_str(&format!("{} check {verdict}\n", kind.name()));
    respond::text(if etcd { 200 } else { 500 }, &text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_that_of_a_real_server() {
        let checks = Kind::Readyz.checks();
        assert_eq!(checks.len(), 24);
        assert_eq!(&checks[..4], ["ping", "log", "etcd", "informer-sync"]);
        assert_eq!(checks.last().map(String::as_str), Some("shutdown"));
    }

    #[test]
    fn paths_are_told_apart() {
        assert_eq!(Kind::of("/readyz"), Some(Kind::Readyz));
        assert_eq!(Kind::of("/healthz/etcd"), Some(Kind::Healthz));
        assert_eq!(Kind::of("/healthzz"), None);
    }
}
