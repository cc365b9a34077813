//! Signals: once is graceful, twice is at once.

use std::time::Duration;

use kvm::Supervisor;
use nix::sys::signal::Signal as Sig;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::error::CommandError;
use crate::event::{EventKind, EventSink};
use crate::exit::Blame;
use crate::lab::{Alarm, AlarmBell};

/// The three signals that ask a program to end.
pub(super) struct Signals {
    int: Signal,
    term: Signal,
    hup: Signal,
}

impl Signals {
    /// Listens from now on.
    ///
    /// # Errors
    /// Where the system refuses to hand out signals.
    pub(super) fn open() -> Result<Self, CommandError> {
        let open =
            |kind| signal(kind).map_err(|error| CommandError::new(Blame::Environment, "listening for signals", &error));
        Ok(Self {
            int: open(SignalKind::interrupt())?,
            term: open(SignalKind::terminate())?,
            hup: open(SignalKind::hangup())?,
        })
    }

    /// The next one. Cancel-safe.
    pub(super) async fn next(&mut self) -> Sig {
        tokio::select! {
            _ = self.int.recv() => Sig::SIGINT,
            _ = self.term.recv() => Sig::SIGTERM,
            _ = self.hup.recv() => Sig::SIGHUP,
        }
    }
}

/// Longest time for the last words of a run that is ended at once.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// Hears the signals of a run.
///
/// The first rings the alarm; the second kills every process of the run, has `last_words` written (given both signals' names;
/// a disk that hangs does not hold up the end) and exits with 130.
pub(super) fn listen(
    mut signals: Signals,
    bell: AlarmBell,
    sink: EventSink,
    supervisor: Supervisor,
    last_words: impl FnOnce(&str, &str) + Send + 'static,
) -> tokio::task::JoinHandle<()> {
    tokio::spawn(async move {
        let first = signals.next().await.to_string();
        sink.emit(EventKind::Interrupted { signal: first.clone() });
        bell.ring(Alarm::Interrupted { signal: first.clone() });
        let second = signals.next().await.to_string();
        supervisor.kill_all_now();
        let (said, done) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            last_words(&first, &second);
            let _ = said.send(());
        });
        let _ = done.recv_timeout(LAST_WORDS);
        std::process::exit(i32::from(Blame::Interrupted.exit_code()));
    })
}
