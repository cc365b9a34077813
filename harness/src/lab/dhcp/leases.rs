//! What a network's clients have asked for and been told so far: the event a node's lease is waited for by, and the reason where it does not come.

use std::collections::BTreeMap;
use std::future::pending;
use std::net::Ipv4Addr;
use std::time::Duration;

use kvm::Mac;
use tokio::sync::watch;
use tokio::time::Instant;

use super::respond::{Answer, Asked, Exchange};
use crate::plan::DhcpPlan;

/// Most clients without a reservation that are kept apart.
const STRANGERS_MAX: usize = 16;

/// One network's leases, as seen by its DHCP server. Clones see the same.
#[derive(Debug, Clone)]
pub struct Leases {
    network: String,
    place: String,
    board: watch::Receiver<Board>,
}

/// The server's side of [`Leases`].
#[derive(Debug)]
pub(crate) struct Book {
    board: watch::Sender<Board>,
}

#[derive(Debug, Clone, Default)]
struct Board {
    clients: BTreeMap<Mac, Client>,
    /// Clients without a reservation: what they call themselves, and how often they asked.
    strangers: BTreeMap<Mac, (Option<String>, u32)>,
}

#[derive(Debug, Clone, Default)]
struct Client {
    first_asked: Option<Instant>,
    discovers: u32,
    offered: Option<Ipv4Addr>,
    requests: u32,
    refused: Option<String>,
    declined: bool,
    leased_after: Option<Duration>,
}

/// The two sides of an empty book.
pub(crate) fn open(plan: &DhcpPlan) -> (Book, Leases) {
    let (sender, board) = watch::channel(Board::default());
    let place = format!("switch {} port {}", plan.switch, plan.port);
    (Book { board: sender }, Leases { network: plan.network.clone(), place, board })
}

impl Book {
    /// Enters what was said.
    pub(super) fn enter(&self, said: &Exchange) {
        self.board.send_modify(|board| {
            if said.node.is_some() {
                board.clients.entry(said.mac).or_default().enter(said);
            } else if board.strangers.len() < STRANGERS_MAX || board.strangers.contains_key(&said.mac) {
                let (name, times) = board.strangers.entry(said.mac).or_default();
                *times = times.saturating_add(1);
                if said.host_name.is_some() {
                    name.clone_from(&said.host_name);
                }
            }
        });
    }
}

impl Client {
    fn enter(&mut self, said: &Exchange) {
        let began = *self.first_asked.get_or_insert_with(Instant::now);
        match said.asked {
            Asked::Discover => self.discovers = self.discovers.saturating_add(1),
            Asked::Select(_) | Asked::Reboot(_) | Asked::Renew(_) | Asked::Rebind(_) => {
                self.requests = self.requests.saturating_add(1);
            }
            Asked::Decline(_) => (self.declined, self.leased_after) = (true, None),
            Asked::Release(_) => self.leased_after = None,
            Asked::Inform => {}
        }
        match said.answer {
            Answer::Offer(address) => self.offered = Some(address),
            Answer::Ack { .. } => {
                self.leased_after.get_or_insert_with(|| began.elapsed());
            }
            Answer::Nak(why) => self.refused = Some(format!("its {} was refused: {why}", said.asked)),
            Answer::Silence(why) if matches!(said.asked, Asked::Select(_)) => {
                self.refused = Some(format!("its {} was not answered: {why}", said.asked));
            }
            Answer::Silence(_) => {}
        }
    }
}

impl Leases {
    /// The network.
    #[must_use]
    pub fn network(&self) -> &str {
        &self.network
    }

    /// Completes when the client of this MAC has its lease; tells how long after its first message it was granted. Never where the server is gone, which rings the alarm.
    pub async fn leased(&self, mac: Mac) -> Duration {
        let mut board = self.board.clone();
        let leased = |board: &Board| board.clients.get(&mac).and_then(|client| client.leased_after);
        let seen = board.wait_for(|board| leased(board).is_some()).await.ok().and_then(|board| leased(&board));
        match seen {
            Some(after) => after,
            None => pending().await,
        }
    }

    /// Why the client of this MAC has no lease, as far as it was seen.
    #[must_use]
    pub fn why_not(&self, mac: Mac) -> String {
        let board = self.board.borrow();
        let Some(client) = board.clients.get(&mac) else {
            return format!("its DISCOVER was never seen on {}", self.place);
        };
        if client.declined {
            return "it declined its address: somebody else has it".to_owned();
        }
        if let Some(refused) = &client.refused {
            return refused.clone();
        }
        match client.offered {
            Some(address) if client.requests == 0 => {
                format!("{address} was offered to its {} DISCOVERs and never requested", client.discovers)
            }
            _ => format!("it sent {} DISCOVERs and {} REQUESTs", client.discovers, client.requests),
        }
    }

    /// Who has asked and has no reservation, in words.
    #[must_use]
    pub fn strangers(&self) -> Vec<String> {
        let named = |(mac, (name, times)): (&Mac, &(Option<String>, u32))| {
            let name = name.as_ref().map(|name| format!(", which calls itself {name},")).unwrap_or_default();
            format!("{mac}{name} has no reservation on network {} and asked {times} times", self.network)
        };
        self.board.borrow().strangers.iter().map(named).collect()
    }
}
