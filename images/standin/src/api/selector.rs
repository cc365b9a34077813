//! Query parameters and Kubernetes' selectors.

use serde_json::Value;

use crate::nodes;

/// A query string taken apart.
#[derive(Debug, Default)]
pub(super) struct Query(Vec<(String, String)>);

impl Query {
    pub(super) fn parse(text: &str) -> Self {
        let pairs = text.split('&').filter(|p| !p.is_empty()).map(|p| {
            let (key, value) = p.split_once('=').unwrap_or((p, ""));
            (percent_decode(key), percent_decode(value))
        });
        Self(pairs.collect())
    }
    pub(super) fn get(&self, key: &str) -> Option<&str> {
        self.0.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str())
    }
    pub(super) fn all<'a>(&'a self, key: &'a str) -> impl Iterator<Item = &'a str> {
        self.0.iter().filter(move |(k, _)| k == key).map(|(_, v)| v.as_str())
    }
    /// `true`, `1`, or the bare name.
    pub(super) fn is_true(&self, key: &str) -> bool {
        matches!(self.get(key), Some("true" | "1" | ""))
    }
}

fn percent_decode(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let bytes = text.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        let hex = text.get(at + 1..at + 3).and_then(|h| u8::from_str_radix(h, 16).ok());
        match (bytes[at], hex) {
            (b'%', Some(byte)) => {
                out.push(byte);
                at += 3;
                continue;
            }
            (b'+', _) => out.push(b' '),
            (b, _) => out.push(b),
        }
        at += 1;
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[derive(Debug, PartialEq, Eq)]
enum Requirement {
    In(String, Vec<String>),
    NotIn(String, Vec<String>),
    Exists(String),
    Absent(String),
}

/// Which objects are meant.
#[derive(Debug, Default)]
pub(super) struct Filter {
    names: Vec<(bool, String)>,
    labels: Vec<Requirement>,
}

impl Filter {
    /// Reads `fieldSelector` (of `metadata.name` only) and `labelSelector`.
    pub(super) fn parse(query: &Query) -> Result<Self, String> {
        let mut filter = Self::default();
        for term in query.get("fieldSelector").unwrap_or_default().split(',').filter(|t| !t.is_empty()) {
            let (equal, key, value) = equality(term).ok_or_else(|| format!("invalid selector: '{term}'"))?;
            if key != "metadata.name" {
                return Err(format!("field label not supported: {key}"));
            }
            filter.names.push((equal, value.to_owned()));
        }
        for term in split_terms(query.get("labelSelector").unwrap_or_default()) {
            filter.labels.push(requirement(term).ok_or_else(|| format!("unable to parse requirement: {term}"))?);
        }
        Ok(filter)
    }

    pub(super) fn matches(&self, object: &Value) -> bool {
        let name = nodes::name(object);
        let labels = &object["metadata"]["labels"];
        let has = |key: &str, values: &[String]| labels[key].as_str().is_some_and(|v| values.iter().any(|w| w == v));
        self.names.iter().all(|(equal, value)| (name == value) == *equal)
            && self.labels.iter().all(|r| match r {
                Requirement::In(key, values) => has(key, values),
                Requirement::NotIn(key, values) => !has(key, values),
                Requirement::Exists(key) => !labels[key.as_str()].is_null(),
                Requirement::Absent(key) => labels[key.as_str()].is_null(),
            })
    }
}

fn equality(term: &str) -> Option<(bool, &str, &str)> {
    if let Some((key, value)) = term.split_once("!=") {
        return Some((false, key.trim(), value.trim()));
    }
    let (key, value) = term.split_once("==").or_else(|| term.split_once('='))?;
    Some((true, key.trim(), value.trim()))
}

/// Splits at commas outside parentheses.
fn split_terms(text: &str) -> Vec<&str> {
    let (mut depth, mut start, mut terms) = (0_u32, 0, Vec::new());
    for (at, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            ',' if depth == 0 => {
                terms.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    terms.push(&text[start..]);
    terms.into_iter().map(str::trim).filter(|t| !t.is_empty()).collect()
}

fn requirement(term: &str) -> Option<Requirement> {
    let valid = |key: &str| !key.is_empty() && !key.contains([' ', '(', ')', '=', '!']);
    if let Some(list) = term.strip_suffix(')') {
        let (head, list) = list.split_once('(')?;
        let values = list.split(',').map(|v| v.trim().to_owned()).collect();
        let mut words = head.split_whitespace();
        let (key, operator) = (words.next()?.to_owned(), words.next()?);
        return match operator {
            "in" => Some(Requirement::In(key, values)),
            "notin" => Some(Requirement::NotIn(key, values)),
            _ => None,
        };
    }
    if let Some((equal, key, value)) = equality(term) {
        let (key, values) = (valid(key).then(|| key.to_owned())?, vec![value.to_owned()]);
        return Some(if equal { Requirement::In(key, values) } else { Requirement::NotIn(key, values) });
    }
    match term.strip_prefix('!') {
        Some(key) => valid(key.trim()).then(|| Requirement::Absent(key.trim().to_owned())),
        None => valid(term).then(|| Requirement::Exists(term.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn filter(query: &str) -> Result<Filter, String> {
        Filter::parse(&Query::parse(query))
    }

    #[test]
    fn selectors_select() {
        let node = json!({"metadata": {"name": "a", "labels": {"role": "etcd", "arch": "amd64"}}});
        for (query, expected) in [
            ("", true),
            ("fieldSelector=metadata.name%3Da", true),
            ("fieldSelector=metadata.name!=a", false),
            ("labelSelector=role", true),
            ("labelSelector=%21role", false),
            ("labelSelector=role%3Detcd,arch+in+(amd64,arm64)", true),
            ("labelSelector=arch+notin+(amd64)", false),
            ("labelSelector=role!=etcd", false),
        ] {
            assert_eq!(filter(query).unwrap().matches(&node), expected, "{query}");
        }
    }

    #[test]
    fn what_cannot_be_selected_is_refused() {
        assert!(filter("fieldSelector=spec.podCIDR=x").is_err());
        assert!(filter("labelSelector=a+b").is_err());
    }

    #[test]
    fn bare_names_are_true() {
        assert!(Query::parse("verbose&x=1").is_true("verbose"));
        assert!(!Query::parse("watch=false").is_true("watch"));
    }
}
