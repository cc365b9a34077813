//! network: the switches on the host, then the profile's interfaces in every guest and the paths between them.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use futures::future::try_join_all;
use kvm::Mac;
use tokio::time::Instant;

use crate::exit::Blame;
use crate::failure::Failure;
use crate::formation::context::{Context, Done, millis};
use crate::formation::identify::WHO;
use crate::guest::Guest;
use crate::lab::Lab;
use crate::lab::dhcp::Leases;
use crate::plan::{GuestCheck, NodePlan, Phase};

/// How often a path is tried: the first frames may be lost while a bond and the switches learn who is where.
const PATH_ATTEMPTS: u32 = 3;
/// A port nobody listens on (discard, RFC 863): a refusal shows the path as well as a connection does.
const QUIET_PORT: u16 = 9;
/// What the last attempt asks for: an image may have a firewall that drops what it does not know.
const SSH_PORT: u16 = 22;

/// Starts the plan's switches, joins them, and plugs the DHCP servers in; what is known of each one's leases.
///
/// # Errors
/// The environment's failure.
pub(super) async fn start_switches(cx: &Context, lab: &mut Lab) -> Result<Vec<Leases>, Failure> {
    let plan = &cx.plan;
    cx.phase(Phase::Network, None, "the switches and their VLAN trunks", async {
        for switch in &plan.switches {
            lab.add_switch(switch.clone()).await?;
        }
        let position = |name: &str| {
            plan.switches
                .iter()
                .position(|switch| switch.name == name)
                .ok_or_else(|| Failure::new(Blame::Harness, format!("the plan links an unknown switch {name}")))
        };
        for link in &plan.links {
            lab.add_link((position(&link.a.switch)?, link.a.port), (position(&link.b.switch)?, link.b.port)).await?;
        }
        let mut leases = Vec::new();
        for server in &plan.dhcp {
            leases.push(lab.add_dhcp(server).await?);
        }
        let counted = [
            count(plan.switches.len(), "switch", "switches"),
            count(plan.links.len(), "link", "links"),
            count(plan.dhcp.len(), "DHCP server", "DHCP servers"),
        ];
        Ok(Done::new(leases, counted.into_iter().flatten().collect::<Vec<_>>().join(", ")))
    })
    .await
}

/// `2 switches`, `1 link`; nothing of what there is none of.
fn count(how_many: usize, one: &str, more: &str) -> Option<String> {
    match how_many {
        0 => None,
        1 => Some(format!("1 {one}")),
        _ => Some(format!("{how_many} {more}")),
    }
}

/// Looks that a guest's own interfaces are as planned: addresses up, VLAN links there, the bond's legs alive. Returns what the
/// guest said at the end of it, in which it says who it is too: a command costs an emulated CPU a tenth of a second.
///
/// `nics_up` completes when the guest has brought its NICs up, as seen from outside. It is not asked before that, or where
/// nothing is seen, for a while.
///
/// # Errors
/// What is not as planned when the deadline is over.
pub(super) async fn check_interfaces(
    cx: &Context,
    guest: &Guest,
    node: &NodePlan,
    leases: &[Leases],
    nics_up: impl Future<Output = ()>,
) -> Result<String, Failure> {
    cx.phase(Phase::Network, Some(&node.name), "the profile's addresses, bond and VLAN links", async {
        let limit = cx.deadline(Phase::Network);
        let began = Instant::now();
        let leased = leased(node, leases, in_guest(limit)).await?;
        // Whatever it shows, the guest decides.
        let _ = tokio::time::timeout(in_guest(limit.saturating_sub(began.elapsed())) / 4, nics_up).await;
        // What that took is not to be had again: the guest says what is missing before the phase is over.
        let left = limit.saturating_sub(began.elapsed());
        let output = guest
            .exec(&wait_script(node, left), left)
            .await
            .map_err(|error| Failure::from_error(Blame::Environment, "looking at the guest's network", &error))?;
        let text = output.text();
        if !output.success() {
            let missing = text.lines().filter_map(|line| line.strip_prefix("missing ")).collect::<Vec<_>>();
            return Err(Failure::new(
                Blame::Usage,
                format!("the guest's network is not as planned: {}", missing.join("; ")),
            )
            .hint(format!(
                "nodes/{0}/ip.txt in the run folder shows the guest's links and bonds, nodes/{0}/journal.log systemd-networkd's reasons",
                node.name
            )));
        }
        let note = text
            .lines()
            .find_map(|line| line.strip_prefix("bond "))
            .map_or_else(String::new, |bond| format!(", {bond}"));
        let addresses = node.addresses.iter().map(|address| {
            let by = leased.get(&address.network).map(|after| format!(" by DHCP in {} ms", millis(*after)));
            format!("{} {}{}", address.interface, address.address, by.unwrap_or_default())
        });
        let note = format!("{}{note}", addresses.collect::<Vec<_>>().join(", "));
        Ok(Done::new(text, note))
    })
    .await
}

/// Waits until every lease of the node is granted; how long each took from its first message on, by network.
async fn leased(node: &NodePlan, leases: &[Leases], limit: Duration) -> Result<BTreeMap<String, Duration>, Failure> {
    let until = Instant::now() + limit;
    let mut all = BTreeMap::new();
    for leases in leases {
        let Some(mac) =
            node.addresses.iter().find(|a| a.network == leases.network()).and_then(|a| node.mac_of(&a.parent))
        else {
            continue;
        };
        match tokio::time::timeout_at(until, leases.leased(mac)).await {
            Ok(after) => all.insert(leases.network().to_owned(), after),
            Err(_) => return Err(no_lease(node, leases, mac)),
        };
    }
    Ok(all)
}

fn no_lease(node: &NodePlan, leases: &Leases, mac: Mac) -> Failure {
    let network = leases.network();
    let mut failure =
        Failure::new(Blame::Usage, format!("{} got no lease on network {network}: {}", node.name, leases.why_not(mac)));
    for stranger in leases.strangers() {
        failure = failure.because(stranger);
    }
    failure.hint(format!(
        "dhcp.log in the run folder has every DHCP message that reached the server, nodes/{}/journal.log what systemd-networkd says; compare the VLANs in plan.json",
        node.name
    ))
}

/// Every node reaches every other on every network of the profile.
///
/// A path is TCP that is answered, asked for by this guest's sshd on a port nobody listens on: no process is started in either
/// guest. One path of a guest after the other: sshd's words on two at the same moment could be exchanged.
///
/// # Errors
/// The first path that does not carry traffic.
pub(super) async fn check_paths(cx: &Context, guests: &BTreeMap<String, Guest>) -> Result<(), Failure> {
    let mut paths = Vec::new();
    for node in &cx.plan.nodes {
        let Some(guest) = guests.get(&node.name) else { continue };
        let mut own = Vec::new();
        for check in &node.checks {
            if let GuestCheck::Reach { network, interface, node: to, address } = check {
                let vlan = node.addresses.iter().find(|a| &a.network == network).and_then(|a| a.vlan);
                let vlan = vlan.map_or_else(|| "untagged".to_owned(), |vlan| format!("VLAN {vlan}"));
                let words = format!(
                    "{} does not reach {to} on network {network} ({vlan}, {address} via {interface})",
                    node.name
                );
                own.push((IpAddr::from(*address), words));
            }
        }
        paths.push((guest, own));
    }
    let count = paths.iter().map(|(_, own)| own.len()).sum::<usize>();
    if count == 0 {
        return Ok(());
    }
    cx.phase(Phase::Network, None, "every node to reach every other on every network", async {
        let of_guest = async |(guest, own): (&Guest, Vec<(IpAddr, String)>)| {
            let mut attempts = 1;
            for (address, words) in own {
                attempts = attempts.max(check_path(cx, guest, address, words).await?);
            }
            Ok::<_, Failure>(attempts)
        };
        let attempts = try_join_all(paths.into_iter().map(of_guest)).await?.into_iter().max().unwrap_or(1);
        Ok(Done::new((), format!("{count} paths carry TCP")).after(attempts))
    })
    .await
}

async fn check_path(cx: &Context, guest: &Guest, address: IpAddr, words: String) -> Result<u32, Failure> {
    let limit = cx.limit(Duration::from_secs(3));
    let mut last = String::new();
    for attempt in 1..=PATH_ATTEMPTS {
        let port = if attempt == PATH_ATTEMPTS { SSH_PORT } else { QUIET_PORT };
        match tokio::time::timeout(limit, guest.tcp_answered(&address.to_string(), port)).await {
            Ok(Ok(())) => return Ok(attempt),
            Ok(Err(error)) => last = error.to_string(),
            Err(_) => last = format!("no answer from {address} within {limit:.0?}"),
        }
    }
    Err(Failure::new(Blame::Usage, words).on(guest.node()).because(last).hint(
        "compare the VLAN membership in plan.json with what the guests use: a tagged frame of a VLAN that is not on the trunk is dropped",
    ))
}

/// How long to wait for what is to happen in a guest, so that what is missing can be named before the phase's deadline: on a
/// busy host a round of looks takes far longer than the pause in it.
fn in_guest(limit: Duration) -> Duration {
    limit.saturating_sub((limit / 5).max(Duration::from_secs(5)))
}

/// Waits in the guest until everything is there, with cheap looks at files, and says what is missing otherwise. A round
/// starts a program or two: each costs an emulated CPU tens of milliseconds. Addresses are what comes
/// last in a boot: the rest is looked at when they are there, and once when the time is over.
///
/// A leg of a bond without a carrier is not waited for until the deadline: a cable does not come late. Where nothing else
/// has been missing for an eighth of the time, that is the answer.
fn wait_script(node: &NodePlan, limit: Duration) -> String {
    let (mut script, mut addresses) = (String::new(), String::new());
    let mut note = String::new();
    let is_leg = |nic: &String| node.bond.as_ref().is_some_and(|bond| bond.members.contains(nic));
    let links = if node.bond.is_some() { "links=$(ip -o link show)\n" } else { "" };
    for check in &node.checks {
        if let GuestCheck::Bond { interface, mode, members } = check {
            let active = members.iter().map(|leg| format!("\"Currently Active Slave: {leg}\"")).collect::<Vec<_>>();
            script.push_str(&format!(
                "mode= leg= of= alive=; {{ while IFS= read -r is; do case $is in \
                 \"Bonding Mode: \"*\"({mode})\"*) mode=1 ;; \
                 {active}) leg=${{is##* }} ;; \
                 \"Slave Interface: \"*) of=${{is##* }} ;; \
                 \"MII Status: up\") alive=\"$alive $of \" ;; \
                 esac; done </proc/net/bonding/{interface}; }} 2>/dev/null\n",
                active = active.join("|"),
            ));
            for leg in members {
                script.push_str(&format!(
                    "case $alive in *' {leg} '*) ;; *) m=\"$m;leg {leg} of {interface} is dead: it has no carrier\" ;; esac\n"
                ));
            }
        }
        let (test, words) = match check {
            GuestCheck::Nic { interface, mac } => {
                let test = if is_leg(interface) {
                    // It wears the bond's address; its own is `permaddr`, which only `ip` tells.
                    format!(
                        "is=${{links#*\": {interface}: \"}}; case ${{is%%\"$nl\"*}} in *' {mac}'*) ;; *) false ;; esac"
                    )
                } else {
                    format!("read -r is </sys/class/net/{interface}/address && [ $is = {mac} ]")
                };
                (test, format!("{interface} with MAC {mac}"))
            }
            GuestCheck::Bond { interface, mode, members } => {
                note = format!("[ -z \"$leg\" ] || echo \"bond {interface} active on $leg\"\n");
                (
                    "[ -n \"$mode\" ] && [ -n \"$leg\" ]".to_owned(),
                    format!("{interface}: {mode} with {} active", members.join(" or ")),
                )
            }
            GuestCheck::Vlan { interface, parent, vlan } => (
                format!(
                    "vid= dev=; while IFS= read -r is; do case $is in \
                     *\"VID: {vlan}\"|*\"VID: {vlan}\"[!0-9]*) vid=1 ;; \"Device: {parent}\") dev=1 ;; \
                     esac; done </proc/net/vlan/{interface} && [ \"$vid$dev\" = 11 ]"
                ),
                format!("{interface}: VLAN {vlan} on {parent}"),
            ),
            GuestCheck::Address { interface, address, prefix } => (
                format!("case $addresses in *\": {interface}    inet {address}/{prefix} \"*) ;; *) false ;; esac"),
                format!("{interface} up with {address}/{prefix}"),
            ),
            GuestCheck::Reach { .. } => continue,
        };
        let checks = if matches!(check, GuestCheck::Address { .. }) { &mut addresses } else { &mut script };
        checks.push_str(&format!("{{ {test}; }} 2>/dev/null || {{ m=\"$m;{words}\"; other=1; }}\n"));
    }
    let seconds = in_guest(limit).as_secs().max(1);
    let patience = (seconds / 8).max(3);
    format!(
        "nl='\n'\nn=0\nread -r up _ </proc/uptime\nend=$((${{up%.*}}+{seconds}))\nsince=\nwhile :; do\nm=\nother=\nover=\n\
         read -r up _ </proc/uptime\n[ ${{up%.*}} -lt $end ] || over=1\n\
         addresses=$(ip -4 -o addr show up)\n{addresses}\
         if [ -z \"$m\" ] || [ -n \"$over\" ]; then\n{links}{script}fi\n\
         [ -z \"$m\" ] && break\n\
         if [ -z \"$other\" ]; then since=${{since:-${{up%.*}}}}; [ $((${{up%.*}}-since)) -lt {patience} ] || over=1; else since=; fi\n\
         if [ -n \"$over\" ]; then echo \"$m\" | tr ';' '\\n' | sed -n 's/^./missing &/p'; exit 1; fi\nn=$((n+1)); if [ $n -lt 20 ]; then sleep 0.1; else sleep 0.5; fi\ndone\n{note}{WHO}exit 0\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::dhcp::open_leases;
    use crate::plan::tests::plan_of;

    /// What the script says where `ip` prints this and NICs have the MACs below `sys`, and how it ends.
    fn run_script(node: &NodePlan, ip: &str, sys: &std::path::Path) -> (Option<i32>, String) {
        // The least limit: the guest has a second.
        let script = wait_script(node, Duration::from_secs(6)).replace("/sys/class/net", sys.to_str().unwrap());
        let script = format!("ip() {{ printf '%s' '{ip}'; }}\n{script}");
        let output = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap())
    }

    #[test]
    fn a_guest_says_what_is_missing_or_who_it_is() {
        let plan = plan_of("simple");
        let node = &plan.nodes[0];
        let sys = tempfile::tempdir().unwrap();
        let mut addresses = String::new();
        for check in &node.checks {
            match check {
                GuestCheck::Nic { interface, mac } => {
                    std::fs::create_dir(sys.path().join(interface)).unwrap();
                    std::fs::write(sys.path().join(interface).join("address"), format!("{mac}\n")).unwrap();
                }
                GuestCheck::Address { interface, address, prefix } => {
                    addresses.push_str(&format!("2: {interface}    inet {address}/{prefix} brd scope global\n"));
                }
                _ => {}
            }
        }
        let (code, said) = run_script(node, &addresses, sys.path());
        assert_eq!(code, Some(0), "{said}");
        assert!(said.contains("\naddr eth1 192.168.1.1/24\n") && said.starts_with("hostname "), "{said}");
        // All is named, though the rest is not looked at before the addresses are there.
        std::fs::write(sys.path().join("eth1/address"), "52:54:00:00:00:01\n").unwrap();
        let (code, said) = run_script(node, "", sys.path());
        assert_eq!(code, Some(1), "{said}");
        assert!(said.contains("missing eth1 up with 192.168.1.1/24\n"), "{said}");
        assert!(said.contains(&format!("missing eth1 with MAC {}\n", node.nics[0].mac)), "{said}");
    }

    /// The switch drops what a node asks: the wait ends by itself, and says where the question should have arrived.
    #[tokio::test(start_paused = true)]
    async fn a_lease_that_never_comes_is_named_with_what_was_seen_of_it() {
        let plan = plan_of("dhcp-simple");
        let (_book, leases) = open_leases(&plan.dhcp[0]);
        let failure = leased(&plan.nodes[1], &[leases], Duration::from_secs(60)).await.unwrap_err();
        assert_eq!(
            failure.one_line(),
            "server-2 got no lease on network cluster: its DISCOVER was never seen on switch access port 3"
        );
        assert_eq!(failure.blame, Blame::Usage);
        // A node that has its addresses by itself waits for nothing.
        let none = leased(&plan_of("simple").nodes[1], &[], Duration::ZERO).await.unwrap();
        assert!(none.is_empty());
    }
}
