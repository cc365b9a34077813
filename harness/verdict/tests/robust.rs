//! Bad input gets an answer, never a panic, in bounded memory.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on says so")]

mod common;

use std::io::{self, BufReader, Read};

use verdict::{Catalogue, Classifier, Context, Outcome, diagnose_reader};

fn diagnose(catalogue: &Catalogue, name: &str, bytes: &[u8]) -> (verdict::Verdict, verdict::Scan) {
    let mut classifier = Classifier::new(catalogue);
    let scan = diagnose_reader(name, bytes, &mut classifier).unwrap();
    (classifier.conclude(&Context::default()), scan)
}

#[test]
fn empty_binary_and_cut_input() {
    let catalogue = common::catalogue();
    for bytes in [
        &b""[..],
        b"\0\0\0\0",
        b"\xff\xfe",
        b"\xfe\xff\x00",
        b"\n\n\n",
        b"{\"MESSAGE\":[",
        b"\"MESSAGE\":[1,2",
        b"MESSAGE=",
        &[0x1b; 64],
    ] {
        assert_eq!(diagnose(&catalogue, "x", bytes).0.outcome, Outcome::NoFailureSeen);
    }
}

#[test]
fn a_line_of_ten_megabytes_and_one_without_an_end() {
    let catalogue = common::catalogue();
    let mut bytes = vec![b'x'; 10 << 20];
    bytes.extend_from_slice(b" panic: bootstrap data already found and encrypted with different token ");
    bytes.resize(bytes.len() + (3 << 20), b'y');
    let (verdict, scan) = diagnose(&catalogue, "x", &bytes);
    assert_eq!((verdict.id.as_deref(), scan.lines), (Some("FM-2"), 1));
    assert!(verdict.evidence[0].text.len() < 600);
}

#[test]
fn text_across_two_buffers_is_found() {
    let catalogue = common::catalogue();
    let line = b"\npanic: bootstrap data already found and encrypted with different token\n";
    for shift in [0, 1, 20, 40, line.len() - 1] {
        let mut bytes = vec![b'-'; (1 << 20) - shift];
        bytes.extend_from_slice(line);
        assert_eq!(diagnose(&catalogue, "x", &bytes).0.id.as_deref(), Some("FM-2"), "shift {shift}");
    }
}

#[test]
fn utf16_from_windows() {
    let catalogue = common::catalogue();
    let text = "\u{feff}Nov 21 02:44:00 server-2 k3s[1]: panic: bootstrap data already found and encrypted with different token\r\n";
    let bytes: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let verdict = diagnose(&catalogue, "wsl.log", &bytes).0;
    assert_eq!((verdict.id.as_deref(), verdict.node.as_deref()), (Some("FM-2"), Some("server-2")));
}

#[test]
fn the_journal_export_format_has_node_and_time() {
    let catalogue = common::catalogue();
    let text = "__CURSOR=s=1\n__REALTIME_TIMESTAMP=1795229040000000\n_HOSTNAME=server-2\nSYSLOG_IDENTIFIER=k3s\nMESSAGE=panic: bootstrap data already found and encrypted with different token\n_PID=4\n\n__CURSOR=s=2\n_HOSTNAME=other\nMESSAGE=x\n\n";
    let verdict = diagnose(&catalogue, "export", text.as_bytes()).0;
    assert_eq!((verdict.id.as_deref(), verdict.node.as_deref()), (Some("FM-2"), Some("server-2")));
    assert_eq!(verdict.evidence[0].at.unwrap().to_string(), "2026-11-21T02:44:00Z");
}

#[test]
fn a_reader_that_fails_keeps_what_was_read() {
    struct Fails<'a>(&'a [u8]);
    impl Read for Fails<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            if self.0.is_empty() { Err(io::Error::other("truncated gzip")) } else { self.0.read(buffer) }
        }
    }
    let mut classifier = Classifier::new(&common::catalogue());
    let text = b"panic: bootstrap data already found and encrypted with different token\nmore";
    assert!(diagnose_reader("x.gz", BufReader::new(Fails(text)), &mut classifier).is_err());
    assert_eq!(classifier.conclude(&Context::default()).id.as_deref(), Some("FM-2"));
}

/// Real lines, cut, spliced and overwritten at random.
#[test]
fn noise_never_panics() {
    let catalogue = common::catalogue();
    let mut seeds: Vec<Vec<u8>> = Vec::new();
    for mode in catalogue.modes() {
        for sign in &mode.signs {
            seeds.extend(sign.examples.iter().map(|e| e.clone().into_bytes()));
        }
    }
    seeds.extend([
        b"{\"MESSAGE\":[112,97],\"_HOSTNAME\":[\"a\",\"b\"]}".to_vec(),
        b"{\"log\":\"\\ud800\\n\"}".to_vec(),
        b"\x1b[36;1mserver-1 login: ".to_vec(),
        b"server_1 # [    4.1] systemd[1]: Hostname set to <server-2>.".to_vec(),
    ]);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = |bound: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state >> 11).unwrap_or(0) % bound.max(1)
    };
    let mut classifier = Classifier::new(&catalogue);
    for _ in 0..3_000 {
        let mut bytes = Vec::new();
        for _ in 0..=next(4) {
            bytes.extend_from_slice(&seeds[next(seeds.len())]);
            if next(3) > 0 {
                bytes.push(b'\n');
            }
        }
        for _ in 0..next(8) {
            let at = next(bytes.len());
            match next(3) {
                0 => bytes[at] = u8::try_from(next(256)).unwrap_or(0),
                1 => bytes.insert(at, u8::try_from(next(256)).unwrap_or(0)),
                _ => bytes.truncate(at + 1),
            }
        }
        diagnose_reader("server-1/x.log", bytes.as_slice(), &mut classifier).unwrap();
    }
    let verdict = classifier.conclude(&Context::default());
    assert!(verdict.evidence.len() <= 10);
    assert!(verdict.render_human().lines().count() < 60);
}
