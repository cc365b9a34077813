//! A file that is on its way: what is there of it, how it goes on, and whether it is the published one in the end.
//!
//! Beside the part lies a note of which file it is a part of. A part is continued only where the note names the digest
//! that is wanted now and the server confirms (by `If-Range`, entity tag and length) that it still serves the same file;
//! whatever was put together is judged by its digest, and made anew in one piece if that is wrong.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::sync::Arc;

use camino::{Utf8Path, Utf8PathBuf};
use reqwest::Url;
use serde::{Deserialize, Serialize};

use super::client::{Answer, Client, Resume, shown};
use super::{DownloadError, DownloadEvent, OnEvent};
use crate::lock::Held;

/// Bytes that are gathered before they are written: what a killed download loses at most.
const WRITE_BYTES: usize = 256 * 1024;

/// A file that is wanted.
pub(crate) struct Wanted {
    pub(crate) url: Url,
    /// Its digest, lowercase hexadecimal.
    pub(crate) sha256: String,
    /// Where its parts are gathered.
    pub(crate) part: Utf8PathBuf,
    /// More than it can have.
    pub(crate) max_bytes: u64,
    /// Held while anything is written: a write that is under way when the download is dropped keeps others out.
    pub(crate) lock: Arc<Held>,
}

/// What the part is a part of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Note {
    sha256: String,
    validator: Option<String>,
    total: Option<u64>,
}

impl Wanted {
    fn note_path(&self) -> Utf8PathBuf {
        Utf8PathBuf::from(format!("{}.json", self.part))
    }

    /// What is there to continue; anything else is removed.
    fn load(&self) -> Result<Option<(u64, Note)>, DownloadError> {
        let note: Option<Note> =
            std::fs::read(self.note_path()).ok().and_then(|text| serde_json::from_slice(&text).ok());
        let length = std::fs::metadata(&self.part).ok().filter(std::fs::Metadata::is_file).map(|found| found.len());
        match (note, length) {
            (Some(note), Some(offset))
                if note.sha256 == self.sha256
                    && offset > 0
                    && offset <= self.max_bytes
                    && note.total.is_none_or(|total| offset <= total) =>
            {
                Ok(Some((offset, note)))
            }
            _ => self.discard().map(|()| None),
        }
    }

    /// Removes what is there.
    pub(crate) fn discard(&self) -> Result<(), DownloadError> {
        for path in [&self.part, &self.note_path()] {
            match std::fs::remove_file(path) {
                Ok(()) => {}
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(DownloadError::io("remove", path.as_path())(error)),
            }
        }
        Ok(())
    }

    /// Removes the note of a part that became a file.
    pub(crate) fn forget(&self) {
        // A note without a part is overwritten by the next download.
        let _ = std::fs::remove_file(self.note_path());
    }

    fn write_note(&self, note: &Note) -> Result<(), DownloadError> {
        let path = self.note_path();
        let text =
            serde_json::to_vec(note).map_err(|error| DownloadError::io("write", path.as_path())(error.into()))?;
        std::fs::write(&path, text).map_err(DownloadError::io("write", path.as_path()))
    }
}

/// Fetches what is missing; afterwards the part is the whole file, has its digest and is on the disk.
pub(crate) async fn fetch(client: &Client, wanted: &Wanted, on_event: OnEvent<'_>) -> Result<u64, DownloadError> {
    let mut again = false;
    loop {
        let resumed = client.retried(&wanted.url, on_event, || attempt(client, wanted, on_event)).await?;
        let (found, bytes, note) = judge(&wanted.part, Arc::clone(&wanted.lock)).await?;
        if found == wanted.sha256 {
            return Ok(bytes);
        }
        wanted.discard()?;
        let url = shown(&wanted.url);
        // A file in one piece is what the server serves; one of several pieces gets one other chance.
        if !resumed || again {
            return Err(DownloadError::Digest { url, found, expected: wanted.sha256.clone(), note });
        }
        again = true;
        on_event(DownloadEvent::Restarted { url });
    }
}

/// One request's worth; says whether earlier bytes were continued.
async fn attempt(client: &Client, wanted: &Wanted, on_event: OnEvent<'_>) -> Result<bool, DownloadError> {
    let there = wanted.load()?;
    let resume = there.as_ref().map(|(offset, note)| Resume { offset: *offset, validator: note.validator.clone() });
    if let Some((offset, Note { total: Some(total), .. })) = &there
        && offset == total
    {
        return Ok(true);
    }
    let mut answer = client.open(&wanted.url, resume.as_ref()).await?;
    answer.expect_plain()?;
    let start = match start_of(&answer, there.as_ref()) {
        Ok(start) => start,
        Err(error) => {
            wanted.discard()?;
            return Err(error);
        }
    };
    // A server may send less than the rest; the range says how much there is in all.
    let in_range = answer.content_range().and_then(|(_, total)| total);
    let total = in_range.or_else(|| answer.length().map(|length| start.saturating_add(length)));
    let too_large = || DownloadError::TooLarge { url: shown(&wanted.url), limit: wanted.max_bytes };
    if total.is_some_and(|total| total > wanted.max_bytes) {
        return Err(too_large());
    }
    let mut writer = Writer::open(wanted, start)?;
    if start == 0 {
        wanted.write_note(&Note { sha256: wanted.sha256.clone(), validator: answer.validator(), total })?;
    }
    on_event(DownloadEvent::Started { url: answer.url().to_owned(), resumed_from: start, total });
    let mut received = start;
    loop {
        let chunk = match answer.chunk().await {
            Ok(Some(chunk)) => chunk,
            Ok(None) => break,
            Err(error) => {
                // What came is kept for the next attempt.
                writer.flush().await?;
                return Err(error);
            }
        };
        received += chunk.len() as u64;
        if received > wanted.max_bytes {
            drop(writer);
            wanted.discard()?;
            return Err(too_large());
        }
        writer.push(&chunk).await?;
        on_event(DownloadEvent::Progress { received, total });
    }
    writer.flush().await?;
    match total {
        Some(total) if received != total => {
            let reason = format!("{received} of {total} bytes came");
            Err(DownloadError::Broken { url: answer.url().to_owned(), reason })
        }
        _ => Ok(start > 0),
    }
}

/// Where in the file the body of an answer begins.
fn start_of(answer: &Answer, there: Option<&(u64, Note)>) -> Result<u64, DownloadError> {
    let url = || answer.url().to_owned();
    let differs = |reason: String| Err(DownloadError::NotResumable { url: url(), reason });
    match (answer.code(), there) {
        // The whole, be it because the file changed or because the server knows no ranges.
        (200, _) => Ok(0),
        (206, Some((offset, note))) => {
            let Some((start, total)) = answer.content_range() else {
                return differs("the server does not say which part it sends".to_owned());
            };
            if start != *offset {
                return differs(format!("byte {offset} was asked for and byte {start} comes"));
            }
            if let (Some(before), Some(now)) = (note.total, total)
                && before != now
            {
                return differs(format!("it was {before} bytes long and is {now}"));
            }
            match (&note.validator, answer.validator()) {
                (Some(before), Some(now)) if *before != now => differs(format!("it was {before} and is {now}")),
                _ => Ok(start),
            }
        }
        (416, Some((offset, _))) => differs(format!("it has no byte {offset}")),
        (_, None) | (_, Some(_)) => Err(DownloadError::Protocol { url: url(), reason: answer.unasked() }),
    }
}

/// Writes at the end of a part, gathered into large pieces and away from the threads that serve other tasks.
struct Writer {
    /// `None` only while a write is under way.
    file: Option<File>,
    path: Utf8PathBuf,
    buffer: Vec<u8>,
    lock: Arc<Held>,
}

impl Writer {
    fn open(wanted: &Wanted, start: u64) -> Result<Self, DownloadError> {
        let path = wanted.part.clone();
        let file = (|| {
            let mut file = OpenOptions::new().create(true).truncate(false).write(true).open(&path)?;
            file.set_len(start)?;
            file.seek(SeekFrom::Start(start))?;
            Ok(file)
        })();
        let file = file.map_err(DownloadError::io("write", path.as_path()))?;
        let buffer = Vec::with_capacity(WRITE_BYTES);
        Ok(Self { file: Some(file), path, buffer, lock: Arc::clone(&wanted.lock) })
    }

    async fn push(&mut self, bytes: &[u8]) -> Result<(), DownloadError> {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= WRITE_BYTES { self.flush().await } else { Ok(()) }
    }

    async fn flush(&mut self) -> Result<(), DownloadError> {
        let Some(mut file) = self.file.take() else { return Err(DownloadError::Interrupted) };
        let buffer = std::mem::take(&mut self.buffer);
        let lock = Arc::clone(&self.lock);
        let (file, mut buffer, written) = tokio::task::spawn_blocking(move || {
            let written = file.write_all(&buffer);
            drop(lock);
            (file, buffer, written)
        })
        .await
        .map_err(|_| DownloadError::Interrupted)?;
        buffer.clear();
        (self.file, self.buffer) = (Some(file), buffer);
        written.map_err(DownloadError::io("write", self.path.as_path()))
    }
}

/// Brings a file to the disk; its digest, its length and what it looks like if it is not what was wanted.
async fn judge(path: &Utf8Path, lock: Arc<Held>) -> Result<(String, u64, &'static str), DownloadError> {
    let path = path.to_owned();
    let work = move || {
        let _lock = lock;
        let mut file = File::open(&path).map_err(DownloadError::io("read", path.as_path()))?;
        file.sync_all().map_err(DownloadError::io("sync", path.as_path()))?;
        let bytes = file.metadata().map_err(DownloadError::io("read", path.as_path()))?.len();
        let mut head = Vec::with_capacity(16);
        (&mut file).take(16).read_to_end(&mut head).map_err(DownloadError::io("read", path.as_path()))?;
        let digest = crate::fs::sha256_file(&path).map_err(DownloadError::io("read", path.as_path()))?;
        Ok((digest, bytes, note(&head)))
    };
    tokio::task::spawn_blocking(work).await.map_err(|_| DownloadError::Interrupted)?
}

fn note(head: &[u8]) -> &'static str {
    match head.iter().find(|byte| !byte.is_ascii_whitespace()) {
        None => " (it is empty)",
        Some(b'<') => " (it looks like a web page)",
        Some(_) => "",
    }
}
