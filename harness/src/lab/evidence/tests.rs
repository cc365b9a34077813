use std::time::Duration;

use super::testing::Bench;
use super::*;
use crate::guest::testing::{Door, Sshd};
use crate::guest::{Guest, generate_ed25519};

fn read(bench: &Bench, name: &str) -> String {
    std::fs::read_to_string(bench.record.path().join(name)).unwrap_or_default()
}

#[tokio::test]
async fn a_burst_of_events_is_bounded_in_the_folder_and_counted() {
    let bench = Bench::new();
    let recorder = bench.pump.recorder();
    let stream = Stream::qmp("server-1");
    for n in 0..1000 {
        recorder.note(&stream, "BLOCK_IO_ERROR", &format!("QMP BLOCK_IO_ERROR {{\"n\":{n}}}"));
    }
    recorder.note(&stream, "RESET", "QMP RESET {}");
    recorder.note(&Stream::vde(), "end", "switch a: vde_switch killed by signal 9\nwhat it said");
    let record = bench.record.clone();
    let (classifier, ..) = bench.pump.finish().await;
    let lines = std::fs::read_to_string(record.path().join("nodes/server-1/qmp.log")).unwrap();
    assert_eq!(lines.lines().count(), 12, "{lines}");
    assert!(lines.contains("BLOCK_IO_ERROR: 990 more since "), "{lines}");
    assert!(lines.contains("Z QMP RESET {}"), "{lines}");
    assert_eq!(std::fs::read_to_string(record.path().join("vde.log")).unwrap().lines().count(), 2);
    assert!(classifier.observed() >= 14);
}

#[tokio::test]
async fn refused_lost_and_made_again_connections_are_in_the_folder_with_counts() {
    let bench = Bench::new();
    let sshd = Sshd::start_with(generate_ed25519("host").unwrap(), Door::Refusing);
    let mut target = sshd.target();
    target.news = bench.pump.recorder().ssh_news("server-1");
    let connecting = tokio::spawn(Guest::connect(target, Duration::from_secs(30)));
    while sshd.accepted() < 20 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    sshd.set(Door::Open);
    let guest = connecting.await.unwrap().unwrap();
    let first = read(&bench, "nodes/server-1/ssh.log");
    assert_eq!(first.lines().count(), 2, "{first}");
    let count: u64 = first.split(' ').nth(1).unwrap().parse().unwrap();
    assert!(count >= 19, "{first}");
    assert!(first.contains("(ended-before-banner)") && first.contains("connected after"), "{first}");
    sshd.kill_sessions();
    // The end is seen by the next operation, if not before it.
    while guest.exec("true", Duration::from_secs(10)).await.is_err() {}
    let all = read(&bench, "nodes/server-1/ssh.log");
    assert!(all.contains(" connection lost: "), "{all}");
    assert_eq!(all.matches("connected after").count(), 2, "{all}");
    // None of it names a failure mode: this is how every guest boots.
    assert!(bench.guard.alarm().is_none());
    let (classifier, ..) = bench.pump.finish().await;
    let passed = verdict::Context { health: verdict::Health::Failed, ..verdict::Context::default() };
    let verdict = classifier.conclude(&passed);
    assert_eq!((verdict.id, verdict.look_alike), (None, None));
}

#[tokio::test]
async fn a_console_that_cannot_be_read_warns_once_and_what_qemu_says_last_is_read() {
    let mut bench = Bench::new();
    let console = bench.record.path().join("no-such-folder/console.log");
    let stderr = bench.record.path().join("qemu.log");
    std::fs::write(&stderr, "").unwrap();
    bench.pump.follow_console("server-1".to_owned(), console, "mark");
    bench.pump.follow_qemu("server-1".to_owned(), stderr.clone());
    tokio::time::sleep(Duration::from_millis(350)).await;
    let warnings = bench.warnings();
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(warnings[0].contains("what console says cannot be read"), "{warnings:?}");
    std::fs::write(&stderr, "qemu-system-x86_64: failed to initialize kvm: Permission denied\n").unwrap();
    let (classifier, ..) = bench.pump.finish().await;
    let failed = verdict::Context { health: verdict::Health::Failed, ..verdict::Context::default() };
    assert_eq!(classifier.conclude(&failed).look_alike.map(|known| known.id), Some("QEMU-FAILED".to_owned()));
}

#[tokio::test]
async fn a_recorder_outlives_the_verdict() {
    let bench = Bench::new();
    let recorder = bench.pump.recorder();
    let record = bench.record.clone();
    let _ = bench.pump.finish().await;
    recorder.note(&Stream::qmp("server-1"), "SHUTDOWN", "QMP SHUTDOWN {}");
    let lines = std::fs::read_to_string(record.path().join("nodes/server-1/qmp.log")).unwrap();
    assert!(lines.contains("QMP SHUTDOWN"), "{lines}");
}

/// The next measurement of a clock, within `limit`.
async fn measured(bench: &mut Bench, limit: Duration) -> Option<()> {
    let next = async {
        loop {
            if matches!(bench.events.recv().await?.event, EventKind::ClockMeasured { .. }) {
                return Some(());
            }
        }
    };
    tokio::time::timeout(limit, next).await.ok()?
}

#[tokio::test]
async fn a_measurement_asked_for_too_soon_is_put_off_and_the_last_one_is_made_at_once() {
    let mut bench = Bench::new();
    let sshd = Sshd::start();
    bench.pump.follow_journal(sshd.guest().await, bench.record.path().join("journal.log"), std::future::ready(()));
    // Nothing else brings a measurement about; the last one has to come before the pause is over.
    let (soon, at_last) = (Duration::from_millis(300), clock::PAUSE - Duration::from_millis(500));
    measured(&mut bench, Duration::from_secs(20)).await.expect("the guest's clock is measured as soon as it answers");
    let recorder = bench.pump.recorder();
    recorder.measure_clocks();
    recorder.measure_clocks();
    assert_eq!(measured(&mut bench, soon).await, None, "it was just measured");
    tokio::time::pause();
    tokio::time::advance(clock::PAUSE).await;
    tokio::time::resume();
    measured(&mut bench, Duration::from_secs(20)).await.expect("what was asked for is forgotten");
    assert_eq!(measured(&mut bench, soon).await, None, "asked for twice, owed once");
    recorder.measure_clocks_last();
    measured(&mut bench, at_last).await.expect("the run is over before the pause is");
}
