//! Releases against a server that misbehaves in every way servers are known to.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod cache;
mod faults;
mod server;
mod ways;

use std::sync::Mutex;
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use images::download::{DownloadError, DownloadEvent, Options, ProxyVars};
use images::release::{Arch, Release, ReleaseFile};
use images::retry::Policy;
use sha2::{Digest as _, Sha256};

use crate::server::{Reply, Request, Server};

const VERSION: &str = "v9.9.9+k3s1";

/// A cache folder, and what was reported.
struct Bench {
    dir: tempfile::TempDir,
    events: Mutex<Vec<DownloadEvent>>,
}

impl Bench {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), events: Mutex::default() }
    }

    fn cache(&self) -> &Utf8Path {
        Utf8Path::from_path(self.dir.path()).unwrap()
    }

    fn folder(&self) -> Utf8PathBuf {
        self.cache().join("k3s").join(VERSION).join("amd64")
    }

    async fn fetch(&self, base: &str) -> Result<ReleaseFile, DownloadError> {
        self.fetch_with(&options(base)).await
    }

    async fn fetch_with(&self, options: &Options) -> Result<ReleaseFile, DownloadError> {
        let told = |event| self.events.lock().unwrap().push(event);
        release(Arch::Amd64).binary(self.cache(), options, &told).await
    }

    /// The pauses and reasons of attempts that were followed by others.
    fn retries(&self) -> Vec<(String, Duration)> {
        let events = self.events.lock().unwrap();
        let retries = events.iter().filter_map(|event| match event {
            DownloadEvent::Retrying { error, pause, .. } => Some((error.clone(), *pause)),
            _ => None,
        });
        retries.collect()
    }

    fn has(&self, wanted: impl Fn(&DownloadEvent) -> bool) -> bool {
        self.events.lock().unwrap().iter().any(wanted)
    }

    /// What lies in the release's folder, without the lock.
    fn files(&self) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.folder()) else { return Vec::new() };
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).filter(|n| n != "lock").collect();
        names.sort();
        names
    }
}

fn release(arch: Arch) -> Release {
    Release::new(VERSION, arch).unwrap()
}

fn options(base: &str) -> Options {
    Options {
        base_url: base.to_owned(),
        connect_timeout: Duration::from_secs(5),
        stall_timeout: Duration::from_secs(5),
        max_retry_after: Duration::from_secs(2),
        max_redirects: 3,
        policy: Policy::Constant { interval: Duration::from_millis(5), max_attempts: 4 },
        proxies: ProxyVars::default(),
    }
}

/// A program for the machine with this number in an ELF header (62: x86_64, 183: aarch64), of `bytes` bytes.
fn program(machine: u8, bytes: usize) -> Vec<u8> {
    let mut content = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, machine, 0];
    let mut state = 0x2545_F491u32;
    content.resize_with(bytes, || {
        // xorshift32: bytes that differ from place to place, so that a piece at the wrong one is noticed.
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state.to_le_bytes()[0]
    });
    content
}

/// Long enough that it is written in several pieces.
fn k3s() -> Vec<u8> {
    program(62, 700_000)
}

fn digest(content: &[u8]) -> String {
    Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn sums(files: &[(&str, &[u8])]) -> String {
    files.iter().map(|(name, content)| format!("{}  {name}\n", digest(content))).collect()
}

/// A release's folder in which `/k3s` is answered by `answer`; the list of digests names `published`.
async fn site(published: &[u8], answer: impl Fn(&Request, usize) -> Reply + Send + Sync + 'static) -> Server {
    let list = sums(&[("k3s", published), ("k3s-airgap-images-amd64.tar.gz", b"other")]);
    Server::start(move |request, number| match request.path() {
        "/r/v9.9.9%2Bk3s1/sha256sum-amd64.txt" => Reply::ok(list.as_bytes()),
        "/r/v9.9.9%2Bk3s1/k3s" | "/moved" => answer(request, number),
        _ => Reply::new("404 Not Found", &[], b"Not Found"),
    })
    .await
}
