//! What a person sees when a YAML file is wrong, and how quickly bad files are refused.

use std::collections::BTreeMap;
use std::time::Duration;

use images::yaml::{self, Segment, YamlError};
use serde::Deserialize;

#[derive(Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
struct Document {
    name: String,
    #[serde(default)]
    nodes: Vec<Node>,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    #[serde(default)]
    flag: bool,
}

#[derive(Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
struct Node {
    name: String,
    role: Role,
    #[serde(default)]
    memory_mib: u32,
    #[serde(default)]
    address: Option<std::net::Ipv4Addr>,
}

#[derive(Debug, Deserialize, PartialEq)]
#[serde(rename_all = "lowercase")]
enum Role {
    Server,
    Agent,
}

fn parse(text: &str) -> Result<Document, YamlError> {
    yaml::parse(text, "lab.yaml")
}

fn refusal(text: &str) -> String {
    let started = cpu_time();
    let error = parse(text).expect_err("must be refused");
    let took = cpu_time() - started;
    // An optimised build needs a hundredth of this; the bound catches what grows with the square of the input.
    assert!(took < Duration::from_secs(2), "refused only after {took:?} on a CPU: {error}");
    error.to_string()
}

/// What this thread has got of the CPUs: a machine that is busy with something else does not count.
fn cpu_time() -> Duration {
    let schedstat = std::fs::read_to_string("/proc/thread-self/schedstat").expect("readable");
    Duration::from_nanos(schedstat.split(' ').next().and_then(|ns| ns.parse().ok()).expect("nanoseconds"))
}

#[test]
fn a_good_document_is_read() {
    let text = "\u{feff}---\nname: a # why not\nnodes:\n  - {name: s1, role: server}\n  - name: s2\n    role: agent\n    memory_mib: 512\nlabels: {a: x, 1: y}\n";
    let document = parse(text).expect("good");
    assert_eq!(document.nodes.len(), 2);
    assert_eq!(document.nodes[1], Node { name: "s2".into(), role: Role::Agent, memory_mib: 512, address: None });
    assert_eq!(document.labels["1"], "y");
}

#[test]
fn anchors_are_understood_in_moderation() {
    let document = parse("name: &n a\nlabels: {x: *n, y: *n}\n").expect("two aliases are no bomb");
    assert_eq!(document.labels["y"], "a");
}

#[test]
fn unknown_field() {
    insta::assert_snapshot!(refusal("name: a\nnodes:\n  - name: s1\n    rolle: server\n"));
}

#[test]
fn unknown_field_with_nothing_close() {
    insta::assert_snapshot!(refusal("name: a\nzzz: 1\n"));
}

#[test]
fn unknown_variant() {
    insta::assert_snapshot!(refusal("name: a\nnodes:\n  - {name: s1, role: severr}\n"));
}

#[test]
fn missing_field() {
    insta::assert_snapshot!(refusal("name: a\nnodes:\n  - name: s1\n"));
}

#[test]
fn wrong_type() {
    let seen = [
        refusal("name: a\nnodes:\n  - name: s1\n    role: server\n    memory_mib: lots\n"),
        refusal("name: a\nnodes: 3\n"),
        refusal("name: a\nflag: maybe\n"),
        refusal("name: [a]\n"),
        refusal("- a\n- b\n"),
    ];
    insta::assert_snapshot!(seen.join("\n\n"));
}

#[test]
fn number_out_of_range() {
    insta::assert_snapshot!(refusal("name: a\nnodes:\n  - {name: s1, role: server, memory_mib: -5}\n"));
}

#[test]
fn a_value_refused_after_it_was_read() {
    insta::assert_snapshot!(refusal("name: a\nnodes:\n  - {name: s1, role: server, address: 192.168.1}\n"));
}

#[test]
fn duplicate_keys() {
    let seen = [
        refusal("name: a\nflag: true\nname: b\n"),
        refusal("name: a\nlabels:\n  x: '1'\n  y: '2'\n  x: '3'\n"),
        refusal("name: a\nlabels:\n  1: one\n  \"1\": uno\n"),
    ];
    insta::assert_snapshot!(seen.join("\n\n"));
}

#[test]
fn more_or_less_than_one_document() {
    let seen = [refusal(""), refusal("# only a comment\n\n"), refusal("name: a\n---\nname: b\n")];
    insta::assert_snapshot!(seen.join("\n\n"));
}

#[test]
fn syntax() {
    let seen = [
        refusal("name: a\nnodes:\n\t- name: b\n"),
        refusal("name: [a\n"),
        refusal("name: \"a\n"),
        refusal("name: a: b\n"),
        refusal("name: *nowhere\n"),
        refusal("name: a\u{0}b\n"),
        refusal("name: !secret x\n"),
    ];
    insta::assert_snapshot!(seen.join("\n\n"));
}

#[test]
fn a_key_that_is_no_scalar() {
    insta::assert_snapshot!(refusal("name: a\nlabels:\n  ? [x, y]\n  : z\n"));
}

#[test]
fn alias_bombs() {
    let mut bomb = String::from("a: &a [x, x, x, x, x, x, x, x, x]\n");
    for (previous, next) in ('a'..'i').zip('b'..='i') {
        bomb.push_str(&format!("{next}: &{next} [{}]\n", vec![format!("*{previous}"); 9].join(", ")));
    }
    let seen = [refusal(&bomb), refusal("name: a\nlabels: &l {x: *l}\n")];
    insta::assert_snapshot!(seen.join("\n\n"));
}

#[test]
fn deep_nesting() {
    let mut block = String::new();
    for depth in 0..400 {
        block.push_str(&format!("{}a:\n", " ".repeat(depth)));
    }
    let seen = [
        refusal(&format!("name: {}{}\n", "[".repeat(40), "]".repeat(40))),
        refusal(&format!("name: {}\n", "[".repeat(100_000))),
        refusal(&format!("name: {}x{}\n", "[".repeat(30), ",x".repeat(60_000))),
        refusal(&format!("{}x\n", "- ".repeat(60_000))),
        refusal(&block),
    ];
    insta::assert_snapshot!(seen.join("\n\n"));
}

#[test]
fn too_large() {
    insta::assert_snapshot!(refusal(&format!("name: {}\n", "x".repeat(300_000))));
    assert!(refusal(&format!("name:\n{}", " - x\n".repeat(25_000))).contains("too many values"));
}

#[test]
fn long_lines_are_cut_around_the_fault() {
    let seen = [
        refusal(&format!("labels: {{a: {}, flog: 1}}\nnaem: 1\n", "y".repeat(50))),
        refusal(&format!("{{name: {}, flog: true, labels: {{a: {}}}}}\n", "y".repeat(300), "z".repeat(300))),
    ];
    insta::assert_snapshot!(seen.join("\n\n"));
}

#[test]
fn positions_of_fields_for_later_checks() {
    let text = "name: a\nnodes:\n  - name: s1\n    role: server\n  - {name: s2, role: agent, memory_mib: 7}\n";
    let at = |path: &[Segment]| yaml::locate(text, path);
    assert_eq!(at(&["nodes".into(), 0.into(), "role".into()]), Some((4, 11)));
    assert_eq!(at(&["nodes".into(), 1.into(), "memory_mib".into()]), Some((5, 41)));
    // Not in the text: the node it would belong to.
    assert_eq!(at(&["nodes".into(), 0.into(), "memory_mib".into()]), Some((3, 5)));
    assert_eq!(at(&["nodes".into(), 7.into()]), Some((3, 3)));
    assert_eq!(at(&[]), Some((1, 1)));
    let error = YamlError::at(text, "lab.yaml", &["nodes".into(), 1.into(), "memory_mib".into()], "too little memory")
        .expected("256 to 65536 MiB");
    insta::assert_snapshot!(error);
}
