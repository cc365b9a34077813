//! Judgements on figures of other machines, and how they read.

use camino::Utf8PathBuf;
use jiff::Timestamp;
use kvm::{Accel, AccelChoice, AccelReport, Calibration, HostFacts, KvmProbe};

use super::*;
use crate::cli::doctor::render;
use crate::lab::ledger::{Claim, Entry};

fn tool(name: &'static str, package: &'static str, purpose: Purpose, version: Option<&str>) -> ToolSeen {
    ToolSeen {
        tool: Tool { name, package, purpose },
        path: Some(format!("/usr/bin/{name}").into()),
        version: version.map(str::to_owned),
        fault: None,
    }
}

fn folder(holds: &'static str, chosen_by: &'static str, path: &str, disks: bool) -> FolderSeen {
    FolderSeen {
        holds,
        chosen_by,
        path: path.into(),
        looked_at: path.into(),
        file_system: "ext2/3/4".to_owned(),
        write_fault: None,
        file_system_fault: None,
        sync_ms: Some(12),
        free_mib: Some(63_000),
        disks,
    }
}

fn need(scenario: &str, nodes: usize, vcpus: u32, memory_mib: u64) -> Need {
    Need { scenario: scenario.to_owned(), nodes, vcpus, memory_mib, fault: None }
}

/// A machine with everything.
fn good() -> Seen {
    let probe = KvmProbe {
        usable: true,
        reason: "a guest loop of 1000000 iterations took 0.90 ms (1111.1 million a second; at least 10 are needed)"
            .to_owned(),
        api_version: Some(12),
        loop_iterations: 1_000_000,
        loop_elapsed_us: Some(900),
    };
    Seen {
        root: false,
        user: "ada".to_owned(),
        kernel: "6.1.0-18-amd64".to_owned(),
        tools: vec![
            tool("qemu-system-x86_64", "qemu-system-x86", Purpose::Run, Some("QEMU emulator version 7.2.22")),
            tool("qemu-img", "qemu-utils", Purpose::Run, Some("qemu-img version 7.2.22")),
            tool("vde_switch", "vde2", Purpose::Run, Some("VDE 2.3.2")),
            tool("vde_plug", "vde2", Purpose::Run, None),
            tool("sync", "coreutils", Purpose::Run, Some("sync (GNU coreutils) 9.1")),
            tool("unshare", "util-linux", Purpose::Build, Some("unshare from util-linux 2.38.1")),
            tool("mmdebstrap", "mmdebstrap", Purpose::Build, Some("mmdebstrap 1.3.5")),
            tool("newuidmap", "uidmap", Purpose::Build, None),
        ],
        accel: AccelSeen {
            report: Some(AccelReport {
                accel: Accel::Kvm,
                choice: AccelChoice::Auto,
                reason: format!("KVM is usable: {}", probe.reason),
                kvm: probe,
            }),
            report_fault: None,
            device: KvmDevice::Accessible,
            calibration: Some(Calibration {
                accel: Accel::Kvm,
                iterations_per_s: 350e6,
                slowdown: 1.0,
                measured: true,
            }),
            calibration_fault: None,
        },
        containment_fault: None,
        namespaces: UserNamespaces {
            max: Some(96_000),
            clone: Some(1),
            apparmor_restricts: None,
            subordinate_ids: true,
        },
        host: HostFacts {
            cores: 8,
            memory_total_mib: 32_000,
            memory_available_mib: 28_000,
            load_1m: 0.42,
            cpu_pressure_some_avg10: Some(1.5),
        },
        labs: Vec::new(),
        labs_fault: None,
        folders: vec![
            folder("records and labs", "--state-dir", "/home/ada/.local/state/harness", true),
            folder("images", "--cache-dir", "/home/ada/.cache/harness", true),
            folder("sockets", "XDG_RUNTIME_DIR", "/run/user/1000/harness", false),
        ],
        socket_folder_bytes: "/run/user/1000/harness/abcdef".len(),
        images: 1,
        needs: vec![need("smoke", 1, 2, 2048), need("bonding-vlans", 2, 4, 4096)],
        standin: None,
        standin_fault: Some("the k3s stand-in is not at /usr/bin/k3s-standin".to_owned()),
        standin_named: false,
    }
}

/// A CI runner as the field has them, on a bad day.
fn bad() -> Seen {
    let mut seen = good();
    for tool in &mut seen.tools {
        if matches!(tool.tool.name, "vde_switch" | "vde_plug" | "newuidmap") {
            (tool.path, tool.version) = (None, None);
        }
    }
    seen.tools[1].version = None;
    seen.tools[1].fault = Some("`qemu-img --version` exited 127: error while loading shared libraries".to_owned());
    let report = seen.accel.report.as_mut().unwrap();
    report.accel = Accel::Tcg;
    report.kvm.usable = false;
    report.kvm.reason = "/dev/kvm cannot be opened: Permission denied (os error 13)".to_owned();
    seen.accel.device = KvmDevice::Forbidden;
    seen.accel.calibration =
        Some(Calibration { accel: Accel::Tcg, iterations_per_s: 70e6, slowdown: 5.0, measured: true });
    seen.containment_fault = Some("unshare exited 1: unshare: failed to execute newuidmap\n".to_owned());
    seen.images = 0;
    seen.host = HostFacts {
        cores: 2,
        memory_total_mib: 7_000,
        memory_available_mib: 3_000,
        load_1m: 5.0,
        cpu_pressure_some_avg10: Some(61.0),
    };
    seen.labs = vec![Entry {
        claim: Claim { lab: "k3v9xa".to_owned(), scenario: "vlans".to_owned(), vcpus: 2, memory_mib: 4096 },
        admitted: true,
        pid: 4242,
        since: Timestamp::UNIX_EPOCH,
        memory_used_mib: Some(1000),
        user: None,
    }];
    seen.folders[0].free_mib = Some(1_500);
    seen.folders[1].file_system = "9p".to_owned();
    (seen.folders[1].sync_ms, seen.folders[1].file_system_fault) = (
        None,
        Some("/mnt/c/cache lies on 9p (as a WSL drvfs or a shared folder), where syncfs can hang for good".to_owned()),
    );
    seen.socket_folder_bytes = 80;
    seen.standin_named = true;
    seen
}

fn level(diagnosis: &Diagnosis, name: &str) -> Level {
    diagnosis.findings.iter().find(|finding| finding.name == name).unwrap().level
}

#[test]
fn a_good_machine_reads_well() {
    let diagnosis = diagnose(good());
    assert!(diagnosis.run_possible && diagnosis.count(Level::Warning) == 0);
    insta::assert_snapshot!(render(&diagnosis));
}

#[test]
fn a_bad_machine_reads_well_and_every_fault_has_what_mends_it() {
    let diagnosis = diagnose(bad());
    assert!(!diagnosis.run_possible);
    for finding in diagnosis.findings.iter().filter(|finding| finding.level != Level::Ok) {
        assert!(finding.means.is_some() && finding.mend.is_some(), "{finding:?}");
    }
    insta::assert_snapshot!(render(&diagnosis));
}

#[test]
fn warnings_alone_leave_a_run_possible() {
    let mut seen = good();
    seen.host.cpu_pressure_some_avg10 = Some(90.0);
    seen.accel.report.as_mut().unwrap().kvm.usable = false;
    seen.folders[0].sync_ms = Some(9_000);
    let diagnosis = diagnose(seen);
    assert!(diagnosis.run_possible);
    assert_eq!(diagnosis.count(Level::Warning), 3);
    assert_eq!(diagnosis.mend, Vec::<String>::new());
}

#[test]
fn an_image_in_the_store_makes_build_tools_a_warning() {
    let without = |images| {
        let mut seen = good();
        seen.images = images;
        seen.tools[6].path = None;
        diagnose(seen)
    };
    assert_eq!(level(&without(0), "mmdebstrap"), Level::Problem);
    assert_eq!(level(&without(1), "mmdebstrap"), Level::Warning);
    assert_eq!(without(0).mend, ["sudo apt-get install mmdebstrap"]);
}

#[test]
fn each_reason_against_user_namespaces_has_its_own_remedy() {
    let with = |change: fn(&mut Seen)| {
        let mut seen = good();
        seen.containment_fault = Some("unshare exited 1: Operation not permitted".to_owned());
        change(&mut seen);
        let diagnosis = diagnose(seen);
        let finding = diagnosis.findings.iter().find(|finding| finding.name == "namespaces").unwrap().clone();
        finding.mend.unwrap()
    };
    assert!(with(|seen| seen.namespaces.max = Some(0)).contains("user.max_user_namespaces"));
    assert!(with(|seen| seen.namespaces.clone = Some(0)).contains("unprivileged_userns_clone=1"));
    assert!(with(|seen| seen.namespaces.subordinate_ids = false).contains("--add-subuids"));
    assert!(with(|seen| seen.namespaces.apparmor_restricts = Some(1)).contains("apparmor_restrict"));
    assert!(with(|seen| seen.tools.retain(|tool| tool.tool.name != "newuidmap")).contains("uidmap"));
    assert!(with(|seen| seen.root = true).contains("SYS_ADMIN"));
}

#[test]
fn memory_is_judged_by_what_scenarios_ask_for() {
    let with = |available| {
        let mut seen = good();
        seen.host.memory_available_mib = available;
        level(&diagnose(seen), "memory")
    };
    assert_eq!(
        [with(4096), with(4095), with(2048), with(2047)],
        [Level::Ok, Level::Warning, Level::Warning, Level::Problem]
    );
    // Not known is no reason to refuse.
    assert_eq!(with(0), Level::Ok);
}

#[test]
fn the_json_form_has_what_a_script_needs() {
    let value = serde_json::to_value(diagnose(bad())).unwrap();
    assert_eq!(value["run_possible"], false);
    assert_eq!(value["findings"][0]["area"], "run-tools");
    assert_eq!(value["findings"][1]["level"], "problem");
    assert_eq!(value["figures"]["host"]["cores"], 2);
    assert_eq!(value["mend"][0], "sudo apt-get install uidmap vde2");
    let path: Utf8PathBuf = serde_json::from_value(value["figures"]["folders"][0]["path"].clone()).unwrap();
    assert!(path.is_absolute());
}
