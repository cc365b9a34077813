//! Outputs of children: always read to their end, kept within bounds.

use std::collections::VecDeque;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::fs::File;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};

use super::Sink;
use crate::error::Error;

/// The last bytes of an output.
#[derive(Debug, Default)]
pub(super) struct Tail {
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    bytes: VecDeque<u8>,
    /// Bytes that stood before the kept ones.
    dropped: u64,
}

/// How far a reader of a child's outputs has got; the default is their beginning.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OutputPosition {
    pub(super) stdout_bytes: u64,
    pub(super) stderr_bytes: u64,
}

/// What a child has written since a reader looked last.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NewOutput {
    /// Its whole lines, those of standard output first. Once the child has ended, what stands after the last newline is one, too.
    pub lines: Vec<String>,
    /// Bytes that came between two looks and were more than is kept.
    pub missed_bytes: u64,
}

impl Tail {
    fn push(&self, chunk: &[u8], max_bytes: usize) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.bytes.extend(chunk);
        if kept.bytes.len() > max_bytes {
            let excess = kept.bytes.len() - max_bytes;
            kept.bytes.drain(..excess);
            kept.dropped += excess as u64;
        }
    }

    /// As text; where the beginning was dropped, from the first whole line on.
    pub(super) fn text(&self) -> String {
        let (bytes, truncated) = {
            let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            (kept.bytes.iter().copied().collect::<Vec<u8>>(), kept.dropped > 0)
        };
        let first_whole =
            bytes.iter().position(|&b| b == b'\n').map(|at| at + 1).filter(|&at| truncated && at < bytes.len());
        String::from_utf8_lossy(&bytes[first_whole.unwrap_or(0)..]).into_owned()
    }

    /// Adds to `new` what was written from `position` on, and moves that past it. A line that is not whole yet is left for the next time, unless the child has `ended`.
    pub(super) fn read_on(&self, position: &mut u64, ended: bool, new: &mut NewOutput) {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let missed = kept.dropped.saturating_sub(*position);
        new.missed_bytes += missed;
        *position += missed;
        let told = usize::try_from(*position - kept.dropped).unwrap_or(usize::MAX);
        let mut unread: Vec<u8> = kept.bytes.iter().skip(told).copied().collect();
        drop(kept);
        if !ended {
            unread.truncate(unread.iter().rposition(|&b| b == b'\n').map_or(0, |at| at + 1));
        }
        *position += unread.len() as u64;
        new.lines.extend(String::from_utf8_lossy(&unread).lines().map(str::to_owned));
    }
}

/// A sink whose files are open: what can fail has failed before the child is started.
#[derive(Debug)]
pub(super) enum OpenSink {
    Null,
    Direct(std::fs::File),
    Drained { file: Option<BoundedFile>, tail_bytes: usize },
}

#[derive(Debug)]
pub(super) struct BoundedFile {
    file: File,
    path: String,
    left_bytes: u64,
}

impl OpenSink {
    pub(super) fn open(sink: &Sink) -> Result<Self, Error> {
        let append = |path: &camino::Utf8Path| {
            std::fs::OpenOptions::new().append(true).create(true).open(path).map_err(|source| Error::Io {
                action: "open for appending",
                path: path.to_owned(),
                source,
            })
        };
        Ok(match sink {
            Sink::Null => Self::Null,
            Sink::Tail { bytes } => Self::Drained { file: None, tail_bytes: *bytes },
            Sink::File { path } => Self::Direct(append(path)?),
            Sink::FileAndTail { path, file_max_bytes, tail_bytes } => {
                let file = BoundedFile {
                    file: File::from_std(append(path)?),
                    path: path.to_string(),
                    left_bytes: *file_max_bytes,
                };
                Self::Drained { file: Some(file), tail_bytes: *tail_bytes }
            }
        })
    }

    /// What the child gets, and what is left to drain.
    pub(super) fn into_stdio(self) -> (Stdio, Option<Drain>) {
        match self {
            Self::Null => (Stdio::null(), None),
            Self::Direct(file) => (Stdio::from(file), None),
            Self::Drained { file, tail_bytes } => (Stdio::piped(), Some(Drain { file, tail_bytes })),
        }
    }
}

/// Where a piped output is drained to.
#[derive(Debug)]
pub(super) struct Drain {
    file: Option<BoundedFile>,
    tail_bytes: usize,
}

impl Drain {
    /// Reads to the end. A file that cannot be written to is given up with a warning: evidence that cannot be kept must not stop the child.
    pub(super) async fn run(mut self, mut from: impl AsyncRead + Unpin, tail: Arc<Tail>) {
        let mut chunk = vec![0u8; 8192];
        loop {
            let n = match from.read(&mut chunk).await {
                Ok(0) | Err(_) => break,
                Ok(n) => n,
            };
            tail.push(&chunk[..n], self.tail_bytes);
            if let Some(file) = &mut self.file
                && let Err(error) = file.append(&chunk[..n]).await
            {
                tracing::warn!(path = %file.path, %error, "an output can no longer be written to its file");
                self.file = None;
            }
        }
    }
}

impl BoundedFile {
    async fn append(&mut self, chunk: &[u8]) -> std::io::Result<()> {
        if self.left_bytes == 0 {
            return Ok(());
        }
        let fits = usize::try_from(self.left_bytes).unwrap_or(usize::MAX).min(chunk.len());
        self.file.write_all(&chunk[..fits]).await?;
        self.left_bytes -= fits as u64;
        if self.left_bytes == 0 {
            self.file.write_all(b"\n[cut here: the output went past its bound]\n").await?;
        }
        // tokio's File hands writes to another thread: without the flush a line could still be on its way when the process's end is told.
        self.file.flush().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tail_keeps_the_last_whole_lines() {
        let tail = Tail::default();
        tail.push(b"first line\nsecond line\n", 64);
        assert_eq!(tail.text(), "first line\nsecond line\n");
        tail.push(b"third\n", 14);
        assert_eq!(tail.text(), "third\n");
        tail.push(&[b'x'; 100], 14);
        assert_eq!(tail.text(), "x".repeat(14), "one long line: its end");
        tail.push(b"\xff\n", 14);
        assert!(tail.text().ends_with("\u{fffd}\n"));
    }

    #[test]
    fn a_reader_of_a_tail_gets_every_line_once_and_is_told_what_it_missed() {
        let (tail, mut at) = (Tail::default(), 0);
        let mut read_on = |tail: &Tail, ended| {
            let mut new = NewOutput::default();
            tail.read_on(&mut at, ended, &mut new);
            (new.lines, new.missed_bytes)
        };
        let lines = |lines: &[&str]| lines.iter().map(|&line| line.to_owned()).collect::<Vec<_>>();
        tail.push(b"one\ntw", 8);
        assert_eq!(read_on(&tail, false), (lines(&["one"]), 0));
        tail.push(b"o\n", 8);
        assert_eq!(read_on(&tail, false), (lines(&["two"]), 0), "the tail has dropped nothing that was not told");
        tail.push(b"three\n", 8);
        assert_eq!(read_on(&tail, false), (lines(&["three"]), 0));
        tail.push(b"0123456789\nabc\n", 8);
        assert_eq!(read_on(&tail, false), (lines(&["789", "abc"]), 7));
        tail.push(&[b'x'; 20], 8);
        assert_eq!(read_on(&tail, false), (lines(&[]), 12), "one endless line");
        assert_eq!(read_on(&tail, false), (lines(&[]), 0), "told once");
        assert_eq!(read_on(&tail, true), (lines(&["xxxxxxxx"]), 0));
        assert_eq!(read_on(&tail, true), (lines(&[]), 0));
    }

    #[tokio::test]
    async fn a_bounded_file_ends_with_a_mark_and_the_tail_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = camino::Utf8PathBuf::from_path_buf(dir.path().join("log")).unwrap();
        let sink = OpenSink::open(&Sink::FileAndTail { path: path.clone(), file_max_bytes: 4, tail_bytes: 3 }).unwrap();
        let (_, drain) = sink.into_stdio();
        let tail = Arc::new(Tail::default());
        drain.unwrap().run(&b"abcdefgh"[..], tail.clone()).await;
        assert_eq!(std::fs::read_to_string(path).unwrap(), "abcd\n[cut here: the output went past its bound]\n");
        assert_eq!(tail.text(), "fgh");
    }
}
