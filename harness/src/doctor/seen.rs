//! What can be seen of this machine. Asks, measures, and judges nothing.

use std::os::unix::fs::MetadataExt as _;
use std::time::{Duration, Instant};

use camino::{Utf8Path, Utf8PathBuf};
use images::k3s::K3sSource;
use images::tool::{ToolError, ToolRunner};
use kvm::{AccelChoice, AccelReport, Calibration, HostFacts, Supervisor};
use nix::unistd::AccessFlags;
use serde::Serialize;

use super::tools::{self, ToolSeen};
use crate::lab::OwnedTools;
use crate::lab::ledger::{Entry, Ledger};
use crate::plan::{Inputs, Paths, plan};
use crate::record::Folders;
use crate::scenario::{list_scenarios, load};

/// How long reading the ledger of labs may take.
const LEDGER_DEADLINE: Duration = Duration::from_secs(5);

/// Everything that was seen.
#[derive(Debug, Clone, Serialize)]
pub struct Seen {
    /// Whether root asks.
    pub root: bool,
    /// The user's name.
    pub user: String,
    /// The kernel, as `uname -r` says it.
    pub kernel: String,
    /// The programs a run and an image build start.
    pub tools: Vec<ToolSeen>,
    /// How guests are run here.
    pub accel: AccelSeen,
    /// What entering the namespaces of an image build came to; `None` means it works.
    pub containment_fault: Option<String>,
    /// What the system says of user namespaces.
    pub namespaces: UserNamespaces,
    /// Cores, memory, load.
    pub host: HostFacts,
    /// The labs that live on this machine.
    pub labs: Vec<Entry>,
    /// Why that could not be found out.
    pub labs_fault: Option<String>,
    /// The folders the harness works in.
    pub folders: Vec<FolderSeen>,
    /// The length of a lab's socket folder in bytes, against the most a socket's path can have.
    pub socket_folder_bytes: usize,
    /// How many usable images are in the store.
    pub images: usize,
    /// What the scenarios ask for.
    pub needs: Vec<Need>,
    /// The stand-in's file.
    pub standin: Option<Utf8PathBuf>,
    /// Why there is no stand-in.
    pub standin_fault: Option<String>,
    /// Whether somebody named a stand-in.
    pub standin_named: bool,
}

/// How guests are run here.
#[derive(Debug, Clone, Serialize)]
pub struct AccelSeen {
    /// What trying KVM showed, and what follows.
    pub report: Option<AccelReport>,
    /// Why nothing could be said.
    pub report_fault: Option<String>,
    /// `/dev/kvm`.
    pub device: KvmDevice,
    /// How fast guests run.
    pub calibration: Option<Calibration>,
    /// Why that could not be measured.
    pub calibration_fault: Option<String>,
}

/// `/dev/kvm`, as this user meets it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum KvmDevice {
    /// It is not there.
    Absent,
    /// It is there and this user may not use it.
    Forbidden,
    /// It is there for this user to use.
    Accessible,
}

/// What the system says of user namespaces.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct UserNamespaces {
    /// `user.max_user_namespaces`; 0 forbids them.
    pub max: Option<u64>,
    /// `kernel.unprivileged_userns_clone` (Debian's and Ubuntu's kernels); 0 forbids them.
    pub clone: Option<u64>,
    /// `kernel.apparmor_restrict_unprivileged_userns` (Ubuntu's kernels); 1 makes them useless.
    pub apparmor_restricts: Option<u64>,
    /// Whether `/etc/subuid` and `/etc/subgid` give this user subordinate ids.
    pub subordinate_ids: bool,
}

/// A folder the harness works in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FolderSeen {
    /// What is kept there.
    pub holds: &'static str,
    /// What chooses another one.
    pub chosen_by: &'static str,
    /// The folder.
    pub path: Utf8PathBuf,
    /// The folder itself, or what of its path is there already.
    pub looked_at: Utf8PathBuf,
    /// The name of its file system.
    pub file_system: String,
    /// Why it cannot be written to.
    pub write_fault: Option<String>,
    /// Why its file system does not do, or does not complete a sync.
    pub file_system_fault: Option<String>,
    /// How long a sync took.
    pub sync_ms: Option<u64>,
    /// Free space for this user.
    pub free_mib: Option<u64>,
    /// Whether virtual disks are written there.
    pub disks: bool,
}

/// What a scenario asks for on this machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Need {
    /// The scenario.
    pub scenario: String,
    /// How many nodes it has.
    pub nodes: usize,
    /// vCPUs over all nodes.
    pub vcpus: u32,
    /// Memory over all nodes.
    pub memory_mib: u64,
    /// Why there is no plan for it.
    pub fault: Option<String>,
}

/// Looks at this machine: some seconds, none of it without a deadline. Changes nothing.
///
/// # Errors
/// Where no process can be started at all.
pub async fn look(folders: &Folders, base: &Utf8Path) -> Result<Seen, kvm::Error> {
    let supervisor = Supervisor::new()?;
    let runner = OwnedTools::new(supervisor.clone());
    let root = nix::unistd::geteuid().is_root();
    let user = user_name();
    // Alone, so that nothing else of ours slows the guest whose speed is measured.
    let accel = accel(&supervisor).await;
    let needed = tools::needed(root);
    let tools = futures::future::join_all(needed.into_iter().map(|tool| tools::find(tool, &runner))).await;
    let containment_fault = containment(&runner).await.err();
    let host = kvm::host_facts();
    let labs = Ledger::host_wide().living_within(LEDGER_DEADLINE).await;
    let folders_seen = folders_seen(folders, &runner).await;
    let needs = needs(base, &host, &accel, folders);
    let (standin, standin_fault) = match K3sSource::Standin.resolve() {
        Ok(binary) => (Some(binary.path), None),
        Err(error) => (None, Some(error.to_string())),
    };
    let seen = Seen {
        root,
        kernel: read_line("/proc/sys/kernel/osrelease").unwrap_or_default(),
        namespaces: namespaces(&user),
        user,
        tools,
        accel,
        containment_fault,
        host,
        labs_fault: labs.as_ref().err().map(|error| crate::error::chain_of(error).join(": ")),
        labs: labs.unwrap_or_default(),
        folders: folders_seen,
        socket_folder_bytes: folders.runtime.join("abcdef").as_str().len(),
        images: images_in_store(&folders.cache),
        needs,
        standin,
        standin_fault,
        standin_named: std::env::var(images::k3s::STANDIN_ENV).is_ok_and(|path| !path.is_empty()),
    };
    for survivor in supervisor.shutdown(Duration::from_secs(2)).await {
        tracing::error!(%survivor, "a tool is left behind");
    }
    Ok(seen)
}

async fn accel(supervisor: &Supervisor) -> AccelSeen {
    let device = Utf8Path::new("/dev/kvm");
    let device = if !device.exists() {
        KvmDevice::Absent
    } else if nix::unistd::access(device.as_std_path(), AccessFlags::R_OK | AccessFlags::W_OK).is_err() {
        KvmDevice::Forbidden
    } else {
        KvmDevice::Accessible
    };
    let report = kvm::resolve(AccelChoice::Auto).await;
    let calibration = match &report {
        Ok(report) => kvm::calibrate(report.accel, supervisor).await.map_err(|error| error.to_string()),
        Err(_) => Err("there is no acceleration to measure".to_owned()),
    };
    let report = report.map_err(|error| error.to_string());
    AccelSeen {
        device,
        report_fault: report.as_ref().err().cloned(),
        report: report.ok(),
        calibration_fault: calibration.as_ref().err().cloned(),
        calibration: calibration.ok(),
    }
}

async fn containment(runner: &dyn ToolRunner) -> Result<(), String> {
    let scratch = tempfile::tempdir().map_err(|error| format!("no folder to try it in: {error}"))?;
    let path = Utf8Path::from_path(scratch.path()).ok_or("the folder for temporary files has no UTF-8 name")?;
    match runner.run(images::contain::probe_command(path)).await {
        Ok(exit) if exit.success() => Ok(()),
        Ok(exit) => Err(format!("unshare {exit}: {}", exit.output_tail.trim())),
        Err(ToolError::DeadlineExceeded { deadline, .. }) => {
            Err(format!("unshare was not done after {} s", deadline.as_secs()))
        }
        Err(error) => Err(error.to_string()),
    }
}

fn namespaces(user: &str) -> UserNamespaces {
    let number = |path: &str| read_line(path)?.parse().ok();
    let uid = nix::unistd::getuid().to_string();
    let has_ids = |path: &str| {
        std::fs::read_to_string(path).is_ok_and(|text| {
            text.lines().filter_map(|line| line.split(':').next()).any(|owner| owner == user || owner == uid)
        })
    };
    UserNamespaces {
        max: number("/proc/sys/user/max_user_namespaces"),
        clone: number("/proc/sys/kernel/unprivileged_userns_clone"),
        apparmor_restricts: number("/proc/sys/kernel/apparmor_restrict_unprivileged_userns"),
        subordinate_ids: has_ids("/etc/subuid") && has_ids("/etc/subgid"),
    }
}

fn user_name() -> String {
    let uid = nix::unistd::getuid();
    nix::unistd::User::from_uid(uid).ok().flatten().map_or_else(|| uid.to_string(), |user| user.name)
}

fn read_line(path: &str) -> Option<String> {
    Some(std::fs::read_to_string(path).ok()?.trim().to_owned())
}

async fn folders_seen(folders: &Folders, runner: &dyn ToolRunner) -> Vec<FolderSeen> {
    let three = [
        ("records and labs", "--state-dir", &folders.state, true),
        ("images", "--cache-dir", &folders.cache, true),
        ("sockets", "XDG_RUNTIME_DIR", &folders.runtime, false),
    ];
    // A file system that hangs should hang once, not once per folder.
    let mut synced: Vec<(u64, Result<u64, String>)> = Vec::new();
    let mut seen = Vec::new();
    for (holds, chosen_by, path, disks) in three {
        let looked_at = existing(path);
        let device = std::fs::metadata(&looked_at).map(|meta| meta.dev()).ok();
        let known = synced.iter().find(|(known, _)| Some(*known) == device).map(|(_, result)| result.clone());
        let result = match known {
            Some(result) => result,
            None => {
                let began = Instant::now();
                let probed = images::fs::probe_folder(&looked_at, runner).await.map_err(|error| error.to_string());
                probed.map(|()| u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX))
            }
        };
        if let Some(device) = device {
            synced.push((device, result.clone()));
        }
        let writable = nix::unistd::access(looked_at.as_std_path(), AccessFlags::W_OK | AccessFlags::X_OK);
        let stat = nix::sys::statvfs::statvfs(looked_at.as_std_path()).ok();
        seen.push(FolderSeen {
            holds,
            chosen_by,
            path: path.clone(),
            file_system: file_system(&looked_at),
            write_fault: writable.err().map(|errno| errno.desc().to_owned()),
            sync_ms: result.as_ref().ok().copied(),
            file_system_fault: result.err(),
            free_mib: stat.map(|stat| stat.blocks_available() * stat.fragment_size() / (1024 * 1024)),
            looked_at,
            disks,
        });
    }
    seen
}

/// The folder, or the nearest one above it that is there.
fn existing(path: &Utf8Path) -> Utf8PathBuf {
    path.ancestors().find(|folder| folder.is_dir()).unwrap_or(Utf8Path::new("/")).to_owned()
}

fn file_system(path: &Utf8Path) -> String {
    use nix::sys::statfs;
    let Ok(found) = statfs::statfs(path.as_std_path()) else { return "unknown".to_owned() };
    match found.filesystem_type() {
        statfs::EXT4_SUPER_MAGIC => "ext2/3/4".to_owned(),
        statfs::XFS_SUPER_MAGIC => "xfs".to_owned(),
        statfs::BTRFS_SUPER_MAGIC => "btrfs".to_owned(),
        statfs::TMPFS_MAGIC => "tmpfs".to_owned(),
        statfs::OVERLAYFS_SUPER_MAGIC => "overlay".to_owned(),
        statfs::NFS_SUPER_MAGIC => "nfs".to_owned(),
        // linux/magic.h, V9FS_MAGIC.
        statfs::FsType(0x0102_1997) => "9p".to_owned(),
        other => format!("type {:#x}", other.0),
    }
}

/// Usable images, without making a store where there is none.
fn images_in_store(cache: &Utf8Path) -> usize {
    let folder = cache.join("images");
    if !folder.is_dir() {
        return 0;
    }
    let listed = images::Store::open(&folder).and_then(|store| store.list());
    listed.map_or(0, |listed| listed.iter().filter(|image| image.fault.is_none()).count())
}

/// What every scenario would ask for here, as its plan has it.
fn needs(base: &Utf8Path, host: &HostFacts, accel: &AccelSeen, folders: &Folders) -> Vec<Need> {
    let calibration = accel.calibration.unwrap_or_else(|| Calibration::assumed(kvm::Accel::Tcg));
    let paths = Paths {
        disks: folders.state.join("labs/abcdef"),
        sockets: folders.runtime.join("abcdef"),
        ..Paths::placeholders()
    };
    let valid = list_scenarios(base).into_iter().filter(|listed| listed.valid);
    let need = |name: String| {
        let none =
            |fault: String| Need { scenario: name.clone(), nodes: 0, vcpus: 0, memory_mib: 0, fault: Some(fault) };
        let loaded = match load(&name, base) {
            Ok(loaded) => loaded,
            Err(error) => return none(error.to_string()),
        };
        let inputs = Inputs {
            lab: "abcdef".to_owned(),
            k3s: loaded.scenario.k3s.to_string(),
            host: host.clone(),
            calibration,
            paths: paths.clone(),
        };
        match plan(&loaded.scenario, &loaded.profile, &inputs) {
            Err(error) => none(error.to_string()),
            Ok(plan) => Need {
                scenario: name.clone(),
                nodes: plan.nodes.len(),
                vcpus: plan.oversubscription.vcpus,
                memory_mib: plan.nodes.iter().map(|node| u64::from(node.memory_mib)).sum(),
                fault: None,
            },
        }
    };
    valid.map(|listed| need(listed.name)).collect()
}
