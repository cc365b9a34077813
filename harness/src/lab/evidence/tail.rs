//! Files that QEMU writes (its console, its standard error), read as they grow.

use std::fs;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::sync::Arc;
use std::time::Duration;

use camino::Utf8PathBuf;
use jiff::Timestamp;
use verdict::{Evidence, Source};

use super::Shared;
use crate::lab::alarm::Alarm;
use crate::redact::redact;

/// How often the files are looked at: a `read` on the host, nothing in the guest.
const POLL: Duration = Duration::from_millis(100);
/// Most bytes of one file taken per look.
const CHUNK_BYTES: usize = 64 * 1024;
/// Longest line kept; a console that never ends its line is cut here.
const LINE_BYTES: usize = 8 * 1024;
/// Looks at the end, for what was written last.
const LAST_LOOKS: usize = 64;

/// Follows a file until the evidence is closed; a line with the mark says that the guest could not unpack its seed. One that cannot be read warns once; it is looked at again all the same.
pub(super) async fn follow(
    node: String,
    path: Utf8PathBuf,
    source: Source,
    seed_failed_mark: Option<&'static str>,
    shared: Arc<Shared>,
) {
    let mut tail = Tail::new(path);
    let mut tick = tokio::time::interval(POLL);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut warned = false;
    let mut closing = shared.closing.subscribe();
    loop {
        let last = tokio::select! {
            _ = tick.tick() => false,
            _ = closing.wait_for(|closing| *closing) => true,
        };
        for _ in 0..if last { LAST_LOOKS } else { 1 } {
            let lines = tail.more().unwrap_or_else(|error| {
                if !warned {
                    shared.sink.warn(format!("what {} says cannot be read: {}: {error}", source.origin, tail.path));
                }
                warned = true;
                Vec::new()
            });
            if lines.is_empty() {
                break;
            }
            take(&node, &source, seed_failed_mark, &shared, lines);
        }
        if last {
            // What it broke off in is often the line that counts.
            let rest = std::mem::take(&mut tail.partial);
            if !rest.is_empty() {
                let rest = String::from_utf8_lossy(&rest).into_owned();
                take(&node, &source, seed_failed_mark, &shared, vec![rest]);
            }
            return;
        }
    }
}

fn take(node: &str, source: &Source, seed_failed_mark: Option<&str>, shared: &Shared, lines: Vec<String>) {
    for line in lines {
        if let Some(at) = seed_failed_mark.and_then(|mark| line.find(mark)) {
            shared.bell.ring(Alarm::seed_failed(node, &line[at..]));
        }
        let line = redact(&line).into_owned();
        shared.observe(&Evidence::new(Some(node), source.clone(), Some(Timestamp::now()), line));
    }
}

/// Reads what was added to a file, line by line.
struct Tail {
    path: Utf8PathBuf,
    offset: u64,
    partial: Vec<u8>,
}

impl Tail {
    fn new(path: Utf8PathBuf) -> Self {
        Self { path, offset: 0, partial: Vec::new() }
    }

    fn more(&mut self) -> io::Result<Vec<String>> {
        let mut file = fs::File::open(&self.path)?;
        let mut chunk = Vec::new();
        file.seek(SeekFrom::Start(self.offset))?;
        self.offset += file.take(CHUNK_BYTES as u64).read_to_end(&mut chunk)? as u64;
        let mut lines = Vec::new();
        for byte in chunk {
            if byte != b'\n' && self.partial.len() < LINE_BYTES {
                self.partial.push(byte);
                continue;
            }
            let line = String::from_utf8_lossy(&self.partial).trim_end_matches('\r').to_owned();
            if !line.is_empty() {
                lines.push(line);
            }
            self.partial.clear();
            if byte != b'\n' {
                self.partial.push(byte);
            }
        }
        Ok(lines)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use camino::Utf8Path;

    use super::*;

    #[test]
    fn a_file_is_read_as_it_grows_and_endless_lines_are_cut() {
        let dir = tempfile::tempdir().unwrap();
        let path = Utf8Path::from_path(dir.path()).unwrap().join("console.log");
        let mut tail = Tail::new(path.clone());
        assert_eq!(tail.more().unwrap_err().kind(), io::ErrorKind::NotFound);
        fs::write(&path, "one\r\ntw").unwrap();
        assert_eq!(tail.more().unwrap(), ["one"]);
        let mut file = fs::OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(b"o\n\xff\xfe\n").unwrap();
        assert_eq!(tail.more().unwrap(), ["two", "\u{fffd}\u{fffd}"]);
        file.write_all(&vec![b'x'; LINE_BYTES + 10]).unwrap();
        file.write_all(b"\n").unwrap();
        let lines = tail.more().unwrap();
        assert_eq!(lines.iter().map(String::len).collect::<Vec<_>>(), [LINE_BYTES, 10]);
    }
}
