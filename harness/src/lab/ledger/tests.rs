use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use tokio::sync::oneshot;

use super::*;

const HOST: Host = Host { cores: 2, memory_available_mib: 10_000 };

fn claim(lab: &str, vcpus: u32, memory_mib: u64) -> Claim {
    Claim { lab: lab.to_owned(), scenario: "simple".to_owned(), vcpus, memory_mib }
}

fn entry(lab: &str, vcpus: u32, memory_mib: u64, admitted: bool) -> Entry {
    let since = Timestamp::UNIX_EPOCH;
    Entry { claim: claim(lab, vcpus, memory_mib), admitted, pid: 1, since, memory_used_mib: Some(0), user: None }
}

fn decided(asked: &Claim, before: &[Entry]) -> Decision {
    decide(asked, before, HOST, Policy::default())
}

#[test]
fn a_lab_alone_is_admitted_whatever_its_vcpus() {
    assert_eq!(decided(&claim("a", 64, 1000), &[]), Decision::Admit);
}

#[test]
fn two_labs_share_the_cores_up_to_the_ratio() {
    let other = [entry("a", 2, 1000, true)];
    assert_eq!(decided(&claim("b", 2, 1000), &other), Decision::Admit);
    let Decision::Wait(obstacle) = decided(&claim("b", 3, 1000), &other) else { panic!() };
    assert_eq!(
        obstacle.to_string(),
        "the nodes ask for 3 vCPUs, 2 of the 4 admitted on this machine are taken by lab a (simple, 2 vCPUs, 1000 MiB, pid 1)"
    );
}

#[test]
fn memory_that_nobody_can_free_is_refused_at_once() {
    let Decision::Refuse(obstacle) = decided(&claim("b", 1, 10_001), &[]) else { panic!() };
    assert!(obstacle.to_string().contains("10001 MiB of memory, 10000 MiB are to be had"), "{obstacle}");
    // Not known is no reason to refuse.
    let unknown = Host { memory_available_mib: 0, ..HOST };
    assert_eq!(decide(&claim("b", 1, 10_001), &[], unknown, Policy::default()), Decision::Admit);
}

#[test]
fn memory_promised_to_others_is_waited_for() {
    let mut other = entry("a", 1, 6_000, true);
    // 6,000 promised and none of it taken yet: 4,000 of the 10,000 available are left.
    assert_eq!(decided(&claim("b", 1, 4_000), &[other.clone()]), Decision::Admit);
    assert!(matches!(
        decided(&claim("b", 1, 4_001), &[other.clone()]),
        Decision::Wait(Obstacle::MemoryPromised { left_mib: 4_000, .. })
    ));
    // What it has taken is no longer available, and promised no more.
    other.memory_used_mib = Some(6_000);
    assert_eq!(decided(&claim("b", 1, 10_000), &[other.clone()]), Decision::Admit);
    assert!(matches!(decided(&claim("b", 1, 12_000), &[other.clone()]), Decision::Wait(_)));
    assert!(matches!(decided(&claim("b", 1, 16_001), &[other]), Decision::Refuse(_)));
}

/// `hidepid`: whether the memory that is missing is what that lab has taken is not known.
#[test]
fn a_lab_that_cannot_be_seen_is_waited_for() {
    let mut other = entry("a", 1, 6_000, true);
    other.memory_used_mib = None;
    let before = std::slice::from_ref(&other);
    assert_eq!(decided(&claim("b", 1, 4_000), before), Decision::Admit);
    for memory_mib in [4_001, 10_001, 16_000] {
        assert!(matches!(
            decided(&claim("b", 1, memory_mib), before),
            Decision::Wait(Obstacle::MemoryPromised { left_mib: 4_000, .. })
        ));
    }
    assert!(matches!(decided(&claim("b", 1, 16_001), before), Decision::Refuse(_)));
    // One that waits has taken nothing.
    other.admitted = false;
    assert!(matches!(decided(&claim("b", 1, 10_001), &[other]), Decision::Refuse(_)));
}

#[test]
fn who_waits_is_not_passed_by_who_came_later() {
    let living = entry("a", 3, 100, true);
    let large = entry("b", 4, 100, false);
    let small = claim("c", 1, 100);
    assert_eq!(decided(&small, std::slice::from_ref(&living)), Decision::Admit);
    assert!(matches!(decided(&small, &[living, large.clone()]), Decision::Wait(_)));
    // Where the one before could go now, its part counts as taken, and what is left is for the next.
    let waiting = entry("b", 2, 100, false);
    assert_eq!(decided(&claim("c", 2, 100), std::slice::from_ref(&waiting)), Decision::Admit);
    assert!(matches!(decided(&claim("c", 3, 100), &[waiting]), Decision::Wait(Obstacle::CoresTaken { taken: 2, .. })));
}

#[test]
fn a_turn_that_has_not_come_is_said_as_that() {
    let before = [entry("a", 1, 6_000, true), entry("b", 1, 6_000, false)];
    let Decision::Wait(obstacle) = decided(&claim("c", 1, 0), &before) else { panic!() };
    assert!(obstacle.to_string().starts_with("it is not this lab's turn: lab a"), "{obstacle}");
    assert_eq!(obstacle.labs().len(), 2);
}

/// What to tell a claim that waits, and what hears it the first time.
fn told() -> (impl FnMut(&Obstacle) + Send, oneshot::Receiver<String>) {
    let (tell, told) = oneshot::channel();
    let mut tell = Some(tell);
    let note = move |obstacle: &Obstacle| {
        if let Some(tell) = tell.take() {
            tell.send(obstacle.to_string()).unwrap();
        }
    };
    (note, told)
}

struct Fixture {
    _base: tempfile::TempDir,
    ledger: Ledger,
}

impl Fixture {
    fn new() -> Self {
        let base = tempfile::tempdir().unwrap();
        let ledger = Ledger::at(&Utf8Path::from_path(base.path()).unwrap().join("ledger"));
        Self { _base: base, ledger }
    }

    async fn admit(&self, lab: &str, vcpus: u32, wait: Duration) -> Result<Ticket, LedgerError> {
        let policy = Policy { wait_max: wait, ..Policy::default() };
        self.ledger.admit(claim(lab, vcpus, 100), policy, || HOST, |_| ()).await
    }

    fn labs(&self) -> Vec<(String, bool)> {
        self.ledger.living().unwrap().into_iter().map(|entry| (entry.claim.lab, entry.admitted)).collect()
    }
}

#[tokio::test]
async fn a_ledger_nobody_made_is_empty_and_is_not_made_by_looking() {
    let fixture = Fixture::new();
    assert!(fixture.labs().is_empty());
    assert!(!fixture.ledger.root.exists());
}

#[tokio::test]
async fn a_claim_is_in_the_ledger_for_as_long_as_its_ticket() {
    let fixture = Fixture::new();
    let ticket = fixture.admit("a", 2, Duration::ZERO).await.unwrap();
    assert_eq!(ticket.claim().vcpus, 2);
    assert_eq!(fixture.labs(), [("a".to_owned(), true)]);
    drop(ticket);
    assert!(fixture.labs().is_empty());
}

#[tokio::test]
async fn of_two_claims_made_at_once_one_is_admitted() {
    for _ in 0..20 {
        let fixture = Fixture::new();
        let (a, b) = tokio::join!(fixture.admit("a", 3, Duration::ZERO), fixture.admit("b", 3, Duration::ZERO));
        assert_eq!(u8::from(a.is_ok()) + u8::from(b.is_ok()), 1, "{a:?} {b:?}");
        let error = a.as_ref().err().or(b.as_ref().err()).unwrap();
        assert!(matches!(error, LedgerError::InTheWay { .. }), "{error}");
        assert_eq!(fixture.labs().len(), 1, "who gave up has no claim");
    }
}

#[tokio::test]
async fn who_waits_is_told_what_for_and_goes_on_when_that_ends() {
    let fixture = Fixture::new();
    let first = fixture.admit("a", 4, Duration::ZERO).await.unwrap();
    let ledger = fixture.ledger.clone();
    let (note, waiting) = told();
    let second = tokio::spawn(async move { ledger.admit(claim("b", 4, 100), Policy::default(), || HOST, note).await });
    let obstacle = waiting.await.unwrap();
    assert!(obstacle.contains("taken by lab a"), "{obstacle}");
    assert_eq!(fixture.labs(), [("a".to_owned(), true), ("b".to_owned(), false)]);
    let began = Instant::now();
    drop(first);
    let second = second.await.unwrap().unwrap();
    assert!(began.elapsed() < Duration::from_secs(5), "woken by the lock, not by a clock");
    assert_eq!(fixture.labs(), [("b".to_owned(), true)]);
    drop(second);
}

#[tokio::test]
async fn a_queue_of_five_is_served_in_its_order() {
    let fixture = Fixture::new();
    let first = fixture.admit("first", 4, Duration::ZERO).await.unwrap();
    let order = Arc::new(Mutex::new(Vec::new()));
    let mut queue = Vec::new();
    for n in 0..5 {
        let (ledger, order) = (fixture.ledger.clone(), order.clone());
        let (note, waiting) = told();
        queue.push(tokio::spawn(async move {
            let ticket = ledger.admit(claim(&format!("q{n}"), 4, 100), Policy::default(), || HOST, note).await.unwrap();
            order.lock().unwrap().push(n);
            drop(ticket);
        }));
        waiting.await.unwrap();
    }
    drop(first);
    for waiter in queue {
        tokio::time::timeout(Duration::from_secs(30), waiter).await.unwrap().unwrap();
    }
    assert_eq!(*order.lock().unwrap(), [0, 1, 2, 3, 4]);
    assert!(fixture.labs().is_empty());
}

#[tokio::test]
async fn a_wait_that_is_cancelled_leaves_no_claim_and_holds_up_nobody() {
    let fixture = Fixture::new();
    let _first = fixture.admit("a", 3, Duration::ZERO).await.unwrap();
    {
        let (note, waiting) = told();
        let admit = fixture.ledger.admit(claim("b", 4, 100), Policy::default(), || HOST, note);
        tokio::select! {
            _ = admit => panic!("there is no room"),
            told = waiting => assert!(told.is_ok()),
        }
    }
    assert_eq!(fixture.labs(), [("a".to_owned(), true)]);
    fixture.admit("c", 1, Duration::ZERO).await.unwrap();
}

#[tokio::test]
async fn memory_is_asked_for_anew_at_every_look() {
    let fixture = Fixture::new();
    let first = fixture.admit("a", 4, Duration::ZERO).await.unwrap();
    let available = Arc::new(AtomicU64::new(10_000));
    let (seen, ledger) = (available.clone(), fixture.ledger.clone());
    let (note, waiting) = told();
    let second = tokio::spawn(async move {
        let host = move || Host { memory_available_mib: seen.load(Ordering::SeqCst), ..HOST };
        ledger.admit(claim("b", 4, 5_000), Policy::default(), host, note).await
    });
    waiting.await.unwrap();
    available.store(1_000, Ordering::SeqCst);
    drop(first);
    let error = second.await.unwrap().unwrap_err();
    assert!(matches!(error, LedgerError::Refused(_)), "{error}");
    assert!(fixture.labs().is_empty());
}

/// The claim of a process that was killed: its file is there, its lock is not.
#[tokio::test]
async fn the_claim_of_a_dead_owner_is_void_and_removed() {
    let fixture = Fixture::new();
    drop(fixture.admit("a", 1, Duration::ZERO).await.unwrap());
    let left = fixture.ledger.own.join("0000000007-dead");
    std::fs::write(&left, serde_json::to_string(&entry("dead", 400, 100, true)).unwrap()).unwrap();
    fixture.admit("b", 4, Duration::ZERO).await.unwrap();
    assert!(!left.exists());
}

/// Who can read a claim can lock it as readers can.
#[tokio::test]
async fn no_reader_keeps_a_dead_claim_alive() {
    let fixture = Fixture::new();
    drop(fixture.admit("a", 1, Duration::ZERO).await.unwrap());
    let left = fixture.ledger.own.join("0000000007-dead");
    let mut dead = entry("dead", 4, 100, true);
    dead.pid = std::process::id();
    std::fs::write(&left, serde_json::to_string(&dead).unwrap()).unwrap();
    let reader = std::fs::File::open(&left).unwrap();
    reader.lock().unwrap();
    assert!(elsewhere(&fixture).living().unwrap().is_empty(), "to other users");
    fixture.admit("b", 4, Duration::ZERO).await.unwrap();
    assert!(!left.exists());
}

/// The owner of the folder above may put another of this user's folders in the place of the ledger's.
#[tokio::test]
async fn nothing_but_a_claim_is_ever_removed() {
    let fixture = Fixture::new();
    drop(fixture.admit("a", 1, Duration::ZERO).await.unwrap());
    let keep = [
        ("2024-report", &b"figures of the year"[..]),
        ("2025-photo", &[0xff, 0xd8, 0xff, 0xe0]),
        ("2026-report.pdf", b""),
        ("0000000008-other", serde_json::to_vec(&entry("dead", 1, 100, true)).unwrap().leak()),
    ];
    for (name, bytes) in keep {
        std::fs::write(fixture.ledger.own.join(name), bytes).unwrap();
    }
    fixture.admit("b", 1, Duration::ZERO).await.unwrap();
    for (name, _) in keep {
        assert!(fixture.ledger.own.join(name).exists(), "{name} is gone");
    }
}

#[tokio::test]
async fn a_number_that_another_user_has_run_up_is_not_gone_on_from() {
    let fixture = Fixture::new();
    let _theirs = fixture.admit("theirs", 1, Duration::ZERO).await.unwrap();
    let run_up = fixture.ledger.own.join(format!("{}-high", 1_u64 << 48));
    let file = std::fs::File::create(&run_up).unwrap();
    let mut high = entry("high", 1, 100, true);
    high.pid = std::process::id();
    std::fs::write(&run_up, serde_json::to_string(&high).unwrap()).unwrap();
    let _held = lock::Held::take(file).unwrap();
    let mine = elsewhere(&fixture).admit(claim("mine", 1, 100), Policy::default(), || HOST, |_| ()).await.unwrap();
    assert_eq!(mine.number(), 2);
}

/// Kills a process that holds a claim while another waits for it.
#[tokio::test]
async fn the_death_of_an_owner_wakes_who_waits() {
    let fixture = Fixture::new();
    std::fs::create_dir_all(&fixture.ledger.own).unwrap();
    let file = fixture.ledger.own.join("0000000001-other");
    std::fs::write(&file, serde_json::to_string(&entry("other", 4, 100, true)).unwrap()).unwrap();
    // A lock belongs to the open file, which is the child's alone as soon as that is started.
    let locked = std::fs::File::options().write(true).open(&file).unwrap();
    lock::lock(&locked).unwrap();
    let mut owner = std::process::Command::new("sleep").arg("600").stdin(locked).spawn().unwrap();
    let (note, waiting) = told();
    let ledger = fixture.ledger.clone();
    let waiter = tokio::spawn(async move { ledger.admit(claim("b", 4, 100), Policy::default(), || HOST, note).await });
    waiting.await.unwrap();
    owner.kill().unwrap();
    owner.wait().unwrap();
    tokio::time::timeout(Duration::from_secs(10), waiter).await.unwrap().unwrap().unwrap();
    assert!(!file.exists());
}

#[tokio::test]
async fn a_ledger_that_stays_locked_holds_up_nobody_for_longer_than_its_deadline() {
    let fixture = Fixture::new();
    let book = book::Book::open(&fixture.ledger).unwrap();
    let error = fixture.ledger.living_within(Duration::from_millis(100)).await.unwrap_err();
    assert!(crate::error::chain_of(&error).join(": ").contains("another process keeps it locked"), "{error}");
    let given_up = tokio::time::timeout(Duration::from_millis(100), fixture.admit("a", 1, Duration::ZERO)).await;
    assert!(given_up.is_err());
    drop(book);
    // Whoever gave up claims nothing, even though its thread gets the lock after all.
    fixture.admit("b", 4, Policy::WAIT_MAX).await.unwrap();
}

#[tokio::test]
async fn who_gives_up_says_who_was_in_the_way() {
    let fixture = Fixture::new();
    let _first = fixture.admit("a", 4, Duration::ZERO).await.unwrap();
    let error = fixture.admit("b", 1, Duration::from_millis(200)).await.unwrap_err();
    let failure = error.to_failure();
    assert_eq!(failure.blame, crate::exit::Blame::Environment);
    assert!(failure.one_line().contains("lab a (simple, 4 vCPUs"), "{}", failure.one_line());
    assert_eq!(fixture.labs().len(), 1);
}

#[tokio::test]
async fn the_memory_of_a_living_lab_is_seen_by_its_children() {
    let fixture = Fixture::new();
    let _ticket = fixture.admit("a", 1, Duration::ZERO).await.unwrap();
    // 48 MiB held by a child of this process, which is who the claim belongs to.
    let mut child = std::process::Command::new("sh")
        .args(["-c", "x=$(head -c 50331648 /dev/zero | tr '\\0' a); echo ready; read end"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut ready = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(child.stdout.take().unwrap()), &mut ready).unwrap();
    let used = fixture.ledger.living().unwrap()[0].memory_used_mib.unwrap();
    drop(child.stdin.take());
    child.wait().unwrap();
    assert!(used >= 48, "{used}");
}

/// A ledger in which this user is another one: what is claimed there is foreign to [`Fixture::ledger`], and the other way
/// round it is not seen, as `self` is no user's number.
fn elsewhere(fixture: &Fixture) -> Ledger {
    Ledger { own: fixture.ledger.root.join("self"), ..fixture.ledger.clone() }
}

#[tokio::test]
async fn labs_of_another_user_count_and_are_waited_for() {
    let fixture = Fixture::new();
    let theirs = fixture.admit("theirs", 4, Duration::ZERO).await.unwrap();
    let mine = elsewhere(&fixture);
    let seen = mine.living().unwrap();
    assert!(!mine.own.exists(), "who only looks leaves nothing");
    assert_eq!(seen[0].user, Some(nix::unistd::geteuid().as_raw()));
    assert!(
        seen[0].to_string().starts_with(&format!("lab theirs of user {} (", nix::unistd::geteuid())),
        "{}",
        seen[0]
    );
    let (note, waiting) = told();
    let waiter = tokio::spawn({
        let mine = mine.clone();
        async move { mine.admit(claim("mine", 4, 100), Policy::default(), || HOST, note).await }
    });
    assert!(waiting.await.unwrap().contains("taken by lab theirs of user"));
    drop(theirs);
    let ticket = tokio::time::timeout(Duration::from_secs(10), waiter).await.unwrap().unwrap().unwrap();
    assert_eq!(ticket.number(), 2, "numbers count over all users");
}

#[tokio::test]
async fn what_another_user_cannot_mean_is_ignored() {
    use std::os::unix::fs::PermissionsExt as _;
    let fixture = Fixture::new();
    let _honest = fixture.admit("honest", 1, Duration::ZERO).await.unwrap();
    let good = serde_json::to_value(entry("other", 1, 100, true)).unwrap();
    let with = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut value = good.clone();
        value["pid"] = std::process::id().into();
        change(&mut value);
        value.to_string()
    };
    let mut locks = Vec::new();
    let mut claim = |name: &str, text: &str| {
        let path = fixture.ledger.own.join(name);
        std::fs::write(&path, text).unwrap();
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        locks.push(lock::Held::take(file).unwrap());
    };
    claim("0000000002-plain", &with(&|_| ()));
    claim("0000000003-greedy", &with(&|value| value["vcpus"] = 4_000_000.into()));
    claim("0000000004-greedy", &with(&|value| value["memory_mib"] = u64::MAX.into()));
    claim("0000000005-loud", &with(&|value| value["lab"] = "\u{1b}[2J".into()));
    claim("0000000006-broken", "{");
    claim(&format!("{}-last", u64::MAX), &with(&|_| ()));
    // Its process is somebody else's, as long as this is not root.
    if !nix::unistd::geteuid().is_root() {
        claim("0000000007-false", &with(&|value| value["pid"] = 1.into()));
    }
    std::os::unix::fs::symlink("/etc/passwd", fixture.ledger.own.join("0000000008-link")).unwrap();
    nix::unistd::mkfifo(fixture.ledger.own.join("0000000009-pipe").as_std_path(), nix::sys::stat::Mode::S_IRWXU)
        .unwrap();
    // A folder that is not of whom it names.
    let false_name = fixture.ledger.root.join("4294967294");
    std::fs::create_dir(&false_name).unwrap();
    std::fs::write(false_name.join("0000000001-x"), with(&|_| ())).unwrap();

    let mine = elsewhere(&fixture);
    let labs: Vec<String> = mine.living().unwrap().into_iter().map(|entry| entry.claim.lab).collect();
    assert_eq!(labs, ["honest", "other"]);
    let mode = |path: &Utf8Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!((mode(&mine.root), mode(&fixture.ledger.own)), (0o1777, 0o755));
}

#[tokio::test]
async fn who_keeps_the_common_lock_holds_up_nobody_for_long() {
    let fixture = Fixture::new();
    drop(fixture.admit("a", 1, Duration::ZERO).await.unwrap());
    let lock = std::fs::File::open(fixture.ledger.root.join("lock")).unwrap();
    lock.lock().unwrap();
    let began = Instant::now();
    fixture.admit("b", 1, Duration::ZERO).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
}

#[test]
fn a_folder_that_is_no_folder_is_an_error_that_names_the_way_out() {
    let base = tempfile::tempdir().unwrap();
    let base = Utf8Path::from_path(base.path()).unwrap();
    std::os::unix::fs::symlink("/tmp", base.join("ledger")).unwrap();
    let error = book::Book::open(&Ledger::at(&base.join("ledger"))).err().unwrap();
    let text = crate::error::chain_of(&error).join(": ");
    assert!(text.contains("it is no folder") && text.contains(LEDGER_ENV), "{text}");
}

/// What a process that was killed between two steps leaves must not keep others out for good.
#[test]
fn a_folder_has_its_mode_as_soon_as_it_has_its_name() {
    use std::os::unix::fs::PermissionsExt as _;
    let base = tempfile::tempdir().unwrap();
    let base = Utf8Path::from_path(base.path()).unwrap();
    for _ in 0..50 {
        let ledger = Ledger::at(&base.join("ledger"));
        std::thread::scope(|scope| {
            let watcher = scope.spawn(|| {
                let began = Instant::now();
                while began.elapsed() < Duration::from_secs(10) {
                    if let Ok(meta) = std::fs::metadata(&ledger.root) {
                        return meta.permissions().mode() & 0o7777;
                    }
                }
                panic!("no folder was made")
            });
            let makers = [(); 2].map(|()| scope.spawn(|| book::Book::open(&ledger).map(drop).unwrap()));
            makers.into_iter().for_each(|maker| maker.join().unwrap());
            assert_eq!(watcher.join().unwrap(), 0o1777);
        });
        let left: Vec<_> = base.read_dir_utf8().unwrap().map(|entry| entry.unwrap().into_path()).collect();
        assert_eq!(left, std::slice::from_ref(&ledger.root), "staged folders are left");
        std::fs::remove_dir_all(&ledger.root).unwrap();
    }
}
