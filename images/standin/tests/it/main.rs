//! The stand-in as a program: real processes, real etcd, loopback addresses of a /24 per test.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;
mod formation;
mod refusals;
