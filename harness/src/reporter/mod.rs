//! Reporters: each turns the same stream of events into what one kind of reader wants.

mod live;
mod ndjson;
mod plain;

use std::io::IsTerminal as _;

use tokio::sync::mpsc;

use crate::event::{Event, EventKind};

pub use ndjson::NdjsonReporter;

/// Takes events one by one.
pub trait Reporter: Send {
    /// Takes the next event. Must not fail: a reader that went away is no reason to end a run.
    fn event(&mut self, event: &Event);
}

/// How a run shows itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Format {
    /// Live phases on a terminal, plain lines elsewhere
    #[default]
    Auto,
    /// One line per event
    Plain,
    /// One JSON document per line
    Json,
}

/// The reporter for a format and the present standard output.
#[must_use]
pub fn for_format(format: Format) -> Box<dyn Reporter> {
    match format {
        Format::Json => Box::new(NdjsonReporter::new(Box::new(std::io::stdout()))),
        Format::Auto if std::io::stderr().is_terminal() && std::io::stdout().is_terminal() => {
            Box::new(live::LiveReporter::new())
        }
        Format::Auto | Format::Plain => Box::new(plain::PlainReporter::new(Box::new(std::io::stdout()))),
    }
}

/// Feeds every event to the reporters until the run has finished.
///
/// What is shown to a person is written by a thread of its own: a terminal that is stopped, or a pager nobody scrolls,
/// holds up neither the run nor its records.
pub async fn drive(
    mut events: mpsc::UnboundedReceiver<Event>,
    mut shown: Box<dyn Reporter>,
    mut kept: Vec<Box<dyn Reporter>>,
) {
    let (show, to_show) = std::sync::mpsc::channel::<Event>();
    let (finished, done) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        for event in to_show {
            shown.event(&event);
        }
        // Whoever waited may have given up.
        let _ = finished.send(());
    });
    while let Some(event) = events.recv().await {
        for reporter in &mut kept {
            reporter.event(&event);
        }
        let last = matches!(event.event, EventKind::RunFinished { .. });
        let _ = show.send(event);
        if last {
            break;
        }
    }
    drop(show);
    let _ = done.await;
}

/// `server-1` or the lab as a whole.
fn scope(node: Option<&str>) -> &str {
    node.unwrap_or("lab")
}

/// Milliseconds as a person reads them: `0.42 s`, `12.3 s`, `3 min 05 s`.
#[must_use]
pub fn human_ms(ms: u64) -> String {
    let s = ms / 1000;
    match ms {
        0..10_000 => format!("{}.{:02} s", s, ms % 1000 / 10),
        10_000..100_000 => format!("{}.{} s", s, ms % 1000 / 100),
        _ => format!("{} min {:02} s", s / 60, s % 60),
    }
}

/// One line for an event, or `None` where a person needs none.
fn line(event: &EventKind) -> Option<String> {
    Some(match event {
        EventKind::RunStarted { run, scenario, profile, k3s, nodes, run_dir } => {
            format!(
                "run {run}: scenario {scenario}, profile {profile}, {}\n  k3s: {k3s}\n  records: {run_dir}",
                nodes.join(" + ")
            )
        }
        EventKind::HostMeasured { accel, reason, slowdown, cores, vcpus } => {
            format!(
                "acceleration {accel}: {reason}; guests run {slowdown:.1}x slower than the reference; {vcpus} vCPUs on {cores} cores"
            )
        }
        EventKind::Warning { message } => format!("warning: {message}"),
        EventKind::PhaseStarted { phase, node, deadline_ms, waits_for } => {
            format!("{phase:<10} {:<10} … {waits_for} (at most {})", scope(node.as_deref()), human_ms(*deadline_ms))
        }
        EventKind::PhaseProgress { phase, node, message } => {
            format!("{phase:<10} {:<10}   {message}", scope(node.as_deref()))
        }
        EventKind::PhaseFinished { phase, node, outcome, phase_elapsed_ms, attempts, note } => {
            let mark = mark(*outcome);
            let tries = if *attempts > 1 { format!(", {attempts} attempts") } else { String::new() };
            format!("{phase:<10} {:<10} {mark} {} {note}{tries}", scope(node.as_deref()), human_ms(*phase_elapsed_ms))
        }
        EventKind::PrewarmMeasured { node, tcp_ms, tls_ms } => {
            let show = |samples: &[Option<f64>]| {
                samples
                    .iter()
                    .map(|ms| ms.map_or_else(|| "failed".to_owned(), |ms| format!("{ms:.1}")))
                    .collect::<Vec<_>>()
                    .join(", ")
            };
            format!("prewarm    {node:<10}   handshakes in ms: tcp {}; tls {}", show(tcp_ms), show(tls_ms))
        }
        EventKind::UnitRestarted { node, unit, restarts, detail } => {
            format!("warning: {node}: {unit} exited ({detail}) and is started again by systemd, restart {restarts}")
        }
        EventKind::FatalSign { node, id, name, line, .. } => {
            let id = id.as_ref().map_or_else(String::new, |id| format!("{id} "));
            format!("sign       {:<10}   {id}{name}: {line}", scope(node.as_deref()))
        }
        // One that is off comes with a warning.
        EventKind::ClockMeasured { .. } => return None,
        EventKind::MachineEvent { machine, message } => format!("machine    {machine:<10}   {message}"),
        EventKind::Interrupted { signal } => {
            format!("{signal}: taking the lab down in order; once more ends it at once")
        }
        EventKind::RunFinished { .. } => return None,
    })
}

fn mark(outcome: crate::event::PhaseOutcome) -> &'static str {
    use crate::event::PhaseOutcome;
    match outcome {
        PhaseOutcome::Ok => "ok",
        PhaseOutcome::Failed => "FAILED",
        PhaseOutcome::Interrupted => "interrupted",
        PhaseOutcome::Skipped => "skipped",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_well() {
        assert_eq!(human_ms(42), "0.04 s");
        assert_eq!(human_ms(9_990), "9.99 s");
        assert_eq!(human_ms(12_345), "12.3 s");
        assert_eq!(human_ms(185_000), "3 min 05 s");
    }
}
