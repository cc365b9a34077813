//! The guest's clock against the host's, by a few round trips over one running command.

use std::time::Duration;

use jiff::Timestamp;
use tokio::time::{Instant, timeout_at};

use super::error::GuestError;
use super::ssh::Guest;
use super::stream::{Lines, Source, Step};

/// Questions asked; the quickest answer counts. The first ones pay for the shell's start.
const EXCHANGES: u32 = 6;
/// Longest time for all of them, before patience.
const LIMIT: Duration = Duration::from_secs(5);
/// `/proc/uptime` counts hundredths of a second and cuts the rest off.
const UPTIME_STEP: Duration = Duration::from_millis(10);

/// Answers every line with the guest's uptime and time of day. A shell without `EPOCHREALTIME` (bash 5 has it) asks date(1).
const COMMAND: &str =
    "while read -r _; do read -r up _ </proc/uptime; echo \"$up ${EPOCHREALTIME:-$(date +%s.%6N)}\"; done";

/// What the guest's clocks showed at a moment of the host's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClockReading {
    /// The moment, on the host's clock: the middle of the exchange.
    pub at: Timestamp,
    /// What the guest took for the time of day.
    pub realtime: Timestamp,
    /// Time since the guest's boot.
    pub uptime: Duration,
    /// The reading is wrong by at most this much: half the round trip, and the uptime's step.
    pub uncertainty: Duration,
}

impl Guest {
    /// Reads the guest's clocks. One shell in the guest, for a few round trips.
    ///
    /// # Errors
    /// [`GuestError::Malformed`] where the guest answers with something else or not in time, and what starting a command
    /// can end with.
    pub async fn clock(&self) -> Result<ClockReading, GuestError> {
        let malformed = |reason: &str| GuestError::Malformed {
            node: self.node().to_owned(),
            what: "the guest's clocks".to_owned(),
            reason: reason.to_owned(),
        };
        let end = Instant::now() + self.target().scaled(LIMIT);
        let session = timeout_at(end, self.start(COMMAND, end)).await.map_err(|_| malformed("no answer in time"))??;
        let writer = std::sync::Arc::clone(&session.writer);
        let mut lines = Lines::new(session);
        let mut best: Option<ClockReading> = None;
        for _ in 0..EXCHANGES {
            let asked = (Timestamp::now(), Instant::now());
            // A guest that takes nothing in any more leaves the channel's window closed.
            if !matches!(timeout_at(end, writer.data(&b"\n"[..])).await, Ok(Ok(()))) {
                break;
            }
            let answer = loop {
                match timeout_at(end, lines.next()).await {
                    Ok(Step::Line { source: Source::Stdout, bytes, .. }) => break Some(bytes),
                    Ok(Step::Line { .. }) => {}
                    Ok(Step::End(_)) | Err(_) => break None,
                }
            };
            let Some(answer) = answer else { break };
            let round_trip = asked.1.elapsed();
            let (uptime, realtime) =
                parse(&String::from_utf8_lossy(&answer)).ok_or_else(|| malformed("not an uptime and a time"))?;
            let reading = ClockReading {
                at: asked.0 + round_trip / 2,
                realtime,
                uptime: uptime + UPTIME_STEP / 2,
                uncertainty: round_trip / 2 + UPTIME_STEP / 2,
            };
            if best.is_none_or(|best| reading.uncertainty < best.uncertainty) {
                best = Some(reading);
            }
        }
        // The end of its input ends the command; its end is waited for, so that nothing has to be killed.
        let _ = timeout_at(end, async {
            let _ = writer.eof().await;
            while !matches!(lines.next().await, Step::End(_)) {}
        })
        .await;
        best.ok_or_else(|| malformed("no answer in time"))
    }
}

/// No guest has been up for longer (thirty years); what one says is not trusted to be a time.
const UPTIME_MAX_S: f64 = 1e9;

/// `12.34 1795228350.123456`; some locales write a comma.
fn parse(answer: &str) -> Option<(Duration, Timestamp)> {
    let (uptime, realtime) = answer.trim().split_once(' ')?;
    let uptime = uptime.parse::<f64>().ok().filter(|seconds| (0.0..UPTIME_MAX_S).contains(seconds))?;
    let uptime = Duration::try_from_secs_f64(uptime).ok()?;
    let (seconds, part) = realtime.split_once(['.', ','])?;
    let part = part.get(..part.len().min(6))?;
    let micros =
        seconds.parse::<i64>().ok()?.checked_mul(1_000_000)?.checked_add(format!("{part:0<6}").parse().ok()?)?;
    Some((uptime, Timestamp::from_microsecond(micros).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::testing::Sshd;

    #[tokio::test]
    async fn the_clock_of_a_guest_that_is_this_host_is_right_within_its_uncertainty() {
        let sshd = Sshd::start();
        let guest = sshd.guest().await;
        let reading = guest.clock().await.unwrap();
        let off = reading.realtime.duration_since(reading.at).unsigned_abs();
        assert!(off <= reading.uncertainty, "{reading:?} is off by {off:?}");
        assert!(reading.uncertainty < Duration::from_secs(2), "{reading:?}");
        let uptime: f64 = std::fs::read_to_string("/proc/uptime").unwrap().split(' ').next().unwrap().parse().unwrap();
        assert!((uptime - reading.uptime.as_secs_f64()).abs() < 5.0, "{uptime} {reading:?}");
        // Nothing is left running in the guest.
        guest.idle().await;
        assert_eq!(guest.connections(), 1);
    }

    #[test]
    fn answers_are_read_in_either_spelling() {
        let (uptime, at) = parse("12.34 1795228350.123456\n").unwrap();
        assert_eq!((uptime, at.as_microsecond()), (Duration::from_millis(12_340), 1_795_228_350_123_456));
        assert_eq!(parse("1.00 1795228350,5").unwrap().1.as_microsecond(), 1_795_228_350_500_000);
        assert_eq!(parse("1.00 1795228350.1234567").unwrap().1.as_microsecond(), 1_795_228_350_123_456);
        for bad in
            ["", "x", "1.0", "1.0 y", "1.0 12", "nan 1.0", "1e15 1.0", "-1 1.0", "1.0 1.\u{e4}\u{e4}\u{e4}\u{e4}"]
        {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }
}
