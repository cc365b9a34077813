//! The way into a guest: SSH with a pinned host key, one connection per node and many channels on it.
//!
//! | file | concern |
//! |---|---|
//! | `keys` | ed25519 key pairs for hosts and for the harness |
//! | `ssh` | [`Guest`]: the connection, its repair, channels |
//! | `session` | one connection, and a session that leaves nothing running |
//! | `connect` | from a closed port to an authenticated connection |
//! | `exec` | one command: output, status, deadline; files over it |
//! | `stream` | a long-running command, line by line |
//! | `pipe` | a command whose streams are the caller's |
//! | `journal` | the journal followed without loss or repetition |
//! | `clock` | the guest's clock against the host's |
//! | `news` | what becomes of the connection, for whoever keeps evidence |
//! | `forward` | a local TCP port that ends in the guest |
//! | `quote` | words made safe for the guest's shell |
//!
//! Architecture invariant: nothing here knows about machines, images, plans or k3s. It takes an address
//! and keys, and answers with bytes.

mod clock;
mod connect;
mod error;
mod exec;
mod forward;
mod journal;
mod keys;
mod news;
mod pipe;
mod quote;
mod session;
mod ssh;
mod stream;

#[cfg(test)]
mod pipe_tests;
#[cfg(test)]
mod search_tests;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

pub use clock::ClockReading;
pub use connect::Sightings;
pub use error::GuestError;
pub use exec::ExecOutput;
pub use forward::Forward;
pub use journal::{Journal, JournalEntry, message_id};
pub use keys::{KeyPair, fingerprint, generate_ed25519, parse_private, parse_public};
pub use news::{AttemptClass, NewsSink, SshNews};
pub use quote::quote;
pub use ssh::{Guest, GuestStream, SshTarget};
pub use stream::{LineStream, Source, StreamEnd, StreamItem};

/// A public SSH key (the type of the `ssh-key` crate, so that callers need not name it).
pub use russh::keys::PublicKey;

/// A private SSH key (the type of the `ssh-key` crate, so that callers need not name it).
pub use russh::keys::PrivateKey;
