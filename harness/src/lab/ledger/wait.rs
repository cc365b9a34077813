//! Waiting for a claim to be admitted: woken by the kernel when a lock is given back, never by looking again and again.

use std::collections::BTreeSet;

use camino::Utf8Path;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout_at};

use super::book::{Book, Claimed, io_error};
use super::lock::wait_while_held;
use super::{Claim, Decision, Entry, Host, Ledger, LedgerError, Obstacle, Policy, Ticket, decide};

/// What a look at the ledger came to.
enum Looked {
    Admitted(Ticket),
    Waits { ticket: Ticket, obstacle: Obstacle, before: Vec<Claimed> },
}

pub(super) async fn admit(
    ledger: &Ledger,
    claim: Claim,
    policy: Policy,
    host: impl Fn() -> Host + Send + Clone + 'static,
    mut waiting: impl FnMut(&Obstacle) + Send,
) -> Result<Ticket, LedgerError> {
    let began = Instant::now();
    let until = began + policy.wait_max;
    // One slot is enough: what matters is that something ended, not how much.
    let (ended, mut any_ended) = mpsc::channel::<()>(1);
    let mut watched = BTreeSet::new();
    let mut ticket = None;
    let mut told: Vec<String> = Vec::new();
    loop {
        let (at, claim, host, held) = (ledger.clone(), claim.clone(), host.clone(), ticket.take());
        let looked = in_thread(&ledger.root, move || look(&at, claim, held, host(), policy)).await??;
        let (held, obstacle, before) = match looked {
            Looked::Admitted(ticket) => return Ok(ticket),
            Looked::Waits { ticket, obstacle, before } => (ticket, obstacle, before),
        };
        if Instant::now() >= until {
            return Err(LedgerError::InTheWay { obstacle, waited: began.elapsed() });
        }
        let labs: Vec<String> = obstacle.labs().iter().map(|entry| entry.claim.lab.clone()).collect();
        if labs != told {
            waiting(&obstacle);
            told = labs;
        }
        ticket = Some(held);
        for claimed in before {
            if watched.insert(claimed.path.clone()) {
                watch(claimed, ended.clone())?;
            }
        }
        // The deadline is answered above, with what is in the way by then.
        let _ = timeout_at(until, any_ended.recv()).await;
    }
}

/// Looks at the ledger, decides, and enters what follows: all under the ledger's lock, so that two claims made at once
/// see each other.
fn look(
    ledger: &Ledger,
    claim: Claim,
    held: Option<Ticket>,
    host: Host,
    policy: Policy,
) -> Result<Looked, LedgerError> {
    let book = Book::open(ledger)?;
    let mine = held.as_ref().map_or((u64::MAX, 0), |ticket| (ticket.number(), book.user()));
    // What is admitted already counts, though it came later: its owner could not see this claim, or could not wait for it.
    let counts = |claimed: &Claimed| claimed.order() < mine || (claimed.entry.admitted && claimed.order() != mine);
    let before: Vec<Claimed> = book.living()?.into_iter().filter(counts).collect();
    let entries: Vec<Entry> = before.iter().map(|claimed| claimed.entry.clone()).collect();
    match decide(&claim, &entries, host, policy) {
        Decision::Refuse(obstacle) => Err(LedgerError::Refused(obstacle)),
        Decision::Admit => match held {
            None => Ok(Looked::Admitted(book.enter(claim, true)?)),
            Some(mut ticket) => {
                book.admit(&mut ticket)?;
                Ok(Looked::Admitted(ticket))
            }
        },
        Decision::Wait(obstacle) => {
            let ticket = match held {
                None => book.enter(claim, false)?,
                Some(ticket) => ticket,
            };
            Ok(Looked::Waits { ticket, obstacle, before })
        }
    }
}

/// Runs what may block on a thread that can be left behind: whoever holds the ledger's lock may have been stopped, and
/// a run that is interrupted must not wait for it. What comes of it too late is given back.
pub(super) async fn in_thread<T: Send + 'static>(
    dir: &Utf8Path,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, LedgerError> {
    let (tell, told) = oneshot::channel();
    std::thread::Builder::new()
        .name("ledger".to_owned())
        .spawn(move || {
            drop(tell.send(work()));
        })
        .map_err(|source| io_error("starting a thread for", dir, source))?;
    told.await.map_err(|_| io_error("reading", dir, std::io::Error::other("the thread that did it panicked")))
}

/// Tells when a claim's lock is given back: by its owner, or by the kernel, at the owner's end.
fn watch(claimed: Claimed, ended: mpsc::Sender<()>) -> Result<(), LedgerError> {
    let path = claimed.path.clone();
    let wait = move || {
        // A file that is gone already has ended.
        let path = &claimed.path;
        if let Ok(file) = claimed.open() {
            // A lock that cannot be waited for is looked at again, no oftener than something else ends.
            if let Err(error) = wait_while_held(&file) {
                tracing::warn!(%path, %error, "the end of a lab cannot be waited for");
                return;
            }
        }
        // A full channel says it already; a closed one is that of a claim that waits no more.
        let _ = ended.try_send(());
    };
    std::thread::Builder::new()
        .name("ledger wait".to_owned())
        .spawn(wait)
        .map(drop)
        .map_err(|source| io_error("starting a thread for", &path, source))
}
