//! Signals: once is graceful, twice is at once.

use kvm::Supervisor;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::error::CommandError;
use crate::event::{EventKind, EventSink};
use crate::exit::Blame;
use crate::lab::{Alarm, AlarmBell};

/// Listens for SIGINT, SIGTERM and SIGHUP from now on.
///
/// The first rings the alarm; the second kills every process of the run and exits with 130.
///
/// # Errors
/// Where the system refuses to hand out signals.
pub(super) fn listen(
    bell: AlarmBell,
    sink: EventSink,
    supervisor: Supervisor,
) -> Result<tokio::task::JoinHandle<()>, CommandError> {
    let open =
        |kind| signal(kind).map_err(|error| CommandError::new(Blame::Environment, "listening for signals", &error));
    let mut int = open(SignalKind::interrupt())?;
    let mut term = open(SignalKind::terminate())?;
    let mut hup = open(SignalKind::hangup())?;
    Ok(tokio::spawn(async move {
        let first = next(&mut int, &mut term, &mut hup).await;
        sink.emit(EventKind::Interrupted { signal: first.to_owned() });
        bell.ring(Alarm::Interrupted { signal: first.to_owned() });
        next(&mut int, &mut term, &mut hup).await;
        supervisor.kill_all_now();
        std::process::exit(i32::from(Blame::Interrupted.exit_code()));
    }))
}

async fn next(int: &mut Signal, term: &mut Signal, hup: &mut Signal) -> &'static str {
    tokio::select! {
        _ = int.recv() => "SIGINT",
        _ = term.recv() => "SIGTERM",
        _ = hup.recv() => "SIGHUP",
    }
}
