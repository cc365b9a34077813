//! NDJSON: every event, one JSON document per line.

use std::io::Write;

use super::Reporter;
use crate::event::Event;

/// Writes every event as one line of JSON.
pub struct NdjsonReporter {
    out: Option<Box<dyn Write + Send>>,
}

impl NdjsonReporter {
    /// A reporter onto a stream.
    #[must_use]
    pub fn new(out: Box<dyn Write + Send>) -> Self {
        Self { out: Some(out) }
    }
}

impl Reporter for NdjsonReporter {
    fn event(&mut self, event: &Event) {
        let Some(out) = self.out.as_mut() else { return };
        let written = serde_json::to_vec(event).map_err(std::io::Error::other).and_then(|mut bytes| {
            bytes.push(b'\n');
            out.write_all(&bytes)?;
            out.flush()
        });
        if let Err(error) = written {
            tracing::warn!(%error, "events are no longer written to one of their readers");
            self.out = None;
        }
    }
}
