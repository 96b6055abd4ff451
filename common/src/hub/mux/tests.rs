//! The mux alone: two ends and a pipe between them that a test pumps by hand.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use super::halves::SEND_BUFFER;
use super::*;

struct Pair {
    a: Mux,
    b: Mux,
}

fn pair() -> Pair {
    Pair {
        a: Mux::new(Side::Dialler, 8, 8),
        b: Mux::new(Side::Listener, 8, 8),
    }
}

impl Pair {
    /// Moves messages until neither end has any; each is within its bound.
    fn pump(&mut self) {
        while step(&mut self.a, &mut self.b) | step(&mut self.b, &mut self.a) {}
    }
}

fn step(from: &mut Mux, to: &mut Mux) -> bool {
    match from.transmit() {
        Some(message) => {
            assert!(message.len() <= MAX_MESSAGE, "{}", message.len());
            to.receive(message).expect("no violation between two of us");
            true
        }
        None => {
            assert!(!from.has_output(), "promised something to send");
            false
        }
    }
}

fn events(mux: &mut Mux) -> Vec<Event> {
    std::iter::from_fn(|| mux.next_event()).collect()
}

fn write(mux: &mut Mux, id: u32, length: usize) -> usize {
    let mut bytes = Bytes::from(vec![5; length]);
    mux.write(id, &mut bytes).expect("open");
    length - bytes.len()
}

fn read(mux: &mut Mux, id: u32) -> usize {
    let mut total = 0;
    loop {
        match mux.read(id, usize::MAX) {
            Ok(Read::Bytes(bytes)) => total += bytes.len(),
            Ok(Read::Blocked | Read::End) => return total,
            Err(end) => panic!("{end:?}"),
        }
    }
}

/// A message in hex, for the snapshots.
fn hex(message: Option<Bytes>) -> String {
    let bytes = message.expect("a message");
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[test]
fn a_conversation_keeps_its_bytes() {
    let Pair { mut a, mut b } = pair();
    let id = a.open(Class::Status).expect("room");
    a.write(id, &mut Bytes::from_static(b"hi")).expect("open");
    a.finish(id);
    // open 1 status | data 1, 2 bytes | fin 1
    assert_eq!(hex(a.transmit()), ["010101", "0201026869", "0301"].concat());
    assert_eq!(a.transmit(), None);
    b.receive(Bytes::from_static(b"\x01\x01\x01\x02\x01\x02hi\x03\x01"))
        .expect("fine");
    assert_eq!(events(&mut b), [Event::Incoming]);
    assert_eq!(b.accept(), Some((1, Class::Status)));
    assert_eq!(b.read(1, 10), Ok(Read::Bytes(Bytes::from_static(b"hi"))));
    assert_eq!(b.read(1, 10), Ok(Read::End));
    b.reset(1, 9);
    b.ping(4);
    // ping 4 | reset 1 code 9
    assert_eq!(hex(b.transmit()), ["0704", "040109"].concat());
    b.close(2, "done");
    // close 2 "done"; nothing follows it
    assert_eq!(hex(b.transmit()), ["090204", "646f6e65"].concat());
    b.ping(5);
    assert_eq!((b.transmit(), b.has_output()), (None, false));
}

#[test]
fn a_reader_that_takes_nothing_stops_its_writer_and_no_other() {
    let mut p = pair();
    let slow = p.a.open(Class::Bulk).expect("room");
    let quick = p.a.open(Class::Bulk).expect("room");
    let mut written = 0;
    loop {
        let took = write(&mut p.a, slow, 100_000);
        written += took;
        p.pump();
        if took == 0 {
            break;
        }
    }
    assert_eq!(
        written,
        INITIAL_WINDOW as usize + SEND_BUFFER,
        "window and send buffer"
    );
    for _ in 0..100 {
        assert_eq!(write(&mut p.a, quick, 10_000), 10_000);
        p.pump();
        assert_eq!(read(&mut p.b, quick), 10_000);
    }
    events(&mut p.a);
    assert_eq!(read(&mut p.b, slow), INITIAL_WINDOW as usize);
    p.pump();
    assert_eq!(
        events(&mut p.a),
        [Event::Writable(slow)],
        "reading sets the writer free"
    );
}

#[test]
fn a_window_grows_in_the_cloud_once_its_reader_took_the_first() {
    let (first, most) = (INITIAL_WINDOW as usize, GROWN_WINDOW as usize);
    for (from_device, windows) in [(true, [first, most, most]), (false, [first, first, first])] {
        let mut p = pair();
        let opener = if from_device { &mut p.a } else { &mut p.b };
        let id = opener.open(Class::Bulk).expect("a place");
        for window in windows {
            loop {
                let writer = if from_device { &mut p.a } else { &mut p.b };
                let took = write(writer, id, 100_000);
                p.pump();
                if took == 0 {
                    break;
                }
            }
            let reader = if from_device { &mut p.b } else { &mut p.a };
            assert_eq!(read(reader, id), window, "from the device: {from_device}");
            p.pump();
        }
    }
}

#[test]
fn what_is_urgent_goes_first_and_equals_take_turns() {
    let Pair { mut a, .. } = pair();
    let bulk = [
        a.open(Class::Bulk).expect("room"),
        a.open(Class::Bulk).expect("room"),
    ];
    let control = a.open(Class::Control).expect("room");
    a.transmit();
    for id in bulk {
        write(&mut a, id, 20_000);
    }
    let streams = |a: &mut Mux| {
        let mut message = a.transmit().expect("output");
        let mut seen = Vec::new();
        while !message.is_empty() {
            if let Frame::Data { stream, .. } = Frame::decode(&mut message).expect("frame") {
                seen.push(stream);
            }
        }
        seen
    };
    assert_eq!(streams(&mut a), [bulk[0]]);
    assert_eq!(streams(&mut a), [bulk[1]]);
    write(&mut a, control, 10);
    assert_eq!(streams(&mut a), [control, bulk[0]]);
    write(&mut a, control, 10_000);
    assert_eq!(streams(&mut a), [control]);
    assert_eq!(streams(&mut a), [control]);
}

#[test]
fn streams_beyond_the_limit_wait_here_and_are_refused_there() {
    let mut p = pair();
    let ids: Vec<_> = (0..8)
        .map(|_| p.a.open(Class::Bulk).expect("room"))
        .collect();
    assert_eq!(p.a.open(Class::Bulk), None);
    p.pump();
    p.a.release_send(ids[0]);
    assert_eq!(events(&mut p.a), []);
    p.a.release_recv(ids[0]);
    assert_eq!(events(&mut p.a), [Event::Slot]);
    assert!(p.a.open(Class::Bulk).is_some());
    // A peer that opens twice as many is told no; its flood is cut off when it does not listen.
    let mut b = Mux::new(Side::Listener, 8, 8);
    let open = |id: u32| {
        let mut out = BytesMut::new();
        let class = Class::Bulk;
        Frame::Open { stream: id, class }.encode(&mut out);
        out.freeze()
    };
    for i in 0..17 {
        b.receive(open(i * 2 + 1)).expect("allowed");
    }
    assert_eq!(b.open_streams(), 16);
    assert_eq!(
        hex(b.transmit()),
        "042101052101",
        "reset 33 code 1, stop 33 code 1"
    );
    let flood = (17..2000).find_map(|i| b.receive(open(i * 2 + 1)).err());
    assert_eq!(flood, Some(Violation::Flood));
}

#[test]
fn what_no_peer_of_ours_does_is_a_violation() {
    let data = |stream: u32, length: usize| Frame::Data {
        stream,
        bytes: vec![0; length].into(),
    };
    let open = |stream: u32| Frame::Open {
        stream,
        class: Class::Bulk,
    };
    let credit = u32::MAX;
    let many: Vec<Frame> = std::iter::once(open(1))
        .chain((0..=INITIAL_WINDOW / 4000).map(|_| data(1, 4000)))
        .collect();
    let table = [
        (vec![open(2)], Violation::OpenOrder(2)),
        (vec![open(0)], Violation::OpenOrder(0)),
        (vec![open(3), open(1)], Violation::OpenOrder(1)),
        (vec![open(3), open(3)], Violation::OpenOrder(3)),
        (vec![data(1, 1)], Violation::NeverOpened(1)),
        (vec![Frame::Fin { stream: 2 }], Violation::NeverOpened(2)),
        (
            vec![Frame::Reset { stream: 0, code: 0 }],
            Violation::NeverOpened(0),
        ),
        (
            vec![open(1), Frame::Window { stream: 1, credit }],
            Violation::CreditOverflow(1),
        ),
        (
            vec![open(1), Frame::Fin { stream: 1 }, data(1, 1)],
            Violation::AfterEnd(1),
        ),
        (many, Violation::OverCredit(1)),
    ];
    for (frames, violation) in table {
        let mut b = Mux::new(Side::Listener, 8, 8);
        let mut result = Ok(());
        for frame in frames {
            assert_eq!(result, Ok(()), "too early");
            let mut out = BytesMut::new();
            frame.encode(&mut out);
            result = b.receive(out.freeze());
        }
        assert_eq!(result, Err(violation));
    }
}

#[test]
fn frames_for_a_stream_that_has_left_are_dropped() {
    let mut p = pair();
    let id = p.a.open(Class::Bulk).expect("room");
    p.pump();
    p.b.accept();
    // Both ends let go at once; what is on its way meets nobody.
    write(&mut p.a, id, 5000);
    p.b.release_send(id);
    p.b.release_recv(id);
    assert_eq!(p.b.open_streams(), 0);
    p.pump();
    p.a.release_send(id);
    p.a.release_recv(id);
    p.pump();
    assert_eq!((p.a.open_streams(), p.b.open_streams()), (0, 0));
}

#[test]
fn a_stop_ends_the_writer_and_wakes_it() {
    let mut p = pair();
    let id = p.a.open(Class::Bulk).expect("room");
    while write(&mut p.a, id, 100_000) > 0 {
        p.pump();
    }
    events(&mut p.a);
    p.b.stop(id, 6);
    p.pump();
    assert_eq!(events(&mut p.a), [Event::Writable(id)]);
    let end = p.a.write(id, &mut Bytes::from_static(b"x"));
    assert_eq!(end, Err(StreamEnd::Stopped(6)));
}

/// xorshift: the same histories on every machine.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    fn next(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        // The high bits: the low ones of a small seed begin alike.
        (self.0 >> 11) % below
    }
}

#[derive(Default)]
struct Flow {
    written: u64,
    read: u64,
    finished: bool,
    /// Cut by either side: only order is then promised.
    cut: bool,
    ended: bool,
}

/// A piece of an endless pattern, begun elsewhere for each stream, so that order and loss show.
fn stretch(id: u32, place: u64, length: usize) -> Bytes {
    static PATTERN: LazyLock<Bytes> =
        LazyLock::new(|| (0..140_000usize).map(|i| (i % 251) as u8).collect());
    let start = ((place + u64::from(id) * 13) % 251) as usize;
    PATTERN.slice(start..start + length)
}

#[test]
fn any_history_of_calls_delivers_every_byte_once_and_in_order() {
    for seed in 1..=400 {
        let mut random = Random::new(seed);
        let mut p = pair();
        // Keyed by (written by a, stream).
        let mut flows: BTreeMap<(bool, u32), Flow> = BTreeMap::new();
        // The streams that b and a have opened or accepted.
        let mut held = [Vec::new(), Vec::new()];
        for _ in 0..600 {
            let by_a = random.next(2) == 0;
            let (me, peer) = if by_a {
                (&mut p.a, &mut p.b)
            } else {
                (&mut p.b, &mut p.a)
            };
            let ids = held[usize::from(by_a)].clone();
            let pick = |random: &mut Random| {
                (!ids.is_empty()).then(|| ids[random.next(ids.len() as u64) as usize])
            };
            match random.next(12) {
                0 => {
                    let class = Class::from_number(random.next(4) as u32);
                    if let Some(id) = me.open(class) {
                        flows.entry((by_a, id)).or_default();
                        held[usize::from(by_a)].push(id);
                    }
                }
                1 => {
                    if let Some((id, _)) = me.accept() {
                        flows.entry((by_a, id)).or_default();
                        held[usize::from(by_a)].push(id);
                    }
                }
                2..5 => {
                    if let Some(id) = pick(&mut random) {
                        let flow = flows.get_mut(&(by_a, id)).expect("picked");
                        let length = random.next(30_000);
                        let mut bytes = stretch(id, flow.written, length as usize);
                        if me.write(id, &mut bytes).is_ok() {
                            flow.written += length - bytes.len() as u64;
                        } else {
                            assert!(
                                flow.finished || flow.cut,
                                "seed {seed}: refused for nothing"
                            );
                        }
                    }
                }
                5..8 => {
                    if let Some(id) = pick(&mut random) {
                        let max = 1 + random.next(40_000) as usize;
                        take(me, id, max, flows.entry((!by_a, id)).or_default(), seed);
                    }
                }
                8 => {
                    if let Some(id) = pick(&mut random) {
                        me.finish(id);
                        flows.get_mut(&(by_a, id)).expect("picked").finished = true;
                    }
                }
                9 => {
                    if let Some(id) = pick(&mut random)
                        && random.next(4) == 0
                    {
                        if random.next(2) == 0 {
                            me.reset(id, 1);
                            flows.get_mut(&(by_a, id)).expect("picked").cut = true;
                        } else {
                            me.stop(id, 1);
                            flows.entry((!by_a, id)).or_default().cut = true;
                        }
                    }
                }
                _pump => {
                    for _ in 0..random.next(6) {
                        step(me, peer);
                    }
                }
            }
        }
        settle(&mut p, &mut flows, seed);
    }
}

fn take(mux: &mut Mux, id: u32, max: usize, flow: &mut Flow, seed: u64) -> bool {
    match mux.read(id, max) {
        Ok(Read::Bytes(bytes)) => {
            assert!(bytes.len() <= max);
            let expected = stretch(id, flow.read, bytes.len());
            assert!(
                bytes == expected,
                "seed {seed} stream {id} at {} of {}",
                flow.read,
                flow.written
            );
            flow.read += bytes.len() as u64;
            true
        }
        Ok(Read::End) => {
            flow.ended = true;
            false
        }
        Ok(Read::Blocked) => false,
        Err(end) => {
            assert!(
                flow.cut,
                "seed {seed}: {id} cut for nothing: {end:?}, {} of {}",
                flow.read, flow.written
            );
            false
        }
    }
}

/// Reads everything out and checks that what was promised arrived.
fn settle(p: &mut Pair, flows: &mut BTreeMap<(bool, u32), Flow>, seed: u64) {
    loop {
        p.pump();
        while let Some((id, _)) = p.a.accept() {
            flows.entry((true, id)).or_default();
        }
        while let Some((id, _)) = p.b.accept() {
            flows.entry((false, id)).or_default();
        }
        let mut moved = false;
        for ((by_a, id), flow) in flows.iter_mut() {
            let reader = if *by_a { &mut p.b } else { &mut p.a };
            moved |= take(reader, *id, usize::MAX, flow, seed);
        }
        if !moved {
            break;
        }
    }
    let known: Vec<_> = flows.keys().copied().collect();
    for (key, flow) in flows.iter() {
        if !flow.cut {
            assert_eq!(flow.read, flow.written, "seed {seed}: {key:?} lost bytes");
            assert_eq!(
                flow.ended, flow.finished,
                "seed {seed}: {key:?} ended wrongly"
            );
        }
    }
    for (by_a, id) in known {
        let writer = if by_a { &mut p.a } else { &mut p.b };
        writer.release_send(id);
        let reader = if by_a { &mut p.b } else { &mut p.a };
        reader.release_recv(id);
    }
    for id in 0..2000 {
        for mux in [&mut p.a, &mut p.b] {
            mux.release_send(id);
            mux.release_recv(id);
        }
    }
    p.pump();
    let left = (p.a.open_streams(), p.b.open_streams());
    assert_eq!(left, (0, 0), "seed {seed}: streams stayed in the table");
}

#[test]
fn noise_is_answered_by_errors_and_never_by_more_memory_than_the_windows() {
    for seed in 1..=300 {
        let mut random = Random::new(seed);
        let mut b = Mux::new(Side::Listener, 8, 8);
        let mut bytes_in = 0;
        for _ in 0..200 {
            let mut out = BytesMut::new();
            for _ in 0..random.next(20) {
                noise(&mut random).encode(&mut out);
            }
            if random.next(10) == 0 && !out.is_empty() {
                let place = random.next(out.len() as u64) as usize;
                out[place] ^= 1 << random.next(8);
            }
            bytes_in += out.len();
            if out.len() > MAX_MESSAGE || b.receive(out.freeze()).is_err() {
                break;
            }
            assert!(b.open_streams() <= 16);
            assert!(
                b.control.len() <= MAX_CONTROL + 64,
                "{} of {bytes_in}",
                b.control.len()
            );
        }
    }
}

fn noise(random: &mut Random) -> Frame {
    let stream = random.next(12) as u32;
    let code = random.next(300) as u32;
    match random.next(9) {
        0 | 1 => Frame::Open {
            stream: stream * 2 + 1,
            class: Class::from_number(code),
        },
        2 | 3 => Frame::Data {
            stream,
            bytes: vec![1; random.next(300) as usize].into(),
        },
        4 => Frame::Fin { stream },
        5 => Frame::Reset { stream, code },
        6 => Frame::Stop { stream, code },
        7 => Frame::Window {
            stream,
            credit: code,
        },
        _ping => Frame::Ping { id: code },
    }
}
