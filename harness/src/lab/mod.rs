//! The lab: the switches, links and machines of one run, and everything they leave on the host.

pub mod alarm;
pub mod console;
pub mod dhcp;
pub mod dirs;
pub mod evidence;
pub mod inventory;
pub mod ledger;
mod listen;
mod runner;
pub mod sampler;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::join_all;
use images::guest::SEED_FAILED_MARK;
use kvm::{Link, Port, Supervisor, Switch, Vm, VmEvent};
use tokio::sync::broadcast::error::RecvError;
use tokio::task::JoinSet;

pub use alarm::{Alarm, AlarmBell, Guard};
pub use dirs::LabDirs;
pub use evidence::{Recorder, Stream};
pub use runner::OwnedTools;

use crate::event::{EventKind, EventSink};
use crate::exit::Blame;
use crate::failure::{DISK_NOT_WRITTEN, Failure};
use crate::lab::dhcp::{DhcpServer, Leases};
use crate::lab::listen::listen;
use crate::plan::DhcpPlan;

/// How long QEMU and the switches may take to end when asked to.
const GRACE: Duration = Duration::from_secs(3);

/// How much of its console a guest that ended is quoted with.
const LAST_WORDS_LINES: usize = 6;
/// How long after a switch port was closed the switch's end may be seen, which then is the cause.
const SWITCH_END_WITHIN: Duration = Duration::from_secs(2);

/// The machines of a run. Ended by [`Lab::teardown`].
pub struct Lab {
    supervisor: Supervisor,
    bell: AlarmBell,
    sink: EventSink,
    recorder: Recorder,
    switches: Vec<Arc<Switch>>,
    links: Vec<Arc<Link>>,
    vms: BTreeMap<String, Arc<Vm>>,
    /// Guests that have reset themselves: what runs there now has nothing to do with what ran before.
    reset: Arc<Mutex<BTreeSet<String>>>,
    watchers: JoinSet<()>,
}

impl Lab {
    /// A lab with nothing in it.
    #[must_use]
    pub fn new(supervisor: Supervisor, bell: AlarmBell, sink: EventSink, recorder: Recorder) -> Self {
        Self {
            supervisor,
            bell,
            sink,
            recorder,
            switches: Vec::new(),
            links: Vec::new(),
            vms: BTreeMap::new(),
            reset: Arc::default(),
            watchers: JoinSet::new(),
        }
    }

    /// Starts a switch and watches it from then on.
    ///
    /// # Errors
    /// The environment's failure, with what the switch said.
    pub async fn add_switch(&mut self, spec: kvm::SwitchSpec) -> Result<(), Failure> {
        let name = spec.name.clone();
        let switch = Switch::start(spec, &self.supervisor)
            .await
            .map_err(|error| Failure::from_error(Blame::Environment, format!("starting switch {name}"), &error))?;
        let switch = Arc::new(switch);
        let (bell, recorder, watched) = (self.bell.clone(), self.recorder.clone(), Arc::clone(&switch));
        self.watchers.spawn(async move {
            let exit = listen(&recorder, watched.name(), |position| watched.new_output(position), watched.died()).await;
            recorder.note(&Stream::vde(), "end", &format!("switch {}: vde_switch {}", exit.name, exit.exit));
            bell.ring(Alarm::Machine {
                machine: format!("switch {}", exit.name),
                is_node: false,
                what: format!("vde_switch {}", exit.exit),
                tail: exit.output_tail,
                blame: Blame::Environment,
            });
        });
        self.switches.push(switch);
        Ok(())
    }

    /// Joins two switches by their position, on the given ports, and watches the link.
    ///
    /// # Errors
    /// The environment's failure.
    pub async fn add_link(&mut self, a: (usize, u16), b: (usize, u16)) -> Result<(), Failure> {
        let (Some(left), Some(right)) = (self.switches.get(a.0), self.switches.get(b.0)) else {
            return Err(Failure::new(Blame::Harness, "the plan links switches it does not have"));
        };
        let link = Link::connect((left, a.1), (right, b.1), &self.supervisor)
            .await
            .map_err(|error| Failure::from_error(Blame::Environment, "joining the switches", &error))?;
        let link = Arc::new(link);
        let (bell, recorder, watched) = (self.bell.clone(), self.recorder.clone(), Arc::clone(&link));
        self.watchers.spawn(async move {
            let exit = listen(&recorder, watched.name(), |position| watched.new_output(position), watched.died()).await;
            recorder.note(&Stream::vde(), "end", &format!("link {}: vde_plug {}", exit.name, exit.exit));
            bell.ring(Alarm::Machine {
                machine: format!("link {}", exit.name),
                is_node: false,
                what: format!("vde_plug {}", exit.exit),
                tail: exit.output_tail,
                blame: Blame::Environment,
            });
        });
        self.links.push(link);
        Ok(())
    }

    /// Plugs the harness's own DHCP server into its switch, and watches it.
    ///
    /// # Errors
    /// The environment's failure.
    pub async fn add_dhcp(&mut self, plan: &DhcpPlan) -> Result<Leases, Failure> {
        let Some(switch) = self.switches.iter().find(|switch| switch.name() == plan.switch).cloned() else {
            return Err(Failure::new(
                Blame::Harness,
                format!("the plan has no switch {} for a DHCP server", plan.switch),
            ));
        };
        let machine = format!("DHCP server of network {}", plan.network);
        let port = Port::plug(&switch, plan.port, &machine)
            .await
            .map_err(|error| Failure::from_error(Blame::Environment, format!("plugging in the {machine}"), &error))?;
        let (server, leases) = DhcpServer::new(plan, port, self.recorder.clone());
        let bell = self.bell.clone();
        self.watchers.spawn(async move {
            let end = server.serve().await;
            // A switch that died has its own watcher, which says more.
            if tokio::time::timeout(SWITCH_END_WITHIN, switch.died()).await.is_err() {
                bell.ring(Alarm::Machine {
                    machine,
                    is_node: false,
                    what: end.to_string(),
                    tail: String::new(),
                    blame: Blame::Environment,
                });
            }
        });
        Ok(leases)
    }

    /// Starts VMs, all at once, and watches each from then on.
    ///
    /// # Errors
    /// The environment's failure, with what QEMU said; of several, that of the first in order. Those that did start are the
    /// lab's all the same.
    pub async fn add_vms(&mut self, specs: Vec<kvm::VmSpec>) -> Result<Vec<Arc<Vm>>, Failure> {
        let supervisor = self.supervisor.clone();
        let started = join_all(specs.into_iter().map(|spec| async {
            let name = spec.name.clone();
            Vm::start(spec, &supervisor).await.map_err(|error| {
                Failure::from_error(Blame::Environment, format!("starting the VM of {name}"), &error).on(&name)
            })
        }));
        let mut vms = Vec::new();
        let mut failed = None;
        for started in started.await {
            match started {
                Ok(vm) => vms.push(self.adopt(vm)),
                Err(failure) => failed = failed.or(Some(failure)),
            }
        }
        failed.map_or(Ok(vms), Err)
    }

    fn adopt(&mut self, vm: Vm) -> Arc<Vm> {
        let vm = Arc::new(vm);
        let events = vm.events();
        self.watchers.spawn(watch_vm(
            Arc::clone(&vm),
            events,
            self.bell.clone(),
            self.sink.clone(),
            self.recorder.clone(),
            Arc::clone(&self.reset),
        ));
        self.watchers.spawn(console::bound(Arc::clone(&vm), self.sink.clone()));
        self.vms.insert(vm.name().to_owned(), Arc::clone(&vm));
        vm
    }

    /// Whether a VM was started.
    #[must_use]
    pub fn has_machines(&self) -> bool {
        !self.vms.is_empty()
    }

    /// Why a node's guest cannot answer, where its VM is gone or held: `its QEMU killed by signal 9`, `its vCPUs are stopped (io-error)`.
    pub async fn silenced(&self, node: &str) -> Option<String> {
        let vm = self.vms.get(node)?;
        if let Some(exit) = vm.try_died() {
            return Some(format!("its QEMU {}", exit.exit));
        }
        if lock(&self.reset).contains(node) {
            return Some("its guest has reset itself and boots again".to_owned());
        }
        // QAPI `query-status`: `running`, and in `status` why not.
        let state = vm.execute("query-status", serde_json::Value::Null).await.ok()?;
        let stopped = state["running"] == false;
        stopped.then(|| format!("its vCPUs are stopped ({})", state["status"].as_str().unwrap_or("unknown")))
    }

    /// Completes when a node's guest cannot answer any more, with the reason as [`Lab::silenced`] has it. Never for a node
    /// without a VM. Cancel-safe.
    pub async fn falls_silent(&self, node: &str) -> String {
        let Some(vm) = self.vms.get(node) else { return std::future::pending().await };
        // Before the first look: what happens in between is an event.
        let mut events = vm.events();
        loop {
            if let Some(why) = self.silenced(node).await {
                return why;
            }
            tokio::select! {
                _ = vm.died() => {}
                event = events.recv() => if matches!(event, Err(RecvError::Closed)) {
                    vm.died().await;
                },
            }
        }
    }

    /// Completes when the last VM has ended. Cancel-safe.
    pub async fn emptied(&self) {
        join_all(self.vms.values().map(|vm| vm.died())).await;
    }

    /// Ends everything: VMs, then links, then switches. What would not end is returned in words.
    pub async fn teardown(mut self) -> Vec<String> {
        self.stop().await
    }

    async fn stop(&mut self) -> Vec<String> {
        // Deaths from here on are the lab's own doing.
        self.watchers.abort_all();
        while self.watchers.join_next().await.is_some() {}
        let mut trouble = Vec::new();
        let vms = std::mem::take(&mut self.vms);
        let ends = join_all(vms.values().map(|vm| vm.stop(GRACE))).await;
        trouble.extend(ends.into_iter().filter_map(Result::err).map(|error| error.to_string()));
        let links = std::mem::take(&mut self.links);
        let ends = join_all(links.iter().map(|link| link.stop(GRACE))).await;
        trouble.extend(ends.into_iter().filter_map(Result::err).map(|error| error.to_string()));
        let switches = std::mem::take(&mut self.switches);
        let ends = join_all(switches.iter().map(|switch| switch.stop(GRACE))).await;
        trouble.extend(ends.into_iter().filter_map(Result::err).map(|error| error.to_string()));
        trouble
    }
}

// A panic under the lock leaves a whole set.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a guest said on its console before an event that tells of its end.
fn last_words(vm: &Vm) -> String {
    let said = console::last_words(&vm.spec().console_log, LAST_WORDS_LINES);
    if said.is_empty() { String::new() } else { format!("the last it said on its console:\n{}", said.join("\n")) }
}

/// Turns what QEMU reports into events, and what no run survives into the alarm.
async fn watch_vm(
    vm: Arc<Vm>,
    mut events: tokio::sync::broadcast::Receiver<VmEvent>,
    bell: AlarmBell,
    sink: EventSink,
    recorder: Recorder,
    reset: Arc<Mutex<BTreeSet<String>>>,
) {
    let machine = vm.name().to_owned();
    let stream = Stream::qmp(&machine);
    let record = |event: &VmEvent| {
        let (name, line) = qmp_line(event);
        recorder.note(&stream, &name, &line);
    };
    let say = |message: String| sink.emit(EventKind::MachineEvent { machine: machine.clone(), message });
    let ring = |what: &str, tail: String, blame: Blame| {
        bell.ring(Alarm::Machine { machine: machine.clone(), is_node: true, what: what.to_owned(), tail, blame });
    };
    loop {
        let event = tokio::select! {
            biased;
            event = events.recv() => event,
            exit = vm.died() => Ok(VmEvent::Exited(exit)),
        };
        let seen = event.as_ref().ok().cloned();
        match event {
            Ok(VmEvent::Exited(exit)) => {
                let what = format!("QEMU {}", exit.exit);
                say(what.clone());
                // QEMU that ends by itself, or by somebody's hand, is never k3s's doing.
                ring(&what, exit.stderr_tail.clone(), Blame::Environment);
                record(&VmEvent::Exited(exit));
                return;
            }
            Ok(VmEvent::GuestPanicked { .. }) => {
                say("GUEST_PANICKED: the guest's kernel panicked".to_owned());
                ring("the guest's kernel panicked (GUEST_PANICKED)", last_words(&vm), Blame::Product);
            }
            Ok(VmEvent::Reset { guest: true, reason }) => {
                say(format!("RESET: the guest reset itself ({reason})"));
                lock(&reset).insert(machine.clone());
                ring("the guest reset itself (RESET)", last_words(&vm), Blame::Product);
            }
            Ok(VmEvent::Shutdown { guest: true, reason }) => {
                say(format!("SHUTDOWN: the guest shut itself down ({reason})"));
                let said = last_words(&vm);
                // The guest's first program turns off where it cannot take the seed; what it said stands before the event.
                if let Some(at) = said.find(SEED_FAILED_MARK) {
                    bell.ring(Alarm::seed_failed(&machine, said[at..].lines().next().unwrap_or_default()));
                } else {
                    ring("the guest shut itself down (SHUTDOWN)", said, Blame::Product);
                }
            }
            Ok(VmEvent::Shutdown { guest: false, reason } | VmEvent::Reset { guest: false, reason }) => {
                say(format!("ended or reset from outside ({reason})"));
            }
            Ok(VmEvent::Stop) => say("STOP: its vCPUs are stopped".to_owned()),
            Ok(VmEvent::Resume) => {
                say("RESUME: its vCPUs run again".to_owned());
                // The guest's clocks stood still meanwhile.
                recorder.measure_clocks();
            }
            // QEMU stops a guest whose disk it cannot write (QAPI: BLOCK_IO_ERROR, action "stop").
            Ok(VmEvent::Other { name, data }) if name == "BLOCK_IO_ERROR" && data["action"] == "stop" => {
                say(format!("BLOCK_IO_ERROR: {DISK_NOT_WRITTEN} and its vCPUs are stopped"));
                let why = data["reason"].as_str().unwrap_or("no reason is given");
                let ended = format!("{DISK_NOT_WRITTEN} ({why}) and its vCPUs are stopped (BLOCK_IO_ERROR)");
                ring(&ended, String::new(), Blame::Environment);
            }
            Ok(VmEvent::Other { .. }) => {}
            Err(RecvError::Lagged(lost)) => {
                sink.warn(format!("{machine}: {lost} events of QEMU came too fast and were lost"))
            }
            Err(RecvError::Closed) => {
                let exit = vm.died().await;
                ring(&format!("QEMU {}", exit.exit), exit.stderr_tail, Blame::Environment);
                return;
            }
        }
        // After the alarm, which says it in words of its own.
        if let Some(event) = &seen {
            record(event);
        }
    }
}

/// QEMU's name for an event, and the event as a line.
fn qmp_line(event: &VmEvent) -> (String, String) {
    let cause = |guest: &bool, reason: &str| serde_json::json!({ "guest": guest, "reason": reason });
    let (name, data) = match event {
        VmEvent::Stop => ("STOP", serde_json::Value::Null),
        VmEvent::Resume => ("RESUME", serde_json::Value::Null),
        VmEvent::Shutdown { guest, reason } => ("SHUTDOWN", cause(guest, reason)),
        VmEvent::Reset { guest, reason } => ("RESET", cause(guest, reason)),
        VmEvent::GuestPanicked { detail } => ("GUEST_PANICKED", detail.clone()),
        VmEvent::Other { name, data } => (name.as_str(), data.clone()),
        // Its last words are in its standard error.
        VmEvent::Exited(exit) => return ("exit".to_owned(), format!("QEMU {}", exit.exit)),
    };
    let data = if data.is_null() { String::new() } else { format!(" {data}") };
    (name.to_owned(), format!("QMP {name}{data}"))
}
