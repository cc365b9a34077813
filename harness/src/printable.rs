//! What a guest has said, made safe for a terminal and for reports: it is shown, never obeyed.
//!
//! A terminal takes orders from the text it is given (ECMA-48): colours and cursor movements at best, a window title, the
//! clipboard, or lines that hide other lines at worst. So whatever is no plain text is shown as an escape (`\x1b`).

use std::borrow::Cow;
use std::io::{IsTerminal, Write};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::AsyncWrite;

/// The text with every character that a terminal would act on as an escape; line feeds and tabs stay, and so does all
/// else that is plain text. A carriage return before a line feed is left out.
#[must_use]
pub fn printable(text: &str) -> Cow<'_, str> {
    if !text.contains(acts) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        if c == '\r' && rest.peek() == Some(&'\n') {
            continue;
        }
        push(&mut out, c);
    }
    Cow::Owned(out)
}

/// JSON in which strings hold no character a terminal would act on: the same document, for JSON knows an escape for each.
#[must_use]
pub fn printable_json(json: &str) -> Cow<'_, str> {
    if !json.contains(acts) {
        return Cow::Borrowed(json);
    }
    let escaped = json.chars().fold(String::with_capacity(json.len() + 16), |mut out, c| {
        if acts(c) {
            out.push_str(&format!("\\u{:04x}", u32::from(c)))
        } else {
            out.push(c)
        }
        out
    });
    Cow::Owned(escaped)
}

/// Whether a terminal acts on it: C0 but for line feed and tab, DEL, C1, and what turns the direction of text around,
/// so that it reads as something else than it is.
fn acts(c: char) -> bool {
    (c.is_control() && c != '\n' && c != '\t')
        || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

fn push(out: &mut String, c: char) {
    if !acts(c) {
        out.push(c);
    } else if u32::from(c) < 0x100 {
        out.push_str(&format!("\\x{:02x}", u32::from(c)));
    } else {
        out.push_str(&format!("\\u{{{:x}}}", u32::from(c)));
    }
}

/// Bytes as they come in, made printable: characters may be cut anywhere between two pieces.
#[derive(Debug, Default)]
pub struct Filter {
    /// The beginning of a character, or a carriage return whose line feed may follow; at most three bytes.
    held: Vec<u8>,
}

impl Filter {
    /// What can be shown after these bytes. What is not UTF-8 is shown as U+FFFD.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        let mut all = std::mem::take(&mut self.held);
        all.extend_from_slice(bytes);
        let mut whole = all.len() - incomplete(&all);
        if whole == all.len() && all.last() == Some(&b'\r') {
            whole -= 1;
        }
        self.held = all.split_off(whole);
        printable(&String::from_utf8_lossy(&all)).into_owned()
    }

    /// What was held back for more that never came.
    pub fn finish(&mut self) -> String {
        printable(&String::from_utf8_lossy(&std::mem::take(&mut self.held))).into_owned()
    }
}

/// How many bytes at the end are the beginning of a character: at most three, whatever stands before them.
fn incomplete(bytes: &[u8]) -> usize {
    let begins = |n: &usize| {
        let end = &bytes[bytes.len() - n..];
        std::str::from_utf8(end).is_err_and(|error| error.valid_up_to() == 0 && error.error_len().is_none())
    };
    (1..=bytes.len().min(3)).find(begins).unwrap_or(0)
}

/// A stream to a terminal through a [`Filter`]; to anything else, the stream itself.
#[derive(Debug)]
pub struct Shown<W> {
    to: W,
    filter: Option<Filter>,
    pending: Vec<u8>,
    written: usize,
}

impl<W: AsyncWrite + Unpin> Shown<W> {
    /// A stream that is filtered where it is a terminal.
    pub fn new(to: W, is_terminal: bool) -> Self {
        Self { to, filter: is_terminal.then(Filter::default), pending: Vec::new(), written: 0 }
    }

    fn drain(&mut self, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        while self.written < self.pending.len() {
            let n = ready!(Pin::new(&mut self.to).poll_write(cx, &self.pending[self.written..]))?;
            if n == 0 {
                return Poll::Ready(Err(std::io::ErrorKind::WriteZero.into()));
            }
            self.written += n;
        }
        self.pending.clear();
        self.written = 0;
        Poll::Ready(Ok(()))
    }
}

impl<W: AsyncWrite + Unpin> AsyncWrite for Shown<W> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<std::io::Result<usize>> {
        ready!(self.drain(cx))?;
        match &mut self.filter {
            None => Pin::new(&mut self.to).poll_write(cx, bytes),
            Some(filter) => {
                self.pending = filter.push(bytes).into_bytes();
                Poll::Ready(Ok(bytes.len()))
            }
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        ready!(self.drain(cx))?;
        Pin::new(&mut self.to).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        if let Some(filter) = &mut self.filter {
            let rest = filter.finish();
            self.pending.extend_from_slice(rest.as_bytes());
        }
        ready!(self.drain(cx))?;
        Pin::new(&mut self.to).poll_shutdown(cx)
    }
}

/// As [`Shown`], for a stream that is written to in place.
#[derive(Debug)]
pub struct ShownSync<W> {
    to: W,
    filter: Option<Filter>,
}

impl<W: Write + IsTerminal> ShownSync<W> {
    /// A stream that is filtered where it is a terminal.
    pub fn new(to: W) -> Self {
        let filter = to.is_terminal().then(Filter::default);
        Self { to, filter }
    }

    /// Writes what was held back.
    ///
    /// # Errors
    /// The system's.
    pub fn finish(&mut self) -> std::io::Result<()> {
        let rest = self.filter.as_mut().map(Filter::finish).unwrap_or_default();
        self.to.write_all(rest.as_bytes()).and_then(|()| self.to.flush())
    }
}

impl<W: Write> Write for ShownSync<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        match &mut self.filter {
            None => self.to.write(bytes),
            Some(filter) => self.to.write_all(filter.push(bytes).as_bytes()).map(|()| bytes.len()),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.to.flush()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt as _;

    use super::*;

    /// A colour, a title, the C1 form of CSI, a bell, a backspace, NUL, DEL, a lone return, text turned around.
    const LIES: &str = "a\x1b[31mred\x1b]0;title\x07 \u{9b}2J \x08\0\x7f over\rwritten \u{202e}cod.exe\r\nnext\tline\n";
    const SHOWN: &str =
        "a\\x1b[31mred\\x1b]0;title\\x07 \\x9b2J \\x08\\x00\\x7f over\\x0dwritten \\u{202e}cod.exe\nnext\tline\n";

    #[test]
    fn nothing_a_terminal_acts_on_gets_through_and_plain_text_is_as_it_was() {
        assert_eq!(printable(LIES), SHOWN);
        let plain = "größer ✓ 漢字\t…\n";
        assert!(matches!(printable(plain), Cow::Borrowed(text) if text == plain));
    }

    #[test]
    fn json_stays_the_same_document() {
        let value = serde_json::json!({ "said": LIES });
        let text = value.to_string();
        let shown = printable_json(&text);
        assert!(!shown.chars().any(acts), "{shown}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&shown).unwrap(), value);
    }

    #[test]
    fn pieces_give_what_the_whole_gives_wherever_they_are_cut() {
        for whole in [LIES.as_bytes(), "größer ✓ 漢字 🦀\n".as_bytes(), b"\xff\xfe\xe2\x9c bad \xf0\x9f\n"] {
            let expected = printable(&String::from_utf8_lossy(whole)).into_owned();
            for size in 1..=whole.len() {
                let mut filter = Filter::default();
                let mut out: String = whole.chunks(size).map(|piece| filter.push(piece)).collect();
                out.push_str(&filter.finish());
                assert_eq!(out, expected, "in pieces of {size}");
            }
        }
    }

    #[tokio::test]
    async fn a_stream_is_filtered_only_for_a_terminal() {
        for (is_terminal, expected) in [(true, SHOWN), (false, LIES)] {
            let mut out = std::io::Cursor::new(Vec::new());
            let mut shown = Shown::new(&mut out, is_terminal);
            for piece in LIES.as_bytes().chunks(3) {
                shown.write_all(piece).await.unwrap();
            }
            shown.shutdown().await.unwrap();
            assert_eq!(String::from_utf8(out.into_inner()).unwrap(), expected);
        }
    }
}
