//! The alarm every wait races: the first machine death, fatal sign or interruption ends all waits at once.

use std::future::Future;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use crate::exit::Blame;
use crate::failure::Failure;
use crate::reporter::human_ms;

/// How long after a failed step an alarm still counts as its cause.
const CAUSE_WITHIN: Duration = Duration::from_millis(300);

/// What ended the waits. The first alarm wins; later ones are consequences.
#[derive(Debug, Clone)]
pub enum Alarm {
    /// A part of the lab (QEMU, switch, link) ended or its guest went away.
    Machine {
        /// The node or switch.
        machine: String,
        /// Whether it is a node of the plan.
        is_node: bool,
        /// What happened, e.g. `QEMU exited 1`.
        what: String,
        /// What it last said.
        tail: String,
        /// Who is to blame.
        blame: Blame,
    },
    /// A line of evidence that leaves no hope for the wait.
    Fatal {
        /// The node it was seen on.
        node: Option<String>,
        /// What it means, e.g. `FM-2 stale bootstrap data …`.
        meaning: String,
        /// The line.
        line: String,
        /// Who is to blame.
        blame: Blame,
    },
    /// Somebody asked the run to end.
    Interrupted {
        /// Name of the signal.
        signal: String,
    },
}

impl Alarm {
    /// A guest whose first program did not take the seed, with its line.
    #[must_use]
    pub fn seed_failed(node: &str, line: &str) -> Self {
        Self::Machine {
            machine: node.to_owned(),
            is_node: true,
            what: "the guest could not unpack its seed".to_owned(),
            tail: line.to_owned(),
            blame: Blame::Harness,
        }
    }

    /// The alarm as the failure of whatever was waiting.
    #[must_use]
    pub fn to_failure(&self) -> Failure {
        match self {
            Self::Machine { machine, is_node, what, tail, blame } => {
                let mut failure = Failure::new(*blame, format!("{machine}: {what}"));
                if !tail.trim().is_empty() {
                    failure = failure.because(tail.trim().to_owned());
                }
                if *is_node { failure.on(machine) } else { failure }
            }
            Self::Fatal { node, meaning, line, blame } => {
                let failure = Failure::new(*blame, meaning.clone()).because(line.clone());
                match node {
                    Some(node) => failure.on(node),
                    None => failure,
                }
            }
            Self::Interrupted { signal } => Failure::new(Blame::Interrupted, format!("interrupted by {signal}")),
        }
    }
}

/// Raises the alarm.
#[derive(Debug, Clone)]
pub struct AlarmBell {
    alarm: watch::Sender<Option<Alarm>>,
    interruption: watch::Sender<Option<String>>,
}

/// Races waits against the alarm and their deadlines.
#[derive(Debug, Clone)]
pub struct Guard {
    alarm: watch::Receiver<Option<Alarm>>,
    interruption: watch::Receiver<Option<String>>,
}

/// A bell and the guard that hears it.
#[must_use]
pub fn alarm() -> (AlarmBell, Guard) {
    let (alarm, alarm_rx) = watch::channel(None);
    let (interruption, interruption_rx) = watch::channel(None);
    (AlarmBell { alarm, interruption }, Guard { alarm: alarm_rx, interruption: interruption_rx })
}

/// Fills an empty slot; what is in it stays.
fn fill<T>(slot: &watch::Sender<Option<T>>, value: T) {
    slot.send_if_modified(|slot| {
        let first = slot.is_none();
        if first {
            *slot = Some(value);
        }
        first
    });
}

/// Completes when the slot is filled; never where nobody can fill it any more.
async fn filled<T: Clone>(slot: &watch::Receiver<Option<T>>) -> T {
    let mut slot = slot.clone();
    let value = slot.wait_for(Option::is_some).await.ok().and_then(|value| value.clone());
    match value {
        Some(value) => value,
        None => std::future::pending().await,
    }
}

impl AlarmBell {
    /// Raises the alarm, unless it was raised before. An interruption is heard in any case.
    pub fn ring(&self, alarm: Alarm) {
        if let Alarm::Interrupted { signal } = &alarm {
            fill(&self.interruption, signal.clone());
        }
        fill(&self.alarm, alarm);
    }
}

impl Guard {
    /// Completes when the alarm is raised.
    pub async fn rung(&self) -> Alarm {
        filled(&self.alarm).await
    }

    /// Completes when somebody asks the run to end, also where the alarm was raised before; says by which signal.
    pub async fn interruption(&self) -> String {
        filled(&self.interruption).await
    }

    /// The alarm, if it was raised.
    #[must_use]
    pub fn alarm(&self) -> Option<Alarm> {
        self.alarm.borrow().clone()
    }

    /// Whether the run was asked to end.
    #[must_use]
    pub fn interrupted(&self) -> bool {
        self.interruption.borrow().is_some()
    }

    /// What a failure is a consequence of: a broken SSH connection may be seen an instant before the exit of the
    /// QEMU that held it.
    async fn cause_of(&self, failure: Failure) -> Failure {
        match tokio::time::timeout(CAUSE_WITHIN, self.rung()).await {
            // Whoever presses Ctrl-C on seeing a failure has not caused it.
            Ok(Alarm::Interrupted { .. }) | Err(_) => failure,
            Ok(alarm) => alarm.to_failure().because(format!("seen first as: {}", failure.one_line())),
        }
    }

    /// The outcome of `work`, or the alarm, or the deadline: whichever is first.
    ///
    /// # Errors
    /// The failure of the work, of the alarm, or one that says what was waited for in vain.
    pub async fn race<T>(
        &self,
        what: &str,
        deadline: Duration,
        work: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Failure> {
        let until = Instant::now() + deadline;
        tokio::select! {
            biased;
            done = work => match done {
                Ok(value) => Ok(value),
                Err(failure) => Err(self.cause_of(failure).await),
            },
            alarm = self.rung() => Err(alarm.to_failure()),
            () = tokio::time::sleep_until(until) => {
                let after = human_ms(u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX));
                let mut failure = Failure::environment(format!("gave up waiting for {what} after {after}"));
                failure.timed_out = true;
                Err(failure)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_first_alarm_wins_and_ends_a_wait_that_would_never_end() {
        let (bell, guard) = alarm();
        bell.ring(Alarm::Interrupted { signal: "SIGINT".to_owned() });
        bell.ring(Alarm::Interrupted { signal: "SIGTERM".to_owned() });
        let failure =
            guard.race("godot", Duration::from_secs(3600), std::future::pending::<Result<(), _>>()).await.unwrap_err();
        assert_eq!(failure.chain, ["interrupted by SIGINT"]);
        assert_eq!(failure.blame, Blame::Interrupted);
    }

    #[tokio::test(start_paused = true)]
    async fn a_deadline_names_what_was_waited_for() {
        let (_bell, guard) = alarm();
        let failure = guard
            .race("an ssh banner", Duration::from_secs(30), std::future::pending::<Result<(), _>>())
            .await
            .unwrap_err();
        assert_eq!(failure.chain, ["gave up waiting for an ssh banner after 30.0 s"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_machine_that_died_explains_the_failure_seen_an_instant_before() {
        let (bell, guard) = alarm();
        let work = async { Err::<(), _>(Failure::environment("ssh connection lost")) };
        let raced = guard.race("x", Duration::from_secs(60), work);
        let ring = async {
            tokio::time::sleep(Duration::from_millis(20)).await;
            bell.ring(Alarm::Machine {
                machine: "server-1".to_owned(),
                is_node: true,
                what: "QEMU killed by signal 9".to_owned(),
                tail: String::new(),
                blame: Blame::Environment,
            });
        };
        let failure = tokio::join!(raced, ring).0.unwrap_err();
        assert_eq!(failure.chain, ["server-1: QEMU killed by signal 9", "seen first as: ssh connection lost"]);
    }

    #[tokio::test]
    async fn work_that_is_done_beats_an_alarm_of_the_same_moment() {
        let (bell, guard) = alarm();
        bell.ring(Alarm::Interrupted { signal: "SIGINT".to_owned() });
        assert_eq!(guard.race("x", Duration::ZERO, async { Ok(7) }).await.unwrap(), 7);
    }
}
