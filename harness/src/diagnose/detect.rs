//! What a file is, told by its first bytes. Names lie: a `.log` can be gzip, a `.gz` can be text.

/// Bytes looked at: a tar's magic stands at 257.
pub(super) const HEAD_BYTES: usize = 8 << 10;

/// Share of NUL bytes from which on a file counts as no text, in percent. A console or a journal export has some, and so
/// has a log whose machine lost its power.
const NUL_PCT: usize = 30;

/// Share of other control characters from which on a file counts as no text, in percent. Random bytes have 10, a console that
/// draws boxes and moves its cursor has 2.
const CONTROL_PCT: usize = 5;

/// What a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// Lines, in whatever encoding.
    Text,
    /// Lines in UTF-16 without the mark that says so; little-endian or not.
    BareUtf16(bool),
    /// Nothing at all.
    Empty,
    /// RFC 1952, one or more members.
    Gzip,
    /// RFC 8878, one or more frames.
    Zstd,
    /// A zip archive.
    Zip,
    /// A POSIX or GNU tar archive.
    Tar,
    /// Something that is no log, or a log in a form that is not read: what it is, and what to do instead where that is known.
    Other(&'static str, Option<&'static str>),
}

const MAGICS: [(&[u8], Form); 17] = [
    (b"\x1f\x8b", Form::Gzip),
    (b"\x28\xb5\x2f\xfd", Form::Zstd),
    (b"PK\x03\x04", Form::Zip),
    (b"PK\x05\x06", Form::Zip),
    (b"\xfd7zXZ\x00", Form::Other("xz-compressed", Some("xz -dc FILE | harness diagnose -"))),
    (b"BZh", Form::Other("bzip2-compressed", Some("bzip2 -dc FILE | harness diagnose -"))),
    (b"\x04\x22\x4d\x18", Form::Other("lz4-compressed", Some("lz4 -dc FILE | harness diagnose -"))),
    (b"7z\xbc\xaf\x27\x1c", Form::Other("a 7z archive", Some("unpack it and name the folder"))),
    (b"LPKSHHRH", Form::Other("a binary journal", Some("journalctl --file FILE -o export | harness diagnose -"))),
    (b"\x7fELF", Form::Other("a program", None)),
    (b"QFI\xfb", Form::Other("a disk image", None)),
    (b"SQLite format 3\x00", Form::Other("an SQLite database", None)),
    (b"\x89PNG", Form::Other("a picture", None)),
    (b"\xff\xd8\xff", Form::Other("a picture", None)),
    (b"%PDF-", Form::Other("a PDF document", None)),
    (b"!<arch>\n", Form::Other("a library or Debian package", None)),
    (b"hsqs", Form::Other("a squashfs image", None)),
];

/// Tells the form of a file that begins with `head`.
pub(super) fn form(head: &[u8]) -> Form {
    if head.is_empty() {
        return Form::Empty;
    }
    if let Some((_, form)) = MAGICS.iter().find(|(magic, _)| head.starts_with(magic)) {
        return *form;
    }
    // A zstd stream may begin with a skippable frame.
    if head.len() >= 4 && (0x50..=0x5f).contains(&head[0]) && head[1..4] == [0x2a, 0x4d, 0x18] {
        return Form::Zstd;
    }
    if head.get(257..262) == Some(b"ustar") {
        return Form::Tar;
    }
    let utf16 = head.starts_with(b"\xff\xfe") || head.starts_with(b"\xfe\xff");
    // Western text has a NUL in every other place, and only there.
    let nuls_at = |odd: usize| head.iter().skip(odd).step_by(2).filter(|&&byte| byte == 0).count();
    let (even, odd) = (nuls_at(0), nuls_at(1));
    let (few, most) = (head.len() / 64, head.len() / 2 - head.len() / 16);
    if !utf16 && head.len() >= 16 && even.max(odd) >= most && even.min(odd) <= few {
        return Form::BareUtf16(odd > even);
    }
    let nuls = even + odd;
    let is_control = |byte: &&u8| matches!(**byte, 0x01..=0x06 | 0x0e..=0x1a | 0x1c..=0x1f | 0x7f);
    let controls = head.iter().filter(is_control).count();
    let binary = nuls * 100 >= head.len() * NUL_PCT || (head.len() >= 64 && controls * 100 >= head.len() * CONTROL_PCT);
    if !utf16 && binary && !looks_like_export(head) {
        return Form::Other("binary", None);
    }
    Form::Text
}

/// `journalctl -o export` gives lengths of messages in eight bytes, most of them zero.
fn looks_like_export(head: &[u8]) -> bool {
    head.starts_with(b"__CURSOR=")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_are_told_by_their_first_bytes() {
        let mut tar = vec![b'a'; 512];
        tar[257..262].copy_from_slice(b"ustar");
        let mut console = b"[    0.0] Linux version\n".repeat(20);
        console.extend([0; 8]);
        let bare: Vec<u8> = "leaderelection lost\n".encode_utf16().flat_map(u16::to_be_bytes).collect();
        // Every byte as often as every other.
        let noise: Vec<u8> = (0..512_u32).map(|n| u8::try_from(n * 167 % 256).unwrap_or(0)).collect();
        let drawn =
            "\u{1b}[2J\u{1b}[1;1H\u{7}\u{8}  GNU GRUB  \u{e}lqqk\u{f}\r\n[ OK ] Started x\r\n".repeat(9).into_bytes();
        let cases: [(&[u8], &str); 16] = [
            (&noise, "Other(\"binary\", None)"),
            (&drawn, "Text"),
            (&bare, "BareUtf16(false)"),
            (b"", "Empty"),
            (b"x", "Text"),
            (b"\x1f\x8b\x08", "Gzip"),
            (b"\x28\xb5\x2f\xfd\x00", "Zstd"),
            (b"\x51\x2a\x4d\x18\x00", "Zstd"),
            (b"PK\x03\x04", "Zip"),
            (&tar, "Tar"),
            (b"\xff\xfeh\x00i\x00", "Text"),
            (
                b"LPKSHHRH\x00",
                "Other(\"a binary journal\", Some(\"journalctl --file FILE -o export | harness diagnose -\"))",
            ),
            (&[0; 1024], "Other(\"binary\", None)"),
            (&console, "Text"),
            (b"__CURSOR=s\nMESSAGE\n\x05\0\0\0\0\0\0\0hello\n", "Text"),
            (b"\xe9t\xe9 latin-1", "Text"),
        ];
        for (head, want) in cases {
            assert_eq!(format!("{:?}", form(head)), want, "{head:?}");
        }
    }
}
