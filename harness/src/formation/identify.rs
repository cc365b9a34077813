//! identify: each guest is the one the plan says (FM-3).

use std::collections::BTreeSet;

use crate::exit::Blame;
use crate::failure::Failure;
use crate::formation::context::{Context, Done};
use crate::plan::{NodePlan, Phase};

/// What a guest must say of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Identity {
    /// The seed's id, from the plan's files.
    pub(super) seed: String,
    /// The image's id.
    pub(super) image: String,
}

/// Has a guest say who it is, by the shell's own means: run where `$addresses` holds what `ip -4 -o addr show` prints.
pub(super) const WHO: &str = "say() { line=; read -r line <\"$2\"; echo \"$1 $line\"; }\n\
    say hostname /proc/sys/kernel/hostname; say seed /etc/harness/seed; say image /etc/harness/image\n\
    while read -r _ dev _ addr _; do echo \"addr $dev $addr\"; done <<END\n$addresses\nEND\n";

/// Compares what a guest says of itself, as it answered [`WHO`], with the plan.
///
/// # Errors
/// Every difference, worded `identify: NODE: FIELD is "…", plan says "…"`.
pub(super) async fn identify(cx: &Context, answer: &str, node: &NodePlan, expected: &Identity) -> Result<(), Failure> {
    cx.phase(Phase::Identify, Some(&node.name), "hostname, seed, image and addresses of the plan", async {
        let differences = differences(answer, node, expected);
        if differences.is_empty() {
            return Ok(Done::new((), format!("seed {}, image {}", expected.seed, short(&expected.image))));
        }
        let mut failure =
            Failure::new(Blame::Environment, format!("{} is not the node the plan says (FM-3)", node.name))
                .hint("a seed or an image was mixed up between nodes: look at seeds and digests in plan.json");
        for difference in differences {
            failure = failure.because(difference);
        }
        Err(failure)
    })
    .await
}

fn short(digest: &str) -> &str {
    digest.get(..16).unwrap_or(digest)
}

fn differences(answer: &str, node: &NodePlan, expected: &Identity) -> Vec<String> {
    let mut found = Vec::new();
    let field = |name: &str| {
        answer.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')).unwrap_or_default().trim().to_owned()
    };
    let mut compare = |what: &str, is: String, plan: &str| {
        if is != plan {
            found.push(format!("identify: {}: {what} is {is:?}, plan says {plan:?}", node.name));
        }
    };
    compare("hostname", field("hostname"), &node.hostname);
    compare("seed id", field("seed"), &expected.seed);
    compare("image digest", field("image"), &expected.image);
    let present: BTreeSet<&str> = answer.lines().filter_map(|line| line.strip_prefix("addr ")).collect();
    for address in &node.addresses {
        let planned = format!("{} {}/{}", address.interface, address.address, address.prefix);
        if !present.contains(planned.as_str()) {
            let on_interface = present
                .iter()
                .filter_map(|line| line.strip_prefix(&address.interface)?.strip_prefix(' '))
                .collect::<Vec<_>>()
                .join(", ");
            compare(
                &format!("address on {}", address.interface),
                on_interface,
                &format!("{}/{}", address.address, address.prefix),
            );
        }
    }
    found
}
