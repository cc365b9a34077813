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

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::super::NdjsonReporter;
    use super::*;
    use crate::event::EventKind;

    #[derive(Clone, Default)]
    struct Seen(Arc<Mutex<Vec<u8>>>);

    impl Write for Seen {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn what_a_guest_says_reaches_no_reader_as_an_order() {
        let message = "k3s \u{1b}]0;owned\u{7}\u{9b}2J exited\0".to_owned();
        let event = Event {
            at: jiff::Timestamp::UNIX_EPOCH,
            elapsed_ms: 1_000,
            event: EventKind::Warning { message: message.clone() },
        };
        let (plain, json) = (Seen::default(), Seen::default());
        PlainReporter::new(Box::new(plain.clone())).event(&event);
        NdjsonReporter::new(Box::new(json.clone())).event(&event);
        let text = |seen: &Seen| String::from_utf8(seen.0.lock().unwrap().clone()).unwrap();
        assert_eq!(text(&plain), "[    1.0 s] warning: k3s \\x1b]0;owned\\x07\\x9b2J exited\\x00\n");
        let json = text(&json);
        assert!(!json.trim_end().chars().any(char::is_control), "{json:?}");
        let back: Event = serde_json::from_str(&json).unwrap();
        assert!(matches!(back.event, EventKind::Warning { message: same } if same == message));
    }
}
