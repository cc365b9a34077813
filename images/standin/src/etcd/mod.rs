//! The datastore: real etcd as a child process, spoken to through its JSON gateway.

pub(crate) mod client;
pub(crate) mod join;
pub(crate) mod process;
pub(crate) mod watch;
