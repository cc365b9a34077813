//! One command in the guest: its output, its status, its deadline. Files travel the same way.

use std::time::Duration;

use russh::ChannelMsg;
use tokio::time::{Instant, sleep_until, timeout_at};

use super::error::{GuestError, brief, tail};
use super::quote::quote;
use super::session::Session;
use super::ssh::Guest;

/// Bytes kept of each of stdout and stderr; the rest is read and dropped.
pub(crate) const OUTPUT_MAX_BYTES: usize = 4 * 1024 * 1024;
/// The largest file [`Guest::read_file`] returns.
const FILE_MAX_BYTES: usize = 32 * 1024 * 1024;
/// How long output is waited for after a command's end, when something it left behind holds the channel open.
const LINGER: Duration = Duration::from_millis(500);
/// Bytes of stderr that an error carries.
const STDERR_TAIL_BYTES: usize = 2_048;

/// What a command said and how it ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExecOutput {
    /// Exit status; `None` when a signal ended it, or when it had not ended.
    pub status: Option<u32>,
    /// Name of the signal that ended it, without `SIG`.
    pub signal: Option<String>,
    /// Standard output, at most 4 MiB of it.
    pub stdout: Vec<u8>,
    /// Standard error, at most 4 MiB of it.
    pub stderr: Vec<u8>,
    /// Whether either of them was longer.
    pub truncated: bool,
    /// From the call to the end.
    pub elapsed: Duration,
}

impl ExecOutput {
    /// Whether the command exited with status 0.
    pub fn success(&self) -> bool {
        self.status == Some(0)
    }

    /// Standard output as text, with replacement characters where it is not UTF-8.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// `exited 1`, `was killed by signal KILL`, or `ended without a status`.
    pub fn how(&self) -> String {
        match (&self.status, &self.signal) {
            (Some(status), _) => format!("exited {status}"),
            (None, Some(signal)) => format!("was killed by signal {signal}"),
            (None, None) => "ended without a status".into(),
        }
    }

    fn keep(&mut self, stdout: bool, data: &[u8], limit: usize) {
        let kept = if stdout { &mut self.stdout } else { &mut self.stderr };
        let room = limit.saturating_sub(kept.len());
        kept.extend_from_slice(&data[..data.len().min(room)]);
        self.truncated |= data.len() > room;
    }
}

impl Guest {
    /// Runs a command line with the guest's login shell and waits for its end.
    ///
    /// Any exit status is an `Ok`. At the deadline (which includes repairing the connection) the answer is
    /// [`GuestError::Deadline`] with the output so far, and the command's process group is killed.
    /// Standard input is empty. Cancel-safe in the same way.
    pub async fn exec(&self, command: &str, deadline: Duration) -> Result<ExecOutput, GuestError> {
        self.exec_with(command, None, OUTPUT_MAX_BYTES, deadline).await
    }

    /// As [`Guest::exec`], and anything but exit status 0 is a [`GuestError::Failed`].
    pub async fn exec_ok(&self, command: &str, deadline: Duration) -> Result<ExecOutput, GuestError> {
        let output = self.exec(command, deadline).await?;
        self.succeeded(command, output)
    }

    /// Reads a whole file of at most 32 MiB.
    pub async fn read_file(&self, path: &str, deadline: Duration) -> Result<Vec<u8>, GuestError> {
        let command = format!("exec cat -- {}", quote(path));
        let output = self.exec_with(&command, None, FILE_MAX_BYTES, deadline).await?;
        let output = self.succeeded(&command, output)?;
        if output.truncated {
            return Err(GuestError::TooLong {
                node: self.node().to_owned(),
                what: path.to_owned(),
                limit_bytes: FILE_MAX_BYTES,
            });
        }
        Ok(output.stdout)
    }

    /// Reads a few small text files in one go, with the shell's own means: sshd starts one shell for all of them, and that starts
    /// nothing. Bytes that are no text come out changed.
    ///
    /// # Errors
    /// [`GuestError::Failed`] with the name of a file that cannot be read; [`GuestError::Malformed`] where one holds a NUL.
    pub async fn read_texts<const N: usize>(
        &self,
        paths: &[String; N],
        deadline: Duration,
    ) -> Result<[String; N], GuestError> {
        let mut command = String::new();
        for path in paths {
            // The last line may have no newline; it is given one.
            command.push_str(&format!(
                "{{ while IFS= read -r l || [ -n \"$l\" ]; do printf '%s\\n' \"$l\"; done; }} <{} || exit 1; printf '\\0'; ",
                quote(path)
            ));
        }
        let output = self.exec_with(&command, None, FILE_MAX_BYTES, deadline).await?;
        let output = self.succeeded(&format!("read {}", paths.join(", ")), output)?;
        let mut texts = output.text().split_terminator('\0').map(str::to_owned).collect::<Vec<_>>();
        let found = texts.len();
        texts.truncate(N);
        texts.try_into().ok().filter(|_| found == N && !output.truncated).ok_or_else(|| GuestError::Malformed {
            node: self.node().to_owned(),
            what: paths.join(", "),
            reason: format!("{found} texts for {N} files"),
        })
    }

    /// Writes a file so that a reader sees the old content or the new, never a part of it.
    ///
    /// `mode` is the file's permission bits. The directory must exist. A connection that breaks on the way
    /// leaves the old file: the bytes are counted in the guest before they take its place.
    pub async fn write_file(
        &self,
        path: &str,
        mode: u32,
        content: &[u8],
        deadline: Duration,
    ) -> Result<(), GuestError> {
        self.write_file_then(path, mode, content, "exit 0", deadline).await.map(drop)
    }

    /// As [`Guest::write_file`], and runs a command line once the file is in its place: one round trip for both.
    ///
    /// Anything but its exit status 0 is a [`GuestError::Failed`].
    pub async fn write_file_then(
        &self,
        path: &str,
        mode: u32,
        content: &[u8],
        then: &str,
        deadline: Duration,
    ) -> Result<ExecOutput, GuestError> {
        let target = quote(path);
        // A file made under this umask has mode 600: no program is started to say so again.
        let chmod = match mode & 0o7777 {
            0o600 => String::new(),
            mode => format!("chmod {mode:o} -- \"$t\" && "),
        };
        let command = format!(
            "umask 077; t={target}.$$.tmp; \
             if cat > \"$t\" && [ \"$(stat -c %s -- \"$t\")\" = {len} ] && {chmod}mv -fT -- \"$t\" {target}; \
             then {then}; exit; fi; rm -f -- \"$t\"; exit 1",
            len = content.len(),
        );
        let output = self.exec_with(&command, Some(content), OUTPUT_MAX_BYTES, deadline).await?;
        self.succeeded(&format!("write {path}"), output)
    }

    fn succeeded(&self, command: &str, output: ExecOutput) -> Result<ExecOutput, GuestError> {
        if output.success() {
            return Ok(output);
        }
        let said = if output.stderr.is_empty() { &output.stdout } else { &output.stderr };
        Err(GuestError::Failed {
            node: self.node().to_owned(),
            command: brief(command),
            how: output.how(),
            status: output.status,
            stderr_tail: tail(said, STDERR_TAIL_BYTES),
        })
    }

    pub(super) async fn exec_with(
        &self,
        command: &str,
        stdin: Option<&[u8]>,
        limit_bytes: usize,
        deadline: Duration,
    ) -> Result<ExecOutput, GuestError> {
        let started = Instant::now();
        let end = started + deadline;
        let mut output = ExecOutput::default();
        let run = self.run(command, stdin, limit_bytes, end, &mut output);
        let ended = timeout_at(end, run).await;
        output.elapsed = started.elapsed();
        match ended {
            Ok(Ok(())) => Ok(output),
            Ok(Err(e)) => Err(e),
            Err(_) => Err(GuestError::Deadline {
                node: self.node().to_owned(),
                command: brief(command),
                limit: deadline,
                partial: Box::new(output),
            }),
        }
    }

    async fn run(
        &self,
        command: &str,
        stdin: Option<&[u8]>,
        limit_bytes: usize,
        end: Instant,
        output: &mut ExecOutput,
    ) -> Result<(), GuestError> {
        let mut session = self.start(command, end).await?;
        let writer = std::sync::Arc::clone(&session.writer);
        let feed = async move {
            if let Some(bytes) = stdin {
                writer.data(bytes).await?;
            }
            writer.eof().await
        };
        tokio::pin!(feed);
        let mut fed = false;
        let mut linger_until = None;
        loop {
            let lingering = async {
                match linger_until {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            let message = tokio::select! {
                message = session.reader.wait() => message,
                // A server that takes no more input says why on the channel: that is read above.
                _ = &mut feed, if !fed => { fed = true; continue }
                () = lingering => {
                    session.abandon_channel().await;
                    return Ok(());
                }
            };
            match message {
                Some(ChannelMsg::Data { data }) => output.keep(true, &data, limit_bytes),
                Some(ChannelMsg::ExtendedData { data, ext: 1 }) => output.keep(false, &data, limit_bytes),
                Some(ChannelMsg::ExitStatus { exit_status }) => output.status = Some(exit_status),
                Some(ChannelMsg::ExitSignal { signal_name, .. }) => output.signal = Some(signal_text(&signal_name)),
                Some(ChannelMsg::Failure) => return Err(GuestError::denied(self.node(), command)),
                Some(ChannelMsg::Close) => {
                    session.finish();
                    return Ok(());
                }
                Some(_) => {}
                None if output.status.is_some() || output.signal.is_some() => return Ok(()),
                None => {
                    return Err(GuestError::ConnectionLost {
                        node: self.node().to_owned(),
                        during: format!("under `{}`", brief(command)),
                        reason: session.lost(),
                    });
                }
            }
            if output.status.is_some() || output.signal.is_some() {
                linger_until = Some(Instant::now() + self.target().scaled(LINGER));
            }
        }
    }

    /// A session with the command started on it.
    pub(super) async fn start(&self, command: &str, end: Instant) -> Result<Session, GuestError> {
        let mut session = self.session(end).await?;
        session.exec(command).await.map_err(|_| GuestError::ConnectionLost {
            node: self.node().to_owned(),
            during: format!("before `{}`", brief(command)),
            reason: session.lost(),
        })?;
        Ok(session)
    }
}

/// A signal's name without `SIG`.
pub(super) fn signal_text(signal: &russh::Sig) -> String {
    match signal {
        russh::Sig::Custom(name) => name.trim_start_matches("SIG").to_owned(),
        known => format!("{known:?}"),
    }
}
