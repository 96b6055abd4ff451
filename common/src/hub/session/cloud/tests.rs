use super::*;
use crate::object::Object;

/// A ConfigMap whose watch is ahead of another's, so that its kind's mark is below its revision.
struct View {
    objects: BTreeMap<ObjectKey, (Object, u64)>,
    mark: u64,
}

impl View {
    fn new(mark: u64) -> Self {
        Self {
            objects: BTreeMap::new(),
            mark,
        }
    }

    fn hold(&mut self, name: &str, revision: u64) {
        let key = ObjectKey::named(Kind::ConfigMap, "d", name);
        let object = Object::present(key.clone(), format!("{name} at {revision}").into_bytes());
        self.objects.insert(key, (object, revision));
    }
}

impl CloudView for View {
    fn epoch(&self) -> [u8; 16] {
        [1; 16]
    }
    fn marks(&self) -> Marks {
        [(Kind::ConfigMap, self.mark)].into()
    }
    fn revision(&self, key: &ObjectKey) -> u64 {
        self.objects.get(key).map_or(0, |(_, revision)| *revision)
    }
    fn each(&self, visit: &mut dyn FnMut(&ObjectKey, &ContentHash)) {
        self.objects
            .iter()
            .for_each(|(k, (o, _))| visit(k, &o.hash));
    }
    fn hash(&self, key: &ObjectKey) -> Option<ContentHash> {
        self.objects.get(key).map(|(o, _)| o.hash)
    }
    fn put(&self, key: &ObjectKey, _: Option<ContentHash>) -> Option<proto::Put> {
        let (object, _) = self.objects.get(key)?;
        let Content::Present(bytes) = &object.content else {
            return Some(proto::Put {
                key: key.to_string(),
                hash: object.hash.0.to_vec(),
                absent: true,
                ..Default::default()
            });
        };
        Some(proto::Put {
            key: key.to_string(),
            hash: object.hash.0.to_vec(),
            payload: bytes.to_vec(),
            size: bytes.len() as u32,
            ..Default::default()
        })
    }
    fn may_remove(&self, _: &ObjectKey) -> bool {
        true
    }
    fn complete(&self) -> bool {
        true
    }
    fn report_base(&self, _: &ObjectKey) -> Option<(ContentHash, Arc<[u8]>)> {
        None
    }
    fn reports_held(&self, _: &[u8; 16]) -> Digest {
        Digest::default()
    }
}

fn message(body: Body) -> proto::Message {
    proto::Message { body: Some(body) }
}

fn welcomed(view: &View) -> CloudSession {
    let mut session = CloudSession::default();
    let hello = proto::Hello {
        version: PROTOCOL_VERSION,
        incarnation: vec![1; 16],
        epoch: vec![1; 16],
        ..Default::default()
    };
    session.handle(message(Body::Hello(hello)), view).unwrap();
    session.welcome(proto::Welcome::default());
    session
}

fn live(view: &View) -> CloudSession {
    let mut session = welcomed(view);
    let ack = Body::WelcomeAck(proto::WelcomeAck {});
    session.handle(message(ack), view).unwrap();
    session
}

fn batches(session: &mut CloudSession) -> Vec<proto::Batch> {
    let mut all = Vec::new();
    while let Some((_, message)) = session.poll_message() {
        if let Some(Body::Batch(batch)) = message.body {
            all.push(batch);
        }
    }
    all
}

fn events(session: &mut CloudSession) -> Vec<CloudEvent> {
    std::iter::from_fn(|| session.poll_event()).collect()
}

fn acked(batch: &proto::Batch, view: &View, unusable: Vec<String>) -> proto::Message {
    message(Body::BatchAck(proto::BatchAck {
        sequence: batch.sequence,
        desired: Some(digest_of(view).into()),
        unusable,
        ..Default::default()
    }))
}

#[test]
fn a_batch_is_marked_no_lower_than_what_it_carries() {
    let mut view = View::new(300);
    view.hold("ahead", 500);
    let mut session = live(&view);
    let mark = |batch: &proto::Batch| batch.marks[0].revision;
    let first = batches(&mut session);
    assert_eq!(first.iter().map(mark).collect::<Vec<_>>(), [500]);
    session
        .handle(acked(&first[0], &view, Vec::new()), &view)
        .unwrap();
    // Another object whose revision is below: what was acknowledged holds on, and is left out.
    view.hold("behind", 310);
    view.mark = 305;
    session.pump(&view);
    let second = batches(&mut session);
    let says_nothing = |b: &proto::Batch| b.epoch.is_empty() && b.marks.is_empty();
    assert!(second.iter().all(says_nothing) && !second.is_empty());
    let behind = |e: &CloudEvent| matches!(e, CloudEvent::Behind { .. });
    assert!(!events(&mut session).iter().any(behind));
    // The view itself went back: nothing is sent.
    let ack = acked(&second[0], &view, Vec::new());
    view.hold("behind", 200);
    view.mark = 200;
    session.handle(ack, &view).unwrap();
    assert!(batches(&mut session).is_empty());
    let told = events(&mut session);
    assert!(told.iter().any(behind), "{told:?}");
}

#[test]
fn what_is_refused_whole_is_not_sent_in_a_loop() {
    let mut view = View::new(1);
    view.hold("a", 1);
    let mut session = live(&view);
    let key = view.objects.keys().next().unwrap().to_string();
    for _ in 0..2 {
        let batch = batches(&mut session).remove(0);
        assert_eq!(batch.puts.len(), 1);
        session
            .handle(acked(&batch, &view, vec![key.clone()]), &view)
            .unwrap();
    }
    assert!(batches(&mut session).is_empty());
    let disagreed = |e: &CloudEvent| matches!(e, CloudEvent::Disagreed);
    assert_eq!(
        events(&mut session).iter().filter(|e| disagreed(e)).count(),
        1
    );
    session.resume(&view);
    assert_eq!(batches(&mut session).len(), 1);
}

#[test]
fn a_digest_that_never_comes_out_is_not_asked_for_in_a_loop() {
    let view = View::new(1);
    let mut session = live(&view);
    let mut rounds = 0;
    while let Some(batch) = batches(&mut session).pop() {
        rounds += 1;
        assert!(rounds < 5, "it goes on for ever");
        let ack = proto::BatchAck {
            sequence: batch.sequence,
            desired: Some(proto::SetDigest {
                count: 7,
                root: vec![7; 16],
            }),
            ..Default::default()
        };
        session.handle(message(Body::BatchAck(ack)), &view).unwrap();
        let inventory = proto::Inventory {
            last: true,
            ..Default::default()
        };
        session
            .handle(message(Body::Inventory(inventory)), &view)
            .unwrap();
    }
    assert_eq!(rounds, 2);
    session.resume(&view);
    assert_eq!(batches(&mut session).len(), 1);
}

#[test]
fn reports_are_refused_by_what_they_claim_to_be() {
    let view = View::new(1);
    let report = |size: usize| proto::Report {
        key: "Pod/d/p/u".into(),
        sequence: 9,
        size: size as u32,
        ..Default::default()
    };
    let reports = |reports| message(Body::Reports(proto::Reports { reports }));
    let mut session = live(&view);
    let large = reports(vec![report(MAX_REPORT + 1)]);
    session.handle(large, &view).unwrap();
    let told = events(&mut session);
    assert!(matches!(told.last(), Some(CloudEvent::TooLarge { bytes, .. }) if *bytes > MAX_REPORT));
    let ack = std::iter::from_fn(|| session.poll_message())
        .last()
        .unwrap()
        .1;
    assert!(matches!(ack.body, Some(Body::ReportAcks(a)) if a.acks[0].sequence == 9));
    // A thousand bombs of 256 KiB in a frame of some kilobytes.
    let bombs = reports(vec![report(MAX_REPORT); 1000]);
    assert!(matches!(
        session.handle(bombs, &view),
        Err(ProtocolError::TooMuch(_))
    ));
}

#[test]
fn an_acknowledgement_never_overtakes_the_welcome() {
    let view = View::new(1);
    let mut session = welcomed(&view);
    let key = ObjectKey::pod("d", "p", "u");
    session.ack_reports([(key, 3, false)]);
    session.ack_events(7);
    let said = std::iter::from_fn(|| session.poll_message());
    assert!(said.count() <= 1, "more than the Welcome");
    let committed = message(Body::WelcomeAck(proto::WelcomeAck {}));
    session.handle(committed, &view).unwrap();
    let said: Vec<_> = std::iter::from_fn(|| session.poll_message()).collect();
    let acks = |body: &Option<Body>| matches!(body, Some(Body::ReportAcks(_) | Body::EventsAck(_)));
    assert_eq!(said.iter().filter(|(_, m)| acks(&m.body)).count(), 2);
}

#[test]
fn what_overtakes_the_acknowledgement_is_bounded_in_bytes() {
    let view = View::new(1);
    let mut session = welcomed(&view);
    let large = || {
        message(Body::Reports(proto::Reports {
            reports: vec![proto::Report {
                payload: vec![0; 900 << 10],
                ..Default::default()
            }],
        }))
    };
    session.handle(large(), &view).unwrap();
    session.handle(large(), &view).unwrap();
    assert!(session.handle(large(), &view).is_err());
}

#[test]
fn a_batch_of_names_alone_is_bounded_as_well() {
    let mut view = View::new(1);
    for n in 0..10_000 {
        let key = ObjectKey::named(
            Kind::Secret,
            "shop",
            &format!("the-name-of-a-secret-{n:05}"),
        );
        view.objects.insert(key.clone(), (Object::absent(key), 1));
    }
    let mut session = live(&view);
    let mut rounds = 0;
    for phase in 0..2 {
        loop {
            let sent = batches(&mut session);
            let Some(batch) = sent.first() else { break };
            assert!(sent.iter().all(|b| b.encoded_len() < 2 * BATCH_BYTES));
            rounds += 1;
            let ack = acked(batch, &view, Vec::new());
            session.handle(ack, &view).unwrap();
        }
        assert!(rounds > 5 * (phase + 1), "{rounds}");
        view.objects.clear();
        session.pump(&view);
    }
}
