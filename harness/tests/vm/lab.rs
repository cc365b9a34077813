//! A harness in a folder of its own, and the eyes to see what it leaves.

use std::io::{BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// A state folder for one test.
pub(crate) struct Bench {
    state: tempfile::TempDir,
}

/// The stand-in, where `ci/build` leaves it.
fn standin() -> PathBuf {
    let path = std::env::var_os("HARNESS_STANDIN").map_or_else(
        || Path::new(env!("CARGO_BIN_EXE_harness")).parent().unwrap().parent().unwrap().join("bin/k3s-standin"),
        PathBuf::from,
    );
    assert!(path.exists(), "{} is missing: run ci/build first", path.display());
    path
}

impl Bench {
    pub(crate) fn new() -> Self {
        Self { state: tempfile::tempdir().unwrap() }
    }

    /// The folder everything of this bench is in.
    pub(crate) fn path(&self) -> &Path {
        self.state.path()
    }

    /// `harness …` with this bench's folders.
    pub(crate) fn harness(&self, args: &[&str]) -> Command {
        let cache = std::env::var_os("HARNESS_TEST_CACHE")
            .map_or_else(|| Path::new(env!("CARGO_TARGET_TMPDIR")).join("vm-cache"), PathBuf::from);
        let mut command = Command::new(env!("CARGO_BIN_EXE_harness"));
        command
            .args(args)
            .current_dir(self.state.path())
            .env("HARNESS_STATE_DIR", self.state.path().join("state"))
            .env("HARNESS_CACHE_DIR", cache)
            .env("HARNESS_STANDIN", standin())
            .env("XDG_RUNTIME_DIR", self.state.path().join("none"))
            .stdin(Stdio::null());
        command
    }

    /// Runs a scenario with the stand-in to its end.
    pub(crate) fn run(&self, scenario: &str, more: &[&str]) -> Run {
        let began = Instant::now();
        let args = [&["run", scenario, "--k3s", "standin", "--format", "plain"], more].concat();
        let output = self.harness(&args).output().unwrap();
        let run = Run { output, dir: self.newest_run(), elapsed: began.elapsed() };
        println!("{}", run.stdout());
        run
    }

    /// Writes a file into the folder runs start in.
    pub(crate) fn write(&self, name: &str, text: &str) {
        let path = self.state.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    /// Starts a run whose events can be read, its errors going to the test's own.
    pub(crate) fn start(&self, scenario: &str) -> Started {
        Started::new(self.harness(&["run", scenario, "--k3s", "standin", "--format", "json"]))
    }

    /// `harness exec server-1 -- COMMAND`, whatever becomes of it.
    pub(crate) fn exec(&self, command: &str) -> Output {
        self.harness(&["exec", "server-1", "--", command]).output().unwrap()
    }

    /// The verdict of the newest run.
    pub(crate) fn verdict(&self) -> Value {
        serde_json::from_slice(&std::fs::read(self.newest_run().join("verdict.json")).unwrap()).unwrap()
    }

    pub(crate) fn newest_run(&self) -> PathBuf {
        let mut runs: Vec<_> = std::fs::read_dir(self.state.path().join("state/runs"))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        runs.sort();
        runs.pop().expect("no run folder")
    }

    /// Nothing of any lab of this bench is left: no process, no folder, no socket.
    #[track_caller]
    pub(crate) fn assert_clean(&self) {
        assert_eq!(self.processes(), Vec::<String>::new(), "processes are left");
        let labs = self.state.path().join("state/labs");
        let left: Vec<_> =
            std::fs::read_dir(labs).map(|dir| dir.map(|entry| entry.unwrap().path()).collect()).unwrap_or_default();
        assert_eq!(left, Vec::<PathBuf>::new(), "lab folders are left");
    }

    /// Kills one process of this bench's labs by the program's name.
    #[track_caller]
    pub(crate) fn kill_one(&self, program: &str) {
        let found = self.found();
        let (pid, _) = found
            .iter()
            .find(|(_, line)| line.split(' ').next().is_some_and(|argv0| argv0.ends_with(program)))
            .expect("no such process");
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(*pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    }

    /// Command lines of living processes that name this bench's folder, the harness's own left out.
    pub(crate) fn processes(&self) -> Vec<String> {
        self.found().into_iter().map(|(_, line)| line).collect()
    }

    fn found(&self) -> Vec<(i32, String)> {
        let marks = self.marks();
        let mut found = Vec::new();
        for entry in std::fs::read_dir("/proc").unwrap().filter_map(Result::ok) {
            let Ok(raw) = std::fs::read(entry.path().join("cmdline")) else { continue };
            let line = String::from_utf8_lossy(&raw).replace('\0', " ");
            let ours = marks.iter().any(|mark| line.contains(mark.as_str()));
            if ours && !line.contains(env!("CARGO_BIN_EXE_harness")) {
                found.push((entry.file_name().to_string_lossy().parse().unwrap(), line));
            }
        }
        found
    }

    /// What command lines of this bench's processes contain: its folder, and the names of its labs' socket folders.
    fn marks(&self) -> Vec<String> {
        let mut marks = vec![self.state.path().to_str().unwrap().to_owned()];
        let runs = std::fs::read_dir(self.state.path().join("state/runs")).into_iter().flatten().filter_map(Result::ok);
        for run in runs {
            let name = run.file_name().to_string_lossy().into_owned();
            if let Some(lab) = name.rsplit('-').next() {
                marks.push(format!("/{lab}/"));
            }
        }
        marks
    }

    /// Waits until no process is left, at most as long as promised.
    #[track_caller]
    pub(crate) fn assert_gone_within(&self, limit: Duration) {
        let until = Instant::now() + limit;
        while !self.processes().is_empty() {
            assert!(Instant::now() < until, "still there after {limit:?}: {:#?}", self.processes());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// A run that has ended.
pub(crate) struct Run {
    pub(crate) output: Output,
    pub(crate) dir: PathBuf,
    pub(crate) elapsed: Duration,
}

impl Run {
    pub(crate) fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.output.stdout).into_owned()
    }

    pub(crate) fn json(&self, name: &str) -> Value {
        serde_json::from_slice(&std::fs::read(self.dir.join(name)).unwrap()).unwrap()
    }

    #[track_caller]
    pub(crate) fn assert_exit(&self, code: i32) {
        assert_eq!(self.output.status.code(), Some(code), "stderr: {}", String::from_utf8_lossy(&self.output.stderr));
    }
}

/// A run that is going on.
pub(crate) struct Started {
    pub(crate) child: Child,
    events: BufReader<std::process::ChildStdout>,
}

impl Started {
    /// Starts a run whose standard output is its events.
    pub(crate) fn new(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let events = BufReader::new(child.stdout.take().unwrap());
        Self { child, events }
    }

    /// Reads events until a phase starts; `boot` until the first guest boots, after its disks were laid.
    #[track_caller]
    pub(crate) fn wait_for_phase(&mut self, phase: &str) {
        self.wait_for(phase, |event| {
            let started = &event["phase-started"];
            started["phase"] == phase && (phase != "boot" || started["node"].is_string())
        });
    }

    /// Reads events until one of this kind.
    #[track_caller]
    pub(crate) fn wait_for(&mut self, what: &str, wanted: impl Fn(&Value) -> bool) {
        let mut seen = Vec::new();
        loop {
            let mut line = String::new();
            assert!(self.events.read_line(&mut line).unwrap() > 0, "the run ended before {what}: {seen:#?}");
            let event: Value = serde_json::from_str(&line).unwrap();
            if wanted(&event["event"]) {
                return;
            }
            seen.push(line);
        }
    }

    pub(crate) fn signal(&self, signal: nix::sys::signal::Signal) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.child.id().try_into().unwrap()), signal).unwrap();
    }

    /// The rest of the events, and the exit code.
    pub(crate) fn finish(mut self) -> (Option<i32>, Vec<Value>) {
        let rest = self.events.by_ref().lines().map(|line| serde_json::from_str(&line.unwrap()).unwrap()).collect();
        (self.child.wait().unwrap().code(), rest)
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        // A failed assertion must not leave a run behind.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
