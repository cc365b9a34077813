//! Trying KVM: a real-mode guest that counts down, timed.
//!
//! Hardware runs the loop at about one iteration a cycle or two: 1,000,000 in a few milliseconds at most. A nested KVM that emulates each instruction was measured at 1.2 million iterations a
//! second. The rounds grow tenfold from 1,000, so that such a host is told apart after some 90 ms of trying, and each round of a guest that runs at all ends by itself. A guest that does not
//! is interrupted by a signal to its thread: KVM_RUN then returns EINTR (Linux, `Documentation/virt/kvm/api.rst`, 4.10).

use std::os::unix::thread::JoinHandleExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use nix::sys::pthread::pthread_kill;
use nix::sys::signal::Signal;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};

use super::KvmProbe;
use crate::sys;

/// `l: dec ecx; jnz l; hlt` in 16-bit code; the count is put into ECX before each round.
const COUNT_DOWN: &[u8] = &[0x66, 0x49, 0x75, 0xfc, 0xf4];

/// Iterations of each round.
const ROUNDS: [u64; 4] = [1_000, 10_000, 100_000, 1_000_000];

/// How long the last round may take: 25 times what hardware needs, an eighth of what was measured under emulation.
const LAST_ROUND_MAX: Duration = Duration::from_millis(100);

/// How often the last round is tried, the quickest counting: a busy host can hold up any single one.
const LAST_ROUND_TRIES: u32 = 3;

/// How long all of it may take.
const DEADLINE: Duration = Duration::from_secs(2);

/// How often, and how many times at most, the thread of a guest that does not end is interrupted: one signal could arrive just before KVM_RUN is entered.
const KICK_PAUSE: Duration = Duration::from_millis(10);
const KICKS_MAX: u32 = 100;

/// The version of the KVM API that never changes any more (Linux, `Documentation/virt/kvm/api.rst`, 4.1).
const API_VERSION: i32 = 12;

/// Tries it, in a thread, with a deadline.
pub(super) async fn probe() -> KvmProbe {
    run(COUNT_DOWN, DEADLINE).await
}

async fn run(code: &'static [u8], deadline: Duration) -> KvmProbe {
    let stop = Arc::new(AtomicBool::new(false));
    let (tell, told) = oneshot::channel();
    let seen = stop.clone();
    let thread = std::thread::Builder::new().name("kvm-probe".to_owned()).spawn(move || {
        let _ = tell.send(try_kvm(code, &seen));
    });
    let thread = match thread {
        Ok(thread) => thread,
        Err(error) => return KvmProbe::failed(format!("no thread to try it in: {error}"), None),
    };
    if let Ok(probe) = timeout(deadline, told).await {
        return probe.unwrap_or_else(|_| KvmProbe::failed("trying it panicked".to_owned(), None));
    }
    stop.store(true, Ordering::Release);
    // SIGURG is ignored by default and so would not interrupt anything; with tokio's handler it does, and does nothing else.
    let handler = signal(SignalKind::from_raw(Signal::SIGURG as i32));
    let mut kicks = 0;
    while handler.is_ok() && !thread.is_finished() && kicks < KICKS_MAX {
        let _ = pthread_kill(thread.as_pthread_t(), Signal::SIGURG);
        kicks += 1;
        sleep(KICK_PAUSE).await;
    }
    let left = if thread.is_finished() { "" } else { ", and it could not be interrupted" };
    KvmProbe::failed(
        format!("a guest of a few instructions was not done after {} ms{left}", deadline.as_millis()),
        Some(API_VERSION),
    )
}

fn try_kvm(code: &[u8], stop: &AtomicBool) -> KvmProbe {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => return KvmProbe::failed(format!("/dev/kvm cannot be opened: {error}"), None),
    };
    let api_version = kvm.get_api_version();
    if api_version != API_VERSION {
        return KvmProbe::failed(format!("KVM API version is {api_version}, not {API_VERSION}"), Some(api_version));
    }
    let (_vm, mut vcpu) = match make_guest(&kvm, code) {
        Ok(guest) => guest,
        Err(what) => return KvmProbe::failed(what, Some(api_version)),
    };
    let mut probe = KvmProbe::failed(String::new(), Some(api_version));
    for (n, &iterations) in ROUNDS.iter().enumerate() {
        let last = n + 1 == ROUNDS.len();
        let tries = if last { LAST_ROUND_TRIES } else { 1 };
        let mut best: Option<Duration> = None;
        for _ in 0..tries {
            match count_down(&mut vcpu, iterations, stop) {
                Ok(elapsed) => best = Some(best.map_or(elapsed, |quickest| quickest.min(elapsed))),
                Err(what) => return KvmProbe { reason: what, ..probe },
            }
            if best.is_some_and(|quickest| quickest <= LAST_ROUND_MAX) {
                break;
            }
        }
        let elapsed = best.unwrap_or_default();
        probe.loop_iterations = iterations;
        probe.loop_elapsed_us = u64::try_from(elapsed.as_micros()).ok();
        let whole = elapsed.as_secs_f64() * ROUNDS[ROUNDS.len() - 1] as f64 / iterations as f64;
        let slow = if last { elapsed > LAST_ROUND_MAX } else { n > 0 && whole > 4.0 * LAST_ROUND_MAX.as_secs_f64() };
        probe.usable = last && !slow;
        probe.reason = format!(
            "a guest loop of {iterations} iterations took {:.2} ms ({:.1} million a second; at least {:.0} are needed)",
            elapsed.as_secs_f64() * 1e3,
            iterations as f64 / elapsed.as_secs_f64().max(1e-9) / 1e6,
            ROUNDS[ROUNDS.len() - 1] as f64 / LAST_ROUND_MAX.as_secs_f64() / 1e6,
        );
        if slow {
            break;
        }
    }
    probe
}

/// The VM is returned along with its vCPU: it must outlive it.
fn make_guest(kvm: &Kvm, code: &[u8]) -> Result<(VmFd, VcpuFd), String> {
    let failed = |what: &str| {
        let what = what.to_owned();
        move |error: kvm_ioctls::Error| format!("{what} failed: {error}")
    };
    let vm = kvm.create_vm().map_err(failed("KVM_CREATE_VM"))?;
    // Intel CPUs without "unrestricted guest" need three pages for real mode, anywhere below 4 GiB that the guest does not use.
    vm.set_tss_address(0xfffb_d000).map_err(failed("KVM_SET_TSS_ADDR"))?;
    sys::give_guest_one_page(&vm, code).map_err(failed("KVM_SET_USER_MEMORY_REGION"))?;
    let vcpu = vm.create_vcpu(0).map_err(failed("KVM_CREATE_VCPU"))?;
    let mut sregs = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    vcpu.set_sregs(&sregs).map_err(failed("KVM_SET_SREGS"))?;
    Ok((vm, vcpu))
}

fn count_down(vcpu: &mut VcpuFd, iterations: u64, stop: &AtomicBool) -> Result<Duration, String> {
    let mut regs = vcpu.get_regs().map_err(|error| format!("KVM_GET_REGS failed: {error}"))?;
    regs.rip = 0;
    regs.rcx = iterations;
    // Bit 1 is always set (Intel SDM, volume 1, 3.4.3).
    regs.rflags = 2;
    vcpu.set_regs(&regs).map_err(|error| format!("KVM_SET_REGS failed: {error}"))?;
    let begin = Instant::now();
    loop {
        match vcpu.run() {
            Ok(VcpuExit::Hlt) => return Ok(begin.elapsed()),
            Ok(exit) => return Err(format!("the guest loop ended in {exit:?}")),
            // EINTR: some signal, ours if `stop` is set.
            Err(error) if error.errno() == nix::errno::Errno::EINTR as i32 => {
                if stop.load(Ordering::Acquire) {
                    return Err("interrupted at the deadline".to_owned());
                }
            }
            Err(error) => return Err(format!("KVM_RUN failed: {error}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_guest_that_never_ends_is_given_up_at_the_deadline() {
        let begin = Instant::now();
        // `l: jmp l`
        let probe = run(&[0xeb, 0xfe], Duration::from_millis(100)).await;
        assert!(!probe.usable, "{probe:?}");
        assert!(begin.elapsed() < Duration::from_secs(1), "{probe:?} after {:?}", begin.elapsed());
        if std::fs::File::options().read(true).write(true).open("/dev/kvm").is_ok() {
            assert_eq!(probe.reason, "a guest of a few instructions was not done after 100 ms");
        }
    }

    #[tokio::test]
    async fn the_verdict_comes_with_figures_or_a_reason() {
        let probe = probe().await;
        assert!(!probe.reason.is_empty());
        if probe.usable {
            assert_eq!(probe.loop_iterations, 1_000_000);
        }
        if let Some(elapsed_us) = probe.loop_elapsed_us {
            assert!(probe.reason.contains("million a second"), "{probe:?}");
            assert_eq!(probe.usable, probe.loop_iterations == 1_000_000 && elapsed_us <= 100_000, "{probe:?}");
        }
    }
}
