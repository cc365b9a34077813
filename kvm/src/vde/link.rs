//! A cable between two switches.
//!
//! One `vde_plug` with two addresses (vdeplug 4, as in Debian 12) passes frames both ways within one process. Two of them with crossed pipes could block on each other under load, and
//! `wirefilter` stays up, spinning, when a switch is gone; this one exits, so that a broken link is seen.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::switch::output_tail;
use super::{LinkExit, Switch};
use crate::error::Error;
use crate::process::{CommandSpec, NewOutput, OutputPosition, Process, Supervisor};

/// How long a link may take until both switches show it.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// How often the switches are asked meanwhile; they tell of a new end only when asked.
const CONNECT_PAUSE: Duration = Duration::from_millis(10);

/// A running link. Dropping it kills the process at once, as a backstop to [`Link::stop`].
#[derive(Debug)]
pub struct Link {
    name: String,
    process: Process,
}

impl Link {
    /// Joins port `a.1` of switch `a.0` with port `b.1` of switch `b.0`, and waits until both switches show it plugged in.
    ///
    /// # Errors
    /// [`Error::ProgramNotFound`]; [`Error::LinkExited`] where it ended instead; what [`Switch::command`] fails with; [`Error::SwitchMismatch`] where a switch does not show it.
    pub async fn connect(a: (&Switch, u16), b: (&Switch, u16), sup: &Supervisor) -> Result<Self, Error> {
        let name = format!("{}:{}-{}:{}", a.0.name(), a.1, b.0.name(), b.1);
        let address = |(switch, port): (&Switch, u16)| format!("vde://{}[{port}]", switch.spec().socket_dir);
        let command = CommandSpec::new(format!("vde_plug {name}"), "vde_plug").args([address(a), address(b)]);
        let link = Self { name, process: sup.spawn(command).await? };
        let plugged_in = async {
            plugged_in(a, link.pid()).await?;
            plugged_in(b, link.pid()).await
        };
        tokio::select! {
            biased;
            exit = link.died() => Err(Error::LinkExited(Box::new(exit))),
            done = plugged_in => done,
        }?;
        Ok(link)
    }

    /// Its name: `SWITCH:PORT-SWITCH:PORT`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it has written to its standard output and error since `position`, which is moved past it.
    pub fn new_output(&self, position: &mut OutputPosition) -> NewOutput {
        self.process.new_output(position)
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Waits for its end, which a switch's end is as well. Cancel-safe; any number of callers may wait.
    pub async fn died(&self) -> LinkExit {
        let exit = self.process.exited().await;
        LinkExit { name: self.name.clone(), exit, output_tail: output_tail(&self.process) }
    }

    /// SIGTERM, the grace, SIGKILL. Of one that has ended, tells how.
    ///
    /// # Errors
    /// [`Error::Survived`].
    pub async fn stop(&self, grace: Duration) -> Result<LinkExit, Error> {
        self.process.terminate(grace).await?;
        Ok(self.died().await)
    }
}

async fn plugged_in((switch, port): (&Switch, u16), pid: u32) -> Result<(), Error> {
    let deadline = Instant::now() + CONNECT_TIMEOUT;
    loop {
        let found = switch.plugged(port).await?;
        if found.contains(&pid) {
            return Ok(());
        }
        if Instant::now() + CONNECT_PAUSE >= deadline {
            return Err(Error::SwitchMismatch {
                switch: switch.name().to_owned(),
                what: format!("processes behind port {port}"),
                expected: format!("the link's, {pid}"),
                found: format!("{found:?} after {} ms", CONNECT_TIMEOUT.as_millis()),
            });
        }
        sleep(CONNECT_PAUSE).await;
    }
}
