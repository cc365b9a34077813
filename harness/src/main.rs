//! `harness`: VM-based integration tests of k3s clusters.

use std::process::ExitCode;

fn main() -> ExitCode {
    harness::cli::main()
}
