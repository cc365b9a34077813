//! The lab's DHCP server: this process itself on a port of a switch, so that no node depends on another for its address.
//!
//! It holds reservations only: each planned MAC gets its planned address, anybody else is recorded and gets nothing. What to say is decided without I/O in `respond`; here frames are
//! moved and what was said is kept: in the run folder, in the evidence, and for whoever waits for a lease.

mod leases;
mod respond;
#[cfg(test)]
mod tests;
mod wire;

use kvm::{FRAME_MAX_BYTES, Port};

use crate::lab::{Recorder, Stream};
use crate::plan::DhcpPlan;
use leases::Book;
pub use leases::Leases;
#[cfg(test)]
pub(crate) use leases::open as open_leases;
use respond::{Responder, Said};

/// A DHCP server that is about to serve one network.
pub struct DhcpServer {
    network: String,
    port: Port,
    responder: Responder,
    book: Book,
    recorder: Recorder,
}

impl DhcpServer {
    /// A server on `port` that has its exchanges recorded.
    #[must_use]
    pub fn new(plan: &DhcpPlan, port: Port, recorder: Recorder) -> (Self, Leases) {
        let (book, leases) = leases::open(plan);
        let responder = Responder::new(plan);
        (Self { network: plan.network.clone(), port, responder, book, recorder }, leases)
    }

    /// Serves until the port is closed, and says how that was seen.
    pub async fn serve(self) -> kvm::Error {
        let mut frame = vec![0_u8; FRAME_MAX_BYTES];
        loop {
            let length = match self.port.receive(&mut frame).await {
                Ok(length) => length,
                Err(error) => return error,
            };
            let outcome = self.responder.respond(&frame[..length]);
            if let Some(reply) = &outcome.reply
                && let Err(error) = self.port.send(reply).await
            {
                return error;
            }
            if let Some(said) = &outcome.said {
                self.record(said);
            }
            // Told last: whoever waits for a lease finds it recorded.
            if let Some(Said::Exchange(exchange)) = &outcome.said {
                self.book.enter(exchange);
            }
        }
    }

    fn record(&self, said: &Said) {
        // A client that repeats itself is counted; what it says for the first time is not.
        let kind = match said {
            Said::Exchange(exchange) => format!("{} {}", exchange.mac, exchange.asked.name()),
            Said::Malformed(why) => (*why).to_owned(),
        };
        self.recorder.note(&Stream::dhcp(), &kind, &format!("network {}: {said}", self.network));
    }
}
