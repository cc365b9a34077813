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
    shorter_than(opened, 1_500, "finding the guest");
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
    shorter_than(opened, 1_500, "finding the guest");
}

#[tokio::test]
async fn a_hint_makes_it_look_at_once() {
    let sshd = Sshd::start_with(generate_ed25519("h").unwrap(), Door::Silent);
    // Attempts 1.6 s apart.
    let (hint, connecting) = searching(&sshd, 4.0);
    eventually("the first attempt", || sshd.accepted() == 1).await;
    sshd.set(Door::Open);
    let hinted = Instant::now();
    hint.coming();
    connecting.await.unwrap().unwrap();
    shorter_than(hinted, 1_000, "a hinted connection");
}

#[tokio::test]
async fn after_a_hint_connections_follow_closely() {
    let sshd = Sshd::start_with(generate_ed25519("h").unwrap(), Door::Silent);
    // Attempts 1.6 s apart.
    let (hint, connecting) = searching(&sshd, 4.0);
    eventually("the first attempt", || sshd.accepted() == 1).await;
    hint.coming();
    // The network behind the port is up only after the connection made at the hint.
    eventually("the hinted attempt", || sshd.accepted() >= 2).await;
    sshd.set(Door::Open);
    let open = Instant::now();
    connecting.await.unwrap().unwrap();
    shorter_than(open, 1_000, "a connection closely after the hint");
}

#[tokio::test]
async fn a_guest_that_never_answers_is_unreachable_at_the_deadline() {
    for door in [Door::Silent, Door::Refusing] {
        let sshd = Sshd::start_with(generate_ed25519("h").unwrap(), door);
        let started = Instant::now();
        let error = Guest::connect(sshd.target(), Duration::from_millis(600)).await.unwrap_err();
        assert!(matches!(&error, GuestError::Unreachable { attempts, .. } if *attempts >= 1), "{error}");
        assert!(started.elapsed() >= Duration::from_millis(600));
        shorter_than(started, 800, "giving up");
        let error = Guest::connect_once(sshd.target(), Duration::from_millis(200)).await.unwrap_err();
        assert!(matches!(error, GuestError::Unreachable { attempts: 1, .. }), "{error}");
    }
}

#[tokio::test]
async fn a_guest_seen_to_take_a_connection_is_given_time_and_no_other() {
    let sshd = Sshd::start_with(generate_ed25519("h").unwrap(), Door::Silent);
    let (seen, connecting) = searching(&sshd, sshd.target().patience);
    seen.coming();
    eventually("connections that follow closely", || sshd.accepted() >= 3).await;
    seen.taken();
    // What was on its way arrives; ten more would follow in the time that is looked at.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let accepted = sshd.accepted();
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    assert_eq!(sshd.accepted(), accepted, "a starved guest was given more to do");
    connecting.abort();
}
