//! A known snapshot for the tests of what is made of one.

use jiff::Timestamp;

use super::*;

pub(crate) fn at(milliseconds: i64) -> Timestamp {
    Timestamp::from_millisecond(1_800_000_000_000 + milliseconds).unwrap()
}

fn cpu(at: Timestamp, nanos: u64) -> Option<Cpu> {
    Some(Cpu {
        at,
        nanos,
        nano_cores: None,
    })
}

fn memory(at: Timestamp, working_set: u64) -> Memory {
    Memory {
        at,
        working_set,
        available: None,
        usage: None,
        rss: None,
        page_faults: None,
        major_page_faults: None,
    }
}

fn disk() -> Disk {
    Disk {
        capacity: 1000,
        available: 400,
        inodes: 50,
        inodes_free: 20,
    }
}

fn interface() -> Interface {
    Interface {
        name: "eth0".into(),
        rx_bytes: 11,
        rx_packets: 12,
        rx_errors: 13,
        rx_dropped: 14,
        tx_bytes: 15,
        tx_packets: 16,
        tx_errors: 17,
        tx_dropped: 18,
    }
}

fn pod() -> PodStats {
    let container = ContainerStats {
        id: "c-1".into(),
        name: "main".into(),
        image: "i:1".into(),
        started: at(-9500),
        cpu: cpu(at(100), 1_500_000_000),
        memory: Some(memory(at(100), 4096)),
        memory_limit: Some(8192),
        writable: Some(Used {
            bytes: 700,
            inodes: Some(7),
        }),
        logs: Used {
            bytes: 30,
            inodes: Some(1),
        },
    };
    PodStats {
        namespace: "default".into(),
        name: "web-0".into(),
        uid: "u-1".into(),
        started: at(-10_000),
        cgroup: "/kubepods/podu-1".into(),
        cpu: cpu(at(0), 2_000_000_000),
        memory: Some(Memory {
            usage: Some(6000),
            rss: Some(3000),
            ..memory(at(0), 5000)
        }),
        network: vec![interface()],
        processes: Some(3),
        containers: vec![container],
    }
}

/// One Pod with one container.
pub(crate) fn snapshot() -> Snapshot {
    Snapshot {
        at: at(0),
        node_name: "edge-1".into(),
        node: Node {
            booted: at(-100_000),
            cpus: 2,
            memory_bytes: 4_000_000,
            cpu: cpu(at(0), 90_000_000_000),
            memory: Some(Memory {
                available: Some(3_000_000),
                ..memory(at(0), 1_000_000)
            }),
            interfaces: vec![interface()],
            default_interface: "eth0".into(),
            processes: 120,
            most_processes: 32_768,
        },
        all_pods: (cpu(at(0), 2_000_000_000), Some(memory(at(0), 5000))),
        agent: Process {
            started: at(-1_000_000),
            cpu: cpu(at(0), 3_000_000_000),
            memory: Some(Memory {
                rss: Some(8000),
                ..memory(at(0), 8000)
            }),
            open_files: 9,
        },
        disk: Some(disk()),
        images: Some((
            disk(),
            Used {
                bytes: 300,
                inodes: Some(3),
            },
        )),
        pods: vec![pod()],
        failed: false,
    }
}
