//! What is kept, under which name, and when it is trusted.

use std::os::unix::fs::PermissionsExt as _;

use super::*;

#[tokio::test]
async fn a_release_is_fetched_once_and_used_without_the_server_afterwards() {
    let bench = Bench::new();
    let server = site(&k3s(), |_, _| Reply::ok(&k3s())).await;
    let file = bench.fetch(&server.base()).await.unwrap();
    assert_eq!(file.path, bench.folder().join("k3s"));
    assert_eq!((file.sha256.as_str(), file.bytes), (digest(&k3s()).as_str(), 700_000));
    assert_eq!(std::fs::read(&file.path).unwrap(), k3s());
    assert_eq!(std::fs::metadata(&file.path).unwrap().permissions().mode() & 0o777, 0o755);
    assert_eq!(bench.files(), ["k3s", "k3s.json"]);
    assert!(bench.has(|event| matches!(event, DownloadEvent::Progress { received: 700_000, total: Some(700_000) })));
    assert!(bench.has(|event| matches!(event, DownloadEvent::Finished { bytes: 700_000, .. })));

    drop(server);
    assert_eq!(bench.fetch("http://127.0.0.1:1/r").await.unwrap(), file);
    assert!(bench.has(|event| matches!(event, DownloadEvent::Cached { .. })));
}

#[tokio::test]
async fn two_at_once_download_once() {
    let bench = Bench::new();
    let server = site(&k3s(), |_, _| Reply::ok(&k3s())).await;
    let base = server.base();
    let (one, two) = tokio::join!(bench.fetch(&base), bench.fetch(&base));
    assert_eq!(one.unwrap(), two.unwrap());
    assert_eq!(server.asked("/k3s").len(), 1);
    assert!(bench.has(|event| matches!(event, DownloadEvent::Waiting { .. })));
}

#[tokio::test]
async fn architectures_never_share_a_file() {
    let bench = Bench::new();
    let arm = program(183, 700_000);
    let list = sums(&[("k3s-arm64", &arm)]);
    let (amd_server, served) = (site(&k3s(), |_, _| Reply::ok(&k3s())).await, arm.clone());
    let arm_server = Server::start(move |request, _| match request.path().rsplit('/').next() {
        Some("sha256sum-arm64.txt") => Reply::ok(list.as_bytes()),
        Some("k3s-arm64") => Reply::ok(&served),
        _ => Reply::new("404 Not Found", &[], b""),
    })
    .await;
    let amd_file = bench.fetch(&amd_server.base()).await.unwrap();
    let arm_file = release(Arch::Arm64).binary(bench.cache(), &options(&arm_server.base()), &|_| {}).await.unwrap();
    assert_eq!(arm_file.path, bench.cache().join("k3s").join(VERSION).join("arm64/k3s-arm64"));
    assert_eq!(arm_file.guest_path, "/usr/local/bin/k3s");
    assert_eq!(std::fs::read(&arm_file.path).unwrap(), arm);

    // FM-7: one architecture's file under the other's name, of the same length.
    std::fs::copy(&arm_file.path, &amd_file.path).unwrap();
    assert_eq!(bench.fetch(&amd_server.base()).await.unwrap(), amd_file);
    assert!(bench.has(|event| matches!(event, DownloadEvent::Damaged { reason, .. } if reason.contains("aarch64"))));
    assert_eq!(std::fs::read(&amd_file.path).unwrap(), k3s());
}

#[tokio::test]
async fn the_wrong_machine_under_the_right_name_and_digest_is_refused() {
    let bench = Bench::new();
    let arm = program(183, 4_096);
    let served = arm.clone();
    let server = site(&arm, move |_, _| Reply::ok(&served)).await;
    let error = bench.fetch(&server.base()).await.unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, DownloadError::Elf { .. }), "{text}");
    assert!(text.contains("aarch64") && text.contains("x86_64") && text.contains("%2Bk3s1/k3s"), "{text}");
    assert_eq!(bench.files(), Vec::<String>::new());
}

#[tokio::test]
async fn a_cached_file_that_changed_is_noticed_and_fetched_anew() {
    let bench = Bench::new();
    let server = site(&k3s(), |_, _| Reply::ok(&k3s())).await;
    let file = bench.fetch(&server.base()).await.unwrap();

    // Shorter.
    std::fs::write(&file.path, &k3s()[..1_000]).unwrap();
    bench.fetch(&server.base()).await.unwrap();
    assert!(bench.has(|event| matches!(event, DownloadEvent::Damaged { reason, .. } if reason.contains("1000 bytes"))));
    // As long and for the right machine, one byte another.
    let mut other = k3s();
    other[5_000] ^= 1;
    std::fs::write(&file.path, &other).unwrap();
    bench.fetch(&server.base()).await.unwrap();
    assert!(bench.has(|event| matches!(event, DownloadEvent::Damaged { reason, .. } if reason.contains("sha256"))));
    assert_eq!(std::fs::read(&file.path).unwrap(), k3s());
    // Without its record.
    std::fs::remove_file(bench.folder().join("k3s.json")).unwrap();
    bench.fetch(&server.base()).await.unwrap();
    assert_eq!(server.asked("/k3s").len(), 4);
    // Only written again: read once as a whole, not fetched.
    std::fs::write(&file.path, k3s()).unwrap();
    bench.fetch(&server.base()).await.unwrap();
    assert_eq!(server.asked("/k3s").len(), 4);
}

#[tokio::test]
async fn a_dropped_download_leaves_a_part_that_the_next_one_continues() {
    let bench = Bench::new();
    let server = site(&k3s(), |request, _| match request.range() {
        None => Reply::ok(&k3s()).cut(700_000, 600_000).hang(),
        Some(start) => Reply::rest(&k3s(), start, "\"one\""),
    })
    .await;
    let base = server.base();
    {
        // Ends as by Ctrl-C: the future goes away in the middle.
        let (sender, mut seen) = tokio::sync::mpsc::unbounded_channel();
        let told = move |event| drop(sender.send(event));
        let (options, release) = (options(&base), release(Arch::Amd64));
        let download = release.binary(bench.cache(), &options, &told);
        let enough = async {
            while let Some(event) = seen.recv().await {
                if matches!(event, DownloadEvent::Progress { received, .. } if received >= 600_000) {
                    return;
                }
            }
        };
        tokio::select! {
            result = download => panic!("it ended by itself: {result:?}"),
            () = enough => {}
        }
    }
    assert_eq!(bench.files(), ["k3s.part", "k3s.part.json"]);
    let kept = std::fs::metadata(bench.folder().join("k3s.part")).unwrap().len();
    assert!(kept >= 600_000 - 256 * 1024, "{kept}");
    bench.fetch(&base).await.unwrap();
    assert_eq!(server.asked("/k3s")[1].range(), Some(usize::try_from(kept).unwrap()));
    assert_eq!(std::fs::read(bench.folder().join("k3s")).unwrap(), k3s());
    assert_eq!(bench.files(), ["k3s", "k3s.json"]);
}

#[tokio::test]
async fn a_part_of_another_publication_is_not_continued() {
    let bench = Bench::new();
    std::fs::create_dir_all(bench.folder()).unwrap();
    std::fs::write(bench.folder().join("k3s.part"), [7; 1_000]).unwrap();
    let note = serde_json::json!({"sha256": digest(b"other"), "validator": "\"one\"", "total": 700_000});
    std::fs::write(bench.folder().join("k3s.part.json"), note.to_string()).unwrap();
    let server = site(&k3s(), |_, _| Reply::ok(&k3s())).await;
    bench.fetch(&server.base()).await.unwrap();
    assert_eq!(server.asked("/k3s")[0].range(), None);
}

#[tokio::test]
async fn what_nobody_uses_is_listed_and_collected() {
    let bench = Bench::new();
    let server = site(&k3s(), |_, _| Reply::ok(&k3s())).await;
    assert!(images::downloads::list(bench.cache()).unwrap().is_empty(), "a cache nobody made is empty");
    let gc = async |unused_s| images::downloads::gc(bench.cache(), Duration::from_secs(unused_s)).await.unwrap();
    assert_eq!(gc(0).await, images::store::GcReport::default());
    let file = bench.fetch(&server.base()).await.unwrap();
    let listed = images::downloads::list(bench.cache()).unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!((listed[0].version.as_str(), listed[0].file.as_str()), (VERSION, "k3s"));
    assert!(listed[0].url.ends_with("/v9.9.9%2Bk3s1/k3s") && listed[0].disk_bytes >= 700_000, "{listed:?}");

    // In use, then used within the hour, then neither.
    let name = format!("k3s/{VERSION}/amd64/k3s");
    let held = file.clone();
    drop(file);
    let report = gc(0).await;
    assert_eq!((report.removed, report.in_use), (vec![], vec![name.clone()]));
    drop(held);
    let report = gc(3_600).await;
    assert_eq!((report.removed, report.in_use), (vec![], vec![]));
    let ago = std::time::SystemTime::now() - Duration::from_secs(7_200);
    let record = std::fs::File::open(bench.folder().join("k3s.json")).unwrap();
    record.set_modified(ago).unwrap();
    // Being asked for is a use.
    drop(bench.fetch(&server.base()).await.unwrap());
    assert!(gc(3_600).await.removed.is_empty());
    record.set_modified(ago).unwrap();
    let report = gc(3_600).await;
    assert_eq!(report.removed, [name]);
    assert!(report.freed_bytes >= 700_000, "{report:?}");
    assert_eq!(bench.files(), Vec::<String>::new());
    bench.fetch(&server.base()).await.unwrap();
    assert_eq!(server.asked("/k3s").len(), 2, "it is fetched anew");
}

#[tokio::test]
async fn parts_are_kept_for_a_while_and_what_is_being_fetched_is_left_alone() {
    let bench = Bench::new();
    std::fs::create_dir_all(bench.folder()).unwrap();
    for name in ["k3s.part", "k3s.part.json", "gone.json", "unrecorded"] {
        std::fs::write(bench.folder().join(name), "x").unwrap();
    }
    let lock = std::fs::File::create(bench.folder().join("lock")).unwrap();
    lock.lock().unwrap();
    let gc = async |unused_s| images::downloads::gc(bench.cache(), Duration::from_secs(unused_s)).await.unwrap();
    assert_eq!(gc(0).await.in_use, [format!("k3s/{VERSION}/amd64: being fetched into")]);
    assert_eq!(bench.files().len(), 4);
    lock.unlock().unwrap();
    assert_eq!(gc(3_600).await.removed, [format!("k3s/{VERSION}/amd64/unrecorded")]);
    assert_eq!(bench.files(), ["k3s.part", "k3s.part.json"]);
    assert_eq!(gc(0).await.removed, [format!("k3s/{VERSION}/amd64/k3s.part")]);
    assert_eq!(bench.files(), Vec::<String>::new());
}

#[tokio::test]
async fn the_images_for_guests_without_a_registry_come_the_same_way() {
    let (zst, gz) = ("k3s-airgap-images-amd64.tar.zst", "k3s-airgap-images-amd64.tar.gz");
    for (listed, expected) in [(vec![gz, zst], Some(zst)), (vec![gz], Some(gz)), (vec!["k3s"], None)] {
        let bench = Bench::new();
        let list = sums(&listed.iter().map(|name| (*name, name.as_bytes())).collect::<Vec<_>>());
        let server = Server::start(move |request, _| match request.path().rsplit('/').next().unwrap() {
            "sha256sum-amd64.txt" => Reply::ok(list.as_bytes()),
            name => Reply::ok(name.as_bytes()),
        })
        .await;
        let options = options(&server.base());
        let result = release(Arch::Amd64).airgap_images(bench.cache(), &options, &|_| {}).await;
        match expected {
            Some(name) => {
                let file = result.unwrap();
                assert_eq!(file.path, bench.folder().join(name));
                assert_eq!(file.guest_path, format!("/var/lib/rancher/k3s/agent/images/{name}"));
                assert_eq!(file.sha256, digest(name.as_bytes()));
            }
            None => {
                let text = result.unwrap_err().to_string();
                assert!(text.ends_with(&format!("sha256sum-amd64.txt does not list {zst} or {gz}")), "{text}");
            }
        }
    }
}
