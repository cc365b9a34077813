//! The host while guests run: CPU pressure, load, memory, and what each VM's vCPU threads got and waited for.
//!
//! Read from outside the guests, once a second. A quorum lost on a host whose vCPU threads waited for CPU is the
//! environment's doing; the same on an idle host is not so sure.

use std::fs;
use std::io::{self, Write as _};
use std::time::Instant;

use camino::Utf8Path;
use jiff::Timestamp;
use serde::Serialize;
use verdict::VmFacts;

use crate::event::EventSink;
use crate::record::private_file;

/// A VM's vCPU threads on the host.
#[derive(Debug, Clone)]
pub struct VcpuThreads {
    /// The node.
    pub node: String,
    /// QEMU's process.
    pub pid: u32,
    /// Thread ids of its vCPUs (QMP `query-cpus-fast`, `thread-id`).
    pub threads: Vec<u64>,
}

/// Nanoseconds the vCPU threads of a VM ran, and were ready to run and did not.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct CpuTime {
    ran_ns: u64,
    waited_ns: u64,
}

struct Watched {
    vm: VcpuThreads,
    since: Instant,
    first: CpuTime,
    last: CpuTime,
}

/// One line of `host.ndjson`.
#[derive(Debug, Serialize)]
struct Sample<'a> {
    at: Timestamp,
    cpu_pressure_some_avg10: Option<f64>,
    load_1m: f64,
    memory_available_mib: u64,
    vms: Vec<VmSample<'a>>,
}

#[derive(Debug, Serialize)]
struct VmSample<'a> {
    node: &'a str,
    ran_ms: u64,
    waited_ms: u64,
}

/// What was seen of the host over a run.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct HostSeen {
    /// Highest `some avg10` of `/proc/pressure/cpu`, percent.
    pub cpu_pressure_some_avg10: Option<f64>,
    /// Highest 1-minute load.
    pub load_1m: Option<f64>,
    /// Lowest available memory.
    pub memory_available_mib: Option<u64>,
    /// Each VM.
    pub vms: Vec<VmFacts>,
}

/// Samples the host and keeps what matters. Bounded: a line per second goes to the file, extremes stay in memory.
pub struct HostSampler {
    out: Option<io::BufWriter<fs::File>>,
    sink: EventSink,
    watched: Vec<Watched>,
    seen: HostSeen,
}

impl HostSampler {
    /// A sampler that writes to `path`; where that cannot be written, it still keeps the extremes.
    #[must_use]
    pub fn new(path: &Utf8Path, sink: EventSink) -> Self {
        let out = match private_file(path) {
            Ok(file) => Some(io::BufWriter::new(file)),
            Err(error) => {
                sink.warn(format!("samples of the host are not kept in {path}: {error}"));
                None
            }
        };
        Self { out, sink, watched: Vec::new(), seen: HostSeen::default() }
    }

    /// Watches a VM from now on.
    pub fn watch(&mut self, vm: VcpuThreads) {
        let first = cpu_time(&vm).unwrap_or_default();
        self.watched.push(Watched { vm, since: Instant::now(), first, last: first });
    }

    /// Takes one sample.
    pub fn sample(&mut self) {
        let host = kvm::host_facts();
        let seen = &mut self.seen;
        let higher = |old: Option<f64>, new: f64| Some(old.map_or(new, |old| old.max(new)));
        if let Some(pressure) = host.cpu_pressure_some_avg10 {
            seen.cpu_pressure_some_avg10 = higher(seen.cpu_pressure_some_avg10, pressure);
        }
        seen.load_1m = higher(seen.load_1m, host.load_1m);
        if host.memory_available_mib > 0 {
            let lowest =
                seen.memory_available_mib.map_or(host.memory_available_mib, |old| old.min(host.memory_available_mib));
            seen.memory_available_mib = Some(lowest);
        }
        for watched in &mut self.watched {
            // A QEMU that is gone keeps its last figures.
            if let Some(time) = cpu_time(&watched.vm) {
                watched.last = time;
            }
        }
        let sample = Sample {
            at: Timestamp::now(),
            cpu_pressure_some_avg10: host.cpu_pressure_some_avg10,
            load_1m: host.load_1m,
            memory_available_mib: host.memory_available_mib,
            vms: self
                .watched
                .iter()
                .map(|watched| VmSample {
                    node: &watched.vm.node,
                    ran_ms: (watched.last.ran_ns - watched.first.ran_ns.min(watched.last.ran_ns)) / 1_000_000,
                    waited_ms: (watched.last.waited_ns - watched.first.waited_ns.min(watched.last.waited_ns))
                        / 1_000_000,
                })
                .collect(),
        };
        let Some(out) = self.out.as_mut() else { return };
        let written = serde_json::to_vec(&sample).map_err(io::Error::other).and_then(|mut line| {
            line.push(b'\n');
            out.write_all(&line)?;
            out.flush()
        });
        if let Err(error) = written {
            self.sink.warn(format!("samples of the host are no longer kept: {error}"));
            self.out = None;
        }
    }

    /// What was seen until now.
    #[must_use]
    pub fn seen(&self) -> HostSeen {
        let vms = self.watched.iter().map(Watched::facts).collect();
        HostSeen { vms, ..self.seen.clone() }
    }
}

impl Watched {
    #[expect(clippy::cast_precision_loss, reason = "nanoseconds of a run are far below 2^52")]
    fn facts(&self) -> VmFacts {
        let ran = self.last.ran_ns.saturating_sub(self.first.ran_ns) as f64;
        let waited = self.last.waited_ns.saturating_sub(self.first.waited_ns) as f64;
        let elapsed = self.since.elapsed().as_nanos() as f64;
        VmFacts {
            name: self.vm.node.clone(),
            vcpus: u32::try_from(self.vm.threads.len()).unwrap_or(u32::MAX),
            cpu_wait_pct: (ran + waited > 0.0).then(|| 100.0 * waited / (ran + waited)),
            cpu_got_pct: (elapsed > 0.0).then(|| 100.0 * ran / elapsed),
        }
    }
}

/// Sums `schedstat` over a VM's vCPU threads: time on the CPU, time on a run queue, in nanoseconds
/// (Documentation/scheduler/sched-stats.rst of the kernel).
fn cpu_time(vm: &VcpuThreads) -> Option<CpuTime> {
    let mut sum = CpuTime::default();
    for thread in &vm.threads {
        let text = fs::read_to_string(format!("/proc/{}/task/{thread}/schedstat", vm.pid)).ok()?;
        let mut fields = text.split_whitespace().map(|field| field.parse::<u64>().ok());
        sum.ran_ns += fields.next()??;
        sum.waited_ns += fields.next()??;
    }
    Some(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_runs_is_seen_to_run() {
        let dir = tempfile::tempdir().unwrap();
        let path = Utf8Path::from_path(dir.path()).unwrap().join("host.ndjson");
        let pid = std::process::id();
        let tid = u64::try_from(nix::unistd::gettid().as_raw()).unwrap();
        let mut sampler = HostSampler::new(&path, EventSink::new().0);
        sampler.watch(VcpuThreads { node: "server-1".to_owned(), pid, threads: vec![tid] });
        let began = Instant::now();
        let mut n = 0_u64;
        while began.elapsed().as_millis() < 50 {
            n = std::hint::black_box(n + 1);
        }
        sampler.sample();
        let seen = sampler.seen();
        assert!(seen.load_1m.is_some() && seen.memory_available_mib.is_some());
        let vm = &seen.vms[0];
        assert!(vm.cpu_got_pct.unwrap() > 1.0, "{vm:?}");
        assert!((0.0..=100.0).contains(&vm.cpu_wait_pct.unwrap()), "{vm:?}");
        let line: serde_json::Value = serde_json::from_str(fs::read_to_string(&path).unwrap().trim()).unwrap();
        assert_eq!(line["vms"][0]["node"], "server-1");
    }

    #[test]
    fn a_vm_that_is_gone_keeps_its_figures() {
        let dir = tempfile::tempdir().unwrap();
        let path = Utf8Path::from_path(dir.path()).unwrap().join("host.ndjson");
        let mut sampler = HostSampler::new(&path, EventSink::new().0);
        sampler.watch(VcpuThreads { node: "n".to_owned(), pid: u32::MAX, threads: vec![1] });
        sampler.sample();
        assert_eq!(sampler.seen().vms[0].cpu_wait_pct, None);
    }
}
