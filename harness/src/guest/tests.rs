//! Against a real sshd on loopback.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::FutureExt as _;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::testing::{Door, Sshd};
use super::*;

pub(super) const LONG: Duration = Duration::from_secs(20);

pub(super) fn shorter_than(started: Instant, limit_ms: u64, what: &str) {
    let elapsed = started.elapsed();
    assert!(elapsed < Duration::from_millis(limit_ms), "{what} took {elapsed:?}");
}

/// Waits for a condition of another process, which cannot be awaited otherwise.
pub(super) async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < LONG, "{what} did not come about");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn another_host_key_is_refused_at_once_and_for_good() {
    let sshd = Sshd::start();
    let mut target = sshd.target();
    target.host_key = generate_ed25519("other").unwrap().public().unwrap();
    let started = Instant::now();
    let error = sshd.connect(target).await.unwrap_err();
    assert!(matches!(&error, GuestError::HostKeyMismatch { expected, offered, .. } if expected != offered), "{error}");
    assert!(error.is_permanent());
    assert!(error.to_string().starts_with("server-1: host key mismatch: expected SHA256:"), "{error}");
    shorter_than(started, 5_000, "a refusal");
}

#[tokio::test]
async fn a_host_key_of_another_kind_is_a_mismatch() {
    let curve = russh::keys::EcdsaCurve::NistP256;
    let algorithm = russh::keys::Algorithm::Ecdsa { curve };
    let key = PrivateKey::random(&mut russh::keys::key::safe_rng(), algorithm).unwrap();
    let ecdsa = KeyPair {
        private_openssh: key.to_openssh(russh::keys::ssh_key::LineEnding::LF).unwrap().to_string(),
        public_openssh: key.public_key().to_openssh().unwrap(),
    };
    let sshd = Sshd::start_with(ecdsa, Door::Open);
    let mut target = sshd.target();
    target.host_key = generate_ed25519("pinned").unwrap().public().unwrap();
    let error = sshd.connect(target).await.unwrap_err();
    assert!(
        matches!(&error, GuestError::HostKeyMismatch { offered, .. } if offered.contains("another kind")),
        "{error}"
    );
}

#[tokio::test]
async fn the_host_key_is_checked_again_when_the_connection_is_repaired() {
    let sshd = Sshd::start();
    let guest = sshd.guest().await;
    guest.exec_ok("true", LONG).await.unwrap();
    let other = generate_ed25519("impostor").unwrap();
    std::fs::write(sshd.dir.path().join("host"), &other.private_openssh).unwrap();
    sshd.kill_sessions();
    let error = guest.exec("true", LONG).await.unwrap_err();
    let error = if error.is_connection() { guest.exec("true", LONG).await.unwrap_err() } else { error };
    assert!(matches!(error, GuestError::HostKeyMismatch { .. }), "{error}");
}

#[tokio::test]
async fn a_refused_login_is_permanent() {
    let sshd = Sshd::start();
    let mut target = sshd.target();
    target.identity = Arc::new(generate_ed25519("stranger").unwrap().private().unwrap());
    let started = Instant::now();
    let error = sshd.connect(target).await.unwrap_err();
    assert!(matches!(&error, GuestError::AuthRefused { methods, .. } if methods == "publickey"), "{error}");
    assert!(error.is_permanent());
    shorter_than(started, 5_000, "a refusal");
}

#[tokio::test]
async fn output_status_and_signal_of_a_command() {
    let sshd = Sshd::start();
    let guest = sshd.guest().await;
    let output = guest.exec("printf out; printf err >&2; exit 3", LONG).await.unwrap();
    assert_eq!((output.status, output.signal.as_deref()), (Some(3), None));
    assert_eq!((output.stdout.as_slice(), output.stderr.as_slice()), (&b"out"[..], &b"err"[..]));
    assert!(!output.truncated && !output.success());
    let output = guest.exec("kill -TERM $$", LONG).await.unwrap();
    assert_eq!((output.status, output.signal.as_deref()), (None, Some("TERM")));
    // Standard input is empty, not open.
    assert_eq!(guest.exec("cat; echo end", LONG).await.unwrap().stdout, b"end\n");
    let error = guest.exec_ok("echo why >&2; exit 4", LONG).await.unwrap_err();
    assert_eq!(error.to_string(), "server-1: `echo why >&2; exit 4` exited 4: why");
    assert_eq!(guest.connections(), 1);
}

#[tokio::test]
async fn a_command_that_never_returns_ends_at_its_deadline_and_is_gone_from_the_guest() {
    let sshd = Sshd::start();
    let guest = sshd.guest().await;
    guest.exec("true", LONG).await.unwrap();
    let started = Instant::now();
    let error = guest.exec("echo $$; exec sleep 1000", Duration::from_millis(500)).await.unwrap_err();
    assert!(started.elapsed() >= Duration::from_millis(500));
    // Twice the deadline would be a second.
    shorter_than(started, 950, "the deadline");
    let GuestError::Deadline { partial, limit, .. } = &error else { panic!("{error}") };
    assert_eq!(*limit, Duration::from_millis(500));
    let pid = partial.text().trim().to_owned();
    assert!(!pid.is_empty() && error.to_string().contains(&format!("last output: {pid}")), "{error}");
    eventually("the end of the command", || !std::path::Path::new(&format!("/proc/{pid}")).exists()).await;
    // The connection is none the worse for it.
    assert_eq!(guest.exec("echo on", LONG).await.unwrap().stdout, b"on\n");
    assert_eq!(guest.connections(), 1);
}

#[tokio::test]
async fn a_daemon_left_behind_does_not_hold_the_command() {
    let sshd = Sshd::start();
    let guest = sshd.guest().await;
    let started = Instant::now();
    let output = guest.exec("sleep 30 & echo started; exit 0", LONG).await.unwrap();
    assert_eq!((output.status, output.stdout.as_slice()), (Some(0), &b"started\n"[..]));
    shorter_than(started, 5_000, "the command");
}

#[tokio::test]
async fn megabytes_on_one_line_are_bounded() {
    let sshd = Sshd::start();
    let guest = sshd.guest().await;
    let output = guest.exec("head -c 10000000 /dev/zero | tr '\\0' x", LONG).await.unwrap();
    assert_eq!(output.status, Some(0));
    assert!(output.truncated);
    assert_eq!(output.stdout.len(), exec::OUTPUT_MAX_BYTES);

    let mut lines = guest.stream("head -c 10000000 /dev/zero | tr '\\0' x; echo; echo after").await.unwrap();
    let Some(StreamItem::Line { bytes, cut: true, .. }) = lines.next().await else { panic!("no long line") };
    assert_eq!(bytes.len(), 64 * 1024);
    let after = StreamItem::Line { source: Source::Stdout, bytes: b"after".to_vec(), cut: false };
    assert_eq!(lines.next().await, Some(after));
    assert_eq!(lines.next().await, Some(StreamItem::End(StreamEnd::Exited { status: Some(0), signal: None })));
    assert_eq!(lines.next().await, None);
}

#[tokio::test]
async fn files_with_any_content_and_name() {
    let sshd = Sshd::start();
    let guest = sshd.guest().await;
    let content: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
    for name in ["plain", "with space", "it's $(odd); -rf", "-dash"] {
        let path = sshd.dir.path().join(name).display().to_string();
        guest.write_file(&path, 0o640, &content, LONG).await.unwrap();
        assert_eq!(guest.read_file(&path, LONG).await.unwrap(), content, "{name}");
        let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&path).unwrap().permissions());
        assert_eq!(mode & 0o7777, 0o640);
        guest.write_file(&path, 0o600, b"", LONG).await.unwrap();
        assert_eq!(guest.read_file(&path, LONG).await.unwrap(), b"");
        let said = guest.write_file_then(&path, 0o600, b"new", "echo then", LONG).await;
        assert_eq!(said.unwrap().text(), "then\n");
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        let failed = guest.write_file_then(&path, 0o600, b"newer", "false", LONG).await.unwrap_err();
        assert!(matches!(&failed, GuestError::Failed { status: Some(1), .. }), "{failed}");
    }
    let left: Vec<_> = std::fs::read_dir(sshd.dir.path())
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .filter(|n| n.contains(".tmp"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
    let error = guest.read_file("/does/not/exist", LONG).await.unwrap_err();
    assert!(matches!(&error, GuestError::Failed { status: Some(1), .. }), "{error}");
    assert!(guest.write_file("/does/not/exist", 0o600, b"x", LONG).await.is_err());
}

#[tokio::test]
async fn a_broken_upload_leaves_the_old_file() {
    let sshd = Sshd::start();
    let guest = sshd.guest().await;
    let path = sshd.dir.path().join("f").display().to_string();
    guest.write_file(&path, 0o600, b"old", LONG).await.unwrap();
    let content = vec![b'n'; 200_000_000];
    let upload = tokio::spawn({
        let (guest, path) = (guest.clone(), path.clone());
        async move { guest.write_file(&path, 0o600, &content, LONG).await }
    });
    let growing = || {
        let files = std::fs::read_dir(sshd.dir.path()).unwrap();
        files
            .flatten()
            .any(|e| e.file_name().to_string_lossy().ends_with(".tmp") && e.metadata().is_ok_and(|m| m.len() > 100_000))
    };
    eventually("the upload", growing).await;
    sshd.kill_sessions();
    let error = upload.await.unwrap().unwrap_err();
    assert!(error.is_connection(), "{error}");
    assert_eq!(guest.read_file(&path, LONG).await.unwrap(), b"old");
}

#[tokio::test]
async fn a_lost_connection_ends_the_command_and_is_repaired_by_the_next() {
    let sshd = Sshd::start();
    let guest = sshd.guest().await;
    let running = tokio::spawn({
        let guest = guest.clone();
        async move { guest.exec("sleep 1000", LONG).await }
    });
    eventually("the session", || !sshd.pids().is_empty()).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let killed = Instant::now();
    sshd.kill_sessions();
    let error = running.await.unwrap().unwrap_err();
    assert!(matches!(&error, GuestError::ConnectionLost { during, .. } if during == "under `sleep 1000`"), "{error}");
    shorter_than(killed, 5_000, "noticing");
    assert_eq!(guest.exec("echo again", LONG).await.unwrap().stdout, b"again\n");
    assert_eq!(guest.connections(), 2);

    // Nobody there for a while: the operation waits within its own deadline.
    sshd.set(Door::Refusing);
    sshd.kill_sessions();
    let waiting = tokio::spawn({
        let guest = guest.clone();
        async move { guest.exec("echo third", LONG).await }
    });
    tokio::time::sleep(Duration::from_millis(400)).await;
    sshd.set(Door::Open);
    assert_eq!(waiting.await.unwrap().unwrap().stdout, b"third\n");

    guest.clone().disconnect().await;
    assert!(matches!(guest.exec("true", LONG).await, Err(GuestError::Closed { .. })));
}

#[tokio::test]
async fn a_guest_that_hangs_is_noticed() {
    let sshd = Sshd::start();
    let guest = sshd.guest().await;
    let mut lines = guest.stream("echo first; sleep 1000").await.unwrap();
    assert!(matches!(lines.next().await, Some(StreamItem::Line { .. })));
    for pid in sshd.pids() {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGSTOP).unwrap();
    }
    let started = Instant::now();
    let Ok(item) = tokio::time::timeout(Duration::from_secs(40), lines.next()).await else { panic!("not noticed") };
    assert!(matches!(&item, Some(StreamItem::End(StreamEnd::Lost { .. }))), "{item:?}");
    assert!(started.elapsed() > Duration::from_secs(10), "noticed after {:?}: too eager", started.elapsed());
    assert_eq!(guest.exec("echo back", LONG).await.unwrap().stdout, b"back\n");
}

#[tokio::test]
async fn more_commands_at_once_than_the_server_has_sessions() {
    let sshd = Sshd::start();
    let guest = sshd.guest().await;
    let all = (0..30).map(|n| {
        let guest = guest.clone();
        async move { guest.exec_ok(&format!("sleep 0.05; echo {n}"), LONG).await.unwrap().text() }
    });
    let found = futures::future::join_all(all).await;
    assert_eq!(found, (0..30).map(|n| format!("{n}\n")).collect::<Vec<_>>());
    assert_eq!(guest.connections(), 1);
}

#[tokio::test]
async fn abandoned_commands_leave_no_sessions_behind() {
    let sshd = Sshd::start();
    let guest = sshd.guest().await;
    for n in 0..40_u64 {
        let wait = Duration::from_millis(n % 8 * 2);
        let _ = tokio::time::timeout(wait, guest.exec("sleep 1000", LONG)).await;
    }
    assert_eq!(guest.exec("echo on", LONG).await.unwrap().stdout, b"on\n");
    assert_eq!(guest.connections(), 1);
}

#[tokio::test]
async fn a_slow_reader_loses_lines_and_holds_up_nobody() {
    let sshd = Sshd::start();
    let guest = sshd.guest().await;
    let mut lines = guest.stream("seq 1 200000").await.unwrap();
    let started = Instant::now();
    assert_eq!(guest.exec("echo free", LONG).await.unwrap().stdout, b"free\n");
    shorter_than(started, 5_000, "another command");
    tokio::time::sleep(Duration::from_millis(500)).await;
    let (mut read, mut skipped, mut ended) = (0_u64, 0, false);
    while let Some(item) = lines.next().await {
        match item {
            StreamItem::Line { .. } => read += 1,
            StreamItem::Skipped(n) => skipped += n,
            StreamItem::End(end) => {
                assert_eq!(end, StreamEnd::Exited { status: Some(0), signal: None });
                ended = true;
            }
        }
    }
    assert!(ended && skipped > 0, "read {read}, skipped {skipped}");
    assert_eq!(read + skipped, 200_000);
}

/// Answers every connection with one HTTP response.
async fn http_server() -> u16 {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut request = [0; 1024];
                let _ = stream.read(&mut request).await;
                let _ =
                    stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\nconnection: close\r\n\r\nhello").await;
            });
        }
    });
    port
}

async fn ask(stream: &mut (impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin)) -> String {
    stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer).await;
    answer
}

#[tokio::test]
async fn a_few_small_files_are_read_in_one_go() {
    let sshd = Sshd::start();
    let guest = sshd.guest().await;
    let path = |name: &str| format!("{}/{name}", sshd.dir.path().display());
    let long = "x".repeat(40_000);
    std::fs::write(path("a b"), "one\n  two \\n%s\n").unwrap();
    std::fs::write(path("empty"), "").unwrap();
    std::fs::write(path("cut"), &long).unwrap();
    let texts = guest.read_texts(&["a b", "empty", "cut"].map(path), LONG).await.unwrap();
    assert_eq!(texts, ["one\n  two \\n%s\n".to_owned(), String::new(), format!("{long}\n")]);
    let error = guest.read_texts(&["a b", "missing"].map(path), LONG).await.unwrap_err();
    assert!(error.to_string().contains("missing"), "{error}");
}

#[tokio::test]
async fn a_tcp_connection_through_the_guest() {
    let sshd = Sshd::start();
    let guest = sshd.guest().await;
    let port = http_server().await;
    let mut stream = guest.direct_tcpip("127.0.0.1", port).await.unwrap();
    assert!(ask(&mut stream).await.ends_with("hello"));
    let error = guest.direct_tcpip("127.0.0.1", 1).await.err().unwrap();
    assert!(
        matches!(&error, GuestError::ChannelRefused { reason, .. } if reason == "it could not connect: Connection refused"),
        "{error}"
    );
    guest.tcp_answered("127.0.0.1", port).await.unwrap();
    guest.tcp_answered("127.0.0.1", 1).await.unwrap();
    // TCP to the broadcast address fails in the kernel, without a packet; sshd has no words of the system for that.
    let error = guest.tcp_answered("255.255.255.255", 1).await.unwrap_err();
    assert!(error.to_string().ends_with("it could not connect: open failed"), "{error}");
}

/// Whoever gives up leaves no words behind for the next one.
#[tokio::test]
async fn a_refusal_nobody_waited_for_is_not_taken_for_another() {
    let sshd = Sshd::start();
    let guest = sshd.guest().await;
    for _ in 0..5 {
        // Asked for, and dropped before the answer can be there.
        assert!(guest.tcp_answered("127.0.0.1", 1).now_or_never().is_none());
        let error = guest.tcp_answered("255.255.255.255", 1).await.unwrap_err();
        assert!(!error.is_tcp_refusal(), "{error}");
    }
}

#[tokio::test]
async fn a_forwarded_port_outlives_the_connection_and_ends_when_dropped() {
    let sshd = Sshd::start();
    let guest = sshd.guest().await;
    let port = http_server().await;
    let forward = Forward::open(guest.clone(), "127.0.0.1", port).await.unwrap();
    let local = forward.local_addr();
    assert!(local.ip().is_loopback());
    for _ in 0..50 {
        let mut stream = tokio::net::TcpStream::connect(local).await.unwrap();
        assert!(ask(&mut stream).await.ends_with("hello"));
    }
    sshd.kill_sessions();
    let mut stream = tokio::net::TcpStream::connect(local).await.unwrap();
    assert!(ask(&mut stream).await.ends_with("hello"));
    assert_eq!(guest.connections(), 2);
    forward.close().await;
    assert!(tokio::net::TcpStream::connect(local).await.is_err());

    // A port that nobody listens on in the guest: the connection is closed, not held.
    let forward = Forward::open(guest, "127.0.0.1", 1).await.unwrap();
    let mut stream = tokio::net::TcpStream::connect(forward.local_addr()).await.unwrap();
    let mut answer = Vec::new();
    let ended = tokio::time::timeout(LONG, stream.read_to_end(&mut answer)).await.unwrap();
    assert!(ended.map_or(true, |n| n == 0));
}

/// A journalctl that shows the lines of a file, from a cursor on, and follows it.
fn fake_journalctl(sshd: &Sshd) -> (String, std::path::PathBuf) {
    let file = sshd.dir.path().join("journal.ndjson");
    let program = sshd.dir.path().join("journalctl");
    let script = format!(
        "#!/bin/sh\nfrom=1\nfor a in \"$@\"; do case $a in --after-cursor=*i=*) from=$((${{a##*i=}} + 1));; esac; done\n\
         exec tail -n +$from -f {}\n",
        file.display()
    );
    std::fs::write(&file, "").unwrap();
    std::fs::write(&program, script).unwrap();
    let mut mode = std::fs::metadata(&program).unwrap().permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut mode, 0o755);
    std::fs::set_permissions(&program, mode).unwrap();
    (program.display().to_string(), file)
}

fn append(file: &std::path::Path, numbers: std::ops::RangeInclusive<u32>) {
    use std::io::Write;
    let mut file = std::fs::OpenOptions::new().append(true).open(file).unwrap();
    let text: String = numbers
        .map(|n| format!("{{\"__CURSOR\":\"s=a;i={n}\",\"__REALTIME_TIMESTAMP\":\"{n}\",\"MESSAGE\":\"m{n}\"}}\n"))
        .collect();
    file.write_all(text.as_bytes()).unwrap();
}

async fn expect(journal: &mut Journal, numbers: std::ops::RangeInclusive<u32>) {
    for n in numbers {
        let entry = tokio::time::timeout(LONG, journal.next()).await.expect("an entry in time").unwrap();
        assert_eq!(entry.message, format!("m{n}"));
    }
}

#[tokio::test]
async fn the_journal_loses_and_repeats_nothing_when_connections_break() {
    let sshd = Sshd::start();
    let guest = sshd.guest().await;
    let (program, file) = fake_journalctl(&sshd);
    append(&file, 1..=500);
    let mut journal = Journal::follow_with(guest, &program, 64);
    expect(&mut journal, 1..=300).await;
    sshd.kill_sessions();
    append(&file, 501..=700);
    expect(&mut journal, 301..=700).await;
    sshd.set(Door::Refusing);
    sshd.kill_sessions();
    append(&file, 701..=800);
    tokio::time::sleep(Duration::from_millis(300)).await;
    sshd.set(Door::Open);
    expect(&mut journal, 701..=800).await;
    append(&file, 801..=801);
    expect(&mut journal, 801..=801).await;
    assert!(journal.opened() >= 3, "opened {}", journal.opened());
    assert_eq!(journal.malformed(), 0);
}

#[tokio::test]
async fn a_slow_reader_of_the_journal_loses_nothing_and_holds_up_nobody() {
    let sshd = Sshd::start();
    let guest = sshd.guest().await;
    let (program, file) = fake_journalctl(&sshd);
    append(&file, 1..=20_000);
    let mut journal = Journal::follow_with(guest.clone(), &program, 32);
    tokio::time::sleep(Duration::from_millis(600)).await;
    let started = Instant::now();
    assert_eq!(guest.exec("echo free", LONG).await.unwrap().stdout, b"free\n");
    shorter_than(started, 2_000, "another command");
    expect(&mut journal, 1..=20_000).await;
    assert!(journal.try_next().is_none());
    assert!(journal.opened() >= 2, "opened {}", journal.opened());
}

#[tokio::test]
async fn lines_that_are_no_entries_are_counted_and_left_out() {
    let sshd = Sshd::start();
    let guest = sshd.guest().await;
    let (program, file) = fake_journalctl(&sshd);
    std::fs::write(&file, b"\xff\xfe garbage\n{\"half\":\n\x1b[31mred\n").unwrap();
    append(&file, 4..=5);
    let mut journal = Journal::follow_with(guest, &program, 32);
    expect(&mut journal, 4..=5).await;
    assert_eq!(journal.malformed(), 3);
}

/// Everything that is awaited can be awaited in a spawned task.
#[expect(dead_code, reason = "checked by the compiler")]
fn futures_are_send(guest: &Guest, lines: &mut LineStream, journal: &mut Journal, target: fn() -> SshTarget) {
    fn send<F: Future + Send>(_: F) {}
    send(Guest::connect_once(target(), LONG));
    send(Guest::connect(target(), LONG));
    send(guest.exec("", LONG));
    send(guest.exec_ok("", LONG));
    send(guest.read_file("", LONG));
    send(guest.write_file("", 0, b"", LONG));
    send(guest.stream(""));
    send(guest.direct_tcpip("", 0));
    send(Forward::open(guest.clone(), "", 0));
    send(guest.clone().disconnect());
    send(lines.next());
    send(journal.next());
}
