//! Acceleration and calibration on this host.
use std::time::{Duration, Instant};

use kvm::{Accel, AccelChoice, Error, Supervisor, calibrate, resolve};

#[tokio::test]
async fn auto_always_settles_and_says_why() {
    let begin = Instant::now();
    let report = resolve(AccelChoice::Auto).await.unwrap();
    assert!(begin.elapsed() < Duration::from_secs(4));
    assert_eq!(report.accel == Accel::Kvm, report.kvm.usable);
    assert!(report.reason.contains(&report.kvm.reason), "{report:?}");
    println!("{report:#?} in {:?}", begin.elapsed());
    match resolve(AccelChoice::Kvm).await {
        Ok(forced) => assert!(forced.kvm.usable),
        Err(Error::KvmUnusable { probe }) => assert!(!probe.usable && !probe.reason.is_empty()),
        Err(other) => panic!("{other}"),
    }
}

#[tokio::test]
async fn calibration_runs_a_real_guest() {
    let supervisor = Supervisor::new().unwrap();
    let accel = resolve(AccelChoice::Auto).await.unwrap().accel;
    let begin = Instant::now();
    let measured = calibrate(accel, &supervisor).await.unwrap();
    println!("{measured:?} in {:?}", begin.elapsed());
    assert!(measured.measured && measured.slowdown >= 1.0);
    assert!((1e5..1e11).contains(&measured.iterations_per_s), "{measured:?}");
    assert!(begin.elapsed() < Duration::from_secs(8), "{:?}", begin.elapsed());
    assert!(supervisor.running().is_empty());
}
