//! What was seen, judged. Pure.

use super::{Area, Diagnosis, Finding, FolderSeen, KvmDevice, Level, Purpose, SCHEMA_VERSION, Seen, ToolSeen};
use crate::formation::preflight::DISK_MIB_PER_NODE;

/// Share of time in which some task waited for a CPU, in percent, above which a run is disturbed by what else runs.
const CPU_PRESSURE_HIGH: f64 = 40.0;

/// A sync that takes longer than this means that virtual disks wait for the host's.
const SYNC_SLOW_MS: u64 = 3_000;

/// What an image build needs besides the image itself, which takes some 400 MiB: root file system, scratch.
const BUILD_DISK_MIB: u64 = 3_072;

/// What a lab's longest socket name may take (a switch's folder and what vde2 adds to it).
const SOCKET_NAME_BYTES: usize = 40;

/// How much slower than the reference a guest may be before it is worth a warning under KVM.
const KVM_SLOWDOWN_HIGH: f64 = 3.0;

/// Judges what was seen.
#[must_use]
pub fn diagnose(seen: Seen) -> Diagnosis {
    let mut findings: Vec<Finding> = seen.tools.iter().map(|tool| tool_finding(tool, &seen)).collect();
    findings.push(containment(&seen));
    findings.extend(guests(&seen));
    findings.extend(host(&seen));
    findings.extend(seen.folders.iter().map(|folder| folder_finding(folder, &seen)));
    findings.push(socket_names(&seen));
    findings.push(k3s(&seen));
    findings.sort_by_key(|finding| finding.area);
    let run_possible = findings.iter().all(|finding| finding.level != Level::Problem);
    Diagnosis { schema_version: SCHEMA_VERSION, run_possible, mend: mends(&findings, &seen), findings, figures: seen }
}

/// How bad it is where images cannot be built: those in the store can still be run.
fn build_level(seen: &Seen) -> (Level, String) {
    if seen.images > 0 {
        (
            Level::Warning,
            format!("no image can be built; runs on the images in the store ({}) are possible", seen.images),
        )
    } else {
        (Level::Problem, "no image can be built, and the store has none".to_owned())
    }
}

fn sudo(seen: &Seen, command: &str) -> String {
    if seen.root { command.to_owned() } else { format!("sudo {command}") }
}

fn install(seen: &Seen, packages: &str) -> String {
    sudo(seen, &format!("apt-get install {packages}"))
}

fn tool_finding(tool: &ToolSeen, seen: &Seen) -> Finding {
    let (area, (level, means)) = match tool.tool.purpose {
        Purpose::Run => (Area::RunTools, (Level::Problem, "every run needs it".to_owned())),
        Purpose::Build => (Area::BuildTools, build_level(seen)),
    };
    let mend = install(seen, tool.tool.package);
    let Some(path) = &tool.path else {
        let mut finding = Finding::ok(area, tool.tool.name, "not on this machine").bad(level, means, mend);
        finding.package = Some(tool.tool.package.to_owned());
        return finding;
    };
    match (&tool.fault, &tool.version) {
        (Some(fault), _) => Finding::ok(area, tool.tool.name, format!("{path}: {fault}")).bad(
            level,
            "it is there and cannot be run",
            sudo(seen, &format!("apt-get install --reinstall {}", tool.tool.package)),
        ),
        (None, Some(version)) => Finding::ok(area, tool.tool.name, format!("{version} ({path})")),
        (None, None) => Finding::ok(area, tool.tool.name, path.as_str()),
    }
}

/// Whether the namespaces of an image build can be entered.
fn containment(seen: &Seen) -> Finding {
    let who = if seen.root { "as root" } else { "as an unprivileged user" };
    let (area, name) = (Area::BuildTools, "namespaces");
    let Some(fault) = &seen.containment_fault else {
        return Finding::ok(area, name, format!("images can be built {who}"));
    };
    let (level, means) = build_level(seen);
    let finding = Finding::ok(area, name, one_line(fault));
    let has = |name: &str| seen.tools.iter().any(|tool| tool.tool.name == name && tool.path.is_some());
    let mend = if !has("unshare") {
        install(seen, "util-linux")
    } else if seen.root {
        "give this root the capability SYS_ADMIN (a container: run it privileged), or build as an unprivileged user"
            .to_owned()
    } else if seen.namespaces.max == Some(0) {
        "sudo sysctl -w user.max_user_namespaces=15000".to_owned()
    } else if seen.namespaces.clone == Some(0) {
        "sudo sysctl -w kernel.unprivileged_userns_clone=1".to_owned()
    } else if !has("newuidmap") {
        install(seen, "uidmap")
    } else if !seen.namespaces.subordinate_ids {
        format!("sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {}", seen.user)
    } else if seen.namespaces.apparmor_restricts == Some(1) {
        "sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0".to_owned()
    } else {
        "build the image as root with the cache folder of this user (--cache-dir)".to_owned()
    };
    finding.bad(level, format!("{means} ({who})"), mend)
}

fn guests(seen: &Seen) -> Vec<Finding> {
    let accel = &seen.accel;
    let kvm = match &accel.report {
        Some(report) if report.kvm.usable => Finding::ok(Area::Guests, "KVM", format!("usable: {}", report.kvm.reason)),
        other => {
            let reason = other.as_ref().map(|report| report.kvm.reason.as_str());
            let reason = reason.or(accel.report_fault.as_deref()).unwrap_or("not known");
            let mend = match accel.device {
                KvmDevice::Absent => {
                    "modprobe kvm_intel (or kvm_amd); on a real machine switch on virtualisation in its firmware, \
                     on a virtual one nested virtualisation"
                }
                KvmDevice::Forbidden => "sudo usermod -aG kvm $USER, and log in again",
                KvmDevice::Accessible => {
                    "nothing on this machine: take one with hardware virtualisation, or with nested virtualisation in \
                     hardware (this one emulates its guests' guests)"
                }
            };
            Finding::ok(Area::Guests, "KVM", format!("not usable: {reason}"))
                .warning("guests are emulated (TCG); every deadline is lengthened to suit", mend)
        }
    };
    let speed = match (&accel.calibration, &accel.calibration_fault) {
        (Some(speed), _) => {
            let figures = format!(
                "{:.1} million loop iterations a second under {}, {:.1} times slower than hardware",
                speed.iterations_per_s / 1e6,
                speed.accel,
                speed.slowdown
            );
            let finding = Finding::ok(Area::Guests, "speed", figures);
            if speed.accel == kvm::Accel::Kvm && speed.slowdown > KVM_SLOWDOWN_HIGH {
                finding.warning(
                    "something else uses the CPUs, or the KVM of this machine is itself virtual",
                    "see what else runs: `top`; compare with --accel tcg",
                )
            } else {
                finding
            }
        }
        (None, fault) => {
            let fault = fault.as_deref().unwrap_or("not measured");
            let qemu = seen.tools.iter().find(|tool| tool.tool.name == "qemu-system-x86_64");
            let finding = Finding::ok(Area::Guests, "speed", format!("not measured: {}", one_line(fault)));
            if qemu.is_some_and(|qemu| qemu.path.is_some()) {
                finding.problem("no guest runs here, not even one of a few instructions", "see what QEMU said above")
            } else {
                finding.problem("there is no QEMU to measure it with", install(seen, "qemu-system-x86"))
            }
        }
    };
    vec![kvm, speed]
}

fn host(seen: &Seen) -> Vec<Finding> {
    let host = &seen.host;
    let planned = seen.needs.iter().filter(|need| need.fault.is_none());
    let most_vcpus = planned.clone().map(|need| need.vcpus).max().unwrap_or(1);
    let mut findings = Vec::new();

    let cores = Finding::ok(Area::Host, "cores", format!("{} (kernel {})", host.cores, seen.kernel));
    findings.push(if most_vcpus > host.cores {
        cores.warning(
            format!("the largest scenario asks for {most_vcpus} vCPUs: oversubscribed (FM-5), and etcd may lose its leader (FM-1)"),
            "a machine with more cores, or a smaller scenario",
        )
    } else {
        cores
    });

    let load = format!("load {:.2}", host.load_1m);
    findings.push(match host.cpu_pressure_some_avg10 {
        None => Finding::ok(Area::Host, "CPU pressure", format!("not told by this kernel; {load}")),
        Some(pressure) => {
            let text = format!("tasks waited for a CPU in {pressure:.0} % of the last 10 s; {load}");
            let finding = Finding::ok(Area::Host, "CPU pressure", text);
            if pressure > CPU_PRESSURE_HIGH {
                finding.warning(
                    "guests will miss their turns: slow boots, lost etcd leases (FM-1)",
                    "end what else runs: `top` or `systemd-cgtop` shows it",
                )
            } else {
                finding
            }
        }
    });
    findings.push(memory(seen));

    findings.push(if let Some(fault) = &seen.labs_fault {
        Finding::ok(Area::Host, "labs", one_line(fault)).warning(
            "a run cannot tell what other labs have taken of this machine",
            "where a lock is kept, `fuser -v` on that folder's `lock` says by whom; HARNESS_LEDGER_DIR names another folder",
        )
    } else if seen.labs.is_empty() {
        Finding::ok(Area::Host, "labs", "none lives")
    } else {
        let labs = seen.labs.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
        Finding::ok(Area::Host, "labs", labs)
    });
    findings
}

fn memory(seen: &Seen) -> Finding {
    let host = &seen.host;
    if host.memory_available_mib == 0 {
        return Finding::ok(Area::Host, "memory", "not told by this kernel");
    }
    let text = format!("{} MiB available of {} MiB", host.memory_available_mib, host.memory_total_mib);
    let finding = Finding::ok(Area::Host, "memory", text);
    let planned = seen.needs.iter().filter(|need| need.fault.is_none());
    let too_large: Vec<String> = (planned.clone())
        .filter(|need| need.memory_mib > host.memory_available_mib)
        .map(|need| format!("{} ({} MiB)", need.scenario, need.memory_mib))
        .collect();
    if too_large.is_empty() {
        return finding;
    }
    let mend = "end what else runs, or lower memory_mib in a scenario of your own";
    if too_large.len() == planned.count() {
        finding.problem("no scenario has room", mend)
    } else {
        finding.warning(format!("no room for {}", too_large.join(", ")), mend)
    }
}

fn folder_finding(folder: &FolderSeen, seen: &Seen) -> Finding {
    let free = folder.free_mib.map_or_else(String::new, |mib| format!(", {mib} MiB free"));
    let sync = folder.sync_ms.map_or_else(String::new, |ms| format!(", a sync takes {ms} ms"));
    let text = format!("{} on {}{free}{sync}", folder.path, folder.file_system);
    let finding = Finding::ok(Area::Folders, folder.holds, text);
    let choose = match folder.chosen_by {
        "XDG_RUNTIME_DIR" => "set XDG_RUNTIME_DIR to a short path on a local disk or tmpfs".to_owned(),
        flag => format!("choose a folder on a local disk with {flag}"),
    };
    if let Some(fault) = &folder.file_system_fault {
        // The probe itself is a program; where it is missing nothing was found out about the folder.
        let sync_missing = seen.tools.iter().any(|tool| tool.tool.name == "sync" && tool.path.is_none());
        if sync_missing && fault.contains("not found") {
            return finding.warning("its file system could not be tried", install(seen, "coreutils"));
        }
        return finding.problem(one_line(fault), choose);
    }
    if let Some(fault) = &folder.write_fault {
        return finding.problem(format!("{} cannot be written to: {fault}", folder.looked_at), choose);
    }
    if folder.disks
        && let Some(free_mib) = folder.free_mib
    {
        let largest = seen.needs.iter().map(|need| need.nodes).max().unwrap_or(1).max(1) as u64;
        let (least, wanted, what) = if folder.chosen_by == "--cache-dir" {
            let least = if seen.images == 0 { BUILD_DISK_MIB } else { 0 };
            (least, BUILD_DISK_MIB, "an image build".to_owned())
        } else {
            (DISK_MIB_PER_NODE, largest * DISK_MIB_PER_NODE, format!("a run of {largest} nodes"))
        };
        if free_mib < wanted {
            let means = format!("{what} may need {wanted} MiB");
            let mend = format!("free some space (`harness image gc`), or {choose}");
            return if free_mib < least { finding.problem(means, mend) } else { finding.warning(means, mend) };
        }
    }
    match folder.sync_ms {
        Some(ms) if ms > SYNC_SLOW_MS && folder.disks => finding.warning(
            "a slow disk: etcd waits for it at every write (FM-1)",
            format!("see what else writes (`iotop`), or {choose}"),
        ),
        _ => finding,
    }
}

fn socket_names(seen: &Seen) -> Finding {
    let room = kvm::UNIX_PATH_MAX_BYTES.saturating_sub(seen.socket_folder_bytes + 1);
    let text = format!("{room} of {} bytes are left for a socket's name", kvm::UNIX_PATH_MAX_BYTES);
    let finding = Finding::ok(Area::Folders, "socket paths", text);
    let mend = "set XDG_RUNTIME_DIR to a shorter path";
    let unplanned: Vec<String> = (seen.needs.iter())
        .filter_map(|need| Some(format!("{}: {}", need.scenario, one_line(need.fault.as_ref()?))))
        .collect();
    if !unplanned.is_empty() {
        let level = if unplanned.len() == seen.needs.len() { Level::Problem } else { Level::Warning };
        finding.bad(level, format!("no plan for {}", unplanned.join("; ")), mend)
    } else if room < SOCKET_NAME_BYTES {
        finding.warning("scenarios with long names of nodes or switches have no room", mend)
    } else {
        finding
    }
}

fn k3s(seen: &Seen) -> Finding {
    match (&seen.standin, &seen.standin_fault) {
        (Some(path), _) => Finding::ok(Area::K3s, "stand-in", format!("{path} (--k3s standin; NOT real k3s)")),
        (None, Some(fault)) if seen.standin_named => Finding::ok(Area::K3s, "stand-in", one_line(fault)).warning(
            "`--k3s standin` will not work; `--k3s file:/path/to/k3s` does not need it",
            format!("set {} to the stand-in's file, or unset it", images::k3s::STANDIN_ENV),
        ),
        (None, _) => Finding::ok(
            Area::K3s,
            "stand-in",
            "not here; only `--k3s standin` needs it (`ci/build` makes it), `--k3s file:/path/to/k3s` does not",
        ),
    }
}

/// What makes a run possible: all missing packages, as one command, then whatever else mends a problem.
fn mends(findings: &[Finding], seen: &Seen) -> Vec<String> {
    let mut packages: Vec<&str> = findings.iter().filter_map(|finding| finding.package.as_deref()).collect();
    packages.sort_unstable();
    packages.dedup();
    let mut all = Vec::new();
    if !packages.is_empty() {
        all.push(install(seen, &packages.join(" ")));
    }
    let others = findings.iter().filter(|finding| finding.level == Level::Problem && finding.package.is_none());
    for mend in others.filter_map(|finding| finding.mend.as_ref()) {
        let installed = mend.strip_prefix(&install(seen, "")).is_some_and(|package| packages.contains(&package));
        if !installed && !all.contains(mend) {
            all.push(mend.clone());
        }
    }
    all
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
