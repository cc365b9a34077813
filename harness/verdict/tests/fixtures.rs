//! Every failure mode, its look-alikes and healthy clusters, in the dialects they come in: the verdict as a person reads it.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on says so")]

mod common;

use std::fs::{self, File};
use std::io::BufReader;
use std::path::{Path, PathBuf};

use verdict::{Catalogue, Classifier, Context, Verdict, diagnose_reader};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn files(path: &Path, out: &mut Vec<PathBuf>) {
    if path.is_file() {
        out.push(path.to_owned());
        return;
    }
    let mut entries: Vec<_> = fs::read_dir(path).unwrap().map(|e| e.unwrap().path()).collect();
    entries.sort();
    for entry in entries {
        files(&entry, out);
    }
}

fn diagnose(path: &Path, context: &Context, catalogue: &Catalogue) -> Verdict {
    let mut classifier = Classifier::new(catalogue);
    let mut all = Vec::new();
    files(path, &mut all);
    for file in all {
        let name = file.strip_prefix(folder()).unwrap().display().to_string();
        diagnose_reader(&name, BufReader::new(File::open(&file).unwrap()), &mut classifier).unwrap();
    }
    classifier.conclude(context)
}

/// A fixture's name begins with what it has to be: `fm2-…`, `look-…` and `unknown-…` (no id, failed), `healthy-…`.
#[test]
fn every_fixture_gets_its_id_and_its_text() {
    let mut entries: Vec<_> = fs::read_dir(folder()).unwrap().map(|e| e.unwrap().path()).collect();
    entries.sort();
    assert!(entries.len() >= 55, "fixtures are missing");
    let catalogue = common::catalogue();
    let mut wrong = Vec::new();
    for entry in entries {
        let name = entry.file_stem().unwrap().to_string_lossy().into_owned();
        let verdict = diagnose(&entry, &Context::default(), &catalogue);
        let want = match name.split('-').next().unwrap() {
            "healthy" | "look" | "unknown" => None,
            mode => Some(format!("FM-{}", mode.trim_start_matches("fm"))),
        };
        let healthy = name.starts_with("healthy");
        if verdict.id != want || (healthy && verdict.outcome != verdict::Outcome::NoFailureSeen) {
            wrong.push(format!("{name}: want {want:?}, got\n{verdict}"));
        }
        insta::with_settings!({ snapshot_path => "snapshots", prepend_module_to_snapshot => false, omit_expression => true }, {
            insta::assert_snapshot!(name, verdict.render_human());
        });
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// What `grep -Hn` and `rg` put before every line takes nothing away from it and adds nothing to it.
#[test]
fn a_log_through_grep_gets_the_same_verdict() {
    let catalogue = common::catalogue();
    // A broken line is not put together behind what grep says.
    let is_whole = |path: &PathBuf| path.is_file() && !path.to_string_lossy().contains("wrapped-by");
    let logs = fs::read_dir(folder()).unwrap().map(|e| e.unwrap().path()).filter(is_whole);
    let mut wrong = Vec::new();
    for log in logs {
        let text = fs::read(&log).unwrap();
        let mut found = Vec::new();
        for (n, line) in text.split_inclusive(|&b| b == b'\n').enumerate() {
            found.extend(format!("logs/all.txt:{}:", n + 1).as_bytes());
            found.extend(line);
        }
        let verdict_of = |bytes: &[u8]| {
            let mut classifier = Classifier::new(&catalogue);
            diagnose_reader("found.txt", bytes, &mut classifier).unwrap();
            let verdict = classifier.conclude(&Context::default());
            let times: Vec<_> = verdict.evidence.iter().map(|line| (line.node.clone(), line.at)).collect();
            (verdict.id, verdict.look_alike.map(|known| known.id), verdict.outcome, times)
        };
        let (plain, grepped) = (verdict_of(&text), verdict_of(&found));
        if plain != grepped {
            wrong.push(format!("{}: {plain:?}, through grep {grepped:?}", log.display()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Logs that are misread once they are broken: in each, what speaks against the id is in a line that is not put together.
const MISREAD: [&str; 5] = [
    "healthy-agent-registers",
    "healthy-joiner-waits",
    "look-deliberate-stop",
    "look-firewall-nixos",
    "look-kernel-module",
];

/// A mail or a terminal that breaks lines may cost the answer; another one it must not give.
#[test]
fn broken_lines_give_no_other_id() {
    let catalogue = common::catalogue();
    let logs = fs::read_dir(folder()).unwrap().map(|e| e.unwrap().path()).filter(|path| path.is_file());
    let mut wrong = Vec::new();
    for log in logs {
        let name = log.file_stem().unwrap().to_string_lossy().into_owned();
        let text = fs::read(&log).unwrap();
        let id_of = |bytes: &[u8]| {
            let mut classifier = Classifier::new(&catalogue);
            diagnose_reader("mail.txt", bytes, &mut classifier).unwrap();
            classifier.conclude(&Context::default()).id
        };
        let plain = id_of(&text);
        for (width, at_blanks) in [(72, true), (100, true), (80, false), (132, false)] {
            let lines = text.split_inclusive(|&b| b == b'\n');
            let id = id_of(&lines.flat_map(|line| wrapped(line, width, at_blanks)).collect::<Vec<u8>>());
            if id.is_some() && id != plain && !MISREAD.contains(&name.as_str()) {
                wrong.push(format!("{name}: {plain:?}, broken at {width} {id:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn wrapped(line: &[u8], width: usize, at_blanks: bool) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = line;
    while rest.len() > width {
        let blank = rest[..width].iter().rposition(|&b| b == b' ').filter(|&at| at_blanks && at > 0);
        let end = blank.unwrap_or(width);
        out.extend(&rest[..end]);
        out.push(b'\n');
        rest = &rest[end + usize::from(blank.is_some())..];
    }
    out.extend(rest);
    out
}
