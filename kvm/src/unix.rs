//! Connecting to a unix socket that a child is about to listen on.

use std::io;
use std::time::Duration;

use camino::Utf8Path;
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep};

use crate::error::Error;

const FIRST_PAUSE: Duration = Duration::from_millis(2);
const LONGEST_PAUSE: Duration = Duration::from_millis(50);

/// Connects as soon as somebody listens. No event tells of another process's `listen`, so this asks again, ever less often, until the deadline; then with the last error.
pub(crate) async fn connect_when_there(path: &Utf8Path, deadline: Instant) -> io::Result<UnixStream> {
    let mut pause = FIRST_PAUSE;
    loop {
        match UnixStream::connect(path.as_std_path()).await {
            Ok(stream) => return Ok(stream),
            Err(error) => {
                let not_yet = matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused | io::ErrorKind::WouldBlock
                );
                if !not_yet || Instant::now() + pause >= deadline {
                    return Err(error);
                }
            }
        }
        sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Makes sure that nobody listens on a path yet, so that what is connected to later is the child that is about to be started. A socket that nobody listens on any more is removed.
pub(crate) async fn claim(path: &Utf8Path) -> Result<(), Error> {
    let refused = |action, source| Err(Error::Io { action, path: path.to_owned(), source });
    match UnixStream::connect(path.as_std_path()).await {
        Ok(_) => refused("use socket", io::Error::from(io::ErrorKind::AddrInUse)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => match std::fs::remove_file(path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => refused("remove stale socket", source),
            _ => Ok(()),
        },
        Err(source) => refused("use socket", source),
    }
}
