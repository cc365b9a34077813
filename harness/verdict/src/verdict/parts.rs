//! The parts of a verdict: its lines, what followed, what contributed.

use crate::catalogue::{Kind, Meaning, Mode};
use crate::classify::Classifier;
use crate::context::Context;
use crate::rules::Firing;
use crate::tally::{Moment, Sample};
use crate::verdict::build::{CONSEQUENCES_MAX, Candidate, cpu_starved, failure_signs, title};
use crate::verdict::{Contribution, EVIDENCE_LINES_MAX, EvidenceLine};

/// Lines by sign, node and text, none twice.
#[derive(Default)]
struct Lines<'a> {
    kept: Vec<(usize, usize, &'a Sample)>,
}

impl<'a> Lines<'a> {
    fn add(&mut self, sign: usize, node: usize, sample: &'a Sample) {
        // One line can be a sign of two things; it is shown once.
        let known =
            |(s, n, old): &(usize, usize, &Sample)| (*s, *n) == (sign, node) || old.moment.seq == sample.moment.seq;
        if self.kept.len() < EVIDENCE_LINES_MAX && !self.kept.iter().any(known) {
            self.kept.push((sign, node, sample));
        }
    }

    /// Lines from `start` on in the order they were said, as far as they tell; else in the order they were read.
    fn sort(&mut self, start: usize) {
        let Some(lines) = self.kept.get_mut(start..) else { return };
        let same_clock = lines.windows(2).all(|w| w[0].2.moment.since_boot == w[1].2.moment.since_boot);
        let timed = same_clock && lines.iter().all(|l| l.2.moment.at.is_some());
        let key = |moment: Moment| (moment.at.filter(|_| timed), moment.seq);
        lines.sort_by_key(|l| key(l.2.moment));
    }
}

/// The chain that made the best rule hold, cause first; those of the other rules; what else was seen of the mode's signs.
pub(super) fn evidence(all: &Classifier, candidate: &Candidate<'_>, best: &Firing) -> Vec<EvidenceLine> {
    let mut lines = Lines::default();
    for (sign, node, sample) in &best.evidence {
        lines.add(*sign, *node, sample);
    }
    lines.sort(0);
    let of_best = lines.kept.len();
    let others = candidate.firings.iter().copied().filter(|f| (f.rule, f.node) != (best.rule, best.node));
    for (sign, node, sample) in others.flat_map(|f| &f.evidence) {
        lines.add(*sign, *node, sample);
    }
    lines.sort(of_best);
    for sign in (0..all.compiled.signs.len()).filter(|&s| all.compiled.signs[s].mode == candidate.mode) {
        if all.compiled.signs[sign].sign.meaning != Meaning::Recovery {
            // A line kept for a sign that counts lines shows the sign of one such line too.
            let pattern = &all.compiled.signs[sign].pattern;
            let shown = |on: usize, lines: &Lines<'_>| {
                lines.kept.iter().any(|(_, node, sample)| *node == on && pattern.is_match(sample.text.as_bytes()))
            };
            for (node, seen) in all.tally.everywhere(sign) {
                if !shown(node, &lines) {
                    lines.add(sign, node, &seen.first);
                }
            }
        }
    }
    lines.kept.iter().map(|(sign, node, sample)| all.evidence_line(*sign, *node, sample)).collect()
}

/// What followed from the primary candidate.
pub(super) fn consequences(
    all: &Classifier,
    candidates: &[Candidate<'_>],
    primary: usize,
    evidence: &[EvidenceLine],
) -> Vec<String> {
    let modes = &all.compiled.modes;
    let place = |node: usize| all.tally.node_name(node).map_or(String::new(), |n| format!(" on {n}"));
    let mut out = Vec::new();
    for (_, other) in candidates.iter().enumerate().filter(|(index, _)| *index != primary) {
        let mode = &modes[other.mode];
        let follows = modes[candidates[primary].mode].explains.contains(&mode.id);
        let link = if follows { "which follows from it" } else { "seen as well" };
        out.push(format!("{}{}, {link}", title(mode), place(other.best(all).node)));
    }
    for sign in failure_signs(all) {
        let name = &all.compiled.signs[sign].sign.name;
        for (node, seen) in all.tally.everywhere(sign) {
            let on = all.tally.node_name(node);
            let shown = evidence.iter().any(|l| {
                l.node.as_deref() == on
                    && (l.sign == *name || (l.at, &l.text) == (seen.first.moment.at, &seen.first.text))
            });
            if !shown {
                let times = if seen.count > 1 { format!(", {} times", seen.count) } else { String::new() };
                out.push(format!("{}{}{times}", all.compiled.signs[sign].sign.says, place(node)));
            }
        }
    }
    out.truncate(CONSEQUENCES_MAX);
    out
}

/// What made it more likely: oversubscription with its ratio, contributing signs, CPU pressure, restarts.
pub(super) fn contributions(all: &Classifier, context: &Context, primary: Option<&Mode>) -> Vec<Contribution> {
    let mut out = Vec::new();
    out.extend(oversubscription(context));
    for sign in (0..all.compiled.signs.len()).filter(|&s| all.compiled.signs[s].sign.meaning == Meaning::Contributing) {
        if let Some(found) = contributing_sign(all, sign, primary, &out) {
            out.push(found);
        }
    }
    if let Some((true, why)) = cpu_starved(context) {
        out.push(Contribution { id: None, text: why, ratio: None });
    }
    for unit in context.restarts.iter().filter(|r| r.restarts > 0) {
        let times = if unit.restarts == 1 { "once".to_owned() } else { format!("{} times", unit.restarts) };
        let text = format!("{} on {} was restarted {times}", unit.unit, unit.node);
        out.push(Contribution { id: None, text, ratio: None });
    }
    out
}

/// More vCPUs asked than the host has CPUs.
fn oversubscription(context: &Context) -> Option<Contribution> {
    let host = context.host.as_ref()?;
    let of_vms = || Some(context.vms.iter().map(|vm| vm.vcpus).sum()).filter(|sum| *sum > 0);
    let asked: u32 = host.vcpus_asked.or_else(of_vms)?;
    let cores = host.cores.filter(|c| *c > 0)?;
    let ratio = f64::from(asked) / f64::from(cores);
    let text = format!("{asked} vCPUs on {cores} CPUs: {ratio:.1} vCPUs for each CPU");
    (ratio > 1.0).then(|| Contribution { id: Some("FM-5".to_owned()), text, ratio: Some(ratio) })
}

fn contributing_sign(
    all: &Classifier,
    sign: usize,
    primary: Option<&Mode>,
    so_far: &[Contribution],
) -> Option<Contribution> {
    let compiled = &all.compiled.signs[sign];
    let mode = &all.compiled.modes[compiled.mode];
    let (_, seen) = all.tally.everywhere(sign).next()?;
    let count: u64 = all.tally.everywhere(sign).map(|(_, s)| s.count).sum();
    let figure = |name: &str| -> Option<f64> {
        let captures = compiled.pattern.captures(seen.first.text.as_bytes())?;
        std::str::from_utf8(captures.name(name)?.as_bytes()).ok()?.parse().ok()
    };
    let figures = figure("asked").zip(figure("available")).filter(|(_, available)| *available > 0.0);
    let of_primary = primary.is_some_and(|p| p.id == mode.id);
    // A mode that others name as a factor is shown by its id; a sign of the primary itself stands among its evidence.
    let is_factor = mode.kind == Kind::Failure && all.compiled.modes.iter().any(|m| m.contributing.contains(&mode.id));
    if of_primary && figures.is_none() {
        return None;
    }
    let id = is_factor.then(|| mode.id.clone());
    if figures.is_some() && so_far.iter().any(|c| c.id == id && c.ratio.is_some()) {
        return None;
    }
    let text = match figures {
        Some((asked, available)) => {
            let ratio = asked / available;
            format!("{}: {asked} vCPUs asked, {available} recommended, ratio {ratio:.1}", compiled.sign.says)
        }
        None if count > 1 => format!("{}, {count} times", compiled.sign.says),
        None => compiled.sign.says.clone(),
    };
    Some(Contribution { id, text, ratio: figures.map(|(asked, available)| asked / available) })
}
