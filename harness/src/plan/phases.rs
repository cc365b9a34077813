//! Deadlines: how long each phase may take here.
//!
//! Each has a base, which is ample on hardware KVM with a core for every vCPU, multiplied by what makes this lab slower.
//! A deadline costs nothing unless something hangs: a phase ends when its event comes, and fails early when a VM dies.

use std::time::Duration;

use super::Inputs;
use super::model::{NodePlan, Oversubscription, PhasePlan, PhaseScope, Plan, PrewarmPlan};
use crate::scenario::{Phase, Scenario};

/// No deadline grows by more than this for the guests' speed.
const MAX_SLOWDOWN: f64 = 20.0;
/// Nor by more than this for oversubscription.
const MAX_OVERSUBSCRIPTION: f64 = 4.0;
/// Nor by more than this in all.
const MAX_FACTOR: f64 = 40.0;

enum Scaling {
    /// Guests do the work.
    Guest,
    /// The host or the contract sets the time, for this reason.
    Fixed(&'static str),
}

pub(super) fn phases(
    scenario: &Scenario,
    nodes: &[NodePlan],
    inputs: &Inputs,
    over: &Oversubscription,
) -> Vec<PhasePlan> {
    // A figure that is none gets the most time there is.
    let slowdown = inputs.calibration.slowdown;
    let slowdown = if slowdown.is_nan() { MAX_SLOWDOWN } else { slowdown.clamp(1.0, MAX_SLOWDOWN) };
    let crowding = over.ratio.clamp(1.0, MAX_OVERSUBSCRIPTION);
    let factor = (slowdown * crowding).min(MAX_FACTOR);
    let guest_scaling = format!("{} slowdown {slowdown:.1} × oversubscription {crowding:.1}", inputs.calibration.accel);

    let names = |nodes: &[NodePlan]| nodes.iter().map(|node| node.name.clone()).collect::<Vec<_>>();
    let all = names(nodes);
    let (first, joiners) = nodes.split_at(nodes.len().min(1));
    let (first, joiners) = (names(first), names(joiners));
    let prewarm = PrewarmPlan::default();
    let attempts = u64::from(prewarm.attempts);
    let prewarm_ms = attempts * prewarm.attempt_timeout_ms + attempts.saturating_sub(1) * prewarm.pause_ms;

    let phase = |phase, scope, nodes: &Vec<String>, base_ms: u64, scaling| {
        let (deadline_ms, scaled_by) = match scaling {
            Scaling::Guest => (scale(base_ms, factor), guest_scaling.clone()),
            Scaling::Fixed(reason) => (base_ms, reason.to_owned()),
        };
        PhasePlan { phase, scope, nodes: nodes.clone(), deadline_ms, base_ms, scaled_by }
    };
    use PhaseScope::{EachNode, Lab, OneByOne};
    use Scaling::{Fixed, Guest};
    let mut settle = phase(
        Phase::Settle,
        OneByOne,
        // A lone server has to stay good, too.
        if joiners.is_empty() { &first } else { &joiners },
        60_000,
        Guest,
    );
    // The period itself is time that has to pass, however fast the guests are.
    settle.base_ms += scenario.settle_ms;
    settle.deadline_ms += scenario.settle_ms;
    settle.scaled_by = format!("{guest_scaling}, but for the settle period of {:.1} s", seconds(scenario.settle_ms));
    vec![
        phase(Phase::Preflight, Lab, &all, 30_000, Fixed("not scaled: the host's work")),
        phase(Phase::Image, Lab, &all, 1_200_000, Fixed("not scaled: the host's work; a build downloads packages")),
        phase(Phase::Network, Lab, &all, 20_000, Guest),
        phase(Phase::Boot, EachNode, &all, 30_000, Guest),
        phase(Phase::Identify, EachNode, &all, 10_000, Guest),
        phase(Phase::Sanitize, EachNode, &all, 15_000, Guest),
        phase(Phase::Primary, OneByOne, &first, 120_000, Guest),
        phase(Phase::Prewarm, EachNode, &joiners, prewarm_ms, Fixed("not scaled: 3 attempts of 15 s, 2 s apart")),
        phase(Phase::Join, OneByOne, &joiners, 120_000, Guest),
        settle,
        phase(Phase::Verify, Lab, &all, 20_000, Guest),
        phase(Phase::Collect, EachNode, &all, 15_000, Guest),
        phase(Phase::Teardown, Lab, &all, 30_000, Fixed("not scaled: ends with SIGKILL")),
    ]
}

impl Plan {
    /// Lets the first phase wait this much longer, for other labs on this machine to end.
    #[must_use]
    pub fn wait_for_host(mut self, wait_max: Duration) -> Self {
        if let Some(preflight) = self.phases.iter_mut().find(|planned| planned.phase == Phase::Preflight)
            && !wait_max.is_zero()
        {
            let wait_ms = u64::try_from(wait_max.as_millis()).unwrap_or(u64::MAX);
            preflight.deadline_ms = preflight.deadline_ms.saturating_add(wait_ms);
            preflight.scaled_by =
                format!("{}; {:.0} s more for other labs to end", preflight.scaled_by, seconds(wait_ms));
        }
        self
    }
}

/// Milliseconds times a factor, to the next tenth of a second.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "bounded: a base is minutes at most, the factor is 1 to 40"
)]
fn scale(base_ms: u64, factor: f64) -> u64 {
    // Rounded first: 30 s times 9.8 is not 294.1 s because of a binary fraction.
    let tenths = (base_ms as f64 * factor / 100.0 * 1000.0).round() / 1000.0;
    (tenths.ceil() as u64) * 100
}

#[expect(clippy::cast_precision_loss, reason = "minutes at most")]
fn seconds(ms: u64) -> f64 {
    ms as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scaling_rounds_up_to_tenths() {
        assert_eq!(scale(30_000, 1.0), 30_000);
        assert_eq!(scale(30_000, 9.8), 294_000);
        assert_eq!(scale(10_000, 1.2345), 12_400);
    }
}
