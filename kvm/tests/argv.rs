//! The QEMU command line, pinned.
use kvm::{Accel, DiskFormat, DiskSpec, Mac, NicBackend, NicSpec, SpecError, VmSpec, argv};

fn spec(accel: Accel) -> VmSpec {
    let vde = |id: &str, dir: &str, port| NicSpec {
        id: id.into(),
        mac: Mac::derive("lab", "server-1", id),
        backend: NicBackend::Vde { socket_dir: dir.into(), port },
        unplugged: false,
    };
    VmSpec {
        name: "server-1".into(),
        accel,
        vcpus: 2,
        memory_mib: 2048,
        kernel: "/store/vmlinuz".into(),
        initrd: "/store/initrd.img".into(),
        cmdline: "console=ttyS0 quiet".into(),
        disks: vec![
            DiskSpec {
                path: "/run/lab/server-1.qcow2".into(),
                format: DiskFormat::Qcow2,
                read_only: false,
                serial: "root".into(),
            },
            DiskSpec {
                path: "/run/lab/server-1.seed".into(),
                format: DiskFormat::Raw,
                read_only: true,
                serial: "seed".into(),
            },
        ],
        nics: vec![
            NicSpec {
                id: "eth0".into(),
                mac: Mac::derive("lab", "server-1", "eth0"),
                backend: NicBackend::User { ssh_forward: true },
                unplugged: false,
            },
            vde("eth1", "/run/lab/sw-a", 1),
            vde("eth2", "/run/lab/sw-b", 1),
        ],
        console_log: "/run/lab/server-1.console".into(),
        qmp_socket: "/run/lab/server-1.qmp".into(),
        stderr_log: "/run/lab/server-1.stderr".into(),
    }
}

/// One option and its value a line, for people.
fn lines(spec: &VmSpec) -> String {
    let mut text = String::new();
    for word in argv(spec) {
        let separator = if word.starts_with('-') && !text.is_empty() {
            "\n"
        } else if text.is_empty() {
            ""
        } else {
            " "
        };
        text.push_str(separator);
        text.push_str(&word);
    }
    text
}

#[test]
fn under_tcg() {
    insta::assert_snapshot!(lines(&spec(Accel::Tcg)));
}

#[test]
fn under_kvm() {
    insta::assert_snapshot!(lines(&spec(Accel::Kvm)));
}

#[test]
fn commas_in_values_do_not_end_them() {
    let mut odd = spec(Accel::Tcg);
    odd.name = "a,b".into();
    odd.cmdline = "isolcpus=1,2".into();
    odd.disks[0].path = "/run/a,id=x/root,1.qcow2".into();
    odd.nics.truncate(2);
    odd.nics[0].backend = NicBackend::User { ssh_forward: false };
    odd.nics[1].backend = NicBackend::Vde { socket_dir: "/run/a,b".into(), port: 12 };
    odd.console_log = "/run/a,b/console".into();
    odd.qmp_socket = "/run/a,b/qmp".into();
    insta::assert_snapshot!(lines(&odd));
}

#[test]
fn specs_that_cannot_work_are_refused() {
    let refused = |change: &dyn Fn(&mut VmSpec)| {
        let mut bad = spec(Accel::Tcg);
        change(&mut bad);
        bad.validate().unwrap_err()
    };
    spec(Accel::Tcg).validate().unwrap();
    assert!(matches!(refused(&|s| s.vcpus = 0), SpecError::OutOfRange { field: "vcpus", .. }));
    assert!(matches!(refused(&|s| s.memory_mib = 1), SpecError::OutOfRange { field: "memory_mib", .. }));
    assert!(matches!(refused(&|s| s.name = String::new()), SpecError::BadName { .. }));
    assert!(matches!(refused(&|s| s.disks[0].serial = "x".repeat(21)), SpecError::BadName { .. }));
    assert!(matches!(refused(&|s| s.disks[0].serial = "a,b".into()), SpecError::BadName { .. }));
    assert!(matches!(refused(&|s| s.disks[1].serial = "root".into()), SpecError::Duplicate { .. }));
    assert!(matches!(refused(&|s| s.nics[1].id = "eth0".into()), SpecError::Duplicate { .. }));
    assert!(matches!(refused(&|s| s.nics[1].id = "1,x".into()), SpecError::BadName { .. }));
    assert!(matches!(refused(&|s| s.nics[1].mac = s.nics[0].mac), SpecError::Duplicate { field: "MAC address", .. }));
    let long = format!("/{}", "q".repeat(107));
    let error = refused(&|s| s.qmp_socket = long.clone().into());
    assert!(error.to_string().starts_with("socket path is 108 bytes, at most 107 fit: /q"), "{error}");
}

#[test]
fn a_spec_survives_json() {
    let spec = spec(Accel::Kvm);
    let json = serde_json::to_string(&spec).unwrap();
    assert_eq!(serde_json::from_str::<VmSpec>(&json).unwrap(), spec);
    assert!(json.contains(r#""backend":{"vde":{"socket_dir":"/run/lab/sw-a","port":1}}"#), "{json}");
}
