//! A cluster's client CA and its API server, for the tests.

use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Frame;
use kube::Client;
use kube::client::Body;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use crate::kube::fake::FakeApi;

pub(super) struct ClientRoot {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

pub(super) type Identity = (CertificateDer<'static>, PrivateKeyDer<'static>);

impl ClientRoot {
    pub(super) fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = named("clients", &[]);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).unwrap().pem();
        Self {
            issuer: Issuer::new(params, key),
            pem,
        }
    }

    pub(super) fn pem(&self) -> String {
        self.pem.clone()
    }

    pub(super) fn client(&self, name: &str, groups: &[&str]) -> Identity {
        self.issue(named(name, groups), ExtendedKeyUsagePurpose::ClientAuth)
    }

    pub(super) fn server(&self, name: &str) -> Identity {
        self.issue(named(name, &[]), ExtendedKeyUsagePurpose::ServerAuth)
    }

    fn issue(&self, mut params: CertificateParams, usage: ExtendedKeyUsagePurpose) -> Identity {
        params.extended_key_usages = vec![usage];
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let key = PrivatePkcs8KeyDer::from(key.serialize_der());
        (certificate.der().clone(), key.into())
    }
}

fn named(name: &str, groups: &[&str]) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    for group in groups {
        params
            .distinguished_name
            .push(DnType::OrganizationName, *group);
    }
    params
}

type Events = mpsc::UnboundedReceiver<Value>;
type Answer = Response<UnsyncBoxBody<Bytes, Box<dyn std::error::Error + Send + Sync>>>;

/// The API server in memory with watches, which stay open: the first of them says `events`. It has
/// subresources and an empty list of Services.
pub(super) fn watching(fake: &FakeApi, events: Events) -> Client {
    let (client, events) = (fake.client(), Arc::new(Mutex::new(Some(events))));
    let service = tower::service_fn(move |request: Request<Body>| {
        let (client, events) = (client.clone(), events.clone());
        async move {
            let uri = request.uri().clone();
            let answer = if uri.query().is_some_and(|q| q.contains("watch=")) {
                said(events.lock().unwrap().take())
            } else if uri.path().ends_with("/services") {
                let none = json!({"metadata": {"resourceVersion": "1"}, "items": []});
                let none = Full::new(Bytes::from(none.to_string()));
                Response::new(none.map_err(Into::into).boxed_unsync())
            } else {
                let whole = uri.to_string().replace("/status?", "?");
                let (mut parts, body) = request.into_parts();
                parts.uri = whole.parse().unwrap();
                let answer = client.send(Request::from_parts(parts, body)).await;
                answer
                    .unwrap()
                    .map(|body| body.map_err(Into::into).boxed_unsync())
            };
            Ok::<_, Infallible>(answer)
        }
    });
    Client::new(service, "default")
}

fn said(events: Option<Events>) -> Answer {
    let lines = futures::stream::unfold(events, |mut events| async move {
        let next = match &mut events {
            Some(events) => events.recv().await,
            None => None,
        };
        let Some(event) = next else {
            return std::future::pending().await;
        };
        let line = Frame::data(Bytes::from(format!("{event}\n")));
        Some((Ok::<_, Infallible>(line), events))
    });
    let lines = StreamBody::new(lines).map_err(Into::into);
    Response::new(lines.boxed_unsync())
}
