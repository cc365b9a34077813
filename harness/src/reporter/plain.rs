//! One line per event, for CI logs and pipes.

use std::io::Write;

use super::{Reporter, line};
use crate::event::Event;
use crate::printable::printable;

/// Writes `[  12.3 s] phase node …` lines.
pub(super) struct PlainReporter {
    out: Option<Box<dyn Write + Send>>,
}

impl PlainReporter {
    pub(super) fn new(out: Box<dyn Write + Send>) -> Self {
        Self { out: Some(out) }
    }
}

impl Reporter for PlainReporter {
    fn event(&mut self, event: &Event) {
        let (Some(out), Some(text)) = (self.out.as_mut(), line(&event.event)) else {
            return;
        };
        let text = printable(&text);
        #[expect(clippy::cast_precision_loss, reason = "milliseconds of a run are far below 2^52")]
        let seconds = event.elapsed_ms as f64 / 1000.0;
        if writeln!(out, "[{seconds:7.1} s] {text}").and_then(|()| out.flush()).is_err() {
            // The reader went away (`| head`): the run goes on, its records are complete.
            self.out = None;
        }
    }
}
