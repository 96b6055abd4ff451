//! `kubectl cp` and `kubectl port-forward`: many bytes, many connections.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use testbed::edge::Transport;
use testbed::forward::Forward;
use testbed::kubectl::Kubectl;
use testbed::wait::wait_for;
use testbed::world::SOON;

use super::{MOMENT, Place, clients, noise, place};

#[test]
fn a_file_is_copied_to_a_pod_and_back() -> Result<()> {
    let place = place(Transport::Quic)?;
    for (name, kubectl) in clients(&place.kubectl)? {
        copies(&place, &kubectl, 32 << 20).with_context(|| format!("kubectl {name}"))?;
    }
    Ok(())
}

#[test]
fn a_file_is_copied_over_a_websocket_link_to_a_pod_and_back() -> Result<()> {
    let place = place(Transport::Websocket)?;
    copies(&place, &place.kubectl, 16 << 20)
}

fn copies(place: &Place, kubectl: &Kubectl, size: usize) -> Result<()> {
    let pod = place.shell("copies", "sleep 1000")?;
    let dir = tempfile::tempdir()?;
    let (there, back) = (dir.path().join("there"), dir.path().join("back"));
    let bytes = noise(size, 2);
    fs::write(&there, &bytes)?;
    let path = |path: &std::path::Path| path.to_str().map(str::to_owned).context("a path");
    let remote = format!("{pod}:/tmp/copied");
    let begun = Instant::now();
    let copy = |from: &str, to: &str| {
        let mut copying = kubectl.start(&["cp", from, to])?;
        copying.end(Duration::from_secs(120))?.ok()
    };
    copy(&path(&there)?, &remote).with_context(|| place.story())?;
    let up = begun.elapsed();
    // One that ends before the file is whole in the container would be found out here.
    let sum = place
        .kubectl
        .ok(&["exec", &pod, "--", "sha256sum", "/tmp/copied"])?;
    ensure!(sum.starts_with(&sha256(&bytes)), "{sum}");
    let begun = Instant::now();
    copy(&remote, &path(&back)?).with_context(|| place.story())?;
    ensure!(fs::read(&back)? == bytes, "another file came back");
    println!(
        "{size} bytes to {}: {up:?}, back: {:?}",
        place.node,
        begun.elapsed()
    );
    Ok(())
}

fn sha256(bytes: &[u8]) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, bytes);
    digest
        .as_ref()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// A Pod that echoes at 7001, says the checksum of its first 4 MiB at 7002, and sends a file that
/// nobody asked for at 7003.
fn servers(place: &Place, name: &str) -> Result<String> {
    let script = "seq 1 300000 >/tmp/file; \
                  nc -ll -p 7001 -e cat & \
                  nc -ll -p 7002 -e sh -c 'head -c 4194304 | sha256sum' & \
                  nc -ll -p 7003 -e cat /tmp/file & \
                  touch /tmp/up; wait";
    let pod = place.shell(name, script)?;
    wait_for("the servers", MOMENT, || {
        place.kubectl.ok(&["exec", &pod, "--", "ls", "/tmp/up"])
    })?;
    Ok(pod)
}

#[test]
fn forwarded_ports_serve_every_kubectl_and_half_of_a_connection_may_end_first() -> Result<()> {
    let place = place(Transport::Quic)?;
    let pod = servers(&place, "ports")?;
    for (name, kubectl) in clients(&place.kubectl)? {
        forwards(&kubectl, &pod)
            .with_context(|| format!("kubectl {name}"))
            .with_context(|| place.story())?;
    }
    Ok(())
}

#[test]
fn ports_are_forwarded_over_a_websocket_link() -> Result<()> {
    let place = place(Transport::Websocket)?;
    let pod = servers(&place, "ports")?;
    forwards(&place.kubectl, &pod).with_context(|| place.story())
}

fn forwards(kubectl: &Kubectl, pod: &str) -> Result<()> {
    let mut forward = Forward::start(kubectl, pod, &[7001, 7002, 7003])?;
    many_connections(&forward)?;

    // We end our half at once; the answer to it comes back all the same.
    let bytes = noise(4 << 20, 3);
    let mut stream = forward.dial(1)?;
    stream.write_all(&bytes)?;
    stream.shutdown(Shutdown::Write)?;
    let mut said = String::new();
    stream.read_to_string(&mut said)?;
    ensure!(said.starts_with(&sha256(&bytes)), "{said:?}");

    // They end their half; all of it is here.
    let mut stream = forward.dial(2)?;
    let mut said = String::new();
    stream.read_to_string(&mut said)?;
    let lines = said.lines().count();
    ensure!(
        lines == 300_000 && said.ends_with("300000\n"),
        "{lines} lines"
    );
    forward.kubectl.ensure_running()
}

/// As many as a page of a browser opens, and then some.
const CONNECTIONS: usize = 20;

/// Opens them all, then speaks on all, so that they are open at the same time.
fn many_connections(forward: &Forward) -> Result<()> {
    let mut streams: Vec<TcpStream> = (0..CONNECTIONS)
        .map(|_| forward.dial(0))
        .collect::<Result<_>>()?;
    for (number, stream) in streams.iter_mut().enumerate() {
        stream.write_all(&noise(10_000, number as u64 * 2 + 1))?;
    }
    for (number, stream) in streams.iter_mut().enumerate() {
        let mut back = vec![0; 10_000];
        stream
            .read_exact(&mut back)
            .with_context(|| format!("connection {number}"))?;
        ensure!(
            back == noise(10_000, number as u64 * 2 + 1),
            "connection {number}"
        );
    }
    Ok(())
}

#[test]
fn a_port_that_nobody_listens_at_is_told_and_the_others_go_on() -> Result<()> {
    let place = place(Transport::Quic)?;
    let pod = servers(&place, "closed")?;
    let forward = Forward::start(&place.kubectl, &pod, &[7001, 9])?;
    let mut stream = forward.dial(1)?;
    let _ = stream.write_all(b"anybody?");
    let mut said = Vec::new();
    let _ = stream.read_to_end(&mut said);
    ensure!(said.is_empty(), "{said:?}");
    wait_for("the error", SOON, || {
        let told = forward.kubectl.stderr();
        ensure!(told.contains("error") && told.contains(" 9"), "{told}");
        Ok(())
    })?;
    // A newer kubectl ends with such an error and is started again by who needs it.
    let forward = Forward::start(&place.kubectl, &pod, &[7001])?;
    many_connections(&forward)
}
