//! A long-running command, line by line.

use std::time::Duration;

use hyper::body::{Buf, Bytes};
use russh::ChannelMsg;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tokio::time::Instant;

use super::error::{GuestError, brief};
use super::exec::signal_text;
use super::session::Session;
use super::ssh::Guest;

/// The longest line that is kept whole, in bytes.
pub(super) const LINE_MAX_BYTES: usize = 64 * 1024;
/// Lines waiting for a reader.
const QUEUE_LINES: usize = 256;
/// How long a full queue is waited for, once, before lines are dropped. Longer would hold up other channels.
const FULL_WAIT: Duration = Duration::from_millis(100);
/// Time to start the command, before patience.
const START_LIMIT: Duration = Duration::from_secs(20);

/// Which of a command's outputs a line came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// One thing that came out of a [`LineStream`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StreamItem {
    /// A line, without its newline. The last one may have had none.
    Line {
        /// Where it was written to.
        source: Source,
        /// Its bytes, at most 64 KiB of them.
        bytes: Vec<u8>,
        /// Whether it was longer.
        cut: bool,
    },
    /// The reader was too slow: this many lines were dropped here.
    Skipped(u64),
    /// The end. Nothing follows it.
    End(StreamEnd),
}

/// How a streamed command ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StreamEnd {
    /// It exited, or was killed by a signal, or the server closed its channel without saying which.
    Exited {
        /// Exit status.
        status: Option<u32>,
        /// Signal name without `SIG`.
        signal: Option<String>,
    },
    /// The connection was lost under it.
    Lost {
        /// What ended the connection.
        reason: String,
    },
}

impl std::fmt::Display for StreamEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exited { status: Some(status), .. } => write!(f, "exited {status}"),
            Self::Exited { signal: Some(signal), .. } => write!(f, "killed by signal {signal}"),
            Self::Exited { .. } => f.write_str("ended without a status"),
            Self::Lost { reason } => write!(f, "connection lost: {reason}"),
        }
    }
}

/// The lines of a running command. Dropping it closes the channel and kills the command.
#[derive(Debug)]
pub struct LineStream {
    items: mpsc::Receiver<StreamItem>,
    task: tokio::task::JoinHandle<()>,
}

impl LineStream {
    /// The next item; `None` after [`StreamItem::End`]. Cancel-safe.
    pub async fn next(&mut self) -> Option<StreamItem> {
        self.items.recv().await
    }
}

impl Drop for LineStream {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Guest {
    /// Starts a command whose output is read line by line, with empty standard input.
    ///
    /// A reader that is slower than the command loses lines, and is told how many: it never stops the
    /// other channels of the connection.
    pub async fn stream(&self, command: &str) -> Result<LineStream, GuestError> {
        let session = self.start_within_limit(command).await?;
        let (sender, items) = mpsc::channel(QUEUE_LINES);
        let task = tokio::spawn(async move {
            let mut lines = Lines::new(session);
            let mut queue = Queue { sender: &sender, skipped: 0, gone: false };
            let end = loop {
                match lines.next().await {
                    Step::Line { source, bytes, cut, .. } => {
                        if !queue.put(StreamItem::Line { source, bytes, cut }).await {
                            return;
                        }
                    }
                    Step::End(end) => break end,
                }
            };
            if queue.skipped > 0 {
                let _ = sender.send(StreamItem::Skipped(queue.skipped)).await;
            }
            // A reader that has gone needs no end.
            let _ = sender.send(StreamItem::End(end)).await;
        });
        Ok(LineStream { items, task })
    }

    /// Starts a command within the usual time for starting one.
    pub(super) async fn start_within_limit(&self, command: &str) -> Result<Session, GuestError> {
        let limit = self.target().scaled(START_LIMIT);
        let session =
            tokio::time::timeout(limit, self.start(command, Instant::now() + limit)).await.map_err(|_| {
                GuestError::Deadline {
                    node: self.node().to_owned(),
                    command: brief(command),
                    limit,
                    partial: Box::default(),
                }
            })??;
        // A failure shows as the channel's end, which the reader sees.
        let _ = session.writer.eof().await;
        Ok(session)
    }
}

struct Queue<'a> {
    sender: &'a mpsc::Sender<StreamItem>,
    skipped: u64,
    gone: bool,
}

impl Queue<'_> {
    /// Queues a line; `false` when nobody reads any more.
    async fn put(&mut self, item: StreamItem) -> bool {
        if self.skipped > 0 {
            match self.sender.try_send(StreamItem::Skipped(self.skipped)) {
                Ok(()) => self.skipped = 0,
                Err(TrySendError::Full(_)) => self.skipped += 1,
                Err(TrySendError::Closed(_)) => self.gone = true,
            }
            if self.gone || self.skipped > 0 {
                return !self.gone;
            }
        }
        match self.sender.try_send(item) {
            Ok(()) => {}
            Err(TrySendError::Full(item)) => match self.sender.send_timeout(item, FULL_WAIT).await {
                Ok(()) => {}
                Err(mpsc::error::SendTimeoutError::Timeout(_)) => self.skipped = 1,
                Err(mpsc::error::SendTimeoutError::Closed(_)) => self.gone = true,
            },
            Err(TrySendError::Closed(_)) => self.gone = true,
        }
        !self.gone
    }
}

/// One step of [`Lines`].
pub(super) enum Step {
    Line {
        source: Source,
        bytes: Vec<u8>,
        cut: bool,
        /// Whether a newline ended it: what came last before a connection was lost may be half a line.
        whole: bool,
    },
    End(StreamEnd),
}

/// A session read to its end, line by line.
pub(super) struct Lines {
    session: Option<Session>,
    stdout: Splitter,
    stderr: Splitter,
    /// Received and not yet cut into lines.
    pending: (Source, Bytes),
    status: Option<u32>,
    signal: Option<String>,
    end: Option<StreamEnd>,
}

impl Lines {
    pub(super) fn new(session: Session) -> Self {
        Self::with_limit(session, LINE_MAX_BYTES)
    }

    /// As [`Lines::new`], with lines kept whole up to another length.
    pub(super) fn with_limit(session: Session, line_max_bytes: usize) -> Self {
        Lines {
            session: Some(session),
            stdout: Splitter::new(line_max_bytes),
            stderr: Splitter::new(LINE_MAX_BYTES),
            pending: (Source::Stdout, Bytes::new()),
            status: None,
            signal: None,
            end: None,
        }
    }

    /// The next line, and after the last one the end, again and again. Cancel-safe.
    pub(super) async fn next(&mut self) -> Step {
        loop {
            let (source, data) = &mut self.pending;
            let source = *source;
            let splitter = if source == Source::Stdout { &mut self.stdout } else { &mut self.stderr };
            if let Some((bytes, cut)) = splitter.take(data) {
                return Step::Line { source, bytes, cut, whole: true };
            }
            let Some(session) = &mut self.session else {
                for (source, splitter) in [(Source::Stdout, &mut self.stdout), (Source::Stderr, &mut self.stderr)] {
                    if let Some((bytes, cut)) = splitter.rest() {
                        return Step::Line { source, bytes, cut, whole: false };
                    }
                }
                let lost = || StreamEnd::Lost { reason: "ended".into() };
                return Step::End(self.end.clone().unwrap_or_else(lost));
            };
            let end = match session.reader.wait().await {
                Some(ChannelMsg::Data { data }) => {
                    self.pending = (Source::Stdout, data);
                    continue;
                }
                Some(ChannelMsg::ExtendedData { data, ext: 1 }) => {
                    self.pending = (Source::Stderr, data);
                    continue;
                }
                Some(ChannelMsg::ExitStatus { exit_status }) => {
                    self.status = Some(exit_status);
                    continue;
                }
                Some(ChannelMsg::ExitSignal { signal_name, .. }) => {
                    self.signal = Some(signal_text(&signal_name));
                    continue;
                }
                Some(ChannelMsg::Failure) => {
                    StreamEnd::Lost { reason: "the request to run the command was denied".into() }
                }
                None if self.status.is_none() && self.signal.is_none() => StreamEnd::Lost { reason: session.lost() },
                Some(ChannelMsg::Close) | None => StreamEnd::Exited { status: self.status, signal: self.signal.take() },
                Some(_) => continue,
            };
            if let (Some(session), StreamEnd::Exited { .. }) = (self.session.take(), &end) {
                session.finish();
            }
            self.end = Some(end);
        }
    }
}

/// Cuts a byte stream into lines of bounded length.
struct Splitter {
    line: Vec<u8>,
    cut: bool,
    max_bytes: usize,
}

impl Splitter {
    fn new(max_bytes: usize) -> Self {
        Splitter { line: Vec::new(), cut: false, max_bytes }
    }

    /// The next whole line of `data`, which moves forward; `None` when it is used up.
    fn take(&mut self, data: &mut Bytes) -> Option<(Vec<u8>, bool)> {
        let newline = data.iter().position(|b| *b == b'\n');
        let piece = data.split_to(newline.unwrap_or(data.len()));
        let room = self.max_bytes.saturating_sub(self.line.len());
        self.line.extend_from_slice(&piece[..piece.len().min(room)]);
        self.cut |= piece.len() > room;
        if newline.is_some() {
            data.advance(1);
        }
        newline.map(|_| (std::mem::take(&mut self.line), std::mem::take(&mut self.cut)))
    }

    /// What came after the last newline.
    fn rest(&mut self) -> Option<(Vec<u8>, bool)> {
        let found = !self.line.is_empty() || self.cut;
        found.then(|| (std::mem::take(&mut self.line), std::mem::take(&mut self.cut)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(chunks: &[&[u8]]) -> Vec<(Vec<u8>, bool)> {
        let mut splitter = Splitter::new(LINE_MAX_BYTES);
        let mut found = Vec::new();
        for chunk in chunks {
            let mut data = Bytes::copy_from_slice(chunk);
            while let Some(line) = splitter.take(&mut data) {
                found.push(line);
            }
        }
        found.extend(splitter.rest());
        found
    }

    #[test]
    fn lines_are_found_across_chunks() {
        assert_eq!(
            lines(&[b"a\nb", b"c\n", b"\n", b"d"]),
            [(b"a".to_vec(), false), (b"bc".to_vec(), false), (vec![], false), (b"d".to_vec(), false)]
        );
        assert_eq!(lines(&[]), []);
        assert_eq!(lines(&[b"x\n"]), [(b"x".to_vec(), false)]);
    }

    #[test]
    fn a_long_line_is_cut_and_marked_and_the_next_is_whole() {
        let long = vec![b'x'; LINE_MAX_BYTES / 2 + 1];
        let found = lines(&[&long, &long, b"tail\nnext\n"]);
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].0.len(), LINE_MAX_BYTES);
        assert!(found[0].1);
        assert_eq!(found[1], (b"next".to_vec(), false));
        let exact = vec![b'x'; LINE_MAX_BYTES];
        assert_eq!(lines(&[&exact, b"\n"]), [(exact, false)]);
    }
}
