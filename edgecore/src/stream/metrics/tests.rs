use super::*;
use crate::stream::stats::testing::snapshot;

#[test]
fn resource_is_what_metrics_server_reads() {
    let want = r#"# HELP container_cpu_usage_seconds_total [STABLE] Cumulative cpu time consumed by the container in core-seconds
# TYPE container_cpu_usage_seconds_total counter
container_cpu_usage_seconds_total{container="main",namespace="default",pod="web-0"} 1.5 1800000000100
# HELP container_memory_working_set_bytes [STABLE] Current working set of the container in bytes
# TYPE container_memory_working_set_bytes gauge
container_memory_working_set_bytes{container="main",namespace="default",pod="web-0"} 4096 1800000000100
# HELP container_start_time_seconds [STABLE] Start time of the container since unix epoch in seconds
# TYPE container_start_time_seconds gauge
container_start_time_seconds{container="main",namespace="default",pod="web-0"} 1799999990.5 1800000000000
# HELP node_cpu_usage_seconds_total [STABLE] Cumulative cpu time consumed by the node in core-seconds
# TYPE node_cpu_usage_seconds_total counter
node_cpu_usage_seconds_total 90 1800000000000
# HELP node_memory_working_set_bytes [STABLE] Current working set of the node in bytes
# TYPE node_memory_working_set_bytes gauge
node_memory_working_set_bytes 1000000 1800000000000
# HELP pod_cpu_usage_seconds_total [STABLE] Cumulative cpu time consumed by the pod in core-seconds
# TYPE pod_cpu_usage_seconds_total counter
pod_cpu_usage_seconds_total{namespace="default",pod="web-0"} 2 1800000000000
# HELP pod_memory_working_set_bytes [STABLE] Current working set of the pod in bytes
# TYPE pod_memory_working_set_bytes gauge
pod_memory_working_set_bytes{namespace="default",pod="web-0"} 5000 1800000000000
# HELP resource_scrape_error 1 if there was an error while getting container metrics, 0 otherwise
# TYPE resource_scrape_error gauge
resource_scrape_error 0
# HELP scrape_error 1 if there was an error while getting container metrics, 0 otherwise
# TYPE scrape_error gauge
scrape_error 0
"#;
    assert_eq!(resource(&snapshot()), want);
}

#[test]
fn a_runtime_that_is_away_is_a_scrape_error_and_not_a_node_without_figures() {
    let snapshot = Snapshot {
        pods: Vec::new(),
        failed: true,
        ..snapshot()
    };
    let text = resource(&snapshot);
    assert!(text.contains("\nscrape_error 1\n") && text.contains("\nresource_scrape_error 1\n"));
    assert!(text.contains("\nnode_cpu_usage_seconds_total 90 "));
}

#[test]
fn cadvisors_series_name_whom_they_are_of() {
    let text = cadvisor(&snapshot());
    let node = r#"{container="",id="/",image="",name="",namespace="",pod=""}"#;
    let pod =
        r#"{container="",id="/kubepods/podu-1",image="",name="",namespace="default",pod="web-0"}"#;
    let main = r#"{container="main",id="/kubepods/podu-1/c-1",image="i:1",name="c-1",namespace="default",pod="web-0"}"#;
    let eth0 = r#"{container="",id="/kubepods/podu-1",image="",interface="eth0",name="",namespace="default",pod="web-0"}"#;
    for want in [
        format!("container_cpu_usage_seconds_total{node} 90 1800000000000"),
        format!("container_cpu_usage_seconds_total{pod} 2 1800000000000"),
        format!("container_cpu_usage_seconds_total{main} 1.5 1800000000100"),
        format!("container_memory_working_set_bytes{main} 4096 1800000000100"),
        format!("container_memory_usage_bytes{pod} 6000 1800000000000"),
        format!("container_memory_rss{pod} 3000 1800000000000"),
        format!("container_fs_usage_bytes{main} 700 1800000000000"),
        format!("container_spec_memory_limit_bytes{main} 8192 1800000000000"),
        format!("container_last_seen{main} 1800000000 1800000000000"),
        format!("container_network_receive_bytes_total{eth0} 11 1800000000000"),
        format!("container_network_transmit_packets_dropped_total{eth0} 18 1800000000000"),
        "machine_cpu_cores 2".to_owned(),
        "machine_memory_bytes 4000000".to_owned(),
    ] {
        assert!(text.lines().any(|line| line == want), "{want}\n{text}");
    }
    // What the runtime does not tell has no series.
    assert!(!text.contains(&format!("container_memory_rss{main}")));
    one_block_a_family(&text);
}

#[test]
fn the_agent_tells_of_itself() {
    let held = Held {
        objects: 7,
        complete: true,
    };
    let text = agent(&snapshot(), &held);
    for want in [
        concat!(
            "edgecore_build_info{version=\"",
            env!("CARGO_PKG_VERSION"),
            "\"} 1"
        ),
        "edgecore_desired_objects 7",
        "edgecore_desired_complete 1",
        "kubelet_running_containers{container_state=\"running\"} 1",
        "kubelet_running_pods 1",
        "process_cpu_seconds_total 3",
        "process_open_fds 9",
        "process_resident_memory_bytes 8000",
        "process_start_time_seconds 1799999000",
    ] {
        assert!(text.lines().any(|line| line == want), "{want}\n{text}");
    }
    one_block_a_family(&text);
}

#[test]
fn a_value_cannot_end_its_label() {
    let mut doc = Document::default();
    doc.family(Kind::Gauge, "x", "X.");
    doc.sample(&[("a", "b\"} 1\nc\\")], 1, None);
    assert!(doc.text.ends_with("x{a=\"b\\\"} 1\\nc\\\\\"} 1\n"));
}

/// Every sample stands under its own family, which stands there once.
fn one_block_a_family(text: &str) {
    let mut seen = std::collections::BTreeSet::new();
    let mut family = "";
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            family = rest.split(' ').next().unwrap();
            assert!(seen.insert(family), "{family} twice");
        } else if !line.starts_with('#') {
            assert_eq!(line.split(['{', ' ']).next().unwrap(), family);
        }
    }
}
