//! The root file system of a suite and its packages, as a tar made by mmdebstrap.

use std::collections::BTreeSet;

use camino::{Utf8Path, Utf8PathBuf};
use sha2::{Digest, Sha256};

use crate::contain::{Builder, unshare_args};
use crate::hex;

/// Counted up when what is made of the same packages changes in a way the arguments do not show.
const FORM: u32 = 1;

/// Runs mmdebstrap with the scratch folder as its own. No initrd is made in there (`INITRD=No` is what Debian's kernel
/// hook looks at): images have one of ours.
const SCRIPT: &str = "export TMPDIR=\"$1\" INITRD=No\nshift\nexec mmdebstrap \"$@\"";

/// Taken out of the tree: what belongs to the machine that built it, host keys (the seed brings the node's), package lists.
const STRIP_HOOK: &str = "rm -rf \"$1\"/etc/ssh/ssh_host_*_key* \"$1\"/etc/hostname \"$1\"/etc/resolv.conf \
     \"$1\"/etc/apt/apt.conf.d/99mmdebstrap \"$1\"/boot/initrd.img* \"$1\"/var/lib/apt/lists/* \"$1\"/var/log/apt \
     \"$1\"/var/log/*.log \"$1\"/var/cache/debconf/*-old";

/// A root file system to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RootfsSpec {
    pub(crate) suite: String,
    pub(crate) packages: BTreeSet<String>,
    pub(crate) exclude: BTreeSet<String>,
}

/// What depends on the machine that builds and not on what is built: where packages come from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct AptSetup {
    /// Lines of a `sources.list`; none means the archive's own mirrors.
    pub(crate) sources: Vec<String>,
    /// apt options, such as a proxy.
    pub(crate) options: Vec<String>,
}

impl RootfsSpec {
    /// Digest of everything that decides what is in the tree, hexadecimal. Mirrors and proxies are not in it.
    pub(crate) fn key(&self) -> String {
        let mut hash = Sha256::new();
        hash.update(format!("rootfs {FORM} {}\n", std::env::consts::ARCH));
        for part in self.fixed_args().iter().chain([&self.suite, &SCRIPT.to_owned()]) {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part.as_bytes());
        }
        let mut key = hex(&hash.finalize());
        key.truncate(crate::store::ID_LEN);
        key
    }

    fn fixed_args(&self) -> Vec<String> {
        let packages: Vec<&str> = self.packages.iter().map(String::as_str).collect();
        let mut args: Vec<String> = ["--mode=root", "--variant=apt", "--format=tar"].map(str::to_owned).to_vec();
        args.extend(self.exclude.iter().map(|pattern| format!("--dpkgopt=path-exclude={pattern}")));
        // A tree that is thrown away unless it is whole needs no fsync per file.
        args.push("--dpkgopt=force-unsafe-io".to_owned());
        args.push("--aptopt=APT::Install-Recommends \"false\"".to_owned());
        args.push(format!("--include={}", packages.join(",")));
        args.push(format!("--customize-hook={STRIP_HOOK}"));
        args
    }

    /// Arguments of `unshare` that make the tree and write it to `out`.
    pub(crate) fn argv(&self, builder: Builder, apt: &AptSetup, scratch: &Utf8Path, out: &Utf8Path) -> Vec<String> {
        let mut args = self.fixed_args();
        args.extend(apt.options.iter().map(|option| format!("--aptopt={option}")));
        args.push(self.suite.clone());
        args.push(out.to_string());
        args.extend(apt.sources.iter().cloned());
        unshare_args(builder, scratch, SCRIPT, &args)
    }
}

/// Options of the machine's apt that reaching a mirror may depend on, out of `apt-config dump`.
pub(crate) fn apt_options(dump: &str) -> Vec<String> {
    const PREFIXES: &[&str] = &[
        "Acquire::http::",
        "Acquire::https::",
        "Acquire::Check-Valid-Until ",
        "Acquire::Retries ",
        "Acquire::ForceIPv4 ",
        "Acquire::ForceIPv6 ",
    ];
    let wanted = |line: &&str| {
        let set = !line.ends_with("\"\";");
        set && PREFIXES
            .iter()
            .any(|prefix| line.get(..prefix.len()).is_some_and(|head| head.eq_ignore_ascii_case(prefix)))
    };
    dump.lines().map(str::trim).filter(wanted).map(|line| line.trim_end_matches(';').to_owned()).collect()
}

/// The machine's own sources of `suite`, as lines for mmdebstrap: only the suite, its updates and its security updates,
/// component main, from what is signed by Debian's archive keys. Empty where there are none.
pub(crate) fn apt_sources(files: &[(Utf8PathBuf, String)], suite: &str) -> Vec<String> {
    let mut lines = BTreeSet::new();
    for (path, text) in files {
        if path.extension() == Some("sources") {
            for stanza in text.split("\n\n") {
                lines.extend(deb822(stanza, suite));
            }
        } else {
            lines.extend(text.lines().filter_map(|line| one_line(line, suite)));
        }
    }
    // Without the suite itself (a machine that has only its updates, say) the archive's own mirrors are the better source.
    let has_base = lines.iter().any(|line| line.split(' ').nth(2) == Some(suite));
    if has_base { lines.into_iter().collect() } else { Vec::new() }
}

/// Whether `found` is the suite, its updates or its security updates.
fn belongs(found: &str, suite: &str) -> bool {
    found == suite || matches!(found.strip_prefix(suite), Some("-updates" | "-security"))
}

fn signed_by_debian(value: &str) -> bool {
    value.split(['/', ',', ' ']).any(|part| part.starts_with("debian-archive-"))
}

fn one_line(line: &str, suite: &str) -> Option<String> {
    let rest = line.trim().strip_prefix("deb ")?.trim();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(inner) => inner.split_once(']')?,
        None => ("", rest),
    };
    let signed = options.split_whitespace().find_map(|option| option.strip_prefix("signed-by="));
    if signed.is_some_and(|value| !signed_by_debian(value)) {
        return None;
    }
    let mut words = rest.split_whitespace();
    let (uri, found) = (words.next()?, words.next()?);
    (belongs(found, suite) && words.any(|component| component == "main")).then(|| format!("deb {uri} {found} main"))
}

fn deb822(stanza: &str, suite: &str) -> Vec<String> {
    let field = |name: &str| -> Option<String> {
        let mut lines = stanza
            .lines()
            .filter(|line| !line.starts_with('#'))
            .skip_while(|line| !line.split_once(':').is_some_and(|(key, _)| key.eq_ignore_ascii_case(name)));
        let first = lines.next()?.split_once(':')?.1.to_owned();
        let more = lines.take_while(|line| line.starts_with([' ', '\t']));
        Some(more.fold(first, |text, line| text + " " + line))
    };
    let has = |name: &str, word: &str| field(name).is_some_and(|value| value.split_whitespace().any(|w| w == word));
    if !has("Types", "deb") || !has("Components", "main") || has("Enabled", "no") {
        return Vec::new();
    }
    if field("Signed-By").is_some_and(|value| !signed_by_debian(&value)) {
        return Vec::new();
    }
    let (uris, suites) = (field("URIs").unwrap_or_default(), field("Suites").unwrap_or_default());
    let pairs = uris.split_whitespace().flat_map(|uri| {
        suites
            .split_whitespace()
            .filter(|found| belongs(found, suite))
            .map(move |found| format!("deb {uri} {found} main"))
    });
    pairs.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> RootfsSpec {
        RootfsSpec {
            suite: "bookworm".to_owned(),
            packages: ["systemd", "curl"].map(str::to_owned).into(),
            exclude: ["/usr/share/man/*".to_owned()].into(),
        }
    }

    #[test]
    fn the_key_is_of_the_content_and_not_of_the_mirror() {
        let base = spec();
        assert_eq!(base.key(), spec().key());
        let mut more = spec();
        more.packages.insert("socat".to_owned());
        assert_ne!(base.key(), more.key());
        let mut other = spec();
        other.exclude.clear();
        assert_ne!(base.key(), other.key());
    }

    #[test]
    fn the_arguments_end_with_suite_target_and_sources() {
        let apt = AptSetup {
            sources: vec!["deb http://m/debian bookworm main".to_owned()],
            options: vec!["Acquire::http::Proxy \"http://p:3128\"".to_owned()],
        };
        let argv = spec().argv(Builder::Root, &apt, Utf8Path::new("/s"), Utf8Path::new("/o.tar"));
        assert!(argv.contains(&"--include=curl,systemd".to_owned()), "{argv:?}");
        assert_eq!(
            argv[argv.len() - 4..],
            [
                "--aptopt=Acquire::http::Proxy \"http://p:3128\"",
                "bookworm",
                "/o.tar",
                "deb http://m/debian bookworm main"
            ]
        );
    }

    #[test]
    fn the_machines_own_debian_sources_are_taken_and_no_others() {
        let files = [
            (
                Utf8PathBuf::from("debian.sources"),
                "Types: deb\n# a note\nURIs: http://deb.debian.org/debian\nSuites: bookworm bookworm-updates\n\
                 Components: main\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n\n\
                 Types: deb\nURIs: http://sec/debian-security\nSuites: bookworm-security\nComponents: main\n\n\
                 Types: deb\nURIs: https://deb.nodesource.com/node_20.x\nSuites: nodistro\nComponents: main\n"
                    .to_owned(),
            ),
            (
                Utf8PathBuf::from("x.list"),
                "deb https://packages.cloud.google.com/apt cloud-sdk-bookworm main\n\
                 deb [arch=amd64 signed-by=/etc/apt/keyrings/docker.gpg] https://download.docker.com/linux/debian bookworm main\n\
                 # deb http://old/debian bookworm main\n\
                 deb http://local/debian bookworm contrib\n"
                    .to_owned(),
            ),
        ];
        assert_eq!(
            apt_sources(&files, "bookworm"),
            [
                "deb http://deb.debian.org/debian bookworm main",
                "deb http://deb.debian.org/debian bookworm-updates main",
                "deb http://sec/debian-security bookworm-security main",
            ]
        );
        assert!(apt_sources(&files, "trixie").is_empty());
        let only_security = [(Utf8PathBuf::from("a.list"), "deb http://sec/ bookworm-security main".to_owned())];
        assert!(apt_sources(&only_security, "bookworm").is_empty());
    }

    #[test]
    fn proxies_are_taken_along_and_empty_settings_are_not() {
        let dump = "APT::Architecture \"amd64\";\nAcquire::http::Proxy \"http://p:3128\";\nAcquire::https::Proxy \"\";\n\
                    Acquire::Check-Valid-Until \"false\";\nAcquire::Languages \"none\";\n";
        assert_eq!(
            apt_options(dump),
            ["Acquire::http::Proxy \"http://p:3128\"", "Acquire::Check-Valid-Until \"false\""]
        );
    }
}
