//! The command line: one file per command, and the only code that prints.

mod catalogue;
mod clean;
mod completions;
mod console;
mod cp;
mod diagnose;
pub(crate) mod doctor;
mod exec;
mod image;
mod k3s;
mod keep;
mod list;
mod logs;
mod man;
mod plan;
mod ps;
mod reach;
mod run;
mod schema;
mod shell;
mod signals;
mod stop;

use std::io::Write as _;
use std::process::ExitCode;

use camino::Utf8PathBuf;
use clap::{Parser, Subcommand};

use crate::error::CommandError;
use crate::exit::Blame;
use crate::printable::{printable, printable_json};
use crate::record::Folders;

/// The longest time an option can ask for.
const MAX_DURATION: std::time::Duration = std::time::Duration::from_secs(7 * 24 * 3600);

const EXIT_CODES: &str = "Exit codes:
    0  the run passed (or failed as the scenario expects)
    1  the product failed: k3s, or what was put into the image with it
    2  usage or configuration: a flag, a scenario, a profile, a recipe
    3  the environment failed: missing tools, starved CPUs, a full disk, a killed process
    4  a bug in the harness
    5  (diagnose) a failure was seen that is not in the catalogue
  130  interrupted";

/// VM-based integration tests of k3s clusters on QEMU/KVM
#[derive(Debug, Parser)]
#[command(name = "harness", version, after_help = EXIT_CODES, max_term_width = 110)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Options of every command.
#[derive(Debug, clap::Args)]
struct Global {
    /// Folder for records of runs and for live labs [default: $XDG_STATE_HOME/harness]
    #[arg(long, global = true, value_name = "DIR", env = "HARNESS_STATE_DIR")]
    state_dir: Option<Utf8PathBuf>,
    /// Folder for images and downloads [default: $XDG_CACHE_HOME/harness]
    #[arg(long, global = true, value_name = "DIR", env = "HARNESS_CACHE_DIR")]
    cache_dir: Option<Utf8PathBuf>,
    /// Say more on standard error; twice for everything
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
}

impl Global {
    fn folders(&self) -> Result<Folders, CommandError> {
        Folders::find(self.state_dir.clone(), self.cache_dir.clone())
            .map_err(|error| CommandError::plain(Blame::Usage, error.to_string()))
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Form the cluster of a scenario in VMs, check it, and take it down
    Run(run::Args),
    /// Print everything a run would do, without doing it
    Plan(plan::Args),
    /// Say why a run failed, from its logs, wherever they come from
    Diagnose(diagnose::Args),
    /// List and show the failure modes the harness knows
    Catalogue(catalogue::Args),
    /// List scenarios and profiles
    List(list::Args),
    /// Build, list, verify and collect guest images
    Image(image::Args),
    /// List the labs that live
    Ps(ps::Args),
    /// Open a shell in a node of a living lab
    Shell(shell::Args),
    /// Run a command in a node of a living lab
    Exec(exec::Args),
    /// Print a node's journal
    Logs(logs::Args),
    /// Print what a node says on its serial console
    Console(console::Args),
    /// Copy files into a node of a living lab, or out of it
    Cp(cp::Args),
    /// End a living lab
    Stop(stop::Args),
    /// Remove what killed runs left
    Clean(clean::Args),
    /// Look at this machine: what a run needs, what is lacking, what mends it
    Doctor(doctor::Args),
    /// Print the JSON schema of a document
    Schema(schema::Args),
    /// Print what a shell needs to complete the command line
    Completions(completions::Args),
    /// Write the manual pages
    Man(man::Args),
}

/// Parses the command line and carries it out.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    init_tracing(cli.global.verbose);
    let result = match cli.command {
        Command::Run(args) => run::run(&cli.global, args),
        Command::Plan(args) => plan::run(&cli.global, args),
        Command::Diagnose(args) => diagnose::run(args),
        Command::Catalogue(args) => catalogue::run(args),
        Command::List(args) => list::run(args),
        Command::Image(args) => image::run(&cli.global, args),
        Command::Ps(args) => ps::run(&cli.global, args),
        Command::Shell(args) => shell::run(&cli.global, args),
        Command::Exec(args) => exec::run(&cli.global, args),
        Command::Logs(args) => logs::run(&cli.global, args),
        Command::Console(args) => console::run(&cli.global, args),
        Command::Cp(args) => cp::run(&cli.global, args),
        Command::Stop(args) => stop::run(&cli.global, args),
        Command::Clean(args) => clean::run(&cli.global, args),
        Command::Doctor(args) => doctor::run(&cli.global, args),
        Command::Schema(args) => schema::run(args),
        Command::Completions(args) => completions::run(args),
        Command::Man(args) => man::run(args),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => ExitCode::from(report(&[error])),
    }
}

/// Says everything that went wrong; the exit code is the highest.
fn report(errors: &[CommandError]) -> u8 {
    for error in errors {
        // Standard error may be closed; the exit code still says it.
        let _ = std::io::stderr().write_all(printable(&error.render()).as_bytes());
    }
    errors.iter().map(|error| error.blame.exit_code()).max().unwrap_or(0)
}

fn init_tracing(verbose: u8) {
    let level = match verbose {
        0 => "warn",
        1 => "harness=info,kvm=info,images=info,verdict=info,warn",
        _ => "harness=trace,kvm=trace,images=trace,verdict=trace,info",
    };
    let filter = tracing_subscriber::EnvFilter::try_from_env("HARNESS_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(level));
    // A second initialisation (in tests) is no error.
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).try_init();
}

/// Prints to standard output, with nothing in it that a terminal would act on; a reader that went away is no error of ours.
fn print(text: &str) {
    write_out(&printable(text));
}

/// Prints a JSON document to standard output, in the same way.
fn print_json(text: &str) {
    write_out(&printable_json(text));
}

fn write_out(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// The folder scenarios, profiles and recipes are looked for in before the shipped ones.
fn base() -> Utf8PathBuf {
    std::env::current_dir().ok().and_then(|dir| Utf8PathBuf::from_path_buf(dir).ok()).unwrap_or_else(|| ".".into())
}

/// A duration as a person writes it (`10m`, `90s`, `1h 30m`), for clap.
fn duration(text: &str) -> Result<std::time::Duration, String> {
    let parsed = text.parse::<jiff::SignedDuration>().ok().and_then(|duration| duration.try_into().ok());
    parsed
        .filter(|duration| *duration <= MAX_DURATION)
        .ok_or_else(|| "expected one like 10m, 90s or 0s, a week at most".to_owned())
}

/// The runtime every command that waits runs on.
fn runtime() -> Result<tokio::runtime::Runtime, CommandError> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .worker_threads(2)
        .build()
        .map_err(|error| CommandError::new(Blame::Environment, "starting the runtime", &error))
}

/// An error of a scenario, a profile or a recipe.
fn usage(context: &str, error: &(dyn std::error::Error + 'static)) -> CommandError {
    CommandError::new(Blame::Usage, context, error)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_shows_an_example() {
        let mut left: Vec<clap::Command> = Cli::command().get_subcommands().cloned().collect();
        assert!(left.len() > 5);
        while let Some(mut command) = left.pop() {
            left.extend(command.get_subcommands().cloned());
            let help = command.render_long_help().to_string();
            assert!(help.contains("Example") && help.contains("    harness "), "{} has none", command.get_name());
        }
    }
}
