//! The testbed itself, without cloudcore and edgecore: what every other test relies on.
#![expect(
    clippy::unwrap_used,
    reason = "a test ends where it finds something wrong"
)]

use std::io::Read;
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use testbed::bed::Bed;
use testbed::containerd::{Containerd, Flavour};
use testbed::images::BUSYBOX;
use testbed::netns::{Backbone, Machine};
use testbed::relay::{Relay, Shape};
use testbed::wait::wait_for;

/// The address that the host sees when the machine opens a TCP connection to it; `None` if that
/// does not succeed within two seconds.
fn dials(machine: &Machine, listener: &TcpListener) -> Option<String> {
    let address = listener.local_addr().unwrap();
    listener.set_nonblocking(true).unwrap();
    let (host, port) = (address.ip().to_string(), address.port().to_string());
    let mut command = machine.command("busybox").unwrap();
    let mut dialler = command
        .args(["nc", "-w", "2", &host, &port])
        .spawn()
        .unwrap();
    let seen = wait_for("connection", Duration::from_secs(2), || {
        Ok(listener.accept()?.1)
    });
    let _ = dialler.wait();
    seen.ok().map(|from| from.ip().to_string())
}

#[test]
fn an_edge_dials_out_through_nat_and_cannot_be_dialled() {
    let bed = Arc::new(Bed::scratch().unwrap());
    let backbone = Backbone::build(&bed).unwrap();
    let machine = backbone.machine("edge-1").unwrap();
    let other = backbone.machine("edge-2").unwrap();
    let listener = TcpListener::bind((bed.host_address(), 0)).unwrap();

    let from = dials(&machine, &listener).expect("the way out is open");
    assert_eq!(
        from,
        format!("198.18.{}.11", bed.number),
        "the router's address is seen"
    );
    let from = dials(&other, &listener).expect("the way out is open");
    assert_eq!(from, format!("198.18.{}.12", bed.number));

    // The edge listens, and its router's address does not lead to it.
    let mut inside = machine.command("busybox").unwrap();
    let mut server = inside.args(["nc", "-l", "-p", "9"]).spawn().unwrap();
    let target = (Ipv4Addr::new(198, 18, bed.number, 11), 9).into();
    let dialled = TcpStream::connect_timeout(&target, Duration::from_secs(1));
    assert!(dialled.is_err(), "the edge was dialled");
    let _ = server.kill();
    let _ = server.wait();
}

#[test]
fn a_link_loses_udp_or_everything_and_comes_back() {
    let bed = Arc::new(Bed::scratch().unwrap());
    let backbone = Backbone::build(&bed).unwrap();
    let machine = backbone.machine("edge-1").unwrap();
    let listener = TcpListener::bind((bed.host_address(), 0)).unwrap();
    let socket = UdpSocket::bind((bed.host_address(), 0)).unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(1)))
        .unwrap();
    let (host, port) = (
        bed.host_address().to_string(),
        socket.local_addr().unwrap().port(),
    );
    let datagram = || {
        let script = format!("echo hello >/dev/udp/{host}/{port}");
        let _ = machine.output(&["bash", "-c", &script]);
        socket.recv(&mut [0; 16]).is_ok()
    };

    assert!(datagram() && dials(&machine, &listener).is_some());
    machine.drop_udp().unwrap();
    assert!(!datagram() && dials(&machine, &listener).is_some());
    machine.restore().unwrap();
    machine.cut().unwrap();
    // What the router itself says to its neighbours (ARP, MLD) is not the machine's.
    let before = machine.forwarded().unwrap();
    assert!(!datagram() && dials(&machine, &listener).is_none());
    let lost = machine.forwarded().unwrap().up - before.up;
    assert_eq!(lost, 0, "bytes went out of a cut link");
    machine.restore().unwrap();
    assert!(datagram() && dials(&machine, &listener).is_some());
    machine.change_address(200).unwrap();
    let from = dials(&machine, &listener).expect("the way out is open");
    assert_eq!(from, format!("198.18.{}.200", bed.number));
}

#[test]
fn a_relay_stands_between_a_machine_and_its_cloud_and_neither_sees_it() {
    let bed = Arc::new(Bed::scratch().unwrap());
    let backbone = Backbone::build(&bed).unwrap();
    let machine = backbone.machine("edge-1").unwrap();
    let listener = TcpListener::bind((bed.host_address(), 0)).unwrap();
    let cloud = listener.local_addr().unwrap();
    let relay = Relay::start(bed.host_address(), cloud, Shape::default()).unwrap();
    machine.divert(cloud, relay.address()).unwrap();
    let from = dials(&machine, &listener).expect("the way out is open");
    assert_eq!(from, bed.host_address().to_string(), "the relay dialled");
}

#[test]
fn a_port_that_a_machine_exposes_can_be_dialled_and_no_other() {
    let bed = Arc::new(Bed::scratch().unwrap());
    let backbone = Backbone::build(&bed).unwrap();
    let machine = backbone.machine("node-1").unwrap();
    let address = machine.expose(7).unwrap();
    assert_eq!(address, Ipv4Addr::new(198, 18, bed.number, 11));
    let mut server = machine.command("busybox").unwrap();
    let mut server = server
        .args(["nc", "-ll", "-p", "7", "-e", "busybox", "echo", "hello"])
        .spawn()
        .unwrap();
    let dial = |port| TcpStream::connect_timeout(&(address, port).into(), Duration::from_secs(1));
    let stream = wait_for("the port", Duration::from_secs(10), || Ok(dial(7)?)).unwrap();
    let mut said = String::new();
    (&stream).read_to_string(&mut said).unwrap();
    assert_eq!(said, "hello\n");
    assert!(dial(8).is_err(), "another port was dialled");
    let _ = server.kill();
    let _ = server.wait();
}

#[test]
fn containerd_runs_a_container_and_nothing_of_it_is_left_behind() {
    let bed = Arc::new(Bed::scratch().unwrap());
    let (dir, number) = (bed.dir.clone(), bed.number);
    let backbone = Backbone::build(&bed).unwrap();
    let machine = backbone.machine("edge-1").unwrap();
    let containerd = Containerd::start(&machine, Flavour::Packaged, &dir).unwrap();
    containerd
        .ctr(
            &machine,
            &["run", "--detach", BUSYBOX, "one", "/bin/sleep", "1000"],
        )
        .unwrap();
    let script = [
        "tasks",
        "exec",
        "--exec-id",
        "x",
        "one",
        "/bin/sh",
        "-c",
        "echo from inside",
    ];
    assert_eq!(
        containerd.ctr(&machine, &script).unwrap().trim(),
        "from inside"
    );
    assert!(
        machine
            .exec(&["cat", "/etc/hostname"])
            .unwrap()
            .contains("edge-1")
    );

    drop((containerd, machine, backbone, bed));
    assert!(!dir.exists());
    assert!(!Path::new(&format!("/sys/class/net/etb{number}")).exists());
    for root in testbed::holder::cgroup_roots() {
        assert!(
            !root.join(format!("etb{number}")).exists(),
            "{} is left",
            root.display()
        );
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(dir.to_str().unwrap()), "a mount is left");
}

#[test]
fn a_machine_that_lost_its_power_comes_back_with_its_disk_and_its_network() {
    let bed = Arc::new(Bed::scratch().unwrap());
    let backbone = Backbone::build(&bed).unwrap();
    let mut machine = backbone.machine("edge-1").unwrap();
    let listener = TcpListener::bind((bed.host_address(), 0)).unwrap();
    machine
        .exec(&["touch", "/etc/cni/net.d/a", "/var/lib/b", "/run/c"])
        .unwrap();
    let old = Containerd::start(&machine, Flavour::Packaged, &bed.dir).unwrap();
    old.ctr(
        &machine,
        &["run", "--detach", BUSYBOX, "one", "/bin/sleep", "1000"],
    )
    .unwrap();

    machine.reboot().unwrap();
    machine
        .exec(&["ls", "/etc/cni/net.d/a", "/var/lib/b"])
        .unwrap();
    assert!(machine.exec(&["ls", "/run/c"]).is_err(), "/run is volatile");
    assert!(dials(&machine, &listener).is_some());
    let new = Containerd::start(&machine, Flavour::Packaged, &bed.dir).unwrap();
    assert!(
        new.ctr(&machine, &["containers", "ls", "-q"])
            .unwrap()
            .contains("one")
    );
    assert!(
        !new.ctr(&machine, &["tasks", "ls", "-q"])
            .unwrap()
            .contains("one")
    );
}
