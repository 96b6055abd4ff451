use std::time::Duration;

use rcgen::{CertificateParams, DnType, KeyPair};
use rustls_pki_types::UnixTime;

use super::*;
use crate::pki::{Ca, NodeKey, Validity};

type Change<'a> = &'a dyn Fn(&mut CertificateParams);

const DAY: u64 = 86_400;

fn at(seconds: u64) -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_secs(seconds))
}

fn days(from: u64, count: u64) -> Validity {
    Validity::starting(at(from * DAY), Duration::from_secs(count * DAY))
}

fn cluster() -> ClusterId {
    ClusterId::parse("c1").expect("label")
}

fn node() -> NodeName {
    NodeName::parse("shop-7").expect("name")
}

fn ca() -> Ca {
    Ca::generate(&cluster(), days(19_000, 3650)).expect("root")
}

#[test]
fn a_signed_request_names_the_node_that_the_cloud_chose() {
    let (ca, key) = (ca(), NodeKey::generate().expect("key"));
    let request = key.request().expect("request");
    let validity = days(20_000, 90);
    let chain = ca
        .sign_node_csr(&request, &node(), &cluster(), validity)
        .expect("signed");
    let identity = NodeIdentity::from_certificate(&chain[0]).expect("identity");
    assert_eq!(identity.node, node());
    assert_eq!(identity.cluster, cluster());
    assert_eq!(identity.key_id, key.id());
    assert_eq!(identity.not_before, validity.not_before);
    assert_eq!(identity.not_after, validity.not_after);
    let renewed = ca
        .sign_node_csr(&request, &node(), &cluster(), validity)
        .expect("signed");
    let renewed = NodeIdentity::from_certificate(&renewed[0]).expect("identity");
    assert_ne!(
        renewed.serial, identity.serial,
        "each certificate has its own serial number"
    );
}

#[test]
fn nothing_but_the_key_is_taken_from_a_request() {
    let key = KeyPair::generate().expect("key");
    let mut wish = CertificateParams::new(vec!["cloudcore.c1".to_owned()]).expect("params");
    wish.distinguished_name
        .push(DnType::CommonName, "system:admin");
    wish.distinguished_name
        .push(DnType::OrganizationName, "system:masters");
    wish.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
    wish.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
    let request = wish.serialize_request(&key).expect("request");
    let chain = ca()
        .sign_node_csr(request.der(), &node(), &cluster(), days(20_000, 1))
        .expect("signed");
    // Strict reading proves each field: subject, alternative name, usages, no CA.
    let identity = NodeIdentity::from_certificate(&chain[0]).expect("identity");
    assert_eq!(identity.node, node());
}

#[test]
fn only_the_exact_form_is_an_identity() {
    let ca = ca();
    let server = ca
        .issue_server(&cluster(), days(20_000, 1), &[])
        .expect("server");
    for (what, der) in [("server", &server.chain[0]), ("root", ca.certificate())] {
        assert!(
            matches!(
                NodeIdentity::from_certificate(der),
                Err(PkiError::NotANode(_))
            ),
            "{what}"
        );
    }
    let key = KeyPair::generate().expect("key");
    let build = |change: Change<'_>| {
        let mut p = CertificateParams::default();
        p.distinguished_name = rcgen::DistinguishedName::new();
        p.distinguished_name
            .push(DnType::OrganizationName, "system:nodes");
        p.distinguished_name
            .push(DnType::CommonName, "system:node:shop-7");
        let uri = "edge://c1/shop-7".to_owned().try_into().expect("uri");
        p.subject_alt_names = vec![rcgen::SanType::URI(uri)];
        p.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
        change(&mut p);
        p.self_signed(&key).expect("signed").der().clone()
    };
    assert!(NodeIdentity::from_certificate(&build(&|_| ())).is_ok());
    let set_cn = |cn: &'static str| {
        move |p: &mut CertificateParams| {
            p.distinguished_name.remove(DnType::CommonName);
            p.distinguished_name.push(DnType::CommonName, cn);
        }
    };
    let set_uri = |uri: &'static str| {
        move |p: &mut CertificateParams| {
            let uri = uri.to_owned().try_into().expect("uri");
            p.subject_alt_names = vec![rcgen::SanType::URI(uri)];
        }
    };
    let table: [(&str, Change<'_>); 8] = [
        ("another user", &set_cn("system:admin")),
        ("a bad name", &set_cn("system:node:Shop")),
        ("another name in the URI", &set_uri("edge://c1/shop-8")),
        ("another scheme", &set_uri("spiffe://c1/shop-7")),
        ("a country as well", &|p| {
            p.distinguished_name.push(DnType::CountryName, "DE")
        }),
        ("two URIs", &|p| {
            let uri = p.subject_alt_names[0].clone();
            p.subject_alt_names.push(uri);
        }),
        ("a server as well", &|p| {
            p.insert_extended_key_usage(rcgen::ExtendedKeyUsagePurpose::ServerAuth);
        }),
        ("no usage", &|p| p.extended_key_usages.clear()),
    ];
    for (what, change) in table {
        assert!(
            NodeIdentity::from_certificate(&build(change)).is_err(),
            "{what}"
        );
    }
    assert!(NodeIdentity::from_certificate(b"").is_err());
    assert!(NodeIdentity::from_certificate(&[0; 20_000]).is_err());
}

#[test]
fn a_root_survives_its_secret_and_refuses_another_key() {
    let (one, other) = (ca(), ca());
    let again = Ca::from_pem(&one.to_pem()).expect("read back");
    assert_eq!(again.pin(), one.pin());
    assert_eq!(again.certificate(), one.certificate());
    let mut mixed = one.to_pem();
    mixed.key = other.to_pem().key;
    assert!(matches!(Ca::from_pem(&mixed), Err(PkiError::KeyMismatch)));
    let debug = format!("{:?} {:?}", one.to_pem(), one);
    assert!(!debug.contains("PRIVATE"), "{debug}");
}

#[test]
fn an_expired_certificate_gets_a_new_one_within_the_grace() {
    let (ca, key) = (ca(), NodeKey::generate().expect("key"));
    let request = key.request().expect("request");
    let chain = ca
        .sign_node_csr(&request, &node(), &cluster(), days(20_000, 90))
        .expect("signed");
    let roots = [ca.certificate().clone()];
    let grace = Duration::from_secs(180 * DAY);
    let check = |der: &[u8], key, roots: &[CertificateDer<'_>], cluster: &ClusterId, day: u64| {
        check_reenrolment(der, key, roots, cluster, at(day * DAY), grace)
    };
    let shown = &chain[0];
    assert!(
        check(shown, key.id(), &roots, &cluster(), 20_091).is_ok(),
        "just expired"
    );
    assert!(
        check(shown, key.id(), &roots, &cluster(), 20_010).is_ok(),
        "not yet expired"
    );
    assert!(
        check(shown, key.id(), &roots, &cluster(), 20_270).is_ok(),
        "the last day"
    );
    assert!(matches!(
        check(shown, key.id(), &roots, &cluster(), 20_272),
        Err(ReenrolError::TooLong { days: 182, .. })
    ));
    assert!(matches!(
        check(shown, KeyId([0; 32]), &roots, &cluster(), 20_091),
        Err(ReenrolError::OtherKey)
    ));
    let stranger = [super::tests::ca().certificate().clone()];
    assert!(matches!(
        check(shown, key.id(), &stranger, &cluster(), 20_091),
        Err(ReenrolError::Untrusted(_))
    ));
    let other = ClusterId::parse("c2").expect("label");
    assert!(matches!(
        check(shown, key.id(), &roots, &other, 20_091),
        Err(ReenrolError::OtherCluster { .. })
    ));
}
