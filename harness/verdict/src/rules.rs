//! When signs together are sufficient.

use crate::catalogue::{Compiled, CompiledRule, Meaning, Scope, When};
use crate::tally::{Moment, Sample, Seen, Tally};

/// A rule that holds.
#[derive(Debug, Clone)]
pub(crate) struct Firing {
    /// Rule index.
    pub(crate) rule: usize,
    /// Node of its last sign.
    pub(crate) node: usize,
    /// The moment of its first sign, when it first held.
    pub(crate) cause: Moment,
    /// The moment it held last.
    pub(crate) last: Moment,
    /// How often it held.
    pub(crate) count: u64,
    /// Its signs when it first held, as (sign, node, line).
    pub(crate) evidence: Vec<(usize, usize, Sample)>,
    /// Since when it waits for recovery.
    pub(crate) pending_since: Option<Moment>,
    /// It ended a wait already.
    pub(crate) reported: bool,
}

/// Signs that made a rule hold, one for each of its groups: (sign, node, moment).
type Chain = Vec<(usize, usize, Moment)>;

/// Whether the rule holds now that `node` has seen something new.
pub(crate) fn holds(rule: &CompiledRule, tally: &Tally, node: usize) -> Option<Chain> {
    let mut chain: Chain = Vec::with_capacity(rule.all.len());
    let mut bound: Option<Moment> = None;
    // From the last group back: in an ordered rule every group's sign is not later than the next group's. The effect is
    // the latest there is, a cause the earliest that is near enough.
    for group in rule.all.iter().rev() {
        let found = group.iter().flat_map(|&sign| candidates(rule, tally, node, sign));
        let found = match bound {
            None => found.max_by_key(|(_, _, moment)| moment.seq)?,
            Some(effect) => found
                .filter(|(_, _, cause)| !rule.rule.ordered || not_later(*cause, effect))
                .filter(|(_, _, cause)| cause.near(effect, rule.rule.within_s))
                .min_by_key(|(_, _, moment)| moment.seq)?,
        };
        bound = Some(found.2);
        chain.push(found);
    }
    chain.reverse();
    let (first, last) = (chain.first()?.2, chain.last()?.2);
    let spread_ok = chain.iter().all(|(_, _, m)| m.near(first, rule.rule.within_s) && m.near(last, rule.rule.within_s));
    if !spread_ok {
        return None;
    }
    let end = chain.iter().map(|c| c.2).max_by_key(|m| m.seq)?;
    (!excluded(rule, tally, node, end, true)).then_some(chain)
}

/// Two moments of one log are in order of reading; of different logs their times decide, where known.
fn not_later(a: Moment, b: Moment) -> bool {
    match (a.at, b.at) {
        (Some(x), Some(y)) if a.since_boot == b.since_boot && x != y => x.as_second() <= y.as_second(),
        _ => a.seq <= b.seq,
    }
}

/// Files are read one after the other, so of moments in different ones the times decide; within a second the order of
/// reading does.
fn later(a: Moment, b: Moment) -> bool {
    match (a.at, b.at) {
        (Some(x), Some(y)) if a.since_boot == b.since_boot && x.as_second() != y.as_second() => x > y,
        _ => a.seq > b.seq,
    }
}

fn candidates<'a>(
    rule: &CompiledRule,
    tally: &'a Tally,
    node: usize,
    sign: usize,
) -> impl Iterator<Item = (usize, usize, Moment)> + 'a {
    let lab = rule.rule.scope == Scope::Lab;
    let nodes = if lab { tally.nodes() } else { node..node + 1 };
    nodes
        .filter_map(move |n| tally.get(n, sign).map(|seen| (n, seen)))
        .flat_map(move |(n, seen)| seen.moments().map(move |m| (sign, n, m)))
}

/// Whether a sign that voids the rule was seen; `so_far` looks only at what was before `end`.
pub(crate) fn excluded(rule: &CompiledRule, tally: &Tally, node: usize, end: Moment, so_far: bool) -> bool {
    rule.none.iter().any(|&(sign, when, within_s)| {
        if so_far && when == When::Any && within_s.is_some() {
            // Judged once everything is known.
            return false;
        }
        candidates(rule, tally, node, sign)
            .any(|(_, _, m)| m.near(end, within_s) && (when == When::Any || not_later(m, end)))
    })
}

/// Whether something says, after the rule held last, that things are well again.
pub(crate) fn recovered(signs: &[usize], rule: &CompiledRule, tally: &Tally, firing: &Firing) -> bool {
    signs.iter().any(|&sign| candidates(rule, tally, firing.node, sign).any(|(_, _, m)| later(m, firing.last)))
}

/// Longest time from a deliberate stop to what it makes programs print, seconds.
const STOP_LAG_S: u64 = 90;

/// Whether a sign of failure needs no explanation on that node: each time it was seen, somebody had just stopped the unit, or
/// things were well again afterwards.
pub(crate) fn excused(compiled: &Compiled, tally: &Tally, node: usize, sign: usize) -> bool {
    let moments = |of: usize| tally.get(node, of).into_iter().flat_map(Seen::moments);
    let recovered = |at: Moment| compiled.signs[sign].recovered_by.iter().any(|&r| moments(r).any(|m| later(m, at)));
    let deliberate = (0..compiled.signs.len()).filter(|&s| compiled.signs[s].sign.meaning == Meaning::Deliberate);
    let deliberate: Vec<usize> = deliberate.collect();
    let stopped =
        |at: Moment| deliberate.iter().any(|&d| moments(d).any(|m| not_later(m, at) && m.near(at, Some(STOP_LAG_S))));
    moments(sign).all(|at| recovered(at) || stopped(at))
}

/// Whether its counter-signs are as many as the signs of its first group, or more.
pub(crate) fn outnumbered(rule: &CompiledRule, tally: &Tally, node: usize) -> bool {
    let count =
        |signs: &[usize]| -> u64 { signs.iter().filter_map(|&s| tally.get(node, s)).map(|s: &Seen| s.count).sum() };
    let against = count(&rule.outnumbered_by);
    against > 0 && rule.all.first().is_some_and(|group| against >= count(group))
}
