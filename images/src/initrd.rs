//! A small initrd of our own: the drivers of the guest's disks, a static busybox and one script.

use std::collections::BTreeSet;

use crate::cpio::Archive;
use crate::guest::{EARLY_NETWORK_PATH, ROOT_SERIAL, SEED_FAILED_MARK, SEED_ID_PATH, SEED_OK_MARK, SEED_SERIAL};

/// Modules every guest needs before its root is mounted. The network and the random source come along: they are
/// virtio too, and a device that is there before udev starts is one udev need not load a module for.
const MODULES: &[&str] = &["virtio_pci", "virtio_blk", "ext4", "virtio_net", "virtio_rng"];

/// Modules that are loaded where the kernel has them. With the first, QEMU is told of a panic, whatever becomes of the
/// console; udev would not load it, as it is asked for disks and network links alone.
const OPTIONAL: &[&str] = &["pvpanic_mmio"];

/// Modules followed through dependencies, at most.
const MAX_MODULES: usize = 64;

/// What the script uses of busybox.
const APPLETS: &[&str] = &["sh", "mount", "insmod", "tar", "rm", "ifconfig", "sleep", "switch_root", "poweroff"];

/// The kernel's modules as its own lists describe them.
#[derive(Debug)]
pub(crate) struct ModuleLists<'a> {
    /// `modules.dep`: `path: dependency paths…`, what is needed first standing last.
    pub(crate) dep: &'a str,
    /// `modules.builtin`: paths of what is part of the kernel itself.
    pub(crate) builtin: &'a str,
}

impl ModuleLists<'_> {
    /// The files to load, in this order, for [`MODULES`]. `Err` is the name of a module the kernel does not have.
    pub(crate) fn load_order(&self) -> Result<Vec<String>, String> {
        let mut order: Vec<String> = Vec::new();
        let mut seen = BTreeSet::new();
        let optional = OPTIONAL.iter().filter(|wanted| self.dep.lines().any(|line| is_module(line, wanted)));
        for wanted in MODULES.iter().chain(optional) {
            if self.builtin.lines().any(|path| module_name(path) == *wanted) {
                continue;
            }
            let entry = self.dep.lines().find_map(|line| {
                let (path, needs) = line.split_once(':')?;
                (module_name(path) == *wanted).then_some((path, needs))
            });
            let (path, needs) = entry.ok_or_else(|| (*wanted).to_owned())?;
            // depmod lists all dependencies, those of dependencies too, each before what it needs itself.
            for path in needs.split_whitespace().rev().chain(std::iter::once(path)) {
                if seen.insert(path.to_owned()) && order.len() < MAX_MODULES {
                    order.push(path.to_owned());
                }
            }
        }
        Ok(order)
    }
}

/// Whether a line of `modules.dep` is this module's.
fn is_module(line: &str, name: &str) -> bool {
    line.split_once(':').is_some_and(|(path, _)| module_name(path) == name)
}

/// A module's name is its file's, with `-` and `_` being the same, whatever it is compressed with.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

/// Builds the initrd. It is not compressed: what the emulated CPU would take to unpack it is more than what it saves.
pub(crate) fn build(busybox: &[u8], modules: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut archive = Archive::default();
    for folder in ["bin", "dev", "proc", "sys", "root", "modules"] {
        archive.folder(folder);
    }
    archive.file("bin/busybox", 0o755, busybox);
    for applet in APPLETS {
        archive.link(&format!("bin/{applet}"), "busybox");
    }
    let mut files = Vec::new();
    for (index, (path, content)) in modules.iter().enumerate() {
        let file = format!("modules/{index:02}-{}", path.rsplit('/').next().unwrap_or(path));
        archive.file(&file, 0o644, content);
        files.push(format!("/{file}"));
    }
    archive.file("init", 0o755, script(&files).as_bytes());
    archive.finish()
}

/// The script the kernel runs first.
///
/// A guest whose seed does not lie over its root must not come up looking like another node: it says why on the console
/// and turns itself off.
pub(crate) fn script(modules: &[String]) -> String {
    let load: String = modules.iter().map(|path| format!("insmod {path} || fail \"{path} does not load\"\n")).collect();
    format!(
        r#"#!/bin/sh
export PATH=/bin
fail() {{
    echo "{SEED_FAILED_MARK}$*"
    poweroff -f
    # Where turning off takes a moment, nothing else may happen meanwhile.
    while :; do sleep 60; done
}}
mount -t devtmpfs none /dev
exec </dev/console >/dev/console 2>&1
mount -t proc none /proc
mount -t sysfs none /sys
{load}
find_disk() {{
    for entry in /sys/block/vd*; do
        serial=
        [ -f "$entry/serial" ] && read -r serial <"$entry/serial"
        [ "$serial" = "$1" ] && disk=/dev/${{entry##*/}} && return 0
    done
    return 1
}}
wait_disk() {{
    tries=0
    until find_disk "$1"; do
        tries=$((tries + 1))
        [ $tries -lt 200 ] || fail "no disk with serial $1"
        sleep 0.05
    done
}}
wait_disk {ROOT_SERIAL}
root=$disk
wait_disk {SEED_SERIAL}
seed=$disk
why=$(mount -t ext4 -o rw,noatime "$root" /root 2>&1) || fail "the root does not mount: $why"
# An earlier boot's mark must not stand for this one's.
rm -f /root{SEED_ID_PATH}
why=$(tar -x -f "$seed" -C /root 2>&1) || fail "the seed does not unpack: $why"
id=
[ -f /root{SEED_ID_PATH} ] && read -r id </root{SEED_ID_PATH}
[ -n "$id" ] || fail "the seed holds no identifier"
echo "{SEED_OK_MARK}$id"
# Seconds before systemd-networkd, which finds the address it would have set: who connects is answered from now on, by a
# refusal as long as sshd does not listen. Without it, the interface comes up later and nothing else changes.
if [ -f /root{EARLY_NETWORK_PATH} ] && read -r dev mac address mask </root{EARLY_NETWORK_PATH}; then
    is=
    [ -f "/sys/class/net/$dev/address" ] && read -r is <"/sys/class/net/$dev/address"
    [ "$is" = "$mac" ] && ifconfig "$dev" "$address" netmask "$mask" up
fi
mount --move /dev /root/dev
mount --move /proc /root/proc
mount --move /sys /root/sys
exec switch_root /root /lib/systemd/systemd
"#
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEP: &str = "kernel/drivers/virtio/virtio.ko: kernel/drivers/virtio/virtio_ring.ko\n\
        kernel/drivers/virtio/virtio_ring.ko:\n\
        kernel/drivers/virtio/virtio_pci.ko: kernel/drivers/virtio/virtio.ko kernel/drivers/virtio/virtio_ring.ko\n\
        kernel/drivers/char/hw_random/virtio-rng.ko: kernel/drivers/virtio/virtio.ko kernel/drivers/virtio/virtio_ring.ko\n\
        kernel/drivers/net/virtio_net.ko.xz: kernel/net/core/failover.ko kernel/drivers/virtio/virtio.ko kernel/drivers/virtio/virtio_ring.ko\n\
        kernel/drivers/block/virtio_blk.ko: kernel/drivers/virtio/virtio.ko kernel/drivers/virtio/virtio_ring.ko\n";

    #[test]
    fn dependencies_come_first_and_once() {
        let lists = ModuleLists { dep: DEP, builtin: "kernel/fs/ext4/ext4.ko\n" };
        let order = lists.load_order().unwrap();
        let names: Vec<String> = order.iter().map(|path| module_name(path)).collect();
        assert_eq!(
            names,
            ["virtio_ring", "virtio", "virtio_pci", "virtio_blk", "failover", "virtio_net", "virtio_rng"]
        );
    }

    #[test]
    fn what_tells_qemu_of_a_panic_is_loaded_where_there_is_such_a_module() {
        let dep = format!("{DEP}kernel/drivers/misc/pvpanic/pvpanic-mmio.ko: kernel/drivers/misc/pvpanic/pvpanic.ko\n");
        let lists = ModuleLists { dep: &dep, builtin: "kernel/fs/ext4/ext4.ko\n" };
        let order = lists.load_order().unwrap();
        assert_eq!(order.last().map(|path| module_name(path)).as_deref(), Some("pvpanic_mmio"), "{order:?}");
    }

    #[test]
    fn a_kernel_without_a_module_is_named() {
        let lists = ModuleLists { dep: DEP, builtin: "" };
        assert_eq!(lists.load_order(), Err("ext4".to_owned()));
    }

    #[test]
    fn the_script_is_valid_shell_and_loads_in_order() {
        let script = script(&["/modules/00-a.ko".to_owned(), "/modules/01-b.ko".to_owned()]);
        let a = script.find("insmod /modules/00-a.ko").unwrap();
        let b = script.find("insmod /modules/01-b.ko").unwrap();
        assert!(a < b);
        assert!(script.contains("echo \"harness-seed: ok $id\""), "{script}");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("init");
        std::fs::write(&path, &script).unwrap();
        let checked = std::process::Command::new("sh").arg("-n").arg(&path).output().unwrap();
        assert!(checked.status.success(), "{checked:?}");
    }
}
