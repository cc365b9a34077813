//! ANSI escape sequences.

use std::borrow::Cow;

const ESC: u8 = 0x1b;

/// The text without CSI and OSC sequences; borrowed where there are none.
#[must_use]
pub fn strip(text: &[u8]) -> Cow<'_, [u8]> {
    if !text.contains(&ESC) {
        return Cow::Borrowed(text);
    }
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&byte, tail)) = rest.split_first() {
        if byte == ESC {
            rest = after_sequence(tail);
        } else {
            out.push(byte);
            rest = tail;
        }
    }
    Cow::Owned(out)
}

/// What follows an escape sequence whose ESC is already taken off.
fn after_sequence(text: &[u8]) -> &[u8] {
    match text.first() {
        // CSI: parameters, then one final byte.
        Some(b'[') => {
            let end = text[1..].iter().position(|b| (0x40..=0x7e).contains(b));
            end.map_or(&[], |end| &text[end + 2..])
        }
        // OSC: up to BEL or ST.
        Some(b']') => {
            let end = text.iter().position(|&b| b == 0x07 || b == ESC);
            match end {
                Some(end) if text[end] == 0x07 => &text[end + 1..],
                Some(end) => text.get(end + 2..).unwrap_or(&[]),
                None => &[],
            }
        }
        Some(_) => &text[1..],
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::strip;

    #[test]
    fn sequences_are_removed_and_plain_text_is_borrowed() {
        assert_eq!(&*strip(b"\x1b[36mINFO\x1b[0m[0000] x"), b"INFO[0000] x");
        assert_eq!(&*strip(b"\x1b]0;title\x07rest"), b"rest");
        assert_eq!(&*strip(b"cut\x1b["), b"cut");
        assert!(matches!(strip(b"plain"), std::borrow::Cow::Borrowed(_)));
    }
}
