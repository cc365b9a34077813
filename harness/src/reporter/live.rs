//! Live phases on a terminal: one spinner per phase and node that is going on, a line for each that ended.

use std::collections::HashMap;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::{Reporter, human_ms, line, mark, scope};
use crate::event::{Event, EventKind, PhaseOutcome};
use crate::plan::Phase;
use crate::printable::printable;

type Key = (Phase, Option<String>);

/// Draws on standard error.
pub(super) struct LiveReporter {
    screen: MultiProgress,
    going_on: HashMap<Key, ProgressBar>,
    style: ProgressStyle,
}

impl LiveReporter {
    pub(super) fn new() -> Self {
        let style = ProgressStyle::with_template("{spinner} {prefix:<21} {elapsed:>5}  {wide_msg}")
            .unwrap_or_else(|_| ProgressStyle::default_spinner());
        Self { screen: MultiProgress::new(), going_on: HashMap::new(), style }
    }

    fn say(&self, text: &str) {
        // A terminal that went away is no reason to end a run.
        let _ = self.screen.println(text);
    }
}

impl Reporter for LiveReporter {
    fn event(&mut self, event: &Event) {
        match &event.event {
            EventKind::PhaseStarted { phase, node, deadline_ms, waits_for } => {
                let bar = self.screen.add(ProgressBar::new_spinner().with_style(self.style.clone()));
                bar.set_prefix(format!("{phase} {}", scope(node.as_deref())));
                bar.set_message(format!("{waits_for} (at most {})", human_ms(*deadline_ms)));
                bar.enable_steady_tick(Duration::from_millis(120));
                self.going_on.insert((*phase, node.clone()), bar);
            }
            EventKind::PhaseProgress { phase, node, message } => {
                if let Some(bar) = self.going_on.get(&(*phase, node.clone())) {
                    bar.set_message(printable(message).into_owned());
                }
            }
            EventKind::PhaseFinished { phase, node, outcome, phase_elapsed_ms, attempts, note } => {
                if let Some(bar) = self.going_on.remove(&(*phase, node.clone())) {
                    bar.finish_and_clear();
                    self.screen.remove(&bar);
                }
                let sign = match outcome {
                    PhaseOutcome::Ok => "\u{1b}[32m✓\u{1b}[0m",
                    PhaseOutcome::Failed => "\u{1b}[31m✗\u{1b}[0m",
                    PhaseOutcome::Interrupted | PhaseOutcome::Skipped => "-",
                };
                let word =
                    if matches!(outcome, PhaseOutcome::Ok) { String::new() } else { format!("{} ", mark(*outcome)) };
                let tries = if *attempts > 1 { format!(" ({attempts} attempts)") } else { String::new() };
                let who = format!("{phase} {}", scope(node.as_deref()));
                let note = printable(note);
                self.say(&format!("{sign} {who:<21} {:>9}  {word}{note}{tries}", human_ms(*phase_elapsed_ms)));
            }
            EventKind::RunFinished { .. } => {
                for (_, bar) in self.going_on.drain() {
                    bar.finish_and_clear();
                }
                let _ = self.screen.clear();
            }
            other => {
                if let Some(text) = line(other) {
                    self.say(&printable(&text));
                }
            }
        }
    }
}
