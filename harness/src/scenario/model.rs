//! The scenario as a person writes it.

use std::collections::BTreeMap;
use std::fmt;

use images::airgap::AirgapImages;
use images::k3s::K3sSource;
use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::Phase;

/// The k3s of a scenario that names none.
pub const DEFAULT_K3S: &str = "release:v1.35.0+k3s1";

/// A cluster to form, and how the run is judged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// Its name, also the name of its file.
    pub name: String,
    /// One line for lists.
    pub description: String,
    /// The name of the profile its network is built by.
    pub profile: String,
    /// Where k3s comes from, unless `--k3s` says otherwise.
    #[serde(default = "default_k3s")]
    pub k3s: K3sSource,
    /// The tarball of images that is laid into every node for k3s to import, where nodes have no registry to pull from.
    #[serde(default, skip_serializing_if = "AirgapImages::is_none")]
    pub airgap_images: AirgapImages,
    /// The recipe of the guest image.
    #[serde(default = "default_image")]
    pub image: String,
    /// The nodes; the first is the server the others join.
    #[schemars(length(min = 1, max = 9))]
    pub nodes: Vec<ScenarioNode>,
    /// How long etcd and the API have to stay good after each join.
    #[serde(default = "default_settle_ms")]
    #[schemars(range(max = 600_000))]
    pub settle_ms: u64,
    /// Packaged components k3s is told to leave out.
    #[serde(default = "default_disable")]
    pub disable: Vec<String>,
    /// Preventions this scenario goes without, to show what they prevent: sanitize, prewarm or settle.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub without: Vec<Phase>,
    /// How the run is expected to end.
    #[serde(default)]
    pub expect: Expect,
}

/// A node of a scenario.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ScenarioNode {
    /// Its name, also its hostname and its name in the cluster.
    pub name: String,
    /// What it is in the cluster.
    pub role: Role,
    /// How many virtual CPUs it gets.
    #[serde(default)]
    pub vcpus: Vcpus,
    /// Its memory.
    #[serde(default = "default_memory_mib")]
    #[schemars(range(min = 256, max = 65_536))]
    pub memory_mib: u32,
    /// VLAN IDs this guest uses in place of the profile's, by network: a fault to inject. The switches keep to the
    /// profile.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub vlans: BTreeMap<String, u16>,
    /// NICs of the profile whose cable is pulled on this node: a fault to inject.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unplugged: Vec<String>,
    /// Another node, whose seed this one is given: a fault to inject (FM-3).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed_of: Option<String>,
}

/// What a node is in the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Control plane and etcd member.
    Server,
    /// Worker only.
    Agent,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Server => "server",
            Self::Agent => "agent",
        })
    }
}

/// How many virtual CPUs a node gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Vcpus {
    /// What the plan finds sensible for the host.
    #[default]
    Auto,
    /// This many.
    Count(u32),
}

impl schemars::JsonSchema for Vcpus {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Vcpus".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "description": "How many virtual CPUs a node gets: `auto`, which is what the plan finds sensible, or 1 to 64.",
            "oneOf": [{ "const": "auto" }, { "type": "integer", "minimum": 1, "maximum": 64 }],
        })
    }
}

impl Serialize for Vcpus {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Auto => serializer.serialize_str("auto"),
            Self::Count(count) => serializer.serialize_u32(*count),
        }
    }
}

impl<'de> Deserialize<'de> for Vcpus {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AutoOrCount;

        impl Visitor<'_> for AutoOrCount {
            type Value = Vcpus;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("`auto` or a whole number from 1 to 64")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Vcpus, E> {
                if text == "auto" { Ok(Vcpus::Auto) } else { Err(E::invalid_value(de::Unexpected::Str(text), &self)) }
            }

            fn visit_u64<E: de::Error>(self, count: u64) -> Result<Vcpus, E> {
                match u32::try_from(count) {
                    Ok(count @ 1..=64) => Ok(Vcpus::Count(count)),
                    _ => Err(E::invalid_value(de::Unexpected::Unsigned(count), &self)),
                }
            }
        }

        deserializer.deserialize_any(AutoOrCount)
    }
}

/// How a run is expected to end.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Expect {
    /// Pass or failure.
    #[serde(default)]
    pub outcome: Outcome,
    /// The phase a failure is expected in; none means any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<Phase>,
}

/// Pass or failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The cluster forms.
    #[default]
    Pass,
    /// It does not, and that is right.
    Failure,
}

fn default_k3s() -> K3sSource {
    // A test holds this to be DEFAULT_K3S.
    K3sSource::Release(DEFAULT_K3S.trim_start_matches("release:").to_owned())
}

fn default_image() -> String {
    "debian-k3s".to_owned()
}

const fn default_settle_ms() -> u64 {
    10_000
}

fn default_disable() -> Vec<String> {
    ["traefik", "servicelb", "metrics-server"].map(str::to_owned).to_vec()
}

const fn default_memory_mib() -> u32 {
    2048
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_k3s_is_the_constant() {
        assert_eq!(default_k3s(), DEFAULT_K3S.parse().unwrap());
    }
}
