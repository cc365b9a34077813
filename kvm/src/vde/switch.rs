//! One `vde_switch`, a child of ours in the foreground.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::{Instant, timeout};

use super::mgmt::{Answer, COMMAND_TIMEOUT, Mgmt};
use super::table::{NO_VLAN, expected_ports, expected_vlans, parse_endpoints, parse_ports, parse_vlans};
use super::{PortSpec, SwitchExit, SwitchSpec};
use crate::error::Error;
use crate::process::{CommandSpec, NewOutput, OutputPosition, Process, Stdin, Supervisor};
use crate::unix;

/// How long a switch may take until it answers. A busy host needs seconds; a switch that failed ends by itself, which is seen at once.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a switch may take to be gone after its management socket broke, before that counts as a fault of its own.
const EXIT_AFTER_CLOSE: Duration = Duration::from_secs(2);

/// A running switch. Dropping it kills the process at once, as a backstop to [`Switch::stop`].
#[derive(Debug)]
pub struct Switch {
    spec: SwitchSpec,
    process: Process,
    /// Taken out for the time of a command: one that failed or was cancelled half-way is not put back.
    mgmt: Mutex<Option<Mgmt>>,
}

impl Switch {
    /// Starts a switch, sets up its ports and VLANs, and checks that it shows them as they were asked for.
    ///
    /// # Errors
    /// [`Error::SwitchSpec`]; [`Error::Io`] where the management socket is in use already; [`Error::ProgramNotFound`]; [`Error::SwitchExited`] where it ended instead; [`Error::SwitchRefused`], [`Error::SwitchProtocol`], [`Error::SwitchMismatch`].
    pub async fn start(spec: SwitchSpec, sup: &Supervisor) -> Result<Self, Error> {
        spec.validate()?;
        // A second switch on one path would end, but not before this side has talked to the first.
        unix::claim(&spec.mgmt_socket).await?;
        // Ports are numbered from 1, and the table has a slot 0 as well.
        let numports = spec.ports.iter().map(|port| port.port).max().unwrap_or(0) + 1;
        let numports = numports.to_string();
        let mut command = CommandSpec::new(format!("vde_switch {}", spec.name), "vde_switch").args([
            // Else it would run commands from /etc/vde2/vde_switch.rc or ~/.vderc.
            "-f",
            "/dev/null",
            "-n",
            &numports,
            "-s",
            spec.socket_dir.as_str(),
            "-m",
            "0600",
            "--dirmode",
            "0700",
            "-M",
            spec.mgmt_socket.as_str(),
            "--mgmtmode",
            "0600",
        ]);
        // In the foreground it exits at the end of its input.
        command.stdin = Stdin::HeldOpen;
        let process = sup.spawn(command).await?;
        let switch = Self { spec, process, mgmt: Mutex::new(None) };
        tokio::select! {
            biased;
            exit = switch.died() => Err(exit.into()),
            done = switch.set_up() => done,
        }?;
        Ok(switch)
    }

    async fn set_up(&self) -> Result<(), Error> {
        let connected = Mgmt::connect(&self.spec.mgmt_socket, Instant::now() + START_TIMEOUT).await;
        *self.mgmt.lock().await = Some(self.or_exit(connected).await?);
        let ports = &self.spec.ports;
        let vlans: BTreeSet<u16> = ports
            .iter()
            .flat_map(|port| port.tagged_vlans.iter().copied().chain(port.native_vlan))
            .filter(|&vlan| vlan != 0)
            .collect();
        for vlan in vlans {
            self.command(&format!("vlan/create {vlan}")).await?;
        }
        for PortSpec { port, native_vlan, tagged_vlans, .. } in ports {
            self.command(&format!("port/create {port}")).await?;
            self.command(&format!("port/setvlan {port} {}", native_vlan.unwrap_or(NO_VLAN))).await?;
            for vlan in tagged_vlans {
                self.command(&format!("vlan/addport {vlan} {port}")).await?;
            }
        }
        self.verify().await
    }

    /// Holds what the switch shows of its VLANs and ports against its specification.
    ///
    /// # Errors
    /// [`Error::SwitchMismatch`], and what [`Switch::command`] fails with.
    pub async fn verify(&self) -> Result<(), Error> {
        let mismatch = |what: &str, expected: String, found: String| {
            Err(Error::SwitchMismatch { switch: self.spec.name.clone(), what: what.to_owned(), expected, found })
        };
        let listing = self.command("vlan/allprint").await?;
        let (expected, found) = (expected_vlans(&self.spec.ports), parse_vlans(&listing));
        if found.as_ref() != Some(&expected) {
            return mismatch(
                "VLAN members (VLAN: port, tagged)",
                format!("{expected:?}"),
                found.map_or_else(|| format!("{listing:?}"), |table| format!("{table:?}")),
            );
        }
        let (expected, found) = (expected_ports(&self.spec.ports), parse_ports(&self.command("port/allprint").await?));
        // Ports that somebody took without a number carry untagged frames of VLAN 0 only, and are none of ours.
        if expected.iter().any(|(port, vlan)| found.get(port) != Some(vlan)) {
            return mismatch("untagged VLANs (port: VLAN)", format!("{expected:?}"), format!("{found:?}"));
        }
        Ok(())
    }

    /// Runs a management command and returns its data lines.
    ///
    /// # Errors
    /// [`Error::SwitchRefused`] with the switch's answer; [`Error::SwitchProtocol`] without one; [`Error::SwitchExited`] where it ended.
    pub async fn command(&self, command: &str) -> Result<Vec<String>, Error> {
        let mut slot = self.mgmt.lock().await;
        let mut mgmt = match slot.take() {
            Some(mgmt) => mgmt,
            None => {
                let connected = Mgmt::connect(&self.spec.mgmt_socket, Instant::now() + COMMAND_TIMEOUT).await;
                self.or_exit(connected).await?
            }
        };
        let answered = mgmt.command(command).await;
        let answer = self.or_exit(answered).await?;
        *slot = Some(mgmt);
        match answer {
            Answer::Success(lines) => Ok(lines),
            Answer::Refused(answer) => {
                Err(Error::SwitchRefused { switch: self.spec.name.clone(), command: command.to_owned(), answer })
            }
        }
    }

    /// The process ids of who is plugged into a port.
    ///
    /// # Errors
    /// What [`Switch::command`] fails with.
    pub async fn plugged(&self, port: u16) -> Result<Vec<u32>, Error> {
        Ok(parse_endpoints(&self.command(&format!("port/allprint {port}")).await?))
    }

    /// A management failure, or, where the switch has ended, that.
    pub(super) async fn or_exit<T>(&self, result: Result<T, String>) -> Result<T, Error> {
        match result {
            Ok(value) => Ok(value),
            Err(what) => Err(match timeout(EXIT_AFTER_CLOSE, self.died()).await {
                Ok(exit) => exit.into(),
                Err(_) => Error::SwitchProtocol { switch: self.spec.name.clone(), what },
            }),
        }
    }

    /// What it has written to its standard output and error since `position`, which is moved past it.
    pub fn new_output(&self, position: &mut OutputPosition) -> NewOutput {
        self.process.new_output(position)
    }

    /// The switch's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.spec.name
    }

    /// What it was started from.
    #[must_use]
    pub fn spec(&self) -> &SwitchSpec {
        &self.spec
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Waits for its end. Cancel-safe; any number of callers may wait.
    pub async fn died(&self) -> SwitchExit {
        let exit = self.process.exited().await;
        SwitchExit { name: self.spec.name.clone(), exit, output_tail: output_tail(&self.process) }
    }

    /// SIGTERM, on which it removes its sockets; the grace; SIGKILL. Of one that has ended, tells how.
    ///
    /// # Errors
    /// [`Error::Survived`].
    pub async fn stop(&self, grace: Duration) -> Result<SwitchExit, Error> {
        self.process.terminate(grace).await?;
        Ok(self.died().await)
    }
}

impl From<SwitchExit> for Error {
    fn from(exit: SwitchExit) -> Self {
        Self::SwitchExited(Box::new(exit))
    }
}

pub(super) fn output_tail(process: &Process) -> String {
    format!("{}{}", process.stdout_tail(), process.stderr_tail())
}
