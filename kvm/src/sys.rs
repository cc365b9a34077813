//! The one place of this crate with unsafe code: what runs between fork and exec, and guest memory for the KVM probe.
#![expect(
    unsafe_code,
    reason = "a hook between fork and exec, and memory handed to the kernel, cannot be had safely; both are audited here"
)]

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use nix::errno::Errno;
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, getpid, getppid};

/// Size of the guest memory that [`give_guest_one_page`] maps: one page of x86-64.
pub(crate) const PAGE_BYTES: usize = 4096;

/// Has the child killed (SIGKILL) when the thread that starts it ends, and with it when this process does (prctl(2), `PR_SET_PDEATHSIG`).
///
/// A parent that died between fork and prctl sent no signal: the child then sees another parent than it should and does not exec at all.
pub(crate) fn die_with_parent(command: &mut Command) {
    let parent = getpid();
    // SAFETY: the closure runs in the forked child of a threaded process, where only async-signal-safe calls are allowed. It makes two system calls, prctl and getppid, through
    // nix wrappers that neither allocate nor lock; its only capture is a plain integer; and its errors are built from a raw code, which does not allocate either.
    unsafe {
        command.pre_exec(move || still_owned(parent));
    }
}

fn still_owned(parent: Pid) -> io::Result<()> {
    prctl::set_pdeathsig(Signal::SIGKILL).map_err(io::Error::from)?;
    if getppid() == parent { Ok(()) } else { Err(io::Error::from_raw_os_error(Errno::ESRCH as i32)) }
}

/// Memory that a guest can run in: aligned as the kernel wants it.
#[repr(align(4096))]
struct GuestPage([u8; PAGE_BYTES]);

/// Maps one page, beginning with `code` and otherwise zero, at guest physical address 0 of `vm`.
///
/// The page is never freed: the kernel may read and write it for as long as the VM's descriptors live, and a vCPU thread that had to be given up may keep them. A process probes once.
pub(crate) fn give_guest_one_page(vm: &VmFd, code: &[u8]) -> Result<(), kvm_ioctls::Error> {
    let mut page = Box::new(GuestPage([0; PAGE_BYTES]));
    let fits = code.len().min(PAGE_BYTES);
    page.0[..fits].copy_from_slice(&code[..fits]);
    let address = Box::into_raw(page);
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: PAGE_BYTES as u64,
        userspace_addr: address as u64,
    };
    // SAFETY: `address` is a page-aligned allocation of `memory_size` bytes that is leaked, so it stays valid for as long as the kernel can use it; nothing else keeps a
    // reference to it, so the guest's writes race with nobody; and the VM has no other memory slot to overlap with (callers create the VM for this one page).
    unsafe { vm.set_user_memory_region(region) }
}
