//! A VM as plain data, and the QEMU command line that follows from it: pure, so that a plan can print it and a test can pin it without any VM.

use std::collections::HashSet;

use camino::Utf8PathBuf;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::accel::Accel;
use crate::mac::Mac;
use crate::{UNIX_PATH_MAX_BYTES, socket_path_fits};

/// The program every VM runs in.
pub const QEMU: &str = "qemu-system-x86_64";

/// The longest virtio-blk serial (`VIRTIO_BLK_ID_BYTES` of the virtio specification, section 5.2).
pub const DISK_SERIAL_MAX_BYTES: usize = 20;

/// Everything QEMU is told about one VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// The node's name; also QEMU's `-name`.
    pub name: String,
    /// How guest code is run.
    pub accel: Accel,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Guest memory.
    pub memory_mib: u32,
    /// The kernel to boot directly.
    #[schemars(with = "String")]
    pub kernel: Utf8PathBuf,
    /// Its initial RAM file system.
    #[schemars(with = "String")]
    pub initrd: Utf8PathBuf,
    /// Its command line.
    pub cmdline: String,
    /// Disks; the guest tells them apart by serial, never by order.
    pub disks: Vec<DiskSpec>,
    /// Network interfaces; the guest tells them apart by MAC, never by order.
    pub nics: Vec<NicSpec>,
    /// Where the serial console is appended to.
    #[schemars(with = "String")]
    pub console_log: Utf8PathBuf,
    /// Where QEMU listens for QMP (at most 107 bytes).
    #[schemars(with = "String")]
    pub qmp_socket: Utf8PathBuf,
    /// Where QEMU's standard error is copied to.
    #[schemars(with = "String")]
    pub stderr_log: Utf8PathBuf,
}

/// One virtio disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskSpec {
    /// The image file.
    #[schemars(with = "String")]
    pub path: Utf8PathBuf,
    /// Its format; never guessed, since a raw disk's first bytes belong to the guest.
    pub format: DiskFormat,
    /// Whether the guest may not write to it.
    pub read_only: bool,
    /// The serial the guest finds it by (`/dev/disk/by-id/virtio-SERIAL`): 1 to 20 letters, digits, `-` or `_`.
    pub serial: String,
}

/// The format of an image file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    /// The disk's bytes as they are.
    Raw,
    /// QEMU's copy-on-write format, here used for overlays.
    Qcow2,
}

impl DiskFormat {
    /// QEMU's name for it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// One virtio network interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NicSpec {
    /// QEMU's id for it, unique in the VM: a letter, then letters, digits, `-`, `_` or `.`.
    pub id: String,
    /// Its address.
    pub mac: Mac,
    /// What it is plugged into.
    pub backend: NicBackend,
    /// Whether its cable is pulled: the guest sees an interface without a carrier, from the start.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unplugged: bool,
}

/// What a NIC is plugged into.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum NicBackend {
    /// QEMU's own user-mode network, cut off from the outside (`restrict=on`).
    User {
        /// Whether a port of the host's 127.0.0.1, chosen by QEMU, leads to the guest's port 22.
        ssh_forward: bool,
    },
    /// A numbered port of a VDE switch.
    Vde {
        /// The switch's socket directory.
        #[schemars(with = "String")]
        socket_dir: Utf8PathBuf,
        /// The port, from 1.
        port: u16,
    },
}

/// What is wrong with a [`VmSpec`].
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SpecError {
    /// A number that QEMU would refuse or a guest could not live with.
    #[error("{field} = {value} is out of range ({min} to {max})")]
    OutOfRange {
        /// The field's name.
        field: &'static str,
        /// What it holds.
        value: u64,
        /// The smallest it may be.
        min: u64,
        /// The largest it may be.
        max: u64,
    },
    /// A name with characters that QEMU or the guest would not take.
    #[error("{field} {value:?} is not a usable name")]
    BadName {
        /// The field's name.
        field: &'static str,
        /// What it holds.
        value: String,
    },
    /// Two disks or NICs that could not be told apart.
    #[error("{field} {value:?} is used twice")]
    Duplicate {
        /// The field's name.
        field: &'static str,
        /// What both hold.
        value: String,
    },
    /// A unix socket's path that the kernel would not take.
    #[error("socket path is {bytes} bytes, at most {UNIX_PATH_MAX_BYTES} fit: {path}")]
    SocketPathTooLong {
        /// The path.
        path: Utf8PathBuf,
        /// Its length.
        bytes: usize,
    },
}

impl VmSpec {
    /// Checks what QEMU would only refuse at start, or would accept and get wrong.
    ///
    /// # Errors
    /// The first thing found to be wrong.
    pub fn validate(&self) -> Result<(), SpecError> {
        in_range("vcpus", u64::from(self.vcpus), 1, 255)?;
        in_range("memory_mib", u64::from(self.memory_mib), 32, 1 << 20)?;
        if self.name.is_empty() || self.name.contains(|c: char| c.is_control()) {
            return Err(SpecError::BadName { field: "name", value: self.name.clone() });
        }
        let mut serials = HashSet::new();
        for disk in &self.disks {
            let ok = (1..=DISK_SERIAL_MAX_BYTES).contains(&disk.serial.len())
                && disk.serial.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
            if !ok {
                return Err(SpecError::BadName { field: "disk serial", value: disk.serial.clone() });
            }
            if !serials.insert(&disk.serial) {
                return Err(SpecError::Duplicate { field: "disk serial", value: disk.serial.clone() });
            }
        }
        let (mut ids, mut macs) = (HashSet::new(), HashSet::new());
        for nic in &self.nics {
            let ok = nic.id.starts_with(|c: char| c.is_ascii_alphabetic())
                && nic.id.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
            if !ok {
                return Err(SpecError::BadName { field: "NIC id", value: nic.id.clone() });
            }
            if !ids.insert(&nic.id) {
                return Err(SpecError::Duplicate { field: "NIC id", value: nic.id.clone() });
            }
            if !macs.insert(nic.mac) {
                return Err(SpecError::Duplicate { field: "MAC address", value: nic.mac.to_string() });
            }
        }
        socket_path_fits(&self.qmp_socket)
    }
}

fn in_range(field: &'static str, value: u64, min: u64, max: u64) -> Result<(), SpecError> {
    if (min..=max).contains(&value) { Ok(()) } else { Err(SpecError::OutOfRange { field, value, min, max }) }
}

/// A value inside a QEMU option: a comma would end it, so it is doubled (QEMU's `qemu-options` syntax).
fn escape(value: &str) -> String {
    value.replace(',', ",,")
}

/// The command line of the VM, program first.
///
/// Choices that are not obvious from the data:
/// - `q35` with the devices no node needs left out (`-nodefaults`, no USB, SMBus or SATA, no option ROMs): less to emulate and to probe.
/// - `-msg timestamp=on` puts the host's time before what QEMU says on its standard error.
/// - No `-no-reboot`: a guest that reboots shows as a RESET event and boots again, with its console appended to; with the option QEMU would end instead.
/// - `-action panic=pause` with a `pvpanic` device: a panicked guest is held as it is, and GUEST_PANICKED tells.
/// - `cache=unsafe` drops only the host's fsync: what the guest flushed is in the host's page cache and outlives QEMU's death, and lab disks need not outlive the host's.
#[must_use]
pub fn argv(spec: &VmSpec) -> Vec<String> {
    let mut args = Args(vec![QEMU.to_owned()]);
    args.pair("-name", escape(&spec.name));
    args.0.extend(["-nodefaults", "-no-user-config"].map(String::from));
    args.pair("-msg", "timestamp=on");
    args.pair("-display", "none");
    args.pair("-machine", "q35,usb=off,smbus=off,sata=off,vmport=off");
    let (accel, cpu) = match spec.accel {
        Accel::Tcg => ("tcg,thread=multi", "max"),
        Accel::Kvm => ("kvm", "host"),
    };
    args.pair("-accel", accel);
    args.pair("-cpu", cpu);
    args.pair("-smp", spec.vcpus.to_string());
    args.pair("-m", format!("{}M", spec.memory_mib));
    args.pair("-kernel", spec.kernel.as_str());
    args.pair("-initrd", spec.initrd.as_str());
    args.pair("-append", spec.cmdline.as_str());
    for disk in &spec.disks {
        let read_only = if disk.read_only { ",read-only=on" } else { "" };
        args.pair(
            "-drive",
            format!(
                "if=none,id=disk-{serial},format={format},cache=unsafe{read_only},file={file}",
                serial = disk.serial,
                format = disk.format.as_str(),
                file = escape(disk.path.as_str()),
            ),
        );
        args.pair("-device", format!("virtio-blk-pci,drive=disk-{serial},serial={serial}", serial = disk.serial));
    }
    for nic in &spec.nics {
        let id = &nic.id;
        let netdev = match &nic.backend {
            NicBackend::User { ssh_forward } => {
                let forward = if *ssh_forward { ",hostfwd=tcp:127.0.0.1:0-:22" } else { "" };
                format!("user,id={id},restrict=on{forward}")
            }
            NicBackend::Vde { socket_dir, port } => {
                format!("vde,id={id},sock={},port={port}", escape(socket_dir.as_str()))
            }
        };
        args.pair("-netdev", netdev);
        args.pair("-device", format!("virtio-net-pci,id={},netdev={id},mac={},romfile=", device_id(id), nic.mac));
    }
    args.pair("-object", "rng-random,id=rng0,filename=/dev/urandom");
    args.pair("-device", "virtio-rng-pci,rng=rng0");
    args.pair("-device", "pvpanic");
    args.pair("-action", "panic=pause");
    args.pair("-chardev", format!("file,id=console,append=on,path={}", escape(spec.console_log.as_str())));
    args.pair("-serial", "chardev:console");
    args.pair("-qmp", format!("unix:{},server=on,wait=off", escape(spec.qmp_socket.as_str())));
    args.0
}

/// QEMU's name for the NIC's guest-side half; the NIC's own id is the other half's.
pub(crate) fn device_id(nic: &str) -> String {
    format!("nic-{nic}")
}

struct Args(Vec<String>);

impl Args {
    fn pair(&mut self, option: &str, value: impl Into<String>) {
        self.0.push(option.to_owned());
        self.0.push(value.into());
    }
}
