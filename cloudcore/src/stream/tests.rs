//! The endpoint as the API server and strangers meet it: TLS on the loopback, a scripted API server
//! for the reviews, and a device at the other end of a real hub connection.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use common::hub::dial::{DialOptions, Preference, Target as DialTarget, dial};
use common::hub::listen::{self, Accepted, Limits, ListenConfig};
use common::hub::proto::StreamKind;
use common::hub::tls::{ClientIdentity, Clock, ServerTls, Trust};
use common::hub::transport::{Connection, Duplex, LinkConfig};
use common::ids::NodeName;
use common::pki::token::Endpoint as DialEndpoint;
use common::pki::{Ca, ClusterId, NodeKey, Validity};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty, Full, combinators::UnsyncBoxBody};
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use kube::Client;
use kube::client::Body;
use rustls::pki_types::{ServerName, UnixTime};
use rustls::{ClientConfig, RootCertStore};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, mpsc};
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::auth::{Auth, ClientCa, Reviews};
use super::metrics::{Metrics, Reason};
use super::server::Server;
use super::serving::ServingTls;
use super::testing::{ClientRoot, Identity};
use super::tunnel::Tunnels;
use crate::hub::registry::Registry;

const HOUR: Duration = Duration::from_secs(3600);

/// What a test waits for at most.
async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    let done = tokio::time::timeout(Duration::from_secs(10), future).await;
    done.unwrap_or_else(|_| panic!("{what} took more than 10 s"))
}

fn node() -> NodeName {
    NodeName::parse("shop-7").unwrap()
}

fn hour() -> Validity {
    Validity::starting(UnixTime::now(), HOUR)
}

/// An API server that reviews: `admin` may all, `scraper` may read metrics, `reader` may get
/// `nodes/proxy`, others nothing; token `good` is the scraper's.
#[derive(Clone, Default)]
struct Judge {
    asked: Arc<Mutex<Vec<Value>>>,
    down: Arc<Mutex<bool>>,
}

impl Judge {
    fn client(&self) -> Client {
        let judge = self.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let judge = judge.clone();
            async move { Ok::<_, Infallible>(judge.answer(request).await) }
        });
        Client::new(service, "default")
    }

    async fn answer(&self, request: Request<Body>) -> Response<Body> {
        let kind = request.uri().path().rsplit('/').next().unwrap().to_owned();
        let body = request.into_body().collect().await.unwrap().to_bytes();
        let mut review: Value = serde_json::from_slice(&body).unwrap();
        self.asked.lock().unwrap().push(review.clone());
        if *self.down.lock().unwrap() {
            let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {},
                "status": "Failure", "message": "no quorum", "reason": "Forbidden", "code": 403});
            let answer = Response::builder().status(403);
            return answer
                .body(Body::from(status.to_string().into_bytes()))
                .unwrap();
        }
        review["status"] = match &*kind {
            "tokenreviews" if review["spec"]["token"] == "good" => json!({"authenticated": true,
                "user": {"username": "scraper", "uid": "u", "extra": {"k": ["v"]}}}),
            "tokenreviews" => json!({"authenticated": false}),
            _ => json!({"allowed": Self::may(&review["spec"])}),
        };
        Response::new(Body::from(review.to_string().into_bytes()))
    }

    fn may(spec: &Value) -> bool {
        let asked = &spec["resourceAttributes"];
        assert_eq!(
            (&asked["resource"], &asked["name"]),
            (&json!("nodes"), &json!("shop-7"))
        );
        match spec["user"].as_str().unwrap() {
            "admin" => true,
            "scraper" => asked["subresource"] == "metrics" && asked["verb"] == "get",
            "reader" => asked["subresource"] == "proxy" && asked["verb"] == "get",
            _ => false,
        }
    }

    fn count(&self) -> usize {
        self.asked.lock().unwrap().len()
    }
}

/// A device: what it was asked, and an answer for each path.
struct Edge {
    connection: Connection,
    asked: mpsc::UnboundedReceiver<(Method, String, HeaderMap, String)>,
    /// An exec's stream has ended at the device.
    ended: Arc<Notify>,
    _task: AbortOnDropHandle<()>,
}

fn edge(connection: Connection) -> Edge {
    let (tell, asked) = mpsc::unbounded_channel();
    let ended = Arc::new(Notify::new());
    let (accepting, at_end) = (connection.clone(), ended.clone());
    let task = tokio::spawn(async move {
        while let Ok(incoming) = accepting.accept().await {
            assert_eq!(incoming.head.kind(), StreamKind::StreamTunnel);
            let principal = incoming.head.tunnel.unwrap().principal;
            let (tell, ended) = (tell.clone(), at_end.clone());
            let service = service_fn(move |request| {
                let _ = tell.send((
                    Method::clone(Request::method(&request)),
                    Request::uri(&request).to_string(),
                    HeaderMap::clone(Request::headers(&request)),
                    principal.clone(),
                ));
                device_answer(request, ended.clone())
            });
            let stream = TokioIo::new(Duplex::new(incoming.send, incoming.recv));
            let serving = hyper::server::conn::http1::Builder::new()
                .serve_connection(stream, service)
                .with_upgrades();
            tokio::spawn(serving);
        }
    });
    Edge {
        connection,
        asked,
        ended,
        _task: AbortOnDropHandle::new(task),
    }
}

/// A stolen device: it shows a page, and says `101` to whatever else it is asked.
fn stolen(connection: Connection) -> AbortOnDropHandle<()> {
    const PAGE: &[u8] =
        b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 8\r\n\r\n<script>";
    const SWITCHED: &[u8] =
        b"HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: SPDY/3.1\r\n\r\n";
    AbortOnDropHandle::new(tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok(incoming) = connection.accept().await {
            let mut stream = Duplex::new(incoming.send, incoming.recv);
            let mut head = [0; 1024];
            let length = stream.read(&mut head).await.unwrap();
            let page = head[..length].starts_with(b"GET /stats/summary");
            let answer = if page { PAGE } else { SWITCHED };
            stream.write_all(answer).await.unwrap();
            stream.flush().await.unwrap();
            held.push(stream);
        }
    }))
}

type DeviceAnswer = Response<UnsyncBoxBody<Bytes, Infallible>>;

async fn device_answer(
    mut request: Request<Incoming>,
    ended: Arc<Notify>,
) -> Result<DeviceAnswer, Infallible> {
    let said = |text: &'static str| Full::new(Bytes::from(text)).boxed_unsync();
    let path = request.uri().path().to_owned();
    if path.ends_with("/busy") {
        let answer = Response::builder().status(StatusCode::SERVICE_UNAVAILABLE);
        return Ok(answer.body(said("the runtime is away")).unwrap());
    }
    if path.starts_with("/exec/") {
        let upgrade = hyper::upgrade::on(&mut request);
        tokio::spawn(async move {
            let Ok(upgraded) = upgrade.await else {
                return;
            };
            let mut stream = TokioIo::new(upgraded);
            let mut buffer = [0; 1024];
            while let Ok(length @ 1..) = stream.read(&mut buffer).await {
                if stream.write_all(&buffer[..length]).await.is_err() {
                    break;
                }
            }
            ended.notify_one();
        });
        let answer = Response::builder()
            .status(StatusCode::SWITCHING_PROTOCOLS)
            .header("connection", "Upgrade")
            .header("upgrade", "SPDY/3.1")
            .header("x-stream-protocol-version", "v5.channel.k8s.io")
            .body(said(""));
        return Ok(answer.unwrap());
    }
    if path.starts_with("/containerLogs/") {
        // A log that is followed and says nothing more.
        let first = futures::stream::once(async {
            Ok::<_, Infallible>(hyper::body::Frame::data(Bytes::from("line\n")))
        });
        let guard = Guard(ended);
        let rest = futures::stream::poll_fn(move |_| {
            let _ = &guard;
            std::task::Poll::Pending
        });
        let body = http_body_util::StreamBody::new(futures::StreamExt::chain(first, rest));
        return Ok(Response::new(body.boxed_unsync()));
    }
    let answer = Response::builder()
        .header("content-type", "application/json")
        .header("set-cookie", "a=b")
        .body(said("{\"items\":[]}"));
    Ok(answer.unwrap())
}

/// Says that the log's body was dropped.
struct Guard(Arc<Notify>);

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.notify_one();
    }
}

struct Bed {
    root: ClientRoot,
    judge: Judge,
    registry: Registry,
    metrics: Metrics,
    ca: Ca,
    address: SocketAddr,
    mistrusted: Arc<Notify>,
    task: AbortOnDropHandle<()>,
}

fn cluster() -> ClusterId {
    ClusterId::parse("c1").unwrap()
}

impl Bed {
    async fn start() -> Self {
        let (root, judge, registry) = (ClientRoot::new(), Judge::default(), Registry::default());
        let metrics = Metrics::default();
        let ca = Ca::generate(&cluster(), hour()).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let credentials = ca.issue_endpoint(&cluster(), address.ip(), hour()).unwrap();
        let (tls, mistrusted) = ServingTls::fixed(&credentials);
        let auth = Auth::new(ClientCa::fixed(&root.pem()), Reviews::new(judge.client()));
        let tunnels = Tunnels::new(registry.clone(), metrics.clone());
        let server = Arc::new(Server::new(tls, auth, tunnels, metrics.clone()));
        let listening = server.listen(node(), listener, CancellationToken::new());
        let task = AbortOnDropHandle::new(tokio::spawn(listening));
        Self {
            root,
            judge,
            registry,
            metrics,
            ca,
            address,
            mistrusted,
            task,
        }
    }

    /// A session of the node over a real hub.
    async fn device(&self) -> (Edge, CancellationToken) {
        let (device, stop) = self.session().await;
        (edge(device), stop)
    }

    async fn session(&self) -> (Connection, CancellationToken) {
        let server = self.ca.issue_server(&cluster(), hour(), &[]).unwrap();
        let tls = ServerTls::new(&server, &[self.ca.certificate().clone()]).unwrap();
        let config = ListenConfig {
            address: ([127, 0, 0, 1], 0).into(),
            link: LinkConfig::default(),
            limits: Limits::default(),
            reset_key: [7; 32],
        };
        let (mut listener, task) = listen::bind(config, tls).await.unwrap();
        let stop = CancellationToken::new();
        tokio::spawn(task.run(stop.clone()));
        let key = NodeKey::generate().unwrap();
        let request = key.request().unwrap();
        let chain = self.ca.sign_node_csr(&request, &node(), &cluster(), hour());
        let identity = ClientIdentity {
            chain: chain.unwrap(),
            key: key.private_key(),
        };
        let at = listener.address();
        let target = DialTarget {
            endpoints: vec![DialEndpoint::new(&at.ip().to_string(), at.port())],
            cluster: cluster(),
            trust: Trust::Roots(vec![self.ca.certificate().clone()]),
        };
        let options = DialOptions {
            preference: Preference::Quic,
            ..DialOptions::new(Clock::Synchronised(UnixTime::now()))
        };
        let (device, accepted) =
            tokio::join!(dial(&target, &identity, &options), listener.accept());
        let Some(Accepted::Session(connection)) = accepted else {
            panic!("no session came");
        };
        self.registry.enter(node(), connection, 0);
        (device.unwrap(), stop)
    }

    async fn connect(&self, identity: Option<Identity>) -> Asker {
        let mut roots = RootCertStore::empty();
        roots.add(self.ca.certificate().clone()).unwrap();
        self.connect_trusting(roots, identity).await.unwrap()
    }

    async fn connect_trusting(
        &self,
        roots: RootCertStore,
        identity: Option<Identity>,
    ) -> std::io::Result<Asker> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
        let config = match identity {
            Some((leaf, key)) => config.with_client_auth_cert(vec![leaf], key).unwrap(),
            None => config.with_no_client_auth(),
        };
        let name = ServerName::from(self.address.ip());
        let stream = TcpStream::connect(self.address).await?;
        let stream = TlsConnector::from(Arc::new(config))
            .connect(name, stream)
            .await?;
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .unwrap();
        let driver = tokio::spawn(async move {
            let _ = connection.with_upgrades().await;
        });
        Ok(Asker {
            sender,
            driver: AbortOnDropHandle::new(driver),
        })
    }

    async fn as_user(&self, name: &str) -> Asker {
        self.connect(Some(self.root.client(name, &["dev"]))).await
    }

    fn refused(&self, reason: Reason) -> u64 {
        self.metrics.numbers().refused[&reason]
    }

    async fn all_closed(&self) {
        soon("closing all tunnels", async {
            while self.metrics.numbers().open > 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
    }
}

/// Whoever dials the endpoint.
struct Asker {
    sender: SendRequest<Empty<Bytes>>,
    driver: AbortOnDropHandle<()>,
}

impl Asker {
    async fn send(&mut self, request: http::request::Builder) -> Response<Incoming> {
        let request = request.body(Empty::new()).unwrap();
        soon("an answer", self.sender.send_request(request))
            .await
            .unwrap()
    }

    async fn get(&mut self, path: &str) -> (StatusCode, String) {
        let answer = self.send(Request::get(path)).await;
        let status = answer.status();
        let body = answer.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }
}

fn exec() -> http::request::Builder {
    Request::post("/exec/default/web-0/main?command=sh&input=1&output=1")
        .header("connection", "Upgrade")
        .header("upgrade", "SPDY/3.1")
        .header("x-stream-protocol-version", "v5.channel.k8s.io")
}

#[tokio::test]
async fn whoever_shows_nothing_or_something_wrong_is_not_known() {
    let bed = Bed::start().await;
    let (_edge, _stop) = bed.device().await;
    let (status, words) = bed.connect(None).await.get("/pods").await;
    assert_eq!(
        (status, &*words),
        (StatusCode::UNAUTHORIZED, "Unauthorized\n")
    );
    // Of another CA, with the most powerful of names: an answer, not a broken handshake.
    let forged = ClientRoot::new().client("admin", &["system:masters"]);
    let (status, _) = bed.connect(Some(forged)).await.get("/pods").await;
    assert_eq!(status, StatusCode::UNAUTHORIZED);
    let request = || Request::get("/metrics").header("authorization", "Bearer bad");
    for _ in 0..3 {
        let mut stranger = bed.connect(None).await;
        let answer = stranger.send(request()).await;
        assert_eq!(answer.status(), StatusCode::UNAUTHORIZED);
        assert_eq!(answer.headers()["connection"], "close");
        let closed = soon("the connection's end", stranger.driver).await;
        closed.unwrap();
    }
    assert_eq!(bed.judge.count(), 1, "a bad token costs one review");
    assert_eq!(bed.refused(Reason::Unauthenticated), 5);
}

#[tokio::test]
async fn whoever_may_gets_what_the_node_answers_and_whoever_may_not_is_told_what_is_missing() {
    let bed = Bed::start().await;
    let (_edge, _stop) = bed.device().await;
    let (status, words) = bed.as_user("jane").await.get("/containerLogs/a/b/c").await;
    assert_eq!(status, StatusCode::FORBIDDEN);
    let want = "Forbidden (user=jane, verb=get, resource=nodes, subresource(s)=[proxy])\n";
    assert_eq!(words, want);
    let mut admin = bed.as_user("admin").await;
    assert_eq!(
        admin.get("/pods").await,
        (StatusCode::OK, "{\"items\":[]}".into())
    );
    let asked = bed.judge.count();
    assert_eq!(admin.get("/pods").await.0, StatusCode::OK);
    assert_eq!(bed.judge.count(), asked, "a decision holds for a while");
    bed.all_closed().await;
    let numbers = bed.metrics.numbers();
    assert_eq!(numbers.opened, [("pods", 2)].into());
    assert_eq!(numbers.back, 24);
}

#[tokio::test]
async fn a_token_speaks_for_its_user_also_beside_a_wrong_certificate() {
    let bed = Bed::start().await;
    let (_edge, _stop) = bed.device().await;
    let forged = ClientRoot::new().client("admin", &[]);
    let mut scraper = bed.connect(Some(forged)).await;
    let request = |path: &str| Request::get(path).header("authorization", "Bearer good");
    let answer = scraper.send(request("/metrics/resource")).await;
    assert_eq!(answer.status(), StatusCode::OK);
    drop(answer.into_body().collect().await);
    assert_eq!(
        scraper.send(request("/pods")).await.status(),
        StatusCode::FORBIDDEN
    );
    let asked = bed.judge.asked.lock().unwrap().clone();
    let kinds: Vec<_> = asked.iter().map(|r| r["kind"].as_str().unwrap()).collect();
    let review = "SubjectAccessReview";
    assert_eq!(kinds, ["TokenReview", review, review, review]);
    assert_eq!(asked[1]["spec"]["extra"]["k"], json!(["v"]));
    let finer: Vec<_> = asked[2..]
        .iter()
        .map(|r| &r["spec"]["resourceAttributes"]["subresource"])
        .collect();
    assert_eq!(finer, ["pods", "proxy"]);
}

#[tokio::test]
async fn an_exec_needs_create_whatever_its_method_is() {
    let bed = Bed::start().await;
    let (_edge, _stop) = bed.device().await;
    let mut reader = bed.as_user("reader").await;
    let (status, words) = reader
        .get("/exec/default/web-0/main?command=id&output=1")
        .await;
    assert_eq!(status, StatusCode::FORBIDDEN);
    assert!(words.contains("verb=create"), "{words}");
    let logs = reader
        .send(Request::get("/containerLogs/default/web-0/main"))
        .await;
    assert_eq!(logs.status(), StatusCode::OK);
}

#[tokio::test]
async fn an_api_server_out_of_reach_lets_nobody_in() {
    let bed = Bed::start().await;
    let (_edge, _stop) = bed.device().await;
    *bed.judge.down.lock().unwrap() = true;
    let (status, words) = bed.as_user("admin").await.get("/pods").await;
    assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR);
    assert!(words.contains("could not be asked"), "{words}");
    let request = Request::get("/pods").header("authorization", "Bearer good");
    let answer = bed.connect(None).await.send(request).await;
    assert_eq!(answer.status(), StatusCode::INTERNAL_SERVER_ERROR);
    // It is back: nothing of that was kept.
    *bed.judge.down.lock().unwrap() = false;
    assert_eq!(
        bed.as_user("admin").await.get("/pods").await.0,
        StatusCode::OK
    );
}

#[tokio::test]
async fn unknown_paths_and_absent_nodes_get_words() {
    let bed = Bed::start().await;
    let mut admin = bed.as_user("admin").await;
    assert_eq!(admin.get("/debug/pprof/").await.0, StatusCode::NOT_FOUND);
    let (status, words) = admin.get("/pods").await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(words.starts_with("node shop-7 is not connected"), "{words}");
    assert_eq!(bed.refused(Reason::NotConnected), 1);
}

#[tokio::test]
async fn only_what_is_the_edges_business_crosses() {
    let bed = Bed::start().await;
    let (mut edge, _stop) = bed.device().await;
    let request = Request::get("/pods?a=b")
        .header("authorization", "Bearer hunter2")
        .header("cookie", "secret=1")
        .header("x-forwarded-for", "192.0.2.1")
        .header("accept", "application/json")
        .header("host", "api.example");
    let answer = bed.as_user("admin").await.send(request).await;
    assert!(!answer.headers().contains_key("set-cookie"));
    assert_eq!(answer.headers()["content-type"], "application/json");
    let (method, uri, headers, principal) = edge.asked.recv().await.unwrap();
    assert_eq!(
        (method, &*uri, &*principal),
        (Method::GET, "/pods?a=b", "admin")
    );
    let mut names: Vec<_> = headers.keys().map(|k| k.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["accept", "host"]);
    assert_eq!(headers["host"], "shop-7");
}

#[tokio::test]
async fn an_exec_is_spliced_and_ends_at_the_device_when_its_asker_goes() {
    let bed = Bed::start().await;
    let (edge, _stop) = bed.device().await;
    let mut admin = bed.as_user("admin").await;
    let mut answer = admin.send(exec()).await;
    assert_eq!(answer.status(), StatusCode::SWITCHING_PROTOCOLS);
    assert_eq!(
        answer.headers()["x-stream-protocol-version"],
        "v5.channel.k8s.io"
    );
    let upgraded = hyper::upgrade::on(&mut answer).await.unwrap();
    let mut stream = TokioIo::new(upgraded);
    stream.write_all(b"hello\0\xff").await.unwrap();
    let mut echoed = [0; 7];
    soon("the echo", stream.read_exact(&mut echoed))
        .await
        .unwrap();
    assert_eq!(&echoed, b"hello\0\xff");
    assert_eq!(bed.metrics.numbers().open, 1);
    let left = std::time::Instant::now();
    drop((stream, admin));
    soon("the end at the device", edge.ended.notified()).await;
    assert!(
        left.elapsed() < Duration::from_secs(1),
        "{:?}",
        left.elapsed()
    );
    bed.all_closed().await;
    let numbers = bed.metrics.numbers();
    assert_eq!((numbers.there, numbers.back), (7, 7));
}

#[tokio::test]
async fn a_silent_log_ends_at_the_device_when_its_reader_goes() {
    let bed = Bed::start().await;
    let (edge, _stop) = bed.device().await;
    let mut admin = bed.as_user("admin").await;
    let mut answer = admin
        .send(Request::get("/containerLogs/a/b/c?follow=true"))
        .await;
    let frame = soon("the first line", answer.body_mut().frame()).await;
    assert_eq!(frame.unwrap().unwrap().into_data().unwrap(), "line\n");
    let left = std::time::Instant::now();
    drop((answer, admin));
    soon("the end at the device", edge.ended.notified()).await;
    assert!(
        left.elapsed() < Duration::from_secs(1),
        "{:?}",
        left.elapsed()
    );
    bed.all_closed().await;
}

#[tokio::test]
async fn a_session_that_ends_takes_its_tunnels_along() {
    let bed = Bed::start().await;
    let (edge, _stop) = bed.device().await;
    let mut admin = bed.as_user("admin").await;
    let mut answer = admin.send(exec()).await;
    let mut stream = TokioIo::new(hyper::upgrade::on(&mut answer).await.unwrap());
    edge.connection.close(0, "the device goes");
    let mut rest = Vec::new();
    // Cut or closed, but at once.
    let _ = soon("the end at the asker", stream.read_to_end(&mut rest)).await;
    bed.all_closed().await;
}

#[tokio::test]
async fn a_node_has_so_many_tunnels_and_one_more_gets_words() {
    let bed = Bed::start().await;
    let (_edge, _stop) = bed.device().await;
    let mut open = Vec::new();
    for _ in 0..64 {
        let mut admin = bed.as_user("admin").await;
        let mut answer = admin.send(exec()).await;
        assert_eq!(answer.status(), StatusCode::SWITCHING_PROTOCOLS);
        open.push((hyper::upgrade::on(&mut answer).await.unwrap(), admin));
    }
    let answer = bed.as_user("admin").await.send(exec()).await;
    assert_eq!(answer.status(), StatusCode::TOO_MANY_REQUESTS);
    assert!(answer.headers().contains_key("retry-after"));
    drop(open);
    bed.all_closed().await;
    let answer = bed.as_user("admin").await.send(exec()).await;
    assert_eq!(answer.status(), StatusCode::SWITCHING_PROTOCOLS);
}

#[tokio::test]
async fn a_client_that_does_not_believe_the_certificate_is_noticed() {
    let bed = Bed::start().await;
    let mut roots = RootCertStore::empty();
    let other = Ca::generate(&cluster(), hour()).unwrap();
    roots.add(other.certificate().clone()).unwrap();
    assert!(bed.connect_trusting(roots, None).await.is_err());
    soon("word of it", bed.mistrusted.notified()).await;
    assert_eq!(bed.refused(Reason::Handshake), 1);
}

/// What is logged on this thread.
#[derive(Clone, Default)]
struct Logged(Arc<Mutex<Vec<u8>>>);

impl Logged {
    fn from_now_on() -> (Self, tracing::subscriber::DefaultGuard) {
        let logged = Self::default();
        let sink = logged.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_ansi(false)
            .with_writer(move || sink.clone())
            .finish();
        let guard = tracing::subscriber::set_default(subscriber);
        (logged, guard)
    }

    fn lines(&self, with: &str) -> Vec<String> {
        let all = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        let lines = all.lines().filter(|line| line.contains(with));
        lines.map(ToOwned::to_owned).collect()
    }
}

impl std::io::Write for Logged {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn a_log_of_an_absent_node_is_refused_with_words_that_its_reader_gets() {
    let bed = Bed::start().await;
    let mut admin = bed.as_user("admin").await;
    // The API server hands the words of a 500 on, and of a 503 throws them away.
    let (status, words) = admin.get("/containerLogs/default/web-0/main").await;
    assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR);
    assert!(words.starts_with("node shop-7 is not connected"), "{words}");
    assert_eq!(bed.refused(Reason::NotConnected), 1);
    let (_edge, _stop) = bed.device().await;
    let (status, words) = admin.get("/containerLogs/default/web-0/busy").await;
    assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR);
    assert_eq!(words, "the runtime is away");
}

#[tokio::test]
async fn a_stolen_device_shows_no_page_and_switches_no_protocol_unasked() {
    let bed = Bed::start().await;
    let (device, _stop) = bed.session().await;
    let _device = stolen(device);
    let mut admin = bed.as_user("admin").await;
    let page = admin.send(Request::get("/stats/summary")).await;
    assert_eq!(page.headers()["content-type"], "text/plain; charset=utf-8");
    assert_eq!(page.headers()["x-content-type-options"], "nosniff");
    drop(page.into_body().collect().await);
    let upgrade = |path: &str| {
        Request::get(path)
            .header("connection", "Upgrade")
            .header("upgrade", "SPDY/3.1")
    };
    for request in [
        Request::get("/metrics/probes"),
        upgrade("/metrics/probes"),
        Request::post("/exec/default/web-0/main?command=sh&output=1"),
    ] {
        let mut admin = bed.as_user("admin").await;
        let answer = admin.send(request).await;
        assert_eq!(answer.status(), StatusCode::BAD_GATEWAY);
        let words = answer.into_body().collect().await.unwrap().to_bytes();
        let words = String::from_utf8_lossy(&words);
        assert!(
            words.starts_with("node shop-7 switched protocols"),
            "{words}"
        );
    }
    assert_eq!(bed.refused(Reason::NoAnswer), 3);
}

#[tokio::test]
async fn what_cloudcore_ends_itself_is_counted_and_told_as_that() {
    let (logged, _guard) = Logged::from_now_on();
    let mut bed = Bed::start().await;
    let (_edge, _stop) = bed.device().await;
    let mut admin = bed.as_user("admin").await;
    let mut answer = admin.send(exec()).await;
    let mut stream = TokioIo::new(hyper::upgrade::on(&mut answer).await.unwrap());
    stream.write_all(b"hello\0\xff").await.unwrap();
    soon("the echo", stream.read_exact(&mut [0; 7]))
        .await
        .unwrap();
    let mut reader = bed.as_user("admin").await;
    let mut log = reader
        .send(Request::get("/containerLogs/a/b/c?follow=true"))
        .await;
    soon("the first line", log.body_mut().frame()).await;
    // The endpoint is released, or the process stops.
    bed.task = AbortOnDropHandle::new(tokio::spawn(async {}));
    bed.all_closed().await;
    let numbers = bed.metrics.numbers();
    assert_eq!((numbers.there, numbers.back), (7, 12));
    let closed = logged.lines("a tunnel closed");
    assert_eq!(closed.len(), 2, "{closed:?}");
    for line in &closed {
        assert!(line.contains("cloudcore closed the endpoint"), "{line}");
    }
    assert_eq!(logged.lines("bytes_there=7 bytes_back=7").len(), 1);
    drop((stream, log));
}

#[tokio::test]
async fn whoever_asks_nothing_loses_the_connection_soon() {
    let bed = Bed::start().await;
    let silent = bed.connect(None).await;
    let mut known = bed.as_user("admin").await;
    assert_eq!(known.get("/debug/pprof/").await.0, StatusCode::NOT_FOUND);
    tokio::time::pause();
    let begun = tokio::time::Instant::now();
    silent.driver.await.unwrap();
    let lived = begun.elapsed();
    assert!(lived <= Duration::from_secs(11), "{lived:?}");
    tokio::time::sleep(Duration::from_secs(30)).await;
    tokio::time::resume();
    assert_eq!(known.get("/debug/pprof/").await.0, StatusCode::NOT_FOUND);
    assert_eq!(bed.refused(Reason::Unauthenticated), 1);
}

#[tokio::test]
async fn a_full_endpoint_is_told_once() {
    let (logged, _guard) = Logged::from_now_on();
    let bed = Bed::start().await;
    let mut held = Vec::new();
    for _ in 0..130 {
        held.push(TcpStream::connect(bed.address).await.unwrap());
    }
    soon("the warning", async {
        while logged.lines("has all connections").is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    let warned = logged.lines("has all connections");
    assert_eq!(warned.len(), 1, "{warned:?}");
    assert!(warned[0].contains("WARN") && warned[0].contains("node=shop-7"));
}
