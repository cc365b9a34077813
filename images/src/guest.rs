//! The contract between an image and whoever boots it: names, paths and marks both sides rely on.

/// Kernel command line of every guest.
///
/// `root=` is absent on purpose: the initrd of this crate finds the root and the seed disk by their virtio serials.
/// `mitigations=off nokaslr quiet` take about a second off an emulated boot. `lsm=` leaves out the security modules nobody
/// configures in a test guest (Debian's kernel ignores `selinux=0`). `panic=-1` turns a kernel panic into a
/// reset, which the machine layer sees as an event, instead of a guest that hangs.
pub const CMDLINE: &str =
    "console=ttyS0 quiet loglevel=4 mitigations=off nokaslr panic=-1 net.ifnames=0 lsm= audit=0 nowatchdog";

/// Virtio serial of the disk that holds the root file system (an overlay on the image's raw base).
pub const ROOT_SERIAL: &str = "root";

/// Virtio serial of the read-only disk that holds the seed (a plain tar).
pub const SEED_SERIAL: &str = "seed";

/// Where the guest keeps the identifier of the image it runs, one line.
pub const IMAGE_ID_PATH: &str = "/etc/harness/image";

/// Where the guest keeps the identifier of the seed it was given, one line.
pub const SEED_ID_PATH: &str = "/etc/harness/seed";

/// Where a seed says which interface the initrd brings up before anything else runs, one line: name, MAC, IPv4 address and
/// netmask in dotted form. A seed without it leaves the network to systemd alone.
pub const EARLY_NETWORK_PATH: &str = "/etc/harness/early-network";

/// What the initrd prints on the console, followed by the seed's identifier, once the seed lies over the root.
pub const SEED_OK_MARK: &str = "harness-seed: ok ";

/// What the initrd prints on the console, followed by the reason, before it halts the guest.
pub const SEED_FAILED_MARK: &str = "harness-seed: FAILED ";

/// Where the k3s binary lives in a guest.
pub const K3S_PATH: &str = "/usr/local/bin/k3s";

/// The unit of a k3s server; installed, not enabled.
pub const SERVER_UNIT: &str = "k3s-server.service";

/// The unit of a k3s agent; installed, not enabled.
pub const AGENT_UNIT: &str = "k3s-agent.service";

/// Environment file of the server unit: `K3S_ARGS="…"`.
pub const SERVER_ENV_PATH: &str = "/etc/default/k3s-server";

/// Environment file of the agent unit: `K3S_ARGS="…"`.
pub const AGENT_ENV_PATH: &str = "/etc/default/k3s-agent";
