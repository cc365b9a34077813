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

/// Writes the unit's environment file and enqueues its start.
///
/// # Errors
/// What could not be written or started.
pub(super) async fn configure_and_start(
    cx: &Context,
    guest: &Guest,
    node: &NodePlan,
    token: Option<&str>,
) -> Result<(), Failure> {
    let env = environment(&node.k3s_args, token);
    let path = match node.role {
        Role::Server => images::guest::SERVER_ENV_PATH,
        Role::Agent => images::guest::AGENT_ENV_PATH,
    };
    let limit = cx.limit(Duration::from_secs(10));
    // The token is in it: readable by root only, and not on any command line.
    guest
        .write_file(path, 0o600, env.as_bytes(), limit)
        .await
        .map_err(|error| Failure::from_error(Blame::Environment, "writing the k3s configuration", &error))?;
    let start = format!("systemctl start --no-block {}", node.k3s_unit);
    guest
        .exec_ok(&start, limit)
        .await
        .map_err(|error| Failure::from_error(Blame::Environment, format!("starting {}", node.k3s_unit), &error))?;
    Ok(())
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

/// Completes when systemd says that the unit has started (for `Type=notify`: when k3s says it is up).
///
/// An exit that systemd answers with a restart is not the end; too many of them, or a unit that has failed
/// for good, are. `entries` must have been subscribed to before the start.
///
/// # Errors
/// The product's failure.
pub(super) async fn wait_started(
    cx: &Context,
    guest: &Guest,
    unit: &str,
    mut entries: broadcast::Receiver<Arc<NodeEntry>>,
) -> Result<u32, Failure> {
    let node = guest.node();
    let mut exits = 0;
    let mut ask = tokio::time::interval(cx.limit(ASK_EVERY));
    ask.tick().await;
    loop {
        let look = tokio::select! {
            entry = entries.recv() => match entry {
                Ok(entry) if entry.node != node => false,
                Ok(entry) if entry.entry.unit_started(unit) => return Ok(exits),
                Ok(entry) if entry.entry.process_exited(unit) => {
                    exits += 1;
                    if exits > EXITS_MAX {
                        return Err(Failure::product(format!("{unit} exited {exits} times"))
                            .because(redact(&entry.entry.message).into_owned()));
                    }
                    false
                }
                Ok(entry) => entry.entry.unit_failed(unit),
                Err(RecvError::Lagged(_)) => true,
                Err(RecvError::Closed) => std::future::pending().await,
            },
            _ = ask.tick() => true,
        };
        if look && has_started(cx, guest, unit).await? {
            return Ok(exits);
        }
    }
}

/// Asks systemd once.
async fn has_started(cx: &Context, guest: &Guest, unit: &str) -> Result<bool, Failure> {
    let ask = format!("systemctl show -p ActiveState -p SubState -p Result {unit}");
    let Ok(output) = guest.exec(&ask, cx.limit(Duration::from_secs(10))).await else {
        // A guest too busy to answer says nothing about its unit.
        return Ok(false);
    };
    let text = output.text();
    let field =
        |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('=')).unwrap_or_default();
    match field("ActiveState") {
        "active" => Ok(true),
        "failed" => Err(Failure::product(format!(
            "{unit} has failed (result {}) and systemd does not start it again",
            field("Result")
        ))),
        _ => Ok(false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
