//! `k3s` in guests that have no k3s binary: what real k3s does while a cluster forms, on real
//! etcd. It runs no containers. Paths, ports, token, statuses and log lines are those measured on
//! k3s 1.21; nothing that watches a cluster form needs to know which of the two it sees.
//!
//! Flow: `cli` → (`server` | `agent` | `kubectl`). `server`: bootstrap data and certificates on
//! disk → etcd child → datastore check → API on 6443 → `kubelet` and `leader` loops.

mod access;
mod agent;
mod api;
mod bootstrap;
mod certs;
mod cli;
mod config;
mod der;
mod etcd;
mod exit;
mod flags;
mod host;
mod kubectl;
mod kubelet;
mod layout;
mod leader;
mod logfmt;
mod net;
mod nodes;
mod notify;
mod pki;
mod server;
mod tls;
mod token;

use std::io::Write as _;
use std::process::ExitCode;
use std::sync::Arc;

use crate::cli::{CliError, Command};
use crate::exit::{Exit, Stop};
use crate::logfmt::Level;

/// The version everything reports.
pub(crate) const VERSION: &str = "v0.0.0-standin";

/// Version and what k3s prints as its commit.
pub(crate) fn version_line() -> String {
    format!("{VERSION} (not real k3s)")
}

/// Prints on standard output; a reader that went away is no failure of ours.
fn print(text: &str) {
    let _ = std::io::stdout().lock().write_all(text.as_bytes());
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args_os().skip(1).map(|a| a.to_string_lossy().into_owned()).collect();
    let command = match cli::parse(&args) {
        Ok(command) => command,
        Err(error) => {
            if matches!(error, CliError::Flag(_)) {
                print(&format!("Incorrect Usage: {error}\n\n{}", cli::help()));
            }
            logfmt::logrus(Level::Fatal, &error.to_string());
            return ExitCode::FAILURE;
        }
    };
    // One thread: a guest's CPU is often emulated, and little here can run side by side. It also
    // is the thread that starts etcd, whose parent-death signal follows it.
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return ExitCode::from(Exit::Fatal(format!("starting the runtime: {error}")).report()),
    };
    let code = runtime.block_on(dispatch(command));
    // Tasks still waiting (connections, watches) end with the process.
    runtime.shutdown_background();
    ExitCode::from(code)
}

async fn dispatch(command: Command) -> u8 {
    let settings = match command {
        Command::Version => {
            print(&format!("k3s version {}\n", version_line()));
            return 0;
        }
        Command::Help => {
            print(&cli::help());
            return 0;
        }
        Command::Kubectl(args) => {
            return match kubectl::run(&args).await {
                Ok(text) => {
                    print(&text);
                    0
                }
                Err(error) => {
                    logfmt::raw_line(&error.to_string());
                    1
                }
            };
        }
        Command::Server(settings) => (settings, true),
        Command::Agent(settings) => (settings, false),
    };
    let mut stop = match Stop::new() {
        Ok(stop) => stop,
        Err(error) => return Exit::Fatal(format!("signals: {error}")).report(),
    };
    let exit = match settings {
        (settings, true) => server::run(Arc::from(settings), &mut stop).await,
        (settings, false) => agent::run(Arc::from(settings), &mut stop).await,
    };
    exit.report()
}
