//! The committed JSON schemas are those of the types, and what is shipped and written is valid by them.
//!
//! After a change to a type: `HARNESS_UPDATE_SCHEMAS=1 cargo test -p harness --test schema`.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use camino::{Utf8Path, Utf8PathBuf};
use harness::error::CommandError;
use harness::event::{Event, EventKind, PhaseOutcome};
use harness::exit::Blame;
use harness::formation::report::RunReport;
use harness::plan::{Inputs, Paths, Phase, plan};
use harness::record::RunHeader;
use harness::scenario::load;
use harness::schema::Document;
use jiff::Timestamp;
use serde_json::{Value, json};
use verdict::{Classifier, Evidence, Source};

/// The repository.
fn repository() -> Utf8PathBuf {
    Utf8Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// What a schema says against a document.
fn faults(document: Document, value: &Value) -> Vec<String> {
    let validator = jsonschema::validator_for(&document.schema().to_value()).unwrap();
    validator.iter_errors(value).map(|error| format!("{}: {error}", error.instance_path())).collect()
}

fn valid(document: Document, value: &Value, what: &str) {
    let faults = faults(document, value);
    assert!(faults.is_empty(), "{what} is no {document}: {faults:#?}\n{value:#}");
}

fn yaml_files(folder: &str) -> Vec<(Utf8PathBuf, Value)> {
    let folder = repository().join(folder);
    let paths = folder.read_dir_utf8().unwrap().map(|entry| entry.unwrap().into_path());
    let read = |path: Utf8PathBuf| {
        let value = images::yaml::parse(&std::fs::read_to_string(&path).unwrap(), path.as_str()).unwrap();
        (path, value)
    };
    let files: Vec<_> = paths.filter(|path| path.extension() == Some("yaml")).map(read).collect();
    assert!(!files.is_empty(), "{folder} has no YAML");
    files
}

#[test]
fn the_committed_schemas_are_current() {
    let folder = repository().join("harness/schemas");
    let update = std::env::var_os("HARNESS_UPDATE_SCHEMAS").is_some();
    for document in Document::ALL {
        let path = folder.join(format!("{document}.json"));
        if update {
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(&path, document.schema_text().unwrap()).unwrap();
        }
        // Not as text: the order of an object's keys depends on the features serde_json was built with.
        let committed: Value =
            serde_json::from_str(&std::fs::read_to_string(&path).unwrap_or_default()).unwrap_or_default();
        let current = document.schema().to_value();
        assert!(committed == current, "{path} is not current: run this test with HARNESS_UPDATE_SCHEMAS=1");
    }
}

#[test]
fn every_schema_is_one_and_explains_its_fields() {
    for document in Document::ALL {
        let schema = document.schema().to_value();
        assert!(jsonschema::meta::is_valid(&schema), "{document}");
        assert!(schema["description"].is_string(), "{document} has no description");
        for (name, property) in schema["properties"].as_object().unwrap() {
            assert!(property["description"].is_string(), "{document}: {name} has no description");
        }
    }
}

#[test]
fn what_is_shipped_is_valid() {
    for (folder, document) in [
        ("scenarios", Document::Scenario),
        ("scenarios/profiles", Document::Profile),
        ("images/recipes", Document::Recipe),
    ] {
        for (path, value) in yaml_files(folder) {
            valid(document, &value, path.as_str());
        }
    }
}

#[test]
fn what_the_harness_refuses_the_schema_refuses() {
    let (_, good) = yaml_files("scenarios").into_iter().find(|(path, _)| path.ends_with("simple.yaml")).unwrap();
    let wrong: [fn(&mut Value); 6] = [
        |value| value["nodes"][0]["vcpus"] = json!(0),
        |value| value["nodes"][0]["vcpu"] = json!(2),
        |value| value["nodes"][0]["role"] = json!("master"),
        |value| value["nodes"] = json!([]),
        |value| value["k3s"] = json!("http://x"),
        |value| drop(value.as_object_mut().unwrap().remove("profile")),
    ];
    for (n, change) in wrong.iter().enumerate() {
        let mut value = good.clone();
        change(&mut value);
        assert!(!faults(Document::Scenario, &value).is_empty(), "change {n} is not noticed");
    }
    let profile = yaml_files("scenarios/profiles").remove(0).1;
    let mut wrong = profile.clone();
    wrong["networks"][0]["subnet"] = json!("192.168.1.0");
    assert!(!faults(Document::Profile, &wrong).is_empty());
}

#[test]
fn the_plan_of_every_shipped_scenario_is_valid() {
    for (path, _) in yaml_files("scenarios") {
        let loaded = load(path.as_str(), &repository()).unwrap();
        let inputs = Inputs {
            lab: "abcdef".to_owned(),
            k3s: "stand-in".to_owned(),
            host: kvm::HostFacts {
                cores: 4,
                memory_total_mib: 16_000,
                memory_available_mib: 12_000,
                load_1m: 0.0,
                cpu_pressure_some_avg10: None,
            },
            calibration: kvm::Calibration::assumed(kvm::Accel::Tcg),
            paths: Paths::placeholders(),
        };
        let plan = plan(&loaded.scenario, &loaded.profile, &inputs).unwrap();
        valid(Document::Plan, &serde_json::to_value(&plan).unwrap(), path.as_str());
    }
}

#[test]
fn events_are_valid_and_others_are_not() {
    let kinds = [
        EventKind::HostMeasured { accel: "tcg".into(), reason: "r".into(), slowdown: 2.5, cores: 2, vcpus: 4 },
        EventKind::PhaseFinished {
            phase: Phase::Join,
            node: Some("server-2".into()),
            outcome: PhaseOutcome::Ok,
            phase_elapsed_ms: 12,
            attempts: 1,
            note: "n".into(),
        },
        EventKind::PrewarmMeasured { node: "server-2".into(), tcp_ms: vec![None, Some(7.5)], tls_ms: vec![] },
        EventKind::RunFinished { passed: true, exit_code: 0, summary: "PASS".into() },
    ];
    for event in kinds {
        let event = Event { at: Timestamp::UNIX_EPOCH, elapsed_ms: 1, event };
        valid(Document::Events, &serde_json::to_value(&event).unwrap(), "an event");
    }
    assert!(
        !faults(Document::Events, &json!({ "at": "1970-01-01T00:00:00Z", "elapsed_ms": 1, "event": "x" })).is_empty()
    );
}

#[test]
fn a_verdict_is_valid_with_evidence_and_without() {
    let header = RunHeader {
        schema_version: 1,
        run: "20260101T000000Z-simple-abcdef".to_owned(),
        lab: "abcdef".to_owned(),
        scenario: "simple".to_owned(),
        k3s: "stand-in".to_owned(),
        started: Timestamp::UNIX_EPOCH,
        command: Vec::new(),
        harness_version: "0".to_owned(),
        pid: 1,
    };
    let mut classifier = Classifier::new(&harness::catalogue::shipped().unwrap());
    let error = CommandError::plain(Blame::Environment, "no room").hint("make some");
    let report = |classifier: &Classifier| RunReport::before_plan(&header, &error, "/runs/x", classifier, 5);
    valid(Document::Verdict, &serde_json::to_value(report(&classifier)).unwrap(), "a verdict without evidence");

    let text = "panic: bootstrap data already found and encrypted with different token";
    classifier.observe(&Evidence::new(Some("server-2"), Source::journal(), Some(Timestamp::UNIX_EPOCH), text));
    let report = report(&classifier);
    assert_eq!(report.verdict.id.as_deref(), Some("FM-2"), "{}", report.verdict);
    valid(Document::Verdict, &serde_json::to_value(&report).unwrap(), "a verdict with evidence");
}
