//! A host that lacks something: disk space in each phase, a writable folder, memory; and outputs nobody reads.
//!
//! Small and read-only file systems are mounted in a mount namespace of the harness's own (`unshare`), which goes with it.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::lab::{Bench, Started};

/// From the cause to the end of the run.
const SOON: Duration = Duration::from_secs(20);

/// `harness …` with its state folder on a file system of its own, made by `mount`'s arguments.
fn harness_on(bench: &Bench, mount: &str, args: &[&str]) -> Command {
    let harness = bench.harness(args);
    let state = bench.path().join("state");
    std::fs::create_dir_all(&state).unwrap();
    let flags = if nix::unistd::geteuid().is_root() { "-m" } else { "-Urm" };
    let mut command = Command::new("unshare");
    command
        .args([flags, "sh", "-ec", &format!("mount {mount} \"$HARNESS_STATE_DIR\"; exec \"$@\""), "sh"])
        .arg(harness.get_program())
        .args(harness.get_args())
        .current_dir(bench.path())
        .stdin(Stdio::null());
    for (name, value) in harness.get_envs() {
        command.env(name, value.unwrap());
    }
    command
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

const RUN: [&str; 6] = ["run", "smoke", "--k3s", "standin", "--format", "plain"];

#[test]
fn a_state_folder_that_takes_nothing_is_refused_with_its_name_and_a_way_out() {
    let bench = Bench::new();
    let state = bench.path().join("state").display().to_string();
    for (mount, cause) in [
        ("-t tmpfs -o size=4k,nr_inodes=2 tmpfs", "No space left on device"),
        ("-t tmpfs -o ro tmpfs", "Read-only file system"),
    ] {
        let output = harness_on(&bench, mount, &RUN).output().unwrap();
        let said = text(&output);
        assert_eq!(output.status.code(), Some(3), "{said}");
        assert!(said.contains(cause) && said.contains(&state) && said.contains("--state-dir"), "{said}");
        assert!(!said.contains("panicked"), "{said}");
    }
}

#[test]
fn a_disk_with_too_little_space_is_refused_before_anything_starts() {
    let bench = Bench::new();
    let output = harness_on(&bench, "-t tmpfs -o size=900m tmpfs", &RUN).output().unwrap();
    let said = text(&output);
    assert_eq!(output.status.code(), Some(3), "{said}");
    assert!(
        said.contains("no space left for the lab: 899 MiB are free in ") || said.contains("900 MiB are free in "),
        "{said}"
    );
    assert!(said.contains("a node may need 1024 MiB") && said.contains("make room"), "{said}");
    assert!(!said.contains("boot "), "{said}");

    // The store: nothing is built into a folder where it will not fit.
    let cache = bench.path().join("cache");
    std::fs::create_dir_all(&cache).unwrap();
    let mut command = harness_on(&bench, "-t tmpfs -o size=100m tmpfs", &["image", "build", "--k3s", "standin"]);
    command.env("HARNESS_CACHE_DIR", bench.path().join("state"));
    let output = command.output().unwrap();
    let said = text(&output);
    assert_eq!(output.status.code(), Some(3), "{said}");
    assert!(said.contains("no space left for it: ") && said.contains("MiB are needed"), "{said}");
}

/// The state folder of a running harness, as it sees it. It can be read until it is dropped, and the run may have ended.
struct Inside {
    _dir: std::fs::File,
    path: PathBuf,
}

impl Inside {
    fn of(run: &Started, bench: &Bench) -> Self {
        use std::os::fd::AsRawFd as _;
        let state = bench.path().join("state");
        let seen =
            Path::new("/proc").join(run.child.id().to_string()).join("root").join(state.strip_prefix("/").unwrap());
        let dir = std::fs::File::open(seen).unwrap();
        let path = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd()));
        Self { _dir: dir, path }
    }

    /// Takes all the space there is, in ever smaller pieces: others write meanwhile.
    fn fill(&self) {
        let file = std::fs::File::create(self.path.join("filler")).unwrap();
        let (mut taken, mut piece) = (0, 1 << 30);
        while piece >= 4096 {
            match nix::fcntl::posix_fallocate(&file, taken, piece) {
                Ok(()) => taken += piece,
                Err(_) => piece /= 2,
            }
        }
    }

    fn run_dir(&self) -> PathBuf {
        std::fs::read_dir(self.path.join("runs")).unwrap().map(|entry| entry.unwrap().path()).next().unwrap()
    }
}

#[test]
fn a_disk_that_fills_up_under_a_run_ends_it_with_the_figures() {
    // Before the disks are laid, while QEMU writes its first records, and while a guest writes to its disk.
    for (phase, later) in [("image", false), ("boot", false), ("primary", true)] {
        let bench = Bench::new();
        let args = ["run", "smoke", "--k3s", "standin", "--format", "json"];
        let mut run = Started::new(harness_on(&bench, "-t tmpfs -o size=1200m tmpfs", &args));
        run.wait_for_phase(phase);
        let inside = Inside::of(&run, &bench);
        inside.fill();
        let began = Instant::now();
        let (code, events) = run.finish();
        assert_eq!(code, Some(3), "{phase}: {events:#?}");
        assert!(began.elapsed() < Duration::from_secs(40), "{phase}: {:?}", began.elapsed());
        assert_eq!(bench.processes(), Vec::<String>::new());
        let dir = inside.run_dir();
        // What the lab took is free again by then.
        let verdict: Value = serde_json::from_slice(&std::fs::read(dir.join("verdict.json")).unwrap()).unwrap();
        let failure = verdict["failure"].to_string();
        assert!(failure.contains("No space left on device"), "{phase}: {failure}");
        assert!(failure.contains(" MiB are free in ") && failure.contains("may need 1024 MiB"), "{phase}: {failure}");
        assert!(failure.contains("make room"), "{phase}: {failure}");
        if later {
            assert!(failure.contains("BLOCK_IO_ERROR"), "{phase}: {failure}");
        }
        let recorded = std::fs::read_to_string(dir.join("events.ndjson")).unwrap();
        assert!(recorded.lines().all(|line| serde_json::from_str::<Value>(line).is_ok()), "{recorded}");
        assert!(recorded.lines().last().unwrap().contains("run-finished"), "{phase}: {recorded}");
        assert_eq!(std::fs::read_dir(inside.path.join("labs")).unwrap().count(), 0, "{phase}");
        println!("{phase}: ended after {:.1} s: {failure}", began.elapsed().as_secs_f64());
    }
}

#[test]
fn no_memory_for_the_second_vm_is_told_by_qemus_words() {
    let bench = Bench::new();
    bench.write(
        "large.yaml",
        "name: large\ndescription: a second VM that does not fit\nprofile: simple\nnodes:\n\
         \x20 - {name: server-1, role: server, memory_mib: 512}\n  - {name: server-2, role: server, memory_mib: 16384}\n",
    );
    let mut command = Command::new("prlimit");
    let harness =
        bench.harness(&["run", "./large.yaml", "--k3s", "standin", "--format", "plain", "--wait-for-host", "0s"]);
    // Of each process: room for the first VM, and by far not for the second.
    command.arg("--as=8589934592").arg(harness.get_program()).args(harness.get_args()).current_dir(bench.path());
    for (name, value) in harness.get_envs() {
        command.env(name, value.unwrap());
    }
    let output = command.stdin(Stdio::null()).output().unwrap();
    let said = text(&output);
    assert_eq!(output.status.code(), Some(3), "{said}");
    assert!(said.contains("on server-2: starting the VM of server-2"), "{said}");
    assert!(said.contains("Cannot allocate memory"), "{said}");
    bench.assert_clean();
    assert_eq!(bench.verdict()["exit_code"], 3);
}

/// `harness run … | head -1`, a pipe nobody reads, and no standard error: the run goes on to its own end.
#[test]
fn outputs_nobody_reads_change_neither_the_end_nor_the_exit_code() {
    for (name, stdout_open, stderr_open) in
        [("head", true, true), ("no stderr", true, false), ("neither", false, false)]
    {
        let bench = Bench::new();
        let harness = bench.harness(&RUN);
        let redirect = match (stdout_open, stderr_open) {
            (true, true) => "exec \"$@\"",
            (true, false) => "exec \"$@\" 2>&-",
            (false, _) => "exec \"$@\" >&- 2>&-",
        };
        let mut command = Command::new("sh");
        command.args(["-c", redirect, "sh"]).arg(harness.get_program()).args(harness.get_args());
        command.current_dir(bench.path()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        for (name, value) in harness.get_envs() {
            command.env(name, value.unwrap());
        }
        let mut child = command.spawn().unwrap();
        if stdout_open {
            let mut line = String::new();
            BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
            assert!(line.contains("run "), "{line}");
        }
        booting(&bench);
        bench.kill_one("qemu-system-x86_64");
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(3), "{name}: {}", text(&output));
        assert!(!text(&output).contains("panicked"), "{name}: {}", text(&output));
        bench.assert_clean();
        assert!(bench.verdict().to_string().contains("QEMU killed by signal 9"), "{name}");
    }
}

/// A pipe that is full and never read: the run ends all the same, and within the time it gives its readers.
#[test]
fn a_blocked_pipe_holds_up_neither_the_run_nor_its_end() {
    let bench = Bench::new();
    let (reader, writer) = nix::unistd::pipe().unwrap();
    // Full, but for what a pipe keeps for itself.
    nix::fcntl::fcntl(&writer, nix::fcntl::FcntlArg::F_SETPIPE_SZ(4096)).unwrap();
    let mut full = std::fs::File::from(writer.try_clone().unwrap());
    std::io::Write::write_all(&mut full, &[b'x'; 4096]).unwrap();
    drop(full);
    let mut child = bench.harness(&RUN).stdout(writer).stderr(Stdio::null()).spawn().unwrap();
    booting(&bench);
    bench.kill_one("qemu-system-x86_64");
    let died = Instant::now();
    let pid = nix::unistd::Pid::from_raw(child.id().try_into().unwrap());
    let verdict = loop {
        if let Ok(bytes) = std::fs::read(bench.newest_run().join("verdict.json")) {
            break String::from_utf8(bytes).unwrap();
        }
        assert!(died.elapsed() < SOON, "no verdict");
        std::thread::sleep(Duration::from_millis(20));
    };
    assert!(verdict.contains("QEMU killed by signal 9"), "{verdict}");
    bench.assert_clean();
    // The summary still waits for its reader; a signal ends that, too.
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(3));
    assert!(died.elapsed() < SOON, "{:?}", died.elapsed());
    drop(reader);
}

/// Waits until the recorded events show a guest that boots.
fn booting(bench: &Bench) {
    let until = Instant::now() + Duration::from_secs(60);
    loop {
        let runs = bench.path().join("state/runs");
        let events = if runs.exists() {
            std::fs::read_to_string(bench.newest_run().join("events.ndjson")).unwrap_or_default()
        } else {
            String::new()
        };
        if events.lines().any(|line| line.contains(r#""phase-started":{"phase":"boot","node":"server-1""#)) {
            return;
        }
        assert!(Instant::now() < until, "no boot: {events}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
