//! UTF-16 logs, as PowerShell and WSL write them, read as UTF-8.

use std::io::{self, Read};

/// Bytes read at a time.
const CHUNK_BYTES: usize = 16 << 10;

/// Byte order of a text that begins with a byte-order mark.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// `FF FE`.
    Little,
    /// `FE FF`.
    Big,
}

/// Byte order told by the first two bytes.
pub(crate) fn order(start: &[u8]) -> Option<Order> {
    match start {
        [0xff, 0xfe, ..] => Some(Order::Little),
        [0xfe, 0xff, ..] => Some(Order::Big),
        _ => None,
    }
}

/// Turns UTF-16 into UTF-8; what is no UTF-16 becomes U+FFFD.
pub(crate) struct Decoder<R> {
    inner: R,
    order: Order,
    /// UTF-8 not handed out yet, and how much of it is.
    out: Vec<u8>,
    done: usize,
    /// An odd byte, a high surrogate: the start of what the next chunk ends.
    odd: Option<u8>,
    high: Option<u16>,
}

impl<R: Read> Decoder<R> {
    pub(crate) fn new(inner: R, order: Order) -> Self {
        Self { inner, order, out: Vec::new(), done: 0, odd: None, high: None }
    }

    /// Decodes one more chunk; false at the end.
    fn fill(&mut self) -> io::Result<bool> {
        let mut chunk = [0u8; CHUNK_BYTES];
        let count = self.inner.read(&mut chunk)?;
        self.out.clear();
        self.done = 0;
        let mut units = Vec::with_capacity(count / 2 + 2);
        units.extend(self.high.take());
        for &byte in &chunk[..count] {
            match self.odd.take() {
                None => self.odd = Some(byte),
                Some(first) => units.push(match self.order {
                    Order::Little => u16::from_le_bytes([first, byte]),
                    Order::Big => u16::from_be_bytes([first, byte]),
                }),
            }
        }
        if count > 0 && units.last().is_some_and(|u| (0xd800..0xdc00).contains(u)) {
            self.high = units.pop();
        }
        for unit in char::decode_utf16(units) {
            let mut buffer = [0u8; 4];
            self.out.extend_from_slice(unit.unwrap_or(char::REPLACEMENT_CHARACTER).encode_utf8(&mut buffer).as_bytes());
        }
        Ok(count > 0)
    }
}

impl<R: Read> Read for Decoder<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.done == self.out.len() {
            if !self.fill()? && self.out.is_empty() {
                return Ok(0);
            }
        }
        let count = buffer.len().min(self.out.len() - self.done);
        buffer[..count].copy_from_slice(&self.out[self.done..self.done + count]);
        self.done += count;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_orders_and_surrogates_across_reads() {
        let text = "panic: 🦀 x";
        for (order, bytes) in [
            (Order::Little, text.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>()),
            (Order::Big, text.encode_utf16().flat_map(u16::to_be_bytes).collect()),
        ] {
            struct OneByte<'a>(&'a [u8]);
            impl Read for OneByte<'_> {
                fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                    let n = self.0.len().min(1);
                    buffer[..n].copy_from_slice(&self.0[..n]);
                    self.0 = &self.0[n..];
                    Ok(n)
                }
            }
            let mut out = String::new();
            Decoder::new(OneByte(&bytes), order).read_to_string(&mut out).unwrap();
            assert_eq!(out, text);
        }
    }
}
