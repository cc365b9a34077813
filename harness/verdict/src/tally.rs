//! What was seen, per node and sign, in bounded memory.

use std::collections::{HashMap, VecDeque};

use jiff::Timestamp;

use crate::catalogue::Counts;
use crate::evidence::SourceKind;

/// Most nodes told apart; lines of further ones count as lines of an unknown node.
pub(crate) const NODES_MAX: usize = 64;
/// Sightings remembered per node and sign, besides the first.
const RECENT_MAX: usize = 32;
/// After so many sightings only each n-th line's text is kept, to be cheap on signs that come by the thousand.
const TEXT_EVERY: u64 = 64;

/// The node of lines that name none.
pub(crate) const UNKNOWN_NODE: usize = 0;

/// When a sign was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Moment {
    /// Order of observation.
    pub(crate) seq: u64,
    /// Time, where known.
    pub(crate) at: Option<Timestamp>,
    /// The time counts from a boot.
    pub(crate) since_boot: bool,
}

impl Moment {
    /// Seconds between two moments on one clock, `None` where that cannot be told.
    pub(crate) fn distance_s(self, other: Self) -> Option<u64> {
        if self.since_boot != other.since_boot {
            return None;
        }
        Some((self.at?.as_second() - other.at?.as_second()).unsigned_abs())
    }

    /// No farther apart than `limit_s`; unknown distances count as near.
    pub(crate) fn near(self, other: Self, limit_s: Option<u64>) -> bool {
        match (limit_s, self.distance_s(other)) {
            (Some(limit), Some(distance)) => distance <= limit,
            _ => true,
        }
    }
}

/// A line kept as evidence.
#[derive(Debug, Clone)]
pub(crate) struct Sample {
    pub(crate) moment: Moment,
    pub(crate) kind: SourceKind,
    pub(crate) origin: String,
    pub(crate) line: Option<u64>,
    pub(crate) text: String,
}

/// One sign on one node.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    /// Raw sightings.
    pub(crate) count: u64,
    /// First line that counted.
    pub(crate) first: Sample,
    /// Latest line.
    pub(crate) last: Sample,
    /// Latest sightings, raw, for counts in a window.
    raw: VecDeque<Moment>,
    /// Latest sightings that counted.
    recent: VecDeque<Moment>,
    /// Whether any sighting counted.
    pub(crate) effective: bool,
}

impl Seen {
    /// The kept line nearest to a moment.
    pub(crate) fn nearest(&self, moment: Moment) -> &Sample {
        let distance = |s: &Sample| s.moment.seq.abs_diff(moment.seq);
        if distance(&self.last) <= distance(&self.first) { &self.last } else { &self.first }
    }

    /// Moments that counted, newest first; the very first one is always among them.
    pub(crate) fn moments(&self) -> impl Iterator<Item = Moment> + '_ {
        let oldest = self.recent.front().copied();
        let first = self.effective.then_some(self.first.moment).filter(|f| oldest.is_some_and(|o| f.seq < o.seq));
        self.recent.iter().rev().copied().chain(first)
    }
}

/// Everything seen.
#[derive(Debug, Clone)]
pub(crate) struct Tally {
    nodes: Vec<String>,
    index: HashMap<String, usize>,
    seen: Vec<Vec<Option<Box<Seen>>>>,
    signs: usize,
}

impl Tally {
    pub(crate) fn new(signs: usize) -> Self {
        Self { nodes: vec![String::new()], index: HashMap::new(), seen: vec![vec![None; signs]], signs }
    }

    /// Index of a node, which it gets on its first line.
    pub(crate) fn node(&mut self, name: Option<&str>) -> usize {
        let Some(name) = name.filter(|n| !n.is_empty()) else { return UNKNOWN_NODE };
        if let Some(&index) = self.index.get(name) {
            return index;
        }
        if self.nodes.len() >= NODES_MAX {
            return UNKNOWN_NODE;
        }
        let index = self.nodes.len();
        self.nodes.push(name.to_owned());
        self.index.insert(name.to_owned(), index);
        self.seen.push(vec![None; self.signs]);
        index
    }

    pub(crate) fn node_name(&self, index: usize) -> Option<&str> {
        self.nodes.get(index).map(String::as_str).filter(|n| !n.is_empty())
    }

    pub(crate) fn nodes(&self) -> std::ops::Range<usize> {
        0..self.nodes.len()
    }

    pub(crate) fn get(&self, node: usize, sign: usize) -> Option<&Seen> {
        self.seen.get(node)?.get(sign)?.as_deref()
    }

    /// Sightings of a sign anywhere that counted.
    pub(crate) fn everywhere(&self, sign: usize) -> impl Iterator<Item = (usize, &Seen)> + '_ {
        self.nodes().filter_map(move |n| self.get(n, sign).filter(|s| s.effective).map(|s| (n, s)))
    }

    /// Notes a sighting; says whether it counts (a sign with a count does only once it is reached).
    pub(crate) fn note(
        &mut self,
        node: usize,
        sign: usize,
        moment: Moment,
        counts: Option<Counts>,
        sample: impl Fn() -> Sample,
    ) -> bool {
        let Some(slot) = self.seen.get_mut(node).and_then(|signs| signs.get_mut(sign)) else { return false };
        let seen = slot.get_or_insert_with(|| {
            let first = sample();
            Box::new(Seen {
                count: 0,
                last: first.clone(),
                first,
                raw: VecDeque::new(),
                recent: VecDeque::new(),
                effective: false,
            })
        });
        seen.count += 1;
        let counted = match counts {
            None => true,
            Some(counts) => {
                push_bounded(&mut seen.raw, moment);
                let within = seen.raw.iter().filter(|m| moment.near(**m, Some(counts.within_s))).count();
                within >= usize::try_from(counts.at_least).unwrap_or(usize::MAX).min(RECENT_MAX)
            }
        };
        if counted {
            push_bounded(&mut seen.recent, moment);
            if !seen.effective {
                seen.first = sample();
                seen.effective = true;
            }
        }
        if seen.count < TEXT_EVERY || seen.count.is_multiple_of(TEXT_EVERY) {
            seen.last = sample();
        }
        counted
    }
}

fn push_bounded(ring: &mut VecDeque<Moment>, moment: Moment) {
    if ring.len() >= RECENT_MAX {
        ring.pop_front();
    }
    ring.push_back(moment);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(seq: u64, second: Option<i64>) -> Sample {
        let at = second.map(|s| Timestamp::from_second(s).unwrap());
        let moment = Moment { seq, at, since_boot: false };
        Sample { moment, kind: SourceKind::Unknown, origin: String::new(), line: None, text: String::new() }
    }

    fn note(tally: &mut Tally, seq: u64, second: i64, counts: Option<Counts>) -> bool {
        let sample = sample(seq, Some(second));
        tally.note(0, 0, sample.moment, counts, || sample.clone())
    }

    #[test]
    fn a_count_needs_its_window() {
        let counts = Some(Counts { at_least: 3, within_s: 10 });
        let mut tally = Tally::new(1);
        assert!(!note(&mut tally, 1, 0, counts));
        assert!(!note(&mut tally, 2, 5, counts));
        assert!(!note(&mut tally, 3, 20, counts));
        assert!(!note(&mut tally, 4, 22, counts));
        assert!(note(&mut tally, 5, 24, counts));
        let seen = tally.get(0, 0).unwrap();
        assert_eq!((seen.count, seen.first.moment.seq), (5, 5));
    }

    #[test]
    fn memory_is_bounded() {
        let mut tally = Tally::new(1);
        for n in 0..10_000u32 {
            let node = tally.node(Some(&format!("node-{n}")));
            let at = Some(i64::from(n));
            let sample = sample(u64::from(n), at);
            tally.note(node, 0, sample.moment, None, || sample.clone());
        }
        assert_eq!(tally.nodes().len(), NODES_MAX);
        assert!(tally.get(UNKNOWN_NODE, 0).unwrap().moments().count() <= RECENT_MAX + 1);
    }
}
