//! The committed schema and the serialized verdict agree.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on says so")]

use serde_json::{Value, json};
use verdict::{
    Attribution, Class, Confidence, Contribution, EvidenceLine, LookAlike, Outcome, Phase, SCHEMA_VERSION, SourceKind,
    Verdict,
};

fn schema() -> Value {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/verdict.schema.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn keys(value: &Value) -> Vec<String> {
    let mut keys: Vec<String> = value.as_object().unwrap().keys().cloned().collect();
    keys.sort();
    keys
}

/// Every property of the schema is in the value and the other way round; required names them all.
fn same_fields(schema: &Value, value: &Value, what: &str) {
    let properties = keys(&schema["properties"]);
    assert_eq!(properties, keys(value), "{what}");
    let mut required: Vec<String> =
        schema["required"].as_array().unwrap().iter().map(|r| r.as_str().unwrap().to_owned()).collect();
    required.sort();
    assert_eq!(properties, required, "{what}");
    assert_eq!(schema["additionalProperties"], json!(false), "{what}");
}

#[test]
fn fields_agree() {
    let verdict = Verdict {
        schema_version: SCHEMA_VERSION,
        outcome: Outcome::Failed,
        id: None,
        look_alike: Some(LookAlike { id: "NET-VLAN".into(), not: vec!["FM-4".into()] }),
        name: String::new(),
        summary: String::new(),
        class: None,
        attribution: None,
        phase: None,
        node: None,
        confidence: Confidence::Low,
        reason: String::new(),
        evidence: vec![EvidenceLine {
            sign: String::new(),
            says: String::new(),
            node: None,
            source: SourceKind::K3s,
            origin: String::new(),
            line: Some(1),
            at: None,
            text: String::new(),
            count: 1,
        }],
        consequences: Vec::new(),
        contributing: vec![Contribution { id: None, text: String::new(), ratio: Some(4.0) }],
        remedy: Vec::new(),
    };
    let (schema, value) = (schema(), serde_json::to_value(&verdict).unwrap());
    same_fields(&schema, &value, "verdict");
    let properties = &schema["properties"];
    same_fields(&properties["look_alike"], &value["look_alike"], "look_alike");
    same_fields(&properties["evidence"]["items"], &value["evidence"][0], "evidence");
    same_fields(&properties["contributing"]["items"], &value["contributing"][0], "contributing");
    assert_eq!(properties["schema_version"]["const"], json!(SCHEMA_VERSION));
}

#[test]
fn words_agree() {
    let schema = schema();
    let properties = &schema["properties"];
    let words = |values: Vec<Value>, nullable: bool| {
        let mut all = values;
        all.extend(nullable.then_some(Value::Null));
        Value::Array(all)
    };
    let of = |v: &dyn erased::Word| v.value();
    assert_eq!(
        properties["outcome"]["enum"],
        words([Outcome::Passed, Outcome::Failed, Outcome::NoFailureSeen].iter().map(|v| of(v)).collect(), false)
    );
    assert_eq!(
        properties["confidence"]["enum"],
        words([Confidence::Low, Confidence::Medium, Confidence::High].iter().map(|v| of(v)).collect(), false)
    );
    let classes = [Class::Timing, Class::State, Class::Resource, Class::Artifact, Class::Configuration];
    assert_eq!(properties["class"]["enum"], words(classes.iter().map(|v| of(v)).collect(), true));
    let blame = [Attribution::Environment, Attribution::Product, Attribution::Harness, Attribution::Configuration];
    assert_eq!(properties["attribution"]["enum"], words(blame.iter().map(|v| of(v)).collect(), true));
    let phases = [
        Phase::Preflight,
        Phase::Image,
        Phase::Network,
        Phase::Boot,
        Phase::Identify,
        Phase::Sanitize,
        Phase::Primary,
        Phase::Prewarm,
        Phase::Join,
        Phase::Settle,
        Phase::Verify,
        Phase::Collect,
        Phase::Teardown,
    ];
    assert_eq!(properties["phase"]["enum"], words(phases.iter().map(|v| of(v)).collect(), true));
    let sources = [
        SourceKind::K3s,
        SourceKind::Etcd,
        SourceKind::Klog,
        SourceKind::Systemd,
        SourceKind::Kernel,
        SourceKind::Qemu,
        SourceKind::Curl,
        SourceKind::Vde,
        SourceKind::Ssh,
        SourceKind::Build,
        SourceKind::Harness,
        SourceKind::Unknown,
    ];
    assert_eq!(
        properties["evidence"]["items"]["properties"]["source"]["enum"],
        words(sources.iter().map(|v| of(v)).collect(), false)
    );
}

mod erased {
    /// A word of the serialized form.
    pub(crate) trait Word {
        fn value(&self) -> serde_json::Value;
    }

    impl<T: serde::Serialize> Word for T {
        fn value(&self) -> serde_json::Value {
            serde_json::to_value(self).unwrap()
        }
    }
}
