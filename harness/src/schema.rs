//! JSON schemas of the documents people write and programs read: made of the types themselves, so that they cannot say
//! something else than the harness does.

use std::fmt;
use std::str::FromStr;

use schemars::generate::SchemaSettings;
use schemars::{Schema, SchemaGenerator};

use crate::event::Event;
use crate::formation::report::RunReport;
use crate::plan::Plan;
use crate::scenario::{Profile, Scenario};

/// A kind of document.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Document {
    /// A scenario, as written.
    Scenario,
    /// A profile, as written.
    Profile,
    /// A recipe of a guest image, as written.
    Recipe,
    /// `plan.json`, and what `harness plan --json` prints.
    Plan,
    /// A line of `events.ndjson`, and of what `harness run --format json` prints.
    Events,
    /// `verdict.json`.
    Verdict,
}

impl Document {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::Scenario, Self::Profile, Self::Recipe, Self::Plan, Self::Events, Self::Verdict];

    /// Its name, also that of its schema's file.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Scenario => "scenario",
            Self::Profile => "profile",
            Self::Recipe => "recipe",
            Self::Plan => "plan",
            Self::Events => "events",
            Self::Verdict => "verdict",
        }
    }

    /// Its schema (JSON Schema, draft 2020-12): of what may be written where people write it, of what is written where
    /// the harness does.
    #[must_use]
    pub fn schema(self) -> Schema {
        let written = || SchemaGenerator::new(SchemaSettings::draft2020_12());
        let printed = || SchemaGenerator::new(SchemaSettings::draft2020_12().for_serialize());
        match self {
            Self::Scenario => written().into_root_schema_for::<Scenario>(),
            Self::Profile => written().into_root_schema_for::<Profile>(),
            Self::Recipe => images::recipe::schema(written()),
            Self::Plan => printed().into_root_schema_for::<Plan>(),
            Self::Events => printed().into_root_schema_for::<Event>(),
            Self::Verdict => printed().into_root_schema_for::<RunReport>(),
        }
    }

    /// The schema as its file has it.
    ///
    /// # Errors
    /// Where it cannot be encoded, which is a bug.
    pub fn schema_text(self) -> Result<String, serde_json::Error> {
        Ok(serde_json::to_string_pretty(&self.schema())? + "\n")
    }
}

impl fmt::Display for Document {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A text that names no document.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no document {0:?}: expected scenario, profile, recipe, plan, events or verdict")]
pub struct UnknownDocument(pub String);

impl FromStr for Document {
    type Err = UnknownDocument;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let found = Self::ALL.into_iter().find(|document| document.as_str() == text);
        found.ok_or_else(|| UnknownDocument(text.to_owned()))
    }
}
