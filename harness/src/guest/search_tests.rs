//! The search for a guest that is coming up.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::testing::{Door, Sshd};
use super::tests::{LONG, eventually, shorter_than};
use super::*;

/// A search that is told what is seen of the guest.
fn searching(sshd: &Sshd, patience: f64) -> (Arc<Sightings>, tokio::task::JoinHandle<Result<Guest, GuestError>>) {
    let target = SshTarget { patience, ..sshd.target() };
    let seen = Arc::new(Sightings::default());
    let told = Arc::clone(&seen);
    (seen, tokio::spawn(async move { Guest::connect_seen(target, LONG, &told).await }))
}

#[tokio::test]
async fn a_guest_that_refuses_at_first_is_found_soon_after_it_listens() {
    let sshd = Sshd::start_with(generate_ed25519("h").unwrap(), Door::Refusing);
    let connecting = tokio::spawn(Guest::connect(sshd.target(), LONG));
    tokio::time::sleep(Duration::from_millis(700)).await;
    assert!(sshd.accepted() >= 5, "a refusal is an event, {} attempts", sshd.accepted());
    sshd.set(Door::Open);
    let opened = Instant::now();
    connecting.await.unwrap().unwrap();
    shorter_than(opened, 10_000, "finding the guest");
}

#[tokio::test]
async fn a_guest_that_is_silent_at_first_is_found_without_a_storm() {
    let sshd = Sshd::start_with(generate_ed25519("h").unwrap(), Door::Silent);
    let connecting = tokio::spawn(Guest::connect(sshd.target(), LONG));
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    assert!(sshd.accepted() <= 5, "{} attempts", sshd.accepted());
    sshd.set(Door::Open);
    let opened = Instant::now();
    connecting.await.unwrap().unwrap();
    shorter_than(opened, 10_000, "finding the guest");
}

#[tokio::test]
async fn a_guest_that_is_watched_is_left_alone_until_its_network_is_up() {
    let sshd = Sshd::start_with(generate_ed25519("h").unwrap(), Door::Open);
    let (seen, connecting) = searching(&sshd, 4.0);
    tokio::time::sleep(Duration::from_millis(700)).await;
    assert_eq!(sshd.accepted(), 0, "each would have cost the guest a process");
    let told = Instant::now();
    seen.up();
    connecting.await.unwrap().unwrap();
    // A minute passes before a guest is looked for that nobody sees.
    shorter_than(told, 10_000, "a connection to a guest that is up");
}

#[tokio::test]
async fn a_guest_that_cannot_be_watched_is_looked_for_at_once() {
    let sshd = Sshd::start_with(generate_ed25519("h").unwrap(), Door::Open);
    let (seen, connecting) = searching(&sshd, 4.0);
    let told = Instant::now();
    seen.look();
    connecting.await.unwrap().unwrap();
    shorter_than(told, 10_000, "a connection to a guest nobody sees");
}

/// Time passes by itself where nothing else happens: no second is waited for here.
#[tokio::test(start_paused = true)]
async fn a_guest_whose_network_is_never_seen_is_looked_for_all_the_same() {
    let sshd = Sshd::start_with(generate_ed25519("h").unwrap(), Door::Silent);
    let began = tokio::time::Instant::now();
    let (_seen, connecting) = searching(&sshd, 1.0);
    eventually("a connection", || sshd.accepted() >= 1).await;
    assert!(began.elapsed() >= Duration::from_secs(15), "{:?}", began.elapsed());
    connecting.abort();
}

#[tokio::test]
async fn once_it_is_up_connections_follow_closely() {
    let sshd = Sshd::start_with(generate_ed25519("h").unwrap(), Door::Silent);
    // Attempts 1.6 s apart, where nothing is seen.
    let (seen, connecting) = searching(&sshd, 4.0);
    seen.up();
    // The address behind the port is there only after the first connection.
    eventually("the first attempt", || sshd.accepted() >= 1).await;
    let first = Instant::now();
    eventually("the fourth attempt", || sshd.accepted() >= 4).await;
    shorter_than(first, 2_500, "three attempts that follow closely");
    sshd.set(Door::Open);
    connecting.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_guest_that_never_answers_is_unreachable_at_the_deadline() {
    for door in [Door::Silent, Door::Refusing] {
        let sshd = Sshd::start_with(generate_ed25519("h").unwrap(), door);
        let started = Instant::now();
        let error = Guest::connect(sshd.target(), Duration::from_millis(600)).await.unwrap_err();
        assert!(matches!(&error, GuestError::Unreachable { attempts, .. } if *attempts >= 1), "{error}");
        assert!(started.elapsed() >= Duration::from_millis(600));
        shorter_than(started, 1_500, "giving up");
        let error = Guest::connect_once(sshd.target(), Duration::from_millis(200)).await.unwrap_err();
        assert!(matches!(error, GuestError::Unreachable { attempts: 1, .. }), "{error}");
    }
}

#[tokio::test]
async fn a_guest_seen_to_take_a_connection_is_given_time_and_no_other() {
    let sshd = Sshd::start_with(generate_ed25519("h").unwrap(), Door::Silent);
    let (seen, connecting) = searching(&sshd, sshd.target().patience);
    seen.up();
    eventually("connections that follow closely", || sshd.accepted() >= 3).await;
    seen.taken();
    // What was on its way arrives; ten more would follow in the time that is looked at.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let accepted = sshd.accepted();
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    assert_eq!(sshd.accepted(), accepted, "a starved guest was given more to do");
    connecting.abort();
}
