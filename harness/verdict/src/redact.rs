//! Tokens never leave the classifier.

/// What stands in for a token.
const REDACTED: &str = "[redacted]";
/// Words after which a token follows.
const KEYS: [&str; 6] = ["--token ", "--token=", "K3S_TOKEN=", "--agent-token ", "--agent-token=", "token: "];
/// Fewest hex digits of the CA hash in a k3s token (`K10<64 hex>::server:<secret>`), so that cut tokens count too.
const HASH_DIGITS_MIN: usize = 16;

/// The text without k3s tokens and values of token options.
#[must_use]
pub(crate) fn tokens(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((at, keep, end)) = next(rest) {
        out.push_str(&rest[..at + keep]);
        out.push_str(REDACTED);
        rest = &rest[end..];
    }
    out.push_str(rest);
    out
}

/// First token: where it or its key begins, how much of that is kept, where it ends.
fn next(text: &str) -> Option<(usize, usize, usize)> {
    let hashed = text.match_indices("K10").find_map(|(at, _)| {
        let hex = text[at + 3..].bytes().take_while(u8::is_ascii_hexdigit).count();
        (hex >= HASH_DIGITS_MIN).then(|| (at, 0, value_end(text, at)))
    });
    let keyed = KEYS.iter().filter_map(|key| {
        text.match_indices(key).find_map(|(at, _)| {
            let end = value_end(text, at + key.len());
            let value = &text[at + key.len()..end];
            // `open /…/server/token: no such file`: what follows a file's name is no token, but what was wrong with it.
            let is_path = text[..at].ends_with('/');
            (!is_path && !value.is_empty() && !value.starts_with(REDACTED)).then_some((at, key.len(), end))
        })
    });
    hashed.into_iter().chain(keyed).min_by_key(|found| found.0 + found.1)
}

fn value_end(text: &str, from: usize) -> usize {
    let stop = |c: char| c.is_whitespace() || matches!(c, '"' | '\'' | '\\' | ',' | ')');
    text[from..].find(stop).map_or(text.len(), |n| from + n)
}

#[cfg(test)]
mod tests {
    use super::tokens;

    #[test]
    fn tokens_go_and_the_rest_stays() {
        let token = format!("K10{}::server:53c9e67a622ef814", "a".repeat(64));
        assert_eq!(tokens(&format!("got {token} from x")), "got [redacted] from x");
        assert_eq!(
            tokens("k3s server --token hunter2 --server https://x"),
            "k3s server --token [redacted] --server https://x"
        );
        assert_eq!(tokens("K3S_TOKEN=abc"), "K3S_TOKEN=[redacted]");
        assert_eq!(tokens("encrypted with different token"), "encrypted with different token");
        assert_eq!(tokens("token: \"\", token: abc"), "token: \"\", token: [redacted]");
    }

    #[test]
    fn what_is_wrong_with_a_file_of_tokens_is_shown_and_what_is_in_it_is_not() {
        let full = "write /var/lib/rancher/k3s/server/token: No space left on device (os error 28)";
        assert_eq!(tokens(full), full);
        let both = "open /etc/rancher/token: no such file; config.yaml:3: token: hunter2";
        assert_eq!(tokens(both), "open /etc/rancher/token: no such file; config.yaml:3: token: [redacted]");
        let hashed = format!("/var/lib/rancher/k3s/server/token: K10{}::server:abc", "a".repeat(64));
        assert_eq!(tokens(&hashed), "/var/lib/rancher/k3s/server/token: [redacted]");
    }
}
