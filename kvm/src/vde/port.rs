//! This process itself, plugged into a switch: Ethernet frames in and out, without a machine or a helper behind the port.
//!
//! Speaks the switch's own protocol (version 3, as libvdeplug does; `vde_switch/datasock.c` of vde2 2.3.2): a request on the stream socket `ctl` names a datagram socket of the client's
//! and the port it wants; the answer is the address of the switch's datagram socket for it. From then on each datagram is one frame, without a checksum. The port is free again when the
//! stream is closed, which it is by the kernel at the latest.

use std::fs;
use std::io;
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixDatagram, UnixStream};
use tokio::time::timeout;

use super::Switch;
use crate::error::Error;

/// The longest frame that is taken, in bytes; what is longer (no guest's MTU here allows it) arrives cut.
pub const FRAME_MAX_BYTES: usize = 9 * 1024;

/// How long the switch may take to answer a request for a port.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// `SWITCH_MAGIC`, in the host's byte order like all numbers here.
const MAGIC: u32 = 0xfeed_face;

/// The version of the request, and its type: `REQ_NEW_CONTROL`, with the port number above the lowest byte.
const VERSION: u32 = 3;
const REQ_NEW_CONTROL: u32 = 0;

/// `struct sockaddr_un`: the family, then a path that ends with a zero byte.
const SOCKADDR_UN_BYTES: usize = 2 + SUN_PATH_BYTES;
const SUN_PATH_BYTES: usize = crate::UNIX_PATH_MAX_BYTES + 1;
const AF_UNIX: u16 = 1;

/// Longest description: with it a request has at most 256 bytes, which the switch reads at once.
const DESCRIPTION_MAX_BYTES: usize = 100;

/// A port of a switch that this process holds. Dropping it unplugs it.
#[derive(Debug)]
pub struct Port {
    name: String,
    ctl: UnixStream,
    data: UnixDatagram,
    /// Last, so that it goes when the sockets are closed.
    _socket: OwnSocket,
}

/// The datagram socket's file, removed with the port.
#[derive(Debug)]
struct OwnSocket(Utf8PathBuf);

impl Drop for OwnSocket {
    fn drop(&mut self) {
        // The switch's folder may be gone already, and the socket with it.
        let _ = fs::remove_file(&self.0);
    }
}

impl Port {
    /// Plugs this process into `port` of `switch` and waits until the switch has taken it. `label` is what the switch shows of it.
    ///
    /// # Errors
    /// [`Error::Io`] where this side's socket cannot be made, such as when this process holds that port already; [`Error::SwitchProtocol`] where the switch does not have the port or does not give it;
    /// [`Error::SwitchExited`] where it ended instead.
    pub async fn plug(switch: &Switch, port: u16, label: &str) -> Result<Self, Error> {
        let dir = &switch.spec().socket_dir;
        let what = |why| format!("port {port} could not be had for {label}: {why}");
        // The switch leaves a request for a port it does not have unanswered.
        if !switch.spec().ports.iter().any(|spec| spec.port == port) {
            let what = what("it has no such port".to_owned());
            return Err(Error::SwitchProtocol { switch: switch.name().to_owned(), what });
        }
        let pid = std::process::id();
        // Named as libvdeplug names its clients' sockets, for which the switch's folder has room.
        let path = dir.join(format!(".{pid}-{port:05}"));
        let data = UnixDatagram::bind(&path).map_err(|source| Error::Io {
            action: "make the socket of a switch port",
            path: path.clone(),
            source,
        })?;
        let socket = OwnSocket(path);
        let asked = timeout(ANSWER_TIMEOUT, ask(dir, port, &socket.0, &format!("{label} pid={pid}"))).await;
        let answered = asked.unwrap_or_else(|_| Err(format!("unanswered after {} ms", ANSWER_TIMEOUT.as_millis())));
        let answered = answered.and_then(|(ctl, theirs)| {
            data.connect(&theirs).map_err(|error| format!("could not connect to {theirs}: {error}"))?;
            Ok(ctl)
        });
        let ctl = switch.or_exit(answered.map_err(what)).await?;
        Ok(Self { name: format!("{}:{port}", switch.name()), ctl, data, _socket: socket })
    }

    /// Its name: `SWITCH:PORT`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Waits for the next frame that reaches the port, and returns its length. Cancel-safe.
    ///
    /// # Errors
    /// [`Error::PortClosed`] once the switch is gone or has taken the port away.
    pub async fn receive(&self, frame: &mut [u8]) -> Result<usize, Error> {
        tokio::select! {
            biased;
            received = self.data.recv(frame) => received.map_err(|error| self.closed_by(&error.to_string())),
            () = self.closed() => Err(self.closed_by("the switch closed it")),
        }
    }

    /// Sends one frame.
    ///
    /// # Errors
    /// [`Error::PortClosed`].
    pub async fn send(&self, frame: &[u8]) -> Result<(), Error> {
        tokio::select! {
            biased;
            sent = self.data.send(frame) => sent.map(drop).map_err(|error| self.closed_by(&error.to_string())),
            () = self.closed() => Err(self.closed_by("the switch closed it")),
        }
    }

    /// Completes when the switch ends the port; it sends nothing else on the stream.
    async fn closed(&self) {
        let mut rest = [0_u8; 64];
        loop {
            if self.ctl.readable().await.is_err() {
                return;
            }
            match self.ctl.try_read(&mut rest) {
                Ok(0) => return,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return,
            }
        }
    }

    fn closed_by(&self, why: &str) -> Error {
        Error::PortClosed { port: self.name.clone(), why: why.to_owned() }
    }
}

/// Asks for a port; the stream that holds it, and the switch's socket for it.
async fn ask(
    dir: &Utf8Path,
    port: u16,
    socket: &Utf8Path,
    description: &str,
) -> Result<(UnixStream, Utf8PathBuf), String> {
    let failed = |error: io::Error| error.to_string();
    let mut ctl = UnixStream::connect(dir.join("ctl").as_std_path()).await.map_err(failed)?;
    ctl.write_all(&request(port, socket, description)).await.map_err(failed)?;
    let mut answer = [0_u8; SOCKADDR_UN_BYTES];
    ctl.read_exact(&mut answer).await.map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => "the switch refused it".to_owned(),
        _ => error.to_string(),
    })?;
    let theirs = path_of(&answer).ok_or("the switch's answer names no socket")?;
    // `DIR/PORT.NUMBER`, with at least three digits for the port: another port than the one asked for carries other VLANs.
    let given = theirs.file_name().and_then(|name| name.split('.').next()?.parse().ok());
    if given == Some(port) { Ok((ctl, theirs)) } else { Err(format!("the switch gave another port, at {theirs}")) }
}

fn request(port: u16, socket: &Utf8Path, description: &str) -> Vec<u8> {
    let mut request = Vec::with_capacity(12 + SOCKADDR_UN_BYTES + DESCRIPTION_MAX_BYTES);
    for number in [MAGIC, VERSION, REQ_NEW_CONTROL | u32::from(port) << 8] {
        request.extend(number.to_ne_bytes());
    }
    request.extend(AF_UNIX.to_ne_bytes());
    let path = socket.as_str().as_bytes();
    let fits = path.len().min(SUN_PATH_BYTES - 1);
    request.extend(&path[..fits]);
    request.resize(request.len() + SUN_PATH_BYTES - fits, 0);
    let fits = description.floor_char_boundary(DESCRIPTION_MAX_BYTES);
    request.extend(description[..fits].bytes());
    request
}

fn path_of(address: &[u8; SOCKADDR_UN_BYTES]) -> Option<Utf8PathBuf> {
    let path = &address[2..];
    let end = path.iter().position(|&byte| byte == 0)?;
    let text = std::str::from_utf8(&path[..end]).ok()?;
    (!text.is_empty()).then(|| text.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_laid_out_as_the_switch_reads_it() {
        let request = request(0x0102, Utf8Path::new("/run/sw/.7-00258"), "dhcp pid=7");
        assert_eq!(request[..4], MAGIC.to_ne_bytes());
        assert_eq!(request[4..8], 3_u32.to_ne_bytes());
        assert_eq!(request[8..12], 0x0001_0200_u32.to_ne_bytes(), "the port above the request's type");
        let address: &[u8; SOCKADDR_UN_BYTES] = request[12..12 + SOCKADDR_UN_BYTES].try_into().unwrap();
        assert_eq!(path_of(address).unwrap(), "/run/sw/.7-00258");
        assert_eq!(&request[12 + SOCKADDR_UN_BYTES..], b"dhcp pid=7");
        let long = super::request(1, Utf8Path::new("/s"), &"é".repeat(200));
        assert!(long.len() <= 256, "{}", long.len());
    }

    #[test]
    fn an_answer_without_a_path_is_none() {
        let mut address = [0_u8; SOCKADDR_UN_BYTES];
        assert_eq!(path_of(&address), None);
        address[2..].fill(b'x');
        assert_eq!(path_of(&address), None, "a path without an end");
    }
}
