//! Which labs live, which node is meant, and who is signalled.

use super::*;

fn folders(base: &tempfile::TempDir) -> Folders {
    let base = Utf8Path::from_path(base.path()).unwrap();
    Folders { state: base.join("state"), cache: base.join("cache"), runtime: base.join("run") }
}

fn node(name: &str, ssh_port: u16) -> NodeEntry {
    NodeEntry {
        name: name.to_owned(),
        role: Role::Server,
        ssh_port,
        user: "root".to_owned(),
        host_key: format!("ssh-ed25519 AAAA{ssh_port} {name}"),
        console_log: "/x/console.log".into(),
        cluster_ip: [192, 168, 1, 1].into(),
    }
}

fn lab(folders: &Folders, id: &str, owner: Owner, started_s: i64, nodes: &[&str]) {
    let dir = folders.state.join("labs").join(id);
    fs::create_dir_all(&dir).unwrap();
    let record = LabRecord {
        schema_version: SCHEMA_VERSION,
        lab: id.to_owned(),
        run: format!("r-{id}"),
        scenario: "smoke".to_owned(),
        k3s: "k3s v1".to_owned(),
        run_dir: folders.state.join("runs/r"),
        owner,
        state: LabState::Forming,
        started: Timestamp::from_second(started_s).unwrap(),
        expires: None,
        slowdown: 1.0,
        nodes: nodes.iter().map(|name| node(name, 4000)).collect(),
    };
    write_record(&dir, &record).unwrap();
}

#[test]
fn the_start_time_is_found_behind_any_name() {
    let stat = "42 (a) R (b)) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 987654 20 21";
    assert_eq!(start_ticks(stat), Some(987_654));
    assert_eq!(start_ticks("42 (x) S 1 2"), None);
    assert!(is_zombie("42 (x) Z 1") && !is_zombie(stat));
}

#[test]
fn an_owner_is_known_by_id_and_start() {
    let this = Owner::this_process().unwrap();
    assert!(this.lives());
    assert!(!Owner { start_ticks: this.start_ticks + 1, ..this }.lives());
}

#[test]
fn only_labs_whose_owner_lives_are_listed_and_only_they_are_signalled() {
    let base = tempfile::tempdir().unwrap();
    let folders = folders(&base);
    assert!(living(&folders).is_empty());
    let this = Owner::this_process().unwrap();
    let recycled = Owner { start_ticks: this.start_ticks - 1, ..this };
    lab(&folders, "bbbbbb", this, 20, &["server-1"]);
    lab(&folders, "aaaaaa", this, 10, &["server-1"]);
    lab(&folders, "dead", recycled, 30, &["server-1"]);
    fs::create_dir_all(folders.state.join("labs/making")).unwrap();
    let ids: Vec<String> = living(&folders).into_iter().map(|one| one.record.lab).collect();
    assert_eq!(ids, ["aaaaaa", "bbbbbb"]);
    let dir = folders.state.join("labs/dead");
    let dead = LivingLab { record: read_record(&dir).unwrap(), dir };
    // SIGKILL would end this very test if the start time were not compared.
    assert!(!dead.signal(Signal::SIGKILL).unwrap());
}

#[test]
fn a_node_is_unique_or_the_choices_are_named() {
    let base = tempfile::tempdir().unwrap();
    let folders = folders(&base);
    let state = folders.state.as_path();
    let this = Owner::this_process().unwrap();
    let none = pick_node(living(&folders), None, "server-1", state).unwrap_err();
    assert!(none.to_string().starts_with("no lab lives under"), "{none}");
    lab(&folders, "aaaaaa", this, 10, &["server-1", "agent-1"]);
    lab(&folders, "bbbbbb", this, 20, &["server-1"]);
    let pick = |lab, node| pick_node(living(&folders), lab, node, state).map(|(lab, _)| lab.record.lab);
    assert_eq!(pick(None, "agent-1").unwrap(), "aaaaaa");
    assert_eq!(pick(Some("bbbbbb"), "server-1").unwrap(), "bbbbbb");
    assert_eq!(pick(None, "server-1").unwrap_err().to_string(), "several labs have a node server-1: aaaaaa, bbbbbb");
    assert_eq!(
        pick(None, "x").unwrap_err().to_string(),
        "no node x; there are: server-1 in lab aaaaaa, agent-1 in lab aaaaaa, server-1 in lab bbbbbb"
    );
    assert_eq!(pick(Some("c"), "x").unwrap_err().to_string(), "no lab c lives; living: aaaaaa, bbbbbb");
    let several = pick_lab(living(&folders), None, state).unwrap_err();
    assert_eq!(several.to_string(), "2 labs live and none was named: aaaaaa, bbbbbb");
}

#[test]
fn a_kept_lab_says_until_when_and_its_files_are_private() {
    use std::os::unix::fs::PermissionsExt as _;
    let base = tempfile::tempdir().unwrap();
    let folders = folders(&base);
    lab(&folders, "aaaaaa", Owner::this_process().unwrap(), 10, &["server-1"]);
    let dir = folders.state.join("labs/aaaaaa");
    let record = mark_kept(&dir, Timestamp::from_second(99).unwrap()).unwrap();
    assert_eq!(read_record(&dir).unwrap(), record);
    assert_eq!((record.state, record.expires.unwrap().as_second()), (LabState::Kept, 99));
    assert_eq!(known_hosts(&record), "harness-aaaaaa-server-1 ssh-ed25519 AAAA4000 server-1\n");
    assert_eq!(fs::metadata(dir.join(RECORD)).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(!dir.join("lab.json.part").exists());
}

#[test]
fn the_end_of_a_lab_is_its_lock() {
    let base = tempfile::tempdir().unwrap();
    let folders = folders(&base);
    let dirs = crate::lab::LabDirs::claim(&folders).unwrap();
    lab(&folders, dirs.id(), Owner::this_process().unwrap(), 10, &[]);
    let one = living(&folders).pop().unwrap();
    assert!(!one.wait_gone(Duration::from_millis(50)).unwrap());
    dirs.remove().unwrap();
    assert!(one.wait_gone(Duration::from_secs(10)).unwrap());
}
