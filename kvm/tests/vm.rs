//! Real QEMU, with guests of a few instructions.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails there and then")]

use std::time::{Duration, Instant};

use camino::{Utf8Path, Utf8PathBuf};
use kvm::{
    Accel, DiskFormat, DiskSpec, Error, Mac, NicBackend, NicSpec, PortSpec, Supervisor, Switch, SwitchSpec, Vm,
    VmEvent, VmSpec,
};
use serde_json::Value;
use tokio::sync::broadcast::Receiver;
use tokio::time::timeout;

const GRACE: Duration = Duration::from_secs(10);

/// A kernel in Linux's boot protocol (Linux, `Documentation/arch/x86/boot.rst`), old version 2.00, all of it in the real-mode part: what stands at offset 0x200 runs in 16-bit mode.
fn kernel(code: &[u8]) -> Vec<u8> {
    let mut image = vec![0u8; 0x2000];
    image[0x1f1] = 4; // setup sectors
    image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    image[0x200..0x202].copy_from_slice(&[0xeb, 0x3e]); // jmp over the header to 0x240
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x0200u16.to_le_bytes());
    image[0x211] = 1; // loaded high
    image[0x214..0x218].copy_from_slice(&0x0010_0000u32.to_le_bytes());
    image[0x240..0x240 + code.len()].copy_from_slice(code);
    image
}

/// Writes "ok\n" to the first serial port.
const SAY_OK: &[u8] = &[0xba, 0xf8, 0x03, 0xb0, b'o', 0xee, 0xb0, b'k', 0xee, 0xb0, b'\n', 0xee];
/// Writes `x` to the first serial port, for ever.
const FLOOD: &[u8] = &[0xba, 0xf8, 0x03, 0xb0, b'x', 0xee, 0xeb, 0xfd];
/// `sti; l: hlt; jmp l`
const IDLE: &[u8] = &[0xfb, 0xf4, 0xeb, 0xfd];
/// Reset by port 0xcf9 (reset control register of the chipset), once: a byte of CMOS that no one uses, 0x7f, remembers.
const RESET_ONCE: &[u8] = &[
    0xb0, 0x7f, 0xe6, 0x70, // mov al, 0x7f; out 0x70, al
    0xe4, 0x71, // in al, 0x71
    0x3c, 0x5a, // cmp al, 0x5a
    0x74, 0x11, // je on
    0xb0, 0x7f, 0xe6, 0x70, // mov al, 0x7f; out 0x70, al
    0xb0, 0x5a, 0xe6, 0x71, // mov al, 0x5a; out 0x71, al
    0xba, 0xf9, 0x0c, // mov dx, 0xcf9
    0xb0, 0x06, 0xee, // mov al, 6; out dx, al
    0xf4, 0xeb, 0xfd, // w: hlt; jmp w (the reset comes a little later)
];
/// Tells pvpanic, at its ISA port 0x505, of a panic (QEMU, `docs/specs/pvpanic.txt`: bit 0).
const PANIC: &[u8] = &[0xba, 0x05, 0x05, 0xb0, 0x01, 0xee];

fn temp() -> (tempfile::TempDir, Utf8PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = Utf8PathBuf::from_path_buf(dir.path().to_owned()).unwrap();
    (dir, path)
}

fn spec(dir: &Utf8Path, code: &[&[u8]]) -> VmSpec {
    let (kernel_path, initrd) = (dir.join("kernel"), dir.join("initrd"));
    std::fs::write(&kernel_path, kernel(&code.concat())).unwrap();
    std::fs::write(&initrd, [0; 512]).unwrap();
    std::fs::write(dir.join("a,b.raw"), vec![0; 1 << 20]).unwrap();
    VmSpec {
        name: "guest,1".into(),
        accel: Accel::Tcg,
        vcpus: 1,
        memory_mib: 64,
        kernel: kernel_path,
        initrd,
        cmdline: "a=1,2 b".into(),
        disks: vec![DiskSpec {
            path: dir.join("a,b.raw"),
            format: DiskFormat::Raw,
            read_only: true,
            serial: "seed".into(),
        }],
        nics: vec![NicSpec {
            id: "mgmt".into(),
            mac: Mac::derive("t", "n", "eth0"),
            backend: NicBackend::User { ssh_forward: true },
            unplugged: false,
        }],
        console_log: dir.join("console,1.log"),
        qmp_socket: dir.join("q,mp"),
        stderr_log: dir.join("stderr"),
    }
}

async fn until(events: &mut Receiver<VmEvent>, wanted: impl Fn(&VmEvent) -> bool) -> VmEvent {
    timeout(GRACE, async {
        loop {
            let event = events.recv().await.unwrap();
            if wanted(&event) {
                return event;
            }
        }
    })
    .await
    .unwrap()
}

#[tokio::test]
async fn a_guest_runs_and_what_happens_to_it_is_seen() {
    let (_dir, dir) = temp();
    let sup = Supervisor::new().unwrap();
    let switch_spec = SwitchSpec {
        name: "sw".into(),
        socket_dir: dir.join("s,w"),
        mgmt_socket: dir.join("sw.mgmt"),
        ports: vec![PortSpec { port: 3, label: "eth1".into(), native_vlan: None, tagged_vlans: vec![200] }],
    };
    let switch = Switch::start(switch_spec, &sup).await.unwrap();
    let mut spec = spec(&dir, &[SAY_OK, RESET_ONCE, PANIC, IDLE]);
    spec.nics.push(NicSpec {
        id: "eth1".into(),
        mac: Mac::derive("t", "n", "eth1"),
        backend: NicBackend::Vde { socket_dir: dir.join("s,w"), port: 3 },
        unplugged: true,
    });
    let begin = Instant::now();
    let vm = Vm::start(spec, &sup).await.unwrap();
    println!("QMP after {:?}", begin.elapsed());
    let mut events = vm.events();
    assert_eq!(switch.plugged(3).await.unwrap(), [vm.pid()]);
    let port = vm.ssh_port().await.unwrap();
    assert!(port > 0);
    tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap();

    let reset = until(&mut events, |event| matches!(event, VmEvent::Reset { .. })).await;
    println!("reset by the guest after {:?}", begin.elapsed());
    assert_eq!(reset, VmEvent::Reset { guest: true, reason: "guest-reset".into() });
    let panicked = until(&mut events, |event| matches!(event, VmEvent::GuestPanicked { .. })).await;
    assert!(matches!(panicked, VmEvent::GuestPanicked { detail } if detail["action"] == "pause"));
    until(&mut events, |event| *event == VmEvent::Stop).await;
    assert_eq!(std::fs::read_to_string(dir.join("console,1.log")).unwrap(), "ok\nok\n", "the console of both boots");

    let exit = vm.stop(GRACE).await.unwrap();
    assert!(exit.exit.success(), "{exit}");
    until(&mut events, |event| *event == VmEvent::Shutdown { guest: false, reason: "host-qmp-quit".into() }).await;
    assert_eq!(until(&mut events, |event| matches!(event, VmEvent::Exited(_))).await, VmEvent::Exited(exit.clone()));
    assert_eq!(vm.stop(GRACE).await.unwrap(), exit, "of one that has ended, tells how");
    assert!(matches!(vm.ssh_port().await, Err(Error::VmExited(_))));
    assert!(sup.shutdown(GRACE).await.is_empty());
}

#[tokio::test]
async fn stop_resume_and_a_guest_deaf_to_the_power_button() {
    let (_dir, dir) = temp();
    let sup = Supervisor::new().unwrap();
    let mut without_nics = spec(&dir, &[IDLE]);
    without_nics.nics.clear();
    let vm = Vm::start(without_nics, &sup).await.unwrap();
    let mut events = vm.events();
    vm.execute("stop", Value::Null).await.unwrap();
    until(&mut events, |event| *event == VmEvent::Stop).await;
    vm.execute("cont", Value::Null).await.unwrap();
    until(&mut events, |event| *event == VmEvent::Resume).await;
    assert!(matches!(vm.ssh_port().await, Err(Error::NoSshForward { .. })));
    assert!(vm.power_off(Duration::from_millis(200)).await.unwrap().exit.success());
    until(&mut events, |event| matches!(event, VmEvent::Other { name, .. } if name == "POWERDOWN")).await;
}

#[tokio::test]
async fn a_console_that_floods_is_unplugged_and_the_guest_runs_on() {
    let (_dir, dir) = temp();
    let sup = Supervisor::new().unwrap();
    let spec = spec(&dir, &[FLOOD]);
    let console = spec.console_log.clone();
    let vm = Vm::start(spec, &sup).await.unwrap();
    let bytes = || std::fs::metadata(&console).map_or(0, |meta| meta.len());
    timeout(GRACE, async {
        while bytes() < 10_000 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .expect("no flood");
    vm.unplug_console().await.unwrap();
    let at_most = bytes();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(bytes(), at_most, "the console is still written");
    let status = vm.execute("query-status", Value::Null).await.unwrap();
    assert_eq!(status["running"], true, "{status}");
    assert!(vm.stop(GRACE).await.unwrap().exit.success());
}

#[tokio::test]
async fn a_killed_qemu_is_an_event_and_dropping_a_vm_ends_it() {
    let (_dir, dir) = temp();
    let sup = Supervisor::new().unwrap();
    let vm = Vm::start(spec(&dir, &[IDLE]), &sup).await.unwrap();
    let mut events = vm.events();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(vm.pid() as i32), nix::sys::signal::Signal::SIGKILL).unwrap();
    let exited = until(&mut events, |event| matches!(event, VmEvent::Exited(_))).await;
    assert!(
        matches!(&exited, VmEvent::Exited(exit) if exit.exit.signal == Some(9) && exit.to_string() == "QEMU killed by signal 9")
    );
    drop(vm);
    // On the same paths again: what the killed one left is no obstacle.
    let vm = Vm::start(spec(&dir, &[IDLE]), &sup).await.unwrap();
    let refused = Vm::start(spec(&dir, &[IDLE]), &sup).await.unwrap_err();
    assert!(matches!(refused, Error::Io { .. }), "{refused}");
    drop(vm);
    timeout(GRACE, async {
        while !sup.running().is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn a_qemu_that_will_not_start_says_why() {
    let (_dir, dir) = temp();
    let sup = Supervisor::new().unwrap();
    let mut missing = spec(&dir, &[IDLE]);
    missing.kernel = dir.join("nowhere");
    let error = Vm::start(missing, &sup).await.unwrap_err().to_string();
    assert!(
        error.starts_with("QEMU exited 1: qemu: could not open kernel file '") && error.contains("nowhere"),
        "{error}"
    );
    assert!(std::fs::read_to_string(dir.join("stderr")).unwrap().contains("could not open kernel file"));
    let mut no_switch = spec(&dir, &[IDLE]);
    no_switch.nics = vec![NicSpec {
        id: "eth1".into(),
        mac: Mac::derive("t", "n", "e"),
        backend: NicBackend::Vde { socket_dir: dir.join("none"), port: 1 },
        unplugged: false,
    }];
    let error = Vm::start(no_switch, &sup).await.unwrap_err().to_string();
    assert!(error.starts_with("QEMU exited 1: "), "{error}");
    let mut long = spec(&dir, &[IDLE]);
    long.qmp_socket = format!("/{}", "x".repeat(107)).into();
    assert!(matches!(Vm::start(long, &sup).await, Err(Error::Spec(_))));
    assert!(sup.running().is_empty());
}
