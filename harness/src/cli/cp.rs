//! `harness cp`: a file or a folder, into a guest or out of it, over the SSH exec channel.

use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use tokio::io::{AsyncWriteExt as _, Empty};
use tokio::net::UnixStream;

use crate::cli::Global;
use crate::cli::reach::{self, Which};
use crate::cli::signals::Signals;
use crate::error::CommandError;
use crate::exit::Blame;
use crate::guest::{Guest, StreamEnd, quote};

/// Most of what a command says of its failure.
const SAID_MAX_BYTES: usize = 4096;
/// How long the guest may take to say what a path is, before its slowness.
const LOOK_LIMIT: Duration = Duration::from_secs(10);

/// `harness cp`
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
    harness cp server-1:/etc/rancher/k3s/k3s.yaml .
    harness cp ./manifests server-1:/var/lib/rancher/k3s/server/manifests/mine

One side is NODE:PATH, the other a local path (./a:b where its name has a colon). Folders are copied whole, by
tar; into a folder that exists, beside what is in it. A file takes the place of the old one in one step.")]
pub(super) struct Args {
    /// What to copy: NODE:PATH or a local path
    from: String,
    /// Where to: a local path or NODE:PATH
    to: String,
    #[command(flatten)]
    which: Which,
}

/// One side of a copy.
#[derive(Debug, PartialEq, Eq)]
enum Side {
    Guest { node: String, path: String },
    Local(PathBuf),
}

impl Side {
    fn parse(text: &str) -> Self {
        match text.split_once(':') {
            Some((node, path)) if !node.is_empty() && !node.contains('/') => {
                let path = if path.is_empty() { "." } else { path };
                Self::Guest { node: node.to_owned(), path: path.to_owned() }
            }
            _ => Self::Local(text.into()),
        }
    }
}

pub(super) fn run(global: &Global, args: Args) -> Result<u8, CommandError> {
    let usage = |message: &str| CommandError::plain(Blame::Usage, message);
    let (node, copy) = match (Side::parse(&args.from), Side::parse(&args.to)) {
        (Side::Guest { node, path }, Side::Local(local)) => (node, Copy::Out { path, local }),
        (Side::Local(local), Side::Guest { node, path }) => (node, Copy::In { local, path }),
        (Side::Local(_), Side::Local(_)) => return Err(usage("neither side is a guest's: NODE:PATH")),
        _ => return Err(usage("both sides are guests': copy by way of a local file")),
    };
    let (lab, node) = args.which.node(global, &node)?;
    reach::block_on(async {
        let guest = reach::connect(&lab, &node).await?;
        let mut signals = Signals::open()?;
        let copied = tokio::select! {
            copied = copy.carry_out(&guest) => copied,
            // The end of the connection ends what it is for.
            _ = signals.next() => return Ok(Blame::Interrupted.exit_code()),
        };
        copied.map(|()| 0)
    })
}

enum Copy {
    Out { path: String, local: PathBuf },
    In { local: PathBuf, path: String },
}

impl Copy {
    async fn carry_out(&self, guest: &Guest) -> Result<(), CommandError> {
        match self {
            Self::Out { path, local } => match look(guest, path).await? {
                Found::Folder => {
                    let to = below(local, path);
                    folder_out(guest, path, &to).await
                }
                Found::File { mode } => file_out(guest, path, mode, &below(local, path)).await,
            },
            Self::In { local, path } => {
                let meta = std::fs::metadata(local).map_err(|error| failed(local.display(), &error))?;
                let name = local_name(local)?;
                if meta.is_dir() {
                    folder_in(guest, local, &name, path).await
                } else {
                    file_in(guest, local, &meta, &name, path).await
                }
            }
        }
    }
}

fn failed(what: impl std::fmt::Display, error: &(dyn std::error::Error + 'static)) -> CommandError {
    CommandError::new(Blame::Environment, format!("copying {what}"), error)
}

/// `local`, or what is to be called `path`'s last part in it where it is a folder.
fn below(local: &Path, path: &str) -> PathBuf {
    match Path::new(path).components().next_back() {
        Some(Component::Normal(name)) if local.is_dir() => local.join(name),
        _ => local.to_owned(),
    }
}

/// The last part of a local path's name, `.` and `..` resolved.
fn local_name(local: &Path) -> Result<String, CommandError> {
    let whole = local.canonicalize().map_err(|error| failed(local.display(), &error))?;
    let named = local.file_name().or(whole.file_name());
    Ok(named.map_or_else(String::new, |name| name.to_string_lossy().into_owned()))
}

/// What a path in a guest is.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    File { mode: u32 },
    Folder,
}

async fn look(guest: &Guest, path: &str) -> Result<Found, CommandError> {
    let command = format!("exec stat -L -c '%F %a' -- {}", quote(path));
    let limit = LOOK_LIMIT.mul_f64(guest.target().patience.clamp(1.0, 6.0));
    let output = guest.exec_ok(&command, limit).await.map_err(|error| failed(path, &error))?;
    found(output.text().trim())
        .ok_or_else(|| CommandError::plain(Blame::Usage, format!("{path} is neither a file nor a folder")))
}

/// `regular file 644`, `regular empty file 644`, `directory 755`: stat(1) of GNU coreutils in the C locale.
fn found(stat: &str) -> Option<Found> {
    let (kind, mode) = stat.rsplit_once(' ')?;
    match kind {
        "directory" => Some(Found::Folder),
        "regular file" | "regular empty file" => Some(Found::File { mode: u32::from_str_radix(mode, 8).ok()? & 0o777 }),
        _ => None,
    }
}

async fn file_out(guest: &Guest, path: &str, mode: u32, to: &Path) -> Result<(), CommandError> {
    let parent = to.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let staged = tempfile::NamedTempFile::new_in(parent).map_err(|error| failed(to.display(), &error))?;
    let file = staged.as_file().try_clone().map_err(|error| failed(to.display(), &error))?;
    let mut file = tokio::fs::File::from_std(file);
    ran(guest, &format!("exec cat -- {}", quote(path)), None::<Empty>, &mut file, path).await?;
    file.shutdown().await.map_err(|error| failed(to.display(), &error))?;
    std::fs::set_permissions(staged.path(), std::fs::Permissions::from_mode(mode))
        .map_err(|error| failed(to.display(), &error))?;
    staged.persist(to).map_err(|error| failed(to.display(), &error))?;
    Ok(())
}

async fn file_in(
    guest: &Guest,
    local: &Path,
    meta: &std::fs::Metadata,
    name: &str,
    path: &str,
) -> Result<(), CommandError> {
    let file = tokio::fs::File::open(local).await.map_err(|error| failed(local.display(), &error))?;
    let command = format!(
        "umask 077; d={target}; if [ -d \"$d\" ]; then d=$d/{name}; fi; t=$d.$$.tmp; \
         if cat > \"$t\" && [ \"$(stat -c %s -- \"$t\")\" = {len} ] && chmod {mode:o} -- \"$t\" && mv -fT -- \"$t\" \"$d\"; \
         then exit 0; fi; rm -f -- \"$t\"; exit 1",
        target = guest_path(path),
        name = quote(name),
        len = meta.len(),
        mode = meta.permissions().mode() & 0o777,
    );
    ran(guest, &command, Some(file), &mut tokio::io::sink(), local.display()).await
}

async fn folder_out(guest: &Guest, path: &str, to: &Path) -> Result<(), CommandError> {
    let (mut ours, theirs) = pipe(to)?;
    let target = to.to_owned();
    let unpacked = tokio::task::spawn_blocking(move || {
        std::fs::create_dir_all(&target)?;
        // Refuses what would lie outside of the folder.
        let mut archive = tar::Archive::new(theirs);
        archive.unpack(&target)
    });
    let sent = async {
        let sent =
            ran(guest, &format!("exec tar -C {} -cf - .", guest_path(path)), None::<Empty>, &mut ours, path).await;
        drop(ours);
        sent
    };
    let (sent, unpacked) = tokio::join!(sent, unpacked);
    let unpacked = unpacked.map_err(|error| failed(to.display(), &error))?;
    // Of the two, the one that broke the other's pipe is at fault: only the unpacking can.
    unpacked.map_err(|error| failed(to.display(), &error)).and(sent)
}

async fn folder_in(guest: &Guest, local: &Path, name: &str, path: &str) -> Result<(), CommandError> {
    let (ours, theirs) = pipe(local)?;
    let source = local.to_owned();
    let packed = tokio::task::spawn_blocking(move || {
        let mut archive = tar::Builder::new(theirs);
        archive.follow_symlinks(false);
        archive.append_dir_all(".", &source)?;
        archive.finish()
    });
    let command = format!(
        "d={target}; if [ -d \"$d\" ]; then d=$d/{name}; fi; mkdir -p -- \"$d\" && exec tar -C \"$d\" --no-same-owner -xf -",
        target = guest_path(path),
        name = quote(name),
    );
    let sent = ran(guest, &command, Some(ours), &mut tokio::io::sink(), local.display()).await;
    let packed = packed.await.map_err(|error| failed(local.display(), &error))?;
    // A guest that takes no more breaks the packing's pipe: what it says is the cause.
    sent.and(packed.map_err(|error| failed(local.display(), &error)))
}

/// Joins our side, which waits by events, to a thread's, which blocks.
fn pipe(what: &Path) -> Result<(UnixStream, std::fs::File), CommandError> {
    let made = StdUnixStream::pair().and_then(|(ours, theirs)| {
        ours.set_nonblocking(true)?;
        Ok((UnixStream::from_std(ours)?, std::fs::File::from(OwnedFd::from(theirs))))
    });
    made.map_err(|error| failed(what.display(), &error))
}

/// A path that the guest's tools cannot take for an option.
fn guest_path(path: &str) -> String {
    if path.starts_with('-') { quote(&format!("./{path}")) } else { quote(path) }
}

/// Runs a command with its streams joined; any other end than exit status 0 is an error with what it said.
async fn ran<I, O>(
    guest: &Guest,
    command: &str,
    input: Option<I>,
    output: &mut O,
    what: impl std::fmt::Display,
) -> Result<(), CommandError>
where
    I: tokio::io::AsyncRead + Unpin,
    O: tokio::io::AsyncWrite + Unpin,
{
    let mut said = Said::default();
    match guest.pipe(command, input, output, &mut said, std::future::pending()).await {
        Ok(Some(StreamEnd::Exited { status: Some(0), .. })) => Ok(()),
        Ok(end) => {
            let code = end.as_ref().map_or(u8::MAX, reach::exit_code);
            let mut error = CommandError::plain(Blame::Environment, format!("copying {what}"));
            let said = String::from_utf8_lossy(&said.0).trim().to_owned();
            error.chain.push(if said.is_empty() { format!("the guest's command ended with {code}") } else { said });
            Err(error)
        }
        Err(error) => Err(failed(what, &error)),
    }
}

/// Keeps the first of what is written to it.
#[derive(Default)]
struct Said(Vec<u8>);

impl tokio::io::AsyncWrite for Said {
    fn poll_write(
        mut self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
        bytes: &[u8],
    ) -> std::task::Poll<std::io::Result<usize>> {
        let room = SAID_MAX_BYTES.saturating_sub(self.0.len());
        self.0.extend_from_slice(&bytes[..bytes.len().min(room)]);
        std::task::Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(
        self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn poll_shutdown(
        self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::task::Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests;
