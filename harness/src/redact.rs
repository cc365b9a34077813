//! Cluster tokens never reach a record, a report or the terminal.

/// What stands in a record where a token stood.
pub const REDACTED: &str = "<token redacted>";

/// The text without k3s tokens.
///
/// A full token is `K10<64 hex of the CA's sha256>::<user>:<password>` (the form k3s writes to
/// `server/token`); whatever follows `K10` and hex digits up to white space or a quote is taken as one.
#[must_use]
pub fn redact(text: &str) -> std::borrow::Cow<'_, str> {
    let Some(first) = find_token(text, 0) else {
        return text.into();
    };
    let mut out = String::with_capacity(text.len());
    let (mut from, mut next) = (0, Some(first));
    while let Some((start, end)) = next {
        out.push_str(&text[from..start]);
        out.push_str(REDACTED);
        from = end;
        next = find_token(text, end);
    }
    out.push_str(&text[from..]);
    out.into()
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
        assert!(matches!(redact("nothing K10abc here"), std::borrow::Cow::Borrowed(_)));
    }
}
