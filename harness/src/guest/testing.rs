//! A real sshd on loopback, for tests of what talks to guests.
//!
//! Every connection gets an sshd of its own (`sshd -i`), so that there is no port to race for and single
//! sessions can be killed. A machine without sshd fails these tests: `ci/setup` installs it.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::{Guest, GuestError, KeyPair, NewsSink, SshTarget, generate_ed25519};

const SSHD: &str = "/usr/sbin/sshd";

/// How a connection is treated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Door {
    /// Given to sshd.
    Open,
    /// Taken and closed at once: a guest without sshd behind QEMU's forwarded port.
    Refusing,
    /// Taken and held: a guest without network behind QEMU's forwarded port.
    Silent,
}

pub(crate) struct Sshd {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) addr: SocketAddr,
    pub(crate) host: KeyPair,
    pub(crate) identity: KeyPair,
    door: Arc<AtomicU8>,
    accepted: Arc<AtomicU64>,
    children: Arc<Mutex<Vec<Child>>>,
}

impl Sshd {
    pub(crate) fn start() -> Sshd {
        let host = generate_ed25519("test host").unwrap();
        Sshd::start_with(host, Door::Open)
    }

    pub(crate) fn start_with(host: KeyPair, door: Door) -> Sshd {
        assert!(std::path::Path::new(SSHD).exists(), "{SSHD} is missing: apt-get install openssh-server");
        // sshd insists on its privilege separation directory when it runs as root.
        let _ = std::fs::create_dir_all("/run/sshd");
        let identity = generate_ed25519("test identity").unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("host"), &host.private_openssh).unwrap();
        let mut mode = std::fs::metadata(path("host")).unwrap().permissions();
        std::os::unix::fs::PermissionsExt::set_mode(&mut mode, 0o600);
        std::fs::set_permissions(path("host"), mode).unwrap();
        std::fs::write(path("authorized"), &identity.public_openssh).unwrap();
        // Another home: what the user's shell does at its start would be part of every figure here, and a
        // command killed in the middle of it could leave a lock behind.
        let config = format!(
            "HostKey {d}/host\nAuthorizedKeysFile {d}/authorized\nPidFile none\nUsePAM no\nStrictModes no\n\
             PasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\nLogLevel ERROR\n\
             SetEnv HOME={d}\n",
            d = dir.path().display()
        );
        std::fs::write(path("config"), config).unwrap();

        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let door = Arc::new(AtomicU8::new(door as u8));
        let accepted = Arc::new(AtomicU64::new(0));
        let children = Arc::new(Mutex::new(Vec::new()));
        let sshd = Sshd {
            addr,
            host,
            identity,
            door: Arc::clone(&door),
            accepted: Arc::clone(&accepted),
            children: Arc::clone(&children),
            dir,
        };
        let config = sshd.dir.path().join("config");
        std::thread::spawn(move || {
            let mut held = Vec::new();
            for stream in listener.incoming() {
                let Ok(stream) = stream else { return };
                accepted.fetch_add(1, Ordering::SeqCst);
                match door.load(Ordering::SeqCst) {
                    n if n == Door::Refusing as u8 => drop(stream),
                    n if n == Door::Silent as u8 => held.push(stream),
                    _ => {
                        let input = OwnedFd::from(stream.try_clone().unwrap());
                        let child = Command::new(SSHD)
                            .args(["-i", "-e", "-f"])
                            .arg(&config)
                            .stdin(Stdio::from(input))
                            .stdout(Stdio::from(OwnedFd::from(stream)))
                            .stderr(Stdio::null())
                            .spawn()
                            .unwrap();
                        children.lock().unwrap().push(child);
                    }
                }
            }
        });
        sshd
    }

    pub(crate) fn set(&self, door: Door) {
        self.door.store(door as u8, Ordering::SeqCst);
    }

    /// TCP connections so far.
    pub(crate) fn accepted(&self) -> u64 {
        self.accepted.load(Ordering::SeqCst)
    }

    /// Kills every session's sshd.
    pub(crate) fn kill_sessions(&self) {
        for mut child in self.children.lock().unwrap().drain(..) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Kills what commands left running: known by the home that sshd gave them.
    fn kill_commands(&self) {
        let home = format!("HOME={}", self.dir.path().display());
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            let environ = std::fs::read(entry.path().join("environ")).unwrap_or_default();
            if environ.split(|byte| *byte == 0).any(|variable| variable == home.as_bytes()) {
                let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
            }
        }
    }

    /// Pids of the sessions' sshd processes.
    pub(crate) fn pids(&self) -> Vec<i32> {
        self.children.lock().unwrap().iter().map(|c| i32::try_from(c.id()).unwrap()).collect()
    }

    pub(crate) fn target(&self) -> SshTarget {
        let user = nix::unistd::User::from_uid(nix::unistd::getuid()).unwrap().unwrap();
        SshTarget {
            node: "server-1".into(),
            addr: self.addr,
            user: user.name,
            host_key: self.host.public().unwrap(),
            identity: Arc::new(self.identity.private().unwrap()),
            patience: 1.0,
            news: NewsSink::none(),
        }
    }

    pub(crate) async fn guest(&self) -> Guest {
        Guest::connect(self.target(), Duration::from_secs(20)).await.unwrap()
    }

    pub(crate) async fn connect(&self, target: SshTarget) -> Result<Guest, GuestError> {
        Guest::connect(target, Duration::from_secs(20)).await
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        self.set(Door::Refusing);
        self.kill_sessions();
        // Wakes the accepting thread, which holds the listener until its process ends otherwise.
        let _ = std::net::TcpStream::connect(self.addr);
        self.kill_commands();
    }
}
