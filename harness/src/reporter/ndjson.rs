//! NDJSON: every event, one JSON document per line.

use std::fs::File;
use std::io::{self, Write};

use super::Reporter;
use crate::event::Event;
use crate::printable::printable_json;

/// Writes every event as one line of JSON.
pub struct NdjsonReporter {
    out: Option<Out>,
}

enum Out {
    /// Somebody who reads: gone for good once a write fails.
    Reader(Box<dyn Write + Send>),
    /// A file of the records: a full disk may have room again when the lab is gone.
    Record { file: File, whole_bytes: u64, warned: bool },
}

impl NdjsonReporter {
    /// A reporter onto a stream.
    #[must_use]
    pub fn new(out: Box<dyn Write + Send>) -> Self {
        Self { out: Some(Out::Reader(out)) }
    }

    /// A reporter into an empty file, which at any time holds whole lines.
    #[must_use]
    pub fn record(file: File) -> Self {
        Self { out: Some(Out::Record { file, whole_bytes: 0, warned: false }) }
    }
}

impl Reporter for NdjsonReporter {
    fn event(&mut self, event: &Event) {
        let Some(out) = self.out.as_mut() else { return };
        let written = match serde_json::to_string(event) {
            Err(error) => Err(io::Error::other(error)),
            Ok(mut line) => {
                line.push('\n');
                out.line(printable_json(&line).as_bytes())
            }
        };
        if let Err(error) = written {
            tracing::warn!(%error, "events are no longer written to one of their readers");
            self.out = None;
        }
    }
}

impl Out {
    fn line(&mut self, line: &[u8]) -> io::Result<()> {
        match self {
            Self::Reader(out) => out.write_all(line).and_then(|()| out.flush()),
            Self::Record { file, whole_bytes, warned } => {
                if let Err(error) = file.write_all(line) {
                    if !std::mem::replace(warned, true) {
                        tracing::warn!(%error, "an event could not be recorded; the next ones are tried all the same");
                    }
                    // Half a line would make the next one unreadable, too.
                    file.set_len(*whole_bytes)?;
                    return io::Seek::seek(file, io::SeekFrom::Start(*whole_bytes)).map(drop);
                }
                *whole_bytes += line.len() as u64;
                Ok(())
            }
        }
    }
}
