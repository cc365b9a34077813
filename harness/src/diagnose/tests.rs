use std::io::Write as _;

use super::*;

fn catalogue() -> Catalogue {
    crate::catalogue::shipped().unwrap()
}

const FM2: &str = "Nov 21 02:44:00 server-2 k3s[532]: time=\"2026-11-21T02:44:00Z\" level=fatal msg=\"starting kubernetes: preparing server: bootstrap data already found and encrypted with different token\"\n";

fn gz(bytes: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    out.write_all(bytes).unwrap();
    out.finish().unwrap()
}

fn zst(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 3).unwrap()
}

fn tar_of(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut out = tar::Builder::new(Vec::new());
    for (name, bytes) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        out.append_data(&mut header, name, *bytes).unwrap();
    }
    out.into_inner().unwrap()
}

fn zip_of(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut out = zip::ZipWriter::new(Cursor::new(Vec::new()));
    for (name, bytes) in files {
        let method = if bytes.len() % 2 == 0 { zip::CompressionMethod::Stored } else { zip::CompressionMethod::Zstd };
        out.start_file(*name, zip::write::SimpleFileOptions::default().compression_method(method)).unwrap();
        out.write_all(bytes).unwrap();
    }
    out.finish().unwrap().into_inner()
}

fn read(name: &str, bytes: &[u8]) -> Result<Diagnosis, Error> {
    diagnose_bytes(name, bytes, &catalogue(), &Limits::default())
}

/// Id and notes, or the error.
fn show(name: &str, bytes: &[u8]) -> String {
    match read(name, bytes) {
        Ok(d) => format!("{} {} {:?}", d.verdict.id.unwrap_or_else(|| "-".to_owned()), d.logs.len(), d.notes),
        Err(error) => format!("error: {error}"),
    }
}

#[test]
fn every_wrapping_gives_the_same_answer() {
    let text = FM2.as_bytes();
    let utf16: Vec<u8> = [0xff, 0xfe].into_iter().chain(FM2.encode_utf16().flat_map(u16::to_le_bytes)).collect();
    let tar = tar_of(&[("a/server-2/journal.log", text)]);
    let long = format!("{}/server-2/journal.log", "deep/".repeat(40));
    let cases: [(&str, Vec<u8>); 14] = [
        ("plain", text.to_vec()),
        ("utf-16", utf16.clone()),
        ("utf-16 without its mark", utf16[2..].to_vec()),
        ("gz", gz(text)),
        ("gz of utf-16", gz(&utf16)),
        ("zst", zst(text)),
        ("two gzip members", [gz(b"x\n"), gz(text)].concat()),
        ("tar", tar.clone()),
        ("tar.gz", gz(&tar)),
        ("tar.zst", zst(&tar)),
        ("zip", zip_of(&[("server-2/journal.log", text)])),
        ("tar.gz in zip", zip_of(&[("x.bin", &[0; 64]), ("art.tgz", &gz(&tar))])),
        ("zip in tar", tar_of(&[("logs.zip", &zip_of(&[("server-2.log.gz", &gz(text))]))])),
        ("tar with a long name", tar_of(&[(&long, text)])),
    ];
    for (what, bytes) in cases {
        let got = read("input", &bytes).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(got.verdict.id.as_deref(), Some("FM-2"), "{what}: {:?}", got.notes);
        assert_eq!(got.verdict.node.as_deref(), Some("server-2"), "{what}");
        assert_eq!(got.logs.len(), 1, "{what}: {:?}", got.logs);
    }
}

#[test]
fn bad_input_gets_an_answer_or_a_clear_error() {
    let whole = gz(format!("{}{FM2}", "filler line\n".repeat(50_000)).as_bytes());
    let early = gz(format!(
        "{FM2}{}",
        (0..40_000).map(|n: u32| format!("{}\n", n.wrapping_mul(2_654_435_761))).collect::<String>()
    )
    .as_bytes());
    let zstd = zst(FM2.repeat(2000).as_bytes());
    let three = zip_of(&[("b.zip", &zip_of(&[("c.zip", &zip_of(&[("d.log", FM2.as_bytes())]))]))]);
    let mut corrupt_zip = zip_of(&[("a.log", FM2.as_bytes()), ("b.log", b"even")]);
    let end = corrupt_zip.len() - 30;
    corrupt_zip[end..].fill(0xee);
    assert_eq!(show("e", b""), "error: nothing to read: the input is empty");
    assert_eq!(show("e.gz", &gz(b"")), "error: nothing to read: the input is empty");
    assert!(show("x.gz", &whole[..12]).starts_with("error: nothing to read:\nx.gz: ends early: "));
    assert!(
        show("x.gz", &early[..early.len() / 2]).starts_with("FM-2 1 [\"x.gz: ends early: "),
        "what stands before is read"
    );
    assert!(show("x.gz", &whole[..whole.len() - 9]).contains("x.gz: ends early: "));
    assert!(show("x.zst", &zstd[..zstd.len() - 3]).contains("x.zst: ends early: "));
    assert!(show("prog", b"\x7fELF\x02\x01").ends_with("prog: not read: it is a program"));
    assert!(show("zeros", &[0; 4096]).ends_with("zeros: not read: it is binary"));
    assert!(show("a.xz", b"\xfd7zXZ\x00\x00").contains("try: xz -dc FILE | harness diagnose -"));
    assert!(show("a.zip", &three).ends_with("c.zip: not read: an archive within an archive within an archive"));
    assert!(show("a.zip", &corrupt_zip).starts_with("error: nothing to read:\na.zip: not read: "));
    assert!(show("a.tar", &tar_of(&[("x.log", FM2.as_bytes())])[..700]).starts_with("FM-2 1"), "a tar cut in a file");
    assert!(show("gz3", &gz(&gz(&gz(FM2.as_bytes())))).ends_with("gz3: not read: compressed more than 2 times"));
    assert_eq!(show("noise", b"\xc3\x28\xff\xfe\x80 caf\xe9 \x1b[31m\r\n"), "- 1 []");
}

#[test]
fn a_line_of_ten_megabytes_is_read() {
    let mut line = vec![b'x'; 10 << 20];
    line.extend_from_slice(b" level=fatal msg=\"bootstrap data already found and encrypted with different token\"\n");
    assert!(show("long.log", &line).starts_with("FM-2 1"), "{}", show("long.log", &line));
}

#[test]
fn bombs_end_early() {
    let limits = Limits {
        expanded_bytes_max: 8 << 20,
        ratio_from_bytes: 1 << 20,
        ratio_max: 1100,
        spool_bytes_max: 2 << 20,
        files_max: 5,
        index_bytes_max: 2000,
        ..Limits::default()
    };
    let run = |name: &str, bytes: &[u8]| match diagnose_bytes(name, bytes, &catalogue(), &limits) {
        Ok(d) => (d.logs.iter().map(|l| l.bytes).sum::<u64>(), d.notes.join("|")),
        Err(error) => (0, error.to_string()),
    };
    let filler = b"all is well\n".repeat(4 << 20);
    let (read, notes) = run("bomb.zst", &zst(&filler));
    assert!(read < 9 << 20 && (notes.contains("bomb") || notes.contains("more than 8 MiB")), "{read} {notes}");
    let (read, notes) = run("bomb.gz.gz", &gz(&gz(&filler)));
    assert!(read < 9 << 20 && !notes.is_empty(), "{read} {notes}");
    let (_, notes) = run("big.tar.gz", &gz(&tar_of(&[("a.log", &filler[..4 << 20])])));
    assert!(notes.contains("larger than 2 MiB"), "{notes}");
    let many: Vec<(String, &[u8])> = (0..9).map(|n| (format!("{n}.log"), &b"x\n"[..])).collect();
    let many: Vec<(&str, &[u8])> = many.iter().map(|(name, bytes)| (name.as_str(), *bytes)).collect();
    let (read, notes) = run("many.zip", &zip_of(&many));
    assert!(read == 10 && notes.contains("more than 5 files"), "{read} {notes}");
    let names: Vec<String> = (0..60).map(|n| format!("{n}-{}.log", "n".repeat(60))).collect();
    let wide: Vec<(&str, &[u8])> = names.iter().map(|name| (name.as_str(), &b"x\n"[..])).collect();
    assert!(
        run("wide.zip", &zip_of(&wide)).1.contains("table of contents is too large"),
        "{:?}",
        run("wide.zip", &zip_of(&wide))
    );
}

#[test]
fn names_of_an_archive_do_no_harm() {
    let tar = tar_of(&[("server-2/a\u{1b}[2J.log", FM2.as_bytes())]);
    let got = read("t.tar", &tar).unwrap();
    assert_eq!(got.logs[0].name, "t.tar/server-2/a?[2J.log");
    // A link is not followed, a device not read.
    let mut out = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Symlink);
    header.set_size(0);
    out.append_link(&mut header, "journal.log", "/etc/passwd").unwrap();
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Char);
    header.set_size(0);
    header.set_cksum();
    out.append_data(&mut header, "dev", &b""[..]).unwrap();
    let text = read("l.tar", &out.into_inner().unwrap()).unwrap_err().to_string();
    assert!(text.contains("1 links were not followed") && text.contains("1 files were not read"), "{text}");
}

#[test]
fn a_file_that_is_there_twice_is_read_once() {
    let dir = tempfile::tempdir().unwrap();
    let log = format!("{}{FM2}", "all is well\n".repeat(1000));
    for name in ["a/server-2.log", "b/copy.log", "b/other.log"] {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, if name == "b/other.log" { format!("{log}more\n") } else { log.clone() }).unwrap();
    }
    let inputs = [Input::Path(dir.path().to_owned()), Input::Path(dir.path().join("a/server-2.log"))];
    let got = diagnose(&inputs, &catalogue(), &Limits::default()).unwrap();
    assert_eq!(got.logs.len(), 2, "{:?}", got.logs);
    assert_eq!(
        got.notes.iter().filter(|note| note.ends_with("a/server-2.log; read once")).count(),
        2,
        "{:?}",
        got.notes
    );
}

#[test]
fn only_near_folders_tell_a_node() {
    assert_eq!(file_name(Path::new("/home/ci/agent-1/work/job/out/k3s.log")), "job/out/k3s.log");
    assert_eq!(file_name(Path::new("../server-1/journal.log")), "server-1/journal.log");
    assert_eq!(file_name(Path::new("./k3s.log")), "k3s.log");
}

/// 200,000 inputs (or as many hundreds as `HARNESS_FUZZ_BATCHES` says) made from real ones by a fixed sequence of damage:
/// an answer each time, and no panic.
#[test]
fn two_hundred_thousand_damaged_inputs_do_no_harm() {
    let batches = std::env::var("HARNESS_FUZZ_BATCHES").map_or(2_000, |text| text.parse::<u32>().unwrap());
    let catalogue = catalogue();
    let seeds: Vec<Vec<u8>> = vec![
        FM2.as_bytes().to_vec(),
        b"2026-11-21 02:10:46.665 W | rafthttp: health check for peer 8e9e05c52164694d could not connect: dial tcp\n".to_vec(),
        b"{\"level\":\"warn\",\"ts\":\"2026-11-21T02:32:37Z\",\"msg\":\"lost leader\"}\n{\"MESSAGE\":[112,97,110],\"_PID\":\"1\"}\n".to_vec(),
        b"__REALTIME_TIMESTAMP=1795228957000000\n_HOSTNAME=server-1\nMESSAGE=k3s.service: Main process exited, code=exited, status=1/FAILURE\n\n".to_vec(),
        b"F1121 02:44:00.872970       1 server.go:205] leaderelection lost\ngoroutine 1 [running]:\nmain.main()\n\t/go/x.go:1 +0x1\n".to_vec(),
        [0xff, 0xfe].into_iter().chain("login: leaderelection lost\n".encode_utf16().flat_map(u16::to_le_bytes)).collect(),
        gz(FM2.as_bytes()),
        zst(FM2.as_bytes()),
        tar_of(&[("server-1/x.log", FM2.as_bytes())])[..1100].to_vec(),
        zip_of(&[("server-1/x.log", FM2.as_bytes())]),
    ];
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = move |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state % below.max(1) as u64).unwrap()
    };
    let limits = Limits::default();
    let mut answered = 0_u32;
    for batch in 0..batches {
        // A hundred inputs share a session: archives and verdicts are made rarely, lines often.
        let mut session = Session::new(&catalogue, &limits);
        for _ in 0..100 {
            // Archives need a temporary file each: every twentieth batch has them.
            let kinds = if batch % 20 == 0 { seeds.len() } else { 8 };
            let mut bytes = seeds[next(kinds)].clone();
            for _ in 0..next(5) {
                let at = next(bytes.len());
                match next(5) {
                    0 => bytes[at] = u8::try_from(next(256)).unwrap(),
                    1 => bytes[at] ^= 1 << next(8),
                    2 => bytes.truncate(at.max(1)),
                    3 => bytes.insert(at, b"\n\0\"\\{[<%="[next(9)]),
                    _ => {
                        let end = (at + next(40)).min(bytes.len());
                        let piece = bytes[at..end].to_vec();
                        bytes.splice(at..at, piece);
                    }
                }
            }
            session.member("server-1/fuzz.log", Source::Stream(&mut &*bytes), Nesting::default());
            answered += 1;
        }
        let _ = session.conclude();
    }
    assert_eq!(answered, batches * 100);
}
