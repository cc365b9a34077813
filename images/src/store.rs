//! The content-addressed store of images.
//!
//! ```text
//! STORE/build.lock        held by whoever builds or removes: one at a time
//! STORE/rootfs/KEY/       rootfs.tar, manifest.json, lease
//! STORE/images/ID/        root.raw, vmlinuz, initrd.img, manifest.json, lease
//! STORE/tmp/              what is being built or removed; whatever lies there without the lock held is a leftover
//! ```
//!
//! An artifact is made in `tmp`, sealed (read-only, on the disk, with size, time and digest in its manifest) and then
//! renamed to its identifier, which is a digest of everything it is made of. So what has a name is whole, and no two
//! variants can have one name. A file that was written to, truncated or lost since is found by its size and time before
//! every use, and by its digest in [`Store::verify`].
//!
//! The digest of a root file system is one over its non-zero blocks (it is mostly holes); all others are plain SHA-256.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use camino::{Utf8Path, Utf8PathBuf};
use serde::Serialize;

use crate::build::{BuildEvent, INITRD, KERNEL, OnEvent, Plan, ROOT, ROOTFS_TAR, blocking};
use crate::error::Error;
use crate::lock::{self, Held};
use crate::manifest::{LEASE, Manifest, sync_folder};
use crate::payload::GuestBinary;
use crate::recipe::Recipe;
use crate::tool::ToolRunner;
use crate::{elf, fs};

/// Length of identifiers in hexadecimal digits (128 bits).
pub(crate) const ID_LEN: usize = 32;

/// An image that is there and whole. While it (or a clone) lives, no `gc` removes it.
#[derive(Debug, Clone, Serialize)]
pub struct Image {
    /// Identifier: a digest over the recipe, its binaries and how images are built.
    pub id: String,
    /// The recipe's name. Several images may have the same.
    pub name: String,
    /// The root file system, raw ext4: the base of overlays, never written to.
    pub root: Utf8PathBuf,
    /// The kernel.
    pub kernel: Utf8PathBuf,
    /// The initrd.
    pub initrd: Utf8PathBuf,
    /// Digest of the root file system's content; see [`crate::store`].
    pub root_sha256: String,
    /// What k3s is in it, for every output.
    pub k3s: String,
    /// When it was built, RFC 3339.
    pub created: String,
    #[serde(skip)]
    #[expect(dead_code, reason = "held, not used: dropping the last clone lets a gc remove the image")]
    lease: Arc<Held>,
}

/// The store, a folder.
#[derive(Debug, Clone)]
pub struct Store {
    dir: Utf8PathBuf,
}

/// An image as [`Store::list`] shows it.
#[derive(Debug, Clone, Serialize)]
pub struct ImageInfo {
    /// Its identifier.
    pub id: String,
    /// The recipe's name; empty where the manifest cannot be read.
    pub name: String,
    /// What k3s is in it.
    pub k3s: String,
    /// When it was built, RFC 3339.
    pub created: String,
    /// When it was last asked for, RFC 3339.
    pub last_used: String,
    /// What it takes on disk, in bytes.
    pub disk_bytes: u64,
    /// Why it cannot be used, if it cannot.
    pub fault: Option<String>,
}

/// What [`Store::verify`] found of one artifact.
#[derive(Debug, Clone, Serialize)]
pub struct Verification {
    /// `image` or `rootfs`.
    pub kind: &'static str,
    /// Its identifier.
    pub id: String,
    /// The recipe's name.
    pub name: String,
    /// What differs from what was registered; empty for a whole one.
    pub faults: Vec<String>,
}

/// What [`Store::gc`] removed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct GcReport {
    /// What was removed, by path below the store or the cache.
    pub removed: Vec<String>,
    /// What would have been and is in use.
    pub in_use: Vec<String>,
    /// Disk space won, in bytes.
    pub freed_bytes: u64,
}

impl GcReport {
    /// Both in one.
    #[must_use]
    pub fn and(mut self, other: Self) -> Self {
        self.removed.extend(other.removed);
        self.in_use.extend(other.in_use);
        self.freed_bytes += other.freed_bytes;
        self
    }
}

/// A kind of artifact and its folder.
const IMAGES: &str = "images";
const ROOTFS: &str = "rootfs";
const TMP: &str = "tmp";

impl Store {
    /// Opens the store at `dir`, which is made where it is missing. Refuses folders that lie on 9p or drvfs; whether the
    /// file system completes a sync is asked by [`fs::probe_folder`].
    ///
    /// # Errors
    /// Where the folder cannot be made or cannot hold images.
    pub fn open(dir: &Utf8Path) -> Result<Self, Error> {
        std::fs::create_dir_all(dir).map_err(Error::io("create folder", dir))?;
        let dir = dir.canonicalize_utf8().map_err(Error::io("find folder", dir))?;
        fs::check_folder_kind(&dir)?;
        for part in [IMAGES, ROOTFS, TMP] {
            let part = dir.join(part);
            std::fs::create_dir_all(&part).map_err(Error::io("create folder", &part))?;
        }
        Ok(Self { dir })
    }

    /// The store's folder.
    pub fn dir(&self) -> &Utf8Path {
        &self.dir
    }

    /// The identifier of the image that [`Store::ensure`] would answer with. Pure.
    ///
    /// # Errors
    /// Where the binaries are not those the recipe asks for.
    pub fn image_id(recipe: &Recipe, binaries: &[GuestBinary]) -> Result<String, Error> {
        Ok(Plan::new(recipe, binaries)?.id)
    }

    /// The image of `recipe` with `binaries`: the one that is there, else a new one.
    ///
    /// Of several callers, in this process or others, one builds and the others wait for it. Dropping the future ends the
    /// build; a build that ends in whatever way leaves nothing that could be taken for an image.
    ///
    /// # Errors
    /// Where the image is not there and cannot be built; the end of the tool's log is part of the message.
    pub async fn ensure(
        &self,
        recipe: &Recipe,
        binaries: &[GuestBinary],
        runner: &dyn ToolRunner,
        on_event: &(dyn Fn(BuildEvent) + Send + Sync),
    ) -> Result<Image, Error> {
        let start = Instant::now();
        let plan = Plan::new(recipe, binaries)?;
        if let Ok(Some(image)) = self.image(&plan.id) {
            on_event(BuildEvent::Hit { id: plan.id });
            return Ok(image);
        }
        // A binary for another machine is found before packages are installed for it.
        for (_, binary) in &plan.binaries {
            elf::check_for_guest(&binary.path)?;
        }
        let lock = lock::exclusive(&self.dir.join("build.lock"), || on_event(BuildEvent::Waiting)).await?;
        // Somebody else may have built it meanwhile.
        if let Some(image) = self.usable_or_discard(IMAGES, &plan.id, on_event, Self::image)? {
            on_event(BuildEvent::Hit { id: plan.id });
            return Ok(image);
        }
        self.sweep()?;
        // Found out now, not by a tool after a minute.
        let has_rootfs = self.dir.join(ROOTFS).join(&plan.rootfs_key).exists();
        fs::require_free(&self.dir, plan.wanted_mib(has_rootfs))?;

        let tar = match self.usable_or_discard(ROOTFS, &plan.rootfs_key, on_event, Self::rootfs_tar)? {
            Some(tar) => tar,
            None => {
                let work = Work::new(&self.dir)?;
                let files = plan.build_rootfs(&work.dir, runner, on_event).await?;
                let name = format!("{} + {} packages", plan.rootfs.suite, plan.rootfs.packages.len());
                let manifest = Manifest::new(&plan.rootfs_key, &name, "", None, files);
                self.register(ROOTFS, work, &manifest)?.join(ROOTFS_TAR)
            }
        };
        let work = Work::new(&self.dir)?;
        let files = plan.build_image(&tar, &work.dir, runner, on_event).await?;
        let manifest = Manifest::new(&plan.id, &plan.recipe.name, &plan.k3s(), Some(plan.rootfs_key.clone()), files);
        let folder = self.register(IMAGES, work, &manifest)?;
        let image = self.image(&plan.id)?.ok_or_else(|| Error::Corrupt {
            path: folder,
            reason: "it was removed while it was registered".to_owned(),
        })?;
        drop(lock);
        on_event(BuildEvent::Built { id: plan.id, elapsed_ms: start.elapsed().as_millis() as u64 });
        Ok(image)
    }

    /// All images, newest first.
    ///
    /// # Errors
    /// Where the store cannot be read.
    pub fn list(&self) -> Result<Vec<ImageInfo>, Error> {
        let mut found = Vec::new();
        for id in self.ids(IMAGES)? {
            let folder = self.dir.join(IMAGES).join(&id);
            let (manifest, fault) = match Manifest::load(&folder) {
                Ok(Some(manifest)) => {
                    let fault = manifest.glance(&folder);
                    (Some(manifest), fault)
                }
                Ok(None) => continue,
                Err(error) => (None, Some(error.to_string())),
            };
            let (name, k3s, created) =
                manifest.map(|manifest| (manifest.name, manifest.k3s, manifest.created)).unwrap_or_default();
            let last_used = jiff::Timestamp::try_from(last_used(&folder)).map(rfc3339).unwrap_or_default();
            found.push(ImageInfo { id, name, k3s, created, last_used, disk_bytes: disk_bytes(&folder), fault });
        }
        found.sort_by(|a, b| b.created.cmp(&a.created).then_with(|| a.id.cmp(&b.id)));
        Ok(found)
    }

    /// Reads every byte of everything in the store and compares it with what was registered.
    ///
    /// # Errors
    /// Where the store cannot be read. What is not whole is no error of this call: it is in the result.
    pub async fn verify(&self) -> Result<Vec<Verification>, Error> {
        let store = self.clone();
        blocking(move || {
            let mut found = Vec::new();
            for (kind, part) in [("image", IMAGES), ("rootfs", ROOTFS)] {
                for id in store.ids(part)? {
                    let folder = store.dir.join(part).join(&id);
                    let (name, faults) = match Manifest::load(&folder) {
                        Ok(Some(manifest)) => {
                            let faults = manifest.study(&folder);
                            (manifest.name, faults)
                        }
                        Ok(None) => continue,
                        Err(error) => (String::new(), vec![error.to_string()]),
                    };
                    found.push(Verification { kind, id, name, faults });
                }
            }
            Ok(found)
        })
        .await
    }

    /// Removes leftovers of builds, what cannot be used, images nobody uses and nobody asked for within `unused_for`, and
    /// the root file systems only those were made from.
    ///
    /// # Errors
    /// Where the store cannot be read or something cannot be removed.
    pub async fn gc(&self, unused_for: Duration) -> Result<GcReport, Error> {
        let _lock = lock::exclusive(&self.dir.join("build.lock"), || {}).await?;
        let mut report = GcReport::default();
        for leftover in self.entries(TMP)? {
            report.freed_bytes += disk_bytes(&self.dir.join(TMP).join(&leftover));
            report.removed.push(format!("{TMP}/{leftover}"));
        }
        self.sweep()?;
        let mut needed = std::collections::BTreeSet::new();
        for part in [IMAGES, ROOTFS] {
            for id in self.ids(part)? {
                let folder = self.dir.join(part).join(&id);
                let manifest = Manifest::load(&folder).ok().flatten().filter(|found| found.glance(&folder).is_none());
                // A clock that was set back makes "last used" lie ahead: such an image counts as used just now.
                let unused = SystemTime::now().duration_since(last_used(&folder)).unwrap_or_default();
                if let Some(manifest) = manifest.filter(|_| unused < unused_for || needed.contains(&id)) {
                    needed.extend(manifest.rootfs);
                    continue;
                }
                // An image without a lease file was damaged: nobody can hold it.
                let lease = folder.join(LEASE);
                let held = if lease.exists() { lock::try_exclusive(&lease)?.map(Some) } else { Some(None) };
                let Some(_held) = held else {
                    report.in_use.push(format!("{part}/{id}"));
                    needed.extend(Manifest::load(&folder).ok().flatten().and_then(|manifest| manifest.rootfs));
                    continue;
                };
                report.freed_bytes += disk_bytes(&folder);
                self.discard(part, &id)?;
                report.removed.push(format!("{part}/{id}"));
            }
        }
        Ok(report)
    }

    /// The image `id`, leased: `None` where it is not there or just being removed.
    ///
    /// # Errors
    /// Where it is there and is not what was registered.
    pub fn image(&self, id: &str) -> Result<Option<Image>, Error> {
        let Some((folder, manifest, lease)) = self.lease(IMAGES, id)? else { return Ok(None) };
        let root_sha256 = manifest.digest_of(ROOT).unwrap_or_default().to_owned();
        Ok(Some(Image {
            id: manifest.id,
            name: manifest.name,
            root: folder.join(ROOT),
            kernel: folder.join(KERNEL),
            initrd: folder.join(INITRD),
            root_sha256,
            k3s: manifest.k3s,
            created: manifest.created,
            lease: Arc::new(lease),
        }))
    }

    fn rootfs_tar(&self, key: &str) -> Result<Option<Utf8PathBuf>, Error> {
        // Only builders use it, and they hold the store's lock: no lease is needed beyond this.
        Ok(self.lease(ROOTFS, key)?.map(|(folder, ..)| folder.join(ROOTFS_TAR)))
    }

    fn lease(&self, part: &str, id: &str) -> Result<Option<(Utf8PathBuf, Manifest, Held)>, Error> {
        let folder = self.dir.join(part).join(id);
        if !folder.exists() {
            return Ok(None);
        }
        let path = folder.join(LEASE);
        let lease = match lock::shared(&path) {
            Ok(Some(lease)) => lease,
            Ok(None) => return Ok(None),
            Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                // Either it is damaged, or it was removed between the two looks.
                return match Manifest::load(&folder)? {
                    None => Ok(None),
                    Some(_) => Err(Error::Corrupt { path: folder, reason: "its lease file is gone".to_owned() }),
                };
            }
            Err(error) => return Err(error),
        };
        // Only now is the folder sure to stay; a removal renames it away first.
        let Some(manifest) = Manifest::load(&folder)? else { return Ok(None) };
        if let Some(reason) = manifest.glance(&folder) {
            return Err(Error::Corrupt { path: folder, reason });
        }
        // When it was last used decides what a gc removes; where that cannot be noted the image is as good.
        if let Err(error) = std::fs::File::open(&path).and_then(|file| file.set_modified(SystemTime::now())) {
            tracing::debug!(%path, %error, "could not note the use");
        }
        Ok(Some((folder, manifest, lease)))
    }

    /// What `find` finds; where that is damaged it is discarded, said so, and not found. The store's lock is held.
    fn usable_or_discard<T>(
        &self,
        part: &str,
        id: &str,
        on_event: OnEvent<'_>,
        find: impl Fn(&Self, &str) -> Result<Option<T>, Error>,
    ) -> Result<Option<T>, Error> {
        match find(self, id) {
            Err(Error::Corrupt { reason, .. }) => {
                self.discard(part, id)?;
                on_event(BuildEvent::Discarded { id: id.to_owned(), reason });
                Ok(None)
            }
            other => other,
        }
    }

    /// Gives what lies in `work` its name. The store's lock is held.
    fn register(&self, part: &str, work: Work, manifest: &Manifest) -> Result<Utf8PathBuf, Error> {
        work.keep_only(manifest)?;
        manifest.store(&work.dir)?;
        let folder = self.dir.join(part).join(&manifest.id);
        // A rename onto a folder that holds anything fails: nothing registered is ever replaced.
        std::fs::rename(&work.dir, &folder).map_err(Error::io("register", &folder))?;
        sync_folder(&self.dir.join(part))?;
        Ok(folder)
    }

    /// Removes an artifact: first its name, then its files. The store's lock is held.
    fn discard(&self, part: &str, id: &str) -> Result<(), Error> {
        let folder = self.dir.join(part).join(id);
        let work = Work::new(&self.dir)?;
        std::fs::rename(&folder, work.dir.join("discarded")).map_err(Error::io("remove", &folder))
    }

    /// Removes what ended builds left. The store's lock is held, so nobody builds.
    fn sweep(&self) -> Result<(), Error> {
        for name in self.entries(TMP)? {
            let path = self.dir.join(TMP).join(name);
            std::fs::remove_dir_all(&path).map_err(Error::io("remove leftover", &path))?;
        }
        Ok(())
    }

    fn entries(&self, part: &str) -> Result<Vec<String>, Error> {
        let folder = self.dir.join(part);
        let mut names = Vec::new();
        for entry in folder.read_dir_utf8().map_err(Error::io("read folder", &folder))? {
            names.push(entry.map_err(Error::io("read folder", &folder))?.file_name().to_owned());
        }
        names.sort();
        Ok(names)
    }

    /// Identifiers of what is registered.
    fn ids(&self, part: &str) -> Result<Vec<String>, Error> {
        Ok(self.entries(part)?.into_iter().filter(|name| name.bytes().all(|b| b.is_ascii_hexdigit())).collect())
    }
}

/// A folder a build works in, removed with everything in it unless it was registered.
struct Work {
    dir: Utf8PathBuf,
}

impl Work {
    fn new(store: &Utf8Path) -> Result<Self, Error> {
        let tmp = store.join(TMP);
        let dir = tempfile::Builder::new().prefix("").tempdir_in(&tmp).map_err(Error::io("create folder in", &tmp))?;
        let path = Utf8PathBuf::from_path_buf(dir.keep())
            .map_err(|path| Error::Corrupt { path: tmp, reason: format!("{} is not UTF-8", path.display()) })?;
        // Others may read images; a lab of another user can share the store.
        let work = Self { dir: path };
        std::fs::set_permissions(&work.dir, std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .map_err(Error::io("set mode of", &work.dir))?;
        Ok(work)
    }

    /// Removes logs and scratch: only what the manifest names is registered.
    fn keep_only(&self, manifest: &Manifest) -> Result<(), Error> {
        for entry in self.dir.read_dir_utf8().map_err(Error::io("read folder", &self.dir))? {
            let entry = entry.map_err(Error::io("read folder", &self.dir))?;
            let path = entry.path();
            if manifest.files.iter().any(|file| file.name == entry.file_name()) {
                continue;
            }
            let removed = if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
            removed.map_err(Error::io("remove", path))?;
        }
        Ok(())
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        // After a registration there is nothing left; after a failure the next build sweeps what this cannot remove.
        if let Err(error) = std::fs::remove_dir_all(&self.dir)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(path = %self.dir, %error, "could not remove a build's leftovers");
        }
    }
}

/// When an artifact was last asked for; the epoch where that cannot be told.
fn last_used(folder: &Utf8Path) -> SystemTime {
    std::fs::metadata(folder.join(LEASE)).and_then(|meta| meta.modified()).unwrap_or(SystemTime::UNIX_EPOCH)
}

pub(crate) fn rfc3339(time: jiff::Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// What a folder takes on disk, in bytes; what cannot be read counts nothing.
fn disk_bytes(folder: &Utf8Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let entries = folder.read_dir_utf8().into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let meta = entry.metadata().ok()?;
            Some(if meta.is_dir() { disk_bytes(entry.path()) } else { meta.blocks() * 512 })
        })
        .sum()
}
