//! Builds: packages to a root file system, a root file system to an image.
//!
//! Two stages, both kept by digest. The first (mmdebstrap) depends on suite and packages alone and takes most of the
//! time; the second lays files and binaries over it and takes seconds, so that another k3s binary costs seconds.

use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::contain::{Builder, unshare_args};
use crate::error::Error;
use crate::guest::IMAGE_ID_PATH;
use crate::initrd::{self, ModuleLists};
use crate::manifest::FileEntry;
use crate::payload::GuestBinary;
use crate::recipe::Recipe;
use crate::rootfs::{AptSetup, RootfsSpec, apt_options, apt_sources};
use crate::store::ID_LEN;
use crate::tool::{ToolCommand, ToolRunner};
use crate::tree::Tree;
use crate::{elf, hex, units};

/// Counted up when what is made of the same recipe changes in a way the key's other parts do not show.
const FORM: u32 = 2;

/// File of a root file system.
pub(crate) const ROOTFS_TAR: &str = "rootfs.tar";
/// File of an image: the root file system.
pub(crate) const ROOT: &str = "root.raw";
/// File of an image: the kernel.
pub(crate) const KERNEL: &str = "vmlinuz";
/// File of an image: the initrd.
pub(crate) const INITRD: &str = "initrd.img";

/// How long mmdebstrap may take: 40 s on an idle machine of 2 cores with a near mirror.
const ROOTFS_DEADLINE: Duration = Duration::from_secs(1200);
/// How long unpacking and `mkfs.ext4` may take: 3 s on an idle machine of 2 cores.
const IMAGE_DEADLINE: Duration = Duration::from_secs(300);
/// How long `apt-config dump` may take.
const APT_CONFIG_DEADLINE: Duration = Duration::from_secs(20);

/// What the first stage takes of the disk: a tree of 450 MiB and a tar of 290, for the shipped recipe.
const ROOTFS_MIB: u64 = 768;
/// What the second stage takes, binaries left out: a tree and an image of 450 MiB each.
const IMAGE_MIB: u64 = 1024;

/// Unpacks a root file system, lays the overlay over it and fills an ext4 image with the tree. Device nodes are left out:
/// an unprivileged user cannot make them, and the guest has devtmpfs. The inode tables are zeroed here, where it is
/// free, so that no guest does it in the background.
const IMAGE_SCRIPT: &str = r#"mkdir "$1/root"
tar --extract --file "$2" --directory "$1/root" --numeric-owner --same-permissions --exclude './dev/*'
tar --extract --file "$3" --directory "$1/root" --numeric-owner --same-permissions --no-overwrite-dir
exec mkfs.ext4 -q -F -t ext4 -L root -m 0 -i 32768 -J size=64 -E lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0 -d "$1/root" "$4" "$5"m"#;

/// What a build tells while it goes on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum BuildEvent {
    /// The image is there already; nothing is built.
    Hit {
        /// Its identifier.
        id: String,
    },
    /// What was registered cannot be used and is built anew.
    Discarded {
        /// Its identifier.
        id: String,
        /// Why.
        reason: String,
    },
    /// Another build holds the store; this one waits for it.
    Waiting,
    /// A step of the build begins.
    Step {
        /// What it does, such as `install packages`.
        what: String,
    },
    /// The image has been built and registered.
    Built {
        /// Its identifier.
        id: String,
        /// How long it took, in milliseconds.
        elapsed_ms: u64,
    },
}

/// Where a build reports to.
pub(crate) type OnEvent<'a> = &'a (dyn Fn(BuildEvent) + Send + Sync);

/// One image to be built: what it is made of, and its key.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) id: String,
    pub(crate) rootfs: RootfsSpec,
    pub(crate) rootfs_key: String,
    pub(crate) recipe: Recipe,
    pub(crate) binaries: Vec<(String, GuestBinary)>,
}

impl Plan {
    pub(crate) fn new(recipe: &Recipe, binaries: &[GuestBinary]) -> Result<Self, Error> {
        let binaries: Vec<(String, GuestBinary)> =
            recipe.place(binaries)?.into_iter().map(|(path, binary)| (path, binary.clone())).collect();
        let mut packages = recipe.packages.clone();
        packages.extend(binaries.iter().flat_map(|(_, binary)| binary.extra_packages.iter().cloned()));
        let rootfs = RootfsSpec { suite: recipe.suite.clone(), packages, exclude: recipe.exclude.clone() };
        let rootfs_key = rootfs.key();
        let mut hash = Sha256::new();
        hash.update(format!("image {FORM} {rootfs_key}\n{IMAGE_SCRIPT}\n{}\n", initrd::script(&[])));
        // The recipe's fields have one order and its maps are sorted: the same recipe has the same text.
        let text = serde_json::to_vec(recipe)
            .map_err(|error| Error::Corrupt { path: recipe.name.clone().into(), reason: error.to_string() })?;
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text);
        for (path, binary) in &binaries {
            hash.update(format!("{path}\n{}\n", binary.sha256));
            for file in &binary.files {
                hash.update(format!("file {} {:o}\n{}\n", file.guest_path, file.mode, file.sha256));
            }
        }
        let mut id = hex(&hash.finalize());
        id.truncate(ID_LEN);
        Ok(Self { id, rootfs, rootfs_key, recipe: recipe.clone(), binaries })
    }

    /// What k3s is in the image: the label of the binary of that name.
    pub(crate) fn k3s(&self) -> String {
        self.binaries
            .iter()
            .find(|(_, binary)| binary.name == "k3s")
            .map_or_else(|| "none".to_owned(), |(_, binary)| binary.label.clone())
    }

    /// About what a build takes of the disk, at its height.
    pub(crate) fn wanted_mib(&self, has_rootfs: bool) -> u64 {
        let base = if has_rootfs { IMAGE_MIB } else { ROOTFS_MIB + IMAGE_MIB };
        // In the overlay's tar, in the tree and in the image.
        let files = self
            .binaries
            .iter()
            .flat_map(|(_, binary)| std::iter::once(&binary.path).chain(binary.files.iter().map(|file| &file.path)));
        base + files
            .filter_map(|path| std::fs::metadata(path).ok())
            .map(|meta| 3 * meta.len() / (1024 * 1024))
            .sum::<u64>()
    }

    /// Makes the root file system in `work` and returns its files, sealed.
    pub(crate) async fn build_rootfs(
        &self,
        work: &Utf8Path,
        runner: &dyn ToolRunner,
        on_event: OnEvent<'_>,
    ) -> Result<Vec<FileEntry>, Error> {
        on_event(step(format!("install {} packages of {}", self.rootfs.packages.len(), self.rootfs.suite)));
        let apt = apt_setup(&self.rootfs.suite, work, runner).await?;
        let scratch = make_scratch(work)?;
        let args = self.rootfs.argv(Builder::current(), &apt, &scratch, &work.join(ROOTFS_TAR));
        run(runner, "install packages", "rootfs", "mmdebstrap", args, work, ROOTFS_DEADLINE).await?;
        let work = work.to_owned();
        blocking(move || Ok(vec![FileEntry::seal(&work, ROOTFS_TAR, false)?])).await
    }

    /// Makes the image in `work` out of the root file system `tar` and returns its files, sealed.
    pub(crate) async fn build_image(
        &self,
        tar: &Utf8Path,
        work: &Utf8Path,
        runner: &dyn ToolRunner,
        on_event: OnEvent<'_>,
    ) -> Result<Vec<FileEntry>, Error> {
        on_event(step("lay files and binaries over the tree".to_owned()));
        let overlay = work.join("overlay.tar");
        let (plan, tar_path, folder, overlay_path) = (self.clone(), tar.to_owned(), work.to_owned(), overlay.clone());
        blocking(move || plan.prepare(&tar_path, &folder, &overlay_path)).await?;

        on_event(step("fill the file system".to_owned()));
        let scratch = make_scratch(work)?;
        let root = work.join(ROOT);
        let args = [tar.to_string(), overlay.to_string(), root.to_string(), self.recipe.disk_mib.to_string()];
        let args = unshare_args(Builder::current(), &scratch, IMAGE_SCRIPT, &args);
        run(runner, "fill the file system", "image", "mkfs.ext4", args, work, IMAGE_DEADLINE).await?;

        on_event(step("take digests".to_owned()));
        std::fs::remove_file(&overlay).map_err(Error::io("remove", &overlay))?;
        let work = work.to_owned();
        blocking(move || {
            [(ROOT, true), (KERNEL, false), (INITRD, false)]
                .into_iter()
                .map(|(name, sparse)| FileEntry::seal(&work, name, sparse))
                .collect()
        })
        .await
    }

    /// Writes kernel, initrd and the overlay's tar.
    fn prepare(&self, tar: &Utf8Path, folder: &Utf8Path, overlay: &Utf8Path) -> Result<(), Error> {
        let lacks =
            |what: &str, hint| Error::RootfsLacks { recipe: self.recipe.name.clone(), what: what.to_owned(), hint };
        const KERNEL_HINT: &str = "add a kernel to `packages`, such as linux-image-cloud-amd64";
        let tree = Tree::open(tar)?;

        // One kernel is what a fresh tree has; of several the last by name is the newest of a series.
        let kernel = tree.below("boot").filter(|path| path.starts_with("boot/vmlinuz-")).last();
        let kernel = kernel.ok_or_else(|| lacks("kernel", KERNEL_HINT))?;
        let version = kernel.trim_start_matches("boot/vmlinuz-");
        let image = tree.read(kernel)?.ok_or_else(|| lacks("kernel", KERNEL_HINT))?;
        write_file(&folder.join(KERNEL), &image)?;

        // Where /lib is a link, as it is in Debian since bookworm, the tar has its files below usr/lib.
        let modules = ["usr/lib/modules", "lib/modules"].map(|folder| format!("{folder}/{version}"));
        let home = modules.iter().find(|home| tree.below(home).next().is_some());
        let home = home.ok_or_else(|| lacks("kernel modules", KERNEL_HINT))?;
        let text = |name: &str| -> Result<String, Error> {
            let content = tree.read(&format!("{home}/{name}"))?.ok_or_else(|| lacks(name, KERNEL_HINT))?;
            Ok(String::from_utf8_lossy(&content).into_owned())
        };
        let (dep, builtin) = (text("modules.dep")?, text("modules.builtin")?);
        let order = ModuleLists { dep: &dep, builtin: &builtin }
            .load_order()
            .map_err(|module| lacks(&format!("kernel module {module}"), KERNEL_HINT))?;
        let mut modules = Vec::with_capacity(order.len());
        for path in order {
            let content = tree
                .read(&format!("{home}/{path}"))?
                .ok_or_else(|| lacks(&path, "it is in the kernel's modules.dep"))?;
            modules.push((path, content));
        }
        let (_, busybox) = tree
            .read_any(&["usr/bin/busybox", "bin/busybox"])?
            .ok_or_else(|| lacks("static busybox", "add busybox-static to `packages`"))?;
        write_file(&folder.join(INITRD), &initrd::build(&busybox, &modules))?;

        self.write_overlay(&tree, overlay)
    }

    fn write_overlay(&self, tree: &Tree, path: &Utf8Path) -> Result<(), Error> {
        let wrap = || Error::io("write", path);
        let mut tar = tar::Builder::new(BufWriter::new(File::create_new(path).map_err(wrap())?));
        for (name, file) in &self.recipe.files {
            append(&mut tar, name, file.mode, file.content.len() as u64, file.content.as_slice()).map_err(wrap())?;
        }
        let id = format!("{}\n", self.id);
        append(&mut tar, IMAGE_ID_PATH, 0o644, id.len() as u64, id.as_bytes()).map_err(wrap())?;
        for (name, binary) in &self.binaries {
            elf::check_for_guest(&binary.path)?;
            let given = std::iter::once((binary.path.as_path(), name.as_str(), 0o755, &binary.sha256));
            let files = binary.files.iter();
            let files = files.map(|file| (file.path.as_path(), file.guest_path.as_str(), file.mode, &file.sha256));
            for (from, to, mode, sha256) in given.chain(files) {
                let read = || Error::io("read", from);
                let file = File::open(from).map_err(read())?;
                let size = file.metadata().map_err(read())?.len();
                let mut reader = Hashing { inner: file, hash: Sha256::new() };
                append(&mut tar, to, mode, size, &mut reader).map_err(wrap())?;
                let found = hex(&reader.hash.finalize());
                if found != *sha256 {
                    let reason = format!("it has digest {found} instead of {sha256}: it changed during the build");
                    return Err(Error::Corrupt { path: from.to_owned(), reason });
                }
            }
        }
        let links = units::links(&self.recipe, |unit| self.unit_file(tree, unit))?;
        for (name, target) in &links {
            let mut header = header(0o777, 0);
            header.set_entry_type(tar::EntryType::Symlink);
            tar.append_link(&mut header, name.trim_start_matches('/'), target).map_err(wrap())?;
        }
        tar.into_inner().and_then(|mut out| out.flush()).map_err(wrap())
    }

    /// A unit's path in the guest and its text.
    fn unit_file(&self, tree: &Tree, unit: &str) -> Result<Option<(String, String)>, Error> {
        for folder in ["/etc/systemd/system", "/lib/systemd/system", "/usr/lib/systemd/system"] {
            let path = format!("{folder}/{unit}");
            let own = self.recipe.files.get(&path).map(|file| file.content.clone());
            let content = match own {
                Some(content) => Some(content),
                None => tree.read(&path)?,
            };
            if let Some(content) = content {
                return Ok(Some((path, String::from_utf8_lossy(&content).into_owned())));
            }
        }
        Ok(None)
    }
}

fn step(what: String) -> BuildEvent {
    BuildEvent::Step { what }
}

/// Where this machine's apt gets the suite from.
async fn apt_setup(suite: &str, work: &Utf8Path, runner: &dyn ToolRunner) -> Result<AptSetup, Error> {
    let mut files: Vec<(Utf8PathBuf, String)> = Vec::new();
    let entries = Utf8Path::new("/etc/apt/sources.list.d").read_dir_utf8().into_iter().flatten().flatten();
    let parts = entries.map(|entry| entry.into_path()).filter(|p| matches!(p.extension(), Some("list" | "sources")));
    for path in std::iter::once(Utf8PathBuf::from("/etc/apt/sources.list")).chain(parts) {
        // A machine without apt's files builds from the archive's own mirrors.
        if let Ok(text) = std::fs::read_to_string(&path) {
            files.push((path, text));
        }
    }
    let doing = "read apt's configuration";
    // The log has all of it, where the tail a runner keeps may be shorter.
    let log = work.join("apt-config.log");
    let command = ToolCommand::new("apt-config", "apt-config").args(["dump"]).deadline(APT_CONFIG_DEADLINE).log(&log);
    let exit = runner.run(command).await.map_err(|source| Error::Tool { doing: doing.to_owned(), source })?;
    if !exit.success() {
        return Err(Error::ToolFailed { doing: doing.to_owned(), program: "apt-config".to_owned(), exit });
    }
    let dump = std::fs::read_to_string(&log).map_err(Error::io("read", &log))?;
    Ok(AptSetup { sources: apt_sources(&files, suite), options: apt_options(&dump) })
}

/// An empty folder for a tmpfs that only the contained tools see.
fn make_scratch(work: &Utf8Path) -> Result<Utf8PathBuf, Error> {
    let scratch = work.join("scratch");
    match std::fs::create_dir(&scratch) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            Err(Error::io("create folder", scratch)(error))
        }
        _ => Ok(scratch),
    }
}

async fn run(
    runner: &dyn ToolRunner,
    doing: &str,
    name: &str,
    program: &str,
    args: Vec<String>,
    work: &Utf8Path,
    deadline: Duration,
) -> Result<(), Error> {
    let command = ToolCommand::new(name, "unshare").args(args).deadline(deadline).log(work.join(format!("{name}.log")));
    let doing = doing.to_owned();
    let exit = runner.run(command).await.map_err(|source| Error::Tool { doing: doing.clone(), source })?;
    if exit.success() { Ok(()) } else { Err(Error::ToolFailed { doing, program: program.to_owned(), exit }) }
}

/// Runs what reads or writes much on a thread where that blocks nobody.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => Err(Error::Interrupted),
        },
    }
}

fn write_file(path: &Utf8Path, content: &[u8]) -> Result<(), Error> {
    File::create_new(path).and_then(|mut file| file.write_all(content)).map_err(Error::io("write", path))
}

fn header(mode: u32, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Regular);
    header.set_mode(mode);
    header.set_size(size);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header
}

fn append<W: Write>(
    tar: &mut tar::Builder<W>,
    path: &str,
    mode: u32,
    size: u64,
    content: impl Read,
) -> std::io::Result<()> {
    tar.append_data(&mut header(mode, size), path.trim_start_matches('/'), content)
}

/// A reader that takes the digest of what passes.
struct Hashing<R> {
    inner: R,
    hash: Sha256,
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.hash.update(&buffer[..read]);
        Ok(read)
    }
}
