//! A local TCP port whose connections come out in the guest.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::error::GuestError;
use super::ssh::Guest;

/// Connections carried at one time; further ones wait in the listen queue.
const CONNECTIONS_MAX: usize = 32;

/// A port on 127.0.0.1, chosen by the kernel, forwarded to an address as seen from the guest.
///
/// A connection that the guest cannot make is closed. Dropping the forward ends it and its connections.
#[derive(Debug)]
pub struct Forward {
    local_addr: SocketAddr,
    task: tokio::task::JoinHandle<()>,
}

impl Forward {
    /// Opens the port. The guest's side is connected to when somebody connects to this one.
    pub async fn open(guest: Guest, remote_host: &str, remote_port: u16) -> Result<Forward, GuestError> {
        let local = |source| GuestError::Local {
            node: guest.node().to_owned(),
            what: format!("local port for {remote_host}:{remote_port}"),
            source,
        };
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.map_err(local)?;
        let local_addr = listener.local_addr().map_err(local)?;
        let task = tokio::spawn(serve(listener, guest.clone(), remote_host.to_owned(), remote_port));
        Ok(Forward { local_addr, task })
    }

    /// Where to connect to.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Ends the forward and waits until the port is free again.
    pub async fn close(mut self) {
        self.task.abort();
        let _ = (&mut self.task).await;
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(listener: TcpListener, guest: Guest, host: String, port: u16) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    // Dropped with this future, which ends every connection with the forward.
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        let accepted = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(e) => {
                // Out of descriptors, mostly: the connections in use give theirs back.
                tracing::warn!(node = guest.node(), error = %e, "forward: accept failed");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                continue;
            }
        };
        let (guest, host) = (guest.clone(), host.clone());
        connections.spawn(async move {
            carry(accepted, &guest, &host, port).await;
            drop(slot);
        });
    }
}

async fn carry(mut local: TcpStream, guest: &Guest, host: &str, port: u16) {
    // Without effect on correctness when refused.
    let _ = local.set_nodelay(true);
    match guest.direct_tcpip(host, port).await {
        Ok(mut remote) => {
            // Either side's end is the other's end; there is nobody to tell about it.
            let _ = tokio::io::copy_bidirectional(&mut local, &mut remote).await;
        }
        Err(e) => tracing::debug!(node = guest.node(), error = %e, "forward: not connected"),
    }
}
