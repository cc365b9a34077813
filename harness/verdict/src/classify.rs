//! The classifier: evidence in, a verdict out, and the end of a wait as soon as the evidence is sufficient.

use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use crate::catalogue::{Attribution, Catalogue, Compiled, EndsWait, Kind, Meaning};
use crate::context::Context;
use crate::evidence::{Evidence, SourceKind};
use crate::line::{Line, LineReader};
use crate::redact;
use crate::rules::{self, Firing};
use crate::tally::{Moment, Sample, Tally};
use crate::verdict::{EvidenceLine, Verdict};

/// A line longer than this is searched in pieces around what the fast filter finds in it, bytes.
const LINE_BYTES_MAX: usize = 64 << 10;
/// Piece of such a line, bytes before and after the find.
const PIECE_BYTES: (usize, usize) = (256, 4 << 10);
/// Most pieces of one line.
const PIECES_MAX: usize = 16;
/// Allowances are not stretched farther than this, however slow the guests are.
const SLOWDOWN_MAX: f64 = 16.0;
/// Longest text kept of a line, bytes.
const SAMPLE_BYTES_MAX: usize = 400;

/// Sufficient evidence: the wait can end.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Fatal {
    /// The failure mode, none for a look-alike.
    pub id: Option<String>,
    /// Name of the mode or look-alike.
    pub name: String,
    /// Who is to blame for it.
    pub attribution: Attribution,
    /// The rule that holds.
    pub rule: String,
    /// Why it is sufficient.
    pub because: String,
    /// The node.
    pub node: Option<String>,
    /// The lines it rests on.
    pub evidence: Vec<EvidenceLine>,
}

/// Something fatal that may still recover.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Pending {
    /// The failure mode, none for a look-alike.
    pub id: Option<String>,
    /// Name of the mode or look-alike.
    pub name: String,
    /// The node.
    pub node: Option<String>,
    /// Since when, on the clock of the evidence.
    pub since: Option<Timestamp>,
    /// Time it has to recover, milliseconds, slowdown included.
    pub allowance_ms: u64,
}

/// Where a line was read, for lines that do not come as [`Evidence`].
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Place<'a> {
    pub(crate) node: Option<&'a str>,
    /// Node of lines that name none.
    pub(crate) fallback_node: Option<&'a str>,
    pub(crate) kind: SourceKind,
    pub(crate) origin: &'a str,
    pub(crate) line: Option<u64>,
    pub(crate) at: Option<Timestamp>,
}

/// The classifier. Pure: the same evidence in the same order gives the same verdict. Memory is bounded by the size of the
/// catalogue times [64 nodes](crate::evidence::Evidence::node), whatever the amount of evidence.
#[derive(Debug, Clone)]
pub struct Classifier {
    pub(crate) compiled: Arc<Compiled>,
    pub(crate) tally: Tally,
    pub(crate) firings: Vec<Firing>,
    reader: LineReader,
    seq: u64,
    slowdown: f64,
    /// When the node whose log is read booted.
    booted_at: Option<Timestamp>,
}

impl Classifier {
    /// A classifier that has seen nothing.
    #[must_use]
    pub fn new(catalogue: &Catalogue) -> Self {
        let compiled = Arc::clone(&catalogue.inner);
        let tally = Tally::new(compiled.signs.len());
        Self { compiled, tally, firings: Vec::new(), reader: LineReader::new(), seq: 0, slowdown: 1.0, booted_at: None }
    }

    /// Stretches the allowances for guests that run `slowdown` times slower than hardware KVM. Values outside 1–16 count as
    /// the nearer of the two: longer waits than that tell nothing new.
    #[must_use]
    pub fn with_slowdown(mut self, slowdown: f64) -> Self {
        self.slowdown = if slowdown.is_finite() { slowdown.clamp(1.0, SLOWDOWN_MAX) } else { 1.0 };
        self
    }

    /// Takes a line in. Gives [`Fatal`] the moment the evidence is sufficient, once for each rule and node.
    ///
    /// Lines that cannot matter cost one multi-substring search.
    pub fn observe(&mut self, evidence: &Evidence) -> Option<Fatal> {
        self.seq += 1;
        let text = evidence.text.as_bytes();
        let fatal = if self.compiled.prefilter.is_match(text) {
            let place = Place {
                node: evidence.node.as_deref(),
                kind: evidence.source.kind,
                origin: &evidence.source.origin,
                at: evidence.at,
                ..Place::default()
            };
            self.take(text, &place)
        } else {
            None
        };
        fatal.or_else(|| evidence.at.and_then(|now| self.poll(now)))
    }

    /// Ends the allowances that are used up at `now`, on the clock of the evidence. To be called while nothing is said.
    pub fn poll(&mut self, now: Timestamp) -> Option<Fatal> {
        let mut due = None;
        for (index, firing) in self.firings.iter_mut().enumerate() {
            let rule = &self.compiled.rules[firing.rule];
            let Some(since) = firing.pending_since.as_mut() else { continue };
            if firing.reported || rule.rule.ends_wait != EndsWait::AfterAllowance {
                continue;
            }
            let Some(at) = since.at else {
                since.at = Some(now);
                continue;
            };
            let allowance = allowance(rule.rule.allowance_s, self.slowdown);
            if !since.since_boot && now.duration_since(at) >= allowance {
                firing.reported = true;
                due = Some(index);
                break;
            }
        }
        due.map(|index| self.fatal(index))
    }

    /// What is fatal unless it recovers, for progress lines such as "etcd has no leader, 12 s left to recover".
    #[must_use]
    pub fn pending(&self) -> Vec<Pending> {
        let waiting = |f: &&Firing| {
            f.pending_since.is_some()
                && !f.reported
                && self.compiled.rules[f.rule].rule.ends_wait == EndsWait::AfterAllowance
        };
        let describe = |f: &Firing| {
            let rule = &self.compiled.rules[f.rule];
            let mode = &self.compiled.modes[rule.mode];
            Pending {
                id: (mode.kind == Kind::Failure).then(|| mode.id.clone()),
                name: mode.name.clone(),
                node: self.tally.node_name(f.node).map(str::to_owned),
                since: f.pending_since.and_then(|m| m.at),
                allowance_ms: u64::try_from(allowance(rule.rule.allowance_s, self.slowdown).as_millis()).unwrap_or(0),
            }
        };
        self.firings.iter().filter(waiting).map(describe).collect()
    }

    /// The verdict on everything seen so far. The errors in the context count as evidence of the harness.
    #[must_use]
    pub fn conclude(&self, context: &Context) -> Verdict {
        let mut all = self.clone();
        // A cause is often worded by two errors of the chain: the URL by one, "timed out" by the next.
        let chain = (context.errors.len() > 1).then(|| context.errors.join(": "));
        for error in chain.iter().chain(&context.errors) {
            let node = context.node.as_deref();
            all.seq += 1;
            let place = Place { node, kind: SourceKind::Harness, origin: "harness", ..Place::default() };
            if all.compiled.prefilter.is_match(error.as_bytes()) {
                let _ = all.take(error.as_bytes(), &place);
            }
        }
        crate::verdict::build::verdict(&all, context)
    }

    /// Lines observed so far.
    #[must_use]
    pub fn observed(&self) -> u64 {
        self.seq
    }

    /// When the node whose logs are read next booted, where that is known: lines that only count from its boot are placed by
    /// it. `None` for logs of which it is not known.
    pub fn booted_at(&mut self, booted_at: Option<Timestamp>) {
        self.booted_at = booted_at;
    }

    /// Begins another log: its year is not the last one's.
    pub(crate) fn begin_log(&mut self) {
        self.reader = LineReader::new();
    }

    /// Learns the year of a log from its beginning.
    pub(crate) fn find_year(&mut self, start: &[u8]) {
        self.reader.find_year(start);
    }

    /// Takes a raw line that passed the fast filter.
    pub(crate) fn take(&mut self, raw: &[u8], place: &Place<'_>) -> Option<Fatal> {
        if raw.len() <= LINE_BYTES_MAX {
            let line = self.reader.read(raw);
            return self.take_line(&line, place);
        }
        let compiled = Arc::clone(&self.compiled);
        let mut fatal = None;
        let mut done = 0;
        for found in compiled.prefilter.find_iter(raw).take(PIECES_MAX) {
            if found.start() < done {
                continue;
            }
            done = (found.end() + PIECE_BYTES.1).min(raw.len());
            let piece = &raw[found.start().saturating_sub(PIECE_BYTES.0)..done];
            let line = self.reader.read(piece);
            fatal = fatal.or(self.take_line(&line, place));
        }
        fatal
    }

    /// Takes a line whose wrappers are off.
    pub(crate) fn take_line(&mut self, line: &Line<'_>, place: &Place<'_>) -> Option<Fatal> {
        if line.trace {
            return None;
        }
        self.seq += 1;
        let compiled = Arc::clone(&self.compiled);
        let message: &[u8] = &line.message;
        let kind = if place.kind == SourceKind::Unknown { line.kind } else { place.kind };
        let node = self.tally.node(place.node.or(line.node.as_deref()).or(place.fallback_node));
        let moment = self.moment(place.at, line);
        let mut fatal = None;
        for index in &compiled.set.matches(message) {
            let sign = &compiled.signs[index];
            let from_elsewhere =
                !sign.sign.sources.is_empty() && kind != SourceKind::Unknown && !sign.sign.sources.contains(&kind);
            if from_elsewhere || sign.unless.as_ref().is_some_and(|u| u.is_match(message)) {
                continue;
            }
            let sample = || Sample {
                moment,
                kind,
                origin: place.origin.to_owned(),
                line: place.line,
                text: excerpt(message, sign.pattern.find(message).map_or(0, |m| m.start())),
            };
            let counted = self.tally.note(node, index, moment, sign.sign.counts, sample);
            if !counted {
                continue;
            }
            if sign.sign.meaning == Meaning::Recovery {
                self.recover(index, node);
            }
            for &rule in &compiled.rules_of_sign[index] {
                if let Some(found) = self.evaluate(rule, node) {
                    fatal = fatal.or(Some(found));
                }
            }
        }
        fatal
    }

    fn moment(&self, at: Option<Timestamp>, line: &Line<'_>) -> Moment {
        let from_boot = line.at.filter(|_| line.since_boot).zip(self.booted_at);
        let placed =
            at.or_else(|| from_boot.and_then(|(since, boot)| boot.checked_add(since - Timestamp::UNIX_EPOCH).ok()));
        Moment { seq: self.seq, at: placed.or(line.at), since_boot: placed.is_none() && line.since_boot }
    }

    /// A sign of recovery ends the allowances that wait for it.
    fn recover(&mut self, sign: usize, node: usize) {
        for firing in &mut self.firings {
            if firing.node == node && self.compiled.rules[firing.rule].recovered_by.contains(&sign) {
                firing.pending_since = None;
            }
        }
    }

    fn evaluate(&mut self, rule: usize, node: usize) -> Option<Fatal> {
        let compiled = Arc::clone(&self.compiled);
        let chain = rules::holds(&compiled.rules[rule], &self.tally, node)?;
        let last = chain.iter().map(|c| c.2).max_by_key(|m| m.seq)?;
        let index = match self.firings.iter().position(|f| f.rule == rule && f.node == node) {
            // It held before; what is new takes no part in it.
            Some(_) if last.seq < self.seq => return None,
            Some(index) => index,
            None => {
                let evidence = chain.iter().filter_map(|&(sign, n, moment)| {
                    let seen = self.tally.get(n, sign)?;
                    Some((sign, n, seen.nearest(moment).clone()))
                });
                self.firings.push(Firing {
                    rule,
                    node,
                    cause: chain.first()?.2,
                    last,
                    count: 0,
                    evidence: evidence.collect(),
                    pending_since: None,
                    reported: false,
                });
                self.firings.len() - 1
            }
        };
        let firing = &mut self.firings[index];
        firing.last = last;
        firing.count += 1;
        firing.pending_since.get_or_insert(last);
        if compiled.rules[rule].rule.ends_wait != EndsWait::AtOnce || firing.reported {
            return None;
        }
        firing.reported = true;
        Some(self.fatal(index))
    }

    fn fatal(&self, index: usize) -> Fatal {
        let firing = &self.firings[index];
        let rule = &self.compiled.rules[firing.rule];
        let mode = &self.compiled.modes[rule.mode];
        let evidence =
            firing.evidence.iter().map(|(sign, node, sample)| self.evidence_line(*sign, *node, sample)).collect();
        Fatal {
            id: (mode.kind == Kind::Failure).then(|| mode.id.clone()),
            name: mode.name.clone(),
            attribution: mode.attribution,
            rule: rule.rule.name.clone(),
            because: rule.rule.because.clone(),
            node: self.tally.node_name(firing.node).map(str::to_owned),
            evidence,
        }
    }

    pub(crate) fn evidence_line(&self, sign: usize, node: usize, sample: &Sample) -> EvidenceLine {
        let compiled = &self.compiled.signs[sign];
        EvidenceLine {
            sign: compiled.sign.name.clone(),
            says: compiled.sign.says.clone(),
            node: self.tally.node_name(node).map(str::to_owned),
            source: sample.kind,
            origin: sample.origin.clone(),
            line: sample.line,
            at: sample.moment.at,
            text: sample.text.clone(),
            count: self.tally.get(node, sign).map_or(1, |s| s.count),
        }
    }
}

fn allowance(allowance_s: Option<u64>, slowdown: f64) -> SignedDuration {
    let seconds = allowance_s.and_then(|s| u32::try_from(s).ok()).unwrap_or(0);
    SignedDuration::try_from_secs_f64(f64::from(seconds) * slowdown).unwrap_or(SignedDuration::MAX)
}

/// The part of a line worth keeping, as text, tokens redacted.
fn excerpt(message: &[u8], start: usize) -> String {
    // What stands before the message of a zap or logrus line is known from elsewhere: level, time, caller.
    let from = own_message(message).unwrap_or(0).min(start);
    let text = String::from_utf8_lossy(&message[from..]);
    let clean: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    // Redacted before the cut, so that no half of a token is left.
    let redacted = redact::tokens(clean.trim());
    if redacted.len() <= SAMPLE_BYTES_MAX {
        return redacted;
    }
    let near = if start - from < SAMPLE_BYTES_MAX / 2 { 0 } else { (start - from).saturating_sub(80) };
    let low = (near..=redacted.len()).find(|&n| redacted.is_char_boundary(n)).unwrap_or(redacted.len());
    let high = (low + SAMPLE_BYTES_MAX).min(redacted.len());
    let high = (low..=high).rev().find(|&n| redacted.is_char_boundary(n)).unwrap_or(low);
    redacted[low..high].to_owned()
}

/// Where a zap line's `"msg":` or a logrus line's `level=` begins.
fn own_message(message: &[u8]) -> Option<usize> {
    let (head, needle): (&[u8], &[u8]) = match message.first()? {
        b'{' => (&message[..message.len().min(512)], b"\"msg\":"),
        b't' if message.starts_with(b"time=") => (&message[..message.len().min(80)], b"level="),
        _ => return None,
    };
    head.windows(needle.len()).position(|w| w == needle)
}
