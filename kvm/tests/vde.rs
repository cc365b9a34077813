//! Real switches, real frames: what a trunk carries, and above all what it does not.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails there and then")]

use std::io;
use std::process::Stdio;
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use kvm::{Error, FRAME_MAX_BYTES, Link, Port, PortSpec, Supervisor, Switch, SwitchSpec};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};
use tokio::time::timeout;

const GRACE: Duration = Duration::from_secs(5);

/// How long a frame that must come may take. A frame that must not come is not waited for: a later one that must come, on the same path, shows that it was dropped.
const ARRIVES: Duration = Duration::from_secs(5);

/// A raw Ethernet end: `vde_plug` passes frames over its standard input and output, each behind its length in two bytes.
struct Plug {
    child: Child,
}

impl Plug {
    async fn new(switch: &Switch, port: u16) -> Self {
        let child = Command::new("vde_plug")
            .arg(format!("vde://{}[{port}]", switch.spec().socket_dir))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let pid = child.id().unwrap();
        timeout(ARRIVES, async {
            while !switch.plugged(port).await.unwrap().contains(&pid) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await
        .unwrap();
        Self { child }
    }

    async fn send(&mut self, frame: &[u8]) {
        let mut bytes = u16::try_from(frame.len()).unwrap().to_be_bytes().to_vec();
        bytes.extend_from_slice(frame);
        self.child.stdin.as_mut().unwrap().write_all(&bytes).await.unwrap();
    }

    async fn receive(&mut self) -> io::Result<Vec<u8>> {
        let stdout = self.child.stdout.as_mut().unwrap();
        timeout(ARRIVES, async {
            let mut length = [0; 2];
            stdout.read_exact(&mut length).await?;
            let mut frame = vec![0; usize::from(u16::from_be_bytes(length))];
            stdout.read_exact(&mut frame).await?;
            Ok(frame)
        })
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
    }
}

/// A broadcast frame of an experimental type (0x88b5, IEEE 802 local experimental), with an 802.1Q tag or without.
fn frame(vlan: Option<u16>, text: &str) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend([0x52, 0x54, 0, 0, 0, 1]);
    if let Some(vlan) = vlan {
        frame.extend([0x81, 0x00]);
        frame.extend(vlan.to_be_bytes());
    }
    frame.extend([0x88, 0xb5]);
    frame.extend(format!("{text:.<60}").bytes());
    frame
}

fn port(port: u16, native_vlan: Option<u16>, tagged: &[u16]) -> PortSpec {
    PortSpec { port, label: format!("nic {port}"), native_vlan, tagged_vlans: tagged.to_vec() }
}

fn spec(dir: &Utf8Path, name: &str, ports: Vec<PortSpec>) -> SwitchSpec {
    SwitchSpec { name: name.into(), socket_dir: dir.join(name), mgmt_socket: dir.join(format!("{name}.mgmt")), ports }
}

fn temp() -> (tempfile::TempDir, Utf8PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = Utf8PathBuf::from_path_buf(dir.path().to_owned()).unwrap();
    (dir, path)
}

#[tokio::test]
async fn a_trunk_carries_its_vlans_and_nothing_else() {
    let (_dir, dir) = temp();
    let sup = Supervisor::new().unwrap();
    // VLAN 300 exists on the switch (port 3 has it), but is not on the trunks of ports 1 and 2.
    let ports = vec![port(1, None, &[100, 200]), port(2, None, &[100, 200]), port(3, None, &[300])];
    let switch = Switch::start(spec(&dir, "sw", ports), &sup).await.unwrap();
    let (mut a, mut b, mut c) = (Plug::new(&switch, 1).await, Plug::new(&switch, 2).await, Plug::new(&switch, 3).await);

    a.send(&frame(Some(200), "two hundred")).await;
    assert_eq!(b.receive().await.unwrap(), frame(Some(200), "two hundred"));

    for dropped in [Some(300), Some(400), None, Some(0), Some(4095)] {
        a.send(&frame(dropped, "must not arrive")).await;
    }
    a.send(&frame(Some(100), "after them")).await;
    assert_eq!(
        b.receive().await.unwrap(),
        frame(Some(100), "after them"),
        "nothing of what is not on the trunk came before"
    );

    // VLAN 300 from outside, then from a member: only port 3's own VLAN ever reaches it.
    c.send(&frame(Some(300), "nobody else is in 300")).await;
    c.send(&frame(Some(200), "not on port 3")).await;
    a.send(&frame(Some(200), "the end")).await;
    assert_eq!(b.receive().await.unwrap(), frame(Some(200), "the end"));
    assert!(timeout(Duration::from_millis(200), c.receive()).await.is_err(), "port 3 got a frame of another VLAN");

    let exit = switch.stop(GRACE).await.unwrap();
    assert!(exit.exit.success(), "{exit}");
    assert!(!dir.join("sw.mgmt").exists() && !dir.join("sw").join("ctl").exists(), "sockets are left");
    assert!(sup.running().is_empty());
}

#[tokio::test]
async fn a_native_vlan_is_untagged_on_its_port_and_tagged_on_a_trunk() {
    let (_dir, dir) = temp();
    let sup = Supervisor::new().unwrap();
    let ports = vec![port(1, Some(200), &[]), port(2, None, &[200]), port(3, Some(0), &[]), port(4, Some(0), &[])];
    let switch = Switch::start(spec(&dir, "sw", ports), &sup).await.unwrap();
    let (mut access, mut trunk) = (Plug::new(&switch, 1).await, Plug::new(&switch, 2).await);
    access.send(&frame(None, "in by native")).await;
    assert_eq!(trunk.receive().await.unwrap(), frame(Some(200), "in by native"));
    trunk.send(&frame(Some(200), "out by native")).await;
    assert_eq!(access.receive().await.unwrap(), frame(None, "out by native"));
    // The default VLAN is a network of its own.
    let (mut x, mut y) = (Plug::new(&switch, 3).await, Plug::new(&switch, 4).await);
    x.send(&frame(None, "default")).await;
    assert_eq!(y.receive().await.unwrap(), frame(None, "default"));
    access.send(&frame(None, "again")).await;
    assert_eq!(
        trunk.receive().await.unwrap(),
        frame(Some(200), "again"),
        "and the default VLAN's frame did not come here"
    );
    assert!(sup.shutdown(GRACE).await.is_empty());
}

#[tokio::test]
async fn a_link_carries_the_trunk_between_switches_and_its_end_is_seen() {
    let (_dir, dir) = temp();
    let sup = Supervisor::new().unwrap();
    let ports = || vec![port(1, None, &[100, 200]), port(9, None, &[200])];
    let left = Switch::start(spec(&dir, "left", ports()), &sup).await.unwrap();
    let right = Switch::start(spec(&dir, "right", ports()), &sup).await.unwrap();
    let link = Link::connect((&left, 9), (&right, 9), &sup).await.unwrap();
    let (mut a, mut b) = (Plug::new(&left, 1).await, Plug::new(&right, 1).await);
    a.send(&frame(Some(100), "not on the link")).await;
    a.send(&frame(Some(200), "across")).await;
    assert_eq!(b.receive().await.unwrap(), frame(Some(200), "across"));
    b.send(&frame(Some(200), "and back")).await;
    assert_eq!(a.receive().await.unwrap(), frame(Some(200), "and back"));

    // One switch dies: it is an event, and so is the end of the link.
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(right.pid() as i32), nix::sys::signal::Signal::SIGKILL).unwrap();
    let died = timeout(GRACE, right.died()).await.unwrap();
    assert!(died.to_string().starts_with("switch right killed by signal 9"), "{died}");
    timeout(GRACE, link.died()).await.unwrap();
    assert!(matches!(right.command("showinfo").await, Err(Error::SwitchExited(_))));
    left.command("showinfo").await.unwrap();
    assert!(sup.shutdown(GRACE).await.is_empty());
}

/// The next frame at a port of this process.
async fn at(port: &Port) -> Vec<u8> {
    let mut frame = vec![0; FRAME_MAX_BYTES];
    let length = timeout(ARRIVES, port.receive(&mut frame)).await.unwrap().unwrap();
    frame.truncate(length);
    frame
}

#[tokio::test]
async fn this_process_is_a_port_like_any_other_and_sees_its_end() {
    let (_dir, dir) = temp();
    let sup = Supervisor::new().unwrap();
    let ports = vec![port(1, None, &[100, 200]), port(2, Some(200), &[]), port(3, Some(100), &[])];
    let switch = Switch::start(spec(&dir, "sw", ports), &sup).await.unwrap();
    let own = Port::plug(&switch, 2, "the harness").await.unwrap();
    assert_eq!(own.name(), "sw:2");
    assert_eq!(switch.plugged(2).await.unwrap(), [std::process::id()]);
    switch.verify().await.unwrap();

    // It is on the planned port: VLAN 200 without its tag, and nothing of VLAN 100.
    let mut trunk = Plug::new(&switch, 1).await;
    trunk.send(&frame(Some(100), "another VLAN")).await;
    trunk.send(&frame(Some(200), "to the harness")).await;
    assert_eq!(at(&own).await, frame(None, "to the harness"));
    own.send(&frame(None, "and back")).await.unwrap();
    assert_eq!(trunk.receive().await.unwrap(), frame(Some(200), "and back"));

    // One port is held once by this process, and is free again when it is dropped, with nothing left behind.
    let error = Port::plug(&switch, 2, "again").await.unwrap_err();
    assert!(error.to_string().starts_with("could not make the socket of a switch port"), "{error}");
    own.send(&frame(None, "still plugged in")).await.unwrap();
    assert_eq!(trunk.receive().await.unwrap(), frame(Some(200), "still plugged in"));
    drop(own);
    timeout(ARRIVES, async { while !switch.plugged(2).await.unwrap().is_empty() {} }).await.unwrap();
    let own = Port::plug(&switch, 2, "the harness").await.unwrap();
    let error = Port::plug(&switch, 9, "nobody").await.unwrap_err();
    assert!(error.to_string().contains("port 9 could not be had for nobody: it has no such port"), "{error}");

    // The switch's death ends a wait for frames at once.
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(switch.pid() as i32), nix::sys::signal::Signal::SIGKILL).unwrap();
    let mut room = [0; 64];
    let error = timeout(GRACE, own.receive(&mut room)).await.unwrap().unwrap_err();
    assert!(error.to_string().starts_with("switch port sw:2 is closed: "), "{error}");
    assert!(matches!(own.send(&[0; 64]).await, Err(Error::PortClosed { .. })));
    let error = Port::plug(&switch, 3, "too late").await.unwrap_err();
    assert!(matches!(error, Error::SwitchExited(_)), "{error}");
    drop(own);
    // The switch could not clean up after itself; this side has.
    let own = format!(".{}-", std::process::id());
    let left =
        std::fs::read_dir(dir.join("sw")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert_eq!(left.filter(|name| name.starts_with(&own)).collect::<Vec<_>>(), Vec::<String>::new());
    assert!(sup.shutdown(GRACE).await.is_empty());
}

#[tokio::test]
async fn refusals_and_failures_say_what_the_switch_said() {
    let (_dir, dir) = temp();
    let sup = Supervisor::new().unwrap();
    let switch = Switch::start(spec(&dir, "sw", vec![port(1, None, &[4093])]), &sup).await.unwrap();
    let error = switch.command("vlan/create 4094").await.unwrap_err();
    assert_eq!(error.to_string(), "switch sw refused `vlan/create 4094`: 1022 Invalid argument");
    assert!(matches!(switch.command("showinfo\nshutdown").await, Err(Error::SwitchProtocol { .. })));
    // The connection of a failed command is not used again.
    assert!(!switch.command("showinfo").await.unwrap().is_empty());
    // Somebody changes the trunk behind our back.
    switch.command("vlan/delport 4093 1").await.unwrap();
    assert!(matches!(switch.verify().await, Err(Error::SwitchMismatch { .. })));

    // A second switch on the same sockets is never taken for the first.
    let error = Switch::start(spec(&dir, "sw", vec![]), &sup).await.unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");
    let mut same_dir = spec(&dir, "sw", vec![]);
    same_dir.mgmt_socket = dir.join("other.mgmt");
    let error = Switch::start(same_dir, &sup).await.unwrap_err();
    assert!(matches!(error, Error::SwitchExited(_)), "{error}");
    // A directory that cannot be made.
    let error = Switch::start(spec(&dir.join("missing/deep"), "sw", vec![]), &sup).await.unwrap_err();
    assert!(error.to_string().starts_with("switch sw exited "), "{error}");
    assert!(sup.shutdown(GRACE).await.is_empty());
}

#[tokio::test]
async fn many_listings_do_not_block_the_switch() {
    let (_dir, dir) = temp();
    let sup = Supervisor::new().unwrap();
    let ports = (1..=64).map(|n| port(n, None, &[100, 200, 300])).collect();
    let switch = Switch::start(spec(&dir, "sw", ports), &sup).await.unwrap();
    for _ in 0..50 {
        assert!(switch.command("vlan/allprint").await.unwrap().len() > 3 * 64);
    }
    // A caller that gives up half-way does not leave its answer to the next.
    for _ in 0..20 {
        let _ = timeout(Duration::from_micros(300), switch.command("port/allprint")).await;
        let info = switch.command("port/showinfo").await.unwrap();
        assert_eq!(info[0], "Numports=65");
    }
    assert!(sup.shutdown(GRACE).await.is_empty());
}
