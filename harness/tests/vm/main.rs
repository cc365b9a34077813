//! The product in real VMs: real QEMU, real switches, real SSH, real etcd. Under TCG where KVM is not usable.
//!
//! Needs what `ci/setup` installs and the stand-in that `ci/build` makes. The image is built once, into a cache below the
//! target folder, and shared by all tests; each test has a state folder of its own.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod lab;

mod bad_guest;
mod bad_host;
mod ended;

mod formation;
mod keep;
mod ownership;
mod soak;
mod verdicts;
