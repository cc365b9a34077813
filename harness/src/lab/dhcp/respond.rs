//! What a DHCP server with nothing but reservations says to a frame (RFC 2131, section 4.3). Pure: no clock, no socket, no memory of what was said before.
//!
//! A client whose MAC has a reservation is offered and granted that address, always the same; everybody else gets no answer. Relays, address pools and options beyond mask and times are
//! out of scope.

use std::collections::BTreeMap;
use std::fmt;
use std::net::Ipv4Addr;

use kvm::Mac;

use super::wire::{self, Incoming, Kind, Message, Own, Reply};
use crate::plan::{DhcpPlan, ReservationPlan};

/// The server's rules: who it is, and who gets what.
#[derive(Debug, Clone)]
pub(super) struct Responder {
    own: Own,
    lease_s: u32,
    reservations: BTreeMap<Mac, ReservationPlan>,
}

/// What became of a frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Outcome {
    /// The frame to send.
    pub(super) reply: Option<Vec<u8>>,
    /// What to record of it; nothing of what is no DHCP.
    pub(super) said: Option<Said>,
}

/// A client's message and the answer to it, or what arrived in its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Said {
    /// A message of a client.
    Exchange(Exchange),
    /// Something for the server that it cannot read.
    Malformed(&'static str),
}

/// A client's message and the answer to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Exchange {
    /// Who asked.
    pub(super) mac: Mac,
    /// The node whose MAC that is; none has no reservation.
    pub(super) node: Option<String>,
    /// What the client calls itself.
    pub(super) host_name: Option<String>,
    /// What it said.
    pub(super) asked: Asked,
    /// What it was told.
    pub(super) answer: Answer,
}

/// What a client says, by the state it is in (RFC 2131, section 4.3.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Asked {
    Discover,
    /// It takes up an offer.
    Select(Option<Ipv4Addr>),
    /// It wants the address back that it had before it was restarted.
    Reboot(Ipv4Addr),
    /// It wants its lease prolonged by the server that gave it.
    Renew(Ipv4Addr),
    /// It wants its lease prolonged by anybody.
    Rebind(Ipv4Addr),
    /// It found its address in use.
    Decline(Option<Ipv4Addr>),
    Release(Ipv4Addr),
    Inform,
}

/// What a client is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    Offer(Ipv4Addr),
    Ack { address: Ipv4Addr, lease_s: u32 },
    Nak(&'static str),
    Silence(&'static str),
}

impl Responder {
    pub(super) fn new(plan: &DhcpPlan) -> Self {
        Self {
            own: Own { mac: plan.mac, address: plan.address, prefix: plan.prefix },
            lease_s: plan.lease_s,
            reservations: plan.reservations.iter().map(|held| (held.mac, held.clone())).collect(),
        }
    }

    /// What to say to a frame.
    pub(super) fn respond(&self, frame: &[u8]) -> Outcome {
        match wire::read(frame, self.own) {
            Incoming::NotOurs => Outcome { reply: None, said: None },
            Incoming::Malformed(why) => Outcome { reply: None, said: Some(Said::Malformed(why)) },
            Incoming::WhoHas { mac, address } => {
                Outcome { reply: Some(wire::is_at(self.own, mac, address)), said: None }
            }
            Incoming::Message(message) => self.answer(&message),
        }
    }

    fn answer(&self, message: &Message) -> Outcome {
        let held = self.reservations.get(&message.mac);
        let asked = asked(message);
        let answer = self.decide(message, asked, held);
        let rapid = asked == Asked::Discover;
        let reply = match answer {
            Answer::Offer(address) => Some(Reply::Offer { address, lease_s: self.lease_s }),
            Answer::Ack { address, lease_s } => Some(Reply::Ack { address, lease_s, rapid }),
            Answer::Nak(why) => Some(Reply::Nak { why }),
            Answer::Silence(_) => None,
        };
        let exchange = Exchange {
            mac: message.mac,
            node: held.map(|held| held.node.clone()),
            host_name: message.host_name.clone(),
            asked,
            answer,
        };
        Outcome {
            reply: reply.map(|reply| wire::reply(message, self.own, reply)),
            said: Some(Said::Exchange(exchange)),
        }
    }

    fn decide(&self, message: &Message, asked: Asked, held: Option<&ReservationPlan>) -> Answer {
        if !message.relay.is_unspecified() {
            return Answer::Silence("it came through a relay");
        }
        let Some(held) = held else { return Answer::Silence("its MAC has no reservation") };
        let ack = Answer::Ack { address: held.address, lease_s: self.lease_s };
        let of_another = message.server.is_some_and(|server| server != self.own.address);
        match asked {
            Asked::Discover if message.rapid_commit => ack,
            Asked::Discover => Answer::Offer(held.address),
            Asked::Select(_) | Asked::Decline(_) | Asked::Release(_) if of_another => {
                Answer::Silence("it is meant for another DHCP server")
            }
            Asked::Select(Some(address)) | Asked::Reboot(address) | Asked::Renew(address) | Asked::Rebind(address)
                if address == held.address =>
            {
                ack
            }
            Asked::Select(_) | Asked::Reboot(_) | Asked::Renew(_) | Asked::Rebind(_) => {
                Answer::Nak("another address is reserved for it")
            }
            Asked::Decline(_) => Answer::Silence("it says that somebody else has the address"),
            Asked::Release(_) => Answer::Silence("a reservation stays"),
            Asked::Inform => Answer::Silence("there is nothing to inform of"),
        }
    }
}

/// RFC 2131, section 4.3.2: the state of a client that sends a REQUEST shows in the fields it fills in.
fn asked(message: &Message) -> Asked {
    let current = message.client_address;
    match message.kind {
        Kind::Discover => Asked::Discover,
        Kind::Request if message.server.is_some() => Asked::Select(message.requested),
        Kind::Request => match message.requested {
            Some(requested) if current.is_unspecified() => Asked::Reboot(requested),
            _ if message.to_all => Asked::Rebind(current),
            _ => Asked::Renew(current),
        },
        Kind::Decline => Asked::Decline(message.requested),
        Kind::Release => Asked::Release(current),
        Kind::Inform => Asked::Inform,
    }
}

impl Asked {
    /// The message's own name.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Discover => "DISCOVER",
            Self::Select(_) | Self::Reboot(_) | Self::Renew(_) | Self::Rebind(_) => "REQUEST",
            Self::Decline(_) => "DECLINE",
            Self::Release(_) => "RELEASE",
            Self::Inform => "INFORM",
        }
    }
}

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exchange(exchange) => exchange.fmt(f),
            Self::Malformed(why) => write!(f, "ignored {why}"),
        }
    }
}

impl fmt::Display for Exchange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.node, &self.host_name) {
            (Some(node), _) => write!(f, "{node} ({})", self.mac)?,
            (None, Some(name)) => write!(f, "{} (calls itself {name})", self.mac)?,
            (None, None) => self.mac.fmt(f)?,
        }
        write!(f, ": {}: {}", self.asked, self.answer)
    }
}

impl fmt::Display for Asked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())?;
        match self {
            Self::Discover | Self::Inform => Ok(()),
            Self::Select(Some(address)) | Self::Decline(Some(address)) | Self::Release(address) => {
                write!(f, " of {address}")
            }
            Self::Select(None) | Self::Decline(None) => f.write_str(" of no address"),
            Self::Reboot(address) => write!(f, " of {address}, which it had before"),
            Self::Renew(address) => write!(f, " to renew {address}"),
            Self::Rebind(address) => write!(f, " to everybody to renew {address}"),
        }
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Offer(address) => write!(f, "OFFER of {address}"),
            Self::Ack { address, lease_s } => write!(f, "ACK of {address} for {lease_s} s"),
            Self::Nak(why) => write!(f, "NAK, {why}"),
            Self::Silence(why) => write!(f, "not answered, {why}"),
        }
    }
}
