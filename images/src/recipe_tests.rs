use super::*;

fn folder(files: &[(&str, &str)]) -> (tempfile::TempDir, Recipes) {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    let path = Utf8PathBuf::from_path_buf(dir.path().to_owned()).unwrap();
    (dir, Recipes::new(Some(path)))
}

fn load_one(text: &str) -> Result<Recipe, RecipeError> {
    let (_dir, recipes) = folder(&[("r.yaml", text)]);
    recipes.load("r")
}

fn error_of(text: &str) -> String {
    load_one(text).unwrap_err().to_string()
}

#[test]
fn the_shipped_recipe_holds_to_the_guest_contract() {
    let recipe = Recipes::default().load("debian-k3s").unwrap();
    assert_eq!(recipe.binaries["k3s"], crate::guest::K3S_PATH);
    for (unit, env, command) in [
        (crate::guest::SERVER_UNIT, crate::guest::SERVER_ENV_PATH, "server"),
        (crate::guest::AGENT_UNIT, crate::guest::AGENT_ENV_PATH, "agent"),
    ] {
        let text = String::from_utf8(recipe.files[&format!("/etc/systemd/system/{unit}")].content.clone()).unwrap();
        for line in [
            "Type=notify",
            "Delegate=yes",
            "KillMode=process",
            "Restart=on-failure",
            "RestartSec=5",
            "TimeoutStartSec=0",
            "LimitNOFILE=1048576",
            &format!("EnvironmentFile=-{env}"),
            &format!("ExecStart=/usr/local/bin/k3s {command} $K3S_ARGS"),
        ] {
            assert!(text.lines().any(|found| found == line), "{unit} lacks {line}:\n{text}");
        }
        assert!(!recipe.units.enable.contains(unit));
    }
    for masked in ["etcd.service", "networking.service", "systemd-networkd-wait-online.service"] {
        assert!(recipe.units.mask.contains(masked), "{masked}");
    }
    assert!(!recipe.files.keys().any(|path| path.starts_with("/etc/ssh/ssh_host_")));
}

#[test]
fn a_recipe_extends_another_and_has_the_last_word() {
    let (_dir, recipes) = folder(&[
        (
            "mine.yaml",
            "name: mine\nextends: base\npackages: [nano]\nfiles:\n  - path: /etc/motd\n    source: motd.txt\n    mode: \"0600\"\n\
             units:\n  enable: [b.service]\n  mask: [a.service]\nbinaries:\n  k3s: /opt/k3s\n",
        ),
        ("motd.txt", "mine\n"),
        (
            "base.yaml",
            "name: base\nsuite: bookworm\ndisk_mib: 2048\npackages: [curl]\nfiles:\n  - path: /etc/motd\n    content: base\n\
             \x20 - path: /etc/x\n    content: x\nunits:\n  enable: [a.service]\n  mask: [b.service, c.service]\n",
        ),
    ]);
    let recipe = recipes.load("mine").unwrap();
    assert_eq!((recipe.name.as_str(), recipe.suite.as_str(), recipe.disk_mib), ("mine", "bookworm", 2048));
    assert_eq!(recipe.packages.iter().cloned().collect::<Vec<_>>(), ["curl", "nano"]);
    assert_eq!(recipe.files["/etc/motd"], RecipeFile { mode: 0o600, content: b"mine\n".to_vec() });
    assert_eq!(recipe.files["/etc/x"].mode, 0o644);
    assert_eq!(recipe.units.enable.iter().cloned().collect::<Vec<_>>(), ["b.service"]);
    assert_eq!(recipe.units.mask.iter().cloned().collect::<Vec<_>>(), ["a.service", "c.service"]);
    assert_eq!(recipe.binaries["k3s"], "/opt/k3s");
    assert_eq!(recipes.names(), ["base", "debian-k3s", "mine"]);
}

#[test]
fn a_recipe_can_extend_a_shipped_one_and_be_named_by_its_path() {
    let (dir, _) = folder(&[("mine.yaml", "name: mine\nextends: debian-k3s\npackages: [nano]\n")]);
    let path = dir.path().join("mine.yaml");
    let recipe = Recipes::default().load(path.to_str().unwrap()).unwrap();
    assert!(recipe.packages.contains("nano") && recipe.packages.contains("openssh-server"));
}

#[test]
fn a_file_wins_over_what_is_shipped() {
    let (_dir, recipes) = folder(&[("debian-k3s.yaml", "name: debian-k3s\nsuite: trixie\n")]);
    assert_eq!(recipes.load("debian-k3s").unwrap().suite, "trixie");
}

#[test]
fn circles_are_found_whatever_way_round() {
    let (_dir, recipes) = folder(&[
        ("a.yaml", "name: a\nextends: b\n"),
        ("b.yaml", "name: b\nextends: ./a.yaml\n"),
        ("self.yaml", "name: self\nextends: self\n"),
    ]);
    for name in ["a", "self"] {
        let error = recipes.load(name).unwrap_err();
        assert!(matches!(error, RecipeError::Cycle { .. }), "{error}");
    }
    let chain: Vec<(String, String)> =
        (0..12).map(|n| (format!("c{n}.yaml"), format!("name: c{n}\nextends: c{}\n", n + 1))).collect();
    let chain: Vec<(&str, &str)> = chain.iter().map(|(name, text)| (name.as_str(), text.as_str())).collect();
    let (_dir, recipes) = folder(&chain);
    assert!(matches!(recipes.load("c0").unwrap_err(), RecipeError::TooDeep { .. }));
}

#[test]
fn what_is_missing_is_named() {
    let (_dir, recipes) = folder(&[("r.yaml", "name: r\nextends: nowhere\n"), ("s.yaml", "name: s\n")]);
    let error = recipes.load("r").unwrap_err().to_string();
    assert!(error.contains("\"nowhere\"") && error.contains("debian-k3s"), "{error}");
    assert!(matches!(recipes.load("s").unwrap_err(), RecipeError::NoSuite { .. }));
    let error = recipes.load("/nonexistent/r.yaml").unwrap_err().to_string();
    assert!(error.contains("could not read /nonexistent/r.yaml"), "{error}");
}

#[test]
fn faults_have_their_place_in_the_file() {
    for (text, place, said) in [
        ("name: r\nsuit: bookworm\n", "r.yaml:2:", "suit"),
        ("name: r\nsuite: bookworm\npackages: [curl, --bad]\n", "r.yaml:3:", "--bad"),
        ("name: r\nsuite: bookworm\npackages: [\"a,b\"]\n", "r.yaml:3:", "a,b"),
        ("name: r\nsuite: bookworm\ndisk_mib: 5\n", "r.yaml:3:", "5 MiB"),
        ("name: r\nsuite: bookworm\nunits:\n  enable: [ssh]\n", "r.yaml:4:", "suffix"),
        ("name: r\nsuite: b\nunits:\n  enable: [a.service]\n  mask: [a.service]\n", "r.yaml:4:", "enabled and masked"),
        ("name: r\nsuite: b\nfiles:\n  - path: /a/../b\n    content: x\n", "r.yaml:4:", ".."),
        ("name: r\nsuite: b\nfiles:\n  - path: /a\n", "r.yaml:4:", "neither"),
        ("name: r\nsuite: b\nfiles:\n  - path: /a\n    content: x\n    mode: \"999\"\n", "r.yaml:6:", "999"),
        ("name: r\nsuite: b\nbinaries:\n  k3s: bin/k3s\n", "r.yaml:4:", "bin/k3s"),
        ("name: ../r\nsuite: b\n", "r.yaml:1:", "../r"),
        ("name: r\nsuite: b\nexclude: [usr]\n", "r.yaml:3:", "usr"),
        (
            "name: r\nsuite: b\nfiles:\n  - path: /a\n    content: x\n  - path: /a\n    content: y\n",
            "r.yaml:6:",
            "twice",
        ),
    ] {
        let error = error_of(text);
        assert!(error.contains(place) && error.contains(said), "{text}\n{error}");
    }
}

#[test]
fn binaries_are_paired_with_their_places() {
    let recipe = load_one("name: r\nsuite: bookworm\nbinaries:\n  k3s: /usr/local/bin/k3s\n").unwrap();
    let binary = |name: &str| GuestBinary {
        name: name.to_owned(),
        path: "/x".into(),
        sha256: String::new(),
        label: String::new(),
        extra_packages: Vec::new(),
        files: Vec::new(),
    };
    let k3s = [binary("k3s")];
    assert_eq!(recipe.place(&k3s).unwrap()[0].0, "/usr/local/bin/k3s");
    assert!(matches!(recipe.place(&[]), Err(RecipeError::BinaryMissing { .. })));
    assert!(matches!(recipe.place(&[binary("k3s"), binary("etcd")]), Err(RecipeError::BinaryUnknown { .. })));
}
