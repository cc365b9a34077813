//! `--k3s release:VERSION` as its user meets it, against servers on loopback.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::io::{BufRead as _, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::PrivateKeyDer;

const SOURCE: &str = "release:v9.9.9+k3s1";

/// `harness run smoke` in an empty folder, with nothing of the host's configuration.
fn run(dir: &tempfile::TempDir, variables: &[(&str, &str)]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_harness"));
    command.args(["run", "smoke", "--k3s", SOURCE]).current_dir(dir.path()).env_clear().env("HOME", dir.path());
    command.envs(variables.iter().copied()).stdout(Stdio::piped()).stderr(Stdio::piped()).stdin(Stdio::null());
    command
}

/// What it printed as errors, after it ended with `code`; nothing was started.
fn failed(dir: &tempfile::TempDir, output: &Output, code: i32) -> String {
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(code), "{text}");
    assert!(!dir.path().join(".local/state/harness/runs").exists(), "nothing was started");
    text
}

/// Reads a request's head; its first line.
fn head(stream: &mut impl Read) -> String {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        assert_eq!(stream.read(&mut byte).unwrap(), 1);
        head.push(byte[0]);
    }
    String::from_utf8(head).unwrap().lines().next().unwrap().to_owned()
}

fn answer(stream: &mut impl Write, status: &str, body: &str) {
    let length = body.len();
    write!(stream, "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}").unwrap();
    stream.flush().unwrap();
}

/// A list of digests that names the binary of every architecture.
fn sums() -> String {
    format!("{0}  k3s\n{0}  k3s-arm64\n", "0".repeat(64))
}

#[test]
fn a_release_that_cannot_be_fetched_names_its_url_and_both_ways_out() {
    let dir = tempfile::tempdir().unwrap();
    // A port that was free a moment ago.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let base = format!("http://127.0.0.1:{port}/mirror");
    let began = Instant::now();
    let output = run(&dir, &[("HARNESS_K3S_BASE_URL", &base)]).output().unwrap();
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    let text = failed(&dir, &output, 3);
    assert!(text.starts_with("error: getting k3s from release:v9.9.9+k3s1\n  caused by: k3s v9.9.9+k3s1 "), "{text}");
    assert!(text.contains(&format!("{base}/v9.9.9%2Bk3s1/k3s")), "{text}");
    assert!(text.contains("connection refused"), "{text}");
    let hint = text.lines().find(|line| line.starts_with("hint: ")).unwrap();
    assert!(hint.contains("--k3s file:/path/to/k3s") && hint.contains("--k3s standin"), "{hint}");
}

/// Answers the list of digests and the binary of a release; anything else is not there. Tells every request's first line.
fn release_site(requests: usize) -> (String, std::thread::JoinHandle<Vec<String>>) {
    use sha2::Digest as _;
    let program = std::fs::read("/proc/self/exe").unwrap();
    let digest: String = sha2::Sha256::digest(&program).iter().map(|byte| format!("{byte:02x}")).collect();
    let tarball = |arch| format!("{}  k3s-airgap-images-{arch}.tar.zst\n", "0".repeat(64));
    let sums = format!("{digest}  k3s\n{digest}  k3s-arm64\n{}{}", tarball("amd64"), tarball("arm64"));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let base = format!("http://{}/r", listener.local_addr().unwrap());
    let serve = move || {
        let one = |_| {
            let (mut stream, _) = listener.accept().unwrap();
            let line = head(&mut stream);
            let path = line.split(' ').nth(1).unwrap();
            let body = match path.rsplit('/').next().unwrap() {
                name if name.starts_with("sha256sum-") => Some(sums.as_bytes()),
                "k3s" | "k3s-arm64" => Some(program.as_slice()),
                _ => None,
            };
            let (status, body) = body.map_or(("404 Not Found", b"no".as_slice()), |body| ("200 OK", body));
            write!(stream, "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", body.len()).unwrap();
            stream.write_all(body).unwrap();
            line
        };
        (0..requests).map(one).collect()
    };
    (base, std::thread::spawn(serve))
}

#[test]
fn air_gap_images_that_cannot_be_fetched_name_their_url_and_both_ways_out() {
    let dir = tempfile::tempdir().unwrap();
    // Digests and binary, digests again, and the tarball that is not there.
    let (base, site) = release_site(4);
    // What is said on the command line wins over the environment.
    let nowhere = [("HARNESS_K3S_BASE_URL", "http://k3s.invalid/r")];
    let mut command = run(&dir, &nowhere);
    let output = command.args(["--k3s-base-url", &base, "--airgap-images", "release"]).output().unwrap();
    let text = failed(&dir, &output, 3);
    let url = format!("{base}/v9.9.9%2Bk3s1/k3s-airgap-images-");
    assert!(text.contains(&format!("the air-gap images of k3s v9.9.9+k3s1 could not be had from {url}")), "{text}");
    assert!(text.contains("answered 404 Not Found"), "{text}");
    let hint = text.lines().find(|line| line.starts_with("hint: ")).unwrap();
    assert!(hint.contains(&url) && hint.contains("--airgap-images file:") && hint.contains("--airgap-images none"));
    let asked = site.join().unwrap();
    assert!(asked[3].starts_with("GET /r/v9.9.9%2Bk3s1/k3s-airgap-images-"), "{asked:?}");
}

#[test]
fn a_base_url_or_images_that_cannot_be_meant_are_usage_errors() {
    let dir = tempfile::tempdir().unwrap();
    for (flags, expected) in [
        (["--k3s-base-url", "ftp://mirror/k3s"], "its scheme is ftp"),
        (["--k3s-base-url", "mirror"], "\"mirror\" is no http or https URL"),
        (["--airgap-images", "file:./images.zip"], "its name has to end in one of .tar, "),
        (["--k3s", "standin"], "standin is no release"),
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_harness"));
        std::fs::write(dir.path().join("gap.yaml"), GAP).unwrap();
        command.args(["run", "./gap.yaml"]).args(flags).current_dir(dir.path()).env_clear().env("HOME", dir.path());
        let text = failed(&dir, &command.output().unwrap(), 2);
        assert!(text.contains(expected), "{text}");
    }
}

#[test]
fn a_plan_says_where_k3s_and_its_images_would_come_from() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("gap.yaml"), GAP).unwrap();
    let plan = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_harness"));
        command.args(["plan", "./gap.yaml", "--no-measure"]).args(args).current_dir(dir.path()).env_clear();
        let output =
            command.env("HOME", dir.path()).env("HARNESS_K3S_BASE_URL", "https://env.example").output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let text = plan(&[]);
    assert!(text.contains("release:v9.9.9+k3s1 from https://env.example/v9.9.9%2Bk3s1/k3s"), "{text}");
    assert!(text.contains("release in /var/lib/rancher/k3s/agent/images"), "{text}");
    let text = plan(&["--k3s-base-url", "https://flag.example/r", "--airgap-images", "none"]);
    assert!(text.contains("from https://flag.example/r/v9.9.9%2Bk3s1/k3s") && !text.contains("air-gap"), "{text}");
    let json: serde_json::Value = serde_json::from_str(&plan(&["--json"])).unwrap();
    assert_eq!(json["airgap_images"], "release");
}

/// A scenario whose nodes have no registry.
const GAP: &str = "name: gap\ndescription: no registry\nprofile: simple\nk3s: release:v9.9.9+k3s1\n\
    airgap_images: release\nnodes:\n  - {name: server-1, role: server}\n";

#[test]
fn proxy_variables_are_followed() {
    let dir = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let proxy = listener.local_addr().unwrap().to_string();
    let served = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let line = head(&mut stream);
        answer(&mut stream, "403 Forbidden", "not here");
        line
    });
    let variables = [("HARNESS_K3S_BASE_URL", "http://k3s.invalid/r"), ("http_proxy", proxy.as_str())];
    let text = failed(&dir, &run(&dir, &variables).output().unwrap(), 3);
    assert!(text.contains("answered 403 Forbidden"), "{text}");
    let line = served.join().unwrap();
    assert!(line.starts_with("GET http://k3s.invalid/r/v9.9.9%2Bk3s1/sha256sum-"), "{line}");
}

#[test]
fn an_interrupted_download_ends_at_once_and_keeps_its_part() {
    let dir = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let base = format!("http://{}/r", listener.local_addr().unwrap());
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        head(&mut stream);
        answer(&mut stream, "200 OK", &sums());
        let (mut stream, _) = listener.accept().unwrap();
        head(&mut stream);
        let head = "HTTP/1.1 200 OK\r\nContent-Length: 70000000\r\n\r\n";
        stream.write_all(&[head.as_bytes(), &[7; 1_000_000]].concat()).unwrap();
        stream // Held open: the client waits for more.
    });
    let mut child: Child = run(&dir, &[("HARNESS_K3S_BASE_URL", &base)]).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let line = lines.next().unwrap().unwrap();
    assert!(
        line.starts_with(&format!("k3s: fetching {base}/v9.9.9%2Bk3s1/k3s")) && line.ends_with("66.8 MiB"),
        "{line}"
    );
    let _open: TcpStream = server.join().unwrap();
    let began = Instant::now();
    kill(Pid::from_raw(child.id().try_into().unwrap()), Signal::SIGINT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    assert_eq!(lines.last().unwrap().unwrap(), "error: interrupted by SIGINT");
    let arch = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let folder = dir.path().join(".cache/harness/k3s/v9.9.9+k3s1").join(arch);
    let mut kept: Vec<_> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    kept.sort();
    let name = if cfg!(target_arch = "aarch64") { "k3s-arm64" } else { "k3s" };
    assert_eq!(kept, [format!("{name}.part"), format!("{name}.part.json"), "lock".to_owned()]);
}

#[test]
fn https_is_verified_and_never_left_for_http() {
    let dir = tempfile::tempdir().unwrap();
    let authority = KeyPair::generate().unwrap();
    let mut ca = CertificateParams::new(Vec::<String>::new()).unwrap();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca_file = dir.path().join("ca.pem");
    std::fs::write(&ca_file, ca.self_signed(&authority).unwrap().pem()).unwrap();
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(vec!["127.0.0.1".to_owned()])
        .unwrap()
        .signed_by(&key, &Issuer::new(ca, authority))
        .unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], PrivateKeyDer::Pkcs8(key.serialize_der().into()))
        .unwrap();
    let config = Arc::new(config);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let base = format!("https://{}/r", listener.local_addr().unwrap());

    // The list comes, and the binary is said to be somewhere on http.
    let tls = Arc::clone(&config);
    let server = std::thread::spawn(move || {
        for reply in [("200 OK", sums()), ("302 Found\r\nLocation: http://127.0.0.1:1/k3s?sig=1", String::new())] {
            let (stream, _) = listener.accept().unwrap();
            let connection = rustls::ServerConnection::new(Arc::clone(&tls)).unwrap();
            let mut stream = rustls::StreamOwned::new(connection, stream);
            head(&mut stream);
            answer(&mut stream, reply.0, &reply.1);
        }
        listener
    });
    let trusted = [("HARNESS_K3S_BASE_URL", base.as_str()), ("SSL_CERT_FILE", ca_file.to_str().unwrap())];
    let text = failed(&dir, &run(&dir, &trusted).output().unwrap(), 3);
    let expected = "k3s redirects from https to http, to http://127.0.0.1:1/k3s, which is not followed";
    assert!(text.contains(expected) || text.contains(&expected.replacen("k3s", "k3s-arm64", 1)), "{text}");

    // The same server for somebody who does not trust its authority.
    let listener = server.join().unwrap();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut connection = rustls::ServerConnection::new(config).unwrap();
        // The client breaks it off.
        connection.complete_io(&mut stream).unwrap_err()
    });
    let other = dir.path().join("other.pem");
    let mut ca = CertificateParams::new(Vec::<String>::new()).unwrap();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    std::fs::write(&other, ca.self_signed(&KeyPair::generate().unwrap()).unwrap().pem()).unwrap();
    let mistrusted = [("HARNESS_K3S_BASE_URL", base.as_str()), ("SSL_CERT_FILE", other.to_str().unwrap())];
    let text = failed(&dir, &run(&dir, &mistrusted).output().unwrap(), 3);
    assert!(text.contains("invalid peer certificate"), "{text}");
    server.join().unwrap();
}
