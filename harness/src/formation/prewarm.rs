//! prewarm: the path from a joiner to the first server has carried TCP and TLS before k3s needs it (FM-4).

use std::cell::RefCell;
use std::net::SocketAddr;
use std::time::Duration;

use images::retry::{Class, Policy, retry};

use crate::cluster::{PrewarmError, PrewarmSample, prewarm as probe};
use crate::event::EventKind;
use crate::exit::Blame;
use crate::failure::Failure;
use crate::formation::context::{Context, Done};
use crate::guest::Guest;
use crate::plan::{API_PORT, Phase};

/// What a joining k3s asks its server for first.
const PATH: &str = "/cacerts";

/// Why one attempt did not do.
#[derive(Debug, thiserror::Error)]
enum Unwarmed {
    #[error(transparent)]
    Guest(#[from] crate::guest::GuestError),
    #[error("{message}")]
    Probe { kind: PrewarmError, message: String },
}

impl Unwarmed {
    fn class(&self) -> Class {
        match self {
            // The slow first handshake this phase is for, or a server that is just coming back.
            Self::Probe { kind: PrewarmError::Timeout | PrewarmError::Refused | PrewarmError::Tls, .. } => {
                Class::Transient
            }
            // No way there: another attempt would only hide a missing VLAN or link.
            Self::Probe { kind: PrewarmError::NoRoute | PrewarmError::Other, .. } | Self::Guest(_) => Class::Permanent,
        }
    }

    fn blame(&self) -> Blame {
        match self {
            Self::Probe { kind: PrewarmError::NoRoute, .. } => Blame::Usage,
            Self::Probe { kind: PrewarmError::Refused | PrewarmError::Tls, .. } => Blame::Product,
            Self::Probe { kind: PrewarmError::Timeout | PrewarmError::Other, .. } | Self::Guest(_) => {
                Blame::Environment
            }
        }
    }
}

/// Warms a joiner's path, and measures it a second time once it is warm.
///
/// # Errors
/// The last attempt's failure.
pub(super) async fn prewarm(cx: &Context, guest: &Guest) -> Result<(), Failure> {
    let server = cx.first_server()?;
    let address = SocketAddr::from((server.cluster_ip, API_PORT));
    let url = format!("https://{address}{PATH}");
    let planned = &cx.plan.prewarm;
    let policy = Policy::Constant { interval: Duration::from_millis(planned.pause_ms), max_attempts: planned.attempts };
    let limit = Duration::from_millis(planned.attempt_timeout_ms);
    cx.phase(Phase::Prewarm, Some(guest.node()), format!("TCP and TLS to {url}"), async {
        let samples = RefCell::new(Vec::new());
        let ask = |_| async {
            let sample = probe(guest, address, PATH, limit).await?;
            samples.borrow_mut().push(sample.clone());
            match sample.error {
                None => Ok(sample),
                Some(kind) => Err(Unwarmed::Probe { kind, message: sample.message }),
            }
        };
        let told = |attempt: u32, error: &Unwarmed, _: Duration| {
            cx.progress(Phase::Prewarm, Some(guest.node()), format!("attempt {attempt} failed: {error}"));
        };
        let warmed = retry(&policy, Unwarmed::class, told, ask).await;
        if warmed.is_ok() {
            // The second one tells a slow first connection from a slow path; it decides nothing.
            let _ = ask(0).await;
        }
        let samples = samples.into_inner();
        emit(cx, guest.node(), &samples);
        match warmed {
            Ok(warmed) => Ok(Done::new((), note(&samples)).after(warmed.attempts)),
            Err(gave_up) => Err(Failure::from_error(
                gave_up.error.blame(),
                format!("{} does not get TCP and TLS to {url} in {} attempts", guest.node(), gave_up.attempts),
                &gave_up.error,
            )),
        }
    })
    .await
}

fn emit(cx: &Context, node: &str, samples: &[PrewarmSample]) {
    cx.sink.emit(EventKind::PrewarmMeasured {
        node: node.to_owned(),
        tcp_ms: samples.iter().map(|sample| sample.ok.then_some(sample.connect_ms)).collect(),
        tls_ms: samples.iter().map(|sample| sample.ok.then_some(sample.tls_ms)).collect(),
    });
}

fn note(samples: &[PrewarmSample]) -> String {
    let one = |sample: &PrewarmSample| format!("tcp {:.0} ms, tls {:.0} ms", sample.connect_ms, sample.tls_ms);
    let mut good = samples.iter().filter(|sample| sample.ok);
    match (good.next(), good.next()) {
        (Some(first), Some(second)) => format!("first {}; then {}", one(first), one(second)),
        (Some(first), None) => one(first),
        (None, _) => String::new(),
    }
}
