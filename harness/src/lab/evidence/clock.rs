//! Guests' clocks: measured against the host's, recorded, and used to put every line on the host's clock.
//!
//! A line of a journal is placed by its time since the guest's boot, which nobody can set: a guest whose clock is wrong, or
//! is set in the middle of a run, still has its lines where they belong.

use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep_until};
use verdict::{Evidence, Source};

use super::Shared;
use crate::event::EventKind;
use crate::guest::{ClockReading, Guest};

/// A guest's clock that is off by this much is worth a warning. Less is normal: a guest takes the time from an RTC that
/// counts whole seconds, and where its vCPUs are emulated or starved, the second it reads is over before it is set.
const OFF_MS: u64 = 3_000;
/// A change of the guest's clock against its own time since boot that counts as somebody having set it.
const STEP_US: u64 = 500_000;
/// Most measurements of one guest in a run, but for the last one, and the shortest time between two.
const READINGS_MAX: u32 = 64;
pub(super) const PAUSE: Duration = Duration::from_secs(5);

/// `nodes/NAME/clock.json`: a guest's clock against the host's, as last measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestClock {
    /// Version of this document's form.
    pub schema_version: u32,
    /// When it was measured, on the host's clock.
    pub measured_at: Timestamp,
    /// The guest's clock minus the host's, microseconds.
    pub offset_us: i64,
    /// The offset is wrong by at most this much, microseconds.
    pub uncertainty_us: u64,
    /// When the guest's time since boot was zero, on the host's clock. The journal and the kernel's lines of this node are
    /// placed by it.
    pub booted_at: Timestamp,
}

impl GuestClock {
    fn of(reading: &ClockReading) -> Self {
        let micros = |duration: Duration| u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        Self {
            schema_version: 1,
            measured_at: reading.at,
            offset_us: reading.realtime.as_microsecond() - reading.at.as_microsecond(),
            uncertainty_us: micros(reading.uncertainty),
            booted_at: reading.at - reading.uptime,
        }
    }

    /// A later measurement. The boot stays where the surer one has it, unless the two contradict each other: a VM that was
    /// stopped for a while has its boot moved.
    fn then(self, later: Self) -> Self {
        let moved = later.booted_at.duration_since(self.booted_at).unsigned_abs();
        let same = moved <= Duration::from_micros(self.uncertainty_us.saturating_add(later.uncertainty_us));
        let booted_at =
            if same && self.uncertainty_us <= later.uncertainty_us { self.booted_at } else { later.booted_at };
        Self { booted_at, ..later }
    }

    /// What to say of a clock that is off: `clock: server-2: the guest's clock is 3600.0 s behind the host's …`.
    #[must_use]
    pub fn off(&self, node: &str) -> Option<String> {
        if self.offset_us.unsigned_abs() < self.limit_us() {
            return None;
        }
        let way = if self.offset_us < 0 { "behind" } else { "ahead of" };
        let seconds = Duration::from_micros(self.offset_us.unsigned_abs()).as_secs_f64();
        Some(format!(
            "clock: {node}: the guest's clock is {seconds:.1} s {way} the host's (to within {} ms); certificates may look \
             expired or not yet valid there",
            self.uncertainty_us.div_ceil(1000)
        ))
    }

    fn limit_us(&self) -> u64 {
        (OFF_MS * 1000).max(self.uncertainty_us.saturating_mul(2))
    }

    /// A time since the guest's boot, on the host's clock.
    fn place(&self, monotonic_us: u64) -> Option<Timestamp> {
        let since_boot = SignedDuration::from_micros(i64::try_from(monotonic_us).ok()?);
        self.booted_at.checked_add(since_boot).ok()
    }
}

/// The clock of one guest over a run.
pub(super) struct ClockBook {
    guest: Guest,
    shared: Arc<Shared>,
    clock: Option<GuestClock>,
    readings: u32,
    /// When the next measurement may be made, and whether one was asked for before that.
    next: Instant,
    owed: bool,
    /// The guest's clock less its time since boot, by the last entry seen.
    difference_us: Option<i64>,
    warned_us: i64,
}

impl ClockBook {
    pub(super) fn new(guest: Guest, shared: Arc<Shared>) -> Self {
        Self {
            guest,
            shared,
            clock: None,
            readings: 0,
            next: Instant::now(),
            owed: false,
            difference_us: None,
            warned_us: 0,
        }
    }

    /// Measures again: now, or where the last time was just before this, once [`ClockBook::due`] says so.
    pub(super) async fn measure_again(&mut self) {
        if self.readings >= READINGS_MAX {
            return;
        }
        self.owed = Instant::now() < self.next;
        if !self.owed {
            self.measure().await;
        }
    }

    /// Completes when a measurement that was put off can be made; never while none is owed. Cancel-safe.
    pub(super) async fn due(&self) {
        if !self.owed {
            return std::future::pending().await;
        }
        sleep_until(self.next).await;
    }

    /// Measures at once, records, and says so where the clock is off. A guest that does not answer keeps what was known.
    pub(super) async fn measure(&mut self) {
        self.readings += 1;
        (self.next, self.owed) = (Instant::now() + PAUSE, false);
        let node = self.guest.node().to_owned();
        let clock = match self.guest.clock().await {
            Ok(reading) => GuestClock::of(&reading),
            Err(error) if self.clock.is_none() => {
                let message = format!("the clock of {node} is not known, its journal is shown on its own: {error}");
                return self.shared.sink.warn(message);
            }
            Err(error) => return tracing::debug!(node, %error, "the guest's clock was not measured again"),
        };
        let clock = self.clock.map_or(clock, |known| known.then(clock));
        self.clock = Some(clock);
        if let Err(error) = self.shared.record.write_json(&format!("nodes/{node}/clock.json"), &clock) {
            self.shared.sink.warn(format!("the clock of {node} is not recorded: {error}"));
        }
        let GuestClock { offset_us, uncertainty_us, booted_at, .. } = clock;
        self.shared.sink.emit(EventKind::ClockMeasured { node: node.clone(), offset_us, uncertainty_us, booted_at });
        self.warn_if_off(&node, &clock);
    }

    fn warn_if_off(&mut self, node: &str, clock: &GuestClock) {
        let changed = (clock.offset_us - self.warned_us).unsigned_abs() >= clock.limit_us();
        let Some(text) = clock.off(node).filter(|_| changed) else { return };
        self.warned_us = clock.offset_us;
        self.shared.observe(&Evidence::new(Some(node), Source::harness(), Some(clock.measured_at), text.as_str()));
        self.shared.sink.warn(format!("{text}; its lines are shown on the host's clock"));
    }

    /// When an entry was written, on the host's clock, and whether somebody has set the guest's clock just before it.
    pub(super) fn place(&mut self, realtime_us: u64, monotonic_us: u64) -> (Option<Timestamp>, bool) {
        let own = i64::try_from(realtime_us).ok();
        let difference = own.zip(i64::try_from(monotonic_us).ok()).map(|(own, since_boot)| own - since_boot);
        let before = std::mem::replace(&mut self.difference_us, difference);
        let set = before.zip(difference).is_some_and(|(before, now)| now.abs_diff(before) > STEP_US);
        let placed = self.clock.and_then(|clock| clock.place(monotonic_us));
        (placed.or_else(|| own.and_then(|us| Timestamp::from_microsecond(us).ok())), set)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clock(booted_at: i64, offset_us: i64, uncertainty_us: u64) -> GuestClock {
        let at = |us| Timestamp::from_microsecond(us).unwrap();
        GuestClock { schema_version: 1, measured_at: at(99), offset_us, uncertainty_us, booted_at: at(booted_at) }
    }

    #[test]
    fn a_line_is_placed_by_its_time_since_boot() {
        let reading = ClockReading {
            at: Timestamp::from_second(1_000_000).unwrap(),
            realtime: Timestamp::from_second(1_000_000 - 3600).unwrap(),
            uptime: Duration::from_secs(10),
            uncertainty: Duration::from_millis(4),
        };
        let clock = GuestClock::of(&reading);
        assert_eq!(clock.offset_us, -3_600_000_000);
        assert_eq!(clock.place(12_000_000).unwrap().as_second(), 1_000_002);
        let off = clock.off("server-2").unwrap();
        assert!(
            off.starts_with("clock: server-2: the guest's clock is 3600.0 s behind the host's (to within 4 ms)"),
            "{off}"
        );
        assert_eq!(
            GuestClock { offset_us: -1_900_000, ..clock }.off("server-2"),
            None,
            "as any guest that was slow to boot"
        );
        assert_eq!(GuestClock { uncertainty_us: 4_000_000_000, ..clock }.off("server-2"), None, "nobody can tell");
    }

    #[test]
    fn the_surer_boot_stays_until_it_is_contradicted() {
        let first = clock(1_000, 0, 50);
        assert_eq!(first.then(clock(1_060, 7, 80)), clock(1_000, 7, 80));
        assert_eq!(first.then(clock(1_060, 7, 20)), clock(1_060, 7, 20));
        assert_eq!(first.then(clock(9_000, 7, 80)), clock(9_000, 7, 80), "the VM was stopped in between");
    }
}
