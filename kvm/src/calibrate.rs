//! How fast guest code runs here, measured by a guest: what scales a lab's deadlines.
//!
//! The guest is a 64 KiB firmware image of its own (`-bios`), so that nothing but it runs: a loop of a read-modify-write of memory, a call, a return and a conditional jump in 16-bit real mode,
//! then a write to QEMU's `isa-debug-exit` port. Such a mix, other than a bare count, goes through what makes translated code slow (address lookups, indirect jumps). Two runs with
//! different counts are timed from the start of the process to its end; what differs is the loop alone.

use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use crate::accel::Accel;
use crate::error::Error;
use crate::process::{CommandSpec, Supervisor};
use crate::spec::QEMU;

/// Iterations a second of the same four instructions run natively, which is what hardware virtualisation does with a guest's: 355 million at best in five runs of 200 million, as 64-bit
/// code, on a shared Intel Xeon at 2.6 GHz.
///
/// It is a fixed point that makes figures of different hosts comparable. Not measured under hardware KVM itself, and a loop is no boot: booting Linux under TCG loses more than this says.
pub const REFERENCE_ITERATIONS_PER_S: f64 = 350e6;

/// What TCG (QEMU 7.2) made of it on the same host: 72 to 99 million in three runs.
const TCG_TYPICAL_ITERATIONS_PER_S: f64 = 90e6;

/// What the guest writes to the exit port; QEMU then exits with twice that and one (QEMU, `hw/misc/debugexit.c`).
const DONE: u8 = 0x2a;
const DONE_STATUS: i32 = 2 * DONE as i32 + 1;

/// How long one run may take.
const RUN_MAX: Duration = Duration::from_secs(10);

/// The smallest firmware QEMU's PC machines take.
const FIRMWARE_BYTES: usize = 64 * 1024;

/// The speed of a guest on one virtual CPU.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// Under which acceleration.
    pub accel: Accel,
    /// Loop iterations a second.
    pub iterations_per_s: f64,
    /// How many times slower than [`REFERENCE_ITERATIONS_PER_S`]; at least 1.
    pub slowdown: f64,
    /// Whether it was measured on this host, or assumed.
    pub measured: bool,
}

impl Calibration {
    /// A typical figure for the acceleration, without measuring.
    #[must_use]
    pub fn assumed(accel: Accel) -> Self {
        let iterations_per_s = match accel {
            Accel::Kvm => REFERENCE_ITERATIONS_PER_S,
            Accel::Tcg => TCG_TYPICAL_ITERATIONS_PER_S,
        };
        Self::new(accel, iterations_per_s, false)
    }

    fn new(accel: Accel, iterations_per_s: f64, measured: bool) -> Self {
        Self { accel, iterations_per_s, slowdown: (REFERENCE_ITERATIONS_PER_S / iterations_per_s).max(1.0), measured }
    }
}

/// Measures it: two runs of QEMU, three where it was not in memory yet, together a fifth of a second.
///
/// # Errors
/// [`Error::Calibration`] where the guest did not do its loop; what starting QEMU can fail with.
pub async fn calibrate(accel: Accel, supervisor: &Supervisor) -> Result<Calibration, Error> {
    let many: u32 = match accel {
        // About a twentieth of a second either way, for which every run waits: ten times what a start of QEMU varies by.
        Accel::Kvm => 30_000_000,
        Accel::Tcg => 5_000_000,
    };
    let few = 1;
    let mut start_up = run(accel, few, supervisor).await?;
    let whole = run(accel, many, supervisor).await?;
    // The first start of QEMU reads it from the disk; taken off the second, it would make a slow guest look fast.
    if whole < start_up * 5 / 3 {
        start_up = start_up.min(run(accel, few, supervisor).await?);
    }
    // A loop that took no measurable time next to the start-up is as good as the reference.
    let looped = whole.saturating_sub(start_up).max(Duration::from_millis(1));
    Ok(Calibration::new(accel, f64::from(many - few) / looped.as_secs_f64(), true))
}

async fn run(accel: Accel, iterations: u32, supervisor: &Supervisor) -> Result<Duration, Error> {
    let failed = |what: String| Error::Calibration { accel, what };
    // In memory, so that nothing is left behind whatever happens; QEMU opens it through this process's descriptor.
    let memory = memfd_create("harness-calibrate", MFdFlags::MFD_CLOEXEC)
        .map_err(|error| failed(format!("no memory file: {error}")))?;
    let path = format!("/proc/{}/fd/{}", std::process::id(), memory.as_raw_fd());
    std::fs::write(&path, firmware(iterations)).map_err(|error| failed(format!("could not write {path}: {error}")))?;
    let (accel_option, cpu) = match accel {
        Accel::Kvm => ("kvm", "host"),
        Accel::Tcg => ("tcg", "max"),
    };
    let command = CommandSpec::new("qemu calibration", QEMU).args([
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-machine",
        "pc",
        "-accel",
        accel_option,
        "-cpu",
        cpu,
        "-m",
        "16M",
        "-bios",
        &path,
        "-device",
        "isa-debug-exit,iobase=0xf4,iosize=0x04",
    ]);
    let begin = Instant::now();
    let process = supervisor.spawn(command).await?;
    let Ok(exit) = timeout(RUN_MAX, process.exited()).await else {
        process.terminate(Duration::ZERO).await?;
        return Err(failed(format!(
            "a guest loop of {iterations} iterations was not done after {} ms",
            RUN_MAX.as_millis()
        )));
    };
    let elapsed = begin.elapsed();
    if exit.code == Some(DONE_STATUS) {
        return Ok(elapsed);
    }
    Err(failed(format!("QEMU {exit} instead of with the guest's {DONE_STATUS}: {}", process.stderr_tail().trim())))
}

/// The firmware: the code at the image's start, and at the reset vector, 16 bytes before its end, a jump there.
fn firmware(iterations: u32) -> Vec<u8> {
    let [a, b, c, d] = iterations.to_le_bytes();
    #[rustfmt::skip]
    let code = [
        0x31, 0xc0,                   // 00     xor ax, ax
        0x8e, 0xd8,                   // 02     mov ds, ax
        0x8e, 0xd0,                   // 04     mov ss, ax
        0xbc, 0x00, 0x70,             // 06     mov sp, 0x7000
        0xbf, 0x00, 0x05,             // 09     mov di, 0x500
        0x66, 0xb9, a, b, c, d,       // 0c     mov ecx, iterations
        0xff, 0x05,                   // 12 l:  inc word [di]
        0xe8, 0x0a, 0x00,             // 14     call f
        0x66, 0x49,                   // 17     dec ecx
        0x75, 0xf7,                   // 19     jnz l
        0xb0, DONE,                   // 1b     mov al, DONE
        0xe6, 0xf4,                   // 1d     out 0xf4, al
        0xeb, 0xfe,                   // 1f     jmp $
        0xc3,                         // 21 f:  ret
    ];
    let mut image = vec![0xf4; FIRMWARE_BYTES];
    image[..code.len()].copy_from_slice(&code);
    // jmp near to offset 0: from the next instruction, 0xfff3, on by 0x000d.
    image[FIRMWARE_BYTES - 16..FIRMWARE_BYTES - 13].copy_from_slice(&[0xe9, 0x0d, 0x00]);
    image
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slowdown_is_against_the_reference_and_never_below_one() {
        assert!((Calibration::new(Accel::Tcg, REFERENCE_ITERATIONS_PER_S / 8.0, true).slowdown - 8.0).abs() < 1e-9);
        assert!((Calibration::new(Accel::Kvm, REFERENCE_ITERATIONS_PER_S * 2.0, true).slowdown - 1.0).abs() < 1e-9);
        assert!(Calibration::assumed(Accel::Tcg).slowdown > Calibration::assumed(Accel::Kvm).slowdown);
        assert!(!Calibration::assumed(Accel::Tcg).measured);
    }

    #[test]
    fn the_firmware_holds_the_count_and_ends_at_the_reset_vector() {
        let image = firmware(0x0403_0201);
        assert_eq!(image.len(), FIRMWARE_BYTES);
        assert_eq!(image[0x0e..0x12], [1, 2, 3, 4]);
        let jump = u16::from_le_bytes([image[FIRMWARE_BYTES - 15], image[FIRMWARE_BYTES - 14]]);
        assert_eq!(0xfff3u16.wrapping_add(jump), 0, "the jump wraps to the image's first byte");
        assert_eq!(0x17 + 0x0au16, 0x21, "the call's target");
    }
}
