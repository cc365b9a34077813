//! What switches and links say: next to nothing, and where they do say something, somebody will want to know.

use std::future::Future;
use std::time::Duration;

use kvm::{NewOutput, OutputPosition};
use tokio::time::MissedTickBehavior;

use super::{Recorder, Stream};

/// How often it is looked whether something was said: into memory.
const LISTEN_EVERY: Duration = Duration::from_secs(1);

/// Records every line that `output` gives, until what says it has died, and what it said last.
pub(super) async fn listen<T>(
    recorder: &Recorder,
    name: &str,
    output: impl Fn(&mut OutputPosition) -> NewOutput,
    died: impl Future<Output = T>,
) -> T {
    let mut tick = tokio::time::interval(LISTEN_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut position = OutputPosition::default();
    tokio::pin!(died);
    loop {
        let ended = tokio::select! {
            exit = &mut died => Some(exit),
            _ = tick.tick() => None,
        };
        let NewOutput { lines, missed_bytes } = output(&mut position);
        if missed_bytes > 0 {
            let missed = format!("{name}: ({missed_bytes} bytes of what it said came too fast and were not kept)");
            recorder.note(&Stream::vde(), "missed", &missed);
        }
        for line in lines.iter().filter(|line| !line.trim().is_empty()) {
            recorder.note(&Stream::vde(), name, &format!("{name}: {line}"));
        }
        if let Some(exit) = ended {
            return exit;
        }
    }
}

#[cfg(test)]
mod tests {
    use kvm::{CommandSpec, Supervisor};

    use super::*;
    use crate::lab::evidence::testing::Bench;

    /// What is recorded of a shell that runs `script`, with `$0` a pipe from which it reads `go` once its first words are recorded.
    async fn recorded(script: &str) -> Vec<String> {
        let bench = Bench::new();
        let log = bench.record.path().join("vde.log");
        let gate = bench.record.path().join("gate");
        nix::unistd::mkfifo(gate.as_std_path(), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let supervisor = Supervisor::new().unwrap();
        let shell = CommandSpec::new("sw", "sh").args(["-c", script, gate.as_str()]);
        let shell = supervisor.spawn(shell).await.unwrap();
        let recorder = bench.pump.recorder();
        let heard = listen(&recorder, "sw", |position| shell.new_output(position), shell.exited());
        let said_first = async {
            while !std::fs::read_to_string(&log).unwrap_or_default().contains("sw: ") {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            tokio::fs::write(&gate, "go\n").await.unwrap();
        };
        let (exit, ()) = tokio::join!(heard, said_first);
        assert!(exit.success(), "{exit}");
        let text = std::fs::read_to_string(&log).unwrap();
        text.lines().map(|line| line.split_once(' ').unwrap().1.to_owned()).collect()
    }

    #[tokio::test]
    async fn what_is_said_on_both_outputs_is_recorded_once() {
        let said = recorded("echo out1; echo err1 >&2; read go <$0; echo out2; echo err2 >&2; printf last").await;
        // Which of two outputs was written to first is not known.
        assert_eq!(said.iter().filter(|line| line.ends_with('1')).count(), 2, "{said:?}");
        let mut sorted = said.clone();
        sorted.sort();
        assert_eq!(sorted, ["sw: err1", "sw: err2", "sw: last", "sw: out1", "sw: out2"], "{said:?}");
    }

    #[tokio::test]
    async fn what_is_more_than_is_kept_is_counted_and_nothing_is_recorded_twice() {
        let said = recorded("echo first; read go <$0; head -c 50000 /dev/zero | tr '\\0' x; echo; echo last").await;
        let lengths: Vec<_> = said.iter().map(String::len).collect();
        let all = |wanted: &str| said.iter().filter(|line| *line == wanted).count();
        assert_eq!((all("sw: first"), all("sw: last")), (1, 1), "{lengths:?}");
        let told: usize = said.iter().map(|line| line.matches('x').count()).sum();
        let count = |line: &str| line.strip_prefix("sw: (")?.split_once(" bytes of what")?.0.parse::<usize>().ok();
        let missed: usize = said.iter().filter_map(|line| count(line)).sum();
        assert!(missed > 0, "{lengths:?}");
        assert_eq!(told + missed, 50_000, "{lengths:?}");
    }
}
