//! The house rules that a test can hold: what the pages name exists, and who links whom.

use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Words in backquotes, in order.
fn quoted(text: &str) -> Vec<&str> {
    text.split('`').skip(1).step_by(2).collect()
}

#[test]
fn every_file_and_name_of_the_flows_exists() {
    let mut checked = 0;
    for entry in std::fs::read_dir(root().join("docs/flows")).unwrap() {
        let page = entry.unwrap().path();
        let mut source: Option<(String, String)> = None;
        for word in quoted(&read(&page)) {
            if word.ends_with(".rs") {
                source = Some((word.to_owned(), read(&root().join(word))));
            } else if let Some((file, text)) = &source {
                let defined = ["fn ", "struct ", "enum ", "trait "]
                    .iter()
                    .any(|kind| text.contains(&format!("{kind}{word}")));
                assert!(defined, "{}: {word} is not in {file}", page.display());
            }
            checked += 1;
        }
    }
    assert!(checked > 30, "only {checked} names were found");
}

#[test]
fn edgecore_links_no_kubernetes_client() {
    let tree = Command::new(env!("CARGO"))
        .args([
            "tree",
            "--package",
            "edgecore",
            "--edges",
            "normal",
            "--prefix",
            "none",
            "--offline",
        ])
        .current_dir(root())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&tree.stdout);
    assert!(
        text.contains("k8s-openapi"),
        "cargo tree failed: {}",
        String::from_utf8_lossy(&tree.stderr)
    );
    for client in ["kube v", "kube-client v", "kube-runtime v"] {
        assert!(!text.contains(client), "edgecore links {client}");
    }
}

#[test]
fn files_that_decide_read_no_clock_and_do_no_input_or_output() {
    for file in [
        "common/src/hub/session/edge.rs",
        "common/src/hub/session/cloud.rs",
        "common/src/hub/delta.rs",
        "cloudcore/src/downstream/index.rs",
        "edgecore/src/pods/plan.rs",
        "edgecore/src/pods/status.rs",
        "edgecore/src/pods/restart.rs",
        "edgecore/src/stream/logs/entry.rs",
        "edgecore/src/stream/metrics.rs",
        "edgecore/src/stream/stats/rates.rs",
        "edgecore/src/stream/stats/summary.rs",
    ] {
        let text = read(&root().join(file));
        let code = text.split("#[cfg(test)]").next().unwrap_or_default();
        for word in [
            "std::fs",
            // An address is a value; these go to the network.
            "TcpStream",
            "TcpListener",
            "UdpSocket",
            "ToSocketAddrs",
            "tokio::",
            "SystemTime",
            "Instant::now",
            "Timestamp::now",
        ] {
            assert!(!code.contains(word), "{file} uses {word}");
        }
    }
}

#[test]
fn the_top_level_is_the_agreed_one() {
    let agreed = [
        "Cargo.lock",
        "Cargo.toml",
        "LICENSE",
        "README.md",
        "cloudcore",
        "common",
        "deploy",
        "device-mappers",
        "docs",
        "edgecore",
        "target",
        "tests",
    ];
    for entry in std::fs::read_dir(root()).unwrap() {
        let name = entry.unwrap().file_name().to_string_lossy().into_owned();
        assert!(
            name.starts_with('.') || agreed.contains(&name.as_str()),
            "{name} is not agreed"
        );
    }
}
