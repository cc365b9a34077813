//! Enabling systemd units without running systemd: links as the `[Install]` section asks for (systemd.unit(5)).

use std::collections::{BTreeMap, BTreeSet};

use crate::error::Error;
use crate::recipe::Recipe;

/// Units followed through `Also=`, at most.
const MAX_UNITS: usize = 64;

/// Where links of enabled and masked units go.
const SYSTEM_DIR: &str = "/etc/systemd/system";

/// The links that enable and mask the recipe's units: path in the guest to target.
///
/// `unit_file` finds a unit's text; what a recipe lays over the tree comes before what packages brought.
///
/// # Errors
/// Where a unit to enable is nowhere, or has no `[Install]` section that does anything.
pub(crate) fn links(
    recipe: &Recipe,
    mut unit_file: impl FnMut(&str) -> Result<Option<(String, String)>, Error>,
) -> Result<BTreeMap<String, String>, Error> {
    let mut links: BTreeMap<String, String> = BTreeMap::new();
    let mut done = BTreeSet::new();
    let mut todo: Vec<(String, bool)> = recipe.units.enable.iter().map(|unit| (unit.clone(), true)).collect();
    while let Some((unit, asked_for)) = todo.pop() {
        if recipe.units.mask.contains(&unit) || !done.insert(unit.clone()) || done.len() > MAX_UNITS {
            continue;
        }
        let lacks = |hint| Error::RootfsLacks { recipe: recipe.name.clone(), what: format!("unit {unit}"), hint };
        let Some((path, text)) = unit_file(&unit)? else {
            if asked_for {
                return Err(lacks("name the package that brings it, or lay it over the tree with `files`"));
            }
            continue;
        };
        let install = Install::parse(&text);
        if asked_for && install.is_empty() {
            return Err(lacks("with an [Install] section, so it cannot be enabled"));
        }
        for (kind, targets) in [("wants", &install.wanted_by), ("requires", &install.required_by)] {
            for target in targets {
                links.insert(format!("{SYSTEM_DIR}/{target}.{kind}/{unit}"), path.clone());
            }
        }
        for alias in &install.alias {
            links.insert(format!("{SYSTEM_DIR}/{alias}"), path.clone());
        }
        todo.extend(install.also.into_iter().map(|unit| (unit, false)));
    }
    for unit in &recipe.units.mask {
        links.insert(format!("{SYSTEM_DIR}/{unit}"), "/dev/null".to_owned());
    }
    Ok(links)
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Install {
    wanted_by: Vec<String>,
    required_by: Vec<String>,
    alias: Vec<String>,
    also: Vec<String>,
}

impl Install {
    fn parse(text: &str) -> Self {
        let mut install = Self::default();
        let mut inside = false;
        for line in text.lines().map(str::trim) {
            if line.starts_with('[') {
                inside = line == "[Install]";
            } else if inside && let Some((key, value)) = line.split_once('=') {
                let list = match key.trim() {
                    "WantedBy" => &mut install.wanted_by,
                    "RequiredBy" => &mut install.required_by,
                    "Alias" => &mut install.alias,
                    "Also" => &mut install.also,
                    _ => continue,
                };
                list.extend(value.split_whitespace().map(str::to_owned));
            }
        }
        install
    }

    fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::Units;

    fn recipe(enable: &[&str], mask: &[&str]) -> Recipe {
        let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        Recipe {
            name: "r".to_owned(),
            suite: "bookworm".to_owned(),
            packages: BTreeSet::new(),
            exclude: BTreeSet::new(),
            files: BTreeMap::new(),
            units: Units { enable: set(enable), mask: set(mask) },
            binaries: BTreeMap::new(),
            disk_mib: 1024,
        }
    }

    #[expect(clippy::unnecessary_wraps, reason = "the signature of what links() calls")]
    fn networkd(unit: &str) -> Result<Option<(String, String)>, Error> {
        let text = match unit {
            "systemd-networkd.service" => {
                "[Unit]\nWantedBy=nonsense.target\n[Install]\nWantedBy=multi-user.target\n\
                 Also=systemd-networkd.socket systemd-networkd-wait-online.service missing.service\n\
                 Alias=dbus-org.freedesktop.network1.service\n"
            }
            "systemd-networkd.socket" => "[Install]\nWantedBy=sockets.target\n",
            "systemd-networkd-wait-online.service" => "[Install]\nWantedBy=network-online.target\n",
            "static.service" => "[Service]\nExecStart=/bin/true\n",
            _ => return Ok(None),
        };
        Ok(Some((format!("/lib/systemd/system/{unit}"), text.to_owned())))
    }

    #[test]
    fn install_sections_become_links() {
        let recipe = recipe(&["systemd-networkd.service"], &["systemd-networkd-wait-online.service"]);
        let links = links(&recipe, networkd).unwrap();
        let shown: Vec<String> = links.iter().map(|(path, target)| format!("{path} -> {target}")).collect();
        assert_eq!(
            shown,
            [
                "/etc/systemd/system/dbus-org.freedesktop.network1.service -> /lib/systemd/system/systemd-networkd.service",
                "/etc/systemd/system/multi-user.target.wants/systemd-networkd.service -> /lib/systemd/system/systemd-networkd.service",
                "/etc/systemd/system/sockets.target.wants/systemd-networkd.socket -> /lib/systemd/system/systemd-networkd.socket",
                "/etc/systemd/system/systemd-networkd-wait-online.service -> /dev/null",
            ]
        );
    }

    #[test]
    fn a_unit_that_cannot_be_enabled_is_an_error() {
        let missing = links(&recipe(&["nowhere.service"], &[]), networkd).unwrap_err().to_string();
        assert!(missing.contains("has no unit nowhere.service: name the package"), "{missing}");
        let fixed = links(&recipe(&["static.service"], &[]), networkd).unwrap_err().to_string();
        assert!(fixed.contains("cannot be enabled"), "{fixed}");
    }
}
