//! `harness shell`: the system's `ssh`, with the lab's keys.

use std::os::unix::process::CommandExt as _;

use crate::cli::Global;
use crate::cli::reach::Which;
use crate::error::CommandError;
use crate::exit::Blame;
use crate::lab::inventory::{LivingLab, NodeEntry, host_alias};

/// `harness shell`
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:
    harness shell server-1

The host key is the one the node was given; nothing of ~/.ssh is read or written. For commands in scripts
there is `harness exec`, which needs no ssh on this machine.")]
pub(super) struct Args {
    /// The node
    node: String,
    #[command(flatten)]
    which: Which,
}

pub(super) fn run(global: &Global, args: Args) -> Result<u8, CommandError> {
    let (lab, node) = args.which.node(global, &args.node)?;
    let ssh = which::which("ssh").map_err(|_| {
        CommandError::plain(Blame::Environment, "missing on this machine: ssh")
            .hint("apt-get install openssh-client, or use `harness exec`")
    })?;
    // Takes this process's place: whatever ends the terminal ends it too. It returns only where it fails.
    let error = std::process::Command::new(ssh).args(arguments(&lab, &node)).exec();
    Err(CommandError::new(Blame::Environment, "starting ssh", &error))
}

/// ssh(1) and ssh_config(5): this lab's keys and no others.
fn arguments(lab: &LivingLab, node: &NodeEntry) -> Vec<String> {
    let options = [
        "IdentitiesOnly=yes".to_owned(),
        "IdentityAgent=none".to_owned(),
        format!("UserKnownHostsFile=\"{}\"", lab.known_hosts()),
        "GlobalKnownHostsFile=/dev/null".to_owned(),
        format!("HostKeyAlias={}", host_alias(&lab.record.lab, &node.name)),
        "StrictHostKeyChecking=yes".to_owned(),
        "UpdateHostKeys=no".to_owned(),
        "LogLevel=ERROR".to_owned(),
    ];
    let mut arguments = vec!["-F".to_owned(), "/dev/null".to_owned()];
    arguments.extend(["-i".to_owned(), lab.client_key().into_string()]);
    arguments.extend(["-p".to_owned(), node.ssh_port.to_string()]);
    arguments.extend(options.into_iter().flat_map(|option| ["-o".to_owned(), option]));
    arguments.push(format!("{}@127.0.0.1", node.user));
    arguments
}
