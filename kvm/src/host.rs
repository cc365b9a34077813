//! What the host has to offer: cores, memory, load, CPU pressure. Read once, from `/proc`.

use std::fs;
use std::thread;

use serde::{Deserialize, Serialize};

/// What the host has and how busy it is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HostFacts {
    /// Cores this process may run on (cgroup quota and affinity included).
    pub cores: u32,
    /// All memory; 0 where `/proc/meminfo` does not tell.
    pub memory_total_mib: u64,
    /// What new programs could have without swapping; 0 where `/proc/meminfo` does not tell.
    pub memory_available_mib: u64,
    /// Load average over one minute; 0 where `/proc/loadavg` does not tell.
    pub load_1m: f64,
    /// Share of the last 10 s in which some task waited for a CPU, in percent (`/proc/pressure/cpu`); `None` where the kernel does not measure it.
    pub cpu_pressure_some_avg10: Option<f64>,
}

/// Reads the host's facts. What cannot be read is 0 or `None`: they inform, they decide nothing here.
#[must_use]
pub fn host_facts() -> HostFacts {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let meminfo = read("/proc/meminfo");
    HostFacts {
        cores: thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX)),
        memory_total_mib: meminfo_mib(&meminfo, "MemTotal:"),
        memory_available_mib: meminfo_mib(&meminfo, "MemAvailable:"),
        load_1m: load_1m(&read("/proc/loadavg")),
        cpu_pressure_some_avg10: pressure_some_avg10(&read("/proc/pressure/cpu")),
    }
}

fn meminfo_mib(meminfo: &str, key: &str) -> u64 {
    meminfo
        .lines()
        .find_map(|line| line.strip_prefix(key))
        .and_then(|rest| rest.split_whitespace().next())
        .and_then(|kib| kib.parse::<u64>().ok())
        .map_or(0, |kib| kib / 1024)
}

fn load_1m(loadavg: &str) -> f64 {
    loadavg.split_whitespace().next().and_then(|load| load.parse().ok()).unwrap_or(0.0)
}

fn pressure_some_avg10(pressure: &str) -> Option<f64> {
    let some = pressure.lines().find_map(|line| line.strip_prefix("some "))?;
    some.split_whitespace().find_map(|field| field.strip_prefix("avg10="))?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_formats_of_proc() {
        let meminfo = "MemTotal:       24576000 kB\nMemFree:  1 kB\nMemAvailable:   12288000 kB\n";
        assert_eq!(meminfo_mib(meminfo, "MemTotal:"), 24_000);
        assert_eq!(meminfo_mib(meminfo, "MemAvailable:"), 12_000);
        assert_eq!(meminfo_mib("", "MemTotal:"), 0);
        assert!((load_1m("1.25 0.50 0.10 1/100 4242\n") - 1.25).abs() < 1e-9);
        let psi = "some avg10=12.50 avg60=1.00 avg300=0.10 total=1\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n";
        assert_eq!(pressure_some_avg10(psi), Some(12.5));
        assert_eq!(pressure_some_avg10(""), None);
    }

    #[test]
    fn this_host_has_cores_and_memory() {
        let facts = host_facts();
        assert!(facts.cores >= 1);
        assert!(facts.memory_total_mib >= facts.memory_available_mib && facts.memory_available_mib > 0);
    }
}
