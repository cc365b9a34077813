//! Ownership of processes.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails there and then")]

use std::time::{Duration, Instant};

use kvm::{CommandSpec, Error, ExitInfo, Process, Sink, Stdin, Supervisor};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, BufReader};

const GRACE: Duration = Duration::from_secs(5);

fn sh(name: &str, script: &str) -> CommandSpec {
    CommandSpec::new(name, "sh").args(["-c", script])
}

/// Waits until the process has printed `ready`.
async fn ready(process: &Process) {
    tokio::time::timeout(GRACE, async {
        while !process.stdout_tail().contains("ready") {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap();
}

fn alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // A zombie that init has not fetched yet is dead.
    stat.rsplit(')').next().is_some_and(|rest| !rest.trim_start().starts_with('Z') && !rest.is_empty())
}

async fn gone_within(pid: u32, limit: Duration) -> bool {
    let begin = Instant::now();
    while alive(pid) && begin.elapsed() < limit {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    !alive(pid)
}

#[tokio::test]
async fn exits_come_with_status_signal_and_output() {
    let sup = Supervisor::new().unwrap();
    let process = sup.spawn(sh("fails", "echo out; echo why >&2; exit 3")).await.unwrap();
    assert_eq!(process.exited().await, ExitInfo { code: Some(3), signal: None });
    assert_eq!((process.stdout_tail().as_str(), process.stderr_tail().as_str()), ("out\n", "why\n"));
    assert_eq!(process.try_exited().unwrap().to_string(), "exited 3");
    let process = sup.spawn(sh("killed", "kill -9 $$")).await.unwrap();
    assert_eq!(process.exited().await.to_string(), "killed by signal 9");
    assert!(sup.running().is_empty());
}

#[tokio::test]
async fn a_missing_program_is_named() {
    let error = Supervisor::new().unwrap().spawn(CommandSpec::new("n", "no-such-program-here")).await.unwrap_err();
    assert!(matches!(&error, Error::ProgramNotFound { program } if program == "no-such-program-here"), "{error}");
}

#[tokio::test]
async fn outputs_are_drained_and_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let log = camino::Utf8PathBuf::from_path_buf(dir.path().join("log")).unwrap();
    let sup = Supervisor::new().unwrap();
    // Far more than a pipe holds: undrained, it would never end.
    let mut spec = sh("loud", "yes line | head -c 4000000; echo; echo last");
    spec.stdout = Sink::FileAndTail { path: log.clone(), file_max_bytes: 1000, tail_bytes: 100 };
    let process = sup.spawn(spec).await.unwrap();
    assert!(process.exited().await.success());
    assert!(process.stdout_tail().ends_with("line\n\nlast\n") && process.stdout_tail().len() <= 100);
    assert!(std::fs::metadata(&log).unwrap().len() < 1100);
}

#[tokio::test]
async fn term_then_kill_to_the_whole_group() {
    let sup = Supervisor::new().unwrap();
    let polite = sup.spawn(sh("polite", "trap 'exit 7' TERM; echo ready; while :; do sleep 0.05; done")).await.unwrap();
    ready(&polite).await;
    assert_eq!(polite.terminate(GRACE).await.unwrap().code, Some(7));

    // Deaf to SIGTERM, with a child of its own that would outlive it.
    let deaf = sup
        .spawn(sh("deaf", "trap '' TERM; sleep 1000 & echo child $!; echo ready; while :; do sleep 0.05; done"))
        .await
        .unwrap();
    ready(&deaf).await;
    let grandchild: u32 = deaf.stdout_tail().lines().find_map(|l| l.strip_prefix("child ")).unwrap().parse().unwrap();
    assert!(alive(grandchild));
    assert_eq!(deaf.terminate(Duration::from_millis(100)).await.unwrap().signal, Some(9));
    assert!(gone_within(grandchild, GRACE).await);

    // A stopped process still ends by SIGTERM.
    let stopped = sup.spawn(CommandSpec::new("stopped", "sleep").args(["1000"])).await.unwrap();
    kill(Pid::from_raw(stopped.pid() as i32), Signal::SIGSTOP).unwrap();
    assert_eq!(stopped.terminate(GRACE).await.unwrap().signal, Some(15));
}

#[tokio::test]
async fn shutdown_ends_all_and_starts_none_any_more() {
    let sup = Supervisor::new().unwrap();
    let mut all = Vec::new();
    for n in 0..5 {
        all.push(sup.spawn(CommandSpec::new(format!("s{n}"), "sleep").args(["1000"])).await.unwrap());
    }
    assert_eq!(sup.running().len(), 5);
    assert!(sup.shutdown(GRACE).await.is_empty());
    assert!(all.iter().all(|process| process.try_exited().is_some()));
    assert!(matches!(sup.spawn(sh("late", ":")).await, Err(Error::ShuttingDown { .. })));
}

#[tokio::test]
async fn dropping_the_owner_ends_the_child_and_kill_all_now_ends_all() {
    let sup = Supervisor::new().unwrap();
    let dropped = sup.spawn(CommandSpec::new("dropped", "sleep").args(["1000"])).await.unwrap().pid();
    assert!(gone_within(dropped, GRACE).await);
    let kept = sup.spawn(CommandSpec::new("kept", "sleep").args(["1000"])).await.unwrap();
    sup.kill_all_now();
    assert_eq!(kept.exited().await.signal, Some(9));
}

#[tokio::test]
async fn a_cancelled_spawn_leaves_nothing() {
    let sup = Supervisor::new().unwrap();
    for n in 0..30u64 {
        let spawn = sup.spawn(CommandSpec::new("cancelled", "sleep").args(["1000"]));
        let _ = tokio::time::timeout(Duration::from_micros(n * 40), spawn).await;
    }
    tokio::time::timeout(GRACE, async {
        // One more start through the same thread: all before it have been served by then.
        assert!(sup.spawn(sh("marker", ":")).await.unwrap().exited().await.success());
        while !sup.running().is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap_or_else(|_| panic!("left: {:?}", sup.running()));
}

#[tokio::test]
async fn a_held_open_input_has_no_end_while_the_child_runs() {
    let sup = Supervisor::new().unwrap();
    let mut spec = CommandSpec::new("cat", "cat");
    spec.stdin = Stdin::HeldOpen;
    let cat = sup.spawn(spec).await.unwrap();
    assert!(tokio::time::timeout(Duration::from_millis(100), cat.exited()).await.is_err());
    assert_eq!(cat.terminate(GRACE).await.unwrap().signal, Some(15));
    assert!(sup.spawn(CommandSpec::new("cat", "cat")).await.unwrap().exited().await.success());
}

/// The owner is killed with SIGKILL: the kernel ends its children, though they hold no pipe to it and ignore SIGTERM.
#[tokio::test]
async fn children_are_gone_two_seconds_after_their_owner_was_killed() {
    let mut owner = tokio::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "owner_role", "--ignored", "--nocapture"])
        .env("KVM_TEST_OWNER", "1")
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(owner.stdout.take().unwrap()).lines();
    let mut pids: Vec<u32> = Vec::new();
    while let Some(line) = tokio::time::timeout(GRACE, lines.next_line()).await.unwrap().unwrap() {
        if line == "ready" {
            break;
        }
        pids.extend(line.strip_prefix("pid ").map(|pid| pid.parse::<u32>().unwrap()));
    }
    assert_eq!(pids.len(), 3);
    assert!(pids.iter().all(|&pid| alive(pid)), "{pids:?}");
    let begin = Instant::now();
    kill(Pid::from_raw(owner.id().unwrap() as i32), Signal::SIGKILL).unwrap();
    for pid in pids {
        let left = Duration::from_secs(2).saturating_sub(begin.elapsed());
        assert!(gone_within(pid, left).await, "{pid} outlived its owner");
        let fate = kill(Pid::from_raw(pid as i32), None);
        assert!(fate == Err(Errno::ESRCH) || !alive(pid));
    }
}

/// The owner of the test above: this very program, started by it.
#[test]
#[ignore = "a role that another test starts in a process of its own"]
fn owner_role() {
    if std::env::var_os("KVM_TEST_OWNER").is_none() {
        return;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let sup = Supervisor::new().unwrap();
        let mut children = vec![sup.spawn(CommandSpec::new("sleep", "sleep").args(["1000"])).await.unwrap()];
        let mut deaf = sh("deaf", "trap '' TERM HUP PIPE; echo ready; while :; do sleep 0.05; done");
        deaf.stdin = Stdin::HeldOpen;
        children.push(sup.spawn(deaf).await.unwrap());
        ready(&children[1]).await;
        // From a worker thread that retires: the child must not go with it, only with the process.
        let from_blocking = sup.clone();
        let handle = tokio::runtime::Handle::current();
        let late = std::thread::spawn(move || {
            handle.block_on(from_blocking.spawn(CommandSpec::new("sleep", "sleep").args(["1000"])))
        })
        .join()
        .unwrap();
        children.push(late.unwrap());
        for child in &children {
            println!("pid {}", child.pid());
        }
        println!("ready");
        std::future::pending::<()>().await;
    });
}
