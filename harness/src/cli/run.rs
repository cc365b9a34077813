//! `harness run`: the whole job.

use std::time::{Duration, Instant};

use jiff::Timestamp;
use kvm::{AccelChoice, Supervisor};
use verdict::Classifier;

use crate::cli::k3s::{K3sArgs, Wanted};
use crate::cli::keep::{self, Closing, Keep, Leash};
use crate::cli::signals::Signals;
use crate::cli::{Global, base, k3s, print, signals, usage};
use crate::error::{CommandError, chain_of};
use crate::event::{EventKind, EventSink};
use crate::exit::Blame;
use crate::formation::context::millis;
use crate::formation::report::{Ended, RunReport};
use crate::formation::{self, Ingredients};
use crate::lab::ledger::{Admission, Ledger, Policy};
use crate::lab::{LabDirs, alarm, dirs};
use crate::plan::{Inputs, Paths, plan};
use crate::record::{Folders, RunDir, RunHeader, private_file};
use crate::reporter::{self, Format, NdjsonReporter, Reporter};
use crate::scenario::{Loaded, load};

/// `harness run`
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
    harness run bonding-vlans --k3s file:./k3s
    harness run smoke --k3s standin --format plain
    harness run bonding-vlans --keep-on-failure --keep-for 1h
    harness run ./mine.yaml --accel kvm --format json > events.ndjson")]
pub(super) struct Args {
    /// A scenario's name, or the path of its file
    scenario: String,
    /// Where k3s comes from: file:/path/to/k3s, release:VERSION or standin [default: the scenario's]
    #[arg(long, value_name = "SOURCE")]
    k3s: Option<images::k3s::K3sSource>,
    #[command(flatten)]
    k3s_args: K3sArgs,
    /// How guests are run; `auto` tries whether KVM is usable and says what it found
    #[arg(long, value_name = "auto|kvm|tcg", default_value = "auto")]
    accel: AccelChoice,
    /// How the run shows itself
    #[arg(long, value_enum, default_value_t)]
    format: Format,
    /// How long to wait for other labs on this machine to end where there is no room beside them: 10m, 90s, 0s
    #[arg(long, value_name = "DURATION", default_value = "10m", value_parser = super::duration)]
    wait_for_host: Duration,
    /// Keep the lab when the run is over, to be looked at: see `harness ps`, `shell`, `exec`, `logs`, `stop`
    #[arg(long, conflicts_with = "keep_on_failure")]
    keep: bool,
    /// Keep the lab where the run did not pass
    #[arg(long)]
    keep_on_failure: bool,
    /// How long a lab is kept before it is taken down: 30m, 2h, 90s
    #[arg(long, value_name = "DURATION", default_value = "30m", value_parser = super::duration)]
    keep_for: Duration,
}

impl Args {
    fn keep(&self) -> Keep {
        match (self.keep, self.keep_on_failure) {
            (true, _) => Keep::Always,
            (false, true) => Keep::OnFailure,
            (false, false) => Keep::Never,
        }
    }
}

pub(super) fn run(global: &Global, args: Args) -> Result<u8, CommandError> {
    if args.keep() != Keep::Never && !keep::is_owner() {
        return keep::relay();
    }
    // Everything that can be wrong with what was asked for is found before anything is made or started.
    let mut loaded = load(&args.scenario, &base()).map_err(|error| usage("reading the scenario", &error))?;
    let recipe = images::recipe::Recipes::new(Some(base().join("images/recipes")))
        .load(&loaded.scenario.image)
        .map_err(|error| usage("reading the recipe", &error))?;
    let source = args.k3s.clone().unwrap_or_else(|| loaded.scenario.k3s.clone());
    loaded.scenario.airgap_images = args.k3s_args.airgap_images(&source, &loaded.scenario.airgap_images)?;
    let folders = global.folders()?;
    let (airgap_images, options) = (&loaded.scenario.airgap_images, &args.k3s_args.options());
    let k3s::Resolved { binary, signals, runtime } =
        k3s::resolve(&Wanted { source: &source, airgap_images, options }, &folders.cache)?;
    runtime.block_on(in_runtime(args, loaded, recipe, binary, folders, signals))
}

async fn in_runtime(
    args: Args,
    loaded: Loaded,
    recipe: images::recipe::Recipe,
    k3s: images::k3s::K3sBinary,
    folders: Folders,
    signals: Signals,
) -> Result<u8, CommandError> {
    let began = Instant::now();
    let environment = |context: &str, error: &(dyn std::error::Error + 'static)| {
        CommandError::new(Blame::Environment, context, error)
    };
    for (id, removed) in dirs::reap(&folders) {
        match removed {
            Ok(()) => tracing::info!(lab = id, "removed what a killed run had left"),
            Err(error) => tracing::warn!(lab = id, error = chain_of(&error).join(": "), "what a killed run left stays"),
        }
    }
    let lab = LabDirs::claim(&folders).map_err(|error| environment("making the lab's folders", &error))?;
    let started = Timestamp::now();
    let run_id = format!("{}-{}-{}", started.strftime("%Y%m%dT%H%M%SZ"), loaded.scenario.name, lab.id());
    let header = RunHeader {
        schema_version: 1,
        run: run_id.clone(),
        lab: lab.id().to_owned(),
        scenario: loaded.scenario.name.clone(),
        k3s: k3s.label.clone(),
        started,
        command: std::env::args().collect(),
        harness_version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
    };
    let record =
        RunDir::create(&folders.state, &header).map_err(|error| environment("making the run folder", &error))?;
    let supervisor = Supervisor::new().map_err(|error| environment("preparing to start processes", &error))?;
    let (sink, events) = EventSink::new();
    let (bell, guard) = alarm::alarm();
    let catalogue = crate::catalogue::shipped()
        .map_err(|error| CommandError::new(Blame::Harness, "reading the shipped catalogue", &error))?;
    let classifier = Classifier::new(&catalogue);
    let last_words = {
        let (record, header, classifier) = (record.clone(), header.clone(), classifier.clone());
        move |first: &str, second: &str| {
            let report = RunReport::ended_at_once(
                &header,
                (first, second),
                record.path().as_str(),
                &classifier,
                millis(began.elapsed()),
            );
            // A run that was judged already keeps its verdict; there is nobody left to be told of a failure.
            let _ = record.write_json_once("verdict.json", &report);
        }
    };
    let listener = signals::listen(signals, bell.clone(), sink.clone(), supervisor.clone(), last_words);
    // Where a lab may be kept, this process is its owner already.
    let leash = match args.keep() {
        Keep::Never => None,
        _ => Some(Leash::take(bell.clone(), sink.clone())?),
    };
    let driven =
        tokio::spawn(reporter::drive(events, reporter::for_format(args.format), kept_reporters(&record, &sink)));
    sink.emit(EventKind::RunStarted {
        run: run_id.clone(),
        scenario: loaded.scenario.name.clone(),
        profile: loaded.profile.name.clone(),
        k3s: k3s.label.clone(),
        nodes: loaded.scenario.nodes.iter().map(|node| node.name.clone()).collect(),
        run_dir: record.path().to_string(),
    });

    let result: Result<Ingredients, CommandError> = async {
        let inputs = tokio::select! {
            biased;
            measured = measure(&args, &lab, &record, &k3s.label, &supervisor) => measured?,
            alarm = guard.rung() => {
                let failure = alarm.to_failure();
                return Err(CommandError { blame: failure.blame, chain: failure.chain, hint: failure.hint });
            }
        };
        let slowdown = inputs.0.calibration.slowdown;
        let plan = plan(&loaded.scenario, &loaded.profile, &inputs.0)
            .map_err(|error| usage("planning", &error))?
            .wait_for_host(args.wait_for_host);
        sink.emit(EventKind::HostMeasured {
            accel: plan.host.accel.to_string(),
            reason: inputs.1,
            slowdown,
            cores: plan.host.cores,
            vcpus: plan.oversubscription.vcpus,
        });
        let admission = Admission {
            ledger: Ledger::host_wide(),
            policy: Policy { wait_max: args.wait_for_host, ..Policy::default() },
        };
        Ok(Ingredients {
            plan,
            admission,
            recipe,
            k3s,
            folders,
            dirs: lab,
            record: record.clone(),
            supervisor: supervisor.clone(),
            bell,
            guard: guard.clone(),
            sink: sink.clone(),
            classifier: classifier.clone().with_slowdown(slowdown),
        })
    }
    .await;
    let judge = |ended: &Ended| RunReport::judge(ended, &run_id, millis(began.elapsed()));
    let (report, error, kept) = match result {
        Ok(ingredients) => {
            let wanted = |ended: &Ended| args.keep().wanted(judge(ended).passed, guard.interrupted());
            let (ended, kept) = formation::run(ingredients, wanted).await;
            (judge(&ended), None, kept)
        }
        Err(error) => {
            supervisor.shutdown(Duration::from_secs(1)).await;
            let dir = record.path().as_str();
            (RunReport::before_plan(&header, &error, dir, &classifier, millis(began.elapsed())), Some(error), None)
        }
    };
    if let Err(error) = record.write_json("verdict.json", &report) {
        sink.warn(format!("the verdict is not kept: {error}"));
    }
    // Listened to before the run's own listener goes: a signal in between would be lost.
    let until_stopped = Signals::open()?;
    listener.abort();
    let (passed, exit_code) = (report.passed, report.exit_code);
    sink.emit(EventKind::RunFinished { passed, exit_code, summary: report.headline() });
    // The reporters end with that event; should one hang on a blocked terminal, the run does not.
    let _ = tokio::time::timeout(Duration::from_secs(5), driven).await;
    if let Some(error) = error {
        return Err(error);
    }
    let summary = if args.format == Format::Json { String::new() } else { report.render() };
    match (kept, leash) {
        (Some(lab), Some(leash)) => {
            let closing = Closing { summary: &summary, exit_code, run_dir: record.path() };
            keep::hold(lab, leash, args.keep_for, until_stopped, closing).await?;
        }
        _ => print_unless_stopped(summary, until_stopped).await,
    }
    Ok(exit_code)
}

/// The reporters that write to the run folder.
fn kept_reporters(record: &RunDir, sink: &EventSink) -> Vec<Box<dyn Reporter>> {
    match private_file(&record.path().join("events.ndjson")) {
        Ok(file) => vec![Box::new(NdjsonReporter::record(file))],
        Err(error) => {
            sink.warn(format!("events are not kept: {error}"));
            Vec::new()
        }
    }
}

/// Prints the summary from a thread of its own, so that a blocked terminal does not make the harness deaf to signals.
async fn print_unless_stopped(text: String, mut signals: Signals) {
    let (printed, done) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        print(&text);
        let _ = printed.send(());
    });
    tokio::select! {
        _ = done => {}
        _ = signals.next() => {}
    }
}

/// Settles the acceleration and measures the host.
async fn measure(
    args: &Args,
    lab: &LabDirs,
    record: &RunDir,
    k3s: &str,
    supervisor: &Supervisor,
) -> Result<(Inputs, String), CommandError> {
    let report = kvm::resolve(args.accel).await.map_err(|error| {
        CommandError::new(Blame::Environment, format!("using the acceleration {}", args.accel), &error)
            .hint("--accel auto takes TCG where KVM is not usable")
    })?;
    let calibration = kvm::calibrate(report.accel, supervisor).await.map_err(|error| {
        CommandError::new(Blame::Environment, "measuring how fast guests run here", &error)
            .hint("apt-get install qemu-system-x86 qemu-utils vde2 mmdebstrap")
    })?;
    let paths = Paths {
        run: record.path().to_owned(),
        disks: lab.disks().to_owned(),
        sockets: lab.sockets().to_owned(),
        ..Paths::placeholders()
    };
    let inputs = Inputs { lab: lab.id().to_owned(), k3s: k3s.to_owned(), host: kvm::host_facts(), calibration, paths };
    Ok((inputs, report.reason))
}
