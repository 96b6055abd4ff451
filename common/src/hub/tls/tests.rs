use std::time::Duration;

use super::*;
use crate::pki::{Ca, Validity};

const DAY: u64 = 86_400;

fn at(day: u64) -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_secs(day * DAY))
}

fn days(from: u64, count: u64) -> Validity {
    Validity::starting(at(from), Duration::from_secs(count * DAY))
}

fn cluster(id: &str) -> ClusterId {
    ClusterId::parse(id).expect("label")
}

/// What is judged, by whom, when, what is shown, and the first word of the verdict.
type Case<'a> = (
    &'a str,
    Trust,
    Clock,
    &'a [CertificateDer<'static>],
    Result<(), &'a str>,
);

fn judged(trust: Trust, clock: Clock, chain: &[CertificateDer<'static>]) -> Result<(), TrustError> {
    let tls = ClientTls::new(trust, &cluster("c1"), clock, None).expect("config");
    let name = ServerName::try_from("dialled.example").expect("name");
    let answer = tls
        .judge
        .verify_server_cert(&chain[0], &chain[1..], &name, &[], UnixTime::now());
    match (answer, tls.verdict()) {
        (Ok(_), None) => Ok(()),
        (Err(_), Some(error)) => Err(error),
        (answer, verdict) => panic!("{answer:?} and {verdict:?} disagree"),
    }
}

#[test]
fn the_server_is_judged_by_root_name_and_the_clock_at_hand() {
    let ca = Ca::generate(&cluster("c1"), days(19_000, 3650)).expect("root");
    let other = Ca::generate(&cluster("c1"), days(19_000, 3650)).expect("root");
    let chain = ca
        .issue_server(&cluster("c1"), days(20_000, 100), &[])
        .expect("server")
        .chain;
    let renamed = ca
        .issue_server(&cluster("c2"), days(20_000, 100), &[])
        .expect("server")
        .chain;
    let proxy = other
        .issue_server(&cluster("c9"), days(20_000, 100), &[])
        .expect("server")
        .chain;
    let ours = || Trust::Roots(vec![ca.certificate().clone()]);
    let theirs = || Trust::Roots(vec![other.certificate().clone()]);
    let both = || Trust::Roots(vec![other.certificate().clone(), ca.certificate().clone()]);
    let on = |day| Clock::Synchronised(at(day));
    let lost = |day: Option<u64>| Clock::Unsynchronised(day.map(at));
    let table: [Case<'_>; 15] = [
        ("in time", ours(), on(20_050), &chain, Ok(())),
        ("one of two anchors", both(), on(20_050), &chain, Ok(())),
        (
            "the pin of our root",
            Trust::Pins(vec![ca.pin()]),
            lost(None),
            &chain,
            Ok(()),
        ),
        ("too late", ours(), on(20_101), &chain, Err("Expired")),
        ("too early", ours(), on(19_999), &chain, Err("NotYetValid")),
        ("no clock and no memory", ours(), lost(None), &chain, Ok(())),
        (
            "no clock, certificate younger than memory",
            ours(),
            lost(Some(19_500)),
            &chain,
            Ok(()),
        ),
        (
            "no clock, memory within",
            ours(),
            lost(Some(20_050)),
            &chain,
            Ok(()),
        ),
        (
            "no clock, ended before memory",
            ours(),
            lost(Some(20_200)),
            &chain,
            Err("Expired"),
        ),
        ("another CA", theirs(), on(20_050), &chain, Err("OtherRoot")),
        ("a proxy", ours(), on(20_050), &proxy, Err("Intercepted")),
        (
            "our root, another name",
            ours(),
            on(20_050),
            &renamed,
            Err("OtherName"),
        ),
        (
            "another pin",
            Trust::Pins(vec![other.pin()]),
            lost(None),
            &chain,
            Err("PinMismatch"),
        ),
        (
            "a proxy at join",
            Trust::Pins(vec![ca.pin()]),
            lost(None),
            &proxy,
            Err("Intercepted"),
        ),
        (
            "our pin, another name",
            Trust::Pins(vec![ca.pin()]),
            lost(None),
            &renamed,
            Err("OtherName"),
        ),
    ];
    for (what, trust, clock, chain, expected) in table {
        let found = judged(trust, clock, chain);
        match expected {
            Ok(()) => assert_eq!(found, Ok(()), "{what}"),
            Err(word) => {
                let text = format!("{:?}", found.expect_err(what));
                assert!(text.starts_with(word), "{what}: {text}");
            }
        }
    }
}

#[test]
fn a_device_that_knows_only_the_old_root_believes_the_cross_signed_new_one() {
    let old = Ca::generate(&cluster("c1"), days(15_000, 9_000)).expect("root");
    let new = Ca::generate(&cluster("c1"), days(20_000, 3650)).expect("root");
    let cross = old.cross_sign(&new, days(20_000, 3650)).expect("cross");
    let server = new
        .issue_server(&cluster("c1"), days(20_010, 100), &[cross])
        .expect("server");
    let on = Clock::Synchronised(at(20_050));
    for root in [&old, &new] {
        let anchors = Trust::Roots(vec![root.certificate().clone()]);
        assert_eq!(judged(anchors, on, &server.chain), Ok(()));
    }
    let plain = new
        .issue_server(&cluster("c1"), days(20_010, 100), &[])
        .expect("server");
    let anchors = Trust::Roots(vec![old.certificate().clone()]);
    assert_eq!(
        judged(anchors, on, &plain.chain),
        Err(TrustError::OtherRoot)
    );
}

#[test]
fn a_pinned_root_that_did_not_sign_the_leaf_is_not_enough() {
    // A thief shows our public root beside a leaf of its own.
    let ca = Ca::generate(&cluster("c1"), days(19_000, 3650)).expect("root");
    let thief = Ca::generate(&cluster("c1"), days(19_000, 3650)).expect("root");
    let mut chain = thief
        .issue_server(&cluster("c1"), days(20_000, 100), &[])
        .expect("server")
        .chain;
    chain.push(ca.certificate().clone());
    let found = judged(
        Trust::Pins(vec![ca.pin()]),
        Clock::Unsynchronised(None),
        &chain,
    );
    assert_eq!(found, Err(TrustError::OtherRoot));
}
