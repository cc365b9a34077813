//! Lists of digests as sha256sum(1) writes them.

use std::collections::BTreeMap;

/// Most entries a list is read for.
const MAX_ENTRIES: usize = 1_000;

/// File names and their SHA-256, lowercase hexadecimal.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Sums(BTreeMap<String, String>);

impl Sums {
    /// Reads lines of `DIGEST  NAME` or `DIGEST *NAME` (GNU coreutils, "cksum output modes": the character before the
    /// name is a blank for text and `*` for binary mode).
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let mut sums = BTreeMap::new();
        for (index, line) in text.lines().enumerate() {
            let line = line.trim_end();
            if line.is_empty() {
                continue;
            }
            let (digest, name) = entry(line).ok_or_else(|| {
                let start: String = line.chars().take(40).collect();
                format!("line {} is {start:?}", index + 1)
            })?;
            if sums.len() >= MAX_ENTRIES {
                return Err(format!("it has more than {MAX_ENTRIES} lines"));
            }
            let digest = digest.to_ascii_lowercase();
            if sums.insert(name.to_owned(), digest.clone()).is_some_and(|other| other != digest) {
                return Err(format!("it gives two digests for {name}"));
            }
        }
        if sums.is_empty() { Err("it is empty".to_owned()) } else { Ok(Self(sums)) }
    }

    /// The digest of `name`.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }
}

fn entry(line: &str) -> Option<(&str, &str)> {
    let (digest, rest) = line.split_at_checked(64)?;
    let name = rest.strip_prefix("  ").or_else(|| rest.strip_prefix(" *"))?;
    (digest.bytes().all(|b| b.is_ascii_hexdigit()) && !name.is_empty()).then_some((digest, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_modes_and_upper_case_are_read() {
        let (a, b) = ("a".repeat(64), "B".repeat(64));
        let sums = Sums::parse(&format!("{a}  k3s\n{b} *k3s-airgap-images-amd64.tar.zst\r\n\n")).unwrap();
        assert_eq!(sums.get("k3s"), Some(a.as_str()));
        assert_eq!(sums.get("k3s-airgap-images-amd64.tar.zst"), Some("b".repeat(64).as_str()));
        assert_eq!(sums.get("k3s-arm64"), None);
    }

    #[test]
    fn what_is_no_list_is_refused() {
        let digest = "0".repeat(64);
        assert_eq!(Sums::parse("").unwrap_err(), "it is empty");
        assert!(Sums::parse("<!DOCTYPE html>\n").unwrap_err().contains("line 1 is \"<!DOCTYPE html>\""));
        assert!(Sums::parse(&format!("{digest} k3s\n")).is_err(), "one blank");
        assert!(Sums::parse(&format!("{}é  k3s\n", "0".repeat(63))).is_err());
        let twice = format!("{digest}  k3s\n{}  k3s\n", "1".repeat(64));
        assert_eq!(Sums::parse(&twice).unwrap_err(), "it gives two digests for k3s");
        let long: String = (0..=MAX_ENTRIES).map(|n| format!("{digest}  f{n}\n")).collect();
        assert!(Sums::parse(&long).unwrap_err().contains("more than 1000 lines"));
    }
}
