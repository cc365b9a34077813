//! Proxy variables, as curl(1) reads them ("ENVIRONMENT"): lowercase wins, `HTTP_PROXY` is not read because a CGI
//! client could set it.

use reqwest::{NoProxy, Proxy, Url};

use super::DownloadError;

/// What the proxy variables say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ProxyVars {
    /// `http_proxy`: for http URLs.
    pub http: Option<String>,
    /// `https_proxy` or `HTTPS_PROXY`: for https URLs.
    pub https: Option<String>,
    /// `all_proxy` or `ALL_PROXY`: where the scheme's own variable is not set.
    pub all: Option<String>,
    /// `no_proxy` or `NO_PROXY`: names, addresses and networks that are asked directly.
    pub none: Option<String>,
}

impl ProxyVars {
    /// Reads this process's environment.
    #[must_use]
    pub fn from_env() -> Self {
        Self::read(|name| std::env::var(name).ok())
    }

    fn read(get: impl Fn(&str) -> Option<String>) -> Self {
        let first = |names: &[&str]| names.iter().find_map(|name| get(name)).filter(|value| !value.trim().is_empty());
        Self {
            http: first(&["http_proxy"]),
            https: first(&["https_proxy", "HTTPS_PROXY"]),
            all: first(&["all_proxy", "ALL_PROXY"]),
            none: first(&["no_proxy", "NO_PROXY"]),
        }
    }

    /// The proxies a client is given.
    pub(super) fn proxies(&self) -> Result<Vec<Proxy>, DownloadError> {
        let mut proxies = Vec::with_capacity(2);
        for (scheme, own, variable) in [("http", &self.http, "http_proxy"), ("https", &self.https, "https_proxy")] {
            let (text, variable) = match (own, &self.all) {
                (Some(text), _) => (text, variable),
                (None, Some(text)) => (text, "all_proxy"),
                (None, None) => continue,
            };
            let url = parse(text, variable)?;
            let proxy = if scheme == "http" { Proxy::http(url) } else { Proxy::https(url) };
            let proxy =
                proxy.map_err(|error| DownloadError::Proxy { variable, reason: error.without_url().to_string() })?;
            proxies.push(proxy.no_proxy(self.none.as_deref().and_then(NoProxy::from_string)));
        }
        Ok(proxies)
    }

    /// The proxy a URL of this scheme goes through unless `no_proxy` excepts it, as messages show it.
    pub(super) fn shown(&self, scheme: &str) -> Option<String> {
        let own = if scheme == "http" { &self.http } else { &self.https };
        let url = parse(own.as_ref().or(self.all.as_ref())?, "").ok()?;
        Some(format!("{}:{}", url.host_str()?, url.port_or_known_default()?))
    }
}

/// A proxy's URL; without a scheme it is one for http, as `host:port` is commonly written.
fn parse(text: &str, variable: &'static str) -> Result<Url, DownloadError> {
    let fail = |reason: String| DownloadError::Proxy { variable, reason };
    let text = text.trim();
    let full = if text.contains("://") { text.to_owned() } else { format!("http://{text}") };
    // The text may hold a password and is not repeated.
    let url = Url::parse(&full).map_err(|error| fail(error.to_string()))?;
    match url.scheme() {
        "http" | "https" if url.has_host() => Ok(url),
        scheme => Err(fail(format!("proxies of kind {scheme} are not spoken to, only http and https ones"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vars(pairs: &[(&str, &str)]) -> ProxyVars {
        ProxyVars::read(|name| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned()))
    }

    #[test]
    fn lowercase_wins_and_http_proxy_is_not_read_in_capitals() {
        let read = vars(&[("https_proxy", "a:1"), ("HTTPS_PROXY", "b:2"), ("HTTP_PROXY", "c:3"), ("NO_PROXY", "x")]);
        assert_eq!(read, ProxyVars { https: Some("a:1".into()), none: Some("x".into()), ..ProxyVars::default() });
        assert_eq!(vars(&[("http_proxy", " ")]), ProxyVars::default());
    }

    #[test]
    fn passwords_are_not_shown_and_other_kinds_are_refused() {
        let read = vars(&[("all_proxy", "http://me:secret@proxy.example:3128")]);
        assert_eq!(read.shown("https").as_deref(), Some("proxy.example:3128"));
        assert_eq!(read.proxies().unwrap().len(), 2);
        let error = vars(&[("all_proxy", "socks5://me:secret@p:1")]).proxies().unwrap_err().to_string();
        assert_eq!(
            error,
            "all_proxy names no usable proxy: proxies of kind socks5 are not spoken to, only http and https ones"
        );
    }
}
