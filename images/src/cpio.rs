//! A writer of cpio archives as the kernel unpacks them ("newc": Documentation/driver-api/early-userspace/buffer-format).

/// Type bits of a regular file in `st_mode`.
const S_IFREG: u32 = 0o100_000;
/// Type bits of a folder.
const S_IFDIR: u32 = 0o040_000;
/// Type bits of a symbolic link.
const S_IFLNK: u32 = 0o120_000;

/// An archive in memory. Everything in it belongs to root and has modification time 0.
#[derive(Debug, Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

impl Archive {
    /// Adds a folder. Folders go before what is in them.
    pub(crate) fn folder(&mut self, path: &str) {
        self.entry(path, S_IFDIR | 0o755, &[]);
    }

    /// Adds a file.
    pub(crate) fn file(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.entry(path, S_IFREG | mode, content);
    }

    /// Adds a symbolic link.
    pub(crate) fn link(&mut self, path: &str, target: &str) {
        self.entry(path, S_IFLNK | 0o777, target.as_bytes());
    }

    /// Ends the archive and returns it.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.inode += 1;
        let links = if mode & S_IFDIR == S_IFDIR && mode & S_IFREG != S_IFREG { 2 } else { 1 };
        // ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
        let fields = [self.inode, mode, 0, 0, links, 0, content.len() as u32, 0, 0, 0, 0, path.len() as u32 + 1, 0];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08X}").bytes());
        }
        self.bytes.extend(path.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_have_the_documented_form() {
        let mut archive = Archive::default();
        archive.folder("bin");
        archive.file("init", 0o755, b"abc");
        archive.link("bin/sh", "busybox");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8_lossy(&bytes);
        let bin = "07070100000001000041ED000000000000000000000002000000000000000000000000\
                   00000000000000000000000000000004";
        assert!(text.starts_with(bin), "{text}");
        let init = "07070100000002000081ED00000000000000000000000100000000000000030000000000000000\
                    000000000000000000000005";
        assert!(text.contains(init), "{text}");
        assert!(text.contains("0000A1FF"), "{text}");
        assert!(text.contains("TRAILER!!!"));
    }

    #[test]
    fn another_implementation_reads_it() {
        let mut archive = Archive::default();
        archive.folder("d");
        archive.file("d/x", 0o644, b"12345");
        let bytes = archive.finish();
        // The reader: walk the headers by their own sizes until the trailer.
        let mut at = 0;
        let mut names = Vec::new();
        loop {
            let field = |n: usize| {
                let start = at + 6 + n * 8;
                usize::from_str_radix(std::str::from_utf8(&bytes[start..start + 8]).unwrap(), 16).unwrap()
            };
            assert_eq!(&bytes[at..at + 6], b"070701");
            let (size, name_len) = (field(6), field(11));
            let name = std::str::from_utf8(&bytes[at + 110..at + 110 + name_len - 1]).unwrap().to_owned();
            let body = (at + 110 + name_len).next_multiple_of(4);
            if name == "d/x" {
                assert_eq!(&bytes[body..body + size], b"12345");
            }
            at = (body + size).next_multiple_of(4);
            names.push(name);
            if names.last().is_some_and(|name| name == "TRAILER!!!") {
                break;
            }
        }
        assert_eq!(names, ["d", "d/x", "TRAILER!!!"]);
        assert_eq!(at, bytes.len());
    }
}
