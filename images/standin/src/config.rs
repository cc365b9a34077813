//! `/etc/rancher/k3s/config.yaml`: the flat subset of YAML that k3s's documentation shows
//! (`key: value`, `key: [a, b]`, `key:` with a list of `- item` lines). Everything else is refused
//! with its line, never guessed at.

/// A line outside the flat subset.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("config file line {line}: {what}")]
pub(crate) struct ConfigError {
    line: usize,
    what: &'static str,
}

/// Turns the file into the arguments k3s puts before those of the command line.
pub(crate) fn to_args(text: &str) -> Result<Vec<String>, ConfigError> {
    let mut args = Vec::new();
    let mut list_key: Option<String> = None;
    for (index, raw) in text.lines().enumerate() {
        let line = index + 1;
        let error = |what| ConfigError { line, what };
        if raw.contains('\t') && raw.trim_start_matches(' ').starts_with('\t') {
            return Err(error("tabs cannot indent"));
        }
        let content = strip_comment(raw);
        let trimmed = content.trim();
        if trimmed.is_empty() || trimmed == "---" {
            continue;
        }
        if let Some(item) = trimmed.strip_prefix('-').filter(|i| i.is_empty() || i.starts_with(' ')) {
            let key = list_key.as_ref().ok_or_else(|| error("a list item without a key"))?;
            args.push(format!("--{key}={}", scalar(item.trim()).map_err(error)?));
            continue;
        }
        if content.starts_with(' ') {
            return Err(error("nested values are not supported"));
        }
        let (key, value) = trimmed.split_once(':').ok_or_else(|| error("expected key: value"))?;
        // "key+" appends to the lists of other files; there is one file here.
        let key = key.trim().trim_end_matches('+').to_owned();
        if key.is_empty() || !key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') {
            return Err(error("not a flag's name"));
        }
        if !value.is_empty() && !value.starts_with(' ') {
            return Err(error("expected a space after the colon"));
        }
        let value = value.trim();
        if value.is_empty() {
            list_key = Some(key);
            continue;
        }
        list_key = None;
        if let Some(inner) = value.strip_prefix('[') {
            let inner = inner.strip_suffix(']').ok_or_else(|| error("a list must end on its line"))?;
            for item in inner.split(',').map(str::trim).filter(|i| !i.is_empty()) {
                args.push(format!("--{key}={}", scalar(item).map_err(error)?));
            }
        } else {
            args.push(format!("--{key}={}", scalar(value).map_err(error)?));
        }
    }
    Ok(args)
}

/// Cuts ` # …` outside quotes.
fn strip_comment(line: &str) -> &str {
    let mut quote = None;
    let mut previous = ' ';
    for (at, c) in line.char_indices() {
        match (quote, c) {
            (None, '"' | '\'') => quote = Some(c),
            (Some(q), c) if q == c => quote = None,
            (None, '#') if previous == ' ' => return &line[..at],
            _ => {}
        }
        previous = c;
    }
    line
}

fn scalar(text: &str) -> Result<String, &'static str> {
    for quote in ['"', '\''] {
        if let Some(inner) = text.strip_prefix(quote) {
            let inner = inner.strip_suffix(quote).ok_or("a quote is not closed")?;
            if inner.contains(['"', '\'', '\\']) {
                return Err("quotes and escapes within quotes are not supported");
            }
            return Ok(inner.to_owned());
        }
    }
    match text.chars().next() {
        None => Err("an empty item"),
        Some('{' | '[' | '&' | '*' | '!' | '|' | '>' | '%' | '@' | '`') => {
            Err("only plain scalars and lists of them are supported")
        }
        Some(_) if text.contains(": ") => Err("nested values are not supported"),
        Some(_) => Ok(text.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flat_subset_becomes_arguments() {
        let text = "# k3s\ncluster-init: true\ntoken: \"a#b\"   # secret\ntls-san:\n  - one\n  - 'two'\ndisable: [traefik, servicelb]\nwrite-kubeconfig-mode: \"0644\"\n";
        assert_eq!(
            to_args(text).unwrap(),
            [
                "--cluster-init=true",
                "--token=a#b",
                "--tls-san=one",
                "--tls-san=two",
                "--disable=traefik",
                "--disable=servicelb",
                "--write-kubeconfig-mode=0644"
            ]
        );
    }

    #[test]
    fn everything_else_is_refused_with_its_line() {
        for (text, line) in [
            ("a: b\n  c: d\n", 2),
            ("- x\n", 1),
            ("a: {b: c}\n", 1),
            ("a: |\n", 1),
            ("a: \"open\n", 1),
            ("nonsense\n", 1),
        ] {
            assert_eq!(to_args(text).unwrap_err().line, line, "{text}");
        }
    }
}
