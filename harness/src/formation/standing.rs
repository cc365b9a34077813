//! A lab whose run is over: what is left of it, to be kept for a while or taken down at once.

use std::collections::BTreeMap;
use std::time::Duration;

use camino::Utf8Path;
use kvm::Supervisor;

use crate::guest::Guest;
use crate::lab::ledger::Ticket;
use crate::lab::{Lab, LabDirs};

/// How long what is left of the run's processes may take to end.
const GRACE: Duration = Duration::from_secs(3);

/// Everything a run has started and not yet ended.
pub struct Standing {
    pub(super) lab: Lab,
    pub(super) guests: BTreeMap<String, Guest>,
    pub(super) supervisor: Supervisor,
    pub(super) dirs: LabDirs,
    /// The lab's share of this machine, claimed for as long as it stands.
    pub(super) ticket: Option<Ticket>,
}

impl Standing {
    /// The lab's id.
    #[must_use]
    pub fn id(&self) -> &str {
        self.dirs.id()
    }

    /// The lab's folder.
    #[must_use]
    pub fn dir(&self) -> &Utf8Path {
        self.dirs.disks()
    }

    /// What the lab's processes are owned by.
    #[must_use]
    pub fn supervisor(&self) -> &Supervisor {
        &self.supervisor
    }

    /// Ends the run's own connections to the guests: nobody listens to what they say any more.
    pub async fn disconnect(&mut self) {
        for guest in std::mem::take(&mut self.guests).into_values() {
            // A guest that hangs must not hold up its own end.
            let _ = tokio::time::timeout(Duration::from_millis(500), guest.disconnect()).await;
        }
    }

    /// Completes when no machine of the lab runs any more: there is nothing left to look into.
    pub async fn emptied(&self) {
        self.lab.emptied().await;
    }

    /// Takes everything down. What would not go is returned in words.
    pub async fn teardown(mut self) -> Vec<String> {
        self.disconnect().await;
        let mut leftovers = self.lab.teardown().await;
        leftovers.extend(self.supervisor.shutdown(GRACE).await.iter().map(ToString::to_string));
        if let Err(error) = self.dirs.remove() {
            leftovers.push(crate::error::chain_of(&error).join(": "));
        }
        drop(self.ticket);
        leftovers
    }
}
