//! A command whose input and outputs are somebody's streams, byte for byte and without a bound.
//!
//! Unlike every other reader of a channel, this one goes at the pace of whoever takes its output, and so holds
//! up all channels of the connection while that one pauses: it is for a connection of its own.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use russh::ChannelMsg;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::time::Instant;

use super::error::{GuestError, brief};
use super::exec::signal_text;
use super::ssh::Guest;
use super::stream::StreamEnd;

/// Bytes of input sent at one time.
const INPUT_CHUNK_BYTES: usize = 32 * 1024;
/// Time to start the command, before patience.
const START_LIMIT: Duration = Duration::from_secs(20);

impl Guest {
    /// Runs a command line with its streams joined to the caller's, until it ends or `stop` does.
    ///
    /// `None` means that `stop` came first; the command is killed then, and its death waited for. Without
    /// `stdin` the command's input is empty.
    ///
    /// # Errors
    /// [`GuestError::Local`] where a stream of the caller's failed (a closed pipe for example; the command is
    /// killed), [`GuestError::ConnectionLost`] and what starting a command can end with.
    pub async fn pipe<I, O, E>(
        &self,
        command: &str,
        stdin: Option<I>,
        stdout: &mut O,
        stderr: &mut E,
        stop: impl Future<Output = ()>,
    ) -> Result<Option<StreamEnd>, GuestError>
    where
        I: AsyncRead + Unpin,
        O: AsyncWrite + Unpin,
        E: AsyncWrite + Unpin,
    {
        let joined = self.join_streams(command, stdin, stdout, stderr);
        let ended = tokio::select! {
            ended = joined => ended.map(Some),
            () = stop => Ok(None),
        };
        if matches!(ended, Ok(None) | Err(GuestError::Local { .. })) {
            self.idle().await;
        }
        ended
    }

    async fn join_streams<I, O, E>(
        &self,
        command: &str,
        stdin: Option<I>,
        stdout: &mut O,
        stderr: &mut E,
    ) -> Result<StreamEnd, GuestError>
    where
        I: AsyncRead + Unpin,
        O: AsyncWrite + Unpin,
        E: AsyncWrite + Unpin,
    {
        let local = |what: &'static str| {
            move |source| GuestError::Local { node: self.node().to_owned(), what: what.to_owned(), source }
        };
        let limit = self.target().scaled(START_LIMIT);
        let started = tokio::time::timeout(limit, self.start(command, Instant::now() + limit)).await;
        let mut session = started.map_err(|_| GuestError::Deadline {
            node: self.node().to_owned(),
            command: brief(command),
            limit,
            partial: Box::default(),
        })??;
        let writer = Arc::clone(&session.writer);
        let feed = async move {
            if let Some(mut stdin) = stdin {
                let mut chunk = vec![0; INPUT_CHUNK_BYTES];
                loop {
                    let n = stdin.read(&mut chunk).await.map_err(local("reading what is to be sent"))?;
                    // A command that takes no more input says why, or ends: both are seen below.
                    if n == 0 || writer.data(&chunk[..n]).await.is_err() {
                        break;
                    }
                }
            }
            let _ = writer.eof().await;
            Ok::<(), GuestError>(())
        };
        tokio::pin!(feed);
        let mut fed = false;
        let (mut status, mut signal) = (None, None);
        loop {
            let message = tokio::select! {
                message = session.reader.wait() => message,
                sent = &mut feed, if !fed => {
                    sent?;
                    fed = true;
                    continue;
                }
            };
            match message {
                Some(ChannelMsg::Data { data }) => write(stdout, &data).await.map_err(local("writing the output"))?,
                Some(ChannelMsg::ExtendedData { data, ext: 1 }) => {
                    write(stderr, &data).await.map_err(local("writing the error output"))?;
                }
                Some(ChannelMsg::ExitStatus { exit_status }) => status = Some(exit_status),
                Some(ChannelMsg::ExitSignal { signal_name, .. }) => signal = Some(signal_text(&signal_name)),
                Some(ChannelMsg::Failure) => return Err(GuestError::denied(self.node(), command)),
                Some(ChannelMsg::Close) => {
                    session.finish();
                    return Ok(StreamEnd::Exited { status, signal });
                }
                Some(_) => {}
                None if status.is_some() || signal.is_some() => return Ok(StreamEnd::Exited { status, signal }),
                None => {
                    return Err(GuestError::ConnectionLost {
                        node: self.node().to_owned(),
                        during: format!("under `{}`", brief(command)),
                        reason: session.lost(),
                    });
                }
            }
        }
    }
}

/// Writes and flushes: whoever watches a command sees what it says when it says it.
async fn write<W: AsyncWrite + Unpin>(to: &mut W, bytes: &[u8]) -> std::io::Result<()> {
    to.write_all(bytes).await?;
    to.flush().await
}
