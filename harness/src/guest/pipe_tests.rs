//! Streams joined to a command, over a real sshd on loopback.

use std::time::Duration;

use super::testing::Sshd;
use super::{Guest, GuestError, StreamEnd};

async fn guest(sshd: &Sshd) -> Guest {
    Guest::connect_once(sshd.target(), Duration::from_secs(20)).await.unwrap()
}

#[tokio::test]
async fn megabytes_go_through_unchanged_and_the_status_is_the_commands() {
    let sshd = Sshd::start();
    let guest = guest(&sshd).await;
    let bytes: Vec<u8> = (0..2_000_000_u32).flat_map(u32::to_le_bytes).collect();
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let command = "cat; echo said >&2; exit 7";
    let end =
        guest.pipe(command, Some(bytes.as_slice()), &mut out, &mut err, std::future::pending()).await.unwrap().unwrap();
    assert_eq!(end, StreamEnd::Exited { status: Some(7), signal: None });
    assert!(out == bytes, "{} bytes came back", out.len());
    assert_eq!(err, b"said\n");
}

#[tokio::test]
async fn what_is_stopped_is_dead_when_it_returns() {
    let sshd = Sshd::start();
    let guest = guest(&sshd).await;
    let (mut tx, rx) = tokio::io::duplex(64);
    let mut err = Vec::new();
    // Stopped by its own first output: it surely runs then.
    let started = async {
        let mut lines = tokio::io::BufReader::new(rx);
        let mut pid = String::new();
        tokio::io::AsyncBufReadExt::read_line(&mut lines, &mut pid).await.unwrap();
        pid
    };
    let (told, when_told) = tokio::sync::oneshot::channel::<()>();
    let stop = async {
        let _ = when_told.await;
    };
    let piped = guest.pipe("echo $$; exec sleep 1000", None::<tokio::io::Empty>, &mut tx, &mut err, stop);
    let (ended, pid) = tokio::join!(piped, async {
        let pid = started.await;
        told.send(()).unwrap();
        pid
    });
    assert_eq!(ended.unwrap(), None);
    // Killed when it returns; its parent, sshd, takes notice in its own time.
    let stat = format!("/proc/{}/stat", pid.trim());
    let until = std::time::Instant::now() + Duration::from_secs(2);
    while std::fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z ")) {
        assert!(std::time::Instant::now() < until, "{stat} is left");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_reader_that_goes_away_ends_the_command() {
    let sshd = Sshd::start();
    let guest = guest(&sshd).await;
    let (mut tx, rx) = tokio::io::duplex(64);
    drop(rx);
    let mut err = Vec::new();
    let ended =
        guest.pipe("exec yes", None::<tokio::io::Empty>, &mut tx, &mut err, std::future::pending()).await.unwrap_err();
    let GuestError::Local { source, .. } = ended else { panic!("{ended}") };
    assert_eq!(source.kind(), std::io::ErrorKind::BrokenPipe);
}
