//! The machine layer: what accelerates guests here and how fast, QEMU from plain data to a running VM, QMP, VDE switches, and the ownership of every process.
//!
//! Knows nothing of YAML, SSH or k3s. Nothing here prints.

pub mod accel;
pub mod calibrate;
mod error;
pub mod host;
pub mod mac;
pub mod process;
pub mod qmp;
pub mod spec;
mod sys;
mod unix;
pub mod vde;
pub mod vm;

use camino::Utf8Path;

pub use accel::{Accel, AccelChoice, AccelReport, KvmProbe, resolve};
pub use calibrate::{Calibration, calibrate};
pub use error::Error;
pub use host::{HostFacts, host_facts};
pub use mac::{Mac, MacError};
pub use process::{CommandSpec, ExitInfo, NewOutput, OutputPosition, Process, Sink, Stdin, Supervisor, Survivor};
pub use qmp::{Qmp, QmpError, QmpEvent};
pub use spec::{DiskFormat, DiskSpec, NicBackend, NicSpec, SpecError, VmSpec, argv};
pub use vde::{FRAME_MAX_BYTES, Link, LinkExit, Port, PortSpec, Switch, SwitchExit, SwitchSpec, SwitchSpecError};
pub use vm::{Vm, VmEvent, VmExit};

/// The longest path a unix socket can have on Linux: `sun_path` is 108 bytes, one of which ends the text (unix(7)).
pub const UNIX_PATH_MAX_BYTES: usize = 107;

/// Checks a unix socket's path against [`UNIX_PATH_MAX_BYTES`].
///
/// # Errors
/// [`SpecError::SocketPathTooLong`] with the length.
pub fn socket_path_fits(path: &Utf8Path) -> Result<(), SpecError> {
    let bytes = path.as_str().len();
    if bytes > UNIX_PATH_MAX_BYTES {
        return Err(SpecError::SocketPathTooLong { path: path.to_owned(), bytes });
    }
    Ok(())
}
