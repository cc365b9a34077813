//! The ways to a server: redirects, proxies, ports where nothing listens.

use std::time::Instant;

use images::{AirgapImages, K3sSource};

use super::*;

#[tokio::test]
async fn redirects_are_followed_with_the_range() {
    let bench = Bench::new();
    let server = site(&k3s(), |request, _| match (request.path(), request.range()) {
        ("/moved", None) => Reply::ok(&k3s()).cut(700_000, 300_000),
        ("/moved", Some(start)) => Reply::rest(&k3s(), start, "\"one\""),
        _ => Reply::new("302 Found", &[("Location", "/moved")], b"over there"),
    })
    .await;
    bench.fetch(&server.base()).await.unwrap();
    assert_eq!(server.asked("/moved")[1].range(), Some(300_000));
}

#[tokio::test]
async fn redirects_are_bounded_and_go_nowhere_else() {
    let bench = Bench::new();
    let server = site(&k3s(), |_, _| Reply::new("302 Found", &[("Location", "/moved")], b"")).await;
    let text = bench.fetch(&server.base()).await.unwrap_err().to_string();
    assert!(
        text.contains("/k3s redirects more than 3 times, at last to http://") && text.ends_with("/moved"),
        "{text}"
    );
    assert_eq!((server.asked("/k3s").len(), server.asked("/moved").len()), (1, 3));

    for (headers, expected) in [
        (vec![("Location", "file:///etc/passwd")], "redirects to a file address, which is not followed"),
        (vec![], "redirects without saying where to"),
    ] {
        let bench = Bench::new();
        let server = site(&k3s(), move |_, _| Reply::new("301 Moved Permanently", &headers, b"")).await;
        let text = bench.fetch(&server.base()).await.unwrap_err().to_string();
        assert!(text.ends_with(expected), "{text}");
        assert_eq!(server.asked("/k3s").len(), 1);
    }
}

#[tokio::test]
async fn proxies_are_used_and_excepted() {
    let list = sums(&[("k3s", &k3s())]);
    let proxy = Server::start(move |request, _| match request.path() {
        "http://k3s.invalid/r/v9.9.9%2Bk3s1/sha256sum-amd64.txt" => Reply::ok(list.as_bytes()),
        "http://k3s.invalid/r/v9.9.9%2Bk3s1/k3s" => Reply::ok(&k3s()),
        _ => Reply::new("403 Forbidden", &[], b""),
    })
    .await;
    let address = proxy.address.to_string();
    let with = |base: &str, proxies: ProxyVars| Options { proxies, ..options(base) };
    let http = ProxyVars { http: Some(address.clone()), ..ProxyVars::default() };

    let bench = Bench::new();
    bench.fetch_with(&with("http://k3s.invalid/r", http)).await.unwrap();

    // https goes through a tunnel, which this proxy refuses.
    let bench = Bench::new();
    let https = ProxyVars { https: Some(format!("http://me:secret@{address}")), ..ProxyVars::default() };
    let text = bench.fetch_with(&with("https://k3s.invalid/r", https)).await.unwrap_err().to_string();
    assert!(text.contains(&format!("through the proxy {address}")) && !text.contains("secret"), "{text}");
    let tunnels = proxy.asked("k3s.invalid:443");
    assert_eq!(tunnels[0].line, "CONNECT k3s.invalid:443 HTTP/1.1");
    assert!(tunnels[0].header("proxy-authorization").unwrap().starts_with("Basic "));
    assert_eq!(tunnels.len(), 1);

    // What is excepted is asked directly: nothing listens where the proxy should be.
    let bench = Bench::new();
    let server = site(&k3s(), |_, _| Reply::ok(&k3s())).await;
    let nowhere = Some("127.0.0.1:1".to_owned());
    let excepted =
        ProxyVars { all: nowhere.clone(), none: Some("example.org,127.0.0.0/8".into()), ..ProxyVars::default() };
    bench.fetch_with(&with(&server.base(), excepted)).await.unwrap();
    let bench = Bench::new();
    let through = ProxyVars { all: nowhere, ..ProxyVars::default() };
    let text = bench.fetch_with(&with(&server.base(), through)).await.unwrap_err().to_string();
    assert!(text.contains("through the proxy 127.0.0.1:1") && text.contains("refused"), "{text}");
}

#[tokio::test]
async fn a_release_that_cannot_be_had_names_its_url_and_both_ways_out() {
    let bench = Bench::new();
    let source: K3sSource = format!("release:{VERSION}").parse().unwrap();
    // A port that was free a moment ago.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let options = Options { base_url: format!("http://127.0.0.1:{port}/r"), ..Options::default() };
    let began = Instant::now();
    let error = source.resolve_with(&AirgapImages::None, bench.cache(), &options, &|_| {}).await.unwrap_err();
    assert!(began.elapsed() < Duration::from_secs(1), "nothing that is refused is tried again: {:?}", began.elapsed());
    let text = error.to_string();
    assert!(text.starts_with("k3s v9.9.9+k3s1 could not be had from http://127.0.0.1:"), "{text}");
    assert!(text.contains("/v9.9.9%2Bk3s1/k3s"), "{text}");
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(cause.starts_with("no connection to the server of http://") && cause.contains("refused"), "{cause}");
    let hint = error.hint().unwrap();
    assert!(hint.contains("--k3s file:/path/to/k3s") && hint.contains("--k3s standin"), "{hint}");
}

#[tokio::test]
async fn a_release_is_labelled_as_what_it_is() {
    let bench = Bench::new();
    let arch = std::env::consts::ARCH;
    let (machine, asset, list) = match arch {
        "x86_64" => (62, "k3s", "sha256sum-amd64.txt"),
        "aarch64" => (183, "k3s-arm64", "sha256sum-arm64.txt"),
        _ => return,
    };
    let content = program(machine, 1_000);
    let sums = sums(&[(asset, &content)]);
    let served = content.clone();
    let server = Server::start(move |request, _| {
        Reply::ok(if request.path().ends_with(list) { sums.as_bytes() } else { &served })
    })
    .await;
    let source: K3sSource = format!("release:{VERSION}").parse().unwrap();
    let binary =
        source.resolve_with(&AirgapImages::None, bench.cache(), &options(&server.base()), &|_| {}).await.unwrap();
    assert_eq!(binary.label, format!("k3s v9.9.9+k3s1 (release, sha256 {})", &digest(&content)[..12]));
    assert!(binary.real && binary.extra_packages.is_empty());
    assert_eq!(binary.guest_binary().sha256, digest(&content));
}

#[tokio::test]
async fn air_gap_images_come_with_the_release_or_say_what_to_do() {
    let Some(arch) = Arch::host() else { return };
    let bench = Bench::new();
    let k3s = program(if arch == Arch::Amd64 { 62 } else { 183 }, 1_000);
    let binary = if arch == Arch::Amd64 { "k3s" } else { "k3s-arm64" };
    let tarball = format!("k3s-airgap-images-{arch}.tar.zst");
    let list = sums(&[(binary, &k3s), (&tarball, b"images")]);
    let there = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let (served, names) = (there.clone(), (binary.to_owned(), tarball.clone()));
    let server = Server::start(move |request, _| match request.path().rsplit('/').next().unwrap() {
        name if name.ends_with(".txt") => Reply::ok(list.as_bytes()),
        name if name == names.0 => Reply::ok(&k3s),
        name if name == names.1 && served.load(std::sync::atomic::Ordering::SeqCst) => Reply::ok(b"images"),
        _ => Reply::new("404 Not Found", &[], b""),
    })
    .await;
    let options = options(&server.base());
    let source: K3sSource = format!("release:{VERSION}").parse().unwrap();

    let error = source.resolve_with(&AirgapImages::Release, bench.cache(), &options, &|_| {}).await.unwrap_err();
    let url = format!("{}/v9.9.9%2Bk3s1/{tarball}", server.base());
    assert_eq!(error.to_string(), format!("the air-gap images of k3s v9.9.9+k3s1 could not be had from {url}"));
    let hint = error.hint().unwrap();
    for part in [url.as_str(), "--airgap-images file:/path/to/it", "--airgap-images none", "--k3s-base-url"] {
        assert!(hint.contains(part), "{part}: {hint}");
    }

    there.store(true, std::sync::atomic::Ordering::SeqCst);
    let binary = source.resolve_with(&AirgapImages::Release, bench.cache(), &options, &|_| {}).await.unwrap();
    let file = &binary.guest_binary().files[0];
    assert_eq!(file.guest_path, format!("/var/lib/rancher/k3s/agent/images/{tarball}"));
    assert_eq!((file.sha256.as_str(), file.mode), (digest(b"images").as_str(), 0o644));
    assert!(file.path.starts_with(bench.cache()));
    assert!(binary.label.ends_with(&format!(" with {tarball} (sha256 {})", &digest(b"images")[..12])), "{binary:?}");

    // A file of one's own needs no server; nothing is fetched for what cannot be meant.
    let own = bench.cache().join("own.tar");
    std::fs::write(&own, b"own").unwrap();
    let asked = server.asked(&tarball).len();
    let binary = source.resolve_with(&AirgapImages::File(own), bench.cache(), &options, &|_| {}).await.unwrap();
    let files = binary.guest_binary().files;
    assert_eq!(files[0].guest_path, "/var/lib/rancher/k3s/agent/images/own.tar");
    let missing = AirgapImages::File("/nonexistent/images.tar".into());
    let error = source.resolve_with(&missing, bench.cache(), &options, &|_| {}).await.unwrap_err().to_string();
    assert!(error.contains("could not read /nonexistent/images.tar"), "{error}");
    let file: K3sSource = "file:/nonexistent/k3s".parse().unwrap();
    let error = file.resolve_with(&AirgapImages::Release, bench.cache(), &options, &|_| {}).await.unwrap_err();
    assert!(error.to_string().contains("file:/nonexistent/k3s is no release"), "{error}");
    assert_eq!(server.asked(&tarball).len(), asked);
}
