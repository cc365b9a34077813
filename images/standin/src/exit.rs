//! How the program ends: k3s's last lines and exit statuses, and the signals that stop it.

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::logfmt::{self, Level};

/// An end.
#[derive(Debug)]
pub(crate) enum Exit {
    /// Asked to stop: status 0.
    Clean,
    /// `level=fatal`: status 1.
    Fatal(String),
    /// A Go panic: status 2.
    Panic(String),
}

impl Exit {
    /// Prints what k3s prints last and returns the exit status.
    pub(crate) fn report(&self) -> u8 {
        match self {
            Self::Clean => 0,
            Self::Fatal(message) => {
                logfmt::logrus(Level::Fatal, message);
                1
            }
            Self::Panic(message) => {
                logfmt::raw_line(&panic_text(message));
                2
            }
        }
    }
}

/// A Go runtime's panic, at the place where k3s saves its bootstrap data.
fn panic_text(message: &str) -> String {
    format!(
        "panic: {message}\n\ngoroutine 203 [running]:\ngithub.com/rancher/k3s/pkg/cluster.(*Cluster).Start.func1(0xc000a41b60, 0xc0002b2ea0, 0x5d3f3e8, 0xc000a1e000)\n\
         \t/go/src/github.com/rancher/k3s/pkg/cluster/cluster.go:103 +0x1e5\ncreated by github.com/rancher/k3s/pkg/cluster.(*Cluster).Start\n\
         \t/go/src/github.com/rancher/k3s/pkg/cluster/cluster.go:98 +0x6bf"
    )
}

/// SIGTERM and SIGINT.
pub(crate) struct Stop {
    term: Signal,
    int: Signal,
}

impl Stop {
    pub(crate) fn new() -> std::io::Result<Self> {
        Ok(Self { term: signal(SignalKind::terminate())?, int: signal(SignalKind::interrupt())? })
    }

    /// Returns when the program is to stop. Cancel-safe.
    pub(crate) async fn wait(&mut self) {
        let name = tokio::select! {
            _ = self.term.recv() => "terminated",
            _ = self.int.recv() => "interrupt",
        };
        logfmt::info(format!("Received signal {name}, shutting down"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_reads_like_gos() {
        let text = panic_text("bootstrap data already found and encrypted with different token");
        let mut lines = text.lines();
        assert_eq!(lines.next(), Some("panic: bootstrap data already found and encrypted with different token"));
        assert_eq!(lines.next(), Some(""));
        assert!(lines.next().unwrap().starts_with("goroutine "));
    }
}
