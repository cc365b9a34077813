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

/// A process that holds the lab's lock, as an owner does, and ignores SIGTERM where it is `deaf`.
fn owner_process(dir: &Utf8Path, deaf: bool) -> std::process::Child {
    use std::io::Read as _;
    // What is ignored stays so across an exec, and a descriptor stays open.
    let trap = if deaf { "trap '' TERM; " } else { "" };
    let script = format!("{trap}exec 9>\"$0\"; flock 9; echo; exec sleep 600");
    let mut child = std::process::Command::new("sh")
        .args(["-c", &script, dir.join("lock").as_str()])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    child.stdout.take().unwrap().read_exact(&mut [0]).unwrap();
    child
}

fn owner_of(child: &std::process::Child) -> Owner {
    let stat = fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap();
    Owner { pid: child.id(), start_ticks: start_ticks(&stat).unwrap() }
}

/// Ends a lab with this owner. Which steps did not do, the signal that ended the owner, and how long that took.
fn end_with(deaf: bool, stopped: bool) -> (Vec<Signal>, Option<i32>, Duration) {
    use std::os::unix::process::ExitStatusExt as _;
    let base = tempfile::tempdir().unwrap();
    let folders = folders(&base);
    let dir = folders.state.join("labs/abcdef");
    fs::create_dir_all(&dir).unwrap();
    let mut child = owner_process(&dir, deaf);
    lab(&folders, "abcdef", owner_of(&child), 1, &[]);
    if stopped {
        nix::sys::signal::kill(Pid::from_raw(child.id().try_into().unwrap()), Signal::SIGSTOP).unwrap();
    }
    let steps = [
        (Signal::SIGTERM, Duration::from_millis(300)),
        (Signal::SIGTERM, Duration::from_millis(200)),
        (Signal::SIGKILL, Duration::from_secs(10)),
    ];
    let (mut in_vain, began) = (Vec::new(), std::time::Instant::now());
    let labs = living(&folders);
    assert!(labs[0].end(&steps, |signal, _| in_vain.push(signal)).unwrap());
    let took = began.elapsed();
    // Its files are closed, and with them the lock, a moment before it is no process any more.
    let signal = child.wait().unwrap().signal();
    assert!(living(&folders).is_empty());
    (in_vain, signal, took)
}

#[test]
fn an_owner_that_ignores_what_it_is_asked_is_killed() {
    let (in_vain, signal, took) = end_with(true, false);
    assert_eq!((in_vain.as_slice(), signal), ([Signal::SIGTERM; 2].as_slice(), Some(Signal::SIGKILL as i32)));
    assert!(took >= Duration::from_millis(500), "each step had its time: {took:?}");
}

#[test]
fn an_owner_that_was_stopped_is_let_go_on_to_hear_it() {
    let (in_vain, signal, _) = end_with(false, true);
    assert_eq!((in_vain.as_slice(), signal), ([].as_slice(), Some(Signal::SIGTERM as i32)));
}

#[test]
fn only_a_kept_lab_expires() {
    let base = tempfile::tempdir().unwrap();
    let folders = folders(&base);
    lab(&folders, "abcdef", Owner::this_process().unwrap(), 1, &[]);
    let mut found = living(&folders).remove(0);
    let at = |second| Timestamp::from_second(second).unwrap();
    assert!(!found.expired(at(9)));
    found.record.expires = Some(at(5));
    assert!(!found.expired(at(9)), "its run is going on");
    found.record.state = LabState::Kept;
    assert!(found.expired(at(5)) && !found.expired(at(4)));
}
