//! Certificates come to their end while devices work, and while they are switched off.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use testbed::cluster::Options;
use testbed::edge::Edge;
use testbed::programs::K8S_1_37;
use testbed::wait::wait_for;
use testbed::world::{SOON, World, container_id, restarts};

/// Short enough for a test, long enough for a machine that does much else.
const LIFE: Duration = Duration::from_secs(40);

/// It has a control plane of its own: the lifetime is cloudcore's for all devices.
#[test]
fn a_certificate_is_renewed_in_time_and_replaced_when_it_ran_out() -> Result<()> {
    let world = World::start(Options::impatient(K8S_1_37))?;
    let life = format!("{}s", LIFE.as_secs());
    set_flags(&world, &["--certificate-lifetime", &life])?;

    let mut edge = world.machine("renews")?;
    let begun = Instant::now();
    world.join(&mut edge, &[])?;
    world.sleeper("renew-pod", "renews")?;
    let before = world.pod_running(&edge, "renew-pod")?;
    let first = key_of(&world)?;

    // Over the session, at 70 to 80 percent of its life, with another key.
    wait_for("the renewal", LIFE, || {
        ensure!(
            edge.text().contains("the certificate was renewed"),
            "not yet"
        );
        Ok(())
    })
    .with_context(|| world.story(&edge))?;
    let took = begun.elapsed();
    ensure!(
        took >= LIFE.mul_f64(0.65) && took <= LIFE.mul_f64(0.95),
        "renewed {took:?} after the join"
    );
    world.node_ready(&mut edge)?;
    wait_for("the new key in the record", SOON, || {
        ensure!(key_of(&world)? != first, "it is the old one");
        Ok(())
    })?;
    // Longer than the first one held, and a new session after it: the second one serves.
    while begun.elapsed() < LIFE + Duration::from_secs(2) {
        std::thread::sleep(Duration::from_millis(200));
        edge.ensure_running()?;
    }
    edge.kill();
    edge.start()?;
    is_served(&world, &mut edge, "renew-pod-2")?;

    // Switched off until the certificate has run out: the known key gets another without a token.
    edge.kill();
    std::thread::sleep(LIFE + Duration::from_secs(2));
    edge.start()?;
    is_served(&world, &mut edge, "renew-pod-3")?;
    let after = world.same_container(&edge, &before)?;
    ensure!(restarts(&after) == Some(0), "{}", after["status"]);

    // Beyond the grace it does not, and the device is told what to do.
    edge.kill();
    set_flags(
        &world,
        &["--certificate-lifetime", &life, "--reenrol-grace", "1s"],
    )?;
    std::thread::sleep(LIFE + Duration::from_secs(3));
    let told = edge.text().len();
    edge.start()?;
    wait_for("the refusal", SOON, || {
        edge.ensure_running()?;
        let said = edge.text().split_off(told);
        ensure!(said.contains("new token"), "{said}");
        Ok(())
    })
    .with_context(|| world.story(&edge))?;
    let runtime = edge.containerd.as_ref().context("a runtime")?;
    let tasks = runtime.ctr(&edge.machine, &["tasks", "ls"])?;
    ensure!(tasks.contains(&container_id(&after)?), "{tasks}");
    Ok(())
}

/// Restarts cloudcore with these flags.
fn set_flags(world: &World, flags: &[&str]) -> Result<()> {
    let mut cloud = world.cloud();
    cloud.set_flags(flags);
    cloud.stop()?;
    cloud.resume()
}

/// The beginning of the key's fingerprint, as `cloudcore node list` shows it.
fn key_of(world: &World) -> Result<String> {
    let list = world.cloud().command(&["node", "list"])?;
    let row = list
        .lines()
        .find(|row| row.starts_with("renews "))
        .context("no such node")?;
    Ok(row
        .split_whitespace()
        .nth(2)
        .context("no key is shown")?
        .to_owned())
}

/// A Pod that is made now comes up: the session is a new one, not what the cluster remembers.
fn is_served(world: &World, edge: &mut Edge, pod: &str) -> Result<()> {
    let name = edge.name.clone();
    world.sleeper(pod, &name)?;
    world.pod_running(edge, pod).map(drop)
}
