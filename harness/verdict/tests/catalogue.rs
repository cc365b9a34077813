//! The catalogue as it is shipped: it loads, and every sign matches what it says it matches.

mod common;

use verdict::dialect::program;
use verdict::line::LineReader;

#[test]
fn every_sign_matches_its_examples_and_no_others() {
    let catalogue = common::catalogue();
    let mut failures = Vec::new();
    for mode in catalogue.modes() {
        for sign in &mode.signs {
            let pattern = regex::bytes::Regex::new(&format!("(?-u){}", sign.pattern)).unwrap();
            let unless = sign.unless.as_ref().map(|u| regex::bytes::Regex::new(&format!("(?-u){u}")).unwrap());
            let matches = |example: &str| {
                let line = LineReader::new().read(example.as_bytes());
                let anchored = sign.anchors.iter().any(|a| example.contains(a.as_str()));
                let kind = program::read(&line.message, 2026).kind.unwrap_or_default();
                let source =
                    sign.sources.is_empty() || kind == verdict::SourceKind::Unknown || sign.sources.contains(&kind);
                let voided = unless.as_ref().is_some_and(|u| u.is_match(&line.message));
                (anchored, pattern.is_match(&line.message) && !voided && source)
            };
            for example in &sign.examples {
                if matches(example) != (true, true) {
                    failures.push(format!(
                        "{}/{} should match (anchor, pattern) {:?}: {example}",
                        mode.id,
                        sign.name,
                        matches(example)
                    ));
                }
            }
            for example in &sign.not_examples {
                if matches(example).1 {
                    failures.push(format!("{}/{} should not match: {example}", mode.id, sign.name));
                }
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn the_seven_modes_are_complete() {
    let catalogue = common::catalogue();
    for n in 1..=7 {
        let id = format!("FM-{n}");
        let mode = catalogue.get(&id).unwrap_or_else(|| panic!("{id} is missing"));
        assert!(!mode.signs.is_empty() && !mode.rules.is_empty(), "{id} has no signs or rules");
        assert!(
            !mode.remedy.is_empty() && !mode.prevention.is_empty() && !mode.references.is_empty(),
            "{id} has no remedy, prevention or references"
        );
        assert!(mode.signs.iter().any(|s| !s.examples.is_empty()), "{id} has no examples");
    }
}

#[test]
fn modes_outside_the_catalogue_never_have_an_fm_id() {
    for mode in common::catalogue().modes() {
        assert_eq!(mode.id.starts_with("FM-"), mode.kind == verdict::Kind::Failure, "{}", mode.id);
    }
}
