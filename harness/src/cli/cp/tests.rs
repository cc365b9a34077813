//! Which side is the guest's; files and folders there and back, over a real sshd on loopback.

use super::*;
use crate::guest::testing::Sshd;

#[test]
fn a_guests_side_has_a_node_before_the_colon() {
    let guest = |node: &str, path: &str| Side::Guest { node: node.to_owned(), path: path.to_owned() };
    assert_eq!(Side::parse("server-1:/etc/hosts"), guest("server-1", "/etc/hosts"));
    assert_eq!(Side::parse("server-1:"), guest("server-1", "."));
    assert_eq!(Side::parse("server-1:a:b"), guest("server-1", "a:b"));
    for local in ["./a:b", "/a:b", ":x", "plain"] {
        assert_eq!(Side::parse(local), Side::Local(local.into()));
    }
}

#[test]
fn what_stat_says() {
    assert_eq!(found("regular file 4755"), Some(Found::File { mode: 0o755 }));
    assert_eq!(found("regular empty file 644"), Some(Found::File { mode: 0o644 }));
    assert_eq!(found("directory 755"), Some(Found::Folder));
    assert_eq!(found("character special file 666"), None);
}

#[tokio::test]
async fn files_and_folders_come_back_as_they_went() {
    let sshd = Sshd::start();
    let guest = Guest::connect_once(sshd.target(), Duration::from_secs(20)).await.unwrap();
    let base = tempfile::tempdir().unwrap();
    let (here, there) = (base.path().join("here"), base.path().join("there"));
    std::fs::create_dir_all(here.join("tree/deep")).unwrap();
    std::fs::create_dir(&there).unwrap();
    let bytes: Vec<u8> = (0..300_000_u32).flat_map(u32::to_le_bytes).collect();
    let file = here.join("it's a file");
    std::fs::write(&file, &bytes).unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o640)).unwrap();
    std::fs::write(here.join("tree/deep/x"), "x").unwrap();
    std::os::unix::fs::symlink("deep/x", here.join("tree/link")).unwrap();

    let remote = |name: &str| there.join(name).to_str().unwrap().to_owned();
    // Into a folder that exists, under its own name.
    Copy::In { local: file.clone(), path: there.to_str().unwrap().to_owned() }.carry_out(&guest).await.unwrap();
    assert_eq!(std::fs::read(there.join("it's a file")).unwrap(), bytes);
    let back = here.join("back");
    Copy::Out { path: remote("it's a file"), local: back.clone() }.carry_out(&guest).await.unwrap();
    assert_eq!(std::fs::read(&back).unwrap(), bytes);
    assert_eq!(std::fs::metadata(&back).unwrap().permissions().mode() & 0o777, 0o640);

    Copy::In { local: here.join("tree"), path: remote("new") }.carry_out(&guest).await.unwrap();
    Copy::Out { path: remote("new"), local: here.join("again") }.carry_out(&guest).await.unwrap();
    assert_eq!(std::fs::read_to_string(here.join("again/deep/x")).unwrap(), "x");
    assert_eq!(std::fs::read_link(here.join("again/link")).unwrap(), Path::new("deep/x"));

    // What fails says why, and leaves nothing half done.
    let error = Copy::Out { path: remote("none"), local: here.join("n") }.carry_out(&guest).await.unwrap_err();
    assert!(error.render().contains("No such file"), "{}", error.render());
    let missing = remote("no/such/folder");
    let error = Copy::In { local: file, path: missing }.carry_out(&guest).await.unwrap_err();
    assert!(error.render().contains("no/such/folder"), "{}", error.render());
    let error = Copy::In { local: here.join("tree"), path: "/proc/x".to_owned() }.carry_out(&guest).await.unwrap_err();
    assert!(error.render().contains("/proc/x"), "{}", error.render());
    assert!(!here.join("n").exists());
}
