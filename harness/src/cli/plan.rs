//! `harness plan`: everything a run would do. Works without KVM, image or root.

use kvm::{AccelChoice, Calibration};

use crate::cli::k3s::K3sArgs;
use crate::cli::{Global, base, print, print_json, runtime, usage};
use crate::error::CommandError;
use crate::exit::Blame;
use crate::plan::{Inputs, Paths, plan};
use crate::scenario::load;

/// `harness plan`
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n    harness plan bonding-vlans\n    harness plan ./mine.yaml --json | jq .phases")]
pub(super) struct Args {
    /// A scenario's name, or the path of its file
    scenario: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// The k3s to plan for, as for `run`
    #[arg(long, value_name = "SOURCE")]
    k3s: Option<images::k3s::K3sSource>,
    #[command(flatten)]
    k3s_args: K3sArgs,
    /// Acceleration to plan for; `auto` tries KVM and measures this host
    #[arg(long, value_name = "auto|kvm|tcg", default_value = "auto")]
    accel: AccelChoice,
    /// Do not measure this host: assume the documented speed of the acceleration
    #[arg(long)]
    no_measure: bool,
}

pub(super) fn run(_global: &Global, args: Args) -> Result<u8, CommandError> {
    let mut loaded = load(&args.scenario, &base()).map_err(|error| usage("reading the scenario", &error))?;
    let source = args.k3s.unwrap_or_else(|| loaded.scenario.k3s.clone());
    loaded.scenario.airgap_images = args.k3s_args.airgap_images(&source, &loaded.scenario.airgap_images)?;
    let calibration = calibration(args.accel, !args.no_measure)?;
    let inputs = Inputs {
        lab: "plan".to_owned(),
        k3s: source.planned(&args.k3s_args.options()),
        host: kvm::host_facts(),
        calibration,
        paths: Paths::placeholders(),
    };
    let plan = plan(&loaded.scenario, &loaded.profile, &inputs).map_err(|error| usage("planning", &error))?;
    if args.json {
        let text = serde_json::to_string_pretty(&plan)
            .map_err(|error| CommandError::new(Blame::Harness, "encoding the plan", &error))?;
        print_json(&format!("{text}\n"));
    } else {
        print(&plan.render_text());
    }
    Ok(0)
}

/// The speed of this host where it can be measured, and what is assumed otherwise, said in the plan.
fn calibration(choice: AccelChoice, measure: bool) -> Result<Calibration, CommandError> {
    let assumed = match choice {
        AccelChoice::Kvm => Calibration::assumed(kvm::Accel::Kvm),
        AccelChoice::Auto | AccelChoice::Tcg => Calibration::assumed(kvm::Accel::Tcg),
    };
    if !measure {
        return Ok(assumed);
    }
    runtime()?.block_on(async {
        let Ok(report) = kvm::resolve(choice).await else { return Ok(assumed) };
        let supervisor = kvm::Supervisor::new()
            .map_err(|error| CommandError::new(Blame::Environment, "preparing to measure this host", &error))?;
        let measured = kvm::calibrate(report.accel, &supervisor).await;
        supervisor.shutdown(std::time::Duration::from_secs(1)).await;
        // A plan is also made where nothing can be run; it says that its figures are assumed.
        Ok(measured.unwrap_or_else(|_| Calibration::assumed(report.accel)))
    })
}
