//! A pump with the shipped catalogue and a run folder of its own.

use verdict::Classifier;

use super::EvidencePump;
use crate::event::{Event, EventKind, EventSink};
use crate::lab::alarm::{Guard, alarm};
use crate::lab::sampler::HostSampler;
use crate::record::RunDir;
use crate::record::testing::run_dir;

pub(in crate::lab) struct Bench {
    _state: tempfile::TempDir,
    pub(in crate::lab) record: RunDir,
    pub(in crate::lab) pump: EvidencePump,
    pub(in crate::lab) guard: Guard,
    pub(in crate::lab) events: tokio::sync::mpsc::UnboundedReceiver<Event>,
}

impl Bench {
    pub(in crate::lab) fn new() -> Self {
        let state = tempfile::tempdir().unwrap();
        let record = run_dir(&state);
        let (sink, events) = EventSink::new();
        let (bell, guard) = alarm();
        let classifier = Classifier::new(&crate::catalogue::shipped().unwrap());
        let sampler = HostSampler::new(&record.path().join("host.ndjson"), sink.clone());
        let pump = EvidencePump::new(classifier, sampler, bell, sink, record.clone());
        Self { _state: state, record, pump, guard, events }
    }

    /// Warnings since the last call.
    pub(in crate::lab) fn warnings(&mut self) -> Vec<String> {
        std::iter::from_fn(|| self.events.try_recv().ok())
            .filter_map(|event| match event.event {
                EventKind::Warning { message } => Some(message),
                _ => None,
            })
            .collect()
    }
}
