//! The command lines: what a wrong word is answered with, before anything is done.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use testbed::bed::testbed_program;
use testbed::cloud::product;

use crate::world;

/// A token with every field, of a cloud that is not there.
const TOKEN: &str = "edge1.Cgh1N3A5dmg5ehIgiPbvCXut70i7sWYAsYofx6WI2aMRn_AVyKRe_8o2tRYaIHi_n2KHvAD--2RLaOeOCEX0DcerYIGvr8seEEbPUNinIg8KCjE5OC4xOC4yLjEQkE4qDGJ2ZGV6ZXEwZG14eQ";

#[test]
fn an_unknown_or_mistyped_key_is_refused_with_its_path_and_the_nearest_name() -> Result<()> {
    let dir = tempfile::tempdir()?;
    for (program, words, text, expected) in [
        ("edgecore", &[][..], "nmae: edge-1\n", &["nmae", "name"][..]),
        (
            "edgecore",
            &[],
            "dataDri: /tmp/x\n",
            &["dataDri", "dataDir"],
        ),
        (
            "edgecore",
            &[],
            "deadAfterSeconds: soon\n",
            &["deadAfterSeconds"],
        ),
        (
            "edgecore",
            &[],
            "transport: pigeon\n",
            &["pigeon", "websocket"],
        ),
        ("edgecore", &[], "log: inof\n", &["inof", "level"]),
        ("cloudcore", &["run"], "log: inof\n", &["inof", "level"]),
        (
            "cloudcore",
            &["run"],
            "lisen: 0.0.0.0:1\n",
            &["lisen", "listen"],
        ),
        (
            "cloudcore",
            &["run"],
            "deadAfter: soon\n",
            &["deadAfter", "soon"],
        ),
        ("cloudcore", &["run"], "listen: 5\n", &["listen"]),
    ] {
        let file = dir.path().join("settings.yaml");
        fs::write(&file, text)?;
        let path = file.to_str().context("path of the file")?;
        let said = run(program, &[words, &["--config", path]].concat(), dir.path())?;
        let line = one_line(&said)?;
        ensure!(!said.status.success(), "{text}");
        for word in expected {
            ensure!(line.contains(word), "{program} {text}: {line}");
        }
        // A flag may say these too.
        let by_file = !text.contains("pigeon") && !text.contains("inof");
        ensure!(line.contains(path) || !by_file, "{line}");
    }
    Ok(())
}

#[test]
fn each_local_refusal_of_edgecore_is_one_line_and_has_its_exit_code() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("a-file");
    fs::write(&file, "")?;
    let file = file.to_str().context("path of the file")?;
    let free = "127.0.0.1:1";
    for (words, code, word) in [
        (&[][..], 2, "--join HOST:PORT --token TOKEN"),
        (&["--join", free], 2, "--token"),
        (&["--cri", "tcp://x"], 3, "unix://"),
        (&["--transport", "pigeon"], 3, "websocket"),
        (&["--config", "/not/there.yaml"], 3, "/not/there.yaml"),
        (&["--join", "host", "--token", TOKEN], 3, "HOST:PORT"),
        (
            &["--join", free, "--token", TOKEN, "--name", "Not_A_Name"],
            3,
            "Not_A_Name",
        ),
        (&["--join", free, "--token", "nonsense"], 4, "edge1."),
        (&["--join", free, "--token", "edge1.AAAA"], 4, "token"),
        (&["--data-dir", file], 5, file),
        (&["status", "--admin", "/not/there"], 1, "is it running?"),
    ] {
        let said = run("edgecore", words, dir.path())?;
        let line = one_line(&said)?;
        ensure!(
            said.status.code() == Some(code),
            "{words:?} ended with {}: {line}",
            said.status
        );
        ensure!(line.contains(word), "{words:?}: {line}");
        ensure!(!line.contains(TOKEN), "the token is shown: {line}");
    }
    Ok(())
}

#[test]
fn the_names_that_scripts_call_are_there() -> Result<()> {
    let dir = tempfile::tempdir()?;
    for (program, words, flags) in [
        (
            "cloudcore",
            &["--help"][..],
            &[
                "--config",
                "--kubeconfig",
                "--listen",
                "--advertise",
                "--admin",
            ][..],
        ),
        ("cloudcore", &["run", "--help"], &["--config", "--listen"]),
        ("cloudcore", &["install", "--help"], &["--kubeconfig"]),
        ("cloudcore", &["node", "list", "--help"], &["--kubeconfig"]),
        (
            "cloudcore",
            &["node", "revoke", "--help"],
            &["--kubeconfig", "NAME"],
        ),
        (
            "cloudcore",
            &["token", "create", "--help"],
            &[
                "--kubeconfig",
                "--ttl",
                "--uses",
                "--node",
                "--labels",
                "--taints",
            ],
        ),
        ("cloudcore", &["token", "list", "--help"], &["--kubeconfig"]),
        (
            "cloudcore",
            &["token", "revoke", "--help"],
            &["--kubeconfig"],
        ),
        (
            "edgecore",
            &["--help"],
            &[
                "--config",
                "--join",
                "--token",
                "--name",
                "--cri",
                "--data-dir",
                "--transport",
                "--admin",
            ],
        ),
        ("edgecore", &["run", "--help"], &["--config", "--join"]),
    ] {
        let said = run(program, words, dir.path())?;
        ensure!(
            said.status.success(),
            "{program} {words:?}: {}",
            said.status
        );
        let text = String::from_utf8_lossy(&said.stdout);
        for flag in flags {
            ensure!(
                text.contains(flag),
                "{program} {words:?} has no {flag}: {text}"
            );
            // Each flag has its variable.
            if let Some(flag) = flag.strip_prefix("--") {
                let name = flag.to_uppercase().replace('-', "_");
                let variable = format!("[env: {}_{name}", program.to_uppercase());
                ensure!(text.contains(&variable), "no {variable}: {text}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_variable_stands_for_its_flag_and_a_flag_before_it() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut command = Command::new(product("edgecore")?);
    command
        .env("EDGECORE_DATA_DIR", dir.path())
        .env("EDGECORE_TRANSPORT", "pigeon");
    let said = command.output()?;
    ensure!(one_line(&said)?.contains("pigeon"), "{said:?}");
    let said = command.args(["--transport", "quic"]).output()?;
    ensure!(one_line(&said)?.contains("has not joined"), "{said:?}");
    Ok(())
}

/// A program with a data directory of its own and no variable of the caller's.
#[test]
fn the_quickstart_leaves_a_cluster_alone_that_has_cloudcore() -> Result<()> {
    let world = world()?;
    let dir = tempfile::tempdir()?;
    let state = dir.path().join("state");
    let quickstart = |word: &str| {
        let mut command = Command::new(testbed_program()?);
        command.arg(word).arg("--state").arg(&state);
        command.env("KUBECONFIG", &world.kubectl.kubeconfig);
        Ok::<_, anyhow::Error>(command.output()?)
    };
    let said = quickstart("up")?;
    let told = String::from_utf8_lossy(&said.stderr);
    ensure!(!said.status.success(), "{told}");
    ensure!(told.contains("has CloudCore already"), "{told}");
    let said = quickstart("down")?;
    ensure!(said.status.success(), "{said:?}");
    world.kubectl.ok(&["get", "namespace", "edge-system"])?;
    world
        .kubectl
        .ok(&["-n", "edge-system", "get", "secret", "cloudcore-ca"])?;
    ensure!(!state.exists(), "the state was left");
    Ok(())
}

fn run(program: &str, words: &[&str], dir: &Path) -> Result<Output> {
    let mut command = Command::new(product(program)?);
    for (name, _) in std::env::vars() {
        if name.starts_with("EDGECORE_") || name.starts_with("CLOUDCORE_") || name == "KUBECONFIG" {
            command.env_remove(name);
        }
    }
    if program == "edgecore" && !words.contains(&"--data-dir") {
        command.env("EDGECORE_DATA_DIR", dir.join("data"));
    }
    Ok(command.args(words).output()?)
}

/// What it wrote to standard error, if that is one line.
fn one_line(said: &Output) -> Result<String> {
    let text = String::from_utf8_lossy(&said.stderr).trim().to_owned();
    ensure!(
        !text.is_empty() && text.lines().count() == 1,
        "not one line: {text:?}"
    );
    Ok(text)
}
