//! Time stamps, as they are printed.
//!
//! Formats: RFC 3339 and its short-iso cousins, syslog (`Nov 21 02:44:00`, localised month names), `2026-11-21 02:44:00`,
//! `2026/11/21 02:44:00`, klog (`1121 02:44:00.872970`), seconds since boot (`59.380000`), `dmesg -T`. Where a line gives no
//! year the caller's guess is used, where it gives no zone UTC is.

use jiff::Timestamp;

/// A time stamp at the start of a text, and what follows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp<'a> {
    /// The time; `None` where it is recognised as one but means nothing (an unknown month's name).
    pub at: Option<Timestamp>,
    /// Whether the year was printed.
    pub has_year: bool,
    /// The rest of the text.
    pub rest: &'a [u8],
}

/// Year of lines that do not print one, until a line of the same log does.
pub const YEAR_UNKNOWN: i16 = 2000;

/// Reads `count` digits.
fn digits(text: &[u8], count: usize) -> Option<(i64, &[u8])> {
    let head = text.get(..count)?;
    let mut value = 0i64;
    for byte in head {
        if !byte.is_ascii_digit() {
            return None;
        }
        value = value * 10 + i64::from(byte - b'0');
    }
    Some((value, &text[count..]))
}

/// Reads one or two digits.
fn one_or_two_digits(text: &[u8]) -> Option<(i64, &[u8])> {
    digits(text, 2).or_else(|| digits(text, 1))
}

fn literal(text: &[u8], byte: u8) -> Option<&[u8]> {
    (text.first() == Some(&byte)).then(|| &text[1..])
}

/// Reads `.123456` or `,123` as nanoseconds; no fraction is zero.
fn fraction(text: &[u8]) -> (i64, &[u8]) {
    if !matches!(text.first(), Some(b'.' | b',')) || !text.get(1).is_some_and(u8::is_ascii_digit) {
        return (0, text);
    }
    let mut nanos = 0i64;
    let mut scale = 100_000_000i64;
    let mut rest = &text[1..];
    while let Some((byte, tail)) = rest.split_first().filter(|(b, _)| b.is_ascii_digit()) {
        nanos += i64::from(byte - b'0') * scale;
        scale /= 10;
        rest = tail;
    }
    (nanos, rest)
}

/// `HH:MM:SS` with an optional fraction, in nanoseconds since midnight.
fn clock(text: &[u8]) -> Option<(i64, &[u8])> {
    let (hour, rest) = digits(text, 2)?;
    let (minute, rest) = digits(literal(rest, b':')?, 2)?;
    let (second, rest) = digits(literal(rest, b':')?, 2)?;
    if hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    let (nanos, rest) = fraction(rest);
    Some(((hour * 3600 + minute * 60 + second) * 1_000_000_000 + nanos, rest))
}

/// Zone after a clock: `Z`, `+00:00`, `-0300`; seconds east of UTC.
fn zone(text: &[u8]) -> (i64, &[u8]) {
    match text.first() {
        Some(b'Z') => (0, &text[1..]),
        Some(&sign @ (b'+' | b'-')) => {
            let parsed = digits(&text[1..], 2).and_then(|(hours, rest)| {
                let rest = literal(rest, b':').unwrap_or(rest);
                digits(rest, 2).map(|(minutes, rest)| (hours * 3600 + minutes * 60, rest))
            });
            parsed.map_or((0, text), |(seconds, rest)| (if sign == b'-' { -seconds } else { seconds }, rest))
        }
        _ => (0, text),
    }
}

/// Days from 1970-01-01 in the proleptic Gregorian calendar.
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let month_from_march = (month + 9) % 12;
    let day_of_year = (153 * month_from_march + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

fn timestamp(year: i64, month: i64, day: i64, nanos_of_day: i64, zone_s: i64) -> Option<Timestamp> {
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) || !(1..=9000).contains(&year) {
        return None;
    }
    let seconds = days_from_civil(year, month, day) * 86_400 + nanos_of_day / 1_000_000_000 - zone_s;
    let nanos = i32::try_from(nanos_of_day % 1_000_000_000).ok()?;
    Timestamp::new(seconds, nanos).ok()
}

/// `2026-11-21T02:44:00.1Z`, `2026-11-21 02:44:00.1 +0000`, `2026/11/21 02:44:00`.
#[must_use]
pub fn full(text: &[u8]) -> Option<Stamp<'_>> {
    let (year, rest) = digits(text, 4)?;
    let separator = *rest.first().filter(|b| matches!(b, b'-' | b'/'))?;
    let (month, rest) = digits(&rest[1..], 2)?;
    let (day, rest) = digits(literal(rest, separator)?, 2)?;
    let rest = match rest.first() {
        Some(b'T' | b' ') => &rest[1..],
        _ => return None,
    };
    let (nanos, rest) = clock(rest)?;
    let (zone_s, rest) = zone(rest);
    Some(Stamp { at: timestamp(year, month, day, nanos, zone_s), has_year: true, rest })
}

/// English month names and their beginnings in languages journald is often set to; others are peeled without a time.
const MONTHS: [&[&str]; 12] = [
    &["jan", "ene", "janv", "gen", "janu"],
    &["feb", "fev", "f\u{e9}vr", "fevr"],
    &["mar", "m\u{e4}r", "mars", "mrt"],
    &["apr", "abr", "avr", "avril"],
    &["may", "mai", "maj", "mei", "mag"],
    &["jun", "juin", "giu"],
    &["jul", "juil", "lug"],
    &["aug", "ago", "ao\u{fb}t", "aout"],
    &["sep", "set", "sept"],
    &["oct", "okt", "out", "ott"],
    &["nov"],
    &["dec", "dez", "dic", "d\u{e9}c"],
];

/// Month of a token such as `Nov`, `nov.`, `6月`, `11`.
fn month(token: &[u8]) -> Option<i64> {
    let digits_end = token.iter().position(|b| !b.is_ascii_digit()).unwrap_or(token.len());
    if digits_end > 0 {
        let (value, rest) = if digits_end == 1 { digits(token, 1)? } else { digits(token, 2)? };
        // 月 and 월, or a bare number.
        let suffix = std::str::from_utf8(rest).ok()?;
        return (suffix.is_empty() || suffix == "月" || suffix == "월")
            .then_some(value)
            .filter(|m| (1..=12).contains(m));
    }
    let name = std::str::from_utf8(token).ok()?.trim_end_matches('.').to_lowercase();
    let position = MONTHS.iter().position(|names| names.iter().any(|n| *n == name))?;
    i64::try_from(position + 1).ok()
}

/// Syslog's `Nov 21 02:44:00[.123456] `, also `6月 08 02:44:00 ` and `21 nov 02:44:00 `.
#[must_use]
pub fn syslog(text: &[u8], year: i16) -> Option<Stamp<'_>> {
    let space = text.iter().take(14).position(|&b| b == b' ')?;
    let first = &text[..space];
    let mut rest = &text[space + 1..];
    while let Some(tail) = literal(rest, b' ') {
        rest = tail;
    }
    let (month, day, rest) = if let Some((day, tail)) = one_or_two_digits(rest) {
        // A day may carry a dot or a suffix (`21.`, `8日`).
        let tail = literal(tail, b'.').or_else(|| tail.strip_prefix("日".as_bytes())).unwrap_or(tail);
        (month(first), day, tail)
    } else {
        let (day, end) = one_or_two_digits(first)?;
        if !(end.is_empty() || end == b".") {
            return None;
        }
        let space = rest.iter().take(14).position(|&b| b == b' ')?;
        (Some(month(&rest[..space])?), day, &rest[space..])
    };
    let (nanos, rest) = clock(literal(rest, b' ')?)?;
    let rest = literal(rest, b' ').or_else(|| rest.is_empty().then_some(rest))?;
    // An unknown month's name still makes a time stamp when it is letters, not a word of a sentence with digits in it.
    if month.is_none() && !first.iter().all(|b| b.is_ascii_alphabetic() || *b >= 0x80 || *b == b'.') {
        return None;
    }
    let at = month.and_then(|month| timestamp(i64::from(year), month, day, nanos, 0));
    Some(Stamp { at, has_year: false, rest })
}

/// klog's `1121 02:44:00.872970`, after its level letter.
#[must_use]
pub fn klog(text: &[u8], year: i16) -> Option<Stamp<'_>> {
    let (month, rest) = digits(text, 2)?;
    let (day, rest) = digits(rest, 2)?;
    let (nanos, rest) = clock(literal(rest, b' ')?)?;
    Some(Stamp { at: timestamp(i64::from(year), month, day, nanos, 0), has_year: false, rest })
}

/// The inside of the kernel's `[   59.380000]`: seconds since boot as a time after 1970-01-01.
#[must_use]
pub fn since_boot(text: &[u8]) -> Option<Timestamp> {
    let text = text.trim_ascii();
    let dot = text.iter().position(|&b| b == b'.')?;
    if dot == 0 || dot > 9 || text.len() - dot > 10 {
        return None;
    }
    let (seconds, _) = digits(&text[..dot], dot)?;
    let (nanos, rest) = fraction(&text[dot..]);
    if !rest.is_empty() {
        return None;
    }
    Timestamp::new(seconds, i32::try_from(nanos).ok()?).ok()
}

/// `Fri Aug  2 20:05:01 2019`, as `dmesg -T` prints it.
#[must_use]
pub fn ctime(text: &[u8]) -> Option<Stamp<'_>> {
    let rest = text.get(4..).filter(|_| text[3] == b' ')?;
    let stamp = syslog(rest, YEAR_UNKNOWN)?;
    let (year, after) = digits(stamp.rest, 4)?;
    syslog(rest, i16::try_from(year).ok()?).map(|s| Stamp { at: s.at, has_year: true, rest: after })
}

/// `1795228957.123456 `, seconds since 1970 as `journalctl -o short-unix` prints them.
#[must_use]
pub fn unix(text: &[u8]) -> Option<Stamp<'_>> {
    let (seconds, rest) = digits(text, 10)?;
    let (micros, rest) = digits(literal(rest, b'.')?, 6)?;
    let rest = literal(rest, b' ')?;
    let at = Timestamp::from_microsecond(seconds * 1_000_000 + micros).ok();
    Some(Stamp { at, has_year: true, rest })
}

/// Microseconds since 1970, as journald prints `__REALTIME_TIMESTAMP`.
#[must_use]
pub fn realtime_us(text: &str) -> Option<Timestamp> {
    Timestamp::from_microsecond(text.trim().parse().ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn show(stamp: Option<Stamp<'_>>) -> String {
        stamp.map_or("none".to_owned(), |s| {
            format!("{} | {}", s.at.map_or("?".to_owned(), |t| t.to_string()), String::from_utf8_lossy(s.rest))
        })
    }

    #[test]
    fn every_format_gives_the_same_moment() {
        assert_eq!(show(full(b"2026-11-21T02:44:00.5Z x")), "2026-11-21T02:44:00.5Z |  x");
        assert_eq!(show(full(b"2026-11-21T03:44:00.5+01:00 x")), "2026-11-21T02:44:00.5Z |  x");
        assert_eq!(show(full(b"2026-11-20T23:44:00-0300")), "2026-11-21T02:44:00Z | ");
        assert_eq!(show(full(b"2026/11/21 02:44:00 INFO")), "2026-11-21T02:44:00Z |  INFO");
        assert_eq!(show(syslog(b"Nov 21 02:44:00 host x", 2026)), "2026-11-21T02:44:00Z | host x");
        assert_eq!(show(syslog("6月 08 02:44:00 host".as_bytes(), 2026)), "2026-06-08T02:44:00Z | host");
        assert_eq!(show(syslog(b"21 nov 02:44:00 host", 2026)), "2026-11-21T02:44:00Z | host");
        assert_eq!(show(syslog("нояб. 21 02:44:00 host".as_bytes(), 2026)), "? | host");
        assert_eq!(
            show(klog(b"1121 02:44:00.872970       1 server.go", 2026)),
            "2026-11-21T02:44:00.87297Z |        1 server.go"
        );
        assert_eq!(since_boot(b"   59.380000").map(|t| t.to_string()), Some("1970-01-01T00:00:59.38Z".to_owned()));
        assert_eq!(show(unix(b"1795229040.500000 host x")), "2026-11-21T02:44:00.5Z | host x");
        assert_eq!(show(ctime(b"Fri Aug  2 20:05:01 2019] INFO")), "2019-08-02T20:05:01Z | ] INFO");
    }

    #[test]
    fn what_is_no_time_stays_text() {
        assert_eq!(full(b"2026-11-21"), None);
        assert_eq!(syslog(b"Node 1 is not ready", 2026), None);
        assert_eq!(since_boot(b"<0>"), None);
        assert_eq!(klog(b"E", 2026), None);
        assert_eq!(unix(b"1795229040.5 host"), None);
        assert_eq!(unix(b"17952290401.500000 host"), None);
    }
}
