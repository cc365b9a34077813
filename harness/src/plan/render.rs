//! The plan as a page a person can read.

use std::fmt::Write as _;

use images::airgap::GUEST_IMAGES_DIR;
use kvm::PortSpec;

use super::model::{GuestCheck, NodePlan, PhasePlan, PhaseScope, Plan};
use crate::scenario::{Outcome, Role};

/// Widest line the page tries to keep to, in characters.
const WIDTH: usize = 110;

impl Plan {
    /// What `harness plan NAME` prints, with a final newline.
    #[must_use]
    pub fn render_text(&self) -> String {
        let mut page = Page(String::new());
        self.head(&mut page);
        self.network(&mut page);
        self.dhcp(&mut page);
        for node in &self.nodes {
            node.render(&mut page);
        }
        self.phases(&mut page);
        page.0
    }

    fn head(&self, page: &mut Page) {
        page.line(0, &format!("plan of scenario {}: {}", self.scenario, self.description));
        page.blank();
        page.field("profile", &self.profile);
        page.field("k3s", &self.k3s);
        if !self.airgap_images.is_none() {
            page.field("air-gap images", &format!("{} in {GUEST_IMAGES_DIR}", self.airgap_images));
        }
        page.field("image", &self.image);
        page.field("lab", &self.lab);
        let expect = match (self.expect.outcome, self.expect.phase) {
            (Outcome::Pass, _) => "pass".to_owned(),
            (Outcome::Failure, None) => "failure".to_owned(),
            (Outcome::Failure, Some(phase)) => format!("failure in phase {phase}"),
        };
        page.field("expected", &expect);
        let host = &self.host;
        let known = if host.measured { "measured" } else { "assumed" };
        page.field(
            "host",
            &format!(
                "{} cores, {} MiB of {} MiB memory to be had",
                host.cores, host.memory_available_mib, host.memory_total_mib
            ),
        );
        page.field(
            "guests run",
            &format!("under {}, {:.1} times slower than hardware KVM ({known})", host.accel, host.slowdown),
        );
        let over = &self.oversubscription;
        page.field("vCPUs", &format!("{} on {} cores, {:.1} per core", over.vcpus, over.cores, over.ratio));
        for warning in &self.warnings {
            page.field("WARNING", warning);
        }
    }

    fn network(&self, page: &mut Page) {
        page.title("switches");
        let width =
            self.switches.iter().flat_map(|switch| &switch.ports).map(|port| port.label.len()).max().unwrap_or(0);
        for switch in &self.switches {
            page.line(1, &format!("{}  ({})", switch.name, switch.socket_dir));
            for port in &switch.ports {
                page.line(2, &format!("port {:<2}  {:width$}  {}", port.port, port.label, membership(port)));
            }
        }
        for link in &self.links {
            page.line(1, &format!("{} port {} = {} port {}", link.a.switch, link.a.port, link.b.switch, link.b.port));
        }
    }

    fn dhcp(&self, page: &mut Page) {
        if self.dhcp.is_empty() {
            return;
        }
        page.title("DHCP servers, the harness's own");
        for server in &self.dhcp {
            let at = format!("{}/{} at {}", server.address, server.prefix, server.mac);
            let port = format!("switch {} port {}", server.switch, server.port);
            page.line(1, &format!("network {}: {at}, {port}, leases of {} s", server.network, server.lease_s));
            let width = server.reservations.iter().map(|held| held.node.len()).max().unwrap_or(0);
            for held in &server.reservations {
                page.line(2, &format!("{:width$}  {}  gets {}", held.node, held.mac, held.address));
            }
        }
    }

    fn phases(&self, page: &mut Page) {
        page.title("phases");
        let of = |plan: &PhasePlan| match (plan.scope, plan.nodes.as_slice()) {
            (_, []) => "nothing to do".to_owned(),
            (PhaseScope::Lab, _) => "the lab".to_owned(),
            (PhaseScope::EachNode, nodes) if nodes.len() > 1 && nodes.len() == self.nodes.len() => {
                "each node, all at once".to_owned()
            }
            (PhaseScope::EachNode, [one]) => one.clone(),
            (PhaseScope::EachNode, nodes) => format!("{}, all at once", nodes.join(", ")),
            (PhaseScope::OneByOne, [one]) => one.clone(),
            (PhaseScope::OneByOne, nodes) => format!("{}, one by one", nodes.join(", ")),
        };
        let of: Vec<String> = self.phases.iter().map(of).collect();
        let width = of.iter().map(String::len).max().unwrap_or(0);
        page.line(1, &format!("{:<10} {:>9}  {:width$}  {:>9}  scaled by", "phase", "deadline", "for", "base"));
        for (plan, of) in self.phases.iter().zip(of) {
            let (deadline, base) = if plan.nodes.is_empty() {
                ("-".to_owned(), "-".to_owned())
            } else {
                (duration(plan.deadline_ms), duration(plan.base_ms))
            };
            page.line(1, &format!("{:<10} {deadline:>9}  {of:width$}  {base:>9}  {}", plan.phase, plan.scaled_by));
        }
    }
}

impl NodePlan {
    fn render(&self, page: &mut Page) {
        page.title(&format!(
            "{}: {}, node {}, {} vCPU, {} MiB",
            self.name, self.role, self.index, self.vcpus, self.memory_mib
        ));
        let mgmt = &self.mgmt;
        let row = |page: &mut Page, name: &str, what: &str| page.line(1, &format!("{name:<10} {what}"));
        let dev =
            |page: &mut Page, name: &str, mac: String, what: String| row(page, name, &format!("{mac:<18} {what}"));
        dev(
            page,
            &mgmt.interface,
            mgmt.mac.to_string(),
            format!("{}/{} by {}, management (SSH)", mgmt.address, mgmt.prefix, mgmt.gateway),
        );
        for nic in &self.nics {
            let bond = self.bond.iter().find(|bond| bond.members.contains(&nic.name));
            let bond = bond.map(|bond| format!(", leg of {}", bond.name)).unwrap_or_default();
            dev(page, &nic.name, nic.mac.to_string(), format!("{} port {}{bond}", nic.switch, nic.port));
        }
        if let Some(bond) = &self.bond {
            let what = format!(
                "{} over {}, primary {}, miimon {} ms",
                bond.mode,
                bond.members.join(" "),
                bond.primary,
                bond.miimon_ms
            );
            dev(page, &bond.name, bond.mac.to_string(), what);
        }
        for address in &self.addresses {
            let vlan = address.vlan.map(|vlan| format!("VLAN {vlan}")).unwrap_or_else(|| "untagged".to_owned());
            let cluster = if address.address == self.cluster_ip { ", cluster address" } else { "" };
            let by = if address.by.is_static() { "" } else { " by DHCP" };
            let what = format!("{}/{}{by}, network {}{cluster}", address.address, address.prefix, address.network);
            dev(page, &address.interface, vlan, what);
        }
        page.blank();
        let command = match self.role {
            Role::Server => "k3s server",
            Role::Agent => "k3s agent",
        };
        page.line(1, &format!("{}: {command}", self.k3s_unit));
        page.wrapped(3, &grouped(&self.k3s_args));
        page.blank();
        page.line(1, "must hold in the guest before k3s starts");
        for check in &self.checks {
            page.line(3, &describe(check));
        }
        page.blank();
        if let Some((program, args)) = self.argv.split_first() {
            page.line(1, program);
            page.wrapped(3, &grouped(args));
        }
    }
}

fn membership(port: &PortSpec) -> String {
    let tagged = match port.tagged_vlans.as_slice() {
        [] => "no VLAN tagged".to_owned(),
        vlans => format!("tagged {}", vlans.iter().map(u16::to_string).collect::<Vec<_>>().join(" ")),
    };
    match port.native_vlan {
        Some(0) => format!("{tagged}, untagged passes"),
        Some(vlan) => format!("{tagged}, untagged is VLAN {vlan}"),
        None => format!("{tagged}, untagged dropped"),
    }
}

fn describe(check: &GuestCheck) -> String {
    match check {
        GuestCheck::Nic { interface, mac } => format!("{interface} is {mac}"),
        GuestCheck::Bond { interface, mode, members } => {
            format!("{interface} is up in {mode}, with {}, one of them active", members.join(" and "))
        }
        GuestCheck::Vlan { interface, parent, vlan } => format!("{interface} carries VLAN {vlan} on {parent}"),
        GuestCheck::Address { interface, address, prefix } => format!("{interface} is up with {address}/{prefix}"),
        GuestCheck::Reach { network, interface, node, address } => {
            format!("{node} answers at {address} by {interface} (network {network})")
        }
    }
}

/// Options with their values: a word that starts with `-` opens a group.
fn grouped(args: &[String]) -> Vec<String> {
    let mut groups: Vec<String> = Vec::new();
    for arg in args {
        let quoted = quote(arg);
        match groups.last_mut() {
            Some(group) if !arg.starts_with('-') => {
                group.push(' ');
                group.push_str(&quoted);
            }
            _ => groups.push(quoted),
        }
    }
    groups
}

/// As a shell would have to be given it.
fn quote(arg: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=+:,./@%${}".contains(c);
    if !arg.is_empty() && arg.chars().all(plain) { arg.to_owned() } else { format!("'{}'", arg.replace('\'', r"'\''")) }
}

/// `4 m 54 s`, `15 s`, `1.5 s`.
fn duration(ms: u64) -> String {
    let (minutes, rest) = (ms / 60_000, ms % 60_000);
    let seconds = if rest % 1000 == 0 {
        format!("{} s", rest / 1000)
    } else {
        format!("{}.{} s", rest / 1000, rest % 1000 / 100)
    };
    match (minutes, rest) {
        (0, _) => seconds,
        (_, 0) => format!("{minutes} m"),
        _ => format!("{minutes} m {seconds}"),
    }
}

struct Page(String);

impl Page {
    fn line(&mut self, indent: usize, text: &str) {
        let line = format!("{}{text}", "  ".repeat(indent));
        // Writing to a String cannot fail.
        let _ = writeln!(self.0, "{}", line.trim_end());
    }

    fn blank(&mut self) {
        self.0.push('\n');
    }

    fn title(&mut self, text: &str) {
        self.blank();
        self.line(0, text);
    }

    fn field(&mut self, name: &str, value: &str) {
        self.line(1, &format!("{name:<10} {value}"));
    }

    /// Groups in as few lines as fit; a group is never broken.
    fn wrapped(&mut self, indent: usize, groups: &[String]) {
        let mut line = String::new();
        for group in groups {
            if !line.is_empty() && indent * 2 + line.chars().count() + 2 + group.chars().count() > WIDTH {
                self.line(indent, &line);
                line.clear();
            }
            if !line.is_empty() {
                line.push_str("  ");
            }
            line.push_str(group);
        }
        if !line.is_empty() {
            self.line(indent, &line);
        }
    }
}
