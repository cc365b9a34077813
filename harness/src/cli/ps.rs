//! `harness ps`: the labs that live.

use std::fmt::Write as _;

use jiff::Timestamp;
use serde::Serialize;

use crate::cli::{Global, print, print_json};
use crate::error::CommandError;
use crate::lab::inventory::{LabRecord, LivingLab, living};
use crate::reporter::human_ms;

/// `harness ps`
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n    harness ps --json | jq -r '.labs[].nodes[] | \"\\(.name) \\(.ssh_port)\"'

A lab is listed from the moment its first guest boots until it is gone.")]
pub(super) struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(global: &Global, args: Args) -> Result<u8, CommandError> {
    let labs = living(&global.folders()?);
    let now = Timestamp::now();
    if args.json {
        print_json(&json(&labs, now));
    } else {
        print(&table(&labs, now));
    }
    Ok(0)
}

/// A lab with what follows from the time.
#[derive(Serialize)]
struct Listed<'a> {
    #[serde(flatten)]
    record: &'a LabRecord,
    age_ms: u64,
    expires_in_ms: Option<u64>,
    client_key: String,
    known_hosts: String,
}

fn json(labs: &[LivingLab], now: Timestamp) -> String {
    let labs: Vec<Listed<'_>> = labs
        .iter()
        .map(|lab| Listed {
            record: &lab.record,
            age_ms: ms_between(lab.record.started, now),
            expires_in_ms: lab.record.expires.map(|expires| ms_between(now, expires)),
            client_key: lab.client_key().into_string(),
            known_hosts: lab.known_hosts().into_string(),
        })
        .collect();
    format!("{:#}\n", serde_json::json!({ "labs": labs }))
}

fn table(labs: &[LivingLab], now: Timestamp) -> String {
    if labs.is_empty() {
        return "no lab lives\n".to_owned();
    }
    let width = labs.iter().map(|lab| lab.record.scenario.len()).max().unwrap_or(0).max("SCENARIO".len());
    let mut out =
        format!("{:<8} {:<width$}  {:<7}  {:>12}  {:>12}  NODES\n", "LAB", "SCENARIO", "STATE", "AGE", "EXPIRES IN");
    for lab in labs {
        let record = &lab.record;
        let age = human_ms(ms_between(record.started, now));
        let left = record.expires.map_or_else(|| "-".to_owned(), |expires| human_ms(ms_between(now, expires)));
        let nodes = record
            .nodes
            .iter()
            .map(|node| format!("{} ({} {}, ssh 127.0.0.1:{})", node.name, node.role, node.cluster_ip, node.ssh_port))
            .collect::<Vec<_>>()
            .join(", ");
        let (id, scenario, state) = (&record.lab, &record.scenario, record.state);
        let _ = writeln!(out, "{id:<8} {scenario:<width$}  {state:<7}  {age:>12}  {left:>12}  {nodes}");
        let _ = writeln!(out, "         k3s: {}", record.k3s);
    }
    out
}

fn ms_between(from: Timestamp, to: Timestamp) -> u64 {
    u64::try_from(to.duration_since(from).as_millis()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::inventory::{LabState, NodeEntry, Owner, SCHEMA_VERSION};
    use crate::scenario::Role;

    fn lab() -> LivingLab {
        let record = LabRecord {
            schema_version: SCHEMA_VERSION,
            lab: "abc234".to_owned(),
            run: "r".to_owned(),
            scenario: "smoke".to_owned(),
            k3s: "stand-in (NOT real k3s)".to_owned(),
            run_dir: "/s/runs/r".into(),
            owner: Owner { pid: 7, start_ticks: 9 },
            state: LabState::Kept,
            started: Timestamp::from_second(1000).unwrap(),
            expires: Some(Timestamp::from_second(1190).unwrap()),
            slowdown: 1.0,
            nodes: vec![NodeEntry {
                name: "server-1".to_owned(),
                role: Role::Server,
                ssh_port: 40001,
                user: "root".to_owned(),
                host_key: "ssh-ed25519 AAAA server-1".to_owned(),
                console_log: "/c".into(),
                cluster_ip: [192, 168, 1, 1].into(),
            }],
        };
        LivingLab { dir: "/s/labs/abc234".into(), record }
    }

    #[test]
    fn a_lab_is_two_lines() {
        let now = Timestamp::from_second(1005).unwrap();
        assert_eq!(table(&[], now), "no lab lives\n");
        assert_eq!(
            table(&[lab()], now),
            "LAB      SCENARIO  STATE             AGE    EXPIRES IN  NODES\n\
             abc234   smoke     kept           5.00 s    3 min 05 s  server-1 (server 192.168.1.1, ssh 127.0.0.1:40001)\n         \
             k3s: stand-in (NOT real k3s)\n"
        );
    }

    #[test]
    fn json_has_what_a_script_needs_and_no_private_key() {
        let text = json(&[lab()], Timestamp::from_second(1200).unwrap());
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        let lab = &value["labs"][0];
        assert_eq!((lab["lab"].as_str(), lab["state"].as_str()), (Some("abc234"), Some("kept")));
        assert_eq!(lab["nodes"][0]["ssh_port"], 40001);
        assert_eq!((&lab["age_ms"], &lab["expires_in_ms"]), (&200_000.into(), &0.into()));
        assert_eq!(lab["client_key"], "/s/labs/abc234/client_key");
        assert!(!text.contains("PRIVATE"));
    }
}
