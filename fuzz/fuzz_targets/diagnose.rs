//! Any bytes given to `harness diagnose`: a verdict or an error, never a panic, in bounded memory.
//!
//! See README.md for how it is run; seeded with
//! `harness/verdict/tests/fixtures`. The first byte chooses the name, as names tell nodes and programs.

#![no_main]

use std::sync::LazyLock;

use harness::diagnose::{Limits, diagnose_bytes};
use libfuzzer_sys::fuzz_target;

static CATALOGUE: LazyLock<verdict::Catalogue> =
    LazyLock::new(|| harness::catalogue::shipped().expect("a test holds that the shipped catalogue is whole"));

const NAMES: [&str; 4] = ["server-1/journal.log", "qemu.log", "x", "a/b/console-agent2.txt.gz"];

fuzz_target!(|data: &[u8]| {
    let Some((first, bytes)) = data.split_first() else { return };
    let limits = Limits {
        expanded_bytes_max: 4 << 20,
        spool_bytes_max: 4 << 20,
        ratio_from_bytes: 1 << 20,
        ..Limits::default()
    };
    let _ = diagnose_bytes(NAMES[usize::from(*first) % NAMES.len()], bytes, &CATALOGUE, &limits);
});
