//! The cluster as its own interfaces show it: the Kubernetes API, the etcd members, a joiner's path to its server.
//!
//! | file | concern |
//! |---|---|
//! | `api` | the Kubernetes API through a forwarded port: nodes, readiness |
//! | `etcd` | etcd's member list and health, through channels of a guest |
//! | `http` | one request over such a channel |
//! | `prewarm` | one probe of the path from a joiner to a server |
//!
//! Architecture invariant: nothing here decides anything. These are facts with a time-out; what they mean
//! for a run is decided by whoever asks.

mod api;
mod etcd;
mod http;
mod prewarm;

#[cfg(test)]
mod api_tests;
#[cfg(test)]
mod guest_tests;
#[cfg(test)]
mod testing;

pub use api::{ClusterApi, ClusterError, ExpectedNode, NodeState, Readyz, WatchNote};
pub use etcd::{EtcdError, EtcdHealth, EtcdMember, EtcdPeer, health};
pub use prewarm::{PrewarmError, PrewarmSample, prewarm};
