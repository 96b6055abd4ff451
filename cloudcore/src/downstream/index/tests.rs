//! Histories of the index, in small steps.

mod world;

use common::object::Content;
use serde_json::json;

use super::*;
use world::{World, absent, answer, config, node, pod, with};

#[test]
fn a_pod_goes_down_once_all_it_names_was_read_as_its_node() {
    let mut world = World::new();
    world.watch_pod(&pod("u", "a", 20, &["x", "y"]));
    assert_eq!(world.said(), ["read x as a", "read y as a"]);
    assert_eq!(world.pods("a"), (vec![], false));

    world.answer("x", "a", &answer("1", 5, 30));
    assert_eq!(world.said(), ["watch x as a from 30"]);
    assert_eq!(world.pods("a"), (vec![], false));

    world.changed.clear();
    world.answer("y", "a", &absent(31));
    assert_eq!(
        world.set("a"),
        (vec!["pod u".into(), "x 1".into(), "y absent".into()], true)
    );
    assert_eq!(world.changed, [node("a")].into());
    assert_eq!(world.pods("b"), (vec![], true));
}

#[test]
fn a_pod_sees_no_reference_older_than_itself() {
    let mut world = World::new();
    world.watch_pod(&pod("u", "a", 20, &["x"]));
    world.answer("x", "a", &answer("old", 5, 20));
    world.said();
    // Known and allowed, but perhaps edited between 20 and 25: read again.
    world.watch_pod(&pod("v", "a", 25, &["x"]));
    assert_eq!(world.said(), ["read x as a"]);
    assert_eq!(world.pods("a"), (vec!["pod u".into()], false));
    world.answer("x", "a", &answer("new", 24, 26));
    assert_eq!(world.set("a").0, ["pod u", "pod v", "x new"]);
    // A read that reached further than the next Pod is enough for it.
    world.watch_pod(&pod("w", "a", 26, &["x"]));
    assert_eq!(world.said(), Vec::<String>::new());
    assert!(world.pods("a").1);
}

#[test]
fn an_answer_older_than_the_pod_that_came_meanwhile_is_not_enough() {
    let mut world = World::new();
    world.watch_pod(&pod("u", "a", 20, &["x"]));
    world.watch_pod(&pod("v", "a", 25, &["x"]));
    assert_eq!(world.said(), ["read x as a"], "one read at a time");
    world.answer("x", "a", &answer("1", 5, 22));
    assert_eq!(world.said(), ["read x as a", "watch x as a from 22"]);
    assert_eq!(world.pods("a"), (vec!["pod u".into()], false));
    world.answer("x", "a", &answer("1", 5, 25));
    assert_eq!(
        world.pods("a"),
        (vec!["pod u".into(), "pod v".into()], true)
    );
}

#[test]
fn one_watch_serves_all_nodes_and_moves_when_its_own_leaves() {
    let mut world = World::new();
    world.watch_pod(&pod("u", "a", 20, &["x"]));
    world.watch_pod(&pod("v", "b", 21, &["x"]));
    world.answer("x", "a", &answer("1", 5, 30));
    assert_eq!(
        world.said(),
        ["read x as a", "read x as b", "watch x as a from 30"]
    );
    // Read by another node: not yet this one's.
    assert_eq!(world.set("b"), (vec![], false));
    world.answer("x", "b", &answer("1", 5, 32));
    assert_eq!(world.said(), Vec::<String>::new());

    let ticket = world.watch_ticket("x");
    world.changed.clear();
    world
        .index
        .observe(&config("x"), ticket, &answer("2", 40, 40));
    world.drain();
    assert_eq!(world.changed, [node("a"), node("b")].into());
    assert_eq!(world.set("b").0, ["pod v", "x 2"]);
    let of = |n| world.index.desired(&node(n)).unwrap().objects[&config("x")].clone();
    assert!(Arc::ptr_eq(&of("a"), &of("b")), "held and encoded once");

    world.index.remove_pod(&pod("u", "a", 50, &["x"]));
    world.drain();
    assert_eq!(world.said(), ["watch x as b from 40"]);
    // What the old watch still had to say counts for nothing.
    world
        .index
        .observe(&config("x"), ticket, &answer("3", 60, 60));
    assert_eq!(world.set("b").0, ["pod v", "x 2"]);

    world.index.remove_pod(&pod("v", "b", 51, &["x"]));
    world.drain();
    assert_eq!(world.said(), ["unwatch x"]);
    assert_eq!(world.index.references_held(), 0);
}

#[test]
fn a_watch_that_is_refused_goes_to_another_node_that_may() {
    let mut world = World::new();
    world.watch_pod(&pod("u", "a", 20, &["x"]));
    world.answer("x", "a", &answer("1", 5, 30));
    world.index.refuse(&config("x"), world.watch_ticket("x"));
    world.drain();
    assert_eq!(
        world.said(),
        ["read x as a", "watch x as a from 30"],
        "nobody else to ask"
    );

    world.watch_pod(&pod("v", "b", 31, &["x"]));
    world.answer("x", "b", &answer("1", 5, 32));
    world.index.refuse(&config("x"), world.watch_ticket("x"));
    world.drain();
    assert_eq!(world.said(), ["read x as b", "watch x as b from 32"]);
    let refusals = world.commands.iter().rev().find_map(|c| match c {
        Command::Watch { refusals, .. } => Some(*refusals),
        _ => None,
    });
    assert_eq!(
        refusals,
        Some(2),
        "the back-off goes with the object, not with the node"
    );
}

#[test]
fn a_question_that_was_withdrawn_takes_no_answer() {
    let mut world = World::new();
    world.watch_pod(&pod("u", "a", 20, &["x"]));
    let Some(Command::Read { ticket, .. }) = world.commands.last().cloned() else {
        panic!("a read was ordered");
    };
    world.index.remove_pod(&pod("u", "a", 21, &["x"]));
    world.drain();
    assert_eq!(world.said(), ["read x as a", "stop reading x as a"]);
    world.watch_pod(&pod("v", "a", 22, &["x"]));
    assert!(
        !world
            .index
            .read(&config("x"), &node("a"), ticket, &answer("1", 5, 99))
    );
    assert_eq!(world.pods("a"), (vec![], false));
}

#[test]
fn an_answer_from_before_never_undoes_a_later_one() {
    let mut world = World::new();
    world.watch_pod(&pod("u", "a", 20, &["x"]));
    world.watch_pod(&pod("v", "b", 20, &["x"]));
    world.answer("x", "a", &answer("new", 28, 30));
    world.answer("x", "b", &answer("old", 5, 25));
    assert_eq!(world.set("b").0, ["pod v", "x new"]);
    let ticket = world.watch_ticket("x");
    world
        .index
        .observe(&config("x"), ticket, &answer("older", 29, 29));
    assert_eq!(world.set("a").0, ["pod u", "x new"]);
}

#[test]
fn a_pod_that_will_not_start_waits_for_nothing() {
    let mut world = World::new();
    let ended = with(
        pod("u", "a", 20, &["x"]),
        "/status/phase",
        json!("Succeeded"),
    );
    world.watch_pod(&ended);
    assert_eq!(world.pods("a"), (vec!["pod u".into()], true));
    assert_eq!(world.said(), Vec::<String>::new());

    let deletion = json!("2026-01-01T00:00:00Z");
    let deleted = pod("v", "b", 21, &["x"]);
    world.watch_pod(&with(deleted, "/metadata/deletionTimestamp", deletion));
    // Its node may still hold what it names: no digest is complete before that is known.
    assert_eq!(world.pods("b"), (vec!["pod v".into()], false));
    world.answer("x", "b", &answer("1", 5, 30));
    assert_eq!(world.set("b"), (vec!["pod v".into(), "x 1".into()], true));
}

#[test]
fn a_pod_that_ends_gives_its_references_back() {
    let mut world = World::new();
    world.watch_pod(&pod("u", "a", 20, &["x"]));
    world.answer("x", "a", &answer("1", 5, 30));
    world.watch_pod(&with(
        pod("u", "a", 31, &["x"]),
        "/status/phase",
        json!("Failed"),
    ));
    assert_eq!(world.set("a"), (vec!["pod u".into()], true));
    assert!(world.said().contains(&"unwatch x".to_owned()));
}

#[test]
fn a_mirror_pod_never_goes_down_but_is_seen() {
    let mut world = World::new();
    let mirror = json!({"kubernetes.io/config.mirror": "hash"});
    world.watch_pod(&with(
        pod("u", "a", 20, &["x"]),
        "/metadata/annotations",
        mirror,
    ));
    assert_eq!(world.set("a"), (vec![], true));
    assert_eq!(world.said(), Vec::<String>::new());
    assert_eq!(
        world.index.live(&node("a")).pods["u"].mirror.as_deref(),
        Some("hash")
    );
}

#[test]
fn an_ephemeral_container_s_references_are_read_before_it_goes_down() {
    let mut world = World::new();
    world.watch_pod(&pod("u", "a", 20, &[]));
    let first = world.index.desired(&node("a")).unwrap();
    let debug = json!([{"name": "d", "envFrom": [{"configMapRef": {"name": "x"}}]}]);
    world.watch_pod(&with(
        pod("u", "a", 21, &[]),
        "/spec/ephemeralContainers",
        debug,
    ));
    assert_eq!(world.said(), ["read x as a"]);
    let key = ObjectKey::pod("ns", "p-u", "u");
    let waiting = world.index.desired(&node("a")).unwrap();
    assert!(!waiting.complete);
    assert!(
        Arc::ptr_eq(&waiting.objects[&key], &first.objects[&key]),
        "the older one stays"
    );
    world.answer("x", "a", &answer("1", 5, 21));
    assert_ne!(
        world.index.desired(&node("a")).unwrap().objects[&key].object,
        first.objects[&key].object
    );
}

#[test]
fn a_status_of_the_edge_changes_its_view_and_not_its_set() {
    let mut world = World::new();
    world.watch_pod(&pod("u", "a", 20, &[]));
    let before = world.index.desired(&node("a")).unwrap();
    world.changed.clear();
    world.viewed.clear();
    let status = json!({"phase": "Running", "podIP": "10.0.0.1"});
    world.watch_pod(&with(pod("u", "a", 21, &[]), "/status", status.clone()));
    assert_eq!(
        (world.changed.len(), &world.viewed),
        (0, &[node("a")].into())
    );
    let key = ObjectKey::pod("ns", "p-u", "u");
    let after = world.index.desired(&node("a")).unwrap();
    assert!(Arc::ptr_eq(&before.objects[&key], &after.objects[&key]));
    let view = &world.index.live(&node("a")).pods["u"];
    assert_eq!((view.status(), &*view.resource_version), (status, "21"));
}

#[test]
fn a_pod_and_its_successor_of_the_same_name_are_two() {
    let mut world = World::new();
    let named = |uid, revision| {
        with(
            pod(uid, "a", revision, &[]),
            "/metadata/name",
            json!("web-0"),
        )
    };
    world.watch_pod(&named("u", 20));
    world.watch_pod(&named("v", 21));
    assert_eq!(world.pods("a").0, ["pod u", "pod v"]);
    world.index.remove_pod(&named("u", 22));
    assert_eq!(world.pods("a").0, ["pod v"]);
}

#[test]
fn only_a_whole_list_removes_and_a_watch_is_no_older_than_it() {
    let mut world = World::new();
    world.watch_pod(&pod("u", "a", 20, &[]));
    world.index.pod_list_begins(&Covered::All, 40);
    world.index.apply_pod(&pod("v", "a", 30, &[]), Origin::List);
    assert_eq!(
        world.pods("a").0,
        ["pod u", "pod v"],
        "a list that broke off removes nothing"
    );
    world.list_pods(40, &[pod("v", "a", 30, &[])]);
    assert_eq!(world.pods("a").0, ["pod v"]);
    world.watch_pod(&pod("w", "a", 39, &[]));
    world.index.remove_pod(&pod("v", "a", 39, &[]));
    assert_eq!(world.pods("a").0, ["pod v"], "old news");
    assert_eq!(world.index.marks().pods, 40);
}

#[test]
fn a_new_edge_node_is_not_complete_before_its_pods_were_listed() {
    let mut world = World::new();
    let names = [node("a"), node("b"), node("c")].into();
    assert_eq!(world.index.edge_nodes(&names), [node("c")].into());
    world.watch_pod(&pod("u", "c", 20, &[]));
    assert_eq!(world.set("c"), (vec![], false));
    world.watch_pod(&pod("v", "a", 21, &[]));
    let only_c = Covered::Nodes([node("c")].into());
    world.index.pod_list_begins(&only_c, 30);
    world.index.apply_pod(&pod("u", "c", 20, &[]), Origin::List);
    world.index.pod_list_ends(&only_c, 30);
    assert_eq!(world.pods("c"), (vec!["pod u".into()], true));
    assert_eq!(
        world.pods("a"),
        (vec!["pod v".into()], true),
        "not covered, not removed"
    );
    assert_eq!(
        world.index.marks().pods,
        21,
        "nor is anything claimed for it"
    );
}

#[test]
fn a_node_that_is_no_edge_any_more_is_forgotten() {
    let mut world = World::new();
    world.watch_pod(&pod("u", "a", 20, &["x"]));
    world.answer("x", "a", &answer("1", 5, 30));
    world.said();
    world.index.edge_nodes(&[node("b")].into());
    world.drain();
    assert_eq!(world.said(), ["unwatch x"]);
    assert!(
        world.index.desired(&node("a")).is_none(),
        "not an empty set, but none"
    );
    assert_eq!(
        (world.index.pods_held(), world.index.references_held()),
        (0, 0)
    );
    world.watch_pod(&pod("w", "a", 40, &[]));
    assert_eq!(world.index.pods_held(), 0);
}

#[test]
fn nothing_is_complete_before_every_feed_has_listed() {
    let mut index = Index::default();
    index.edge_nodes(&[node("a")].into());
    let complete = |index: &Index| index.desired(&node("a")).is_some_and(|d| d.complete);
    index.pod_list_begins(&Covered::All, 5);
    index.pod_list_ends(&Covered::All, 5);
    assert!(!complete(&index));
    index.service_list_ends(5);
    assert!(!complete(&index));
    index.node_list_ends(&Covered::All, 5);
    assert!(complete(&index));
}

#[test]
fn a_cluster_that_went_back_keeps_what_runs_and_reads_all_again() {
    let mut world = World::new();
    world.watch_pod(&pod("u", "a", 1000, &["x"]));
    world.answer("x", "a", &answer("of the future", 900, 1000));
    let old_watch = world.watch_ticket("x");
    world.said();
    world.list_pods(
        500,
        &[pod("u", "a", 400, &["x"]), pod("v", "a", 450, &["x"])],
    );
    assert_eq!(world.said(), ["unwatch x", "read x as a"]);
    assert_eq!(
        world.set("a"),
        (vec!["pod u".into(), "x of the future".into()], false)
    );
    world.index.observe(
        &config("x"),
        old_watch,
        &answer("of the old watch", 1100, 1100),
    );
    world.answer("x", "a", &answer("restored", 300, 510));
    assert_eq!(
        world.set("a"),
        (
            vec!["pod u".into(), "pod v".into(), "x restored".into()],
            true
        )
    );
    assert_eq!(world.said(), ["watch x as a from 510"]);
    assert_eq!(world.index.marks().pods, 500);
    world.watch_pod(&pod("w", "a", 505, &[]));
    assert_eq!(
        world.pods("a").0.len(),
        3,
        "events of the restored cluster count again"
    );
}

#[test]
fn nothing_is_complete_in_a_restored_cluster_before_it_was_seen_again() {
    let mut world = World::new();
    world.watch_pod(&pod("u", "a", 1000, &["x"]));
    world.answer("x", "a", &answer("of the future", 900, 1000));
    world.index.node_list_ends(&Covered::All, 1000);
    world.index.service_list_ends(1000);
    assert!(world.set("a").1);
    // The feed of Nodes is the first to notice.
    world.index.node_list_ends(&Covered::All, 500);
    assert!(world.index.take().list_again);
    world.list_pods(501, &[pod("u", "a", 400, &["x"])]);
    assert_eq!(
        world.index.marks(),
        Marks {
            pods: 501,
            nodes: 500,
            services: 0
        }
    );
    assert_eq!(
        world.set("a"),
        (vec!["pod u".into(), "x of the future".into()], false)
    );
    world.answer("x", "a", &answer("restored", 300, 510));
    assert!(!world.set("a").1, "Services are still those of the future");
    world.changed.clear();
    world.index.service_list_ends(502);
    world.drain();
    assert_eq!(
        world.set("a"),
        (vec!["pod u".into(), "x restored".into()], true)
    );
    assert!(world.changed.contains(&node("a")));
}

#[test]
fn a_malformed_pod_is_reported_and_the_others_go_on() {
    let mut world = World::new();
    world.watch_pod(&pod("u", "a", 20, &[]));
    world.watch_pod(&with(
        pod("u", "a", 21, &[]),
        "/metadata/resourceVersion",
        json!("?"),
    ));
    world.watch_pod(&with(
        pod("v", "a", 22, &[]),
        "/metadata/uid",
        json!("v/../x"),
    ));
    world.watch_pod(&json!(null));
    let odd = json!([{"name": "not a name,"}]);
    world.watch_pod(&with(pod("w", "a", 23, &[]), "/spec/imagePullSecrets", odd));
    assert_eq!(
        world.pods("a"),
        (vec!["pod u".into(), "pod w".into()], true)
    );
    assert_eq!(world.malformed.len(), 4);
    assert_eq!(world.malformed[3].name, "p-w");
    // A list that holds it, malformed or not, does not remove it.
    let odd = with(
        pod("u", "a", 21, &[]),
        "/metadata/resourceVersion",
        json!("?"),
    );
    world.list_pods(40, &[odd]);
    assert_eq!(world.pods("a").0, ["pod u"]);
}

#[test]
fn a_node_gets_its_own_node_object_and_no_other() {
    let mut world = World::new();
    let object = |name: &str, label: &str, revision: u64| {
        json!({"metadata": {"name": name, "labels": {"l": label},
                            "resourceVersion": revision.to_string()}, "spec": {}})
    };
    world.index.apply_node(&object("a", "1", 20), Origin::Watch);
    world.index.apply_node(&object("c", "1", 21), Origin::Watch);
    world.drain();
    assert_eq!(world.changed, [node("a")].into());
    assert_eq!(
        world.set("a").0,
        [r#"a {"metadata":{"labels":{"l":"1"},"name":"a"},"spec":{}}"#]
    );
    assert!(world.set("b").0.is_empty());
    world.changed.clear();
    world.index.apply_node(&object("a", "1", 22), Origin::Watch);
    world.drain();
    assert!(world.changed.is_empty(), "a heartbeat is no change");
    // Listed by itself at 40: the watch comes there later.
    world.index.node_list_begins();
    world.index.apply_node(&object("a", "2", 35), Origin::List);
    world
        .index
        .node_list_ends(&Covered::Nodes([node("a")].into()), 40);
    world.index.apply_node(&object("a", "1", 30), Origin::Watch);
    world.index.remove_node(&object("a", "1", 31));
    assert_eq!(
        world.set("a").0,
        [r#"a {"metadata":{"labels":{"l":"2"},"name":"a"},"spec":{}}"#]
    );
    let listed = world.index.desired(&node("a")).unwrap().listed;
    assert_eq!(
        (listed, world.index.marks().nodes),
        (Listed { pods: 10, node: 40 }, 10)
    );
    world.index.node_list_begins();
    world.index.node_list_ends(&Covered::All, 50);
    assert!(world.set("a").0.is_empty());
}

#[test]
fn a_reference_that_stays_refused_is_reported_on_each_pod_that_waits() {
    let mut world = World::new();
    world.watch_pod(&pod("u", "a", 20, &["x"]));
    world.watch_pod(&pod("v", "a", 21, &["x", "y"]));
    world.watch_pod(&pod("w", "a", 22, &["y"]));
    world.index.stuck(&config("x"), &node("a"));
    world.drain();
    let names: Vec<&str> = world.malformed.iter().map(|m| m.name.as_str()).collect();
    assert_eq!(names, ["p-u", "p-v"]);
    assert!(world.malformed[0].message.contains("ConfigMap/ns/x"));
}

fn service(namespace: &str, name: &str, ip: &str) -> Value {
    json!({"metadata": {"namespace": namespace, "name": name, "resourceVersion": "20"},
           "spec": {"clusterIP": ip, "ports": [{"port": 80}]}})
}

#[test]
fn services_come_by_namespace_in_use_and_kubernetes_always() {
    let mut world = World::new();
    for s in [
        service("ns", "web", "10.0.0.2"),
        service("ns", "db", "10.0.0.3"),
        service("ns", "headless", "None"),
        service("other", "x", "10.0.0.4"),
        service("default", "kubernetes", "10.0.0.1"),
        service("default", "y", "10.0.0.5"),
    ] {
        world.index.apply_service(&s, Origin::Watch);
    }
    world.watch_pod(&pod("u", "a", 21, &[]));
    let services = |world: &World, on: &str| -> Vec<(String, Vec<String>)> {
        let desired = world.index.desired(&node(on)).unwrap();
        let lists = desired
            .objects
            .values()
            .filter(|v| v.object.key.kind == Kind::Services);
        lists
            .map(|v| {
                let Content::Present(bytes) = &v.object.content else {
                    panic!("a list of Services is never absent");
                };
                let lines: Vec<Value> = serde_json::from_slice(bytes).unwrap();
                let names = lines
                    .iter()
                    .map(|l| l["name"].as_str().unwrap().into())
                    .collect();
                (v.object.key.namespace.to_string(), names)
            })
            .collect()
    };
    let list = |ns: &str, names: &[&str]| {
        (
            ns.to_owned(),
            names.iter().map(|n| n.to_string()).collect::<Vec<_>>(),
        )
    };
    assert_eq!(
        services(&world, "a"),
        [list("default", &["kubernetes"]), list("ns", &["db", "web"])]
    );
    assert_eq!(services(&world, "b"), [list("default", &["kubernetes"])]);

    let in_default = with(
        pod("v", "b", 22, &[]),
        "/metadata/namespace",
        json!("default"),
    );
    world.watch_pod(&in_default);
    assert_eq!(
        services(&world, "b"),
        [list("default", &["kubernetes", "y"])]
    );

    world.changed.clear();
    world.index.remove_service(&service("ns", "db", "10.0.0.3"));
    world.drain();
    assert_eq!(world.changed, [node("a")].into());
    world.changed.clear();
    world
        .index
        .apply_service(&service("other", "z", "10.0.0.9"), Origin::Watch);
    world.drain();
    assert!(world.changed.is_empty(), "nobody uses that namespace");

    world.index.service_list_begins();
    world
        .index
        .apply_service(&service("default", "kubernetes", "10.0.0.1"), Origin::List);
    world.index.service_list_ends(30);
    assert_eq!(
        services(&world, "a"),
        [list("default", &["kubernetes"]), list("ns", &[])]
    );
}

#[test]
fn all_that_a_node_s_pods_name_can_be_read_once_more() {
    let mut world = World::new();
    world.watch_pod(&pod("u", "a", 20, &["x"]));
    world.watch_pod(&pod("v", "b", 21, &["y"]));
    world.answer("x", "a", &answer("1", 5, 30));
    world.said();
    assert_eq!(world.index.read_again(&node("a")), [config("x")]);
    world.drain();
    assert_eq!(world.said(), ["read x as a"]);
    world.answer("x", "a", &answer("2", 31, 40));
    assert_eq!(world.set("a").0, ["pod u", "x 2"]);
}
