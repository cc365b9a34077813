//! From what was seen to the verdict: causes before symptoms, the earliest sufficient cause first.

use crate::catalogue::{Attribution, Class, EndsWait, Kind, Meaning, Mode};
use crate::classify::Classifier;
use crate::context::{Context, Health};
use crate::rules::{self, Firing};
use crate::tally::Moment;
use crate::verdict::parts::{consequences, contributions, evidence};
use crate::verdict::{Confidence, EVIDENCE_LINES_MAX, EvidenceLine, LookAlike, Outcome, SCHEMA_VERSION, Verdict};

/// How much later than its consequence a cause may be printed, seconds: buffers and clocks are not exact.
const CAUSE_LAG_S: u64 = 120;
/// Most consequences listed.
pub(super) const CONSEQUENCES_MAX: usize = 6;
/// From this share of waiting on, percent, vCPU threads count as starved.
const CPU_WAIT_PCT: f64 = 10.0;
/// From this pressure on, percent, the host counts as short of CPU.
const CPU_PRESSURE_PCT: f64 = 25.0;

/// All that holds for one mode.
pub(super) struct Candidate<'a> {
    pub(super) mode: usize,
    pub(super) firings: Vec<&'a Firing>,
}

impl Candidate<'_> {
    /// The firing it rests on: the surest, the earliest among these.
    pub(super) fn best(&self, all: &Classifier) -> &Firing {
        let rank = |f: &&&Firing| (std::cmp::Reverse(all.compiled.rules[f.rule].rule.confidence), f.cause.seq);
        self.firings.iter().min_by_key(rank).unwrap_or(&self.firings[0])
    }

    fn earliest(&self) -> Moment {
        self.firings
            .iter()
            .map(|f| f.cause)
            .reduce(|a, b| if before(b, a) { b } else { a })
            .unwrap_or(self.firings[0].cause)
    }
}

fn before(a: Moment, b: Moment) -> bool {
    match (a.at, b.at) {
        (Some(x), Some(y)) if a.since_boot == b.since_boot && x != y => x < y,
        _ => a.seq < b.seq,
    }
}

/// The verdict on everything `all` has seen.
pub(crate) fn verdict(all: &Classifier, context: &Context) -> Verdict {
    let candidates = candidates(all);
    if context.health == Health::Passed {
        return passed(all, context, &candidates);
    }
    let Some(primary) = primary(all, &candidates) else { return nothing_known(all, context) };
    explained(all, context, &candidates, primary)
}

fn candidates(all: &Classifier) -> Vec<Candidate<'_>> {
    let mut out: Vec<Candidate<'_>> = Vec::new();
    for firing in &all.firings {
        let rule = &all.compiled.rules[firing.rule];
        let void = rules::excluded(rule, &all.tally, firing.node, firing.last, false)
            || rules::outnumbered(rule, &all.tally, firing.node)
            || rules::recovered(&rule.voided_by, rule, &all.tally, firing);
        if void {
            continue;
        }
        match out.iter_mut().find(|c| c.mode == rule.mode) {
            Some(candidate) => candidate.firings.push(firing),
            None => out.push(Candidate { mode: rule.mode, firings: vec![firing] }),
        }
    }
    // What is only good where nothing else is known yields to whatever is.
    let last_resort = |f: &&Firing| all.compiled.rules[f.rule].rule.last_resort;
    if out.iter().any(|c| !c.firings.iter().all(&last_resort)) {
        for candidate in &mut out {
            candidate.firings.retain(|f| !last_resort(f));
        }
        out.retain(|c| !c.firings.is_empty());
    }
    out
}

/// Something ended badly, whatever the reason, and neither was it wanted nor did it pass.
fn has_unexplained_failure(all: &Classifier) -> bool {
    failure_signs(all)
        .any(|sign| all.tally.everywhere(sign).any(|(node, _)| !rules::excused(&all.compiled, &all.tally, node, sign)))
}

/// Shared signs of failure that were seen.
pub(super) fn failure_signs(all: &Classifier) -> impl Iterator<Item = usize> + '_ {
    (0..all.compiled.signs.len()).filter(|&s| {
        let sign = &all.compiled.signs[s];
        all.compiled.modes[sign.mode].kind == Kind::Shared
            && matches!(sign.sign.meaning, Meaning::Fatal | Meaning::FatalUnlessRecovered)
            && all.tally.everywhere(s).next().is_some()
    })
}

fn primary(all: &Classifier, candidates: &[Candidate<'_>]) -> Option<usize> {
    let explains = |cause: &Candidate<'_>, effect: &Candidate<'_>| {
        let modes = &all.compiled.modes;
        if !modes[cause.mode].explains.contains(&modes[effect.mode].id) {
            return false;
        }
        let (a, b) = (cause.earliest(), effect.earliest());
        !before(b, a) || a.near(b, Some(CAUSE_LAG_S))
    };
    let unexplained: Vec<usize> = (0..candidates.len())
        .filter(|&e| !(0..candidates.len()).any(|c| c != e && explains(&candidates[c], &candidates[e])))
        .collect();
    // Modes that explain each other leave nobody: then all of them count.
    let pool: Vec<usize> = if unexplained.is_empty() { (0..candidates.len()).collect() } else { unexplained };
    let weight = |c: usize| {
        let candidate = &candidates[c];
        let sure = all.compiled.rules[candidate.best(all).rule].rule.confidence;
        let is_mode = all.compiled.modes[candidate.mode].kind == Kind::Failure;
        // A guess at a failure mode does not beat a sure explanation.
        u8::from(is_mode && sure >= Confidence::Medium) + u8::from(sure >= Confidence::Medium)
    };
    pool.into_iter().reduce(|a, b| {
        let (wa, wb) = (weight(a), weight(b));
        if wb > wa || (wb == wa && before(candidates[b].earliest(), candidates[a].earliest())) { b } else { a }
    })
}

fn passed(all: &Classifier, context: &Context, candidates: &[Candidate<'_>]) -> Verdict {
    let consequences = candidates
        .iter()
        .filter(|c| all.compiled.modes[c.mode].kind == Kind::Failure)
        .map(|c| format!("signs of {} were seen and the run recovered", title(&all.compiled.modes[c.mode])))
        .take(CONSEQUENCES_MAX)
        .collect();
    Verdict {
        outcome: Outcome::Passed,
        name: "passed".to_owned(),
        summary: "Every phase passed.".to_owned(),
        confidence: Confidence::High,
        reason: "the run passed".to_owned(),
        consequences,
        contributing: contributions(all, context, None),
        ..empty(context)
    }
}

fn empty(context: &Context) -> Verdict {
    Verdict {
        schema_version: SCHEMA_VERSION,
        outcome: Outcome::NoFailureSeen,
        id: None,
        look_alike: None,
        name: String::new(),
        summary: String::new(),
        class: None,
        attribution: None,
        phase: context.phase,
        node: context.node.clone(),
        confidence: Confidence::Low,
        reason: String::new(),
        evidence: Vec::new(),
        consequences: Vec::new(),
        contributing: Vec::new(),
        remedy: Vec::new(),
    }
}

fn nothing_known(all: &Classifier, context: &Context) -> Verdict {
    let mut found: Vec<(bool, Moment, EvidenceLine)> = Vec::new();
    let failed = context.health == Health::Failed || has_unexplained_failure(all);
    for sign in 0..all.compiled.signs.len() {
        let meaning = all.compiled.signs[sign].sign.meaning;
        let fatal = matches!(meaning, Meaning::Fatal | Meaning::FatalUnlessRecovered);
        if !fatal && meaning != Meaning::Symptom {
            continue;
        }
        for (node, seen) in all.tally.everywhere(sign) {
            found.push((!fatal, seen.first.moment, all.evidence_line(sign, node, &seen.first)));
        }
    }
    found.sort_by(|a, b| a.0.cmp(&b.0).then(a.1.seq.cmp(&b.1.seq)));
    let mut evidence: Vec<EvidenceLine> = Vec::new();
    for (_, _, line) in found {
        // One line can be several signs; it is shown once.
        let same = |old: &EvidenceLine| (&old.origin, old.line, &old.text) == (&line.origin, line.line, &line.text);
        if evidence.len() < EVIDENCE_LINES_MAX && !evidence.iter().any(same) {
            evidence.push(line);
        }
    }
    let contributing = contributions(all, context, None);
    if !failed {
        return Verdict {
            outcome: Outcome::NoFailureSeen,
            name: "no failure seen".to_owned(),
            summary: "Nothing in the evidence says that anything failed.".to_owned(),
            confidence: Confidence::Medium,
            reason: match evidence.len() {
                0 => "no sign of any failure was found".to_owned(),
                1 => "a kind of warning was found that a healthy cluster prints too".to_owned(),
                n => format!("{n} kinds of warnings were found that a healthy cluster prints too"),
            },
            evidence,
            contributing,
            ..empty(context)
        };
    }
    let what = context.errors.first().map_or_else(|| "Something failed".to_owned(), |e| format!("The run failed: {e}"));
    Verdict {
        outcome: Outcome::Failed,
        name: "no known failure mode".to_owned(),
        summary: format!("{what}. These are the lines worth reading first."),
        confidence: Confidence::Low,
        reason: match evidence.len() {
            0 => "no line of the evidence names a cause".to_owned(),
            _ => "the lines say that something failed, not why".to_owned(),
        },
        evidence,
        contributing,
        remedy: vec![
            "read the lines above and what stands just before them in the named file".to_owned(),
            "run it again: a failure that stays on one test points to code, one that wanders to the environment"
                .to_owned(),
        ],
        ..empty(context)
    }
}

pub(super) fn title(mode: &Mode) -> String {
    if mode.kind == Kind::Failure { format!("{} ({})", mode.id, mode.name) } else { mode.name.clone() }
}

fn explained(all: &Classifier, context: &Context, candidates: &[Candidate<'_>], primary: usize) -> Verdict {
    let candidate = &candidates[primary];
    let mode = &all.compiled.modes[candidate.mode];
    let firing = candidate.best(all);
    let rule = &all.compiled.rules[firing.rule];
    let mut confidence = rule.rule.confidence;
    let mut attribution = mode.attribution;
    let mut reasons = vec![rule.rule.because.clone()];
    if let Some(phase) = context.phase.filter(|p| !mode.phases.is_empty() && !mode.phases.contains(p)) {
        confidence = confidence.lowered();
        reasons.push(format!("the phase that failed ({phase}) is not one it usually shows in"));
    }
    if mode.contributing.iter().any(|c| c == "FM-5") && mode.attribution == Attribution::Environment {
        match cpu_starved(context) {
            Some((true, why)) => reasons.push(format!("the host was short of CPU ({why})")),
            Some((false, why)) => {
                confidence = confidence.lowered();
                attribution = Attribution::Product;
                reasons.push(format!(
                    "but the host was not short of CPU ({why}), so the environment is not the likely reason"
                ));
            }
            None => {}
        }
    }
    if rule.rule.ends_wait == EndsWait::AfterAllowance && rules::recovered(&rule.recovered_by, rule, &all.tally, firing)
    {
        reasons.push("it came back afterwards".to_owned());
    }
    match context.blame.filter(|step| *step != attribution) {
        Some(Attribution::Harness) => {
            attribution = Attribution::Harness;
            reasons.push("but the run ended over a fault of the harness".to_owned());
        }
        // A guess neither accuses nor clears anybody.
        Some(step) if confidence < Confidence::Medium => {
            attribution = step;
            reasons.push("too unsure to say who is to blame: that is what the failed step points to".to_owned());
        }
        _ => {}
    }
    let evidence = evidence(all, candidate, firing);
    let node = all.tally.node_name(firing.node).map(str::to_owned).or_else(|| context.node.clone());
    Verdict {
        outcome: Outcome::Failed,
        id: (mode.kind == Kind::Failure).then(|| mode.id.clone()),
        look_alike: (mode.kind == Kind::LookAlike)
            .then(|| LookAlike { id: mode.id.clone(), not: mode.looks_like.clone() }),
        name: mode.name.clone(),
        summary: mode.summary.clone(),
        class: Some(mode.class),
        attribution: Some(attribution),
        node,
        confidence,
        reason: reasons.join("; "),
        consequences: consequences(all, candidates, primary, &evidence),
        evidence,
        contributing: contributions(all, context, Some(mode)),
        remedy: mode.remedy.clone(),
        ..empty(context)
    }
}

/// Whether the host was short of CPU, with the figures; `None` where nobody measured.
pub(super) fn cpu_starved(context: &Context) -> Option<(bool, String)> {
    let mut figures: Vec<String> = Vec::new();
    let mut starved = false;
    let waits = context.vms.iter().filter_map(|vm| vm.cpu_wait_pct.map(|w| (w, vm.name.as_str())));
    if let Some((wait, name)) = waits.max_by(|a, b| a.0.total_cmp(&b.0)) {
        starved |= wait >= CPU_WAIT_PCT;
        figures.push(format!("the vCPU threads of {name} waited for {wait:.0} % of their time"));
    }
    if let Some(pressure) = context.host.as_ref().and_then(|h| h.cpu_pressure_some_avg10) {
        starved |= pressure >= CPU_PRESSURE_PCT;
        figures.push(format!("CPU pressure {pressure:.0} %"));
    }
    (!figures.is_empty()).then(|| (starved, figures.join(", ")))
}

/// Class of a mode, for the renderer.
pub(crate) fn class_word(class: Option<Class>) -> String {
    class.map_or_else(|| "unknown".to_owned(), |c| c.to_string())
}
