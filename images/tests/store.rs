//! The store with tools that are played by a runner of the test's: what it does when they behave and when they do not.

#![expect(clippy::unwrap_used, reason = "in a test an unwrap is an assertion")]

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use camino::{Utf8Path, Utf8PathBuf};
use images::tool::{ToolCommand, ToolError, ToolExit, ToolFuture, ToolRunner};
use images::{BuildEvent, Error, GuestBinary, Image, Recipe, Recipes, Store};
use tokio::sync::Notify;

/// What the tools do.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mood {
    Fine,
    /// The tool of this name writes half of its output and fails.
    FailsHalfway(&'static str),
    /// The tool of this name writes half of its output and never ends.
    Hangs(&'static str),
    /// The tool of this name is ended by its runner's deadline.
    OutOfTime(&'static str),
    /// mmdebstrap is fine, but its tree has no such file.
    Lacks(&'static str),
}

struct Tools {
    mood: Mood,
    rootfs: AtomicU32,
    images: AtomicU32,
    hanging: Notify,
    /// What was laid over the tree of the last image: path, mode, size.
    laid: Mutex<Vec<(String, u32, u64)>>,
}

impl Tools {
    fn new(mood: Mood) -> Self {
        Self {
            mood,
            rootfs: AtomicU32::new(0),
            images: AtomicU32::new(0),
            hanging: Notify::new(),
            laid: Mutex::default(),
        }
    }

    fn runs(&self) -> (u32, u32) {
        (self.rootfs.load(Ordering::SeqCst), self.images.load(Ordering::SeqCst))
    }
}

impl ToolRunner for Tools {
    fn run<'a>(&'a self, command: ToolCommand) -> ToolFuture<'a> {
        Box::pin(async move {
            // Give other tasks a chance to race.
            tokio::time::sleep(Duration::from_millis(20)).await;
            let log = command.log.clone().unwrap();
            std::fs::write(&log, "Acquire::Retries \"3\";\n").unwrap();
            let folder = log.parent().unwrap();
            let name = command.name.as_str();
            let out = match name {
                "rootfs" => {
                    self.rootfs.fetch_add(1, Ordering::SeqCst);
                    Some((folder.join("rootfs.tar"), tree(self.mood)))
                }
                "image" => {
                    self.images.fetch_add(1, Ordering::SeqCst);
                    *self.laid.lock().unwrap() = entries(&folder.join("overlay.tar"));
                    Some((folder.join("root.raw"), b"an ext4 file system".repeat(1000)))
                }
                _ => None,
            };
            let output_tail = format!("E: {name} said this last\n");
            let bad = matches!(self.mood, Mood::FailsHalfway(n) | Mood::Hangs(n) | Mood::OutOfTime(n) if n == name);
            if let Some((path, content)) = out {
                let len = if bad { content.len() / 2 } else { content.len() };
                std::fs::write(path, &content[..len]).unwrap();
            }
            match self.mood {
                Mood::FailsHalfway(_) if bad => Ok(ToolExit { code: Some(25), signal: None, output_tail }),
                Mood::OutOfTime(_) if bad => {
                    let deadline = command.deadline.unwrap();
                    Err(ToolError::DeadlineExceeded { name: command.name, deadline, output_tail })
                }
                Mood::Hangs(_) if bad => {
                    self.hanging.notify_one();
                    std::future::pending().await
                }
                _ => Ok(ToolExit { code: Some(0), signal: None, output_tail }),
            }
        })
    }
}

/// What a tar holds: path, mode, size.
fn entries(tar: &Utf8Path) -> Vec<(String, u32, u64)> {
    let mut tar = tar::Archive::new(std::fs::File::open(tar).unwrap());
    let entries = tar.entries().unwrap().map(Result::unwrap);
    let entry = |entry: tar::Entry<'_, _>| {
        let header = entry.header();
        (entry.path().unwrap().to_str().unwrap().to_owned(), header.mode().unwrap(), header.size().unwrap())
    };
    entries.map(entry).collect()
}

/// A tree with just what an image needs.
fn tree(mood: Mood) -> Vec<u8> {
    let dep =
        "kernel/drivers/virtio/virtio_pci.ko:\nkernel/virtio_blk.ko:\nkernel/virtio_net.ko:\nkernel/virtio-rng.ko:\n";
    let mut tar = tar::Builder::new(Vec::new());
    for (path, content) in [
        ("./boot/vmlinuz-6.1.0-1-cloud-amd64", "a kernel"),
        ("./usr/lib/modules/6.1.0-1-cloud-amd64/modules.dep", dep),
        ("./usr/lib/modules/6.1.0-1-cloud-amd64/modules.builtin", "kernel/fs/ext4/ext4.ko\n"),
        ("./usr/lib/modules/6.1.0-1-cloud-amd64/kernel/drivers/virtio/virtio_pci.ko", "pci"),
        ("./usr/lib/modules/6.1.0-1-cloud-amd64/kernel/virtio_blk.ko", "blk"),
        ("./usr/lib/modules/6.1.0-1-cloud-amd64/kernel/virtio_net.ko", "net"),
        ("./usr/lib/modules/6.1.0-1-cloud-amd64/kernel/virtio-rng.ko", "rng"),
        ("./usr/bin/busybox", "a busybox"),
        ("./lib/systemd/system/a.service", "[Install]\nWantedBy=multi-user.target\n"),
    ] {
        if matches!(mood, Mood::Lacks(what) if path.contains(what)) {
            continue;
        }
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, path, content.as_bytes()).unwrap();
    }
    tar.into_inner().unwrap()
}

struct Bench {
    dir: tempfile::TempDir,
    store: Store,
    recipe: Recipe,
    events: Mutex<Vec<BuildEvent>>,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let recipe = dir.path().join("tiny.yaml");
        std::fs::write(
            &recipe,
            "name: tiny\nsuite: bookworm\npackages: [systemd]\nbinaries:\n  k3s: /usr/local/bin/k3s\n\
             units:\n  enable: [a.service]\nfiles:\n  - path: /etc/x\n    content: x\n",
        )
        .unwrap();
        let recipe = Recipes::default().load(recipe.to_str().unwrap()).unwrap();
        let store = Store::open(&Utf8Path::from_path(dir.path()).unwrap().join("store")).unwrap();
        Self { dir, store, recipe, events: Mutex::new(Vec::new()) }
    }

    /// A program for this host; `salt` makes it another one.
    fn k3s(&self, salt: &str) -> GuestBinary {
        let path = Utf8Path::from_path(self.dir.path()).unwrap().join(format!("k3s{salt}"));
        let mut header = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0];
        header.extend(if cfg!(target_arch = "aarch64") { [183, 0] } else { [62, 0] });
        header.extend(salt.bytes());
        std::fs::write(&path, header).unwrap();
        let sha256 = images::fs::sha256_file(&path).unwrap();
        let (name, label) = ("k3s".to_owned(), format!("k3s{salt}"));
        GuestBinary { name, path, sha256, label, extra_packages: Vec::new(), files: Vec::new() }
    }

    async fn ensure(&self, tools: &Tools, salt: &str) -> Result<Image, Error> {
        let binary = self.k3s(salt);
        self.store.ensure(&self.recipe, &[binary], tools, &|event| self.events.lock().unwrap().push(event)).await
    }

    fn events(&self) -> Vec<BuildEvent> {
        std::mem::take(&mut self.events.lock().unwrap())
    }

    /// Everything below the store but its lock.
    fn leftovers(&self) -> Vec<String> {
        let mut found = Vec::new();
        for part in ["images", "rootfs", "tmp"] {
            for entry in self.store.dir().join(part).read_dir_utf8().unwrap() {
                found.push(format!("{part}/{}", entry.unwrap().file_name()));
            }
        }
        found
    }
}

fn damage(path: &Utf8Path, by: impl FnOnce(&Utf8Path)) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o644)).unwrap();
    by(path);
}

#[tokio::test]
async fn a_second_build_is_a_hit() {
    let bench = Bench::new();
    let tools = Tools::new(Mood::Fine);
    let image = bench.ensure(&tools, "").await.unwrap();
    assert_eq!((image.name.as_str(), image.k3s.as_str()), ("tiny", "k3s"));
    assert_eq!(std::fs::read_to_string(&image.kernel).unwrap(), "a kernel");
    assert!(std::fs::read(&image.initrd).unwrap().starts_with(b"070701"));
    assert_eq!(std::fs::metadata(&image.root).unwrap().mode() & 0o777, 0o444);
    assert!(matches!(bench.events().last(), Some(BuildEvent::Built { .. })));

    let start = Instant::now();
    let again = bench.ensure(&tools, "").await.unwrap();
    assert!(start.elapsed() < Duration::from_millis(500), "{:?}", start.elapsed());
    assert_eq!((again.id, again.root_sha256), (image.id.clone(), image.root_sha256));
    assert_eq!(bench.events(), [BuildEvent::Hit { id: image.id }]);
    assert_eq!(tools.runs(), (1, 1));
    // Logs, scratch folders and the overlay's tar are not part of what is registered.
    assert_eq!(bench.leftovers().len(), 2, "{:?}", bench.leftovers());
    let names: Vec<String> =
        image.root.parent().unwrap().read_dir_utf8().unwrap().map(|e| e.unwrap().file_name().to_owned()).collect();
    assert_eq!(names.len(), 5, "{names:?}");
}

#[tokio::test]
async fn another_binary_is_another_image_of_the_same_packages() {
    let bench = Bench::new();
    let tools = Tools::new(Mood::Fine);
    let first = bench.ensure(&tools, "").await.unwrap();
    let second = bench.ensure(&tools, "-other").await.unwrap();
    assert_ne!(first.id, second.id);
    assert_eq!(second.k3s, "k3s-other");
    assert_eq!(tools.runs(), (1, 2));
    let listed = bench.store.list().unwrap();
    assert_eq!(listed.len(), 2);
    assert!(listed.iter().all(|info| info.fault.is_none() && info.disk_bytes > 0 && info.name == "tiny"), "{listed:?}");
}

#[tokio::test]
async fn files_beside_a_binary_are_laid_into_the_image_and_part_of_its_key() {
    let bench = Bench::new();
    let tools = Tools::new(Mood::Fine);
    let without = bench.ensure(&tools, "").await.unwrap();
    let with = |content: &[u8]| {
        let path = Utf8Path::from_path(bench.dir.path()).unwrap().join("images.tar.zst");
        std::fs::write(&path, content).unwrap();
        let sha256 = images::fs::sha256_file(&path).unwrap();
        let guest_path = "/var/lib/rancher/k3s/agent/images/images.tar.zst".to_owned();
        let file = images::GuestFile { path, sha256, guest_path, mode: 0o644 };
        GuestBinary { files: vec![file], ..bench.k3s("") }
    };
    let ensure = async |binary: &GuestBinary| {
        bench.store.ensure(&bench.recipe, std::slice::from_ref(binary), &tools, &|_| {}).await
    };
    let one = ensure(&with(b"images")).await.unwrap();
    let expected = ("var/lib/rancher/k3s/agent/images/images.tar.zst".to_owned(), 0o644, 6);
    assert!(tools.laid.lock().unwrap().contains(&expected), "{:?}", tools.laid);
    let mut other = with(b"others");
    let two = ensure(&other).await.unwrap();
    assert!(without.id != one.id && one.id != two.id && two.id != without.id);
    assert_eq!(tools.runs(), (1, 3), "the packages are the same");

    // It changed after its digest was taken.
    std::fs::write(&other.files[0].path, b"neither").unwrap();
    other.label.push_str(" again");
    other.files[0].guest_path.push_str(".tar");
    let error = ensure(&other).await.unwrap_err().to_string();
    assert!(error.contains("images.tar.zst") && error.contains("it changed during the build"), "{error}");
}

#[tokio::test]
async fn callers_at_once_get_one_build() {
    let bench = Bench::new();
    let tools = Tools::new(Mood::Fine);
    let (a, b, c) = tokio::join!(bench.ensure(&tools, ""), bench.ensure(&tools, ""), bench.ensure(&tools, ""));
    let (a, b, c) = (a.unwrap(), b.unwrap(), c.unwrap());
    assert!(a.id == b.id && b.id == c.id);
    assert_eq!(tools.runs(), (1, 1));
    let events = bench.events();
    assert_eq!(events.iter().filter(|event| matches!(event, BuildEvent::Waiting)).count(), 2, "{events:?}");
    assert_eq!(events.iter().filter(|event| matches!(event, BuildEvent::Hit { .. })).count(), 2, "{events:?}");
}

#[tokio::test]
async fn a_failed_build_leaves_nothing_and_shows_the_tools_last_words() {
    for (tool, program) in [("rootfs", "mmdebstrap"), ("image", "mkfs.ext4")] {
        let bench = Bench::new();
        let error = bench.ensure(&Tools::new(Mood::FailsHalfway(tool)), "").await.unwrap_err().to_string();
        assert!(error.contains(&format!("{program} exited 25\n  | E: {tool} said this last")), "{error}");
        let left = bench.leftovers();
        assert!(left.iter().all(|name| name.starts_with("rootfs/") && tool == "image"), "{left:?}");
        // The next build is not disturbed.
        bench.ensure(&Tools::new(Mood::Fine), "").await.unwrap();
    }
    let bench = Bench::new();
    let error = bench.ensure(&Tools::new(Mood::OutOfTime("rootfs")), "").await.unwrap_err().to_string();
    assert!(error.contains("did not end within") && error.contains("E: rootfs said this last"), "{error}");
    assert!(bench.leftovers().is_empty(), "{:?}", bench.leftovers());
}

#[tokio::test]
async fn a_build_that_is_given_up_leaves_nothing() {
    for tool in ["rootfs", "image"] {
        let bench = Bench::new();
        let tools = Tools::new(Mood::Hangs(tool));
        tokio::select! {
            result = bench.ensure(&tools, "") => panic!("the tool hangs: {result:?}"),
            () = tools.hanging.notified() => {}
        }
        let left = bench.leftovers();
        assert!(!left.iter().any(|name| name.starts_with("tmp/") || name.starts_with("images/")), "{left:?}");
        // The lock is free again.
        bench.ensure(&Tools::new(Mood::Fine), "").await.unwrap();
    }
}

#[tokio::test]
async fn a_waiter_that_is_given_up_does_not_keep_the_lock() {
    let bench = Bench::new();
    let hanging = Tools::new(Mood::Hangs("rootfs"));
    let fine = Tools::new(Mood::Fine);
    {
        let builder = bench.ensure(&hanging, "");
        tokio::pin!(builder);
        tokio::select! {
            result = &mut builder => panic!("the tool hangs: {result:?}"),
            () = hanging.hanging.notified() => {}
        }
        let waiter = tokio::time::timeout(Duration::from_millis(50), bench.ensure(&fine, ""));
        assert!(waiter.await.is_err(), "the lock is held");
        assert!(bench.events().contains(&BuildEvent::Waiting));
    }
    let image = tokio::time::timeout(Duration::from_secs(10), bench.ensure(&fine, "")).await;
    image.expect("the lock is free again").unwrap();
}

#[tokio::test]
async fn what_a_killed_build_left_is_swept_by_the_next() {
    let bench = Bench::new();
    let left = bench.store.dir().join("tmp/abandoned/scratch");
    std::fs::create_dir_all(&left).unwrap();
    std::fs::write(left.join("rootfs.tar"), "half").unwrap();
    bench.ensure(&Tools::new(Mood::Fine), "").await.unwrap();
    assert!(!left.exists());
}

#[tokio::test]
async fn a_damaged_image_is_never_used() {
    type Damage = fn(&Utf8Path);
    let damages: [(&str, Damage); 5] = [
        ("root.raw", |path| std::fs::File::options().write(true).open(path).unwrap().set_len(7).unwrap()),
        ("root.raw", |path| {
            let len = std::fs::metadata(path).unwrap().len() as usize;
            std::fs::write(path, vec![b'x'; len]).unwrap();
        }),
        ("vmlinuz", |path| std::fs::remove_file(path).unwrap()),
        ("manifest.json", |path| std::fs::write(path, "{").unwrap()),
        ("manifest.json", |path| std::fs::remove_file(path).unwrap()),
    ];
    for (name, by) in damages {
        let bench = Bench::new();
        let tools = Tools::new(Mood::Fine);
        let image = bench.ensure(&tools, "").await.unwrap();
        let folder = image.root.parent().unwrap().to_owned();
        let id = image.id.clone();
        drop(image);
        bench.events();
        damage(&folder.join(name), by);
        assert!(matches!(bench.store.image(&id), Err(Error::Corrupt { .. })), "{name}");
        assert!(bench.store.list().unwrap()[0].fault.is_some(), "{name}");

        let again = bench.ensure(&tools, "").await.unwrap();
        assert_eq!(again.id, id);
        assert_eq!(tools.runs(), (1, 2), "{name}");
        let events = bench.events();
        assert!(events.iter().any(|event| matches!(event, BuildEvent::Discarded { .. })), "{events:?}");
        assert!(bench.store.verify().await.unwrap().iter().all(|found| found.faults.is_empty()));
    }
}

#[tokio::test]
async fn a_damaged_root_file_system_is_made_again() {
    let bench = Bench::new();
    let tools = Tools::new(Mood::Fine);
    bench.ensure(&tools, "").await.unwrap();
    let part = bench.store.dir().join("rootfs");
    let key = part.read_dir_utf8().unwrap().next().unwrap().unwrap().into_path();
    damage(&key.join("rootfs.tar"), |path| {
        std::fs::File::options().write(true).open(path).unwrap().set_len(7).unwrap();
    });
    bench.ensure(&tools, "-other").await.unwrap();
    assert_eq!(tools.runs(), (2, 2));
}

#[tokio::test]
async fn verify_finds_a_byte_that_changed_behind_the_times_back() {
    let bench = Bench::new();
    let image = bench.ensure(&Tools::new(Mood::Fine), "").await.unwrap();
    let modified = std::fs::metadata(&image.root).unwrap().modified().unwrap();
    damage(&image.root, |path| {
        let mut content = std::fs::read(path).unwrap();
        content[100] ^= 1;
        std::fs::write(path, content).unwrap();
        std::fs::File::options().write(true).open(path).unwrap().set_modified(modified).unwrap();
    });
    let found = bench.store.verify().await.unwrap();
    let faults: Vec<&String> = found.iter().flat_map(|found| &found.faults).collect();
    assert_eq!(faults.len(), 1, "{found:?}");
    assert!(faults[0].starts_with("root.raw has digest "), "{faults:?}");
}

#[tokio::test]
async fn gc_spares_what_is_in_use_or_recent() {
    let bench = Bench::new();
    let tools = Tools::new(Mood::Fine);
    let image = bench.ensure(&tools, "").await.unwrap();
    let clone = image.clone();
    drop(image);
    std::fs::create_dir(bench.store.dir().join("tmp/abandoned")).unwrap();

    let report = bench.store.gc(Duration::ZERO).await.unwrap();
    assert_eq!(report.removed, ["tmp/abandoned"]);
    assert_eq!(report.in_use, [format!("images/{}", clone.id)]);
    let id = clone.id.clone();
    drop(clone);

    let report = bench.store.gc(Duration::from_secs(3600)).await.unwrap();
    assert!(report.removed.is_empty() && report.in_use.is_empty(), "{report:?}");

    let report = bench.store.gc(Duration::ZERO).await.unwrap();
    assert_eq!(report.removed.len(), 2, "{report:?}");
    assert_eq!(report.removed[0], format!("images/{id}"));
    assert!(report.removed[1].starts_with("rootfs/") && report.freed_bytes > 0, "{report:?}");
    assert!(bench.leftovers().is_empty(), "{:?}", bench.leftovers());
}

#[tokio::test]
async fn a_tree_that_lacks_something_says_what_to_add() {
    for (lacks, said) in [
        ("vmlinuz", "has no kernel: add a kernel to `packages`"),
        ("virtio_blk", "has no kernel/virtio_blk.ko"),
        ("busybox", "has no static busybox: add busybox-static"),
        ("a.service", "has no unit a.service"),
    ] {
        let bench = Bench::new();
        let error = bench.ensure(&Tools::new(Mood::Lacks(lacks)), "").await.unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
    }
}

#[tokio::test]
async fn a_binary_that_changes_under_way_or_is_for_another_machine_is_refused() {
    let bench = Bench::new();
    let tools = Tools::new(Mood::Fine);
    let mut binary = bench.k3s("");
    binary.sha256 = "0".repeat(64);
    let error = bench.store.ensure(&bench.recipe, &[binary.clone()], &tools, &|_| {}).await.unwrap_err();
    assert!(error.to_string().contains("it changed during the build"), "{error}");

    let mut foreign = std::fs::read(&binary.path).unwrap();
    foreign[18] = 22;
    foreign[19] = 0;
    std::fs::write(&binary.path, foreign).unwrap();
    let error = bench.store.ensure(&bench.recipe, &[binary], &tools, &|_| {}).await.unwrap_err();
    assert!(matches!(error, Error::Elf(_)), "{error}");
}

#[tokio::test]
async fn an_overlay_is_never_laid_over_another_file() {
    let bench = Bench::new();
    let path: Utf8PathBuf = bench.store.dir().join("node.qcow2");
    std::fs::write(&path, "kept").unwrap();
    let image = bench.ensure(&Tools::new(Mood::Fine), "").await.unwrap();
    let error = images::overlay::create(&image.root, &path, &Tools::new(Mood::Fine)).await.unwrap_err();
    assert!(error.to_string().contains("could not create overlay"), "{error}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "kept");
}
