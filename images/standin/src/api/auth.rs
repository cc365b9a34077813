//! Who is asking: a client certificate of the client CA, or the token (as HTTP basic
//! `server:PASSWORD`, or as bearer).

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hyper::HeaderMap;
use hyper::header::AUTHORIZATION;

use crate::api::App;
use crate::der::Subject;
use crate::token::Token;

/// An identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Identity {
    Anonymous,
    /// Credentials were given and are wrong.
    Rejected,
    /// Who knows the token; `server` may fetch what servers share.
    Token {
        server: bool,
    },
    Certificate(Subject),
}

impl Identity {
    pub(crate) fn authenticated(&self) -> bool {
        matches!(self, Self::Token { .. } | Self::Certificate(_))
    }
}

pub(super) fn identify(app: &App, headers: &HeaderMap, subject: Option<Subject>) -> Identity {
    match headers.get(AUTHORIZATION) {
        Some(value) => value
            .to_str()
            .ok()
            .and_then(|v| check_header(v, &app.password))
            .map_or(Identity::Rejected, |server| Identity::Token { server }),
        None => subject.map_or(Identity::Anonymous, Identity::Certificate),
    }
}

/// Whether the header proves knowledge of the password, and as a server.
fn check_header(value: &str, password: &str) -> Option<bool> {
    let (user, given) = if let Some(basic) = value.strip_prefix("Basic ") {
        let text = String::from_utf8(STANDARD.decode(basic.trim()).ok()?).ok()?;
        let (user, given) = text.split_once(':')?;
        (user.to_owned(), given.to_owned())
    } else {
        let token = Token::parse(value.strip_prefix("Bearer ")?, "server").ok()?;
        (token.user, token.password)
    };
    let known = matches!(user.as_str(), "server" | "node") && same(&given, password);
    known.then(|| user == "server")
}

/// Compares without telling by time where the difference is.
fn same(a: &str, b: &str) -> bool {
    a.len() == b.len() && a.bytes().zip(b.bytes()).fold(0, |d, (x, y)| d | (x ^ y)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn basic_and_bearer_prove_the_token() {
        let basic = |text: &str| format!("Basic {}", STANDARD.encode(text));
        assert_eq!(check_header(&basic("server:pw"), "pw"), Some(true));
        assert_eq!(check_header(&basic("node:pw"), "pw"), Some(false));
        assert_eq!(check_header(&basic("root:pw"), "pw"), None);
        assert_eq!(check_header(&basic("server:px"), "pw"), None);
        assert_eq!(check_header("Bearer pw", "pw"), Some(true));
        assert_eq!(check_header("Digest x", "pw"), None);
    }
}
