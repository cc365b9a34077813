//! Cluster tokens never reach a record, a report or the terminal.

/// What stands in a record where a token stood.
pub const REDACTED: &str = "<token redacted>";

/// What stands before a token that is not in k3s's full form.
const KEYS: [&str; 5] = ["K3S_TOKEN=", "K3S_AGENT_TOKEN=", "--token", "--agent-token", "--agent-token-file"];

/// The text without k3s tokens.
///
/// A full token is `K10<64 hex of the CA's sha256>::<user>:<password>` (the form k3s writes to
/// `server/token`); whatever follows `K10` and hex digits up to white space or a quote is taken as one. A short one is
/// known by the flag or variable before it.
#[must_use]
pub fn redact(text: &str) -> std::borrow::Cow<'_, str> {
    let Some(first) = find(text, 0) else {
        return text.into();
    };
    let mut out = String::with_capacity(text.len());
    let (mut from, mut next) = (0, Some(first));
    while let Some((start, end)) = next {
        out.push_str(&text[from..start]);
        out.push_str(REDACTED);
        from = end;
        next = find(text, end);
    }
    out.push_str(&text[from..]);
    out.into()
}

/// The next token of either form.
fn find(text: &str, from: usize) -> Option<(usize, usize)> {
    let keyed = KEYS.iter().filter_map(|key| find_keyed(text, from, key)).min();
    match (find_token(text, from), keyed) {
        (Some(full), Some(keyed)) => Some(full.min(keyed)),
        (full, keyed) => full.or(keyed),
    }
}

/// The value behind a key, quotes left standing.
fn find_keyed(text: &str, mut from: usize, key: &str) -> Option<(usize, usize)> {
    while let Some(at) = text[from..].find(key) {
        let behind = from + at + key.len();
        let rest = &text[behind..];
        // `--token X`, `--token=X`, `K3S_TOKEN="X"`; but `--token-file` is another flag.
        let lead = rest.len() - rest.trim_start_matches(['=', ' ', '"', '\'']).len();
        let start = behind + lead;
        let len = text[start..].find(|c: char| c.is_whitespace() || matches!(c, '"' | '\'' | ',' | '\\'));
        let end = len.map_or(text.len(), |len| start + len);
        let value = &text[start..end];
        if (lead > 0 || key.ends_with('=')) && !value.is_empty() && !value.starts_with('<') && !value.starts_with('$') {
            return Some((start, end));
        }
        from = behind;
    }
    None
}

fn find_token(text: &str, mut from: usize) -> Option<(usize, usize)> {
    while let Some(at) = text[from..].find("K10") {
        let start = from + at;
        let rest = &text[start + 3..];
        let hex = rest.bytes().take_while(u8::is_ascii_hexdigit).count();
        if hex >= 32 && rest[hex..].starts_with("::") {
            let end = rest
                .find(|c: char| c.is_whitespace() || matches!(c, '"' | '\'' | ',' | '\\'))
                .map_or(text.len(), |len| start + 3 + len);
            return Some((start, end));
        }
        from = start + 3;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_go_and_the_rest_stays() {
        let token = format!("K10{}::server:{}", "a1".repeat(32), "0f".repeat(16));
        let line = format!("--token {token} --node-ip 10.0.0.1 K10 x \"{token}\"");
        let clean = redact(&line);
        assert_eq!(clean, format!("--token {REDACTED} --node-ip 10.0.0.1 K10 x \"{REDACTED}\""));
        assert_eq!(redact("K3S_TOKEN=\"secret\" x"), format!("K3S_TOKEN=\"{REDACTED}\" x"));
        assert_eq!(redact("k3s server --token s3 --node-ip 1"), format!("k3s server --token {REDACTED} --node-ip 1"));
        assert_eq!(redact("--token=s3"), format!("--token={REDACTED}"));
        assert_eq!(redact("--token-file /x --token ${TOKEN}"), "--token-file /x --token ${TOKEN}");
        assert_eq!(redact(&redact("--token s3")), format!("--token {REDACTED}"));
        assert!(matches!(redact("nothing K10abc here"), std::borrow::Cow::Borrowed(_)));
    }
}
