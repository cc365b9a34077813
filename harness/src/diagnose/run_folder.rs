//! Run folders of ours: what the harness knew beyond the log lines (the failed phase, the host, restarts) is read from
//! their JSON files and given to the classifier as context.

use std::collections::BTreeMap;
use std::io::Read as _;

use jiff::Timestamp;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use verdict::{Context, Evidence, Health, HostFacts, UnitRestarts, VmFacts};

use crate::diagnose::tree::{Member, Source, Tree};
use crate::lab::evidence::GuestClock;

/// Largest JSON document of a run that is read, bytes.
const JSON_BYTES_MAX: u64 = 8 << 20;

/// Most runs of one input that are told apart.
const RUNS_MAX: usize = 256;
/// Most nodes of one run whose clocks are read.
const NODES_MAX: usize = 256;

/// A run folder within a tree.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Run {
    /// Where it is below the tree: empty, or a path that ends with `/`.
    pub(super) root: String,
    /// The run's id.
    pub(super) id: String,
    /// What is known besides the lines.
    pub(super) context: Context,
    /// Its nodes' clocks.
    clocks: BTreeMap<String, GuestClock>,
    /// Whether it has no `verdict.json`: it was killed, or it still goes on.
    pub(super) unfinished: bool,
}

/// `run.json`, as much as is needed.
#[derive(Deserialize)]
struct Header {
    run: String,
    #[expect(dead_code, reason = "that it is there tells our run.json from another program's")]
    lab: String,
}

/// `verdict.json`, as much as is needed; written by this and by earlier versions.
#[derive(Deserialize)]
struct Report {
    run: String,
    #[expect(dead_code, reason = "that it is there tells our verdict.json from another program's")]
    passed: bool,
    #[serde(default)]
    failure: Option<Failure>,
    #[serde(default)]
    restarts: Vec<UnitRestarts>,
    /// All of it, where the run has kept it.
    #[serde(default)]
    context: Option<Context>,
}

#[derive(Deserialize)]
struct Failure {
    #[serde(default)]
    phase: Option<serde_json::Value>,
    #[serde(default)]
    node: Option<String>,
    #[serde(default)]
    chain: Vec<String>,
}

/// `plan.json`, as much as is needed.
#[derive(Deserialize)]
struct Plan {
    host: PlanHost,
    oversubscription: Oversubscription,
    #[serde(default)]
    nodes: Vec<PlanNode>,
}

#[derive(Deserialize)]
struct PlanHost {
    cores: u32,
    accel: String,
    memory_available_mib: u64,
}

#[derive(Deserialize)]
struct Oversubscription {
    vcpus: u32,
}

#[derive(Deserialize)]
struct PlanNode {
    name: String,
    vm: PlanVm,
}

#[derive(Deserialize)]
struct PlanVm {
    vcpus: u32,
}

/// Finds the run folders of a tree, in the order of their paths.
pub(super) fn find(tree: &mut dyn Tree) -> Vec<Run> {
    let mut roots: Vec<String> = Vec::new();
    for member in tree.members() {
        let (root, file) = split(&member.path);
        if matches!(file, "run.json" | "verdict.json")
            && !roots.iter().any(|known| known == root)
            && roots.len() < RUNS_MAX
        {
            roots.push(root.to_owned());
        }
    }
    roots.into_iter().filter_map(|root| read_run(tree, root)).collect()
}

fn split(path: &str) -> (&str, &str) {
    path.rfind('/').map_or(("", path), |at| path.split_at(at + 1))
}

fn read_run(tree: &mut dyn Tree, root: String) -> Option<Run> {
    let report: Option<Report> = document(tree, &format!("{root}verdict.json"));
    let header: Option<Header> = document(tree, &format!("{root}run.json"));
    let id = report.as_ref().map(|report| report.run.clone()).or(header.map(|header| header.run))?;
    let plan: Option<Plan> = document(tree, &format!("{root}plan.json"));
    let unfinished = report.is_none();
    let context = report.map(context).unwrap_or_default();
    let context = plan.map_or(context.clone(), |plan| with_plan(context, &plan));
    let clocks = clocks(tree, &root);
    Some(Run { root, id, context, clocks, unfinished })
}

/// What the clocks of the run's nodes say.
fn clocks(tree: &mut dyn Tree, root: &str) -> BTreeMap<String, GuestClock> {
    let nodes = format!("{root}nodes/");
    let of_node = |path: &str| Some(path.strip_prefix(&nodes)?.strip_suffix("/clock.json")?.to_owned());
    let found: Vec<_> = tree.members().iter().filter_map(|m| Some((of_node(&m.path)?, m.path.clone()))).collect();
    let read = |(node, path): (String, String)| Some((node, document(tree, &path)?));
    found.into_iter().take(NODES_MAX).filter_map(read).collect()
}

fn document<T: DeserializeOwned>(tree: &mut dyn Tree, path: &str) -> Option<T> {
    let member: Member = tree.members().iter().find(|member| member.path == path)?.clone();
    let mut bytes = Vec::new();
    let mut read = |source: Source<'_>| {
        // What cannot be read is no document; the reader of the log lines says so again, where it matters.
        let _ = match source {
            Source::File(file) => file.take(JSON_BYTES_MAX).read_to_end(&mut bytes),
            Source::Stream(stream) | Source::Packed(stream, _) => stream.take(JSON_BYTES_MAX).read_to_end(&mut bytes),
        };
    };
    tree.open(&member, &mut read).ok()?;
    serde_json::from_slice(&bytes).ok()
}

fn context(report: Report) -> Context {
    if let Some(context) = report.context {
        return context;
    }
    let health = if report.failure.is_some() { Health::Failed } else { Health::Passed };
    let failure = report.failure.unwrap_or(Failure { phase: None, node: None, chain: Vec::new() });
    Context {
        health,
        // A phase this version does not know is no phase.
        phase: failure.phase.and_then(|phase| serde_json::from_value(phase).ok()),
        node: failure.node,
        errors: failure.chain,
        restarts: report.restarts,
        ..Context::default()
    }
}

fn with_plan(mut context: Context, plan: &Plan) -> Context {
    let host = context.host.get_or_insert_with(HostFacts::default);
    host.cores = host.cores.or(Some(plan.host.cores));
    host.vcpus_asked = host.vcpus_asked.or(Some(plan.oversubscription.vcpus));
    host.memory_available_mib = host.memory_available_mib.or(Some(plan.host.memory_available_mib));
    host.accel.get_or_insert_with(|| plan.host.accel.clone());
    if context.vms.is_empty() {
        let vm = |node: &PlanNode| VmFacts { name: node.name.clone(), vcpus: node.vm.vcpus, ..VmFacts::default() };
        context.vms = plan.nodes.iter().map(vm).collect();
    }
    context
}

impl Run {
    /// Whether a file of the run is evidence: what the run's own classifier saw, and not what the harness wrote about it.
    /// `has` tells whether the tree has a file with something in it.
    pub(super) fn is_evidence(&self, path: &str, has: &dyn Fn(&str) -> bool) -> bool {
        let Some(below) = path.strip_prefix(&self.root) else { return true };
        let (folder, file) = split(below);
        if folder.is_empty() {
            return file.ends_with(".log");
        }
        match file {
            // The journal has the kernel's lines too; twice would count twice.
            "dmesg.log" => !has(&format!("{}{folder}journal.log", self.root)),
            _ => file.ends_with(".log"),
        }
    }

    /// When the node booted whose file this is.
    pub(super) fn booted_at(&self, path: &str) -> Option<Timestamp> {
        let (node, _) = path.strip_prefix(&self.root)?.strip_prefix("nodes/")?.split_once('/')?;
        Some(self.clocks.get(node)?.booted_at)
    }

    /// What was said of clocks that were off.
    pub(super) fn clocks_off(&self) -> impl Iterator<Item = Evidence> + '_ {
        self.clocks.iter().filter_map(|(node, clock)| {
            let text = clock.off(node)?;
            Some(Evidence::new(Some(node), verdict::Source::harness(), Some(clock.measured_at), text))
        })
    }

    /// Whether it is known to have passed.
    pub(super) fn passed(&self) -> bool {
        self.context.health == Health::Passed
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::diagnose::limits::Limits;
    use crate::diagnose::tree::Folder;

    #[test]
    fn the_phase_the_host_and_the_errors_come_from_the_json_files() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("runs/r1");
        fs::create_dir_all(run.join("nodes/server-1")).unwrap();
        fs::write(run.join("run.json"), r#"{"run":"r1","lab":"l","scenario":"simple"}"#).unwrap();
        fs::write(
            run.join("verdict.json"),
            r#"{"run":"r1","passed":false,"failure":{"blame":"product","phase":"join","node":"server-2","chain":["no","because"]},
                "restarts":[{"node":"server-1","unit":"k3s-server.service","restarts":2}],"new_field":1}"#,
        )
        .unwrap();
        fs::write(
            run.join("plan.json"),
            r#"{"host":{"cores":2,"accel":"tcg","memory_available_mib":100},"oversubscription":{"vcpus":8},
                "nodes":[{"name":"server-1","vm":{"vcpus":4}}]}"#,
        )
        .unwrap();
        fs::write(
            run.join("nodes/server-1/clock.json"),
            r#"{"schema_version":1,"measured_at":"2026-11-21T02:40:00Z","offset_us":-3600000000,"uncertainty_us":4000,
                "booted_at":"2026-11-21T02:39:00Z"}"#,
        )
        .unwrap();
        fs::write(dir.path().join("runs/verdict.json"), r#"{"ok":true}"#).unwrap();
        let mut folder = Folder::list(dir.path(), &Limits::default(), &mut Vec::new()).unwrap();
        let found = find(&mut folder);
        assert_eq!(found.len(), 1, "the other verdict.json is not ours");
        let run = &found[0];
        assert_eq!(
            (run.root.as_str(), run.id.as_str(), run.passed(), run.unfinished),
            ("runs/r1/", "r1", false, false)
        );
        assert_eq!(run.context.phase, Some(verdict::Phase::Join));
        assert_eq!(run.context.errors, ["no", "because"]);
        let host = run.context.host.as_ref().unwrap();
        assert_eq!((host.cores, host.vcpus_asked), (Some(2), Some(8)));
        assert_eq!(run.context.vms[0].vcpus, 4);
        let booted = run.booted_at("runs/r1/nodes/server-1/console.log").unwrap();
        assert_eq!(booted.to_string(), "2026-11-21T02:39:00Z");
        assert!(run.clocks_off().next().unwrap().text.contains("3600.0 s behind"));
        assert_eq!(run.booted_at("runs/r1/nodes/server-2/console.log"), None);
        assert_eq!(run.booted_at("runs/r1/vde.log"), None);
        let has_journal = |path: &str| path == "runs/r1/nodes/server-1/journal.log";
        for (path, want) in [
            ("runs/r1/nodes/server-1/journal.log", true),
            ("runs/r1/nodes/server-1/dmesg.log", false),
            ("runs/r1/nodes/server-2/dmesg.log", true),
            ("runs/r1/nodes/server-1/qmp.log", true),
            ("runs/r1/nodes/server-1/ssh.log", true),
            ("runs/r1/nodes/server-1/clock.json", false),
            ("runs/r1/vde.log", true),
            ("runs/r1/nodes/server-1/units.txt", false),
            ("runs/r1/events.ndjson", false),
            ("runs/r1/verdict.json", false),
            ("runs/other.txt", true),
        ] {
            assert_eq!(run.is_evidence(path, &has_journal), want, "{path}");
        }
    }
}
