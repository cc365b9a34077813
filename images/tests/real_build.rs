//! A whole build with the real tools. It installs packages, so it runs only when asked for:
//!
//! `IMAGES_STORE=/tmp/store IMAGES_K3S=/bin/busybox cargo test -p images --test real_build -- --ignored --nocapture`

use std::time::{Duration, Instant};

use camino::Utf8PathBuf;
use images::{K3sSource, Recipes, Store};

mod common;

#[tokio::test]
#[ignore = "installs packages from a Debian mirror; takes a minute"]
async fn the_shipped_recipe_builds_and_is_then_a_hit() {
    let temporary = tempfile::tempdir().unwrap();
    let dir =
        std::env::var("IMAGES_STORE").map_or_else(|_| temporary.path().to_str().unwrap().into(), Utf8PathBuf::from);
    let k3s = std::env::var("IMAGES_K3S").unwrap_or_else(|_| "/proc/self/exe".to_owned());
    let binary = K3sSource::File(k3s.into()).resolve().unwrap().guest_binary();
    let recipe = Recipes::default().load("debian-k3s").unwrap();
    let store = Store::open(&dir).unwrap();

    let start = Instant::now();
    let told = |event| println!("{:7.2} s {event:?}", start.elapsed().as_secs_f64());
    let image = store.ensure(&recipe, std::slice::from_ref(&binary), &common::Runner, &told).await.unwrap();
    println!("{image:#?}");
    assert!(image.root.is_file() && image.kernel.is_file() && image.initrd.is_file());

    let again = Instant::now();
    let hit = store.ensure(&recipe, &[binary], &common::Runner, &told).await.unwrap();
    assert_eq!(hit.id, image.id);
    assert!(again.elapsed() < Duration::from_millis(500), "{:?}", again.elapsed());
    println!("hit after {:?}", again.elapsed());
    for found in store.verify().await.unwrap() {
        assert!(found.faults.is_empty(), "{found:?}");
    }
}
