//! `kubectl logs`, in every way that it can be asked.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use testbed::bed::run;
use testbed::edge::Transport;
use testbed::wait::wait_for;
use testbed::world::SOON;

use super::{MOMENT, Place, place, shell_container};

#[test]
fn a_log_is_cut_by_lines_bytes_and_time() -> Result<()> {
    let place = place(Transport::Quic)?;
    let script = "for i in 1 2 3; do echo line-$i; done; sleep 3; echo late; sleep 1000";
    let pod = place.shell("cut-log", script)?;
    let logs = |words: &[&str]| place.kubectl.ok(&[&["logs", &pod], words].concat());
    wait_for("the late line", MOMENT, || {
        let said = logs(&[])?;
        ensure!(said.contains("late"), "{said}");
        Ok(())
    })?;
    for (words, want) in [
        (&[][..], "line-1\nline-2\nline-3\nlate\n"),
        (&["--tail=2"], "line-3\nlate\n"),
        (&["--tail=0"], ""),
        (&["--tail=100"], "line-1\nline-2\nline-3\nlate\n"),
        (&["--limit-bytes=10"], "line-1\nlin"),
        (&["--tail=2", "--limit-bytes=8"], "line-3\nl"),
        (&["--since=1h"], "line-1\nline-2\nline-3\nlate\n"),
    ] {
        ensure!(logs(words)? == want, "{words:?}: {:?}", logs(words)?);
    }

    let stamped = logs(&["--timestamps"])?;
    let stamps: Vec<&str> = stamped
        .lines()
        .filter_map(|line| Some(line.split_once(' ')?.0))
        .collect();
    ensure!(stamps.len() == 4, "{stamped}");
    ensure!(
        stamps
            .iter()
            .all(|s| s.contains('T') && s.contains('.') && s.ends_with('Z')),
        "{stamped}"
    );
    // Whole seconds cross the API: two after the first line stand between it and the late one.
    let words = ["-u", "+%FT%TZ", "-d", &format!("{} +2 seconds", stamps[0])];
    let between = run(Command::new("date").args(words))?;
    let since = format!("--since-time={}", between.trim());
    ensure!(
        logs(&[&since])? == "late\n",
        "{since}: {:?}",
        logs(&[&since])?
    );

    std::thread::sleep(Duration::from_secs(2));
    ensure!(
        logs(&["--since=1s"])?.is_empty(),
        "{:?}",
        logs(&["--since=1s"])?
    );
    Ok(())
}

#[test]
fn each_container_of_a_pod_has_its_log_the_initial_one_too() -> Result<()> {
    let place = place(Transport::Quic)?;
    let mut pod = place.pod("many-logs", "echo of main; echo wrong >&2; sleep 1000");
    pod["spec"]["initContainers"] = json!([shell_container("first", "echo of first")]);
    let second = shell_container("second", "echo of second; sleep 1000");
    pod["spec"]["containers"]
        .as_array_mut()
        .context("containers")?
        .push(second);
    let pod = place.start(&pod)?;
    for (container, want) in [("first", "of first\n"), ("second", "of second\n")] {
        let said = place.kubectl.ok(&["logs", &pod, "-c", container])?;
        ensure!(said == want, "{container}: {said}");
    }
    let said = place.kubectl.ok(&["logs", &pod, "-c", "main"])?;
    ensure!(said.contains("of main") && said.contains("wrong"), "{said}");
    let all = place.kubectl.ok(&["logs", &pod, "--all-containers"])?;
    for word in ["of first", "of main", "of second"] {
        ensure!(all.contains(word), "{word}: {all}");
    }
    let said = place.kubectl.run(&["logs", &pod, "-c", "third"])?;
    ensure!(said.code != 0 && said.stderr.contains("third"), "{said:?}");
    Ok(())
}

#[test]
fn a_followed_log_shows_a_line_within_a_second_and_ends_with_its_container() -> Result<()> {
    for transport in [Transport::Quic, Transport::Websocket] {
        follows(&*place(transport)?)?;
    }
    Ok(())
}

fn follows(place: &Place) -> Result<()> {
    let script = "echo begun; while ! [ -e /tmp/go ]; do sleep 0.05; done; echo went; \
                  while ! [ -e /tmp/end ]; do sleep 0.05; done; echo last";
    let mut pod = place.pod("followed", script);
    pod["spec"]["restartPolicy"] = json!("Never");
    let pod = place.start(&pod)?;
    let mut log = place.kubectl.start(&["logs", "-f", &pod])?;
    log.sees("begun\n", MOMENT)?;
    place
        .kubectl
        .ok(&["exec", &pod, "--", "touch", "/tmp/go"])?;
    // The line was written before the exec had ended.
    log.sees("went\n", Duration::from_secs(1))
        .with_context(|| place.story())?;
    place
        .kubectl
        .ok(&["exec", &pod, "--", "touch", "/tmp/end"])?;
    let ended = log.end(Duration::from_secs(10))?.ok()?;
    ensure!(ended.text() == "begun\nwent\nlast\n", "{ended}");
    // And the log of a container that has ended can be read, and followed to its end.
    ensure!(place.kubectl.ok(&["logs", &pod])? == "begun\nwent\nlast\n");
    let again = place
        .kubectl
        .start(&["logs", "-f", &pod])?
        .end(MOMENT)?
        .ok()?;
    ensure!(again.text() == "begun\nwent\nlast\n", "{again}");
    Ok(())
}

#[test]
fn the_previous_life_of_a_container_can_be_read() -> Result<()> {
    let place = place(Transport::Quic)?;
    let script = "if [ -e /data/ran ]; then echo second life; sleep 1000; fi; \
                  touch /data/ran; echo first life; exit 1";
    let mut pod = place.pod("lives", script);
    pod["spec"]["volumes"] = json!([{"name": "data", "emptyDir": {}}]);
    pod["spec"]["containers"][0]["volumeMounts"] = json!([{"name": "data", "mountPath": "/data"}]);
    let pod = place.create(&pod)?;
    wait_for("the second life", SOON, || {
        let said = place.kubectl.ok(&["logs", &pod])?;
        ensure!(said == "second life\n", "{said}");
        Ok(())
    })
    .with_context(|| place.story())?;
    let said = place.kubectl.ok(&["logs", &pod, "--previous"])?;
    ensure!(said == "first life\n", "{said}");

    let fresh = place.shell("one-life", "sleep 1000")?;
    let said = place.kubectl.run(&["logs", &fresh, "--previous"])?;
    ensure!(
        said.code != 0 && said.stderr.contains("previous terminated container"),
        "{said:?}"
    );
    Ok(())
}

#[test]
fn a_container_that_waits_says_why_there_is_no_log() -> Result<()> {
    let place = place(Transport::Quic)?;
    let mut pod = place.pod("waits", "true");
    pod["spec"]["containers"][0]["image"] = json!("docker.io/local/nowhere:1");
    pod["spec"]["containers"][0]["imagePullPolicy"] = json!("Never");
    let pod = place.create(&pod)?;
    wait_for("the reason", SOON, || {
        let said = place.kubectl.run(&["logs", &pod])?;
        ensure!(said.code != 0, "{said:?}");
        ensure!(
            said.stderr
                .contains("is waiting to start: ErrImageNeverPull"),
            "{said:?}"
        );
        Ok(())
    })
    .with_context(|| place.story())
}

/// More than the 10 MiB at which a log is rotated.
const CHATTY: u64 = 130_000;

#[test]
fn a_followed_log_loses_nothing_where_it_is_rotated() -> Result<()> {
    let place = place(Transport::Quic)?;
    let script = format!(
        "seq 1 {CHATTY} | awk '{{ printf \"%d %060d\\n\", $1, 0 }}'; i={CHATTY}; \
         while ! [ -e /tmp/end ]; do i=$((i + 1)); echo $i more; sleep 0.2; done; echo 0 done"
    );
    let mut pod = place.pod("rotated", &script);
    pod["spec"]["restartPolicy"] = json!("Never");
    let pod = place.start(&pod)?;
    let mut log = place.kubectl.start(&["logs", "-f", &pod])?;
    let begun = Instant::now();
    wait_for("the rotation", SOON, || {
        ensure!(rotated(&place, &pod)?, "one file");
        Ok(())
    })
    .with_context(|| place.story())?;
    println!("rotated after {:?}", begun.elapsed());
    // Lines of the file that began with the rotation.
    let seen = log.stdout().lines().count();
    wait_for("lines after the rotation", MOMENT, || {
        ensure!(log.stdout().lines().count() > seen + 10, "none yet");
        Ok(())
    })?;
    place
        .kubectl
        .ok(&["exec", &pod, "--", "touch", "/tmp/end"])?;
    let text = log.end(MOMENT)?.ok()?.text();
    let end = text.lines().last().unwrap_or_default();
    ensure!(end == "0 done", "the log ends with {end:?}");
    let mut numbers = text.lines().map(|line| {
        let first = line.split(' ').next().unwrap_or_default();
        first.parse::<u64>().with_context(|| format!("{line:?}"))
    });
    let mut last = 0;
    loop {
        match numbers.next().context("lines are left")?? {
            0 => break,
            number => ensure!(number == last + 1, "{number} after {last}"),
        }
        last += 1;
    }
    ensure!(last > CHATTY, "the log ends with {last}");
    // What is left without following is the newest file, to its end.
    let left = place.kubectl.ok(&["logs", &pod])?;
    ensure!(left.ends_with("0 done\n"), "{:?}", left.lines().last());
    Ok(())
}

/// Whether there is more than one file of the container's log.
fn rotated(place: &Place, pod: &str) -> Result<bool> {
    for dir in fs::read_dir(&place.log_dir)?.flatten() {
        if dir
            .file_name()
            .to_string_lossy()
            .contains(&format!("_{pod}_"))
        {
            return Ok(fs::read_dir(dir.path().join("main"))?.count() > 1);
        }
    }
    Ok(false)
}
