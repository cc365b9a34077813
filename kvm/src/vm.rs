//! A running VM: QEMU as a child of ours, its control channel, and what happens to it as events.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::broadcast;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::error::Error;
use crate::process::{CommandSpec, DEFAULT_TAIL_BYTES, ExitInfo, Process, Sink, Supervisor};
use crate::qmp::{Qmp, QmpError, QmpEvent};
use crate::spec::{VmSpec, argv, device_id};
use crate::unix;

/// How long QEMU may take from its start to its QMP answer. A busy host needs seconds; one that has failed ends by itself, which is seen at once.
const QMP_START_TIMEOUT: Duration = Duration::from_secs(60);

/// How long a QMP command may take: QEMU's main loop answers within milliseconds unless the host stands still.
pub const QMP_TIMEOUT: Duration = Duration::from_secs(10);

/// How long QEMU may take to be gone after its QMP connection broke, before that counts as a fault of its own.
const EXIT_AFTER_CLOSE: Duration = Duration::from_secs(2);

/// How much of QEMU's standard error goes to its log.
const STDERR_LOG_MAX_BYTES: u64 = 8 * 1024 * 1024;

/// How many events a receiver may lag behind before it loses the oldest.
const EVENT_QUEUE: usize = 1024;

/// Something that happened to a VM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmEvent {
    /// The virtual CPUs stopped.
    Stop,
    /// The virtual CPUs run again.
    Resume,
    /// The VM shuts down; QEMU ends right after.
    Shutdown {
        /// Whether the guest asked for it.
        guest: bool,
        /// QEMU's `ShutdownCause`, such as `guest-shutdown` or `host-qmp-quit`.
        reason: String,
    },
    /// The VM was reset and boots again.
    Reset {
        /// Whether the guest asked for it.
        guest: bool,
        /// QEMU's `ShutdownCause`, such as `guest-reset`.
        reason: String,
    },
    /// The guest's kernel panicked (told through pvpanic); the VM is held as it is.
    GuestPanicked {
        /// All that QEMU says about it.
        detail: Value,
    },
    /// QEMU is gone; always the last event.
    Exited(VmExit),
    /// Any other event of QEMU, and `harness-qmp-closed` where the control channel broke with QEMU still there, `harness-events-lost` where more came than could be kept.
    Other {
        /// Its name.
        name: String,
        /// Its data.
        data: Value,
    },
}

/// How a VM's QEMU ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmExit {
    /// The VM's name.
    pub name: String,
    /// How the process ended.
    pub exit: ExitInfo,
    /// The end of its standard error.
    pub stderr_tail: String,
}

impl fmt::Display for VmExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "QEMU {}", self.exit)?;
        let said = self.stderr_tail.trim();
        if said.is_empty() { Ok(()) } else { write!(f, ": {said}") }
    }
}

/// A VM. Dropping it kills QEMU at once, as a backstop to [`Vm::stop`].
#[derive(Debug)]
pub struct Vm {
    spec: VmSpec,
    process: Arc<Process>,
    qmp: Qmp,
    events: broadcast::Sender<VmEvent>,
    first_events: Mutex<Option<broadcast::Receiver<VmEvent>>>,
    forwarder: JoinHandle<()>,
}

impl Vm {
    /// Starts QEMU and waits until it answers on QMP. Guest code runs from then on.
    ///
    /// # Errors
    /// [`Error::Spec`]; [`Error::Io`] where the QMP socket is in use already; [`Error::ProgramNotFound`] without QEMU; [`Error::VmExited`] (`QEMU exited 1: …`) where it ended instead; [`Error::Qmp`] where it stays silent.
    pub async fn start(spec: VmSpec, sup: &Supervisor) -> Result<Self, Error> {
        spec.validate()?;
        unix::claim(&spec.qmp_socket).await?;
        let mut words = argv(&spec).into_iter();
        let program = words.next().unwrap_or_default();
        let mut command = CommandSpec::new(format!("qemu {}", spec.name), program).args(words);
        command.stderr = Sink::FileAndTail {
            path: spec.stderr_log.clone(),
            file_max_bytes: STDERR_LOG_MAX_BYTES,
            tail_bytes: DEFAULT_TAIL_BYTES,
        };
        let process = Arc::new(sup.spawn(command).await?);
        let connected = tokio::select! {
            biased;
            _ = process.exited() => return Err(died(&spec.name, &process).await.into()),
            connected = Qmp::connect(&spec.qmp_socket, QMP_START_TIMEOUT) => connected,
        };
        let qmp = match connected {
            Ok(qmp) => qmp,
            Err(source) => {
                // A QEMU that ends closes its socket first: its own words say more than the socket's.
                return Err(match timeout(EXIT_AFTER_CLOSE, died(&spec.name, &process)).await {
                    Ok(exit) if !matches!(source, QmpError::Timeout { .. }) => exit.into(),
                    _ => Error::Qmp { vm: spec.name, source },
                });
            }
        };
        let (events, first_events) = broadcast::channel(EVENT_QUEUE);
        let forwarder = tokio::spawn(forward(spec.name.clone(), qmp.clone(), process.clone(), events.clone()));
        let vm = Self { spec, process, qmp, events, first_events: Mutex::new(Some(first_events)), forwarder };
        // Long before a guest's firmware has come to look at a NIC.
        for nic in vm.spec.nics.iter().filter(|nic| nic.unplugged) {
            vm.execute("set_link", json!({ "name": nic.id, "up": false })).await?;
        }
        Ok(vm)
    }

    /// The VM's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.spec.name
    }

    /// What it was started from.
    #[must_use]
    pub fn spec(&self) -> &VmSpec {
        &self.spec
    }

    /// QEMU's process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Events: the first call gets all since the start, later ones those from then on. [`VmEvent::Exited`] is the last; who subscribes after it asks [`Vm::died`].
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<VmEvent> {
        let first = self.first_events.lock().unwrap_or_else(PoisonError::into_inner).take();
        first.unwrap_or_else(|| self.events.subscribe())
    }

    /// Waits for QEMU's end. Cancel-safe; any number of callers may wait.
    pub async fn died(&self) -> VmExit {
        died(&self.spec.name, &self.process).await
    }

    /// How QEMU ended, if it has.
    #[must_use]
    pub fn try_died(&self) -> Option<VmExit> {
        let exit = self.process.try_exited()?;
        Some(VmExit { name: self.spec.name.clone(), exit, stderr_tail: self.process.stderr_tail() })
    }

    /// The port of the host's 127.0.0.1 that leads to the guest's SSH; QEMU chose it, and holds it since its start.
    ///
    /// # Errors
    /// [`Error::Qmp`]; [`Error::NoSshForward`] where no NIC of the spec has one; [`Error::VmExited`] where QEMU ended.
    pub async fn ssh_port(&self) -> Result<u16, Error> {
        let answer = self.execute("human-monitor-command", json!({ "command-line": "info usernet" })).await?;
        let text = answer.as_str().unwrap_or_default();
        forwarded_port(text, 22)
            .ok_or_else(|| Error::NoSshForward { vm: self.spec.name.clone(), answer: text.chars().take(400).collect() })
    }

    /// How many connections to the guest's SSH port the guest itself has taken. QEMU's user-mode network takes every one at
    /// once; whether the guest answered shows in its table alone.
    ///
    /// # Errors
    /// As [`Vm::execute`].
    pub async fn ssh_connections_taken(&self) -> Result<usize, Error> {
        let answer = self.execute("human-monitor-command", json!({ "command-line": "info usernet" })).await?;
        Ok(taken_connections(answer.as_str().unwrap_or_default(), 22))
    }

    /// Waits until the guest has brought the interface of a NIC up, as its driver's list of multicast groups shows: every
    /// interface that comes up joins the all-hosts group (RFC 1112, 4). QEMU tells of a change of that list once for each time
    /// it is asked for it (QAPI `NIC_RX_FILTER_CHANGED`, `query-rx-filter`). Cancel-safe.
    ///
    /// # Errors
    /// As [`Vm::execute`]; QEMU knows no filter of a device that is not virtio.
    pub async fn interface_up(&self, nic: &str) -> Result<(), Error> {
        let mut events = self.events.subscribe();
        loop {
            if in_all_hosts(&self.execute("query-rx-filter", json!({ "name": device_id(nic) })).await?) {
                return Ok(());
            }
            let changed = async {
                loop {
                    match events.recv().await {
                        Ok(VmEvent::Other { name, .. }) if name == "NIC_RX_FILTER_CHANGED" => break,
                        // One may have been among those.
                        Err(broadcast::error::RecvError::Lagged(_)) => break,
                        // QEMU's end: the next question says so.
                        Ok(VmEvent::Exited(_)) | Err(broadcast::error::RecvError::Closed) => break,
                        Ok(_) => {}
                    }
                }
            };
            changed.await;
        }
    }

    /// Takes the file away from the serial console for good: what the guest says from now on goes nowhere (QAPI `chardev-change`).
    ///
    /// # Errors
    /// As [`Vm::execute`].
    pub async fn unplug_console(&self) -> Result<(), Error> {
        let nowhere = json!({ "id": "console", "backend": { "type": "null", "data": {} } });
        self.execute("chardev-change", nowhere).await.map(drop)
    }

    /// The control channel.
    #[must_use]
    pub fn qmp(&self) -> &Qmp {
        &self.qmp
    }

    /// Runs a QMP command, racing QEMU's end.
    ///
    /// # Errors
    /// [`Error::VmExited`] where QEMU ended, else [`Error::Qmp`].
    pub async fn execute(&self, command: &str, arguments: Value) -> Result<Value, Error> {
        let source = match self.qmp.execute(command, arguments, QMP_TIMEOUT).await {
            Ok(value) => return Ok(value),
            Err(source) => source,
        };
        if matches!(source, QmpError::Closed { .. })
            && let Ok(exit) = timeout(EXIT_AFTER_CLOSE, self.died()).await
        {
            return Err(exit.into());
        }
        Err(Error::Qmp { vm: self.spec.name.clone(), source })
    }

    /// Ends QEMU without asking the guest: QMP `quit` and up to the grace, then SIGTERM and up to the grace, then SIGKILL. Of one that has ended, tells how.
    ///
    /// # Errors
    /// [`Error::Survived`].
    pub async fn stop(&self, grace: Duration) -> Result<VmExit, Error> {
        // Only an attempt: a stuck or broken channel must not hold up the end.
        let quit = async {
            let _ = self.qmp.execute("quit", Value::Null, grace.min(QMP_TIMEOUT)).await;
            self.died().await
        };
        if let Ok(exit) = timeout(grace, quit).await {
            return Ok(exit);
        }
        self.process.terminate(grace).await?;
        Ok(self.died().await)
    }

    /// Asks the guest to power off (ACPI power button) and waits up to the grace; then [`Vm::stop`].
    ///
    /// # Errors
    /// [`Error::Survived`].
    pub async fn power_off(&self, grace: Duration) -> Result<VmExit, Error> {
        let asked = async {
            self.qmp.execute("system_powerdown", Value::Null, grace.min(QMP_TIMEOUT)).await?;
            Ok::<_, QmpError>(self.died().await)
        };
        match timeout(grace, asked).await {
            Ok(Ok(exit)) => Ok(exit),
            Ok(Err(_)) | Err(_) => self.stop(Duration::from_secs(5)).await,
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // The forwarder shares the process; without it the process's own drop follows.
        self.forwarder.abort();
        self.process.kill_now();
    }
}

impl From<VmExit> for Error {
    fn from(exit: VmExit) -> Self {
        Self::VmExited(Box::new(exit))
    }
}

async fn died(name: &str, process: &Process) -> VmExit {
    let exit = process.exited().await;
    VmExit { name: name.to_owned(), exit, stderr_tail: process.stderr_tail() }
}

async fn forward(name: String, qmp: Qmp, process: Arc<Process>, events: broadcast::Sender<VmEvent>) {
    let mut from = qmp.events();
    let pass = |received: Result<QmpEvent, broadcast::error::RecvError>| match received {
        Ok(event) => {
            let _ = events.send(translate(event));
            true
        }
        Err(broadcast::error::RecvError::Lagged(lost)) => {
            let _ =
                events.send(VmEvent::Other { name: "harness-events-lost".to_owned(), data: json!({ "lost": lost }) });
            true
        }
        Err(broadcast::error::RecvError::Closed) => false,
    };
    let closed = loop {
        tokio::select! {
            biased;
            received = from.recv() => if !pass(received) { break QmpError::Closed { what: "no more events".to_owned() } },
            closed = qmp.closed() => break closed,
        }
    };
    // All that came before the end is in the queue by now; at most a queue's length.
    for _ in 0..EVENT_QUEUE {
        match from.try_recv() {
            Ok(event) => pass(Ok(event)),
            Err(_) => break,
        };
    }
    let exit = match timeout(EXIT_AFTER_CLOSE, died(&name, &process)).await {
        Ok(exit) => exit,
        Err(_) => {
            let _ = events.send(VmEvent::Other {
                name: "harness-qmp-closed".to_owned(),
                data: json!({ "reason": closed.to_string() }),
            });
            died(&name, &process).await
        }
    };
    let _ = events.send(VmEvent::Exited(exit));
}

/// QEMU's events that a lab acts on (QEMU, `qapi/run-state.json`); the others as they are.
fn translate(event: QmpEvent) -> VmEvent {
    let guest = event.data.get("guest").and_then(Value::as_bool).unwrap_or(false);
    let reason = event.data.get("reason").and_then(Value::as_str).unwrap_or("unknown").to_owned();
    match event.name.as_str() {
        "STOP" => VmEvent::Stop,
        "RESUME" => VmEvent::Resume,
        "SHUTDOWN" => VmEvent::Shutdown { guest, reason },
        "RESET" => VmEvent::Reset { guest, reason },
        "GUEST_PANICKED" => VmEvent::GuestPanicked { detail: event.data },
        _ => VmEvent::Other { name: event.name, data: event.data },
    }
}

/// The host port that leads to `guest_port`, from `info usernet`: `TCP[HOST_FORWARD]  12  127.0.0.1 44673  10.0.2.15  22  0  0`.
fn forwarded_port(usernet: &str, guest_port: u16) -> Option<u16> {
    usernet.lines().find_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["TCP[HOST_FORWARD]", _fd, _source, port, _dest, to, ..] if to.parse() == Ok(guest_port) => {
                port.parse().ok()
            }
            _ => None,
        }
    })
}

/// The connections to `guest_port` in `info usernet` whose handshake the guest has answered (`slirp_connection_info` of
/// libslirp names the states of RFC 793; one that nobody has answered is in `SYN_SENT`).
fn taken_connections(usernet: &str, guest_port: u16) -> usize {
    let taken = |line: &&str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        matches!(words.as_slice(), ["TCP[ESTABLISHED]", _fd, _source, _port, _dest, to, ..] if to.parse() == Ok(guest_port))
    };
    usernet.lines().filter(taken).count()
}

/// Whether a NIC of `query-rx-filter`'s answer takes what is sent to the all-hosts group, 224.0.0.1.
fn in_all_hosts(filters: &Value) -> bool {
    let nics = filters.as_array().into_iter().flatten();
    let mut groups = nics.flat_map(|nic| nic["multicast-table"].as_array().into_iter().flatten());
    groups.any(|group| group == "01:00:5e:00:00:01")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_that_is_up_is_in_the_all_hosts_group() {
        let down = json!([{ "name": "nic-eth0", "promiscuous": true, "multicast-table": [] }]);
        let up = json!([{ "name": "nic-eth0", "promiscuous": false, "multicast-table": ["33:33:00:00:00:01", "01:00:5e:00:00:01"] }]);
        assert!(!in_all_hosts(&down) && in_all_hosts(&up) && !in_all_hosts(&Value::Null));
    }

    #[test]
    fn connections_the_guest_has_taken_are_counted() {
        let usernet = "Hub -1 (mgmt):\r\n  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r\n  TCP[ESTABLISHED]    9   10.0.2.2 40000   10.0.2.15 22 0 0\r\n  TCP[SYN_SENT]    9   10.0.2.2 40002   10.0.2.15 22 0 0\r\n  TCP[ESTABLISHED]    9   10.0.2.2 40004   10.0.2.15 6443 0 0\r\n  TCP[HOST_FORWARD]  11       127.0.0.1 44673       10.0.2.15    22     0     0\r\n";
        assert_eq!(taken_connections(usernet, 22), 1);
        assert_eq!(taken_connections("", 22), 0);
    }

    #[test]
    fn the_forwarded_port_is_read_from_info_usernet() {
        let usernet = "Hub -1 (mgmt):\r\n  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r\n  TCP[ESTABLISHED]    9   127.0.0.1 22   10.0.2.15 22 0 0\r\n  TCP[HOST_FORWARD]  10       127.0.0.1 40000       10.0.2.15    80     0     0\r\n  TCP[HOST_FORWARD]  11       127.0.0.1 44673       10.0.2.15    22     0     0\r\n";
        assert_eq!(forwarded_port(usernet, 22), Some(44673));
        assert_eq!(forwarded_port(usernet, 6443), None);
        assert_eq!(forwarded_port("", 22), None);
    }

    #[test]
    fn an_exit_reads_as_one_line() {
        let exit = |stderr: &str| {
            VmExit { name: "n".into(), exit: ExitInfo { code: Some(1), signal: None }, stderr_tail: stderr.into() }
                .to_string()
        };
        assert_eq!(exit("qemu: no such file\n"), "QEMU exited 1: qemu: no such file");
        assert_eq!(exit(""), "QEMU exited 1");
    }

    #[test]
    fn events_keep_what_is_not_known() {
        let event = |name: &str, data: Value| {
            translate(QmpEvent { name: name.into(), data, timestamp_us: None, raw: Value::Null })
        };
        assert_eq!(
            event("SHUTDOWN", json!({"guest": true, "reason": "guest-shutdown"})),
            VmEvent::Shutdown { guest: true, reason: "guest-shutdown".into() }
        );
        assert_eq!(event("RESET", json!({})), VmEvent::Reset { guest: false, reason: "unknown".into() });
        assert_eq!(event("BALLOON", json!({"x": 1})), VmEvent::Other { name: "BALLOON".into(), data: json!({"x": 1}) });
    }
}
