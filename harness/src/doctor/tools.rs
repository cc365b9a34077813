//! The programs a run and an image build start.

use std::time::Duration;

use camino::Utf8PathBuf;
use images::tool::{ToolCommand, ToolError, ToolRunner};
use serde::Serialize;

use crate::formation::preflight::RUN_TOOLS;

/// How long a program may take to say its version.
const VERSION_DEADLINE: Duration = Duration::from_secs(15);

/// Where an image build looks besides `PATH`: an unprivileged user's has no `sbin`.
const SBIN: [&str; 2] = ["/usr/sbin", "/sbin"];

/// Programs the folder check of every run starts besides [`RUN_TOOLS`].
const MORE_RUN_TOOLS: [(&str, &str); 1] = [("sync", "coreutils")];

/// Programs an image build starts, and the Debian package each is in.
const BUILD_TOOLS: [(&str, &str); 6] = [
    ("unshare", "util-linux"),
    ("mount", "mount"),
    ("mmdebstrap", "mmdebstrap"),
    ("tar", "tar"),
    ("mkfs.ext4", "e2fsprogs"),
    ("apt-config", "apt"),
];

/// What an unprivileged user's image build needs besides.
const USER_BUILD_TOOLS: [(&str, &str); 2] = [("newuidmap", "uidmap"), ("newgidmap", "uidmap")];

/// What a program is needed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Purpose {
    /// Every run.
    Run,
    /// Building an image.
    Build,
}

/// A program that is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Tool {
    /// The program.
    pub name: &'static str,
    /// The Debian package it is in.
    pub package: &'static str,
    /// What it is needed for.
    pub purpose: Purpose,
}

/// A program, looked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ToolSeen {
    /// Which.
    pub tool: Tool,
    /// Where it is.
    pub path: Option<Utf8PathBuf>,
    /// What it says its version is; `None` where it has no option for that.
    pub version: Option<String>,
    /// Why it could not say it.
    pub fault: Option<String>,
}

/// All programs this user needs.
pub(super) fn needed(root: bool) -> Vec<Tool> {
    let run = RUN_TOOLS.iter().chain(&MORE_RUN_TOOLS).map(|tool| (Purpose::Run, tool));
    let more = if root { &[][..] } else { &USER_BUILD_TOOLS[..] };
    let build = BUILD_TOOLS.iter().chain(more).map(|tool| (Purpose::Build, tool));
    run.chain(build).map(|(purpose, &(name, package))| Tool { name, package, purpose }).collect()
}

/// Looks for a program and asks for its version.
pub(super) async fn find(tool: Tool, runner: &dyn ToolRunner) -> ToolSeen {
    let Some(path) = locate(tool) else { return ToolSeen { tool, path: None, version: None, fault: None } };
    let (version, fault) = match version_option(tool.name) {
        None => (None, None),
        Some(option) => match ask(tool.name, &path, option, runner).await {
            Ok(version) => (Some(version), None),
            Err(fault) => (None, Some(fault)),
        },
    };
    ToolSeen { tool, path: Some(path), version, fault }
}

fn locate(tool: Tool) -> Option<Utf8PathBuf> {
    let found = which::which(tool.name).ok().or_else(|| {
        let sbin = (tool.purpose == Purpose::Build).then(|| std::env::join_paths(SBIN).ok()).flatten()?;
        which::which_in(tool.name, Some(sbin), "/").ok()
    })?;
    Utf8PathBuf::from_path_buf(found).ok()
}

/// The option that makes a program say its version and end; `None` where it has none.
fn version_option(name: &str) -> Option<&'static str> {
    match name {
        "vde_plug" | "newuidmap" | "newgidmap" => None,
        "mkfs.ext4" => Some("-V"),
        _ => Some("--version"),
    }
}

async fn ask(name: &str, path: &Utf8PathBuf, option: &str, runner: &dyn ToolRunner) -> Result<String, String> {
    let command = ToolCommand::new(format!("{name} version"), path.as_str()).args([option]).deadline(VERSION_DEADLINE);
    match runner.run(command).await {
        Ok(exit) if exit.success() => Ok(first_line(&exit.output_tail)),
        Ok(exit) => Err(format!("`{name} {option}` {exit}: {}", first_line(&exit.output_tail))),
        Err(ToolError::DeadlineExceeded { deadline, .. }) => {
            Err(format!("`{name} {option}` was not done after {} s", deadline.as_secs()))
        }
        Err(error) => Err(error.to_string()),
    }
}

/// The first line that says something, without what a version is wrapped in.
fn first_line(text: &str) -> String {
    let line = text.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or_default();
    // A bracket behind the version is the distribution's; one before it is part of the name.
    let line = line
        .split_once(" (")
        .map_or(line, |(head, _)| if head.contains(|c: char| c.is_ascii_digit()) { head } else { line });
    line.chars().filter(|c| !c.is_control()).take(80).collect()
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn versions_are_cut_to_what_matters() {
        assert_eq!(
            first_line("QEMU emulator version 7.2.22 (Debian 1:7.2)\nCopyright"),
            "QEMU emulator version 7.2.22"
        );
        assert_eq!(first_line("\nmke2fs 1.47.0 (5-Feb-2023)\n"), "mke2fs 1.47.0");
        assert_eq!(first_line("unshare from util-linux 2.38.1\n"), "unshare from util-linux 2.38.1");
        assert_eq!(first_line("tar (GNU tar) 1.34\n"), "tar (GNU tar) 1.34");
        assert_eq!(first_line(""), "");
    }

    #[test]
    fn root_needs_no_id_maps() {
        let names = |root| needed(root).iter().map(|tool| tool.name).collect::<Vec<_>>();
        assert!(!names(true).contains(&"newuidmap"));
        assert!(names(false).contains(&"newuidmap"));
        for (tool, _) in RUN_TOOLS {
            assert!(names(true).contains(&tool));
        }
    }
}
