//! How many virtual CPUs nodes get, and whether the host has them.

use super::model::Oversubscription;

/// The virtual CPUs of a node that asks for `auto`: the host's cores shared evenly, but at least 1 and at most 2.
///
/// Two, because a guest boots markedly quicker on two than on one, emulated or not, and hardly quicker on more. Fewer only
/// where two each would be more than the host has: then the second virtual CPU takes its time from another node's first
/// (FM-5), and an etcd that does not get to send its heartbeats costs the cluster its leader (FM-1).
#[must_use]
pub fn auto_vcpus(cores: u32, nodes: u32) -> u32 {
    (cores / nodes.max(1)).clamp(1, 2)
}

/// `all_auto`: every node leaves the number to the plan, which then has nothing left to lower.
pub(super) fn oversubscription(vcpus: u32, cores: u32, all_auto: bool) -> Oversubscription {
    let ratio = f64::from(vcpus) / f64::from(cores.max(1));
    let instead = if all_auto { "fewer nodes" } else { "`vcpus: auto`, fewer nodes" };
    let warning = (ratio > 1.0).then(|| {
        format!(
            "the nodes ask for {vcpus} vCPUs, the host has {cores} cores: oversubscribed {ratio:.1} times (FM-5); \
             expect slow boots and lost etcd leases, or use {instead} or a larger host"
        )
    });
    Oversubscription { vcpus, cores, ratio, warning }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_shares_the_cores() {
        let shares = [(1, 1), (2, 1), (16, 1), (2, 2), (4, 2), (16, 2), (2, 3), (6, 3), (1, 9)];
        let vcpus = shares.map(|(cores, nodes)| auto_vcpus(cores, nodes));
        assert_eq!(vcpus, [1, 2, 2, 1, 2, 2, 1, 2, 1]);
    }

    #[test]
    fn auto_oversubscribes_only_where_there_are_more_nodes_than_cores() {
        for cores in 1..=64 {
            for nodes in 1..=9 {
                let over = oversubscription(auto_vcpus(cores, nodes) * nodes, cores, true);
                assert_eq!(over.warning.is_some(), nodes > cores, "{nodes} nodes on {cores} cores");
            }
        }
    }

    #[test]
    fn the_warning_names_the_figures() {
        let over = oversubscription(8, 4, false);
        assert!((over.ratio - 2.0).abs() < f64::EPSILON);
        let warning = over.warning.unwrap();
        assert!(warning.contains("8 vCPUs") && warning.contains("4 cores") && warning.contains("FM-5"), "{warning}");
        assert!(warning.contains("use `vcpus: auto`"), "{warning}");
        // Who has left it to the plan is not told to leave it to the plan.
        let warning = oversubscription(3, 2, true).warning.unwrap();
        assert!(!warning.contains("auto") && warning.contains("use fewer nodes or a larger host"), "{warning}");
    }
}
