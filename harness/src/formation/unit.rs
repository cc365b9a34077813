//! A k3s unit: configured, started, and awaited by its journal.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;

use crate::exit::Blame;
use crate::failure::Failure;
use crate::formation::context::Context;
use crate::guest::Guest;
use crate::lab::evidence::NodeEntry;
use crate::plan::{NodePlan, TOKEN_PLACEHOLDER};
use crate::redact::redact;
use crate::scenario::Role;

/// How often k3s may exit and be restarted by systemd while it is awaited. Real k3s, starved of CPU, exits up to
/// three times on its way.
const EXITS_MAX: u32 = 5;
/// How often the unit itself is asked, should the journal have been silent.
const ASK_EVERY: Duration = Duration::from_secs(15);

/// A started unit, watched by its journal until the node it makes is Ready.
pub(super) struct UnitWatch<'a> {
    cx: &'a Context,
    guest: &'a Guest,
    unit: &'a str,
    entries: broadcast::Receiver<Arc<NodeEntry>>,
    /// Entries before this moment of the guest's clock are of an earlier start.
    started_at_us: u64,
    /// Exits so far; each was followed by a restart.
    pub(super) exits: u32,
}

/// Writes the unit's environment file and enqueues its start.
///
/// # Errors
/// What could not be written or started.
pub(super) async fn start<'a>(
    cx: &'a Context,
    guest: &'a Guest,
    node: &'a NodePlan,
    token: Option<&str>,
    entries: broadcast::Receiver<Arc<NodeEntry>>,
) -> Result<UnitWatch<'a>, Failure> {
    let env = environment(&node.k3s_args, token);
    let path = match node.role {
        Role::Server => images::guest::SERVER_ENV_PATH,
        Role::Agent => images::guest::AGENT_ENV_PATH,
    };
    let limit = cx.limit(Duration::from_secs(10));
    // Where sanitize was left out, the image may have started the unit already, with another configuration.
    let start = format!("read -r up _ </proc/uptime; echo $up; systemctl restart --no-block {}", node.k3s_unit);
    // The token is in it: readable by root only, and not on any command line.
    let output = guest.write_file_then(path, 0o600, env.as_bytes(), &start, limit).await.map_err(|error| {
        Failure::from_error(Blame::Environment, format!("configuring and starting {}", node.k3s_unit), &error)
    })?;
    let started_at_us = uptime_us(&output.text());
    Ok(UnitWatch { cx, guest, unit: &node.k3s_unit, entries, started_at_us, exits: 0 })
}

/// Microseconds of `/proc/uptime`'s first field, 0 where it cannot be read.
fn uptime_us(text: &str) -> u64 {
    let first = text.split_whitespace().next().unwrap_or_default();
    let (seconds, hundredths) = first.split_once('.').unwrap_or((first, "0"));
    let part = |text: &str| text.parse::<u64>().unwrap_or(0);
    part(seconds) * 1_000_000 + part(hundredths) * 10_000
}

fn environment(args: &[String], token: Option<&str>) -> String {
    // The plan shows `--token`; k3s takes the same from K3S_TOKEN, where no process list shows it.
    let mut shown = Vec::new();
    let mut rest = args.iter().map(String::as_str).peekable();
    while let Some(arg) = rest.next() {
        if arg == "--token" && rest.peek() == Some(&TOKEN_PLACEHOLDER) {
            rest.next();
        } else {
            shown.push(arg);
        }
    }
    let mut env = format!("K3S_ARGS=\"{}\"\n", shown.join(" "));
    if let Some(token) = token {
        env.push_str(&format!("K3S_TOKEN=\"{token}\"\n"));
    }
    env
}

/// What the journal or systemd said of the unit.
enum Said {
    Started,
    Nothing,
}

impl UnitWatch<'_> {
    /// Completes when systemd says that the unit has started (for `Type=notify`: when k3s says it is up).
    ///
    /// # Errors
    /// See [`UnitWatch::next`].
    pub(super) async fn started(&mut self) -> Result<(), Failure> {
        while !matches!(self.next().await?, Said::Started) {}
        Ok(())
    }

    /// Completes only when the unit is beyond hope; for racing what comes after its start.
    pub(super) async fn broken(&mut self) -> Failure {
        loop {
            if let Err(failure) = self.next().await {
                return failure;
            }
        }
    }

    /// Waits for the next thing said of the unit.
    ///
    /// An exit that systemd answers with a restart is not the end.
    ///
    /// # Errors
    /// The product's failure: too many exits, or a unit that has failed for good.
    async fn next(&mut self) -> Result<Said, Failure> {
        let look = match tokio::time::timeout(self.cx.limit(ASK_EVERY), self.entries.recv()).await {
            Ok(Ok(entry)) if entry.node != self.guest.node() || entry.entry.monotonic_us < self.started_at_us => false,
            Ok(Ok(entry)) if entry.entry.unit_started(self.unit) => return Ok(Said::Started),
            Ok(Ok(entry)) if entry.entry.process_exited(self.unit) => {
                self.exits += 1;
                let message = redact(&entry.entry.message).into_owned();
                if self.exits > EXITS_MAX {
                    let exits = self.exits;
                    return Err(Failure::product(format!("{} exited {exits} times", self.unit)).because(message));
                }
                false
            }
            Ok(Ok(entry)) => entry.entry.unit_failed(self.unit),
            Ok(Err(RecvError::Closed)) => std::future::pending().await,
            // Entries were missed, or there were none for a while: systemd itself knows.
            Ok(Err(RecvError::Lagged(_))) | Err(_) => true,
        };
        if look { self.ask().await } else { Ok(Said::Nothing) }
    }

    /// Asks systemd once.
    async fn ask(&self) -> Result<Said, Failure> {
        let ask = format!("systemctl show -p ActiveState -p SubState -p Result {}", self.unit);
        let Ok(output) = self.guest.exec(&ask, self.cx.limit(Duration::from_secs(10))).await else {
            // A guest too busy to answer says nothing about its unit.
            return Ok(Said::Nothing);
        };
        let text = output.text();
        let field =
            |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('=')).unwrap_or_default();
        match field("ActiveState") {
            "active" => Ok(Said::Started),
            "failed" => {
                let result = field("Result");
                Err(Failure::product(format!(
                    "{} has failed (result {result}) and systemd does not start it again",
                    self.unit
                )))
            }
            _ => Ok(Said::Nothing),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uptime_is_read_to_the_hundredth() {
        assert_eq!(uptime_us("12.34 45.67\n"), 12_340_000);
        assert_eq!(uptime_us("garbage"), 0);
    }

    #[test]
    fn the_token_is_in_the_environment_not_among_the_arguments() {
        let args = ["--server", "https://192.168.1.1:6443", "--token", TOKEN_PLACEHOLDER].map(str::to_owned);
        assert_eq!(
            environment(&args, Some("K10ab::server:cd")),
            "K3S_ARGS=\"--server https://192.168.1.1:6443\"\nK3S_TOKEN=\"K10ab::server:cd\"\n"
        );
        assert_eq!(environment(&args[..1], None), "K3S_ARGS=\"--server\"\n");
    }
}
